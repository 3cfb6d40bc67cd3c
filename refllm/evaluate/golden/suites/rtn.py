"""The suite quant/rtn. Ids are never reused and never renumbered: new cases take new numbers."""

import math

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, Values, manifest_head, values
from refllm.evaluate.golden.suites.rtn_definition import Definition, case, invalid, random_case
from refllm.evaluate.golden.suites.rtn_notes import NOTES

HEADER = [
    "Input w, f32 [out, in]. Params: bits 2..8; group_size g > 0 (g consecutive columns of a row share a scale), -1 "
    "(a row), "
    "0 (the whole tensor); symmetric; scale_dtype.",
    "All arithmetic in float32, every operation rounded once. symmetric: scale = amax / (2^(bits-1) - 1), zero point "
    "2^(bits-1), not returned. Otherwise: lo = min(w, 0), hi = max(w, 0), scale = (hi - lo) / (2^bits - 1), "
    "zero_point = "
    "clip(rint(-lo / scale), 0, 2^bits - 1).",
    "The scale is rounded to scale_dtype first, and the rounded scale is used for everything else. A scale that "
    "rounds to zero "
    "becomes the smallest subnormal of scale_dtype; one that overflows is rejected. An all-zero group takes the "
    "scale of a "
    "group with amax 1 (not symmetric: lo -1, hi 1).",
    "codes = clip(rint(w / scale) + zero_point, lowest, 2^bits - 1), u8 [out, in]; lowest is 1 when symmetric, else 0. "
    "w_hat = scale * (codes - zero_point), f32 [out, in].",
    "Outputs: codes; scale [out, groups] ([1, 1] per tensor); zero_point u8 of the same shape unless symmetric; "
    "w_hat; packed: "
    "each row of codes as one little-endian bit stream (code i in bits [i*bits, (i+1)*bits), low bit first), padded "
    "with zero "
    "bits to whole bytes; packed_zero_point: the zero points packed row by row in the same way.",
    "NaN, infinities, a group size that does not divide the columns, and bits or group_size out of range are rejected.",
    "Declare ties=away for rint that rounds halves away from zero, zero_group=scale_one or scale_zero for other "
    "scales of an "
    "all-zero group, arithmetic=float64 for float64 between the float32 input and the rounded scale.",
]
TINY = 2.0**-24  # the smallest float16
BELOW_HALF = float.fromhex("0x1.fffffep-2")  # the largest float32 below 0.5
# Scales of 11 bits whose rounded reciprocal pushes x.5 up (even x) and down (odd x).
UP, DOWN = 1746 / 1024, 1370 / 1024
NAN, INF = math.nan, math.inf


def suite() -> SuiteSpec:
    """The suite quant/rtn."""
    head = manifest_head(
        __name__,
        "quant/rtn",
        "Round to nearest on an integer grid: scales, zero points, codes, packed bytes, decoded weights",
        HEADER,
        "lessons/03-rounding-to-a-grid.md",
    )
    source = {"kind": "first_principles", "name": "the header above, in exact fractions rounded once per operation"}

    def group(cases, **params):
        return {"params": params, "source": source}, cases

    half = {"scale_dtype": "float16"}
    return SuiteSpec(
        head,
        NOTES,
        [
            group(symmetric(), symmetric=True, **half),
            group(affine(), symmetric=False, **half),
            group(float32_scale(), symmetric=True, scale_dtype="float32"),
            group(rejected(True), symmetric=True, **half),
            group(rejected(False), symmetric=False, **half),
        ],
    )


def symmetric() -> list[CaseSpec]:
    """Symmetric grids, float16 scales."""
    return [
        *_symmetric_layout(),
        *_symmetric_rounding(),
        *_symmetric_degenerate(),
    ]  # fmt: skip


