"""obs_sweep: change a weight one input column at a time, and let the columns not yet reached make up for it.

To minimise ||(W - Q) X^T||^2, with H = X^T X (damped) and H^-1 = U^T U, U upper (linalg.inverse_factor):

    for j = 0 .. in - 1:    q_j = project(w_j)          any rule: round to a grid, or set some to zero
                            e_j = (w_j - q_j) / U_jj
                            w_k -= e_j U_jk              for every k > j: the least-squares answer to the change

This is optimal brain surgery with the columns in one order for all rows, so that one factor U serves them all. When
all is done W - Q = E U, and ||E||^2 = tr((W - Q) H (W - Q)^T).

Frantar et al. 2022, "GPTQ", arXiv:2210.17323, Algorithm 1; Frantar & Alistarh 2023, "SparseGPT", arXiv:2301.00774,
Algorithm 1. Lesson: lessons/10-gptq.md.
"""

from collections.abc import Callable

import numpy as np

from refllm.kernels.packed.ordered import subtract_product


def obs_sweep(
    W: np.ndarray,
    U: np.ndarray,
    project: Callable[[np.ndarray, int, np.ndarray], np.ndarray],
    block: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """The second-order column loop.

    Parameters
    ----------
    W : (out, in) float
        Left alone.
    U : (in, in) float64
        Upper triangular, H^-1 = U^T U. Where errors must not reach columns of their own block (BiLLM), zero those
        entries of U.
    project : callable (w, j, W_now) -> q
        w: (out,) float64, column j as the columns before have left it; q: (out,), what is stored instead. W_now:
        (out, in) float64, a view of all columns, not to be written to. It is up to date up to the end of j's block;
        later columns lack the errors of this block until it ends. Columns before j hold the w they had.
    block : int
        Columns whose errors are passed on at once to the rest. Every number goes through the same operations in the
        same order, so the result does not depend on it, bit for bit, unless project looks at W_now.

    Returns
    -------
    Q : (out, in) float64
        The projected columns.
    E : (out, in) float64
        The errors e_j: W - Q = E U, and the published loss is sum(E^2) / 2.

    Raises
    ------
    ValueError
        Shapes that do not fit, a block below 1.

    Examples
    --------
    Two inputs that are nearly one and the same: what rounding takes from the first is given to the second.

    >>> U = np.array([[2.0, -2.0], [0.0, 1.0]])
    >>> Q, E = obs_sweep(np.array([[0.25, 0.25]]), U, lambda w, j, W_now: np.rint(w))
    >>> Q.tolist(), E.tolist()
    ([[0.0, 0.0]], [[0.125, 0.5]])
    """
    rows, columns = W.shape
    if U.shape != (columns, columns):
        raise ValueError(f"U must be ({columns}, {columns}) for a weight of {columns} columns, got {U.shape}")
    if block < 1:
        raise ValueError(f"block must be at least 1 column, got {block}")
    now = np.array(W.T, np.float64, order="C")  # [in, out]: a column of W lies together
    Q, E = np.empty((2, columns, rows))
    for a in range(0, columns, block):
        b = min(a + block, columns)
        for j in range(a, b):
            Q[j] = project(now[j], j, now.T)
            E[j] = (now[j] - Q[j]) / U[j, j]
            now[j + 1 : b] -= U[j, j + 1 : b, None] * E[j]
        subtract_product(now[b:], U[a:b, b:].T, E[a:b])
    return Q.T, E.T
