"""Products of weights that never become dense rows, against the records' own numbers.

2:4, bitmasks, kept blocks, factors in float16.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.bits import pack_bits
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import fast, matmul, reference
from refllm.kernels.packed.records import CodeWeight, LowRank, Sparse24, SparseBitmask
from refllm.kernels.packed.tiled import form_of, tiles_of
from tests.strategies import gamma
from tests.targets import AVX, AVX2, GENERIC, run_for
from tests.unit.kernels.packed.test_fast import random_blocks
from tests.unit.kernels.packed.test_tables import MANY_CASES, bound, check_product, code_weights, rounded, tokens_and
from tests.unit.kernels.packed.test_tiling import int_weight

PAIRS = np.array([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], np.uint8)  # the ways to keep two of four
GRIDS = {  # bits, groups
    "S3": (SymmetricGrid, 3, (-1, 0)),
    "S4": (SymmetricGrid, 4, (-1, 32, 64)),
    "A4": (AffineGrid, 4, (16,)),
    "A8": (AffineGrid, 8, (-1, 0, 32)),
}
FLOATS, CODES = ("float16", "float32"), ("NF4", "FP8_E4M3FN")
PANELS = {"float16", "S4", "A4"}  # values whose kernels for many tokens are compiled, too


@st.composite
def two_of_four(draw, values, columns):
    """Values (or codes) of a kind for any columns of each four, or always the same two."""
    rows, seed = draw(st.integers(1, 18)), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    kept = columns // 2
    if values in FLOATS:
        stored = rng.standard_normal((rows, kept)) * 10.0 ** rng.integers(-7, 4, (rows, 1))
        stored[rng.random(stored.shape) < 0.1] = -0.0
        stored = stored.astype(values)
    elif values in GRIDS:
        grid, bits, groups = GRIDS[values]
        groups = [g for g in groups if g < 1 or kept % g == 0] or [-1]
        stored = int_weight(grid(bits, draw(st.sampled_from(groups))), rows, kept, seed, draw(st.booleans()))
    else:
        stored = draw(code_weights(values, kept))
        rows = len(stored.codes)
    nibbles = PAIRS[rng.integers(0, 6, (rows, columns // 4))]
    if draw(st.booleans()):
        nibbles[:] = draw(st.sampled_from(list(PAIRS)))
    return Sparse24(stored, pack_bits(nibbles, 4), columns)


@pytest.mark.parametrize("values", [*FLOATS, *GRIDS, *CODES])
@MANY_CASES
@given(data=st.data(), columns=st.sampled_from([4, 28, 32, 36, 64, 96, 100, 128]))
def test_2_4_within_the_bound(values, data, columns):
    weight = data.draw(two_of_four(values, columns))
    x = data.draw(tokens_and(columns, values in PANELS))
    assert tiles_of(weight).form.layout == "pairs"
    with np.errstate(all="ignore"):
        W = weight.dense()
    largest = float(np.abs(W).max())
    check_product(lambda x: fast.matmul_float(x, weight), x, W, largest)
    if values in GRIDS:
        x_rounded = rounded(x)
        with np.errstate(all="ignore"):
            y = fast.matmul_int8(x, weight)
            exact = x_rounded.astype(np.float64) @ W.T.astype(np.float64)
            text = reference.matmul_int8(x, weight)
        assert np.array_equal(y, text, equal_nan=True)
        assert np.array_equal(y[:3], fast.matmul_int8(x[:3], weight), equal_nan=True)
        assert (np.abs(y - exact) <= bound(x_rounded, W, largest)).all()


def whole(values, rows, columns, seed, largest=False):
    """2:4 with whole numbers for weights."""
    rng = np.random.default_rng(seed)
    grid, bits, _ = GRIDS[values]
    inner = int_weight(grid(bits, -1), rows, columns // 2, seed, largest)
    inner = replace(inner, scale=np.ones_like(inner.scale))
    return Sparse24(inner, pack_bits(PAIRS[rng.integers(0, 6, (rows, columns // 4))], 4), columns)


def check_whole_numbers(values, rows, columns, seed, largest, tokens=3):
    weight, rng = whole(values, rows, columns, seed, largest), np.random.default_rng(seed)
    x = rng.integers(-127, 128, (tokens, columns)).astype(np.float32)
    x[:, 0] = 127  # so that every token's scale is 1
    if largest:
        x[:] = 127 * rng.choice([-1, 1], (tokens, 1))
    exact = x.astype(np.int64) @ weight.dense().T.astype(np.int64)
    for product in (fast.matmul_int8, fast.matmul_float):
        assert np.array_equal(product(x, weight), exact)
        assert np.array_equal(product(x[:1], weight), exact[:1])


@pytest.mark.parametrize("values", GRIDS)
@MANY_CASES
@given(rows=st.integers(1, 18), quads=st.integers(1, 40), seed=st.integers(0, 2**16), largest=st.booleans())
def test_2_4_whole_numbers_are_exact(values, rows, quads, seed, largest):
    check_whole_numbers(values, rows, 4 * quads, seed, largest, 13 if values in PANELS else 3)


@pytest.mark.parametrize("values", ["float16", "S4"])
@pytest.mark.parametrize("tokens", [2, 13])
def test_not_a_number_poisons_its_token_picked_or_not(values, tokens):
    rng = np.random.default_rng(0)
    weight = whole("S4", 20, 96, 0)
    if values == "float16":
        weight = replace(weight, values=weight.values.dense().astype(np.float16))
    x = rng.standard_normal((tokens, 96), np.float32)
    for product in (fast.matmul_float, fast.matmul_int8):
        clean = product(x, weight)
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = x.copy()
            spoilt[1, 37] = bad
            y = product(spoilt, weight)
            assert not np.isfinite(y[1]).any()
            assert np.array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


def test_2_4_the_same_bits_with_any_number_of_threads(monkeypatch):
    monkeypatch.setattr("refllm.kernels.packed.threads.MINIMUM_WORK", 1)
    weight, x = whole("A4", 100, 96, 0), np.random.default_rng(0).standard_normal((30, 96), np.float32)
    found = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("REFLLM_THREADS", threads)
        found.append((fast.matmul_float(x, weight), fast.matmul_int8(x, weight)))
    assert all(np.array_equal(found[0], other) for other in found[1:])


@st.composite
def bitmasks(draw, dtype):
    """Any rows and columns; of each row nothing, some, all or only its ends kept."""
    rows, columns = draw(st.integers(1, 35)), draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    W = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-7, 4, (rows, 1))
    W[rng.random(W.shape) < 0.1] = -0.0
    mask = rng.random(W.shape) < rng.choice([0, 0.1, 0.5, 0.9, 1], (rows, 1))
    mask[draw(st.integers(0, rows - 1))] = np.arange(columns) % max(1, columns - 1) == 0
    return SparseBitmask.compress(W, mask, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@MANY_CASES
@given(data=st.data())
def test_bitmask_within_the_bound(dtype, data):
    weight = data.draw(bitmasks(dtype))
    W = weight.dense()
    check_product(lambda x: fast.matmul_float(x, weight), data.draw(tokens_and(weight.columns)), W, 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
@MANY_CASES
@given(data=st.data())
def test_bitmask_tiles_hold_the_weight(dtype, data):
    weight = data.draw(bitmasks(dtype))
    tiles, (out, columns) = tiles_of(weight), weight.shape
    assert tiles.values.dtype == dtype and tiles.values.size == weight.values.size + 16
    W = np.zeros((len(tiles.codes) * 16, tiles.blocks * 32), np.float32)
    for tile, block in np.ndindex(tiles.scale.shape):
        at = int(tiles.scale[tile, block])
        masks = tiles.codes[tile, block].view(np.uint16)  # of the rows, one a column
        for column, row in np.argwhere(masks[:, None] >> np.arange(16) & 1):
            W[16 * tile + row, 32 * block + column] = tiles.values[at]
            at += 1
    assert np.array_equal(W[:out, :columns], weight.dense())
    assert not W[out:].any() and not W[:, columns:].any()


def check_bitmask(rows=17, columns=70, tokens=(1, 13)):
    rng = np.random.default_rng(0)
    W, x = rng.integers(-9, 10, (rows, columns)).astype(np.float32), rng.integers(-99, 99, (13, columns))
    for dtype in FLOATS:
        weight = SparseBitmask.compress(W, rng.random(W.shape) < 0.4, dtype)
        exact = x @ weight.dense().T.astype(np.int64)
        for count in tokens:
            assert np.array_equal(fast.matmul_float(x[:count].astype(np.float32), weight), exact[:count])


def test_bitmask_whole_numbers_are_exact():
    check_bitmask()


def test_bitmask_poison_and_threads(monkeypatch):
    monkeypatch.setattr("refllm.kernels.packed.threads.MINIMUM_WORK", 1)
    rng = np.random.default_rng(0)
    weight = SparseBitmask.compress(rng.standard_normal((100, 96)), rng.random((100, 96)) < 0.3)
    x = rng.standard_normal((30, 96), np.float32)
    clean = fast.matmul_float(x, weight)
    for threads in ("1", "3"):
        monkeypatch.setenv("REFLLM_THREADS", threads)
        assert np.array_equal(fast.matmul_float(x, weight), clean)
    for bad in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[1, 37] = bad
        y = fast.matmul_float(spoilt, weight)
        assert not np.isfinite(y[1]).any() and np.array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


@MANY_CASES
@given(data=st.data(), rows=st.integers(1, 35), columns=st.integers(1, 100), seed=st.integers(0, 2**16))
def test_float16_factors_within_the_bound(data, rows, columns, seed):
    rng = np.random.default_rng(seed)
    W = (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-7, 4, (rows, 1))).astype(np.float16)
    W[rng.random(W.shape) < 0.1] = -0.0
    B = LowRank(np.ones((1, rows), np.float32), W).factors[1]
    x = data.draw(tokens_and(columns))
    check_product(lambda x: fast.matmul_float(x, B), x, W.astype(np.float32), 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_low_rank_is_two_products_of_its_factors(dtype):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((40, 7)).astype(dtype), rng.standard_normal((7, 90)).astype(dtype)
    weight, x = LowRank(A, B), rng.standard_normal((13, 90), np.float32)
    if dtype == "float16":
        assert all(tiles_of(factor) is not None for factor in weight.factors)
    y = matmul(x, weight)
    middle = x.astype(np.float64) @ B.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(B).T.astype(np.float64) @ np.abs(A).T.astype(np.float64)
    assert y.dtype == np.float32 and (np.abs(y - middle @ A.T.astype(np.float64)) <= gamma(90 + 7) * size).all()
    assert np.array_equal(y[:2], matmul(x[:2], weight)) or dtype == "float32"  # of float32 BLAS may sum otherwise
    wide = matmul(x.astype(np.float64), weight)
    assert wide.dtype == np.float64 and np.allclose(wide, middle @ A.T.astype(np.float64), rtol=1e-12, atol=1e-12)
    spoilt = x.copy()
    spoilt[1, 3] = np.nan
    assert np.isnan(matmul(spoilt, weight)[1]).all() and np.isfinite(np.delete(matmul(spoilt, weight), 1, 0)).all()


def test_values_without_tiles_are_decoded():
    weight = whole("S4", 5, 96, 0)
    plain = CodeWeight.pack(np.ones((5, 48), np.uint8), np.ones((1, 10), np.float32), "NF4", (0, 24))
    for values in (plain, random_blocks("Q4_K", 5, 1, 0), random_blocks("Q4_1", 5, 2, 0)):
        columns = 2 * values.shape[1]
        nibbles = np.full((5, columns // 4), 0x4, np.uint8)
        other = replace(weight, values=values, indices=pack_bits(nibbles, 4), columns=columns)
        assert form_of(other) is None
        x = np.random.default_rng(0).standard_normal((3, columns), np.float32)
        assert np.allclose(fast.matmul_float(x, other), reference.matmul_float(x, other), rtol=1e-3, atol=1e-3)


OTHER_TARGETS = """
from tests.unit.kernels.packed.test_sparse_kernels import *
from tests.unit.kernels.packed.test_tables import *
from refllm.kernels.packed import dots
assert dots.byte_shuffle() == SHUFFLE
check_whole_numbers("A8", 17, 100, 0, False, TOKENS)
check_bitmask(tokens=(1,))
rng = np.random.default_rng(0)
W, x = rng.standard_normal((17, 96)).astype(np.float32), rng.standard_normal((3, 96), np.float32)
codes = rng.integers(0, 64, W.shape).astype(np.uint8)
stored = Sparse24(W[:, :48].astype(np.float16), pack_bits(PAIRS[rng.integers(0, 6, (17, 24))], 4), 96)
for weight in (blockwise(W), stored, *(CodeWeight.pack(codes, None, t, (1, 96)) for t in ("FP6_E3M2", DYNAMIC8))):
    check_product(lambda x: fast.matmul_float(x, weight), x, weight.dense())
for name in ("IQ4_NL", "Q1_0"):
    weight = with_scales_of_one(name, 17, 1, 0)
    x = rng.integers(-127, 128, (3, weight.columns)).astype(np.float32)
    x[:, ::32] = 127
    assert np.array_equal(fast.matmul_int8(x, weight), x.astype(np.int64) @ weight.dense().T.astype(np.int64))
"""


@pytest.mark.parametrize(
    ("features", "shuffle", "tokens"),
    [
        pytest.param(AVX2, ("llvm.x86.avx2.pshuf.b", 32), 13, id="avx2"),
        pytest.param(AVX, ("llvm.x86.ssse3.pshuf.b.128", 16), 3, id="avx"),
        pytest.param(GENERIC, None, 3, id="generic"),
    ],
)
def test_look_ups_on_other_targets(features, shuffle, tokens):
    run_for(features, f"SHUFFLE, TOKENS = {shuffle}, {tokens}\n{OTHER_TARGETS}")
