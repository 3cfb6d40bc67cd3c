"""What all checkpoint formats share: units of a layout along an axis, codes in groups, checks.

A checkpoint stores a matrix of codes as words (bytes, 32-bit words, 16-bit words). A `Layout` says where the codes of
one unit of words lie; `pack_axis` sets units one after another along an axis of the matrix.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from refllm.formats.layouts import Layout, stream


class Grouped(NamedTuple):
    """Integer codes with one scale, and perhaps one zero point, per row and group of columns.

    codes : (out, in) uint8
    scale : (out, groups) float
    zero_point : (out, groups) uint8, or None for the middle code 2^(bits-1) everywhere
    g_idx : (in,) int32 group of each column, or None for consecutive columns in groups of one size
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None = None
    g_idx: np.ndarray | None = None


@cache
def dense_words(bits: int, word: int = 32) -> Layout:
    """The smallest unit of whole words that whole codes fill as one little-endian bit stream, low bits first.

    Examples
    --------
    >>> dense_words(4).elements, dense_words(3).elements, dense_words(3).nbytes
    (8, 32, 12)
    """
    unit = math.lcm(bits, word)
    return Layout(f"{bits}-bit codes in {word}-bit words", unit // 8, unit // bits, (stream("q", unit // bits, bits),))


def word_count(n: int, layout: Layout, word: str) -> int:
    """Words that n codes take: a last unit that is not full ends with its last word that holds a code."""
    size = np.dtype(word).itemsize
    whole, rest = divmod(n, layout.elements)
    return whole * (layout.nbytes // size) + -(-rest * layout.field("q").bits // (8 * size))


def pack_axis(codes: np.ndarray, layout: Layout, axis: int, word: str) -> np.ndarray:
    """Codes -> words, units of a layout one after another along an axis.

    Parameters
    ----------
    codes : integer array
        Each in the range of the layout's field `q`.
    layout : Layout
        With one field, `q`; `layout.elements` consecutive codes make a unit.
    axis : int
        Bits that no code fills are 0.
    word : str
        NumPy dtype of the words: "i4", "u1" ...

    Returns
    -------
    array of `word`, `word_count` long along the axis

    Examples
    --------
    >>> [hex(w) for w in pack_axis(np.arange(16).reshape(2, 8) % 8, dense_words(4), 1, "i4").ravel()]
    ['0x76543210', '0x76543210']
    """
    line = np.moveaxis(codes, axis, -1)
    *lead, n = line.shape
    units = -(-n // layout.elements)
    full = np.zeros((*lead, units * layout.elements), codes.dtype)
    full[..., :n] = line
    data = layout.pack(q=full.reshape(*lead, units, layout.elements)).reshape(*lead, units * layout.nbytes)
    words = data.view(f"<{word}")[..., : word_count(n, layout, word)].astype(word)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def unpack_axis(words: np.ndarray, layout: Layout, axis: int, n: int) -> np.ndarray:
    """Inverse of `pack_axis` for n codes along the axis; bits that no code fills are ignored. Any byte order."""
    line = np.moveaxis(words, axis, -1)
    width = word_count(n, layout, words.dtype.str[1:])
    if line.shape[-1] != width:
        raise ValueError(f"{n} codes take {width} words along axis {axis}, got shape {words.shape}")
    units = -(-n // layout.elements)
    full = np.zeros((*line.shape[:-1], units * layout.nbytes // words.dtype.itemsize), f"<{words.dtype.str[1:]}")
    full[..., :width] = line
    data = full.view(np.uint8).reshape(*line.shape[:-1], units, layout.nbytes)
    codes = layout.unpack(data)["q"].reshape(*line.shape[:-1], units * layout.elements)[..., :n]
    return np.ascontiguousarray(np.moveaxis(codes, -1, axis))


def dequantize(grouped: Grouped, bits: int, group_size: int | None = None) -> np.ndarray:
    """w[o, i] = scale[o, g] (codes[o, i] - zero_point[o, g]) in float32, g the group of column i.

    Parameters
    ----------
    grouped : Grouped
    bits : int
        Says the zero point where none is stored: 2^(bits-1).
    group_size : int, optional
        Needed only where neither g_idx nor the number of groups tells it: the last group may be shorter.

    Returns
    -------
    (out, in) float32
        Exact for float16 scales; rounded once for float32 ones.
    """
    codes, scale, zero, g_idx = grouped
    columns, groups = codes.shape[1], scale.shape[1]
    if g_idx is None and group_size is not None:
        g_idx = np.arange(columns) // group_size
    index = group_index(columns, groups) if g_idx is None else g_idx
    middle = np.float32(1 << (bits - 1))
    difference = codes.astype(np.float32) - (middle if zero is None else zero.astype(np.float32)[:, index])
    with np.errstate(over="ignore", invalid="ignore"):
        return scale.astype(np.float32)[:, index] * difference


def group_index(columns: int, groups: int) -> np.ndarray:
    """The group of each column when all groups are equally long: (columns,) int32.

    Raises
    ------
    ValueError
        The groups do not divide the columns.
    """
    if groups < 1 or columns < 1 or columns % groups:
        raise ValueError(f"{groups} groups do not divide {columns} columns; give g_idx, the group of each column")
    return (np.arange(columns) // (columns // groups)).astype(np.int32)


def times_power_of_two(values: np.ndarray, scale: np.ndarray, nan_scale: bool = True) -> np.ndarray:
    """values 2^(scale - 127) in float32 for E8M0 codes; the code 255 is NaN (OCP), or 2^128 if not `nan_scale`."""
    with np.errstate(over="ignore"):
        product = np.ldexp(values, scale.astype(np.int32) - 127)
    if nan_scale:
        product[scale == 255] = np.nan
    return product


def check_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of `bits` bits as uint8.

    Raises
    ------
    ValueError
        Not a matrix of integers, or one does not fit.
    """
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" or codes.ndim != 2:
        raise ValueError(f"codes must be (out, in) integers, got {codes.dtype} of shape {codes.shape}")
    return _fits("codes", codes, bits)


def check_groups(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, bits: int):
    """Scales and zero points that fit the rows of codes: (scale, zero point as uint8 or None).

    Raises
    ------
    ValueError
        Another shape or dtype, a scale that is not finite, a zero point that is no code.
    """
    scale = np.asarray(scale)
    if scale.dtype.kind != "f" or scale.ndim != 2 or len(scale) != len(codes):
        expected = f"scale must be (out, groups) floats for {len(codes)} rows"
        raise ValueError(f"{expected}, got {scale.dtype} of shape {scale.shape}")
    if not np.isfinite(scale).all():
        raise ValueError("scale holds NaN or infinity")
    if zero_point is None:
        return scale, None
    zero_point = np.asarray(zero_point)
    if zero_point.dtype.kind not in "iu" or zero_point.shape != scale.shape:
        expected = f"zero_point must be integers of the shape of scale, {scale.shape}"
        raise ValueError(f"{expected}, got {zero_point.dtype} of shape {zero_point.shape}")
    return scale, _fits("zero_point", zero_point, bits)


def as_scale(scale: np.ndarray, dtype: str) -> np.ndarray:
    """Scales rounded to a dtype, to nearest, ties to even.

    Raises
    ------
    ValueError
        One overflows.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.ascontiguousarray(scale, dtype)
    if not np.isfinite(rounded).all():
        raise ValueError(f"a scale of {float(np.abs(scale).max()):.6g} overflows {dtype}")
    return rounded


def check_g_idx(g_idx: np.ndarray, columns: int, groups: int) -> np.ndarray:
    """The group of each column, (in,) int32.

    Raises
    ------
    ValueError
        Another shape, or a group that has no scale.
    """
    g_idx = np.asarray(g_idx)
    if g_idx.dtype.kind not in "iu" or g_idx.shape != (columns,):
        raise ValueError(f"g_idx must be ({columns},) integers, got {g_idx.dtype} of shape {g_idx.shape}")
    if g_idx.size and (g_idx.min() < 0 or g_idx.max() >= groups):
        raise ValueError(f"g_idx names groups {g_idx.min()}..{g_idx.max()}, there are {groups}")
    return g_idx.astype(np.int32)


def stored(tensors: dict[str, np.ndarray], name: str, dtypes: tuple[str, ...], ndim: int) -> np.ndarray:
    """A tensor of a checkpoint, in native byte order, if it is of one of these dtypes and has that many axes.

    Raises
    ------
    ValueError
        It is missing, or of another kind.
    """
    if name not in tensors:
        raise ValueError(f"{name} is missing; there are {', '.join(sorted(tensors)) or 'no tensors'}")
    array = np.asarray(tensors[name])
    if array.dtype.newbyteorder("=").name not in dtypes or array.ndim != ndim:
        expected = f"{name} must be {' or '.join(dtypes)} with {ndim} axes"
        raise ValueError(f"{expected}, got {array.dtype} of shape {array.shape}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def check_multiple(name: str, n: int, unit: int, why: str) -> None:
    """Raise ValueError unless n is a multiple of `unit`."""
    if n % unit:
        raise ValueError(f"{name} must be a multiple of {unit} ({why}), got {n}")


def _fits(name: str, numbers: np.ndarray, bits: int) -> np.ndarray:
    if numbers.size and (numbers.min() < 0 or numbers.max() >= 1 << bits):
        came = f"{numbers.min()}..{numbers.max()}"
        raise ValueError(f"{name} must lie in 0..{(1 << bits) - 1} for {bits} bits, got {came}")
    return numbers.astype(np.uint8)
