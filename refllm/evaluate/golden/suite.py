"""Golden suites as files: find, read, check the hashes, build the arrays.

    DIR/SHA256SUMS               one line a file, as `sha256sum -c` reads it
    DIR/quant/rtn.json           the manifest, see data/golden/golden-v1.schema.json
    DIR/quant/rtn.safetensors    its larger arrays

An array is given as a `key` of the data file, `inline`, or as a `recipe`; always with the sha256 of its bytes. Formats
that NumPy has no type for (bf16, fp8, 4-bit codes ...) are arrays of unsigned codes, one code an element.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from refllm.formats.errors import FormatError
from refllm.formats.files import data_path, read_json
from refllm.formats.tensors import StoredTensor, read_safetensors

SCHEMA_FILE = "golden-v1.schema.json"
SUMS_FILE = "SHA256SUMS"
# Logical dtype -> NumPy type of the stored array.
STORAGE = {
    "bool": "u1", "u8": "u1", "i8": "i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "u64": "<u8",
    "i64": "<i8", "f16": "<f2", "bf16": "<u2", "f32": "<f4", "f64": "<f8", "i4": "i1", "u4": "u1", "i2": "i1", "u2":
    "u1",
    "f8_e4m3fn": "u1", "f8_e5m2": "u1", "f8_e4m3fnuz": "u1", "f8_e5m2fnuz": "u1", "f8_e8m0fnu": "u1",
    "f6_e2m3fn": "u1", "f6_e3m2fn": "u1", "f4_e2m1fn": "u1", "bytes": "u1", "utf8": "u1",
}  # fmt: skip
_MAX_ELEMENTS = 1 << 26  # of a recipe: a manifest must not fill the memory


class CorruptVectors(FormatError):
    """The vectors themselves are damaged: a hash, a file or a manifest is not what it was (exit code 4)."""


@dataclass(frozen=True)
class Case:
    """One case of a suite, the group's params merged in.

    suite, op, id, comment, result ("valid", "invalid" or "acceptable"), flags, params, requires, error (of an
    invalid case);
    `inputs` and `expected` are the manifest's own entries.
    """

    suite: str
    op: str
    id: int
    comment: str
    result: str
    flags: tuple[str, ...]
    params: dict
    requires: tuple[str, ...]
    error: str | None
    inputs: dict
    expected: dict

    @property
    def name(self) -> str:
        """`SUITE#ID`."""
        return f"{self.suite}#{self.id}"


@dataclass(frozen=True)
class Suite:
    """A manifest and the tensors of its data file (not read yet)."""

    name: str
    path: Path
    manifest: dict
    tensors: dict[str, StoredTensor]

    @cached_property
    def cases(self) -> list[Case]:
        """All cases in the order of the file."""
        op = self.manifest["op"]
        return [
            Case(
                self.name,
                op,
                case["id"],
                case["comment"],
                case["result"],
                tuple(case["flags"]),
                group["params"] | case.get("params", {}),
                tuple(group.get("requires", ())),
                case.get("error"),
                case["inputs"],
                case.get("expected", {}),
            )
            for group in self.manifest["groups"]
            for case in group["cases"]
        ]

    def array(self, entry: dict, where: str = "") -> np.ndarray:
        """The array of one tensor entry, its hash checked.

        Parameters
        ----------
        entry : dict
            A `tensor` of the schema.
        where : str
            Named in the error, e.g. "quant/rtn#3 w".

        Returns
        -------
        ndarray
            A fresh, native-endian, C-order array of the storage type.

        Raises
        ------
        CorruptVectors
        """
        try:
            array = _build(entry, self.tensors)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptVectors(f"{where}: the tensor cannot be built: {error}", path=self.path) from None
        if "sha256" in entry and array_hash(array) != entry["sha256"]:
            raise CorruptVectors(f"{where}: the tensor's bytes do not have the sha256 of the manifest", path=self.path)
        return array

    def inputs(self, case: Case) -> dict[str, np.ndarray]:
        """Fresh arrays of a case's inputs."""
        return {name: self.array(entry, f"{case.name} {name}") for name, entry in case.inputs.items()}


