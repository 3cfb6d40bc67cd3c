"""The suites quant/qoq and transform/smoothattention. Ids are never reused and never renumbered."""

import math
from fractions import Fraction
from math import isqrt

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, dyadic_recipe, nearest, to_f16, to_f32
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Input w, f32 [out, in]. Param group_size: columns of a group, -1 a row. G groups a row.",
    "scale, f16 [out, 1]: amax of the row divided by 119 in float32, rounded to float16, at least 2^-24. int8 of a "
    "row: q0 = w / scale in float32, rounded half to even, clipped to [-119, 119].",
    "Of each group of q0, lo = min(0, least), hi = max(0, largest): level, u8 [out, G] = max(1, round((hi - lo) / "
    "15)); zero, u8 [out, G] = round(-lo / level) clipped to 0 .. 15; codes, u8 [out, in] = round(q0 / level + zero) "
    "clipped to 0 .. 15. All halves go to even.",
    "int8, i8 [out, in] = codes level - zero level, within +-127. w_hat, f32 [out, in] = int8 scale.",
    "NaN, infinities, a group_size that does not divide `in` and a scale beyond 65504 are rejected.",
]
NOTES = {
    "Protected": note(
        "OVERFLOW",
        "The first level ends at 119: rounded levels and zero points carry extremes outwards.",
        "With 127 some groups decode beyond a byte and wrap around.",
    ),
    "StoredScale": note("PRECISION", "Codes are computed with the scale as it is stored, in float16."),
    "FromInt8": note(
        "ORDER", "The second level rounds the int8 of the first, not the weights.", "Two levels that do not nest."
    ),
    "IntegerLevel": note("ROUNDING", "A level is a rounded whole number: not a float, not rounded up."),
    "LevelAtLeastOne": note("DEGENERATE", "A group of small numbers has the level 1, not 0."),
    "ZeroClip": note("DEGENERATE", "A zero point beyond 15 is clipped, and the extremes with it."),
    "PreScale": note(
        "LAYOUT",
        "The zero point counts codes, before the level multiplies; other software stores it in int8 steps.",
        "Decoded groups are shifted by less than a level.",
    ),
    "RowScale": note("LAYOUT", "A float scale for every row."),
    "TieToEven": note("ROUNDING", "Halves go to the even number."),
    "Random": note("BASIC", "Dyadic random weights."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "GroupNotDividing": note("SHAPE", "Groups fill the row."),
    "ScaleOverflow": note("OVERFLOW", "A scale beyond float16 is rejected."),
}  # fmt: skip


def _case(id: int, comment: str, flags: str, w: list[list], group_size: int, recipe=None) -> CaseSpec:
    out = {name: [] for name in ("scale", "level", "zero", "codes", "int8", "w_hat")}
    clip = lambda v, low, high: min(max(v, low), high)
    for row in ([Fraction(v) for v in row] for row in w):
        scale = max(to_f16(to_f32(max(map(abs, row)) / 119)), Fraction(1, 2**24))
        q0 = [clip(nearest(to_f32(v / scale)), -119, 119) for v in row]
        levels, zeros, codes, decoded = [], [], [], []
        width = len(row) if group_size == -1 else group_size
        for start in range(0, len(row), width):
            group = q0[start : start + width]
            low, high = min(0, *group), max(0, *group)
            level = max(1, nearest(Fraction(high - low, 15)))
            zero = clip(nearest(Fraction(-low, level)), 0, 15)
            part = [clip(nearest(Fraction(q, level) + zero), 0, 15) for q in group]
            levels.append(level)
            zeros.append(zero)
            codes += part
            decoded += [c * level - zero * level for c in part]
        parts = ([scale], levels, zeros, codes, decoded, [q * scale for q in decoded])
        for name, numbers in zip(out, parts, strict=True):
            out[name].append([float(v) for v in numbers])
    kinds = {"scale": "f16", "int8": "i8", "w_hat": "f32"}
    expected = {
        name: Output({"class": "bits", "zero_sign": "ignore"} if name == "w_hat" else {"class": "bits"},
                     values(kinds.get(name, "u8"), numbers))
        for name, numbers in out.items()
    }  # fmt: skip
    inputs = {"w": values("f32", [[float(v) for v in row] for row in w], recipe=recipe)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"group_size": group_size})


def _rejected(id: int, comment: str, flag: str, error: str, w: list, group_size: int) -> CaseSpec:
    inputs, params = {"w": values("f32", w)}, {"group_size": group_size}
    return CaseSpec(id, comment, (flag,), inputs, result="invalid", error=error, params=params)


def suite() -> SuiteSpec:
    """The suite quant/qoq."""
    flat = dyadic(7000, 9, -5, 96)
    cases = [
        _case(1, "one-sided groups: 120 is decoded", "Protected RowScale", [[-119, 0, 1, 119]], 2),
        _case(2, "halves in the zero point and in codes", "TieToEven", [[-13, 17, 1, 3, 119, 0, 0, 0]], 4),
        _case(3, "a row of zeros, a group of zeros", "LevelAtLeastOne", [[0, 0, 0, 0], [0, 0, -119, 5]], 2),
        _case(4, "22 steps of one level", "ZeroClip IntegerLevel PreScale", [[-22, 0, -21, 0, 119, -119, 60, -60]], 4),
        _case(5, "rows of very different size", "RowScale StoredScale",
              [[0.125, -0.375, 0.75, 0], [59.515625, 119.046875, 0, 1]], -1),
        _case(6, "3 x 32", "Random FromInt8 IntegerLevel PreScale StoredScale Protected",
              [flat[i : i + 32] for i in (0, 32, 64)], 8, dyadic_recipe(7000, 9, -5)),
        _rejected(20, "NaN", "NonFinite", "value", [[1.0, math.nan]], 2),
        _rejected(21, "6 columns, groups of 4", "GroupNotDividing", "shape", [[1.0] * 6], 4),
        _rejected(22, "1e7", "ScaleOverflow", "overflow", [[1e7, 1.0]], 2),
    ]  # fmt: skip
    head = manifest_head(
        __name__,
        "quant/qoq",
        "Progressive group quantization: 4 bits with integer scales under int8 rows",
        HEADER,
        "lessons/13-rotations.md",
    )
    source = {"kind": "first_principles", "name": "the header above, with fractions"}
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases)])


