"""Plain NumPy implementations of the ops of checkpoint formats, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake. Codes are written as
rows of single bits here; values of small floats are computed from their fields.
"""

import json

import numpy as np

CHECKS = {
    "cut_off": "OutOfRange",
    "no_shape_check": "BadShape",
    "no_params_check": "BadParams",
    "pads": "WidthNotDividing",
    "tail_group": "GroupNotDividing",
    "no_finite_check": "NonFinite",
    "saturates": "ScaleOverflow",
}
WORDS = {
    "high_first": "NibbleOrder",
    "arithmetic_shift": "SignBit",
    "not_transposed": "Transposed",
    "groups_interleaved": "GroupBoundary",
    "middle_minus_one": "Symmetric",
    "uint8_subtract": "UnsignedSubtract",
    "noise": "Random",
}
BUGS = {
    "formats.gptq": CHECKS | WORDS | {
        "awq_order": "NibbleOrder",
        "straddling_bits_dropped": "BitStream",
        "v1_as_it_is": "ZeroPoint",
        "v2_minus_one": "ZeroPoint",
        "zero_wraps": "ZeroPointZero",
        "full_zero_wraps_and_adds": "ZeroPointZero",
        "g_idx_ignored": "ActOrder",
        "scale_truncated": "ScaleRounding",
    },
    "formats.awq": {bug: flag for bug, flag in CHECKS.items() if bug != "no_params_check"} | WORDS | {
        "linear_order": "NibbleOrder",
        "inverse_order": "NibbleOrder",
        "zero_minus_one": "ZeroPoint",
        "scale_truncated": "ScaleRounding",
    },
    "formats.compressed_tensors": {bug: flag for bug, flag in CHECKS.items() if bug != "saturates"} | WORDS | {
        "straddling_bits_dropped": "BitStream",
        "zero_minus_one": "ZeroPoint",
        "g_idx_ignored": "ActOrder",
        "rows_run_on": "OddSize",
        "twos_complement": "OffsetBinary",
        "global_scale_multiplies": "ReciprocalScale",
        "first_global_scale": "FusedLayers",
        "largest_global_scale": "FusedLayers",
        "blocks_of_the_other": "BlockSize",
        "e2m1_linear": "FloatCodes",
        "nan_is_480": "FloatCodes",
        "scale_255_is_a_number": "E8m0Scale",
        "scale_0_is_0": "E8m0Scale",
    },
    "formats.bitsandbytes": {
        "low_first": "NibbleOrder",
        "first_scale": "GroupBoundary",
        "noise": "Random",
        "cut_off": "OutOfRange",
        "no_shape_check": "BadShape",
        "no_params_check": "BadParams",
        "no_finite_check": "NonFinite",
        "blocks_per_row": "BlocksAcrossRows",
        "filled_with_0": "OddSize",
        "fp4_is_e2m1": "Tables",
        "no_offset": "DoubleQuant",
        "linear_map": "DynamicMap",
        "no_state_check": "State",
        "dense_json": "State",
        "not_over_127": "RowScale",
    },
    "formats.checkpoints_misc": {
        "high_first": "NibbleOrder",
        "first_scale": "GroupBoundary",
        "zero_minus_one": "ZeroPoint",
        "middle_minus_one": "Symmetric",
        "uint8_subtract": "UnsignedSubtract",
        "noise": "Random",
        "cut_off": "OutOfRange",
        "no_shape_check": "BadShape",
        "no_params_check": "BadParams",
        "no_finite_check": "NonFinite",
        "pads": "WidthNotDividing",
        "nan_is_480": "FloatCodes",
        "scale_divides": "SquareBlocks",
        "scale_255_is_a_number": "E8m0Scale",
        "scale_0_is_0": "E8m0Scale",
        "consecutive_codes": "Strides",
        "consecutive_rows": "Quarters",
        "scale_multiplies": "Reciprocal",
        "short_block_cut": "ShortBlock",
        "zero_points_run_on": "ZeroPointPacking",
        "second_index_low": "PairOrder",
        "high_bit_first": "BitOrder",
        "ends_not_offsets": "RowOffsets",
        "no_offset_check": "RowOffsets",
        "tile_row_major": "TileOrder",
        "padded_with_ones": "TilePadding",
    },
}  # fmt: skip


class Taken(Exception):
    """An input that must be rejected was taken."""


