"""The record of weights in codes of two lengths (SPARK): a sign, and a magnitude of four or eight bits."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.formats.spark import decode_rows, encode_rows
from refllm.kernels.packed.base import ALL, FLOATS, BaseRecord, check_array, check_columns, check_packed
from refllm.kernels.packed.sparse import smallest_unsigned


@dataclass(frozen=True, eq=False)
class SparkWeight(BaseRecord):
    """w = scale * magnitude, with a sign; magnitudes are coded as refllm.formats.spark says.

    Rows differ in length, and no row can be found without those before it: so their bytes are counted.

    Parameters
    ----------
    stream : (bytes,) uint8
        The magnitudes of all rows.
    row_bytes : (out,) uint8, uint16 or uint32
        Bytes of each row; the smallest type that has room for the largest.
    signs : (out, ceil(columns / 8)) uint8
        1 = negative, low bit first.
    scale : (out, groups) or, one for everything, (1, 1), float16 or float32
        Groups are equally wide.
    columns : int
    """

    stream: np.ndarray
    row_bytes: np.ndarray
    signs: np.ndarray
    scale: np.ndarray
    columns: int
    kind: ClassVar[str] = "spark"
    stored: ClassVar[tuple[str, ...]] = ("stream", "row_bytes", "signs", "scale")

    def __post_init__(self):
        check_columns(self.columns)
        if np.ndim(self.row_bytes) != 1 or self.row_bytes.size == 0 or self.row_bytes.dtype.kind != "u":
            raise ValueError(f"row_bytes must be one unsigned integer a row, got shape {np.shape(self.row_bytes)}")
        rows = len(self.row_bytes)
        check_array("row_bytes", self.row_bytes, (smallest_unsigned(int(self.row_bytes.max())),), (rows,))
        check_array("stream", self.stream, (np.uint8,), (int(self.row_bytes.sum(dtype=np.int64)),))
        check_packed("signs", self.signs, rows, self.columns, 1)
        groups = self.scale.shape[1] if np.ndim(self.scale) == 2 else 1
        check_array("scale", self.scale, FLOATS, (1, 1) if np.shape(self.scale) == (1, 1) else (rows, groups))
        if groups == 0 or self.columns % groups:
            raise ValueError(f"{self.columns} columns are not {groups} equal groups")
        decode_rows(self.stream, self.row_bytes, self.columns)

    @classmethod
    def pack(cls, magnitudes: np.ndarray, negative: np.ndarray, scale: np.ndarray):
        """From magnitudes (out, in) uint8, which their code may round, and negative (out, in) bool."""
        stream, row_bytes = encode_rows(magnitudes)
        row_bytes = row_bytes.astype(smallest_unsigned(int(row_bytes.max())))
        signs = pack_bits((negative & (magnitudes > 0)).astype(np.uint8), 1)
        return cls(stream, row_bytes, signs, scale, magnitudes.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.row_bytes), self.columns

    @cached_property
    def ends(self) -> np.ndarray:
        """Where the bytes of each row end, (out,) int64."""
        return np.cumsum(self.row_bytes, dtype=np.int64)

    def magnitudes(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The numbers of some rows, (k, in) uint8."""
        counts = self.row_bytes[ids].astype(np.int64)
        where = np.repeat(self.ends[ids] - np.cumsum(counts), counts) + np.arange(counts.sum())
        return decode_rows(self.stream[where], counts, self.columns)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        out = self.magnitudes(ids).astype(np.float32)
        np.negative(out, out=out, where=unpack_bits(self.signs[ids], 1, self.columns).astype(bool))
        scale = (self.scale if len(self.scale) == 1 else self.scale[ids]).astype(np.float32)
        groups = scale.shape[1]
        return (out.reshape(len(out), groups, self.columns // groups) * scale[..., None]).reshape(out.shape)
