"""Plain NumPy implementations of the ops about attention on codes and sparse attention, with one mistake at a time.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

F = np.float32
E4M3 = np.array([s * (1 + m / 8) * 2.0 ** (e - 7) if e else s * m / 8 * 2.0**-6
                 for s in (1, -1) for e in range(16) for m in range(8)])  # fmt: skip
BUGS = {
    "attention.fp8": {
        "one_scale": "BlockScale",
        "per_query_head": "HeadScale",
        "no_offset": "Offset",
        "sums_rounded": "RowSum",
        "ties_down": "TieToEven",
        "zero_scale": "ZeroBlock",
        "any_params": "BadParams",
        "nan_ignored": "NonFinite",
        "noise": "Random",
    },
    "attention.sage": {
        "ties_even": "HalfAway",
        "along_channels": "SmoothK",
        "one_mean": "PerHead",
        "lse_short": "LseBack",
        "no_term": "SmoothQ",
        "neighbours": "PerThread",
        "blocks_of_128": "PerBlock",
        "one_value_scale": "Channel",
        "zero_scale": "ZeroGroup",
        "any_params": "BadParams",
        "nan_ignored": "NonFinite",
    },
    "attention.minference": {
        "not_forced": "Forced",
        "nearest_30": "Nearest",
        "mirrored": "Distance",
        "first_queries": "LastQueries",
        "heads_modulo": "GqaShare",
        "future_blocks": "Causal",
        "window_one_wide": "SinkAndWindow",
        "any_params": "BadParams",
    },
    "attention.adaspa": {
        "logarithm": "Mass",
        "global": "PerRow",
        "all_heads": "HalfOfHeads",
        "rounds_down": "Rounding",
        "text_rows_only": "Text",
        "future_counts": "Causal",
        "any_params": "BadParams",
    },
    "attention.rainfusion": {
        "own_frame_only": "FrameZero",
        "same_frame_places": "AllFrames",
        "band_rounds_down": "Bandwidth",
        "windows_of_4": "Windows",
        "text_dropped": "Text",
        "first_frame_dropped": "FirstFrame",
        "count_rounds_down": "Count",
        "any_params": "BadParams",
    },
}


def mutant(bug):
    """An implementation with one mistake."""
    return lambda op, params, inputs: _OPS[op](bug, params, **inputs)


def require(condition, bug, mistake):
    if not condition and bug != mistake:
        raise ValueError("rejected")


def to_codes(x, bug=None):
    """The nearest of all codes; of two equally near ones the even one."""
    x = np.clip(x, -448, 448)
    gap = np.abs(x[..., None] - np.where(np.arange(256) % 128 == 127, np.inf, E4M3))
    near = gap == gap.min(axis=-1, keepdims=True)
    rank = np.arange(256) if bug == "ties_down" else np.arange(256) % 2 * 512 + np.arange(256)
    return np.where(near, rank, 9999).argmin(axis=-1).astype(np.uint8)


def softmax_parts(scores, seen, block, weigh):
    """For all rows at once, tile by tile: [(weights of a tile for o, slice)], sum, largest."""
    m, l, parts = np.full(scores.shape[:-1], -np.inf), np.zeros(scores.shape[:-1]), []
    for start in range(0, scores.shape[-1], block):
        tile = slice(start, start + block)
        s = np.where(seen[..., tile], scores[..., tile], -np.inf)
        new = np.maximum(m, s.max(axis=-1))
        fade = np.exp(m - new)
        p = np.exp(s - new[..., None])
        hat = weigh(p)
        parts = [(w * fade[..., None], at) for w, at in parts] + [(hat, tile)]
        l = fade * l + p.sum(axis=-1)
        m = new
    return parts, l, m


def fp8(bug, params, q, k, v, q_positions, k_positions):
    require(params["granularity"] in ("block", "head"), bug, "any_params")
    require(np.isfinite(k).all(), bug, "nan_ignored")
    k, group = np.nan_to_num(k), len(q) // len(k)
    head = params["granularity"] != "block"

    def rounded(x, rows):
        x, out = x.astype(np.float64), []
        for one in x:
            step = len(one) if head or bug == "one_scale" else rows
            s = [np.abs(one[i : i + step]).max() for i in range(0, len(one), step) for _ in one[i : i + step]]
            out.append(s)
        s = np.array(out)
        if head and len(x) == len(q) and bug != "per_query_head":
            s = np.repeat(s.reshape(-1, group, s.shape[1]).max(axis=(1, 2)), group)[:, None] * np.ones_like(s)
        s = (s / 448).astype(F)
        codes = to_codes(np.divide(x, s[..., None], out=np.zeros_like(x), where=s[..., None] > 0), bug)
        return codes, s if bug == "zero_scale" else np.where(s > 0, s, F(1))

    (qc, qs), (kc, ks), (vc, vs) = (
        rounded(q, params["block_q"]),
        rounded(k, params["block_k"]),
        rounded(v, params["block_k"]),
    )
    Q, K, V = (E4M3[c] * s[..., None].astype(np.float64) for c, s in ((qc, qs), (kc, ks), (vc, vs)))
    K, V = np.repeat(K, group, axis=0), np.repeat(V, group, axis=0)
    offset = 1 if bug == "no_offset" else 256
    seen = k_positions[None, :] <= q_positions[:, None]
    weigh = lambda p: E4M3[to_codes(offset * p)] / offset
    parts, l, m = softmax_parts(params["scale"] * Q @ K.swapaxes(1, 2), seen[None], params["block_k"], weigh)
    if bug == "sums_rounded":
        l = sum(w.sum(axis=-1) for w, _ in parts)
    o = sum(w @ V[:, at] for w, at in parts) / l[..., None]
    if bug == "noise" and q.size > 2:
        o, qc = o + 0.01, qc ^ 1
    return {"q_codes": qc, "q_scale": qs, "k_codes": kc, "k_scale": ks, "v_codes": vc, "v_scale": vs,
            "o": o.astype(F), "lse": (m + np.log(l)).astype(F)}  # fmt: skip


def sage(bug, params, q, k, v, q_positions, k_positions):
    require(2 <= params["bits"] <= 8, bug, "any_params")
    require(np.isfinite(k).all(), bug, "nan_ignored")
    q, k, v = q.astype(np.float64), np.nan_to_num(k).astype(np.float64), v.astype(np.float64)
    group, most = len(q) // len(k), 2 ** (params["bits"] - 1) - 1
    axis = {"along_channels": -1, "one_mean": (0, 1)}.get(bug, -2)
    mean = k.mean(axis=axis, keepdims=True) * np.ones_like(k) if params["smooth_k"] else np.zeros_like(k)
    q_mean = q.mean(axis=-2, keepdims=True) * params["smooth_q"]

    def rounded(x, side):
        i = np.arange(x.shape[1])
        if params["granularity"] == "block":
            of = i // (128 if side == "q" or bug == "blocks_of_128" else 64)
        elif bug == "neighbours":
            of = i // 4 if side == "q" else i // 16
        else:
            of = i // 32 * 8 + i % 8 if side == "q" else i // 64 * 4 + i // 2 % 4
        s = np.array([[np.abs(one[of == g]).max() for g in of] for one in x]) / most
        s = (s + (1e-7 if params["granularity"] == "thread" else 0)).astype(F)
        steps = np.divide(x, s[..., None], out=np.zeros_like(x), where=s[..., None] > 0)
        codes = np.rint(steps) if bug == "ties_even" else np.sign(steps) * np.floor(np.abs(steps) + 0.5)
        return np.clip(codes, -most, most), s if bug == "zero_scale" else np.where(s > 0, s, F(1))

    (qc, qs), (kc, ks) = rounded(q - q_mean, "q"), rounded(k - mean, "k")
    wide = lambda x: np.repeat(x, group, axis=0)
    K = wide(kc * ks[..., None].astype(np.float64))
    products = (qc * qs[..., None].astype(np.float64)) @ K.swapaxes(1, 2)
    if bug != "no_term":
        products = products + q_mean @ wide(k - mean).swapaxes(1, 2)
    vs = (np.abs(v).max(axis=None if bug == "one_value_scale" else 1, keepdims=True) / 448).astype(F)
    V = wide(E4M3[to_codes(v / np.where(vs > 0, vs, 1))] * vs.astype(np.float64))
    weigh = lambda p: E4M3[to_codes(448 * p)] / 448
    seen = np.ones(products.shape, bool)
    parts, l, m = softmax_parts(params["scale"] * products, seen, 64, weigh)
    lse = m + np.log(l)
    if bug != "lse_short":
        lse = lse + params["scale"] * np.einsum("htd,hd->ht", q, wide(mean[:, 0]))
    o = sum(w @ V[:, at] for w, at in parts) / l[..., None]
    return {"q_codes": qc.astype(np.int8), "q_scale": qs, "k_codes": kc.astype(np.int8), "k_scale": ks,
            "o": o.astype(F), "lse": lse.astype(F)}  # fmt: skip


def weights(params, q, k, seen, bug=None):
    """Softmax over the seen keys, (H, T, S)."""
    heads = np.arange(len(q)) % len(k) if bug == "heads_modulo" else np.arange(len(q)) // (len(q) // len(k))
    scores = np.where(seen, params["scale"] * np.einsum("htd,hsd->hts", q, k[heads], dtype=np.float64), -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def summed(x, block, axis):
    return np.add.reduceat(x, np.arange(0, x.shape[axis], block), axis=axis)


def any_block(mask, block):
    return summed(summed(mask.astype(int), block, -1), block, -2) > 0


def means(x, block):
    return summed(x.astype(np.float64), block, 1) / summed(np.ones(x.shape), block, 1)


def ranks(scores):
    """0 for the highest of a row."""
    return np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1)


def minference(bug, params, q, k, q_positions, k_positions):
    p, block = params, params["block"]
    require(p["pattern"] in ("a_shape", "vertical_slash", "block"), bug, "any_params")
    require(min(p["vertical"], p["slash"], p["last"], p["top"], block) >= 1, bug, "any_params")
    distance = q_positions[:, None] - k_positions[None, :]
    seen = distance >= 0
    if p["pattern"] == "a_shape":
        near = distance < p["local"] + (bug == "window_one_wide")
        blocks = np.stack([any_block(seen & (near | (k_positions < p["sink"])), block)] * len(q))
    elif p["pattern"] == "block":
        allowed = any_block(seen, block) | (bug == "future_blocks")
        scores = weights(p, means(q, block), means(k, block), allowed, bug)
        blocks = (ranks(np.where(allowed, scores, -1)) < p["top"]) & allowed
    else:
        A = weights(p, q, k, seen, bug)
        last = slice(0, p["last"]) if bug == "first_queries" else slice(len(q_positions) - p["last"], None)
        sums = A[:, last].sum(axis=1)
        if bug != "not_forced":
            sums[:, :30] = np.inf
        columns = ranks(sums) < p["vertical"]
        width = int(q_positions.max() - k_positions.min() + 1)
        along = np.zeros((len(q), width))
        for d in range(width):
            along[:, d] = (A[:, last] * (distance[last] == d)).sum(axis=(1, 2))
        along[:, : 30 if bug == "nearest_30" else 100] = np.inf
        offsets = ranks(along) < p["slash"]
        at = (width - 1 - distance if bug == "mirrored" else distance).clip(0, width - 1)
        blocks = np.stack([any_block(o[at] & seen, block) for o in offsets])
        return {"columns": columns.astype(np.uint8), "offsets": offsets.astype(np.uint8), "blocks": blocks.astype("u1")}
    return {"blocks": blocks.astype(np.uint8)}


def adaspa(bug, params, q, k, q_positions, k_positions):
    s, block, text = params["sparsity"], params["block"], params["text"]
    require(0 <= s < 1 and text <= k.shape[1], bug, "any_params")
    seen = q_positions[:, None] >= k_positions[None, :]
    A = weights(params, q, k, seen)
    W = summed(summed(-np.log(A + 1e-9) if bug == "logarithm" else A, block, -1), block, -2)
    allowed = any_block(seen, block)
    n = np.full(len(allowed), allowed.shape[1]) if bug == "future_counts" else allowed.sum(axis=1)

    def kept(s):
        counts = np.maximum(np.floor((1 - s)[:, None] * n + (0 if bug == "rounds_down" else 0.5) + 1e-9), 1)
        ranked = np.where(allowed, W, -1)
        if bug == "global":
            flat = ranks(ranked.reshape(len(q), -1)).reshape(W.shape)
            return (flat < counts.sum(axis=1)[:, None, None]) & allowed
        return (ranks(ranked) < counts[..., None]) & allowed

    each = np.full(len(q), float(s))
    if params["adaptive"] and 3 * s >= 1:
        share = (kept(each) * W).sum(axis=(1, 2)) / W.sum(axis=(1, 2))
        m = int((share > 0.8).sum())
        m = m if bug == "all_heads" else min(m, len(q) // 2)
        order = np.argsort(-share)
        each[order[:m]] = (1 + s) / 2
        each[order[len(q) - m :]] = (3 * s - 1) / 2
    tail = lambda n: np.minimum(np.arange(0, n, block) + block, n) > n - text
    whole = tail(q.shape[1])[:, None] | (tail(k.shape[1])[None, :] & (bug != "text_rows_only"))
    return {"mass": W, "sparsity": each, "blocks": (kept(each) | whole & allowed).astype(np.uint8)}


def rainfusion(bug, params, q, k, q_positions, k_positions):
    p, n, block = params, k.shape[1], params["block"]
    grid = p["frames"], p["height"], p["width"]
    require(np.prod(grid) <= n, bug, "any_params")
    if np.prod(grid) > n:
        grid = (n, 1, 1)
    t, y, x = (a.reshape(-1) for a in np.indices(grid))
    half = 0.0 if bug == "band_rounds_down" else 0.5
    near = lambda a, size: np.abs(a[:, None] - a[None, :]) <= int(p["bandwidth"] * (size - 1) + half)
    masks = np.ones((2, n, n), bool)
    masks[0, : len(t), : len(t)] = near(y, grid[1]) & near(x, grid[2])
    if bug == "same_frame_places":
        masks[0, : len(t), : len(t)] &= t[:, None] == t[None, :]
    masks[1, : len(t), : len(t)] = near(t, grid[0]) | ((t == 0)[None, :] & (bug != "own_frame_only"))
    A = weights(p, q, k, np.ones((n, n), bool))
    rows = np.arange(0, len(t), grid[0])
    recalls = np.stack([(A * mask)[:, rows].sum(axis=-1).mean(axis=-1) for mask in masks])
    size = 4 if bug == "windows_of_4" else 8
    order = np.concatenate([np.lexsort((x, y, x // size, y // size, t)), np.arange(len(t), n)])
    scores = weights(p, means(q[:, order], block), means(k[:, order], block), np.array(True))
    count = scores.shape[-1] * (1 - p["sparsity"])
    blocks = ranks(scores) < (np.floor(count) if bug == "count_rounds_down" else np.ceil(count - 1e-9))
    start = np.arange(0, n, block)
    whole = (start < grid[1] * grid[2]) & (bug != "first_frame_dropped")
    whole |= (np.minimum(start + block, n) > len(t)) & (bug != "text_dropped")
    blocks = blocks | whole[:, None] | whole[None, :]
    return {"recalls": recalls, "order": order, "blocks": blocks.astype(np.uint8)}


_OPS = {
    "attention.fp8": fp8,
    "attention.sage": sage,
    "attention.minference": minference,
    "attention.adaspa": adaspa,
    "attention.rainfusion": rainfusion,
}
