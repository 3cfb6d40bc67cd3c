"""Factors of a layer's Hessian H = X^T X that second-order methods walk along.

    damped            H + damp mean(diag H) I, dead inputs given a 1 on the diagonal first
    inverse_factor    U upper with H^-1 = U^T U: row j of U is row j of the inverse of what is left of H once the
                      inputs before j are fixed, divided by its first entry's root

H^-1 is never formed: H = R R^T with R upper (a Cholesky factorisation that starts in the last corner), and U = R^-1.
Elements are subtracted one product after another (refllm.kernels.packed.ordered), so U is the same on every machine.

Frantar et al. 2022, "GPTQ", arXiv:2210.17323, section 3.3 (the Cholesky reformulation), and the damping and dead inputs
of its published code. Lesson: lessons/10-gptq.md.
"""

import math

import numpy as np

from refllm.kernels.packed.ordered import subtract_product

BLOCK = 64  # columns factored before the rest of the matrix is touched; the result does not depend on it


def damped(H: np.ndarray, damp: float = 0.01) -> np.ndarray:
    """Make a Hessian safely invertible.

    Parameters
    ----------
    H : (in, in) float64
        X^T X, symmetric, times any factor.
    damp : float
        Fraction of the mean of the diagonal that is added to the diagonal, dead inputs counted.

    Returns
    -------
    (in, in) float64
        A new array. An input that was never active (H_jj = 0) has 1 on the diagonal before damping.

    Raises
    ------
    ValueError
        Not square, NaN or Inf, a negative diagonal, a damp that is negative or not finite.

    Examples
    --------
    >>> damped(np.array([[4.0, 0.0], [0.0, 0.0]]), damp=0.5).tolist()
    [[5.25, 0.0], [0.0, 2.25]]
    """
    H = np.array(H, np.float64)
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.size == 0:
        raise ValueError(f"H must be a square [in, in] matrix, got shape {H.shape}")
    if not np.isfinite(H).all():
        raise ValueError("H holds NaN or Inf; check the calibration inputs")
    if not 0 <= damp < math.inf:
        raise ValueError(f"damp must be a number from 0 up (a fraction of the mean diagonal), got {damp}")
    diagonal = np.einsum("ii->i", H)  # a view
    if (diagonal < 0).any():
        raise ValueError(f"H has a negative number on its diagonal, {diagonal.min():.6g}; it must be X^T X")
    diagonal[diagonal == 0] = 1
    diagonal += damp * (math.fsum(diagonal) / len(H))
    return H


def inverse_factor(H: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor U of the inverse, H^-1 = U^T U.

    Parameters
    ----------
    H : (in, in) float64, symmetric positive definite
        See `damped`. Only the upper triangle is read.

    Returns
    -------
    (in, in) float64, upper triangular with a positive diagonal

    Raises
    ------
    ValueError
        H is not positive definite within rounding.

    Examples
    --------
    >>> inverse_factor(np.array([[4.0, 0.0], [0.0, 0.25]])).tolist()
    [[0.5, 0.0], [0.0, 2.0]]
    """
    R = _cholesky(np.array(H[::-1, ::-1].T, np.float64, order="C"))  # rows and columns in reverse
    return np.ascontiguousarray(_inverse(R)[::-1, ::-1])


def _cholesky(G: np.ndarray) -> np.ndarray:
    """Lower L with G = L L^T, in the place of G; numbers above its diagonal are left over."""
    n = len(G)
    least = n * 2.0**-52 * np.diag(G)  # what rounding alone can leave of a pivot
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        for j in range(a, b):
            if not G[j, j] > least[j]:
                raise ValueError(
                    f"H is singular or not positive definite: of {n} inputs, number {n - 1 - j} depends on those "
                    "after it; raise damp (0.01 is usual) or calibrate on more text"
                )
            G[j:, j] /= math.sqrt(G[j, j])
            G[j + 1 :, j + 1 : b] -= G[j + 1 :, j, None] * G[j + 1 : b, j]
        for c in range(b, n, BLOCK):  # of what remains, only the lower triangle
            d = min(c + BLOCK, n)
            subtract_product(G[c:, c:d], G[c:, a:b], G[c:d, a:b].T)
    return G


def _inverse(L: np.ndarray) -> np.ndarray:
    """L^-1 of a lower triangular matrix: L X = I by forward substitution, row after row."""
    n = len(L)
    X = np.eye(n)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        subtract_product(X[a:b, :a], L[a:b, :a], X[:a, :a])
        for j in range(a, b):
            X[j, : j + 1] /= L[j, j]
            X[j + 1 : b, : j + 1] -= L[j + 1 : b, j, None] * X[j, : j + 1]
    return X
