"""The suite lowrank/svd. Ids are never reused and never renumbered: new cases take new numbers."""

import itertools
import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, dyadic_recipe, first_clear
from refllm.evaluate.golden.suites.rtn_notes import note
from refllm.evaluate.golden.suites.svd_definition import case, householder, jacobi, product, rank_of

HEADER = [
    "Input w, f32 [out, in]. Params: rank, or ratio (0.5 where neither is given), and dtype of the factors.",
    "W = U diag(S) V^T, S falling. a = U_r diag(sqrt S_r), dtype [out, r]; b = diag(sqrt S_r) V_r^T, dtype [r, "
    "in]; the "
    "entry of largest magnitude of every row of b is positive. w_hat = a b, f32 [out, in], from the rounded "
    "factors; error "
    "f64 [], the sum of (w - w_hat)^2, which is the sum of the dropped S^2; rank i64 [].",
    "rank from ratio: floor(ratio * out * in / (out + in)). Another sign or another split of S is as good an "
    "approximation: "
    "then compare --outputs w_hat,error,rank. Where singular values are equal or zero the factors are not expected.",
    "Singular values are well apart. The bounds admit a float32 decomposition, whose error e = 64 * 2^-24 * S_1 "
    "turns a "
    "vector by at most 2 e / gap, and one rounding of every entry of a factor.",
    "NaN, infinities, rank beside ratio, a ratio above 1 or one that leaves no rank, a rank outside 1 .. "
    "min(out, in), and "
    "entries beyond dtype are rejected. A rank above break-even, out * in / (out + in), is allowed if asked for.",
]
NOTES = {
    "SqrtSplit": note(
        "LAYOUT", "Both factors get the square root of S.", "The product is the same; float16 overflows sooner."
    ),
    "SignConvention": note(
        "SIGNED_ZERO",
        "A pair of singular vectors is known up to its sign: the largest entry of every row of b is positive.",
        "Files differ between LAPACKs, and a b is -w where only one of the two is turned.",
    ),
    "Orientation": note(
        "LAYOUT",
        "Libraries return V^T or V: the rows of b run along `in`. Neither w nor its factors are symmetric here.",
        "A factor of a plausible shape, a product that is noise.",
    ),
    "Shape": note("SHAPE", "Tall, wide and single-row matrices: r is at most the smaller side."),
    "LargestKept": note("ORDER", "The largest singular values stay: some routines return them rising."),
    "SquaredError": note(
        "BASIC", "The squared Frobenius error is the sum of the dropped S^2: nothing of rank r is nearer.",
    ),
    "RankFloor": note(
        "OFF_BY_ONE",
        "rank = floor(ratio * out * in / (out + in)): not rounded, not ratio * min(out, in).",
        "More numbers stored than asked for; 0.9 of the rank of a square matrix is 1.8 times its size.",
    ),
    "BreakEven": note("DEGENERATE", "A rank beyond break-even is carried out where it is named, up to full rank."),
    "EqualValues": note(
        "DEGENERATE", "Equal singular values: any rotation of their vectors is right, the product is unique."
    ),
    "Deficient": note("DEGENERATE", "Fewer singular values than the rank asked for, or none: zeros, no NaN."),
    "Float32Factors": note("PRECISION", "dtype float32: factors are not rounded to float16."),
    "FactorOverflow": note("OVERFLOW", "A factor entry beyond 65504 is rejected.", "Infinities in the factors."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "BadParams": note("MALFORMED", "rank and ratio that contradict each other or the shape."),
    "BadShape": note("SHAPE", "A weight is a matrix with elements."),
    "Random": note("BASIC", "Dyadic random weights, decomposed by Jacobi rotations in float64."),
}  # fmt: skip
SQUARES = [Fraction(s) for s in (16, 9, 4, 1, Fraction(1, 4))]


def _known(S, left=(1, 1, 1, 1, 2), right=(1, 1, 1, 2, 3)):
    """Factors with exact entries: columns of one reflection, rows of another."""
    U, V = householder(list(left)), householder(list(right))
    return [U[i] for i in range(len(S))], list(S), [V[i] for i in range(len(S))]


def _built(id, comment, flags, triple, rank, **options) -> CaseSpec:
    return case(id, comment, flags, product(triple), triple, rank, **({"rank": rank} | options))


def _factors() -> list[CaseSpec]:
    square = _known(SQUARES)
    row = ([[Fraction(1)]], [Fraction(4)], [[Fraction(x, 4) for x in (1, -1, 1, 2, -3)]])
    tall = _known(SQUARES, left=(1, 2, 1, 0, 1, 1), right=(2, 1, -3, 1, 1))
    wide = _known(SQUARES[:4], left=(1, 1, 1, 1), right=(1, -1, 0, 2, 3, 1))
    return [
        _built(1, "rank 1", "SqrtSplit LargestKept Orientation SquaredError", square, 1),
        _built(3, "rank 4: the largest entry of a row of b is negative before its sign is turned", "SignConvention "
               "BreakEven SquaredError", square, 4),
        _built(4, "full rank", "BreakEven SignConvention", square, 5),
        _built(5, "6 x 5", "Shape Orientation SquaredError", tall, 3),
        _built(6, "4 x 6", "Shape Orientation SignConvention SquaredError", wide, 2),
        _built(7, "one row", "Shape SignConvention", row, 1),
        _built(8, "float32 factors", "Float32Factors SqrtSplit", square, 2, dtype="float32"),
        _built(9, "singular values 3, 3, 1", "EqualValues", _known([Fraction(s) for s in (3, 3, 1)]), 2, free=True),
        _built(10, "rank 3 of a matrix of rank 2", "Deficient", _known([Fraction(s) for s in (9, 4, 0)]), 3, free=True),
        _zeros(11),
    ]  # fmt: skip


def _zeros(id: int) -> CaseSpec:
    exactly = lambda dtype, nested: Output({"class": "bits", "zero_sign": "ignore"}, values(dtype, nested))
    expected = {"w_hat": exactly("f32", [[0] * 3] * 2), "error": exactly("f64", 0), "rank": exactly("i64", 1)}
    inputs = {"w": values("f32", [[0] * 3] * 2)}
    return CaseSpec(id, "nothing but zeros", ("Deficient",), inputs, expected, params={"dtype": "float16", "rank": 1})


def _random() -> list[CaseSpec]:
    def weights(seed):
        flat = [float(x) for x in dyadic(seed, 12, -10, 30)]
        return [flat[i : i + 5] for i in range(0, 30, 5)]

    def made(seed, id=30):
        triple = jacobi(weights(seed))
        S = triple[1]
        if min(a - b for a, b in itertools.pairwise(S)) < S[0] / 8:
            raise Unclear("singular values are not well apart")
        recipe = dyadic_recipe(seed, 12, -10)
        return case(id, "6 x 5", "Random SquaredError Orientation", weights(seed), triple, 2, recipe=recipe, rank=2)

    return [first_clear(made, 30000)]


def _ranks() -> list[CaseSpec]:
    def only_rank(id, shape, ratio, flags="RankFloor"):
        expected = {"rank": Output({"class": "bits"}, values("i64", rank_of(shape, 0.5 if ratio is None else ratio)))}
        flat = [float(x) for x in dyadic(id, 8, -7, shape[0] * shape[1])]
        w = [flat[i : i + shape[1]] for i in range(0, len(flat), shape[1])]
        inputs = {"w": values("f32", w, recipe=dyadic_recipe(id, 8, -7))}
        params = {"dtype": "float16"} | ({} if ratio is None else {"ratio": ratio})
        return CaseSpec(
            id, f"{shape[0]} x {shape[1]}, ratio {ratio}", tuple(flags.split()), inputs, expected, params=params
        )

    return [
        only_rank(40, (6, 10), 0.5),
        only_rank(41, (16, 16), 0.5),
        only_rank(42, (12, 4), None),
        only_rank(44, (24, 8), 1.0, "RankFloor BreakEven"),
    ]


def _rejected() -> list[CaseSpec]:
    fine = [[4.0, 1, 0, 2], [1, 3, 1, 0], [0, 1, 2, 1], [5, 0, 1, 1]]

    def bad(id, comment, flags, error, w=fine, **params):
        params = {"dtype": "float16"} | params
        return CaseSpec(id, comment, (flags,), {"w": values("f32", w)}, result="invalid", error=error, params=params)

    return [
        bad(60, "NaN", "NonFinite", "value", [[1.0, math.nan], [0, 1]], rank=1),
        bad(61, "Inf", "NonFinite", "value", [[1.0, 0], [-math.inf, 1]], rank=1),
        bad(62, "rank and ratio", "BadParams", "value", rank=1, ratio=0.5),
        bad(63, "ratio 1.5", "BadParams", "value", ratio=1.5),
        bad(64, "rank 0", "BadParams", "value", rank=0),
        bad(65, "rank 5 of 4 x 4", "BadParams", "value", rank=5),
        bad(66, "ratio 0.4 of 4 x 4 leaves rank 0", "BadParams", "value", ratio=0.4),
        bad(67, "a vector", "BadShape", "shape", [1.0, 2, 3], rank=1),
        bad(68, "an entry of 2^17", "FactorOverflow", "overflow", [[2.0**34, 0], [0, 1]], rank=1),
    ]


def suite() -> SuiteSpec:
    """The suite lowrank/svd."""
    head = manifest_head(
        __name__,
        "lowrank/svd",
        "Truncated singular value decomposition: factors, their product, its error, the rank",
        HEADER,
        "lessons/08-zeros-and-ranks.md",
        version="1.0.2",
    )
    source = {"kind": "first_principles", "name": "products of known factors; #30 by Jacobi rotations"}
    groups = (_factors(), _random(), _ranks(), _rejected())
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in groups])
