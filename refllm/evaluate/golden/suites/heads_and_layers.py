"""Suites about the head, feature and layer dimension of the cache. Ids are never reused: new cases take new numbers."""

from decimal import Decimal, localcontext
from fractions import Fraction
from math import acos, ceil, cos, exp, pi, sin, sqrt

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import to_f32
from refllm.evaluate.golden.suites.rtn_notes import note

NEAR = {"class": "allclose", "rtol": 2.0**-20, "atol": 1e-6}
CLOSE = {"class": "allclose", "rtol": 1e-9, "atol": 1e-9}
BITS = {"class": "bits"}
Matrix = list[list]


def _suite(name: str, op: str, title: str, lesson: str, header: list[str], notes: dict, cases: list) -> SuiteSpec:
    head = manifest_head(__name__, name, title, header, f"lessons/{lesson}.md", op=op)
    source = {"kind": "first_principles", "name": "the header above, one number at a time"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


def _case(id, comment, flags, inputs, expected, params=None) -> CaseSpec:
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params or {})


def _invalid(id, comment, flag, inputs, params, error="value") -> CaseSpec:
    return CaseSpec(id, comment, (flag,), inputs, result="invalid", error=error, params=params)


def _floats(nested):
    return [_floats(x) for x in nested] if isinstance(nested, list) else float(nested)


def _singles(nested):
    """The nearest float32 of exact numbers."""
    return [_singles(x) for x in nested] if isinstance(nested, list) else float(to_f32(Fraction(nested)))


# --- gqa -------------------------------------------------------------------------------------------------------------

GQA_HEADER = [
    "Inputs k, v, f32 [Hk D, d], and q, f32 [H D, d], where init is aligned: rows of the projections, heads one after "
    "another, D rows each (param head_dim). Params kv_heads and init. Outputs k, v, f32 [kv_heads D, d], and q.",
    "A group is Hk / kv_heads neighbours. mean: row j of the new head is the mean of the rows j of the group's heads. "
    "first: the group's first head. aligned: as mean, after turning each head nearest to the mean of the turned heads: "
    "rows j and j + D/2 of k by an angle, and those of the query heads that read it by the same; rows of v by an "
    "orthogonal matrix (undone in o). The first head of a group that agrees up to turns stays as it is.",
    "kv_heads that do not divide Hk are rejected.",
]
GQA_NOTES = {
    "Neighbours": note("LAYOUT", "A group is neighbouring heads: h // g, not h % kv_heads.", "Queries read strangers."),
    "Mean": note("BASIC", "The mean of the heads, not their sum."),
    "Rows": note("LAYOUT", "Heads are pooled row by row: D rows of a head lie together."),
    "First": note("BASIC", "The first head of a group takes its place."),
    "Pairs": note("LAYOUT", "Keys turn in pairs j and j + D/2, as RoPE in halves turns them.", "Scores change."),
    "Queries": note("BASIC", "Query heads turn with the key head they read.", "Scores change."),
    "Counts": note("MALFORMED", "kv_heads divides the heads there are."),
}


def _turn_pairs(head: Matrix, cosine: Fraction, sine: Fraction) -> Matrix:
    half, columns = len(head) // 2, range(len(head[0]))
    pairs = list(zip(head[:half], head[half:], strict=True))
    first = [[x[i] * cosine - y[i] * sine for i in columns] for x, y in pairs]
    return first + [[x[i] * sine + y[i] * cosine for i in columns] for x, y in pairs]


def _gqa(id, comment, flags, k, v, kv_heads, init, D) -> CaseSpec:
    group = len(k) // D // kv_heads

    def pooled(rows):
        out = []
        for g in range(kv_heads):
            for j in range(D):
                members = [rows[(g * group + i) * D + j] for i in range(group)]
                mean = [sum(map(Fraction, column)) / group for column in zip(*members, strict=True)]
                out.append(members[0] if init == "first" else mean)
        return out

    inputs = {"k": values("f32", k), "v": values("f32", v)}
    expected = {n: Output(BITS, values("f32", _singles(pooled(x)))) for n, x in (("k", k), ("v", v))}
    return _case(id, comment, flags, inputs, expected, {"kv_heads": kv_heads, "init": init, "head_dim": D})


