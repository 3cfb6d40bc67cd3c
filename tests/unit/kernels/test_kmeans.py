"""k-means of vectors: against loops, ties and empty clusters by rule, bits pinned (those of k-means on a line, too)."""

import hashlib
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.kmeans import kmeans, nearest
from refllm.kernels.kmeans_1d import exact_1d, lloyd_1d, nearest_1d
from tests.strategies import PROPERTY, SEEDS


@PROPERTY
@given(SEEDS, st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
def test_nearest_equals_the_loops_and_the_kernel(seed, n, K, d):
    rng = np.random.default_rng(seed)
    X, centres = rng.integers(-2, 3, (n, d)) / 2.0, rng.integers(-2, 3, (K, d)) / 2.0  # many ties
    if seed % 2:
        X += rng.normal(size=X.shape)
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for kernels in ("numpy", "numba"):
            patch.setenv("REFLLM_KERNELS", kernels)
            found[kernels] = nearest(X, centres)
    for i, x in enumerate(X):
        squares = []
        for centre in centres:
            total = 0.0
            for a, b in zip(x.tolist(), centre.tolist(), strict=True):
                total += (a - b) * (a - b)
            squares.append(total)
        for codes, distance in found.values():
            assert codes[i] == squares.index(min(squares)) and distance[i] == min(squares)


@PROPERTY
@given(SEEDS, st.integers(1, 12))
def test_vectors_never_get_worse_with_more_steps(seed, K):
    rng = np.random.default_rng(seed)
    X, weights = rng.normal(size=(30, 3)), rng.random(30)
    errors = []
    for iterations in (0, 1, 3, 20):
        centres, codes = kmeans(X, K, np.random.default_rng(seed), weights, iterations)
        np.testing.assert_array_equal(codes, nearest(X, centres)[0])
        errors.append((weights * ((X - centres[codes]) ** 2).sum(axis=1)).sum())
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))


def slow_seeds(X, K, rng, weights):
    """The chance of every point in fractions, its squared distance as floats have it."""
    chosen = []
    for draw in rng.random(K).tolist():
        chances = [Fraction(w) for w in weights.tolist()]
        for i, x in enumerate(X.tolist() if chosen else []):
            squares = [sum(((a - b) * (a - b) for a, b in zip(x, X[c].tolist(), strict=True)), 0.0) for c in chosen]
            chances[i] *= Fraction(min(squares))
        below = list(itertools.accumulate(chances))
        drawn = Fraction(draw) * below[-1]
        chosen.append(next(i for i, sum_ in enumerate(below) if sum_ > drawn) if below[-1] else chosen[0])
    return X[chosen]


