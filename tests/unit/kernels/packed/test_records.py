"""Packed records: what is stored decodes to what was meant, survives parts/from_parts, and refuses everything else."""

from dataclasses import MISSING, fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats import blocks
from refllm.formats.bits import pack_bits, unpack_bits
from refllm.formats.errors import FormatError
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.masks import keep_n_of_m, keep_top
from refllm.kernels.packed import matmul
from refllm.kernels.packed.encode_codes import blockwise, fp8_blocks, nvfp4
from refllm.kernels.packed.records import (
    BinaryBlocks,
    BlockSparse,
    CodeWeight,
    ColumnGroups,
    GGUFBlocks,
    IntWeight,
    LowRank,
    MinWeight,
    MixedRows,
    OutlierInputs,
    PairInputs,
    PatternInputs,
    Reordered,
    Rotated,
    SparkWeight,
    Sparse24,
    SparseBitmask,
    SparseRows,
    StaticInputs,
    Sum,
    TableRows,
    ThresholdInputs,
    TokenInputs,
    TwoLevel,
    VectorWeight,
    as_float,
    from_parts,
    is_record,
    meta,
    parts,
)
from tests.strategies import PROPERTY, group_sizes, mixed_weights, weight_row

W = np.stack([weight_row("normal", 32, seed) for seed in range(6)])


def int_weight(W, grid):
    scale, zero_point = grid.fit(W)
    return IntWeight.pack(grid, grid.encode(W, scale, zero_point), scale, zero_point)


WIDTHS = np.array([3, 0, 8, 1, 4, 5])


LEVELS = [np.linspace(-1, 2, 18 * n).astype(np.float16).reshape(6, 3, n) for n in (3, 4)]


def numbers(shape):
    return [np.linspace(a, 2, shape[0] * shape[1]).astype(np.float16).reshape(shape) for a in (0.5, -1)]


def one_of_each():
    sparse = Sparse24.compress(W, keep_n_of_m(np.abs(W), 2, 4))
    grid = SymmetricGrid(4, 8)
    return {
        "int sym": int_weight(W, SymmetricGrid(3, 16)),
        "int asym": int_weight(W, AffineGrid(4, 32)),
        "int tensor": int_weight(W, AffineGrid(3, 0, "float32")),
        "min": MinWeight(pack_bits(np.arange(192, dtype=np.uint8).reshape(6, 32) % 8, 3), *numbers((6, 2)), 3, 16, 32),
        "mixed rows": MixedRows.pack(
            np.arange(192, dtype=np.uint8).reshape(6, 32) % (1 << WIDTHS)[:, None], WIDTHS, W[:, 0], W[:, 1]
        ),
        "two level": two_level(),
        "binary blocks": binary_blocks(),
        "column groups": column_groups(),
        "gguf": GGUFBlocks(blocks.Q4_0.encode(W), "Q4_0", 32),
        "codes": fp8_blocks(W, (4, 16)),
        "codes in flat blocks": blockwise(W, block=24),
        "codes with nested scales": blockwise(W, "FP4_BNB", 16, double_quant=True),
        "codes with divided scales": nvfp4(W),
        "codes of a table of its own": CodeWeight.pack(
            np.arange(192, dtype=np.uint8).reshape(6, 32) % 16, None, "OWN", (1, 32), values=W[0, :16].copy()
        ),
        "reordered int": Reordered(int_weight(W, AffineGrid(4, 8)), np.arange(32, dtype=np.int32)[::-1].copy()),
        "sparse24": sparse,
        "sparse24 of int": Sparse24(int_weight(sparse.values.astype(np.float32), grid), sparse.indices, 32),
        "bitmask": SparseBitmask.compress(W, keep_top(np.abs(W), 0.7), "float32"),
        "bitmask of int": bitmask_of_int(),
        "vectors": VectorWeight.pack(
            np.arange(48).reshape(6, 4, 2) % 6, W[:, :16].reshape(1, 2, 6, 8), W[:, :1].copy()
        ),
        "vectors of spans": VectorWeight.pack(
            np.arange(48).reshape(6, 8, 1) % 12, W[:, :16].reshape(2, 1, 12, 4), None
        ),
        "table rows": TableRows.pack(np.arange(192, dtype=np.uint8).reshape(6, 32) % 8, W[:, :8].copy()),
        "two lengths": SparkWeight.pack((100 * np.abs(W)).clip(0, 255).astype(np.uint8), W < 0, W[:, :4] ** 2),
        "sparse rows": SparseRows.compress(W, keep_top(np.abs(W), 0.1)),
        "blocks": BlockSparse.compress(W, np.array([[1, 0, 1], [0, 1, 1]]), (4, 12), "float32"),
        "blocks of int": blocks_of_int(),
        "lowrank": LowRank(W[:, :5].copy(), W[:5].copy()),
        "sum": Sum(W.astype(np.float16), W.copy()),
        "sum of int and lowrank": Sum(int_weight(W, grid), LowRank(W[:, :2].copy(), W[:2].copy())),
        "rotated": Rotated.of(W),
        "rotated heads of int": Rotated(int_weight(W, grid), 8),
        "lowrank of int": LowRank(int_weight(W[:, :8], grid), int_weight(W[:5].repeat(2, 0)[:8], grid)),
    }