def _gqa_turned() -> CaseSpec:
    """Two heads of D = 4 that differ by turns of 3-4-5 and 5-12-13 triangles."""
    exact = lambda rows: [[Fraction(x) for x in row] for row in rows]
    k0 = exact([[65, 0, 130], [0, 65, 65], [130, 65, 0], [65, 195, -65]])
    q0 = exact([[1, 0, 2], [3, 1, 0], [0, 1, 1], [2, 2, 1]])
    k1 = _turn_pairs(k0, Fraction(3, 5), Fraction(4, 5))
    q1 = _turn_pairs(q0, Fraction(3, 5), Fraction(4, 5))
    inputs = {"q": values("f32", _singles(q0 + q1)), "k": values("f32", _singles(k0 + k1))}
    inputs["v"] = values("f32", _floats(k0 + k0))
    expected = {"k": Output(NEAR, values("f32", _floats(k0))), "q": Output(NEAR, values("f32", _floats(q0 + q0)))}
    params = {"kv_heads": 1, "init": "aligned", "head_dim": 4}
    return _case(4, "a second head that is the first one turned", "Pairs Queries", inputs, expected, params)


def gqa_suite() -> SuiteSpec:
    """The suite transform/gqa."""
    k = [[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 13], [-1, -2], [0, 0.5]]
    v = [[x * 4 for x in row] for row in reversed(k)]
    one = {name: values("f32", [[1.0]] * 6) for name in "kv"}
    cases = [
        _gqa(1, "four heads of two rows into two", "Neighbours Mean Rows", k, v, 2, "mean", 2),
        _gqa(3, "the first of each pair", "First Neighbours", k, v, 2, "first", 2),
        _gqa_turned(),
        _invalid(5, "3 heads into 2", "Counts", one, {"kv_heads": 2, "init": "mean", "head_dim": 2}),
    ]
    title = "Key-value heads pooled into fewer: mean, first, aligned"
    return _suite("transform/gqa", "transform.gqa", title, "19-five-dimensions", GQA_HEADER, GQA_NOTES, cases)


# --- mfa -------------------------------------------------------------------------------------------------------------

MFA_HEADER = [
    "Factoring: inputs q, f32 [H D, d]; k, f32 [Hk D, d]; x, f32 [T, d]. Params head_dim, theta, width. One key of "
    "`width` channels replaces those of all heads. Output scores, f64 [H, T, T]: rotated queries times rotated keys, "
    "token i at position i, before any scale. Where the keys of all heads are multiples of one, frequency by "
    "frequency (complex multiples: channels j and j + D/2 are one number), width D is exact; width Hk D always is.",
    "Reused keys: inputs x, f32 [T, C], taken as unrotated keys; n, f32 [C, C]; alpha, f32 [C]; output v, f64 [T, C] = "
    "x + alpha * (x n^T).",
    "A width that is not a multiple of head_dim, or beyond Hk head_dim, is rejected.",
]
MFA_NOTES = {
    "Repeated": note("LAYOUT", "The frequencies of a head come again for every part of the wide key."),
    "Conjugate": note("BASIC", "Queries take the conjugate of what mixed the keys.", "Signs of imaginary parts."),
    "Complex": note("BASIC", "Heads are mixed by complex numbers: turned copies of one key need one channel pair."),
    "Halves": note("LAYOUT", "Pairs are j and j + D/2."),
    "Gate": note("LAYOUT", "alpha gates what comes out of n, not what goes in."),
    "Transposed": note("LAYOUT", "n is [out, in]: x n^T."),
    "Unrotated": note("ORDER", "Values are made of keys before RoPE."),
    "Width": note("MALFORMED", "The width is a multiple of head_dim, at most all heads."),
}


