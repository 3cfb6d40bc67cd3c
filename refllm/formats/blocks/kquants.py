"""GGUF's K-quants: super-blocks of 256, whose sub-blocks have small integer scales under one float16 scale.

    Q4_K   x = (d sc[i // 32]) q[i] - dmin mn[i // 32]     8 sub-blocks of 32, scales and minima of 6 bits
    Q6_K   x = (d sc[i // 16]) (q[i] - 32)                 16 sub-blocks of 16, scales of 8 bits

Source: ggml's dequantize_row_*_K in ggml-quants.c; the same floats as gguf-py 0.19.
"""

import numpy as np

from refllm.formats.blocks.base import BlockFormat
from refllm.formats.layouts import Bits, Field, Layout, codes, numbers


def _six_bits(name: str, at: int, first: int, nibble: int, text: str) -> tuple[Field, Field]:
    """The scales (or minima) of Q4_K and Q5_K: the first four in the low six bits of bytes `first`.., the last four cut
    in two, low four bits in a nibble of bytes 8.., top two bits on top of the first four."""
    low = codes(f"{name}_low", 4, 6, f"{at + first} + i", "0", f"{text} of sub-blocks 0..3")
    parts = Bits(4, f"{at + 8} + i", str(nibble)), Bits(2, f"{at + first} + i", "6", low=4)
    return low, Field(f"{name}_high", 4, "u1", parts, f"{text} of sub-blocks 4..7")


Q4_K_LAYOUT = Layout(
    "Q4_K",
    144,
    256,
    (
        numbers("d", "f2", 0, text="scale of the scales"),
        numbers("dmin", "f2", 2, text="scale of the minima"),
        *_six_bits("sc", 4, 0, 0, "scales"),
        *_six_bits("mn", 4, 4, 4, "minima"),
        codes("q", 256, 4, "16 + 32 * (i // 64) + i % 32", "i % 64 // 32 * 4", "codes"),
    ),
)


def _decode_q4_k(d, dmin, sc_low, sc_high, mn_low, mn_high, q) -> np.ndarray:
    scale = d.astype(np.float32) * np.concatenate([sc_low, sc_high], axis=1).astype(np.float32)
    low = dmin.astype(np.float32) * np.concatenate([mn_low, mn_high], axis=1).astype(np.float32)
    return np.repeat(scale, 32, axis=1) * q.astype(np.float32) - np.repeat(low, 32, axis=1)


def _six_bit_codes() -> Field:
    half, k = "(i // 128)", "(i % 128 // 32)"
    parts = (
        Bits(4, f"64 * {half} + 32 * ({k} % 2) + i % 32", f"{k} // 2 * 4"),
        Bits(2, f"128 + 32 * {half} + i % 32", f"2 * {k}", low=4),
    )
    return Field("q", 256, "u1", parts, "codes")


Q6_K_LAYOUT = Layout(
    "Q6_K",
    210,
    256,
    (_six_bit_codes(), numbers("sc", "i1", 192, 16, "scales"), numbers("d", "f2", 208, text="scale of the scales")),
)


def _decode_q6_k(q, sc, d) -> np.ndarray:
    scale = d.astype(np.float32) * sc.astype(np.float32)
    return np.repeat(scale, 16, axis=1) * (q.astype(np.float32) - 32)


Q4_K = BlockFormat(12, Q4_K_LAYOUT, _decode_q4_k)
Q6_K = BlockFormat(14, Q6_K_LAYOUT, _decode_q6_k)
