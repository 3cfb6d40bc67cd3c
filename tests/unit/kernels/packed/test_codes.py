"""Weights on a table of values: what is stored decodes by the formulas, number by number; encoders take the nearest."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.dtypes import FP4_E2M1, FP8_E4M3FN, NF4
from refllm.kernels.grids import AffineGrid
from refllm.kernels.packed import matmul
from refllm.kernels.packed.codes import scale_shape, table_values
from refllm.kernels.packed.encode_codes import blockwise, fp8_blocks, int8_rows, nvfp4
from refllm.kernels.packed.records import CodeWeight, IntWeight, Reordered
from tests.strategies import PROPERTY, mixed_weights

F = np.float32
RNG = np.random.default_rng(0)


@PROPERTY
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 12), rule=st.sampled_from(["multiply", "divide"]))
def test_every_weight_by_the_formula(data, rows, columns, rule):
    block = data.draw(st.tuples(st.integers(0, 6), st.integers(1, 14)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
    scale = rng.uniform(0.1, 2, scale_shape((rows, columns), *block)).astype(
        data.draw(st.sampled_from([F, np.float16]))
    )
    offset = F([0.25]) if data.draw(st.booleans()) else None
    record = CodeWeight.pack(codes, scale, "NF4", block, rule=rule, offset=offset)
    W = record.dense()
    for o in range(rows):
        for i in range(columns):
            at = (o // block[0], i // block[1]) if block[0] else (0, (o * columns + i) // block[1])
            value, s = NF4.values[codes[o, i]], F(scale[at])
            expected = value * s if rule == "multiply" else value / s
            assert W[o, i] == (expected if offset is None else expected + offset[0])
    ids = rng.integers(0, rows, 3)
    assert np.array_equal(record.rows(ids), W[ids]) and np.array_equal(record.rows(slice(1, 3)), W[1:3])


def test_int8_rounds_twice():
    record = int8_rows(F([[0.3, -0.1, 0.2]]))
    assert record.unpacked().view(np.int8).tolist() == [[127, -42, 85]]
    expected = F([127, -42, 85]) * F(0.3) * F(1 / 127)
    assert record.dense().tolist() == [expected.tolist()] and record.nbytes == 3 + 4


def test_nested_scales_are_decoded_first():
    W = RNG.normal(size=(8, 64)).astype(F)
    plain, double = blockwise(W, block=32), blockwise(W, block=32, double_quant=True)
    assert np.array_equal(plain.codes, double.codes)
    scales = double.scale.rows(slice(None))
    assert np.abs(scales - plain.scale).max() < 0.02 * plain.scale.max() and not np.array_equal(scales, plain.scale)
    assert np.array_equal(double.dense(), replace(plain, scale=scales).dense())
    assert double.nbytes == 256 + 16 + 4 + 4  # codes; 16 scales in a byte each; one scale of scales; the offset


@PROPERTY
@given(mixed_weights(columns=st.sampled_from([16, 32, 48])))
def test_encoders_take_the_nearest_value(W):
    with np.errstate(over="ignore"):
        W = np.clip(W, -1e30, 1e30).astype(F)
    for record in (blockwise(W, block=16), blockwise(W, "FP4_BNB", 20), int8_rows(W), fp8_blocks(W, (2, 16))):
        step = record.scales().astype(np.float64) / (127 if record.rule == "multiply_127" else 1)
        values = table_values(record.table).astype(np.float64)
        values = values[np.isfinite(values)]
        if record.table == "INT8":
            values = values[values >= -127]
        nearest = np.abs(W[..., None] - step[..., None] * values).min(axis=-1)
        taken = np.abs(W - record.dense().astype(np.float64))
        # Dividing and multiplying back in float32 moves a number by a few units in the last place of the largest.
        assert (taken <= nearest + 4e-7 * np.abs(values).max() * step + 1e-37).all(), record.table


def test_a_block_of_zeros_stays_zero():
    zeros = np.zeros((2, 32), F)
    records = [blockwise(zeros), blockwise(zeros, "FP4_BNB", 24), int8_rows(zeros), fp8_blocks(zeros), nvfp4(zeros)]
    assert all(not record.dense().any() for record in records)


def test_nvfp4_divides_by_the_scale_of_the_tensor():
    W = RNG.normal(size=(4, 32)).astype(F)
    record = nvfp4(W)
    codes, scale, total = record.unpacked(), FP8_E4M3FN.decode(record.scale.unpacked()), record.scale.scale[0, 0]
    step = np.repeat(scale / total, 16, axis=1)
    assert np.array_equal(record.dense(), FP4_E2M1.decode(codes) * step)
    assert record.nbytes == 64 + 8 + 4


@pytest.mark.parametrize("encode", [blockwise, int8_rows, fp8_blocks, nvfp4])
def test_encoders_refuse(encode):
    for bad in (np.full((2, 16), np.nan, F), np.full((2, 16), 1e300), np.zeros((0, 16), F), np.zeros(16, F)):
        with pytest.raises(ValueError, match=r"NaN or Inf|non-empty"):
            encode(bad)
    for good in (np.asfortranarray(RNG.normal(size=(4, 16))), RNG.normal(size=(4, 16)).astype(">f4")[:, ::-1]):
        good.flags.writeable = False
        assert encode(good).shape == (4, 16)


CODES, SCALE = np.zeros((2, 4), np.uint8), np.ones((2, 1), F)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "NF5"}, r"unknown table 'NF5'; known: .*NF4.*DYNAMIC8, OWN"),
        ({"table": "FP16"}, "unknown table"),
        ({"table": "OWN"}, "values must be given exactly if"),
        ({"values": np.zeros(16, F)}, "values must be given exactly if"),
        ({"table": "OWN", "values": np.zeros(7, F)}, "16 or 256"),
        ({"table": "OWN", "values": np.full(16, np.nan, F)}, "NaN"),
        ({"rule": "add"}, "rule must be one of"),
        ({"rule": "divide", "scale": SCALE * 0}, "a scale that divides is 0"),
        ({"rule": "divide", "scale": None}, "needs a scale"),
        ({"scale": SCALE.T}, r"scale must be .* \(2, 1\)"),
        ({"scale": SCALE * F(np.inf)}, "NaN or Inf"),
        ({"block_rows": -1}, "blocks must be"),
        ({"block_columns": 0}, "blocks must be"),
        ({"columns": 9}, "codes"),
        ({"codes": np.full((2, 8), 0x7F, np.uint8), "table": "FP8_E4M3FN"}, "codes hold NaN or Inf of FP8_E4M3FN"),
        ({"offset": np.zeros(2, F)}, "offset"),
    ],
)
def test_codes_refuse(changes, message):
    good = CodeWeight(CODES, SCALE, None, None, "NF4", "multiply", 1, 8, 8)
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)


def test_reordered_columns():
    W = RNG.normal(size=(6, 32)).astype(F)
    order = RNG.permutation(32).astype(np.int32)
    grid = AffineGrid(4, 8)
    scale, zero = grid.fit(W[:, order])
    inner = IntWeight.pack(grid, grid.encode(W[:, order], scale, zero), scale, zero)
    record = Reordered(inner, order)
    assert record.nbytes == inner.nbytes + 128
    assert np.array_equal(record.dense()[:, order], inner.dense())
    x = RNG.normal(size=(2, 3, 32))
    assert np.allclose(matmul(x, record), x @ record.dense().T.astype(np.float64), rtol=0, atol=1e-12)
    for bad in (order[:-1], np.where(order == 3, 4, order).astype(np.int32), order.astype(np.int64)):
        with pytest.raises(ValueError, match="order"):
            Reordered(inner, bad)
    with pytest.raises(ValueError, match="packed record"):
        Reordered(W, order)
