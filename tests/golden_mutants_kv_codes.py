"""Plain NumPy implementations of the caches that code every token by itself, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

from itertools import combinations, pairwise, product

import numpy as np

BUGS = {
    "kvcache.qserve": {
        "whole_zero": "Zero",
        "exact_scale": "Stored",
        "one_grid_a_token": "Head",
        "divide_by_2_to_bits": "Divisor",
        "high_code_first": "Packed",
        "scale_one_where_constant": "Constant",
        "zero_saturates": "Narrow",
        "ties_away": "Ties",
    },
    "kvcache.llmqat": {
        "a_step_a_head": "Heads",
        "one_step_for_all": "Tokens",
        "divide_by_half_range": "Divisor",
        "twos_complement": "Offset",
        "no_limit": "Gradient",
        "limit_included": "Limit",
        "clipped_at_the_limit": "Limit",
        "zero_step_is_one_code": "ZeroToken",
        "ties_away": "Ties",
    },
    "kvcache.kvtuner": {
        "all_pairs": "Front",
        "equals_stay": "Equal",
        "each_layer_alone": "Group",
        "mean_over_groups": "Weighted",
        "below_the_limit": "Limit",
        "always_greedy": "Exhaustive",
        "least_loss": "Greedy",
        "most_bits_of_equals": "Ties",
    },
    "kvcache.turboquant": {
        "turned_twice": "Rotation",
        "no_root_of_d": "Scale",
        "even_steps": "Table",
        "exact_norm": "Norm",
        "signs_of_x": "Signs",
        "root_of_d_for_signs": "Constant",
        "high_code_first": "Packed",
    },
    "kvcache.kvquant": {
        "channel_after_channel": "Channels",
        "own_limits_for_keys": "Offline",
        "a_limit_is_beyond": "Strict",
        "a_percentile_is_within": "Inclusive",
        "outliers_in_the_range": "Range",
        "offset_forgotten": "Offset",
        "x_is_stored": "Offset",
        "entry_under_an_outlier": "Zero",
        "outliers_by_channel": "Order",
        "high_code_first": "Packed",
        "exact_offset": "Stored",
        "one_table": "Norm",
        "decoding_row_decides": "Norm",
        "no_cap": "Cap",
        "cap_by_size": "Cap",
        "equal_numbers_apart": "Constant",
        "upper_entry_halfway": "Ties",
        "ends_are_outliers": "NoOutliers",
    },
    "kvcache.kvquant.learn": {
        "all_at_each_end": "Percentile",
        "nearest_number": "Percentile",
        "values_by_channel": "Sides",
        "keys_by_token": "Sides",
        "no_weights": "Fisher",
        "outliers_at_the_ends": "Inliers",
        "nearest_float16": "Outwards",
        "first_tokens_count": "Sinks",
        "ratio_upside_down": "Norm",
        "mean_forgotten": "Norm",
    },
    "kvcache.rotatekv": {
        "each_head_alone": "Heads",
        "by_magnitude": "Order",
        "equal_ones_backwards": "Equal",
        "order_again": "Inverse",
        "no_clip": "Clip",
        "clip_towards_zero": "Middle",
        "divide_by_bits_squared": "Divisor",
        "low_to_nearest": "Low",
        "scale_one_where_constant": "Constant",
        "values_together": "Values",
        "high_code_first": "Packed",
    },
    "kvcache.cq": {
        "strided": "Coupled",
        "largest_product": "Nearest",
        "last_of_equals": "Ties",
        "one_book": "Parts",
        "a_byte_a_code": "Packed",
        "first_part_of_query": "Table",
        "last_weight": "Mass",
        "each_channel_weighs_itself": "Sensitivity",
        "zero_mean": "Unweighed",
        "order_of_weight": "Order",
        "truncated": "Stored",
    },
}


def mutant(bug):
    """An implementation `f(op, params, inputs)` of all these ops with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            return _OPS[op](bug, **params, **{name: x.astype(np.float64) for name, x in inputs.items()})

    return implementation


def rounded(bug, x):
    return np.sign(x) * np.floor(np.abs(x) + 0.5) if bug == "ties_away" else np.rint(x)


