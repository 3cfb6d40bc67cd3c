"""compressed-tensors checkpoints with float codes: nvfp4-pack-quantized, mxfp4-pack-quantized, float-quantized.

Units run along `in`; nothing is transposed. A pair of 4-bit codes makes a byte, the even column in the low nibble.

    nvfp4-pack-quantized   weight_packed        U8 [out, in / 2]         E2M1 codes
                           weight_scale         F8_E4M3 [out, in / 16]
                           weight_global_scale  F32 [1]
                           w[o, i] = E2M1(q[o, i]) (E4M3(weight_scale[o, i // 16]) / weight_global_scale)
    mxfp4-pack-quantized   weight_packed        U8 [out, in / 2]         E2M1 codes
                           weight_scale         U8 [out, in / 32]        E8M0 codes
                           w[o, i] = E2M1(q[o, i]) 2^(weight_scale[o, i // 32] - 127)
    float-quantized        weight               F8_E4M3 [out, in]
                           weight_scale         [out, groups]
                           w[o, i] = E4M3(weight[o, i]) weight_scale[o, g]

The global scale divides: it is the factor that the quantiser multiplied with, 448 * 6 / amax. TensorRT's and torchao's
is its reciprocal and multiplies. Source: compressed-tensors, compressors/.
"""

from typing import NamedTuple

import numpy as np

from refllm.formats.checkpoints.base import (
    check_codes,
    check_multiple,
    dense_words,
    group_index,
    pack_axis,
    stored,
    times_power_of_two,
    unpack_axis,
)
from refllm.formats.checkpoints.describe import Stored, Tensor

PAIRS = dense_words(4, 8)
NVFP4_BLOCK, MXFP4_BLOCK = 16, 32
STORED = (
    Stored(
        "nvfp4-pack-quantized",
        "E2M1, blocks of 16",
        "E2M1(weight_packed[o, i]) * (E4M3(weight_scale[o, i // 16]) / weight_global_scale)",
        "none",
        (
            Tensor("weight_packed", "E2M1 codes", PAIRS, "in", ("out", "in / 2"), "U8"),
            Tensor("weight_scale", "block scales", None, "", ("out", "in / 16"), "F8_E4M3"),
            Tensor("weight_global_scale", "divisor of all scales", None, "", ("1",), "F32", "448 * 6 / amax"),
        ),
        "compressed-tensors",
    ),
    Stored(
        "mxfp4-pack-quantized",
        "E2M1, blocks of 32",
        "E2M1(weight_packed[o, i]) * 2^(weight_scale[o, i // 32] - 127)",
        "none",
        (
            Tensor("weight_packed", "E2M1 codes", PAIRS, "in", ("out", "in / 2"), "U8"),
            Tensor("weight_scale", "E8M0 codes of the block scales", None, "", ("out", "in / 32"), "U8"),
        ),
        "compressed-tensors",
    ),
    Stored(
        "float-quantized",
        "FP8 E4M3",
        "E4M3(weight[o, i]) * weight_scale[o, g]",
        "none",
        (
            Tensor("weight", "E4M3 codes", None, "", ("out", "in"), "F8_E4M3"),
            Tensor("weight_scale", "scales", None, "", ("out", "groups"), "scale", "one group: [out, 1]"),
        ),
        "compressed-tensors",
    ),
)


class FloatCodes(NamedTuple):
    """Float codes with scales: codes (out, in) uint8; scale (out, groups), codes or floats as the format stores them;
    global_scale float32 of NVFP4, None elsewhere."""

    codes: np.ndarray
    scale: np.ndarray
    global_scale: np.float32 | None = None


def nvfp4_pack(codes: np.ndarray, scale: np.ndarray, global_scale: float) -> dict[str, np.ndarray]:
    """E2M1 codes and E4M3 block scales -> the tensors of nvfp4-pack-quantized.

    Parameters
    ----------
    codes : (out, in) integers 0..15
    scale : (out, in / 16) uint8
        E4M3 codes.
    global_scale : float
        The divisor, finite and positive.

    Returns
    -------
    dict of weight_packed, weight_scale, weight_global_scale

    Raises
    ------
    ValueError
        Wrong shapes or ranges.
    """
    divisor = np.float32(global_scale)
    if not (np.isfinite(divisor) and divisor > 0):
        raise ValueError(f"global_scale must be finite and positive, got {global_scale}")
    tensors = _pack_pairs(codes, scale, NVFP4_BLOCK)
    return {**tensors, "weight_global_scale": np.array([divisor], np.float32)}


def nvfp4_unpack(tensors: dict[str, np.ndarray]) -> FloatCodes:
    """The tensors of nvfp4-pack-quantized -> codes and scales. E4M3 scales come as uint8 codes.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype.
    """
    codes, scale = _unpack_pairs(tensors, NVFP4_BLOCK)
    divisor = stored(tensors, "weight_global_scale", ("float32",), 1)
    if divisor.shape != (1,):
        raise ValueError(f"weight_global_scale must be one number, got shape {divisor.shape}")
    return FloatCodes(codes, scale, divisor[0])


