"""Records of weights on a table of values (NF4, FP8, FP4 ...; a table a row), and of weights with reordered columns."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.packed.base import (
    ALL,
    FLOATS,
    BaseRecord,
    check_array,
    check_columns,
    check_factor,
    check_packed,
    row_count,
    rows_of,
)

DYNAMIC8 = "DYNAMIC8"  # bitsandbytes' 8-bit map of scales
OWN = "OWN"  # the record brings its table
RULES = ("multiply", "divide", "multiply_127")
FLAT = 0  # block_rows: blocks run through the row-major matrix


@cache
def table_values(name: str) -> np.ndarray:
    """Value of every code of a table of up to 8 bits, float32.

    Parameters
    ----------
    name : str
        A name of refllm.formats.dtypes, or DYNAMIC8.
    """
    from refllm.formats.checkpoints.bitsandbytes import dynamic_map
    from refllm.formats.dtypes import FORMATS

    if name == DYNAMIC8:
        return dynamic_map()
    form = FORMATS.get(name)
    if form is None or form.bits > 8:
        known = ", ".join([n for n, f in FORMATS.items() if f.bits <= 8] + [DYNAMIC8, OWN])
        raise ValueError(f"unknown table {name!r}; known: {known}")
    values = form.decode(np.arange(1 << form.bits, dtype=np.uint8))
    values.flags.writeable = False
    return values


@dataclass(frozen=True, eq=False)
class CodeWeight(BaseRecord):
    """Codes of a table of values, with a scale per block.

        multiply       w = table[code] scale (+ offset)
        divide         w = table[code] / scale (+ offset)
        multiply_127   w = (table[code] scale) float32(1 / 127)

    each step rounded to float32. The scales may be a record themselves: double quantisation, or block scales in FP8.

    Parameters
    ----------
    codes : (out, ceil(columns * bits / 8)) uint8
        Bit order of refllm.formats.bits; the table says how many bits.
    scale : (blocks of rows, blocks of columns) float16 or float32, or a record of that shape, or None: no scale
        (1, blocks) where block_rows is 0.
    offset : (1,) float32, or None: 0
    values : (2^bits,) float32, or None
        The table where it has no name (table "OWN").
    table : str
        A name of refllm.formats.dtypes, "DYNAMIC8" or "OWN".
    rule : str
        One of the formulas above.
    block_rows, block_columns : int
        Weights that share a scale; the last blocks may be smaller. block_rows 0: block_columns consecutive weights of
        the row-major matrix, across the ends of rows.
    columns : int
    """

    codes: np.ndarray
    scale: "np.ndarray | BaseRecord | None"
    offset: np.ndarray | None
    values: np.ndarray | None
    table: str
    rule: str
    block_rows: int
    block_columns: int
    columns: int
    kind: ClassVar[str] = "codes"
    stored: ClassVar[tuple[str, ...]] = ("codes", "scale", "offset", "values")
    optional: ClassVar[tuple[str, ...]] = ("scale", "offset", "values")

    def __post_init__(self):
        check_columns(self.columns)
        if (self.values is not None) != (self.table == OWN):
            raise ValueError(f"values must be given exactly if the table is {OWN!r}, got table {self.table!r}")
        if self.values is not None and np.shape(self.values) not in ((16,), (256,)):
            raise ValueError(f"values must be 16 or 256 numbers, got shape {np.shape(self.values)}")
        if self.values is not None:
            check_array("values", self.values, (np.float32,), self.values.shape)
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.block_rows < 0 or self.block_columns < 1:
            raise ValueError(
                f"blocks must be 0 or more rows of 1 or more columns, got {self.block_rows} x {self.block_columns}"
            )
        rows = row_count("codes", self.codes)
        check_packed("codes", self.codes, rows, self.columns, self.bits)
        self._check_values()
        self._check_scale(rows)

    def _check_values(self) -> None:
        finite = np.isfinite(self.entries)
        if not finite.all() and not finite[unpack_bits(self.codes, self.bits, self.columns)].all():
            raise ValueError(f"codes hold NaN or Inf of {self.table}")
        if self.offset is not None:
            check_array("offset", self.offset, (np.float32,), (1,))

    def _check_scale(self, rows: int) -> None:
        if self.scale is None:
            if self.rule != "multiply":
                raise ValueError(f"rule {self.rule!r} needs a scale")
            return
        check_factor("scale", self.scale, scale_shape((rows, self.columns), self.block_rows, self.block_columns))
        if self.rule == "divide" and not rows_of(self.scale, ALL).all():
            raise ValueError("a scale that divides is 0")

    @classmethod
    def pack(
        cls, codes: np.ndarray, scale, table: str, block: tuple[int, int], *, rule="multiply", offset=None, values=None
    ):
        """From codes (out, in); the other parameters are the fields, `block` is (block_rows, block_columns)."""
        bits = int(values.size).bit_length() - 1 if table == OWN else int(table_values(table).size).bit_length() - 1
        return cls(pack_bits(codes, bits), scale, offset, values, table, rule, *block, codes.shape[1])

    @property
    def entries(self) -> np.ndarray:
        """Value of every code, float32."""
        return table_values(self.table) if self.values is None else self.values

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.entries.size).bit_length() - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.columns

    def unpacked(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The codes of some rows, (k, in) uint8."""
        return unpack_bits(self.codes[ids], self.bits, self.columns)

    def scales(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The scale of every weight of some rows, (k, in) float32."""
        return self.spread(self.scale, ids)

    def spread(self, of_blocks: "np.ndarray | BaseRecord", ids: np.ndarray | slice) -> np.ndarray:
        """A number of each block -> one of every weight of some rows, (k, in) float32."""
        numbers = np.arange(self.shape[0])[ids]
        if self.block_rows != FLAT:
            of_rows = rows_of(of_blocks, numbers // self.block_rows)
            return np.repeat(of_rows, self.block_columns, axis=1)[:, : self.columns]
        flat = rows_of(of_blocks, ALL)[0]
        if self.columns % self.block_columns == 0:
            return np.repeat(flat.reshape(self.shape[0], -1)[numbers], self.block_columns, axis=1)
        return flat[(numbers[:, None] * self.columns + np.arange(self.columns)) // self.block_columns]

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        out = self.entries[self.unpacked(ids)]
        with np.errstate(over="ignore"):
            if self.scale is not None:
                (np.divide if self.rule == "divide" else np.multiply)(out, self.scales(ids), out=out)
            if self.rule == "multiply_127":
                out *= np.float32(1 / 127)
            return out if self.offset is None else out + self.offset


@dataclass(frozen=True, eq=False)
class TableRows(BaseRecord):
    """Codes of a table of its own for every row: w[r, c] = tables[r, code[r, c]].

    Parameters
    ----------
    codes : (out, ceil(columns * bits / 8)) uint8
        Bit order of refllm.formats.bits.
    tables : (out, 2^bits) float16 or float32
        2 to 256 values a row, in any order.
    columns : int
    """

    codes: np.ndarray
    tables: np.ndarray
    columns: int
    kind: ClassVar[str] = "table_rows"
    stored: ClassVar[tuple[str, ...]] = ("codes", "tables")

    def __post_init__(self):
        check_columns(self.columns)
        rows = row_count("codes", self.codes)
        values = self.tables.shape[1] if np.ndim(self.tables) == 2 else 0
        if values not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"tables must be [out, 2 to 256, a power of two], got shape {np.shape(self.tables)}")
        check_array("tables", self.tables, FLOATS, (rows, values))
        check_packed("codes", self.codes, rows, self.columns, self.bits)

    @classmethod
    def pack(cls, codes: np.ndarray, tables: np.ndarray):
        """From codes (out, in), integers; the other parameters are the fields."""
        return cls(pack_bits(codes, int(tables.shape[1]).bit_length() - 1), tables, codes.shape[1])

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.tables.shape[1]).bit_length() - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.columns

    def unpacked(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The codes of some rows, (k, in) uint8."""
        return unpack_bits(self.codes[ids], self.bits, self.columns)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        tables = self.tables[ids].astype(np.float32)
        return np.take_along_axis(tables, self.unpacked(ids).astype(np.intp), axis=1)


def scale_shape(shape: tuple[int, int], block_rows: int, block_columns: int) -> tuple[int, int]:
    """Shape of the scales of a matrix.

    Examples
    --------
    >>> scale_shape((200, 300), 128, 128), scale_shape((3, 100), 0, 64)
    ((2, 3), (1, 5))
    """
    if block_rows == FLAT:
        return 1, -(-shape[0] * shape[1] // block_columns)
    return -(-shape[0] // block_rows), -(-shape[1] // block_columns)


@dataclass(frozen=True, eq=False)
class Reordered(BaseRecord):
    """A weight whose columns are stored in another order, so that the columns of a group lie together (act-order).

    Column j of `weight` is column order[j] of the matrix: W x = weight x[order].

    Parameters
    ----------
    weight : record
    order : (in,) int32
        Every column once.
    """

    weight: BaseRecord
    order: np.ndarray
    kind: ClassVar[str] = "reordered"
    stored: ClassVar[tuple[str, ...]] = ("weight", "order")

    def __post_init__(self):
        if not isinstance(self.weight, BaseRecord):
            raise ValueError(f"weight must be a packed record, got {type(self.weight).__name__}")
        columns = self.weight.shape[1]
        check_array("order", self.order, (np.int32,), (columns,))
        if not np.array_equal(np.sort(self.order), np.arange(columns)):
            raise ValueError(f"order must name each of {columns} columns once")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        stored = self.weight.rows(ids)
        out = np.empty_like(stored)
        out[:, self.order] = stored
        return out
