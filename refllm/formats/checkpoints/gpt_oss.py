"""MXFP4 as gpt-oss stores its experts: pairs of E2M1 codes, one E8M0 scale per 32 inputs.

Units of 16 bytes run along `in`; leading axes (experts) stay.

    NAME_blocks   U8 [experts, out, in / 32, 16]   byte j of a block: input 2 j low nibble, 2 j + 1 high
    NAME_scales   U8 [experts, out, in / 32]

    w[e, o, i] = E2M1(q[e, o, i]) 2^(scales[e, o, i // 32] - 127)

The scale code 255 is NaN by the standard (OCP MX v1.0); gpt-oss's own reader takes it for 2^128 (`nan_scale=False`).
transformers gives the transposed weight [experts, in, out]. Source: gpt-oss, gpt_oss/torch/weights.py.
"""

import numpy as np

from refllm.formats.checkpoints.base import check_multiple, stored, times_power_of_two
from refllm.formats.checkpoints.describe import Stored, Tensor
from refllm.formats.layouts import Layout, codes

BLOCK = Layout("gpt-oss MXFP4 block", 16, 32, (codes("q", 32, 4, "i // 2", "4 * (i % 2)", "E2M1 codes"),))
STORED = (
    Stored(
        "mxfp4",
        "gpt-oss experts",
        "E2M1(blocks[e, o, i]) * 2^(scales[e, o, i // 32] - 127)",
        "none",
        (
            Tensor("blocks", "E2M1 codes", BLOCK, "in", ("experts", "out", "in / 32", "16"), "U8", "NAME_blocks"),
            Tensor("scales", "E8M0 codes", None, "", ("experts", "out", "in / 32"), "U8", "NAME_scales"),
        ),
        "gpt-oss",
    ),
)


def gpt_oss_pack(codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """E2M1 codes (..., out, in) and E8M0 codes (..., out, in / 32) uint8 -> blocks, scales.

    Raises
    ------
    ValueError
        Wrong shapes or dtypes; a code above 15.
    """
    codes, scale = np.asarray(codes), np.asarray(scale)
    if codes.dtype.kind not in "iu" or codes.ndim < 2:
        raise ValueError(f"codes must be (..., out, in) integers, got {codes.dtype} of shape {codes.shape}")
    check_multiple("in", codes.shape[-1], 32, "whole blocks")
    blocks = (*codes.shape[:-1], codes.shape[-1] // 32)
    if scale.dtype != np.uint8 or scale.shape != blocks:
        raise ValueError(f"scale must be uint8 codes of shape {blocks}, got {scale.dtype} of shape {scale.shape}")
    return {"blocks": BLOCK.pack(q=codes.reshape(*blocks, 32)), "scales": np.ascontiguousarray(scale)}


def gpt_oss_unpack(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """blocks, scales -> E2M1 codes (..., out, in), E8M0 codes (..., out, in / 32).

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype.
    """
    ndim = np.asarray(tensors.get("scales", np.empty((0, 0, 0)))).ndim
    scale = stored(tensors, "scales", ("uint8",), max(ndim, 2))
    blocks = stored(tensors, "blocks", ("uint8",), scale.ndim + 1)
    if blocks.shape != (*scale.shape, 16):
        raise ValueError(f"blocks must have the shape of scales and 16 bytes each, got {blocks.shape}, {scale.shape}")
    q = BLOCK.unpack(blocks)["q"]
    return q.reshape(*scale.shape[:-1], scale.shape[-1] * 32), np.ascontiguousarray(scale)


def gpt_oss_dequantize(tensors: dict[str, np.ndarray], *, nan_scale: bool = True) -> np.ndarray:
    """blocks, scales -> (..., out, in) float32, exact; products beyond float32 are infinite.

    Parameters
    ----------
    tensors : dict
    nan_scale : bool
        Whether the scale code 255 is NaN (OCP) or 2^128 (gpt-oss's reader).
    """
    from refllm.formats.dtypes import FP4_E2M1

    codes, scale = gpt_oss_unpack(tensors)
    return times_power_of_two(FP4_E2M1.decode(codes), np.repeat(scale, 32, axis=-1), nan_scale)
