"""The suite blockwise/omniquant. Ids are never reused and never renumbered: new cases take new numbers."""

import math

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, manifest_head
from refllm.evaluate.golden.suites.omniquant_definition import case, first_case, invalid, random_case
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "One linear with learned clipping and learned scales of its inputs, judged by its own output; all f64: w [out, "
    "in], x [n, in], s [in], c [2, out, groups]: c_hi, then c_lo. In a model the output of a whole block is compared.",
    "Of every group of v = w s: hi = sigmoid(c_hi) max(v, 0), lo = sigmoid(c_lo) min(v, 0). Affine: scale = (hi - lo) "
    "/ (2^bits - 1), zero_point = clip(rint(-lo / scale), 0, 2^bits - 1). Symmetric: scale = max(hi, -lo) / "
    "(2^(bits-1) - 1), zero_point = 2^(bits-1), which is not given. The scale is clipped to [1e-5, 1e4] and rounded "
    "to f16 before it is used. codes = clip(rint(v / scale) + zero_point, 0, 2^bits - 1).",
    "loss = the mean over tokens and outputs of the square of (x / s) V^T - x w^T, V = scale (codes - zero_point).",
    "of_c and of_s are its slopes. rint and the rounding to f16 count as the identity, clips as what they are, "
    "the slope of max and min is 1 for the number that they take.",
    "Cases with amax, f64 [in], the largest |x| of every input: s, where scales begin, max(amax^alpha / m^(1-alpha), "
    "1e-2), m the largest |w| of a column, both at least 1e-5.",
]
NOTES = {
    "Logit": note("BASIC", "c goes through the logistic function.", "Ranges beyond those of the weights."),
    "TwoEnds": note(
        "BASIC",
        "Each end has a factor of its own.",
        "One factor on the largest magnitude cannot clip a lopsided group where it should.",
    ),
    "StraightThrough": note(
        "BASIC", "rint passes slopes.", "Without it what rounds to the same codes has no slope for s or the ends."
    ),
    "ThroughScale": note("BASIC", "Slopes go through the scale.", "The steps within the range have no say."),
    "ThroughZero": note(
        "BASIC",
        "Slopes go through the zero point, too. The authors' code stops them there.",
        "An end that moves is felt as a shift of what the other end clips.",
    ),
    "ClipStops": note("BASIC", "A clipped code does not follow its weight."),
    "Inputs": note("BASIC", "s divides the inputs and multiplies the columns: both have a part in its slope."),
    "ThroughEnds": note("BASIC", "Where s moves the largest weight of a group, it moves the scale."),
    "ZeroInRange": note("DEGENERATE", "A group of one sign keeps 0 in its range.", "Zero points beyond the codes."),
    "LeastStep": note("DEGENERATE", "A scale is at least 1e-5: a group of zeros is no division by 0."),
    "StoredScale": note("BASIC", "Codes are computed with the scale that is stored."),
    "Symmetric": note("BASIC", "The divisor is 2^(bits-1) - 1."),
    "LongerEnd": note("OFF_BY_ONE", "Codes go down to -2^(bits-1), which only what is clipped reaches."),
    "FirstScales": note("BASIC", "alpha is the exponent of the inputs, 1 - alpha that of the weights."),
    "FirstFloor": note("DEGENERATE", "The first scales are at least 1e-2: an input that is always 0."),
    "GroupNotDividing": note("SHAPE", "A group_size that does not divide the columns is rejected."),
    "NonFinite": note("NON_FINITE", "NaN is rejected."),
    "Random": note("BASIC", "Dyadic random inputs."),
}  # fmt: skip


def _plain() -> list[CaseSpec]:
    w, ones = [[-0.8125, -0.1875, 0.34375, 1.6875]], [1.0] * 4
    x = [[1.0, -2, 0.5, 1], [0.25, 1, 1.5, -1]]
    plain = "Logit TwoEnds StraightThrough ThroughScale"
    return [
        case(1, "the upper end clipped by a half", plain + " ThroughZero ClipStops", w, x, ones, [[0.0]], [[4.0]]),
        case(2, "both ends", plain + " ThroughZero ClipStops", w, x, ones, [[1.0]], [[-0.5]]),
        case(3, "scales", "Inputs ThroughEnds ClipStops", w, x, [2.0, 0.5, 1, 0.75], [[1.0]], [[1.0]]),
        case(4, "weights of one sign", "ZeroInRange", [[0.59375, 0.71875, 0.84375, 1.09375]], x, ones, [[2.0]],
             [[2.0]]),
        case(5, "a group of zeros, another beside it", "LeastStep", [[0, 0, 0, 0, *w[0]]], [t + t[::-1] for t in x],
             ones * 2, [[4.0, 3.0]], [[4.0, 3.0]]),
        case(6, "symmetric, clipped below", "Symmetric LongerEnd", [[-1.6875, -0.1875, 0.34375, 0.8125]], x, ones,
             [[1.0]], [[-0.25]], bits=3, symmetric=True),
        first_case(10, "alpha 3/4", "FirstScales", [4.0, 1, 0.5, 2], [*w, [0.5, -0.25, 0.125, 2]], 0.75),
        first_case(11, "an input that is 0, a column of zeros", "FirstFloor", [0.0, 3], [[2.0, 0]], 0.5),
        random_case(20, "2 x 8, two groups", "Random StoredScale " + plain, 2, 2, 4),
        random_case(21, "three bits", "Random ThroughZero Inputs ThroughEnds", 2, 1, 3, bits=3, group_size=6),
    ]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite blockwise/omniquant."""
    head = manifest_head(
        __name__,
        "blockwise/omniquant",
        "OmniQuant on one linear: learned clipping, learned scales, and the slopes of both",
        HEADER,
        "lessons/20-learned-rounding.md",
    )
    source = {"kind": "first_principles", "name": "the header above, each slope carried along by every number"}
    fine, x = [[-0.8125, -0.1875, 0.34375, 1.6875]], [[1.0, -2, 0.5, 1]]
    rejected = [
        invalid(70, "NaN in w", "NonFinite", [[0.5, math.nan, -0.75, 0.25]], x, "value"),
        invalid(71, "NaN in x", "NonFinite", fine, [[1.0, math.nan, 1, 1]], "value"),
        invalid(72, "groups of 3", "GroupNotDividing", fine, x, "shape", group_size=3),
    ]
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in (_plain(), rejected)])
