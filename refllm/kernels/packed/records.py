"""Packed weights: what a compressed layer stores, and nothing else.

A record is a frozen dataclass. The fields named in `stored` are arrays (or records themselves, or None) and are
exactly what is written to disk; the other fields are small integers and strings. A record that exists is valid: the
constructor checks shapes, types and cheap ranges. Records compare by identity and their arrays must not be written
to.

    IntWeight      codes on an integer grid, one scale (and zero point) per group
    MinWeight      codes counted from a minimum, a scale and a minimum per group
    MixedRows      the same with a number of bits for every row
    TwoLevel       codes under integer scales under a float scale a row
    ColumnGroups   groups of columns of different widths and bits, with integer levels under a scale a group (EXL2)
    GGUFBlocks     rows of GGUF blocks, as they lie in the file
    BinaryBlocks   two bits a weight: a sign, and a second sign or which of two groups it belongs to
    CodeWeight     codes of a table of values (NF4, FP8, FP4 ...), a scale per block
    VectorWeight   codes of vectors of columns, of one codebook or several that are added (AQLM, product quantisation)
    TableRows      codes of a table of values of each row's own
    SparkWeight    codes of four or eight bits, the rows one after another
    Reordered      a record whose columns are stored in another order
    Sparse24       two of every four columns, with 2-bit positions
    SparseBitmask  the kept values in row-major order, one bit per weight saying where
    SparseRows     a few kept values with their columns
    BlockSparse    the kept blocks, one bit per block saying where
    LowRank        two factors; never multiplied out
    Plain          floats as they are
    Sum            two weights of one shape, whose products are added
    TokenInputs, StaticInputs, PairInputs, OutlierInputs
                   a record, and how its inputs are rounded
    ThresholdInputs, PatternInputs
                   a record, and which of its inputs are taken as zero
    Rotated        a weight whose inputs are turned by a Hadamard matrix at run time

Records nest: the values of a Sparse24 and the factors of a LowRank may be records (2:4 with 4-bit values, say). The
flattened name of such a part is `values.codes`.

    parts(record)   {"codes": ..., "scale": ...}; a nested record's arrays are named "values.codes"
    meta(record)    {"bits": 4, ...}; a nested record's own {"kind": ..., ...} stands under its field's name
    from_parts      the inverse; everything it is given may come from a file and is checked
"""

from dataclasses import MISSING, fields
from typing import get_args

import numpy as np

from refllm.formats.errors import FormatError
from refllm.kernels.packed.base import as_float, is_record, rows_of
from refllm.kernels.packed.binary import BinaryBlocks
from refllm.kernels.packed.block_sparse import BlockSparse
from refllm.kernels.packed.codes import CodeWeight, Reordered, TableRows
from refllm.kernels.packed.column_groups import ColumnGroups
from refllm.kernels.packed.inputs import OutlierInputs, PairInputs, StaticInputs, TokenInputs
from refllm.kernels.packed.kept import PatternInputs, ThresholdInputs
from refllm.kernels.packed.lengths import SparkWeight
from refllm.kernels.packed.quantized import GGUFBlocks, IntWeight, MinWeight, MixedRows
from refllm.kernels.packed.rotated import Rotated
from refllm.kernels.packed.sparse import LowRank, Plain, Sparse24, SparseBitmask, SparseRows, Sum
from refllm.kernels.packed.two_level import TwoLevel
from refllm.kernels.packed.vectors import VectorWeight

__all__ = [
    "KINDS",
    "BinaryBlocks",
    "BlockSparse",
    "CodeWeight",
    "ColumnGroups",
    "GGUFBlocks",
    "IntWeight",
    "LowRank",
    "MinWeight",
    "MixedRows",
    "OutlierInputs",
    "PairInputs",
    "PatternInputs",
    "Plain",
    "Record",
    "Reordered",
    "Rotated",
    "SparkWeight",
    "Sparse24",
    "SparseBitmask",
    "SparseRows",
    "StaticInputs",
    "Sum",
    "TableRows",
    "ThresholdInputs",
    "TokenInputs",
    "TwoLevel",
    "VectorWeight",
    "as_float",
    "from_parts",
    "is_record",
    "meta",
    "parts",
    "rows_of",
]

