"""Plain NumPy implementations of quant.billm and quant.binary, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

from tests.golden_mutants_methods import require

BUGS = {
    "quant.billm": {
        "one_sign": "SecondSign",
        "second_mean_lost": "TwoMeans",
        "zero_mean": "Mean",
        "near_is_one": "Groups",
        "inverse_itself": "Importance",
        "squares_alone": "Importance",
        "searched_on_weights": "Searched",
        "searched_on_importance": "SearchWeights",
        "magnitude_squared": "Magnitude",
        "others_once": "OthersTwice",
        "zeros_left_out": "CountedZeros",
        "no_compensation": "LaterBlocks",
        "gptq_inside": "WithinBlock",
        "groups_of_original": "Refreshed",
        "exact_levels": "StoredNumbers",
        "dead_weight_stays": "DeadInput",
        "damp_1_percent": "Damping",
        "empty_mean_nan": "ZeroRow",
        "tail_left_out": "ShortBlock",
        "last_of_equals": "StableTies",
        "nan_to_zero": "NonFinite",
        "no_params_check": "BadParams",
        "stretches_inputs": "BadShape",
        "last_pair_swapped": "Random",
    },
    "quant.binary": {
        "zero_mean": "Mean",
        "root_mean_square": "Scale",
        "ties_minus": "Ties",
        "row_for_group": "Groups",
        "plus_and_minus_one": "ZeroRow",
        "nan_to_zero": "NonFinite",
        "tail_left_out": "BadShape",
        "last_pair_swapped": "Random",
    },
}


def braq(bug, x, mask, order):
    """Mean, scales, signs, what is left."""
    x, total, scales, signs = x.astype(np.float64), 0.0, [], []
    for k in range(order):
        count = mask.sum(axis=1, keepdims=True)
        with np.errstate(all="ignore"):
            mean = (x * mask).sum(axis=1, keepdims=True) / count
            if bug != "empty_mean_nan":
                mean = np.where(count > 0, mean, 0)
            if bug == "zero_mean":
                mean = mean * 0
            x = x - mean
            scale = np.abs(x * mask).sum(axis=1, keepdims=True) / np.maximum(count, 1)
        plus = x >= 0
        x = x - np.where(plus, scale, -scale)
        total = total + (0 if bug == "second_mean_lost" and k else mean)
        scales, signs = [*scales, scale], [*signs, plus]
    return total, scales, signs, np.nansum((x * mask) ** 2)


def grouping(bug, params, S, w):
    n = S.shape[1]
    searched = {"searched_on_weights": "weights", "searched_on_importance": "importance"}.get(bug, params["search"])
    M = S if searched == "importance" else w
    sums = np.abs(S).sum(axis=0)
    ranked = (
        n - 1 - np.argsort(-sums[::-1], kind="stable") if bug == "last_of_equals" else np.argsort(-sums, kind="stable")
    )
    errors = []
    for k in range(1, min(49, n) + 1):
        mask = np.zeros(S.shape, bool)
        mask[:, ranked[:k]] = True
        errors.append(braq(None, M, mask, 2)[-1] + braq(None, M, ~mask, 1 if bug == "others_once" else 2)[-1])
    salient = np.zeros(n, bool)
    salient[ranked[: np.argmin(errors) + 1]] = True
    size = np.where(salient, 0, np.abs(M))
    quantiles = np.arange(10, 91) / 100
    counted = size[:, ~salient] if bug == "zeros_left_out" and not salient.all() else size
    splits = [~salient & (size >= p) for p in np.quantile(counted, quantiles)]
    errors = [braq(None, M, far, 1)[-1] + braq(None, M, ~salient & ~far, 1)[-1] for far in splits]
    return salient, splits[int(np.argmin(errors))]


def billm(bug, params, w, x):
    if bug == "nan_to_zero":
        w, x = np.nan_to_num(w), np.nan_to_num(x, posinf=1)
    require(np.isfinite(w).all() and np.isfinite(x).all(), bug, "nan_to_zero")
    require(x.shape[1] == w.shape[1], bug, "stretches_inputs")
    known = params["by"] in ("hessian", "magnitude") and params["search"] in ("importance", "weights")
    require(known and params["block"] >= 1, bug, "no_params_check")
    w, x, block = w.astype(np.float64), np.resize(x, (len(x), w.shape[1])).astype(np.float64), max(1, params["block"])
    H = x.T @ x
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    if bug != "dead_weight_stays":
        w[:, dead] = 0
    n = w.shape[1]
    H += (0.01 if bug == "damp_1_percent" else params["damp"]) * np.mean(np.diag(H)) * np.eye(n)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    weight = np.diag(np.linalg.inv(H)) ** 2 if bug == "inverse_itself" else np.diag(U) ** 2
    if bug == "squares_alone":
        weight = np.ones(n)
    original, parts = w.copy(), []
    w_hat = np.zeros(w.shape, np.float32)
    for a in range(0, n - n % block if bug == "tail_left_out" and n > block else n, block):
        b = min(a + block, n)
        now = w[:, a:b]
        seen = original[:, a:b] if bug == "groups_of_original" else now
        S = seen if params["by"] == "magnitude" else seen**2 / weight[a:b]
        if bug == "magnitude_squared":
            S = S**2
        salient, far = grouping(bug, params, S, seen)
        fits = [
            braq(bug, now, m, k) for m, k in ((~salient & ~far, 1), (far, 1), (salient & np.ones(far.shape, bool), 2))
        ]
        mean = np.stack([f[0][:, 0] for f in fits], axis=1)
        scale = np.stack([s[:, 0] for f in fits for s in f[1]], axis=1)
        if bug == "one_sign":
            scale[:, 3] = 0
        half = mean.astype(np.float16), scale.astype(np.float16)
        mean, scale = (v.astype(np.float32) for v in half)
        group = np.where(salient, 2, far)
        signs = np.choose(group, [f[2][0] for f in fits])
        take = lambda levels, g: np.take_along_axis(levels, g, axis=1)
        level = take(scale, group)
        q = take(mean, group) + np.where(signs, level, -level)
        q = q + np.where(salient, np.where(fits[2][2][1], scale[:, 3:], -scale[:, 3:]), 0)
        second = np.where(salient, fits[2][2][1], ~far if bug == "near_is_one" else far)
        w_hat[:, a:b] = q
        exact = q.astype(np.float64)
        if bug == "exact_levels":
            exact = np.round(exact, 2)
        error = (now - exact) / np.diag(U)[a:b]
        if bug == "gptq_inside":
            w_hat[:, b - 1] = q[:, -1] - (error[:, :-1] @ U[a : b - 1, b - 1]).astype(np.float32)
        if bug != "no_compensation":
            w[:, b:] -= error @ U[a:b, b:]
        parts.append((signs, second, salient, *half))
    signs, second, salient = (np.concatenate(p, axis=-1).astype(np.uint8) for p in list(zip(*parts, strict=True))[:3])
    mean, scale = (np.stack(p, axis=1) for p in list(zip(*parts, strict=True))[3:])
    if bug == "last_pair_swapped" and n > 10:
        signs[:, -2:] = 1 - signs[:, -2:]
    return {"signs": signs, "second": second, "salient": salient, "mean": mean, "scale": scale, "w_hat": w_hat}


def binary(bug, params, w):
    w = np.nan_to_num(w) if bug == "nan_to_zero" else w
    require(np.isfinite(w).all(), bug, "nan_to_zero")
    n, g = w.shape[1], params["group_size"]
    g = n if g < 0 or bug == "row_for_group" else g
    require(n % g == 0, bug, "tail_left_out")
    groups = w[:, : n // g * g].reshape(len(w), -1, g).astype(np.float64)
    mean = groups.mean(axis=2, keepdims=True) * (bug != "zero_mean")
    apart = groups - mean
    scale = np.sqrt((apart**2).mean(axis=2)) if bug == "root_mean_square" else np.abs(apart).mean(axis=2)
    if bug == "plus_and_minus_one":
        scale = np.where(scale == 0, 1, scale)
    codes = (apart > 0 if bug == "ties_minus" else apart >= 0).astype(np.uint8)
    if bug == "last_pair_swapped" and n > 10:
        codes[-1, -1] = codes[-1, -1, ::-1]
    step, least = (2 * scale).astype(np.float16), (mean[..., 0] - scale).astype(np.float16)
    w_hat = step.astype(np.float32)[..., None] * codes + least.astype(np.float32)[..., None]
    out = (len(w), -1)
    return {"codes": codes.reshape(out), "scale": step, "minimum": least, "w_hat": w_hat.reshape(out)}


_OPS = {"quant.billm": billm, "quant.binary": binary}


def mutant(bug):
    """implementation(op, params, inputs) with one mistake, or none."""
    return lambda op, params, inputs: _OPS[op](bug, params, **inputs)
