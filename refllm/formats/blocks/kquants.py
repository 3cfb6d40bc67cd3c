"""GGUF's K-quants: super-blocks of 256, whose sub-blocks have small integer scales under one float16 scale.

    Q2_K   x = (d sc) q - dmin mn      16 sub-blocks of 16, scales and minima of 4 bits, codes of 2
    Q3_K   x = (d (sc - 32)) (q - 4)   16 sub-blocks of 16, scales of 6 bits, codes of 3
    Q4_K   x = (d sc) q - dmin mn      8 sub-blocks of 32, scales and minima of 6 bits, codes of 4
    Q5_K   x = (d sc) q - dmin mn      the same with codes of 5 bits
    Q6_K   x = (d sc) (q - 32)         16 sub-blocks of 16, scales of 8 bits, codes of 6
    Q8_K   x = d q                     one float32 scale; activations only, with the sums of every 16 codes

Encoding has three steps: a search gives each sub-block a real scale (and minimum), see scale_search; these are rounded
to integers under one float16; then every number is rounded again, with the scale that a decoder will see. A sub-block
whose decoded scale is 0 keeps the codes of the search.
With importance v the weights of the search are v sqrt(c mean(x^2 of the super-block) + x^2), c = 1 for Q2_K and 2 for
Q3_K to Q5_K, and v alone for Q6_K; the scales of scales are then searched too.

Source: ggml's quantize_row_*_K_ref, *_K_impl and dequantize_row_*_K in ggml-quants.c; the same bytes as libgguf, the
same floats as gguf-py 0.19. No paper.
Deviations: a value that is not finite, or so large that a scale overflows float16, is a ValueError; the sums of a zero
block of Q8_K, which ggml leaves as they are, are 0.
"""

import numpy as np

from refllm.formats.blocks.base import BlockFormat, Terms
from refllm.formats.blocks.scale_search import EMPTY, nearest_int, signed_largest, total
from refllm.formats.layouts import Bits, Field, Layout, codes, numbers

_PAIRS = "i % 128 // 32 * 2"  # the shift of 2-bit codes: four of 32 elements apart share a byte


def _scale(at: int) -> Field:
    return numbers("d", "f2", at, text="scale of the scales")


def _scale_of_minima(at: int) -> Field:
    return numbers("dmin", "f2", at, text="scale of the minima")


def _six_bits(name: str, first: int, nibble: int, text: str) -> tuple[Field, Field]:
    """The scales (or minima) of Q4_K and Q5_K: the first four in the low six bits of bytes `first`.., the last four cut
    in two, low four bits in a nibble of bytes 12.., top two bits on top of the first four."""
    low = codes(f"{name}_low", 4, 6, f"{first} + i", "0", f"{text} of sub-blocks 0..3")
    parts = Bits(4, "12 + i", str(nibble)), Bits(2, f"{first} + i", "6", low=4)
    return low, Field(f"{name}_high", 4, "u1", parts, f"{text} of sub-blocks 4..7")


def _field(name: str, count: int, text: str, *parts: Bits) -> Field:
    return Field(name, count, "u1", parts, text)


Q2_K_LAYOUT = Layout(
    "Q2_K",
    84,
    256,
    (
        codes("sc", 16, 4, "i", "0", "scale of each sub-block"),
        codes("mn", 16, 4, "i", "4", "minimum of each sub-block, subtracted"),
        codes("q", 256, 2, "16 + 32 * (i // 128) + i % 32", _PAIRS, "codes 0..3"),
        _scale(80),
        _scale_of_minima(82),
    ),
)
Q3_K_LAYOUT = Layout(
    "Q3_K",
    110,
    256,
    (
        _field(
            "q",
            256,
            "codes 0..7, 4 means 0; the third bits lie apart",
            Bits(2, "32 + 32 * (i // 128) + i % 32", _PAIRS),
            Bits(1, "i % 32", "i // 32", low=2),
        ),
        _field(
            "sc",
            16,
            "scale of each sub-block, 32 means 0",
            Bits(4, "96 + i % 8", "i // 8 * 4"),
            Bits(2, "104 + i % 4", "i // 4 * 2", low=4),
        ),
        _scale(108),
    ),
)
_SCALES_AND_MINIMA = (
    _scale(0),
    _scale_of_minima(2),
    *_six_bits("sc", 4, 0, "scales"),
    *_six_bits("mn", 8, 4, "minima, subtracted,"),
)
Q4_K_LAYOUT = Layout(
    "Q4_K",
    144,
    256,
    (*_SCALES_AND_MINIMA, codes("q", 256, 4, "16 + 32 * (i // 64) + i % 32", "i % 64 // 32 * 4", "codes 0..15")),
)
Q5_K_LAYOUT = Layout(
    "Q5_K",
    176,
    256,
    (
        *_SCALES_AND_MINIMA,
        _field(
            "q",
            256,
            "codes 0..31; the fifth bits lie apart",
            Bits(4, "48 + 32 * (i // 64) + i % 32", "i % 64 // 32 * 4"),
            Bits(1, "16 + i % 32", "i // 32", low=4),
        ),
    ),
)
Q6_K_LAYOUT = Layout(
    "Q6_K",
    210,
    256,
    (
        _field(
            "q",
            256,
            "codes 0..63, 32 means 0; the top two bits lie apart",
            Bits(4, "64 * (i // 128) + 32 * (i % 128 // 32 % 2) + i % 32", "i % 128 // 64 * 4"),
            Bits(2, "128 + 32 * (i // 128) + i % 32", _PAIRS, low=4),
        ),
        numbers("sc", "i1", 192, 16, "scale of each sub-block, signed"),
        _scale(208),
    ),
)
Q8_K_LAYOUT = Layout(
    "Q8_K",
    292,
    256,
    (
        numbers("d", "f4", 0, text="scale"),
        numbers("q", "i1", 4, 256, "signed codes"),
        numbers("sums", "i2", 260, 16, "sums of 16 codes each: what a minimum is multiplied with"),
    ),
)


