"""Records of quantized weights: codes on an integer grid, and GGUF blocks."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.grids import PER_TENSOR, AffineGrid, SymmetricGrid, group_count
from refllm.kernels.packed.base import ALL, FLOATS, BaseRecord, check_array, check_columns, check_packed, row_count


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
