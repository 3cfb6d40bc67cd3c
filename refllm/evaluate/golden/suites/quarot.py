"""The suite transform/quarot. Ids are never reused and never renumbered: new cases take new numbers."""

from fractions import Fraction
from math import isqrt, sqrt

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, to_f32
from refllm.evaluate.golden.suites.rtn_notes import note
from refllm.evaluate.golden.suites.svd_definition import householder

HEADER = [
    "Turning: inputs w, f32 [out, in], and x, f32 [n, in], of one layer; param inner. n = in / inner = K 2^k, K the "
    "smallest size with a construction below; Q = (B_K (x) S (x) I_inner) / sqrt(n). stored = w Q; turned = x Q; "
    "y = turned stored^T = x w^T.",
    "S is Sylvester's matrix, S_2m = [[S, S], [S, -S]]. B_1 = 1. With q = K - 1 a prime, q = 3 mod 4: B_K = I + C, C "
    "the matrix with a border: C[0, 0] = 0, C[0, j] = 1, C[i, 0] = -1, C[i, j] = the Legendre symbol of j - i modulo "
    "q. Another Hadamard matrix turns as well: then compare --outputs y.",
    "Folding: inputs gain [d], reader [m, d], writer [d, m], bias [d], f32, and q, f64 [d, d], orthogonal. The reader "
    "takes the gain of the norm before it, then meets the residual stream in the basis q: reader diag(gain) q; what "
    "writes to the stream becomes q^T writer, q^T bias.",
    "Widths without a matrix, an inner that does not divide `in`, and a q that is not orthogonal are rejected.",
]
NOTES = {
    "Normalised": note("BASIC", "The matrix is divided by the root of n.", "Products are n times too large."),
    "Side": note(
        "LAYOUT",
        "Rows are multiplied from the right, x Q. B_12 is not symmetric: Q x is another vector.",
        "Weights and inputs turned by different matrices: noise.",
    ),
    "Outer": note("LAYOUT", "B_K is the outer factor, S the inner one: place i lies in block i // 2^k."),
    "Heads": note(
        "LAYOUT",
        "inner neighbours move together: heads are mixed channel by channel.",
        "The channels of a head are mixed with the heads: what was folded into v is undone.",
    ),
    "GainFirst": note(
        "ORDER",
        "The gain of a norm moves into the reader before the basis is turned.",
        "The norm scales channels of the other basis: another function.",
    ),
    "ReaderSide": note("LAYOUT", "A reader, [out, in], is multiplied by q from the right."),
    "WriterSide": note("LAYOUT", "A writer is multiplied by the transpose of q from the left."),
    "Bias": note("BASIC", "The bias of a writer lies in the residual stream and is turned with it."),
    "NoMatrix": note("SHAPE", "There is no Hadamard matrix of size 6 or 18, and none is made up."),
    "BadInner": note("MALFORMED", "inner divides the width."),
    "NotOrthogonal": note("MALFORMED", "q is a rotation, or the function changes."),
    "Random": note("BASIC", "Dyadic random weights and inputs."),
}  # fmt: skip


