"""nf4 and fp4: codes against loops, blocks that run across rows, double quantisation, and what the values promise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.formats.dtypes import FP4_BNB, NF4
from refllm.kernels.packed.records import CodeWeight
from refllm.methods.quant import fp4, nf4
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.strategies import PROPERTY, weights

METHODS = {"nf4": (nf4, NF4), "fp4": (fp4, FP4_BNB)}
both = pytest.mark.parametrize(("method", "form"), METHODS.values(), ids=METHODS)


def slow(W, values, block):
    """One weight at a time: the nearest value, of two as near the lower one, the first code of two with one value."""
    flat = [np.float32(w) for w in W.ravel()]
    codes, scales = [], []
    for first in range(0, len(flat), block):
        part = flat[first : first + block]
        absmax = max(abs(w) for w in part)
        floor = max(absmax, np.float32(1e-38))
        whole = len(part) == block
        scales.append(absmax if whole else floor)
        for w in part:
            x = w * (np.float32(1) / floor) if whole else w / floor
            x = min(max(x, np.float32(-1)), np.float32(1))
            order = sorted(range(16), key=lambda c: (values[c], c))
            order = [c for i, c in enumerate(order) if i == 0 or values[c] != values[order[i - 1]]]
            place = sum(x > (values[a] + values[b]) / np.float32(2) for a, b in itertools.pairwise(order))
            codes.append(order[place])
    return np.array(codes).reshape(W.shape), np.array(scales, np.float32)


@both
@PROPERTY
@given(weights(columns=st.integers(1, 40)))
def test_equals_the_loops(method, form, W):
    record = method(W, block_size=32, double_quant=False)
    codes, scales = slow(W, form.values, 32)
    np.testing.assert_array_equal(record.unpacked(), codes)
    assert record.scale.ravel().tobytes() == scales.tobytes()
    spread = scales[np.arange(W.size) // 32].reshape(W.shape)
    np.testing.assert_array_equal(record.dense(), form.values[codes] * spread)


@both
def test_the_sixteen_values_come_back_and_a_second_pass_changes_nothing(method, form):
    W = np.concatenate([form.values, -form.values, [1.0, -1.0] * 16]).astype(np.float32)[None] * np.float32(0.375)
    once = method(W[:, :32], block_size=32, double_quant=False)
    np.testing.assert_array_equal(once.dense()[:, :16], W[:, :16])
    noise = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    once = method(noise, block_size=32, double_quant=False)
    again = method(once.dense(), block_size=32, double_quant=False)
    np.testing.assert_array_equal(again.dense(), once.dense())


def test_nf4_is_not_symmetric():
    """8 positive values, 7 negative ones: the codes of -w are not those of w mirrored."""
    assert (NF4.values > 0).sum() == 8 and (NF4.values < 0).sum() == 7
    W = np.random.default_rng(0).normal(size=(4, 64))
    assert (nf4(-W).dense() != -nf4(W).dense()).any()
    np.testing.assert_array_equal(
        np.abs(fp4(-W, double_quant=False).dense()), np.abs(fp4(W, double_quant=False).dense())
    )


def test_normal_weights_prefer_nf4():
    W = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    error = lambda record: np.mean((record.dense() - W) ** 2)
    assert error(nf4(W)) < 0.75 * error(fp4(W))
    assert error(nf4(W, block_size=32)) < error(nf4(W)) < error(nf4(W, block_size=256))


@both
def test_bits_per_weight(method, form):
    W = np.random.default_rng(2).normal(size=(256, 1024)).astype(np.float32)  # 4096 blocks, 16 of their own
    bits = lambda **knobs: 8 * method(W, **knobs).nbytes / W.size
    assert bits(double_quant=False) == 4 + 32 / 64
    assert bits() == 4 + 8 / 64 + 32 / (64 * 256) + 32 / W.size  # and one offset
    assert bits(block_size=4096, double_quant=False) == 4 + 32 / 4096


@both
def test_double_quantisation_moves_scales_by_little(method, form):
    W = np.random.default_rng(3).normal(size=(64, 256)).astype(np.float32)
    plain, double = method(W, double_quant=False), method(W)
    assert type(double.scale) is CodeWeight and double.codes.tobytes() == plain.codes.tobytes()
    off = np.abs(double.scale.dense() - plain.scale)
    # The map's widest step is 0.0141 of the largest distance from the mean.
    assert off.max() <= 0.0141 / 2 * 1.01 * np.abs(plain.scale - plain.scale.mean()).max()


@both
def test_blocks_run_across_rows(method, form):
    W = np.ones((3, 40), np.float32)
    W[1, 20:] = 100  # rows of 40: 0 ends a block of 64 in the middle of row 1, at column 24
    scale = method(W, double_quant=False).scale
    assert scale.tolist() == [[100.0, 100.0]]
    assert method(W, block_size=32, double_quant=False).scale.tolist() == [[1.0, 100.0, 100.0, 1.0]]


@both
@pytest.mark.parametrize("block_size", [0, 1, 48, 8192, -64])
def test_other_block_sizes_are_refused(method, form, block_size):
    with pytest.raises(ValueError, match=f"block_size must be one of 32, 64, .*, got {block_size}$"):
        method(np.ones((2, 2)), block_size=block_size)


@both
def test_extremes(method, form):
    zeros = method(np.zeros((2, 40)))
    assert math.copysign(1, zeros.dense()[0, 0]) == 1 and not zeros.dense().any()
    huge = np.array([[3e38, -3e38, 1e-45, -0.0]], np.float32)
    assert np.isfinite(method(huge, double_quant=False).dense()).all()
    with pytest.raises(ValueError, match="NaN or Inf"):
        method(np.array([[1e39]]))  # beyond float32


@both
def test_a_model_stores_it_and_runs(method, form, tmp_path):
    small = refllm.compress(refllm.load("tiny"), f"wanda:pattern=2:4+{method.__name__}", np.arange(200))
    save_native(small, tmp_path / "small")
    ids = np.arange(20)[None]
    np.testing.assert_array_equal(forward(refllm.load(tmp_path / "small"), ids), forward(small, ids))