def packed(bug, codes, bits):
    if bug == "high_code_first" and codes.shape[-1] % 2 == 0:
        codes = codes.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)
    stream = ((codes.astype(np.int64)[..., None] >> np.arange(bits)) & 1).astype(np.uint8)
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def qserve(bug, x, bits):
    axes = (0, 2) if bug == "one_grid_a_token" else 2
    low, high = (np.broadcast_to(f(x, axis=axes, keepdims=True), (*x.shape[:2], 1)) for f in (np.min, np.max))
    levels = 2**bits - 1
    exact = (high - low) / (levels + (bug == "divide_by_2_to_bits"))
    scale = exact.astype(np.float16)
    used = exact if bug == "exact_scale" else scale.astype(np.float64)
    zero = (-low / used).astype(np.float16)
    if bug == "zero_saturates":
        zero = np.clip(zero, -65504, 65504)
    if bug == "whole_zero":
        zero = np.rint(zero)
    one = (scale == 0) | ~np.isfinite(zero)
    filled = np.float16(1) if bug == "scale_one_where_constant" else ((low + high) / 2).astype(np.float16)
    scale, zero = np.where(one, filled, scale), np.where(one, np.float16(-1), zero)
    codes = rounded(bug, np.clip(x / np.where(one, 1, used) + zero, 0, levels))
    codes = np.where(one, 0, codes)
    back = ((codes - zero.astype(np.float64)) * scale).astype(np.float32)
    return {"codes": packed(bug, codes, bits), "scale": scale, "zero": zero, "x_hat": back}


def llmqat(bug, x, bits):
    most = 2 ** (bits - 1) - 1
    axes = {"a_step_a_head": 2, "one_step_for_all": None}.get(bug, (0, 2))
    source = np.clip(x, -2, 2) if bug == "clipped_at_the_limit" else x
    step = np.abs(source).max(axis=axes, keepdims=True) / (most + (bug == "divide_by_half_range"))
    step = np.broadcast_to(step.astype(np.float32), (*x.shape[:2], 1))
    codes = rounded(bug, source / np.where(step > 0, step, 1).astype(np.float64))
    codes = np.clip(codes, -most, most)
    if bug == "zero_step_is_one_code":
        codes = np.where(step == 0, -most, codes)
    back = (codes * step).astype(np.float32)
    stored = codes % 2**bits if bug == "twos_complement" else codes + most
    inside = np.abs(x) <= 2 if bug == "limit_included" else np.abs(x) < 2
    inside = np.ones(x.shape) if bug == "no_limit" else inside
    return {
        "codes": packed(bug, stored, bits),
        "step": step[0, :, 0],
        "x_hat": back,
        "gradient": inside.astype(np.float32),
    }


def kvtuner(bug, errors, loss, bits, trials):
    pairs = np.array([(k, v) for k in (2, 4, 8) for v in (2, 4, 8)])
    total, fronts = pairs.sum(axis=1), []
    for row in errors:
        kept = []
        for i in sorted(range(9), key=lambda i: (total[i], row[i], i)):
            least = min([row[j] for j in kept], default=np.inf)
            better = row[i] <= least if bug == "equals_stay" else row[i] < least
            if better or bug == "all_pairs":
                kept.append(i)
        fronts.append(tuple(kept[::-1]))
    names = list(range(len(fronts))) if bug == "each_layer_alone" else fronts
    groups = list(dict.fromkeys(names))
    front = {name: fronts[names.index(name)] for name in groups}

    def rank(way):
        at = np.array([way[groups.index(name)] for name in names])
        used = total[list(way)].mean() / 2 if bug == "mean_over_groups" else total[at].mean() / 2
        tie = -used if bug == "most_bits_of_equals" else used
        return loss[np.arange(len(at)), at].sum(), used, tie, pairs[at].tolist()

    fits = lambda way: rank(way)[1] < bits if bug == "below_the_limit" else rank(way)[1] <= bits
    ways = list(product(*(front[name] for name in groups)))
    if len(ways) <= trials and bug != "always_greedy":
        best = min(filter(fits, ways), key=lambda way: (rank(way)[0], *rank(way)[2:]))
    else:
        best = tuple(front[name][0] for name in groups)
        while not fits(best):
            steps = []
            for g, name in enumerate(groups):
                place = front[name].index(best[g]) + 1
                if place < len(front[name]):
                    way = (*best[:g], front[name][place], *best[g + 1 :])
                    saved = 1 if bug == "least_loss" else rank(best)[1] - rank(way)[1]
                    steps.append(((rank(way)[0] - rank(best)[0]) / saved, *rank(way)[2:], way))
            best = min(steps)[-1]
    kept = np.array([[i in layer for i in range(9)] for layer in fronts], np.uint8)
    return {"front": kept, "pairs": np.array(rank(best)[3])}


NORMAL = {2: [0.4528, 1.5104], 3: [0.2451, 0.7560, 1.3439, 2.1519]}


