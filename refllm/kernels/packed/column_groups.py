"""The record of EXL2: groups of columns of different widths and bits, with 4-bit levels under one scale a group."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, packed_size, padding_is_zero, unpack_bits
from refllm.kernels.packed.base import ALL, BaseRecord, check_array, check_packed, row_count

LEVEL_BITS = 4
UNIT = np.float32(1 / 256)  # of squared levels: (level / 16)^2


@dataclass(frozen=True, eq=False)
class ColumnGroups(BaseRecord):
    """weight = (code - 2^(bits - 1)) * level^2 * scale / 256, bits and scale those of the column's group.

    The step of a row in a group, level^2 * scale / 256, is exact in float32; the product with the code is rounded.

    Parameters
    ----------
    codes : (out, bytes) uint8
        The groups one after another, each padded with zero bits to whole bytes; bit order of refllm.formats.bits.
    level : (groups, ceil(out / 2)) uint8
        4 bits each, the level of a row less 1: 1 to 16 are meant.
    scale : (groups,) float16
    groups : (groups, 2) uint16
        Bits of a code, 2 to 8, and columns.

    References
    ----------
    turboderp-org/exllamav2, the EXL2 format, which keeps the same numbers.
    """

    codes: np.ndarray
    level: np.ndarray
    scale: np.ndarray
    groups: np.ndarray
    kind: ClassVar[str] = "column groups"
    stored: ClassVar[tuple[str, ...]] = ("codes", "level", "scale", "groups")

    def __post_init__(self):
        rows, count = row_count("codes", self.codes), row_count("groups", self.groups)
        check_array("groups", self.groups, (np.uint16,), (count, 2))
        bits, columns = self.groups[:, 0], self.groups[:, 1]
        if bits.min() < 2 or bits.max() > 8 or columns.min() < 1:
            raise ValueError(
                f"groups must be of 2 to 8 bits and at least 1 column, got {bits.min()} to {bits.max()} bits, "
                f"{columns.min()} columns"
            )
        check_array("codes", self.codes, (np.uint8,), (rows, int(self._places[-1, 1])))
        for (b, n), (first, last) in zip(self.groups.tolist(), self._places, strict=True):
            if not padding_is_zero(self.codes[:, first:last], b, n):
                raise ValueError(f"codes: bits after the last of {n} codes of {b} bits are not zero")
        check_packed("level", self.level, count, rows, LEVEL_BITS)
        check_array("scale", self.scale, (np.dtype(np.float16),), (count,))

    @classmethod
    def pack(cls, codes: np.ndarray, level: np.ndarray, scale: np.ndarray, groups: list[tuple[int, int]]):
        """From codes (out, in), levels 1 to 16 (groups, out), scale (groups,) float16, and (bits, columns) of each."""
        ends = np.cumsum([n for _, n in groups])
        parts = [pack_bits(codes[:, end - n : end], b) for (b, n), end in zip(groups, ends, strict=True)]
        packed_level = pack_bits(level.astype(np.uint8) - np.uint8(1), LEVEL_BITS)
        return cls(np.concatenate(parts, axis=1), packed_level, scale, np.array(groups, np.uint16))

    @cached_property
    def _places(self) -> np.ndarray:
        """First byte of every group and the one after its last, (groups, 2)."""
        ends = np.cumsum([packed_size(n, b) for b, n in self.groups.tolist()])
        return np.stack([np.append(0, ends[:-1]), ends], axis=1)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], int(self.groups[:, 1].sum(dtype=np.int64))

    def levels(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """Levels of some rows, 1 to 16, (groups, k) uint8."""
        return unpack_bits(self.level, LEVEL_BITS, len(self.codes))[:, ids] + np.uint8(1)

    def unpacked(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """The codes of some rows, (k, in) uint8."""
        some, groups = self.codes[ids], zip(self.groups.tolist(), self._places, strict=True)
        return np.concatenate([unpack_bits(some[:, first:last], b, n) for (b, n), (first, last) in groups], axis=1)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        bits, columns = self.groups.astype(np.int64).T
        step = self.levels(ids).astype(np.float32) ** 2 * (self.scale.astype(np.float32) * UNIT)[:, None]
        middle = np.repeat(np.float32(2) ** (bits - 1), columns).astype(np.float32)
        return (self.unpacked(ids).astype(np.float32) - middle) * np.repeat(step.T, columns, axis=1)