def _symmetric_layout() -> list[CaseSpec]:
    s4 = Definition()
    uneven = [[7, -2, 40, -100], [-56, 16, 3, 5], [1, -0.625, 90, 30], [-8, 24, 0.5, 0.375]]
    return [
        case(1, "scale 1, every symmetric code but 0", "ScaleDivisor OffsetBinary UnsignedSubtract", [[-7, -6, -5, -4,
             -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 0]], s4),
        case(2, "8 bits: amax 127 takes codes 1 and 255", "ScaleDivisor OffsetBinary UnsignedSubtract", [[127, -127,
             64, -1, 0, 1], [-127, 100, 3, -99, 126, -126]], Definition(bits=8)),
        case(3, "3 bits: seven codes, rows of 15 bits", "ScaleDivisor OffsetBinary BitStream OddSize", [[3, 2, 1, 0,
             -1], [-3, -2, -1, 0, 3], [1, -3, 2, -2, 3]], Definition(bits=3)),
        case(4, "2 bits: only -1, 0 and 1", "ScaleDivisor OffsetBinary BitStream OddSize", [[1, 0, -1, -1, 0], [0.25,
             -1, 1, 0.75, 0]], Definition(bits=2)),
        random_case(5, "3 x 5, one scale a row", "Transposed OddSize Random", (3, 5), s4),
        case(6, "4 x 4 in groups of 2: rows and columns of very different size", "Transposed GroupAlongWrongAxis",
             uneven, Definition(group_size=2)),
        case(7, "one column", "OddSize AbsmaxNegative", [[7], [-7], [3.5]], s4),
        case(8, "per tensor: a small row beside a large one", "Granularity", [[7, -3, 0, 1], [0.75, -0.25, 0.4375,
             -0.75], [2, 2, -2, 6]], Definition(group_size=0)),
        case(9, "per channel: each row has a scale of its own", "Granularity", [[7, -3, 0, 1], [0.75, -0.25, 0.59375,
             -0.75], [2, 2, -2, 6]], s4),
        case(10, "the largest magnitude is negative", "AbsmaxNegative", [[-7, 3, 1, 0, 2, -1], [-14, 2.5, 13.5, 12,
             -2.5, 4]], s4),
        random_case(11, "8 x 64 in groups of 32", "Random", (8, 64), Definition(group_size=32)),
        random_case(12, "8 bits, one scale a row", "Random", (6, 32), Definition(bits=8)),
        random_case(13, "3 bits in groups of 8", "Random BitStream", (4, 24), Definition(bits=3, group_size=8)),
        random_case(14, "2 bits in groups of 16", "Random BitStream", (4, 32), Definition(bits=2, group_size=16)),
        random_case(15, "per tensor, 8 bits", "Random Granularity", (5, 12), Definition(bits=8, group_size=0)),
    ]  # fmt: skip


def _symmetric_rounding() -> list[CaseSpec]:
    s4 = Definition()
    return [
        case(20, "scale 1, exact halves", "TieToEven", [[0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7], [-0.5, -1.5, -2.5,
             -3.5, -4.5, -5.5, -6.5, 7]], s4, vary=("ties", "away")),
        case(21, "one float32 step beside a half", "RoundBelowHalf", [[BELOW_HALF, -BELOW_HALF, 0.5 + 2.0**-24, 7],
             [1.5 - 2.0**-23, -1.5 + 2.0**-23, 2.5 + 2.0**-22, 7], [-(2.5 + 2.0**-22), 2.5 - 2.0**-22, 6.5 - 2.0**-21,
             -7]], s4, near=True),
        case(22, "exact halves of a scale whose reciprocal rounds", "DivideByScale", [[7 * UP, 2.5 * UP, 6.5 * UP,
             -2.5 * UP], [7 * DOWN, 1.5 * DOWN, 3.5 * DOWN, -1.5 * DOWN]], s4, vary=("ties", "away")),
        case(23, "8 bits: the float16 scale is 4e-4 larger than the exact one", "ScaleRoundedFirst", [[139.4658203125,
             *(float.fromhex(x) for x in ("0x1.0f4dap+7", "0x1.117ffp+7", "0x1.13b26p+7")), -0.25]],
             Definition(bits=8)),
        case(24, "-0.0 and what rounds to it", "NegativeZero", [[-0.0, -0.25, 0.25, 0.0, -7], [7, -0.375, -0.0, 1,
             -1]], s4),
    ]  # fmt: skip


