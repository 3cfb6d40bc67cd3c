"""The NumPy text of every packed product: the definition that the Numba kernels are tested against.

A packed weight is decoded some rows at a time, so no product ever holds more than one block of it as floats.
"""

from collections.abc import Iterator

import numpy as np

from refllm.kernels.packed.activations import dequantize_activations, quantize_activations
from refllm.kernels.packed.quantized import GGUFBlocks, IntWeight

BLOCK_ELEMENTS = 1 << 20  # weights decoded at a time: 4 MB of float32
GGUF_BLOCK = 32  # columns per activation scale beside GGUF weights


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

    IntWeight: per token one scale; the product of codes is summed in integers inside each group, then

        y = x_scale * sum over groups of  scale[group] * sum over its columns of  x_code * (code - zero_point)

    in float32, groups in order. Other records: x is rounded (per token; per 32 columns beside GGUF blocks, as GGML
    does) and multiplied as floats, which is the same number up to float32 rounding.
    """
    if isinstance(weight, IntWeight):
        return _int_times_int(x, weight, bits)
    block = GGUF_BLOCK if isinstance(weight, GGUFBlocks) else 0
    codes, scale = quantize_activations(x.astype(np.float32), block, bits)
    return matmul_float(dequantize_activations(codes, scale).astype(x.dtype), weight)


def matmul_int8(x: np.ndarray, weight) -> np.ndarray:
    """matmul_rounded to 8 bits."""
    return matmul_rounded(x, weight, 8)


def _int_times_int(x: np.ndarray, weight: IntWeight, bits: int) -> np.ndarray:
    codes, x_scale = quantize_activations(x.astype(np.float32), 0, bits)
    with np.errstate(invalid="ignore"):
        return (codes_times(codes, weight) * x_scale).astype(x.dtype)


def codes_times(x_codes: np.ndarray, weight) -> np.ndarray:
    """x_codes W^T: (tokens, in) int8 -> (tokens, out) float32.

    IntWeight: sums of whole numbers inside each group, then the groups in order, each times its scale. Other records
    are decoded.
    """
    if not isinstance(weight, IntWeight):
        return matmul_float(x_codes.astype(np.float32), weight)
    y = np.empty((len(x_codes), weight.shape[0]), np.float32)
    for block in row_blocks(weight.shape, BLOCK_ELEMENTS // 4):
        sums, scale = group_sums(x_codes, weight, block)
        total = np.zeros((len(x_codes), sums.shape[1]), np.float32)
        for g in range(sums.shape[2]):
            total += sums[:, :, g].astype(np.float32) * scale[:, g].astype(np.float32)
        y[:, block] = total
    return y


def group_sums(x_codes: np.ndarray, weight: IntWeight, ids: slice) -> tuple[np.ndarray, np.ndarray]:
    """The integers inside an int8 product.

    Parameters
    ----------
    x_codes : (tokens, in) int8
    weight : IntWeight
    ids : slice
        Rows of the weight.

    Returns
    -------
    sums : (tokens, rows, groups) int64
        Sum over the columns of each group of x_code * (code - zero_point).
    scale : (rows, groups) or (1, 1)
    """
    codes = weight.unpacked(ids)
    scale, zero = weight.scales(ids)
    groups, width = scale.shape[1], weight.columns // scale.shape[1]
    steps = codes.reshape(len(codes), groups, width).astype(np.int32) - zero[..., None]
    # Exact in float64 (below 2^53), and there BLAS does it.
    x_groups = x_codes.reshape(len(x_codes), groups, width).astype(np.float64).transpose(1, 0, 2)  # [groups, tokens, g]
    sums = x_groups @ steps.astype(np.float64).transpose(1, 2, 0)  # [groups, tokens, rows]
    return sums.transpose(1, 2, 0).astype(np.int64), scale