@PROPERTY
@given(SEEDS, st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
def test_seeds_equal_the_loops_and_the_kernel(seed, n, K, d):
    """Quarters and whole weights: sums are exact. Some points are equal, some weigh nothing."""
    rng = np.random.default_rng(seed)
    X, weights = rng.integers(-3, 4, (n, d)) / 4.0, rng.integers(0, 4, n).astype(np.float64)
    weights[rng.integers(n)] = 1
    slow = slow_seeds(X, K, np.random.default_rng(seed), weights)
    with pytest.MonkeyPatch.context() as patch:
        for kernels in ("numpy", "numba"):
            patch.setenv("REFLLM_KERNELS", kernels)
            draws = np.random.default_rng(seed)
            np.testing.assert_array_equal(kmeans(X, K, draws, weights, 0)[0], slow)
            assert draws.random() == np.random.default_rng(seed).random(K + 1)[-1]  # one draw for each centre


@PROPERTY
@given(SEEDS, st.integers(1, 300), st.integers(1, 20), st.integers(1, 5))
def test_seeds_of_any_numbers_are_those_of_the_kernel(seed, n, K, d):
    """Sums that are rounded, far points whose squares overflow and near ones whose squares vanish."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * 10.0 ** rng.choice([-170, -3, 0, 3, 160], (n, 1))
    weights = np.where(rng.random(n) < 0.3, 0, np.exp(9 * rng.normal(size=n)))
    weights[-1] += seed % 2 or not weights.any()
    found = []
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore", invalid="ignore"):
        for kernels in ("numpy", "numba"):
            patch.setenv("REFLLM_KERNELS", kernels)
            found.append(kmeans(X, K, np.random.default_rng(seed), weights, 0)[0])
    np.testing.assert_array_equal(*found)


def test_arrays_that_may_not_be_written_and_have_gaps():
    X, weights = np.random.default_rng(0).normal(size=(20, 6)), np.arange(1.0, 21)
    expected = kmeans(X[:, ::2].copy(), 4, np.random.default_rng(0), weights[::-1].copy())
    X.flags.writeable = weights.flags.writeable = False
    for given_ in ((X[:, ::2], weights[::-1]), (X[:, ::2].copy(order="F"), weights[::-1].tolist())):
        found = kmeans(given_[0], 4, np.random.default_rng(0), given_[1])
        assert all(map(np.array_equal, found, expected))
    whole = X[:, :3].copy()
    whole.flags.writeable = False
    assert np.array_equal(nearest(whole, whole)[0], np.arange(20))


def test_seeds_are_points_and_differ():
    X = np.arange(10.0)[:, None]
    centres, _ = kmeans(X, 10, np.random.default_rng(3), iterations=0)
    assert sorted(centres[:, 0]) == list(range(10))  # a point that is a centre is never drawn again
    weights = np.where(np.arange(10) < 3, 1.0, 0.0)
    assert kmeans(X, 3, np.random.default_rng(3), weights, 0)[0].max() <= 2


def test_as_many_centres_as_vectors_that_differ_lose_nothing():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(8, 2))
    X = points[rng.integers(8, size=50)]
    centres, codes = kmeans(X, 8, rng)
    np.testing.assert_allclose(centres[codes], X, rtol=1e-15)
    centres, codes = kmeans(np.ones((4, 2)), 3, rng)  # fewer than asked for
    np.testing.assert_array_equal(centres[codes], np.ones((4, 2)))


def test_an_empty_cluster_moves_to_the_farthest_vector():
    """Seeds 0, 0.5, 1 of weight 1 and a far cloud without a seed cannot stay: one centre goes there."""
    X = np.concatenate([np.zeros((5, 1)), np.full((5, 1), 10.0), np.full((1, 1), 12.0)])
    for seed in range(20):
        centres, codes = kmeans(X, 3, np.random.default_rng(seed))
        np.testing.assert_array_equal(centres[codes], X)


def test_bad_input_is_named():
    rng = np.random.default_rng(0)
    for X, K, weights in (
        (np.ones(3), 1, None),
        (np.ones((0, 2)), 1, None),
        (np.ones((2, 2)), 0, None),
        (np.ones((2, 2)), 1, np.ones(3)),
        (np.ones((2, 2)), 1, np.array([-1.0, 2])),
        (np.ones((2, 2)), 1, np.zeros(2)),
        (np.array([[1.0], [np.nan]]), 1, None),
        (np.array([[1.0], [np.inf]]), 1, None),
        (np.ones((2, 2)), 1, np.array([1.0, np.nan])),
    ):
        with pytest.raises(ValueError, match="k-means needs"):
            kmeans(X, K, rng, weights)


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_bits_are_the_same_everywhere(kernels, monkeypatch):
    """No sum goes through BLAS or changes its order with a vector unit's width, so these hold on any machine."""
    monkeypatch.setenv("REFLLM_KERNELS", kernels)
    rng = np.random.default_rng(7)
    X = rng.integers(-1000, 1000, (300, 4)) / 256.0
    centres, codes = kmeans(X, 16, np.random.default_rng(1), rng.integers(1, 9, 300) / 4.0)
    x, weights = X.reshape(4, 300), rng.integers(0, 9, (4, 300)) / 4.0
    on_lines = lloyd_1d(x, weights, np.tile(np.linspace(-4, 4, 8), (4, 1)))
    digest = hashlib.sha256()
    for array in (centres, codes, on_lines, nearest_1d(x, on_lines), exact_1d(x, weights, 8)):
        digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest()[:16] == "d997495ce13b0f26"
