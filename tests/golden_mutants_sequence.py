"""Plain NumPy implementations of the stores that give tokens up, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

from itertools import pairwise

import numpy as np

BUGS = {
    "kvcache.streaming": {
        "window_only": "Sinks",
        "absolute_positions": "Distance",
        "one_too_many": "Self",
        "prompt_cut_first": "Prompt",
        "last_of_the_call": "Call",
        "own_token_kept": "Zero",
    },
    "kvcache.h2o": {
        "last_call_only": "Sum",
        "recent_is_heavy": "Recent",
        "tiled_heads": "Group",
        "gone_is_seen": "Gone",
    },
    "kvcache.snapkv": {
        "all_vote": "Voters",
        "capacity_beside_voters": "Window",
        "softmax_of_the_old": "Softmax",
        "not_pooled": "Pool",
        "mean_of_those_there": "Edge",
        "tiled_heads": "Group",
        "last_of_equals": "Ties",
    },
    "kvcache.razor": {
        "counts_once": "Count",
        "before_the_scale": "AfterScale",
        "all_compressed": "Full",
        "dropped_without_a_trace": "Exact",
        "drops_one": "Two",
        "window_moves": "Step",
        "layer_by_layer": "Global",
        "induction_only": "Union",
    },
    "kvcache.freekv": {
        "mean_of_the_digest": "Bound",
        "present_query": "Before",
        "never_corrects": "Correct",
        "all_heads_correct": "PerHead",
        "mean_before_softmax": "Group",
        "always_a_page_more": "Recent",
        "fetches_all_again": "Changed",
    },
    "kvcache.pqcache": {
        "worst": "Top",
        "whole_budget": "Half",
        "budget_grows": "Half",
        "largest_of_the_group": "Sum",
        "sinks_chosen": "Sinks",
        "prompt_only": "Later",
        "last_of_equals": "Ties",
        "always_codes": "Short",
    },
}


def mutant(bug):
    """An implementation `f(op, params, inputs)` of all these ops with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            return _OPS[op](bug, params, **{name: x.astype(np.float64) for name, x in inputs.items()})

    return implementation


