"""Tile products of weights on a table, and of the GGUF types that have one, against the records' own numbers.

Floats keep a bound that follows from the roundings a kernel makes; whole numbers are exact where every step can be.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.formats import blocks
from refllm.formats.dtypes import FORMATS
from refllm.kernels.packed import fast, matmul, reference, tables
from refllm.kernels.packed.activations import round_activations
from refllm.kernels.packed.codes import DYNAMIC8, OWN, scale_shape, table_values
from refllm.kernels.packed.encode_codes import blockwise, fp8_blocks, int8_rows, nvfp4
from refllm.kernels.packed.records import CodeWeight, GGUFBlocks, Sparse24, SparseRows, Sum, TableRows
from refllm.kernels.packed.tiled import form_of, tiles_of
from tests.strategies import PROPERTY, activations, gamma
from tests.unit.kernels.packed.test_fast import random_blocks

MANY_CASES = settings(PROPERTY, max_examples=200)
TYPES = ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0")
TABLES = (
    "NF4", "FP4_BNB", "FP4_E2M1", "FP8_E4M3FN", "FP8_E5M2", "FP8_E4M3FNUZ", "FP8_E5M2FNUZ", "FP6_E2M3", "FP6_E3M2",
    "UE4M3", "INT2", "INT3", "INT4", "INT5", "INT6", "INT7", "INT8", "BINARY", "E8M0", DYNAMIC8,
)  # fmt: skip
# Read as others are but for their numbers: no kernels for many tokens, which differ from those for one in loops only.
FEW_TOKENS = {
    "INT2", "INT3", "INT5", "INT6", "INT7", "FP8_E5M2", "FP8_E4M3FNUZ", "FP8_E5M2FNUZ", "FP6_E2M3", "FP6_E3M2", "UE4M3",
    "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0", "Q1_0",
}  # fmt: skip
LEAST = 2.0**-149  # a float32 below the normal numbers is off by up to half of this


def bound(x, W, scale=1.0):
    """How far a float32 product may be from x W^T.

    A kernel adds the products of 16 columns one after another into each of two sums (16 roundings), adds these (1) and
    multiplies with a scale while it adds up blocks or halves of them (1 each); scales were rounded up to three times,
    rounded activations and the record's own numbers once or twice each. Below the normal numbers every operation may be
    off by LEAST, times what it is multiplied with afterwards.
    """
    x, W = np.abs(x).astype(np.float64), np.abs(W).astype(np.float64)
    steps = 16 + 1 + -(-x.shape[1] // 16) + 8
    slack = x.sum(axis=1)[:, None] + W.sum(axis=1) + x.shape[1] * (1 + scale)
    return gamma(steps) * (x @ W.T) + LEAST * slack


def check_product(product, x, W, scale=1.0):
    """Within the bound; the same bits for one token at a time and for all."""
    with np.errstate(all="ignore"):
        y = product(x)
        assert np.array_equal(y, np.concatenate([product(x[i : i + 1]) for i in range(len(x))]), equal_nan=True)
        assert (np.abs(y - x.astype(np.float64) @ W.T.astype(np.float64)) <= bound(x, W, scale)).all()


def rounded(x, block=0):
    return round_activations(x, block)


def tokens_and(columns, many=True):
    """Enough tokens for a panel, or few that are multiplied one by one; of every kind."""
    return activations(columns, st.integers(4, 14) if many else st.integers(1, 3))


@pytest.mark.parametrize("name", TYPES)
@MANY_CASES
@given(data=st.data(), rows=st.integers(1, 18), count=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_gguf_types_within_the_bound(name, data, rows, count, seed):
    weight = random_blocks(name, rows, count, seed)
    if name == "MXFP4":  # sums that fit a float32
        weight.data[:, ::17] = np.minimum(weight.data[:, ::17], 160)
    x, W = data.draw(tokens_and(weight.columns, name not in FEW_TOKENS)), weight.dense()
    largest = float(np.abs(W).max())
    check_product(lambda x: fast.matmul_float(x, weight), x, W, largest)
    x_rounded = rounded(x, reference.activation_block(weight))
    with np.errstate(all="ignore"):
        y = fast.matmul_int8(x, weight)
        exact = x_rounded.astype(np.float64) @ W.T.astype(np.float64)
        text = reference.matmul_int8(x, weight)
    assert (np.abs(y - exact) <= bound(x_rounded, W, largest)).all()
    off = np.abs(y.astype(np.float64) - text).max()
    assert off == 0 or (name == "NVFP4" and off < 2.0**-140)  # its kernel halves the sum: smallest numbers lose a bit


def with_scales_of_one(name, rows, count, seed):
    """Random codes; every scale is 1, or 2 where the table holds doubled values."""
    form, rng = blocks.BLOCKS[name], np.random.default_rng(seed)
    fields = form.layout.unpack(rng.integers(0, 256, (rows, count, form.bytes_per_block), dtype=np.uint8))
    fields |= {key: np.ones_like(value) for key, value in fields.items() if value.dtype.kind == "f"}
    if "sc" in fields:
        fields["sc"][:] = 33
    if name in ("MXFP4", "NVFP4"):  # UE4M3: exponent 7 + 1
        fields["e" if "e" in fields else "d"][:] = 128 if "e" in fields else 8 << 3
    return GGUFBlocks(form.layout.pack(**fields).reshape(rows, -1), name, count * form.block_size)


@pytest.mark.parametrize("name", TYPES)
@MANY_CASES
@given(rows=st.integers(1, 18), count=st.integers(1, 3), seed=st.integers(0, 2**16), largest=st.booleans())
def test_whole_numbers_are_exact(name, rows, count, seed, largest):
    weight, rng = with_scales_of_one(name, rows, count, seed), np.random.default_rng(seed)
    x = rng.integers(-127, 128, (3 if name in FEW_TOKENS else 13, weight.columns)).astype(np.float32)
    x[:, ::32] = 127  # so that the scale of every block is 1
    if largest:
        x[:] = 127 * rng.choice([-1, 1], (len(x), 1))
    W = weight.dense()
    assert (W == np.rint(W)).all() and np.abs(W).max() <= 127
    exact = x.astype(np.int64) @ W.T.astype(np.int64)
    for product in (fast.matmul_int8, fast.matmul_float):
        assert np.array_equal(product(x, weight), exact)
        assert np.array_equal(product(x[:1], weight), exact[:1])


@st.composite
def code_weights(draw, table, columns, scales="float32", shared=(), rows=None):
    """Any codes of a table (finite ones), scales from very small to large, each for a row or one of the blocks."""
    rows = rows or draw(st.integers(1, 18))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    own = rng.standard_normal(16).astype(np.float32) if table == OWN else None
    entries = table_values(table) if own is None else own
    kept = np.flatnonzero(np.isfinite(entries) & (np.abs(entries) < 1e6))
    codes = kept[rng.integers(0, len(kept), (rows, columns))].astype(np.uint8)
    if draw(st.booleans()):  # the largest code everywhere
        codes[:] = kept[np.argmax(np.abs(entries[kept]))]
    block = draw(st.sampled_from(shared)) if shared else (1, columns)
    shape = scale_shape((rows, columns), *block)
    scale = rng.uniform(0.5, 2, shape) * 10.0 ** rng.integers(-6 if scales == "float16" else -30, 4, shape)
    scale = np.where(rng.random(shape) < 0.1, 0, scale).astype(scales)
    rule = draw(st.sampled_from(["multiply", "divide", "multiply_127"]))
    if rule == "divide":
        scale = np.where(scale == 0, 1, 1 / np.where(scale == 0, 1, scale.astype(np.float32)))
        scale = np.minimum(scale, 60000 if scales == "float16" else 1e30).astype(scales)
    if table == "E8M0":  # whose largest number leaves no room for more
        scale = (np.maximum if rule == "divide" else np.minimum)(scale, np.float32(1))
    if rule == "multiply" and draw(st.booleans()):
        scale = None
    return CodeWeight.pack(codes, scale, table, block, rule=rule, values=own)


def check_codes(weight, x):
    assert tiles_of(weight) is not None
    with np.errstate(all="ignore"):
        W = weight.dense()
    entries = np.abs(table_values(weight.table) if weight.values is None else weight.values)
    least = entries[np.isfinite(entries) & (entries > 0)].min()  # a scale is at most a weight by the number it scales
    check_product(lambda x: fast.matmul_float(x, weight), x, W, float(np.abs(W).max()) / min(float(least), 1))


@pytest.mark.parametrize("table", [*TABLES, OWN])
@MANY_CASES
@given(data=st.data(), columns=st.sampled_from([1, 5, 31, 32, 33, 64, 100]))
def test_every_table_within_the_bound(table, data, columns):
    many = table not in FEW_TOKENS
    check_codes(data.draw(code_weights(table, columns)), data.draw(tokens_and(columns, many)))


SHARED = {  # columns: blocks of scales that fall on blocks or halves of them
    96: [(1, 16), (1, 32), (3, 32), (2, 96), (5, 48), (0, 16), (0, 48), (0, 64), (0, 32), (0, 192), (4, 200)],
    100: [(1, 32), (7, 64), (1, 16), (128, 128), (0, 100), (0, 300)],
    256: [(128, 128), (1, 64), (0, 64), (0, 128), (2, 16), (0, 512)],
}


@pytest.mark.parametrize("table", ["NF4", "INT8"])
@MANY_CASES
@given(data=st.data(), columns=st.sampled_from(list(SHARED)), dtype=st.sampled_from(["float16", "float32"]))
def test_scales_fall_where_the_record_has_them(table, data, columns, dtype):
    weight = data.draw(code_weights(table, columns, dtype, SHARED[columns]))
    if form_of(weight) is None:  # not for its blocks: a scale that overflows in a product
        weight = replace(weight, rule="multiply")
    check_codes(weight, data.draw(tokens_and(columns, table == "NF4")))


@pytest.mark.parametrize("kind", ["E8M0", "UE4M3"])
@MANY_CASES
@given(data=st.data(), columns=st.sampled_from([32, 48, 96]), width=st.sampled_from([16, 32]))
def test_scales_of_one_byte(kind, data, columns, width):
    """MX and NVFP4 as checkpoints have them: scales in small floats, kept as such."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    rows, groups = data.draw(st.integers(1, 18)), -(-columns // width)
    if kind == "E8M0":
        scale = CodeWeight.pack(rng.integers(60, 160, (rows, groups)).astype(np.uint8), None, "E8M0", (1, 1))
    else:
        total = data.draw(st.sampled_from([None, np.full((1, 1), 2688 / 3, np.float32)]))
        rule = "multiply" if total is None else data.draw(st.sampled_from(["multiply", "divide"]))
        codes = rng.integers(0, 0x7F, (rows, groups)).astype(np.uint8)
        scale = CodeWeight.pack(codes, total, "FP8_E4M3FN", (rows, groups), rule=rule)
    weight = CodeWeight.pack(rng.integers(0, 16, (rows, columns)).astype(np.uint8), scale, "FP4_E2M1", (1, width))
    tiles = tiles_of(weight)
    assert tiles.form.scale == {"E8M0": "power", "UE4M3": "ue4m3"}[kind] and tiles.scale.dtype == np.uint8
    check_codes(weight, data.draw(tokens_and(columns, kind == "UE4M3")))


