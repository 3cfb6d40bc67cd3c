"""Rounded activations: one scale per token, or per block of columns, or one that is given; and their products."""

from dataclasses import dataclass

import numpy as np

BLOCK, SUPER_BLOCK = 32, 256  # columns per scale beside GGUF weights, and beside those with levels
SHIFTS = 3  # a block of 32 may be so many powers of two finer than its super-block


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


def quantize_shifted(x: np.ndarray, bits: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round activations to x^ = scale 2^shift code: 256 columns share the scale, 32 of them a shift of 0 to 3.

    scale = amax / 127 / 8, and the shift is the least for which the codes of the 32 columns reach from -127 to 127 (7
    for 127 with 4 bits). Zeros, NaN and Inf: as in quantize_activations. A sum over 256 columns stays one of integers.

    Parameters
    ----------
    x : (tokens, in) float32, in a multiple of 256
    bits : int

    Returns
    -------
    codes : (tokens, in) int8
    scale : (tokens, in / 256) float32
    shift : (tokens, in / 32) int32

    References
    ----------
    One scale per 256: GGML's Q8_K. Powers of two below a shared scale: Rouhani et al. 2023, "With Shared
    Microexponents, A Little Shifting Goes a Long Way", arXiv:2302.08007.

    Examples
    --------
    >>> codes, scale, shift = quantize_shifted(np.repeat(np.float32([[1016, 508, 507, 127, 126, 3, 1, 0]]), 32, axis=1))
    >>> scale.tolist(), shift.tolist(), codes[0, ::32].tolist()
    ([[1.0]], [[3, 2, 2, 0, 0, 0, 0, 0]], [127, 127, 127, 127, 126, 3, 1, 0])
    """
    blocks = x.reshape(len(x), -1, SUPER_BLOCK // BLOCK, BLOCK)
    most = np.float32((1 << (bits - 1)) - 1)
    own = np.abs(blocks).max(axis=-1)
    amax = own.max(axis=-1, keepdims=True)
    scale = amax / most * np.float32(0.5**SHIFTS)
    with np.errstate(over="ignore"):
        reach = sum(((own * np.float32(2**k) <= amax) & np.isfinite(amax)).astype(np.int32) for k in (1, 2, 3))
    shift = SHIFTS - reach
    usable = np.isfinite(scale) & (scale > 0)
    divisor = np.ldexp(np.where(usable, scale, np.float32(1)), shift)[..., None]
    steps = np.where(usable[..., None], blocks, 0) / divisor
    codes = np.clip(np.rint(steps), -most, most).astype(np.int8)
    return codes.reshape(x.shape), scale[..., 0], shift.reshape(len(x), -1)


def round_activations(x: np.ndarray, block: int, bits: int = 8) -> np.ndarray:
    """What rounded activations stand for, float32 (tokens, in); block : as reference.activation_block gives it."""
    if block != SUPER_BLOCK:
        return dequantize_activations(*quantize_activations(x, block, bits))
    codes, scale, shift = quantize_shifted(x, bits)
    return dequantize_activations(codes, np.ldexp(np.repeat(scale, SUPER_BLOCK // BLOCK, axis=1), shift))


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