def coded(name):
    """Whether rounded activations apply to one of each."""
    return "int" in name or name in ("min", "two level", "gguf")


def one_of_each_with_rounded_inputs():
    """Their products are those of other inputs: test_inputs.py."""
    weight, scale, zero_point = int_weight(W, SymmetricGrid(4, 8)), np.float32([[0.1]]), np.uint8([[7]])
    return one_of_each() | {
        "token inputs": TokenInputs(weight, "e4m3"),
        "static inputs": StaticInputs(weight, scale, zero_point, 8),
        "pair inputs": PairInputs(weight, scale),
        "threshold inputs": ThresholdInputs(weight, scale),
        "pattern inputs": PatternInputs(weight, np.abs(W[:1]), 2, 4, 2),
        "outlier inputs": OutlierInputs(weight, np.int32([3, 9]), W[:, :2].astype(np.float16), 6.0),
    }


def two_level():
    groups = np.arange(12).reshape(6, 2)
    return TwoLevel.pack(np.arange(192).reshape(6, 32) % 16, groups + 1, groups, W[:, :1].astype(np.float16), 16)


def binary_blocks():
    """Three blocks of columns, of which the last is short."""
    signs, second = (W > W[0]) | (W < -1), W > np.roll(W, 1)
    return BinaryBlocks.pack(signs, second, W[0] > 0.5, *LEVELS, 12)


def column_groups():
    """Three groups of which the last does not fill its bytes."""
    groups = [(6, 8), (3, 16), (2, 7), (5, 1)]
    codes = np.concatenate([np.arange(6 * n).reshape(6, n) % (1 << bits) for bits, n in groups], axis=1)
    return ColumnGroups.pack(codes, np.arange(24).reshape(4, 6) % 16 + 1, np.float16([0.5, 1, 0.1, 300]), groups)


def blocks_of_int():
    return BlockSparse(int_weight(W[:, :16], AffineGrid(4, 8)), np.uint8([[2], [1]]), 6, 32, 3, 16)


def bitmask_of_int():
    mask = np.zeros(W.shape, bool)
    mask[:, ::4] = True
    plain = SparseBitmask.compress(W, mask)
    return SparseBitmask(int_weight(W[:, ::4], SymmetricGrid(8, -1)), plain.bitmask, plain.row_offsets, 32)


def same_rows(weight, found, expected):
    """Equal; those of factors up to rounding, for a BLAS may sum products of few rows in another order."""
    if isinstance(weight, LowRank | Sum):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    else:
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", one_of_each_with_rounded_inputs())
def test_parts_and_back(name):
    record = one_of_each_with_rounded_inputs()[name]
    stored, described = parts(record), meta(record)
    again = from_parts(record.kind, dict(stored), dict(described))
    assert is_record(again) and again.shape == record.shape
    assert again.nbytes == record.nbytes == sum(array.nbytes for array in stored.values())
    dense = record.dense()
    assert dense.dtype == np.float32 and dense.shape == record.shape
    assert np.array_equal(again.dense(), dense)
    ids = np.array([3, 0, 3])
    same_rows(record, record.rows(ids), dense[ids])
    same_rows(record, record.rows(slice(1, 4)), dense[1:4])


