"""Weights -> CodeWeight records: the blockwise NF4, FP4 and int8 of bitsandbytes, block-FP8, NVFP4.

Each is the rounding of the software whose files have that layout, so that both write the same codes.
"""

import numpy as np

from refllm.formats.checkpoints.bitsandbytes import NESTED_BLOCK, encode_absmax
from refllm.formats.dtypes import FORMATS
from refllm.formats.microscale import NVFP4, MXFormat
from refllm.kernels.packed.base import as_float
from refllm.kernels.packed.codes import DYNAMIC8, FLAT
from refllm.kernels.packed.records import CodeWeight

_SMALLEST = np.float32(1e-38)  # bitsandbytes' floor of a block's largest magnitude when it divides


def _checked(W: np.ndarray) -> np.ndarray:
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0 or W.dtype.kind != "f":
        raise ValueError(f"a weight must be a non-empty [out, in] matrix of floats, got {W.dtype} of shape {W.shape}")
    with np.errstate(over="ignore"):
        W = W.astype(np.float32)
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; quantization needs finite values")
    return W


def blockwise(W: np.ndarray, table: str = "NF4", block: int = 64, double_quant: bool = False) -> CodeWeight:
    """bitsandbytes' 4 bits: blocks of the row-major weight, each divided by its largest magnitude.

    Parameters
    ----------
    W : (out, in) float, finite
    table : str
        NF4 or FP4_BNB.
    block : int
        Consecutive weights that share a scale, across the ends of rows.
    double_quant : bool
        Scales as 8-bit codes, see refllm.formats.checkpoints.bitsandbytes.

    Returns
    -------
    CodeWeight
    """
    W = _checked(W)
    flat = W.reshape(-1)
    whole = flat[: flat.size // block * block].reshape(-1, block)
    absmax = np.abs(whole).max(axis=1)
    with np.errstate(over="ignore"):
        scaled = whole * (np.float32(1) / np.maximum(absmax, _SMALLEST))[:, None]
    scaled, tail = scaled.reshape(-1), flat[whole.size :]
    if tail.size:  # divided, not multiplied with the inverse; its floor is stored
        absmax = np.append(absmax, np.maximum(np.abs(tail).max(), _SMALLEST))
        scaled = np.append(scaled, tail / absmax[-1])
    codes = FORMATS[table].encode(np.clip(scaled, -1, 1)).reshape(W.shape)
    scale = absmax.reshape(1, -1)
    if double_quant:
        absmax_codes, nested, offset = encode_absmax(absmax)
        offset = np.full(1, offset, np.float32)
        nested = nested.reshape(1, -1)
        scale = CodeWeight.pack(absmax_codes.reshape(1, -1), nested, DYNAMIC8, (FLAT, NESTED_BLOCK), offset=offset)
    return CodeWeight.pack(codes, scale, table, (FLAT, block))


def int8_rows(W: np.ndarray) -> CodeWeight:
    """bitsandbytes' int8: one scale a row, its largest magnitude; w = code scale / 127."""
    W = _checked(W)
    scale = np.abs(W).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.rint(W * (np.float32(1) / scale * np.float32(127)))  # its own order of roundings
    codes = np.where(scale > 0, np.clip(codes, -127, 127), 0).astype(np.int8)
    return CodeWeight.pack(codes.view(np.uint8), scale, "INT8", (1, W.shape[1]), rule="multiply_127")


def fp8_blocks(W: np.ndarray, block: tuple[int, int] = (128, 128)) -> CodeWeight:
    """E4M3 in blocks: scale = largest magnitude / 448, 1 for a block of zeros."""
    return small_float(W, "FP8_E4M3FN", block)


def small_float(W: np.ndarray, table: str, block: tuple[int, int], scale_dtype: str = "float32") -> CodeWeight:
    """A small float in blocks: scale = largest magnitude / largest number, 1 for a block of zeros.

    Parameters
    ----------
    W : (out, in) float, finite
    table : str
        A float format of refllm.formats.dtypes.
    block : (rows, columns)
    scale_dtype : str
        float32 or float16; the codes are computed with the stored scale, those beyond the largest number saturate.
    """
    W, form = _checked(W), FORMATS[table]
    rows, columns = (np.arange(0, size, step) for size, step in zip(W.shape, block, strict=True))
    amax = np.maximum.reduceat(np.maximum.reduceat(np.abs(W), rows, axis=0), columns, axis=1)
    scale = np.where(amax > 0, amax, form.max) / np.float32(form.max)
    limits = np.finfo(scale_dtype)
    least = limits.tiny if scale_dtype == "float32" else limits.smallest_subnormal
    scale = as_float(np.maximum(scale.astype(np.float32), np.float32(least)), scale_dtype)
    spread = np.repeat(np.repeat(scale.astype(np.float32), block[0], axis=0)[: W.shape[0]], block[1], axis=1)
    return CodeWeight.pack(form.encode(W / spread[:, : W.shape[1]]), scale, table, block)


def microscaled(W: np.ndarray, form: MXFormat, scale_rule: str = "floor") -> CodeWeight:
    """A microscaling format along the rows, its E8M0 scales as codes."""
    codes, scales = form.encode(_checked(W), scale_rule)
    return CodeWeight.pack(
        codes, CodeWeight.pack(scales, None, "E8M0", (1, 1)), form.element.name, (1, form.block_size)
    )


def nvfp4(W: np.ndarray) -> CodeWeight:
    """E2M1 with an E4M3 scale for 16 columns and one scale of the tensor, as compressed-tensors makes it."""
    W = _checked(W)
    codes, scales, total = NVFP4.encode(W)
    inner = CodeWeight.pack(scales, np.full((1, 1), total, np.float32), "FP8_E4M3FN", scales.shape, rule="divide")
    return CodeWeight.pack(codes, inner, "FP4_E2M1", (1, NVFP4.block_size))
