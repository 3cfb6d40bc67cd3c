"""k-means with weights: of numbers, row by row, and of vectors. The same centres and codes on every machine.

    minimise  sum over i of  weight_i |x_i - centre[code_i]|^2

On a line the clusters of any optimum are intervals. So Lloyd's step (codes = nearest centre, centre = weighted mean)
needs nothing of a sorted row but where the middles of neighbouring centres fall and sums of prefixes, and the optimum
itself is found by dynamic programming:

    best[k, j] = min over i of  best[k - 1, i] + cost(i, j)        cost(i, j): points i .. j - 1 around their mean

Among vectors Lloyd's step starts from k-means++ (points drawn with probability weight times squared distance to the
nearest centre drawn before).

Rules, so that there is one answer: a point halfway between two centres takes the lower one (vectors: the one that is
first); a centre without weight (or, on a line, with one that vanishes in sums of the row's) moves to the point with
the largest weight times squared distance, the first of equals, and stays where it is if all points lie on centres; all
sums are float64, in a fixed order. A step never raises the objective: a row is never worse than its start.

Lloyd 1982, "Least squares quantization in PCM"; Arthur and Vassilvitskii 2007, "k-means++: The advantages of careful
seeding"; Wang and Song 2011, "Ckmeans.1d.dp: Optimal k-means clustering in one dimension by dynamic programming".
"""

from functools import cache

import numpy as np

from refllm.kernels.packed import backend
from refllm.kernels.packed.threads import over_rows

_CHUNK = 1 << 15  # distances at a time, which stay in a processor's cache


def lloyd_1d(x: np.ndarray, weights: np.ndarray, start: np.ndarray, iterations: int = 50) -> np.ndarray:
    """Lloyd's algorithm on numbers, every row by itself.

    Parameters
    ----------
    x : (rows, n) float
    weights : (rows, n) float
        Not negative. A number of weight 0 pulls no centre.
    start : (rows, K) float
        Centres to begin with, in any order.
    iterations : int
        At most so many steps.

    Returns
    -------
    (rows, K) float64
        Centres, rising. `nearest_1d` gives the codes.

    Examples
    --------
    >>> x = np.array([[0.0, 1.0, 10.0, 12.0]])
    >>> lloyd_1d(x, np.array([[1.0, 3.0, 1.0, 1.0]]), np.array([[0.0, 5.0]])).tolist()
    [[0.75, 11.0]]
    """
    x, weights = _sorted(x, weights)
    sums = _prefix_sums(weights), _prefix_sums(weights * x)
    centres = np.sort(start.astype(np.float64), axis=1)
    open_rows = np.arange(len(x))
    for _ in range(iterations):
        before = centres[open_rows]
        after = _lloyd_step(x[open_rows], weights[open_rows], [s[open_rows] for s in sums], before)
        centres[open_rows] = after
        open_rows = open_rows[(after != before).any(axis=1)]
        if open_rows.size == 0:
            break
    return centres


