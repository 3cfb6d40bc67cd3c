"""The flags of quant/rtn and quant/rtn_matmul: which mistake a failing case points at."""

_GITHUB = "https://github.com/"


def note(bug_type: str, description: str, effect: str = "", *links: str) -> dict:
    """A note of the schema; links are given without https://github.com/."""
    entry = {"bug_type": bug_type, "description": description}
    if effect:
        entry["effect"] = effect
    return entry | ({"links": [_GITHUB + link for link in links]} if links else {})


LAYOUT = {
    "NibbleOrder": note(
        "LAYOUT",
        "The first code of a byte sits in its low bits. High first, AWQ's 0 2 4 6 1 3 5 7 and the two halves of a "
        "block in one "
        "byte are other layouts.",
        "Weights load cleanly and the model writes garbage.",
        "amd/Quark/pull/30",
        "casper-hansen/AutoAWQ/issues/566",
        "kekzl/imp/pull/567",
    ),
    "BitStream": note(
        "LAYOUT",
        "2- and 3-bit codes are one stream of bits, low bit first; a 3-bit code may straddle two bytes.",
        "Every code after the first straddling one is wrong.",
        "ModelCloud/GPTQModel/pull/1218",
        "intel/auto-round/pull/264",
    ),
    "OddSize": note(
        "SHAPE",
        "A row whose codes do not fill whole bytes: the next row starts on a byte of its own, the unused high bits "
        "are zero.",
        "Rows after the first are shifted, or the last column is lost.",
    ),
    "OffsetBinary": note(
        "LAYOUT",
        "Symmetric codes are stored with 2^(bits-1) added, not as two's complement.",
        "Positive and negative weights trade places.",
    ),
    "Transposed": note(
        "LAYOUT",
        "Weights are [out, in], in C order; groups run along `in`.",
        "A non-square weight has the wrong shape, a square one silently the wrong values.",
    ),
    "GroupAlongWrongAxis": note(
        "LAYOUT",
        "A group is consecutive columns of one row, not consecutive rows of one column.",
        "Scales have a plausible shape and belong to other weights.",
        "DeepWok/mase/pull/321",
    ),
    "Granularity": note("LAYOUT", "group_size -1 is one scale a row, 0 one scale for the whole tensor."),
    "ZeroPoint": note(
        "OFF_BY_ONE",
        "Zero points at both ends of the range, 0 and 2^bits - 1, stored as they are (not minus one).",
        "zero_point - 1 turns 0 into the largest code: thousands of weights wrong, NaN perplexity.",
        "ModelCloud/GPTQModel/issues/2350",
        "vllm-project/vllm/pull/26092",
    ),
    "ZeroPointPacking": note(
        "LAYOUT",
        "Zero points are packed along the groups of a row, each row on a byte of its own, however few there are.",
        "The zero points of odd groups are lost or those of another row.",
        "microsoft/onnxruntime/pull/24828",
    ),
    "UnsignedSubtract": note(
        "OVERFLOW",
        "codes - zero_point is negative for half of the weights: widen the codes before subtracting.",
        "Negative weights become large positive ones (8-bit wrap-around).",
    ),
    "Random": note(
        "BASIC", "Random weights whose every rounding decision is clear: a failure is no matter of rounding."
    ),
}

