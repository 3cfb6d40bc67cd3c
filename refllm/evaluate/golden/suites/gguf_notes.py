"""The flags of formats/gguf_decode and formats/gguf_encode: which mistake a failing case points at."""

from refllm.evaluate.golden.suites.rtn_notes import note

_RANDOM = note("BASIC", "Nothing in particular: whatever else is wrong shows here too.")
_PARAMS = note("MALFORMED", "A type that does not exist must be rejected.")
_BITS = note(
    "LAYOUT",
    "Codes count up and every scale is another one. 32-blocks are half-split (byte j holds j and j + 16), K-quants "
    "take numbers 32 apart into one byte, third to sixth bits lie apart, six-bit scales are cut in two.",
    "Weights load cleanly and the model writes garbage.",
    "kekzl/imp/pull/567",
    "microsoft/BitNet/issues/412",
    "Comfy-Org/comfy-kitchen/pull/41",
)
_WIDTH = note("SHAPE", "Rows that are not whole blocks are rejected, never padded.", "Later rows are shifted.")
DECODE = {
    "Random": _RANDOM,
    "BitOrder": _BITS,
    "SignedZero": note("SIGNED_ZERO", "A negative scale times 0 is -0.", "Harmless, but not the same bytes."),
    "Subnormal": note(
        "SUBNORMAL", "The smallest float16 (or the lowest exponent) as scale.", "Small blocks become zeros."
    ),
    "Extremes": note(
        "OVERFLOW",
        "Every code bit set: the largest codes, scales that are -1 where they are signed and 63 where they are not.",
        "A signed field read as unsigned, or the other way round.",
    ),
    "OddSize": _WIDTH,
    "BadParams": _PARAMS,
}
ENCODE = {
    "Random": _RANDOM,
    "Search": note(
        "PRECISION",
        "The scale is searched for: a number of inverse scales is tried and the least weighted error kept, in float32, "
        "sums in element order. The minimum of the best try is used in the next.",
        "A somewhat larger error than ggml's file of the same size.",
    ),
    "Requantized": note(
        "PRECISION",
        "When the scales have been rounded, every code is computed again with the scale that a decoder sees.",
        "Codes that belong to another scale: a larger error, silently.",
    ),
    "NibbleOrder": _BITS,
    "AllZeroGroup": note(
        "DEGENERATE", "A block of zeros has scale 0 and no division by it; Q4_0 and Q5_0 store -0.", "NaN in the file."
    ),
    "NegativeZero": note("SIGNED_ZERO", "-0 counts as 0: nothing but its sign may pass into a minimum."),
    "TieAway": note(
        "ROUNDING",
        "Halves go away from zero: C's roundf, not rint.",
        "Codes off by one on exact halves.",
        "ggml-org/llama.cpp/pull/7234",
    ),
    "TieUp": note("ROUNDING", "Halves go up: the code is the integer part of x / d + 8.5.", "Codes off by one."),
    "TieTowardZero": note(
        "ROUNDING", "FP4 blocks take the lower of two codes that are equally near, and never -0.", "Codes off by one."
    ),
    "AbsmaxNegative": note(
        "OFF_BY_ONE",
        "The sign of the largest magnitude goes into the scale, so that it gets the lowest code.",
        "The largest weight is clipped by one step.",
    ),
    "Subnormal": note(
        "SUBNORMAL",
        "The scale is a subnormal float16: its rounding is coarse, and K-quants must requantize with it.",
        "Small blocks are far off.",
    ),
    "OneSided": note(
        "DEGENERATE",
        "All numbers on one side of zero. K-quants force the minimum to 0 or below; Q4_1 and Q5_1 take it as it is.",
        "A minimum of the wrong sign: the whole block is shifted.",
    ),
    "Importance": note(
        "BASIC",
        "With importance, errors are weighted by importance sqrt(mean(x^2) + x^2); Q6_K by importance alone.",
        "The importance matrix has no effect, or the wrong one.",
    ),
    "ImportanceZero": note("DEGENERATE", "No column counts: the first grid is kept, nothing is divided by zero."),
    "RowMean": note("LAYOUT", "The mean of 4- and 5-bit 32-blocks is that of the row, not of the block."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "ScaleOverflow": note("OVERFLOW", "Numbers whose scale overflows float16 are rejected."),
    "OddSize": _WIDTH,
    "BadImportance": note("MALFORMED", "Importance is not negative, one number a column, and not for every type."),
    "BadParams": _PARAMS,
}
