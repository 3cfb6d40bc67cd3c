"""omse: the searched range against every candidate tried by hand, and what the search promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.packed.records import Sum
from refllm.methods.quant.omse import omse
from refllm.methods.quant.rtn import rtn
from tests.strategies import PROPERTY, group_sizes, mixed_weights, weight_row


def slow(group, bits, symmetric, p):
    """The decoded group of least error, candidate by candidate in float32, as rtn would code a clipped group."""
    best, least = None, np.inf
    for step in range(80):
        r = np.float32(1 - step / 100)
        lo, hi = np.minimum(group.min(), 0) * r, np.maximum(group.max(), 0) * r
        if symmetric:
            amax = max(-lo, hi) or np.float32(1)
            scale = np.float32(np.maximum(np.float16(amax / np.float32(2 ** (bits - 1) - 1)), np.float16(6e-8)))
            codes = np.clip(np.rint(group / scale), -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
        else:
            lo, hi = (lo, hi) if hi > lo else (np.float32(-1), np.float32(1))
            scale = np.float32(np.maximum(np.float16((hi - lo) / np.float32(2**bits - 1)), np.float16(6e-8)))
            zero = np.clip(np.rint(-lo / scale), 0, 2**bits - 1)
            codes = np.clip(np.rint(group / scale) + zero, 0, 2**bits - 1) - zero
        decoded = scale * codes.astype(np.float32)
        error = (np.abs(decoded.astype(np.float64) - group) ** p).sum()
        if error < least:
            best, least = decoded, error
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equals_trying_every_range(bits, symmetric):
    W = np.stack([weight_row(kind, 24, 3) for kind in ("normal", "outlier", "constant", "zero")])
    record = omse(W, bits=bits, group_size=8, symmetric=symmetric)
    expected = [[slow(group, bits, symmetric, 2) for group in row.reshape(3, 8)] for row in W]
    np.testing.assert_array_equal(record.dense(), np.reshape(expected, W.shape))


@PROPERTY
@given(st.data(), st.integers(2, 8), st.booleans(), st.sampled_from([1.0, 2.0, 2.4]))
def test_never_worse_than_the_full_range_in_its_own_measure(data, bits, symmetric, p):
    W = data.draw(mixed_weights(columns=st.integers(1, 24)))
    g = data.draw(group_sizes(W.shape[1]))
    knobs = dict(bits=bits, group_size=g, symmetric=symmetric)
    lost = lambda record: np.abs(record.dense().astype(np.float64) - W) ** p
    mine, full = lost(omse(W, p=p, **knobs)), lost(rtn(W, **knobs))
    groups = lambda x: x.reshape((1, 1, -1) if g == 0 else (len(W), 1 if g == -1 else W.shape[1] // g, -1)).sum(-1)
    assert (groups(mine) <= groups(full) * (1 + 1e-12)).all()


def clip_of(W, bits):
    """The searched end of the range, by the largest decoded weight."""
    return np.abs(omse(W, bits=bits, group_size=0, symmetric=True).dense()).max()


def test_four_bits_of_a_normal_weight_end_near_two_and_a_half_sigma():
    W = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    assert 2.3 < clip_of(W, 4) < 2.9  # analytic optimum for 16 levels: 2.56; 15 levels are used here
    assert np.abs(W).max() > 4


def test_one_huge_weight_is_given_up_and_eight_bits_keep_everything():
    W = np.random.default_rng(1).normal(size=(8, 1024)).astype(np.float32)
    spiked = W.copy()
    spiked[0, 0] = 8
    assert clip_of(spiked, 3) < 4
    assert clip_of(W, 8) > 0.9 * np.abs(W).max()


def test_a_second_weight_takes_what_the_first_missed():
    W = weight_row("normal", 64, 5)[None]
    one, two = omse(W, bits=4, group_size=32), omse(W, bits=4, group_size=32, dual=True)
    assert isinstance(two, Sum) and two.nbytes == 2 * one.nbytes
    np.testing.assert_array_equal(two.first.dense(), one.dense())
    error = lambda record: np.square(record.dense() - W).sum()
    assert error(two) < error(one) / 50  # each four bits divide the step by about 16


def test_wrong_knobs_and_weights():
    W = np.ones((2, 4), np.float32)
    for p in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match="p must be above 0"):
            omse(W, group_size=2, p=p)
    with pytest.raises(ValueError, match="NaN or Inf"):
        omse(np.array([[np.nan, 1]]), group_size=2)
    with pytest.raises(ValueError, match="group_size 3 does not divide the 4 columns"):
        omse(W, group_size=3)


def test_in_a_recipe():
    model = refllm.load("tiny")
    small = refllm.compress(model, "omse:bits=3,group=32+kivi:bits=4")
    plain = refllm.compress(model, "rtn:bits=3,group=32")
    name = "model.layers.0.mlp.up_proj.weight"
    assert small.weights[name].nbytes == plain.weights[name].nbytes
    assert np.isfinite(refllm.forward(small, [1, 2, 3])).all()
