"""Numba twin of refllm.kernels.kmeans.nearest: the same numbers, bit for bit.

The squares of a distance are added coordinate by coordinate, as in NumPy; the vector units work on several centres at
a time, so no sum is reordered.
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


_MATRIX = types.Array(types.float64, 2, "C")
SIGNATURE = types.void(_MATRIX, _MATRIX, types.Array(types.int64, 1, "C"), types.Array(types.float64, 1, "C"))
