"""The clip search against loops over tokens, rows and groups, and what it promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.grids import MinMaxGrid
from refllm.kernels.scales import clip, clip_limits
from tests.strategies import PROPERTY


def example(seed, rows=3, columns=16, tokens=20):
    rng = np.random.default_rng(seed)
    W = rng.standard_t(3, (rows, columns)).astype(np.float32)
    return W, (rng.normal(size=(tokens, columns)) * np.exp(rng.normal(size=columns))).astype(np.float32)


def group_errors(W, X, bits, first, last, row):
    """The errors of the ten limits of one group, with products token by token."""
    w = W[row, first:last].astype(np.float64)
    errors = []
    for i in range(10):
        limit = np.float32(np.abs(W[row, first:last]).max() * np.float32(1 - i / 20))
        cut = np.clip(W[row, first:last], -limit, limit)
        grid = MinMaxGrid(bits, -1)
        found = grid.fit(cut[None])
        rounded = grid.decode(grid.encode(cut[None], *found), *found)[0]
        errors.append(np.mean([(float(x @ rounded) - float(x @ w)) ** 2 for x in X[:, first:last].astype(np.float64)]))
    return errors


@pytest.mark.parametrize("group", [4, 8, 16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_limits_are_those_of_the_loops(bits, group):
    for seed in range(4):
        W, X = example(seed)
        limits = clip_limits(W, X, MinMaxGrid(bits, group))
        width = 16 if group == -1 else group
        for row in range(len(W)):
            for g, first in enumerate(range(0, 16, width)):
                errors = group_errors(W, X, bits, first, first + width, row)
                amax = np.abs(W[row, first : first + width]).max()
                chosen = round((1 - limits[row, g] / amax) * 20)
                assert errors[chosen] <= min(errors) * (1 + 1e-9)


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from((2, 3, 4, 8)))
def test_limits_stay_between_half_and_all(seed, bits):
    W, X = example(seed)
    limits = clip_limits(W, X, MinMaxGrid(bits, 8))
    amax = np.abs(W.reshape(3, 2, 8)).max(axis=-1)
    assert limits.dtype == W.dtype and (limits <= amax).all() and (limits >= 0.55 * amax * (1 - 1e-6)).all()
    assert np.array_equal(clip_limits(W, 4 * X, MinMaxGrid(bits, 8)), limits)  # a common factor changes no comparison


def test_where_nothing_is_gained_nothing_is_cut():
    """0 and +-1 lie on a grid of two bits exactly: the first limit has no error, and no later one is better."""
    W = np.array([[-1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    limits = clip_limits(W, np.ones((5, 8), np.float32), MinMaxGrid(2, 4))
    assert limits.tolist() == [[2.0, 0.0]]
    assert np.array_equal(clip(W, limits, 4), W)


def test_parts_of_a_row_are_judged_one_by_one():
    """The groups' errors cancel where they are added up: equal weights, inputs of opposite sign."""
    rng = np.random.default_rng(0)
    half, x = rng.standard_t(2, (1, 8)).astype(np.float32), rng.normal(size=(30, 8)).astype(np.float32)
    alone = clip_limits(half, x, MinMaxGrid(2, 8))
    both = clip_limits(np.concatenate([half, half], 1), np.concatenate([x, -x], 1), MinMaxGrid(2, 8))
    assert both.tolist() == [alone[0].tolist() * 2] and alone[0, 0] < np.abs(half).max()


def test_many_tokens_are_thinned_out():
    W, X = example(1, tokens=1600)
    grid = MinMaxGrid(3, 8)
    assert np.array_equal(clip_limits(W, X, grid), clip_limits(W, X[::3], grid))
