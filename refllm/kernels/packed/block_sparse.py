"""The record of block sparsity: whole blocks of a weight are kept or left out."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.packed.base import (
    BaseRecord,
    Whole,
    as_float,
    check_columns,
    check_factor,
    check_packed,
    rows_of,
)


@dataclass(frozen=True, eq=False)
class BlockSparse(BaseRecord):
    """Kept blocks one below another, row of blocks by row of blocks, and one bit per block saying where.

    Gray et al. 2017, "GPU Kernels for Block-Sparse Weights"; the values of one block may be read, and multiplied, like
    a dense matrix.

    Parameters
    ----------
    values : (kept * block_rows, block_columns) float16 or float32, or a record of that shape
        Blocks at the ends of rows and columns are filled up with anything.
    bitmap : (ceil(out / block_rows), ceil(blocks in a row / 8)) uint8
        1 = kept, low bit first.
    out, columns : int
    block_rows, block_columns : int
    """

    values: "np.ndarray | BaseRecord"
    bitmap: np.ndarray
    out: int
    columns: int
    block_rows: int
    block_columns: int
    kind: ClassVar[str] = "blocks"
    stored: ClassVar[tuple[str, ...]] = ("values", "bitmap")

    def __post_init__(self):
        check_columns(self.columns)
        if min(self.out, self.block_rows, self.block_columns) < 1:
            raise ValueError(
                f"out and blocks must be at least 1, got {self.out} and {self.block_rows} x {self.block_columns}"
            )
        rows, columns = self.grid
        check_packed("bitmap", self.bitmap, rows, columns, 1)
        kept = int(np.bitwise_count(self.bitmap).sum())
        check_factor("values", self.values, (kept * self.block_rows, self.block_columns))

    @classmethod
    def compress(cls, W: np.ndarray, mask: np.ndarray | None = None, block=(16, 32), dtype: str = "float16"):
        """Keep the blocks the mask names.

        Parameters
        ----------
        W : (out, in) float
        mask : (rows of blocks, blocks in a row) bool; None = where any weight of a block is not 0
        block : (int, int)
            Rows and columns.
        dtype : str
            float16 (values are rounded to nearest, ties to even) or float32.
        """
        if W.ndim != 2 or 0 in W.shape or min(block) < 1:
            raise ValueError(f"weight must be a non-empty matrix and blocks at least 1 x 1, got {W.shape} and {block}")
        (out, columns), (height, width) = W.shape, block
        grid = -(-out // height), -(-columns // width)
        padded = np.pad(W, ((0, grid[0] * height - out), (0, grid[1] * width - columns)))
        blocks = padded.reshape(grid[0], height, grid[1], width).swapaxes(1, 2)  # [row, column, height, width]
        mask = (blocks != 0).any(axis=(2, 3)) if mask is None else np.asarray(mask, bool)
        if mask.shape != grid:
            raise ValueError(f"{W.shape} in blocks of {height} x {width} needs a mask of {grid}, got {mask.shape}")
        values = as_float(blocks[mask].reshape(-1, width), dtype) if mask.any() else np.zeros((0, width), dtype)
        return cls(values, pack_bits(mask.astype(np.uint8), 1), out, columns, height, width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows of blocks, blocks in a row."""
        return -(-self.out // self.block_rows), -(-self.columns // self.block_columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out, self.columns

    def mask(self) -> np.ndarray:
        """Which blocks are kept, bool of the shape of the grid."""
        return unpack_bits(self.bitmap, 1, self.grid[1]).astype(bool)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        kept = self._kept(ids)
        return self._spread(rows_of(self.values, kept[-1]), *kept)[:, : self.columns]

    def whole(self, ids: np.ndarray | slice) -> Whole | None:
        """Some rows as whole numbers, if the kept ones are such; a group that is left out has the scale 0."""
        if not isinstance(self.values, BaseRecord) or self.columns % self.block_columns:
            return None
        kept = self._kept(ids)
        values = self.values.whole(kept[-1])
        return values and Whole(*(None if a is None else self._spread(a, *kept) for a in values[:3]))

    def _kept(self, ids: np.ndarray | slice) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """How many rows; of each kept part of a row: which of the rows, which block of it, and which row of values."""
        numbers, mask = np.arange(self.out)[ids], self.mask()
        row, inside = np.divmod(numbers, self.block_rows)
        order = np.cumsum(mask).reshape(mask.shape) - 1  # of the kept blocks
        k, column = np.nonzero(mask[row])
        return len(numbers), k, column, order[row[k], column] * self.block_rows + inside[k]

    def _spread(self, values: np.ndarray, count: int, k: np.ndarray, column: np.ndarray, _) -> np.ndarray:
        """What kept parts of rows have, at their places: (kept, n) -> (rows, blocks * n) float32, zeros elsewhere."""
        out = np.zeros((count, self.grid[1], values.shape[1]), np.float32)
        out[k, column] = values
        return out.reshape(count, self.grid[1] * values.shape[1])
