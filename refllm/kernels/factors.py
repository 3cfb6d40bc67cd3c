"""The nearest matrix of lower rank as two factors: what svd stores, and what repairs of an error are made of."""

import numpy as np


def truncated(W: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A (out, rank) and B (rank, in), float64, with A B the matrix of that rank nearest to W.

    A = U_r diag(sqrt S_r), B = diag(sqrt S_r) V_r^T: both factors have the same scale. A singular vector is known up to
    its sign only; the entry of largest magnitude of every row of B is positive, the first of equals.

    Parameters
    ----------
    W : (out, in) float, finite
    rank : int
        1 to min(out, in).

    Examples
    --------
    >>> A, B = truncated(np.array([[0.0, 0.0], [-9.0, 0.0]]), 1)
    >>> (A + 0.0).tolist(), (B + 0.0).tolist()
    ([[0.0], [-3.0]], [[3.0, 0.0]])
    """
    U, S, Vt = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    root = np.sqrt(S[:rank])
    A, B = U[:, :rank] * root, root[:, None] * Vt[:rank]
    largest = np.argmax(np.abs(B), axis=1)
    sign = np.where(np.take_along_axis(B, largest[:, None], axis=1)[:, 0] < 0, -1.0, 1.0)
    return A * sign, B * sign[:, None]
