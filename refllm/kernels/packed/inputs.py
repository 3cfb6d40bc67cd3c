"""Records of weights that say how their inputs are rounded: y = x^ W^T, and x^ is part of what is stored.

    TokenInputs     every token with a scale of its own: whole numbers of 2 to 8 bits, FP8 E4M3, or SPARK's code
    StaticInputs    whole numbers with one scale for everything, found in calibration
    PairInputs      outlier-victim pairs with such a scale
    OutlierInputs   int8 per token, except columns that hold an outlier: these stay as they are

All share one form, x^ = scale (steps - zero), which each gives with `steps`; how they are multiplied: rounded.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refllm.kernels.packed.activations import Rounding
from refllm.kernels.packed.base import FLOATS, BaseRecord, check_array
from refllm.kernels.pairs import round_pairs

E4M3, SPARK = "e4m3", "spark"
FORMS = {
    f"{sign}int{bits}": Rounding(bits, symmetric=not sign) for sign in ("", "u") for bits in range(2, 9)
}  # fmt: skip


class RoundedInputs(BaseRecord):
    """What all have in common: a weight that is a record itself."""

    weight: BaseRecord

    def __post_init__(self):
        if not isinstance(self.weight, BaseRecord) or isinstance(self.weight, RoundedInputs):
            raise ValueError(f"weight must be a packed record whose inputs are not rounded, got {_name(self.weight)}")
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        return self.weight.rows(ids)

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """x^ = scale (steps - zero).

        Parameters
        ----------
        x : (tokens, in) float32

        Returns
        -------
        steps : (tokens, in) int8, or float32 where they are not whole
        scale : (tokens, 1) float32; not finite for a token that holds NaN or Inf, so that its products are NaN
        zero : (tokens, 1) or (1, 1) float32, or None: 0
        """
        raise NotImplementedError

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """The inputs that the weight meets in place of x, (tokens, in) float32."""
        steps, scale, zero = self.steps(x)
        with np.errstate(invalid="ignore"):
            return (steps.astype(np.float32) - (np.float32(0) if zero is None else zero)) * scale


@dataclass(frozen=True, eq=False)
class TokenInputs(RoundedInputs):
    """Inputs rounded token by token.

    Parameters
    ----------
    weight : record
    form : str
        int2 ... int8: scale = amax / (2^(bits-1) - 1). uint2 ... uint8: scale = (max - min) / (2^bits - 1), 0 in the
        range, and a zero point per token. e4m3: scale = amax / 448 and the nearest number of FP8 E4M3. spark: scale =
        amax / 255 and the magnitudes that refllm.formats.spark makes of whole numbers.
    """

    weight: BaseRecord
    form: str
    kind: ClassVar[str] = "token_inputs"
    stored: ClassVar[tuple[str, ...]] = ("weight",)

    def _check(self) -> None:
        if self.form not in (*FORMS, E4M3, SPARK):
            raise ValueError(f"form of inputs must be {E4M3}, {SPARK} or one of {', '.join(FORMS)}, got {self.form!r}")

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """See RoundedInputs.steps."""
        if self.form in FORMS:
            return FORMS[self.form].steps(x)
        from refllm.formats.dtypes import FP8_E4M3FN
        from refllm.formats.spark import ROUNDED

        most = FP8_E4M3FN.max if self.form == E4M3 else len(ROUNDED) - 1
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(most)
        usable = np.isfinite(scale) & (scale > 0)
        steps = np.where(usable, x, 0) / np.where(usable, scale, np.float32(1))
        if self.form == E4M3:
            return FP8_E4M3FN.decode(FP8_E4M3FN.encode(steps)), scale, None
        whole = np.clip(np.rint(np.abs(steps)), 0, most).astype(np.uint8)  # a tiny scale is rounded, and so is amax
        return np.copysign(ROUNDED[whole].astype(np.float32), steps), scale, None


@dataclass(frozen=True, eq=False)
class StaticInputs(RoundedInputs):
    """Inputs rounded with one scale for all tokens and columns: nothing is measured at run time.

    Parameters
    ----------
    weight : record
    scale : (1, 1) float32, positive
    zero_point : (1, 1) uint8 below 2^bits, or None
        None: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1. Else codes from 0 to 2^bits - 1, and this one means 0.
    bits : int
        2 to 8.
    """

    weight: BaseRecord
    scale: np.ndarray
    zero_point: np.ndarray | None
    bits: int
    kind: ClassVar[str] = "static_inputs"
    stored: ClassVar[tuple[str, ...]] = ("weight", "scale", "zero_point")
    optional: ClassVar[tuple[str, ...]] = ("zero_point",)

    def _check(self) -> None:
        Rounding(self.bits)
        _check_scale(self.scale)
        if self.zero_point is not None:
            check_array("zero_point", self.zero_point, (np.uint8,), (1, 1))
            if self.zero_point >= 1 << self.bits:
                raise ValueError(f"zero_point must be below {1 << self.bits}, got {self.zero_point.item()}")

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """See RoundedInputs.steps."""
        middle = np.float32(1 << (self.bits - 1))
        finite = np.isfinite(x).all(axis=1, keepdims=True)
        scale = np.where(finite, self.scale, np.float32(np.nan))
        with np.errstate(over="ignore"):
            codes = np.rint(np.where(finite, x, 0) / self.scale)
        if self.zero_point is None:
            return np.clip(codes, 1 - middle, middle - 1).astype(np.int8), scale, None
        zero = self.zero_point.astype(np.float32) - middle
        return np.clip(codes + zero, -middle, middle - 1).astype(np.int8), scale, zero


@dataclass(frozen=True, eq=False)
class PairInputs(RoundedInputs):
    """Inputs as outlier-victim pairs of neighbouring columns (refllm.kernels.pairs), with one scale for everything.

    Parameters
    ----------
    weight : record
    scale : (1, 1) float32, positive
    """

    weight: BaseRecord
    scale: np.ndarray
    kind: ClassVar[str] = "pair_inputs"
    stored: ClassVar[tuple[str, ...]] = ("weight", "scale")

    def _check(self) -> None:
        _check_scale(self.scale)

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        """See RoundedInputs.steps; they are whole numbers up to 96."""
        finite = np.isfinite(x).all(axis=1, keepdims=True)
        with np.errstate(over="ignore"):
            values = round_pairs(np.where(finite, x, 0) / self.scale)
        return values.astype(np.int8), np.where(finite, self.scale, np.float32(np.nan)), None


@dataclass(frozen=True, eq=False)
class OutlierInputs(RoundedInputs):
    """Inputs in two parts: columns with an outlier as they are, all others as int8 with a scale per token.

        O = columns that hold a number with |x| >= threshold, in any token of the call, and the kept ones
        y = (int8 codes of the rest) . (int8 codes of the weight) + x[:, O] W[:, O]^T

    A token's scale is that of its numbers outside O's entries above the threshold, so one outlier does not cost all
    others their precision.

    Parameters
    ----------
    weight : record
    columns : (k,) int32, rising, or None
        Columns that never are rounded.
    kept : (out, k) float16, or None
        Their weights, in place of those of `weight`.
    threshold : float
        0 or less: there are no outliers.
    """

    weight: BaseRecord
    columns: np.ndarray | None
    kept: np.ndarray | None
    threshold: float
    kind: ClassVar[str] = "outlier_inputs"
    stored: ClassVar[tuple[str, ...]] = ("weight", "columns", "kept")
    optional: ClassVar[tuple[str, ...]] = ("columns", "kept")

    def _check(self) -> None:
        if np.isnan(self.threshold):
            raise ValueError("threshold must be a number, got NaN")
        if (self.columns is None) != (self.kept is None):
            raise ValueError("columns and kept weights come together or not at all")
        if self.columns is not None:
            out, width = self.shape
            check_array("columns", self.columns, (np.int32,), (np.size(self.columns),))
            if np.any(np.diff(self.columns) <= 0) or not (0 <= self.columns.min() and self.columns.max() < width):
                raise ValueError(f"columns must rise and lie in [0, {width})")
            check_array("kept", self.kept, FLOATS[:1], (out, len(self.columns)))

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows, (k, in) float32."""
        rows = self.weight.rows(ids)
        if self.columns is not None:
            rows[:, self.columns] = self.kept[ids]
        return rows

    def outliers(self, x: np.ndarray) -> np.ndarray:
        """Which columns of the weight are not rounded in this call, beside those it never rounds: (in,) bool."""
        found = (np.abs(x) >= self.threshold).any(axis=0) if self.threshold > 0 else np.zeros(x.shape[1], bool)
        if self.columns is not None:
            found[self.columns] = False
        return found

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        """See RoundedInputs.steps; columns that are not rounded have steps of 0."""
        rest = np.where(np.abs(x) >= self.threshold, np.float32(0), x) if self.threshold > 0 else x.copy()
        if self.columns is not None:
            rest[:, self.columns] = 0
        codes, amax = vector_wise(rest)
        codes[:, self.outliers(x)] = 0
        return codes, amax / np.float32(127), None

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """See RoundedInputs.rounded."""
        out, exact = super().rounded(x), self.outliers(x)
        if self.columns is not None:
            exact[self.columns] = True
        out[:, exact] = x[:, exact]
        return out


