"""GGUF blocks of one and two bits: a scale d, and codes that say how many times.

    TQ1_0   x = d (t - 1)    256 numbers, t = 0..2 as digits to base 3, five in a byte
    TQ2_0   x = d (t - 1)    256 numbers, two bits each
    Q1_0    x = d or -d      128 numbers, one bit each
    Q2_0    x = d (q - 1)    64 numbers, two bits each, q = 0..3

d is the largest magnitude, of Q1_0 the mean magnitude. Codes are rint(x / d) + 1 with halves away from zero, so an
encoder never writes q = 3; bits of Q1_0 are set for x >= 0.

Source: ggml's quantize_row_tq1_0_ref, quantize_row_tq2_0_ref, quantize_row_q1_0_ref, quantize_row_q2_0_ref; for ternary
weights (Ma et al. 2024, "The Era of 1-bit LLMs", arXiv:2402.17764) the codes are exact.
Deviations: as those of simple.py.
"""

import numpy as np

from refllm.formats.blocks.base import BlockFormat, Terms
from refllm.formats.blocks.scale_search import total
from refllm.formats.blocks.simple import inverse, round_half_away
from refllm.formats.layouts import Digits, Field, Layout, codes, numbers


def _scale(at: int) -> Field:
    return numbers("d", "f2", at, text="scale")


def _trits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale (n, 1) and codes 0..2."""
    d = np.abs(x).max(axis=1, keepdims=True)
    return d, (round_half_away(x * inverse(d)) + 1).astype(np.uint8)


def _centred(d: np.ndarray, t: np.ndarray) -> Terms:
    return Terms(d.astype(np.float32), t.astype(np.float32) - 1)


def _encode_tq1_0(x: np.ndarray) -> dict[str, np.ndarray]:
    d, t = _trits(x)
    return {"first": t[:, :160], "second": t[:, 160:240], "last": t[:, 240:], "d": d}


def _terms_tq1_0(first, second, last, d) -> Terms:
    return _centred(d, np.concatenate([first, second, last], axis=1))


def _encode_two_bits(x: np.ndarray) -> dict[str, np.ndarray]:
    d, q = _trits(x)
    return {"q": q, "d": d}


def _terms_two_bits(q, d) -> Terms:
    return _centred(d, q)


def _encode_q1_0(x: np.ndarray) -> dict[str, np.ndarray]:
    d = total(np.ascontiguousarray(np.abs(x).T))[:, None] / np.float32(x.shape[1])
    return {"d": d, "q": (x >= 0).astype(np.uint8)}


def _terms_q1_0(d, q) -> Terms:
    return Terms(d.astype(np.float32), 2 * q.astype(np.float32) - 1)


TQ1_0 = BlockFormat(
    34,
    Layout(
        "TQ1_0",
        54,
        256,
        (
            Field("first", 160, "u1", Digits("i % 32", "i // 32"), "digits 0..2 of elements 0..159, 1 means 0"),
            Field("second", 80, "u1", Digits("32 + i % 16", "i // 16"), "digits of elements 160..239"),
            Field("last", 16, "u1", Digits("48 + i % 4", "i // 4"), "digits of elements 240..255; the fifth is 0"),
            _scale(52),
        ),
    ),
    _terms_tq1_0,
    _encode_tq1_0,
)
TQ2_0 = BlockFormat(
    35,
    Layout(
        "TQ2_0",
        66,
        256,
        (codes("q", 256, 2, "32 * (i // 128) + i % 32", "i % 128 // 32 * 2", "codes, 1 means 0"), _scale(64)),
    ),
    _terms_two_bits,
    _encode_two_bits,
)
Q1_0 = BlockFormat(
    41,
    Layout("Q1_0", 18, 128, (_scale(0), codes("q", 128, 1, "2 + i // 8", "i % 8", "1 for +, 0 for -"))),
    _terms_q1_0,
    _encode_q1_0,
)
Q2_0 = BlockFormat(
    42,
    Layout("Q2_0", 18, 64, (_scale(0), codes("q", 64, 2, "2 + i // 4", "i % 4 * 2", "codes, 1 means 0"))),
    _terms_two_bits,
    _encode_two_bits,
)
