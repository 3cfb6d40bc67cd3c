"""Integer grids: fit a scale (and a zero point), round to codes, and back.

    decode:  x^ = scale * (code - zero_point)             encode:  code = clip(rint(x / scale) + zero_point)

Grids of the published zoo, by their rule for scale and zero point; codes are stored unsigned, 0 .. 2^b - 1:

    SymmetricGrid   scale = amax / (2^(b-1) - 1)           zero_point = 2^(b-1), constant, not stored
                    q = code - 2^(b-1) in [-(2^(b-1) - 1), 2^(b-1) - 1]; the code 0 is never produced
    FullRangeGrid   scale = 2 amax / (2^b - 1)             zero_point = 2^(b-1), constant, not stored
                    q in [-2^(b-1), 2^(b-1) - 1]: both extremes lie half a step from their codes
    TwosGrid        scale = amax / 2^(b-1)                 zero_point = 2^(b-1), constant, not stored
                    q in [-2^(b-1), 2^(b-1) - 1]: -amax is exact, +amax saturates by one step
    AffineGrid      scale = (hi - lo) / (2^b - 1)          zero_point = clip(rint(-lo / scale), 0, 2^b - 1)
                    lo = min(x, 0), hi = max(x, 0): zero is always on the grid
    MinMaxGrid      the same with lo = min(x), hi = max(x), and hi - lo at least 1e-5

The scale is rounded to the type it is stored in *before* the zero point and the codes are computed, so that encoding
and decoding use the same number. In-range error is then at most scale / 2. rint is half to even, and every quotient is
rounded to float32 before it. In a full-range group amax / scale is a tie but for the rounding of the scale; in float32
most are to the bit, in float64 the last bit of the scale would decide. So float64 weights get float32's codes.

Degenerate groups: an all-zero group takes the scale of a group with amax 1 (GPTQ's rule); a scale that would round to
zero becomes the smallest number of its type; a scale beyond its type, NaN or Inf is a ValueError.

Symmetric: the absmax form of Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 2. Affine and full range:
the min-max and the symmetric grid of Frantar et al. 2022, "GPTQ", arXiv:2210.17323, as in its published code (there a
symmetric group without a negative number has the scale amax / (2^b - 1) and clips its upper half; not here). Twos: the
symmetric grid of Yao et al. 2022, "ZeroQuant", arXiv:2206.01861, as in DeepSpeed's code. MinMaxGrid: that of Lin et al.
2023, "AWQ", arXiv:2306.00978, as in its published code. Lesson: lessons/03-rounding-to-a-grid.md.
"""

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import numpy as np

SCALE_DTYPES = ("float16", "float32")
PER_CHANNEL = -1
PER_TENSOR = 0
COMMON_GROUP, LEAST_GROUP = 128, 8


def group_count(columns: int, group_size: int) -> int:
    """Groups along a row of `columns` weights.

    Parameters
    ----------
    columns : int
    group_size : int
        g > 0: g consecutive columns share a scale (g must divide columns); -1: a whole row; 0: the whole tensor.

    Examples
    --------
    >>> group_count(256, 64), group_count(256, -1), group_count(256, 0)
    (4, 1, 1)
    """
    if group_size < PER_CHANNEL:
        raise ValueError(f"group_size must be positive, -1 (per channel) or 0 (per tensor), got {group_size}")
    if group_size in (PER_CHANNEL, PER_TENSOR):
        return 1
    if columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {columns} columns of the weight")
    return columns // group_size


def group_for(columns: int, group_size: int | None) -> int:
    """group_size where it is given, else 128, or what 128 and the width have in common.

    Raises
    ------
    ValueError
        They have less than 8 in common; 0, for methods that need the groups of rows.

    Examples
    --------
    >>> group_for(4096, None), group_for(576, None), group_for(576, 32)
    (128, 64, 32)
    """
    if group_size == PER_TENSOR:
        raise ValueError("group_size must be positive or -1 (whole rows), got 0")
    if group_size is not None:
        return group_size
    common = gcd(COMMON_GROUP, columns)
    if common < LEAST_GROUP:
        raise ValueError(
            f"{columns} columns have no group of {LEAST_GROUP} to {COMMON_GROUP} in common with {COMMON_GROUP}; "
            "give a group_size that divides them"
        )
    return common