SMOOTH_HEADER = [
    "Inputs keys, f32 [Hk, T, D], after RoPE in halves (j turns with j + D/2); q, f32 [H D, d], and k, f32 [Hk D, d], "
    "the rows of the projections, heads one after another. Param alpha.",
    "factors, f64 [Hk, D/2]: the largest |key| of the two channels over all tokens, to the power alpha; 1 where both "
    "are 0. k row j or j + D/2 is divided by it, the same row of every query head that reads this key head, "
    "h // (H / Hk), multiplied.",
]
SMOOTH_NOTES = {
    "Paired": note(
        "LAYOUT",
        "Both channels of a pair take the larger factor: RoPE turns them together.",
        "Scores change with the distance of tokens.",
    ),
    "HalfSplit": note("LAYOUT", "Pairs are j and j + D/2, not 2 j and 2 j + 1."),
    "AbsMax": note("BASIC", "The largest magnitude over the tokens: not the mean, not the largest number."),
    "Direction": note("BASIC", "Keys are divided, queries multiplied.", "The cache gets harder to round."),
    "Groups": note("LAYOUT", "Query heads of one group are neighbours."),
    "Alpha": note("BASIC", "The power alpha."),
    "DeadPair": note("DEGENERATE", "A pair that was never active keeps its size: no division by 0."),
    "BadParams": note("MALFORMED", "alpha lies between 0 and 1."),
}  # fmt: skip


def _smooth(id: int, comment: str, flags: str, keys: list, q: list, k: list, alpha: float = 0.5) -> CaseSpec:
    half, group = len(keys[0][0]) // 2, len(q) // len(k)
    factors = []
    for head in keys:
        largest = [max(abs(Fraction(row[j + part])) for row in head for part in (0, half)) for j in range(half)]
        factors.append([Fraction(1) if not v else _power(v, alpha) for v in largest])
    scaled = lambda rows, change, heads: [
        [float(to_f32(change(Fraction(v), factors[i // (2 * half) // heads][i % half]))) for v in row]
        for i, row in enumerate(rows)
    ]
    near = lambda numbers: Output({"class": "ulp", "max_ulp": 1}, values("f32", numbers))
    expected = {
        "factors": Output({"class": "ulp", "max_ulp": 2}, values("f64", [[float(v) for v in row] for row in factors])),
        "q": near(scaled(q, lambda v, s: v * s, group)),
        "k": near(scaled(k, lambda v, s: v / s, 1)),
    }
    inputs = {name: values("f32", array) for name, array in (("keys", keys), ("q", q), ("k", k))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"alpha": alpha})


def _power(v: Fraction, alpha: float) -> Fraction:
    """v, 1, or the root of a square."""
    root = Fraction(isqrt(v.numerator), isqrt(v.denominator))
    if alpha == 0.5 and root * root != v:
        raise Unclear(f"the root of {v} is irrational")
    return {0.0: Fraction(1), 0.5: root, 1.0: v}[alpha]


def smooth_suite() -> SuiteSpec:
    """The suite transform/smoothattention."""
    count = lambda n, first=1: [[first + i] for i in range(n)]
    two = [[[4, 1, -16, 0.25], [0.25, -9, 1, 4]], [[1, 25, 0, 1], [-64, 2, 4, -1]]]
    cases = [
        _smooth(1, "one head of two channels", "Direction AbsMax Alpha", [[[-4, 1], [3, 0]]], [[2], [3]], [[8], [4]]),
        _smooth(2, "one head of four", "Paired HalfSplit AbsMax", two[:1], count(4), count(4, 5)),
        _smooth(3, "two key heads, four query heads", "Groups Paired HalfSplit", two, count(16), count(8, 3)),
        _smooth(4, "a pair of zeros", "DeadPair", [[[0, 4, 0, 1]]], count(4), count(4)),
        _smooth(5, "all of it", "Alpha", [[[2, 8], [0.5, -3]]], count(2), count(2), 1.0),
        CaseSpec(20, "alpha 2", ("BadParams",), {n: values("f32", a) for n, a in (("keys", two[:1]), ("q", count(4)),
                 ("k", count(4)))}, result="invalid", error="value", params={"alpha": 2.0}),
    ]  # fmt: skip
    head = manifest_head(
        __name__,
        "transform/smoothattention",
        "SmoothAttention: the size of key channels moved into queries",
        SMOOTH_HEADER,
        "lessons/13-rotations.md",
    )
    source = {"kind": "first_principles", "name": "the header above, with fractions"}
    return SuiteSpec(head, SMOOTH_NOTES, [({"params": {}, "source": source}, cases)])
