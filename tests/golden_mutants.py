"""A plain NumPy implementation of quant.rtn and quant.rtn.matmul with one mistake at a time switched on.

`mutant(None)` has no mistake. Every name of BUGS is a mistake that people have made; beside it stands the flag that
must be among the failing ones.
"""

import numpy as np

BUGS = {
    # quant.rtn
    "ties_away": "TieToEven",
    "floor_x_plus_half": "TieToEven",
    "trunc_half_away": "RoundBelowHalf",
    "round_after_offset": "TieBeforeOffset",
    "reciprocal": "DivideByScale",
    "unrounded_scale": "ScaleRoundedFirst",
    "float64_arithmetic": "DoubleRounding",
    "divide_by_half_range": "ScaleDivisor",
    "divide_by_2_to_bits": "ScaleDivisor",
    "max_not_absmax": "AbsmaxNegative",
    "sign_in_scale": "AbsmaxNegative",
    "lowest_code_used": "AbsmaxNegative",
    "fake_quantization": "NegativeZero",
    "flush_subnormal_scale": "Subnormal",
    "float16_reciprocal": "Subnormal",
    "zero_scale_kept": "ScaleUnderflow",
    "zero_group_nan": "AllZeroGroup",
    "tiny_group_taken_for_zero": "ScaleUnderflow",
    "constant_group_scale_zero": "ConstantGroup",
    "zero_not_in_range": "ZeroInRange",
    "no_clip": "Clip",
    "scale_saturates": "ScaleOverflow",
    "scale_infinite": "ScaleOverflow",
    "no_finite_check": "NonFinite",
    "nan_ignored": "NonFinite",
    "group_padded": "GroupNotDividing",
    "group_tail_merged": "GroupNotDividing",
    "no_params_check": "BadParams",
    "flattens": "BadShape",
    "empty_wrong_width": "EmptyMatrix",
    "float16_scale_always": "Float32Scale",
    "groups_along_out": "GroupAlongWrongAxis",
    "transposed": "Transposed",
    "per_channel_as_tensor": "Granularity",
    "per_tensor_as_channel": "Granularity",
    "high_nibble_first": "NibbleOrder",
    "half_split": "NibbleOrder",
    "awq_order": "NibbleOrder",
    "three_bits_in_nibbles": "BitStream",
    "rows_not_on_bytes": "OddSize",
    "padding_ones": "OddSize",
    "twos_complement": "OffsetBinary",
    "zero_point_minus_one": "ZeroPoint",
    "zero_points_packed_flat": "ZeroPointPacking",
    "uint8_subtract": "UnsignedSubtract",
    # quant.rtn.matmul
    "mm_high_nibble_first": "NibbleOrder",
    "mm_half_split": "NibbleOrder",
    "mm_three_bits_in_nibbles": "BitStream",
    "mm_rows_not_on_bytes": "OddSize",
    "mm_twos_complement": "OffsetBinary",
    "mm_uint8_subtract": "UnsignedSubtract",
    "mm_zero_point_plus_one": "ZeroPoint",
    "mm_zero_points_of_first_group": "ZeroPointPacking",
    "mm_scale_of_first_group": "GroupBoundary",
    "mm_first_scale_for_all": "Granularity",
    "mm_transposed": "Transposed",
    "mm_int16_saturates": "Saturation",
    "mm_float16_accumulator": "Accumulator",
    "mm_float16_products": "ExactSums",
    "mm_tf32_activations": "ExactSums",
    "mm_activation_scale_per_tensor": "TokenIndependence",
    "mm_flush_subnormal_scale": "Subnormal",
    "mm_float16_scale_always": "Float32Scale",
    "mm_no_finite_check": "NonFinite",
    "mm_no_shape_check": "BadShape",
    "mm_padding_bits_used": "PaddingBits",
    "mm_no_tokens_one_row": "EmptyBatch",
    "mm_adds_noise": "Random",
    "random_off_by_one": "Random",
}