@pytest.mark.parametrize("make", [blockwise, fp8_blocks, int8_rows, nvfp4, lambda W: blockwise(W, double_quant=True)])
def test_what_encoders_make_has_tiles(make):
    rng = np.random.default_rng(0)
    check_codes(make(rng.standard_normal((40, 128)).astype(np.float32)), rng.standard_normal((13, 128), np.float32))


def test_int8_activations_of_floats_are_rounded_first():
    rng = np.random.default_rng(0)
    weight, x = blockwise(rng.standard_normal((20, 64)).astype(np.float32)), rng.standard_normal((5, 64), np.float32)
    assert not tiles_of(weight).form.has_integers
    assert np.array_equal(fast.matmul_int8(x, weight), fast.matmul_float(rounded(x), weight))
    assert np.allclose(fast.matmul_int8(x, weight), reference.matmul_int8(x, weight), atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_columns": 24, "scale": np.ones((1, 8), np.float32)},
        {"offset": np.ones(1, np.float32)},
        {"rule": "divide", "scale": np.full((1, 4), 1e-39, np.float32)},  # 1 / scale is not a normal number
        {"rule": "divide", "scale": np.full((1, 4), 3e38, np.float32)},
        {"scale": np.full((1, 4), 3e38, np.float32), "table": "FP4_E2M1"},  # weights overflow, sums need not
    ],
)
def test_what_has_no_tiles(changes):
    good = CodeWeight.pack(np.ones((3, 64), np.uint8), np.ones((1, 4), np.float32), "NF4", (0, 48))
    assert tiles_of(good) is not None
    weight = replace(good, **changes)
    assert form_of(weight) is None and tiles_of(weight) is None
    x = np.full((2, 64), 1e-3, np.float32)
    with np.errstate(all="ignore"):
        assert np.allclose(fast.matmul_float(x, weight), reference.matmul_float(x, weight), equal_nan=True)