def mutant(bug):
    """An implementation `f(op, params, inputs)` of all these ops with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            try:
                return _OPS[op](bug, params, inputs)
            except Taken:
                return {}

    return implementation


def need(condition, bug, check):
    if not condition:
        if bug == check:
            raise Taken
        raise ValueError(check)


# --- codes and bits --------------------------------------------------------------------------------------------------


def to_bytes(rows, bits, size=8):
    """Rows of codes (..., n) -> bytes, one stream of bits a row, filled up to whole words of `size` bits."""
    single = (rows[..., None].astype(np.int64) >> np.arange(bits) & 1).astype(np.uint8).reshape(*rows.shape[:-1], -1)
    gap = np.zeros((*rows.shape[:-1], -single.shape[-1] % size), np.uint8)
    return np.packbits(np.concatenate([single, gap], axis=-1), axis=-1, bitorder="little")


def from_bytes(data, bits, n):
    single = np.unpackbits(np.ascontiguousarray(data), axis=-1, bitorder="little")[..., : n * bits]
    return (single.reshape(*data.shape[:-1], n, bits).astype(np.int64) << np.arange(bits)).sum(axis=-1).astype(np.uint8)


def spoil(bug, rows, bits, word):
    """Codes as a wrong packer sees them, and a wrong reader gives them back (both are involutions or losses)."""
    per = word // bits
    whole = word % bits == 0 and rows.shape[-1] % per == 0
    if bug == "high_first" and whole:
        return rows.reshape(*rows.shape[:-1], -1, per)[..., ::-1].reshape(rows.shape)
    if bug == "straddling_bits_dropped" and word % bits:
        start = np.arange(rows.shape[-1]) * bits % word
        return rows & np.where(start + bits > word, (1 << np.clip(word - start, 0, bits)) - 1, 255).astype(np.uint8)
    return rows


def shifted(bug, rows, bits, word):
    """The last code of each word with the sign of the word spread over it."""
    if bug != "arithmetic_shift" or word % bits:
        return rows
    out, last = rows.copy(), slice(word // bits - 1, None, word // bits)
    out[..., last] = np.where(rows[..., last] >> (bits - 1), rows[..., last] | (256 - (1 << bits)), rows[..., last])
    return out


def words(bug, rows, bits):
    return to_bytes(spoil(bug, rows, bits, 32), bits, 32).view("<i4").astype(np.int32)


def unwords(bug, data, bits, n):
    rows = from_bytes(np.ascontiguousarray(data).view(np.uint8), bits, n)
    return shifted(bug, spoil(bug, rows, bits, 32), bits, 32)


def awq_words(bug, rows):
    order = [0, 1, 2, 3, 4, 5, 6, 7] if bug == "linear_order" else [0, 2, 4, 6, 1, 3, 5, 7]
    order = [0, 4, 1, 5, 2, 6, 3, 7] if bug == "inverse_order" else order
    return words(bug, rows.reshape(*rows.shape[:-1], -1, 8)[..., order].reshape(rows.shape), 4)


def unawq(bug, data, n):
    order = [0, 1, 2, 3, 4, 5, 6, 7] if bug == "linear_order" else [0, 4, 1, 5, 2, 6, 3, 7]
    order = [0, 2, 4, 6, 1, 3, 5, 7] if bug == "inverse_order" else order
    rows = unwords(bug, data, 4, n)
    return rows.reshape(*rows.shape[:-1], -1, 8)[..., order].reshape(rows.shape)


def noisy(bug, codes):
    if bug == "noise" and codes.size >= 64:
        codes = codes.copy()
        codes.flat[codes.size // 2] ^= 1
    return codes


def half(bug, scale):
    if bug == "scale_truncated":
        wide = scale.astype(np.float32)
        near = wide.astype(np.float16)
        over = np.abs(near.astype(np.float32)) > np.abs(wide)
        return np.where(over, np.nextafter(near, np.float16(0)), near)
    return scale.astype(np.float16)


def decode_groups(bug, codes, scale, zero, g_idx):
    zero = zero[:, g_idx]
    if bug == "uint8_subtract":
        difference = (codes.astype(np.uint8) - zero.astype(np.uint8)).astype(np.float32)
    else:
        difference = codes.astype(np.float32) - zero.astype(np.float32)
    return scale.astype(np.float32)[:, g_idx] * difference


def group_of(bug, columns, groups):
    if bug == "groups_interleaved":
        return (np.arange(columns) % groups).astype(np.int32)
    return (np.arange(columns) * groups // columns).astype(np.int32)


def check_matrix(bug, codes, scale, zero, bits):
    need(codes.ndim == 2 and scale.ndim == 2 and len(codes) == len(scale), bug, "no_shape_check")
    need(zero is None or zero.shape == scale.shape, bug, "no_shape_check")
    need(np.isfinite(scale).all(), bug, "no_finite_check")
    for numbers in (codes, zero):
        need(numbers is None or numbers.size == 0 or int(numbers.max()) < 1 << bits, bug, "cut_off")


def check_g_idx(bug, g_idx, columns, groups):
    fine = g_idx.shape == (columns,) and g_idx.min() >= 0 and g_idx.max() < groups
    need(fine, bug, "no_shape_check")


def middle(bug, scale, bits):
    return np.full(scale.shape, (1 << (bits - 1)) - (bug == "middle_minus_one"), np.uint8)


# --- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


def gptq(bug, params, given):
    bits, v1 = params["bits"], params["checkpoint_format"] == "gptq"
    need(bits in (2, 3, 4, 8) and params["checkpoint_format"] in ("gptq", "gptq_v2"), bug, "no_params_check")
    v1 = (v1 and bug != "v1_as_it_is") or bug == "v2_minus_one"
    unit = np.lcm(bits, 32) // bits
    pack = (lambda bug, rows: words(None, spoil_awq(rows), bits)) if bug == "awq_order" and bits == 4 else (
        lambda bug, rows: words(bug, rows, bits))  # fmt: skip
    if params["direction"] == "pack":
        codes, scale, zero = given["codes"], given["scale"], given.get("zero_point")
        check_matrix(bug, codes, scale, zero, bits)
        need(codes.shape[0] % unit == 0 and codes.shape[1] % unit == 0, bug, "pads")
        columns, groups = codes.shape[1], scale.shape[1]
        need("g_idx" in given or columns % groups == 0, bug, "tail_group")
        g_idx = given.get("g_idx", group_of(bug, columns, groups))
        check_g_idx(bug, g_idx, columns, groups)
        zero = middle(bug, scale, bits) if zero is None else zero
        need(not v1 or zero.all(), bug, "zero_wraps")
        need(np.isfinite(scale.astype(np.float16)).all(), bug, "saturates")
        codes = noisy(bug, codes)
        qweight = pack(bug, codes) if bug == "not_transposed" else pack(bug, codes).T
        stored_zero = (zero - np.uint8(v1)) & np.uint8((1 << bits) - 1)
        qzeros = pack(bug, np.ascontiguousarray(stored_zero.T))
        return {"qweight": qweight, "qzeros": qzeros, "scales": half(bug, scale).T, "g_idx": g_idx}
    scales, qweight, qzeros = given["scales"], given["qweight"], given["qzeros"]
    groups, out = scales.shape
    columns = len(qweight) * 32 // bits
    fine = qweight.shape[1] == out and qzeros.shape == (groups, out * bits // 32)
    need(fine, bug, "no_shape_check")
    g_idx = group_of(bug, columns, groups)
    if "g_idx" in given:
        check_g_idx(bug, given["g_idx"], columns, groups)
        g_idx = g_idx if bug == "g_idx_ignored" else given["g_idx"]
    read = (lambda data, n: spoil_awq(unwords(None, data, bits, n), True)) if bug == "awq_order" and bits == 4 else (
        lambda data, n: unwords(bug, data, bits, n))  # fmt: skip
    codes, zero = noisy(bug, read(qweight.T, columns)), read(qzeros, out).T
    if v1 and bug == "full_zero_wraps_and_adds":
        wide = zero.astype(int)
        zero = (wide + 1) % (1 << bits) + (wide == (1 << bits) - 1)
    elif v1:
        need((zero < (1 << bits) - 1).all() or bug, bug, "never")
        zero = zero + np.uint8(1)
    zero = zero.astype(np.uint8)
    codes = codes.T.reshape(codes.shape) if bug == "not_transposed" else codes
    w_hat = decode_groups(bug, codes, scales.T, zero, g_idx)
    return {"codes": codes, "scale": scales.T, "zero_point": zero, "g_idx": g_idx, "w_hat": w_hat}


def spoil_awq(rows, back=False):
    order = [0, 4, 1, 5, 2, 6, 3, 7] if back else [0, 2, 4, 6, 1, 3, 5, 7]
    return rows.reshape(*rows.shape[:-1], -1, 8)[..., order].reshape(rows.shape)


def awq(bug, params, given):
    if params["direction"] == "pack":
        codes, scale, zero = given["codes"], given["scale"], given.get("zero_point")
        check_matrix(bug, codes, scale, zero, 4)
        need(len(codes) % 8 == 0, bug, "pads")
        need(codes.shape[1] % scale.shape[1] == 0, bug, "tail_group")
        need(np.isfinite(scale.astype(np.float16)).all(), bug, "saturates")
        zero = middle(bug, scale, 4) if zero is None else zero
        zero = zero - np.uint8(1) & np.uint8(15) if bug == "zero_minus_one" else zero
        codes = noisy(bug, codes)
        qweight = words(bug, codes, 4) if bug == "not_transposed" and codes.shape[1] % 8 == 0 else awq_words(
            bug, np.ascontiguousarray(codes.T))  # fmt: skip
        qweight = qweight.T if bug == "not_transposed" else qweight
        qzeros = awq_words(bug, np.ascontiguousarray(zero.T))
        return {"qweight": qweight, "qzeros": qzeros, "scales": half(bug, scale).T}
    scales = given["scales"]
    groups, out = scales.shape
    columns = len(given["qweight"])
    fine = given["qweight"].shape == (columns, out // 8) and given["qzeros"].shape == (groups, out // 8)
    need(fine and columns % groups == 0, bug, "no_shape_check")
    codes, zero = noisy(bug, unawq(bug, given["qweight"], out).T), unawq(bug, given["qzeros"], out).T
    zero = zero + np.uint8(1) if bug == "zero_minus_one" else zero
    w_hat = decode_groups(bug, codes, scales.T, zero, group_of(bug, columns, groups))
    return {"codes": codes, "scale": scales.T, "zero_point": zero, "w_hat": w_hat}


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def e2m1(bug, codes):
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    magnitude = np.arange(8, dtype=np.float32) if bug == "e2m1_linear" else magnitude
    return np.where(codes & 8, -magnitude[codes & 7], magnitude[codes & 7])


def e4m3(bug, codes):
    field, fraction = (codes >> 3 & 15).astype(np.int64), (codes & 7).astype(np.float64)
    size = np.where(field == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (field - 7))
    size = size if bug == "nan_is_480" else np.where(codes & 127 == 127, np.nan, size)
    return np.where(codes & 128, -size, size).astype(np.float32)


def e8m0(bug, codes, special):
    power = (2.0 ** (codes.astype(np.float64) - 127)).astype(np.float64)
    power = np.where(codes == 0, 0, power) if bug == "scale_0_is_0" else power
    return power if bug == "scale_255_is_a_number" else np.where(codes == 255, special, power)


def compressed_tensors(bug, params, given):
    form = params["format"]
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized"):
        return compressed_floats(bug, params, given)
    bits = params["bits"]
    need(form in ("pack-quantized", "int-quantized") and 1 <= bits <= 8, bug, "no_params_check")
    pack = params["direction"] == "pack"
    return (pack_compressed if pack else read_compressed)(bug, form, bits, given)


def offset(bug, codes, bits):
    return codes ^ np.uint8(1 << (bits - 1)) if bug == "twos_complement" else codes


def pack_compressed(bug, form, bits, given):
    codes, scale, zero = given["codes"], given["scale"], given.get("zero_point")
    check_matrix(bug, codes, scale, zero, bits)
    need("g_idx" in given or codes.shape[1] % scale.shape[1] == 0, bug, "tail_group")
    out = {"weight_scale": scale} | ({"weight_g_idx": given["g_idx"]} if "g_idx" in given else {})
    codes, zero = noisy(bug, codes), zero if zero is None or bug != "zero_minus_one" else zero - np.uint8(1)
    if form == "int-quantized":
        signed = lambda x: (x if bug == "twos_complement" else x ^ np.uint8(128) if bits == 8 else x - np.uint8(
            1 << (bits - 1))).view(np.int8)  # fmt: skip
        return out | {"weight": signed(codes)} | ({} if zero is None else {"weight_zero_point": signed(zero)})
    out["weight_shape"] = np.array(codes.shape)
    if bug == "rows_run_on":
        flat = to_bytes(codes.reshape(1, -1), bits, 32 * len(codes)).view("<i4").reshape(len(codes), -1)
        out["weight_packed"] = flat.astype(np.int32)
    else:
        out["weight_packed"] = words(bug, offset(bug, codes, bits), bits)
    if zero is not None:
        zero = offset(bug, zero & np.uint8((1 << bits) - 1), bits)
        along = zero if bug == "not_transposed" else np.ascontiguousarray(zero.T)
        packed = words(bug, along, bits)
        out["weight_zero_point"] = packed if bug == "not_transposed" else packed.T
    return out


def read_compressed(bug, form, bits, given):
    scale = given["weight_scale"]
    if form == "int-quantized":
        fits = lambda x: x.size == 0 or (x.min() >= -(1 << (bits - 1)) and x.max() < 1 << (bits - 1))
        need(fits(given["weight"]), bug, "cut_off")
        unsigned = lambda x: (x.astype(np.int64) + (0 if bug == "twos_complement" else 1 << (bits - 1))).astype(
            np.uint8
        )
        codes = unsigned(given["weight"])
        zero = unsigned(given["weight_zero_point"]) if "weight_zero_point" in given else None
    else:
        rows, columns = given["weight_shape"].tolist()
        fine = given["weight_packed"].shape == (rows, -(-columns * bits // 32)) and len(scale) == rows
        packed_zero = given.get("weight_zero_point")
        fine &= packed_zero is None or packed_zero.shape == (-(-rows * bits // 32), scale.shape[1])
        need(fine, bug, "no_shape_check")
        codes = offset(bug, unwords(bug, given["weight_packed"], bits, columns), bits)
        zero = None
        if packed_zero is not None:
            along = np.ascontiguousarray(packed_zero.T)
            zero = offset(bug, unwords(bug, along, bits, rows).T, bits)
    codes = noisy(bug, codes)
    columns, groups = codes.shape[1], scale.shape[1]
    g_idx = group_of(bug, columns, groups)
    if "weight_g_idx" in given and bug != "g_idx_ignored":
        g_idx = given["weight_g_idx"]
    if zero is not None and bug == "zero_minus_one":
        zero = zero + np.uint8(1)
    used = middle(bug, scale, bits) if zero is None else zero
    out = {"codes": codes, "scale": scale, "w_hat": decode_groups(bug, codes, scale, used, g_idx)}
    out |= {} if zero is None else {"zero_point": zero}
    return out | ({"g_idx": given["weight_g_idx"]} if "weight_g_idx" in given else {})


def compressed_floats(bug, params, given):
    form, pack = params["format"], params["direction"] == "pack"
    if form == "float-quantized":
        names = {"codes": "weight", "scale": "weight_scale"}
        if pack:
            return {stored: given[name] for name, stored in names.items()}
        codes, scale = given["weight"], given["weight_scale"]
        w_hat = e4m3(bug, codes) * scale[:, group_of(bug, codes.shape[1], scale.shape[1])]
        return {"codes": codes, "scale": scale, "w_hat": w_hat}
    nvfp4 = form == "nvfp4-pack-quantized"
    block = 16 if nvfp4 else 32
    if pack:
        need(given["codes"].shape[1] % block == 0, bug, "pads")
        divisor = {"weight_global_scale": given["global_scale"]} if nvfp4 else {}
        need(
            not nvfp4 or (np.isfinite(given["global_scale"]) & (given["global_scale"] > 0)).all(),
            bug,
            "no_finite_check",
        )
        packed = to_bytes(spoil(bug, given["codes"], 4, 8), 4)
        return {"weight_packed": packed, "weight_scale": given["scale"]} | divisor
    codes = spoil(bug, from_bytes(given["weight_packed"], 4, 2 * given["weight_packed"].shape[1]), 4, 8)
    scale, columns = given["weight_scale"], codes.shape[1]
    index = np.arange(columns) // (48 - block if bug == "blocks_of_the_other" else block)
    index = index.clip(max=scale.shape[1] - 1) if bug == "blocks_of_the_other" else index
    index = group_of(bug, columns, scale.shape[1]) if bug == "groups_interleaved" else index
    out = {"codes": codes, "scale": scale}
    if nvfp4:
        stored = given["weight_global_scale"]
        parts = params.get("parts", [len(codes)])
        need(sum(parts) == len(codes) and len(parts) == len(stored), bug, "no_shape_check")
        divisor = np.resize(np.repeat(stored, np.resize(parts, len(stored))), (len(codes), 1))
        if bug in ("first_global_scale", "largest_global_scale"):
            divisor = stored.max() if bug[0] == "l" else stored[0]
        effective = e4m3(bug, scale) * divisor if bug == "global_scale_multiplies" else e4m3(bug, scale) / divisor
        return out | {"global_scale": stored, "w_hat": e2m1(bug, codes) * effective[:, index]}
    return out | {"w_hat": (e2m1(bug, codes) * e8m0(bug, scale, np.nan)[:, index]).astype(np.float32)}


# --- bitsandbytes ----------------------------------------------------------------------------------------------------

NF4 = (
    "-1 -.6961928 -.52507305 -.3949175 -.28444138 -.18477343 -.091050036 0 "
    ".0795803 .1609302 .2461123 .33791524 .44070983 .562617 .72295684 1"
)


def quant_map(bug, quant_type):
    if quant_type == "nf4":
        return np.array(NF4.split(), np.float32)
    if bug == "fp4_is_e2m1":
        return e2m1(bug, np.arange(16)) / np.float32(6)
    half_table = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    return np.concatenate([half_table, 0 - half_table])


def nested_map(bug):
    if bug == "linear_map":
        return np.linspace(-1, 1, 256, dtype=np.float32)
    found = [0.0, 1.0]
    for i in range(7):
        first, n = np.float32(0.1), 2**i
        step, k = np.float64((np.float32(1) - first) / np.float32(n)), np.arange(n + 1)
        edges = np.where(k < (n + 1) // 2, np.float64(first) + step * k, 1 - step * (n - k)).astype(np.float32)
        values = np.float32(10.0 ** (i - 6)) * ((edges[1:] + edges[:-1]) / np.float32(2))
        found += [*values, *-values]
    return np.sort(np.array(found, np.float32))


def bitsandbytes(bug, params, given):
    kind = params["quant_type"]
    need(kind in ("nf4", "fp4", "int8"), bug, "no_params_check")
    pack = params["direction"] == "pack"
    if kind == "int8":
        if pack:
            return {"weight": given["codes"], "SCB": given["scale"]}
        codes, scale = given["weight"], given["SCB"]
        need(len(codes) == len(scale), bug, "no_shape_check")
        step = np.float32(1) if bug == "not_over_127" else np.float32(1 / 127)
        codes = codes if bug != "noise" or codes.size < 64 else codes ^ np.int8(1)
        rows = scale[:1] if bug == "first_scale" else scale
        return {"codes": codes, "scale": scale, "w_hat": codes * rows[:, None] * step}
    return (pack_4_bits if pack else read_4_bits)(bug, params, given)


def pack_4_bits(bug, params, given):
    kind, size = params["quant_type"], params["blocksize"]
    need(size > 0, bug, "no_params_check")
    codes, scale = given["codes"], given["scale"]
    need(codes.max() < 16, bug, "cut_off")
    need(scale.size == -(-codes.size // size), bug, "no_shape_check")
    need(np.isfinite(scale).all(), bug, "no_finite_check")
    zero = 0 if bug == "filled_with_0" or kind == "fp4" else 7
    flat = np.append(noisy(bug, codes).ravel(), [zero] * (codes.size % 2)).astype(np.uint8)
    a, b = flat[::2], flat[1::2]
    weight = (a | b << 4 if bug == "low_first" else a << 4 | b).reshape(-1, 1)
    out = {"weight": weight, "quant_map": quant_map(bug, kind), "absmax": scale}
    state = {"quant_type": kind, "blocksize": size, "dtype": params["dtype"], "shape": list(codes.shape)}
    if params["double_quant"]:
        shift, table = given["offset"][0], nested_map(bug)
        centred = scale - (0 if bug == "no_offset" else shift)
        blocks = [centred[i : i + 256] for i in range(0, len(centred), 256)]
        nested = np.array([np.abs(block).max() for block in blocks], np.float32)
        scaled = [b * (np.float32(1) / max(n, np.float32(1e-38))) for b, n in zip(blocks, nested, strict=True)]
        middles = (table[1:] + table[:-1]) / np.float32(2)
        out["absmax"] = (np.concatenate(scaled)[:, None] > middles).sum(axis=1).astype(np.uint8)
        out |= {"nested_absmax": nested, "nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(shift)}
    text = json.dumps(state, separators=(",", ":") if bug == "dense_json" else None)
    return out | {"quant_state": np.frombuffer(text.encode(), np.uint8)}


def read_4_bits(bug, params, given):
    try:
        state = json.loads(given["quant_state"].tobytes())
        (rows, columns), size = state["shape"], state["blocksize"]
    except (ValueError, KeyError):
        need(False, bug, "no_state_check")
    n = rows * columns
    need(len(given["weight"]) == (n + 1) // 2 or state["shape"] == [1, 4], bug, "no_state_check")
    fine = (
        len(given["weight"]) == (n + 1) // 2 and len(given["absmax"]) == -(-n // size) and len(given["quant_map"]) == 16
    )
    need(fine, bug, "no_shape_check")
    high, low = given["weight"][:, 0] >> 4, given["weight"][:, 0] & 15
    pairs = (low, high) if bug == "low_first" else (high, low)
    codes = noisy(bug, np.stack(pairs, axis=1).ravel()[:n].reshape(rows, columns))
    scale = given["absmax"]
    if "nested_offset" in state:
        table = nested_map(bug) if bug == "linear_map" else given["nested_quant_map"]
        scale = table[scale] * np.repeat(given["nested_absmax"], 256)[: len(scale)]
        scale = scale if bug == "no_offset" else scale + np.float32(state["nested_offset"])
    index = np.arange(n) // size
    if bug == "blocks_per_row":
        a_row = -(-columns // size)
        index = (np.arange(n) // columns * a_row + np.arange(n) % columns // size).clip(max=len(scale) - 1)
    index = 0 * index if bug == "first_scale" else index
    table = quant_map(bug, state["quant_type"]) if bug == "fp4_is_e2m1" else given["quant_map"]
    return {"codes": codes, "scale": scale, "w_hat": table[codes] * scale[index].reshape(codes.shape)}


# --- the others ------------------------------------------------------------------------------------------------------


def misc(bug, params, given):
    need(params["format"] in _MISC, bug, "no_params_check")
    return _MISC[params["format"]](bug, params, given, params["direction"] == "pack")


def fp8_block(bug, params, given, pack):
    codes, scale = (given[name] for name in (("codes", "scale") if pack else ("weight", "weight_scale_inv")))
    rows, columns = params["block_size"]
    need(scale.shape == (-(-codes.shape[0] // rows), -(-codes.shape[1] // columns)), bug, "no_shape_check")
    need(np.isfinite(scale).all(), bug, "no_finite_check")
    if pack:
        return {"weight": codes, "weight_scale_inv": scale}
    wide = np.repeat(np.repeat(scale, rows, axis=0), columns, axis=1)[: codes.shape[0], : codes.shape[1]]
    wide = np.full_like(wide, scale[0, 0]) if bug == "first_scale" else wide
    values = e4m3(bug, codes)
    return {"codes": codes, "scale": scale, "w_hat": values / wide if bug == "scale_divides" else values * wide}


def gpt_oss(bug, params, given, pack):
    if pack:
        codes, scale = given["codes"], given["scale"]
        need(codes.shape[-1] % 32 == 0, bug, "pads")
        need(codes.max() < 16, bug, "cut_off")
        return {"blocks": to_bytes(spoil(bug, codes.reshape(*scale.shape, 32), 4, 8), 4), "scales": scale}
    codes, scale = spoil(bug, from_bytes(given["blocks"], 4, 32), 4, 8), given["scales"]
    power = e8m0(bug, scale, np.nan)[..., None]
    power = power[:1, :1, :1] if bug == "first_scale" else power
    flat = (*scale.shape[:-1], -1)
    w_hat = (e2m1(bug, codes) * power).astype(np.float32).reshape(flat)
    return {"codes": noisy(bug, codes).reshape(flat), "scale": scale, "w_hat": w_hat}


def i2_s(bug, params, given, pack):
    need(params["order"] in ("x86", "arm"), bug, "no_params_check")
    quarter = 32 if params["order"] == "x86" else 16
    n = int(np.prod(params["shape"]))
    need(n % (4 * quarter) == 0, bug, "pads")
    if pack:
        codes = given["codes"]
        need(codes.max() < 3, bug, "cut_off")
        units = codes.reshape(-1, 4, quarter)
        units = codes.reshape(-1, quarter, 4).swapaxes(1, 2) if bug == "consecutive_codes" else units
        data = units[:, 0] << 6 | units[:, 1] << 4 | units[:, 2] << 2 | units[:, 3]
        return {"data": np.concatenate([data.ravel(), given["scale"].view(np.uint8), np.zeros(28, np.uint8)])}
    need(given["data"].size == n // 4 + 32, bug, "no_shape_check")
    data = given["data"][: n // 4].reshape(-1, quarter)
    units = np.stack([data >> 6, data >> 4 & 3, data >> 2 & 3, data & 3], axis=2 if bug == "consecutive_codes" else 1)
    codes = units.reshape(params["shape"])
    need(codes.max() < 3, bug, "cut_off")
    scale = given["data"][n // 4 : n // 4 + 4].view(np.float32)
    return {"codes": codes, "scale": scale, "w_hat": (codes.astype(np.float32) - 1) * scale}


def bitnet(bug, params, given, pack):
    if pack:
        codes, scale = given["codes"], given["scale"]
        need(len(codes) % 4 == 0, bug, "pads")
        need((scale != 0).all(), bug, "no_finite_check")
        parts = [codes[k::4] for k in range(4)] if bug == "consecutive_rows" else np.split(noisy(bug, codes), 4)
        return {"weight": parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6, "weight_scale": scale}
    parts = np.stack([given["weight"] >> 2 * k & 3 for k in range(4)], axis=1 if bug == "consecutive_rows" else 0)
    codes, scale = noisy(bug, parts.reshape(-1, given["weight"].shape[1])), given["weight_scale"]
    trits = codes.astype(np.float32) - 1
    return {"codes": codes, "scale": scale, "w_hat": trits * scale if bug == "scale_multiplies" else trits / scale}


def matmul_nbits(bug, params, given, pack):
    bits, size, columns = params["bits"], params["block_size"], params["columns"]
    need(bits in (2, 4, 8) and size >= 16 and size & (size - 1) == 0, bug, "no_params_check")
    blocks = -(-columns // size)
    if pack:
        codes, scale, zero = given["codes"], given["scale"], given.get("zero_point")
        need(scale.shape == (len(codes), blocks), bug, "no_shape_check")
        full = np.pad(noisy(bug, codes), ((0, 0), (0, blocks * size - columns)))
        full = full[:, :columns] if bug == "short_block_cut" else full
        rows = to_bytes(spoil(bug, full, bits, 8), bits)
        short = bug == "short_block_cut" and columns % size
        out = {"B": rows if short else rows.reshape(len(codes), blocks, -1), "scales": scale}
        if zero is None:
            return out
        zero = (zero - np.uint8(bug == "zero_minus_one")) & np.uint8((1 << bits) - 1)
        zero = zero.reshape(1, -1) if bug == "zero_points_run_on" else zero
        return out | {"zero_points": to_bytes(spoil(bug, zero, bits, 8), bits)}
    data, scale, zero = given["B"], given["scales"], given.get("zero_points")
    fine = zero is None or zero.shape == (len(data), -(-blocks * bits // 8))
    need(fine and data.shape == (len(data), blocks, size * bits // 8), bug, "no_shape_check")
    codes = noisy(bug, spoil(bug, from_bytes(data.reshape(len(data), -1), bits, blocks * size), bits, 8)[:, :columns])
    if zero is not None:
        one_stream = bug == "zero_points_run_on"
        flat = from_bytes(zero.reshape(1, -1), bits, scale.size) if one_stream else from_bytes(zero, bits, blocks)
        zero = flat.reshape(scale.shape) if one_stream else spoil(bug, flat, bits, 8)
        zero = zero + np.uint8(bug == "zero_minus_one")
    used = middle(bug, scale, bits) if zero is None else zero
    index = np.arange(columns) // size * (bug != "first_scale")
    w_hat = decode_groups(bug, codes, scale, used, index)
    return {"codes": codes, "scale": scale, "w_hat": w_hat} | ({} if zero is None else {"zero_point": zero})


def sparse24(bug, params, given, pack):
    swap = lambda c: c.reshape(len(c), -1, 2)[..., ::-1].reshape(c.shape) if bug == "second_index_low" else c
    if pack:
        columns, values = given["columns"], given["values"]
    else:
        values = given["values"]
        columns = swap(from_bytes(given["metadata"].astype("<u2").view(np.uint8), 2, values.shape[1]))
    need(2 * values.shape[1] % 16 == 0, bug, "pads")
    pairs = swap(columns).reshape(len(columns), -1, 2) if not pack else columns.reshape(len(columns), -1, 2)
    need((pairs[..., 0] < pairs[..., 1]).all(), bug, "cut_off")
    if pack:
        return {"values": values, "metadata": to_bytes(swap(columns), 2, 16).view("<u2").astype(np.uint16)}
    w_hat = np.zeros((len(values), 2 * values.shape[1]), np.float32)
    for k in range(values.shape[1]):
        w_hat[np.arange(len(values)), 4 * (k // 2) + columns[:, k]] = values[:, k]
    return {"values": values, "columns": columns, "w_hat": w_hat}


def bitmask(bug, params, given, pack):
    order = "big" if bug == "high_bit_first" else "little"
    if pack:
        w, mask = given["w"], given["mask"].astype(bool)
        ends = np.cumsum(mask.sum(axis=1))
        offsets = ends if bug == "ends_not_offsets" else ends - mask.sum(axis=1)
        return {"values": w[mask], "bitmask": np.packbits(mask, axis=1, bitorder=order), "row_offsets": offsets}
    columns = params["columns"]
    mask = np.unpackbits(given["bitmask"], axis=1, bitorder=order)[:, :columns].astype(bool)
    true_mask = np.unpackbits(given["bitmask"], axis=1, bitorder="little")[:, :columns].astype(bool)
    need(true_mask.sum() == len(given["values"]), bug, "no_shape_check")
    offsets = np.cumsum(true_mask.sum(axis=1)) - true_mask.sum(axis=1)
    need(np.array_equal(offsets, given["row_offsets"]), bug, "no_offset_check")
    w_hat = np.zeros(mask.shape, np.float32)
    w_hat[mask] = np.resize(given["values"], mask.sum())
    return {"w_hat": w_hat}


def csr(bug, params, given, pack):
    if pack:
        w, mask = given["w"], given["mask"].astype(bool)
        ends = np.cumsum(mask.sum(axis=1))
        indptr = np.append(ends, ends[-1]) if bug == "ends_not_offsets" else np.append(0, ends)
        return {"data": w[mask], "indices": np.nonzero(mask)[1].astype(np.int32), "indptr": indptr.astype(np.int32)}
    data, indices, indptr = given["data"], given["indices"], given["indptr"]
    fine = indptr[0] == 0 and indptr[-1] == len(data) and (np.diff(indptr) >= 0).all()
    need(fine, bug, "no_offset_check")
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    places = set(zip(rows.tolist(), indices.tolist(), strict=True))
    need(indices.max(initial=0) < params["columns"] and len(places) == len(indices), bug, "cut_off")
    w_hat = np.zeros((len(indptr) - 1, params["columns"]), np.float32)
    w_hat[rows, indices] = data
    return {"w_hat": w_hat}


def scales_swizzled(bug, params, given, pack):
    rows, columns = params["shape"]
    down, across = -(-rows // 128), -(-columns // 4)
    r, c = np.indices((128 * down, 4 * across))
    place = 512 * (r // 128 * across + c // 4) + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4
    if bug == "tile_row_major":
        place = 512 * (r // 128 * across + c // 4) + 4 * (r % 128) + c % 4
    if pack:
        data = np.full(512 * down * across, 255 if bug == "padded_with_ones" else 0, np.uint8)
        data[place[:rows, :columns]] = noisy(bug, given["scale"])
        return {"data": data}
    need(given["data"].size == 512 * down * across, bug, "no_shape_check")
    return {"scale": given["data"][place[:rows, :columns]]}


_MISC = {
    "fp8_block": fp8_block,
    "gpt_oss": gpt_oss,
    "i2_s": i2_s,
    "bitnet": bitnet,
    "matmul_nbits": matmul_nbits,
    "sparse24": sparse24,
    "bitmask": bitmask,
    "csr": csr,
    "scales_swizzled": scales_swizzled,
}
_OPS = {
    "formats.gptq": gptq,
    "formats.awq": awq,
    "formats.compressed_tensors": compressed_tensors,
    "formats.bitsandbytes": bitsandbytes,
    "formats.checkpoints_misc": misc,
}