def mutant(bug):
    """An implementation `f(op, params, inputs)` with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            if op == "quant.rtn":
                return quantize(bug, inputs["w"], **params)
            return matmul(bug, **params, **inputs)

    return implementation


def rounded(bug, x):
    if bug == "ties_away":
        whole = np.trunc(x)
        return whole + np.sign(x) * (np.abs(x - whole) >= 0.5)
    if bug == "floor_x_plus_half":
        return np.floor(x + x.dtype.type(0.5))
    if bug == "trunc_half_away":
        return np.trunc(x + np.copysign(x.dtype.type(0.5), x))
    return np.rint(x)


def to_groups(bug, w, g):
    """(groups of weights as rows, how to come back)."""
    rows, columns = w.shape
    if (g == 0 and bug != "per_tensor_as_channel") or (g == -1 and bug == "per_channel_as_tensor"):
        return w.reshape(1, -1)
    if g in (0, -1):
        return w
    if columns % g:
        if bug == "group_padded":
            return np.pad(w, ((0, 0), (0, -columns % g))).reshape(-1, g)
        if bug != "group_tail_merged":
            raise ValueError("group_size")
        return w
    if bug == "groups_along_out" and rows % g == 0:
        return w.T.reshape(-1, g)
    return w.reshape(-1, g)


def from_groups(bug, grouped, shape, g):
    rows, columns = shape
    if bug == "groups_along_out" and g > 0 and rows % g == 0:
        return grouped.reshape(columns, rows).T
    if grouped.size != rows * columns:
        return grouped.reshape(rows, -1)[:, :columns]
    return grouped.reshape(rows, columns)


def check(bug, w, bits, group_size):
    if w.ndim != 2 and bug != "flattens":
        raise ValueError("shape")
    if (not 2 <= bits <= 8 or group_size < -1) and bug != "no_params_check":
        raise ValueError("params")
    finite = ~np.isinf(w) if bug == "nan_ignored" else np.isfinite(w)
    if not finite.all() and bug != "no_finite_check":
        raise ValueError("finite")


def fit(bug, groups, bits, symmetric, dtype):
    """Scale and zero point of each row of groups, the scale before rounding too."""
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        size = groups if bug == "max_not_absmax" else np.abs(groups)
        amax = size.max(axis=1, keepdims=True)
        if bug == "sign_in_scale":
            at = np.abs(groups).argmax(axis=1)[:, None]
            amax = -np.take_along_axis(groups, at, 1)
        empty = np.abs(groups).max(axis=1, keepdims=True) == 0
        divisor = {"divide_by_half_range": levels / 2, "divide_by_2_to_bits": half}.get(bug, half - 1)
        exact = np.where(empty & (bug != "zero_group_nan"), 1, amax) / groups.dtype.type(max(divisor, 0.5))
    else:
        lo, hi = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
        if bug not in ("zero_not_in_range", "constant_group_scale_zero"):
            lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
        elif bug == "constant_group_scale_zero":
            same = lo == hi
            lo, hi = np.where(same, lo, np.minimum(lo, 0)), np.where(same, hi, np.maximum(hi, 0))
        empty = (lo == 0) & (hi == 0)
        if bug != "zero_group_nan":
            lo, hi = np.where(empty, -1, lo), np.where(empty, 1, hi)
        exact = (hi - lo) / groups.dtype.type(levels + (bug == "divide_by_2_to_bits"))
    if bug == "tiny_group_taken_for_zero":
        exact = np.where(np.abs(groups).max(axis=1, keepdims=True) < 1e-8, 1, exact)
    if bug == "float16_scale_always":
        exact = exact.astype(np.float16)
    scale = exact.astype(dtype)
    if bug == "scale_saturates":
        scale = np.minimum(scale, np.finfo(dtype).max)
    if not np.isfinite(scale).all() and bug not in (
        "scale_infinite",
        "no_finite_check",
        "nan_ignored",
        "zero_group_nan",
    ):
        raise ValueError("scale")
    if bug == "flush_subnormal_scale":
        scale = np.where(np.abs(scale) < np.finfo(dtype).tiny, 0, scale).astype(dtype)
    if bug not in ("zero_scale_kept", "zero_group_nan", "flush_subnormal_scale", "constant_group_scale_zero"):
        scale = np.where(scale == 0, np.finfo(dtype).smallest_subnormal, scale)
    if symmetric:
        return scale, exact, np.full(scale.shape, half)
    zero = rounded(bug, -lo / scale.astype(groups.dtype))
    zero = np.nan_to_num(zero if bug == "zero_not_in_range" else np.clip(zero, 0, levels))
    return scale, exact, zero.astype(np.int64)


def encode(bug, groups, scale, exact, zero, bits, symmetric):
    s = (exact if bug == "unrounded_scale" else scale).astype(groups.dtype)
    if bug == "reciprocal":
        steps = groups * (1 / s)
    elif bug == "float16_reciprocal":
        steps = groups * (np.float16(1) / scale.astype(np.float16)).astype(groups.dtype)
    else:
        steps = groups / s
    if bug == "round_after_offset":
        codes = rounded(bug, steps + zero.astype(steps.dtype))
    else:
        codes = rounded(bug, steps) + zero
    if bug != "no_clip":
        lowest = 1 if symmetric and bug not in ("lowest_code_used", "divide_by_2_to_bits", "sign_in_scale") else 0
        codes = np.clip(codes, lowest, 2**bits - 1)
    if bug == "lowest_code_used" and symmetric:  # -amax takes the code 0, as in a grid divided by 2^(bits-1)
        codes = np.where(steps <= -(2 ** (bits - 1) - 1), 0, codes)
    return np.nan_to_num(codes).astype(np.int64)


def pack(bug, codes, bits):
    codes = np.asarray(codes, np.int64) & (2**bits - 1)
    if bug == "twos_complement":
        codes = codes ^ (1 << (bits - 1))
    rows, columns = codes.shape
    if bits == 4 and bug in ("high_nibble_first", "half_split", "awq_order"):
        padded = np.pad(codes, ((0, 0), (0, columns % 2)))
        if bug == "high_nibble_first":
            return (padded[:, 1::2] | padded[:, ::2] << 4).astype(np.uint8)
        if bug == "half_split":
            half = padded.shape[1] // 2
            return (padded[:, :half] | padded[:, half:] << 4).astype(np.uint8)
        if padded.shape[1] % 8 == 0:
            padded = padded.reshape(rows, -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(rows, -1)
        return (padded[:, ::2] | padded[:, 1::2] << 4).astype(np.uint8)
    if bug == "three_bits_in_nibbles" and bits == 3:
        bits = 4
    flat = codes.reshape(1, -1) if bug == "rows_not_on_bytes" else codes
    stream = ((flat[:, :, None] >> np.arange(bits)) & 1).reshape(flat.shape[0], -1).astype(np.uint8)
    if bug == "padding_ones":
        stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 8)), constant_values=1)
    packed = np.packbits(stream, axis=1, bitorder="little")
    if bug == "rows_not_on_bytes":
        wanted = rows * ((columns * bits + 7) // 8)
        packed = np.pad(packed, ((0, 0), (0, wanted - packed.size))).reshape(rows, -1)
    return packed


def quantize(bug, w, bits, group_size, symmetric, scale_dtype):
    check(bug, w, bits, group_size)
    w = w.reshape(1, -1) if w.ndim != 2 else w
    if not len(w):
        wide = w.shape[1] + (bug == "empty_wrong_width")
        empty = {"codes": (0, wide), "packed": (0, (wide * bits + 7) // 8), "scale": (0, 1), "w_hat": (0, wide)}
        types = {"scale": np.float16, "w_hat": np.float32}
        return {name: np.zeros(shape, types.get(name, np.uint8)) for name, shape in empty.items()}
    original = w
    if bug == "transposed":
        w = np.ascontiguousarray(w.T)
    if bug == "float64_arithmetic":
        w = w.astype(np.float64)
    groups = to_groups(bug, w, group_size)
    scale, exact, zero = fit(bug, groups, bits, symmetric, np.dtype(scale_dtype))
    codes = encode(bug, groups, scale, exact, zero, bits, symmetric)
    if bug == "random_off_by_one" and codes.size > 40:
        codes[-1, -1] ^= 1
    steps = codes - zero
    if bug == "uint8_subtract":
        steps = codes.astype(np.uint8) - zero.astype(np.uint8)
    w_hat = steps.astype(np.float32) * scale.astype(np.float32)
    if bug == "fake_quantization":
        w_hat = (
            np.clip(np.rint(groups / scale.astype(np.float32)), -zero, 2**bits - 1 - zero).astype(np.float32) * scale
        )
    back = lambda x: np.ascontiguousarray(from_groups(bug, x, w.shape, group_size))
    codes, w_hat = back(codes), back(w_hat.astype(np.float32))
    rows = 1 if scale.size == 1 and group_size == 0 else w.shape[0]
    shape = (rows, -1) if scale.size % rows == 0 else (1, -1)
    scale, zero = scale.reshape(shape).astype(scale_dtype), zero.reshape(shape)
    if bug == "transposed" and original.shape[0] == original.shape[1]:
        codes, w_hat = codes.T, w_hat.T
    outputs = {"codes": codes.astype(np.uint8), "packed": pack(bug, codes, bits), "scale": scale, "w_hat": w_hat}
    if bug == "twos_complement" and not symmetric:
        outputs["packed"] = pack(None, codes, bits)
    if symmetric:
        return outputs
    if bug == "zero_point_minus_one":
        zero = (zero - 1) % 2**bits
    flat_bug = "rows_not_on_bytes" if bug == "zero_points_packed_flat" else None
    return outputs | {"zero_point": zero.astype(np.uint8), "packed_zero_point": pack(flat_bug, zero, bits)}


def unpack(bug, packed, bits, columns):
    bug = bug[3:] if bug and bug.startswith("mm_") else None
    rows = packed.shape[0]
    if bits == 4 and bug == "high_nibble_first":
        packed = packed >> 4 | packed << 4
    if bits == 4 and bug == "half_split":
        return np.concatenate([packed & 15, packed >> 4], axis=1)[:, :columns].astype(np.int64)
    if bug == "three_bits_in_nibbles" and bits == 3:
        both = np.stack([packed & 7, packed >> 4 & 7], axis=2).reshape(rows, -1)
        return np.pad(both, ((0, 0), (0, columns)))[:, :columns].astype(np.int64)
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    if bug == "rows_not_on_bytes":
        stream = stream.reshape(1, -1)[:, : rows * columns * bits].reshape(rows, -1)
    stream = stream[:, : columns * bits].reshape(rows, columns, bits).astype(np.int64)
    return (stream << np.arange(bits)).sum(axis=2)


def check_product(x, packed, scale, zeros, bits, group_size, columns, groups):
    rows = 1 if group_size == 0 else packed.shape[0]
    shapes = [(x.shape[1:], (columns,)), (packed.shape[1], (columns * bits + 7) // 8), (scale.shape, (rows, groups))]
    if zeros is not None:
        shapes.append((zeros.shape, (rows, (groups * bits + 7) // 8)))
    if any(came != wanted for came, wanted in shapes):
        raise ValueError("shape")


def matmul(bug, x, packed, scale, bits, group_size, symmetric, columns, packed_zero_point=None):
    g = columns if group_size <= 0 else group_size
    groups = columns // g
    if bug != "mm_no_shape_check":
        check_product(x, packed, scale, packed_zero_point, bits, group_size, columns, groups)
    else:  # takes what is there
        x, packed = np.resize(x, (len(x), columns)), np.resize(packed, (len(packed), (columns * bits + 7) // 8))
        scale = scale[:, :groups]
        packed_zero_point = None if symmetric else packed_zero_point[: len(packed)]
    if not np.isfinite(scale).all() and bug != "mm_no_finite_check":
        raise ValueError("finite")
    codes = unpack(bug, packed, bits, columns)
    if bug == "mm_twos_complement" and symmetric:
        codes = codes ^ (1 << (bits - 1))
    if bug == "mm_padding_bits_used" and columns * bits % 8 and bits == 4:
        codes[:, -1] += packed[:, -1] >> 4
    if bug == "mm_float16_scale_always":
        scale = scale.astype(np.float16)
    if bug == "mm_flush_subnormal_scale":
        scale = np.where(np.abs(scale) < np.finfo(np.float16).tiny, 0, scale)
    zero = np.full(scale.shape, 1 << (bits - 1)) if symmetric else unpack(None, packed_zero_point, bits, groups)
    if bug == "mm_zero_point_plus_one" and not symmetric:
        zero = (zero + 1) % 2**bits
    if bug == "mm_zero_points_of_first_group":
        zero = np.repeat(zero[:, :1], groups, axis=1)
    if bug == "mm_scale_of_first_group":
        scale = np.repeat(scale[:, :1], groups, axis=1)
    if bug == "mm_first_scale_for_all":
        scale = np.full((packed.shape[0], groups), scale[0, 0]) if group_size != 0 else scale * 2
    if group_size != 0:
        scale, zero = np.repeat(scale, g, axis=1), np.repeat(zero, g, axis=1)
    steps = codes - zero
    if bug == "mm_uint8_subtract":
        steps = codes.astype(np.uint8) - zero.astype(np.uint8)
    w = steps.astype(np.float32) * scale.astype(np.float32)
    if bug == "mm_transposed":
        w = np.ascontiguousarray(w.reshape(w.shape[1], w.shape[0]).T)
    return {"y": product(bug, x, w, steps, scale)}


def product(bug, x, w, steps, scale):
    if bug == "mm_no_tokens_one_row" and not len(x):
        return np.zeros((1, len(w)), np.float32)
    if bug == "mm_int16_saturates" and np.all(x == np.rint(x)) and np.abs(x).max(initial=0) < 128:
        pairs = (x[:, None, :] * steps).reshape(len(x), len(w), -1, 2) if w.shape[1] % 2 == 0 else None
        if pairs is not None:
            sums = np.clip(pairs.sum(axis=3), -32768, 32767).sum(axis=2)
            return (sums * scale[:, 0]).astype(np.float32)
    if bug == "mm_activation_scale_per_tensor":
        step = max(np.abs(x).max(initial=0) / 2**22, 1e-30)
        x = (np.rint(x / np.float32(step)) * step).astype(np.float32)
    if bug == "mm_tf32_activations":
        x = ((x.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    y = np.einsum("tk,ok->to", x.astype(np.float64), w.astype(np.float64))
    if bug in ("mm_float16_accumulator", "mm_float16_products"):
        terms = x[:, None, :] * w[None]
        terms = terms.astype(np.float16)
        y = terms.astype(np.float64).sum(axis=2)
        if bug == "mm_float16_accumulator":
            y = np.zeros(y.shape, np.float16)
            for k in range(terms.shape[2]):
                y = y + terms[:, :, k]
    if bug == "mm_adds_noise":
        y = y * (1 + 1e-4 * (w.shape[1] > 40))
    return y.astype(np.float32)
