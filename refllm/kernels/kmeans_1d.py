"""k-means of numbers with weights, row by row. The same centres and codes on every machine.

    minimise  sum over i of  weight_i (x_i - centre[code_i])^2

On a line the clusters of any optimum are intervals. So Lloyd's step (codes = nearest centre, centre = weighted mean)
needs nothing of a sorted row but where the middles of neighbouring centres fall and sums of prefixes, and the optimum
itself is found by dynamic programming:

    best[k, j] = min over i of  best[k - 1, i] + cost(i, j)        cost(i, j): points i .. j - 1 around their mean

Rules, so that there is one answer: a number halfway between two centres takes the lower one; a centre without weight
(or with one that vanishes in sums of the row's) moves to the number with the largest weight times squared distance,
the first of equals, and stays where it is if all lie on centres; all sums are float64, in a fixed order. A step never
raises the objective: a row is never worse than its start.

Lloyd 1982, "Least squares quantization in PCM"; Wang and Song 2011, "Ckmeans.1d.dp: Optimal k-means clustering in one
dimension by dynamic programming". Of vectors: kmeans.py.
"""

import numpy as np

STEPS = 50  # of Lloyd's algorithm at most


def lloyd_1d(x: np.ndarray, weights: np.ndarray, start: np.ndarray, iterations: int = STEPS) -> np.ndarray:
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
    return _lloyd_sorted(*_sorted(x, weights), start, iterations)


def _lloyd_sorted(x, weights, start, iterations: int) -> np.ndarray:
    """lloyd_1d of what `_sorted` returns."""
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
    in_order = _sorted(x, weights)
    found = [_lloyd_sorted(*in_order, start, STEPS) for start in (exact_1d(*_coarse(*in_order, bins), K), even)]
    errors = [squared_error_1d(x, weights, centres) for centres in found]
    return np.where((errors[0] <= errors[1])[:, None], *found)


def _coarse(x: np.ndarray, weights: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means and sums of weights of equally long runs of every row, as `_sorted` returns them."""
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
