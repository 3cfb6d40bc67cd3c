"""qoq: against loops over Python numbers, the protective range by brute force, the error beside float scales."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.packed import matmul
from refllm.kernels.packed.records import IntWeight, TwoLevel
from refllm.kernels.packed.tiled import tiles_of
from refllm.methods.quant import qoq, rtn
from refllm.methods.quant.qoq import second_level
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model
from tests.strategies import weights

IDS = np.random.default_rng(0).integers(0, 64, 60)


def slow_qoq(W, group_size):
    """One number after another; s0 divided in float32 and stored as float16, as all that follows uses it."""
    int8, codes, levels, zeros, scales = [], [], [], [], []
    for row in W.astype(np.float32):
        largest = max(abs(float(w)) for w in row)
        s0 = max(np.float16(np.float32(largest) / np.float32(119)), np.float16(2.0**-24))
        q0 = [min(max(round(float(np.float32(w) / np.float32(s0))), -119), 119) for w in row]
        scales.append(s0)
        for start in range(0, len(row), group_size):
            group = q0[start : start + group_size]
            low, high = min(*group, 0), max(*group, 0)
            s1 = max(round(Fraction(high - low, 15)), 1)
            z1 = min(max(round(Fraction(-low, s1)), 0), 15)
            levels.append(s1)
            zeros.append(z1)
            for q in group:
                code = min(max(round(Fraction(q, s1) + z1), 0), 15)
                codes.append(code)
                int8.append(code * s1 - z1 * s1)
    shape = (len(W), -1)
    return [np.array(a).reshape(shape) for a in (int8, codes, levels, zeros, scales)]


@given(weights(columns=st.sampled_from((4, 8, 24))), st.sampled_from((4, 2)))
def test_equals_the_loops(W, group_size):
    record = qoq(W, group_size=group_size)
    int8, _, levels, zeros, scales = slow_qoq(W, group_size)
    assert np.array_equal(record.int8(), int8) and record.scale.tobytes() == scales.astype(np.float16).tobytes()
    level, zero = record.levels()
    assert np.array_equal(level, levels) and np.array_equal(zero, zeros)
    assert np.abs(int8).max() <= 127


def worst(p):
    """Extremes of what groups that reach from -p .. 0 to 0 .. p decode to."""
    low, high = (a.ravel() for a in np.meshgrid(np.arange(-p, 1), np.arange(p + 1)))
    level, zero = second_level(low, high)
    decode = lambda q0: (np.clip(np.rint(q0 / level + zero), 0, 15) - zero) * level
    return low, high, decode(low), decode(high)


def test_the_protective_range():
    """119 is the largest range that stays in [-127, 127]; 120 in [-128, 127]; 127 leaves it for many pairs."""
    bounds = lambda p: (worst(p)[2].min(), worst(p)[3].max())
    assert bounds(119)[0] >= -127 and bounds(119)[1] <= 127
    assert not (bounds(120)[0] >= -127 and bounds(120)[1] <= 127)
    assert bounds(120)[0] >= -128 and bounds(120)[1] <= 127
    assert not (bounds(121)[0] >= -128 and bounds(121)[1] <= 127)
    _, _, first, last = worst(127)
    assert np.sum((first < -128) | (last > 127)) == 271
    level, zero = second_level(*worst(119)[:2])
    assert level.max() == 16 and level.min() == 1 and zero.min() == 0 and zero.max() == 15


def test_two_levels_lose_little_against_float_scales():
    """At most 5% of the error of a float scale a group, on Gaussian weights; and fewer bytes."""
    W = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    two, one = qoq(W), rtn(W, bits=4, group_size=128)
    error = lambda record: np.sqrt(np.mean((record.dense() - W) ** 2))
    assert 1 <= error(two) / error(one) <= 1.05
    assert two.nbytes == W.size // 2 + 64 * (8 // 2 + 8 // 2 + 2) < one.nbytes


def test_bytes_hold_small_scales_and_decode_to_int8():
    record = qoq(np.random.default_rng(1).normal(size=(5, 96)).astype(np.float32), group_size=32)
    assert record.level.shape == record.zero_point.shape == (5, 2)  # three groups of 4 bits in two bytes
    assert np.array_equal(record.dense(), record.int8().astype(np.float32) * record.scale.astype(np.float32))


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("activations", ["float32", "int8", "int4"])
@pytest.mark.parametrize("group_size", [16, 32, 128, -1, 8])
def test_products_meet_the_integers(activations, backend, group_size, monkeypatch):
    """The sums of int8 activations with the int8 of the definition, times the row's scale and the token's."""
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    rng = np.random.default_rng(2)
    W, x = rng.normal(size=(20, 128)).astype(np.float32), rng.normal(size=(3, 128)).astype(np.float32)
    record = qoq(W, group_size=group_size)
    assert isinstance(record.flat, IntWeight) and np.array_equal(record.flat.dense(), record.dense())
    assert (tiles_of(record) is None) == (group_size == 8)  # a fraction of a block of columns is decoded instead
    y = matmul(x, record, activations)
    if activations == "float32":
        np.testing.assert_allclose(y, x @ record.dense().T, rtol=1e-4, atol=1e-4)
        return
    most = {"int8": 127, "int4": 7}[activations]
    step = np.abs(x).max(axis=1, keepdims=True) / np.float32(most)
    exact = np.rint(x / step).astype(np.int64) @ record.int8().T.astype(np.int64)
    np.testing.assert_allclose(y, exact * step * record.scale.T.astype(np.float32), rtol=1e-4, atol=1e-4)


def test_zero_rows_and_one_sided_groups():
    record = qoq(np.float32([[0, 0, 0, 0], [119, 119, 119, 119], [-119, -119, -119, -119]]), group_size=2)
    assert record.int8().tolist() == [[0] * 4, [120] * 4, [-120] * 4]


def test_a_recipe_of_qserve(tmp_path):
    """W4 A8 KV4, stored and read back, compiled and readable."""
    model = random_model("llama", intermediate_size=64)
    recipe = "smoothattention+qoq:group=32+dynamic:bits=8+kivi:bits=4,group=8"
    small = refllm.compress(model, recipe, IDS)
    save_native(small, tmp_path / "m")
    back = refllm.load(tmp_path / "m")
    assert isinstance(back.weights["model.layers.0.mlp.up_proj.weight"], TwoLevel)
    assert np.array_equal(forward(back, IDS), forward(small, IDS))
    gap = np.abs(forward(small, IDS) - forward(model, IDS))
    assert 0 < gap.mean() < 0.5 * np.abs(forward(model, IDS)).mean()


def test_what_it_refuses():
    W = np.ones((2, 12), np.float32)
    with pytest.raises(ValueError, match="group_size must be positive or -1"):
        qoq(W, group_size=0)
    with pytest.raises(ValueError, match="group_size 5 does not divide the 12 columns"):
        qoq(W, group_size=5)
    with pytest.raises(ValueError, match="too large for float16"):
        qoq(W * 1e8, group_size=-1)