@pytest.mark.parametrize("name", ["NF4", "FP8_E4M3FN", DYNAMIC8, "IQ4_NL", "Q1_0"])
def test_not_a_number_stays_in_its_token(name):
    rng = np.random.default_rng(0)
    weight = random_blocks(name, 20, 2, 0) if name in blocks.BLOCKS else blockwise(np.ones((20, 64), np.float32))
    if name not in blocks.BLOCKS:
        weight = CodeWeight.pack(rng.integers(0, 15, (20, 64)).astype(np.uint8), None, name, (1, 64))
    for tokens in (3,) if name in FEW_TOKENS else (3, 13):
        x = rng.standard_normal((tokens, weight.columns), np.float32)
        clean = fast.matmul_float(x, weight), fast.matmul_int8(x, weight)
        x[0, 3], x[2, 40] = np.nan, np.inf
        for product, before in zip((fast.matmul_float, fast.matmul_int8), clean, strict=True):
            with np.errstate(invalid="ignore"):
                y = product(x, weight)
            assert np.isnan(y[0]).all() and not np.isfinite(y[2]).any()
            assert np.array_equal(np.delete(y, [0, 2], 0), np.delete(before, [0, 2], 0))


@pytest.mark.parametrize("make", [nvfp4, fp8_blocks, blockwise])
def test_the_same_bits_with_any_number_of_threads(make, monkeypatch):
    rng = np.random.default_rng(0)
    weight, x = make(rng.standard_normal((400, 512)).astype(np.float32)), rng.standard_normal((40, 512), np.float32)
    found = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("REFLLM_THREADS", threads)
        found.append(fast.matmul_float(x, weight))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_tables_name_every_format_that_a_weight_may_have():
    for name, form in FORMATS.items():
        if form.bits > 8 or name == "TERNARY":
            continue
        table, offset = tables.table_of(name, table_values(name))
        assert (table == "") == name.startswith("INT")
        if table == "":
            codes = np.arange(1 << form.bits, dtype=np.uint8)
            assert np.array_equal((codes ^ offset).astype(np.float32) - offset, table_values(name))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@settings(PROPERTY, max_examples=100)
