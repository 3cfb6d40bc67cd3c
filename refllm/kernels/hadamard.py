"""Orthogonal matrices that spread a spike over all places: Hadamard matrices, their fast transform, random rotations.

A Hadamard matrix H of size n has entries +-1 and orthogonal rows, H H^T = n I; divided by the root of n it is a
rotation in which every number reaches every place with the same magnitude. Here

    H_n = B_K (x) S_m      n = K m, m a power of two

    S_2m = [[S, S], [S, -S]]                Sylvester 1867
    B_K  with K = q + 1, q = 3 mod 4        Paley 1933, first construction; q a prime
         with K = 2 (q + 1), q = 1 mod 4    Paley's second
         with K = 172                       Williamson 1944: four symmetric circulant blocks

B_K is the smallest that n allows: sizes 2^k, 12 2^k, 20 2^k, 28 2^k, 36 2^k, 44 2^k ... but not every multiple of four.
A product with S_m takes log2 m additions a number (the fast transform), one with B_K takes K.

Paley 1933, "On orthogonal matrices"; Williamson 1944, "Hadamard's determinant theorem and the sum of four squares";
Tseng et al. 2024, "QuIP#", arXiv:2402.04396 (random signs in front); Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456.
Lesson: lessons/13-rotations.md.
"""

from functools import cache

import numpy as np

ROTATIONS = ("hadamard", "orthogonal")  # kinds of random rotations
# Williamson's four rows for 4 * 43: +-1 over the classes of 1 .. 42 modulo 43 that multiplication by 6 and -1 makes
# (named by their smallest element, those in the list have -1). Found by trying all 2^7 rows four times.
_CLASSES = (1, 2, 3, 4, 5, 9, 10)
_MINUS = {172: ((1, 2, 3), (2, 3, 4, 9), (3, 5, 9), (2, 9, 10))}


def has_hadamard(n: int) -> bool:
    """Whether `hadamard(n)` can be built here."""
    return _base(n) is not None


def check_hadamard(n: int, what: str) -> None:
    """Raise ValueError unless there is a Hadamard matrix for `what`."""
    if not has_hadamard(n):
        raise ValueError(
            f"{what} is {n} wide, for which no Hadamard matrix is known here; sizes are K * 2^k with K = 1, or K = "
            "q + 1 or 2 (q + 1) of a suitable prime q, such as 12, 20, 28, 36, 44"
        )


