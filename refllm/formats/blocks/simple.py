"""GGUF's simple blocks of 32: one scale d, perhaps a minimum m, and the codes.

    Q4_0   x = d (q - 8)      Q5_0   x = d (q - 16)     Q8_0   x = d q
    Q4_1   x = d q + m        Q5_1   x = d q + m        Q8_1   x = d q, s = d sum(q) (activations only)

Without importance the extremes of a block give its scale. With importance v (4 and 5 bits), the scale is searched with
weights v sqrt(mean(x^2 of the row) + x^2), see scale_search.

Codes of 4 bits lie half-split: byte j has element j in its low nibble and element j + 16 in the high one. The fifth
bits of Q5 are a little-endian word of 32 bits, bit i for element i.
Source: ggml's quantize_row_*_ref and dequantize_row_* in ggml-quants.c; the same bytes and floats as gguf-py 0.19.
Deviations: a value that is not finite, or so large that its scale overflows float16, is a ValueError; a block so small
that 1/d overflows float32 gets the codes of a zero block (its stored scale is 0 either way).
"""

import numpy as np

from refllm.formats.blocks.base import BlockFormat, Terms
from refllm.formats.blocks.scale_search import signed_largest, smallest
from refllm.formats.layouts import Bits, Field, Layout, codes, numbers


def inverse(d: np.ndarray) -> np.ndarray:
    """1/d in float32; 0 where d is 0 or 1/d overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        result = np.float32(1) / d
    return np.where(np.isfinite(result), result, np.float32(0))


def round_half_away(x: np.ndarray) -> np.ndarray:
    """To the nearest integer, halves away from zero, as C's roundf; |x| < 2^22, where the fraction is exact."""
    whole = np.floor(np.abs(x))
    return np.copysign(whole + (np.abs(x) - whole >= 0.5), x)


def row_weights(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """importance sqrt(mean(x^2) + x^2), the mean being that of the row, summed in order; (..., n) float32."""
    square = x * x
    mean = np.add.accumulate(square, axis=-1)[..., -1:] / np.float32(x.shape[-1])
    return importance * np.sqrt(mean + square)


def _encode_signed(levels: int):
    def encode(x: np.ndarray, weights: np.ndarray | None, search) -> dict[str, np.ndarray]:
        """Codes 0..levels-1 around levels/2: the largest magnitude gets code 0, its sign goes into d."""
        if weights is not None:
            scale, q = search.make_qx(x, levels // 2, weights)
            return {"d": scale[:, None], "q": q}
        d = signed_largest(x) / np.float32(-levels / 2)
        q = np.trunc(x * inverse(d) + np.float32(levels / 2 + 0.5))
        return {"d": d, "q": np.minimum(q, levels - 1).astype(np.uint8)}

    return encode


def _signed(levels: int):
    return lambda d, q: Terms(d.astype(np.float32), q.astype(np.float32) - np.float32(levels / 2))


def _encode_affine(levels: int):
    def encode(x: np.ndarray, weights: np.ndarray | None, search) -> dict[str, np.ndarray]:
        """m = min(x), codes 0..levels-1; halves round up."""
        if weights is not None:
            scale, minimum, q = search.make_qkx(x, levels - 1, weights, -0.9, 0.05, 36)
            return {"d": scale[:, None], "m": -minimum[:, None], "q": q}
        m = smallest(x)
        d = (x.max(axis=1, keepdims=True) - m) / np.float32(levels - 1) + np.float32(0)  # of zeros never -0
        q = np.trunc((x - m) * inverse(d) + np.float32(0.5))
        return {"d": d, "m": m, "q": np.minimum(q, levels - 1).astype(np.uint8)}

    return encode


def _affine(d: np.ndarray, m: np.ndarray, q: np.ndarray) -> Terms:
    return Terms(d.astype(np.float32), q.astype(np.float32), m.astype(np.float32))


def _encode_q8_0(x: np.ndarray) -> dict[str, np.ndarray]:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return {"d": d, "q": round_half_away(x * inverse(d)).astype(np.int8)}


def _encode_q8_1(x: np.ndarray) -> dict[str, np.ndarray]:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    q = round_half_away(x * inverse(d))
    return {"d": d, "s": q.sum(axis=1, keepdims=True) * d, "q": q.astype(np.int8)}


def _whole(d: np.ndarray, q: np.ndarray) -> Terms:
    return Terms(d.astype(np.float32), q.astype(np.float32))


def _scale(at: int = 0) -> Field:
    return numbers("d", "f2", at, text="scale")


def _minimum(at: int = 2) -> Field:
    return numbers("m", "f2", at, text="minimum, added")


def _nibbles(at: int, text: str) -> Field:
    return codes("q", 32, 4, f"{at} + i % 16", "i // 16 * 4", text)


def _fives(at: int, text: str) -> Field:
    """Low nibbles half-split from byte at + 4 on; fifth bits in the four bytes before."""
    parts = Bits(4, f"{at + 4} + i % 16", "i // 16 * 4"), Bits(1, f"{at} + i // 8", "i % 8", low=4)
    return Field("q", 32, "u1", parts, text)


def _searched(type_id: int, layout: Layout, terms, encode) -> BlockFormat:
    return BlockFormat(type_id, layout, terms, encode, takes_importance=True, weigh=row_weights)


Q4_0 = _searched(
    2,
    Layout("Q4_0", 18, 32, (_scale(), _nibbles(2, "codes 0..15, 8 means 0"))),
    _signed(16),
    _encode_signed(16),
)
Q4_1 = _searched(
    3,
    Layout("Q4_1", 20, 32, (_scale(), _minimum(), _nibbles(4, "codes 0..15 above the minimum"))),
    _affine,
    _encode_affine(16),
)
Q5_0 = _searched(
    6,
    Layout("Q5_0", 22, 32, (_scale(), _fives(2, "codes 0..31, 16 means 0"))),
    _signed(32),
    _encode_signed(32),
)
Q5_1 = _searched(
    7,
    Layout("Q5_1", 24, 32, (_scale(), _minimum(), _fives(4, "codes 0..31 above the minimum"))),
    _affine,
    _encode_affine(32),
)
Q8_0 = BlockFormat(
    8, Layout("Q8_0", 34, 32, (_scale(), numbers("q", "i1", 2, 32, "signed codes"))), _whole, _encode_q8_0
)
Q8_1 = BlockFormat(
    9,
    Layout(
        "Q8_1",
        36,
        32,
        (
            _scale(),
            numbers("s", "f2", 2, text="scale times the sum of the codes: what a minimum is multiplied with"),
            numbers("q", "i1", 4, 32, "signed codes"),
        ),
    ),
    lambda d, s, q: _whole(d, q),
    _encode_q8_1,
    activations_only=True,
)
