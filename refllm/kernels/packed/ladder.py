"""The kernel ladder: one product on five rungs, from a loop in Python to the tile product. Each equals the one before.

A vector times a weight of 4-bit codes in groups of 32 columns, symmetric, float16 scales; the vector rounded to int8:

    y[row] = x_scale * sum over groups of  scale[row, group] * sum over its columns of  x[column] * (code - 8)

The inner sum is a whole number, so its order does not matter; the sums of floats run group by group on every rung.
Lesson: lessons/07-kernel-ladder.md.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import float32, int8, int64, intp, uint8, uint16, void

from refllm.kernels.packed.activations import quantize_activations
from refllm.kernels.packed.compile import compile_kernel
from refllm.kernels.packed.fast import tile_matmul
from refllm.kernels.packed.laid_out import TOKEN
from refllm.kernels.packed.quantized import IntWeight
from refllm.kernels.packed.simd import half_to_float
from refllm.kernels.packed.threads import over_rows
from refllm.kernels.packed.tiled import tiles_of

GROUP = 32
ZERO = 8  # the code that means 0


def python_loops(x: np.ndarray, weight: IntWeight) -> np.ndarray:
    """Rung 1: the formula, number by number.

    Parameters
    ----------
    x : (in,) float32
    weight : IntWeight
        4 bits, groups of 32, no zero points.

    Returns
    -------
    (out,) float32
    """
    x, x_scale = _rounded(x)
    y = np.zeros(len(weight.codes), np.float32)
    for row in range(len(y)):
        for group in range(len(x) // GROUP):
            inner = 0
            for column in range(GROUP * group, GROUP * (group + 1)):
                code = int(weight.codes[row, column // 2]) >> column % 2 * 4 & 15
                inner += int(x[column]) * (code - ZERO)
            y[row] += np.float32(inner) * np.float32(weight.scale[row, group])
    with np.errstate(invalid="ignore"):  # NaN or Inf among x
        return y * x_scale


def whole_arrays(x: np.ndarray, weight: IntWeight) -> np.ndarray:
    """Rung 2: the same in NumPy, whole arrays at a time; parameters as for python_loops."""
    x, x_scale = _rounded(x)
    steps = np.stack([weight.codes & 15, weight.codes >> 4], axis=-1).view(np.int8) - np.int8(ZERO)  # [row, byte, 2]
    products = steps.reshape(len(steps), -1).astype(np.int16) * x
    inner = products.reshape(len(steps), -1, GROUP).sum(axis=-1, dtype=np.int32)
    y = np.zeros(len(steps), np.float32)
    for group in range(inner.shape[1]):
        y += inner[:, group].astype(np.float32) * weight.scale[:, group]
    with np.errstate(invalid="ignore"):  # NaN or Inf among x
        return y * x_scale


def scalar_text(codes, scale, x, x_scale, y, first, last):
    """Rung 3: rung 1 for Numba. The scales come as the 16 bits they are: Numba has no arrays of float16."""
    for row in range(first, last):
        total = np.float32(0)
        for group in range(x.size // GROUP):
            inner = 0
            for column in range(GROUP * group, GROUP * (group + 1)):
                code = np.int64(codes[row, column // 2]) >> column % 2 * 4 & 15
                inner += x[column] * (code - ZERO)
            total += np.float32(inner) * half_to_float(scale[row, group])
        y[row] = total * x_scale


def blocked_text(codes, scale, x, start, x_scale, y, first, last):
    """Rung 4: four rows at a time, and inner loops over neighbours, which the compiler turns into vectors.

    x : (groups, 2, 16) int8, the even and the odd columns of a group. start : (groups,) -8 times the sum of all.
    """
    for row in range(first, last, 4):
        r1, r2, r3 = min(row + 1, last - 1), min(row + 2, last - 1), min(row + 3, last - 1)  # the last row again
        t0 = t1 = t2 = t3 = np.float32(0)
        for group in range(len(x)):
            s0 = s1 = s2 = s3 = start[group]
            for j in range(GROUP // 2):
                at, even, odd = GROUP // 2 * group + j, x[group, 0, j], x[group, 1, j]
                s0 += (codes[row, at] & 15) * even + (codes[row, at] >> 4) * odd
                s1 += (codes[r1, at] & 15) * even + (codes[r1, at] >> 4) * odd
                s2 += (codes[r2, at] & 15) * even + (codes[r2, at] >> 4) * odd
                s3 += (codes[r3, at] & 15) * even + (codes[r3, at] >> 4) * odd
            t0 += np.float32(s0) * half_to_float(scale[row, group])
            t1 += np.float32(s1) * half_to_float(scale[r1, group])
            t2 += np.float32(s2) * half_to_float(scale[r2, group])
            t3 += np.float32(s3) * half_to_float(scale[r3, group])
        y[row], y[r1], y[r2], y[r3] = t0 * x_scale, t1 * x_scale, t2 * x_scale, t3 * x_scale


def scalar(x: np.ndarray, weight: IntWeight) -> np.ndarray:
    """Rung 3, compiled; parameters as for python_loops."""
    x, x_scale = _rounded(x)
    y = np.empty(len(weight.codes), np.float32)
    _scalar()(*_arrays(weight), x, x_scale, y, 0, len(y))
    return y


def blocked(x: np.ndarray, weight: IntWeight) -> np.ndarray:
    """Rung 4, compiled, on several threads where that pays; parameters as for python_loops."""
    x, x_scale = _rounded(x)
    pairs = np.ascontiguousarray(x.reshape(-1, GROUP // 2, 2).swapaxes(1, 2))
    start = -ZERO * pairs.sum(axis=(1, 2), dtype=np.int64)
    y, run, arrays = np.empty(len(weight.codes), np.float32), _blocked(), _arrays(weight)
    over_rows(lambda first, last: run(*arrays, pairs, start, x_scale, y, first, last), len(y), weight.codes.size * 2)
    return y


def tiles(x: np.ndarray, weight: IntWeight) -> np.ndarray:
    """Rung 5: integer dot products of sixteen interleaved rows, the product that matmul uses (tile_kernels.py)."""
    return tile_matmul(x[None], tiles_of(weight), TOKEN)[0]


RUNGS = (python_loops, whole_arrays, scalar, blocked, tiles)


def _rounded(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Codes (in,) int8 and their scale."""
    codes, scale = quantize_activations(x[None])
    return codes[0], scale[0, 0]


def _arrays(weight: IntWeight) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the bits of the scales as Numba wants them."""
    tidy = lambda a: np.require(a, requirements=["C", "A"])
    return tidy(weight.codes), tidy(weight.scale).view(np.uint16)


@cache
def _scalar() -> Callable:
    signature = void(uint8[:, ::1], uint16[:, ::1], int8[::1], float32, float32[::1], intp, intp)
    return compile_kernel(scalar_text, signature)


@cache
def _blocked() -> Callable:
    x = int8[:, :, ::1], int64[::1]
    return compile_kernel(blocked_text, void(uint8[:, ::1], uint16[:, ::1], *x, float32, float32[::1], intp, intp))
