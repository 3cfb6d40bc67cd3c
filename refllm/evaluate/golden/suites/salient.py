"""The suite quant/salient. Ids are never reused and never renumbered: new cases take new numbers."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, to_f16
from refllm.evaluate.golden.suites.rtn_definition import MARGIN, Definition, quantize
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs w, f32 [out, in]; x, f32 [n, in]. Params: bits, group_size, fraction, by. Codes, scale and zero_point "
    "are those "
    "of quant/rtn (symmetric false, scale_dtype float16) for all of w, but in kept columns every code is the zero "
    "point of "
    "its group.",
    "Kept are max(1, floor(fraction * in)) columns, those of largest mean |x_k| (by = activation) or largest sum of "
    "squares "
    "of w_k (by = weight), of equal ones the first. `kept`, i64 [kept], rising; `columns`, f16 [out, kept]: the "
    "weights of "
    "the kept columns.",
]
NOTES = {
    "MeanNotMax": note("BASIC", "Channels are ranked by the mean of |x_k|, not by its maximum."),
    "ByWeight": note("BASIC", "by = weight ranks by the columns of w and does not look at x."),
    "AtLeastOne": note("OFF_BY_ONE", "floor(fraction * in) channels, but one at least."),
    "StableTies": note("ORDER", "Of channels that are equally large the first is kept."),
    "AllFitted": note("BASIC", "The grid is fitted to all columns, kept ones included, as in the authors' experiment."),
    "CodesOfKept": note(
        "LAYOUT", "Kept columns stand in the codes as zero.", "Codes and kept weights are added: columns count twice."
    ),
    "BadParams": note("MALFORMED", "fraction outside 0 < fraction <= 1, or inputs of another width, are rejected."),
}


def _case(id, comment, flags, w, x, kept, *, bits=3, group_size=4, fraction=0.25, by="activation") -> CaseSpec:
    exact = [[Fraction(v) for v in row] for row in w]
    found, margin = quantize(exact, Definition(bits=bits, group_size=group_size, symmetric=False))
    if margin < MARGIN:
        raise Unclear(f"case {id}: a value lies {float(margin):.2g} steps from a rounding boundary")
    codes = [list(row) for row in found["codes"]]
    for row, zeros in zip(codes, found["zero_point"], strict=True):
        for k in kept:
            row[k] = zeros[k // group_size]
    same = {"class": "bits"}
    expected = {
        "kept": Output(same, values("i64", kept)),
        "columns": Output(same, values("f16", [[float(to_f16(row[k])) for k in kept] for row in exact])),
        "codes": Output(same, values("u8", codes)),
        "scale": Output(same, values("f16", [[float(s) for s in row] for row in found["scale"]])),
        "zero_point": Output(same, values("u8", found["zero_point"])),
    }
    params = {"bits": bits, "group_size": group_size, "fraction": fraction, "by": by}
    inputs = {"w": values("f32", w), "x": values("f32", x)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def suite() -> SuiteSpec:
    """The suite quant/salient."""
    head = manifest_head(
        __name__,
        "quant/salient",
        "AWQ's experiment: rounding to nearest beside the few input channels of largest activations",
        HEADER,
        "lessons/11-awq.md",
    )
    source = {"kind": "first_principles", "name": "the header above, in exact fractions"}
    w = [[0.9, 0.1, -0.7, 0.4, 0.3, -0.2, 0.8, 0.6], [-0.5, 0.3, 0.2, 0.7, -0.9, 0.6, 0.1, -0.35]]
    w = [[math.ldexp(round(v * 1024), -10) for v in row] for row in w]
    flat = [[1.0] * 8]
    spike = [
        [1, 3, 3, 1, 1, 1, 0, 1.0],
        [1, 3, 3, 1, 1, 1, 9, 1.0],
        [1, 3, 3, 1, 1, 1, 0, 1.0],
        [1, 3, 3, 1, 1, 1, 0, 1],
    ]
    large = [[row[0] * 8, *row[1:]] for row in w]
    cases = [
        _case(1, "means 3 and 3; a maximum of 9 in one token", "MeanNotMax CodesOfKept", w, spike, [1, 2]),
        _case(2, "the largest columns of w", "ByWeight", w, spike, [0, 4], by="weight"),
        _case(3, "0.01 of 8 is none: one", "AtLeastOne", w, spike, [1], fraction=0.01),
        _case(4, "all inputs alike", "StableTies", w, flat, [0, 1, 2], fraction=0.4),
        _case(5, "the kept column has the largest weights of its group", "AllFitted",
              large, [[9.0] + [1.0] * 7], [0], fraction=0.125),
    ]  # fmt: skip
    bad = lambda id, comment, x, **params: CaseSpec(
        id, comment, ("BadParams",), {"w": values("f32", w), "x": values("f32", x)}, result="invalid", error="value",
        params={"bits": 3, "group_size": 4, "fraction": 0.25, "by": "activation"} | params,
    )  # fmt: skip
    rejected = [bad(70, "fraction 0", flat, fraction=0.0), bad(71, "seven inputs", [[1.0] * 7])]
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, group) for group in (cases, rejected)])