NOTES = LAYOUT | {
    "ScaleDivisor": note(
        "OFF_BY_ONE",
        "The symmetric scale is amax / (2^(bits-1) - 1): 7, not 7.5 or 8, at 4 bits; the affine one divides by "
        "2^bits - 1.",
        "Every weight is scaled by a few percent.",
    ),
    "AbsmaxNegative": note(
        "OFF_BY_ONE",
        "The largest magnitude is negative: it takes the lowest symmetric code, 1, and the code 0 is never used; the "
        "scale "
        "stays positive.",
        "Large negative weights are clipped, or the whole group changes sign.",
    ),
    "TieToEven": note(
        "ROUNDING",
        "Halves round to the even integer, for codes and for zero points. Declare ties=away if yours go away from "
        "zero.",
        "Codes off by one on exact halves; files differ from the reference bit by bit.",
        "ggml-org/llama.cpp/pull/7234",
    ),
    "TieBeforeOffset": note(
        "ROUNDING",
        "rint(w / scale) + zero_point, not rint(w / scale + zero_point): at a half they differ when the zero point "
        "is odd.",
        "Codes off by one on exact halves.",
    ),
    "RoundBelowHalf": note(
        "ROUNDING",
        "The largest float32 below one half rounds to 0. floor(|x| + 0.5) gives 1, because the sum rounds up to 1.",
        "A rounding that passes for round-half-away, but is not it.",
        "ModelCloud/GPTQModel/pull/3058",
    ),
    "DivideByScale": note(
        "ROUNDING",
        "w / scale, not w * (1 / scale): the reciprocal is rounded, so exact halves move off their place.",
        "Codes off by one.",
        "ggml-org/llama.cpp/pull/7234",
    ),
    "ScaleRoundedFirst": note(
        "PRECISION",
        "Codes and zero points are computed with the scale as it is stored (float16), not with the one before "
        "rounding.",
        "Codes are off by one near half steps: what is decoded is not the nearest point of the grid.",
    ),
    "DoubleRounding": note(
        "PRECISION",
        "hi - lo rounds to float32 before it is divided. Declare arithmetic=float64 if yours does not.",
        "The scale is one float16 step apart.",
    ),
    "Float32Scale": note("PRECISION", "scale_dtype float32: the scale is not rounded to float16, w_hat rounds once."),
    "NegativeZero": note(
        "SIGNED_ZERO",
        "-0.0 and small negative weights decode to +0.0, since codes have no sign of zero.",
        "Decoded weights keep a sign that the stored codes cannot hold: the result was not decoded from them.",
    ),
    "Subnormal": note(
        "SUBNORMAL",
        "The scale is a float16 subnormal; its reciprocal does not fit float16, and flushing it to zero loses the "
        "group.",
        "Infinities, NaN, or a group of zeros.",
    ),
    "ScaleUnderflow": note(
        "SUBNORMAL",
        "The scale rounds to zero, the group is not zero: it takes the smallest subnormal, and all codes mean zero.",
        "Division by zero.",
    ),
    "AllZeroGroup": note(
        "DEGENERATE",
        "A group of zeros beside others. Declare zero_group=scale_one or scale_zero if yours stores another scale.",
        "0 / 0: NaN in scales or decoded weights, though the codes may look right.",
    ),
    "ConstantGroup": note(
        "DEGENERATE",
        "All weights of a group are equal: zero still belongs to the range, so the scale is not zero.",
        "Division by zero, or a constant that decodes to zero.",
    ),
    "ZeroInRange": note(
        "DEGENERATE",
        "All weights of a group have one sign: the range is widened to include zero, so that the zero point fits the "
        "codes.",
        "Zero points out of range, or zero that is not on the grid.",
    ),
    "Clip": note(
        "OVERFLOW",
        "Both extremes round outwards: the code 2^bits must be clipped, before packing.",
        "The largest weight of a group wraps around to the smallest.",
    ),
    "ScaleOverflow": note(
        "OVERFLOW",
        "The largest scale float16 holds is 65504; from 65520 on it would be infinite and the weight is rejected.",
        "An infinite scale: every weight of the group decodes to NaN.",
    ),
    "NonFinite": note(
        "NON_FINITE",
        "A weight with NaN or an infinity is rejected, wherever it stands.",
        "NaN scales, or a group whose other weights all become zero.",
    ),
    "GroupNotDividing": note(
        "SHAPE",
        "group_size must divide the columns: a shorter last group is neither padded nor merged.",
        "Silently wrong scales at the end of each row.",
    ),
    "BadParams": note("MALFORMED", "bits outside 2..8, group_size below -1."),
    "BadShape": note("SHAPE", "A weight is a matrix."),
    "EmptyMatrix": note("SHAPE", "No rows: reject it, or return arrays without rows."),
}
