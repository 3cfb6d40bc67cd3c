"""Plain NumPy implementations of the ops about heads, latents and layers, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

BUGS = {
    "transform.gqa": {
        "strided": "Neighbours",
        "sum": "Mean",
        "rows_apart": "Rows",
        "last": "First",
        "pairs_of_neighbours": "Pairs",
        "queries_kept": "Queries",
        "any_count": "Counts",
    },
    "transform.mfa": {
        "frequencies_of_the_width": "Repeated",
        "not_conjugated": "Conjugate",
        "real": "Complex",
        "pairs_of_neighbours": "Halves",
        "gate_before": "Gate",
        "transposed": "Transposed",
        "rotated": "Unrotated",
        "any_width": "Width",
    },
    "transform.palu": {
        "plain_svd": "Whitened",
        "inverse_transposed": "Side",
        "uniform": "Proportion",
        "beyond_full": "Full",
        "largest_first": "Leftover",
        "no_block": "Block",
        "tiled": "QueryHeads",
        "bias_lost": "Bias",
    },
    "kvcache.minicache": {
        "raw": "Sphere",
        "one_length": "OwnLength",
        "shallower": "Deeper",
        "closest": "Distant",
        "strict": "Inclusive",
        "later": "Tie",
        "floor": "RoundedUp",
        "over_heads": "PerHead",
        "always_sines": "Straight",
        "no_fallback": "Opposite",
        "nan": "Zero",
        "any_params": "Range",
    },
    "kvcache.cla": {"last_owns": "Owner", "whole_groups": "Tail", "all_store": "Bytes", "any_share": "Share"},
    "model.mla": {
        "values_first": "KeyRowsFirst",
        "all_keys_first": "HeadRows",
        "no_position": "BothParts",
        "own_key": "SharedKey",
        "top_left": "Causal",
        "root_scale": "Scale",
    },
    "model.moe.route": {
        "bias_in_weight": "BiasSteers",
        "best_one": "TwoBest",
        "best_two": "OneBest",
        "open": "Closed",
        "not_normalised": "Normalised",
        "not_scaled": "Scaling",
        "last": "Ties",
    },
}


def mutant(bug):
    """An implementation with one mistake."""
    return lambda op, params, inputs: _OPS[op](bug, params, **inputs)


def gqa(bug, params, k, v, q=None):
    D, after = params["head_dim"], params["kv_heads"]
    before, d = len(k) // D, k.shape[1]
    if before % after:
        if bug != "any_count":
            raise ValueError("kv_heads does not divide")
        k, v, before = k[: after * D], v[: after * D], after
    group = before // after

    def groups(x):
        heads = x.astype(np.float64).reshape(before, D, d)
        if bug == "rows_apart":
            heads = x.astype(np.float64).reshape(D, before, d).swapaxes(0, 1)
        order = (
            np.arange(before).reshape(group, after).T if bug == "strided" else np.arange(before).reshape(after, group)
        )
        return heads[order]

    k, v = groups(k), groups(v)
    if params["init"] == "aligned":
        half = D // 2
        take = (
            (slice(0, None, 2), slice(1, None, 2)) if bug == "pairs_of_neighbours" else (slice(half), slice(half, None))
        )
        z = lambda x: x[..., take[0], :] + 1j * x[..., take[1], :]
        factor = np.exp(1j * np.angle(np.sum(np.conj(z(k)) * z(k[:, :1]), axis=-1)))[..., None]

        def turned(x, factor):
            y, out = z(x) * factor, np.empty_like(x)
            out[..., take[0], :], out[..., take[1], :] = y.real, y.imag
            return out

        k = turned(k, factor)
        q = q.astype(np.float64).reshape(after, group, -1, D, d)
        q = q if bug == "queries_kept" else turned(q, factor[:, :, None])
    pool = lambda x: x[:, -1 if bug == "last" else 0] if params["init"] == "first" else x.mean(axis=1)
    pool = (lambda x: x.sum(axis=1)) if bug == "sum" and params["init"] == "mean" else pool
    outputs = {"k": pool(k).reshape(-1, d), "v": pool(v).reshape(-1, d)}
    outputs |= {} if q is None else {"q": q.reshape(-1, d)}
    return {name: x.astype(np.float32) for name, x in outputs.items()}


def mfa(bug, params, x, q=None, k=None, n=None, alpha=None):
    x = x.astype(np.float64)
    if n is not None:
        n = n.T if bug == "transposed" else n
        if bug == "rotated":
            angle = np.arange(3, 3 + len(x))[:, None] * 1e4 ** (-np.arange(2) / 2)
            a, b = x[:, :2], x[:, 2:]
            x = np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=1)
        return {"v": x + ((alpha * x) @ n.T if bug == "gate_before" else alpha * (x @ n.T))}
    D, width, theta = params["head_dim"], params["width"], params["theta"]
    heads, kv_heads, half = len(q) // D, len(k) // D, D // 2
    if width % D or width > kv_heads * D:
        if bug != "any_width":
            raise ValueError("width")
        width = D
    kept = width // D
    take = (slice(0, None, 2), slice(1, None, 2)) if bug == "pairs_of_neighbours" else (slice(half), slice(half, None))
    complex_rows = lambda w, count: (lambda y: y[:, take[0]] + 1j * y[:, take[1]])(
        w.astype(np.float64).reshape(count, D, -1)
    )
    z, zq = complex_rows(k, kv_heads).swapaxes(0, 1), complex_rows(q, heads)
    U = np.linalg.svd(z.real if bug == "real" else z, full_matrices=True)[0][..., :kept]
    keys = np.einsum("jhm,jhx->mjx", np.conj(U), z)
    mix = U if bug == "not_conjugated" else np.conj(U)
    queries = np.einsum("jhm,hsjx->hsmjx", mix, zq.reshape(kv_heads, heads // kv_heads, half, -1)).reshape(
        heads, kept, half, -1
    )
    frequency = np.tile(theta ** (-2 * np.arange(half) / D), (kept, 1))
    if bug == "frequencies_of_the_width":
        frequency = (theta ** (-2 * np.arange(kept * half) / width)).reshape(kept, half)
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequency)
    a = np.einsum("hmjx,tx->htmj", queries, x) * turn
    b = np.einsum("mjx,tx->tmj", keys, x) * turn
    return {"scores": np.einsum("htmj,smj->hts", np.conj(a), b).real}


def palu(bug, params, **inputs):
    if "w" in inputs:
        w = inputs["w"].astype(np.float64)
        S = np.eye(w.shape[1]) if bug == "plain_svd" else np.linalg.cholesky(inputs["gram"])
        U, s, Vt = np.linalg.svd(w @ S)
        r = params["rank"]
        inverse = np.linalg.inv(S).T if bug == "inverse_transposed" else np.linalg.inv(S)
        return {"w_hat": (U[:, :r] * s[:r]) @ Vt[:r] @ inverse}
    if "scores" in inputs:
        scores, full, groups, block = inputs["scores"], params["full"], params["groups"], params["block"]
        scores = np.ones_like(scores) if bug == "uniform" else scores
        target = int(params["ratio"] * full * len(scores))
        share = target * scores / scores.sum()
        ranks = np.floor(share).astype(int)
        ranks = ranks if bug == "beyond_full" else np.minimum(ranks, full)
        order = np.argsort(ranks - share if bug == "largest_first" else share - ranks, kind="stable")
        left = target - ranks.sum()
        while left > 0:
            for i in order:
                if left > 0 and (ranks[i] < full or bug == "beyond_full"):
                    ranks[i], left = ranks[i] + 1, left - 1
        each = ranks // groups
        if bug != "no_block":
            each = np.maximum(1, np.rint(each / block).astype(int)) * block
        return {"ranks": each if bug == "beyond_full" else np.minimum(each, full // groups)}
    o, factor, bias, D = inputs["o"], inputs["l"], inputs["bias"], params["head_dim"]
    heads, kv_heads = o.shape[1] // D, len(factor) // D
    repeat = (
        (lambda x: np.tile(x, (heads // kv_heads, 1, 1)))
        if bug == "tiled"
        else (lambda x: np.repeat(x, heads // kv_heads, axis=0))
    )
    columns = o.reshape(len(o), heads, D)
    folded = np.einsum("ohd,hdr->ohr", columns, repeat(factor.reshape(kv_heads, D, -1))).reshape(len(o), -1)
    added = np.einsum("ohd,hdx->o", columns, repeat(bias.reshape(kv_heads, D, 1)))
    added = np.zeros_like(added) if bug == "bias_lost" else added
    return {"folded": folded.astype(np.float32), "added": added.astype(np.float32)}


def minicache(bug, params, a, b):
    t, gamma = params["t"], params["gamma"]
    if not (0 <= t <= 1 and 0 <= gamma <= 1) and bug != "any_params":
        raise ValueError("range")
    gamma = min(gamma, 1)
    x = np.stack([a, b]).astype(np.float64)
    length = np.sqrt((x * x).sum(axis=-1))
    with np.errstate(all="ignore"):
        unit = x / (length if bug == "nan" else np.where(length > 0, length, 1))[..., None]
        dot = (unit[0] * unit[1]).sum(axis=-1)
        w = np.arccos(np.clip(dot, -1, 1))
        t = 1 - t if bug == "shallower" else t
        straight = np.zeros(w.shape, bool) if bug == "always_sines" else np.sin(w) < 1e-6
        sine = np.where(straight, 1, np.sin(w))
        fa = np.where(straight, 1 - t, np.sin((1 - t) * w) / sine)[..., None]
        fb = np.where(straight, t, np.sin(t * w) / sine)[..., None]
        e = fa * unit[0] + fb * unit[1]
        norm = np.sqrt((e * e).sum(axis=-1, keepdims=True))
        fallback = (norm < 1e-6) & (bug != "no_fallback")
        e = np.where(fallback, unit[1], e / np.where(norm < 1e-6, 1, norm))
        if bug == "always_sines":
            e = np.where(np.sin(w)[..., None] < 1e-6, fa * unit[0] / np.sin(w)[..., None], e)
    d = w / np.pi
    d = -d if bug == "closest" else d
    if params["rule"] == "threshold":
        axis = None if bug == "over_heads" else -1
        high, low = d.max(axis=axis, keepdims=True), d.min(axis=axis, keepdims=True)
        edge = high - gamma * (high - low)
        keep = d > edge if bug == "strict" else d >= edge
    else:
        count = (np.floor if bug == "floor" else np.ceil)(gamma * d.shape[-1])
        order = (
            np.argsort(-d[..., ::-1], axis=-1, kind="stable")
            if bug == "later"
            else np.argsort(-d, axis=-1, kind="stable")
        )
        order = d.shape[-1] - 1 - order if bug == "later" else order
        keep = np.zeros(d.shape, bool)
        np.put_along_axis(keep, order[..., : int(count)], True, axis=-1)
    hats = length[..., None] * e
    if bug == "one_length":
        hats = np.stack([hats[1], hats[1]])
    if bug == "raw":
        hats = np.stack([(1 - t) * x[0] + t * x[1]] * 2)
    hats = np.where(keep[..., None], x, hats).astype(np.float32)
    return {"keep": keep.astype(np.uint8), "a_hat": hats[0], "b_hat": hats[1]}


def cla(bug, params, k):
    share = params["share"]
    if share < 1:
        if bug != "any_share":
            raise ValueError("share")
        share = 1
    layer = np.arange(len(k))
    owner = layer - layer % share
    if bug == "last_owns":
        owner = np.minimum(owner + share - 1, len(k) - 1)
    if bug == "whole_groups":
        owner = np.minimum(owner, (len(k) // share - 1) * share)
    stored = len(k) if bug == "all_store" else len(set(owner.tolist()))
    return {"read": k[owner], "nbytes": np.array(2 * stored * k[0].nbytes)}


def mla(bug, params, q_n, q_r, c, k_r, up):
    H, T, n = q_n.shape
    S = len(c)
    if bug == "all_keys_first":
        keys, values = up[: H * n].reshape(H, n, -1), up[H * n :].reshape(H, -1, up.shape[1])
    else:
        own = up.reshape(H, -1, up.shape[1])
        keys, values = own[:, :n], own[:, n:]
        if bug == "values_first":
            keys, values = own[:, -n:], own[:, :-n]
    scores = np.einsum("htn,hnr,sr->hts", q_n, keys, c)
    of_position = np.einsum("htp,sp->hts", q_r, k_r)
    if bug == "own_key":
        of_position[1:] = np.einsum("htp,sp->hts", q_r[1:], np.roll(k_r, 1, axis=1))
    scores = scores if bug == "no_position" else scores + of_position
    scores = scores * ((n + k_r.shape[1]) ** -0.5 if bug == "root_scale" else params["scale"])
    first = 0 if bug == "top_left" else S - T
    scores = np.where(np.arange(S) <= np.arange(first, first + T)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return {"o": np.einsum("hts,sr,hvr->htv", weights, c, values).astype(np.float32)}


def route(bug, params, logits, bias=None):
    sigmoid = params["scoring"] == "sigmoid"
    e = np.exp(logits)
    score = e / (1 + e) if sigmoid else e / e.sum(axis=-1, keepdims=True)
    ranked = score if bias is None else score + bias
    groups, size = params["groups"], logits.shape[1] // params["groups"]
    best = {"best_one": 1, "best_two": 2}.get(bug, 2 if sigmoid else 1)
    largest = lambda x, count: np.argsort(-x, axis=-1, kind="stable")[:, :count]
    if bug == "last":
        largest = lambda x, count: x.shape[1] - 1 - np.argsort(-x[:, ::-1], axis=-1, kind="stable")[:, :count]
    if bug != "open":
        worth = np.sort(ranked.reshape(-1, groups, size), axis=-1)[..., -best:].sum(axis=-1)
        inside = np.zeros(worth.shape, bool)
        np.put_along_axis(inside, largest(worth, params["active_groups"]), True, axis=1)
        ranked = np.where(np.repeat(inside, size, axis=1), ranked, -np.inf)
    chosen = largest(ranked, params["active"])
    weight = np.take_along_axis(score if bug != "bias_in_weight" or bias is None else score + bias, chosen, axis=1)
    if params["normalised"] and bug != "not_normalised":
        weight = weight / weight.sum(axis=1, keepdims=True)
    return {"chosen": chosen, "weight": weight * (1 if bug == "not_scaled" else params["scaling"])}


_OPS = {
    "transform.gqa": gqa,
    "transform.mfa": mfa,
    "transform.palu": palu,
    "kvcache.minicache": minicache,
    "kvcache.cla": cla,
    "model.mla": mla,
    "model.moe.route": route,
}
