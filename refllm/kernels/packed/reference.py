"""The NumPy text of every packed product: the definition that the Numba kernels are tested against.

A packed weight is decoded some rows at a time, so no product ever holds more than one block of it as floats.
"""

from collections.abc import Iterator

import numpy as np

from refllm.kernels.packed.activations import (
    BLOCK,
    SUPER_BLOCK,
    dequantize_activations,
    quantize_activations,
    quantize_shifted,
)
from refllm.kernels.packed.base import Whole
from refllm.kernels.packed.quantized import GGUFBlocks, has_levels

BLOCK_ELEMENTS = 1 << 20  # weights decoded at a time: 4 MB of float32
LACKING = np.int64((1 << 29) - 1)  # bits of a float64's mantissa that float32 has not


def row_blocks(shape: tuple[int, int], elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Slices of rows that hold about `elements` weights each."""
    rows, columns = shape
    step = max(1, elements // columns)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def matmul_float(x: np.ndarray, weight) -> np.ndarray:
    """x W^T for a record, in the type of x: (tokens, in) -> (tokens, out)."""
    y = np.empty((x.shape[0], weight.shape[0]), x.dtype)
    for block in row_blocks(weight.shape):
        y[:, block] = x @ weight.rows(block).T.astype(x.dtype, copy=False)
    return y


def matmul_rounded(x: np.ndarray, weight, bits: int = 8) -> np.ndarray:
    """x W^T with activations rounded to `bits` bits: (tokens, in) float -> (tokens, out) of the type of x.

    x is rounded with one scale per token; per 32 columns beside GGUF blocks, as GGML does. Where weights are whole
    numbers with a scale and perhaps a minimum for each group of columns (`whole` of the record), a row is summed run by
    run; a run is 512 columns of a group (beside GGUF blocks and 2:4 32), or what is left of it:

        total = fma(x_scale * (sum of x_code * number), scale, total)
        total = fma(low, x_scale * (sum of x_code), total)

    in float32, where the sums are exact and an fma rounds once. A scale per token is left out there, and multiplies the
    total of the row. K-quants (w = d * whole + low * minimum, whole numbers
    and minima being products of levels) have one scale per 256 columns, and a power of two for every 32 of them
    (quantize_shifted), and block by block of 256, from 0 on,

        total += x_scale * (d * (sum of whole * 2^shift x_code) + low * (sum of minimum * 2^shift x_code))

    with the sums in integers. A kernel that takes the same steps gets the same bits. Other weights are multiplied as
    floats.
    """
    block = activation_block(weight)
    if block == SUPER_BLOCK:
        return _add_super_blocks(x.astype(np.float32), weight, bits).astype(x.dtype)
    codes, steps = quantize_activations(x.astype(np.float32), block, bits)
    if weight.whole(slice(0, 1)) is None:
        return matmul_float(dequantize_activations(codes, steps), weight).astype(x.dtype)
    if block:
        return codes_times(codes, weight, steps).astype(x.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        return (codes_times(codes, weight) * steps).astype(x.dtype)


def activation_block(weight) -> int:
    """Columns that share a scale of rounded activations beside a weight; 0: all of a token."""
    if not isinstance(weight, GGUFBlocks):
        return 0
    return SUPER_BLOCK if has_levels(weight.type_name) else BLOCK


def matmul_int8(x: np.ndarray, weight) -> np.ndarray:
    """matmul_rounded to 8 bits."""
    return matmul_rounded(x, weight, 8)


def codes_times(x_codes: np.ndarray, weight, steps: np.ndarray | None = None) -> np.ndarray:
    """x W^T for x = step * x_code, with the sums of matmul_rounded.

    Parameters
    ----------
    x_codes : (tokens, in) int8
    weight : record
        One without whole numbers is decoded.
    steps : (tokens, in / block) float32, optional
        None: 1.

    Returns
    -------
    (tokens, out) float32
    """
    if weight.whole(slice(0, 1)) is None:
        return matmul_float(x_codes.astype(np.float32), weight)
    codes, y = x_codes.astype(np.float32), np.empty((len(x_codes), weight.shape[0]), np.float32)
    few = weight.shape[0], max(len(codes), weight.shape[1] // 16)
    for ids in row_blocks(few, BLOCK_ELEMENTS // 16):  # sums stay in cache, and so do numbers
        y[:, ids] = _add_runs(codes, steps, weight.whole(ids))
    return y


def _add_runs(codes: np.ndarray, steps: np.ndarray | None, weight: Whole) -> np.ndarray:
    """The sums of matmul_rounded: codes (tokens, in) and steps (tokens, in / block) -> (tokens, rows) float32."""
    total, length = np.zeros((len(codes), len(weight.numbers)), np.float32), weight.run if steps is None else BLOCK
    group, block = codes.shape[1] // weight.scale.shape[1], codes.shape[1] // (1 if steps is None else steps.shape[1])
    for start in range(0, codes.shape[1], group):
        scale = weight.scale[:, start // group]
        for first in range(start, start + group, length):
            run = slice(first, min(first + length, start + group))
            step = np.float32(1) if steps is None else steps[:, first // block, None]
            with np.errstate(invalid="ignore", over="ignore"):
                # Sums of products below 2^24 are exact in float32, and there BLAS makes them.
                total = fma(step * (codes[:, run] @ weight.numbers[:, run].T), scale, total)
                if weight.low is not None:
                    of = step * codes[:, run].sum(axis=1, keepdims=True)
                    total = fma(weight.low[:, start // group], of, total)
    return total


def _add_super_blocks(x: np.ndarray, weight: GGUFBlocks, bits: int) -> np.ndarray:
    """The sums of matmul_rounded beside levels: (tokens, in) -> (tokens, out) float32."""
    codes, x_scale, shift = quantize_shifted(x, bits)
    y = np.zeros((len(x), weight.shape[0]), np.float32)
    # Exact in float64 (below 2^53), and there BLAS makes them.
    shifted = np.ldexp(codes.astype(np.float64), np.repeat(shift, BLOCK, axis=1)).reshape(len(x), -1, SUPER_BLOCK)
    with np.errstate(invalid="ignore"):
        for ids in row_blocks(weight.shape, BLOCK_ELEMENTS // 4):
            d, whole, low, minimum = weight.levels(ids)
            for s in range(x_scale.shape[1]):
                product = (shifted[:, s] @ whole[:, s].T).astype(np.float32) * d[:, s]
                if low is not None:
                    product += (shifted[:, s] @ minimum[:, s].T).astype(np.float32) * low[:, s]
                y[:, ids] += product * x_scale[:, s, None]
    return y


def fma(x: np.ndarray, y: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """x * y + addend of float32 arrays, rounded once; where it is below 2^-126, perhaps twice.

    Examples
    --------
    >>> x = np.float32([1 + 2**-12])
    >>> fma(x, x, np.float32([2**-60])).tolist(), (x * x).tolist()
    ([1.0004884004592896], [1.00048828125])
    """
    product = x.astype(np.float64) * y  # exact
    total = product + addend
    result = total.astype(np.float32)
    # float64 rounded first. That alone may have brought the sum halfway between two float32 numbers, where of the bits
    # that float32 lacks the first is set and no other. Then what was lost says to which side it belongs.
    halfway = total.view(np.int64) & LACKING == LACKING // 2 + 1
    if halfway.any():
        total, product = total[halfway], product[halfway]
        addend = np.broadcast_to(addend, result.shape)[halfway]
        rest = total - product
        lost = (product - (total - rest)) + (addend - rest)
        result[halfway] = np.where(lost == 0, total, np.nextafter(total, np.copysign(np.inf, lost)))
    return result
