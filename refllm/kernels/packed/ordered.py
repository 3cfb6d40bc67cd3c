"""Matrix products whose last bit is the same on every machine, whatever its BLAS.

    subtract_product    C -= A B, one term after another: each number of C goes through its terms in one order,
                        rounded after every product and every difference
    gram                X^T X from whole numbers that float64 adds without rounding, so that the order does not matter

Codes that depend on sums (GPTQ's) are made with these. How the work is cut into blocks and threads changes no bit.
"""

from functools import cache

import numpy as np

from refllm.kernels.packed.threads import over_rows

HALF_BITS = 22  # of each of the two whole numbers that an input is split into
EXACT_ROWS = 1 << (53 - 2 * HALF_BITS)  # so many products of two such numbers add up exactly


def subtract_product(C: np.ndarray, A: np.ndarray, B: np.ndarray) -> None:
    """C -= A B in place, terms in ascending order.

    Parameters
    ----------
    C : (m, n) float64
        Shares no memory with A and B.
    A : (m, k) float64
    B : (k, n) float64

    Examples
    --------
    >>> C = np.ones((1, 2))
    >>> subtract_product(C, np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 3.0]]))
    >>> C.tolist()
    [[0.0, -5.0]]
    """
    from refllm.kernels.packed import backend

    if backend() == "numpy":
        for j in range(A.shape[1]):
            C -= A[:, j, None] * B[j]
        return
    run = lambda first, last: _kernel()(C[first:last], A[first:last], B)
    over_rows(run, len(C), A.shape[1] * C.size)


@cache
def _kernel():
    from refllm.kernels.packed import ordered_kernels
    from refllm.kernels.packed.compile import compile_kernel

    return compile_kernel(ordered_kernels.subtract_product, ordered_kernels.SUBTRACT_SIGNATURE)


def gram(X: np.ndarray) -> np.ndarray:
    """X^T X, (in, in) float64.

    Every input is split into two whole numbers of 22 bits, times a power of two of its column: X = (a + b 2^-22) s.
    Sums of up to 512 products of them are exact in float64 in any order, so BLAS may take its own; what remains are a
    few additions in a fixed order. Parts of an input below 2^-44 of the largest in its column are rounded away.

    Parameters
    ----------
    X : (n, in) float32 or float64, finite

    Examples
    --------
    >>> gram(np.array([[1.0, 2.0], [3.0, -4.0]])).tolist()
    [[10.0, -10.0], [-10.0, 20.0]]
    """
    _, exponent = np.frexp(np.max(np.abs(X), axis=0).astype(np.float64))
    high, mixed, low = np.zeros((3, X.shape[1], X.shape[1]))
    for first in range(0, len(X), EXACT_ROWS):
        scaled = np.ldexp(X[first : first + EXACT_ROWS].astype(np.float64), HALF_BITS - exponent)
        a = np.rint(scaled)
        b = np.rint((scaled - a) * 2.0**HALF_BITS)
        high += a.T @ a
        if b.any():
            mixed += a.T @ b
            low += b.T @ b
    high += (mixed + mixed.T) * 2.0**-HALF_BITS
    high += low * 4.0**-HALF_BITS
    unit = exponent - HALF_BITS
    return np.ldexp(high, unit[:, None] + unit)
