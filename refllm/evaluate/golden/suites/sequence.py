"""The suites of stores that give tokens up or leave them on the host. Ids are never reused: new cases take new numbers.

kvcache/streaming, kvcache/h2o, kvcache/snapkv, kvcache/razor, kvcache/freekv, kvcache/pqcache.
"""

from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, dyadic_recipe, first_clear
from refllm.evaluate.golden.suites.rtn_notes import note

BITS = {"class": "bits"}
NEAR = {"class": "allclose", "rtol": 1e-5, "atol": 1e-6}
MARGIN = Decimal("1e-5")
Rows = list[list[Fraction]]


def _ints(nested) -> Output:
    return Output(BITS, values("i64", nested))


def _floats(nested) -> Output:
    return Output(NEAR, values("f64", nested))


def _drawn(seed: int, heads: int, tokens: int, dim: int) -> tuple[list[Rows], dict]:
    flat = iter(dyadic(seed, 6, -4, heads * tokens * dim))
    nested = [[[next(flat) for _ in range(dim)] for _ in range(tokens)] for _ in range(heads)]
    return nested, dyadic_recipe(seed, 6, -4)


def _array(rows: list[Rows], recipe: dict | None = None):
    return values("f32", [[[float(x) for x in row] for row in head] for head in rows], recipe=recipe)


def _dot(a: list, b: list) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def _softmax(scores: list[Fraction]) -> list[Decimal]:
    with localcontext() as context:
        context.prec = 30
        exact = [Decimal(s.numerator) / Decimal(s.denominator) for s in scores]
        weights = [(s - max(exact)).exp() for s in exact]
        return [w / sum(weights) for w in weights]


def _best(scores: dict[int, Decimal], count: int) -> list[int]:
    """The tokens (or pages) with the highest scores, rising; ValueError where the decision is close and no tie."""
    order = sorted(scores, key=lambda j: (-scores[j], j))
    if 0 < count < len(order):
        gap = scores[order[count - 1]] - scores[order[count]]
        if Decimal("1e-20") < gap < MARGIN:
            raise Unclear("a close decision")
    return sorted(order[:count])


def _clear(made, start: int) -> CaseSpec:
    """The first seed whose decisions are all clear."""

    return first_clear(made, start)


