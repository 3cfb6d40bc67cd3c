"""The suite runtime/speculative. Ids are never reused and never renumbered: new cases take new numbers."""

from fractions import Fraction

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, Values, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, to_f64
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs p, f64 [n + 1, V], the model's distribution at each of n drafted positions and after the last; q, "
    "f64 [n, V], the "
    "draft's; drafted i64 [n]; uniforms f64, random numbers in [0, 1), used from the front: one for each drafted "
    "token that "
    "is looked at, then one for the token that is drawn.",
    "In order: accept x = drafted[i] if u * q_i(x) < p_i(x). At the first that is not, draw from max(p_i - q_i, "
    "0) and stop; "
    "if nothing is left of that (p = q up to rounding), draw from p_i. If all are accepted, draw from p_n. "
    "Drawing: the first "
    "id at which the cumulative sum exceeds u times the total.",
    "Outputs: accepted i64 [], the number of drafted tokens kept; next_id i64 [], the one drawn.",
    "Cases without drafted and uniforms ask for probabilities, n = 1: acceptance f64 [V], the probability that x "
    "is accepted "
    "if it is drafted (0 where q is 0); residual f64 [V], the distribution after a rejection (not expected where "
    "p = q); "
    "distribution f64 [V], that of the first token that results, which is p. Leave these out by raising "
    "NotImplementedError.",
    "All probabilities are dyadic, and no decision is closer than 10^-6 unless it is exact.",
]
NOTES = {
    "AcceptRatio": note(
        "BASIC",
        "Accepted with probability min(1, p(x) / q(x)): not p(x), not only where p exceeds q.",
        "Too few tokens.",
    ),
    "Residual": note(
        "BASIC",
        "After a rejection the token comes from max(p - q, 0), not from p again.",
        "Tokens the draft likes come out too often: the text is no sample of the model.",
    ),
    "ResidualNormalised": note(
        "BASIC",
        "The residual sums to less than 1: normalise it, or scale the uniform number.",
        "The last id too often.",
    ),
    "BonusToken": note(
        "OFF_BY_ONE", "All accepted: one more token, from p after the last.", "A token per pass is given away."
    ),
    "StopAtRejection": note(
        "ORDER", "Nothing behind the first rejection counts, even if it would be accepted.", "Text with a hole."
    ),
    "PositionRow": note("LAYOUT", "Each drafted token is judged by its own row of p and q."),
    "UniformOrder": note("ORDER", "Each decision uses a number of its own."),
    "ZeroProbability": note(
        "DEGENERATE", "p(x) = 0 is never accepted, not even with u = 0.", "A token that top-k has ruled out."
    ),
    "EqualDistributions": note("DEGENERATE", "p = q: everything is accepted, even with the largest u below 1."),
    "EmptyResidual": note(
        "DEGENERATE", "A rejection by rounding where p <= q everywhere: the residual is empty, draw from p.", "0 / 0."
    ),
    "OneHot": note("DEGENERATE", "A draft that is sure of itself (n-gram): the residual is p without x."),
    "Greedy": note("DEGENERATE", "One-hot p: accept where the argmax agrees, else emit it."),
    "Disjoint": note("DEGENERATE", "Nothing in common: always rejected, and the residual is p."),
    "NothingDrafted": note("DEGENERATE", "n = 0: one token from p, one random number."),
    "DrawBoundary": note(
        "OFF_BY_ONE", "u on a step of the cumulative sum takes the next id; u = 0 skips ids of probability 0."
    ),
    "ExactDistribution": note("BASIC", "q(x) min(1, p / q) + P(rejected) residual(x) = p(x), for every x."),
}
BELOW_1 = 1 - 2.0**-53


def _draw(p: list[Fraction], u: Fraction) -> int:
    reached, goal = Fraction(0), u * sum(p)
    chosen = None
    for i, x in enumerate(p):
        reached += x
        if reached != goal and abs(reached - goal) < Fraction(1, 10**6) and u != Fraction(BELOW_1):
            raise Unclear("a draw is too close")
        if chosen is None and reached > goal:
            chosen = i
    return chosen


def _accept(p, q, drafted, uniforms) -> tuple[int, int]:
    numbers = iter(uniforms)
    for i, x in enumerate(drafted):
        u = next(numbers)
        if u * q[i][x] >= p[i][x]:
            rest = [max(a - b, Fraction(0)) for a, b in zip(p[i], q[i], strict=True)]
            return i, _draw(rest if any(rest) else p[i], next(numbers))
    return len(drafted), _draw(p[len(drafted)], next(numbers))


def _exact(rows):
    return [[Fraction(x) for x in row] for row in rows]


def case(id, comment, flags, p, q, drafted, uniforms) -> CaseSpec:
    """A case of decisions."""
    accepted, next_id = _accept(_exact(p), _exact(q), drafted, [Fraction(u) for u in uniforms])
    whole = lambda number: Output({"class": "bits"}, values("i64", number))
    empty = Values("f64", np.zeros((0, len(p[0]))))
    inputs = {
        "p": values("f64", p),
        "q": values("f64", q) if q else empty,
        "drafted": values("i64", drafted),
        "uniforms": values("f64", uniforms),
    }
    expected = {"accepted": whole(accepted), "next_id": whole(next_id)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected)