def weights(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def best(bug, scores, count):
    """Places, rising; 12 digits, so that equal sums are equal."""
    scores = np.round(scores, 12)
    order = np.argsort(-scores, kind="stable")
    if bug == "last_of_equals":
        order = len(scores) - 1 - np.argsort(-scores[::-1], kind="stable")
    return np.sort(order[:count])


def ends_of(chunks):
    return np.cumsum([0, *chunks])


def streaming(bug, params, k):
    sinks, recent, ends = params["sinks"], params["recent"], ends_of(params["chunks"])
    sinks = 0 if bug == "window_only" else sinks
    length, before = ends[-1], ends[-2]
    every = np.arange(length)
    if before or bug == "prompt_cut_first":
        first = before - max(recent - 1, 0) - (bug == "one_too_many")
        first = length - recent if bug == "last_of_the_call" or not before else first
        every = every[(every < sinks) | (every >= first)]
    at = every if bug == "absolute_positions" else length - len(every) + np.arange(len(every))
    kept = max(recent, 1) if bug == "own_token_kept" else recent
    left = np.array([j for j in range(length) if j < sinks or j >= length - kept], np.int64)
    return {"seen": every, "distance": length - 1 - at, "kept": left}


def h2o(bug, params, q, k):
    heavy, recent, ends = params["heavy"], params["recent"], ends_of(params["chunks"])
    kept, found = [], []
    for head in range(len(k)):
        score = np.zeros(k.shape[1])
        alive = np.zeros(k.shape[1], bool)
        mine = [h for h in range(len(q)) if (h % len(k) if bug == "tiled_heads" else h * len(k) // len(q)) == head]
        for start, end in pairwise(ends):
            alive[start:end] = True
            if bug == "last_call_only":
                score[:] = 0
            for t in range(start, end):
                seen = np.flatnonzero(alive & (np.arange(len(alive)) <= t))
                seen = np.arange(t + 1) if bug == "gone_is_seen" else seen
                for h in mine:
                    score[seen] += weights(q[h, t] @ k[head, seen].T / 2)
            there = np.flatnonzero(alive)
            others = there[: max(len(there) - (0 if bug == "recent_is_heavy" else recent), 0)]
            stay = others[best(bug, score[others], heavy + (recent if bug == "recent_is_heavy" else 0))]
            alive[others] = False
            alive[stay] = True
        kept.append(np.flatnonzero(alive))
        found.append(score[kept[-1]])
    return {"kept": np.array(kept), "scores": np.array(found)}


def snapkv(bug, params, q, k):
    n, capacity, kernel = k.shape[1], params["capacity"], params["kernel"]
    w = min(params["voters"], capacity)
    old, kept = n - w, []
    for head in range(len(k)):
        mine = [h for h in range(len(q)) if (h % len(k) if bug == "tiled_heads" else h * len(k) // len(q)) == head]
        votes = np.zeros(old)
        for h in mine:
            for t in range(0 if bug == "all_vote" else old, n):
                stop = old if bug == "softmax_of_the_old" else t + 1
                found = weights(q[h, t] @ k[head, :stop].T / 2)[:old]
                votes[: len(found)] += found
        half = kernel // 2
        near = votes.copy()
        for j in range(old):
            around = [votes[i] for i in range(j - half, j + half + 1) if 0 <= i < old]
            size = len(around) if bug == "mean_of_those_there" else kernel
            near[j] = sum(around) / size if params["pool"] == "mean" else max(around)
        near = votes if bug == "not_pooled" else near
        count = capacity if bug == "capacity_beside_voters" else capacity - w
        kept.append([*best(bug, near, count), *range(old, n)])
    return {"kept": np.array(kept)}


def razor(bug, params, **arrays):
    if "induction" in arrays:
        chosen = set()
        pairs = [("induction", params["shares"][0]), ("echo", params["shares"][1])]
        for name, share in pairs[: 1 if bug == "induction_only" else 2]:
            scores = arrays[name]
            if bug == "layer_by_layer":
                for layer, row in enumerate(scores):
                    chosen |= {(layer, int(i)) for i in np.argsort(-row, kind="stable")[: round(row.size * share)]}
                continue
            order = np.argsort(-scores.ravel(), kind="stable")[: round(scores.size * share)]
            chosen |= {tuple(int(i) for i in np.unravel_index(p, scores.shape)) for p in order}
        return {"heads": np.array(sorted(chosen))}
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    sinks, recent, last = params["sinks"], params["recent"], k.shape[1] - 1
    stop = last - recent + (bug == "window_moves")
    gone = np.arange(sinks, stop)
    gone = gone if len(gone) >= (1 if bug == "drops_one" else 2) else gone[:0]
    out = []
    for head in range(2):
        full = f"0.{head}" in params["heads"].split("/") and bug != "all_compressed"
        there = [j for j in range(last + 1) if full or j not in gone]
        scores, rows = [q[head, 0] @ k[head, j] / 2 for j in there], [v[head, j] for j in there]
        if len(gone) and not full and bug != "dropped_without_a_trace":
            count = np.log(len(gone)) * {"counts_once": 0, "before_the_scale": 0.5}.get(bug, 1)
            scores.append(q[head, 0] @ k[head, gone].mean(axis=0) / 2 + count)
            rows.append(v[head, gone].mean(axis=0))
        out.append(weights(np.array(scores)) @ np.array(rows))
    dropped = len(gone) - (bug == "window_moves" and len(gone) > 0)
    return {"o": np.array(out, np.float32), "dropped": np.array(dropped)}


def freekv(bug, params, q, k):
    page, sinks, recent, budget = (params[n] for n in ("page", "sinks", "recent", "budget"))
    ends, heads = ends_of(params["chunks"]), len(k)
    group, recalled = len(q) // heads, 0
    old = [set() for _ in range(heads)]
    for end in ends[2:]:
        full, rest = divmod(end - sinks, page)
        near = max(recent // page - (2 * rest > page and bug != "always_a_page_more"), rest == 0)
        count = full - near
        of = lambda h: q[h * group : (h + 1) * group]
        pages = [k[h, sinks : sinks + count * page].reshape(count, page, -1) for h in range(heads)]
        low, high = ([getattr(p, name)(axis=1) for p in pages] for name in ("min", "max"))

        def ranked(h, t, low=low, high=high, of=of):
            x = of(h)[:, t, None, :]
            bound = np.maximum(x * low[h], x * high[h]).sum(axis=-1)
            if bug == "mean_of_the_digest":
                bound = (x * (low[h] + high[h]) / 2).sum(axis=-1)
            if bug == "mean_before_softmax":
                return best(bug, weights(bound.mean(axis=0)), budget // page)
            return best(bug, weights(bound).mean(axis=0), budget // page)

        cosine = []
        for h in range(heads):
            a, b = of(h)[:, end - 1], of(h)[:, end - 2]
            size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            cosine.append(np.nan_to_num((a * b).sum(axis=-1) / size).mean())
        turned = np.array(cosine) < params["tau"]
        turned = {"never_corrects": turned & False, "all_heads_correct": turned | turned.any()}.get(bug, turned)
        seen = []
        for h in range(heads):
            chosen = ranked(h, end - 1 if turned[h] or bug == "present_query" else end - 2)
            new = set(chosen.tolist())
            recalled += len(new - (set() if bug == "fetches_all_again" else old[h])) * page * 16
            old[h] = new
            middle = [sinks + j * page + i for j in chosen for i in range(page)]
            seen.append([*range(sinks), *middle, *range(sinks + count * page, end)])
    return {"seen": np.array(seen), "recalled": np.array(recalled), "corrected": turned.astype(np.uint8)}


def pqcache(bug, params, q, k):
    sinks, steps, (heads, length) = params["sinks"], params["steps"], k.shape[:2]
    group, recalled = len(q) // heads, 0
    prompt = length - steps
    old = [set() for _ in range(heads)]
    for end in range(prompt + 1, length + 1):
        body = (end if bug == "budget_grows" else prompt) - sinks
        near = int(params["ratio"] * body) // (1 if bug == "whole_budget" else 2)
        start = end - max(near, 1)
        stop = min(start, prompt) if bug == "prompt_only" else start
        first = 0 if bug == "sinks_chosen" else sinks
        seen = []
        for h in range(heads):
            at = list(range(end))
            if (prompt - sinks > 1 << params["bits"] or bug == "always_codes") and start - sinks > near:
                found = weights(q[h * group : (h + 1) * group, end - 1] @ k[h, first:stop].T / np.sqrt(2))
                scores = found.max(axis=0) if bug == "largest_of_the_group" else found.sum(axis=0)
                chosen = first + best(bug, -scores if bug == "worst" else scores, near)
                recalled += len(set(chosen.tolist()) - old[h]) * 16
                old[h] = set(chosen.tolist())
                at = [*range(sinks), *chosen, *range(start, end)]
            seen.append(at)
    return {"seen": np.array(seen), "recalled": np.array(recalled)}


_OPS = {
    "kvcache.streaming": streaming,
    "kvcache.h2o": h2o,
    "kvcache.snapkv": snapkv,
    "kvcache.razor": razor,
    "kvcache.freekv": freekv,
    "kvcache.pqcache": pqcache,
}
