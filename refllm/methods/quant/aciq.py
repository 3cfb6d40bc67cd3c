"""aciq: range, bits and bias of every output channel from a formula, without a search over the weights.

    clip        alpha_M = argmin of the error of M bits for a Laplace or normal law of the channel's b or sigma
    bits        B_o = n 2^M r_o^(2/3) / sum r^(2/3)       M_o = round(log2 B_o), clipped to 0..8, mean M_o = M
    bias        w_o gets back its mean (and its standard deviation, if asked), which rounding moved

The error of a value clipped to [-alpha, alpha] and rounded to 2^M bins is

    Laplace(b)        2 b^2 e^(-alpha/b) + alpha^2 / (3 * 4^M)
    normal(sigma)     (sigma^2 + alpha^2)(1 - erf(alpha / (sigma sqrt 2))) + alpha^2 / (3 * 4^M)
                      - alpha sigma sqrt(2/pi) e^(-alpha^2 / (2 sigma^2))

and its minimum alpha / b or alpha / sigma depends on M alone. A channel takes the law that has the smaller error,
unless one is asked for. r is the width of a channel's clipped range: wide ones get more bits, and n channels keep n M
bits.

Paper: Banner et al. 2018, "Post training 4-bit quantization of convolutional networks for rapid-deployment",
arXiv:1810.05723, sections 3 to 5.
Differs from the authors' code: alpha is computed, not read from a table of two decimals; the choice between the two
laws is ours; the budget of bins is found by bisection, so that the mean of the bits is never above M, where the code
stops within 0.01 of it on either side; a channel is a row of the weight, with scale and minimum in float32, into which
the correction is folded.
Stage: memory, decode
Inventory: 23
Lesson: lessons/09-choosing-the-range.md
Golden: quant/aciq
Baseline: none, a row stores 9 bytes beside its codes and its own number of bits: no recipe has its size
"""

import math
from functools import cache

import numpy as np

from refllm.kernels.packed.records import MixedRows
from refllm.kernels.stats import Stats

LAWS = ("laplace", "normal")
CORRECTIONS = ("none", "mean", "both")
MOST_BITS = 8


def aciq(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    bits: int = 4,
    law: str = "best",
    allocate: bool = True,
    correct: str = "mean",
) -> MixedRows:
    """Analytic clipping, bit allocation and bias correction.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    bits : int
        1 to 8, of every row, or on average with `allocate`.
    law : str
        laplace, normal, or best: for each row the one whose clipped range loses less.
    allocate : bool
        Give wide rows more bits than narrow ones, 0 to 8.
    correct : str
        none, mean (each row keeps its mean), or both (mean and standard deviation).

    Returns
    -------
    MixedRows

    Raises
    ------
    ValueError
        NaN or Inf in W, a knob out of its range.

    Examples
    --------
    >>> record = aciq(np.array([[-3.0, -1, 1, 3], [-1.0, 1, 1, -1]]), bits=2, law="normal", allocate=False)
    >>> record.bits.tolist(), record.dense().mean(axis=1).round(6).tolist()
    ([2, 2], [0.0, 0.0])
    """
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; quantization needs finite values")
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits must be 1 to {MOST_BITS}, got {bits}")
    if law not in ("best", *LAWS) or correct not in CORRECTIONS:
        raise ValueError(
            f"law must be best, laplace or normal and correct none, mean or both, got {law!r} and {correct!r}"
        )
    W = W.astype(np.float64)
    widths = np.full(len(W), bits)
    if allocate:
        lo, hi = clipped_range(W, widths, law)
        widths = allocate_bits(hi - lo, bits)
    lo, hi = clipped_range(W, widths, law)
    most = (1 << widths) - 1
    scale = np.where(most > 0, (hi - lo) / np.maximum(most, 1), 0)
    minimum = np.where(most > 0, lo, W.mean(axis=1))
    steps = (W - minimum[:, None]) / np.where(scale > 0, scale, 1)[:, None]
    codes = np.clip(np.rint(steps), 0, most[:, None])
    scale, minimum = _corrected(W, codes, scale, minimum, correct)
    return MixedRows.pack(codes.astype(np.uint8), widths, scale, minimum)


