"""Records of sparse weights (2:4 and bitmask), of low-rank factors and of sums of two weights."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.packed.activations import BLOCK
from refllm.kernels.packed.base import (
    ALL,
    FLOATS,
    BaseRecord,
    Whole,
    as_float,
    check_array,
    check_columns,
    check_factor,
    check_packed,
    row_count,
    rows_of,
)

# Nibbles i0 | i1 << 2 with i0 < i1: the six ways to choose two of four columns.
_PAIRS = np.zeros(16, bool)
_PAIRS[[0x4, 0x8, 0xC, 0x9, 0xD, 0xE]] = True


@dataclass(frozen=True, eq=False)
class Sparse24(BaseRecord):
    """2:4 semi-structured sparsity: of each four consecutive columns two values and their positions.

    Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378; the plain (not reordered) layout.

    Parameters
    ----------
    values : (out, columns / 2) float16 or float32, or a record of that shape
    indices : (out, ceil(columns / 8)) uint8
        A nibble i0 | i1 << 2, i0 < i1, per group of four, low nibble first.
    columns : int
        A multiple of 4.
    """

    values: "np.ndarray | BaseRecord"
    indices: np.ndarray
    columns: int
    kind: ClassVar[str] = "sparse24"
    stored: ClassVar[tuple[str, ...]] = ("values", "indices")

    def __post_init__(self):
        check_columns(self.columns, 4)
        if self.columns % 4:
            raise ValueError(f"2:4 sparsity needs a multiple of 4 columns, got {self.columns}")
        rows = row_count("indices", self.indices)
        check_factor("values", self.values, (rows, self.columns // 2))
        check_packed("indices", self.indices, rows, self.columns // 4, 4)
        if not _PAIRS[unpack_bits(self.indices, 4, self.columns // 4)].all():
            raise ValueError("indices: a nibble does not name two different columns in ascending order")

    @classmethod
    def compress(cls, W: np.ndarray, mask: np.ndarray | None = None, dtype: str = "float16"):
        """Keep the two weights of each four that the mask names.

        Parameters
        ----------
        W : (out, in) float
        mask : (out, in) bool, at most two True in each four; None = where W is not 0 (which drops the sign of -0.0)
        dtype : str
            float16 (values are rounded to nearest, ties to even) or float32.

        Notes
        -----
        A group with fewer than two kept columns is filled up with column 2, else 3, and the value 0 there, so that
        none, {2} and {3} are all stored as (2, 3): what NVIDIA's converters write.
        """
        mask = W != 0 if mask is None else np.asarray(mask, bool)
        if W.ndim != 2 or W.shape[1] % 4 or mask.shape != W.shape:
            raise ValueError(
                f"2:4 needs [out, in] with in a multiple of 4 and a mask alike, got {W.shape}, {mask.shape}"
            )
        kept = mask.reshape(W.shape[0], -1, 4)
        if (kept.sum(axis=-1) > 2).any():
            raise ValueError("more than two kept weights in a group of four columns")
        fill = np.array([4, 3, 1, 2])  # the order in which unkept columns are taken: 2, 3, 1, 0
        chosen = np.sort(np.argsort(np.where(kept, 0, fill), axis=-1, kind="stable")[..., :2], axis=-1)
        values = np.take_along_axis(np.where(mask, W, 0).reshape(kept.shape), chosen, axis=-1)
        indices = pack_bits(chosen[..., 0] | chosen[..., 1] << 2, 4)
        return cls(as_float(values.reshape(W.shape[0], -1), dtype), indices, W.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.indices.shape[0], self.columns

    def pairs(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """Places of the kept columns of some rows among their four, (k, in / 2) uint8."""
        return unpack_bits(self.indices[ids], 2, self.columns // 2)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        return self._spread(rows_of(self.values, ids), ids)

    def whole(self, ids: np.ndarray | slice) -> Whole | None:
        """Some rows as whole numbers, if the kept ones are such without a minimum."""
        kept = self.values.whole(ids) if isinstance(self.values, BaseRecord) else None
        if kept is None or kept.low is not None:
            return None
        return Whole(self._spread(kept.numbers, ids), kept.scale, run=BLOCK)

    def _spread(self, kept: np.ndarray, ids: np.ndarray | slice) -> np.ndarray:
        """Numbers (k, in / 2) of some rows at their places, (k, in) float32."""
        chosen = self.pairs(ids).reshape(-1, self.columns // 4, 2)
        out = np.zeros((*chosen.shape[:2], 4), np.float32)
        np.put_along_axis(out, chosen.astype(np.intp), kept.reshape(chosen.shape), axis=-1)
        return out.reshape(len(out), self.columns)


@dataclass(frozen=True, eq=False)
class SparseBitmask(BaseRecord):
    """Unstructured sparsity: one bit per weight, the kept values in row-major order.

    Parameters
    ----------
    values : (kept,) float16 or float32, or a record whose elements in row-major order are the values
    bitmask : (out, ceil(columns / 8)) uint8
        1 = kept, low bit first.
    row_offsets : (out,) uint32
        Where the values of each row begin.
    columns : int
    """

    values: "np.ndarray | BaseRecord"
    bitmask: np.ndarray
    row_offsets: np.ndarray
    columns: int
    kind: ClassVar[str] = "bitmask"
    stored: ClassVar[tuple[str, ...]] = ("values", "bitmask", "row_offsets")

    def __post_init__(self):
        check_columns(self.columns)
        rows = row_count("bitmask", self.bitmask)
        check_packed("bitmask", self.bitmask, rows, self.columns, 1)
        check_array("row_offsets", self.row_offsets, (np.uint32,), (rows,))
        counts = np.bitwise_count(self.bitmask).sum(axis=1, dtype=np.int64)
        if not np.array_equal(self.row_offsets, np.cumsum(counts) - counts):
            raise ValueError("row_offsets do not follow from the bitmask")
        kept = int(counts.sum())
        if isinstance(self.values, BaseRecord):
            size = self.values.shape[0] * self.values.shape[1]
            if size != kept:
                raise ValueError(f"values must hold the {kept} weights the bitmask keeps, got {self.values.shape}")
        else:
            check_array("values", self.values, FLOATS, (kept,))

    @classmethod
    def compress(cls, W: np.ndarray, mask: np.ndarray | None = None, dtype: str = "float16"):
        """Keep the weights the mask names.

        Parameters
        ----------
        W : (out, in) float
        mask : (out, in) bool; None = where W is not 0 (which drops the sign of -0.0)
        dtype : str
            float16 (values are rounded to nearest, ties to even) or float32.
        """
        mask = W != 0 if mask is None else np.asarray(mask, bool)
        if W.ndim != 2 or mask.shape != W.shape:
            raise ValueError(f"weight and mask must be [out, in] alike, got {W.shape}, {mask.shape}")
        counts = mask.sum(axis=1)
        if counts.sum() >= 1 << 32:
            raise ValueError(f"row offsets are 32-bit, {counts.sum()} values are too many")
        offsets = (np.cumsum(counts) - counts).astype(np.uint32)
        return cls(as_float(W[mask], dtype), pack_bits(mask.astype(np.uint8), 1), offsets, W.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.bitmask.shape[0], self.columns

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        mask = unpack_bits(self.bitmask[ids], 1, self.columns).astype(bool)
        counts = mask.sum(axis=1)
        where = np.repeat(self.row_offsets[ids] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        values = self.values.dense().ravel() if isinstance(self.values, BaseRecord) else self.values
        out = np.zeros(mask.shape, np.float32)
        out[mask] = values[where]
        return out


@dataclass(frozen=True, eq=False)
class SparseRows(BaseRecord):
    """A few kept weights: their columns, row after row (CSR with counts in place of pointers).

    Beside a bitmask this pays below about one weight in ten: a kept weight costs its value and its column, the others
    nothing.

    Parameters
    ----------
    values : (kept,) float16 or float32
    indices : (kept,) uint8, uint16 or uint32
        The column of each, ascending within a row; the smallest type that has room for columns - 1.
    counts : (out,) uint8, uint16 or uint32
        Kept in each row; the smallest type that has room for the largest.
    columns : int
    """

    values: np.ndarray
    indices: np.ndarray
    counts: np.ndarray
    columns: int
    kind: ClassVar[str] = "sparse_rows"
    stored: ClassVar[tuple[str, ...]] = ("values", "indices", "counts")

    def __post_init__(self):
        check_columns(self.columns)
        if np.ndim(self.counts) != 1 or self.counts.size == 0 or self.counts.dtype.kind != "u":
            raise ValueError(f"counts must be one unsigned integer a row, got shape {np.shape(self.counts)}")
        check_array("counts", self.counts, (smallest_unsigned(int(self.counts.max())),), self.counts.shape)
        kept = int(self.counts.sum(dtype=np.int64))
        check_array("values", self.values, FLOATS, (kept,))
        check_array("indices", self.indices, (smallest_unsigned(self.columns - 1),), (kept,))
        if kept and self.indices.max() >= self.columns:
            raise ValueError(f"indices must name one of {self.columns} columns, got {self.indices.max()}")
        if (np.diff(self.places) <= 0).any():
            raise ValueError("indices must ascend within every row")

    @classmethod
    def compress(cls, W: np.ndarray, mask: np.ndarray, dtype: str = "float16"):
        """Keep the weights that the mask (out, in) names; values are rounded to dtype as in SparseBitmask."""
        if W.ndim != 2 or mask.shape != W.shape:
            raise ValueError(f"weight and mask must be [out, in] alike, got {W.shape}, {mask.shape}")
        counts, (_, indices) = mask.sum(axis=1), np.nonzero(mask)
        return cls(
            as_float(W[mask], dtype),
            indices.astype(smallest_unsigned(W.shape[1] - 1)),
            counts.astype(smallest_unsigned(int(counts.max()))),
            W.shape[1],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.counts), self.columns

    @cached_property
    def ends(self) -> np.ndarray:
        """Where the values of each row end, (out,) int64."""
        return np.cumsum(self.counts, dtype=np.int64)

    @cached_property
    def places(self) -> np.ndarray:
        """The place of each value in the row-major matrix, (kept,) int64."""
        return np.repeat(np.arange(len(self.counts)), self.counts) * self.columns + self.indices

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        numbers = np.arange(len(self.counts))[ids]
        counts = self.counts[numbers].astype(np.int64)
        where = np.repeat(self.ends[numbers] - np.cumsum(counts), counts) + np.arange(counts.sum())
        out = np.zeros((len(numbers), self.columns), np.float32)
        out[np.repeat(np.arange(len(numbers)), counts), self.indices[where]] = self.values[where]
        return out

    def product(self, x: np.ndarray) -> np.ndarray:
        """x W^T of the kept weights alone, each row's in ascending order: (tokens, in) -> (tokens, out), type of x."""
        y = np.zeros((len(x), len(self.counts)), x.dtype)
        filled = np.flatnonzero(self.counts)
        if filled.size:
            terms = x[:, self.indices] * self.values.astype(x.dtype)
            y[:, filled] = np.add.reduceat(terms, (self.ends - self.counts)[filled], axis=1)
        return y


