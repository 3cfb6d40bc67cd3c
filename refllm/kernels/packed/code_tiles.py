"""The scales of a CodeWeight as a tile kernel has them: which columns share one, and what is multiplied.

A kernel multiplies sums of table values with a scale, so `divide` becomes a product with the inverse and `multiply_127`
one with scale / 127: the result differs from the record's own by the rounding of one more float32 operation. A record
whose weights could overflow on one side only, or that has an offset, has no such form.
"""

from math import gcd

import numpy as np

from refllm.kernels.packed.base import ALL, rows_of
from refllm.kernels.packed.codes import FLAT, CodeWeight

_TINY, _HUGE = np.finfo(np.float32).tiny, np.finfo(np.float32).max


def shared_columns(weight: CodeWeight) -> int:
    """Columns that share a scale in every row, counted from its start.

    Examples
    --------
    >>> codes = np.zeros((3, 24), np.uint8)
    >>> shared_columns(CodeWeight.pack(codes, np.ones((1, 5), np.float32), "NF4", (FLAT, 16)))
    8
    """
    if weight.scale is None:
        return weight.columns
    if weight.block_rows == FLAT:  # row r begins in the middle of a block, r * columns further on
        return gcd(weight.columns, weight.block_columns)
    return min(weight.columns, weight.block_columns)


def scale_kind(weight: CodeWeight) -> str | None:
    """How a kernel stores the scales: a Form's `scale`; None where it cannot have them."""
    if weight.offset is not None:
        return None
    if weight.scale is None:
        return "float"
    if isinstance(weight.scale, CodeWeight) and weight.rule == "multiply":
        inner = weight.scale
        if inner.table == "E8M0" and inner.scale is None and inner.offset is None:
            return "power"
        if inner.table == "FP8_E4M3FN" and inner.offset is None and inner.unpacked().max() < 0x7F:
            if inner.scale is None or rows_of(inner.scale, ALL).size == 1:
                return "ue4m3"
    with np.errstate(over="ignore"):
        numbers = np.abs(_multiplied(weight, rows_of(weight.scale, ALL)))
        largest = np.abs(weight.entries[np.isfinite(weight.entries)]).max()
        if not np.isfinite(numbers * max(largest, np.float32(1))).all():
            return None
        if weight.rule == "divide" and not ((numbers >= _TINY) & (numbers <= _HUGE)).all():
            return None
    as_stored = weight.rule == "multiply" and isinstance(weight.scale, np.ndarray) and weight.scale.dtype == np.float16
    return "half" if as_stored else "float"


def _multiplied(weight: CodeWeight, scale: np.ndarray) -> np.ndarray:
    """What table values are multiplied with, float32."""
    if weight.rule == "divide":
        return np.float32(1) / scale
    return scale * np.float32(1 / 127) if weight.rule == "multiply_127" else scale


def spread_scales(weight: CodeWeight, kind: str, width: int, ids: slice) -> np.ndarray:
    """A scale for every `width` columns of some rows, as a kernel stores it: (k, ceil(in / width))."""
    if weight.scale is None:
        return np.ones((len(weight.codes[ids]), 1), np.float32)
    if kind in ("power", "ue4m3"):
        codes = weight.scale.unpacked() + np.uint8(kind == "power")  # a kernel's power of two is 2^(e - 128)
        return weight.spread(codes, ids)[:, ::width].astype(np.uint8)
    numbers = weight.spread(weight.scale, ids)[:, ::width]
    return numbers.astype(np.float16) if kind == "half" else _multiplied(weight, numbers)


def row_factor(weight: CodeWeight) -> float:
    """What the products beside ue4m3 scales are multiplied with in the end."""
    inner = weight.scale
    if inner.scale is None:
        return 1.0
    return float(_multiplied(inner, rows_of(inner.scale, ALL))[0, 0])


def lookup_values(weight: CodeWeight) -> np.ndarray:
    """The table as a kernel looks it up: 16 or 256 float32."""
    values = np.zeros(16 if weight.entries.size <= 16 else 256, np.float32)
    values[: weight.entries.size] = weight.entries
    return values
