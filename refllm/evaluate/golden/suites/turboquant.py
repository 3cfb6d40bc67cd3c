"""The suite kvcache/turboquant. Ids are never reused: new cases take new numbers."""

from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import (
    Unclear,
    dyadic,
    dyadic_recipe,
    f16_margin,
    first_clear,
    pack_low_first,
    to_f16,
)
from refllm.evaluate.golden.suites.rtn_notes import note

BITS = {"class": "bits"}
NEAR = {"class": "allclose", "rtol": 3e-4, "atol": 3e-4}  # the tables below have four digits
MARGIN = Fraction(1, 200)
# Max 1960, "Quantizing for minimum distortion", table I: positive centroids of a normal variable.
MAX = {1: [7979], 2: [4528, 15104], 3: [2451, 7560, 13439, 21519]}
# A rotation of exact binary fractions that is not its own transpose.
HALVES = [[Fraction(sign, 2) for sign in row] for row in ([1, 1, 1, 1], [-1, 1, -1, 1], [1, 1, -1, -1], [1, -1, -1, 1])]


def _root(x: Fraction) -> Fraction:
    with localcontext() as context:
        context.prec = 40
        return Fraction((Decimal(x.numerator) / Decimal(x.denominator)).sqrt())


def _table(bits: int) -> list[Fraction]:
    positive = [Fraction(c, 10000) for c in MAX[bits]]
    return [*(-c for c in reversed(positive)), *positive]


def _stored(x: Fraction) -> Fraction:
    if x and f16_margin(x) < MARGIN:
        raise Unclear("a norm lies near the middle of two float16")
    return to_f16(x)


def _dot(a: list, b: list) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def _vector(x: list[Fraction], S: list, bits: int) -> dict:
    """One vector of four numbers; ValueError where a decision is close."""
    norm, table = _root(_dot(x, x)), _table(bits)
    unit = [v / (norm or 1) for v in x]
    turned = [2 * _dot(row, unit) for row in HALVES]  # sqrt(4)
    middles = [(a + b) / 2 for a, b in pairwise(table)]
    if norm and min(abs(y - m) for y in turned for m in middles) < MARGIN:
        raise Unclear("a number lies near the middle of two centroids")
    codes = [sum(y > m for m in middles) for y in turned]
    columns = list(zip(*HALVES, strict=True))
    back = [_dot(column, [table[c] for c in codes]) / 2 for column in columns]
    rest = [u - b for u, b in zip(unit, back, strict=True)]
    products = [_dot(row, rest) for row in S]
    if min(map(abs, products)) < MARGIN:
        raise Unclear("a sign is close")
    size = _root(_dot(rest, rest))
    signs = [int(p >= 0) for p in products]
    pull = _root(Fraction("3.14159265358979323846") / 2) / 4 * size
    more = [pull * _dot([2 * s - 1 for s in signs], [row[j] for row in S]) for j in range(4)]
    kept = _stored(norm)
    return {
        "codes": pack_low_first(codes, bits),
        "norm": float(kept),
        "signs": pack_low_first(signs, 1)[0],
        "residual": float(size),
        "x_hat": [float(kept * b) for b in back],
        "k_hat": [float(kept * (b + m)) for b, m in zip(back, more, strict=True)],
    }


def _case(id, comment, flags, tokens, bits, only) -> CaseSpec:
    def made(seed):
        flat = [float(n) for n in dyadic(seed, 6, -3, 4 * tokens)]
        drawn = [float(n) for n in dyadic(seed + 1, 6, -4, 16)]
        x, S = ([[Fraction(n) for n in part[i : i + 4]] for i in range(0, len(part), 4)] for part in (flat, drawn))
        found = [_vector(row, S, bits) for row in x]
        inputs = {
            "x": values("f32", [[float(n) for n in row] for row in x], recipe=dyadic_recipe(seed, 6, -3)),
            "rotation": values("f32", [[float(n) for n in row] for row in HALVES]),
            "s": values("f32", [[float(n) for n in row] for row in S], recipe=dyadic_recipe(seed + 1, 6, -4)),
        }
        types = {"codes": "u8", "norm": "f16", "signs": "u8"}
        expected = {
            name: Output(BITS if name in types else NEAR, values(types.get(name, "f64"), [f[name] for f in found]))
            for name in only.split()
        }
        return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"bits": bits})

    return first_clear(made, 100 * id)


def suite() -> SuiteSpec:
    """The suite kvcache/turboquant."""
    header = [
        "Inputs f32: x [tokens, D], rotation P [D, D], s [D, D]. n = |x|, y = sqrt(D) P x / n; codes u8: the nearest "
        "of the 2^bits Lloyd-Max centroids of the normal distribution, one little-endian bit stream a token; norm: "
        "f16(n); x_hat = norm P^T centroid / sqrt(D).",
        "r = x / n - P^T centroid / sqrt(D); residual: |r|; signs u8: bit i is 1 where (s r)_i >= 0; k_hat = x_hat + "
        "norm |r| sqrt(pi / 2) / D s^T (+-1).",
    ]
    notes = {
        "Rotation": note("LAYOUT", "P turns, its transpose turns back."),
        "Scale": note("OFF_BY_ONE", "Numbers of a unit vector are 1 / sqrt(D) as large as the table's."),
        "Table": note("BASIC", "Lloyd-Max centroids, not even steps."),
        "Norm": note("PRECISION", "The norm is stored in float16."),
        "Signs": note("ORDER", "Signs are those of the residual, not of x."),
        "Constant": note("OFF_BY_ONE", "sqrt(pi / 2) / D, not 1 / sqrt(D).", "Scores are biased."),
        "Packed": note("LAYOUT", "Low bits first."),
    }
    cases = [
        _case(1, "a key", "Rotation Scale Signs Constant", 1, 2, "codes norm signs residual k_hat"),
        _case(2, "three bits", "Table Norm Packed", 2, 3, "codes norm x_hat"),
    ]
    head = manifest_head(
        __name__,
        "kvcache/turboquant",
        "Vectors turned at random, coded by the table of the normal distribution; signs of what is missed",
        header,
        "lessons/29-random-rotations-of-caches.md",
    )
    source = {"kind": "first_principles", "name": "the header, in fractions, roots with 40 digits, Max's table of 1960"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])
