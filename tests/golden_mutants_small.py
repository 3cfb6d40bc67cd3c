"""NumPy implementations of the ops of integers, lists of values and stochastic rounding, with one mistake each.

BUGS and OPS join those of golden_mutants_numbers. A format is a table here, and encoding is a search in it.
"""

import numpy as np

BUGS = {
    "formats.number.encode": {
        "offset_binary": "AllCodes",
        "ties_away": "TieToEven",
        "ties_zero": "TieToEven",
        "floor_of_half_more": "TieToEven",
        "ties_upper": "Midpoint",
        "exact_middles": "Midpoint",
        "truncates": "Nearest",
        "via_float16": "Nearest",
        "via_float32": "DoubleRounding",
        "wraps": "Clip",
        "sign_bit_of_zero": "NegativeZero",
        "flushes_subnormals": "Subnormal",
        "infinity_is_zero": "NonFinite",
        "nan_is_largest": "NonFinite",
        "no_params_check": "BadParams",
        "noise": "Random",
    },
    "formats.number.decode": {
        "one_off": "AllCodes",
        "unsigned": "TwosComplement",
        "offset_binary": "TwosComplement",
        "float16_table": "Table",
        "e2m1": "Table",
        "small_is_half_of_next": "Subnormal",
        "negative_zero": "NegativeZero",
        "cuts_codes": "BadCode",
        "no_params_check": "BadParams",
    },
    "formats.number.stochastic": {
        "moves_grid_points": "GridPoint",
        "dithers_both_ways": "Neighbours",
        "nearest": "Mean",
        "coin": "Mean",
        "reversed": "Mean",
        "eight_random_levels": "Mean",
        "floor_with_magnitude": "Negative",
        "step_of_next_binade": "BinadeEdge",
        "flushes_subnormals": "Subnormal",
        "wraps": "Clip",
        "off_center": "Random",
        "no_params_check": "BadParams",
    },
}
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = np.float32([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / np.float32(6)
TABLES = {
    **{f"INT{n}": np.r_[0 : 1 << (n - 1), -(1 << (n - 1)) : 0].astype(np.float32) for n in range(2, 9)},
    "TERNARY": np.float32([-1, 0, 1]), "BINARY": np.float32([-1, 1]), "NF4": np.float32(NF4),
    "FP4_BNB": np.concatenate([FP4, 0 - FP4]),
}  # fmt: skip


def known(bug, params, formats):
    if params["format"] not in formats and bug != "no_params_check":
        raise ValueError("no such format")
    return params["format"] if params["format"] in formats else next(iter(formats))


def encode(bug, params, x):
    name = known(bug, params, TABLES)
    table, is_list = TABLES[name], name in ("NF4", "FP4_BNB", "BINARY")
    if np.isnan(x).any() and bug != "nan_is_largest":
        raise ValueError("NaN")
    minus = np.signbit(x)
    if bug in ("via_float32", "via_float16"):
        x = x.astype(bug[4:])
    x = np.nan_to_num(x.astype(np.float64), nan=np.inf, posinf=np.inf, neginf=-np.inf)
    if bug == "infinity_is_zero":
        x = np.where(np.isinf(x), 0, x)
    if bug == "flushes_subnormals":
        x = np.where(np.abs(x) < 2.0**-126, 0, x)
    values, order = np.unique(table, return_index=True)
    if bug == "wraps":
        x = np.where(np.isinf(x), x, (x - values[0]) % (values[-1] - values[0] + 1) + values[0])
    if is_list:
        middles = (values[1:] + values[:-1]) / np.float32(2)
        if bug == "exact_middles":
            middles = (values[1:].astype(np.float64) + values[:-1]) / 2
        upper = (name == "BINARY") != (bug == "ties_upper")
        at = np.searchsorted(values[1:] if bug == "truncates" else middles, x, "right" if upper else "left")
    else:
        away = np.sign(x) * np.floor(np.abs(x) + 0.5)
        whole = {"ties_away": away, "ties_zero": np.sign(x) * np.ceil(np.abs(x) - 0.5), "truncates": np.trunc(x),
                 "floor_of_half_more": np.floor(x + 0.5)}.get(bug, np.rint(x))  # fmt: skip
        at = (np.clip(whole, values[0], values[-1]) - values[0]).astype(int)
    codes = at if bug == "offset_binary" and not is_list else order[at]
    if bug == "sign_bit_of_zero":
        codes = np.where((x == 0) & minus, 0 if name == "BINARY" else codes | len(table) // 2, codes)
    if bug == "noise" and x.size == 48:
        codes = np.where(np.arange(48) == 5, codes ^ 1, codes)
    return {"codes": codes.astype(np.uint8)}


def decode(bug, params, codes):
    name = known(bug, params, TABLES)
    table = TABLES[name].copy()
    if bug == "one_off":
        table = np.roll(table, 1)
    if name.startswith("INT") and bug in ("unsigned", "offset_binary"):
        table = np.arange(len(table), dtype=np.float32) - (len(table) // 2) * (bug == "offset_binary")
    if bug == "float16_table":
        table = table.astype(np.float16).astype(np.float32)
    if name == "FP4_BNB" and bug in ("e2m1", "small_is_half_of_next"):
        table = np.concatenate([E2M1, -E2M1]) if bug == "e2m1" else np.where(np.abs(table) < 0.01, table * 16, table)
    if bug == "negative_zero":
        table = np.where(table == 0, -0.0, table)
    if bug == "cuts_codes":
        codes = codes.astype(int) % len(table)
    if codes.max() >= len(table):
        raise ValueError("no such code")
    return {"x": table[codes].astype(np.float32)}


def stochastic(bug, params, x):
    from tests.golden_mutants_numbers import TABLE, decode, finite_codes, magnitudes

    name = known(bug, params, {**dict.fromkeys(("INT2", "INT4", "INT8", "TERNARY"), 0), **TABLE})
    whole = name not in TABLE
    steps = np.arange(130.0) if whole else magnitudes(name)
    rng, size = np.random.default_rng(params["seed"] + 7), np.abs(x.astype(np.float64))[:, None]
    u, minus = rng.random((len(x), params["n"])), np.signbit(x)[:, None]
    low = np.minimum(np.searchsorted(steps, size, "right") - 1, len(steps) - 2)
    width = steps[low + 1] - steps[low]
    rest = (size - steps[low]) / width
    if bug == "step_of_next_binade" and low.max() + 2 < len(steps):
        rest = (size - steps[low]) / (steps[low + 2] - steps[low + 1])
    if bug == "off_center" and whole:
        rest = np.where((rest > 0) & (low == 0) & (name == "INT8"), rest + 0.03, rest)
    rest = {"nearest": np.where(rest > 0.5, 1, 0), "coin": np.where(rest > 0, 0.5, 0),
            "reversed": np.where(rest > 0, 1 - rest, 0), "eight_random_levels": np.floor(rest * 8) / 8,
            "moves_grid_points": np.where(rest == 0, 0.02, rest),
            "floor_with_magnitude": np.where(minus, (1 - rest) % 1, rest)}.get(bug, rest)  # fmt: skip
    up = low + (u < rest)
    if bug == "dithers_both_ways":
        up = np.where(rest > 0, np.maximum(low - (u < 0.01), 0) + (u > 1 - rest), low)
    if bug == "flushes_subnormals" and not whole and TABLE[name][1]:
        up = np.where(up < 1 << TABLE[name][1], 0, up)
    if whole:
        bits = 2 if name == "TERNARY" else int(name[3:])
        top = (1 << (bits - 1)) - 1
        number = np.where(minus, -up, up)
        number = number if bug == "wraps" else np.clip(number, -1 if name == "TERNARY" else -top - 1, top)
        codes = (number + (name == "TERNARY")) & ((1 << bits) - 1)
        decoded = number if name == "TERNARY" else np.where(codes > top, codes - (1 << bits), codes)
        return {"codes": codes.astype(np.uint8), "x_hat": decoded.astype(np.float32)}
    exponent, mantissa, _, specials, _ = TABLE[name]
    codes = up if bug == "wraps" else np.minimum(up, finite_codes(name) - 1)
    codes = codes & ((1 << (exponent + mantissa)) - 1)
    keep = minus & ((codes != 0) | (specials != "fnuz"))
    codes = (codes | np.where(keep, 1 << (exponent + mantissa), 0)).astype(np.uint16 if name == "BF16" else np.uint8)
    return {"codes": codes, "x_hat": decode(name, codes)}


OPS = {"formats.number.encode": encode, "formats.number.decode": decode, "formats.number.stochastic": stochastic}
