"""The nearest matrix of lower rank as two factors: what svd stores, and what repairs of an error are made of.

truncated     nearest in the weights: || W - A B ||
whitened      nearest in the outputs of inputs X: || (W - A B) X^T ||, through S with S S^T = X^T X
"""

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


def whitening(gram: np.ndarray) -> np.ndarray:
    """Lower S with S S^T = gram: || M S || is what a change M of a weight does to the outputs of these inputs.

    Parameters
    ----------
    gram : (in, in) float
        X^T X, symmetric. Where it is singular (dead or dependent inputs), as much is added to its diagonal as makes its
        least eigenvalue a millionth of the mean of the diagonal.

    Returns
    -------
    (in, in) float64

    Raises
    ------
    ValueError
        NaN or Inf, or nothing but zeros.

    Examples
    --------
    >>> whitening(np.array([[4.0, 2.0], [2.0, 10.0]])).tolist()
    [[2.0, 0.0], [1.0, 3.0]]
    """
    gram = np.asarray(gram, np.float64)
    mean = np.trace(gram) / len(gram)
    if not np.isfinite(gram).all() or not mean > 0:
        raise ValueError("X^T X of the calibration inputs must be finite and not zero; check the calibration text")
    least = np.linalg.eigvalsh(gram)[0]
    missing = max(0.0, 1e-6 * mean - least) if least < 1e-9 * mean else 0.0
    return np.linalg.cholesky(gram + missing * np.eye(len(gram)))


def whitened(W: np.ndarray, S: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A (out, rank) and B (rank, in), float64, with || (W - A B) S || least; as `truncated` of W S, and B S^-1.

    Parameters
    ----------
    S : (in, in)
        From `whitening`.

    Examples
    --------
    >>> A, B = whitened(np.diag([1.0, 2.0]), np.diag([10.0, 1.0]), 1)  # the small weight has the large input
    >>> (A @ B + 0.0).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    A, B = truncated(W.astype(np.float64) @ S, rank)
    return A, np.linalg.solve(S.T, B.T).T
