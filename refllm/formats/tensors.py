"""safetensors: a strict reader and a deterministic writer.

Layout: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}} padded
with spaces, then the data, every byte of which belongs to exactly one tensor. The reader trusts nothing: all sizes are
Python integers (no wrap-around) and are checked against the file before anything is allocated. Stricter than the
format's own library: duplicate names, extra keys, leading spaces, empty names and control characters are refused too,
and a header is at most 8 MB (about 80,000 tensors). Data are memory-mapped and copied only when a tensor is asked for.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from refllm.formats.dtypes import BF16
from refllm.formats.errors import FormatError
from refllm.formats.files import atomic_write, parse_json, read_json

HEADER_LIMIT = 8 << 20
# Logical dtype -> (bits, NumPy dtype of the stored codes).
DTYPES = {
    "BOOL": (8, "u1"), "U8": (8, "u1"), "I8": (8, "i1"), "I16": (16, "<i2"), "U16": (16, "<u2"),
    "I32": (32, "<i4"), "U32": (32, "<u4"), "I64": (64, "<i8"), "U64": (64, "<u8"),
    "F16": (16, "<f2"), "BF16": (16, "<u2"), "F32": (32, "<f4"), "F64": (64, "<f8"), "C64": (64, "<c8"),
    "F8_E4M3": (8, "u1"), "F8_E5M2": (8, "u1"), "F8_E8M0": (8, "u1"),
    "F8_E4M3FNUZ": (8, "u1"), "F8_E5M2FNUZ": (8, "u1"), "F6_E2M3": (6, "u1"), "F6_E3M2": (6, "u1"), "F4": (4, "u1"),
}  # fmt: skip
_NUMPY_NAMES = ("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "F32", "F64", "C64")
_WRITTEN = {np.dtype(DTYPES[name][1]): name for name in _NUMPY_NAMES} | {np.dtype(bool): "BOOL"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet.

    name, dtype (as the file spells it, e.g. "BF16"), shape, offset (absolute, bytes), nbytes, path.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path
    _bytes: np.ndarray = field(repr=False, compare=False)

    def stored(self) -> np.ndarray:
        """A fresh array of exactly what is stored: BF16 as uint16 codes, 8-bit floats as uint8 codes.

        The 4- and 6-bit floats come as one flat uint8 array of their packed bytes.
        """
        bits, code = DTYPES[self.dtype]
        # The copy also aligns: offsets in the file need not be multiples of the item size.
        raw = np.array(self._bytes[self.offset : self.offset + self.nbytes])
        if bits < 8:
            return raw
        array = raw.view(np.dtype(code)).reshape(self.shape)
        if self.dtype != "BOOL":
            return array.astype(array.dtype.newbyteorder("="), copy=False)
        if (raw > 1).any():
            at = self.offset + int(np.argmax(raw > 1))
            raise FormatError(f"BOOL tensor {self.name!r} holds a byte other than 0 and 1", path=self.path, offset=at)
        return array.view(bool)

    def floats(self) -> np.ndarray:
        """The values: float32 for F32, F16 and BF16 (exact), float64 for F64. Raises FormatError for other types."""
        if self.dtype not in ("F64", "F32", "F16", "BF16"):
            message = f"tensor {self.name!r} is {self.dtype}; F64, F32, F16 or BF16 was expected"
            raise FormatError(message, path=self.path, offset=self.offset)
        array = self.stored()
        if self.dtype == "BF16":
            return BF16.decode(array)
        return array.astype(np.float32) if self.dtype == "F16" else array


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Validate a .safetensors file and map it.

    Returns
    -------
    tensors : dict of name -> StoredTensor, in the order of their data
    metadata : dict of str -> str

    Raises
    ------
    FormatError
        Naming the byte offset, for anything that is not exactly the format.
    """
    path = Path(path)
    refuse_pickle(path)
    size = path.stat().st_size
    if size < 8:
        raise FormatError(f"a safetensors file has at least 8 bytes, this one has {size}", path=path, offset=size)
    data = np.memmap(path, np.uint8, mode="r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > size - 8:
        raise FormatError(f"header length {length} is longer than the file ({size} bytes)", path=path, offset=0)
    if not 2 <= length <= HEADER_LIMIT:
        raise FormatError(f"header length must be 2 to {HEADER_LIMIT} bytes, got {length}", path=path, offset=0)
    header = data[8 : 8 + length].tobytes()
    if header[:1] != b"{":
        raise FormatError(f"the header must begin with '{{', got {header[:1]!r}", path=path, offset=8)
    if not header.rstrip(b" ").endswith(b"}"):
        raise FormatError("the header must end with '}' and spaces", path=path, offset=8 + len(header.rstrip(b" ")))
    table = parse_json(header, path=path, base=8, integers_only=True)
    metadata = _metadata(table.pop("__metadata__", {}), header, path)
    tensors = [_entry(name, entry, header, data, path) for name, entry in table.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_ranges(tensors, 8 + length, size, path)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _where(name: str, header: bytes) -> int:
    """Offset of a name in the file's header, for error messages."""
    return 8 + max(header.find(json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass")), 0)


def _metadata(entry: object, header: bytes, path: Path) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise FormatError("__metadata__ must map strings to strings", path=path, offset=_where("__metadata__", header))
    return entry


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entry(name: str, entry: object, header: bytes, data: np.ndarray, path: Path) -> StoredTensor:
    """Check one line of the header by itself."""

    def fail(message):
        return FormatError(f"tensor {name!r}: {message}", path=path, offset=_where(name, header))

    if not name or not name.isprintable():
        raise fail("a name must be non-empty and printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("exactly dtype, shape and data_offsets are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_size, shape)):
        raise fail("shape must be a list of at most 32 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise fail("data_offsets must be two sizes")
    begin, end = offsets
    start = 8 + len(header)
    bits = math.prod(shape) * DTYPES[dtype][0]
    if bits % 8:
        raise fail(f"{math.prod(shape)} values of {dtype} do not fill whole bytes")
    if begin > end or end > len(data) - start:
        raise fail(f"data_offsets {begin}, {end} are reversed or outside the {len(data) - start} bytes of data")
    if end - begin != bits // 8:
        raise fail(f"shape {tuple(shape)} of {dtype} needs {bits // 8} bytes, data_offsets give {end - begin}")
    return StoredTensor(name, dtype, tuple(shape), start + begin, end - begin, path, data)


def _check_ranges(tensors: list[StoredTensor], start: int, size: int, path: Path) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            word = "overlaps the one before" if tensor.offset < end else "leaves a gap before it"
            raise FormatError(f"tensor {tensor.name!r} {word}", path=path, offset=min(tensor.offset, end))
        end = tensor.offset + tensor.nbytes
    if end != size:
        raise FormatError(f"{size - end} bytes follow the last tensor", path=path, offset=end)


def refuse_pickle(path: Path) -> None:
    """Raise FormatError for checkpoints that are Python pickles: reading one can run any code it holds."""
    if path.suffix.lower() in _PICKLES:
        message = "is a pickle, which can run code when read; convert it to .safetensors where you trust it"
        raise FormatError(message, path=path, offset=0)


def open_folder(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder: `model.safetensors`, or the shards its index names.

    Raises
    ------
    FormatError
        No weights, only pickles, an index that names files outside the folder, or that disagrees with its shards.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise FormatError("both model.safetensors and model.safetensors.index.json are there; remove one", path=folder)
    if single.exists():
        return read_safetensors(single)[0]
    if index.exists():
        return _open_shards(folder, index)
    for file in sorted(folder.iterdir()):
        refuse_pickle(file)
    raise FormatError("no model.safetensors and no model.safetensors.index.json in this folder", path=folder)


def _open_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError("weight_map must map tensor names to file names", path=index, offset=0)
    if not weight_map:
        raise FormatError("weight_map names no tensor", path=index, offset=0)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not file.endswith(".safetensors") or set(file) & set("/\\:\0") or file.startswith("."):
            message = f"weight_map names {file!r}; a plain .safetensors name in this folder is expected"
            raise FormatError(message, path=index, offset=0)
        if not (folder / file).is_file():
            raise FormatError(f"shard {file!r} is missing from the folder", path=index, offset=0)
        shard = read_safetensors(folder / file)[0]
        claimed = {name for name, place in weight_map.items() if place == file}
        for word, names in (("lacks", claimed - set(shard)), ("holds, unlisted by the index,", set(shard) - claimed)):
            if names:
                raise FormatError(f"shard {file!r} {word} {_some(names)}", path=index, offset=0)
        tensors |= shard
    return tensors


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write a .safetensors file; the same tensors always give the same bytes.

    Parameters
    ----------
    path : path
        Written under a temporary name and renamed.
    tensors : mapping of name -> array
        Any memory order; stored in C order, little-endian, larger items first so that every tensor is aligned.
    metadata : mapping of str -> str, optional
    dtypes : mapping of name -> str, optional
        The logical dtype of code arrays, e.g. "BF16" for uint16 codes, "F8_E4M3" for uint8 codes.
    """
    dtypes = dtypes or {}
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = dict(sorted(metadata.items()))
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        array = tensors[name]
        dtype = dtypes.get(name) or _WRITTEN.get(array.dtype.newbyteorder("<"))
        if dtype is None:
            raise ValueError(f"tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold")
        bits = 8 * array.dtype.itemsize
        if DTYPES[dtype][0] != bits:
            raise ValueError(f"tensor {name!r}: {dtype} has {DTYPES[dtype][0]} bits, the array's items have {bits}")
        if not name or not name.isprintable() or name == "__metadata__":
            raise ValueError(f"{name!r} cannot be the name of a tensor")
        table[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > HEADER_LIMIT:
        raise ValueError(f"the header needs {len(header)} bytes, more than the {HEADER_LIMIT} that are read back")
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            array = np.ascontiguousarray(tensors[name])
            file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).data if array.size else b"")