def _affine(d, dmin, sc, mn, q) -> Terms:
    d, dmin, sc, mn, q = (a.astype(np.float32) for a in (d, dmin, sc, mn, q))
    return Terms(d, q, -dmin, sc, mn)


def _affine_six_bits(d, dmin, sc_low, sc_high, mn_low, mn_high, q) -> Terms:
    sc, mn = np.concatenate([sc_low, sc_high], axis=1), np.concatenate([mn_low, mn_high], axis=1)
    return _affine(d, dmin, sc, mn, q)


def _signed(scale_offset: int, offset: int):
    def terms(q, sc, d) -> Terms:
        levels = sc.astype(np.float32) - np.float32(scale_offset)
        return Terms(d.astype(np.float32), q.astype(np.float32) - np.float32(offset), levels=levels)

    return terms


def block_weights(x: np.ndarray, importance: np.ndarray, factor: float) -> np.ndarray:
    """importance sqrt(factor mean(x^2) + x^2), the mean over the block, summed in order: (n, block) float32."""
    square = x * x
    mean = np.float32(factor) * total(np.ascontiguousarray(square.T)) / np.float32(x.shape[1])
    return importance * np.sqrt(mean[:, None] + square)


def _requantized(x: np.ndarray, d: np.ndarray, low, old: np.ndarray, least: int, most: int) -> np.ndarray:
    """Codes under the scales a decoder sees; where such a scale is 0, the old ones.

    x (n, k, size), d and low (n, k, 1), old (n, k, size).
    """
    new = np.clip(nearest_int((x + low) / d), least, most) - least
    return np.where(d != 0, new, old).reshape(len(x), 256)


def _encode_affine(size: int, nmax: int, most: int, plain: tuple, weights_of):
    """Q2_K, Q4_K, Q5_K: sub-blocks of `size`, codes 0..nmax, scales and minima 0..most."""

    def encode(x: np.ndarray, importance: np.ndarray | None, search) -> dict[str, np.ndarray]:
        n, parts = len(x), x.reshape(-1, size)
        if importance is None:
            scale, low, old = search.make_qkx(parts, nmax, weights_of(parts), *plain)
            scale, low = scale.reshape(n, -1), low.reshape(n, -1)
            d, sc = _integer_scales(scale, most)
            dmin, mn = _integer_scales(low, most)
        else:
            weights = block_weights(x, importance, 1 if nmax == 3 else 2).reshape(-1, size)
            scale, low, old = search.make_qkx(parts, nmax, weights, -0.9, 0.05, 36)
            sums = total(np.ascontiguousarray(weights.T)).reshape(n, -1)
            d, sc = search.make_qp(scale.reshape(n, -1), most, sums)
            dmin, mn = search.make_qp(low.reshape(n, -1), most, sums)
        stored, sc, mn = (_nibble_pairs if nmax == 3 else _cut_in_two)(sc, mn)
        d, dmin = d.astype(np.float16)[:, None], dmin.astype(np.float16)[:, None]
        scale, low = d.astype(np.float32) * sc.astype(np.float32), dmin.astype(np.float32) * mn.astype(np.float32)
        q = _requantized(x.reshape(n, -1, size), scale[..., None], low[..., None], old.reshape(n, -1, size), 0, nmax)
        return {"d": d, "dmin": dmin, "q": q, **stored}

    return encode


