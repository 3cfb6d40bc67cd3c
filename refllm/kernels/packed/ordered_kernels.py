"""The Numba text of `ordered.subtract_product`. Texts only; `ordered` compiles them."""

import numpy as np
from numba import types

TILE = 256  # columns whose running values stay in the first-level cache
_MATRIX = types.Array(types.float64, 2, "A")
SUBTRACT_SIGNATURE = types.void(_MATRIX, types.Array(types.float64, 2, "A", readonly=True), _MATRIX.copy(readonly=True))


def subtract_product(C, A, B):
    """See ordered.subtract_product. Four products a turn: each value is loaded and stored once for the four."""
    rows, depth = A.shape
    columns = B.shape[1]
    fours = depth // 4 * 4
    tile, values = np.empty((depth, TILE)), np.empty(TILE)
    for first in range(0, columns, TILE):
        n = min(TILE, columns - first)
        for j in range(depth):
            for k in range(n):
                tile[j, k] = B[j, first + k]
        for i in range(rows):
            for k in range(n):
                values[k] = C[i, first + k]
            for j in range(0, fours, 4):
                a, b, c, d = A[i, j], A[i, j + 1], A[i, j + 2], A[i, j + 3]
                p, q, r, s = tile[j], tile[j + 1], tile[j + 2], tile[j + 3]
                for k in range(n):
                    values[k] = (((values[k] - a * p[k]) - b * q[k]) - c * r[k]) - d * s[k]
            for j in range(fours, depth):
                a = A[i, j]
                for k in range(n):
                    values[k] -= a * tile[j, k]
            for k in range(n):
                C[i, first + k] = values[k]