def optional_parts(record):
    nested = [(name, inner) for name in record.stored if is_record(inner := getattr(record, name))]
    return {*record.optional} | {f"{name}.{key}" for name, inner in nested for key in optional_parts(inner)}


@pytest.mark.parametrize("name", one_of_each_with_rounded_inputs())
def test_missing_and_extra_parts_and_fields(name):
    record = one_of_each_with_rounded_inputs()[name]
    for key in parts(record):
        if key in optional_parts(record):
            continue  # without it the weight is another one: symmetric, say
        with pytest.raises(FormatError, match=key.split(".")[-1]):
            from_parts(record.kind, {k: v for k, v in parts(record).items() if k != key}, meta(record))
    later = {field.name for field in fields(record) if field.default is not MISSING}
    for key in meta(record).keys() - later:
        with pytest.raises(FormatError, match=key):
            from_parts(record.kind, parts(record), {k: v for k, v in meta(record).items() if k != key})
    with pytest.raises(FormatError, match="unexpected more"):
        from_parts(record.kind, parts(record) | {"more": np.zeros(1)}, meta(record))
    with pytest.raises(FormatError, match="unexpected more"):
        from_parts(record.kind, parts(record), meta(record) | {"more": 1})


@PROPERTY
@given(data=st.data(), kind=st.sampled_from([SymmetricGrid, AffineGrid]), bits=st.integers(2, 8))
def test_int_weight_decodes_what_the_grid_does(data, kind, bits):
    W = data.draw(mixed_weights(columns=st.integers(1, 20)))
    grid = kind(bits, data.draw(group_sizes(W.shape[1])), data.draw(st.sampled_from(["float16", "float32"])))
    scale, zero_point = grid.fit(W)
    codes = grid.encode(W, scale, zero_point)
    record = IntWeight.pack(grid, codes, scale, zero_point)
    assert record.grid == grid and record.shape == W.shape
    assert np.array_equal(record.dense(), grid.decode(codes, scale, zero_point))
    zero_bytes = 0 if zero_point is None else scale.shape[0] * -(-scale.shape[1] * bits // 8)
    assert record.nbytes == len(W) * -(-W.shape[1] * bits // 8) + scale.nbytes + zero_bytes


def test_binary_blocks_weight_by_weight():
    """Every weight by the formulas of the record, one after another; two bits, seven halves a row and block."""
    record = binary_blocks()
    signs, second, salient = record.unpacked()
    mean, scale = (a.astype(np.float32) for a in (record.mean, record.scale))
    dense, f32 = record.dense(), np.float32
    groups = set()
    for r, c in np.ndindex(dense.shape):
        g = 2 if salient[c] else int(second[r, c])
        m, a = mean[r, c // 12], scale[r, c // 12]
        w = f32(m[g] + (a[g] if signs[r, c] else -a[g]))
        if salient[c]:
            w = f32(w + (a[3] if second[r, c] else -a[3]))
        assert dense[r, c] == w
        groups.add((g, bool(signs[r, c]), bool(second[r, c])))
    assert len(groups) == 8  # all that two bits can say, in a salient column and elsewhere
    assert record.nbytes == 2 * 6 * 4 + 4 + 2 * 6 * 3 * 7


def test_column_groups_weight_by_weight():
    record, f32 = column_groups(), np.float32
    codes, levels, dense = record.unpacked(), record.levels(), record.dense()
    group_of = np.repeat(np.arange(4), record.groups[:, 1])
    for r, c in np.ndindex(dense.shape):
        g = group_of[c]
        step = float(levels[g, r]) ** 2 * float(record.scale[g]) / 256
        assert f32(step) == step  # exact
        assert dense[r, c] == f32((int(codes[r, c]) - 2 ** (int(record.groups[g, 0]) - 1)) * step)
    assert record.nbytes == 6 * (6 + 6 + 2 + 1) + 4 * 3 + 4 * 2 + 4 * 4


def test_2_4_positions_by_the_table():
    # kept -> nibble i0 | i1 << 2; groups with fewer than two are filled up with 2, else 3
    table = {(0, 1): 0x4, (0, 2): 0x8, (1, 2): 0x9, (0, 3): 0xC, (1, 3): 0xD, (2, 3): 0xE}
    table |= {(): 0xE, (0,): 0x8, (1,): 0x9, (2,): 0xE, (3,): 0xE}
    for kept, nibble in table.items():
        row = np.zeros((1, 4), np.float32)
        row[0, list(kept)] = np.arange(1, len(kept) + 1)
        record = Sparse24.compress(row)
        assert unpack_bits(record.indices, 4, 1).item() == nibble, kept
        assert np.array_equal(record.dense(), row)


@PROPERTY
@given(mixed_weights(columns=st.integers(1, 9).map(lambda groups: 4 * groups)), st.sampled_from(["float16", "float32"]))
def test_2_4_round_trip(W, dtype):
    W = W * keep_n_of_m(np.abs(W), 2, 4)
    record = Sparse24.compress(W, dtype=dtype)
    assert np.array_equal(record.dense(), W.astype(dtype).astype(np.float32))
    assert record.nbytes == W.size // 2 * np.dtype(dtype).itemsize + len(W) * -(-W.shape[1] // 8)


@PROPERTY
@given(mixed_weights(columns=st.integers(1, 20)), st.floats(0, 1), st.sampled_from(["float16", "float32"]))
def test_bitmask_round_trip(W, sparsity, dtype):
    mask = keep_top(np.abs(W), sparsity)
    record = SparseBitmask.compress(W, mask, dtype)
    assert np.array_equal(record.dense(), np.where(mask, W, 0).astype(dtype).astype(np.float32))
    assert np.array_equal(np.signbit(record.dense()[mask]), np.signbit(W[mask]))  # -0.0 is kept where the mask says so
    assert record.nbytes == mask.sum() * np.dtype(dtype).itemsize + len(W) * (-(-W.shape[1] // 8) + 4)


def test_bits_per_weight_are_honest():
    W = np.ones((16, 256), np.float32)
    assert 8 * int_weight(W, SymmetricGrid(4, 128)).nbytes / W.size == 4 + 16 / 128
    assert 8 * int_weight(W, AffineGrid(4, 32)).nbytes / W.size == 4 + 20 / 32
    assert 8 * Sparse24.compress(W, keep_n_of_m(W, 2, 4)).nbytes / W.size == 9
    assert 8 * SparseBitmask.compress(W, keep_top(W, 0.5)).nbytes / W.size == 9 + 32 / 256


def replaced(record, **changes):
    """from_parts with some parts or fields changed."""
    stored = parts(record) | {k: v for k, v in changes.items() if k in parts(record)}
    described = meta(record) | {k: v for k, v in changes.items() if k in meta(record)}
    return from_parts(record.kind, stored, described)


E = one_of_each()
NAN16 = np.full((6, 2), np.nan, np.float16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_parts("zip", {}, {}), "unknown kind.*int, min"),
        (lambda: from_parts(["int"], {}, {}), "unknown kind"),
        (lambda: from_parts("int", {}, None), "dictionary"),
        (lambda: replaced(E["int sym"], bits="3"), "'bits' must be int"),
        (lambda: replaced(E["int sym"], bits=True), "'bits' must be int"),
        (lambda: replaced(E["int sym"], bits=9), "bits must be 2 to 8"),
        (lambda: replaced(E["int sym"], bits=4), "codes must be uint8 .6, 16."),
        (lambda: replaced(E["int sym"], group_size=5), "5 does not divide the 32"),
        (lambda: replaced(E["int sym"], columns=0), "columns"),
        (lambda: replaced(E["int sym"], columns=10**12, group_size=-1), "codes"),
        (lambda: replaced(E["int sym"], scale=NAN16), "scale holds NaN"),
        (lambda: replaced(E["int sym"], scale=np.ones((6, 2))), "scale must be float16 or float32"),
        (lambda: replaced(E["int sym"], scale=np.ones((6, 2), ">f4")), "scale must be"),
        (lambda: replaced(E["int sym"], codes=E["int sym"].codes.astype(np.int8)), "codes must be uint8"),
        (lambda: replaced(E["int sym"], codes=np.zeros(12, np.uint8)), "codes must be a matrix"),
        (lambda: replaced(E["int asym"], zero_point=np.full((6, 1), 0x10, np.uint8)), "zero_point: bits after"),
        (lambda: replaced(E["binary blocks"], block=0), "block must be at least 1"),
        (lambda: replaced(E["binary blocks"], block=16), "mean must be float16 .6, 2, 3."),
        (lambda: replaced(E["binary blocks"], columns=31), "bits after the last of 31"),
        (lambda: replaced(E["binary blocks"], salient=E["binary blocks"].signs), "salient must be uint8 .1, 4."),
        (lambda: replaced(E["binary blocks"], scale=np.full((6, 3, 4), np.nan, np.float16)), "scale holds NaN"),
        (lambda: replaced(E["column groups"], groups=np.uint16([[9, 8]] * 4)), "of 2 to 8 bits .* got 9 to 9 bits"),
        (lambda: replaced(E["column groups"], groups=np.uint16([[3, 0]] * 4)), "at least 1 column, got 3 to 3 bits, 0"),
        (lambda: replaced(E["column groups"], groups=np.uint16([[3, 8]] * 4)), "codes must be uint8 .6, 12."),
        (lambda: replaced(E["column groups"], groups=np.int32([[3, 8]] * 4)), "groups must be uint16"),
        (lambda: replaced(E["column groups"], groups=np.zeros((0, 2), np.uint16)), "groups must be a matrix"),
        (lambda: replaced(E["column groups"], codes=np.full((6, 15), 255, np.uint8)), "the last of 7 codes of 2 bits"),
        (lambda: replaced(E["column groups"], level=np.zeros((4, 2), np.uint8)), "level must be uint8 .4, 3."),
        (lambda: replaced(E["column groups"], scale=np.float16([1, 2, 3, np.inf])), "scale holds NaN"),
        (lambda: replaced(E["gguf"], type_name="Q9_9"), "unknown GGUF block type 'Q9_9'"),
        (lambda: replaced(E["gguf"], type_name="np"), "unknown GGUF block type"),
        (lambda: replaced(E["gguf"], columns=33), "multiple of 32 columns, got 33"),
        (lambda: replaced(E["gguf"], data=np.full((6, 18), 0x7F, np.uint8)), "Q4_0 block decodes to NaN"),
        (lambda: replaced(E["sparse24"], indices=np.zeros((6, 4), np.uint8)), "two different columns"),
        (lambda: replaced(E["sparse24"], columns=30), "multiple of 4 columns"),
        (lambda: replaced(E["sparse24"], columns=28), "values must be"),
        (lambda: replaced(E["bitmask"], row_offsets=np.zeros(6, np.uint32)), "row_offsets do not follow"),
        (lambda: replaced(E["bitmask"], bitmask=np.zeros((6, 4), np.uint8)), "row_offsets do not|values must"),
        (lambda: replaced(E["bitmask"], values=E["bitmask"].values[1:]), "values must be"),
        (lambda: replaced(E["table rows"], tables=np.ones((6, 5), np.float16)), "a power of two"),
        (lambda: replaced(E["table rows"], tables=np.ones((5, 8), np.float32)), "tables must be"),
        (lambda: replaced(E["table rows"], tables=np.full((6, 8), np.inf, np.float32)), "tables holds NaN or Inf"),
        (lambda: replaced(E["two lengths"], row_bytes=np.ones((6, 1), np.uint8)), "one unsigned integer a row"),
        (lambda: replaced(E["two lengths"], row_bytes=np.ones(6, np.uint16)), "row_bytes must be uint8"),
        (lambda: replaced(E["two lengths"], row_bytes=np.ones(6, np.uint8)), r"stream must be uint8 .6,."),
        (lambda: replaced(E["two lengths"], row_bytes=E["two lengths"].row_bytes[::-1].copy()), "32 whole codes"),
        (lambda: replaced(E["two lengths"], columns=31), "31 whole codes|signs: bits|equal groups"),
        (lambda: replaced(E["two lengths"], signs=np.zeros((6, 5), np.uint8)), "signs must be uint8"),
        (lambda: replaced(E["two lengths"], scale=np.ones((5, 4), np.float16)), "scale must be"),
        (lambda: replaced(E["two lengths"], scale=np.ones((6, 5), np.float16)), "not 5 equal groups"),
        (lambda: replaced(E["sparse rows"], counts=np.full(6, 9, np.uint8)), "values must be"),
        (lambda: replaced(E["sparse rows"], counts=E["sparse rows"].counts.astype(np.uint16)), "counts must be uint8"),
        (lambda: replaced(E["sparse rows"], counts=np.ones((6, 1), np.uint8)), "one unsigned integer a row"),
        (lambda: replaced(E["sparse rows"], indices=E["sparse rows"].indices[::-1].copy()), "ascend within"),
        (lambda: replaced(E["sparse rows"], columns=20), "must name one of 20 columns"),
        (lambda: replaced(E["lowrank"], A=np.ones((6, 4), np.float32)), "ranks of A .6, 4. and B .5, 32."),
        (lambda: replaced(E["lowrank"], A=np.ones((6, 0), np.float32)), "non-empty"),
        (lambda: replaced(E["lowrank"], A=np.full((6, 5), np.inf, np.float32)), "A holds NaN"),
        (lambda: from_parts("lowrank", {"A.codes": W, "B": W}, {"A": 3}), "'A' must be one array"),
        (lambda: from_parts("lowrank", {"A.codes": W, "A": W, "B": W}, {"A": {"kind": "int"}}), "'A' must be one"),
        (lambda: from_parts("lowrank", {"B": W}, {"A": {"kind": "int"}}), "'A' must be one"),
        (
            lambda: from_parts("sparse24", {"values.q": W, "indices": W}, {"columns": 4, "values": {}}),
            "unknown kind of packed weight None",
        ),
    ],
)
def test_hostile_parts(call, message):
    with pytest.raises(FormatError, match=message):
        call()


def test_nesting_is_bounded():
    described, stored = {"kind": "lowrank"}, {"A": W, "B": W}
    for _ in range(50):
        described = {"kind": "lowrank", "A": described}
        stored = {f"A.{k}": v for k, v in stored.items()} | {"B": W}
    with pytest.raises(FormatError, match="nested at most"):
        from_parts("lowrank", stored, {k: v for k, v in described.items() if k != "kind"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_float(np.array([1e6]), "float16"), "too large for float16"),
        (lambda: as_float(np.array([np.nan]), "float32"), "NaN"),
        (lambda: as_float(np.array([1.0]), "float64"), "float16 or float32"),
        (lambda: Sparse24.compress(np.ones((1, 6), np.float32)), "multiple of 4"),
        (lambda: Sparse24.compress(np.ones((1, 4), np.float32)), "more than two"),
        (lambda: SparseBitmask.compress(W, np.ones((1, 1), bool)), "alike"),
        (
            lambda: IntWeight(pack_bits(np.ones((2, 4), np.uint8), 4), np.ones((1, 1), np.float16), None, 4, -1, 4),
            "scale",
        ),
    ],
)
def test_bad_weights(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_the_products_of_a_sum_are_added(backend, activations, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    record = one_of_each()["sum of int and lowrank"]
    x = weight_row("normal", 32, 9)[None]
    apart = matmul(x, record.first, activations) + matmul(x, record.second, activations)
    assert np.array_equal(matmul(x, record, activations), apart)
    np.testing.assert_allclose(matmul(x, record), x @ record.dense().T, rtol=1e-4, atol=1e-5)


def test_terms_of_a_sum_have_one_shape():
    with pytest.raises(ValueError, match=r"second must be .*\(6, 32\)"):
        Sum(W, W[:, :31].copy())
    with pytest.raises(ValueError, match="first must be a non-empty matrix"):
        Sum(W[0], W[0])
