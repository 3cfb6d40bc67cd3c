"""The flags of the suites of number formats and microscaling: which mistake a failing case points at."""

from refllm.evaluate.golden.suites.rtn_notes import note

_RANDOM = note("BASIC", "Numbers of no particular kind, none near a decision.")
_PARAMS = note("MALFORMED", "A format that does not exist must be rejected.")
_SUBNORMAL = note(
    "SUBNORMAL",
    "The field 0 has no leading one: its numbers are fraction / 2^m times the smallest normal number.",
    "Small numbers become 0, or twice as large.",
    "tenstorrent/tt-metal/issues/51971",
)
_FNUZ = note(
    "SIGNED_ZERO",
    "0x80 is NaN in FNUZ formats: a negative number that rounds to zero is +0, code 0.",
    "A zero becomes a NaN, and the NaN spreads.",
    "modelscope/DiffSynth-Studio/pull/1528",
)
ENCODE = {
    "EveryCode": note(
        "BASIC",
        "Every finite number of a format is its own code: exponent, bias and fraction are where they belong.",
        "decode then encode gives other codes.",
        "tenstorrent/tt-metal/issues/51971",
        "tinygrad/tinygrad/pull/14866",
    ),
    "TieToEven": note(
        "ROUNDING", "Halfway between two codes the even one is taken.", "A bias away from zero.", "ROCm/aiter/pull/3992"
    ),
    "Nearest": note("ROUNDING", "One float32 step beside halfway the nearer code is taken, on both sides."),
    "DoubleRounding": note(
        "ROUNDING",
        "One rounding, from float64: through float32 a number just beside halfway becomes a tie.",
        "Codes that are one off, rarely.",
    ),
    "Overflow": note(
        "OVERFLOW",
        "The largest number reaches to halfway of where the next one would be; what lies beyond saturates, or is "
        "infinity or NaN by declaration. It never wraps.",
        "One large weight or activation becomes NaN, or a small number.",
        "jax-ml/ml_dtypes/issues/400",
        "stillwater-sc/universal/pull/1351",
        "pytorch/pytorch/pull/178817",
    ),
    "Subnormal": _SUBNORMAL,
    "NegativeZero": note("SIGNED_ZERO", "-0, and what rounds to zero from below, keep their sign."),
    "Fnuz": _FNUZ,
    "NonFinite": note(
        "NON_FINITE", "NaN is NaN where there is one, infinity is infinity where there is one, else the largest number."
    ),
    "Unsigned": note("NON_FINITE", "A format without sign has no code for a number below zero: NaN."),
    "E8m0Edge": note(
        "ROUNDING",
        "A power of two is itself; others go to the nearest power, and 1.5 2^k is halfway. Code 0 is 2^-127 and "
        "nothing is smaller.",
        "Scales that are off by a factor of two.",
        "ROCm/FlyDSL/pull/590",
        "jax-ml/ml_dtypes/pull/398",
    ),
    "BadParams": _PARAMS,
    "Random": _RANDOM,
}
DECODE = {
    "EveryCode": note(
        "BASIC",
        "Every code: sign, exponent, bias, fraction.",
        "All weights scaled, or some.",
        "tinygrad/tinygrad/pull/14866",
    ),
    "Specials": note(
        "NON_FINITE",
        "Which codes are infinity and NaN: E4M3FN has numbers up to 448 where IEEE would have NaN, FP6 and FP4 have no "
        "special codes at all.",
    ),
    "Subnormal": _SUBNORMAL,
    "NegativeZero": note("SIGNED_ZERO", "The sign bit alone is -0."),
    "Fnuz": _FNUZ,
    "E8m0Edge": note("DEGENERATE", "E8M0 has no zero: code 0 is 2^-127; code 255 is NaN."),
    "BadParams": _PARAMS,
}
_BLOCK_AXIS = note(
    "LAYOUT",
    "A block is consecutive columns of one row; scales stand in the order of the blocks.",
    "Scales have a plausible shape and belong to other numbers.",
    "DeepWok/mase/pull/321",
)
_ZERO_SIGN = note("SIGNED_ZERO", "-0 stays -0 in a floating-point element.")
_TIES = note("ROUNDING", "Elements halfway between two codes take the even one.")
_DIVIDING = note("SHAPE", "A row that is no whole number of blocks is rejected, not padded silently.")
MICROSCALE = {
    "ScaleRule": note(
        "ROUNDING",
        "The exponent of the scale comes from the block's largest magnitude; four rules are in use, which differ where "
        "it is no power of two.",
        "One step of the scale is a factor of two: half of the codes unused, or the largest numbers clipped.",
        "pytorch/ao/issues/436",
        "microsoft/microxcaling/issues/4",
        "ROCm/FlyDSL/pull/590",
        "ROCm/aiter/pull/3212",
    ),
    "Clip": note(
        "OVERFLOW",
        "Scaled numbers beyond the largest element saturate; they become neither NaN nor infinity and do not wrap.",
    ),
    "TieToEven": _TIES,
    "BlockAxis": _BLOCK_AXIS,
    "E8m0Edge": note(
        "SUBNORMAL",
        "Scales end at 2^-127 (code 0) and 2^127; 2^-127 is a subnormal float32, and dividing by 2^-126 instead is "
        "wrong.",
        "Blocks of very small numbers are halved or lost.",
    ),
    "AllZeroGroup": note("DEGENERATE", "A block of zeros has the scale 2^-127 and codes of zero.", "log2(0), NaN."),
    "NegativeZero": _ZERO_SIGN,
    "NonFinite": note("NON_FINITE", "NaN must not vanish: it is rejected, or the scale of its block is NaN."),
    "GroupNotDividing": _DIVIDING,
    "BadParams": _PARAMS,
    "Random": _RANDOM,
}
NVFP4 = {
    "GlobalScale": note(
        "LAYOUT",
        "The tensor's scale is stored as 2688 / amax by some and as amax / 2688 by others.",
        "All weights scaled by its square: garbage.",
        "modular/modular/issues/6600",
        "vllm-project/vllm/issues/54974",
    ),
    "BlockAxis": _BLOCK_AXIS,
    "TieToEven": _TIES,
    "AllZeroGroup": note("DEGENERATE", "The scale of a block of zeros is not 0: 0 / 0 is NaN."),
    "NegativeZero": _ZERO_SIGN,
    "Subnormal": note("SUBNORMAL", "Block scales below 2^-6 are E4M3 subnormals; those below 2^-10 round to zero."),
    "ScaleRoundedFirst": note(
        "PRECISION", "Numbers are divided by the block scale as stored, in E4M3, not as computed."
    ),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected: one would spoil the scale of the whole tensor."),
    "GroupNotDividing": _DIVIDING,
    "Random": _RANDOM,
}
