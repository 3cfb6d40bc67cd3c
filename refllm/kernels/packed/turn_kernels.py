"""The fast Hadamard transform of one token inside the compiled passes: the twin of `refllm.kernels.hadamard.turn`."""

from functools import cache

import numpy as np

from refllm.kernels.hadamard import base_of
from refllm.kernels.packed.compile import jitable
from refllm.kernels.packed.lane_math import fma, plus, times
from refllm.kernels.packed.lane_memory import load_float, load_floats, store_float, store_floats
from refllm.kernels.packed.lanes import every, splat


@cache
def turn_matrix(n: int) -> np.ndarray:
    """(K, K) float32: what is left to multiply with once sums and differences are made, divided by sqrt(n)."""
    return np.ascontiguousarray(base_of(n).T * n**-0.5, np.float32)


@jitable
def turn(x, width, inner, base, matrix, scratch):
    """x = x (H (x) I_inner) / sqrt(n), in place; n = width / inner.

    x, scratch : addresses of `width` float32. matrix : address of turn_matrix(n), `base` rows.
    """
    part = width // base
    half = inner
    while half < part:
        for start in range(0, width, 2 * half):
            whole = half // 16 * 16
            for i in range(start, start + whole, 16):
                a, b = load_floats(x + 4 * i), load_floats(x + 4 * (i + half))
                store_floats(x + 4 * i, plus(a, b))
                store_floats(x + 4 * (i + half), plus(a, times(b, every(-1))))
            for i in range(start + whole, start + half):
                a, b = load_float(x + 4 * i), load_float(x + 4 * (i + half))
                store_float(x + 4 * i, a + b)
                store_float(x + 4 * (i + half), a - b)
        half *= 2
    whole = part // 16 * 16
    for j in range(base):
        row, out = matrix + 4 * base * j, scratch + 4 * part * j
        for c in range(0, whole, 16):
            total = every(0)
            for i in range(base):
                total = fma(splat(load_float(row + 4 * i)), load_floats(x + 4 * (part * i + c)), total)
            store_floats(out + 4 * c, total)
        for c in range(whole, part):
            rest = np.float32(0)
            for i in range(base):
                rest += load_float(row + 4 * i) * load_float(x + 4 * (part * i + c))
            store_float(out + 4 * c, rest)
    for i in range(width):
        store_float(x + 4 * i, load_float(scratch + 4 * i))
