"""Plain NumPy implementations of the ops of codebook methods, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

from refllm.formats.checkpoints.dynamic_map import dynamic_map
from refllm.formats.dtypes import FP4_BNB, NF4

BUGS = {
    "quant.blockwise": {
        "blocks_per_row": "FlatBlocks",
        "mirrored_table": "Table",
        "e2m1": "Table",
        "ties_upper": "Midpoint",
        "divides": "Reciprocal",
        "tail_in_the_block_before": "ShortBlock",
        "no_floor": "ZeroBlock",
        "no_offset": "DoubleQuant",
        "half_the_map": "DoubleQuant",
        "no_finite_check": "NonFinite",
        "no_params_check": "BadParams",
        "flattens": "BadShape",
        "last_pair_swapped": "Random",
    },
    "quant.squeezellm": {
        "plain": "Weighted",
        "one_table": "PerRow",
        "sensitive_in_rows": "Sensitive",
        "signed_outliers": "Outliers",
        "zeros_pull": "ZeroWeight",
        "whole_values": "Residual",
        "no_gradient_zeros": "NoGradient",
        "unrounded_codes": "RoundedFirst",
        "spare_values_zero": "FewNumbers",
        "no_finite_check": "NonFinite",
        "no_params_check": "BadParams",
        "broadcast_fisher": "BadShape",
        "last_pair_swapped": "Random",
    },
}


def mutant(bug):
    """An implementation `f(op, params, inputs)` of all these ops with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            return _OPS[op](bug, op, params, **inputs)

    return implementation


def require(condition, bug, check):
    if not condition and bug != check:
        raise ValueError(check)


# --- nf4, fp4 --------------------------------------------------------------------------------------------------------


def blockwise(bug, op, params, w):
    if bug == "flattens":
        w = np.atleast_2d(w)
    require(w.ndim == 2, bug, "flattens")
    require(np.isfinite(w).all(), bug, "no_finite_check")
    block = params["block_size"]
    require(block in (32, 64, 128), bug, "no_params_check")
    block, w = max(block, 1), np.nan_to_num(w, posinf=1, neginf=-1)
    values = (NF4 if params["table"] == "nf4" else FP4_BNB).values
    if bug == "mirrored_table":
        values = np.where(values == 0, 0, -values[::-1]) if params["table"] == "nf4" else values
    if bug == "e2m1" and params["table"] == "fp4":
        values = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]) / np.float32(6)
    pieces = [w.ravel()] if bug != "blocks_per_row" else list(w)
    codes, absmax, scale_of = [], [], []
    for piece in pieces:
        starts = list(range(0, piece.size, block))
        if bug == "tail_in_the_block_before" and piece.size % block and len(starts) > 1:
            starts.pop()
        for first, end in zip(starts, [*starts[1:], piece.size], strict=True):
            part = piece[first:end]
            largest = np.abs(part).max()
            floor = largest if bug == "no_floor" else np.maximum(largest, np.float32(1e-38))
            multiplied = part.size >= block and bug != "divides"
            x = np.clip(part * (np.float32(1) / floor) if multiplied else part / floor, -1, 1)
            codes.append(nearest(bug, x, values))
            scale_of.append(np.full(part.size, len(absmax)))
            absmax.append(largest if part.size >= block else floor)
    codes = np.concatenate(codes).reshape(w.shape)
    if bug == "last_pair_swapped" and w.size > 100:
        codes[-1, -2:] = codes[-1, -2:][::-1].copy()
    out, scale = scales(bug, params, np.float32(absmax))
    w_hat = values[codes] * scale[np.concatenate(scale_of)].reshape(w.shape)
    return out | {"codes": codes, "w_hat": w_hat.astype(np.float32)}


def nearest(bug, x, values):
    ordered, first = np.unique(values, return_index=True)
    middles = (ordered[1:] + ordered[:-1]) / np.float32(2)
    place = np.searchsorted(middles, x, side="right" if bug == "ties_upper" else "left")
    return first[np.minimum(place, len(ordered) - 1)].astype(np.uint8)