def array_hash(array: np.ndarray) -> str:
    """sha256 of the little-endian C-order bytes of an array."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def splitmix64(seed: int, n: int) -> np.ndarray:
    """The first n outputs of SplitMix64 (Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators").

    Examples
    --------
    >>> splitmix64(1234567, 1).tolist()
    [6457827717110365317]
    """
    z = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, n + 1, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _recipe(recipe: dict, dtype: np.dtype, n: int) -> np.ndarray:
    kind = recipe["kind"]
    if n > _MAX_ELEMENTS:
        raise ValueError(f"a recipe of {n} elements; at most {_MAX_ELEMENTS} are made")
    if kind == "splitmix64_dyadic":
        bits = recipe["bits"]
        top = (splitmix64(int(recipe["seed"], 16), n) >> np.uint64(64 - bits)).astype(np.int64) - (1 << (bits - 1))
        return np.ldexp(top.astype(np.float64), recipe["exp2"]).astype(dtype)
    if kind == "arange":
        return (recipe["start"] + recipe["step"] * np.arange(n, dtype=np.int64)).astype(dtype)
    if kind == "full":
        return np.full(n, _number(recipe["value"], dtype), dtype)
    if kind == "all_bit_patterns":
        width = np.dtype(f"u{dtype.itemsize}")
        if n > 1 << (8 * dtype.itemsize):
            raise ValueError(f"{n} elements are more than the bit patterns of {dtype}")
        return np.arange(n, dtype=np.uint64).astype(width).view(dtype)
    raise ValueError(f"recipe {kind!r} is unknown")


def _number(value: str | int | bool, dtype: np.dtype) -> int | float:
    """A number of the manifest: hex float for float types, integer otherwise."""
    if dtype.kind == "f":
        return float.fromhex(value) if isinstance(value, str) else value
    return int(value)


def _build(entry: dict, tensors: dict[str, StoredTensor]) -> np.ndarray:
    dtype, shape = np.dtype(STORAGE[entry["dtype"]]), tuple(entry["shape"])
    if "key" in entry:
        stored = tensors[entry["key"]]
        array = stored.stored()
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{entry['key']} is {array.dtype} {array.shape}, the manifest says {dtype} {shape}")
        return array
    n = int(np.prod(shape, dtype=object)) if shape else 1
    if "inline" in entry:
        flat = np.array([_number(value, dtype) for value in entry["inline"]], dtype)
    else:
        flat = _recipe(entry["recipe"], dtype, n)
    if flat.size != n:
        raise ValueError(f"{flat.size} values for the shape {shape}")
    return flat.reshape(shape).astype(dtype.newbyteorder("="))


def default_root() -> Path:
    """The folder of the vectors refllm ships."""
    return data_path("golden")


def suite_names(root: Path) -> list[str]:
    """Names of all suites below a folder, sorted."""
    manifests = (p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.json") if p.name != SCHEMA_FILE)
    return sorted(manifests)


def read_sums(root: Path) -> dict[str, str]:
    """SHA256SUMS as {relative path: sha256}.

    Raises
    ------
    CorruptVectors
        Missing, or a line that is not `HASH  PATH`.
    """
    path = root / SUMS_FILE
    if not path.is_file():
        raise CorruptVectors(f"{SUMS_FILE} is missing, so the vectors cannot be checked", path=root)
    sums = {}
    *lines, end = path.read_bytes().decode("utf-8", "replace").split("\n")
    if end:
        raise CorruptVectors("the last line is cut off", path=path)
    for number, line in enumerate(lines, 1):
        found = re.fullmatch(r"([0-9a-f]{64})  ([A-Za-z0-9_./-]+)", line)
        if not found:
            raise CorruptVectors(f"line {number} is not 'sha256  path'", path=path)
        sums[found[2]] = found[1]
    return sums


def _checked_file(root: Path, relative: str, sums: dict[str, str]) -> Path:
    path = root / relative
    if relative not in sums:
        raise CorruptVectors(f"{relative} is not listed in {SUMS_FILE}", path=root)
    if not path.is_file():
        raise CorruptVectors("the file is missing", path=path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sums[relative]:
        raise CorruptVectors(f"the file does not have the sha256 listed in {SUMS_FILE}", path=path)
    return path


def read_schema(root: Path) -> dict:
    """The manifest schema of format v1, hash checked."""
    return read_json(_checked_file(root, SCHEMA_FILE, read_sums(root)))


def read_suite(root: Path, name: str) -> Suite:
    """Read a suite; both its files must have the hashes of SHA256SUMS.

    Parameters
    ----------
    root : Path
        Folder of vectors.
    name : str
        E.g. "quant/rtn", one of `suite_names(root)`.

    Raises
    ------
    CorruptVectors
        Anything that is not as it was written.
    """
    sums = read_sums(root)
    manifest_path = _checked_file(root, f"{name}.json", sums)
    try:
        manifest = read_json(manifest_path)
        data = manifest["data"]
        relative = f"{name}.safetensors"
        if data["file"] != Path(relative).name:
            raise ValueError(f"data.file must be {Path(relative).name!r}, got {data['file']!r}")
        data_file = _checked_file(root, relative, sums)
        if data["sha256"] != sums[relative]:
            raise ValueError(f"data.sha256 is not the sha256 of {relative}")
        tensors, _ = read_safetensors(data_file)
    except CorruptVectors:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptVectors(str(error) or "malformed", path=manifest_path) from None
    return Suite(name, manifest_path, manifest, tensors)


def read_suites(root: Path, names: list[str] | None = None) -> Iterator[Suite]:
    """The named suites, or all."""
    for name in names or suite_names(root):
        yield read_suite(root, name)
