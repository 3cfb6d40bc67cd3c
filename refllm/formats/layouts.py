"""Packed layouts: one description says where every bit lies, and the rest follows from it.

A layout describes a *unit*: a few bytes that hold a fixed number of elements. A unit has fields (codes, scales,
minima), a field has `count` numbers, and a number is cut into parts, each of which lies within one byte:

    Q4_0, 18 bytes, 32 elements
        d   f16       bytes 0 and 1
        q   4 bits    byte 2 + i % 16, shift i // 16 * 4          (i = 0 .. 31)

Formulas are Python expressions of `i`, the number's index in its field. From them come `pack` and `unpack`, the bits
per element, the check that no bit is used twice, and the pages and pictures of docs/formats.

How units lie in a tensor (one after another along which axis, in which order) is said by those who use a layout:
blocks (GGUF rows) and checkpoints (tensors of a Hugging Face folder).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_DTYPES = {name: np.dtype(name) for name in ("u1", "u2", "u4", "i1", "i2", "f2", "f4")}


@dataclass(frozen=True)
class Bits:
    """Some bits of number i of a field.

    Parameters
    ----------
    width : int
        How many bits, 1..8.
    byte : str
        Formula: the byte of the unit they lie in.
    shift : str
        Formula: the bit of that byte where they start; 0 is the lowest.
    low : int
        The bit of the number where they start.
    """

    width: int
    byte: str
    shift: str = "0"
    low: int = 0


@dataclass(frozen=True)
class Digits:
    """Number i of a field is one of five base-3 digits of a byte.

    The byte is ceil(v 256 / 243) with v = sum of digit[p] 3^(4-p), so that digit p is the integer part of 3 times the
    fraction that the byte, times 3^p, leaves behind 256: ((byte 3^p mod 256) 3) >> 8. Source: ggml's TQ1_0.

    Parameters
    ----------
    byte, place : str
        Formulas: the byte, and which of its digits (0 is the most significant).
    """

    byte: str
    place: str


@dataclass(frozen=True)
class Field:
    """Numbers of one kind within a unit.

    Parameters
    ----------
    name : str
    count : int
    dtype : str
        What `unpack` gives: u1, u2, u4 (unsigned bytes wide), i1, i2 (two's complement), f2, f4 (IEEE floats).
    parts : tuple of Bits, or Digits
    text : str
        What the numbers mean.
    """

    name: str
    count: int
    dtype: str
    parts: tuple[Bits, ...] | Digits
    text: str = ""

    @property
    def bits(self) -> int:
        """Bits of one number; 2 for a base-3 digit, which takes 8/5 of a bit."""
        return 2 if isinstance(self.parts, Digits) else sum(part.width for part in self.parts)

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest number of a field of integers."""
        if isinstance(self.parts, Digits):
            return 0, 2
        signed = self.dtype[0] == "i"
        return (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1) if signed else (0, (1 << self.bits) - 1)


def codes(name: str, count: int, width: int, byte: str, shift: str = "0", text: str = "", dtype: str = "u1") -> Field:
    """A field whose numbers lie in one piece: `width` bits of byte `byte` from bit `shift` on (formulas of i)."""
    return Field(name, count, dtype, (Bits(width, byte, shift),), text)


def numbers(name: str, dtype: str, at: int, count: int = 1, text: str = "") -> Field:
    """A field of whole little-endian numbers, one after another from byte `at` on."""
    size = _DTYPES[dtype].itemsize
    parts = tuple(Bits(8, f"{at + k} + {size} * i" if count > 1 else str(at + k), low=8 * k) for k in range(size))
    return Field(name, count, dtype, parts, text)


def stream(name: str, count: int, width: int, at: int = 0, text: str = "") -> Field:
    """A field of `width`-bit codes that follow each other without gaps, low bits first: a little-endian bit stream.

    A code that crosses into the next byte needs a second part whose width depends on i; it is described bit by bit.
    """
    start = f"{at} + " if at else ""
    if 8 % width == 0:
        return codes(name, count, width, f"{start}{width} * i // 8", f"{width} * i % 8", text)
    bit = [f"({width} * i + {k})" for k in range(width)]
    parts = tuple(Bits(1, f"{start}{bit[k]} // 8", f"{bit[k]} % 8", low=k) for k in range(width))
    return Field(name, count, "u1", parts, text)


@dataclass(frozen=True)
class Layout:
    """The bytes of one unit.

    Parameters
    ----------
    name : str
    nbytes : int
        Bytes of a unit.
    elements : int
        Weights a unit stands for.
    fields : tuple of Field

    Raises
    ------
    ValueError
        A part lies outside the unit, or a bit is used twice.

    Examples
    --------
    >>> pairs = Layout("pairs", 1, 2, (codes("q", 2, 4, "0", "4 * i"),))
    >>> pairs.pack(q=np.array([[1, 2]], np.uint8)).tolist(), pairs.bits_per_element
    ([[33]], 4.0)
    >>> pairs.unpack(np.array([[0xF0]], np.uint8))["q"].tolist()
    [[0, 15]]
    """

    name: str
    nbytes: int
    elements: int
    fields: tuple[Field, ...]

    def __post_init__(self):
        owner = np.zeros(8 * self.nbytes, np.int64)
        for field in self.fields:
            if isinstance(field.parts, Digits):  # the digits of a byte share all of its bits
                positions = np.unique(_formula(field.parts.byte, field.count))[:, None] * 8 + np.arange(8)
            else:
                positions = self.positions(field.name)
            if positions.min() < 0 or positions.max() >= len(owner):
                raise ValueError(f"{self.name}.{field.name}: bits lie outside the {self.nbytes} bytes of the unit")
            np.add.at(owner, positions.reshape(-1), 1)
        if owner.max(initial=0) > 1:
            raise ValueError(f"{self.name}: bit {int(owner.argmax())} is used {owner.max()} times")

    @property
    def bits_per_element(self) -> float:
        """Bits stored for one element: all bytes of the unit count."""
        return 8 * self.nbytes / self.elements

    def field(self, name: str) -> Field:
        """The field of this name."""
        return next(field for field in self.fields if field.name == name)

    def positions(self, name: str) -> np.ndarray:
        """Bit k of number i lies at bit positions[i, k] % 8 of byte positions[i, k] // 8: (count, bits) int."""
        field = self.field(name)
        place = np.empty((field.count, field.bits), np.int64)
        for part in field.parts:
            first = 8 * _formula(part.byte, field.count) + _formula(part.shift, field.count)
            place[:, part.low : part.low + part.width] = first[:, None] + np.arange(part.width)
        return place

    def digit_places(self, name: str) -> list[tuple[int, int]]:
        """(byte, place) of every number of a field of Digits."""
        field = self.field(name)
        byte, place = _formula(field.parts.byte, field.count), _formula(field.parts.place, field.count)
        return list(zip(byte.tolist(), place.tolist(), strict=True))

    def unpack(self, units: np.ndarray, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Units of bytes -> fields.

        Parameters
        ----------
        units : (..., nbytes) uint8
        names : tuple of str, optional
            Only these fields.

        Returns
        -------
        dict of name to (..., count) array of the field's dtype. Any bytes give something.

        Raises
        ------
        ValueError
            Another dtype, or another number of bytes.
        """
        units = np.asarray(units)
        if units.dtype != np.uint8 or units.ndim == 0 or units.shape[-1] != self.nbytes:
            raise ValueError(
                f"{self.name} has units of {self.nbytes} bytes (uint8), got {units.dtype} of shape {units.shape}"
            )
        flat = units.reshape(-1, self.nbytes)
        wanted = self.fields if names is None else [self.field(name) for name in names]
        return {f.name: self._unpack_field(f, flat).reshape(*units.shape[:-1], f.count) for f in wanted}

    def pack(self, **fields: np.ndarray) -> np.ndarray:
        """Fields -> units; bits that belong to no field are 0.

        Parameters
        ----------
        **fields : (..., count) arrays
            One for every field, of its dtype or of any integer type.

        Returns
        -------
        (..., nbytes) uint8

        Raises
        ------
        ValueError
            A field is missing, unknown or of a wrong shape, or a number needs more bits than it has.
        """
        if set(fields) != {field.name for field in self.fields}:
            raise ValueError(f"{self.name} has the fields {', '.join(f.name for f in self.fields)}, got {list(fields)}")
        given = {name: np.asarray(value) for name, value in fields.items()}
        lead = {value.shape[:-1] for value in given.values()}
        wrong = [f for f in self.fields if given[f.name].ndim == 0 or given[f.name].shape[-1] != f.count]
        if len(lead) != 1 or wrong:
            shapes = {name: value.shape for name, value in given.items()}
            counts = {f.name: f.count for f in self.fields}
            raise ValueError(f"{self.name} needs fields whose last axes are {counts}, got shapes {shapes}")
        (lead,) = lead
        out = np.zeros((int(np.prod(lead, dtype=np.int64)), self.nbytes), np.uint8)
        for field in self.fields:
            self._pack_field(field, given[field.name].reshape(-1, field.count), out)
        return out.reshape(*lead, self.nbytes)

    @cached_property
    def _places(self) -> dict[str, list[tuple[Bits, np.ndarray, np.ndarray]]]:
        """For every field of Bits: each part with its bytes and its shifts, evaluated."""
        return {
            field.name: [
                (part, _formula(part.byte, field.count), _formula(part.shift, field.count).astype(np.uint8))
                for part in field.parts
            ]
            for field in self.fields
            if not isinstance(field.parts, Digits)
        }

    def _unpack_field(self, field: Field, flat: np.ndarray) -> np.ndarray:
        if isinstance(field.parts, Digits):
            byte = flat[:, _formula(field.parts.byte, field.count)]
            power = 3 ** _formula(field.parts.place, field.count)
            return ((byte * power.astype(np.uint8)).astype(np.uint16) * 3 >> 8).astype(np.uint8)
        dtype = _DTYPES[field.dtype]
        word = np.dtype(f"u{dtype.itemsize}")
        number = np.zeros((len(flat), field.count), word)
        for part, byte, shift in self._places[field.name]:
            piece = flat.take(byte, axis=1, mode="clip")  # row by row in memory, unlike flat[:, byte]
            piece >>= shift
            piece &= np.uint8((1 << part.width) - 1)
            number |= piece.astype(word, copy=False) << word.type(part.low)
        if dtype.kind == "i" and field.bits < 8 * dtype.itemsize:
            sign = word.type(1 << (field.bits - 1))
            number = (number ^ sign) - sign
        return number.view(dtype)

    def _pack_field(self, field: Field, values: np.ndarray, out: np.ndarray) -> None:
        dtype = _DTYPES[field.dtype]
        if dtype.kind == "f":
            number = np.ascontiguousarray(values, dtype).view(f"u{dtype.itemsize}")
        else:
            self._check_range(field, values)
            number = values.astype(dtype).view(f"u{dtype.itemsize}")
        if isinstance(field.parts, Digits):
            _pack_digits(number, field, out)
            return
        for part, byte, shift in self._places[field.name]:
            piece = (number >> number.dtype.type(part.low)).astype(np.uint8) & np.uint8((1 << part.width) - 1)
            for s in np.unique(shift):  # numbers with one shift lie in different bytes
                these = shift == s
                out[:, byte[these]] |= piece[:, these] << s

    def _check_range(self, field: Field, values: np.ndarray) -> None:
        if values.dtype.kind not in "iu":
            raise ValueError(f"{self.name}.{field.name} takes integers, got {values.dtype}")
        low, high = field.limits
        if values.size and (values.min() < low or values.max() > high):
            came = f"{values.min()}..{values.max()}"
            raise ValueError(f"{self.name}.{field.name} holds numbers {low}..{high}, got {came}")


def _formula(text: str, count: int) -> np.ndarray:
    """The values of a formula for i = 0 .. count - 1."""
    value = eval(text, {"__builtins__": {}}, {"i": np.arange(count)})  # a constant of refllm's own source
    return np.broadcast_to(np.asarray(value, np.int64), (count,))


def _pack_digits(digits: np.ndarray, field: Field, out: np.ndarray) -> None:
    """Base-3 digits to bytes; a byte with fewer than five digits has zeros in the last places."""
    byte, place = _formula(field.parts.byte, field.count), _formula(field.parts.place, field.count)
    value = np.zeros((len(digits), out.shape[1]), np.uint32)
    for p in range(5):
        these = place == p
        value[:, byte[these]] += digits[:, these].astype(np.uint32) * 3 ** (4 - p)
    used = np.unique(byte)
    out[:, used] = (value[:, used] * 256 + 242) // 243
