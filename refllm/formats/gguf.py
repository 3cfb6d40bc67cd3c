"""GGUF: a strict reader (versions 2 and 3) and a deterministic writer (version 3).

Layout, little-endian: "GGUF", version u32, tensor count u64, key count u64; the keys (name, type u32, value); for each
tensor its name, its dimensions with the fastest one first, type and offset; padding to `general.alignment`; the data.
Strings are a u64 length and UTF-8 bytes, arrays an element type u32 and a u64 count.

Nothing a file says is believed: counts and lengths are compared with the bytes that are left before any loop or
allocation, sizes are Python integers, and the tensors must fill the data section one after the other. Split files and
arrays of arrays are refused. Source: the GGUF specification in ggml's docs/gguf.md.
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from refllm.formats.blocks import BLOCKS
from refllm.formats.dtypes import BF16
from refllm.formats.errors import FormatError
from refllm.formats.files import atomic_write, forget_pages

# Tensor types: id -> (name, numbers in a block, bytes of a block).
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip
_TYPE_IDS = {name: type_id for type_id, (name, _, _) in TENSOR_TYPES.items()}
# Value types: id -> (name, struct code).
_SCALARS = {
    0: ("UINT8", "B"), 1: ("INT8", "b"), 2: ("UINT16", "H"), 3: ("INT16", "h"), 4: ("UINT32", "I"), 5: ("INT32", "i"),
    6: ("FLOAT32", "f"), 7: ("BOOL", "?"), 10: ("UINT64", "Q"), 11: ("INT64", "q"), 12: ("FLOAT64", "d"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SMALLEST_KEY, _SMALLEST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # bytes of the shortest entry of each kind


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file, not read yet.

    name, type_name ("Q4_1"), shape (NumPy order: rows first), offset (absolute, bytes), nbytes, path.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path
    _bytes: np.ndarray = field(repr=False, compare=False)

    def mapped(self) -> np.ndarray:
        """What is stored as uint8 (..., bytes of a row): the file itself, read-only, brought into memory when read."""
        return self._bytes[self.offset : self.offset + self.nbytes].reshape(*self.shape[:-1], -1)

    def stored(self) -> np.ndarray:
        """A fresh uint8 array (..., bytes of a row) of exactly what is stored."""
        return np.array(self.mapped())

    def floats(self) -> np.ndarray:
        """The values: float32, or float64 for F64. Raises FormatError for types without a decoder."""
        raw = self.stored()
        if self.type_name in BLOCKS:
            return BLOCKS[self.type_name].decode(raw)
        if self.type_name == "BF16":
            return BF16.decode(raw.view("<u2").astype(np.uint16, copy=False))
        if self.type_name not in ("F32", "F16", "F64"):
            message = f"tensor {self.name!r} has type {self.type_name}, which is not decoded"
            raise FormatError(message, path=self.path, offset=self.offset)
        array = raw.view(f"<f{self.nbytes // math.prod(self.shape)}")
        return array.astype(np.float64 if self.type_name == "F64" else np.float32, copy=False)


@dataclass(frozen=True)
class GGUFFile:
    """What a file holds: version, alignment, `metadata` as Python values (arrays of numbers as NumPy arrays, of strings
    as lists), `types` of the metadata by name, unread tensors."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, object]
    types: dict[str, str]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: str | os.PathLike) -> GGUFFile:
    """Validate a .gguf file and map it.

    Raises
    ------
    FormatError
        Naming the byte offset, for anything that is not exactly the format.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < 24:
        raise FormatError(f"a GGUF file has at least 24 bytes, this one has {size}", path=path, offset=size)
    with open(path, "rb") as file:
        read = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
    version = _version(read)
    tensor_count, key_count = read.number("Q"), read.number("Q")
    read.check_count(key_count, _SMALLEST_KEY, "keys")
    metadata: dict[str, object] = {}
    types: dict[str, str] = {}
    for _ in range(key_count):
        at = read.at
        key = read.string("key", limit=65535)
        if key in metadata:
            raise read.fail(f"key {key!r} stands twice", at)
        metadata[key], types[key] = _value(read, key)
    alignment = _alignment(read, metadata, types)
    read.check_count(tensor_count, _SMALLEST_TENSOR, "tensors")
    entries = [_entry(read) for _ in range(tensor_count)]
    return GGUFFile(path, version, alignment, metadata, types, _place(read, entries, alignment))


class _Cursor:
    """A position in a mapped file; every read is checked against what is left."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.size, self.at = data, path, len(data), 0

    def fail(self, message: str, at: int | None = None) -> FormatError:
        """The error to raise, with the byte offset `at` (where reading stands, unless given)."""
        return FormatError(message, path=self.path, offset=self.at if at is None else at)

    def number(self, code: str):
        """One little-endian number of a struct code."""
        width = struct.calcsize("<" + code)
        if width > self.size - self.at:
            raise self.fail("the file ends inside its header")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += width
        return value

    def check_count(self, count: int, smallest: int, what: str) -> None:
        """A count must fit into the bytes that are left, before anything loops over it."""
        if count > (self.size - self.at) // smallest:
            raise self.fail(f"{count} {what} do not fit into the {self.size - self.at} bytes that are left")

    def string(self, what: str, limit: int) -> str:
        """A name: non-empty, printable, at most `limit` bytes."""
        at = self.at
        text = self.strings(1, what)[0]
        if not text or not text.isprintable() or self.at - at - 8 > limit:
            raise self.fail(f"a {what} must be 1 to {limit} printable bytes, got {text!r:.80}", at)
        return text

    def strings(self, count: int, what: str) -> list[str]:
        """Strings one after the other; this loop sees the 100,000 entries of a vocabulary."""
        self.check_count(count, 8, what + " strings")
        data, size, at, result = self.data, self.size, self.at, []
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if size - at < 8:
                raise self.fail(f"the file ends inside {what}", at)
            end = at + 8 + length_at(data, at)[0]
            if end > size:
                raise self.fail(f"a string of {end - at - 8} bytes in {what} runs past the end of the file", at)
            try:
                result.append(data[at + 8 : end].decode())
            except UnicodeDecodeError as error:
                raise self.fail(f"{what} is not UTF-8: {error.reason}", at + 8 + error.start) from None
            at = end
        self.at = at
        return result