def _suite(name: str, title: str, lesson: str, header: list[str], notes: dict, cases: list[CaseSpec]) -> SuiteSpec:
    head = manifest_head(__name__, f"kvcache/{name}", title, header, f"lessons/{lesson}.md")
    source = {"kind": "first_principles", "name": "the header, in fractions, exp with 30 digits"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


CALLS = "The tokens come in calls of the lengths chunks; the first call is the prompt and attends over all of itself. "
FIRST, SECOND = "21-which-tokens", "22-retrieval-heads"

# --- streaming -------------------------------------------------------------------------------------------------------


def _streaming(id: int, comment: str, flags: str, sinks: int, recent: int, chunks: list[int]) -> CaseSpec:
    length = sum(chunks)
    seen = list(range(length))
    if len(chunks) > 1:
        before = sum(chunks[:-1])
        seen = [j for j in seen if j < sinks or j >= before - max(recent - 1, 0)]
    distance = [len(seen) - 1 - i for i in range(len(seen))]
    kept = [j for j in range(length) if j < sinks or j >= length - recent]
    params = {"sinks": sinks, "recent": recent, "chunks": chunks}
    inputs = {"k": values("f32", [[[float(j)] for j in range(length)]])}
    expected = {"seen": _ints(seen), "distance": _ints(distance), "kept": _ints(kept)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def streaming_suite() -> SuiteSpec:
    """The suite kvcache/streaming."""
    header = [
        CALLS + "A later call sees the first `sinks` tokens, the recent - 1 tokens before it and its own; afterwards "
        "the sinks and the last `recent` tokens are kept.",
        "Input k f32 [1, tokens, 1], the number of each token. Outputs, i64: seen, the tokens the last call attends "
        "over; distance, from its last query to each of them as the rotation sees it, all standing side by side; kept.",
    ]
    notes = {
        "Sinks": note("BASIC", "The first tokens stay for good.", "Perplexity explodes when they leave the window."),
        "Distance": note("LAYOUT", "Positions are places in the cache.", "Sinks ever farther away."),
        "Self": note("OFF_BY_ONE", "The `recent` tokens that a query sees include its own."),
        "Prompt": note("ORDER", "The prompt attends over all of itself."),
        "Call": note("ORDER", "A call of several tokens sees recent - 1 tokens before its first."),
        "Zero": note("DEGENERATE", "recent 0: the query's own tokens are seen and not kept."),
    }
    cases = [
        _streaming(2, "a step after it", "Sinks Distance Self", 2, 3, [9, 1]),
        _streaming(4, "a call of three", "Call Distance", 2, 4, [8, 3]),
        _streaming(5, "recent 0", "Zero", 2, 0, [4, 1]),
        _streaming(6, "a prompt longer than the cache", "Prompt", 2, 3, [7]),
    ]
    return _suite("streaming", "Sinks and a window", FIRST, header, notes, cases)


# --- h2o -------------------------------------------------------------------------------------------------------------


def _h2o(id, comment, flags, heads, kv_heads, heavy, recent, chunks, seed=0) -> CaseSpec:
    length, dim = sum(chunks), 4

    def made(seed: int) -> CaseSpec:
        q, q_recipe = _drawn(seed, heads, length, dim)
        keys, k_recipe = _drawn(seed + 1, kv_heads, length, dim)
        group, kept, scores = heads // kv_heads, [], []
        for head in range(kv_heads):
            score: dict[int, Decimal] = {}
            end = 0
            for count in chunks:
                start, end = end, end + count
                score |= {j: Decimal(0) for j in range(start, end)}
                for t in range(start, end):
                    seen = [j for j in score if j <= t]
                    for h in range(head * group, (head + 1) * group):
                        weights = _softmax([_dot(q[h][t], keys[head][j]) / 2 for j in seen])
                        for j, w in zip(seen, weights, strict=True):
                            score[j] += w
                others = sorted(score)[: max(len(score) - recent, 0)]
                stay = set(_best({j: score[j] for j in others}, heavy)) | (set(score) - set(others))
                score = {j: s for j, s in score.items() if j in stay}
            kept.append(sorted(score))
            scores.append([float(score[j]) for j in sorted(score)])
        params = {"heavy": heavy, "recent": recent, "chunks": chunks}
        inputs = {"q": _array(q, q_recipe), "k": _array(keys, k_recipe)}
        expected = {"kept": _ints(kept), "scores": _floats(scores)}
        return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)

    return _clear(made, seed or 100 * id)


def h2o_suite() -> SuiteSpec:
    """The suite kvcache/h2o."""
    header = [
        CALLS + "Inputs q f32 [H, tokens, 4], k f32 [Hk, tokens, 4]; query head h reads key-value head h // (H / Hk). "
        "A query sees the tokens still kept and those of its call up to itself, softmax of q . k / 2.",
        "The score of a token is the sum of the weights it gets from all queries and all query heads of its group. "
        "After a call each key-value head keeps its last `recent` tokens and the `heavy` others with the highest "
        "scores, the earlier of equals. Outputs: kept i64 [Hk, n], rising; scores f64 [Hk, n].",
    ]
    notes = {
        "Sum": note("BASIC", "Scores add up over all calls.", "Only the last query decides."),
        "Recent": note("OFF_BY_ONE", "The last tokens stay whatever their score, and are not counted as heavy."),
        "Group": note("LAYOUT", "The query heads of a group add up, neighbours h // g."),
        "Gone": note("ORDER", "What was given up is not seen by later queries."),
    }
    cases = [
        _h2o(2, "groups of two, three steps", "Group Sum Gone Recent", 4, 2, 2, 2, [5, 1, 1, 1], seed=1),
        _h2o(4, "only heavy ones", "Recent Gone", 1, 1, 3, 0, [5, 1]),
    ]
    return _suite("h2o", "Heavy hitters", FIRST, header, notes, cases)


# --- snapkv ----------------------------------------------------------------------------------------------------------


def _snapkv(
    id, comment, flags, heads, kv_heads, length, capacity, voters, kernel, pool="mean", k=None, seed=0
) -> CaseSpec:
    def made(seed: int) -> CaseSpec:
        q, q_recipe = _drawn(seed, heads, length, 4)
        keys, k_recipe = (k, None) if k else _drawn(seed + 1, kv_heads, length, 4)
        group, kept = heads // kv_heads, []
        old = length - min(voters, capacity)
        for head in range(kv_heads):
            votes = [Decimal(0)] * old
            for h in range(head * group, (head + 1) * group):
                for t in range(old, length):
                    weights = _softmax([_dot(q[h][t], keys[head][j]) / 2 for j in range(t + 1)])
                    votes = [vote + w for vote, w in zip(votes, weights, strict=False)]
            half, near = kernel // 2, {}
            for j in range(old):
                around = [votes[i] if 0 <= i < old else Decimal(0) for i in range(j - half, j + half + 1)]
                near[j] = sum(around) / kernel if pool == "mean" else max(around)
            stay = _best(near, capacity - (length - old)) + list(range(old, length))
            kept.append(list(range(length)) if length <= capacity else stay)
        params = {"capacity": capacity, "voters": voters, "kernel": kernel, "pool": pool}
        inputs = {"q": _array(q, q_recipe), "k": _array(keys, k_recipe)}
        return CaseSpec(id, comment, tuple(flags.split()), inputs, {"kept": _ints(kept)}, params=params)

    return _clear(made, seed or 100 * id)


def snapkv_suite() -> SuiteSpec:
    """The suite kvcache/snapkv."""
    header = [
        "Inputs q f32 [H, tokens, 4], k f32 [Hk, tokens, 4], a prompt in one call; query head h reads key-value head "
        "h // (H / Hk). Up to `capacity` tokens all stay. Otherwise w = min(voters, capacity): the last w queries give "
        "each token before them votes, softmax of q . k / 2 over all tokens up to their own, added up over queries "
        "and query heads of a group.",
        "Pooled votes: mean (divided by `kernel` everywhere) or max of `kernel` neighbours, zeros beyond both ends. "
        "The last w tokens and the capacity - w others with the highest pooled votes stay, the earlier of equals. "
        "Output: kept i64 [Hk, n], rising.",
    ]
    notes = {
        "Voters": note("BASIC", "Only the last queries vote.", "Early tokens win: h2o."),
        "Window": note("OFF_BY_ONE", "The voters stay, count in the capacity, and are not voted on."),
        "Softmax": note("ORDER", "Weights are over all tokens, the voters' own among them; cut afterwards."),
        "Pool": note("BASIC", "Neighbours of a strong vote stay, too."),
        "Edge": note("OFF_BY_ONE", "The mean divides by the kernel at the ends, too."),
        "Group": note("LAYOUT", "A group votes together: one list for each key-value head."),
        "Ties": note("ROUNDING", "Of equal pooled votes the earlier token."),
    }
    spike = [[[Fraction(0)] * 4 for _ in range(9)]]
    cases = [
        _snapkv(1, "no pooling", "Voters Window Softmax", 2, 2, 10, 5, 2, 1, seed=4),
        _snapkv(2, "mean of three, groups of two", "Pool Group Voters", 4, 2, 10, 5, 2, 3),
        _snapkv(3, "maximum of three", "Pool Ties", 1, 1, 10, 5, 1, 3, "max"),
        _snapkv(4, "keys alike: pooled votes fall off at the ends only", "Edge Ties", 1, 1, 9, 3, 1, 3, k=spike),
        _snapkv(6, "more voters than capacity", "Window", 1, 1, 6, 3, 8, 1),
    ]
    return _suite("snapkv", "Votes at the end of a prompt", FIRST, header, notes, cases)


# --- razor -----------------------------------------------------------------------------------------------------------


def _razor(id, comment, flags, prompt, sinks, recent, heads="none", k=None) -> CaseSpec:
    """Two key-value heads with a query head each; a prompt, and one step."""
    q, q_recipe = _drawn(10 * id, 2, 1, 2)
    keys, k_recipe = (k, None) if k else _drawn(10 * id + 1, 2, prompt + 1, 2)
    v, v_recipe = _drawn(10 * id + 2, 2, prompt + 1, 2)
    gone = range(sinks, prompt - recent)
    gone = gone if len(gone) >= 2 else range(0)
    out = []
    for head in range(2):
        full = f"0.{head}" in heads.split("/")
        side = []
        for rows in (keys[head], v[head]):
            mean = [sum(rows[j][c] for j in gone) / max(len(gone), 1) for c in range(2)]
            side.append([mean if j in gone and not full else row for j, row in enumerate(rows)])
        weights = _softmax([_dot(q[head][0], key) / 2 for key in side[0]])
        out.append([float(sum(w * Decimal(float(x)) for w, x in zip(weights, c, strict=True)))
                    for c in zip(*side[1], strict=True)])  # fmt: skip
    params = {"sinks": sinks, "recent": recent, "heads": heads}
    inputs = {"q": _array(q, q_recipe), "k": _array(keys, k_recipe), "v": _array(v, v_recipe)}
    expected = {"o": Output(NEAR, values("f32", np.float32(out).tolist())), "dropped": _ints(len(gone))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _ranked(id, comment, flags, induction, echo, shares) -> CaseSpec:
    flat = [(layer, head) for layer in range(len(echo)) for head in range(len(echo[0]))]
    chosen = set()
    for scores, share in ((induction, shares[0]), (echo, shares[1])):
        exact = Fraction(share) * len(flat)
        chosen |= set(sorted(flat, key=lambda p, s=scores: (-s[p[0]][p[1]], p))[: round(exact)])
    inputs = {"induction": values("f64", induction), "echo": values("f64", echo)}
    params = {"shares": shares}
    expected = {"heads": _ints([list(p) for p in sorted(chosen)])}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def razor_suite() -> SuiteSpec:
    """The suite kvcache/razor."""
    header = [
        "Inputs q f32 [2, 1, 2]; k, v f32 [2, tokens, 2]: all tokens but the last are the prompt, the last is a step "
        "with the query q; head h of q reads head h. Scores are q . k / 2. A head that is not in `heads` "
        "(layer.head, this is layer 0) keeps the first `sinks` and the last `recent` tokens of the prompt; the others, "
        "if two or more, are one token: the mean of their keys and of their values, counted as often as there are "
        "tokens in it. Outputs: o f32 [2, 2]; dropped i64 [].",
        "Cases with the inputs induction and echo f64 [layers, heads] ask for heads i64 [n, 2], rising: of all heads "
        "of all layers, the round(shares[0] n) best by induction and the round(shares[1] n) best by echo.",
    ]
    notes = {
        "Count": note("BASIC", "The mean counts N_d times: ln N_d is added to its score.", "It is hardly seen."),
        "AfterScale": note("ORDER", "ln N_d is added after the scale.", "It counts N_d^scale times."),
        "Full": note("BASIC", "Retrieval heads keep every token."),
        "Exact": note("DEGENERATE", "Dropped keys that are equal: nothing is lost."),
        "Two": note("OFF_BY_ONE", "One token is not worth replacing by one: nothing is dropped."),
        "Step": note("OFF_BY_ONE", "Later tokens are kept; the window is the prompt's."),
        "Global": note("LAYOUT", "Heads of all layers are ranked together, not layer by layer."),
        "Union": note("BASIC", "Either score makes a retrieval head."),
    }
    same = [[[Fraction(h + 1), Fraction(1, 2)]] * 7 for h in range(2)]
    cases = [
        _razor(2, "the second head keeps all", "Full Count AfterScale Step", 8, 1, 2, "0.1"),
        _razor(3, "all keys alike", "Exact Count", 6, 1, 1, k=same),
        _razor(4, "one token too many", "Two", 5, 2, 2),
        _ranked(21, "both of layer 1, and one by echo", "Union Global", [[0.125, 0.25], [0.75, 0.5]],
                [[0.5, 0], [0, 0]], [0.5, 0.25]),
    ]  # fmt: skip
    return _suite("razor", "Retrieval heads and a compensation token", SECOND, header, notes, cases)


# --- freekv ----------------------------------------------------------------------------------------------------------


def _freekv(id, comment, flags, heads, chunks, page, sinks, recent, budget, tau, seed=0) -> CaseSpec:
    """Two key-value heads; keys and queries of two channels."""
    length = sum(chunks)

    def made(seed: int) -> CaseSpec:
        query, q_recipe = _drawn(seed, heads, length, 2)
        k, k_recipe = _drawn(seed + 1, 2, length, 2)
        group = heads // 2
        ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
        seen, corrected, recalled = [], [], 0
        for head in range(2):
            mine = query[head * group : (head + 1) * group]
            old: set[int] = set()
            for before, end in pairwise(ends):
                now, at, turned = _freekv_step(mine, k[head], before, end, page, sinks, recent, budget, tau)
                recalled += len(now - old) * page * 2 * 2 * 4
                old = now
            seen.append(at)
            corrected.append(int(turned))
        params = dict(page=page, sinks=sinks, recent=recent, budget=budget, tau=tau, chunks=chunks)
        expected = {"seen": _ints(seen), "recalled": _ints(recalled)}
        expected |= {"corrected": Output(BITS, values("u8", corrected))} if old else {}
        inputs = {"q": _array(query, q_recipe), "k": _array(k, k_recipe)}
        return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)

    return _clear(made, seed or 100 * id)


def _freekv_step(q, k, before, length, page, sinks, recent, budget, tau):
    """Pages, tokens attended and whether the head chose again, of one key-value head and its queries."""
    if length <= sinks + recent + budget:
        return set(), list(range(length)), False
    full, rest = divmod(length - sinks, page)
    near = max(recent // page - (2 * rest > page), 1 if rest == 0 else 0)
    candidates = full - near

    def ranked(t: int) -> list[int]:
        total = dict.fromkeys(range(candidates), Decimal(0))
        for head in q:
            bounds = []
            for j in range(candidates):
                rows = k[sinks + j * page : sinks + (j + 1) * page]
                channels = zip(head[t], zip(*rows, strict=True), strict=True)
                bounds.append(sum(max(x * min(c), x * max(c)) for x, c in channels))
            total = {j: total[j] + w for j, w in zip(total, _softmax(bounds), strict=True)}
        return _best(total, budget // page)

    with localcontext() as context:
        context.prec = 30
        cosine = Decimal(0)
        for head in q:
            a, b = head[length - 1], head[before - 1]
            size = Decimal(float(_dot(a, a) * _dot(b, b))).sqrt()
            cosine += Decimal(float(_dot(a, b))) / size / len(q) if size else 0
    if abs(cosine - Decimal(tau)) < MARGIN:
        raise Unclear("a close decision")
    turned = cosine < Decimal(tau)
    pages = ranked(length - 1 if turned else before - 1)
    middle = [sinks + j * page + i for j in pages for i in range(page)]
    return set(pages), [*range(sinks), *middle, *range(sinks + candidates * page, length)], turned


def freekv_suite() -> SuiteSpec:
    """The suite kvcache/freekv."""
    header = [
        CALLS + "Inputs q f32 [H, tokens, 2], k f32 [2, tokens, 2]; values are as wide. Each later call is one token. "
        "Tokens behind the sinks form pages; with n of them, n // page are full and r = n mod page follow. The last "
        "recent // page full pages, one less if 2 r > page, but the last one at least if r = 0, and the r tokens are "
        "attended anyway; of the others the budget // page best ones. Up to sinks + recent + budget tokens all are.",
        "A query head gives a page the bound sum_d max(q_d min_d, q_d max_d) over its keys, softmax over the pages "
        "that are to choose from; a key-value head takes the mean of its group, the first of equals. The query of the "
        "token before chooses; where the mean cosine of the two queries is below tau, the query itself. Outputs: seen "
        "i64 [2, n] in the last step; recalled i64 [], bytes of float32 keys and values of pages that the step before "
        "had not; corrected u8 [2].",
    ]
    notes = {
        "Bound": note("BASIC", "Per channel the larger of the two products.", "Pages ranked by their mean."),
        "Before": note("ORDER", "The query before chooses, not the present one."),
        "Correct": note("BASIC", "Below tau a head chooses again; the others keep theirs."),
        "PerHead": note("LAYOUT", "Each key-value head has pages of its own."),
        "Group": note("ORDER", "Softmax for each query head, then the mean over the group."),
        "Recent": note("OFF_BY_ONE", "More than half a page in progress makes one page less recent."),
        "Changed": note("BASIC", "Only pages that were not there are fetched."),
    }
    cases = [
        _freekv(2, "always corrected", "Correct Bound Recent", 2, [15, 1], 3, 2, 3, 3, 2.0),
        _freekv(
            3,
            "groups of two, three steps",
            "Group Before Changed Recent Bound",
            4,
            [17, 1, 1, 1],
            3,
            1,
            3,
            6,
            -2.0,
            seed=19,
        ),
        _freekv(4, "tau 1/4", "Correct PerHead", 4, [14, 1], 2, 2, 2, 4, 0.25, seed=43),
    ]
    return _suite("freekv", "Pages chosen one step ahead", SECOND, header, notes, cases)


# --- pqcache ---------------------------------------------------------------------------------------------------------


def _pqcache(id, comment, flags, heads, k, ratio, sinks, bits, steps=1, seed=0) -> CaseSpec:
    """Keys of two channels, each a part of its own, with at most 2^bits different numbers."""
    kv_heads, length = len(k), len(k[0])

    def made(seed: int) -> CaseSpec:
        q, q_recipe = _drawn(seed, heads, length, 2)
        group, body = heads // kv_heads, length - steps - sinks
        near = int(Fraction(ratio) * body) // 2 if body > 1 << bits else None
        seen, recalled = [], 0
        for head in range(kv_heads):
            old: set[int] = set()
            for end in range(length - steps + 1, length + 1):
                at, now = list(range(end)), set()
                start = end - max(near or 0, 1)
                if near is not None and start - sinks > near:
                    scores = dict.fromkeys(range(sinks, start), Decimal(0))
                    for h in range(head * group, (head + 1) * group):
                        with localcontext() as context:
                            context.prec = 30
                            root = Decimal(2).sqrt()
                        exact = [_dot(q[h][end - 1], k[head][j]) for j in scores]
                        weights = _softmax([Fraction(Decimal(float(x)) / root) for x in exact])
                        scores = {j: s + w for (j, s), w in zip(scores.items(), weights, strict=True)}
                    now = set(_best(scores, near))
                    at = [*range(sinks), *sorted(now), *range(start, end)]
                recalled += len(now - old) * 2 * 2 * 4
                old = now
            seen.append(at)
        inputs = {"q": _array(q, q_recipe), "k": _array(k)}
        params = {"ratio": ratio, "sinks": sinks, "bits": bits, "steps": steps}
        expected = {"seen": _ints(seen), "recalled": _ints(recalled)}
        return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)

    return _clear(made, seed or 100 * id)


def pqcache_suite() -> SuiteSpec:
    """The suite kvcache/pqcache."""
    header = [
        "Inputs q f32 [H, tokens, 2], k f32 [Hk, tokens, 2]; values are as wide. All tokens but the last `steps` are "
        "the prompt, of n behind the sinks; the others come one by one. Each channel is a part, with at most 2^bits "
        "different numbers: any k-means over the prompt with distinct seeds finds them, so that codes lose nothing.",
        "top = near = floor(ratio n) // 2, fixed; n <= 2^bits: everything is attended. A step attends over the sinks, "
        "the last max(near, 1) tokens and, of those between, the `top` with the largest sum over the query heads of "
        "the group of softmax (over those between) of q . k / sqrt(2), the earlier of equals. Outputs: seen i64 [Hk, "
        "n'] in the last step; recalled i64 [], bytes of float32 keys and values of tokens that the step before had "
        "not fetched.",
    ]
    notes = {
        "Top": note("BASIC", "The best tokens by the tables of the codes."),
        "Half": note("OFF_BY_ONE", "Half of the budget for the last tokens, half for chosen ones; of the prompt."),
        "Sum": note("ORDER", "A group adds its weights up; the largest weight is another rule."),
        "Sinks": note("LAYOUT", "Sinks are attended anyway and not among the candidates."),
        "Later": note("BASIC", "Tokens after the prompt get codes of the nearest centroids, and can be chosen."),
        "Ties": note("ROUNDING", "Of equal tokens the earlier."),
        "Short": note("DEGENERATE", "A prompt of no more than 2^bits tokens has no codes."),
    }
    of = lambda rows: [[[Fraction(x), Fraction(y)] for x, y in head] for head in rows]
    a, b = [0, 2, -1, 1, 2, -2, 0, 1, -1, 2, 1, 0, -2, 1], [1, -1, 2, 0, 1, 1, -2, 2, 0, -1, 1, 2, 0, -1]
    one, two = list(zip(a, b, strict=True)), list(zip(b, a, strict=True))
    alike = [(1, 1), (0, 1)] * 6
    cases = [
        _pqcache(2, "two heads, groups of two", "Sum Top Half Sinks", 4, of([one, two]), 0.5, 2, 3, seed=13),
        _pqcache(3, "three steps", "Later Half", 1, of([one]), 0.5, 1, 3, steps=3, seed=4),
        _pqcache(4, "tokens alike", "Ties Sinks", 1, of([alike]), 0.5, 2, 1),
        _pqcache(5, "a prompt of 4 tokens behind the sinks", "Short", 1, of([one[:6]]), 0.25, 1, 2),
    ]
    return _suite("pqcache", "Tokens found by codes of keys", SECOND, header, notes, cases)


SUITES = (streaming_suite, h2o_suite, snapkv_suite, razor_suite, freekv_suite, pqcache_suite)
