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
    "quant.pq": {
        "vectors_along_out": "Columns",
        "unscaled": "Scale",
        "one_book": "Spans",
        "second_replaces": "Residual",
        "zero_row_nan": "ZeroRow",
        "codes_only": "Bytes",
        "no_finite_check": "NonFinite",
        "no_shape_check": "BadShape",
    },
    "quant.aqlm.search": {
        "diagonal_blocks": "OffDiagonal",
        "plain_distance": "Metric",
        "all_at_once": "InOrder",
        "other_books_ignored": "Sum",
        "no_scale": "Scale",
        "last_of_equals": "Ties",
        "last_row_kept": "Random",
    },
    "finish.vqllm": {
        "order_for_rank": "Renamed",
        "one_order": "PerBook",
        "reversed_ties": "StableOrder",
        "unused_dropped": "Unused",
        "bound_is_hit": "Levels",
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
    from refllm.kernels.kmeans_1d import exact_1d

    if not h.any():
        return np.zeros(count)
    keep = h > 0
    table = exact_1d(row[None, keep], h[None, keep], count)[0]
    if bug == "spare_values_zero":
        table = np.sort(np.append(np.unique(table), np.zeros(count))[:count])
    return table


# --- vector codes ----------------------------------------------------------------------------------------------------


def pq(bug, op, params, w):
    """Only for weights that have as few different vectors as there are centres, as those of the suite."""
    require(np.isfinite(w).all(), bug, "no_finite_check")
    w = np.nan_to_num(w)
    d, M, bits, columns = params["vector"], params["books"], params["bits"], w.shape[1]
    spans = params["spans"] or max(columns // d, 1)
    fits = columns % (d * spans) == 0 and bits * d % M == 0
    require(fits, bug, "no_shape_check")
    if not fits:
        return {"w_hat": w, "nbytes": np.array(0)}
    K, rows = 1 << bits * d // M, len(w)
    nbytes = rows * -(-columns // d * bits * d // 8)
    if bug != "codes_only":
        nbytes += 2 * spans * M * K * d + 2 * rows
    size = np.sqrt((w.astype(np.float64) ** 2).mean(axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
    unit = w / (1 if bug == "unscaled" else size if bug == "zero_row_nan" else np.where(size > 0, size, 1))
    pieces = unit.reshape(rows, spans, -1, d) if bug != "one_book" else unit.reshape(rows, 1, -1, d)
    if bug == "vectors_along_out" and rows % d == 0:
        pieces = unit.T.reshape(columns, spans, -1, d)
    found = np.empty(pieces.shape)
    for span in range(pieces.shape[1]):
        vectors = pieces[:, span].reshape(-1, d)
        used = np.repeat(size.ravel() > 0, len(vectors) // rows) if len(pieces) == rows else slice(None)
        different = np.unique(vectors[used] if size.any() else vectors, axis=0)[:K]
        nearest_one = ((vectors[:, None] - different) ** 2).sum(axis=-1).argmin(axis=1)
        best = different[nearest_one]
        if bug == "second_replaces" and M > 1:
            best = vectors - best
        found[:, span] = best.reshape(len(pieces), -1, d)
    back = found.reshape(columns, rows).T if bug == "vectors_along_out" and rows % d == 0 else found.reshape(w.shape)
    w_hat = back * (1 if bug == "unscaled" else size)
    return {"w_hat": w_hat.astype(np.float32), "nbytes": np.array(nbytes)}


def aqlm_search(bug, op, params, w, h, books, codes, scale):
    M, K, d = books.shape
    scale = np.ones_like(scale) if bug == "no_scale" else scale
    metric = h.copy()
    if bug == "diagonal_blocks":
        metric *= np.kron(np.eye(len(h) // d), np.ones((d, d)))
    if bug == "plain_distance":
        metric = np.eye(len(h))
    decode = lambda some: np.concatenate([sum(books[m][some[j, m]] for m in range(M)) for j in range(len(some))])
    found = codes.copy()
    for row in range(len(w) - (bug == "last_row_kept" and len(w) > 2)):
        start = found[row].copy()
        for j in range(codes.shape[1]):
            for m in range(M):
                losses = []
                for k in range(K):
                    tried = (start if bug == "all_at_once" else found[row]).copy()
                    tried[j, m] = k
                    if bug == "other_books_ignored":
                        off = np.zeros(len(h))
                        part = slice(j * d, (j + 1) * d)
                        off[part] = scale[row] * books[m][k] - w[row, part]
                    else:
                        off = scale[row] * decode(tried) - w[row]
                    losses.append(float(off @ metric @ off))
                best = min(losses)
                equal = [k for k, value in enumerate(losses) if value == best]
                found[row, j, m] = equal[-1 if bug == "last_of_equals" else 0]
    off = np.array([scale[r] * decode(found[r]) - w[r] for r in range(len(w))], np.float64)
    return {"codes": found, "loss": np.array(np.trace(off @ h @ off.T))}


def vqllm(bug, op, params, codes, books, registers=None):
    spans, M, K, d = books.shape
    groups = codes.shape[1]
    of = np.arange(groups) * spans // groups
    new, moved = codes.copy(), books.copy()
    for s in range(spans):
        for m in range(M):
            mine = codes[:, of == s, m] if bug != "one_order" else codes
            uses = np.bincount(mine.ravel(), minlength=K)
            order = np.argsort(-uses, kind="stable")
            if bug == "reversed_ties":
                order = K - 1 - np.argsort(-uses[::-1], kind="stable")
            rank = order if bug == "order_for_rank" else np.argsort(order)
            new[:, of == s, m] = rank[codes[:, of == s, m]]
            moved[s, m] = books[s, m][order]
            if bug == "unused_dropped":
                moved[s, m][np.sort(uses)[::-1] == 0] = 0
    each = 4 * M * d
    n1 = min(params["registers"] // each, K)
    n2 = min(n1 + params["shared"] // each, K)
    if bug == "bound_is_hit":
        n1, n2 = n1 + 1, n2 + 1
    hits = [(new < n1).mean(), ((new >= n1) & (new < n2)).mean(), (new >= n2).mean()]
    return {"codes": new, "books": moved, "hits": np.array(hits)}


_OPS = {
    "quant.blockwise": blockwise,
    "quant.squeezellm": squeezellm,
    "quant.pq": pq,
    "quant.aqlm.search": aqlm_search,
    "finish.vqllm": vqllm,
}
