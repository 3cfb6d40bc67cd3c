"""The record of binary weights with a second bit: signs around levels that a row has for every block of columns."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.packed.base import ALL, BaseRecord, check_array, check_columns, check_packed, row_count

NEAR, FAR, SALIENT = range(3)  # groups of the weights of a row in a block
HALF = (np.dtype(np.float16),)


@dataclass(frozen=True, eq=False)
class BinaryBlocks(BaseRecord):
    """Two bits a weight, and for each row and block of columns seven numbers that say what they mean.

        salient column    w = mean[SALIENT] +- scale[SALIENT] +- scale[3]       by both bits
        another column    w = mean[g] +- scale[g]                               g = FAR where the second bit is set

    Sums are taken from left to right, each rounded to float32.

    Parameters
    ----------
    signs : (out, ceil(columns / 8)) uint8
        1 = plus; bit order of refllm.formats.bits.
    second : (out, ceil(columns / 8)) uint8
        In a salient column the sign of the second scale; elsewhere 1 = FAR.
    salient : (1, ceil(columns / 8)) uint8
        1 = salient, for all rows.
    mean : (out, blocks, 3) float16
        Of NEAR, FAR and SALIENT.
    scale : (out, blocks, 4) float16
        Of NEAR, FAR and SALIENT, and the second one of SALIENT.
    block : int
        Columns that share means and scales; the last block may have fewer.
    columns : int

    References
    ----------
    Huang et al. 2024, "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs", arXiv:2402.04291.
    """

    signs: np.ndarray
    second: np.ndarray
    salient: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    block: int
    columns: int
    kind: ClassVar[str] = "binary blocks"
    stored: ClassVar[tuple[str, ...]] = ("signs", "second", "salient", "mean", "scale")

    def __post_init__(self):
        check_columns(self.columns)
        if self.block < 1:
            raise ValueError(f"block must be at least 1 column, got {self.block}")
        rows, blocks = row_count("signs", self.signs), -(-self.columns // self.block)
        check_packed("signs", self.signs, rows, self.columns, 1)
        check_packed("second", self.second, rows, self.columns, 1)
        check_packed("salient", self.salient, 1, self.columns, 1)
        check_array("mean", self.mean, HALF, (rows, blocks, 3))
        check_array("scale", self.scale, HALF, (rows, blocks, 4))

    @classmethod
    def pack(
        cls,
        signs: np.ndarray,
        second: np.ndarray,
        salient: np.ndarray,
        mean: np.ndarray,
        scale: np.ndarray,
        block: int,
    ):
        """From bits (out, in), (out, in) and (in,), bool; the other parameters are the fields."""
        bits = [pack_bits(np.atleast_2d(plane).astype(np.uint8), 1) for plane in (signs, second, salient)]
        return cls(*bits, mean, scale, block, signs.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.signs.shape[0], self.columns

    def unpacked(self, ids: np.ndarray | slice = ALL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Signs and second bits of some rows, (k, in) bool, and the salient columns, (in,) bool."""
        planes = self.signs[ids], self.second[ids], self.salient[0]
        return tuple(unpack_bits(plane, 1, self.columns).astype(bool) for plane in planes)

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        signs, second, salient = self.unpacked(ids)
        group = np.where(salient, SALIENT, np.where(second, FAR, NEAR))
        block = np.arange(self.columns) // self.block

        def of_weights(levels, place):
            flat = levels[ids].astype(np.float32).reshape(len(signs), levels.shape[1] * levels.shape[2])
            return np.take_along_axis(flat, block * levels.shape[2] + place, axis=1)

        scale = of_weights(self.scale, group)
        out = of_weights(self.mean, group) + np.where(signs, scale, -scale)
        more = of_weights(self.scale, np.full(group.shape, 3))[:, salient]
        out[:, salient] += np.where(second[:, salient], more, -more)
        return out