def grouped(W: np.ndarray, group_size: int) -> np.ndarray:
    """(out, in) -> (out, groups, g), or (1, 1, out * in) per tensor."""
    rows, columns = W.shape
    if group_size == PER_TENSOR:
        return W.reshape(1, 1, W.size)
    groups = group_count(columns, group_size)
    return W.reshape(rows, groups, columns // groups)


def checked_weight(W: np.ndarray) -> np.ndarray:
    """A weight that is an [out, in] matrix of finite float32 or float64, or ValueError."""
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if W.dtype not in (np.float32, np.float64):
        W = W.astype(np.float32)
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; quantization needs finite values")
    return W


def _stored_scale(scale: np.ndarray, scale_dtype: str) -> np.ndarray:
    """Round to the stored type; never zero, never infinite."""
    limits = np.finfo(scale_dtype)
    with np.errstate(over="ignore", under="ignore"):
        stored = scale.astype(scale_dtype)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"a scale of {scale.max():.6g} does not fit {scale_dtype} (largest {limits.max}); "
            "store scales as float32 or rescale the weight"
        )
    return np.maximum(stored, limits.smallest_subnormal)


def _amax(W: np.ndarray, group_size: int) -> np.ndarray:
    """Largest magnitude of every group, 1 where all are zero."""
    amax = np.abs(grouped(checked_weight(W), group_size)).max(axis=-1)
    amax[amax == 0] = 1
    return amax