Record = (
    IntWeight
    | MinWeight
    | MixedRows
    | GGUFBlocks
    | CodeWeight
    | VectorWeight
    | TableRows
    | SparkWeight
    | Reordered
    | Sparse24
    | SparseBitmask
    | SparseRows
    | BlockSparse
    | LowRank
    | Plain
    | Sum
    | TokenInputs
    | StaticInputs
    | PairInputs
    | OutlierInputs
    | ThresholdInputs
    | PatternInputs
    | Rotated
    | TwoLevel
    | BinaryBlocks
    | ColumnGroups
)
KINDS: dict[str, type] = {cls.kind: cls for cls in get_args(Record)}
MAX_DEPTH = 4  # of nested records: a file cannot make the reader recurse without end


def parts(record: Record) -> dict[str, np.ndarray]:
    """The stored arrays by name. The arrays are the record's own, not copies."""
    flat = {}
    for name in record.stored:
        value = getattr(record, name)
        if is_record(value):
            flat |= {f"{name}.{inner}": array for inner, array in parts(value).items()}
        elif value is not None:
            flat[name] = value
    return flat


def meta(record: Record) -> dict:
    """The fields that are not arrays: int, float and str, and a dict with its own `kind` for each nested record."""
    plain = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in record.stored}
    nested = {name: getattr(record, name) for name in record.stored if is_record(getattr(record, name))}
    return plain | {name: {"kind": inner.kind, **meta(inner)} for name, inner in nested.items()}


def from_parts(kind: str, parts: dict[str, np.ndarray], meta: dict, *, _depth: int = 0) -> Record:
    """Build a record from what parts() and meta() gave.

    Parameters
    ----------
    kind : str
    parts : dict of arrays
    meta : dict

    Raises
    ------
    FormatError
        Unknown kind; missing or extra parts or fields; a wrong type, shape or range.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"unknown kind of packed weight {kind!r}; known: {', '.join(KINDS)}")
    if not isinstance(meta, dict) or _depth > MAX_DEPTH:
        raise FormatError(f"{kind}: meta must be a dictionary nested at most {MAX_DEPTH} deep")
    cls = KINDS[kind]
    # A field with a default may be missing: records that were stored before it was there mean that.
    meta = {f.name: f.default for f in fields(cls) if f.name not in cls.stored and f.default is not MISSING} | meta
    values = {}
    for field in fields(cls):
        if field.name not in cls.stored:
            values[field.name] = _plain(kind, meta, field.name, field.type)
        else:
            values[field.name] = _stored(kind, parts, meta, field.name, field.name in cls.optional, _depth)
    known = set(values) | {name for name in parts if name.split(".")[0] in cls.stored and "." in name}
    if extra := sorted(map(str, (set(parts) | set(meta)) - known)):
        raise FormatError(f"{kind}: unexpected {', '.join(extra)}; expected {', '.join(values)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise FormatError(f"{kind}: {error}") from None


def _plain(kind: str, meta: dict, name: str, wanted: type) -> int | float | str:
    """One int, float or str field."""
    value = meta.get(name)
    if type(value) is not wanted:
        raise FormatError(f"{kind}: meta {name!r} must be {wanted.__name__}, got {value!r}")
    return value


def _stored(kind: str, parts: dict, meta: dict, name: str, optional: bool, depth: int):
    """One stored field: an array, a nested record, or None where that is allowed."""
    inner = {key[len(name) + 1 :]: array for key, array in parts.items() if key.startswith(f"{name}.")}
    nested = meta.get(name)
    if inner or nested is not None:
        if name in parts or not inner or not isinstance(nested, dict):
            raise FormatError(
                f"{kind}: {name!r} must be one array, or a record with arrays '{name}.*' and meta, not both"
            )
        rest = {key: value for key, value in nested.items() if key != "kind"}
        return from_parts(nested.get("kind"), inner, rest, _depth=depth + 1)
    if name not in parts and not optional:
        raise FormatError(f"{kind}: part {name!r} is missing; got {', '.join(map(str, parts)) or 'none'}")
    return parts.get(name)