def hadamard(n: int) -> np.ndarray:
    """A Hadamard matrix.

    Parameters
    ----------
    n : int
        1, 2, or a multiple of four that a construction above covers.

    Returns
    -------
    (n, n) float64, entries +-1
        Symmetric where n is a power of two.

    Raises
    ------
    ValueError
        No construction for this size.

    Examples
    --------
    >>> hadamard(4).astype(int).tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    check_hadamard(n, "a matrix")
    K = _base(n)
    H = _base_matrix(K)
    for _ in range((n // K).bit_length() - 1):
        H = np.kron(H, [[1.0, 1.0], [1.0, -1.0]])
    return H


def turn(x: np.ndarray, *, inner: int = 1, back: bool = False) -> np.ndarray:
    """x (H_n (x) I_inner) / sqrt(n), by the fast transform: n log2 m additions and n K with B_K.

    Parameters
    ----------
    x : (..., n * inner) float32 or float64
    inner : int
        Neighbouring numbers that move together: the channels of a head, when heads are mixed. 1 = all numbers mix.
    back : bool
        Multiply by the transposed matrix instead, which undoes it.

    Returns
    -------
    array like x

    Raises
    ------
    ValueError
        inner does not divide the width, or no Hadamard matrix of what remains.

    Examples
    --------
    >>> turn(np.array([8.0, 0.0, 0.0, 0.0])).tolist()
    [4.0, 4.0, 4.0, 4.0]
    >>> turn(np.array([8.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), inner=2).tolist()
    [4.0, 0.5, 4.0, 0.5, 4.0, 0.5, 4.0, 0.5]
    """
    width = x.shape[-1]
    if inner < 1 or width % inner:
        raise ValueError(f"inner must divide the width {width}, got {inner}")
    n = width // inner
    check_hadamard(n, "the input")
    K, m = _base(n), n // _base(n)
    y = np.ascontiguousarray(x).reshape(-1, K, m * inner)
    half = inner
    while half < m * inner:  # pairs of places `half` apart become their sum and their difference
        pairs = y.reshape(-1, 2, half)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        half *= 2
    y = y.reshape(-1, K, m * inner)
    if K > 1:
        B = _base_matrix(K).astype(x.dtype)
        y = (B if back else B.T) @ y
    return (y * x.dtype.type(n**-0.5)).reshape(x.shape)


def base_of(n: int) -> np.ndarray:
    """B_K of H_n, (K, K) float64 with entries +-1."""
    check_hadamard(n, "a matrix")
    return _base_matrix(_base(n))


def random_hadamard(n: int, rng: np.random.Generator) -> np.ndarray:
    """diag(+-1) H_n / sqrt(n) with random signs, (n, n) float64: a rotation that no input is aligned with.

    Parameters
    ----------
    rng : numpy Generator
        Gives n signs.
    """
    signs = 1.0 - 2.0 * rng.integers(0, 2, n)
    return signs[:, None] * hadamard(n) / n**0.5


def random_orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    """A rotation drawn evenly from all (Haar measure), (n, n) float64: Q of a Gaussian's QR, made unique.

    LAPACK leaves the signs of diag(R) open; times these, Q does not depend on its choice and is evenly distributed.
    """
    Q, R = np.linalg.qr(rng.standard_normal((n, n)))
    return Q * np.where(np.diag(R) < 0, -1.0, 1.0)


def random_rotation(n: int, kind: str, rng: np.random.Generator, what: str) -> np.ndarray:
    """A random rotation (n, n) float64.

    Parameters
    ----------
    kind : str
        hadamard (random signs) or orthogonal (drawn evenly from all rotations).
    what : str
        What is turned by it, for the error.

    Raises
    ------
    ValueError
        Another kind, or no Hadamard matrix of this size.
    """
    if kind not in ROTATIONS:
        raise ValueError(f"rotation must be {' or '.join(ROTATIONS)}, got {kind!r}")
    if kind == "orthogonal":
        return random_orthogonal(n, rng)
    try:
        check_hadamard(n, what)
    except ValueError as error:
        raise ValueError(f"{error}; rotation=orthogonal needs none") from None
    return random_hadamard(n, rng)


@cache
def _base(n: int) -> int | None:
    """The smallest K with n = K 2^k that has a construction."""
    if n < 1:
        return None
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    K = 4 * odd
    while K <= n:
        if K in _MINUS or _is_prime(K - 1) or _is_second(K):
            return K
        K *= 2
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % i for i in range(2, int(q**0.5) + 1))


def _is_second(K: int) -> bool:
    """Whether Paley's second construction gives K."""
    q = K // 2 - 1
    return q % 4 == 1 and _is_prime(q)


@cache
def _base_matrix(K: int) -> np.ndarray:
    if K == 1:
        return np.ones((1, 1))
    if K in _MINUS:
        return _williamson(_MINUS[K])
    if _is_prime(K - 1):  # K is a multiple of four, so q = 3 mod 4
        return np.eye(K) + _bordered(K - 1, -1)
    C = _bordered(K // 2 - 1, 1)
    return np.kron(C, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(K // 2), [[1.0, -1.0], [-1.0, -1.0]])


def _bordered(q: int, sign: int) -> np.ndarray:
    """Paley's matrix with a border: C C^T = q I; C^T = sign C.

    Entry (i, j) is the Legendre symbol of j - i: 1 for squares modulo q, -1 for others, 0 on the diagonal.
    """
    symbol = np.full(q, -1.0)
    symbol[np.arange(1, q) ** 2 % q] = 1
    symbol[0] = 0
    C = np.ones((q + 1, q + 1))
    C[0, 0] = 0
    C[1:, 0] = sign
    C[1:, 1:] = symbol[(np.arange(q) - np.arange(q)[:, None]) % q]
    return C


def _williamson(minus: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Four symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4 n I, in Williamson's array."""
    place = np.arange(43)
    name = np.zeros(43, int)
    for first in reversed(_CLASSES):
        name[[sign * first * power % 43 for power in (1, 6, 36) for sign in (1, -1)]] = first
    blocks = [np.where(np.isin(name, row), -1.0, 1.0)[(place - place[:, None]) % 43] for row in minus]
    A, B, C, D = blocks
    return np.block([[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]])
