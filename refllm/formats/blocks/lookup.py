"""GGUF blocks whose codes are indices into a table of values.

    IQ4_NL   x = d v[q]               32 numbers, float16 scale; v = 16 integers, denser around 0
    IQ4_XS   x = (d (sc - 32)) v[q]   256 numbers, eight sub-blocks with scales of 6 bits
    MXFP4    x = 2^(e - 127) f[q]     32 numbers, E8M0 scale; f = the values of FP4 E2M1
    NVFP4    x = s f[q]               64 numbers, a UE4M3 scale for every 16

IQ4 encodes with the scale that `scale_search.fit_levels` finds, weights x^2, or with importance v
v sqrt(2 mean(x^2 of the block) + x^2); IQ4_NL's codes belong to the scale before it is rounded to float16.
MXFP4: e = floor(log2(max)) - 2 + 127, log2 rounded to float32 first, so that a number just below a power of two counts
as that power. NVFP4: s = max / 6 rounded to UE4M3, halves up; from 248 on ggml takes 448, so blocks with numbers of
1488 and more are coarser than they need be, and numbers above 2688 are clipped. Both: the nearest value, halves toward
zero, never -0.

Source: ggml's quantize_iq4_nl, quantize_iq4_xs, quantize_row_mxfp4_ref, quantize_row_nvfp4_ref and dequantize_row_*;
FP4 blocks: OCP Microscaling Formats v1.0. NVFP4's scale for the whole tensor lies outside of the block and is not here.
Deviation: MXFP4 blocks below 2^-125 get e = 0, where ggml converts a negative number to a byte and so stores e = 233 to
255, which are huge scales, the last one NaN elsewhere.
"""

from itertools import pairwise

import numpy as np

from refllm.formats.blocks.base import BlockFormat, Terms
from refllm.formats.blocks.kquants import block_weights
from refllm.formats.blocks.scale_search import nearest_int, nearest_level, signed_largest
from refllm.formats.layouts import Bits, Field, Layout, codes, numbers

IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
IQ4_TRIES = 7
# FP4 E2M1 doubled, as ggml keeps it: integers.
FP4_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _nibbles(at: int, count: int, block: int, text: str) -> Field:
    """Nibbles, half-split within every `block` elements."""
    half = block // 2
    return codes("q", count, 4, f"{at} + {half} * (i // {block}) + i % {half}", f"i % {block} // {half} * 4", text)


_INDEX = "index into the table of 16 levels"
_FP4 = "FP4 E2M1 codes: sign, two bits of exponent, one of mantissa"
_SIX_BITS = Field(
    "sc",
    8,
    "u1",
    (Bits(4, "4 + i // 2", "i % 2 * 4"), Bits(2, "2 + i // 4", "i % 4 * 2", low=4)),
    "scale of each sub-block, 32 means 0; the top two bits lie apart",
)


def _terms_iq4_nl(d, q) -> Terms:
    return Terms(d.astype(np.float32), IQ4_LEVELS[q].astype(np.float32))


def _terms_iq4_xs(d, sc, q) -> Terms:
    levels = sc.astype(np.float32) - np.float32(32)
    return Terms(d.astype(np.float32), IQ4_LEVELS[q].astype(np.float32), levels=levels)


def _iq4_scales(x: np.ndarray, importance: np.ndarray | None, search) -> np.ndarray:
    """One real scale for every 32 numbers: (n, block) -> (n, block / 32)."""
    weights = x * x if importance is None else block_weights(x, importance, 2)
    return search.fit_levels(x.reshape(-1, 32), IQ4_LEVELS, weights.reshape(-1, 32), IQ4_TRIES).reshape(len(x), -1)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale != 0, np.float32(1) / scale, np.float32(0))


def _encode_iq4_nl(x: np.ndarray, importance: np.ndarray | None, search) -> dict[str, np.ndarray]:
    d = _iq4_scales(x, importance, search)
    return {"d": d, "q": nearest_level(_inverse(d) * x, IQ4_LEVELS)}


def _encode_iq4_xs(x: np.ndarray, importance: np.ndarray | None, search) -> dict[str, np.ndarray]:
    scale = _iq4_scales(x, importance, search)
    d = -signed_largest(scale) / np.float32(32)
    sc = np.clip(nearest_int(_inverse(d) * scale), -32, 31)
    step = _inverse(d * sc.astype(np.float32))
    q = nearest_level(np.repeat(step, 32, axis=1) * x, IQ4_LEVELS)
    return {"d": d, "sc": sc + 32, "q": q}


