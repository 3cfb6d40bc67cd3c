"""Rounded activations, int8 or int4: one symmetric scale per token, or per block of columns."""

import numpy as np


def quantize_activations(x: np.ndarray, block: int = 0, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Round activations to int8: q = clip(rint(x / scale), -127, 127), scale = amax / 127; to int4 with 7 for 127.

    Dynamic: the scale comes from the values themselves. An all-zero block has scale 0 and codes 0; a block that holds
    NaN or Inf keeps a scale that is not finite, so its products come out as NaN and are not mistaken for numbers.

    Parameters
    ----------
    x : (tokens, in) float32
    block : int
        Columns per scale; 0 = the whole row (one scale per token).
    bits : int
        8, or fewer: codes reach from -(2^(bits-1) - 1) to 2^(bits-1) - 1.

    Returns
    -------
    codes : (tokens, in) int8
    scale : (tokens, in / block) float32, or (tokens, 1)

    References
    ----------
    Per token: Yao et al. 2022, "ZeroQuant", arXiv:2206.01861, section 4.1. Blocks of 32: GGML's Q8_0, here with a
    float32 scale and half-to-even rounding. 4 bits per token: Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456.

    Examples
    --------
    >>> codes, scale = quantize_activations(np.array([[-127.0, 2.5, 0.0, 63.0]], np.float32))
    >>> codes.tolist(), scale.tolist()
    ([[-127, 2, 0, 63]], [[1.0]])
    """
    tokens, columns = x.shape
    width = block or columns
    blocks = x.reshape(tokens, columns // width, width)
    most = (1 << (bits - 1)) - 1
    scale = np.abs(blocks).max(axis=-1) / np.float32(most)
    usable = np.isfinite(scale) & (scale > 0)
    divisor = np.where(usable, scale, np.float32(1))[..., None]
    steps = np.where(usable[..., None], blocks, 0) / divisor
    codes = np.clip(np.rint(steps), -most, most).astype(np.int8)
    return codes.reshape(x.shape), scale


def dequantize_activations(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """codes * scale, float32, shape (tokens, in)."""
    blocks = codes.reshape(*scale.shape, codes.shape[1] // scale.shape[1]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return (blocks * scale[..., None]).reshape(codes.shape)