def _scores(q: Matrix, k: Matrix, x: Matrix, D: int, theta: float) -> list:
    """Exact projections, then complex numbers in float64."""
    heads, kv_heads, half = len(q) // D, len(k) // D, D // 2
    dot = lambda row, token: float(sum(Fraction(w) * Fraction(z) for w, z in zip(row, token, strict=True)))
    project = lambda rows, h, token: [dot(row, token) for row in rows[h * D : (h + 1) * D]]
    out = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        out.append([])
        for i, a in enumerate(x):
            out[-1].append([])
            for s, b in enumerate(x):
                mine, other, total = project(q, h, a), project(k, g, b), 0.0
                for j in range(half):
                    angle = (i - s) * theta ** (-2 * j / D)
                    re = mine[j] * other[j] + mine[j + half] * other[j + half]
                    im = mine[j + half] * other[j] - mine[j] * other[j + half]
                    total += cos(angle) * re - sin(angle) * im
                out[-1][-1].append(total)
    return out


def _mfa(id, comment, flags, q, k, x, width) -> CaseSpec:
    inputs = {"q": values("f32", q), "k": values("f32", k), "x": values("f32", x)}
    bound = {"class": "allclose", "rtol": 1e-5, "atol": 1e-5}
    expected = {"scores": Output(bound, values("f64", _scores(q, k, x, 4, 100.0)))}
    return _case(id, comment, flags, inputs, expected, {"head_dim": 4, "theta": 100.0, "width": width})


def mfa_suite() -> SuiteSpec:
    """The suite transform/mfa."""
    q = [[1.0, 2], [0, 1], [1, -1], [2, 0], [0, 1], [1, 1], [-1, 2], [3, 1]]
    k0 = [[1.0, 1], [2, -1], [0, 2], [1, 1]]
    turned = [[0.0, -2], [-1, -1], [1, 1], [2, -1]]  # times i in both frequencies
    apart = [[2.0, -1], [1, 0], [0, 1], [-1, 3]]
    x = [[1.0, 0], [0.5, 1], [-1, 2]]
    n = [[0.0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, -1]]
    alpha = [1.0, 0.5, 0, -2]
    key = [[1.0, 2, 3, 4], [-1, 0.5, 0, 1]]
    made = [[row[i] + alpha[i] * sum(n[i][j] * row[j] for j in range(4)) for i in range(4)] for row in key]
    reused = {"x": values("f32", key), "n": values("f32", n), "alpha": values("f32", alpha)}
    small = {"q": values("f32", q[:4]), "k": values("f32", k0), "x": values("f32", x)}
    cases = [
        _mfa(1, "two heads side by side", "Repeated Conjugate Halves", q, k0 + apart, x, 8),
        _mfa(2, "the second head is the first one turned: width 4", "Complex Conjugate Halves", q, k0 + turned, x, 4),
        _case(3, "values of keys", "Gate Transposed Unrotated", reused, {"v": Output(NEAR, values("f64", made))}),
        _invalid(4, "width 6 of heads of 4", "Width", small, {"head_dim": 4, "theta": 100.0, "width": 6}),
    ]
    title = "Grouped-query attention as one wide key with factored queries, and values made from keys"
    return _suite("transform/mfa", "transform.mfa", title, "26-latent-caches", MFA_HEADER, MFA_NOTES, cases)


# --- palu ------------------------------------------------------------------------------------------------------------