@cache
def best_clip(bits: int, law: str) -> float:
    """alpha / b of a Laplace law, or alpha / sigma of a normal one, with least error at so many bits.

    Examples
    --------
    >>> round(best_clip(4, "laplace"), 3), round(best_clip(4, "normal"), 3)
    (5.029, 2.559)
    """

    def slope(a: float) -> float:
        """Derivative of expected_error: rises through zero once."""
        rounding = 2 * a / (3 * 4**bits)
        if law == "laplace":
            return rounding - 2 * math.exp(-a)
        density = math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return rounding + 2 * a * math.erfc(a / math.sqrt(2)) - 2 * density

    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return low


def expected_error(alpha: np.ndarray, bits: np.ndarray, law: str) -> np.ndarray:
    """Mean square error of clipping at alpha and rounding to 2^bits bins, for b = 1 or sigma = 1."""
    rounding = alpha**2 / (3 * 4.0**bits)
    if law == "laplace":
        return 2 * np.exp(-alpha) + rounding
    tail = (1 + alpha**2) * np.array([math.erfc(a / math.sqrt(2)) for a in alpha.ravel()]).reshape(alpha.shape)
    return tail - alpha * np.sqrt(2 / np.pi) * np.exp(-(alpha**2) / 2) + rounding


def clipped_range(W: np.ndarray, bits: np.ndarray, law: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of every row: mean -+ alpha, no further than the row itself reaches.

    Parameters
    ----------
    W : (out, in) float64
    bits : (out,) integer
        0 counts as 1: one bin has no best clip.
    """
    mean = W.mean(axis=1)
    size = {
        "laplace": np.abs(W - mean[:, None]).mean(axis=1),
        "normal": np.sqrt(np.square(W - mean[:, None]).mean(axis=1)),
    }
    alpha, least = np.zeros(len(W)), np.full(len(W), np.inf)
    for name in LAWS if law == "best" else (law,):
        ratio = np.array([best_clip(max(1, int(b)), name) for b in bits])
        error = size[name] ** 2 * expected_error(ratio, np.maximum(bits, 1), name)
        better = error < least
        alpha[better], least[better] = (ratio * size[name])[better], error[better]
    return np.maximum(W.min(axis=1), mean - alpha), np.minimum(W.max(axis=1), mean + alpha)


def allocate_bits(widths: np.ndarray, bits: int) -> np.ndarray:
    """Bits of every channel, 0 to 8, from the widths of their ranges; their mean is at most `bits`, and near it.

    Parameters
    ----------
    widths : (out,) float64
    bits : int
        The mean wanted. The number of bins is raised or lowered until rounding and the limits of 0 and 8 allow it.

    Returns
    -------
    (out,) int64

    Examples
    --------
    Eight times the range, four times the bins:

    >>> allocate_bits(np.array([8.0, 1.0]), 4).tolist()
    [5, 3]
    """
    n = len(widths)
    share = np.cbrt(widths) ** 2
    if not share.any():
        return np.full(n, bits)
    share = share / share.sum()
    with np.errstate(divide="ignore"):
        powers = np.log2(share)  # -inf for a constant row, which needs no bits
    give = lambda extra: np.clip(np.rint(np.log2(n) + extra + powers), 0, MOST_BITS).astype(np.int64)
    low, high = bits - 2.0 * MOST_BITS, bits + 2.0 * MOST_BITS
    best = give(low)
    for _ in range(60):  # the largest budget whose mean is not above
        middle = (low + high) / 2
        given = give(middle)
        if given.sum() <= n * bits:
            low, best = middle, given
        else:
            high = middle
    return best


def _corrected(W, codes, scale, minimum, correct: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum that give every row its mean, and its standard deviation, back: variance first, then mean."""
    if correct == "none":
        return scale, minimum
    mean, spread = codes.mean(axis=1), codes.std(axis=1)
    if correct == "both":
        scale = np.where(spread > 0, W.std(axis=1) / np.where(spread > 0, spread, 1), scale)
    scale = scale.astype(np.float32).astype(np.float64)  # as stored, so that the mean is that of what is decoded
    return scale, W.mean(axis=1) - scale * mean
