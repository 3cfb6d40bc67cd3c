"""Scores to masks: which weights a pruning method keeps.

True = keep. Exactly k = int(sparsity * n) entries go, the lowest scores first; among equal scores the lowest index goes
first (a stable sort), so a mask depends on nothing but its scores. `sparsity` is the fraction removed.
"""

import numpy as np


def _checked(scores: np.ndarray, sparsity: float = 0.0) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores must be an [out, in] matrix, got shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN; nothing can be ranked")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie between 0 and 1 (the fraction removed), got {sparsity}")
    return scores


def _keep_last(scores: np.ndarray, removed: int) -> np.ndarray:
    """Along the last axis, False at the `removed` lowest scores."""
    order = np.argsort(scores, axis=-1, kind="stable")
    mask = np.ones(scores.shape, bool)
    np.put_along_axis(mask, order[..., :removed], False, axis=-1)
    return mask


def keep_top(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Unstructured, compared over the whole matrix.

    Parameters
    ----------
    scores : (out, in) float
    sparsity : float in [0, 1]

    Returns
    -------
    (out, in) bool, True = keep; exactly int(sparsity * out * in) are False

    Examples
    --------
    >>> keep_top(np.array([[1.0, 5.0], [3.0, 2.0]]), 0.5).tolist()
    [[False, True], [True, False]]
    """
    scores = _checked(scores, sparsity)
    return _keep_last(scores.reshape(-1), int(sparsity * scores.size)).reshape(scores.shape)


def keep_top_per_row(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Unstructured, compared within each row: exactly int(sparsity * in) go from every row.

    Parameters and result as keep_top.

    Examples
    --------
    >>> keep_top_per_row(np.array([[1.0, 5.0], [3.0, 2.0]]), 0.5).tolist()
    [[False, True], [True, False]]
    """
    scores = _checked(scores, sparsity)
    return _keep_last(scores, int(sparsity * scores.shape[1]))


def keep_n_of_m(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """N:M sparsity: of every m consecutive columns of a row the n best are kept (2:4 keeps two of four).

    Parameters
    ----------
    scores : (out, in) float, in a multiple of m
    n : int
        Kept, 0 <= n <= m. (Wanda's published code calls the number *removed* n; 2:4 and 4:8 mean the same either way.)
    m : int

    Returns
    -------
    (out, in) bool, True = keep

    Examples
    --------
    >>> keep_n_of_m(np.array([[4.0, 1.0, 3.0, 2.0]]), 2, 4).tolist()
    [[True, False, True, False]]
    """
    scores = _checked(scores)
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"N:M needs 0 <= N <= M and M >= 1, got {n}:{m}")
    rows, columns = scores.shape
    if columns % m:
        raise ValueError(f"{n}:{m} sparsity needs a multiple of {m} columns, got {columns}")
    return _keep_last(scores.reshape(rows, columns // m, m), m - n).reshape(rows, columns)
