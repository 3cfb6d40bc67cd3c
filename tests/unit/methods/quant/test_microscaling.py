"""mx, nvfp4, fp8 and fp6: codes by the formats' own encoders, real bits, and what their scales promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.formats.dtypes import FP6_E2M3, FP6_E3M2, FP8_E4M3FN
from refllm.formats.microscale import NVFP4
from refllm.kernels.packed import matmul
from refllm.methods.quant.microscaling import ELEMENTS, fp6, fp8, mx, nvfp4
from tests.strategies import PROPERTY, mixed_weights, weight_row

ROWS = ("normal", "outlier", "zero", "ties", "subnormal", "negative zero")


def weight(columns=64, seed=0):
    return np.stack([weight_row(kind, columns, seed) for kind in ROWS])


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_is_what_the_format_reads_back(element, rule):
    W, form = weight(), ELEMENTS[element]
    record = mx(W, element=element, scale_rule=rule)
    np.testing.assert_array_equal(record.dense(), form.decode(*form.encode(W, rule)))
    assert 8 * record.nbytes == W.size * form.bits_per_weight


def test_nvfp4_is_what_the_format_reads_back():
    W = weight()
    record = nvfp4(W)
    np.testing.assert_allclose(record.dense(), NVFP4.decode(*NVFP4.encode(W)), rtol=1e-6)
    assert record.nbytes == W.size // 2 + W.size // 16 + 4


@given(st.integers(-20, 20), st.sampled_from(sorted(ELEMENTS)), st.integers(0, 99))
def test_a_power_of_two_moves_the_scales_and_no_code(k, element, seed):
    W = weight_row("normal", 64, seed)[None]
    a, b = mx(W, element=element), mx(W * np.float32(2.0**k), element=element)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.scale.unpacked().astype(int) + k, b.scale.unpacked())


def test_the_largest_of_a_block_clips_under_the_rule_of_ocp_only():
    W = np.full((1, 32), 7, np.float32)
    assert mx(W).dense()[0, 0] == 6
    assert mx(W, scale_rule="ceil").dense()[0, 0] == 8  # a step of 2 x 1 above 4: 7 is a tie, 8 is even
    assert mx(np.full((1, 32), 4.0)).dense()[0, 0] == 4  # a power of two is exact


def slow(W, form, rows, columns, dtype):
    """Block by block, number by number."""
    out = np.empty(W.shape, np.float32)
    for i in range(0, W.shape[0], rows):
        for j in range(0, W.shape[1], columns):
            block = W[i : i + rows, j : j + columns]
            scale = np.abs(block).max() / np.float32(form.max) if block.any() else np.float32(1)
            scale = np.float32(scale.astype(dtype)) or np.float32(2.0**-24)
            scale = max(scale, np.float32(np.finfo(np.float32).tiny))
            grid = form.decode(np.arange(1 << form.bits, dtype=np.uint8)).astype(np.float64)
            grid = np.unique(np.abs(grid[np.isfinite(grid)]))
            for at, w in np.ndenumerate(block):
                distance = np.abs(grid - min(abs(np.float64(w / scale)), form.max))
                nearest = np.flatnonzero(distance == distance.min())
                code = nearest[nearest % 2 == 0][0] if len(nearest) == 2 else nearest[0]  # a tie: the even one
                out[i + at[0], j + at[1]] = np.copysign(np.float32(grid[code]) * scale, w)
    return out


@pytest.mark.parametrize("block", [(128, 128), (4, 16), (1, 24)])
def test_fp8_block_by_block(block):
    W = weight(40)
    record = fp8(W, block_rows=block[0], block_columns=block[1])
    np.testing.assert_array_equal(record.dense(), slow(W, FP8_E4M3FN, *block, np.float32))
    assert record.nbytes == W.size + 4 * -(-6 // block[0]) * -(-40 // block[1])


@pytest.mark.parametrize(("element", "form"), [("e3m2", FP6_E3M2), ("e2m3", FP6_E2M3)])
@pytest.mark.parametrize("columns", [-1, 20])
def test_fp6_row_by_row(element, form, columns):
    W = weight(40)
    record = fp6(W, element=element, block_columns=columns)
    np.testing.assert_array_equal(record.dense(), slow(W, form, 1, 40 if columns == -1 else columns, np.float16))
    assert record.nbytes == W.size * 6 // 8 + 2 * 6 * (40 // (40 if columns == -1 else columns))


@PROPERTY
@given(mixed_weights(columns=st.integers(1, 40)))
def test_fp8_relative_error_of_normal_numbers(W):
    record = fp8(W, block_rows=1, block_columns=-1)
    amax = np.abs(W).max(axis=1, keepdims=True)
    normal = np.abs(W) >= amax * 2.0**-14  # below, subnormal steps count
    error = np.abs(record.dense().astype(np.float64) - W)
    assert (error <= np.where(normal, np.abs(W) * (2.0**-4 + 1e-6), amax * 2.0**-14) + 1e-44)[amax[:, 0] > 1e-30].all()


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_products(backend, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    W = np.random.default_rng(0).normal(size=(33, 128)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(3, 128)).astype(np.float32)
    for record in (mx(W), mx(W, element="fp6_e2m3"), mx(W, element="fp8_e4m3"), nvfp4(W), fp8(W), fp6(W)):
        exact, bound = x.astype(np.float64) @ record.dense().T, np.abs(x) @ np.abs(record.dense()).T
        assert (np.abs(matmul(x, record) - exact) <= 1e-5 * bound).all()


def test_more_bits_lose_less():
    W = np.random.default_rng(2).normal(size=(32, 256)).astype(np.float32)
    lost = lambda record: np.square(record.dense() - W).sum()
    assert lost(mx(W)) > lost(nvfp4(W)) > lost(mx(W, element="fp6_e2m3"))
    # Not so from 6 to 8 bits: both have three bits of mantissa, and E4M3 ends at 1.75 of its last power of two.
    assert lost(mx(W, element="fp8_e4m3")) > lost(mx(W, element="fp6_e2m3"))


def test_what_is_refused():
    W = np.ones((2, 40), np.float32)
    with pytest.raises(ValueError, match="32"):
        mx(W)
    with pytest.raises(ValueError, match="16"):
        nvfp4(W)
    with pytest.raises(ValueError, match="element must be one of fp4_e2m1"):
        mx(W, element="fp5")
    with pytest.raises(ValueError, match="scale_rule"):
        mx(np.ones((1, 32), np.float32), scale_rule="up")
    with pytest.raises(ValueError, match="element must be e3m2 or e2m3"):
        fp6(W, element="e4m1")
    for knobs in (dict(block_rows=0), dict(block_columns=0), dict(block_columns=-2)):
        with pytest.raises(ValueError, match="a block needs rows and columns"):
            fp8(W, **knobs)
    for method in (mx, nvfp4, fp8, fp6):
        with pytest.raises(ValueError, match="NaN or Inf"):
            method(np.full((1, 32), np.nan, np.float32))
        with pytest.raises(ValueError, match="non-empty"):
            method(np.ones((0, 32), np.float32))
    with pytest.raises(ValueError, match="too large for float16"):
        fp6(np.full((1, 2), 1e7, np.float32))


def test_in_a_recipe():
    model = refllm.load("tiny")
    small = refllm.compress(model, "mx:element=fp6_e3m2+kivi:bits=4")
    weight = small.weights["model.layers.0.mlp.up_proj.weight"]
    assert 8 * weight.nbytes == 6.25 * weight.shape[0] * weight.shape[1]
    assert np.isfinite(refllm.forward(small, [1, 2, 3])).all()
