"""Plain NumPy implementations of the ops about rounded inputs, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

F = np.float32
BUGS = {
    "activations.dynamic": {
        "one_scale": "PerToken",
        "divides_by_128": "Levels",
        "ties_away": "TieToEven",
        "ratio_ignored": "Clip",
        "zero_not_rounded": "ZeroPoint",
        "range_without_zero": "OneSided",
        "zero_scale_one": "ZeroToken",
        "any_params": "BadParams",
        "noise": "Random",
    },
    "finish.static": {
        "own_scale": "OneScale",
        "wraps": "Saturates",
        "nearest_rank": "Percentile",
        "percentile_ignored": "Percentile",
        "average_from_zero": "Average",
        "symmetric_always": "ZeroPoint",
        "any_params": "BadParams",
        "any_width": "WrongWidth",
    },
    "quant.llm_int8": {
        "above": "Threshold",
        "amax_before": "AmaxAfter",
        "entries_stay": "WholeColumn",
        "columns_before": "EntriesOnly",
        "exact_weights": "DecodedWeights",
        "divides_by_128": "Levels",
        "nan_rows": "ZeroRow",
        "zero_is_a_threshold": "NoThreshold",
        "any_params": "BadParams",
        "any_weight": "NonFinite",
        "noise": "Random",
    },
    "quant.zeroquant": {
        "textbook": "Divisor",
        "along_columns": "GroupAlongRow",
        "ties_away": "TieToEven",
        "divides_by_4": "Divisor6",
        "m1_down": "M1",
        "m2_up": "M2",
        "next_power": "PowersStay",
        "zero_scale": "ZeroGroup",
        "any_params": "BadParams",
        "any_weight": "NonFinite",
        "noise": "Random",
    },
    "finish.lorc": {
        "of_the_weight": "ErrorNotWeight",
        "smallest": "LargestKept",
        "one_less": "FullRank",
        "any_rank": "BadRank",
        "any_shape": "WrongShape",
        "nan_ignored": "NonFinite",
    },
    "finish.teal": {
        "keeps_equal": "Strict",
        "of_x": "Magnitude",
        "own_quantile": "Calibrated",
        "zeros_count": "Zero",
        "any_params": "BadParams",
    },
    "finish.amber": {
        "not_clipped": "Clip",
        "rows": "Column",
        "ties_up": "TieLower",
        "threshold": "ExactlyN",
        "one_by_one": "Block",
        "any_params": "BadParams",
        "cut_short": "Shape",
        "scale_of_all": "OwnScale",
        "divide_by_half_range": "Divisor",
        "scale_one_for_zeros": "Empty",
    },
    "transform.smoothquant": {
        "first_only": "Joint",
        "divided": "Multiply",
        "alpha_swapped": "Alpha",
        "no_floor": "Floor",
        "rows": "PerColumn",
        "any_params": "BadParams",
        "never_inverted": "Inverted",
        "dead_inverted": "Dead",
    },
    "transform.osplus": {
        "all_channels": "OnlyOutside",
        "upper_only": "BothSigns",
        "last_threshold": "Search",
        "mean": "Shift",
        "dead_half": "Dead",
        "any_params": "BadParams",
    },
}


def mutant(bug):
    """An implementation with one mistake."""
    return lambda op, params, inputs: _OPS[op](bug, params, **inputs)


def require(condition, bug, mistake):
    if not condition and bug != mistake:
        raise ValueError("rejected")


def rint(bug, x):
    return np.sign(x) * np.floor(np.abs(x) + 0.5) if bug == "ties_away" else np.rint(x)


def over(x, scale):
    """x / scale, 0 where the scale is."""
    return np.divide(x, scale, out=np.zeros(np.broadcast_shapes(x.shape, scale.shape), x.dtype), where=scale != 0)


def dynamic(bug, params, x):
    bits, ratio = params["bits"], 1.0 if bug == "ratio_ignored" else params["clip_ratio"]
    require(2 <= bits <= 8 and 0 < ratio <= 1, bug, "any_params")
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    along = dict(axis=None if bug == "one_scale" else 1, keepdims=True)
    if params["symmetric"]:
        most = half - 1
        scale = F(ratio) * (np.abs(x).max(**along) / F(half if bug == "divides_by_128" else most))
        scale = np.broadcast_to(scale, (len(x), 1))
        codes = np.clip(rint(bug, over(x, scale)), -most - (bug == "divides_by_128"), most)
        outputs = {"codes": codes}
    else:
        lo, hi = x.min(**along), x.max(**along)
        if bug != "range_without_zero":
            lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
        lo, hi = np.broadcast_to(lo * F(ratio), (len(x), 1)), np.broadcast_to(hi * F(ratio), (len(x), 1))
        scale = hi / F(top) - lo / F(top)
        exact = over(-lo, scale)
        zero = exact if bug == "zero_not_rounded" else np.rint(exact)
        codes = np.clip(np.rint(over(x, scale) + (zero if bug == "zero_not_rounded" else 0))
                        + (0 if bug == "zero_not_rounded" else zero), 0, top) - half  # fmt: skip
        outputs = {"codes": codes, "zero": (zero - F(half)).astype(F)}
    if bug == "zero_scale_one":
        scale = np.where(scale == 0, F(1), scale)
    if bug == "noise" and x.size > 30:
        codes[-1, -1] = -codes[-1, -1] - 1
    return outputs | {"codes": codes.astype(np.int8), "scale": np.ascontiguousarray(scale, F)}


def static(bug, params, calibration, x):
    bits, symmetric = params["bits"], params["symmetric"] or bug == "symmetric_always"
    fine = 2 <= bits <= 8 and 50 < params["percentile"] <= 100 and 0 <= params["momentum"] < 1
    require(fine, bug, "any_params")
    require(calibration.shape[1] == x.shape[1], bug, "any_width")
    bits = max(bits, 2)
    seen = (x if bug == "own_scale" else calibration).astype(np.float64)
    high = observed(bug, params, np.abs(seen) if symmetric else seen)
    if symmetric:
        scale, zero, middle, top = F(high / ((1 << (bits - 1)) - 1)), 0, 0, (1 << (bits - 1)) - 1
        lowest = -top
    else:
        low, high = min(0, -observed(bug, params, -seen)), max(0, high)
        top, lowest, middle = (1 << bits) - 1, 0, 1 << (bits - 1)
        scale = F((high - low) / top)
        zero = np.clip(np.rint(F(-low) / scale), 0, top)
    codes = np.rint(x / scale) + zero
    codes = (codes - lowest) % (top - lowest + 1) + lowest if bug == "wraps" else np.clip(codes, lowest, top)
    outputs = {"codes": (codes - middle).astype(np.int8), "scale": np.full((1, 1), scale, F)}
    if not params["symmetric"]:
        outputs["zero_point"] = np.full((1, 1), zero, np.uint8)
    return outputs


def observed(bug, params, X):
    if params["observer"] == "max" or bug == "percentile_ignored":
        return X.max()
    if params["observer"] == "percentile":
        method = "nearest" if bug == "nearest_rank" else "linear"
        return np.percentile(X, params["percentile"], method=method)
    batches = [X[i : i + 512].max() for i in range(0, len(X), 512)]
    high = 0 if bug == "average_from_zero" else batches.pop(0)
    for batch in batches:
        high = params["momentum"] * high + (1 - params["momentum"]) * batch
    return high


def vector_wise(bug, x):
    amax = np.abs(x).max(axis=1, keepdims=True)
    levels = F(128 if bug == "divides_by_128" else 127)
    with np.errstate(all="ignore"):
        factor = levels * (F(1) / amax)
        codes = np.rint(x * factor)
    if bug == "nan_rows":
        return np.nan_to_num(codes, nan=-1), amax
    return np.clip(np.where(amax > 0, codes, 0), -128, 127), amax


def llm_int8(bug, params, w, x):
    t = params["threshold"]
    require(t >= 0, bug, "any_params")
    require(np.isfinite(w).all(), bug, "any_weight")
    w = np.nan_to_num(w)
    if bug == "zero_is_a_threshold" and t == 0:
        t = 1e-30
    large = (np.abs(x) > t if bug == "above" else np.abs(x) >= t) if t > 0 else np.zeros(x.shape, bool)
    columns = large.any(axis=0)
    moved = large if bug == "entries_stay" else np.broadcast_to(columns, x.shape)
    rest = np.where(moved if bug == "columns_before" else large, F(0), x)
    w_codes, w_amax = vector_wise(bug, w)
    x_codes, x_amax = vector_wise(bug, x if bug == "amax_before" else rest)
    x_codes = np.where(moved, 0, x_codes)
    w_scale, x_scale = np.where(w_amax > 0, w_amax, F(1)) / F(127), x_amax / F(127)
    y = (x_codes @ w_codes.T).astype(np.float64) * x_scale * w_scale.T
    other = w if bug == "exact_weights" else w_codes * w_scale
    y += np.where(moved, x, 0).astype(np.float64) @ other.T.astype(np.float64)
    if bug == "noise" and x.size > 30:
        y[-1, -1] += 1
    return {
        "w_codes": w_codes.astype(np.int8), "w_scale": w_scale, "x_codes": x_codes.astype(np.int8),
        "x_scale": x_scale, "outliers": columns[None].astype(np.uint8), "y": y.astype(F),
    }  # fmt: skip


FP4 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def zeroquant(bug, params, w):
    g = params["group_size"]
    fine = w.shape[1] % g == 0 and 2 <= params.get("bits", 4) <= 8
    require(fine and params.get("constraint", "none") in ("none", "m1", "m2"), bug, "any_params")
    require(np.isfinite(w).all(), bug, "any_weight")
    if not fine or not np.isfinite(w).all():
        return {"codes": np.zeros(w.shape, np.uint8)}
    shape = (len(w), w.shape[1] // g, g)
    groups = w.reshape(shape[0], g, shape[1]).swapaxes(1, 2) if bug == "along_columns" else w.reshape(shape)
    amax = np.abs(groups).max(axis=2)
    amax = amax if bug == "zero_scale" else np.where(amax > 0, amax, F(1))
    form = integers if params["form"] == "integer" else small_floats
    codes, scale, back = form(bug, params, groups, amax)
    if bug == "noise" and w.size > 20:
        back = back.copy()
        back[-1, -1, -1] += 1
    if bug == "along_columns":
        codes, back = codes.swapaxes(1, 2), back.swapaxes(1, 2)
    return {"codes": codes.reshape(w.shape).astype(np.uint8), "scale": scale, "w_hat": back.reshape(w.shape)}


def integers(bug, params, groups, amax):
    half = 1 << (params["bits"] - 1)
    scale = (amax / F(half - 1 if bug == "textbook" else half)).astype(np.float16)
    wide = scale.astype(F)[..., None]
    q = np.clip(rint(bug, over(groups, wide)), -half, half - 1)
    return q + half, scale, (q * wide).astype(F)


def small_floats(bug, params, groups, amax):
    scale = amax.astype(np.float64) / (4 if bug == "divides_by_4" else 6)
    up = lambda x: np.exp2(np.floor(np.log2(x)) + 1 if bug == "next_power" else np.ceil(np.log2(x) - 1e-12))
    down = lambda x: np.exp2(np.floor(np.log2(x)))
    with np.errstate(divide="ignore", invalid="ignore"):
        if params["constraint"] == "m1":
            scale = down(scale) if bug == "m1_down" else up(scale)
        if params["constraint"] == "m2":
            ratio = scale.max() / scale
            scale = scale.max() / (down(ratio) if bug == "m2_up" else up(ratio))
    scale = scale.astype(np.float16)
    steps = over(groups, scale.astype(F)[..., None])
    gaps = np.abs(np.abs(steps)[..., None] - FP4)
    order = np.arange(8) if bug == "ties_away" else np.arange(8) % 2
    nearest = gaps.min(axis=-1, keepdims=True)
    rank = np.where(gaps == nearest, -order if bug == "ties_away" else order, 99)
    codes = rank.argmin(axis=-1)
    sign = np.where(groups < 0, -1, 1)
    return codes + 8 * (groups < 0), scale, (FP4[codes] * scale.astype(F)[..., None] * sign).astype(F)


def lorc(bug, params, w, w_hat):
    r = params["rank"]
    require(w.shape == w_hat.shape, bug, "any_shape")
    require(1 <= r <= min(w_hat.shape), bug, "any_rank")
    require(np.isfinite(w).all(), bug, "nan_ignored")
    w = np.nan_to_num(w)[: len(w_hat), : w_hat.shape[1]].astype(np.float64)
    U, S, Vt = np.linalg.svd(w if bug == "of_the_weight" else w - w_hat, full_matrices=False)
    kept = slice(len(S) - r, None) if bug == "smallest" else slice(0, r - (bug == "one_less" and r > 1))
    root = np.sqrt(S[kept])
    A, B = ((part).astype(np.float16).astype(np.float64) for part in (U[:, kept] * root, root[:, None] * Vt[kept]))
    repaired = w_hat + A @ B
    return {"repaired": repaired.astype(F), "error": np.array(np.sum((w - repaired) ** 2))}


def teal(bug, params, calibration, x):
    s = params["sparsity"]
    require(0 <= s < 1, bug, "any_params")
    seen = x if bug == "own_quantile" else calibration
    sizes = np.sort((seen if bug == "of_x" else np.abs(seen)).reshape(-1))
    count = min(int(np.ceil(s * sizes.size)), sizes.size)
    tau = sizes[count - 1] if count else F(-1 if bug == "zeros_count" else 0)
    kept = np.abs(x) >= tau if bug == "keeps_equal" else np.abs(x) > tau
    return {"threshold": np.full((1, 1), max(tau, 0), F), "kept": kept.astype(np.uint8)}


def amber(bug, params, w, x):
    n, m, b = params["n"], params["m"], params["block"]
    require(1 <= n <= m, bug, "any_params")
    require(w.shape[1] % (m * b) == 0, bug, "cut_short")
    b = 1 if bug == "one_by_one" or w.shape[1] % (m * b) else b
    W = w.astype(np.float64)
    W = W if bug == "not_clipped" else np.clip(W, *np.percentile(W, (0.5, 99.5)))
    norms = np.linalg.norm((W - W.mean()) / W.std(), axis=1 if bug == "rows" else 0)
    factor = norms / norms[norms > 0].min()
    score = np.abs(x.astype(np.float64)) * (factor if params["score"] == "amber" else 1)
    units = (score.reshape(len(x), -1, m, b) ** 2).sum(axis=-1)
    order = np.argsort(-units[..., ::-1] if bug == "ties_up" else -units, axis=-1, kind="stable")
    kept = np.argsort(order, axis=-1) < n
    kept = kept[..., ::-1] if bug == "ties_up" else kept
    if bug == "threshold":
        kept = kept & (units > 0)
    kept = np.repeat(kept.reshape(len(x), -1), b, axis=1).astype(np.uint8)
    found = {"factor": factor[None].astype(F), "kept": kept}
    if "bits" in params:
        most = 2 ** (params["bits"] - 1) - (bug != "divide_by_half_range")
        scale = np.abs(x if bug == "scale_of_all" else x * kept).max(axis=1, keepdims=True) / F(most)
        codes = np.rint(x * kept / np.where(scale > 0, scale, F(1))).astype(np.int8)
        if bug == "scale_one_for_zeros":
            scale = np.where(scale > 0, scale, F(1))
        found |= {"codes": codes, "scale": scale}
    return found


def smoothquant(bug, params, absmax, gain, first, second):
    alpha = 1 - params["alpha"] if bug == "alpha_swapped" else params["alpha"]
    require(0 <= alpha <= 1, bug, "any_params")
    floor = 0 if bug == "no_floor" else 1e-5
    w = np.abs(first if bug == "first_only" else np.concatenate([first, second])).max(axis=0).astype(np.float64)
    with np.errstate(all="ignore"):
        s = np.maximum(floor, absmax[0] ** alpha / np.maximum(floor, w) ** (1 - alpha))
        if bug == "rows":
            s = s[::-1]
        if params.get("inverted") and bug != "never_inverted":
            dead = (absmax[0] == 0) | ~np.concatenate([first, second]).any(axis=0)
            s = np.where(dead & (bug != "dead_inverted"), 1, 1 / s)
        scaled = [W / s if bug == "divided" else W * s for W in (first, second)]
        return {"s": s[None], "gain": (gain / s).astype(F), "first": scaled[0].astype(F), "second": scaled[1].astype(F)}


def osplus(bug, params, x, w):
    bits, steps = params["bits"], params["steps"]
    require(2 <= bits <= 8 and steps >= 1, bug, "any_params")
    high, low = x.max(axis=0).astype(np.float64), x.min(axis=0).astype(np.float64)
    top, most = np.abs(x).max().astype(np.float64), (1 << (max(bits, 2) - 1)) - 1
    z = x.astype(np.float64).mean(axis=0) if bug == "mean" else (high + low) / 2
    if bug == "dead_half":
        high = np.where(high == 0, 4 * top, high)
    best = None
    for i in range(max(steps, 1) + 1):
        t = top - i * (top - 0.1) / max(steps, 1)
        s = (high if bug == "upper_only" else np.maximum(high, -low)) / t
        s = s + 1 if bug == "all_channels" else np.maximum(1, s)
        loss = np.sum((grid(x / s, most) @ grid(w * s, most).T - x.astype(np.float64) @ w.T) ** 2)
        if best is None or loss < best[0] or bug == "last_threshold":
            best = loss, s, t
    return {"s": best[1][None], "t": np.array(best[2]), "z": z[None]}


def grid(x, most):
    scale = (np.abs(x).max(axis=1, keepdims=True) / most).astype(F).astype(np.float64)
    return np.rint(x / scale) * scale


_OPS = {
    "activations.dynamic": dynamic,
    "finish.static": static,
    "quant.llm_int8": llm_int8,
    "quant.zeroquant": zeroquant,
    "finish.lorc": lorc,
    "finish.teal": teal,
    "finish.amber": amber,
    "transform.smoothquant": smoothquant,
    "transform.osplus": osplus,
}
