"""The flags of the suites of integers, lists of values and stochastic rounding: which mistake a case points at."""

from refllm.evaluate.golden.suites.rtn_notes import note

_PARAMS = note("MALFORMED", "A format that does not exist must be rejected.")
ENCODE = {
    "AllCodes": note("BASIC", "Every number of a format is its own code.", "decode then encode gives other codes."),
    "TieToEven": note("ROUNDING", "Halves go to the even number.", "A bias away from zero."),
    "Midpoint": note(
        "ROUNDING",
        "Halfway between two values of a list, (a + b) / 2 in float32, belongs to the lower value; 0 is +1 in BINARY.",
        "Codes that are one off, rarely.",
    ),
    "Nearest": note("ROUNDING", "One float32 step beside halfway the nearer value is taken, on both sides."),
    "DoubleRounding": note(
        "ROUNDING", "One decision, from float64: through float32 a number just beside halfway becomes a tie."
    ),
    "Clip": note(
        "OVERFLOW",
        "What rounds beyond the ends is the end. It wraps only by declaration.",
        "One outlier turns its sign: 8 becomes -8.",
    ),
    "NegativeZero": note(
        "SIGNED_ZERO", "-0, and what rounds to zero from below, is the code of zero; BINARY takes it for +1."
    ),
    "Subnormal": note(
        "SUBNORMAL",
        "Numbers below the smallest normal are near zero, but have a sign: BINARY sees it.",
        "Flushed to zero, they change sides.",
    ),
    "NonFinite": note(
        "NON_FINITE",
        "Infinities are the ends, or rejected. There is no code for NaN: it is rejected, or 0 in an integer format.",
        "A NaN becomes a plausible weight, whichever the machine's cast makes of it.",
    ),
    "BadParams": _PARAMS,
    "Random": note("BASIC", "Numbers of no particular kind, none near a decision."),
}
DECODE = {
    "AllCodes": note("BASIC", "Every code."),
    "TwosComplement": note(
        "LAYOUT", "INTn codes are two's complement in n bits; only TERNARY has an offset, 1.", "Weights shifted."
    ),
    "Table": note(
        "PRECISION",
        "The values are float32, to the bit; the FP4 of bitsandbytes is a list of its own, not E2M1.",
        "All weights slightly off, or garbage.",
    ),
    "Subnormal": note("SUBNORMAL", "The small value of FP4 is 1/192, not the half of the next one."),
    "NegativeZero": note("SIGNED_ZERO", "Zero is +0; only code 8 of FP4 may be -0."),
    "BadCode": note("MALFORMED", "A code that the format does not have is rejected, not cut to its low bits."),
    "BadParams": _PARAMS,
}
STOCHASTIC = {
    "GridPoint": note(
        "ROUNDING", "A number of the format is never moved, -0 included.", "Zeros become noise: sparsity is lost."
    ),
    "Neighbours": note(
        "ROUNDING", "Only the two numbers of the format around x may come out.", "Noise twice as large as it needs be."
    ),
    "Mean": note(
        "ROUNDING",
        "x goes up with the probability of the fraction of a step that is lost, so its mean is x.",
        "Small updates are always lost, or always one step.",
    ),
    "Negative": note("ROUNDING", "The same below zero: the fraction is that of the magnitude.", "A drift."),
    "BinadeEdge": note("ROUNDING", "From the last number below a power of two the step is the smaller one."),
    "Subnormal": note("SUBNORMAL", "Subnormals have equal steps down to zero.", "Small numbers always vanish."),
    "Clip": note(
        "OVERFLOW", "What goes up from the largest number is the largest; infinity or NaN only by declaration."
    ),
    "Random": note("BASIC", "Numbers of no particular kind."),
    "BadParams": _PARAMS,
}
