"""qserve: keys and values of every token and head in four (or eight) bits, with a zero that is not rounded.

    s = (max - min) / (2^bits - 1)    z = -min / s    code = rint(clip(x / s + z, 0, 2^bits - 1))    x^ = (code - z) s

over the D channels of one head of one token; s and z are float16 and stored beside the codes, which makes bits + 32 / D
bits a number. A token is coded once, when it has been attended: a call sees its own tokens in full. Keys are coded
after RoPE. In front of it `smoothattention` evens their channels out, which one scale for all of them needs.

z takes no whole number: one that had to would move the whole grid by up to half a step, for nothing, as no product
with integers is formed (the codes are widened before the product).

Paper: Lin et al. 2024, "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", arXiv:2405.04532,
section 4.2.
Differs from the authors' code: z is computed with the s that is stored; a head whose numbers are all equal, or so close
together that s would be 0 or z beyond float16, becomes one number, s = its middle, z = -1 (there: 0 / 0).
Stage: decode, memory
Inventory: 13
Lesson: lessons/27-quantised-caches.md
Golden: kvcache/qserve
"""

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.methods.kvcache._coded import CodedStore


def qserve(layer: int, *, bits: int = 4, recent: int = 0) -> "QServeStore":
    """The store of one layer: `new_cache(model, policy=qserve)`.

    Parameters
    ----------
    layer : int
        Every layer is treated alike.
    bits : int
        Of a code, 2 to 8; the paper has KV4 and KV8.
    recent : int
        Last tokens that are kept in full (the paper: none).

    Returns
    -------
    QServeStore

    Raises
    ------
    ValueError
        A number outside its range.
    """
    return QServeStore(bits, bits, recent)


class QServeStore(CodedStore):
    """Codes, s and z of every token and head.

    Parameters
    ----------
    k_bits, v_bits : int
        Of the codes of keys and of values, 2 to 8.
    recent : int
        As in `qserve`.
    """

    def __init__(self, k_bits: int, v_bits: int, recent: int = 0, name: str = "qserve"):
        self.name = name
        for bits in (k_bits, v_bits):
            if not 2 <= bits <= 8:
                raise ValueError(f"{name} bits must be 2 to 8, got {bits}")
        self.bits = {"k": k_bits, "v": v_bits}
        super().__init__(recent)

    def _encode(self, side, x):
        codes, scale, zero = quantize_tokens(x, self.bits[side])
        return {"codes": pack_bits(codes, self.bits[side]), "scale": scale[..., None], "zero": zero[..., None]}

    def _decode(self, side, arrays, dtype):
        codes = unpack_bits(arrays["codes"], self.bits[side], self._width(side))
        return dequantize_tokens(codes, arrays["scale"][..., 0], arrays["zero"][..., 0], dtype)


def quantize_tokens(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round the last axis to 2^bits even steps.

    Parameters
    ----------
    x : (..., D) float32 or float64
        Finite, of magnitudes up to 65504.
    bits : int
        2 to 8.

    Returns
    -------
    codes : (..., D) uint8
    scale, zero : (...) float16
        As stored; the codes are computed with these, in float64.

    Examples
    --------
    >>> codes, scale, zero = quantize_tokens(np.array([-0.5, 0.0, 7.0]), bits=4)
    >>> codes.tolist(), scale.tolist(), zero.tolist()
    ([0, 1, 15], 0.5, 1.0)
    """
    x = x.astype(np.float64)
    lowest, highest = x.min(axis=-1), x.max(axis=-1)
    levels = 2**bits - 1
    scale = ((highest - lowest) / levels).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero = (-lowest / scale.astype(np.float64)).astype(np.float16)
    one_number = (scale == 0) | ~np.isfinite(zero)
    scale = np.where(one_number, ((lowest + highest) / 2).astype(np.float16), scale)
    zero = np.where(one_number, np.float16(-1), zero)
    step = np.where(one_number, 1.0, scale)[..., None]
    codes = np.rint(np.clip(x / step + zero[..., None], 0, levels))
    return np.where(one_number[..., None], 0, codes).astype(np.uint8), scale, zero


def dequantize_tokens(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, dtype=np.float32) -> np.ndarray:
    """(code - zero) * scale, rounded once; shapes as `quantize_tokens` returns them.

    Examples
    --------
    >>> dequantize_tokens(np.array([0, 15], np.uint8), np.float16(0.5), np.float16(0.25)).tolist()
    [-0.125, 7.375]
    """
    scale, zero = (np.asarray(a)[..., None].astype(np.float64) for a in (scale, zero))
    return ((codes - zero) * scale).astype(dtype)