def turboquant(bug, x, rotation, s, bits):
    table = np.array(NORMAL[bits])
    if bug == "even_steps":
        table = (np.arange(len(table)) + 0.5) * table[-1] / (len(table) - 0.5)
    table = np.concatenate([-table[::-1], table])
    D = x.shape[1]
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    root = 1 if bug == "no_root_of_d" else np.sqrt(D)
    unit = x / norm
    codes = np.abs((root * unit @ rotation.T)[..., None] - table).argmin(axis=-1)
    back = table[codes] @ (rotation.T if bug == "turned_twice" else rotation) / root
    rest = unit - back
    signs = ((unit if bug == "signs_of_x" else rest) @ s.T >= 0).astype(np.int64)
    size = np.linalg.norm(rest, axis=1, keepdims=True)
    factor = 1 / np.sqrt(D) if bug == "root_of_d_for_signs" else np.sqrt(np.pi / 2) / D
    stored = norm if bug == "exact_norm" else norm.astype(np.float16)
    more = size * factor * (2 * signs - 1) @ s
    return {
        "codes": packed(bug, codes, bits),
        "norm": stored[:, 0],
        "signs": packed(None, signs, 1)[:, 0],
        "residual": size[:, 0],
        "x_hat": stored * back,
        "k_hat": stored * (back + more),
    }


