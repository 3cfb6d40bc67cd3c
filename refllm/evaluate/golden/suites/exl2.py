"""The suites blockwise/exl2 and blockwise/exl2_choose. Ids are never reused: new cases take new numbers."""

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import (
    Unclear,
    dyadic,
    dyadic_recipe,
    f16_margin,
    first_clear,
    nearest,
    to_f16,
    to_f32,
)
from refllm.evaluate.golden.suites.gptq_definition import hessian, inverse
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs w, f32 [out, in]; x, f32 [n, in], the inputs of the layer. Params: mix, steps. H = X^T X, plus 0.12 times "
    "its mean diagonal on the diagonal (dead inputs are nothing special). Columns are taken in descending order of "
    "H_jj (before damping), equal ones in their own order: order, i32 [in].",
    "mix: parts like 3@10/64, separated by spaces: 3 bits, 10 percent of the columns, groups of 64 (no @: all that is "
    "left). Part after part takes ceil(min(in * share, columns left) / group) groups; the last group of all may be "
    "narrower. groups, i64 [groups, 2]: bits, columns, in the order taken.",
    "When a group is reached (weights as all columns before have left them): base = (max |w| of the row + 1e-12) / "
    "(2^(bits-1) - 1/2), M the largest base. level = clip(rint(16 sqrt(base / M)), 1, 16), u8 [groups, out]. For p = "
    "0.7 + 0.5 i / steps, i = 0 .. steps: s = p (level / 16)^2 M, and the first p with the least sum of |clip(rint(w "
    "/ s), -2^(bits-1), 2^(bits-1) - 1) s - w|^3.5 over the group is taken. scale = p M, f16 [groups].",
    "step = (level / 16)^2 scale, with the rounded scale. Each column in turn: code = clip(rint(w / step), "
    "-2^(bits-1), 2^(bits-1) - 1), q = code step rounded to float32; all later columns take the least-squares share "
    "of w - q, as in quant/gptq. codes, u8 [out, in], in the order taken: code + 2^(bits-1). w_hat, f32 [out, in], in "
    "the order of w.",
    "nbytes, i64 []: codes (each row of each group in whole bytes), half a byte a level (groups in whole bytes), 2 a "
    "scale, 4 for bits and columns of a group, 4 for each column's place.",
    "A mix that leaves columns over, NaN, infinities are rejected. Every decision is clear of its boundary.",
]
NOTES = {
    "Order": note("ORDER", "Columns with the largest inputs first; equal ones in their own order."),
    "Mix": note(
        "LAYOUT",
        "The first part of a mix gets the first columns; shares are filled by whole groups.",
        "The other end of the matrix gets the bits.",
    ),
    "ShortGroup": note("OFF_BY_ONE", "The last group is as narrow as what is left."),
    "SquaredLevels": note("BASIC", "A level counts with its square.", "Rows with small weights are far too large."),
    "Power": note("BASIC", "The scale is the one with the least sum of |error|^3.5, not of squares."),
    "HalfRange": note("BASIC", "base = max / (2^(bits-1) - 1/2), and codes reach one further down than up."),
    "RoundedScale": note("PRECISION", "Codes are those of the float16 scale."),
    "Compensation": note("BASIC", "Later columns take over what rounding took from a column."),
    "Updated": note("ORDER", "A group is fitted to its weights as all columns before have left them."),
    "Damping": note("BASIC", "0.12 of the mean diagonal, not GPTQ's 0.01."),
    "DeadInput": note("DEGENERATE", "Weights of dead inputs are kept.", "They become 0, as in GPTQ."),
    "Bytes": note("BASIC", "Levels, scales, groups and the order count."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "BadMix": note("MALFORMED", "A mix that leaves columns over is rejected."),
    "Random": note("BASIC", "Dyadic random weights and inputs."),
}
CLEAR = Fraction(1, 1000)
BITS = {"class": "bits"}
FLOATS = {"class": "bits", "zero_sign": "ignore"}


def groups_of(mix: str, columns: int) -> list[tuple[int, int]]:
    """Bits and columns of every group, or ValueError."""
    groups, left = [], columns
    for part in mix.split():
        head, size = part.split("/")
        bits, share = head.split("@") if "@" in head else (head, "100")
        wanted = min(Fraction(columns * int(share), 100), left)
        for _ in range(math.ceil(wanted / int(size))):
            groups.append((int(bits), min(int(size), left)))
            left -= groups[-1][1]
    if left:
        raise ValueError("columns left over")
    return groups


def _code(w: Fraction, step: Fraction, half: int, margins: list) -> int:
    steps = w / step
    margins.append(abs(steps - steps.numerator // steps.denominator - Fraction(1, 2)))
    return min(max(nearest(steps), -half), half - 1)


def _power(error: Fraction) -> Decimal:
    """|error|^3.5, 50 digits."""
    value = Decimal(abs(error).numerator) / Decimal(error.denominator)
    return value**3 * value.sqrt()


def fit(rows: list[list[Fraction]], bits: int, steps: int, margins: list) -> tuple[list[int], Fraction]:
    """Levels and the rounded scale of a group."""
    half = 1 << (bits - 1)
    base = [(max(map(abs, row)) + Fraction(1e-12)) / (half - Fraction(1, 2)) for row in rows]
    levels = []
    for b in base:
        exact = 16 * math.sqrt(b / max(base))
        margins.append(Fraction(abs(exact % 1 - 0.5)))
        levels.append(min(max(round(exact), 1), 16))
    with localcontext() as context:
        context.prec = 50
        totals = []
        for i in range(steps + 1):
            p = Fraction(7, 10) + Fraction(i, 2 * steps)
            total = Decimal(0)
            for row, level in zip(rows, levels, strict=True):
                s = p * Fraction(level, 16) ** 2 * max(base)
                total += sum(_power(_code(w, s, half, []) * s - w) for w in row)
            totals.append(total)
        best = totals.index(min(totals))
        if sorted(totals)[1] < totals[best] * Decimal("1.000001"):
            raise Unclear
    scale = (Fraction(7, 10) + Fraction(best, 2 * steps)) * max(base)
    margins.append(f16_margin(scale))
    return levels, to_f16(scale)


def quantize(w, x, mix: str, steps: int) -> dict:
    """The op blockwise.exl2, number by number: {output: (dtype, nested)}."""
    columns, rows = len(w[0]), len(w)
    groups = groups_of(mix, columns)
    H = hessian([[Fraction(v) for v in row] for row in x])
    order = sorted(range(columns), key=lambda j: (-H[j][j], j))
    add = Fraction(0.12) * sum(H[j][j] for j in range(columns)) / columns
    A = inverse([[H[i][j] + (add if i == j else 0) for j in order] for i in order])
    now = [[Fraction(row[j]) for j in order] for row in w]
    margins: list[Fraction] = []
    codes, w_hat = [[0] * columns for _ in w], [[0.0] * columns for _ in w]
    levels, scales, start = [], [], 0
    for bits, n in groups:
        half = 1 << (bits - 1)
        level, scale = fit([row[start : start + n] for row in now], bits, steps, margins)
        levels.append(level)
        scales.append(float(scale))
        for j in range(start, start + n):
            for r, row in enumerate(now):
                step = Fraction(level[r], 16) ** 2 * scale
                code = _code(row[j], step, half, margins)
                q = to_f32(code * step)
                codes[r][j], w_hat[r][order[j]] = code + half, float(q)
                share = (row[j] - q) / A[j][j]
                for k in range(j, columns):
                    row[k] -= share * A[j][k]
            pivot = list(A[j])
            for m in range(j + 1, columns):
                A[m] = [v - pivot[m] * p / pivot[j] for v, p in zip(A[m], pivot, strict=True)]
        start += n
    if min(margins) < CLEAR:
        raise Unclear
    nbytes = rows * sum(-(-b * n // 8) for b, n in groups) + len(groups) * (-(-rows // 2) + 2 + 4) + 4 * columns
    of_groups = {"groups": ("i64", [list(g) for g in groups]), "level": ("u8", levels), "scale": ("f16", scales)}
    return {"order": ("i32", order), **of_groups, "codes": ("u8", codes), "w_hat": ("f32", w_hat),
            "nbytes": ("i64", nbytes)}  # fmt: skip


def _drawn(id, comment, flags, shape, tokens, mix, steps=96, make=None) -> CaseSpec:
    rows, columns = shape
    cut = lambda flat: [[float(v) for v in flat[i : i + columns]] for i in range(0, len(flat), columns)]

    def made(seed):
        w, x = cut(dyadic(seed, 9, -7, rows * columns)), cut(dyadic(seed + 1, 4, -2, tokens * columns))
        recipes = [dyadic_recipe(seed, 9, -7), dyadic_recipe(seed + 1, 4, -2)]
        if make is not None:
            make(w, x)
            recipes = [None, None]
        outputs = quantize(w, x, mix, steps)
        expected = {
            name: Output(FLOATS if dtype[0] == "f" else BITS, values(dtype, nested))
            for name, (dtype, nested) in outputs.items()
        }
        inputs = {"w": values("f32", w, recipe=recipes[0]), "x": values("f32", x, recipe=recipes[1])}
        return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"mix": mix, "steps": steps})

    return first_clear(made, 1000 * id)


def _uneven(w, x) -> None:
    """The last columns have the largest inputs, the first and the third equal ones; the first row is small."""
    for row in x:
        row[-1] *= 4
        row[-2] *= 2
        row[2] = -row[0]
    w[0] = [v / 8 for v in w[0]]


def _dead(w, x) -> None:
    for row in x:
        row[1] = 0.0


def suite() -> SuiteSpec:
    """The suite blockwise/exl2."""
    cases = [
        _drawn(1, "one group, rows of different sizes", "SquaredLevels HalfRange Order", (3, 4), 6, "4/8", 24, _uneven),
        _drawn(2, "two parts, groups of 2 and 4", "Mix ShortGroup Order Bytes", (3, 7), 10, "5@20/2 2/4", 24, _uneven),
        _drawn(3, "ninety-six steps of p", "Power RoundedScale", (2, 6), 8, "3/6"),
        _drawn(4, "groups of 2", "Compensation Updated Damping", (2, 6), 8, "3/2", 12),
        _drawn(5, "a dead input", "DeadInput", (2, 4), 6, "3/4", 12, _dead),
        _drawn(20, "2 x 10, three parts", "Random Mix Bytes", (2, 10), 12, "6@10/2 3@30/4 2/4", 12),
    ]

    def bad(id, comment, flag, error, w, x, mix):
        inputs = {"w": values("f32", w), "x": values("f32", x)}
        params = {"mix": mix, "steps": 4}
        return CaseSpec(id, comment, (flag,), inputs, result="invalid", error=error, params=params)

    unit = [[1.0, 0.0], [0.0, 1.0]]
    rejected = [
        bad(30, "NaN in w", "NonFinite", "value", [[1.0, math.nan]], unit, "3/2"),
        bad(31, "Inf in x", "NonFinite", "value", [[1.0, 2.0]], [[1.0, math.inf]], "3/2"),
        bad(32, "half the columns", "BadMix", "value", [[1.0, 2.0]], unit, "3@50/1"),
    ]
    return _suite(
        "blockwise/exl2", "blockwise.exl2", "EXL2: one matrix in a mix of widths", HEADER, NOTES, cases, rejected
    )


def _suite(name, op, title, header, notes, *groups) -> SuiteSpec:
    head = manifest_head(__name__, name, title, header, "lessons/17-mixed-precision.md", op=op)
    source = {"kind": "first_principles", "name": "the header above, in fractions and decimals"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases) for cases in groups])


CHOOSE_HEADER = [
    "Inputs: error, f64 [halves, options], from 0 to 1; nbytes, i64, alike; budget, i64 []. Output choice, i64 "
    "[halves]: an option for every half, bytes within the budget.",
    "The choice makes the sum of error^p small, for the p of 1.5 to 3.575 whose choice has the smallest largest "
    "error, by simulated annealing; then what is left is spent where it saves most error^p per byte. Luck must not "
    "matter here: in every case one choice is the best for all those p, and no other comes near.",
    "A budget below the cheapest options is rejected.",
]
CHOOSE_NOTES = {
    "Budget": note("BASIC", "The budget holds."),
    "AllBest": note(
        "BASIC",
        "With enough bytes every half has its option of least error, which need not be its largest.",
    ),
    "Cheapest": note(
        "DEGENERATE",
        "With just enough bytes every half has its cheapest option, which need not be its first.",
    ),
    "Powers": note(
        "BASIC",
        "Sums are of powers of 1.5 and more: large errors count for more.",
        "The sum of errors itself.",
    ),
    "SpendsRest": note("BASIC", "What the largest error does not need is spent on others."),
    "BadBudget": note("MALFORMED", "Below the cheapest options nothing is chosen."),
}


def best_choice(error, nbytes, budget) -> list[int]:
    """The one choice that is best for every power; refused where there is none."""
    found = set()
    for p in (1.4, 1.5, 2, 2.5, 3, 3.5, 3.7):
        sums = {}
        for choice in itertools.product(*(range(len(row)) for row in error)):
            if sum(n[o] for n, o in zip(nbytes, choice, strict=True)) <= budget:
                sums[choice] = sum(e[o] ** p for e, o in zip(error, choice, strict=True))
        best = sorted(sums, key=sums.get)
        found.add(best[0])
        if len(best) > 1 and sums[best[1]] < sums[best[0]] + 1e-3:
            raise Unclear("another choice comes near")
    if len(found) > 1:
        raise ValueError("powers differ")
    return list(found.pop())


def choose_suite() -> SuiteSpec:
    """The suite blockwise/exl2_choose."""

    def case(id, comment, flags, error, nbytes, budget):
        inputs = {"error": values("f64", error), "nbytes": values("i64", nbytes), "budget": values("i64", budget)}
        expected = {"choice": Output(BITS, values("i64", best_choice(error, nbytes, budget)))}
        return CaseSpec(id, comment, tuple(flags.split()), inputs, expected)

    error, nbytes = [[0.75, 0.5, 0.125], [0.875, 0.25, 0.375]], [[4, 8, 16], [4, 10, 12]]
    cases = [
        case(1, "bytes for all", "AllBest", error, nbytes, 100),
        case(2, "bytes for the cheapest only", "Cheapest Budget", [[0.25, 0.5], [0.875, 0.25]], [[8, 4], [4, 10]], 9),
        case(3, "the larger error first", "Budget", error, nbytes, 14),
        case(4, "0.6 to 0.4, or 0.3 to 0.09", "Powers Budget", [[0.6, 0.4], [0.3, 0.09]], [[2, 4], [2, 4]], 6),
        case(5, "a small error is made smaller, too", "SpendsRest", [[0.875, 0.75], [0.5, 0.25]], [[2, 4], [2, 4]], 9),
    ]
    inputs = {"error": values("f64", [[0.5]]), "nbytes": values("i64", [[4]]), "budget": values("i64", 3)}
    bad = CaseSpec(30, "one byte short", ("BadBudget",), inputs, result="invalid", error="value")
    title = "EXL2: an option for every half of a layer within a budget"
    return _suite("blockwise/exl2_choose", "blockwise.exl2.choose", title, CHOOSE_HEADER, CHOOSE_NOTES, cases, [bad])
