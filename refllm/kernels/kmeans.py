"""k-means of vectors with weights. The same centres and codes on every machine.

    minimise  sum over i of  weight_i |x_i - centre[code_i]|^2

Lloyd's step (codes = nearest centre, centre = weighted mean) starts from k-means++: points drawn with probability
weight times squared distance to the nearest centre drawn before.

Rules, so that there is one answer: a point halfway between two centres takes the first of them; a centre without weight
moves to the point with the largest weight times squared distance, the first of equals, and stays where it is if all
points lie on centres; all sums are float64, in a fixed order. A step never raises the objective.

Lloyd 1982, "Least squares quantization in PCM"; Arthur and Vassilvitskii 2007, "k-means++: The advantages of careful
seeding". Of numbers, where more is possible: kmeans_1d.py.
"""

from functools import cache

import numpy as np

from refllm.kernels.packed import backend
from refllm.kernels.packed.threads import over_rows

_CHUNK = 1 << 15  # distances at a time, which stay in a processor's cache


def kmeans(
    X: np.ndarray, K: int, rng: np.random.Generator, weights: np.ndarray | None = None, iterations: int = 25
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm on vectors, from k-means++.

    Parameters
    ----------
    X : (n, d) float
    K : int
    rng : Generator
        One draw for each centre.
    weights : (n,) float, optional
        Not negative; 1 unless given.
    iterations : int
        At most so many steps; 0: the seeds.

    Returns
    -------
    centres : (K, d) float64
    codes : (n,) int64
        The nearest centre of each vector.

    Raises
    ------
    ValueError
        No vectors, NaN or Inf, a weight below 0 or none above it, K below 1.

    Examples
    --------
    >>> X = np.array([[0.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    >>> centres, codes = kmeans(X, 2, np.random.default_rng(0))
    >>> sorted(centres.tolist())
    [[0.0, 1.0], [9.0, 9.0]]
    """
    X = np.ascontiguousarray(X, np.float64)
    weights = np.ones(len(X)) if weights is None else np.asarray(weights, np.float64)
    if X.ndim != 2 or 0 in X.shape or weights.shape != (len(X),):
        raise ValueError(f"k-means needs vectors (n, d) and n weights, got shapes {X.shape} and {weights.shape}")
    if not (np.isfinite(X).all() and np.isfinite(weights).all()):
        raise ValueError("k-means needs finite vectors and weights, got NaN or Inf among them")
    if K < 1 or (weights < 0).any() or not weights.any():
        raise ValueError(f"k-means needs 1 centre or more and weights from 0 on, not all 0; got {K} centres")
    centres = _seeds(X, K, rng, weights)
    codes, squares = nearest(X, centres)
    for _ in range(iterations):
        centres = _moved(X, weights, centres, codes, squares)
        before = codes
        codes, squares = nearest(X, centres)
        if np.array_equal(codes, before):
            break
    return centres, codes


def _seeds(X: np.ndarray, K: int, rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """k-means++; once every vector with a weight is a centre, the first seed again."""
    columns, draws = np.ascontiguousarray(X.T), rng.random(K)  # one coordinate of all vectors after another
    chosen = np.empty(K, np.int64)
    if backend() == "numba":
        _compiled("seeds")(columns, np.ascontiguousarray(weights), draws, chosen)
        return X[chosen]
    chances, squares = weights, np.full(len(X), np.inf)
    for k, draw in enumerate(draws):
        sums = np.cumsum(chances)
        at = np.searchsorted(sums, draw * sums[-1], side="right") if sums[-1] > 0 else chosen[0]
        chosen[k] = min(at, len(X) - 1)
        squares = np.minimum(squares, _squares(columns, X[chosen[k]]))
        chances = weights * squares
    return X[chosen]


def _squares(columns: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Squared distances from a centre; the elements are added in order."""
    total = np.zeros(columns.shape[1])
    for x, c in zip(columns, centre, strict=True):
        off = x - c
        off *= off
        total += off
    return total


def nearest(X: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of every vector, the first of equals.

    Parameters
    ----------
    X : (n, d) float
    centres : (K, d) float

    Returns
    -------
    codes : (n,) int64
    squares : (n,) float64
        Squared distances.

    Examples
    --------
    >>> [found.tolist() for found in nearest(np.array([[0.0, 1.0], [5.0, 5.0]]), np.array([[0.0, 0.0], [0.0, 2.0]]))]
    [[0, 1], [1.0, 34.0]]
    """
    X, centres = np.ascontiguousarray(X, np.float64), np.ascontiguousarray(centres, np.float64)
    codes, squares = np.empty(len(X), np.int64), np.empty(len(X))
    if backend() == "numba":
        columns, kernel = np.ascontiguousarray(centres.T), _compiled("nearest")
        run = lambda first, last: kernel(X[first:last], columns, codes[first:last], squares[first:last])
        over_rows(run, len(X), X.size * len(centres))
        return codes, squares
    step = max(1, _CHUNK // len(centres))
    for first in range(0, len(X), step):
        part = slice(first, first + step)
        distance = np.zeros((len(X[part]), len(centres)))
        for x, c in zip(X[part].T, centres.T, strict=True):
            off = x[:, None] - c
            off *= off
            distance += off
        codes[part] = np.argmin(distance, axis=1)
        squares[part] = np.take_along_axis(distance, codes[part, None], axis=1)[:, 0]
    return codes, squares


@cache
def _compiled(name: str):
    from refllm.kernels.packed import cluster_kernels
    from refllm.kernels.packed.compile import compile_kernel

    return compile_kernel(getattr(cluster_kernels, name), getattr(cluster_kernels, name.upper()))


def _moved(X, weights, centres, codes, squares) -> np.ndarray:
    """Weighted means of the clusters; centres without weight move to the farthest points."""
    K = len(centres)
    weight = np.bincount(codes, weights, K)
    means = centres.copy()
    for j, x in enumerate(X.T):
        np.divide(np.bincount(codes, weights * x, K), weight, out=means[:, j], where=weight > 0)
    far = weights * squares
    for empty in np.flatnonzero(weight == 0):
        point = int(np.argmax(far))
        if far[point] == 0:
            break
        means[empty], far[point] = X[point], 0
    return means