def _matrix(n: int) -> list[list[int]]:
    """H_n: B_K outside, Sylvester inside."""
    K = next(K for K in (1, 4, 12) if n % K == 0 and (n // K) & (n // K - 1) == 0)
    base = [[1]] if K < 12 else _paley(11)
    m = n // len(base)
    return [[base[i // m][j // m] * (-1) ** bin((i % m) & (j % m)).count("1") for j in range(n)] for i in range(n)]


def _paley(q: int) -> list[list[int]]:
    squares = {i * i % q for i in range(1, q)}
    symbol = lambda a: 0 if a % q == 0 else 1 if a % q in squares else -1
    entry = lambda i, j: int(i == j) + (-1 if j == 0 and i else int(i == 0 and j > 0))
    inner = lambda i, j: int(i == j) + symbol(j - i)
    return [[inner(i, j) if i and j else entry(i, j) for j in range(q + 1)] for i in range(q + 1)]


def _turned(rows: list[list[Fraction]], inner: int) -> list[list[Fraction]]:
    """Rows times H (x) I, not divided by the root."""
    n = len(rows[0]) // inner
    H = _matrix(n)
    at = [divmod(j, inner) for j in range(n * inner)]
    return [[sum((row[i * inner + r] * H[i][j] for i in range(n)), Fraction(0)) for j, r in at] for row in rows]


def _rows(flat: list[Fraction], columns: int) -> list[list[Fraction]]:
    return [flat[i : i + columns] for i in range(0, len(flat), columns)]


def _divided(rows: list[list[Fraction]], n: int) -> Output:
    """Divided by sqrt(n): exact where that is a power of two, else within two roundings of float32."""
    root = isqrt(n)
    if root * root == n:
        exact = _nested_f32([[v / root for v in row] for row in rows])
        return Output({"class": "bits", "zero_sign": "ignore"}, values("f32", exact))
    near = [[float(to_f32(Fraction(float(v) / sqrt(n)))) for v in row] for row in rows]
    return Output({"class": "allclose", "rtol": 2.0**-21, "atol": 1e-6}, values("f32", near))


def _turn(id: int, comment: str, flags: str, w: list, x: list, inner: int = 1, recipes=(None, None)) -> CaseSpec:
    w, x = ([[Fraction(v) for v in row] for row in rows] for rows in (w, x))
    n = len(w[0]) // inner
    norm = lambda rows: max(sqrt(float(sum(v * v for v in row))) for row in rows)
    y = [[sum(a * b for a, b in zip(row, other, strict=True)) for other in w] for row in x]
    # Sums of `in` products of turned numbers, whose magnitudes add up to |w| |x| at most.
    atol = float(f"{1.1 * (len(w[0]) + 6) * 2.0**-24 * norm(w) * norm(x):.1e}")
    expected = {
        "stored": _divided(_turned(w, inner), n),
        "turned": _divided(_turned(x, inner), n),
        "y": Output({"class": "allclose", "rtol": 0, "atol": atol}, values("f32", _floats(y))),
    }
    inputs = {"w": values("f32", _floats(w), recipe=recipes[0]), "x": values("f32", _floats(x), recipe=recipes[1])}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"inner": inner})


def _turns() -> list[CaseSpec]:
    def draw(id, columns, inner, flags):
        w, x = (_rows(dyadic(id * 10 + i, 5, -2, k * columns), columns) for i, k in ((0, 2), (1, 3)))
        recipes = dyadic_recipe(id * 10, 5, -2), dyadic_recipe(id * 10 + 1, 5, -2)
        return _turn(id, f"{columns} columns, {inner} together", f"Random {flags}", w, x, inner, recipes)

    return [
        _turn(1, "a spike in each of four places", "Normalised", [[8, 0, 0, 0], [0, 0, 4, 0]],
              [[0, 2, 0, 0], [0, 0, 0, 6]]),
        _turn(3, "two heads of two channels", "Heads Normalised", [[1, 2, 4, 8]], [[1, 0, 0, 0], [0, 0, 0, 1]], 2),
        _turn(4, "twelve places", "Side Normalised", [[1, *[0] * 11], [0, 0, 0, 0, 0, 2, *[0] * 6]],
              [[0, 1, *[0] * 10], [1] * 12]),
        _turn(5, "24 places: two inside twelve", "Side Outer Normalised", [[1, *[0] * 23], [0, 1, 0, 3, *[0] * 20]],
              [[0, 0, 1, *[0] * 21], [1] * 24]),
        draw(7, 32, 1, "Normalised"), draw(8, 48, 2, "Heads Side Outer"),
    ]  # fmt: skip


def _orthogonal() -> list[list[Fraction]]:
    """A product of two reflections with a change of sign: dyadic and not symmetric."""
    A, B = householder([1, 1, 1, 1]), householder([1, 0, 1, 0])
    mixed = [[sum(A[i][k] * B[k][j] for k in range(4)) for j in range(4)] for i in range(4)]
    return [[-v if j == 1 else v for j, v in enumerate(row)] for row in mixed]


def _fold(id: int, comment: str, flags: str, gain: list, reader: list, writer: list, bias: list) -> CaseSpec:
    q, d, m = _orthogonal(), range(4), range(len(reader))
    exact = lambda rows: [[Fraction(v) for v in row] for row in rows]
    R, W = exact(reader), exact(writer)
    read = [[sum(R[i][k] * Fraction(gain[k]) * q[k][j] for k in d) for j in d] for i in m]
    written = [[sum(q[k][i] * W[k][j] for k in d) for j in m] for i in d]
    turned = [sum(q[k][i] * Fraction(bias[k]) for k in d) for i in d]
    near = lambda nested: Output(
        {"class": "allclose", "rtol": 2.0**-23, "atol": 1e-14}, values("f32", _nested_f32(nested))
    )
    inputs = {"gain": values("f32", gain), "reader": values("f32", reader), "writer": values("f32", writer)}
    inputs |= {"bias": values("f32", bias), "q": values("f64", _floats(q))}
    expected = {"reader": near(read), "writer": near(written), "bias": near([turned])}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected)


def _floats(rows: list[list[Fraction]]) -> list[list[float]]:
    return [[float(v) for v in row] for row in rows]


def _nested_f32(rows: list[list[Fraction]]) -> list[list[float]]:
    return [[float(to_f32(v)) for v in row] for row in rows]


def _folds() -> list[CaseSpec]:
    rows = lambda seed, n, columns: [
        [float(v) for v in row] for row in _rows(dyadic(seed, 5, -2, n * columns), columns)
    ]
    return [
        _fold(31, "a gain in one channel", "GainFirst", [1, 16, 1, 1], rows(3, 2, 4), rows(4, 4, 2), [0, 0, 0, 0]),
        _fold(32, "a bias", "Bias", [1, 1, 1, 1], rows(5, 2, 4), rows(6, 4, 2), [1, -2, 0.5, 4]),
        _fold(33, "all of it", "GainFirst ReaderSide WriterSide Bias Random", [2, 0, -1, 0.5], rows(7, 6, 4),
              rows(8, 4, 6), [3, 1, -4, 1]),
    ]  # fmt: skip


def _rejected() -> list[CaseSpec]:
    def turn(id, comment, flag, error, columns, inner):
        inputs = {"w": values("f32", [[1.0] * columns]), "x": values("f32", [[1.0] * columns])}
        return CaseSpec(id, comment, (flag,), inputs, result="invalid", error=error, params={"inner": inner})

    shear = [[1.0, 0.5, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]
    inputs = {"gain": values("f32", [1.0] * 4), "reader": values("f32", [[1.0] * 4] * 2)}
    inputs |= {"writer": values("f32", [[1.0] * 2] * 4), "bias": values("f32", [0.0] * 4), "q": values("f64", shear)}
    return [
        turn(50, "6 columns", "NoMatrix", "shape", 6, 1),
        turn(51, "36 columns, 2 together: 18", "NoMatrix", "shape", 36, 2),
        turn(52, "8 columns, 3 together", "BadInner", "shape", 8, 3),
        CaseSpec(54, "a shear", ("NotOrthogonal",), inputs, result="invalid", error="value"),
    ]


def suite() -> SuiteSpec:
    """The suite transform/quarot."""
    head = manifest_head(
        __name__,
        "transform/quarot",
        "Hadamard rotations: turned weights and inputs, and rotations folded into weights",
        HEADER,
        "lessons/13-rotations.md",
    )
    source = {"kind": "first_principles", "name": "the header above, with integers and fractions"}
    return SuiteSpec(
        head, NOTES, [({"params": {}, "source": source}, cases) for cases in (_turns(), _folds(), _rejected())]
    )