def smallest_unsigned(most: int) -> np.dtype:
    """The smallest unsigned type that has room for a number.

    Examples
    --------
    >>> smallest_unsigned(255), smallest_unsigned(256)
    (dtype('uint8'), dtype('uint16'))
    """
    return np.dtype(next(t for t in (np.uint8, np.uint16, np.uint32) if most <= np.iinfo(t).max))


@dataclass(frozen=True, eq=False)
class Plain(BaseRecord):
    """A matrix of floats as a record: so that halves have a tile product, and can be stored beside codes.

    Parameters
    ----------
    values : (out, in) float16 or float32
    """

    values: np.ndarray
    kind: ClassVar[str] = "plain"
    stored: ClassVar[tuple[str, ...]] = ("values",)

    def __post_init__(self):
        check_array("values", self.values, FLOATS, (row_count("values", self.values), self.values.shape[1]))
        check_columns(self.values.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        return self.values[ids].astype(np.float32)


def as_factor(part: "np.ndarray | BaseRecord") -> "np.ndarray | BaseRecord":
    """A stored matrix as products take it: a float32 array, or a record."""
    return Plain(part) if isinstance(part, np.ndarray) and part.dtype == np.float16 else part


@dataclass(frozen=True, eq=False)
class LowRank(BaseRecord):
    """weight = A B, applied as two products.

    Parameters
    ----------
    A : (out, rank) float16 or float32, or a record of that shape
    B : (rank, in) float16 or float32, or a record of that shape
    """

    A: "np.ndarray | BaseRecord"
    B: "np.ndarray | BaseRecord"
    kind: ClassVar[str] = "lowrank"
    stored: ClassVar[tuple[str, ...]] = ("A", "B")

    def __post_init__(self):
        for name, factor in (("A", self.A), ("B", self.B)):
            shape = getattr(factor, "shape", ())
            if len(shape) != 2 or 0 in shape:
                raise ValueError(f"{name} must be a non-empty matrix, got shape {shape}")
            check_factor(name, factor, shape)
        if self.A.shape[1] != self.B.shape[0]:
            raise ValueError(f"the ranks of A {self.A.shape} and B {self.B.shape} differ")

    @cached_property
    def factors(self) -> tuple:
        """A and B as products take them: float32 arrays, or records."""
        return tuple(map(as_factor, (self.A, self.B)))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.A.shape[0], self.B.shape[1]

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        return rows_of(self.A, ids) @ rows_of(self.B, ALL)


@dataclass(frozen=True, eq=False)
class Sum(BaseRecord):
    """weight = first + second, applied as two products: codes and a low-rank repair, codes and a few kept values.

    Parameters
    ----------
    first, second : (out, in) float16 or float32, or a record of that shape
    """

    first: "np.ndarray | BaseRecord"
    second: "np.ndarray | BaseRecord"
    kind: ClassVar[str] = "sum"
    stored: ClassVar[tuple[str, ...]] = ("first", "second")

    def __post_init__(self):
        shape = getattr(self.first, "shape", ())
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"first must be a non-empty matrix, got shape {shape}")
        check_factor("first", self.first, shape)
        check_factor("second", self.second, shape)

    @cached_property
    def terms(self) -> tuple:
        """Both parts as products take them: float32 arrays, or records."""
        return tuple(map(as_factor, (self.first, self.second)))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.first.shape

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        return rows_of(self.first, ids) + rows_of(self.second, ids)
