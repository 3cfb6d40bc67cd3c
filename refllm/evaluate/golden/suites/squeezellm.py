"""The suite quant/squeezellm. Ids are never reused: new cases take new numbers."""

import itertools
import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, f16_margin, first_clear, to_f16, to_f32
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs w and fisher, f32 [out, in], fisher not negative. Params: bits; sensitive and outliers, fractions.",
    "Kept apart: the int(sensitive * out * in) weights of largest fisher; of the others the int(outliers * out * in) "
    "of largest |w|, zeros excepted. Equal ones go in row-major order. mask u8 [out, in], 1 = kept apart.",
    "Every row: weights h = fisher, 0 where kept apart, all 1 if none is positive. tables f16 [out, 2^bits], rising: "
    "the 2^bits values v with the smallest sum of h (w - nearest v)^2, rounded to float16; a value that no weight "
    "needs repeats the lowest. The best clusters are the only ones within 1 % of their error: any exact search finds "
    "them.",
    "codes u8 [out, in]: the nearest value of the rounded table, halfway the lower one; 0 in place of the weights kept "
    "apart. values f16: of each weight kept apart, row-major, w - tables[code], rounded. w_hat f32 = tables[code] + "
    "value.",
    "NaN, infinities, a fisher of another shape and fractions outside [0, 1) are rejected.",
]
NOTES = {
    "Weighted": note("BASIC", "Values are weighted means, and errors count by their weight.", "Plain k-means."),
    "PerRow": note("LAYOUT", "Every row has a table of its own."),
    "Sensitive": note("ORDER", "The largest fisher, over the whole matrix, not within rows."),
    "Outliers": note("ORDER", "The largest magnitude of those left: negative weights, too."),
    "ZeroWeight": note(
        "BASIC", "Weights kept apart leave zeros behind, which must not pull a value.", "A value that sticks to 0."
    ),
    "Residual": note(
        "LAYOUT", "The table's value at a place kept apart is part of w_hat: what is stored is the rest.",
        "Outliers that are off by the value nearest to 0.",
    ),
    "NoGradient": note("DEGENERATE", "A row without any weight counts all alike.", "NaN, or a table of zeros."),
    "RoundedFirst": note("PRECISION", "Codes are those of the rounded table."),
    "FewNumbers": note("DEGENERATE", "Fewer different numbers than values."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "BadParams": note("MALFORMED", "A fraction out of range."),
    "BadShape": note("SHAPE", "fisher has the shape of w."),
    "Random": note("BASIC", "Dyadic random weights."),
}  # fmt: skip


def _mean_and_cost(points: list[tuple[Fraction, Fraction]]) -> tuple[Fraction, Fraction]:
    total = sum(h for _, h in points)
    mean = sum(h * x for x, h in points) / total
    return mean, sum(h * (x - mean) ** 2 for x, h in points)


def best_values(row: list[Fraction], weights: list[Fraction], count: int) -> list[Fraction]:
    """The optimum by trying every cut into intervals; refused where another cut is nearly as good."""
    points: dict[Fraction, Fraction] = {}
    for x, h in zip(row, weights, strict=True):
        if h > 0:
            points[x] = points.get(x, Fraction(0)) + h
    ordered = sorted(points.items())
    count_used = min(count, len(ordered))
    best = [{0: [(Fraction(0), [])]}]  # of the first n points: up to two (cost, values)
    for _ in range(count_used):
        layer: dict[int, list] = {}
        for end in range(1, len(ordered) + 1):
            found = []
            for begin, before in best[-1].items():
                if begin < end:
                    mean, cost = _mean_and_cost(ordered[begin:end])
                    found += [(total + cost, [*means, mean]) for total, means in before]
            layer[end] = sorted(found)[:2]
        best.append(layer)
    first, *others = best[-1][len(ordered)]
    if others and others[0][0] < first[0] * Fraction(101, 100):
        raise Unclear("two clusterings are nearly alike")
    return [first[1][0]] * (count - count_used) + first[1]


def quantize(w, fisher, bits: int, sensitive: float, outliers: float) -> dict:
    """The op, weight by weight: {output: (dtype, nested)}."""
    rows, columns = len(w), len(w[0])
    W, F = ([[Fraction(x) for x in row] for row in m] for m in (w, fisher))
    places = [(r, c) for r in range(rows) for c in range(columns)]
    apart = sorted(places, key=lambda p: -F[p[0]][p[1]])[: int(sensitive * len(places))]
    left = [p for p in places if p not in apart]
    largest = sorted(left, key=lambda p: -abs(W[p[0]][p[1]]))[: int(outliers * len(places))]
    apart = {*apart, *(p for p in largest if W[p[0]][p[1]])}
    tables, codes, w_hat, stored = [], [], [], []
    for r in range(rows):
        rest = [Fraction(0) if (r, c) in apart else W[r][c] for c in range(columns)]
        h = [Fraction(0) if (r, c) in apart else F[r][c] for c in range(columns)]
        h = h if any(h) else [Fraction(1)] * columns
        exact = best_values(rest, h, 1 << bits)
        if min(map(f16_margin, exact)) < Fraction(1, 1000):
            raise Unclear("a value lies between two float16")
        table = [to_f16(v) for v in exact]
        code = [sum(x > (a + b) / 2 for a, b in itertools.pairwise(table)) for x in rest]
        tables.append(list(map(float, table)))
        codes.append(code)
        values_of = [table[k] for k in code]
        for c in range(columns):
            if (r, c) in apart:
                stored.append(to_f16(W[r][c] - values_of[c]))
                values_of[c] = to_f32(values_of[c] + stored[-1])
        w_hat.append(list(map(float, values_of)))
    mask = [[int((r, c) in apart) for c in range(columns)] for r in range(rows)]
    return {"mask": ("u8", mask), "tables": ("f16", tables), "codes": ("u8", codes), "w_hat": ("f32", w_hat),
            "values": ("f16", list(map(float, stored)))}  # fmt: skip


def _case(id, comment, flags, w, fisher, bits=1, sensitive=0.0, outliers=0.0) -> CaseSpec:
    params = {"bits": bits, "sensitive": sensitive, "outliers": outliers}
    outputs = quantize(w, fisher, **params)
    bits_of = {"class": "bits", "zero_sign": "ignore"}
    expected = {
        name: Output(bits_of if dtype[0] == "f" else {"class": "bits"}, values(dtype, nested))
        for name, (dtype, nested) in outputs.items()
        if name != "values" or nested
    }
    inputs = {"w": values("f32", w), "fisher": values("f32", fisher)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _random(id, shape, **params) -> CaseSpec:
    rows, columns = shape

    def made(seed):
        cut = lambda flat: [[float(x) for x in flat[i : i + columns]] for i in range(0, rows * columns, columns)]
        w, f = cut(dyadic(seed, 12, -10, rows * columns)), cut(dyadic(seed + 1, 6, -5, rows * columns))
        f = [[x * x for x in row] for row in f]
        return _case(id, f"{rows} x {columns}", "Random Weighted", w, f, **params)

    return first_clear(made, 1000 * id)


def _valid() -> list[CaseSpec]:
    one = lambda rows: [[1.0] * len(row) for row in rows]
    plain = [[0.0, 1, 10, 11, 12, 0.5], [-4, -5, 3, 3.5, 3.25, -4.5]]
    far = [[1.0, 1.25, 4, 4.25, -64, 4.125, 1.5, 32], [-8, -8.5, 2, 2.25, 2.5, -8.25, 2, -9]]
    return [
        _case(1, "two clusters a row", "PerRow", plain, one(plain)),
        _case(2, "a weight of 32 draws its value near", "Weighted", [[0.0, 4, 5, 20, 24, 22]],
              [[1.0, 32, 1, 1, 1, 32]]),
        _case(3, "a weight of 0 counts nothing", "Weighted", [[0.0, 1, 10, 11, 100]], [[1.0, 1, 1, 1, 0]]),
        _case(4, "the two largest magnitudes go, one is negative", "Outliers ZeroWeight Residual", far, one(far),
              outliers=0.125),
        _case(5, "the two most sensitive weights lie in one row", "Sensitive ZeroWeight Residual", far,
              [[1.0, 1, 1, 1, 1, 1, 1, 1], [1, 9, 1, 1, 8, 1, 1, 1]], sensitive=0.125),
        _case(6, "both: sensitive ones first", "Sensitive Outliers", far,
              [[1.0, 1, 1, 1, 5, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]], sensitive=0.0625, outliers=0.0625),
        _case(7, "no gradient in a row", "NoGradient", [[0.0, 1, 10, 12], [0, 1, 10, 14]], [[0.0] * 4, [1.0] * 4]),
        _case(8, "a mean that float16 rounds moves a middle", "RoundedFirst",
              [[0.0, 2049.0, 2049.5, 1024.75, 1024.5]], [[1.0, 1.0, 1.0, 0.0, 0.0]]),
        _case(9, "two different numbers, four values", "FewNumbers", [[3.0, 5, 3, 3]], [[1.0] * 4], bits=2),
        _random(20, (2, 12), bits=2),
        _random(21, (3, 10), bits=2, sensitive=0.04, outliers=0.07),
        _random(22, (1, 14), bits=3),
    ]  # fmt: skip


def _rejected() -> list[CaseSpec]:
    def bad(id, comment, flag, error, w, fisher, **params):
        params = {"bits": 1, "sensitive": 0.0, "outliers": 0.0} | params
        inputs = {"w": values("f32", w), "fisher": values("f32", fisher)}
        return CaseSpec(id, comment, (flag,), inputs, result="invalid", error=error, params=params)

    fine = [[1.0, 2.0]]
    return [
        bad(30, "NaN in w", "NonFinite", "value", [[1.0, math.nan]], fine),
        bad(31, "Inf in fisher", "NonFinite", "value", fine, [[1.0, math.inf]]),
        bad(32, "all weights apart", "BadParams", "value", fine, fine, outliers=1.0),
        bad(33, "a fisher of one column", "BadShape", "shape", fine, [[1.0]]),
    ]


def suite() -> SuiteSpec:
    """The suite quant/squeezellm."""
    head = manifest_head(
        __name__,
        "quant/squeezellm",
        "A table a row by weighted k-means, and the weights kept apart from it",
        HEADER,
        "lessons/14-codebooks.md",
    )
    source = {"kind": "first_principles", "name": "the header above, in exact fractions, every clustering compared"}
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in (_valid(), _rejected())])
