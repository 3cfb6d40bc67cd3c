"""The record of vector quantisation: a code names a vector of some columns, and several codebooks may be added."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.packed.base import ALL, FLOATS, BaseRecord, check_array, check_columns, check_packed, row_count

MOST_BOOKS = 8  # added to one vector: a compiled product names each of them
MOST_VECTORS = 1 << 16


@dataclass(frozen=True, eq=False)
class VectorWeight(BaseRecord):
    """Codes of vectors: columns d j .. d j + d - 1 of row r are

        scale[r, group of columns] * (codebooks[s, 0, code[r, j, 0]] + codebooks[s, 1, code[r, j, 1]] + ...)

    where s is the span of columns that j lies in; all spans are equally wide. Vectors are added in float32, in order.

        spans = 1, books = 1     plain vector quantisation
        spans = 1, books > 1     residual and additive quantisation (AQLM)
        spans > 1, books = 1     product quantisation: every d columns (or span of them) have a codebook of their own

    Parameters
    ----------
    codes : (out, ceil(columns / d * books * bits / 8)) uint8
        For each vector its codes, one a book; bit order of refllm.formats.bits. `bits` follows from the number of
        vectors: ceil(log2(vectors)), at least 1.
    codebooks : (spans, books, vectors, d) float16 or float32
        Up to 8 books of up to 65536 vectors.
    scale : (out, groups) float16 or float32, or None: no scale
        Groups are equally wide and hold whole vectors.
    columns : int

    References
    ----------
    Jegou et al. 2011, "Product Quantization for Nearest Neighbor Search"; Egiazarian et al. 2024, "Extreme Compression
    of Large Language Models via Additive Quantization" (AQLM), arXiv:2401.06118.
    """

    codes: np.ndarray
    codebooks: np.ndarray
    scale: np.ndarray | None
    columns: int
    kind: ClassVar[str] = "vectors"
    stored: ClassVar[tuple[str, ...]] = ("codes", "codebooks", "scale")
    optional: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self):
        shape = np.shape(self.codebooks)
        if len(shape) != 4 or 0 in shape or shape[1] > MOST_BOOKS or shape[2] > MOST_VECTORS:
            most = f"at most {MOST_BOOKS} books of {MOST_VECTORS} vectors"
            raise ValueError(f"codebooks must be [spans, books, vectors, d], {most}, got {shape}")
        check_array("codebooks", self.codebooks, FLOATS, shape)
        spans, books, vectors, d = shape
        check_columns(self.columns, d)
        if self.columns % (spans * d):
            raise ValueError(f"{self.columns} columns are not {spans} equal spans of vectors of {d}")
        rows = row_count("codes", self.codes)
        check_packed("codes", self.codes, rows, self.columns // d * books, self.bits)
        if vectors < 1 << self.bits and (top := self.unpacked().max()) >= vectors:
            raise ValueError(f"codes must name one of {vectors} vectors, got {top}")
        if self.scale is not None:
            groups = self.scale.shape[1] if np.ndim(self.scale) == 2 else 1
            check_array("scale", self.scale, FLOATS, (rows, groups))
            if groups == 0 or self.columns % (groups * d):
                raise ValueError(f"{self.columns} columns are not {groups} equal groups of vectors of {d}")

    @classmethod
    def pack(cls, codes: np.ndarray, codebooks: np.ndarray, scale: np.ndarray | None):
        """From codes (out, columns / d, books), integers; the other parameters are the fields."""
        if np.ndim(codes) != 3 or np.ndim(codebooks) != 4 or codes.shape[2] != codebooks.shape[1]:
            raise ValueError(
                "codes must be [out, columns / d, books] and codebooks [spans, books, vectors, d], "
                f"got {np.shape(codes)} and {np.shape(codebooks)}"
            )
        vectors, d = codebooks.shape[2:]
        packed = pack_bits(codes.reshape(len(codes), -1), code_bits(vectors))
        return cls(packed, codebooks, scale, codes.shape[1] * d)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return code_bits(self.codebooks.shape[2])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.columns

    @property
    def spans(self) -> np.ndarray:
        """The span of each vector of a row, (columns / d,)."""
        spans, _, _, d = self.codebooks.shape
        return np.repeat(np.arange(spans), self.columns // (spans * d))

    def unpacked(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The codes of some rows, (k, columns / d, books) uint8, or uint16 for more than 8 bits."""
        _, books, _, d = self.codebooks.shape
        across = self.columns // d
        return unpack_bits(self.codes[ids], self.bits, across * books).reshape(-1, across, books)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        codes, spans = self.unpacked(ids), self.spans
        total = np.zeros((*codes.shape[:2], self.codebooks.shape[3]), np.float32)
        for m in range(codes.shape[2]):
            total += self.codebooks[spans, m, codes[..., m]]
        if self.scale is not None:
            scale = self.scale[ids].astype(np.float32)
            total = total.reshape(*scale.shape, self.columns // scale.shape[1]) * scale[..., None]
        return total.reshape(len(codes), self.columns)


def code_bits(vectors: int) -> int:
    """Bits of a code that names one of so many vectors.

    Examples
    --------
    >>> code_bits(256), code_bits(257), code_bits(1)
    (8, 9, 1)
    """
    return max(1, (vectors - 1).bit_length())
