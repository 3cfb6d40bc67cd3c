"""Plain NumPy implementations of quant.olive and quant.spark, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

F = np.float32
BUGS = {
    "quant.olive": {
        "ties_even": "Tie",
        "ties_away": "Tie",
        "normal_at_the_border": "TieToOutlier",
        "victim_kept": "Victim",
        "larger_wins": "FirstWins",
        "second_wins": "FirstWins",
        "eight_is_an_outlier": "Abfloat",
        "identifier_first": "Identifier",
        "high_nibble_first": "NibbleOrder",
        "sign_and_magnitude": "TwosComplement",
        "int_always": "Flint",
        "largest_dropped": "Saturates",
        "population_std": "SampleStd",
        "no_mean": "Mean",
        "std_of_all": "PerRow",
        "one_scale": "PerRow",
        "victims_free": "VictimsCount",
        "high_included": "UpperEnd",
        "best_by_row": "Best",
        "exact_scale": "RoundedFirst",
        "nan_rows": "ZeroRow",
        "run_on": "OddWidth",
        "any_weight": "NonFinite",
        "any_params": "BadParams",
        "noise": "Random",
    },
    "quant.spark": {
        "eight_is_short": "Short",
        "down_to_zero": "RoundDown",
        "up_to_ones": "RoundUp",
        "b3_kept": "FourthBit",
        "high_nibble_first": "NibbleOrder",
        "rows_run_on": "RowBytes",
        "signs_high_bit_first": "Signs",
        "sign_of_zero": "ZeroSign",
        "ties_away": "TieToEven",
        "a_scale_a_row": "Groups",
        "rows_not_tensor": "PerTensor",
        "levels_127": "Levels",
        "zero_scale": "ZeroGroup",
        "exact_scale": "RoundedFirst",
        "any_weight": "NonFinite",
        "any_params": "BadParams",
        "noise": "Random",
    },
}
NORMALS = {"int": np.arange(8.0), "flint": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 8])}


def mutant(bug):
    """An implementation with one mistake."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            return _OPS[op](bug, params, **inputs)

    return implementation


def require(condition, bug, mistake):
    if not condition and bug != mistake:
        raise ValueError("rejected")


# --- olive -----------------------------------------------------------------------------------------------------------


def outliers_of(bug):
    magnitudes = np.array([12.0, 16, 24, 32, 48, 64, 96])
    return {"eight_is_an_outlier": np.append(8.0, magnitudes), "largest_dropped": magnitudes[:-1]}.get(bug, magnitudes)


def nearest(bug, x, normals):
    """The value of every step, by the distances to all of them."""
    normal, outlier = NORMALS[normals], outliers_of(bug)
    both = lambda magnitudes: np.unique(np.concatenate([-magnitudes, magnitudes]))
    listed = np.concatenate([both(normal), both(outlier)])
    if bug == "normal_at_the_border":
        listed = np.sort(listed)
    if bug in ("ties_even", "ties_away"):
        listed = listed[np.argsort(np.abs(listed), kind="stable")]
    x = np.clip(x.astype(np.float64), -1e6, 1e6)
    gaps = np.abs(x[..., None] - listed)
    last = listed[len(listed) - 1 - gaps[..., ::-1].argmin(axis=-1)]
    if bug == "ties_even":
        return np.where(np.abs(x) < 7, np.rint(x), last) if normals == "int" else last
    return last


def victims(bug, values):
    """Values with one of each pair gone."""
    pairs = values.reshape(len(values), -1, 2).copy()
    a, b = np.abs(pairs[..., 0]), np.abs(pairs[..., 1])
    first, second = a > 8, b > 8
    if bug == "victim_kept":
        first = second = np.zeros(a.shape, bool)
    elif bug == "second_wins":
        first = first & ~second
    elif bug == "larger_wins":
        first, second = first & ~(second & (b > a)), second & ~(first & (a >= b))
    pairs[..., 1][first] = 0
    pairs[..., 0][second & ~first] = 0
    return pairs.reshape(values.shape)


def nibbles(bug, values, normals):
    size, negative = np.abs(values), values < 0
    index = np.searchsorted(NORMALS[normals], np.minimum(size, NORMALS[normals][-1]))
    normal = np.where(negative, (8 + index if bug == "sign_and_magnitude" else -index) % 16, index)
    place = np.searchsorted(outliers_of(bug), np.maximum(size, outliers_of(bug)[0])) + (bug != "eight_is_an_outlier")
    large = size > 8
    found = np.where(large, place % 8 + 8 * negative, normal).reshape(len(values), -1, 2)
    large = large.reshape(found.shape)
    a, b = np.where(large[..., 1], 8, found[..., 0]), np.where(large[..., 0], 8, found[..., 1])
    if bug == "identifier_first":  # always in the low nibble
        a, b = np.where(large[..., 0], 8, a), np.where(large[..., 0], found[..., 0], b)
    return (a << 4 | b if bug == "high_nibble_first" else a | b << 4).astype(np.uint8)


def decode(bug, w, scale, normals):
    """Values and decoded weights."""
    steps = w / scale.astype(F)
    return victims(bug, nearest(bug, steps, normals))


