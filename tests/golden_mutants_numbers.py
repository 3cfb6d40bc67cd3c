"""Plain NumPy implementations of the ops of number formats and microscaling, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake. A format is a table
of its values here, and encoding is a search among them.
"""

import numpy as np

from tests import golden_mutants_small

BUGS = {
    **golden_mutants_small.BUGS,
    "formats.float.encode": {
        "ties_away": "TieToEven",
        "ties_zero": "TieToEven",
        "truncates": "Nearest",
        "via_float32": "DoubleRounding",
        "via_bfloat16": "Nearest",
        "flushes_subnormals": "Subnormal",
        "bias_off_by_one": "EveryCode",
        "drops_zero_sign": "NegativeZero",
        "fnuz_negative_zero": "Fnuz",
        "nan_is_largest": "NonFinite",
        "wraps": "Overflow",
        "early_overflow": "Overflow",
        "sign_dropped_wrongly": "Unsigned",
        "e8m0_one_low": "E8m0Edge",
        "e8m0_zero_is_one": "E8m0Edge",
        "no_params_check": "BadParams",
        "noise": "Random",
    },
    "formats.float.decode": {
        "bias_off_by_one": "EveryCode",
        "no_specials": "Specials",
        "ieee_specials": "Specials",
        "leading_one_in_subnormals": "Subnormal",
        "drops_zero_sign": "NegativeZero",
        "fnuz_negative_zero": "Fnuz",
        "e8m0_zero": "E8m0Edge",
        "no_params_check": "BadParams",
    },
    "formats.mx.encode": {
        "one_low": "ScaleRule",
        "log2_float32": "ScaleRule",
        "wraps": "Clip",
        "ties_away": "TieToEven",
        "groups_along_rows": "BlockAxis",
        "one_scale_a_row": "BlockAxis",
        "least_scale_2_to_minus_126": "E8m0Edge",
        "zero_block_scale_1": "AllZeroGroup",
        "drops_zero_sign": "NegativeZero",
        "nan_ignored": "NonFinite",
        "pads": "GroupNotDividing",
        "no_params_check": "BadParams",
        "noise": "Random",
    },
    "formats.nvfp4.encode": {
        "reciprocal_global_scale": "GlobalScale",
        "no_global_scale": "GlobalScale",
        "one_scale_a_row": "BlockAxis",
        "ties_away": "TieToEven",
        "zero_scale": "AllZeroGroup",
        "drops_zero_sign": "NegativeZero",
        "flushes_subnormal_scales": "Subnormal",
        "unrounded_scale": "ScaleRoundedFirst",
        "nan_ignored": "NonFinite",
        "pads": "GroupNotDividing",
        "noise": "Random",
    },
}
# exponent bits, mantissa bits, bias, specials, signed
TABLE = {
    "FP16": (5, 10, 15, "ieee", 1), "BF16": (8, 7, 127, "ieee", 1), "TF32": (8, 10, 127, "ieee", 1),
    "FP8_E4M3FN": (4, 3, 7, "fn", 1), "FP8_E5M2": (5, 2, 15, "ieee", 1), "FP8_E4M3FNUZ": (4, 3, 8, "fnuz", 1),
    "FP8_E5M2FNUZ": (5, 2, 16, "fnuz", 1), "FP6_E2M3": (2, 3, 1, "", 1), "FP6_E3M2": (3, 2, 3, "", 1),
    "FP4_E2M1": (2, 1, 1, "", 1), "UE4M3": (4, 3, 7, "fn", 0), "E8M0": (8, 0, 127, "fn", 0),
}  # fmt: skip
MX = {
    "MXFP8_E4M3": "FP8_E4M3FN", "MXFP8_E5M2": "FP8_E5M2", "MXFP6_E2M3": "FP6_E2M3", "MXFP6_E3M2": "FP6_E3M2",
    "MXFP4": "FP4_E2M1", "MXINT8": "INT8",
}  # fmt: skip