def _symmetric_degenerate() -> list[CaseSpec]:
    s4, g4 = Definition(), Definition(group_size=4)
    return [
        case(30, "scale 3 * 2^-24, a float16 subnormal", "Subnormal", [[21 * TINY, -3 * TINY, 9 * TINY, -21 * TINY],
             [7 * TINY, TINY, -2 * TINY, 0]], s4),
        case(31, "a subnormal scale rounds down: amax is 9.8 scales and clips", "Subnormal Clip", [[9.8125 * TINY,
             -9.8125 * TINY, 3 * TINY, 8.75 * TINY]], s4),
        case(32, "amax / 7 rounds to zero in float16, and in float32", "ScaleUnderflow", [[2.0**-40, -(2.0**-41), 0,
             2.0**-40], [2.0**-149, 0, 0, -(2.0**-149)], [7, 0, 1, -1]], s4),
        case(33, "a group of zeros beside another", "AllZeroGroup", [[0, 0, 0, 0, 7, -3, 2, 0], [1.75, -0.5, 0.25, 1,
             0, -0.0, 0, 0]], g4, vary=("zero_group", "scale_one", "scale_zero")),
        case(34, "nothing but zeros, per tensor", "AllZeroGroup", [[0, 0, 0], [0, 0, 0]], Definition(bits=8,
             group_size=0), vary=("zero_group", "scale_one", "scale_zero")),
        case(35, "all weights equal", "ConstantGroup", [[0.75] * 4, [-0.75] * 4], s4),
        case(36, "the largest scale of float16", "ScaleOverflow", [[7 * 65504, -65504, 0, 1], [7 * 65512, 65536,
             -7 * 65512, 0]], s4),
        CaseSpec(37, "no rows", ("EmptyMatrix",), {"w": Values("f32", values("f32", []).array.reshape(0, 4))},
                 _empty(), result="acceptable", params=s4.params()),
    ]  # fmt: skip


def _empty() -> dict:
    shapes = {"codes": ("u8", 4), "packed": ("u8", 2), "scale": ("f16", 1), "w_hat": ("f32", 4)}
    return {
        name: Output({"class": "bits"}, Values(dtype, values(dtype, []).array.reshape(0, columns)))
        for name, (dtype, columns) in shapes.items()
    }