def kvquant(bug, x, k_range, k_table, v_table, bits, outliers, cap):
    order = (1, 2, 0) if bug == "channel_after_channel" else (1, 0, 2)
    x = x.transpose(order).reshape(x.shape[1], -1)
    q = np.array([outliers / 2, 1 - outliers / 2])
    low, high = np.quantile(x, q, axis=0) if bug == "own_limits_for_keys" else k_range
    offset, spread = (low + high) / 2, (high - low) / 2
    sides = (x >= high, x <= low) if bug == "a_limit_is_beyond" else (x > high, x < low)
    far = np.abs(x - offset) / (1 if bug == "cap_by_size" else spread)
    if cap and bug != "no_cap":
        sides = [s & (np.argsort(np.argsort(np.where(s, -far, 1), axis=1), axis=1) < cap) for s in sides]
    apart = (sides[0] | sides[1]) & (outliers > 0)
    found = _kvquant_side("k_", bug, x, apart, offset, spread, k_table, bits)

    low, high = np.quantile(x, q, axis=1, keepdims=True)
    apart = (x < low) | (x > high) if bug == "a_percentile_is_within" else (x <= low) | (x >= high)
    median = np.sort(x, axis=1)[:, [(x.shape[1] - 1) // 2]]
    if bug != "equal_numbers_apart":
        apart &= x != median
    apart &= (outliers > 0) | (bug == "ends_are_outliers")
    rest = x if bug == "outliers_in_the_range" else np.where(apart, median, x)
    low, high = rest.min(axis=1, keepdims=True), rest.max(axis=1, keepdims=True)
    stored = [a.astype(np.float16) for a in ((low + high) / 2, (high - low) / 2)]
    used = ((low + high) / 2, (high - low) / 2) if bug == "exact_offset" else [a.astype(np.float64) for a in stored]
    found |= _kvquant_side("v_", bug, x, apart, *used, v_table, bits)
    return found | {"v_offset": stored[0][:, 0], "v_spread": stored[1][:, 0]}


def _kvquant_side(side, bug, x, apart, offset, spread, table, bits):
    u = np.where(spread > 0, (x - offset) / np.where(spread > 0, spread, 1), -9)
    first = table[-1] if bug == "decoding_row_decides" else table[0]
    distance = np.abs(u[..., None] - first)
    codes = distance.argmin(axis=-1)
    if bug == "upper_entry_halfway":
        codes = len(first) - 1 - distance[..., ::-1].argmin(axis=-1)
    codes = np.where(apart | (spread == 0), 0, codes)
    back = table[0 if bug == "one_table" else -1][codes] * spread
    rest = (x - (0 if bug == "x_is_stored" else offset)).astype(np.float16)
    back = np.where(apart, rest + (back if bug == "entry_under_an_outlier" else 0), back)
    hat = back + np.where(apart & (bug == "offset_forgotten"), 0, offset)
    turned = (lambda a: a.T) if bug == "outliers_by_channel" else (lambda a: a)
    found = {"counts": apart.sum(axis=1).astype(np.uint8), "hat": hat.astype(np.float32)}
    places = np.broadcast_to(np.arange(x.shape[1], dtype=np.uint8), x.shape)
    found |= {"codes": packed(bug, codes, bits), "rest": turned(rest)[turned(apart)]}
    return {side + name: a for name, a in (found | {"places": turned(places)[turned(apart)]}).items()}


def kvquant_learn(bug, k, v, k_squares, v_squares, bits, outliers, sinks, norm):
    skipped = 0 if bug == "first_tokens_count" else sinks
    rows = lambda a: a[:, :, skipped:].swapaxes(1, 2).reshape(-1, a.shape[1] * a.shape[3])
    k, v, fk, fv = map(rows, (k, v, k_squares, v_squares))
    tail = outliers if bug == "all_at_each_end" else outliers / 2
    method = "nearest" if bug == "nearest_number" else "linear"
    limits = lambda x, axis: np.quantile(x, [tail, 1 - tail], axis=axis, keepdims=True, method=method)
    low, high = limits(k, 0)
    k_range = np.stack([low[0], high[0]]).astype(np.float16)
    if bug != "nearest_float16":
        k_range[0] = np.where(k_range[0] > low[0], np.nextafter(k_range[0], np.float16(-np.inf)), k_range[0])
        k_range[1] = np.where(k_range[1] < high[0], np.nextafter(k_range[1], np.float16(np.inf)), k_range[1])
    k_limits = limits(k, 1) if bug == "keys_by_token" else k_range.astype(np.float64)
    v_limits = limits(v, 0 if bug == "values_by_channel" else 1)
    tables = {}
    for name, x, squares, (low, high) in (("k_table", k, fk, k_limits), ("v_table", v, fv, v_limits)):
        u = (x - (low + high) / 2) / ((high - low) / 2)
        kept = np.abs(u) <= 1
        if bug == "outliers_at_the_ends":
            u, kept = np.clip(u, -1, 1), np.ones(u.shape, bool)
        weights = np.ones(kept.sum()) if bug == "no_weights" else squares[kept]
        tables[name] = _kvquant_table(bug, u[kept], weights, 1 << bits, norm).astype(np.float32)
    return tables | {"k_range": k_range}


def _kvquant_table(bug, u, weights, clusters, norm):
    order = np.argsort(u)
    x, w = u[order], weights[order]

    def means(cuts):
        return [np.average(x[i:j], weights=w[i:j]) for i, j in pairwise((0, *cuts, len(x)))]

    cost = lambda table: (w * ((x[:, None] - np.array(table)) ** 2).min(axis=1)).sum()
    table = np.array(min(map(means, combinations(range(1, len(x)), clusters - 1)), key=cost))
    if not norm:
        return table[None]
    coded = table[np.abs(u[:, None] - table).argmin(axis=1)]
    ratio = coded.std() / u.std() if bug == "ratio_upside_down" else u.std() / coded.std()
    middle = 0 if bug == "mean_forgotten" else coded.mean()
    return np.stack([table, (table - middle) * ratio + u.mean()])


def spread(x, size):
    """Every `size` neighbours times a Hadamard matrix over the root of its size."""
    at = np.arange(size)
    H = 1 - 2.0 * (np.bitwise_count(at[:, None] & at) % 2)
    return (x.reshape(*x.shape[:-1], -1, size) @ H / np.sqrt(size)).reshape(x.shape).astype(x.dtype)


def rotatekv(bug, x, side, bits, text=None, group_size=None, heads=1):
    Hk, tokens, D = x.shape
    if bug == "each_head_alone":
        heads = 1
    rows = lambda k: spread(k.swapaxes(0, 1).reshape(k.shape[1], -1), heads * D)
    if side == "k":
        sums = rows(text).sum(axis=0)
        sums = np.abs(sums) if bug == "by_magnitude" else sums
        order = np.argsort(sums, kind="stable")
        if bug == "equal_ones_backwards":
            order = len(sums) - 1 - np.argsort(sums[::-1], kind="stable")
        groups = rows(x)[:, order].reshape(tokens, -1, group_size)
    elif bug == "values_together":
        groups = spread(x.swapaxes(0, 1).reshape(tokens, -1), Hk * D).reshape(tokens, Hk, D).swapaxes(0, 1)[:, :, None]
    else:
        groups = spread(x, D)[:, :, None]
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    if bits == 2 and bug == "clip_towards_zero":
        low, high = 0.8 * low, 0.8 * high
    elif bits == 2 and bug != "no_clip":
        low, high = 0.9 * low + 0.1 * high, 0.1 * low + 0.9 * high
    groups = np.clip(groups, low, high)
    stored = low.astype(np.float16)
    if bug != "low_to_nearest":
        stored = np.where(stored > low, np.nextafter(stored, np.float16(-np.inf)), stored)
    levels = (bits**2 if bug == "divide_by_bits_squared" else 2**bits) - 1
    scale = ((high - stored) / levels).astype(np.float16)
    codes = np.rint((groups - stored) / np.where(scale > 0, scale, 1).astype(np.float64))
    codes = np.clip(codes, 0, 2**bits - 1)
    if bug == "scale_one_where_constant":
        scale = np.where(scale > 0, scale, np.float16(1))
    back = (stored + codes * scale.astype(np.float64)).astype(np.float32)
    outputs = {"scale": scale[..., 0], "low": stored[..., 0]}
    if side == "v":
        return outputs | {"codes": packed(bug, codes[:, :, 0], bits), "x_hat": spread(back[:, :, 0], D)}
    inverse = order if bug == "order_again" else np.argsort(order)
    back = spread(back.reshape(tokens, -1)[:, inverse], heads * D).reshape(tokens, Hk, D).swapaxes(0, 1)
    flat = codes.reshape(tokens, -1)
    return outputs | {"codes": packed(bug, flat, bits), "x_hat": back, "order": order.astype(np.uint16)}


def cq(bug, x, channels, bits, books=None, q=None, weights=None, sensitivity=None):
    m = x.shape[1] // channels
    cut = lambda a: a.reshape(*a.shape[:-1], m, channels)
    if bug == "strided":
        cut = lambda a: a.reshape(*a.shape[:-1], channels, m).swapaxes(-1, -2)
    found = {}
    if books is None:
        books = np.stack([cq_book(bug, cut(x)[:, p], cut(sensitivity)[:, p], 2**bits) for p in range(m)])
        found["books"] = books.astype(np.float16)
        books = books.astype(np.float64)
    used = books[[0] * m] if bug == "one_book" else books
    apart = ((cut(x)[..., None, :] - used) ** 2).sum(axis=-1)
    if bug == "largest_product":
        apart = -(cut(x)[..., None, :] * used).sum(axis=-1)
    codes = 2**bits - 1 - apart[..., ::-1].argmin(axis=-1) if bug == "last_of_equals" else apart.argmin(axis=-1)
    vectors = used[np.arange(m), codes]
    back = (vectors.swapaxes(-1, -2) if bug == "strided" else vectors).reshape(x.shape)
    packs = codes.astype(np.uint8) if bug == "a_byte_a_code" else packed(None, codes, bits)
    found |= {"codes": packs, "x_hat": back.astype(np.float32)}
    if q is not None:
        pieces = cut(q)[:, [0] * m] if bug == "first_part_of_query" else cut(q)
        found["scores"] = np.einsum("gpc,tpc->gt", pieces, vectors)
    if weights is not None:
        mass = np.zeros((len(weights), m, 2**bits))
        for t, p in product(range(len(x)), range(m)):
            mass[:, p, codes[t, p]] = weights[:, t] + (0 if bug == "last_weight" else mass[:, p, codes[t, p]])
        found["mixed"] = np.einsum("gpn,pnc->gpc", mass, used).reshape(len(weights), -1)
    return found


def cq_book(bug, x, sensitivity, n):
    """Clusters that lie far apart: Lloyd's algorithm from the points that lie farthest from each other."""
    weight = np.repeat(sensitivity.sum(axis=1, keepdims=True), x.shape[1], axis=1)
    if bug == "each_channel_weighs_itself":
        weight = sensitivity
    if not weight.any() and bug != "zero_mean":
        weight = np.ones(x.shape)
    centres = x[:1]
    while len(centres) < n:
        far = ((x[:, None] - centres) ** 2).sum(axis=-1).min(axis=1)
        centres = np.concatenate([centres, x[[far.argmax()]]])
    codes = ((x[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
    mine = codes == np.arange(n)[:, None]
    means = (mine @ (weight * x)) / np.maximum(mine @ weight, 1e-30)
    uses = mine @ weight.sum(axis=1) if bug == "order_of_weight" else mine.sum(axis=1)
    means = means[np.argsort(-uses, kind="stable")]
    stored = means.astype(np.float16)
    return (
        np.where(np.abs(stored) > np.abs(means), np.nextafter(stored, np.float16(0)), stored)
        if bug == "truncated"
        else stored
    )


_OPS = {
    "kvcache.qserve": qserve,
    "kvcache.llmqat": llmqat,
    "kvcache.kvtuner": kvtuner,
    "kvcache.turboquant": turboquant,
    "kvcache.kvquant": kvquant,
    "kvcache.kvquant.learn": kvquant_learn,
    "kvcache.rotatekv": rotatekv,
    "kvcache.cq": cq,
}
