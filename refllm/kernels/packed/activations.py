"""Rounded activations: one scale per token, or per block of columns, or one that is given; and their products."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rounding:
    """How `matmul` rounds the inputs of weights that are stored as codes: each token with a scale of its own.

    Parameters
    ----------
    bits : int
        2 to 8.
    clip_ratio : float
        In (0, 1]: the range is so much of what the token needs; what lies beyond it saturates.
    symmetric : bool
        False: the range goes from the least to the largest number of a token, and a zero point says where 0 lies.
    """

    bits: int = 8
    clip_ratio: float = 1.0
    symmetric: bool = True

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits of activations must be 2 to 8, got {self.bits}")
        if not 0 < self.clip_ratio <= 1:
            raise ValueError(f"clip_ratio must lie above 0 and not above 1, got {self.clip_ratio}")

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """x^ = scale (codes - zero): codes (tokens, in) int8, scale (tokens, 1) float32, zero (tokens, 1) or None."""
        if self.symmetric:
            return *quantize_activations(x, 0, self.bits, self.clip_ratio), None
        return quantize_affine(x, self.bits, self.clip_ratio)


def quantize_activations(
    x: np.ndarray, block: int = 0, bits: int = 8, clip_ratio: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
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
    clip_ratio : float
        Multiplies the scale.

    Returns
    -------
    codes : (tokens, in) int8
    scale : (tokens, in / block) float32, or (tokens, 1)

    References
    ----------
    Per token: Yao et al. 2022, "ZeroQuant", arXiv:2206.01861, section 4.1. Blocks of 32: GGML's Q8_0, here with a
    float32 scale and half-to-even rounding. 4 bits per token and clip_ratio: Ashkboos et al. 2024, "QuaRot",
    arXiv:2404.00456.

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
    if clip_ratio != 1:
        scale *= np.float32(clip_ratio)
    usable = np.isfinite(scale) & (scale > 0)
    divisor = np.where(usable, scale, np.float32(1))[..., None]
    steps = np.where(usable[..., None], blocks, 0) / divisor
    codes = np.clip(np.rint(steps), -most, most).astype(np.int8)
    return codes.reshape(x.shape), scale


def quantize_affine(x: np.ndarray, bits: int = 8, clip_ratio: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round every token to a grid between its least and its largest number: x^ = scale (code - zero).

    scale = (hi - lo) / (2^bits - 1) and zero = rint(-lo / scale), lo <= 0 <= hi, both times clip_ratio; codes and zero
    are stored less 2^(bits-1), so that they fit int8. A token of zeros has scale 0; one that holds NaN or Inf a scale
    that is not finite.

    Returns
    -------
    codes : (tokens, in) int8
    scale, zero : (tokens, 1) float32; zero is a whole number

    References
    ----------
    Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456, as in its published code.

    Examples
    --------
    >>> codes, scale, zero = quantize_affine(np.array([[-1.0, 0.0, 2.0]], np.float32), bits=2)
    >>> codes.tolist(), scale.tolist(), zero.tolist()
    ([[-2, -1, 1]], [[1.0]], [[-1.0]])
    """
    lo = np.minimum(x.min(axis=1, keepdims=True), 0) * np.float32(clip_ratio)
    hi = np.maximum(x.max(axis=1, keepdims=True), 0) * np.float32(clip_ratio)
    levels, middle = np.float32((1 << bits) - 1), np.float32(1 << (bits - 1))
    with np.errstate(over="ignore", invalid="ignore"):
        scale = hi / levels - lo / levels
    usable = np.isfinite(scale) & (scale > 0)
    divisor = np.where(usable, scale, np.float32(1))
    zero = np.rint(np.where(usable, -lo, 0) / divisor)
    codes = np.clip(np.rint(np.where(usable, x, 0) / divisor) + zero, 0, levels)
    return (codes - middle).astype(np.int8), scale, zero - middle


def dequantize_activations(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """codes * scale, float32, shape (tokens, in)."""
    blocks = codes.reshape(*scale.shape, codes.shape[1] // scale.shape[1]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return (blocks * scale[..., None]).reshape(codes.shape)