def affine() -> list[CaseSpec]:
    """Affine grids, float16 scales."""
    a4 = Definition(symmetric=False)
    a = lambda **knobs: Definition(symmetric=False, **knobs)
    return [
        case(50, "codes 0 to 15 in order, zero point 5", "NibbleOrder UnsignedSubtract", [[i - 5 for i in range(16)]],
             a4),
        case(51, "2 bits: codes in order, zero point 1", "BitStream UnsignedSubtract", [[-1, 0, 1, 2, 2, 1, 0, -1],
             [0, 2, 1, -1, 1, -1, 2, 0]], a(bits=2)),
        case(52, "3 bits: codes 0 to 7 in order, zero point 3", "BitStream UnsignedSubtract", [[-3, -2, -1, 0, 1, 2,
             3, 4], [4, 3, 2, 1, 0, -1, -2, -3]], a(bits=3)),
        case(53, "8 bits: codes 0, 1, 127, 128, 254, 255", "UnsignedSubtract ScaleDivisor", [[-100, -99, 27, 28, 154,
             155, 0]], a(bits=8)),
        case(54, "3 rows of 7 codes: padding", "OddSize NibbleOrder", [[-7, 8, 0, 1, 2, 3, -4], [0, 15, 3, 7, 11, 1,
             2], [-15, 0, -1, -2, -3, -4, -14]], a4),
        case(55, "all positive, all negative: zero points 0 and 15", "ZeroPoint ZeroInRange", [[1, 4, 9, 15], [-1, -4,
             -9, -15], [3, 5, 7.25, 6], [-3, -5, -7.25, -6]], a4),
        case(56, "3 groups a row: an odd number of zero points", "ZeroPointPacking ZeroPoint", [[-1, 14, 0, 15, -15,
             0], [-9, 6, -3, 12, -7, 8], [0, 15, -2, 13, -11, 4]], a(group_size=2)),
        case(57, "3 bits, 3 groups a row: 9 bits of zero points", "ZeroPointPacking BitStream", [[-1, 6, 0, 7, -7, 0],
             [-5, 2, -3, 4, -6, 1]], a(bits=3, group_size=2)),
        case(58, "per tensor: one zero point", "Granularity ZeroPointPacking", [[-4, 11, 0], [3, 2, 1]],
             a(group_size=0)),
        case(59, "per channel, 5 x 3", "Transposed Granularity", [[-1, 14, 5], [0, 7.5, 3], [-30, 0, -8], [-2, 28,
             12], [1, 0, -0.875]], a4),
        case(60, "4 x 4 in groups of 2: rows and columns of very different size", "Transposed GroupAlongWrongAxis",
             [[0, 15, -150, 0], [-15, 0, 150, 0], [-7, 8, 70, -80], [3, -12, 0, 1.5]], a(group_size=2)),
        random_case(61, "8 x 64 in groups of 32", "Random", (8, 64), a(group_size=32)),
        random_case(62, "8 bits in groups of 16", "Random", (6, 32), a(bits=8, group_size=16)),
        random_case(63, "3 bits in groups of 8", "Random BitStream ZeroPointPacking", (4, 24), a(bits=3,
                    group_size=8)),
        random_case(64, "2 bits in groups of 16", "Random BitStream ZeroPointPacking", (4, 48), a(bits=2,
                    group_size=16)),
        random_case(65, "7 x 9, one scale a row", "Random OddSize Transposed", (7, 9), a4),
        *_affine_rounding(a4, a),
    ]  # fmt: skip


def _affine_rounding(a4, a) -> list[CaseSpec]:
    return [
        case(70, "exact halves, zero point 5 (odd)", "TieToEven TieBeforeOffset", [[-5, 10, 0.5, 1.5, 2.5, -0.5, -1.5,
             -2.5, 9.5]], a4, vary=("ties", "away")),
        case(71, "the zero point is an exact half: 4.5", "TieToEven", [[-4.5, 10.5, 0, 1, 10, -4]], a4, vary=("ties",
             "away")),
        case(72, "both extremes round outwards: 8 + 8 is clipped to 15", "Clip", [[-7.5029296875, 7.5029296875, 0, 1,
             -1, 7]], a4),
        case(73, "a subnormal scale rounds down: zero point and codes clip", "Clip Subnormal", [[-21 * TINY, 0,
             -3 * TINY, -20 * TINY], [21 * TINY, 0, 3 * TINY, 20 * TINY]], a4),
        case(74, "the float16 scale is 4e-4 larger than the exact one", "ScaleRoundedFirst", [[16.47265625,
             13.73046875, 11.533203125, 0]], a4),
        case(75, "hi - lo is not a float32", "DoubleRounding", [[15.00732421875, -(2.0**-22), 12.505859375, 3]], a4,
             vary=("arithmetic", "float64")),
        case(76, "-0.0 and what rounds to it", "NegativeZero", [[-0.0, -0.25, 15, 0.25], [-15, -0.25, 0.0, -0.0]], a4),
        case(77, "a subnormal scale: 2^-24 and 5 * 2^-24", "Subnormal", [[-5 * TINY, 10 * TINY, 0, TINY], [-25 * TINY,
             50 * TINY, 5 * TINY, -10 * TINY]], a4),
        case(78, "the scale rounds to zero", "ScaleUnderflow", [[2.0**-40, -(2.0**-41), 0], [0, 2.0**-149, 0], [15, 1,
             0]], a4),
        case(79, "a group of zeros beside another", "AllZeroGroup", [[0, 0, 0, 0, 7, -8, 2, 0], [14, -1, 0, 1, 0,
             -0.0, 0, 0]], a(group_size=4), vary=("zero_group", "scale_one", "scale_zero")),
        case(80, "all weights equal, positive and negative", "ConstantGroup ZeroInRange", [[0.9375] * 4,
             [-0.9375] * 4, [30] * 4], a4),
    ]  # fmt: skip