def _version(read: _Cursor) -> int:
    magic = read.data[:4]
    if magic != b"GGUF":
        raise read.fail(f"a GGUF file begins with b'GGUF', got {magic!r}", 0)
    read.at = 4
    version = read.number("I")
    if version in (2, 3):
        return version
    hint = "; big-endian files are not supported" if version >= 1 << 16 else ""
    raise read.fail(f"GGUF version must be 2 or 3, got {version}{hint}", 4)


def _value(read: _Cursor, key: str) -> tuple[object, str]:
    """A metadata value and the name of its type."""
    at = read.at
    kind = read.number("I")
    if kind == _STRING:
        return read.strings(1, key)[0], "STRING"
    if kind in _SCALARS:
        name, code = _SCALARS[kind]
        value = read.number("B" if kind == _BOOL else code)
        if kind != _BOOL:
            return value, name
        if value > 1:
            raise read.fail(f"BOOL {key!r} must be 0 or 1, got {value}", read.at - 1)
        return bool(value), name
    if kind != _ARRAY:
        raise read.fail(f"key {key!r} has unknown value type {kind}", at)
    at = read.at
    kind, count = read.number("I"), read.number("Q")
    if kind == _STRING:
        return read.strings(count, key), "ARRAY of STRING"
    if kind not in _SCALARS:
        raise read.fail(f"array {key!r} has element type {kind}; numbers, BOOL or STRING were expected", at)
    name, code = _SCALARS[kind]
    dtype = np.dtype("<" + code)
    read.check_count(count, dtype.itemsize, f"elements of {key!r}")
    raw = read.data[read.at : read.at + count * dtype.itemsize]
    if kind == _BOOL and raw.strip(b"\0\1"):
        raise read.fail(f"BOOL array {key!r} holds a byte other than 0 and 1")
    read.at += len(raw)
    return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=False), f"ARRAY of {name}"


def _alignment(read: _Cursor, metadata: dict, types: dict) -> int:
    value = metadata.get("general.alignment", 32)
    if types.get("general.alignment", "UINT32") != "UINT32" or value < 8 or value & (value - 1):
        raise read.fail(f"general.alignment must be a UINT32 power of two and at least 8, got {value!r:.80}")
    split = metadata.get("split.count", 0)
    if not isinstance(split, int) or split > 1:
        raise read.fail(f"this is one of {split!r:.80} parts of a split model; merge the parts first")
    return value


def _entry(read: _Cursor) -> tuple[str, str, tuple[int, ...], int, int, int]:
    """(name, type, shape, offset in the data, bytes, where in the header) of one tensor."""
    at = read.at
    name = read.string("tensor name", limit=64)
    dims = read.number("I")
    if not 1 <= dims <= 4:
        raise read.fail(f"tensor {name!r} has {dims} dimensions; 1 to 4 were expected", read.at - 4)
    shape = tuple(read.number("Q") for _ in range(dims))[::-1]
    if 0 in shape:
        raise read.fail(f"tensor {name!r} has a dimension of 0", at)
    type_id = read.number("I")
    if type_id not in TENSOR_TYPES:
        raise read.fail(f"tensor {name!r} has unknown type {type_id}", read.at - 4)
    type_name, block, block_bytes = TENSOR_TYPES[type_id]
    if shape[-1] % block:
        raise read.fail(
            f"tensor {name!r}: rows of {shape[-1]} are not a multiple of {type_name}'s block of {block}", at
        )
    return name, type_name, shape, read.number("Q"), math.prod(shape) // block * block_bytes, at