PALU_HEADER = [
    "Factors: inputs w, f32 [out, in]; gram, f64 [in, in] = X^T X; param rank. Output w_hat, f64 [out, in]: the matrix "
    "of that rank with the least || (w - w_hat) X^T ||.",
    "Ranks: input scores, f64 [matrices]; params full (rank of a matrix), ratio, groups, block. target = floor(ratio * "
    "full * matrices); share = target * score / sum of scores; rank = min(full, floor(share)); then one to each matrix "
    "that is not full, in the order of share - rank (ties: the earlier one), again and again until target is reached. "
    "rank // groups, to the nearest multiple of block (ties to even), one block at least, full / groups at most. "
    "Output ranks, i64 [matrices], of a group.",
    "Folding: inputs o, f32 [d, H D]; l, f32 [Hk D, r]; bias, f32 [Hk D]; param head_dim. Outputs folded, "
    "f32 [d, H r], "
    "the columns of head h times the rows of l of key-value head h // (H / Hk); added, f32 [d]: o times the biases.",
]
PALU_NOTES = {
    "Whitened": note("BASIC", "Inputs decide what a weight is worth: S S^T = gram, w S is decomposed."),
    "Side": note("LAYOUT", "S is the lower factor; its inverse comes from the right, not its transpose's."),
    "Proportion": note("BASIC", "Ranks follow the scores."),
    "Full": note("OFF_BY_ONE", "No rank above the matrix; what is left goes to the others."),
    "Leftover": note("ORDER", "What rounding leaves goes first to the smallest remainder."),
    "Block": note("ROUNDING", "Ranks of a group are multiples of a block, one at least."),
    "QueryHeads": note("LAYOUT", "One copy for every query head; heads of a group are neighbours."),
    "Bias": note("BASIC", "A bias of v becomes one of o: weights of attention add up to one."),
}