def float32_scale() -> list[CaseSpec]:
    """Symmetric grids with float32 scales."""
    d = Definition(scale_dtype="float32")
    return [
        case(90, "amax / 7 is no float16", "Float32Scale", [[1, -0.4375, 0.25, 0.6875]], d),
        random_case(
            91,
            "16 x 16 in groups of 8",
            "Float32Scale Random",
            (16, 16),
            Definition(group_size=8, scale_dtype="float32"),
        ),
    ]


def rejected(symmetric: bool) -> list[CaseSpec]:
    """What must be rejected."""
    fine = [[7, -3, 2, 1, 0, 1, -1, 5], [1, 2, 3, 4, 5, 6, 7, -7]]

    def planted(value, at):
        rows = [list(map(float, row)) for row in fine]
        rows[at // 8][at % 8] = value
        return rows

    if symmetric:
        return [
            invalid(100, "NaN", "NonFinite", planted(NAN, 0), "value"),
            invalid(101, "+Inf", "NonFinite", planted(INF, 5), "value"),
            invalid(102, "-Inf, the last weight", "NonFinite", planted(-INF, 15), "value", group_size=4),
            invalid(103, "NaN per tensor", "NonFinite", planted(NAN, 11), "value", group_size=0, bits=8),
            invalid(
                104, "10 columns in groups of 4", "GroupNotDividing", [[1.0] * 10, [2.0] * 10], "shape", group_size=4
            ),
            invalid(105, "4 columns in groups of 8", "GroupNotDividing", [[1.0, 2, 3, 4]], "shape", group_size=8),
            invalid(
                106, "amax / 7 is 65520: infinite in float16", "ScaleOverflow", [[7 * 65520.0, 1, 0, 0]], "overflow"
            ),
            invalid(107, "1 bit", "BadParams", fine, "value", bits=1),
            invalid(108, "9 bits", "BadParams", fine, "value", bits=9),
            invalid(109, "group_size -2", "BadParams", fine, "value", group_size=-2),
            invalid(110, "a vector", "BadShape", [1.0, 2, 3, 4], "shape"),
            invalid(111, "three axes", "BadShape", [fine, fine], "shape"),
        ]
    largest = float.fromhex("0x1.fffffep+127")
    return [
        invalid(120, "NaN, the last weight", "NonFinite", planted(NAN, 15), "value"),
        invalid(121, "+Inf and NaN in one group", "NonFinite", [[INF, NAN, 1, 2]], "value"),
        invalid(122, "-Inf", "NonFinite", planted(-INF, 3), "value", group_size=2),
        invalid(123, "5 columns in groups of 2", "GroupNotDividing", [[1.0, 2, 3, 4, 5]], "shape", group_size=2),
        invalid(124, "hi - lo overflows float32", "ScaleOverflow", [[largest, -largest, 0, 1]], "overflow"),
        invalid(125, "(hi - lo) / 15 is 65520", "ScaleOverflow", [[15 * 65520.0, 0, 1, 2]], "overflow"),
    ]  # fmt: skip