def nvfp4_dequantize(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The tensors of nvfp4-pack-quantized -> (out, in) float32: scale / global_scale is rounded, then the product."""
    from refllm.formats.dtypes import FP4_E2M1, FP8_E4M3FN

    codes, scale, divisor = nvfp4_unpack(tensors)
    with np.errstate(all="ignore"):
        effective = FP8_E4M3FN.decode(scale) / divisor
        return FP4_E2M1.decode(codes) * np.repeat(effective, NVFP4_BLOCK, axis=1)


def mxfp4_pack(codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """E2M1 codes (out, in) and E8M0 codes (out, in / 32) -> the tensors of mxfp4-pack-quantized.

    Raises
    ------
    ValueError
        Wrong shapes or ranges.
    """
    return _pack_pairs(codes, scale, MXFP4_BLOCK)


def mxfp4_unpack(tensors: dict[str, np.ndarray]) -> FloatCodes:
    """The tensors of mxfp4-pack-quantized -> E2M1 and E8M0 codes. Raises ValueError for wrong shapes or dtypes."""
    return FloatCodes(*_unpack_pairs(tensors, MXFP4_BLOCK))


def mxfp4_dequantize(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The tensors of mxfp4-pack-quantized -> (out, in) float32, exact; products beyond float32 are infinite.

    The scale code 255 gives NaN, as OCP MX v1.0 has it; compressed-tensors itself takes it for an infinity.
    """
    from refllm.formats.dtypes import FP4_E2M1

    codes, scale, _ = mxfp4_unpack(tensors)
    return times_power_of_two(FP4_E2M1.decode(codes), np.repeat(scale, MXFP4_BLOCK, axis=1))


def float_quantized_pack(codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """E4M3 codes (out, in) uint8 and scales (out, groups) float -> the tensors of float-quantized.

    Raises
    ------
    ValueError
        Wrong shapes; a scale that is not finite; groups that do not divide the columns.
    """
    codes, scale = check_codes(codes, 8), np.asarray(scale)
    if scale.dtype.kind != "f" or scale.ndim != 2 or len(scale) != len(codes) or not np.isfinite(scale).all():
        raise ValueError(f"scale must be (out, groups) finite floats, got {scale.dtype} of shape {scale.shape}")
    group_index(codes.shape[1], scale.shape[1])
    native = scale.dtype.newbyteorder("=")
    return {"weight": np.ascontiguousarray(codes), "weight_scale": np.ascontiguousarray(scale, native)}


def float_quantized_unpack(tensors: dict[str, np.ndarray]) -> FloatCodes:
    """The tensors of float-quantized -> E4M3 codes and scales; a scale [1] or [out] becomes a column.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype.
    """
    codes = stored(tensors, "weight", ("uint8",), 2)
    scale = np.asarray(tensors.get("weight_scale", np.empty(0)))
    if scale.shape == (1,) or scale.shape == (len(codes),):
        tensors = {"weight_scale": np.broadcast_to(scale.reshape(-1, 1), (len(codes), 1))}
    scale = stored(tensors, "weight_scale", ("float16", "float32"), 2)
    if len(scale) != len(codes):
        raise ValueError(f"weight_scale must have {len(codes)} rows, got shape {scale.shape}")
    group_index(codes.shape[1], scale.shape[1])
    return FloatCodes(codes, np.ascontiguousarray(scale))


def float_quantized_dequantize(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The tensors of float-quantized -> (out, in) float32, each product rounded once."""
    from refllm.formats.dtypes import FP8_E4M3FN

    codes, scale, _ = float_quantized_unpack(tensors)
    with np.errstate(all="ignore"):
        return FP8_E4M3FN.decode(codes) * scale.astype(np.float32)[:, group_index(codes.shape[1], scale.shape[1])]


def _pack_pairs(codes: np.ndarray, scale: np.ndarray, block: int) -> dict[str, np.ndarray]:
    codes, scale = check_codes(codes, 4), np.asarray(scale)
    rows, columns = codes.shape
    check_multiple("in", columns, block, "whole blocks")
    if scale.dtype != np.uint8 or scale.shape != (rows, columns // block):
        expected = f"scale must be uint8 codes of shape {(rows, columns // block)}"
        raise ValueError(f"{expected}, got {scale.dtype} of shape {scale.shape}")
    return {"weight_packed": pack_axis(codes, PAIRS, 1, "u1"), "weight_scale": np.ascontiguousarray(scale)}


def _unpack_pairs(tensors: dict[str, np.ndarray], block: int) -> tuple[np.ndarray, np.ndarray]:
    packed = stored(tensors, "weight_packed", ("uint8",), 2)
    scale = stored(tensors, "weight_scale", ("uint8",), 2)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    check_multiple("in", columns, block, "whole blocks")
    if scale.shape != (rows, columns // block):
        raise ValueError(f"weight_scale must have the shape {(rows, columns // block)}, got {scale.shape}")
    return unpack_axis(packed, PAIRS, 1, columns), np.ascontiguousarray(scale)
