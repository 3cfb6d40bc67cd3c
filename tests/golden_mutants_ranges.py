"""Plain NumPy implementations of quant.omse, quant.hqq and quant.aciq, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar

_CHECKS = {"no_finite_check": "NonFinite", "no_params_check": "BadParams", "noise": "Random"}
BUGS = {
    "quant.omse": _CHECKS
    | {
        "full_range": "Search",
        "power_of_one": "Power",
        "one_range": "PerGroup",
        "against_clipped": "Unclipped",
    },
    "quant.hqq": _CHECKS
    | {
        "rounded_zero": "FloatZero",
        "keeps_all": "Shrink",
        "best_zero": "LastZero",
        "exact_numbers": "StoredNumbers",
        "no_guard": "ConstantRow",
        "same_beta": "Growth",
    },
    "quant.aciq": _CHECKS
    | {
        "next_line": "Clip",
        "other_law": "Law",
        "no_mean": "Mean",
        "mean_first": "Spread",
        "beyond_the_row": "RowRange",
    },
}


def _checked(bug, params, w, fine):
    if not np.isfinite(w).all() and bug != "no_finite_check":
        raise ValueError("not finite")
    if not fine and bug != "no_params_check":
        raise ValueError("params")
    return np.nan_to_num(w, nan=0, posinf=1)


def omse(bug, params, w):
    bits, symmetric = params["bits"], params["symmetric"]
    w = _checked(bug, params, w, 2 <= bits <= 8)
    bits = max(bits, 2)
    g = w.shape[1] if params["group_size"] == -1 else params["group_size"]
    found = {"codes": [], "scale": [], "zero_point": [], "w_hat": []}
    for row in w:
        of_row = []
        for group in row.reshape(-1, g):
            lo, hi = min(group.min(), 0), max(group.max(), 0)
            if bug == "one_range":
                lo, hi = min(row.min(), 0), max(row.max(), 0)
            of_row.append(_search(bug, group, np.float32(lo), np.float32(hi), bits, symmetric))
        for name in found:
            found[name].append(np.concatenate([np.atleast_1d(one[name]) for one in of_row]))
    if symmetric:
        found.pop("zero_point")
    return {name: np.array(rows) for name, rows in found.items()}


def _search(bug, group, lo, hi, bits, symmetric):
    best, least = None, np.inf
    for step in range(1 if bug == "full_range" else 80):
        r = np.float32(1 - step / 100)
        low, high, most = r * lo, r * hi, 2**bits - 1
        span = max(-low, high) / np.float32(2 ** (bits - 1) - 1) if symmetric else (high - low) / np.float32(most)
        scale = np.float32(np.float16(span))
        zero = 2 ** (bits - 1) if symmetric else np.clip(np.rint(-low / scale), 0, most)
        codes = np.clip(np.rint(group / scale) + zero, 1 if symmetric else 0, most)
        w_hat = scale * (codes - zero).astype(np.float32)
        wanted = np.clip(group, w_hat.min(), w_hat.max()) if bug == "against_clipped" else group
        error = np.abs(w_hat.astype(np.float64) - wanted) ** (1 if bug == "power_of_one" else 2)
        if error.sum() < least:
            least = error.sum()
            best = {
                "codes": codes.astype(np.uint8),
                "scale": np.float16(scale),
                "zero_point": np.uint8(zero),
                "w_hat": w_hat + np.float32(1e-3 * (bug == "noise")),
            }
    return best


def hqq(bug, params, w):
    p, beta = params["p"], params["beta"]
    w = _checked(bug, params, w, 0 < p <= 1).astype(np.float64)
    most = 2 ** params["bits"] - 1
    low, span = w.min(axis=1), w.max(axis=1) - w.min(axis=1)
    with np.errstate(divide="ignore"):
        inverse = np.minimum(most / span, 2e4)
    if bug != "no_guard":
        inverse[span <= 1e-4] = 1
    zero, inverse = (-low * inverse)[:, None], inverse[:, None]
    least, best = np.inf, zero
    for _ in range(params["rounds"]):
        codes = np.clip(np.rint(w * inverse + zero), 0, most)
        error = w - (codes - zero) / inverse
        if np.abs(error).mean() < least:
            best = zero
        size = np.abs(error)
        kept = np.sign(error) * np.maximum(0, size - 1 / beta)
        if bug == "keeps_all":
            kept = error
        zero = np.mean(codes - (w - kept) * inverse, axis=1, keepdims=True)
        if bug == "rounded_zero":
            zero = np.rint(zero)
        beta *= 1 if bug == "same_beta" else params["growth"]
        if size.mean() >= least:
            break
        least = size.mean()
    if bug == "best_zero":
        zero = best
    scale, minimum = np.float16(1 / inverse), np.float16(-zero / inverse)
    if bug == "exact_numbers":
        codes = np.clip(np.rint(w * inverse + zero), 0, most)
    else:
        codes = np.clip(np.rint((w - minimum.astype(np.float64)) / scale.astype(np.float64)), 0, most)
    w_hat = scale.astype(np.float32) * codes.astype(np.float32) + minimum.astype(np.float32)
    w_hat += np.float32(1e-3 * (bug == "noise"))
    return {"codes": codes.astype(np.uint8), "scale": scale, "minimum": minimum, "w_hat": w_hat}


def aciq(bug, params, w):
    bits, correct = params["bits"], params["correct"]
    w = _checked(bug, params, w, 1 <= bits <= 8).astype(np.float64)
    most, law = 2**bits - 1, params["law"]
    if bug == "other_law":
        law = {"laplace": "normal", "normal": "laplace"}[law]

    def error(a, bits=bits + (bug == "next_line")):
        if law == "laplace":
            return 2 * math.exp(-a) + a * a / (3 * 4**bits)
        tail = (1 + a * a) * math.erfc(a / math.sqrt(2)) + a * a / (3 * 4**bits)
        return tail - a * math.sqrt(2 / math.pi) * math.exp(-a * a / 2)

    ratio = minimize_scalar(error, bounds=(0.5, 12), method="bounded", options={"xatol": 1e-9}).x
    mean = w.mean(axis=1, keepdims=True)
    size = np.abs(w - mean).mean(axis=1, keepdims=True) if law == "laplace" else w.std(axis=1, keepdims=True)
    lo, hi = mean - ratio * size, mean + ratio * size
    if bug != "beyond_the_row":
        lo, hi = np.maximum(w.min(axis=1, keepdims=True), lo), np.minimum(w.max(axis=1, keepdims=True), hi)
    scale = (hi - lo) / most
    codes = np.clip(np.rint((w - lo) / scale), 0, most)
    minimum, old = lo, scale
    if correct == "both":
        scale = w.std(axis=1, keepdims=True) / codes.std(axis=1, keepdims=True)
    if correct != "none" and bug != "no_mean":
        minimum = mean - (old if bug == "mean_first" else scale) * codes.mean(axis=1, keepdims=True)
    minimum = minimum + 1e-3 * (bug == "noise")
    return {
        "codes": codes.astype(np.uint8),
        "scale": scale.astype("f4").ravel(),
        "minimum": minimum.astype("f4").ravel(),
    }


_OPS = {"quant.omse": omse, "quant.hqq": hqq, "quant.aciq": aciq}


def mutant(bug):
    """implementation(op, params, inputs) with one mistake, or none."""
    return lambda op, params, inputs: _OPS[op](bug, params, **inputs)
