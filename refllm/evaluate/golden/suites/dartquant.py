"""The suite transform/dartquant. Ids are never reused and never renumbered: new cases take new numbers."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe
from refllm.evaluate.golden.suites.rtn_notes import note
from refllm.evaluate.golden.suites.svd_definition import householder

HEADER = [
    "One step of gradient descent. Inputs x, f64 [n, d], activations as they are, and z, f64 [d, d]; param rate.",
    "z = q r, q orthogonal, r upper triangular with a positive diagonal. loss = mean over the rows of x of the sum "
    "over i of exp(-|o_i|), o = x q. gradient = d loss / d z, through q; where an o_i is 0 its slope is taken as 0. "
    "z_next = z - rate * gradient.",
    "Expected gradients were found forward, entry by entry of z: dq = q W with W antisymmetric and the part of "
    "q^T dz r^-1 below the diagonal.",
]
NOTES = {
    "Absolute": note("BASIC", "exp(-|o|): both signs alike.", "Large negative numbers have a huge loss."),
    "SumOverChannels": note(
        "BASIC", "A sum over the channels of a token, a mean over tokens.", "Another learning rate, d times smaller."
    ),
    "MeanOverTokens": note("BASIC", "The mean over tokens.", "The learning rate depends on the batch."),
    "RawInputs": note(
        "BASIC",
        "Activations are used as they are: the loss is not scale invariant.",
        "Tokens divided by their length lead to another rotation.",
    ),
    "ThroughQR": note(
        "BASIC",
        "The gradient goes through the decomposition: its part that would leave the rotations is zero.",
        "z moves where q does not follow; the loss falls less than it says.",
    ),
    "LowerTriangle": note("LAYOUT", "The lower triangle is mirrored upwards, not the upper one downwards."),
    "InverseR": note("BASIC", "z that is no rotation: the gradient is divided by the transposed r."),
    "PositiveDiagonal": note(
        "LAYOUT",
        "r has a positive diagonal, so a rotation is its own q. LAPACK leaves signs open.",
        "Columns of q change their signs from one library to the next; the loss stays.",
    ),
    "SlopeAtZero": note("DEGENERATE", "Where a rotated number is 0, the slope is 0."),
    "Random": note("BASIC", "Dyadic random inputs."),
}  # fmt: skip


def _matmul(A: list, B: list) -> list:
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*B, strict=True)] for row in A]


def _transposed(A: list) -> list:
    return [list(row) for row in zip(*A, strict=True)]


def _inverse_upper(R: list[list[Fraction]]) -> list[list[Fraction]]:
    d = len(R)
    X = [[Fraction(int(i == j)) for j in range(d)] for i in range(d)]
    for i in reversed(range(d)):
        for j in range(d):
            X[i][j] = (X[i][j] - sum(R[i][k] * X[k][j] for k in range(i + 1, d))) / R[i][i]
    return X


def _case(id: int, comment: str, flags: str, x: list, q: list, r: list, rate: float, recipe=None) -> CaseSpec:
    x, q, r = ([[Fraction(v) for v in row] for row in rows] for rows in (x, q, r))
    d, z = range(len(q)), _matmul(q, r)
    o = [[float(v) for v in row] for row in _matmul(x, q)]
    loss = math.fsum(math.exp(-abs(v)) for row in o for v in row) / len(x)
    sign = lambda v: (v > 0) - (v < 0)
    slopes = [[-sign(v) * math.exp(-abs(v)) / len(x) for v in row] for row in o]
    of_q = [[math.fsum(float(row[i]) * s[j] for row, s in zip(x, slopes, strict=True)) for j in d] for i in d]
    inverse, gradient = _inverse_upper(r), []
    for a in d:
        gradient.append([])
        for b in d:
            C = [[q[a][i] * inverse[b][j] for j in d] for i in d]  # q^T dz r^-1, dz one in (a, b)
            W = [[C[i][j] if i > j else -C[j][i] if j > i else Fraction(0) for j in d] for i in d]
            dq = _matmul(q, W)
            gradient[-1].append(math.fsum(of_q[i][j] * float(dq[i][j]) for i in d for j in d))
    floats = lambda rows: [[float(v) for v in row] for row in rows]
    z_next = [[float(z[a][b]) - rate * gradient[a][b] for b in d] for a in d]
    near = lambda nested: Output({"class": "allclose", "rtol": 1e-9, "atol": 1e-11}, values("f64", nested))
    expected = {"loss": near(loss), "q": near(floats(q)), "gradient": near(gradient), "z_next": near(z_next)}
    inputs = {"x": values("f64", floats(x), recipe=recipe), "z": values("f64", floats(z))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"rate": rate})


def _cases() -> list[CaseSpec]:
    one, turned = [[1, 0], [0, 1]], [[0, -1], [1, 0]]
    reflected = householder([1, 1, 1, 1])
    mixed = _matmul(reflected, [[0, 1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    flat = lambda seed, n, d: [v for v in dyadic(seed, 7, -4, n * d)]
    rows = lambda seed, n, d: [flat(seed, n, d)[i : i + d] for i in range(0, n * d, d)]
    plain = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    upper = [[2, 1, -0.5, 0.25], [0, 0.5, 3, -1], [0, 0, 1, 0.75], [0, 0, 0, 4]]
    return [
        _case(1, "one token, no turn", "Absolute SumOverChannels RawInputs ThroughQR", [[3, -0.5]], one, one, 0.5),
        _case(2, "a token with a zero", "SlopeAtZero MeanOverTokens", [[2, 0], [-1, 0], [0, 0]], one, one, 1.0),
        _case(3, "a quarter turn", "PositiveDiagonal MeanOverTokens Absolute", [[1, 2], [-3, 0.25]], turned, one, 0.25),
        _case(4, "z = q r in two dimensions", "InverseR LowerTriangle ThroughQR", [[1, 2], [0.5, -1]], turned,
              [[2, 3], [0, 0.5]], 0.125),
        _case(5, "a rotation of four", "Random ThroughQR SumOverChannels RawInputs", rows(50, 6, 4), mixed, plain, 0.25,
              dyadic_recipe(50, 7, -4)),
        _case(6, "any z of four", "Random InverseR LowerTriangle PositiveDiagonal", rows(60, 5, 4), mixed, upper, 0.5,
              dyadic_recipe(60, 7, -4)),
    ]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite transform/dartquant."""
    head = manifest_head(
        __name__,
        "transform/dartquant",
        "One step of learning a rotation: Whip loss, and its gradient through QR",
        HEADER,
        "lessons/13-rotations.md",
    )
    source = {"kind": "first_principles", "name": "the header above; q and r exact, exponentials by the C library"}
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, _cases())])
