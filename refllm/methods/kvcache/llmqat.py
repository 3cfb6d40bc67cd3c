"""llmqat: keys and values of a token, all heads together, in signed codes of one step, as they leave their projections.

    step = largest |x| of the token / q      code = rint(x / step)      x^ = step * code      q = 2^(bits - 1) - 1

over the Hk D numbers of a token, keys before RoPE. One step for all heads costs next to nothing (float32 a token: bits
+ 32 / (Hk D) bits a number) and lets the loudest head decide for all. Attention sees rounded numbers only, of its own
tokens too, since the model was trained with them: the rounding is part of the forward pass, and its gradient

    d x^ / d x = 1 where |x| < 2, else 0

passes straight through, the step counting as a constant. The limit of 2 stops numbers from growing; forward it clips
nothing.

Paper: Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", arXiv:2305.17888,
section 2.2.
Differs from the authors' code: 1e-6, which it adds to the largest magnitude and to 1 / step, is left out; a token of
zeros has the step 0 and codes 0.
Stage: decode, memory
Inventory: 97
Lesson: lessons/27-quantised-caches.md
Golden: kvcache/llmqat
"""

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.autograd import Tensor, record
from refllm.methods.kvcache._coded import CodedStore

LIMIT = 2.0  # magnitudes from here on have no gradient


def llmqat(layer: int, *, bits: int = 4, recent: int = 0) -> "LLMQATStore":
    """The store of one layer: `new_cache(model, policy=llmqat)`.

    Parameters
    ----------
    layer : int
        Every layer is treated alike.
    bits : int
        Of a code, 2 to 16.
    recent : int
        Last tokens that are kept in full (the paper: none).

    Returns
    -------
    LLMQATStore

    Raises
    ------
    ValueError
        A number outside its range.
    """
    return LLMQATStore(bits, recent)


class LLMQATStore(CodedStore):
    """Codes and one step of every token.

    Parameters
    ----------
    bits, recent : int
        As in `llmqat`.
    """

    name = "llmqat"
    pre_rope = True
    rounds_own = True

    def __init__(self, bits: int, recent: int = 0):
        if not 2 <= bits <= 16:
            raise ValueError(f"llmqat bits must be 2 to 16, got {bits}")
        self.bits = bits
        super().__init__(recent)

    def _encode(self, side, x):
        codes, step = quantize_heads(x, self.bits)
        return {"codes": pack_bits(codes, self.bits), "step": step}

    def _decode(self, side, arrays, dtype):
        codes = unpack_bits(arrays["codes"], self.bits, self._width(side))
        return dequantize_heads(codes, arrays["step"], self.bits, dtype)


def quantize_heads(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round tokens, all heads of one with the same step.

    Parameters
    ----------
    x : (..., Hk, T, D) float32 or float64, finite
    bits : int
        2 to 16.

    Returns
    -------
    codes : (..., Hk, T, D) uint8, or uint16 above 8 bits
        q = 2^(bits - 1) - 1 is added: 0 to 2 q.
    step : (..., 1, T, 1) float32
        As stored; the codes are computed with it, in float64.

    Examples
    --------
    >>> codes, step = quantize_heads(np.array([[[7.0, -1.4]], [[0.5, 0.0]]]), bits=4)
    >>> codes.tolist(), step.tolist()
    ([[[14, 6]], [[7, 7]]], [[[1.0]]])
    """
    most = 2 ** (bits - 1) - 1
    step = (np.abs(x).max(axis=(-3, -1), keepdims=True).astype(np.float64) / most).astype(np.float32)
    ratio = x / np.where(step > 0, step, 1).astype(np.float64)
    codes = np.clip(np.rint(ratio), -most, most) + most
    return codes.astype(np.uint8 if bits <= 8 else np.uint16), step


def dequantize_heads(codes: np.ndarray, step: np.ndarray, bits: int, dtype=np.float32) -> np.ndarray:
    """step * (code - q), rounded once; shapes as `quantize_heads` returns them.

    Examples
    --------
    >>> dequantize_heads(np.array([[[14, 6]]], np.uint8), np.float32([[[0.5]]]), 4).tolist()
    [[[3.5, -0.5]]]
    """
    return ((codes.astype(np.float64) - (2 ** (bits - 1) - 1)) * step).astype(dtype)


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """The rounding as a step of training: x as the cache gives it back, with the gradient of x where |x| < 2.

    Parameters
    ----------
    x : Tensor (..., T, n)
        What a projection gives for T tokens: all heads side by side.
    bits : int

    Examples
    --------
    >>> from refllm.kernels.autograd import parameter
    >>> x = parameter(np.array([[7.0, -1.4]]))
    >>> y = round_tokens(x, bits=4)
    >>> y.sum().backward()
    >>> y.data.tolist(), x.grad.tolist()
    ([[7.0, -1.0]], [[0.0, 1.0]])
    """
    codes, step = quantize_heads(x.data[..., None, :, :], bits)
    rounded = dequantize_heads(codes, step, bits, x.data.dtype)[..., 0, :, :]
    inside = np.abs(x.data) < LIMIT
    return record(rounded, (x,), lambda g: (g * inside,))
