"""A plain NumPy implementation of blockwise.lkd, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

BUGS = {
    "blockwise.lkd": {
        "symmetric_divisor": "Divisor",
        "saturated_stay": "WholeSlope",
        "scale_is_learned": "WholeSlope",
        "scale_of_the_teacher": "ScaleFollows",
        "own_target": "Teacher",
        "rounded_target": "Teacher",
        "exact_inputs": "RoundedInputs",
        "slope_of_exact_inputs": "RoundedInputs",
        "one_scale_for_tokens": "TokenScale",
        "mean_over_tokens": "Mean",
        "divides_by_zero_token": "Zeros",
        "divides_by_zero_group": "Zeros",
        "nan_to_zero": "NonFinite",
        "noise": "Random",
    }
}


def lkd(bug, params, w, v, x):
    if bug != "nan_to_zero" and not np.isfinite(v).all():
        raise ValueError("not finite")
    v = np.nan_to_num(v)
    half, g = 2 ** (params["bits"] - 1), v.shape[1] if params["group_size"] == -1 else params["group_size"]
    groups = v.reshape(len(v), -1, g)
    fitted = w.reshape(groups.shape) if bug == "scale_of_the_teacher" else groups
    amax = np.abs(fitted).max(axis=-1)
    if bug != "divides_by_zero_group":
        amax = np.where(amax, amax, 1)
    step = (amax / (half - (bug == "symmetric_divisor"))).astype(np.float16).astype(np.float64)[..., None]
    with np.errstate(invalid="ignore"):
        ratio = groups / step
    free = (np.rint(ratio) >= -half) & (np.rint(ratio) < half)
    q = np.clip(np.nan_to_num(np.rint(ratio), nan=half - 1), -half, half - 1)
    v_hat = (q * step).reshape(v.shape)

    most = 2 ** (params["activation_bits"] - 1) - 1
    size = np.abs(x).max(axis=None if bug == "one_scale_for_tokens" else 1, keepdims=True) / most
    size = size if bug == "divides_by_zero_token" else np.where(size, size, 1)
    with np.errstate(invalid="ignore"):
        x_hat = x if bug == "exact_inputs" else np.rint(x / size) * size
    target = (x_hat if bug == "rounded_target" else x) @ (v if bug == "own_target" else w).T
    r = (x_hat @ v_hat.T - target) * (1 + 1e-4 * (bug == "noise" and len(w) > 1))
    count = len(x) if bug == "mean_over_tokens" else r.size
    of_v = 2 / count * r.T @ (x if bug == "slope_of_exact_inputs" else x_hat)
    if bug == "scale_is_learned":
        largest = np.arange(g) == np.abs(groups).argmax(axis=-1)[..., None]
        through = (of_v.reshape(groups.shape) * (q - ratio)).sum(axis=-1, keepdims=True)
        of_v = of_v + (through * largest * np.sign(groups) / half).reshape(v.shape)
    if bug == "saturated_stay":
        of_v = of_v * free.reshape(v.shape)
    codes = (q + half).astype(np.uint8).reshape(v.shape)
    return {"codes": codes, "loss": np.array((r**2).sum() / count), "of_v": of_v}


def mutant(bug):
    """implementation(op, params, inputs) with one mistake, or none."""
    return lambda op, params, inputs: lkd(bug, params, **inputs)