def mutant(bug):
    """An implementation `f(op, params, inputs)` of all these ops with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            return _OPS[op](bug, params, **inputs)

    return implementation


def require(condition, bug, check):
    if not condition and bug != check:
        raise ValueError(check)


def known(bug, params, formats):
    require(params["format"] in formats, bug, "no_params_check")
    return params["format"] if params["format"] in formats else next(iter(formats))


def magnitudes(name, bug=None):
    """The numbers of all codes without sign as if none were special, and the next one."""
    exponent, mantissa, bias, _, _ = TABLE[name]
    codes = np.arange((1 << (exponent + mantissa)) + 1)
    field, fraction = codes >> mantissa, codes % (1 << mantissa)
    subnormal = (field == 0) & (name != "E8M0")
    bias += bug == "bias_off_by_one"
    leading = ~subnormal | (bug == "leading_one_in_subnormals")
    return np.ldexp(fraction / (1 << mantissa) + leading, np.where(subnormal, 1, field) - bias)


def finite_codes(name):
    exponent, mantissa, _, specials, _ = TABLE[name]
    count = 1 << (exponent + mantissa)
    return count - {"ieee": 1 << mantissa, "fn": 1}.get(specials, 0)


def encode(name, x, bug=None):
    exponent, mantissa, _, specials, signed = TABLE[name]
    if bug == "via_float32":
        x = x.astype(np.float32)
    if bug == "via_bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        x = (bits + 0x7FFF + ((bits >> 16) & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    x = x.astype(np.float64)
    table, count, sign = magnitudes(name, bug), finite_codes(name), signed << (exponent + mantissa)
    size = np.abs(x)
    high = np.clip(np.searchsorted(table, size, "left"), 1, len(table) - 1)
    low, middle = high - 1, (table[high] + table[high - 1]) / 2
    at_tie = {"ties_away": high, "ties_zero": low}.get(bug, np.where(low % 2 == 0, low, high))
    codes = np.where(size > middle, high, np.where(size < middle, low, at_tie))
    codes = np.where(size == table[high], high, codes)
    if bug == "truncates" or (bug == "e8m0_one_low" and name == "E8M0"):
        codes = np.where(size < table[high], low, high)
    codes = np.where((size <= table[0]), 0, codes)
    if bug == "flushes_subnormals" and name != "E8M0":
        codes = np.where(size < table[1 << mantissa], 0, codes)
    infinite = count if specials == "ieee" else count - 1
    codes = np.where(np.isinf(size), infinite, np.minimum(codes, count - 1 - (bug == "early_overflow")))
    if bug == "wraps":
        over = np.isfinite(size) & (size > table[count - 1])
        codes = np.where(over, codes % max(count // 2, 1), codes)
    if bug == "e8m0_zero_is_one" and name == "E8M0":
        codes = np.where(x == 0, 127, codes)
    minus = np.signbit(x)
    if signed:
        keep = minus
        if specials == "fnuz" and bug != "fnuz_negative_zero":
            keep = keep & (codes != 0)
        if bug == "drops_zero_sign" and specials != "fnuz":
            keep = keep & (codes != 0)
        codes = codes | np.where(keep, sign, 0)
    elif bug != "sign_dropped_wrongly":
        codes = np.where(minus & (x != 0), count, codes)
    nan = {"ieee": count + (1 << max(mantissa - 1, 0)), "fn": count, "fnuz": sign}.get(specials, 0)
    nan = 1 if bug == "nan_is_largest" else nan
    codes = np.where(np.isnan(x), nan, codes)
    bits = signed + exponent + mantissa
    return codes.astype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)


def decode(name, codes, bug=None):
    exponent, mantissa, _, specials, signed = TABLE[name]
    sign, count = signed << (exponent + mantissa), finite_codes(name)
    codes = codes.astype(np.int64)
    size = codes & ~sign if sign else codes
    values = magnitudes(name, bug)[size]
    if bug == "ieee_specials":
        count, specials = (1 << (exponent + mantissa)) - (1 << mantissa), "ieee"
    if bug != "no_specials":
        if specials == "ieee":
            values = np.where(size == count, np.inf, values)
        values = np.where((size > count) | ((size == count) & (specials == "fn")), np.nan, values)
    if bug == "e8m0_zero" and name == "E8M0":
        values = np.where(codes == 0, 0, values)
    minus = (codes & sign) != 0
    if bug == "drops_zero_sign" and specials != "fnuz":
        minus &= size != 0
    values = np.where(minus, -values, values)
    if specials == "fnuz" and bug != "no_specials":
        values = np.where(codes == sign, -0.0 if bug == "fnuz_negative_zero" else np.nan, values)
    return values.astype(np.float32)


def float_encode(bug, params, x):
    name = known(bug, params, TABLE)
    codes = encode(name, x, bug)
    if bug == "noise" and x.size == 48:
        codes[5] ^= 1
    return {"codes": codes.view(np.float16) if name == "FP16" else codes}


def float_decode(bug, params, codes):
    return {"x": decode(known(bug, params, TABLE), codes, bug)}


def blocks_of(bug, x, size):
    if bug == "pads" and x.shape[-1] % size:
        x = np.pad(x, ((0, 0), (0, -x.shape[-1] % size)))
    require(x.shape[-1] % size == 0, bug, "pads")
    return x.reshape(len(x), -1, size)


def mx_encode(bug, params, x):
    element = MX[known(bug, params, MX)]
    blocks = blocks_of(bug, x, 32).astype(np.float64)
    bad = ~np.isfinite(blocks).all(-1)
    if bug == "nan_ignored":
        blocks, bad = np.where(np.isfinite(blocks), blocks, 0), np.zeros_like(bad)
    blocks = np.where(bad[..., None], 0, blocks)
    amax = np.abs(blocks).max(-1)
    if bug == "one_scale_a_row":
        amax = np.broadcast_to(amax.max(-1, keepdims=True), amax.shape)
    if bug == "groups_along_rows":
        amax = np.roll(amax, 1, axis=0)
    emax = {"FP8_E4M3FN": 8, "FP8_E5M2": 15, "FP6_E3M2": 4, "INT8": 0}.get(element, 2)
    exponent = np.frexp(amax)[1] - 1.0
    if bug == "log2_float32":
        exponent = np.round(np.log2(np.maximum(amax, 2.0**-149)).astype(np.float32))
    exponent -= bug == "one_low"
    shared = np.where(amax == 0, 0 if bug == "zero_block_scale_1" else -127, np.clip(exponent - emax, -127, 127))
    divisor = np.exp2(np.maximum(shared, -126) if bug == "least_scale_2_to_minus_126" else shared)[..., None]
    scaled = blocks / divisor
    if element == "INT8":
        steps = np.sign(scaled) * np.floor(np.abs(scaled) * 64 + 0.5) if bug == "ties_away" else np.rint(scaled * 64)
        whole = steps if bug == "wraps" else np.clip(steps, -127, 127)
        codes = whole.astype(np.int64).astype(np.int8)
        decoded, codes = codes / 64, codes.view(np.uint8)
    else:
        codes = encode(element, scaled, bug if bug in ("ties_away", "wraps", "drops_zero_sign") else None)
        decoded = decode(element, codes).astype(np.float64)
    if bug == "noise" and x.size == 128:
        codes[0, 0, 7] ^= 1
    w_hat = np.where(bad[..., None], np.nan, decoded * np.exp2(shared)[..., None]).astype(np.float32)
    scales = np.where(bad, 255, shared + 127).astype(np.uint8)
    return {"codes": codes.reshape(len(x), -1), "scales": scales, "w_hat": w_hat.reshape(len(x), -1)}


def nvfp4_encode(bug, params, x):
    require(np.isfinite(x).all(), bug, "nan_ignored")
    blocks = blocks_of(bug, np.nan_to_num(x, posinf=0, neginf=0), 16)
    f = np.float32
    amax = np.abs(blocks).max(-1)
    largest = amax.max()
    g = f(2688) * (f(1) / largest) if largest > 0 else f(1)
    g = f(1) if bug == "no_global_scale" else g
    amax = np.broadcast_to(amax.max(-1, keepdims=True), amax.shape) if bug == "one_scale_a_row" else amax
    wanted = g * (amax / f(6))
    scales = encode("FP8_E4M3FN", wanted, "flushes_subnormals" if bug == "flushes_subnormal_scales" else None)
    scales = scales if bug == "zero_scale" else np.where(scales == 0, np.uint8(0x20), scales)
    s = wanted if bug == "unrounded_scale" else decode("FP8_E4M3FN", scales)
    step = (s / g)[..., None]
    codes = encode("FP4_E2M1", blocks / step, bug if bug in ("ties_away", "drops_zero_sign") else None)
    if bug == "noise" and x.size == 256:
        codes[1, 1, 7] ^= 1
    w_hat = (decode("FP4_E2M1", codes) * step).reshape(len(x), -1)
    g = f(1) / g if bug == "reciprocal_global_scale" else g
    return {"codes": codes.reshape(len(x), -1), "scales": scales, "global_scale": np.array(g), "w_hat": w_hat}


_OPS = {
    **golden_mutants_small.OPS,
    "formats.float.encode": float_encode,
    "formats.float.decode": float_decode,
    "formats.mx.encode": mx_encode,
    "formats.nvfp4.encode": nvfp4_encode,
}
