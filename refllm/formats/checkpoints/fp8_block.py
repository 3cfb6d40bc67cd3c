"""Block-FP8 checkpoints as DeepSeek-V3 stores them: E4M3 codes, one scale per square of 128 x 128 weights.

    weight             F8_E4M3 [out, in]
    weight_scale_inv   F32 [ceil(out / 128), ceil(in / 128)]

    w[o, i] = E4M3(weight[o, i]) weight_scale_inv[o // 128, i // 128]

The name says inverse because the scale is the inverse of the factor that the quantiser multiplied with; reading
multiplies. The last squares may be smaller. Source: DeepSeek-V3, inference/kernel.py; in config.json
`weight_block_size`.
"""

import numpy as np

from refllm.formats.checkpoints.base import check_codes, stored
from refllm.formats.checkpoints.describe import Stored, Tensor

BLOCK = (128, 128)
STORED = (
    Stored(
        "fp8",
        "E4M3, blocks of 128 x 128",
        "E4M3(weight[o, i]) * weight_scale_inv[o // 128, i // 128]",
        "none",
        (
            Tensor("weight", "E4M3 codes", None, "", ("out", "in"), "F8_E4M3"),
            Tensor("weight_scale_inv", "scales", None, "", ("ceil(out / 128)", "ceil(in / 128)"), "F32", "multiplies"),
        ),
        "DeepSeek-V3",
    ),
)


def fp8_block_pack(
    codes: np.ndarray, scale: np.ndarray, *, block_size: tuple[int, int] = BLOCK
) -> dict[str, np.ndarray]:
    """E4M3 codes and scales of blocks -> weight, weight_scale_inv.

    Parameters
    ----------
    codes : (out, in) uint8
    scale : (ceil(out / rows), ceil(in / columns)) float
        Finite; stored as float32.
    block_size : (rows, columns)

    Raises
    ------
    ValueError
        Wrong shapes; a scale that is not finite.
    """
    codes, scale = check_codes(codes, 8), np.asarray(scale)
    expected = _blocks(codes.shape, block_size)
    if scale.dtype.kind != "f" or scale.shape != expected or not np.isfinite(scale).all():
        raise ValueError(f"scale must be finite floats of shape {expected}, got {scale.dtype} of shape {scale.shape}")
    return {"weight": np.ascontiguousarray(codes), "weight_scale_inv": np.ascontiguousarray(scale, np.float32)}


def fp8_block_unpack(
    tensors: dict[str, np.ndarray], *, block_size: tuple[int, int] = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """weight (its codes as uint8), weight_scale_inv -> codes (out, in), scale (blocks of rows, blocks of columns).

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype.
    """
    codes = stored(tensors, "weight", ("uint8",), 2)
    scale = stored(tensors, "weight_scale_inv", ("float32",), 2)
    expected = _blocks(codes.shape, block_size)
    if scale.shape != expected:
        raise ValueError(f"weight_scale_inv of a weight {codes.shape} must be {expected}, got {scale.shape}")
    return codes, scale


def fp8_block_dequantize(tensors: dict[str, np.ndarray], *, block_size: tuple[int, int] = BLOCK) -> np.ndarray:
    """weight, weight_scale_inv -> (out, in) float32, each product rounded once."""
    from refllm.formats.dtypes import FP8_E4M3FN

    codes, scale = fp8_block_unpack(tensors, block_size=block_size)
    rows, columns = (np.arange(n) // size for n, size in zip(codes.shape, block_size, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        return FP8_E4M3FN.decode(codes) * scale[rows][:, columns]


def _blocks(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, ...]:
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"block_size must be two positive sizes, got {block_size}")
    return tuple(-(-n // size) for n, size in zip(shape, block_size, strict=True))
