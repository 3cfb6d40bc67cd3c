"""svd: keep the r largest singular values and store two thin factors.

    W = U diag(S) V^T      A = U_r diag(sqrt S_r)  (out, r)      B = diag(sqrt S_r) V_r^T  (r, in)      y = (x B^T) A^T

No matrix of rank r is nearer to W in the Frobenius or the spectral norm, and ||W - A B||^2 = sum over i > r of S_i^2.
r (out + in) numbers are stored instead of out * in: only r below out * in / (out + in), the break-even rank, saves
anything. The split gives both factors the same scale, so neither overflows float16.

A singular vector is known up to its sign only. Here the entry of largest magnitude of every row of B is positive, the
first of equals.

Paper: Eckart and Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1, pp. 211-218.
Differs from it: the factors are rounded to float16 (each entry by at most 2^-11 of itself, 2^-25 below 2^-14) after a
float64 decomposition.
Stage: memory, prefill, decode
Inventory: 78
Lesson: lessons/08-zeros-and-ranks.md
Golden: lowrank/svd
Baseline: none, optimal for its rank
"""

import numpy as np

from refllm.kernels.factors import truncated
from refllm.kernels.packed.records import LowRank, as_float
from refllm.kernels.stats import Stats

DEFAULT_RATIO = 0.5


def svd(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    dtype: str = "float16",
) -> LowRank:
    """Truncated singular value decomposition.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    ratio : float, optional
        Numbers stored / numbers in W, at most 1: rank = int(ratio * out * in / (out + in)). 0.5 unless given.
    rank : int, optional
        The rank itself, 1 to min(out, in), beyond break-even too. Instead of ratio.
    dtype : str
        float16 or float32, of the factors.

    Returns
    -------
    LowRank

    Raises
    ------
    ValueError
        NaN or Inf in W; both ratio and rank; a ratio above 1 or so small that no rank is left; a rank out of range; an
        entry beyond dtype.

    Examples
    --------
    >>> record = svd(np.outer([1.0, 2.0, 3.0], [4.0, 0.0, 0.0]), rank=1)
    >>> record.A.shape, record.B.shape, record.dense()[2].round(2).tolist()
    ((3, 1), (1, 3), [12.0, 0.0, 0.0])
    """
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; a decomposition needs finite values")
    r = _rank(W.shape, ratio, rank)
    A, B = truncated(W, r)
    return LowRank(as_float(A, dtype), as_float(B, dtype))


def _rank(shape: tuple[int, int], ratio: float | None, rank: int | None) -> int:
    out, columns = shape
    if rank is not None:
        if ratio is not None:
            raise ValueError(f"give ratio or rank, not both (ratio={ratio}, rank={rank})")
        if not 1 <= rank <= min(shape):
            raise ValueError(f"rank must lie between 1 and {min(shape)} for a weight of shape {shape}, got {rank}")
        return rank
    ratio = DEFAULT_RATIO if ratio is None else ratio
    break_even = out * columns / (out + columns)
    if not 0 < ratio <= 1:
        raise ValueError(
            f"ratio must lie between 0 and 1, got {ratio}: above 1 the factors hold more numbers than the weight "
            f"(break-even rank {int(break_even)} for shape {shape}); ask for such a rank by rank="
        )
    r = int(ratio * break_even)
    if r == 0:
        raise ValueError(
            f"ratio {ratio} leaves rank 0 for a weight of shape {shape} (break-even rank {int(break_even)}); "
            "raise it, or ask for a rank by rank="
        )
    return r