def _quotient(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x / scale rounded to float32: a tie there is a tie for float64 weights, too."""
    with np.errstate(over="ignore"):  # a quotient beyond the float range clips like any other
        return (x / scale.astype(x.dtype)).astype(np.float32, copy=False)


@dataclass(frozen=True)
class _Grid:
    """What the grids share: encode and decode for any scale and zero point.

    Parameters
    ----------
    bits : int
        2 to 8.
    group_size : int
        g > 0 columns per scale, -1 = per channel (row), 0 = per tensor.
    scale_dtype : str
        float16 or float32: the type scales are stored in.
    """

    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "float16"
    lowest: ClassVar[int] = 0  # code

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_dtype!r}")
        group_count(0, self.group_size)  # the sign rule

    @property
    def offset(self) -> int:
        """The zero point of a symmetric grid: 2^(bits - 1)."""
        return 1 << (self.bits - 1)

    def _zero(self, zero_point: np.ndarray | None) -> np.ndarray:
        """As int32 that broadcasts over (out, groups, g): unsigned codes must not wrap when it is subtracted."""
        return np.int32(self.offset) if zero_point is None else np.asarray(zero_point).astype(np.int32)[..., None]

    def encode(self, W: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None) -> np.ndarray:
        """Round to the nearest code.

        Parameters
        ----------
        W : (out, in) float32 or float64
        scale : (out, groups) or, per tensor, (1, 1)
        zero_point : like scale, uint8; None for a symmetric grid

        Returns
        -------
        (out, in) uint8
        """
        W = checked_weight(W)
        steps = _quotient(grouped(W, self.group_size), scale[..., None])
        codes = np.rint(steps, out=steps)
        codes += self._zero(zero_point).astype(np.float32)
        np.clip(codes, self.lowest, (1 << self.bits) - 1, out=codes)
        return codes.astype(np.uint8).reshape(W.shape)

    def decode(self, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None) -> np.ndarray:
        """scale * (code - zero_point), float32: codes are exact, the product rounds once.

        Parameters
        ----------
        codes : (out, in) uint8
        scale, zero_point : as for encode

        Returns
        -------
        (out, in) float32
        """
        steps = grouped(codes, self.group_size).astype(np.int32) - self._zero(zero_point)
        return (steps.astype(np.float32) * scale.astype(np.float32)[..., None]).reshape(codes.shape)


@dataclass(frozen=True)
class SymmetricGrid(_Grid):
    """amax / (2^(b-1) - 1): zero in the middle, no zero point stored.

    Examples
    --------
    >>> grid = SymmetricGrid(bits=4, group_size=-1)
    >>> W = np.array([[7.0, -3.4, 0.0]])
    >>> scale, zero_point = grid.fit(W)
    >>> scale.tolist(), zero_point, grid.encode(W, scale).tolist()
    ([[1.0]], None, [[15, 5, 8]])
    """

    lowest: ClassVar[int] = 1

    def fit(self, W: np.ndarray) -> tuple[np.ndarray, None]:
        """Scales of a weight.

        Parameters
        ----------
        W : (out, in) float32 or float64, finite

        Returns
        -------
        scale : (out, groups) or, per tensor, (1, 1), of scale_dtype
        zero_point : None

        Raises
        ------
        ValueError
            NaN or Inf, a group that does not divide, a scale beyond scale_dtype.
        """
        amax = _amax(W, self.group_size)
        return _stored_scale(amax / amax.dtype.type(self.offset - 1), self.scale_dtype), None


@dataclass(frozen=True)
class FullRangeGrid(_Grid):
    """2 amax / (2^b - 1): zero in the middle, no zero point stored, every code in use.

    Examples
    --------
    >>> grid = FullRangeGrid(bits=2, group_size=-1)
    >>> W = np.array([[3.0, -3.0, 0.9]])
    >>> scale, zero_point = grid.fit(W)
    >>> scale.tolist(), zero_point, grid.encode(W, scale).tolist()
    ([[2.0]], None, [[3, 0, 2]])
    """

    def fit(self, W: np.ndarray) -> tuple[np.ndarray, None]:
        """Scales of a weight; parameters, result and errors as in SymmetricGrid.fit."""
        amax = _amax(W, self.group_size)
        with np.errstate(over="ignore"):
            return _stored_scale(2 * amax / amax.dtype.type((1 << self.bits) - 1), self.scale_dtype), None


@dataclass(frozen=True)
class TwosGrid(_Grid):
    """amax / 2^(b-1): the codes are those of two's complement, no zero point stored.

    Examples
    --------
    >>> grid = TwosGrid(bits=3, group_size=-1)
    >>> W = np.array([[4.0, -4.0, 1.2]])
    >>> scale, zero_point = grid.fit(W)
    >>> scale.tolist(), zero_point, grid.encode(W, scale).tolist()
    ([[1.0]], None, [[7, 0, 5]])
    """

    def fit(self, W: np.ndarray) -> tuple[np.ndarray, None]:
        """Scales of a weight; parameters, result and errors as in SymmetricGrid.fit."""
        amax = _amax(W, self.group_size)
        return _stored_scale(amax / amax.dtype.type(self.offset), self.scale_dtype), None


@dataclass(frozen=True)
class AffineGrid(_Grid):
    """(hi - lo) / (2^b - 1) with an integer zero point.

    Examples
    --------
    >>> grid = AffineGrid(bits=2, group_size=-1)
    >>> W = np.array([[-1.0, 0.0, 2.0]])
    >>> scale, zero_point = grid.fit(W)
    >>> scale.tolist(), zero_point.tolist(), grid.encode(W, scale, zero_point).tolist()
    ([[1.0]], [[1]], [[0, 1, 3]])
    """

    def fit(self, W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points of a weight; parameters and errors as in SymmetricGrid.fit.

        Returns
        -------
        scale : (out, groups) or, per tensor, (1, 1), of scale_dtype
        zero_point : the same shape, uint8 in [0, 2^bits)
        """
        groups = grouped(checked_weight(W), self.group_size)
        lo = np.minimum(groups.min(axis=-1), 0)
        hi = np.maximum(groups.max(axis=-1), 0)
        empty = (lo == 0) & (hi == 0)
        lo[empty], hi[empty] = -1, 1
        with np.errstate(over="ignore"):
            return self.from_range(lo, hi - lo)

    def from_range(self, lo: np.ndarray, span: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The grid of 2^bits points that begins at `lo` and is `span` wide, for each group.

        Parameters
        ----------
        lo, span : (out, groups) or, per tensor, (1, 1), float32 or float64

        Returns
        -------
        scale, zero_point : as from fit
            A range on one side of zero keeps its scale, and the zero point stays in [0, 2^bits): what lies beyond
            2^bits - 1 steps from zero saturates.
        """
        levels = (1 << self.bits) - 1
        scale = _stored_scale(span / lo.dtype.type(levels), self.scale_dtype)
        zero_point = np.clip(np.rint(_quotient(-lo, scale)), 0, levels)
        return scale, zero_point.astype(np.uint8)


@dataclass(frozen=True)
class MinMaxGrid(AffineGrid):
    """An affine grid over the values' own range: zero is not forced into it, so a group of one sign saturates.

    Examples
    --------
    >>> grid = MinMaxGrid(bits=2, group_size=-1)
    >>> W = np.array([[-1.0, 0.0, 2.0], [4.0, 5.5, 7.0]])
    >>> scale, zero_point = grid.fit(W)
    >>> scale.tolist(), zero_point.tolist(), grid.encode(W, scale, zero_point).tolist()
    ([[1.0], [1.0]], [[1], [0]], [[0, 1, 3], [3, 3, 3]])
    """

    def fit(self, W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points of a weight; as AffineGrid.fit."""
        groups = grouped(checked_weight(W), self.group_size)
        lo = groups.min(axis=-1)
        with np.errstate(over="ignore"):
            return self.from_range(lo, np.maximum(groups.max(axis=-1) - lo, groups.dtype.type(1e-5)))
