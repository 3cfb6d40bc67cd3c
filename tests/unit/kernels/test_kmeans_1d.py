"""k-means on a line: against loops in fractions and against every partition there is."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.kmeans_1d import exact_1d, lloyd_1d, near_best_1d, nearest_1d
from tests.strategies import PROPERTY, SEEDS


def objective(x, weights, centres):
    """Per row, of the nearest centres."""
    off = np.take_along_axis(centres, nearest_1d(x, centres).astype(np.intp), axis=1) - x
    return (weights * off**2).sum(axis=1)


def row_problem(seed, rows=4, n=9, zero_weights=True):
    """Rows with equal numbers, weights of very different size, and weights of 0."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((rows, n)) < 0.3, rng.integers(-2, 3, (rows, n)), rng.normal(size=(rows, n)))
    weights = np.exp(3 * rng.normal(size=(rows, n)))
    if zero_weights:
        weights[rng.random((rows, n)) < 0.3] = 0
    return x, weights


def slow_lloyd(x, weights, centres, iterations):
    """One row, one point at a time, in fractions."""
    centres = sorted(map(Fraction, centres))
    points = sorted(zip(map(Fraction, x), map(Fraction, weights), strict=True), key=lambda pair: pair[0])
    for _ in range(iterations):
        clusters = [[] for _ in centres]
        for value, weight in points:
            code = sum(value > (a + b) / 2 for a, b in itertools.pairwise(centres))
            clusters[code].append((value, weight))
        sums = [sum(w for _, w in cluster) for cluster in clusters]
        means = [
            sum(v * w for v, w in cluster) / total if total > 0 else centre
            for cluster, total, centre in zip(clusters, sums, centres, strict=True)
        ]
        if 0 in sums:
            far = [(w * (v - m) ** 2, v) for cluster, m in zip(clusters, means, strict=True) for v, w in cluster]
            largest = max(far, key=lambda pair: pair[0])
            if largest[0] > 0:
                means[sums.index(0)] = largest[1]
        centres = sorted(means)
    return list(map(float, centres))


@PROPERTY
@given(SEEDS, st.integers(1, 6), st.integers(0, 6))
def test_lloyd_equals_the_loops(seed, K, iterations):
    x, weights = row_problem(seed, zero_weights=seed % 2 == 0)
    weights[weights.sum(axis=1) == 0] = 1
    start = np.random.default_rng(seed + 1).normal(size=(len(x), K))
    ours = lloyd_1d(x, weights, start, iterations)
    slow = [slow_lloyd(*row, iterations) for row in zip(x, weights, start, strict=True)]
    np.testing.assert_allclose(ours, slow, rtol=1e-9, atol=1e-9)


@PROPERTY
@given(SEEDS, st.integers(1, 5))
def test_exact_equals_every_partition(seed, K):
    x, weights = row_problem(seed, rows=2, n=7)
    found = objective(x, weights, exact_1d(x, weights, K))
    for row in range(len(x)):
        order = np.argsort(x[row])
        values, w = x[row, order], weights[row, order]
        least = np.inf
        for cuts in itertools.combinations(range(1, 7), min(K, 7) - 1):
            parts = itertools.pairwise((0, *cuts, 7))
            error = 0.0
            for a, b in parts:
                mean = np.average(values[a:b], weights=w[a:b]) if w[a:b].any() else 0.0
                error += np.sum(w[a:b] * (values[a:b] - mean) ** 2)
            least = min(least, error)
        assert found[row] == pytest.approx(least, rel=1e-9, abs=1e-9)


@PROPERTY
@given(SEEDS, st.integers(1, 8))
def test_steps_never_raise_the_objective_and_never_beat_the_optimum(seed, K):
    x, weights = row_problem(seed, n=20)
    start = np.random.default_rng(seed).normal(size=(len(x), K))
    errors = [objective(x, weights, lloyd_1d(x, weights, start, n)) for n in (0, 1, 2, 5, 50)]
    assert all((b <= a + 1e-9).all() for a, b in itertools.pairwise(errors))
    assert (objective(x, weights, exact_1d(x, weights, K)) <= errors[-1] + 1e-9).all()


def test_near_best_is_the_best_of_short_rows_and_near_it_in_long_ones():
    x, weights = row_problem(5, rows=6, n=60)
    best = objective(x, weights, exact_1d(x, weights, 8))
    np.testing.assert_allclose(objective(x, weights, near_best_1d(x, weights, 8)), best, rtol=1e-9)
    x, weights = row_problem(6, rows=6, n=300)
    best, found = (objective(x, weights, f(x, weights, 8)) for f in (exact_1d, near_best_1d))
    assert (found <= 1.1 * best).all() and found.sum() <= 1.04 * best.sum()


@PROPERTY
@given(SEEDS, st.integers(1, 9))
def test_near_best_is_never_worse_than_the_even_grid(seed, K):
    x, weights = row_problem(seed, n=30)
    used = np.where(weights > 0, x, np.nan)
    low, high = np.nan_to_num(np.nanmin(used, axis=1)), np.nan_to_num(np.nanmax(used, axis=1))
    even = np.linspace(low, high, K, axis=1)
    assert (objective(x, weights, near_best_1d(x, weights, K, 8)) <= objective(x, weights, even) + 1e-9).all()


def test_by_hand():
    # 1 is halfway between 0 and 2: the lower cluster takes it.
    assert nearest_1d(np.array([[1.0, -5, 9]]), np.array([[0.0, 2.0]])).tolist() == [[0, 0, 1]]
    # Middles 5 and 15: the clusters are {0, 4}, {10}, {20}.
    x, one = np.array([[0.0, 4, 10, 20]]), np.ones((1, 4))
    assert lloyd_1d(x, one, np.array([[0.0, 10, 20]])).tolist() == [[2.0, 10.0, 20.0]]
    # Nothing is near 100: that centre moves to the point farthest from its mean, 20 (from 8.5 of {0, 4, 10, 20}).
    assert lloyd_1d(x, one, np.array([[0.0, 100]]), 1).tolist() == [[8.5, 20.0]]
    assert lloyd_1d(x, one, np.array([[0.0, 100]])).tolist() == [[14 / 3, 20.0]]
    # A weight of 0 pulls nothing; one of 3 counts three times.
    assert lloyd_1d(x, np.array([[1.0, 3, 0, 0]]), np.array([[0.0]])).tolist() == [[3.0]]


def test_fewer_numbers_than_centres():
    x, one = np.array([[3.0, 3.0, 5.0]]), np.ones((1, 3))
    for centres in (exact_1d(x, one, 4), lloyd_1d(x, one, np.zeros((1, 4)))):
        assert set(centres[0]) >= {3.0, 5.0} and objective(x, one, centres) == 0
    nothing = np.zeros((1, 3))
    assert np.isfinite(exact_1d(x, nothing, 2)).all()
    assert lloyd_1d(x, nothing, np.array([[1.0, 2.0]])).tolist() == [[1.0, 2.0]]


def test_weights_that_vanish_beside_others():
    """The difference of two sums of prefixes says nothing of them: their centre is free for the others."""
    x, weights = np.array([[0.0, 1.0, 100.0, 101.0]]), np.array([[1e15, 1e15, 1e-15, 1e-15]])
    start = np.array([[0.0, 100.0]])
    centres = lloyd_1d(x, weights, start)
    assert centres.tolist() == [[0.0, 1.0]] and objective(x, weights, centres) < objective(x, weights, start)