def vector_wise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 row by row, with the reciprocal multiplied as bitsandbytes does: q = rint(x (127 (1 / amax))).

    Parameters
    ----------
    x : (rows, columns) float32

    Returns
    -------
    codes : (rows, columns) int8
    amax : (rows, 1) float32
        0 for a row of zeros; not finite for a row that holds NaN or Inf, whose codes are 0.

    References
    ----------
    Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 2; the order of the operations is that of
    bitsandbytes on the CPU.

    Examples
    --------
    >>> codes, amax = vector_wise(np.array([[-2.0, 1.0, 0.0]], np.float32))
    >>> codes.tolist(), amax.tolist()
    ([[-127, 64, 0]], [[2.0]])
    """
    amax = np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        factor = np.float32(127) * (np.float32(1) / np.where(amax > 0, amax, np.float32(1)))
    usable = np.isfinite(amax) & (amax > 0) & np.isfinite(factor)
    codes = np.rint(np.where(usable, x, 0) * np.where(usable, factor, np.float32(0)))
    return codes.astype(np.int8), amax


def _check_scale(scale: object) -> None:
    check_array("scale", scale, (np.float32,), (1, 1))
    if not scale > 0:
        raise ValueError(f"the scale of inputs must be positive, got {scale.item()}")


def _name(weight: object) -> str:
    return getattr(weight, "kind", type(weight).__name__)
