"""Records of weights that say which of their inputs count: the others are taken as zero, and their columns not read.

    ThresholdInputs   |x| above a threshold found in calibration
    PatternInputs     the n best of every m consecutive inputs, or blocks of inputs

What a column of the weight costs to read is saved where its input is zero for every token of the call.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refllm.kernels.masks import keep_n_of_m
from refllm.kernels.packed.base import BaseRecord, check_array
from refllm.kernels.packed.inputs import FORMS, RoundedInputs


class KeptInputs(RoundedInputs):
    """What the two have in common."""

    def kept(self, x: np.ndarray) -> np.ndarray:
        """Which inputs count, (tokens, in) bool; NaN does.

        Parameters
        ----------
        x : (tokens, in) float32
        """
        raise NotImplementedError

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        """See RoundedInputs.steps: floats, the scale 1."""
        return np.where(self.kept(x), x, np.float32(0)), np.ones((len(x), 1), np.float32), None

    def columns_read(self, x: np.ndarray) -> int:
        """Columns of the weight that some token of a call needs."""
        return int(self.kept(x).any(axis=0).sum())

    def bytes_read(self, x: np.ndarray) -> int:
        """Bytes of the weight that a call reads: its columns' share, rounded up, of all that is stored for it."""
        return -(-self.weight.nbytes * self.columns_read(x) // self.shape[1])


@dataclass(frozen=True, eq=False)
class ThresholdInputs(KeptInputs):
    """Inputs above a threshold count.

    Parameters
    ----------
    weight : record
    threshold : (1, 1) float32, not negative
        |x| = threshold does not count.
    """

    weight: BaseRecord
    threshold: np.ndarray
    kind: ClassVar[str] = "threshold_inputs"
    stored: ClassVar[tuple[str, ...]] = ("weight", "threshold")

    def _check(self) -> None:
        check_array("threshold", self.threshold, (np.float32,), (1, 1))
        if self.threshold < 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold.item()}")

    def kept(self, x: np.ndarray) -> np.ndarray:
        """See KeptInputs.kept."""
        return ~(np.abs(x) <= self.threshold)


@dataclass(frozen=True, eq=False)
class PatternInputs(KeptInputs):
    """The n best of every m units of consecutive inputs count.

    Parameters
    ----------
    weight : record
    factor : (1, in) float32, not negative, or None
        An input's score is |x| times its factor.
    n, m : int
        1 <= n <= m.
    block : int
        Inputs of a unit, whose score is the root of the sum of squares; 1: each by itself.
    bits : int
        2 to 8: what counts is rounded, token by token, with a scale of what counts alone. 0: it stays as it is.
    """

    weight: BaseRecord
    factor: np.ndarray | None
    n: int
    m: int
    block: int
    bits: int = 0
    kind: ClassVar[str] = "pattern_inputs"
    stored: ClassVar[tuple[str, ...]] = ("weight", "factor")
    optional: ClassVar[tuple[str, ...]] = ("factor",)

    def _check(self) -> None:
        width = self.shape[1]
        if not 1 <= self.n <= self.m or self.block < 1:
            raise ValueError(f"n:m needs 1 <= n <= m and blocks of at least 1, got {self.n}:{self.m} of {self.block}")
        if self.bits and f"int{self.bits}" not in FORMS:
            raise ValueError(f"bits of inputs must be 2 to 8, or 0 for none, got {self.bits}")
        if width % (self.m * self.block):
            raise ValueError(
                f"{self.n}:{self.m} inputs in blocks of {self.block} need a multiple of {self.m * self.block} columns, "
                f"got {width}"
            )
        if self.factor is not None:
            check_array("factor", self.factor, (np.float32,), (1, width))
            if (self.factor < 0).any():
                raise ValueError(f"factor must not be negative, got {self.factor.min()}")

    def kept(self, x: np.ndarray) -> np.ndarray:
        """See KeptInputs.kept. Among equals the lower index counts."""
        score = np.abs(x).astype(np.float64) * (1 if self.factor is None else self.factor)
        units = np.sqrt((score.reshape(len(x), -1, self.block) ** 2).sum(axis=2)) if self.block > 1 else score
        units = np.where(np.isnan(units), np.inf, units)  # a NaN is kept, so that it shows
        return np.repeat(keep_n_of_m(units[:, ::-1], self.n, self.m)[:, ::-1], self.block, axis=1)

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        """See RoundedInputs.steps."""
        steps, scale, zero = super().steps(x)
        return FORMS[f"int{self.bits}"].steps(steps) if self.bits else (steps, scale, zero)