def _place(read: _Cursor, entries: list, alignment: int) -> dict[str, GGUFTensor]:
    """Check that the tensors fill the data section, each starting at the next aligned byte after the one before."""
    start = -(-read.at // alignment) * alignment if entries else read.at
    mapped = np.frombuffer(read.data, np.uint8)
    forget_pages(mapped[: read.at])  # all of the head is in Python's objects now
    result: dict[str, GGUFTensor] = {}
    end = start
    for name, type_name, shape, offset, nbytes, at in sorted(entries, key=lambda entry: entry[3]):
        expected = -(-end // alignment) * alignment
        if name in result:
            raise read.fail(f"tensor {name!r} stands twice", at)
        if start + offset != expected:
            word = (
                "overlaps the one before"
                if start + offset < end
                else f"is not at {expected - start}, the next free place"
            )
            raise read.fail(f"tensor {name!r} at offset {offset} {word}", at)
        end = expected + nbytes
        if end > read.size:
            raise read.fail(f"tensor {name!r} ends at byte {end}, the file has {read.size}", at)
        result[name] = GGUFTensor(name, type_name, shape, start + offset, nbytes, read.path, mapped)
    if read.size > -(-end // alignment) * alignment:
        raise read.fail(f"{read.size - end} bytes follow the last tensor", end)
    return {entry[0]: result[entry[0]] for entry in entries}


def write_gguf(
    path: str | os.PathLike, metadata: Mapping[str, object], tensors: Mapping[str, tuple[str, np.ndarray]]
) -> None:
    """Write a GGUF version 3 file with alignment 32; the same input always gives the same bytes.

    Parameters
    ----------
    path : path
        Written under a temporary name and renamed.
    metadata : mapping
        bool, str, int (UINT32 where it fits), float (FLOAT32), lists of str, NumPy scalars and arrays (their own type).
    tensors : mapping of name -> (type name, array)
        ("F32", float32), ("F16", float16), ("BF16", uint16 codes), or a block format with uint8 (..., bytes of a row).

    Raises
    ------
    ValueError
        An array that does not fit its type, a name that is too long, a value that GGUF cannot hold.
    """
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_packed_string(key), _packed_value(key, value)]
    offset, arrays = 0, []
    for name, (type_name, array) in tensors.items():
        shape, array = _stored_form(name, type_name, array)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += [_packed_string(name), dims, struct.pack("<IQ", _TYPE_IDS[type_name], offset)]
        arrays.append(array)
        offset += -(-array.nbytes // 32) * 32
    head = b"".join(header)
    with atomic_write(path) as file:
        file.write(head + b"\0" * (-len(head) % 32 if arrays else 0))
        for array in arrays:
            file.write(array.data)
            file.write(b"\0" * (-array.nbytes % 32))


def _stored_form(name: str, type_name: str, array: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape in numbers and the array to write."""
    if not 0 < len(name.encode()) <= 64 or not name.isprintable():
        raise ValueError(f"a tensor name must be 1 to 64 printable bytes, got {name!r}")
    if type_name not in _TYPE_IDS:
        raise ValueError(f"tensor {name!r}: unknown GGUF type {type_name!r}; known: {', '.join(_TYPE_IDS)}")
    _, block, block_bytes = TENSOR_TYPES[_TYPE_IDS[type_name]]
    dtypes = {
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",
        "F64": "<f8",
        "I8": "i1",
        "I16": "<i2",
        "I32": "<i4",
        "I64": "<i8",
    }
    dtype = np.dtype(dtypes.get(type_name, "u1"))
    if array.dtype.newbyteorder("<") != dtype or array.size == 0 or not 1 <= array.ndim <= 4:
        raise ValueError(
            f"tensor {name!r}: {type_name} takes 1 to 4 axes of {dtype}, got {array.dtype} of {array.shape}"
        )
    shape = array.shape
    if block > 1:
        if shape[-1] % block_bytes:
            raise ValueError(f"tensor {name!r}: rows of {shape[-1]} bytes are not a multiple of {block_bytes}")
        shape = (*shape[:-1], shape[-1] // block_bytes * block)
    return shape, np.ascontiguousarray(array.astype(dtype, copy=False))


def _packed_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_value(key: str, value: object) -> bytes:
    """Type and value of one key."""
    ids = {np.dtype("<" + code): type_id for type_id, (_, code) in _SCALARS.items()}
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _packed_string(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_packed_string, value))
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        small, large = (np.uint32, np.uint64) if value >= 0 else (np.int32, np.int64)
        value = small(value) if np.iinfo(small).min <= value <= np.iinfo(small).max else large(value)
    elif isinstance(value, float) and not isinstance(value, np.generic):
        value = np.float32(value)
    if isinstance(value, np.generic | np.ndarray) and value.dtype.newbyteorder("<") in ids and value.ndim <= 1:
        type_id = ids[value.dtype.newbyteorder("<")]
        head = struct.pack("<IIQ", _ARRAY, type_id, value.size) if value.ndim else struct.pack("<I", type_id)
        return head + value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    raise ValueError(f"GGUF key {key!r} cannot hold {type(value).__name__} {value!r:.80}")
