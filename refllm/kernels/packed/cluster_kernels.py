"""Numba twins of the steps of refllm.kernels.kmeans that take longest: the same numbers, bit for bit.

The squares of a distance are added coordinate by coordinate, as in NumPy; the vector units work on several centres, or
points, at a time, so no sum is reordered.
"""

import numpy as np
from numba import types


def nearest(X, centres, codes, squares):
    """See kmeans.nearest; centres come as columns, (d, K)."""
    d, K = centres.shape
    distance = np.empty(K)
    for i in range(len(X)):
        for k in range(K):
            distance[k] = 0.0
        for j in range(d):
            x = X[i, j]
            for k in range(K):
                off = x - centres[j, k]
                distance[k] += off * off
        best = 0
        for k in range(1, K):
            if distance[k] < distance[best]:
                best = k
        codes[i] = best
        squares[i] = distance[best]


def seeds(columns, weights, draws, chosen):
    """See kmeans._seeds; points come as columns, (d, n), and `chosen` (K,) is written."""
    d, n = columns.shape
    squares, distance, sums = np.full(n, np.inf), np.empty(n), np.empty(n)
    total = 0.0
    for i in range(n):
        total += weights[i]
        sums[i] = total
    for k in range(len(draws)):
        at = chosen[0]
        if total > 0:
            at, high, drawn = 0, n - 1, draws[k] * total
            while at < high:
                middle = (at + high) // 2
                if sums[middle] > drawn:
                    high = middle
                else:
                    at = middle + 1
        chosen[k] = at
        for i in range(n):
            distance[i] = 0.0
        for j in range(d):
            centre = columns[j, at]
            for i in range(n):
                off = columns[j, i] - centre
                distance[i] += off * off
        for i in range(n):
            squares[i] = min(squares[i], distance[i])
        total = 0.0
        for i in range(n):
            total += weights[i] * squares[i]
            sums[i] = total


def _read(dimensions: int):
    """An array that is not written and may be one that must not be."""
    return types.Array(types.float64, dimensions, "C", readonly=True)


_CODES = types.Array(types.int64, 1, "C")
NEAREST = types.void(_read(2), _read(2), _CODES, types.Array(types.float64, 1, "C"))
SEEDS = types.void(_read(2), _read(1), _read(1), _CODES)