def scales(bug, params, absmax):
    if not params["double_quant"]:
        return {"absmax": absmax}, absmax
    offset = np.float32(0 if bug == "no_offset" else absmax.astype(np.float64).mean())
    centred = absmax - offset
    table = np.abs(dynamic_map()) if bug == "half_the_map" else dynamic_map()
    table = np.sort(table)
    nested = np.abs(centred).max()
    middles = (table[1:] + table[:-1]) / np.float32(2)
    codes = np.searchsorted(middles, centred * (np.float32(1) / np.maximum(nested, np.float32(1e-38))))
    out = {"absmax": codes.astype(np.uint8), "nested_absmax": np.float32([nested]), "offset": np.float32([offset])}
    return out, table[codes] * nested + offset


# --- squeezellm ------------------------------------------------------------------------------------------------------


def squeezellm(bug, op, params, w, fisher):
    require(np.isfinite(w).all() and np.isfinite(fisher).all(), bug, "no_finite_check")
    require(fisher.shape == w.shape, bug, "broadcast_fisher")
    fine = all(0 <= params[name] < 1 for name in ("sensitive", "outliers"))
    require(fine, bug, "no_params_check")
    w, fisher = np.nan_to_num(w), np.nan_to_num(np.broadcast_to(fisher, w.shape), posinf=1)
    apart = np.zeros(w.size, bool)
    count = int(params["sensitive"] * w.size)
    if bug == "sensitive_in_rows":
        each = np.argsort(-fisher, axis=1, kind="stable")[:, : count // len(w)]
        np.put_along_axis(apart.reshape(w.shape), each, True, axis=1)
    else:
        apart[np.argsort(-fisher.ravel(), kind="stable")[:count]] = True
    size = w.ravel() if bug == "signed_outliers" else np.abs(w.ravel())
    largest = np.argsort(-np.where(apart, -np.inf, size), kind="stable")[: int(min(params["outliers"], 0.5) * w.size)]
    apart[largest[size[largest] > 0]] = True
    apart = apart.reshape(w.shape)
    rest = np.where(apart, 0, w)
    h = np.where(apart & (bug != "zeros_pull"), 0, fisher).astype(np.float64)
    if bug == "plain":
        h = np.where(apart, 0.0, 1.0)
    if bug != "no_gradient_zeros":
        h[~h.any(axis=1)] = 1
    tables = np.array([best_table(bug, *row, 1 << params["bits"]) for row in zip(rest, h, strict=True)])
    if bug == "one_table":
        tables[:] = best_table(bug, rest.ravel(), h.ravel(), 1 << params["bits"])
    half = tables.astype(np.float16)
    used = tables if bug == "unrounded_codes" else half.astype(np.float64)
    codes = (rest[..., None] > ((used[:, 1:] + used[:, :-1]) / 2)[:, None]).sum(axis=-1).astype(np.uint8)
    if bug == "last_pair_swapped" and w.shape[1] > 9:
        codes[-1] = codes[-1][::-1].copy()
    w_hat = np.take_along_axis(half.astype(np.float32), codes.astype(int), axis=1)
    values = ((w if bug == "whole_values" else w - w_hat.astype(np.float64))[apart]).astype(np.float16)
    w_hat[apart] += values.astype(np.float32)
    out = {"mask": apart.astype(np.uint8), "tables": half, "codes": codes, "w_hat": w_hat}
    return out | ({"values": values} if values.size else {})


def best_table(bug, row, h, count):
    from refllm.kernels.kmeans import exact_1d

    if not h.any():
        return np.zeros(count)
    keep = h > 0
    table = exact_1d(row[None, keep], h[None, keep], count)[0]
    if bug == "spare_values_zero":
        table = np.sort(np.append(np.unique(table), np.zeros(count))[:count])
    return table


_OPS = {"quant.blockwise": blockwise, "quant.squeezellm": squeezellm}