def search(bug, w, normals, low, high):
    wide = w.astype(np.float64)
    mean, std = wide.mean(axis=1, keepdims=True), wide.std(axis=1, ddof=bug != "population_std", keepdims=True)
    if bug == "std_of_all":
        mean, std = np.full_like(mean, wide.mean()), np.full_like(std, wide.std(ddof=1))
    base = (0 if bug == "no_mean" else np.abs(mean)) + 3 * std
    if bug == "one_scale":
        base[:] = base.max()
    if bug != "nan_rows":
        base[base == 0] = 1
    best, least = np.zeros(base.shape), np.full(base.shape, np.inf)
    for percent in range(low, max(high + (bug == "high_included"), low + 1), 2):
        scale = base * percent / 100 / NORMALS[normals][-1]
        used = scale if bug == "exact_scale" else scale.astype(np.float16)
        values = decode("victim_kept" if bug == "victims_free" else bug, w, used, normals)
        error = np.square((values.astype(F) * used.astype(F)).astype(np.float64) - wide).sum(axis=1, keepdims=True)
        better = error < least
        least[better], best[better] = error[better], scale[better]
    return best, least


def olive(bug, params, w, scale=None):
    if bug == "run_on" and w.shape[1] % 2:
        w = np.pad(w, ((0, 0), (0, 1)))
    require(w.shape[1] % 2 == 0, bug, "run_on")
    require(np.isfinite(w).all(), bug, "any_weight")
    fine = params["normals"] in ("int", "flint", "best") and 1 <= params["low"] < params["high"]
    require(fine, bug, "any_params")
    w, low, high = np.nan_to_num(w, posinf=1, neginf=-1), params["low"], params["high"]
    normals = params["normals"] if params["normals"] in ("int", "flint", "best") else "int"
    if bug == "int_always":
        normals = "int"
    if scale is not None:
        if bug == "one_scale":
            scale = np.full_like(scale, scale.max())
        values = decode(bug, w, scale, normals)
        return {"codes": nibbles(bug, values, normals), "w_hat": values.astype(F) * scale}
    forms = ("int", "flint") if normals == "best" else (normals,)
    found = {form: search(bug, w, form, low, high) for form in forms}
    of_rows = [min(forms, key=lambda form: found[form][1].sum())] * len(w)
    if bug == "best_by_row":
        of_rows = [min(forms, key=lambda form: found[form][1][row, 0]) for row in range(len(w))]
    scales, codes, back = [], [], []
    for row, form in enumerate(of_rows):
        exact = found[form][0][row : row + 1]
        half = exact.astype(np.float16)
        values = decode(bug, w[row : row + 1], exact if bug == "exact_scale" else half, form)
        if bug == "noise" and w.size > 20:
            values[0, ::5] = 0
        scales.append(half)
        codes.append(nibbles(bug, values, form))
        back.append(values.astype(F) * half.astype(F))
    return {name: np.concatenate(parts) for name, parts in (("scale", scales), ("codes", codes), ("w_hat", back))}


# --- spark -----------------------------------------------------------------------------------------------------------


def long_code(bug, v):
    b0, b3, low = v >> 7, v >> 4 & 1, v & 15
    if b0 < b3:
        low = 0 if bug == "down_to_zero" else 15
    elif b0 > b3:
        low = 15 if bug == "up_to_ones" else 0
    return 0x80 | v & 0x60 | (b3 if bug == "b3_kept" else b0) << 4 | low


def spark(bug, params, w):
    g = params["group_size"]
    require(np.isfinite(w).all(), bug, "any_weight")
    rows, columns = w.shape
    require(g >= -1 and (g <= 0 or columns % g == 0), bug, "any_params")
    w = np.nan_to_num(w)
    if g == 0 and bug != "rows_not_tensor":
        groups = w.reshape(1, 1, -1)
    else:
        width = columns if g <= 0 or columns % g or bug == "a_scale_a_row" else g
        groups = w.reshape(rows, -1, width)
    levels = F(127 if bug == "levels_127" else 255)
    amax = np.abs(groups).max(axis=2)
    single = (amax if bug == "zero_scale" else np.where(amax == 0, F(2), amax)) / levels
    half = single.astype(np.float16)
    used = single if bug == "exact_scale" else half.astype(F)
    steps = np.nan_to_num(np.abs(groups) / used[..., None])
    v = np.floor(steps + F(0.5)) if bug == "ties_away" else np.rint(steps)
    v = np.minimum(v, levels).astype(int)
    numbers, streams, row_bytes, plain = v.reshape(rows, columns), [], [], []
    back = np.empty(numbers.shape, int)
    for r in range(rows):
        found = []
        for c, number in enumerate(numbers[r]):
            if number <= 7 + (bug == "eight_is_short"):
                found.append(min(number, 7))
                back[r, c] = min(number, 7)
                continue
            code = long_code(bug, int(number))
            found += [code >> 4, code & 15]
            back[r, c] = code if code & 16 else code & 127
        if bug == "noise" and numbers.size > 30:
            back[r, -1] = 0
        plain += found
        found += [0] * (len(found) % 2)
        streams.append(packed(bug, found))
        row_bytes.append(len(found) // 2)
    stream = packed(bug, plain + [0] * (len(plain) % 2)) if bug == "rows_run_on" else np.concatenate(streams)
    negative = (w < 0) & ((numbers > 0) | (bug == "sign_of_zero"))
    signs = np.packbits(negative, axis=1, bitorder="big" if bug == "signs_high_bit_first" else "little")
    w_hat = (back.reshape(groups.shape).astype(F) * half.astype(F)[..., None]).reshape(w.shape)
    return {
        "stream": stream,
        "row_bytes": np.array(row_bytes),
        "signs": signs,
        "scale": half,
        "w_hat": np.where(w < 0, -w_hat, w_hat),
    }


def packed(bug, found):
    first, second = np.array(found[::2], np.uint8), np.array(found[1::2], np.uint8)
    return first << 4 | second if bug == "high_nibble_first" else first | second << 4


_OPS = {"quant.olive": olive, "quant.spark": spark}