@given(data=st.data(), rows=st.integers(1, 35), columns=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_a_table_a_row_within_the_bound(bits, data, rows, columns, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    tables_of_rows = rng.standard_normal((rows, 1 << bits)).astype(["float16", "float32"][seed % 2])
    weight = TableRows.pack(codes, tables_of_rows)
    assert form_of(weight).table == tables.OF_ROWS
    W = weight.dense()
    np.testing.assert_array_equal(W, [[row[c] for c in some] for row, some in zip(tables_of_rows, codes, strict=True)])
    check_product(lambda x: fast.matmul_float(x, weight), data.draw(tokens_and(columns)), W)


def test_tables_of_more_than_sixteen_are_decoded():
    rng = np.random.default_rng(0)
    weight = TableRows.pack(rng.integers(0, 32, (5, 9)).astype(np.uint8), rng.standard_normal((5, 32), np.float32))
    assert form_of(weight) is None
    x = rng.standard_normal((3, 9), np.float32)
    np.testing.assert_allclose(fast.matmul_float(x, weight), x @ weight.dense().T, rtol=1e-5, atol=1e-5)


def test_2_4_of_tables_of_rows():
    rng = np.random.default_rng(1)
    values = TableRows.pack(rng.integers(0, 8, (20, 32)).astype(np.uint8), rng.standard_normal((20, 8), np.float32))
    weight = Sparse24(values, np.resize(np.uint8([0x4E, 0xC9]), (20, 8)), 64)
    x = rng.standard_normal((14, 64), np.float32)
    check_product(lambda x: fast.matmul_float(x, weight), x, weight.dense())


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
@PROPERTY
@given(rows=st.integers(1, 6), columns=st.sampled_from((1, 7, 256, 257)), seed=st.integers(0, 2**16))
def test_few_kept_weights(kernels, rows, columns, seed):
    """Rows without any, columns in bytes and in pairs of bytes; alone and beside codes."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows, columns)).astype(np.float32)
    mask = rng.random(W.shape) < rng.choice([0, 0.02, 0.5, 1])
    mask[0] &= seed % 3 > 0
    kept = SparseRows.compress(W, mask, "float32")
    np.testing.assert_array_equal(kept.dense(), np.where(mask, W, 0))
    np.testing.assert_array_equal(kept.rows(np.array([rows - 1, 0, 0])), np.where(mask, W, 0)[[rows - 1, 0, 0]])
    assert kept.nbytes == mask.sum() * (4 + (1 if columns <= 256 else 2)) + rows * (
        2 if mask.sum(axis=1).max() > 255 else 1
    )
    x = rng.standard_normal((3, columns)).astype(np.float32)
    codes = TableRows.pack(np.zeros(W.shape, np.uint8), np.ones((rows, 2), np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFLLM_KERNELS", kernels)
        for weight in (kept, Sum(codes, kept)):
            y, W_hat = matmul(x, weight), weight.dense()
            exact = x.astype(np.float64) @ W_hat.T.astype(np.float64)
            size = np.abs(x).astype(np.float64) @ (np.abs(kept.dense()) + 1).T
            assert (np.abs(y - exact) <= gamma(columns + 4) * size).all()
    assert matmul(x.astype(np.float64), kept).dtype == np.float64