def _palu_ranks(id, comment, flags, scores, full, ratio, groups, block) -> CaseSpec:
    exact = [Fraction(s) for s in scores]
    target = int(Fraction(ratio) * full * len(scores))
    share = [target * s / sum(exact) for s in exact]
    ranks = [min(full, int(s)) for s in share]
    order, left = sorted(range(len(scores)), key=lambda i: share[i] - ranks[i]), target - sum(ranks)
    while left:
        for i in order:
            if left and ranks[i] < full:
                ranks[i], left = ranks[i] + 1, left - 1
    each = [min(max(1, round(Fraction(rank // groups, block))) * block, full // groups) for rank in ranks]
    params = {"full": full, "ratio": ratio, "groups": groups, "block": block}
    inputs = {"scores": values("f64", scores)}
    return _case(id, comment, flags, inputs, {"ranks": Output(BITS, values("i64", each))}, params)


def palu_suite() -> SuiteSpec:
    """The suite transform/palu."""
    factors = lambda id, comment, flags, w, gram, rank, w_hat: _case(
        id, comment, flags, {"w": values("f32", w), "gram": values("f64", gram)},
        {"w_hat": Output({"class": "allclose", "rtol": 1e-6, "atol": 1e-6}, values("f64", w_hat))}, {"rank": rank},
    )  # fmt: skip
    # S = [[2, 0], [1, 3]]: w S = [[2, 0], [0, 3]] of w = S^-1 scaled; the larger singular value is kept.
    mixed = [[1.0, 0], [-0.5, 1]]
    two = [[1.0, 2, 3, 4], [5, 6, 7, 8]]
    folding = {"o": two, "l": [[1.0], [10]], "bias": [0.0, 1]}
    folding = {name: values("f32", x) for name, x in folding.items()}
    cases = [
        factors(1, "small weight, large input", "Whitened", [[1, 0], [0, 2]], [[100, 0], [0, 1]], 1, [[1, 0], [0, 0]]),
        factors(3, "dependent inputs", "Side Whitened", mixed, [[4, 2], [2, 10]], 1, [[0, 0], [-0.5, 1]]),
        _palu_ranks(4, "in proportion, then a full matrix", "Proportion Full", [1.0, 1, 6, 2], 16, 0.5, 1, 1),
        _palu_ranks(5, "smallest remainders first", "Leftover", [1.0, 1.25, 1.5], 16, 0.25, 1, 1),
        _palu_ranks(6, "two groups, blocks of 4", "Block Proportion", [1.0, 2, 3, 10], 32, 0.5, 2, 4),
        _case(8, "two key-value heads of one channel, two query heads each", "QueryHeads Bias", folding,
              {"folded": Output(BITS, values("f32", [[r[0], r[1], 10 * r[2], 10 * r[3]] for r in two])),
               "added": Output(BITS, values("f32", [r[2] + r[3] for r in two]))}, {"head_dim": 1}),
    ]  # fmt: skip
    title = "Low-rank keys and values: whitened factors, ranks by score, values folded into o"
    return _suite("transform/palu", "transform.palu", title, "26-latent-caches", PALU_HEADER, PALU_NOTES, cases)


# --- minicache and cla -----------------------------------------------------------------------------------------------

MINI_HEADER = [
    "Inputs a, b, f32 [Hk, T, D]: keys (or values) of a shallower and a deeper layer. Params t, gamma, rule. Outputs "
    "keep, u8 [Hk, T]; a_hat, b_hat, f32 [Hk, T, D], what is read again.",
    "With lengths |a|, |b| and directions a/|a|, b/|b| (0 for a zero vector) at the angle w: "
    "e = (sin((1 - t) w) a/|a| + sin(t w) b/|b|) / sin w; where sin w < 1e-6 (1 - t) a/|a| + t b/|b|; "
    "brought to length 1, or b/|b| where it has "
    "none. a_hat = |a| e, b_hat = |b| e, but the originals where keep is 1. d = w / pi. threshold: keep where "
    "d >= max - gamma (max - min) over the tokens of a head, all for gamma 1; top: the ceil(gamma T) largest d of a "
    "head, of equal ones the earlier.",
    "t and gamma outside 0 to 1 are rejected.",
]
MINI_NOTES = {
    "Sphere": note("BASIC", "Directions are interpolated on the sphere, not vectors.", "Lengths shrink."),
    "OwnLength": note("BASIC", "Each layer keeps its own length."),
    "Deeper": note("LAYOUT", "t is the weight of the deeper layer."),
    "Distant": note("BASIC", "The most distant tokens keep their originals, not the closest."),
    "Inclusive": note("OFF_BY_ONE", ">=: gamma 0 keeps the most distant token."),
    "Tie": note("ORDER", "Of equal distances the earlier token is kept."),
    "RoundedUp": note("ROUNDING", "top keeps ceil(gamma T) tokens."),
    "PerHead": note("LAYOUT", "Every head has tokens of its own that are kept."),
    "Straight": note("DEGENERATE", "Equal directions: no division by sin 0."),
    "Opposite": note("DEGENERATE", "Opposite directions and t = 1/2: the deeper one."),
    "Zero": note("DEGENERATE", "A zero vector has no direction; no NaN."),
    "Range": note("MALFORMED", "t and gamma lie between 0 and 1."),
}


def _merged(a: list, b: list, t: float) -> tuple[float, list, list]:
    """One token: distance, and what is read of both layers."""
    la, lb = (sqrt(sum(x * x for x in v)) for v in (a, b))
    ua, ub = ([x / n if n else 0.0 for x in v] for v, n in ((a, la), (b, lb)))
    w = acos(max(-1.0, min(1.0, sum(x * y for x, y in zip(ua, ub, strict=True)))))
    fa, fb = (1 - t, t) if sin(w) < 1e-6 else (sin((1 - t) * w) / sin(w), sin(t * w) / sin(w))
    e = [fa * x + fb * y for x, y in zip(ua, ub, strict=True)]
    norm = sqrt(sum(x * x for x in e))
    e = ub if norm < 1e-6 else [x / norm for x in e]
    return w / pi, [la * x for x in e], [lb * x for x in e]


def _mini(id, comment, flags, a, b, t=0.6, gamma=0.0, rule="threshold") -> CaseSpec:
    keep, a_hat, b_hat = [], [], []
    for xs, ys in zip(a, b, strict=True):
        tokens = [_merged(x, y, t) for x, y in zip(xs, ys, strict=True)]
        d = [token[0] for token in tokens]
        if rule == "threshold":
            chosen = [gamma == 1 or x >= max(d) - gamma * (max(d) - min(d)) for x in d]
        else:
            best = sorted(range(len(d)), key=lambda i: (-d[i], i))[: ceil(gamma * len(d))]
            chosen = [i in best for i in range(len(d))]
        keep.append([int(c) for c in chosen])
        a_hat.append([x if c else token[1] for x, c, token in zip(xs, chosen, tokens, strict=True)])
        b_hat.append([y if c else token[2] for y, c, token in zip(ys, chosen, tokens, strict=True)])
    inputs = {"a": values("f32", a), "b": values("f32", b)}
    expected = {"keep": Output(BITS, values("u8", keep))}
    expected |= {n: Output(NEAR, values("f32", _singles(x))) for n, x in (("a_hat", a_hat), ("b_hat", b_hat))}
    return _case(id, comment, flags, inputs, expected, {"t": t, "gamma": gamma, "rule": rule})


def minicache_suite() -> SuiteSpec:
    """The suite kvcache/minicache."""
    a = [[[3.0, 4], [1, 0], [0, 2]], [[2.0, 0], [1, 1], [1, 0]]]
    b = [[[4.0, 3], [0, -1], [0, 5]], [[0.0, 1], [1, 1.5], [-1, 0.25]]]
    far = [[[1.0, 0], [0, 1], [1, 0], [1, 0]]]
    away = [[[0.0, 2], [3, 0], [1, 0], [0, -1]]]
    cases = [
        _mini(1, "two heads, one kept in each", "Sphere OwnLength Deeper Distant Inclusive PerHead", a, b),
        _mini(3, "three right angles, two kept", "Tie RoundedUp", far, away, gamma=0.3, rule="top"),
        _mini(4, "opposite directions, zeros, one direction", "Opposite Zero Straight",
              [[[1.0, 0], [0, 0], [3, 4], [0, 0]]], [[[-2.0, 0], [0, 3], [6, 8], [0, 0]]], t=0.5, rule="top"),
        _invalid(6, "gamma 1.5", "Range", {"a": values("f32", far), "b": values("f32", far)},
                 {"t": 0.5, "gamma": 1.5, "rule": "top"}),
    ]  # fmt: skip
    title = "MiniCache: two layers with one direction a token"
    return _suite("kvcache/minicache", "kvcache.minicache", title, "19-five-dimensions", MINI_HEADER, MINI_NOTES, cases)


CLA_HEADER = [
    "Input k, f32 [L, T, D]: what every layer would store of T tokens, one head. Param share. Outputs read, "
    "f32 [L, T, D]: the keys of layer i - i mod share; nbytes, i64: of all stores, keys and "
    "values of this size in float32.",
    "A share below 1 is rejected.",
]
CLA_NOTES = {
    "Owner": note("LAYOUT", "The first layer of a group owns the cache.", "A layer reads what is not there yet."),
    "Tail": note("OFF_BY_ONE", "The last group may be smaller."),
    "Bytes": note("BASIC", "Only owners store."),
    "Share": note("MALFORMED", "A share is 1 or more."),
}


def cla_suite() -> SuiteSpec:
    """The suite kvcache/cla."""
    k = [[[float(10 * layer + token)] for token in range(2)] for layer in range(5)]

    def case(id, comment, flags, share):
        read = [k[layer - layer % share] for layer in range(5)]
        nbytes = 2 * 4 * 2 * len({layer - layer % share for layer in range(5)})
        expected = {"read": Output(BITS, values("f32", read)), "nbytes": Output(BITS, values("i64", nbytes))}
        return _case(id, comment, flags, {"k": values("f32", k)}, expected, {"share": share})

    cases = [
        case(1, "two layers share", "Owner Tail Bytes", 2),
        case(2, "three layers share", "Owner Tail Bytes", 3),
        _invalid(4, "none", "Share", {"k": values("f32", k)}, {"share": 0}),
    ]
    title = "Cross-layer attention: which layer's keys are read"
    return _suite("kvcache/cla", "kvcache.cla", title, "19-five-dimensions", CLA_HEADER, CLA_NOTES, cases)


# --- latent attention and experts ------------------------------------------------------------------------------------

MLA_HEADER = [
    "Inputs q_n, f32 [H, T, n] and q_r, f32 [H, T, p], the two parts of the queries; c, f32 [S, r], cached latents; "
    "k_r, f32 [S, p], cached keys of positions; up, f32 [H (n + v), r], for each head first n rows that make its key, "
    "then v rows that make its value. Everything that turns is turned. Param scale. Queries are the "
    "last T of S tokens.",
    "score = scale * (q_n . U_h c + q_r . k_r), of keys not behind the query; o, f32 [H, T, v]: sum of softmax weights "
    "times V_h c. Naive and absorbed give the same.",
]
MLA_NOTES = {
    "KeyRowsFirst": note("LAYOUT", "Within a head the rows of the key come first, then those of the value."),
    "HeadRows": note("LAYOUT", "Rows of up are heads one after another, not all keys and then all values."),
    "BothParts": note("BASIC", "The scores of both parts of a key are added before the softmax."),
    "SharedKey": note("BASIC", "k_r is one key for all heads."),
    "Causal": note("OFF_BY_ONE", "The last query sees all keys, the one before it one less."),
    "Scale": note("BASIC", "The scale is a param: the root of n + p, times what yarn adds."),
}


def _query(q_n: list, q_r: list, c: Matrix, k_r: Matrix, rows: Matrix, scale: float) -> list[float]:
    """One query of one head over the tokens it sees."""
    dot = lambda x, y: sum(Fraction(a) * Fraction(b) for a, b in zip(x, y, strict=True))
    decimal = lambda x: Decimal(x.numerator) / Decimal(x.denominator)
    of_key, of_value = rows[: len(q_n)], rows[len(q_n) :]
    scores = [
        dot(q_n, [dot(row, latent) for row in of_key]) + dot(q_r, key) for latent, key in zip(c, k_r, strict=True)
    ]
    scores = [decimal(score) * Decimal(scale) for score in scores]
    weights = [(score - max(scores)).exp() for score in scores]
    mixed = lambda row: sum(w * decimal(dot(row, latent)) for w, latent in zip(weights, c, strict=True))
    return [float(mixed(row) / sum(weights)) for row in of_value]


def mla_suite() -> SuiteSpec:
    """The suite model/mla."""

    def case(id, comment, flags, q_n, q_r, c, k_r, up, scale):
        H, T, S = len(q_n), len(q_n[0]), len(c)
        rows = len(up) // H
        o = []
        for h in range(H):
            own = up[h * rows : (h + 1) * rows]
            o.append([])
            for i in range(T):
                seen = S - T + i + 1
                with localcontext() as context:
                    context.prec = 40
                    o[-1].append(_query(q_n[h][i], q_r[h][i], c[:seen], k_r[:seen], own, scale))
        inputs = {"q_n": q_n, "q_r": q_r, "c": c, "k_r": k_r, "up": up}
        inputs = {name: values("f32", x) for name, x in inputs.items()}
        bound = {"class": "allclose", "rtol": 1e-5, "atol": 1e-5}
        return _case(id, comment, flags, inputs, {"o": Output(bound, values("f32", _singles(o)))}, {"scale": scale})

    up = [[1.0, 0], [0, 1], [2, 1], [0.5, -1], [1, 1], [-1, 3]]
    c, k_r = [[1.0, 2], [0, 1], [-1, 0.5]], [[0.5, 0], [1, -1], [0, 2]]
    two = [[[1.0, 0.5], [0, 1]], [[0.25, -1], [1, 1]]]
    cases = [
        case(1, "two heads, the last two of three tokens", "KeyRowsFirst HeadRows BothParts SharedKey Causal", two,
             [[[1.0, 0], [0.5, 1]], [[0, 1], [-1, 0]]], c, k_r, up, 0.5),
        case(2, "one query", "Scale BothParts", [x[1:] for x in two], [[[2.0, 0]], [[0, 1.5]]], c, k_r, up, 0.25),
    ]  # fmt: skip
    title = "Latent attention from the cache: naive and absorbed"
    return _suite("model/mla", "model.mla", title, "26-latent-caches", MLA_HEADER, MLA_NOTES, cases)


ROUTE_HEADER = [
    "Inputs logits, f64 [N, E]; bias, f64 [E], with sigmoid. Params active, groups, active_groups, scoring, "
    "normalised, scaling. Outputs chosen, i64 [N, active], best first; weight, f64 [N, active].",
    "score = sigmoid(logits), or softmax over E. Ranked by score + bias: groups of E / groups neighbours by the sum of "
    "their two best (sigmoid) or their best (softmax), the best active_groups stay open; of their experts the best "
    "`active` are chosen. Equal: the lower number. weight = score of the chosen, over their sum if normalised, times "
    "scaling.",
]
ROUTE_NOTES = {
    "BiasSteers": note("BASIC", "The bias is for the choice only, weights come from scores."),
    "TwoBest": note("BASIC", "A group is worth its two best experts together."),
    "OneBest": note("BASIC", "With softmax a group is worth its best expert."),
    "Closed": note("BASIC", "Experts of other groups cannot be chosen, however good."),
    "Normalised": note("ORDER", "Weights of the chosen are divided by their own sum, then scaled."),
    "Scaling": note("BASIC", "The routed scaling factor multiplies weights."),
    "Ties": note("ORDER", "Of equal scores the lower number is chosen."),
}  # fmt: skip


def route_suite() -> SuiteSpec:
    """The suite model/moe."""

    def case(id, comment, flags, logits, bias, active, groups, active_groups, scoring, normalised, scaling):
        chosen, weight = [], []
        for row in logits:
            total = sum(exp(x) for x in row)
            score = [1 / (1 + exp(-x)) for x in row] if scoring == "sigmoid" else [exp(x) / total for x in row]
            ranked = [s + b for s, b in zip(score, bias or [0.0] * len(row), strict=True)]
            size, best = len(row) // groups, 2 if scoring == "sigmoid" else 1
            worth = [sum(sorted(ranked[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
            open_ = sorted(range(groups), key=lambda g, worth=worth: (-worth[g], g))[:active_groups]
            inside = [i for i in range(len(row)) if i // size in open_]
            own = sorted(inside, key=lambda i, ranked=ranked: (-ranked[i], i))[:active]
            whole = sum(score[i] for i in own) if normalised else 1
            chosen.append(own)
            weight.append([score[i] / whole * scaling for i in own])
        inputs = {"logits": values("f64", logits)} | ({"bias": values("f64", bias)} if bias else {})
        expected = {"chosen": Output(BITS, values("i64", chosen)), "weight": Output(CLOSE, values("f64", weight))}
        params = {"active": active, "groups": groups, "active_groups": active_groups, "scoring": scoring}
        return _case(id, comment, flags, inputs, expected, params | {"normalised": normalised, "scaling": scaling})

    rows = [[3.0, -2, 1, 1.5, 0, 2], [-1, 4, 0.5, 0, 1, -3]]
    cases = [
        case(1, "groups of two, one open: not that of the best expert", "TwoBest Closed Normalised Scaling", rows,
             [0.0] * 6, 2, 3, 1, "sigmoid", True, 2.5),
        case(2, "a bias turns the choice", "BiasSteers", rows, [-1.0, 0, 0, 0, 1, 0], 2, 1, 1, "sigmoid", True, 1.0),
        case(3, "softmax: the best expert's group", "OneBest Scaling", [[2.0, -3, 1.9, 1.8, 0, 0]], None, 2, 3, 1,
             "softmax", False, 16.0),
        case(4, "equal logits", "Ties", [[0.0] * 6], [0.0] * 6, 3, 3, 2, "sigmoid", False, 1.0),
    ]  # fmt: skip
    return _suite("model/moe", "model.moe.route", "Experts chosen for tokens, and their weights", "26-latent-caches",
                  ROUTE_HEADER, ROUTE_NOTES, cases)  # fmt: skip
