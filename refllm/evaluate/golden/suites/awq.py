"""The suite blockwise/awq. Ids are never reused and never renumbered: new cases take new numbers."""

import math

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, manifest_head
from refllm.evaluate.golden.suites.awq_definition import case, invalid, random_case
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs w, f32 [out, in]; x, f32 [n, in], the inputs of the layer. Params: bits, group_size, duo_scaling. One "
    "linear "
    "is judged by its own output; in a model, those that share an input are scaled together and judged behind the "
    "attention or the feed-forward network.",
    "For r = 0, 0.05 .. 0.95, all in float64: a_k = mean |x_k|; s = max(a^r, 1e-4), or with duo_scaling "
    "max(a^r / (m^(1-r) + 1e-4), 1e-4) where m_k is the mean over rows of |w_k| / (amax of its group + 1e-6); s is "
    "divided "
    "by sqrt(max(s) min(s)). W^ = Q(w s) / s, w s rounded to f32. The s is kept whose mean of (x (W^ - w)^T)^2 is "
    "least, "
    "the first of equals: `s`, f64 [in], and `ratio`, i64 [], its number from 0.",
    "Then, for every row and group of w s (f32), with x / s (f32): of the limits amax (1 - i / 20), i = 0 .. 9, "
    "that whose "
    "Q(clip(w s)) changes the group's own part of the output least, the first of equals: `clip_step`, i64 [out, "
    "groups].",
    "Q, on the clipped weights: scale = max(max - min, 1e-5) / (2^bits - 1), rounded to f16; zero_point = "
    "clip(rint(-min / "
    "scale), 0, 2^bits - 1); codes = clip(rint(w / scale) + zero_point, 0, 2^bits - 1). Zero is not forced into the "
    "range. "
    "float32 arithmetic, every operation rounded once.",
    "Errors that are compared are 0.01 % apart at least, or equal. NaN and a group_size that does not divide are "
    "rejected.",
]
NOTES = {
    "MeanNotMax": note("BASIC", "a_k is the mean of |x_k|; the authors' code calls it x_max.", "A rare token decides."),
    "Normalised": note("BASIC", "s is divided by sqrt(max(s) min(s)).", "Steps that leave the range of float16."),
    "Ratios": note("OFF_BY_ONE", "r = i / 20 for i = 0 .. 19: it begins with rounding to nearest and never reaches 1."),
    "DuoScaling": note("BASIC", "AutoAWQ divides by a power of the weights' mean relative size; no r gives s = 1."),
    "DeadInput": note("DEGENERATE", "An input that is always 0 gets 1e-4, not 0.", "0 / 0: NaN weights."),
    "PartsOfGroups": note(
        "BASIC",
        "A limit is judged by the output of its own group, not by that of the whole row.",
        "Errors of groups that cancel hide each other.",
    ),
    "AgainstTheOriginal": note("BASIC", "The output is compared with that of the weights before they are clipped."),
    "OneSign": note(
        "DEGENERATE",
        "Zero is not forced into a group's range: with a zero point that must not leave 0 .. 2^bits - 1, a group of "
        "one "
        "sign saturates.",
        "A grid that holds zero gives other codes: also right, but not what AWQ kernels were written for.",
    ),
    "SmallRange": note("DEGENERATE", "A range is at least 1e-5: zeros have a scale that is not 0."),
    "GroupNotDividing": note("SHAPE", "A group_size that does not divide the columns is rejected."),
    "NonFinite": note("NON_FINITE", "NaN is rejected."),
}  # fmt: skip
LARGE = [[1.0, 8, 0.5, -1], [-2, -12, 1, 0.25], [0.5, 9, -1, 2], [1, -16, 0.25, 1], [0.75, 11, 2, -0.5]]


def _plain() -> list[CaseSpec]:
    moved = lambda found: found.expected["ratio"].tensor.array > 0
    clipped = lambda found: moved(found) and (found.expected["clip_step"].tensor.array > 0).any()
    spike = [[0.25, 1, 2, -1]] * 7 + [[14.25, -1, 2, 1]]
    return [
        case(1, "the second input is ten times the others", "Normalised Ratios",
             [[0.9375, 0.109375, -0.703125, 0.4375], [-0.609375, 0.265625, 0.8125, 0.109375]], LARGE),
        case(2, "one token of eight is large: the mean is 2 like that of others", "MeanNotMax",
             [[0.9296875, 0.2109375, -0.7734375, 0.453125], [-0.6171875, 0.2890625, 0.828125, 0.171875]], spike),
        case(3, "a dead input", "DeadInput",
             [[0.9375, 0.109375, -0.703125, 0.4375]], [[t[0], t[1], 0.0, t[3]] for t in LARGE]),
        case(4, "all weights of a group positive", "OneSign", [[0.53125, 0.6171875, 0.96875, 0.7109375]], LARGE),
        case(5, "a group of zeros", "SmallRange",
             [[0.9375, 0.109375, -0.703125, 0.4375, 0, 0, 0, 0]], [t + t[::-1] for t in LARGE]),
        random_case(20, "3 x 8, two groups", "PartsOfGroups AgainstTheOriginal Ratios", (3, 8), 9, clipped),
        random_case(21, "4 bits", "Normalised MeanNotMax", (2, 16), 12, moved, bits=4, group_size=8),
        random_case(22, "the same with AutoAWQ's scales", "DuoScaling", (3, 8), 9, clipped, duo_scaling=True),
    ]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite blockwise/awq."""
    head = manifest_head(
        __name__, "blockwise/awq", "AWQ on one linear: scale, clipping limits, codes", HEADER, "lessons/11-awq.md"
    )
    source = {
        "kind": "first_principles",
        "name": "the header above, grids in exact fractions, means and errors by fsum",
    }
    fine, nan = [[0.9375, 0.109375, -0.703125, 0.4375]], math.nan
    rejected = [
        invalid(70, "NaN in w", "NonFinite", [[0.9375, nan, -0.703125, 0.4375]], LARGE, "value"),
        invalid(71, "NaN in x", "NonFinite", fine, [[1.0, nan, 1, 1]], "value"),
        invalid(72, "groups of 3", "GroupNotDividing", fine, LARGE, "shape", group_size=3),
    ]
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in (_plain(), rejected)])