def _integer_scales(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A scale of scales for the largest of them, (n,), and the scales as bytes, (n, k)."""
    largest = np.maximum(values.max(axis=1), np.float32(0)) + np.float32(0)  # never -0
    inverse = np.where(largest > 0, np.float32(most) / largest, np.float32(0))
    return largest / np.float32(most), nearest_int(inverse[:, None] * values) & 255


def _nibble_pairs(sc: np.ndarray, mn: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """What a byte holds of a scale and a minimum: fields, and both as they are read back."""
    byte = (sc | mn << 4) & 255
    return {"sc": byte & 15, "mn": byte >> 4}, byte & 15, byte >> 4


def _cut_in_two(sc: np.ndarray, mn: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    sc, mn = np.minimum(sc, 63), np.minimum(mn, 63)
    fields = {"sc_low": sc[:, :4], "sc_high": sc[:, 4:], "mn_low": mn[:, :4], "mn_high": mn[:, 4:]}
    return fields, sc, mn


def _rms_plus(parts: np.ndarray) -> np.ndarray:
    """The weights of Q4_K and Q5_K: rms of the sub-block + abs(x)."""
    mean = total(np.ascontiguousarray((parts * parts).T)) / np.float32(parts.shape[1])
    return np.sqrt(mean)[:, None] + np.abs(parts)


def _encode_q3_k(x: np.ndarray, importance: np.ndarray | None, search) -> dict[str, np.ndarray]:
    n, parts = len(x), x.reshape(-1, 16)
    if importance is None:
        scale, old = search.make_q3(parts, 4)
        scale = scale.reshape(n, 16)
        largest = signed_largest(scale)
        inverse = np.float32(-32) / largest
        sc = (nearest_int(inverse * scale) & 255).astype(np.uint8).view(np.int8).astype(np.int32)
        sc = np.where(largest != 0, np.clip(sc, -32, 31) + 32, 0)
        d = np.where(largest != 0, np.float32(1) / inverse, np.float32(0))
    else:
        weights = block_weights(x, importance, 2).reshape(-1, 16)
        scale, old = search.make_qx(parts, 4, weights)
        sums = total(np.ascontiguousarray(weights.T)).reshape(n, 16)
        d, sc = search.make_qx(scale.reshape(n, 16), 32, sums)
        d = d[:, None]
    d = d.astype(np.float16)
    scale = d.astype(np.float32) * (sc - 32).astype(np.float32)
    q = _requantized(x.reshape(n, 16, 16), scale[..., None], np.float32(0), old.reshape(n, 16, 16), -4, 3)
    return {"q": q, "sc": sc, "d": d}


def _encode_q6_k(x: np.ndarray, importance: np.ndarray | None, search) -> dict[str, np.ndarray]:
    n, parts = len(x), x.reshape(-1, 16)
    scale, old = search.make_qx(parts, 32, parts * parts if importance is None else importance.reshape(-1, 16))
    scale = scale.reshape(n, 16)
    largest = signed_largest(scale)
    empty = np.abs(largest) < EMPTY  # not where it is NaN: sums of large numbers overflowed, d will show it
    inverse = np.float32(-128) / largest
    sc = np.where(empty, 0, np.minimum(nearest_int(inverse * scale), 127))
    d = np.where(empty, np.float32(0), np.float32(1) / inverse).astype(np.float16)
    step = d.astype(np.float32) * sc.astype(np.float32)
    q = _requantized(x.reshape(n, 16, 16), step[..., None], np.float32(0), old.reshape(n, 16, 16), -32, 31)
    return {"q": np.where(empty, 0, q), "sc": sc, "d": d}


def _encode_q8_k(x: np.ndarray) -> dict[str, np.ndarray]:
    inverse = np.float32(-127) / signed_largest(x)
    q = (np.minimum(nearest_int(inverse * x), 127) & 255).astype(np.uint8).view(np.int8)
    d = np.where(np.isfinite(inverse), np.float32(1) / inverse, np.float32(0))
    return {"d": d, "q": q, "sums": q.reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)}


def _terms_q8_k(d, q, sums) -> Terms:
    return Terms(d, q.astype(np.float32))


def _searched(type_id: int, layout: Layout, terms, encode) -> BlockFormat:
    return BlockFormat(type_id, layout, terms, encode, takes_importance=True)


Q2_K = _searched(10, Q2_K_LAYOUT, _affine, _encode_affine(16, 3, 15, (-0.5, 0.1, 15, True), np.abs))
Q3_K = _searched(11, Q3_K_LAYOUT, _signed(32, 4), _encode_q3_k)
Q4_K = _searched(12, Q4_K_LAYOUT, _affine_six_bits, _encode_affine(32, 15, 63, (-1.0, 0.1, 20), _rms_plus))
Q5_K = _searched(13, Q5_K_LAYOUT, _affine_six_bits, _encode_affine(32, 31, 63, (-0.5, 0.1, 15), _rms_plus))
Q6_K = _searched(14, Q6_K_LAYOUT, _signed(0, 32), _encode_q6_k)
Q8_K = BlockFormat(15, Q8_K_LAYOUT, _terms_q8_k, _encode_q8_k, activations_only=True)
