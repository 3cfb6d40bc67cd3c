"""What lowrank/svd expects: factors of matrices built from known ones, and of others by one-sided Jacobi rotations.

Everything is Python floats and fractions with +, -, *, / and sqrt, which every machine rounds alike.
"""

from fractions import Fraction
from math import isqrt, sqrt

from refllm.evaluate.golden.build import CaseSpec, Output, values
from refllm.evaluate.golden.suites.exact import Unclear

SINGLE = 64 * 2.0**-24  # error of a float32 decomposition, as a fraction of the largest singular value
Triple = tuple[list[list], list, list[list]]  # columns of U, singular values (falling), rows of V^T


def householder(v: list[int]) -> list[list[Fraction]]:
    """Rows of I - 2 v v^T / (v . v): orthogonal, symmetric, and dyadic where v . v is a power of two."""
    n = sum(x * x for x in v)
    return [[Fraction(int(i == j)) - Fraction(2 * a * b, n) for j, b in enumerate(v)] for i, a in enumerate(v)]


def product(triple: Triple) -> list[list]:
    """U diag(S) V^T."""
    U, S, V = triple
    rows, columns = range(len(U[0])), range(len(V[0]))
    return [[sum(s * u[r] * v[c] for u, s, v in zip(U, S, V, strict=True)) for c in columns] for r in rows]


def jacobi(w: list[list[float]]) -> Triple:
    """Singular value decomposition of a matrix with at least as many rows as columns: rotate columns until "
    "orthogonal."""
    columns = [list(column) for column in zip(*w, strict=True)]
    n = len(columns)
    right = [[float(i == j) for j in range(n)] for i in range(n)]  # its rows turn into those of V^T
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))
    for _ in range(30):
        for i in range(n):
            for j in range(i + 1, n):
                alpha, beta = dot(columns[i], columns[i]), dot(columns[j], columns[j])
                gamma = dot(columns[i], columns[j])
                if abs(gamma) <= 1e-17 * sqrt(alpha * beta):
                    continue
                zeta = (beta - alpha) / (2 * gamma)
                t = (1 if zeta >= 0 else -1) / (abs(zeta) + sqrt(1 + zeta * zeta))
                c = 1 / sqrt(1 + t * t)
                for rows in (columns, right):
                    a, b = rows[i], rows[j]
                    rows[i] = [c * x - c * t * y for x, y in zip(a, b, strict=True)]
                    rows[j] = [c * t * x + c * y for x, y in zip(a, b, strict=True)]
    found = sorted(((sqrt(dot(a, a)), i) for i, a in enumerate(columns)), reverse=True)
    return [[x / s for x in columns[i]] for s, i in found], [s for s, _ in found], [right[i] for _, i in found]


def root(s: Fraction | float) -> Fraction | float:
    """Square root; of a fraction only where it is one."""
    if isinstance(s, float):
        return sqrt(s)
    exact = Fraction(isqrt(s.numerator), isqrt(s.denominator))
    if exact**2 != s:
        raise Unclear(f"the root of {s} is irrational")
    return exact


def factors(triple: Triple, rank: int) -> tuple[list[list], list[list]]:
    """Rows of A and of B, the largest entry of every row of B positive."""
    A, B = [], []  # A by columns first
    for u, s, v in list(zip(*triple, strict=True))[:rank]:
        sizes = sorted(map(abs, v))
        if len(sizes) > 1 and sizes[-1] - sizes[-2] < Fraction(1, 50):
            raise Unclear("two entries of a right singular vector are nearly as large")
        sign = 1 if max(v, key=abs) > 0 else -1
        A.append([sign * root(s) * x for x in u])
        B.append([sign * root(s) * x for x in v])
    return [list(row) for row in zip(*A, strict=True)], B


def rank_of(shape: tuple[int, int], ratio: float) -> int:
    """floor(ratio out in / (out + in)), refused where floating point may take the other side of an integer."""
    exact = Fraction(ratio) * shape[0] * shape[1] / (shape[0] + shape[1])
    whole = exact.numerator // exact.denominator
    if exact != whole and min(exact - whole, whole + 1 - exact) < Fraction(1, 1000):
        raise Unclear(f"rank {float(exact)} is nearly an integer")
    return whole


def _bounds(triple: Triple, rank: int, half: bool) -> tuple[float, float, float]:
    """Absolute bounds for an entry of A or B, an entry of W^, and the squared error.

    A float32 decomposition is off by e = SINGLE S_1. That turns a singular vector by at most 2 e / gap (Wedin), and
    moves the root of a singular value by e / (2 sqrt S). Rounding the factors adds u of every product, twice.
    """
    U, S, V = triple[0], [float(s) for s in triple[1]], triple[2]
    e, u = SINGLE * S[0], 2.0 ** (-11 if half else -24)
    full = rank == len(S)
    edge = S[rank - 1] - (0 if full else S[rank])
    others = [*S, 0.0]
    gap = min(abs(S[i] - s) for i in range(rank) for j, s in enumerate(others) if j != i)
    entry = 2 * e * sqrt(S[0]) / gap + e / (2 * sqrt(S[rank - 1])) + 2.0**-24 if gap else 0.0
    weight = (e if full else 4 * e * S[0] / edge) + (2 * u + rank * 2.0**-24) * sum(S[:rank])
    spread = weight * sqrt(len(U[0]) * len(V[0]))
    dropped = sqrt(sum(s * s for s in S[rank:]))
    return entry, weight, 2 * dropped * spread + spread**2


def _allclose(dtype: str, nested: object, rtol: float, atol: float) -> Output:
    numbers = values("f64", nested).array.astype({"f16": "<f2", "f32": "<f4", "f64": "<f8"}[dtype])
    bound = float(f"{atol:.1e}") * 1.1  # few digits, rounded up
    return Output({"class": "allclose", "rtol": rtol, "atol": float(f"{bound:.1e}")}, values(dtype, numbers.tolist()))


def case(
    id: int, comment: str, flags: str, w: list[list], triple: Triple, r: int, *, dtype: str = "float16",
    free: bool = False, recipe: dict | None = None, **params,
) -> CaseSpec:  # fmt: skip
    """A valid case.

    Parameters
    ----------
    r : int
        The rank that follows from the params.
    free : bool
        The factors are not unique (equal or vanishing singular values): only their product is expected.
    params :
        rank or ratio, as the case gives it.
    """
    half = dtype == "float16"
    entry, weight, squared = _bounds(triple, r, half)
    floats = lambda nested: [[float(x) for x in row] for row in nested]
    kept = product(tuple(part[:r] for part in triple))
    error = float(sum(s * s for s in triple[1][r:]))
    expected = {}
    if not free:
        A, B = factors(triple, r)
        stored = "f16" if half else "f32"
        rtol = 2.0**-10 if half else 2.0**-22
        expected = {n: _allclose(stored, floats(x), rtol, entry) for n, x in (("a", A), ("b", B))}
    expected["w_hat"] = _allclose("f32", floats(kept), 0, weight)
    expected["error"] = _allclose("f64", error, 0, squared)
    expected["rank"] = Output({"class": "bits"}, values("i64", r))
    inputs = {"w": values("f32", floats(w), recipe=recipe)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"dtype": dtype} | params)
