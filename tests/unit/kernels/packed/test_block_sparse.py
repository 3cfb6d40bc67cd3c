"""Block sparsity: the record holds what it was made from, and its products meet the kept blocks only."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.bits import pack_bits
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import fast, has_codes, matmul, reference
from refllm.kernels.packed.records import BlockSparse, from_parts, meta, parts
from refllm.kernels.packed.tiled import form_of, tiles_of
from tests.targets import GENERIC, run_for
from tests.unit.kernels.packed.test_tables import MANY_CASES, bound, check_product, code_weights, rounded, tokens_and
from tests.unit.kernels.packed.test_tiling import int_weight

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 70))
BLOCKS = [(16, 32), (16, 64), (32, 32), (48, 96)]  # which tiles make up
GRIDS = {"S4": (SymmetricGrid, 4, 32), "A4": (AffineGrid, 4, 16), "A8": (AffineGrid, 8, -1)}  # bits, group
FLOATS, CODES = ("float16", "float32"), ("NF4", "FP8_E4M3FN")
PANELS = {"float16", "A4"}  # values whose kernels for many tokens are compiled, too


@MANY_CASES
@given(size=SIZES, block=st.tuples(st.integers(1, 20), st.integers(1, 40)), seed=st.integers(0, 2**16))
def test_every_kept_block_comes_back(size, block, seed):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal(size).astype(np.float32)
    mask = rng.random((-(-size[0] // block[0]), -(-size[1] // block[1]))) < rng.choice([0, 0.4, 1])
    weight = BlockSparse.compress(W, mask, block, "float32")
    expected = np.zeros_like(W)
    for i, j in np.ndindex(size):
        if mask[i // block[0], j // block[1]]:
            expected[i, j] = W[i, j]
    assert weight.shape == size and np.array_equal(weight.mask(), mask)
    assert np.array_equal(weight.dense(), expected)
    ids = rng.integers(0, size[0], 5)
    assert np.array_equal(weight.rows(ids), expected[ids]) and np.array_equal(weight.rows(slice(1, 3)), expected[1:3])
    assert weight.nbytes == mask.sum() * block[0] * block[1] * 4 + len(mask) * -(-mask.shape[1] // 8)
    again = from_parts("blocks", parts(weight), meta(weight))
    assert np.array_equal(again.dense(), expected)
    found = BlockSparse.compress(expected, None, block, "float32")  # without a mask: the blocks that are not zero
    assert np.array_equal(found.dense(), expected)


@st.composite
def kept_blocks(draw, values):
    block = draw(st.sampled_from(BLOCKS))
    rows, across, seed = draw(st.integers(1, 70)), draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    mask = rng.random((-(-rows // block[0]), across)) < draw(st.sampled_from([0.2, 0.6, 1]))
    mask[draw(st.integers(0, len(mask) - 1)), 0] = True  # of other rows there may be none
    shape = int(mask.sum()) * block[0], block[1]
    if values in FLOATS:
        stored = rng.standard_normal(shape) * 10.0 ** rng.integers(-7, 4, (shape[0], 1))
        stored[rng.random(shape) < 0.1] = -0.0
        stored = stored.astype(values)
    elif values in GRIDS:
        grid, bits, group = GRIDS[values]
        stored = int_weight(grid(bits, group), *shape, seed, draw(st.booleans()))
    else:
        stored = draw(code_weights(values, shape[1], rows=shape[0]))
    return BlockSparse(stored, pack_bits(mask.astype(np.uint8), 1), rows, across * block[1], *block)


@pytest.mark.parametrize("values", [*FLOATS, *GRIDS, *CODES])
@MANY_CASES
@given(data=st.data())
def test_products_within_the_bound(values, data):
    weight = data.draw(kept_blocks(values))
    x = data.draw(tokens_and(weight.columns, values in PANELS))
    assert tiles_of(weight).form.layout == "blocks"
    with np.errstate(all="ignore"):
        W = weight.dense()
    largest = float(np.abs(W).max())
    check_product(lambda x: fast.matmul_float(x, weight), x, W, largest)
    assert has_codes(weight) == (values in GRIDS)
    if values in GRIDS:
        seen = rounded(x)
        with np.errstate(all="ignore"):
            y = fast.matmul_int8(x, weight)
            exact = seen.astype(np.float64) @ W.T.astype(np.float64)
            text = reference.matmul_int8(x, weight)
        assert np.array_equal(y, text, equal_nan=True)
        assert np.array_equal(y[:3], fast.matmul_int8(x[:3], weight), equal_nan=True)
        assert (np.abs(y - exact) <= bound(seen, W, largest)).all()


def whole(values, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 4)) < 0.5
    mask[0] = np.arange(4) % 2
    grid, bits, group = GRIDS[values]
    inner = int_weight(grid(bits, group), int(mask.sum()) * 16, 32, seed)
    inner = replace(inner, scale=np.ones_like(inner.scale))
    return BlockSparse(inner, pack_bits(mask.astype(np.uint8), 1), 40, 128, 16, 32)


def check_whole_numbers(values, seed):
    weight, rng = whole(values, seed), np.random.default_rng(seed)
    x = rng.integers(-127, 128, (13 if values in PANELS else 3, 128)).astype(np.float32)
    x[:, 0] = 127
    exact = x.astype(np.int64) @ weight.dense().T.astype(np.int64)
    for product in (fast.matmul_int8, fast.matmul_float):
        assert np.array_equal(product(x, weight), exact)
        assert np.array_equal(product(x[:1], weight), exact[:1])


@pytest.mark.parametrize("values", GRIDS)
@MANY_CASES
@given(seed=st.integers(0, 2**16))
def test_whole_numbers_are_exact(values, seed):
    check_whole_numbers(values, seed)


@pytest.mark.parametrize("product", [fast.matmul_float, fast.matmul_int8])
def test_not_a_number_poisons_its_token_and_threads_change_nothing(product, monkeypatch):
    monkeypatch.setattr("refllm.kernels.packed.threads.MINIMUM_WORK", 1)
    weight, x = whole("A4", 1), np.random.default_rng(0).standard_normal((30, 128), np.float32)
    clean = product(x, weight)
    for threads in ("1", "3"):
        monkeypatch.setenv("REFLLM_THREADS", threads)
        assert np.array_equal(product(x, weight), clean)
    for column in (3, 37, 127):  # in blocks that some rows leave out
        spoilt = x.copy()
        spoilt[1, column] = np.nan
        y = product(spoilt, weight)
        assert np.isnan(y[1]).all() and np.array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize("size, block", [((40, 100), (16, 32)), ((20, 48), (4, 8)), ((40, 96), (16, 16))])
def test_other_blocks_and_none_at_all_go_through_decoded_rows(size, block):
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal(size).astype(np.float32), rng.standard_normal((5, size[1]), np.float32)
    mask = rng.random((-(-size[0] // block[0]), -(-size[1] // block[1]))) < 0.5
    for kept in (mask, np.zeros_like(mask)):
        weight = BlockSparse.compress(W, kept, block)
        assert form_of(weight) is None
        assert np.allclose(matmul(x, weight), reference.matmul_float(x, weight), rtol=1e-5, atol=1e-5)
    assert form_of(BlockSparse.compress(np.ones((32, 64)), np.zeros((2, 2)))) is None


GOOD = BlockSparse.compress(np.ones((20, 40), np.float32), None, (16, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": GOOD.values[:-1]}, r"values must be .* \(64, 32\)"),
        ({"values": GOOD.values.astype(np.float64)}, "values must be float16 or float32"),
        ({"values": np.where(GOOD.values == 1, np.float16(np.nan), GOOD.values)}, "NaN"),
        ({"bitmap": GOOD.bitmap[:1]}, "bitmap must be"),
        ({"bitmap": np.full((2, 1), 7, np.uint8)}, "not zero"),
        ({"block_rows": 0}, "at least 1"),
        ({"out": 0}, "at least 1"),
        ({"columns": 0}, "columns"),
        ({"columns": 90}, "not zero|values must be|bitmap"),
    ],
)
def test_refusals(changes, message):
    if changes.get("columns"):
        changes = changes | {"values": GOOD.values[:-16]}
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **changes)


def test_compress_refuses():
    for call in (
        lambda: BlockSparse.compress(np.ones(4), None),
        lambda: BlockSparse.compress(np.ones((4, 4)), np.ones((2, 2)), (4, 4)),
        lambda: BlockSparse.compress(np.ones((4, 4)), None, (0, 4)),
        lambda: BlockSparse.compress(np.full((4, 4), 1e9), None, (4, 4)),
    ):
        with pytest.raises(ValueError, match=r"must be|needs a mask|too large"):
            call()


def test_without_wide_vectors():
    run_for(GENERIC, "from tests.unit.kernels.packed.test_block_sparse import *\ncheck_whole_numbers('A4', 3)")
