"""Weights of 4 bits under 8 bits: small integer scales that decode to int8, and one float scale a row above them."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.grids import PER_TENSOR, group_count
from refllm.kernels.packed.base import ALL, BaseRecord, Whole, check_array, check_columns, check_packed, row_count
from refllm.kernels.packed.quantized import IntWeight

BITS = 4  # of codes, levels and zero points


@dataclass(frozen=True, eq=False)
class TwoLevel(BaseRecord):
    """weight = scale * (code * level - zero_point * level); what stands in brackets is an int8.

    Parameters
    ----------
    codes : (out, ceil(columns / 2)) uint8
        Of 4 bits, bit order of refllm.formats.bits.
    level : (out, ceil(groups / 2)) uint8, packed like the codes
        The integer scale of a group less 1: 1 to 16 are meant.
    zero_point : (out, ceil(groups / 2)) uint8, packed like the codes
    scale : (out, 1) float16
        Of a row.
    group_size : int
        g columns, or -1: a row.
    columns : int
    """

    codes: np.ndarray
    level: np.ndarray
    zero_point: np.ndarray
    scale: np.ndarray
    group_size: int
    columns: int
    kind: ClassVar[str] = "two level"
    stored: ClassVar[tuple[str, ...]] = ("codes", "level", "zero_point", "scale")

    def __post_init__(self):
        check_columns(self.columns)
        if self.group_size == PER_TENSOR:
            raise ValueError("group_size must be positive or -1 (a row), got 0")
        groups, rows = group_count(self.columns, self.group_size), row_count("codes", self.codes)
        check_packed("codes", self.codes, rows, self.columns, BITS)
        check_packed("level", self.level, rows, groups, BITS)
        check_packed("zero_point", self.zero_point, rows, groups, BITS)
        check_array("scale", self.scale, (np.dtype(np.float16),), (rows, 1))

    @classmethod
    def pack(cls, codes: np.ndarray, level: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, group_size: int):
        """From codes (out, in) uint8, levels 1 to 16 and zero points (out, groups), scale (out, 1) float16."""
        packed = [pack_bits(a.astype(np.uint8), BITS) for a in (codes, level - 1, zero_point)]
        return cls(*packed, scale, group_size, codes.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.columns

    def levels(self, ids: np.ndarray | slice = ALL) -> tuple[np.ndarray, np.ndarray]:
        """Integer scales and zero points of some rows, (k, groups) int32."""
        groups = group_count(self.columns, self.group_size)
        level, zero = (unpack_bits(a[ids], BITS, groups).astype(np.int32) for a in (self.level, self.zero_point))
        return level + 1, zero

    def int8(self, ids: np.ndarray | slice = ALL) -> np.ndarray:
        """What an int8 product reads of some rows, (k, in) int32: multiplied first, as codes fit into bytes then.

        Within -128 to 127 only if whoever made the record saw to it.
        """
        level, zero = self.levels(ids)
        codes = unpack_bits(self.codes[ids], BITS, self.columns).astype(np.int32)
        grouped = codes.reshape(*level.shape, self.columns // level.shape[1])
        return (grouped * level[..., None] - (zero * level)[..., None]).reshape(codes.shape)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32; 8 bits times 11 bits, so nothing is rounded."""
        return self.int8(ids).astype(np.float32) * self.scale[ids].astype(np.float32)

    def whole(self, ids: np.ndarray | slice) -> Whole:
        """Some rows as whole numbers, as kernels take them."""
        return self.flat.whole(ids)

    @cached_property
    def flat(self) -> IntWeight:
        """The same weight with one float scale a group, scale * level (exact in float32): what kernels multiply by.

        Codes and zero points are this record's own arrays.
        """
        level, _ = self.levels()
        scale = self.scale.astype(np.float32) * level.astype(np.float32)
        return IntWeight(self.codes, scale, self.zero_point, BITS, self.group_size, self.columns)
