"""A plain NumPy GPTQ, with one mistake at a time switched on: see tests/test_golden.py.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

from tests.golden_mutants_methods import require

BUGS = {
    "quant.gptq": {
        "no_compensation": "Compensation",
        "lower_factor": "UpperFactor",
        "factor_of_h": "UpperFactor",
        "inverse_itself": "UpperFactor",
        "damp_is_1_percent": "Damping",
        "dead_weight_stays": "DeadInput",
        "damped_first": "DeadDamping",
        "ascending": "ActOrder",
        "stays_permuted": "ActOrder",
        "last_of_equals_first": "ActOrderTies",
        "plain_group_map": "GroupIndex",
        "static_of_permuted": "StaticGroups",
        "static_ignored": "StaticGroups",
        "always_updated": "PublishedGroups",
        "always_published": "UpdatedGroups",
        "errors_stay_in_block": "LaterBlocks",
        "exact_scale": "ScaleRoundedFirst",
        "float16_always": "Float32Scale",
        "float64_quotient": "FloatQuotient",
        "narrow_range": "FullRange",
        "one_sign_halved": "OneSign",
        "zero_scale_nan": "ZeroGroup",
        "scale_per_row": "PerTensor",
        "noise": "Random",
        "no_finite_check": "NonFinite",
        "short_last_group": "GroupNotDividing",
        "pseudo_inverse": "Singular",
        "saturates": "ScaleOverflow",
        "no_params_check": "BadParams",
        "flattens": "BadShape",
    }
}


def mutant(bug):
    """An implementation `f(op, params, inputs)` with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            return gptq(bug, params, **inputs)

    return implementation


def gptq(bug, params, w, x):
    if bug == "flattens":
        w = np.atleast_2d(w)
        x = x if x.shape[1] == w.shape[1] else np.resize(x, (len(x), w.shape[1]))
    require(w.ndim == 2 and w.shape[1:] == x.shape[1:], bug, "flattens")
    require(np.isfinite(w).all() and np.isfinite(x).all(), bug, "no_finite_check")
    fine = params["bits"] >= 2 and params["damp"] >= 0 and params["block"] >= 1
    fine &= params["group_grid"] in ("published", "updated")
    require(fine, bug, "no_params_check")
    if not fine:
        params = params | {
            "bits": max(params["bits"], 2),
            "damp": abs(params["damp"]),
            "block": max(params["block"], 1),
        }
    g, columns = params["group_size"], w.shape[1]
    require(g <= 0 or columns % g == 0, bug, "short_last_group")
    w, x = np.nan_to_num(w.astype(np.float64)), np.nan_to_num(x.astype(np.float64), posinf=1)

    H = x.T @ x
    dead = np.diag(H) == 0
    damp = 0.01 if bug == "damp_is_1_percent" else params["damp"]
    early = np.mean(np.diag(H))
    H[dead, dead] = 1
    if bug != "dead_weight_stays":
        w[:, dead] = 0
    order = np.arange(columns)
    if params["act_order"]:
        key = np.diag(H) if bug == "ascending" else -np.diag(H)
        order = np.argsort(key, kind="stable")
        if bug == "last_of_equals_first":
            order = columns - 1 - np.argsort(key[::-1], kind="stable")
    H = H + damp * (early if bug == "damped_first" else np.mean(np.diag(H))) * np.eye(columns)
    H = H[np.ix_(order, order)]
    singular = np.linalg.matrix_rank(H) < columns
    require(not singular, bug, "pseudo_inverse")
    inverse = np.linalg.pinv(H) + 1e-3 * np.eye(columns) if singular else np.linalg.inv(H)
    U = np.linalg.cholesky(inverse).T
    if bug == "lower_factor":
        U = np.triu(np.linalg.cholesky(inverse[::-1, ::-1])[::-1, ::-1])
    if bug == "factor_of_h":
        U = np.linalg.cholesky(H).T
    if bug == "inverse_itself":
        U = inverse
    return sweep(bug, params, w, U, order)


def sweep(bug, params, w, U, order):
    rows, columns = w.shape
    g, block = params["group_size"], params["block"]
    static = params["static_groups"] and bug != "static_ignored"
    moving = g > 0 and not static
    now, fit = w[:, order].copy(), lambda part: fitted(bug, params, part)
    size = columns if g <= 0 else g
    group_of = (order if static and bug != "static_of_permuted" else np.arange(columns)) // size
    source = now if bug == "static_of_permuted" else w
    if g == 0 and bug != "scale_per_row":
        grids = [[np.repeat(a, rows) for a in fit(w.reshape(1, -1))]]
    else:
        grids = [fit(source[:, a : a + size]) for a in range(0, columns, size)]
    updated = (params["group_grid"] == "updated" or bug == "always_updated") and bug != "always_published"
    codes, outer = np.zeros((rows, columns), np.uint8), now.copy()
    for j in range(columns):
        if updated or j % block == 0:
            outer = now.copy()
        if moving and j % g == 0:
            grids[j // g] = fit(outer[:, j : j + g])
        scale, exact, zero = grids[group_of[j]]
        scale = (exact if bug == "exact_scale" else scale).astype(np.float64)
        quotient = (now[:, j] / scale).astype(np.float64 if bug == "float64_quotient" else np.float32)
        code = np.clip(np.rint(quotient) + zero, 0, 2 ** params["bits"] - 1)
        codes[:, j] = np.nan_to_num(code)
        error = (now[:, j] - scale * (code - zero)) / U[j, j]
        end = (j // block + 1) * block if bug == "errors_stay_in_block" else columns
        if bug != "no_compensation":
            now[:, j + 1 : end] -= error[:, None] * U[j, j + 1 : end]
    if bug == "noise" and columns > 10:
        codes[-1, -1] ^= 1

    g_idx = np.empty(columns, np.int32)
    g_idx[order] = np.arange(columns) // size if bug == "static_of_permuted" else group_of
    if bug == "plain_group_map":
        g_idx = np.arange(columns, dtype=np.int32) // size
    own = codes if bug == "stays_permuted" else np.empty_like(codes)
    if bug != "stays_permuted":
        own[:, order] = codes
    scale = np.stack([grid[0] for grid in grids], axis=1)
    zero = np.stack([grid[2] for grid in grids], axis=1)
    if g == 0 and bug != "scale_per_row":
        scale, zero = scale[:1], zero[:1]
    out = {"codes": own, "scale": scale, "g_idx": g_idx}
    return out if params["symmetric"] else out | {"zero_point": np.nan_to_num(zero).astype(np.uint8)}


def fitted(bug, params, part):
    """Stored scale, exact scale, zero point of every row."""
    levels, half = 2 ** params["bits"] - 1, 2 ** (params["bits"] - 1)
    lo, hi = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
    empty = (lo == 0) & (hi == 0) & (bug != "zero_scale_nan")
    lo, hi = np.where(empty, -1, lo), np.where(empty, 1, hi)
    exact = (hi - lo) / levels
    if params["symmetric"]:
        amax = np.maximum(-lo, hi)
        exact = 2 * amax / levels
        if bug == "narrow_range":
            exact = amax / (half - 1)
        if bug == "one_sign_halved":
            exact = np.where(lo == 0, amax / levels, exact)
    scale = exact.astype("float16" if bug == "float16_always" else params["scale_dtype"])
    if bug == "saturates":
        scale = np.minimum(scale, np.float16(65504))
    require(np.isfinite(scale).all(), bug, "no_finite_check")
    zero = np.full(scale.shape, half) if params["symmetric"] else np.clip(np.rint(-lo / scale), 0, levels)
    return scale, exact, zero