def law(id, comment, flags, p, q) -> CaseSpec:
    """A case of probabilities."""
    a, b = _exact([p, q])
    acceptance = [min(Fraction(1), x / y) if y else Fraction(0) for x, y in zip(a, b, strict=True)]
    rest = [max(x - y, Fraction(0)) for x, y in zip(a, b, strict=True)]
    residual = [x / sum(rest) for x in rest] if any(rest) else None
    kept = [x * y for x, y in zip(b, acceptance, strict=True)]
    distribution = [x + (1 - sum(kept)) * y for x, y in zip(kept, residual or rest, strict=True)]
    if distribution != a:
        raise ValueError("the definition does not reproduce p")
    close = lambda row: Output(
        {"class": "allclose", "rtol": 0, "atol": 1e-12}, values("f64", [float(to_f64(x)) for x in row])
    )
    expected = {"acceptance": close(acceptance), "distribution": close(distribution)}
    expected |= {"residual": close(residual)} if residual else {}
    inputs = {"p": values("f64", [p, p]), "q": values("f64", [q])}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected)


def _decisions() -> list[CaseSpec]:
    p, q = [0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.25, 0.125]
    other, last = [0.0, 0.125, 0.25, 0.625], [0.0, 0.25, 0.75, 0.0]
    hot = lambda i: [float(i == j) for j in range(4)]
    return [
        case(1, "p / q = 1/2, u = 0.375: accepted, and one more token", "AcceptRatio BonusToken", [p, last], [q], [1],
             [0.375, 0.125]),
        case(2, "p / q = 1/2, u = 0.625: rejected", "AcceptRatio Residual", [p, last], [q], [1], [0.625, 0.875]),
        case(4, "a residual of two ids that sums to 1/4", "ResidualNormalised Residual", [p, last],
             [[0.375, 0.125, 0.375, 0.125]], [2], [0.5, 0.4375]),
        case(5, "p above q: any u", "AcceptRatio UniformOrder", [p, last], [q], [0], [BELOW_1, 0.125]),
        case(6, "both accepted", "BonusToken PositionRow UniformOrder", [p, other, last], [q, q], [0, 3], [0.875, 0.75,
             0.625]),
        case(7, "the second rejected", "PositionRow Residual UniformOrder", [p, other, last], [q, q], [0, 1], [0.25,
            0.5,
             0.9375]),
        case(8, "the first rejected, the second would do", "StopAtRejection", [p, other, last], [q, q], [1, 3], [0.75,
             0.125, 0.5]),
        case(9, "p = 0 and u = 0", "ZeroProbability", [other, last], [q], [0], [0.0, 0.75]),
        case(10, "p = q, the largest u", "EqualDistributions BonusToken", [p, last], [p], [3], [BELOW_1, 0.125]),
        case(11, "p 2^-54 below q at one id", "EmptyResidual", [[0.5, 0.25, 0.25 - 2.0**-54, 0.0], last],
             [[0.5, 0.25, 0.25, 0.0]], [2], [BELOW_1, 0.625]),
        case(12, "one-hot draft, accepted", "OneHot AcceptRatio", [p, last], [hot(1)], [1], [0.1875, 0.5]),
        case(13, "one-hot draft, rejected: p without it", "OneHot Residual", [p, last], [hot(1)], [1], [0.25, 0.6875]),
        case(14, "greedy, agreed twice", "Greedy BonusToken", [hot(2), hot(0), hot(3)], [hot(2), hot(0)], [2, 0], [0.5,
             0.75, 0.5]),
        case(15, "greedy, the second differs", "Greedy StopAtRejection", [hot(2), hot(0), hot(3)], [hot(2), hot(1)],
             [2, 1], [BELOW_1, 0.0, 0.5]),
        case(16, "disjoint", "Disjoint ZeroProbability", [[0.25, 0.75, 0.0, 0.0], last], [[0.0, 0.0, 0.5, 0.5]], [3],
             [0.0, 0.5]),
        case(17, "nothing drafted", "NothingDrafted", [p], [], [], [0.8125]),
        case(18, "u = 0 where p begins with zeros", "DrawBoundary NothingDrafted", [[0.0, 0.0, 0.5, 0.5]], [], [],
            [0.0]),
        case(19, "u on a step", "DrawBoundary", [p], [], [], [0.75]),
    ]  # fmt: skip


def _laws() -> list[CaseSpec]:
    p, q = [0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.25, 0.125]
    return [
        law(40, "any p and q", "ExactDistribution AcceptRatio Residual", p, q),
        law(42, "disjoint", "ExactDistribution Disjoint", [0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]),
        law(43, "equal", "ExactDistribution EqualDistributions", p, p),
        law(44, "two ids left over", "ExactDistribution ResidualNormalised", p, [0.375, 0.125, 0.375, 0.125]),
    ]


def suite() -> SuiteSpec:
    """The suite runtime/speculative."""
    head = manifest_head(
        __name__,
        "runtime/speculative",
        "Speculative decoding: which drafted tokens are kept and what follows, for given random numbers",
        HEADER,
        "lessons/02-prefill-decode-cache.md",
        op="runtime.accept",
    )
    source = {"kind": "first_principles", "name": "the header above, in exact fractions"}
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in (_decisions(), _laws())])