def _nearest_fp4(magnitude: np.ndarray, negative: np.ndarray, half: np.ndarray) -> np.ndarray:
    """The codes of the nearest of `half` times FP4_DOUBLED; every midpoint is exact in float32."""
    q = np.zeros(magnitude.shape, np.uint8)
    for low, high in pairwise(FP4_DOUBLED[:8]):
        q += magnitude > half * (np.float32(low) + np.float32(high)) * np.float32(0.5)
    return np.where(half > 0, q | ((q > 0) & negative).astype(np.uint8) << 3, 0)


def _terms_mxfp4(e, q) -> Terms:
    return Terms(np.ldexp(np.float32(1), e.astype(np.int32) - 128), FP4_DOUBLED[q].astype(np.float32))


def _encode_mxfp4(x: np.ndarray) -> dict[str, np.ndarray]:
    largest = np.abs(x).max(axis=1, keepdims=True)
    log2 = np.log2(np.where(largest > 0, largest, 1).astype(np.float64)).astype(np.float32)
    e = np.where(largest > 0, np.maximum(np.floor(log2).astype(np.int32) - 2 + 127, 0), 0)
    return {"e": e, "q": _nearest_fp4(np.abs(x), x < 0, np.ldexp(np.float32(1), e - 128))}


def _ue4m3_halved(scale: np.ndarray) -> np.ndarray:
    """Half the value of a scale; 0 and 0x7F mean 0, the top bit nothing."""
    exponent, mantissa = (scale >> 3 & 15).astype(np.int32), (scale & 7).astype(np.float32)
    value = np.where(exponent == 0, mantissa / 8 * np.float32(2**-6), np.ldexp(1 + mantissa / 8, exponent - 7))
    return np.where(scale == 0x7F, np.float32(0), value * np.float32(0.5))


def _to_ue4m3(x: np.ndarray) -> np.ndarray:
    """The nearest UE4M3, halves up: normals by the bits of float32, subnormals (below 2^-6) in steps of 2^-9.

    What would have the largest exponent (248 and more) becomes the largest number, 448, as in ggml.
    """
    normal = ((x.view(np.int32) + (1 << 19)) >> 20) - ((127 - 7) << 3)
    normal = np.where(normal >= 15 << 3, 0x7E, normal)
    small = np.minimum((x * np.float32(512) + np.float32(0.5)).astype(np.int32), 7)
    return np.where(x < np.float32(2**-6), small, normal)


def _terms_nvfp4(d, q) -> Terms:
    return Terms(_ue4m3_halved(d), FP4_DOUBLED[q].astype(np.float32))


def _encode_nvfp4(x: np.ndarray) -> dict[str, np.ndarray]:
    scale = _to_ue4m3(np.abs(x).reshape(-1, 4, 16).max(axis=2) / np.float32(6))
    half = np.repeat(_ue4m3_halved(scale), 16, axis=1)
    return {"d": scale, "q": _nearest_fp4(np.abs(x), x < 0, half)}


IQ4_NL = BlockFormat(
    20,
    Layout("IQ4_NL", 18, 32, (numbers("d", "f2", 0, text="scale"), _nibbles(2, 32, 32, _INDEX))),
    _terms_iq4_nl,
    _encode_iq4_nl,
    takes_importance=True,
)
IQ4_XS = BlockFormat(
    23,
    Layout(
        "IQ4_XS",
        136,
        256,
        (numbers("d", "f2", 0, text="scale of the scales"), _SIX_BITS, _nibbles(8, 256, 32, _INDEX)),
    ),
    _terms_iq4_xs,
    _encode_iq4_xs,
    takes_importance=True,
)
MXFP4 = BlockFormat(
    39,
    Layout(
        "MXFP4",
        17,
        32,
        (numbers("e", "u1", 0, text="E8M0 scale: exponent plus 127"), _nibbles(1, 32, 32, _FP4)),
    ),
    _terms_mxfp4,
    _encode_mxfp4,
)
NVFP4 = BlockFormat(
    40,
    Layout(
        "NVFP4",
        36,
        64,
        (numbers("d", "u1", 0, 4, "UE4M3 scale of every 16 elements"), _nibbles(4, 64, 16, _FP4)),
    ),
    _terms_nvfp4,
    _encode_nvfp4,
)
