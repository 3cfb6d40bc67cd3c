"""hqq: a zero point found by half-quadratic splitting, for errors of which a few may be large.

    min over z of  ||W - W_r||_p^p,  p < 1            W_q = clip(rint(W / s + z), 0, 2^b - 1)        W_r = s (W_q - z)

    repeat      e = shrink(W - W_r)                   shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
                z = mean over the group of W_q - (W - e) / s
                beta *= 1.01

The norm with p = 0.7 cares for many small errors and gives up on a few outliers: e takes these, and z is fitted to the
rest in closed form. s stays what the range gives; z is a real number. The loop ends after 20 rounds, or when the mean
error grows no smaller, with the z of the last round.

Paper: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", the published code
(no arXiv number).
Differs from the authors' code: the default loop of version 0.2.8 leaves beta as it is, unlike the published algorithm
and the other loop of that code (`growth=1` is that default); groups run along `in` (their axis=1, not their default);
arithmetic is float64; stored are scale and minimum = -s z in float16, and the final codes are computed with these.
Stage: memory, decode
Inventory: none, S1 to S3 do not name it; issue 5 does
Lesson: lessons/09-choosing-the-range.md
Golden: quant/hqq
Baseline: none, a minimum takes 16 bits where rtn's zero point takes 4: no recipe has its size
"""

import numpy as np

from refllm.formats.bits import pack_bits
from refllm.kernels.grids import PER_TENSOR, group_count
from refllm.kernels.packed.base import as_float
from refllm.kernels.packed.records import MinWeight
from refllm.kernels.stats import Stats

LEAST_RANGE, MOST_INVERSE = 1e-4, 2e4
ROUNDS = 20


def hqq(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    bits: int = 4,
    group_size: int = 64,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    rounds: int = ROUNDS,
    scale_dtype: str = "float16",
) -> MinWeight:
    """Half-quadratic quantization.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call: no data is needed.
    bits : int
        1 to 8.
    group_size : int
        g columns that share scale and minimum, g divides `in`; -1: a row.
    p : float
        0 < p <= 1, the power of the error; 1 shrinks by 1 / beta.
    beta : float
        Above 0; the larger, the more counts as an outlier.
    growth : float
        What beta is multiplied by after each round, at least 1.
    rounds : int
        At most; 0 leaves the zero point of the range, not rounded.
    scale_dtype : str
        float16 or float32, of scale and minimum.

    Returns
    -------
    MinWeight

    Raises
    ------
    ValueError
        NaN or Inf in W, a group_size that does not divide `in`, a knob out of its range, a scale beyond its type.

    Examples
    --------
    >>> hqq(np.array([[0.0, 1.0, 2.0, 3.0]]), bits=2, group_size=-1).dense().tolist()
    [[0.0, 1.0, 2.0, 3.0]]
    """
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; quantization needs finite values")
    if not (1 <= bits <= 8 and 0 < p <= 1 and beta > 0 and growth >= 1 and rounds >= 0):
        raise ValueError(
            f"hqq needs bits 1 to 8, 0 < p <= 1, beta > 0, growth >= 1 and rounds >= 0, got bits {bits}, p {p}, "
            f"beta {beta}, growth {growth}, rounds {rounds}"
        )
    if group_size == PER_TENSOR:
        raise ValueError("group_size must be positive or -1 (a row), got 0")
    groups = W.astype(np.float64).reshape(len(W), group_count(W.shape[1], group_size), -1)
    most = (1 << bits) - 1
    inverse, zero = _from_range(groups, most)
    zero = split(groups, inverse, zero, most, p, beta, growth, rounds)
    scale, minimum = as_float(1 / inverse, scale_dtype), as_float(-zero / inverse, scale_dtype)
    steps = (groups - minimum.astype(np.float64)[..., None]) / scale.astype(np.float64)[..., None]
    codes = np.clip(np.rint(steps), 0, most).astype(np.uint8).reshape(W.shape)
    return MinWeight(pack_bits(codes, bits), scale, minimum, bits, group_size, W.shape[1])


def _from_range(groups: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """1 / scale and the zero point, not rounded, each (out, groups)."""
    lo, hi = groups.min(axis=-1), groups.max(axis=-1)
    flat = hi - lo <= LEAST_RANGE
    inverse = np.minimum(most / np.where(flat, 1, hi - lo), MOST_INVERSE)
    inverse[flat] = 1
    return inverse, -lo * inverse


def split(
    groups: np.ndarray,
    inverse: np.ndarray,
    zero: np.ndarray,
    most: int,
    p: float,
    beta: float,
    growth: float,
    rounds: int,
) -> np.ndarray:
    """The zero point after half-quadratic splitting.

    Parameters
    ----------
    groups : (out, groups, g) float64
    inverse, zero : (out, groups) float64
    most : int
        The largest code.

    Returns
    -------
    (out, groups) float64
    """
    least = np.inf
    inverse = inverse[..., None]
    for _ in range(rounds):
        codes = np.clip(np.rint(groups * inverse + zero[..., None]), 0, most)
        error = groups - (codes - zero[..., None]) / inverse
        zero = np.mean(codes - (groups - shrink(error, p, beta)) * inverse, axis=-1)
        beta *= growth
        mean = np.abs(error).mean()
        if mean >= least:
            break
        least = mean
    return zero


def shrink(x: np.ndarray, p: float, beta: float) -> np.ndarray:
    """sign(x) max(0, |x| - |x|^(p-1) / beta); 0 stays 0, where the power would be infinite.

    Examples
    --------
    >>> shrink(np.array([0.0, -0.5, 3.0]), 1.0, 1.0).tolist()
    [0.0, -0.0, 2.0]
    """
    size = np.abs(x)
    with np.errstate(divide="ignore"):
        return np.sign(x) * np.maximum(0, size - np.where(size == 0, 0, size ** (p - 1)) / beta)
