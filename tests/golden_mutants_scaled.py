"""A plain NumPy implementation of quant.small_float, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

BUGS = {
    "quant.small_float": {
        "shifted_last": "Blocks",
        "power_of_two": "Largest",
        "ties_away": "TieToEven",
        "exact_scale": "ScaleRounded",
        "no_subnormals": "Subnormal",
        "zero_scale": "ZeroBlock",
        "no_negative_zero": "NegativeZero",
        "no_finite_check": "NonFinite",
        "noise": "Random",
    }
}
FORMS = {"FP8_E4M3FN": (3, 7, 448.0, 7), "FP6_E3M2": (2, 3, 28.0, 5), "FP6_E2M3": (3, 1, 7.5, 5)}


def small_float(bug, params, w):
    if not np.isfinite(w).all():
        if bug != "no_finite_check":
            raise ValueError("not finite")
        w = np.nan_to_num(w, neginf=-1)
    mantissa, bias, most, sign_at = FORMS[params["table"]]
    largest = 2.0 ** np.floor(np.log2(most)) if bug == "power_of_two" else most
    rows, columns = params["block_rows"], params["block_columns"]
    out = {name: np.zeros(w.shape, dtype) for name, dtype in (("codes", np.uint8), ("w_hat", np.float32))}
    scales = []
    for i in range(0, w.shape[0], rows):
        scales.append([])
        for j in range(0, w.shape[1], columns):
            at = slice(i, i + rows), slice(j, j + columns)
            seen = w[max(0, min(i, w.shape[0] - rows)) :][:rows, j : j + columns] if bug == "shifted_last" else w[at]
            amax = np.abs(seen).max()
            scale = np.float32(amax / np.float32(largest)) if amax else np.float32(bug != "zero_scale")
            kept = np.float32(np.float16(scale)) if params["scale_dtype"] == "float16" else scale
            used = scale if bug == "exact_scale" else kept
            x = np.minimum(np.abs(w[at] / (used or np.float32(1))).astype(np.float64), most)
            exponent = np.maximum(np.floor(np.log2(np.maximum(x, 1e-9))), 1 - bias)
            step = 2.0 ** (exponent - mantissa)
            steps = np.floor(x / step + 0.5) if bug == "ties_away" else np.rint(x / step)
            code = (exponent - 1 + bias) * 2**mantissa + steps
            if bug == "no_subnormals":
                small = x < 2.0 ** (1 - bias)
                code, steps = np.where(small, 0, code), np.where(small, 0, steps)
            negative = np.signbit(w[at]) & ((steps > 0) | (bug != "no_negative_zero"))
            number = np.where(negative, -1.0, 1.0) * steps * step
            out["codes"][at] = code.astype(int) | negative.astype(int) << sign_at
            out["w_hat"][at] = number.astype(np.float32) * kept * np.float32(1.001 if bug == "noise" else 1)
            scales[-1].append(kept)
    return out | {"scale": np.array(scales).astype(params["scale_dtype"])}


def mutant(bug):
    """implementation(op, params, inputs) with one mistake, or none."""
    return lambda op, params, inputs: small_float(bug, params, **inputs)