def _sorted(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in rising order; numbers of weight 0 stand at the end as copies of the largest that has one."""
    order = np.lexsort((x, weights == 0), axis=1)
    x = np.take_along_axis(x, order, axis=1).astype(np.float64)
    weights = np.take_along_axis(weights, order, axis=1).astype(np.float64)
    last = np.maximum((weights > 0).sum(axis=1, keepdims=True) - 1, 0)
    return np.where(weights > 0, x, np.take_along_axis(x, last, axis=1)), weights


def _prefix_sums(values: np.ndarray) -> np.ndarray:
    """(rows, n) -> (rows, n + 1): sums of the first 0 .. n values."""
    return np.pad(np.cumsum(values, axis=1), ((0, 0), (1, 0)))


def _lloyd_step(x, weights, sums, centres):
    """New centres of rows that are sorted, as their centres are."""
    rows, n = x.shape
    edges = np.empty((rows, centres.shape[1] + 1), np.intp)
    edges[:, 0], edges[:, -1] = 0, n
    edges[:, 1:-1] = _count_up_to(x, _middles(centres))
    edges = np.minimum(edges, (weights > 0).sum(axis=1, keepdims=True))  # of those that weigh
    weight, moment = (np.diff(np.take_along_axis(s, edges, axis=1), axis=1) for s in sums)
    mean = np.divide(moment, weight, out=centres.copy(), where=weight > 0)
    # Differences of sums are rounded: a mean stays among the points it is the mean of.
    first = np.take_along_axis(x, np.minimum(edges[:, :-1], n - 1), axis=1)
    last = np.take_along_axis(x, np.maximum(edges[:, 1:] - 1, 0), axis=1)
    mean = np.where(weight > 0, np.clip(mean, first, last), mean)
    lacking = np.flatnonzero((weight <= 0).any(axis=1))
    if lacking.size:
        _reseed(x[lacking], weights[lacking], edges[lacking], weight[lacking], mean, lacking)
    return np.sort(mean, axis=1)


def _reseed(x, weights, edges, weight, mean, rows):
    """Move the first centre without weight of each of some rows to the farthest point, in place."""
    codes = np.zeros(x.shape, np.intp)
    for edge in edges[:, 1:-1].T:
        codes += np.arange(x.shape[1]) >= edge[:, None]
    far = weights * (x - np.take_along_axis(mean[rows], codes, axis=1)) ** 2
    point = np.argmax(far, axis=1)[:, None]
    at = np.take_along_axis(x, point, axis=1)[:, 0]
    moved = np.take_along_axis(far, point, axis=1)[:, 0] > 0
    empty = np.argmax(weight <= 0, axis=1)
    mean[rows[moved], empty[moved]] = at[moved]


def _middles(centres: np.ndarray) -> np.ndarray:
    return (centres[:, 1:] + centres[:, :-1]) / 2


def _count_up_to(x: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """How many numbers of each sorted row of x are at most each limit: (rows, n), (rows, m) -> (rows, m)."""
    low = np.zeros(limits.shape, np.intp)
    high = np.full(limits.shape, x.shape[1], np.intp)
    for _ in range(x.shape[1].bit_length()):
        middle = (low + high) // 2
        inside = np.take_along_axis(x, np.minimum(middle, x.shape[1] - 1), axis=1) <= limits
        low = np.where(inside & (middle < high), middle + 1, low)
        high = np.where(inside, high, middle)
    return low


def nearest_1d(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest centre of every number, row by row.

    Parameters
    ----------
    x : (rows, n) float
    centres : (rows, K) float, K at most 256
        Rising in every row. Middles are computed in float64; a number on one takes the lower centre.

    Returns
    -------
    (rows, n) uint8

    Examples
    --------
    >>> nearest_1d(np.array([[-9.0, 1.0, 1.1]]), np.array([[0.0, 2.0]])).tolist()
    [[0, 0, 1]]
    """
    codes = np.zeros(x.shape, np.uint8)
    for middle in _middles(centres.astype(np.float64)).T:
        codes += x > middle[:, None]
    return codes


def exact_1d(x: np.ndarray, weights: np.ndarray, K: int) -> np.ndarray:
    """The centres of the smallest objective there is, every row by itself: K n^2 / 2 steps a row.

    Parameters
    ----------
    x : (rows, n) float
    weights : (rows, n) float
        Not negative.
    K : int
        Centres; the lowest one is repeated where a row has fewer numbers that differ.

    Returns
    -------
    (rows, K) float64
        Rising. Of several optima the one whose last cluster begins earliest, and so on down.

    Examples
    --------
    >>> exact_1d(np.array([[5.0, 0.0, 4.0, 1.0]]), np.ones((1, 4)), 2).tolist()
    [[0.5, 4.5]]
    """
    x, weights = _sorted(x, weights)
    total, moment = (_prefix_sums(part)[:, -1:] for part in (weights, weights * x))
    shift = np.divide(moment, total, out=np.zeros_like(total), where=total > 0)
    x = x - shift  # around the mean, differences of sums of squares lose least
    sums = [_prefix_sums(weights), _prefix_sums(weights * x), _prefix_sums(weights * x * x)]
    rows, n = x.shape
    best = np.full((rows, n + 1), np.inf)
    best[:, 0] = 0
    begins = np.zeros((K, rows, n + 1), np.intp)
    for k in range(K):
        new = np.full((rows, n + 1), np.inf)
        new[:, 0] = 0
        for j in range(1, n + 1):
            through = best[:, :j] + _cost(sums, j)
            begins[k, :, j] = np.argmin(through, axis=1)
            new[:, j] = np.take_along_axis(through, begins[k, :, j, None], axis=1)[:, 0]
        best = new
    return shift + _means_of(x, sums, begins)


def near_best_1d(x: np.ndarray, weights: np.ndarray, K: int, bins: int = 64) -> np.ndarray:
    """Lloyd's algorithm from the best centres of a coarse row and from the even grid; of the two results the better.

    The coarse row has the weighted means of `bins` runs of the sorted row in place of its numbers, so that the search
    for its best centres costs no more for a long row than for a short one. Rounding to the even grid from the lowest
    number to the highest is never better than the result.

    Parameters
    ----------
    x, weights, K :
        As for `exact_1d`.
    bins : int

    Returns
    -------
    (rows, K) float64
        Rising.

    Examples
    --------
    >>> near_best_1d(np.array([[5.0, 0.0, 4.0, 1.0]]), np.ones((1, 4)), 2).tolist()
    [[0.5, 4.5]]
    """
    low, high = (np.where(weights > 0, x, edge) for edge in (np.inf, -np.inf))
    low, high = low.min(axis=1, keepdims=True), high.max(axis=1, keepdims=True)
    low, high = (np.where(np.isfinite(end), end, 0) for end in (low, high))  # a row without weight
    even = low + (high - low) * (np.arange(K) / max(K - 1, 1))
    found = [lloyd_1d(x, weights, start) for start in (exact_1d(*_coarse(x, weights, bins), K), even)]
    errors = [squared_error_1d(x, weights, centres) for centres in found]
    return np.where((errors[0] <= errors[1])[:, None], *found)


def _coarse(x: np.ndarray, weights: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means and sums of weights of equally long runs of every sorted row."""
    x, weights = _sorted(x, weights)
    edges = np.arange(bins + 1) * x.shape[1] // bins if x.shape[1] > bins else np.arange(x.shape[1] + 1)
    weight, moment = (np.diff(_prefix_sums(part)[:, edges], axis=1) for part in (weights, weights * x))
    return np.divide(moment, weight, out=x[:, edges[:-1]], where=weight > 0), weight


def squared_error_1d(x: np.ndarray, weights: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """sum of weight |x - nearest centre|^2 of every row, (rows,) float64, summed in order."""
    off = x - np.take_along_axis(centres, nearest_1d(x, centres).astype(np.intp), axis=1)
    return np.cumsum(weights * off * off, axis=1)[:, -1]


def _cost(sums, j: int) -> np.ndarray:
    """Squared error of points i .. j - 1 around their mean, for every i < j: (rows, j)."""
    weight, moment, square = (s[:, j, None] - s[:, :j] for s in sums)
    mean_part = np.divide(moment * moment, weight, out=np.zeros_like(weight), where=weight > 0)
    return np.maximum(square - mean_part, 0)


def _means_of(x, sums, begins) -> np.ndarray:
    """Centres of the clusters that the table of beginnings leads to."""
    K, rows, n = begins.shape[0], begins.shape[1], begins.shape[2] - 1
    centres = np.empty((rows, K))
    end = np.full((rows, 1), n)
    after = x[:, -1:]
    for k in range(K - 1, -1, -1):
        begin = np.take_along_axis(begins[k], end, axis=1)
        weight, moment = (np.take_along_axis(s, end, axis=1) - np.take_along_axis(s, begin, axis=1) for s in sums[:2])
        middle = np.take_along_axis(x, np.minimum(begin, n - 1), axis=1)
        mean = np.divide(moment, weight, out=middle, where=weight > 0)
        last = np.take_along_axis(x, np.maximum(end - 1, 0), axis=1)
        mean = np.minimum(np.maximum(mean, np.take_along_axis(x, np.minimum(begin, n - 1), axis=1)), last)
        after = np.where(begin < end, mean, after)  # nothing left: the centre above again
        centres[:, k] = after[:, 0]
        end = begin
    return centres


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
        No vectors, a weight below 0 or none above it, K below 1.

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


def _squares(X: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Squared distances of vectors from a centre; the elements are added in order."""
    total = np.zeros(len(X))
    for x, c in zip(X.T, centre, strict=True):
        off = x - c
        off *= off
        total += off
    return total


def _seeds(X: np.ndarray, K: int, rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """k-means++; once every vector with a weight is a centre, the first seed again."""
    X = np.asfortranarray(X)  # _squares reads one coordinate of all vectors after another
    chances, squares, chosen = weights, np.full(len(X), np.inf), []
    for _ in range(K):
        sums = np.cumsum(chances)
        at = np.searchsorted(sums, rng.random() * sums[-1], side="right") if sums[-1] > 0 else chosen[0]
        chosen.append(min(int(at), len(X) - 1))
        squares = np.minimum(squares, _squares(X, X[chosen[-1]]))
        chances = weights * squares
    return X[chosen]


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
        columns, kernel = np.ascontiguousarray(centres.T), _compiled_nearest()
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
def _compiled_nearest():
    from refllm.kernels.packed import cluster_kernels
    from refllm.kernels.packed.compile import compile_kernel

    return compile_kernel(cluster_kernels.nearest, cluster_kernels.SIGNATURE)


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
