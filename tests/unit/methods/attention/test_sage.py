"""sage, sage2 and sage2pp: codes one number at a time, what smoothing may not change, what it gains."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.attention import attend
from refllm.methods.attention.flash import flash_with_lse
from refllm.methods.attention.sage import (
    _summed_in_float16,
    round_rows,
    row_groups,
    sage,
    sage2,
    sage2pp,
    sage_with_lse,
)


def example(seed=0, queries=7, keys=9, heads=4, kv_heads=2, dim=8, bias=0.0):
    rng = np.random.default_rng(seed)
    shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, 5))
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    return q, k + bias * rng.normal(size=(kv_heads, 1, dim)), v


def relative(got, exact):
    return np.linalg.norm(got - exact) / np.linalg.norm(exact)


def slow_groups(rows, granularity, side):
    """The rows of every group: warps of 32 queries hold 8 scales, 64 keys hold 4."""
    groups = {}
    for i in range(rows):
        if granularity == "tensor":
            of = 0
        elif granularity == "block":
            of = math.floor(i / (128 if side == "q" else 64))
        elif side == "q":
            of = (math.floor(i / 32), i % 8)
        else:
            of = (math.floor(i / 64), math.floor((i % 8) / 2))
        groups.setdefault(of, []).append(i)
    return sorted(groups.values())


@pytest.mark.parametrize("granularity", ["tensor", "block", "thread"])
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("rows", [1, 37, 200])
def test_rows_of_a_group(rows, granularity, side):
    of = row_groups(rows, granularity, side)
    found = sorted(np.flatnonzero(of == group).tolist() for group in np.unique(of))
    assert found == slow_groups(rows, granularity, side)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["tensor", "block", "thread"]),
    side=st.sampled_from("qk"),
    rows=st.integers(1, 80),
)
def test_codes_one_number_at_a_time(seed, bits, granularity, side, rows):
    rng = np.random.default_rng(seed)
    x = rng.integers(-40, 41, (rows, 3)) * rng.choice([0.0, 0.25, 1.0], size=(rows, 1))  # zeros, halves: ties
    codes, scale = round_rows(x, bits, granularity, side)
    most = 2 ** (bits - 1) - 1
    for group in slow_groups(rows, granularity, side):
        largest = max(abs(x[i, j]) for i in group for j in range(3))
        s = float(np.float32(largest / most + (1e-7 if granularity == "thread" else 0))) if largest else 1.0
        for i in group:
            assert scale[i] == np.float32(s)
            for j in range(3):
                code = math.floor(abs(x[i, j]) / s + 0.5)
                assert codes[i, j] == math.copysign(min(code, most), x[i, j])


def test_halves_go_away_from_zero():
    codes, _ = round_rows(np.array([[127.0, 0.5, 1.5, -0.5, -2.5, 0.49]]), 8, "block", "q")
    assert codes.tolist() == [[127, 1, 2, -1, -3, 0]]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("knobs", [dict(smooth_k=False), dict(), dict(smooth_q=True, smooth_v=True)])
def test_with_codes_that_are_exact_smoothing_changes_nothing(softcap, knobs):
    """Whole numbers whose largest is 127 in every group: both sides are on the grid, before smoothing and after."""
    rng = np.random.default_rng(0)
    q, v = (rng.integers(-3, 4, (2, 6, 4)).astype(float) for _ in range(2))
    half = rng.integers(-120, 121, (2, 3, 4))
    k = np.concatenate([half, -half], axis=1).astype(float)  # mean 0
    k[:, 0, 0], k[:, 3, 0] = 127, -127
    q[:, 0, 0], q[:, 1, 0] = 127, -127  # not smoothed on the grid, so q's mean must be a whole number
    q[:, 2:, 0], q[:, :, 1:] = 0, np.concatenate([q[:, :3, 1:], -q[:, :3, 1:]], axis=1)
    at, rule = (np.arange(6), np.arange(6)), dict(scale=1 / 800, softcap=softcap)
    exact = flash_with_lse(q, k, v, *at, **rule)
    got = sage_with_lse(q, k, v, *at, **rule, **knobs)
    np.testing.assert_allclose(got[0], exact[0], atol=2e-2)  # weights and values in float16
    np.testing.assert_allclose(got[1], exact[1], atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bias=st.sampled_from([0.0, 5.0]), window=st.none() | st.integers(1, 9))
def test_lse_is_that_of_the_scores_without_smoothing(seed, bias, window):
    """Bounds: a code of q or k is off by half a step, a sum over D by D times that and the other side."""
    q, k, v = example(seed, bias=bias)
    at, rule = (np.arange(2, 9), np.arange(9)), dict(scale=8**-0.5, window=window)
    exact = flash_with_lse(q, k, v, *at, **rule)[1]
    for granularity in ("tensor", "block", "thread"):
        for smooth_k in (False, True):
            lse = sage_with_lse(q, k, v, *at, **rule, granularity=granularity, smooth_k=smooth_k)[1]
            step = (np.abs(q).max() + 1e-6) * (np.abs(k).max() * (1 + smooth_k) + 1e-6) / 127
            assert np.abs(lse - exact).max() <= rule["scale"] * 8 * 1.01 * step


def test_smoothing_gains_what_the_bias_costs():
    gains = {}
    for bias in (0.0, 3.0, 10.0):
        q, k, v = example(3, 256, 256, dim=64, bias=bias)
        at = np.arange(256), np.arange(256)
        exact = attend(q, k, v, *at, scale=0.125)
        error = [relative(sage(q, k, v, *at, scale=0.125, smooth_k=s), exact) for s in (False, True)]
        gains[bias] = error[0] / error[1]
    assert 0.9 < gains[0.0] < 1.2 < gains[3.0] < gains[10.0] and gains[10.0] > 3


def test_finer_scales_are_better_on_average():
    errors = {name: 0.0 for name in ("thread", "block", "tensor")}
    for seed in range(4):
        q, k, v = example(seed, 256, 256, dim=64)
        at = np.full(256, 256), np.arange(256)
        exact = attend(q, k, v, *at, scale=0.125)
        for name in errors:
            errors[name] += relative(sage(q, k, v, *at, scale=0.125, granularity=name), exact) / 4
    assert errors["thread"] <= errors["block"] <= errors["tensor"] < 0.02


def test_values_that_share_a_bias():
    """smooth_v: E4M3 keeps what tells values apart; weights sum to 1, so the mean comes back whole."""
    q, k, v = example(1, 64, 64, dim=16)
    v += 50
    at = np.arange(64), np.arange(64)
    exact = attend(q, k, v, *at, scale=0.25)
    rough, fine = (np.abs(sage(q, k, v, *at, scale=0.25, values="fp8", smooth_v=s) - exact).max() for s in (0, 1))
    assert fine < rough / 5


def test_a_query_that_sees_nothing_gives_zeros_even_with_smoothed_values():
    q, k, v = example()
    o, lse = sage_with_lse(q, k, v + 3, np.arange(7), np.arange(5, 14), scale=1.0, smooth_v=True)
    assert not o[:, :5].any() and np.isneginf(lse[:, :5]).all() and np.isfinite(o[:, 5:]).all()


def test_sums_of_two_steps_fit_float16():
    """64 keys of weight 448 and value 2.25 make 64512; three steps would not fit, so each pair goes to a wide sum."""
    p, v = np.full((1, 192), 448.0), np.full((192, 1), 2.25)
    assert _summed_in_float16(p, v, 32, 64).item() == 192 * 448 * 2.25
    assert np.isinf(_summed_in_float16(p, v, 32, 192)).all()


def test_what_each_of_the_three_costs():
    q, k, v = example(0, 300, 300, dim=64)
    at = np.arange(300), np.arange(300)
    exact = attend(q, k, v, *at, scale=0.125)
    error = {method.__name__: relative(method(q, k, v, *at, scale=0.125), exact) for method in (sage, sage2, sage2pp)}
    assert error["sage"] < 0.015 < error["sage2pp"] < 0.05 < error["sage2"] < 0.25
    smooth = relative(sage(q, k, v, *at, scale=0.125, bits=4, smooth_q=True), exact)
    q = q + 4 * np.random.default_rng(1).normal(size=(4, 1, 64))
    exact = attend(q, k, v, *at, scale=0.125)
    with_bias, without = (relative(sage(q, k, v, *at, scale=0.125, bits=4, smooth_q=s), exact) for s in (True, False))
    assert with_bias < without and smooth < 0.25


def test_refusals():
    one, at = np.ones((1, 2, 4)), (np.arange(2), np.arange(2))
    with pytest.raises(ValueError, match="beyond float16; values=fp8 scales them"):
        sage(one, one, one * 1e6, *at, scale=1.0)
    assert sage(one, one, one * 1e6, *at, scale=1.0, values="fp8").max() == pytest.approx(1e6)
    for knobs, message in (
        (dict(bits=9), "bits must be 2 to 8, got 9"),
        (dict(values="fp4"), "values must be one of float16, fp8, fp8_float16, got 'fp4'"),
        (dict(granularity="row"), "granularity must be one of tensor, block, thread, got 'row'"),
    ):
        with pytest.raises(ValueError, match=message):
            sage(one, one, one, *at, scale=1.0, **knobs)
    with pytest.raises(ValueError, match="k holds NaN or Inf"):
        sage(one, one * np.inf, one, *at, scale=1.0)
