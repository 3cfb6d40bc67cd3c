"""ONNX Runtime's MatMulNBits: quantised B of Y = X B^T, blocks along `in`, codes low bits first.

Units run along `in` within a block; nothing is transposed. bits 2, 4 or 8; a last block may be shorter than block_size
but is stored in full.

    B             U8 [out, blocks, block_size bits / 8]
    scales        [out, blocks]                              flat in older models
    zero_points   U8 [out, ceil(blocks bits / 8)]            absent: 2^(bits-1). Each row starts on a byte of its own
    w[o, i] = scales[o, i // block_size] (q[o, i] - zero_points[o, i // block_size])

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits. Zero points may also come as floats, unpacked;
not done here.
"""

import numpy as np

from refllm.formats.checkpoints.base import (
    Grouped,
    check_codes,
    check_groups,
    check_multiple,
    dense_words,
    dequantize,
    pack_axis,
    stored,
    unpack_axis,
)
from refllm.formats.checkpoints.describe import Stored, Tensor

BITS = (2, 4, 8)


def _description(bits: int) -> Stored:
    cells, block = dense_words(bits, 8), f"block_size * {bits} / 8"
    zeros = f"ceil(ceil(in / block_size) * {bits} / 8)"
    return Stored(
        "MatMulNBits",
        f"{bits} bits",
        "scales[o, i // block_size] * (B[o, i] - zero_points[o, i // block_size])",
        f"as it is; absent: {1 << (bits - 1)}",
        (
            Tensor("B", "codes", cells, "in", ("out", "ceil(in / block_size)", block), "U8", "the last block is full"),
            Tensor("scales", "scales", None, "", ("out", "ceil(in / block_size)"), "scale", "flat in older models"),
            Tensor("zero_points", "zero points", cells, "groups", ("out", zeros), "U8"),
        ),
        "ONNX Runtime",
    )


STORED = tuple(map(_description, BITS))


def matmul_nbits_pack(
    codes: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None = None,
    *,
    bits: int = 4,
    block_size: int = 32,
) -> dict[str, np.ndarray]:
    """Codes, scales and zero points -> the inputs B, scales, zero_points of MatMulNBits.

    Parameters
    ----------
    codes : (out, in) integers, 0 .. 2^bits - 1
        A last block that is short is filled up with 0, as ONNX Runtime's own quantiser does.
    scale : (out, ceil(in / block_size)) float16 or float32
    zero_point : integers of the shape of scale, optional
        None: left out, which means 2^(bits-1).
    bits : int
        2, 4 or 8.
    block_size : int
        A power of two, at least 16.

    Raises
    ------
    ValueError
        Wrong shapes or ranges.

    Examples
    --------
    >>> tensors = matmul_nbits_pack(np.arange(16).reshape(1, 16), np.ones((1, 1), np.float32), block_size=16)
    >>> tensors["B"].tobytes().hex()
    '1032547698badcfe'
    """
    _check_options(bits, block_size)
    codes = check_codes(codes, bits)
    scale, zero_point = check_groups(codes, scale, zero_point, bits)
    (out, columns), blocks = codes.shape, -(-codes.shape[1] // block_size)
    if scale.shape != (out, blocks) or scale.dtype.newbyteorder("=").name not in ("float16", "float32"):
        raise ValueError(f"scale must be float16 or float32 {(out, blocks)}, got {scale.dtype} {scale.shape}")
    full = np.zeros((out, blocks * block_size), np.uint8)
    full[:, :columns] = codes
    packed = pack_axis(full, dense_words(bits, 8), 1, "u1").reshape(out, blocks, block_size * bits // 8)
    tensors = {"B": packed, "scales": np.ascontiguousarray(scale, scale.dtype.newbyteorder("="))}
    if zero_point is not None:
        tensors["zero_points"] = pack_axis(zero_point, dense_words(bits, 8), 1, "u1")
    return tensors


def matmul_nbits_unpack(
    tensors: dict[str, np.ndarray], columns: int, *, bits: int = 4, block_size: int = 32
) -> Grouped:
    """B, scales and perhaps zero_points -> codes, scales, zero points.

    Parameters
    ----------
    tensors : dict
        scales and zero_points may be flat.
    columns : int
        `in` (the attribute K): the blocks do not tell it.
    bits, block_size
        The attributes of the node.

    Returns
    -------
    Grouped
        g_idx is given where the last block is short.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype.
    """
    _check_options(bits, block_size)
    packed = stored(tensors, "B", ("uint8",), 3)
    out, blocks = len(packed), -(-columns // block_size)
    if packed.shape != (out, blocks, block_size * bits // 8):
        expected = (out, blocks, block_size * bits // 8)
        raise ValueError(f"B of {columns} columns in blocks of {block_size} must be {expected}, got {packed.shape}")
    cells = dense_words(bits, 8)
    codes = unpack_axis(packed.reshape(out, -1), cells, 1, blocks * block_size)[:, :columns]
    scale = _rows(tensors, "scales", ("float16", "float32"), (out, blocks))
    zero_point = None
    if tensors.get("zero_points") is not None:
        width = -(-blocks * bits // 8)
        zero_point = unpack_axis(_rows(tensors, "zero_points", ("uint8",), (out, width)), cells, 1, blocks)
    g_idx = (np.arange(columns) // block_size).astype(np.int32) if columns % block_size else None
    return Grouped(np.ascontiguousarray(codes), scale, zero_point, g_idx)


def matmul_nbits_dequantize(
    tensors: dict[str, np.ndarray], columns: int, *, bits: int = 4, block_size: int = 32
) -> np.ndarray:
    """B, scales and perhaps zero_points -> the weight, (out, in) float32. Arguments as in `matmul_nbits_unpack`."""
    return dequantize(matmul_nbits_unpack(tensors, columns, bits=bits, block_size=block_size), bits)


def _rows(tensors: dict[str, np.ndarray], name: str, dtypes: tuple[str, ...], shape: tuple[int, int]) -> np.ndarray:
    given = stored(tensors, name, dtypes, min(max(np.asarray(tensors.get(name, 0)).ndim, 1), 2))
    if given.shape not in (shape, (shape[0] * shape[1],)):
        raise ValueError(f"{name} must have the shape {shape}, or be flat, got {given.shape}")
    return np.ascontiguousarray(given).reshape(shape)


def _check_options(bits: int, block_size: int) -> None:
    if bits not in BITS:
        raise ValueError(f"MatMulNBits has 2, 4 or 8 bits, got {bits}")
    if block_size < 16 or block_size & (block_size - 1):
        check_multiple("block_size", block_size, 16, "a power of two")
        raise ValueError(f"block_size must be a power of two, at least 16, got {block_size}")
