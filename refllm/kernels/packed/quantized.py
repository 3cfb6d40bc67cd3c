"""Records of quantized weights: codes on an integer grid, with a zero point or a minimum, and GGUF blocks."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, padding_is_zero, unpack_bits
from refllm.kernels.grids import PER_TENSOR, AffineGrid, SymmetricGrid, group_count
from refllm.kernels.packed.base import (
    ALL,
    FLOATS,
    BaseRecord,
    Whole,
    check_array,
    check_columns,
    check_packed,
    row_count,
)


@dataclass(frozen=True, eq=False)
class IntWeight(BaseRecord):
    """Integer codes: weight = scale * (code - zero_point).

    Parameters
    ----------
    codes : (out, ceil(columns * bits / 8)) uint8
        Bit order of refllm.formats.bits.
    scale : (out, groups) float16 or float32; (1, 1) per tensor
    zero_point : (out, ceil(groups * bits / 8)) uint8, packed like the codes; (1, 1) per tensor; None = 2^(bits-1)
        Symmetric codes are stored with that offset, so 2^(bits-1) means 0.
    bits : int
        2 to 8.
    group_size : int
        As in refllm.kernels.grids: g columns, -1 per channel, 0 per tensor.
    columns : int
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    bits: int
    group_size: int
    columns: int
    kind: ClassVar[str] = "int"
    stored: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero_point")
    optional: ClassVar[tuple[str, ...]] = ("zero_point",)

    def __post_init__(self):
        check_columns(self.columns)
        groups = group_count(self.columns, self.group_size)
        rows = row_count("codes", self.codes)
        SymmetricGrid(self.bits)  # checks bits
        check_packed("codes", self.codes, rows, self.columns, self.bits)
        scales = 1 if self.group_size == PER_TENSOR else rows
        check_array("scale", self.scale, FLOATS, (scales, groups))
        if self.zero_point is not None:
            check_packed("zero_point", self.zero_point, scales, groups, self.bits)

    @classmethod
    def pack(
        cls, grid: SymmetricGrid | AffineGrid, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None
    ):
        """From what a grid's fit and encode returned.

        Parameters
        ----------
        codes : (out, in) uint8
        scale : (out, groups) or (1, 1), float16 or float32
        zero_point : the same shape, uint8, or None
        """
        packed_zero = None if zero_point is None else pack_bits(zero_point, grid.bits)
        return cls(pack_bits(codes, grid.bits), scale, packed_zero, grid.bits, grid.group_size, codes.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.columns

    @property
    def grid(self) -> SymmetricGrid | AffineGrid:
        """The grid that decodes this weight."""
        kind = SymmetricGrid if self.zero_point is None else AffineGrid
        return kind(self.bits, self.group_size, self.scale.dtype.name)

    def scales(self, ids: np.ndarray | slice = ALL) -> tuple[np.ndarray, np.ndarray]:
        """Scale (as stored) and zero point (int32) of some rows, each (k, groups); (1, 1) per tensor."""
        of_scale = ALL if self.group_size == PER_TENSOR else ids
        scale = self.scale[of_scale]
        if self.zero_point is None:
            return scale, np.full(scale.shape, self.grid.offset, np.int32)
        return scale, unpack_bits(self.zero_point[of_scale], self.bits, scale.shape[1]).astype(np.int32)

    def unpacked(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The codes of some rows, (k, in) uint8."""
        return unpack_bits(self.codes[ids], self.bits, self.columns)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        return self.grid.decode(self.unpacked(ids), *self.scales(ids))

    def whole(self, ids: np.ndarray | slice) -> Whole:
        """Some rows as whole numbers: code - zero_point."""
        codes, (scale, zero) = self.unpacked(ids).astype(np.float32), self.scales(ids)
        groups = scale.shape[1]
        numbers = codes.reshape(len(codes), groups, self.columns // groups) - zero[..., None].astype(np.float32)
        return Whole(numbers.reshape(codes.shape), np.broadcast_to(scale.astype(np.float32), numbers.shape[:2]))


@dataclass(frozen=True, eq=False)
class MinWeight(BaseRecord):
    """Integer codes counted from a minimum that need not be a multiple of the scale: weight = scale * code + minimum.

    Parameters
    ----------
    codes : (out, ceil(columns * bits / 8)) uint8
        Bit order of refllm.formats.bits.
    scale, minimum : (out, groups) float16 or float32, both alike
    bits : int
        1 to 8.
    group_size : int
        g columns that share a scale, or -1: a row.
    columns : int
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray
    bits: int
    group_size: int
    columns: int
    kind: ClassVar[str] = "min"
    stored: ClassVar[tuple[str, ...]] = ("codes", "scale", "minimum")

    def __post_init__(self):
        check_columns(self.columns)
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.group_size == PER_TENSOR:
            raise ValueError("group_size must be positive or -1 (a row), got 0")
        groups, rows = group_count(self.columns, self.group_size), row_count("codes", self.codes)
        check_packed("codes", self.codes, rows, self.columns, self.bits)
        check_array("scale", self.scale, FLOATS, (rows, groups))
        check_array("minimum", self.minimum, (self.scale.dtype,), (rows, groups))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.columns

    def unpacked(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The codes of some rows, (k, in) uint8."""
        return unpack_bits(self.codes[ids], self.bits, self.columns)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32: a product, then a sum, each rounded to float32."""
        scale, minimum = (a[ids].astype(np.float32)[..., None] for a in (self.scale, self.minimum))
        codes = self.unpacked(ids).astype(np.float32).reshape(*scale.shape[:2], self.columns // scale.shape[1])
        return (scale * codes + minimum).reshape(len(scale), self.columns)

    def whole(self, ids: np.ndarray | slice) -> Whole:
        """Some rows as whole numbers: the codes, with the scale and minimum of each group."""
        scale, minimum = (a[ids].astype(np.float32) for a in (self.scale, self.minimum))
        return Whole(self.unpacked(ids).astype(np.float32), scale, minimum)


@dataclass(frozen=True, eq=False)
class MixedRows(BaseRecord):
    """Rows of different widths, each with a scale and a minimum: weight = scale * code + minimum.

    Parameters
    ----------
    codes : (bytes,) uint8
        The rows one after another, each padded with zero bits to whole bytes. A row of 0 bits has none.
    bits : (out,) uint8
        0 to 8; with 0 bits every weight of the row is the minimum.
    scale, minimum : (out,) float32
    columns : int
    """

    codes: np.ndarray
    bits: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray
    columns: int
    kind: ClassVar[str] = "mixed rows"
    stored: ClassVar[tuple[str, ...]] = ("codes", "bits", "scale", "minimum")

    def __post_init__(self):
        check_columns(self.columns)
        out = self.bits.shape if isinstance(self.bits, np.ndarray) else ()
        if len(out) != 1 or not out[0]:
            raise ValueError(f"bits must be a vector with a number for every row, got shape {out}")
        check_array("bits", self.bits, (np.uint8,), out)
        if self.bits.max() > 8:
            raise ValueError(f"bits must be 0 to 8, got {self.bits.max()}")
        check_array("scale", self.scale, (np.float32,), out)
        check_array("minimum", self.minimum, (np.float32,), out)
        check_array("codes", self.codes, (np.uint8,), (int(self._ends[-1]),))
        for bits in set(self.bits.tolist()) - {0}:
            if not padding_is_zero(self._packed(np.flatnonzero(self.bits == bits), bits), bits, self.columns):
                raise ValueError(f"codes: bits after the last of a row of {bits} bits are not zero")

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum((self.bits.astype(np.int64) * self.columns + 7) // 8)

    def _packed(self, numbers: np.ndarray, bits: int) -> np.ndarray:
        """The bytes of some rows that all have so many bits, (k, n)."""
        size = (bits * self.columns + 7) // 8
        return self.codes[self._ends[numbers, None] - size + np.arange(size)]

    @classmethod
    def pack(cls, codes: np.ndarray, bits: np.ndarray, scale: np.ndarray, minimum: np.ndarray):
        """From codes (out, in) uint8 and vectors (out,)."""
        packed = [pack_bits(row[None], int(b)).ravel() for row, b in zip(codes, bits, strict=True) if b]
        return cls(
            np.concatenate([np.empty(0, np.uint8), *packed]),
            bits.astype(np.uint8),
            scale.astype(np.float32),
            minimum.astype(np.float32),
            codes.shape[1],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.bits), self.columns

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32: a product, then a sum, each rounded to float32."""
        numbers = np.arange(len(self.bits))[ids]
        codes = self.unpacked(ids).astype(np.float32)
        return self.scale[numbers, None] * codes + self.minimum[numbers, None]

    def unpacked(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The codes of some rows, (k, in) uint8."""
        numbers = np.arange(len(self.bits))[ids]
        codes = np.zeros((len(numbers), self.columns), np.uint8)
        for bits in set(self.bits[numbers].tolist()) - {0}:
            same = self.bits[numbers] == bits
            codes[same] = unpack_bits(self._packed(numbers[same], bits), bits, self.columns)
        return codes


@dataclass(frozen=True, eq=False)
class GGUFBlocks(BaseRecord):
    """Rows of GGUF blocks.

    Parameters
    ----------
    data : (out, columns / block_size * bytes_per_block) uint8
    type_name : str
        A name of refllm.formats.blocks: Q4_0, Q8_0, Q4_K ...
    columns : int
    """

    data: np.ndarray
    type_name: str
    columns: int
    kind: ClassVar[str] = "gguf"
    stored: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self):
        check_columns(self.columns)
        layout = self.layout
        if self.columns % layout.block_size:
            raise ValueError(f"{self.type_name} needs a multiple of {layout.block_size} columns, got {self.columns}")
        row_bytes = self.columns // layout.block_size * layout.bytes_per_block
        check_array("data", self.data, (np.uint8,), (row_count("data", self.data), row_bytes))
        if not layout.is_finite(self.data):
            raise ValueError(f"data: a {self.type_name} block decodes to NaN or Inf")

    @property
    def layout(self):
        """The block type in refllm.formats.blocks."""
        from refllm.formats import blocks

        layout = getattr(blocks, self.type_name, None)
        if not hasattr(layout, "bytes_per_block"):
            raise ValueError(f"unknown GGUF block type {self.type_name!r}")
        return layout

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.data.shape[0], self.columns

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        return self.layout.decode(self.data[ids])

    def whole(self, ids: np.ndarray | slice) -> Whole:
        """Some rows as whole numbers, with the scale and minimum of each group."""
        terms = self._terms(ids)
        rows = -1, self.columns // self.layout.block_size
        arrays = terms.whole, *terms.of_groups
        return Whole(*(None if a is None else a.reshape(-1, rows[1] * a.shape[1]) for a in arrays))

    def levels(self, ids: np.ndarray | slice) -> tuple:
        """Some rows of a type that has levels, taken apart: w = d * whole + low * minimum.

        Returns
        -------
        d, whole, low, minimum : (k, in / 256) float32, (k, in / 256, 256) float64, and the same once more
            whole = level * number and minimum, the minimum level of each column, are whole numbers. A type without
            minima has None for low and minimum.
        """
        terms = self._terms(ids)
        shape = -1, self.columns // self.layout.block_size, self.layout.block_size
        wide = lambda levels: np.repeat(levels.astype(np.float64), shape[2] // levels.shape[1], axis=1)
        d, whole = terms.scale.reshape(shape[:2]), (wide(terms.levels) * terms.whole).reshape(shape)
        if terms.low is None:
            return d, whole, None, None
        return d, whole, terms.low.reshape(shape[:2]), wide(terms.low_levels).reshape(shape)

    def _terms(self, ids):
        return self.layout.read(self.data[ids].reshape(-1, self.layout.bytes_per_block))


@cache
def has_levels(type_name: str) -> bool:
    """Whether blocks of a GGUF type have small integer scales under a float16 one: K-quants and IQ4_XS."""
    from refllm.formats import blocks

    form = blocks.BLOCKS[type_name]
    return form.read(np.zeros((1, form.bytes_per_block), np.uint8)).levels is not None
