"""What `pattern=` and `sparsity=` mean: from the scores of a pruning method to the record that stores what is kept.

    unstructured    the int(sparsity * n) lowest scores go, compared per row or over the matrix    -> SparseBitmask
    2:4             of every four consecutive columns of a row two are kept                        -> Sparse24
    N:M             of every M consecutive columns of a row N are kept                             -> SparseBitmask

Equal scores: the lowest column (over the matrix: the first in row-major order) goes first.
"""

import re

import numpy as np

from refllm.kernels.masks import keep_n_of_m, keep_top, keep_top_per_row
from refllm.kernels.packed.records import Sparse24, SparseBitmask

DEFAULT_SPARSITY = 0.5


def check_weight(W: np.ndarray) -> np.ndarray:
    """The weight as an array, or a ValueError: a non-empty [out, in] matrix of finite numbers."""
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; pruning needs finite values")
    return W


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(N, M) of "N:M", N kept of M; None for "unstructured".

    Examples
    --------
    >>> parse_pattern("2:4"), parse_pattern("unstructured")
    ((2, 4), None)
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern must be unstructured or N:M with 0 < N < M, N kept (such as 2:4), got {pattern!r}")
    return int(match[1]), int(match[2])


def prune(
    W: np.ndarray, scores: np.ndarray, pattern: str, sparsity: float | None, dtype: str, per_row: bool
) -> Sparse24 | SparseBitmask:
    """Keep the weights with the highest scores and store them.

    Parameters
    ----------
    W : (out, in) float
    scores : (out, in) float
    pattern : str
        "unstructured" or "N:M".
    sparsity : float or None
        Fraction removed, unstructured only; None = 0.5. N:M says it itself, and both together are an error.
    dtype : str
        float16 or float32, of the kept values.
    per_row : bool
        Unstructured: compare within each row, or over the whole matrix.

    Returns
    -------
    Sparse24 for 2:4, SparseBitmask for everything else

    Raises
    ------
    ValueError
        An unknown pattern, sparsity beside N:M or outside [0, 1], `in` not a multiple of M, a value beyond dtype.
    """
    n_of_m = parse_pattern(pattern)
    if n_of_m is None:
        keep = keep_top_per_row if per_row else keep_top
        mask = keep(scores, DEFAULT_SPARSITY if sparsity is None else sparsity)
    elif sparsity is not None:
        raise ValueError(f"pattern {pattern} already says how much goes; leave out sparsity={sparsity}")
    else:
        mask = keep_n_of_m(scores, *n_of_m)
    return (Sparse24 if n_of_m == (2, 4) else SparseBitmask).compress(W, mask, dtype)
