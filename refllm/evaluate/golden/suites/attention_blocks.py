"""Suites of sparse attention: which blocks are kept. Ids are never reused and never renumbered."""

import math

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, dyadic_recipe, first_clear
from refllm.evaluate.golden.suites.rtn_notes import note

_BITS = {"class": "bits"}
_NEAR = {"class": "allclose", "rtol": 1e-5, "atol": 1e-6}
_GAP = 1e-4  # scores that are ranked lie so far apart


def _heads(seed, shape, exp2):
    flat = iter(float(x) for x in dyadic(seed, 8, exp2, math.prod(shape)))
    return [[[next(flat) for _ in range(shape[2])] for _ in range(shape[1])] for _ in range(shape[0])]


def _case(id, comment, flags, of, shapes, at, params, only, exp2=-4) -> CaseSpec:
    """A case on the first random q and k whose rankings are all clear."""

    def made(seed):
        return seed, of(_heads(seed, shapes[0], exp2), _heads(seed + 1, shapes[1], exp2), at, params)

    seed, found = first_clear(made, 1000 * id)
    inputs = {}
    for i, name in enumerate("qk"):
        inputs[name] = values("f32", _heads(seed + i, shapes[i], exp2), recipe=dyadic_recipe(seed + i, 8, exp2))
    inputs |= {"q_positions": values("i64", at[0]), "k_positions": values("i64", at[1])}
    types = {"mass": "f64", "recalls": "f64", "sparsity": "f64", "order": "i64"}
    near = lambda name: _NEAR if types.get(name) == "f64" else _BITS
    expected = {n: Output(near(n), values(types.get(n, "u8"), found[n])) for n in only.split()}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _rejected(id, comment, params) -> CaseSpec:
    inputs = {n: values("f32", [[[1.0], [1.0]]]) for n in "qk"}
    inputs |= {n: values("i64", [0, 1]) for n in ("q_positions", "k_positions")}
    return CaseSpec(id, comment, ("BadParams",), inputs, result="invalid", error="value", params=params)


def _suite(name, title, header, notes, cases) -> SuiteSpec:
    head = manifest_head(__name__, f"attention/{name}", title, header, "lessons/24-sparse-attention.md")
    notes = notes | {"BadParams": note("MALFORMED", "A param out of range.")}
    source = {"kind": "first_principles", "name": "the header above, one number after another"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


def _best(scores: dict, count: int) -> set:
    """Keys of the largest scores; the ranking must be clear where it decides."""
    ranked = sorted(scores, key=lambda at: -scores[at])
    if 0 < count < len(ranked):
        a, b = (scores[ranked[i]] for i in (count - 1, count))
        if a - b < _GAP * max(abs(a), 1e-3):
            raise Unclear
    return set(ranked[:count])


def _softmax(scores: dict) -> dict:
    top = max(scores.values(), default=0)
    p = {at: math.exp(s - top) for at, s in scores.items()}
    total = math.fsum(p.values())
    return {at: x / total for at, x in p.items()}


def _dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _parts(n, block):
    return [range(start, min(start + block, n)) for start in range(0, n, block)]


def _blocks(n, m, block, kept) -> list:
    """1 where a block holds a (query, key) that `kept` names."""
    return [
        [int(any(kept(i, j) for i in rows for j in keys)) for keys in _parts(m, block)] for rows in _parts(n, block)
    ]


def _means(rows, block):
    return [[math.fsum(rows[i][d] for i in part) / len(part) for d in range(len(rows[0]))]
            for part in _parts(len(rows), block)]  # fmt: skip


def _pooled(q, k, at, scale, block) -> list[dict]:
    """For each block row the softmax over its visible blocks."""
    seen = _blocks(len(q), len(k), block, lambda i, j: at[1][j] <= at[0][i])
    means_k = _means(k, block)
    return [
        _softmax({j: scale * _dot(a, b) for j, b in enumerate(means_k) if seen[i][j]})
        for i, a in enumerate(_means(q, block))
    ]


# --- attention/minference --------------------------------------------------------------------------------------------


def _minference(q, k, at, p) -> dict:
    group, found = len(q) // len(k), {"columns": [], "offsets": [], "blocks": []}
    S, T, width = len(k[0]), len(q[0]), max(at[0]) - min(at[1]) + 1
    for h, head in enumerate(q):
        keys = k[h // group]
        if p["pattern"] == "block":
            kept = [_best(row, p["top"]) for row in _pooled(head, keys, at, p["scale"], p["block"])]
            found["blocks"].append([[int(j in row) for j in range(len(_parts(S, p["block"])))] for row in kept])
            continue
        if p["pattern"] == "a_shape":
            near = lambda i, j: 0 <= at[0][i] - at[1][j] and (at[1][j] < p["sink"] or at[0][i] - at[1][j] < p["local"])
            found["blocks"].append(_blocks(T, S, p["block"], near))
            continue
        columns, offsets = dict.fromkeys(range(S), 0.0), dict.fromkeys(range(width), 0.0)
        for i in range(T - p["last"], T):
            scores = {j: p["scale"] * _dot(head[i], keys[j]) for j in range(S) if at[1][j] <= at[0][i]}
            for j, weight in _softmax(scores).items():
                columns[j] += weight
                offsets[at[0][i] - at[1][j]] += weight
        columns = set(range(30)) | _best({j: x for j, x in columns.items() if j >= 30}, max(p["vertical"] - 30, 0))
        offsets = set(range(100)) | _best({d: x for d, x in offsets.items() if d >= 100}, max(p["slash"] - 100, 0))
        found["columns"].append([int(j in columns) for j in range(S)])
        found["offsets"].append([int(d in offsets) for d in range(width)])
        found["blocks"].append(_blocks(T, S, p["block"], lambda i, j, kept=offsets: at[0][i] - at[1][j] in kept))
    return found


def minference_suite() -> SuiteSpec:
    """The suite attention/minference."""
    header = [
        "Inputs q f32 [H, T, D], k f32 [Hk, S, D], positions as in attention/flash. Params pattern, scale, vertical, "
        "slash, last, sink, local, top, block. A block is kept where it holds a kept (query, key) pair, block x block "
        "tokens. a_shape: keys at positions below sink, or at a distance (q_position - k_position) of 0 .. local - 1; "
        "never later ones. block: in each block row the `top` visible blocks (some key not later than some query) with "
        "the largest softmax(scale q_mean k_mean) over visible blocks.",
        "vertical_slash: A = softmax of the last `last` queries over the keys they see. columns: keys 0 .. "
        "29 and those "
        "with the largest sums of A, `vertical` in all. offsets: distances 0 .. 99 and those with the "
        "largest sums of A, "
        "`slash` in all. blocks: pairs at a kept distance. Outputs u8: columns [H, S], offsets [H, max(q_positions) - "
        "min(k_positions) + 1], blocks [H, ceil(T / block), ceil(S / block)].",
    ]
    notes = {
        "Forced": note("BASIC", "The first 30 keys are kept in any case."),
        "Nearest": note("BASIC", "The nearest 100 distances are kept in any case."),
        "Distance": note("LAYOUT", "A diagonal is a distance from the query back.", "Mirrored diagonals."),
        "LastQueries": note("BASIC", "Only the last queries are asked."),
        "GqaShare": note("LAYOUT", "Query head h reads key-value head h // (H / Hk)."),
        "Causal": note("ORDER", "Blocks that no query sees take no part in the ranking."),
        "SinkAndWindow": note("OFF_BY_ONE", "sink counts positions from 0; a window of 1 is the key itself."),
    }
    p = {"scale": 1.0, "pattern": "vertical_slash", "vertical": 32, "slash": 103, "last": 3, "sink": 3, "local": 2}
    p |= {"top": 2, "block": 2}
    r = lambda a, b: list(range(a, b))
    of = lambda *a, **changed: _case(*a[:3], _minference, a[3], a[4], p | changed, a[5])
    cases = [
        of(1, "5 queries behind 139 keys", "Forced Nearest LastQueries",
           ((1, 5, 2), (1, 144, 2)), (r(139, 144), r(0, 144)), "columns offsets"),
        of(2, "blocks that a distance crosses", "Distance", ((1, 2, 2), (1, 140, 2)), (r(138, 140), r(0, 140)),
           "blocks", last=2, block=8),
        of(3, "the two best of visible blocks, four heads on two", "Causal GqaShare", ((4, 8, 2), (2, 8, 2)),
           (r(0, 8), r(0, 8)), "blocks", pattern="block"),
        of(4, "3 sinks, a window of 2", "SinkAndWindow", ((1, 9, 1), (1, 9, 1)), (r(0, 9), r(0, 9)), "blocks",
           pattern="a_shape", block=1),
        _rejected(40, "another pattern", p | {"pattern": "dense"}),
        _rejected(41, "no column", p | {"vertical": 0}),
    ]  # fmt: skip
    return _suite("minference", "Blocks, columns and diagonals of sparse prefill", header, notes, cases)


# --- attention/adaspa ------------------------------------------------------------------------------------------------


def _adaspa(q, k, at, p) -> dict:
    group, block, S, T = len(q) // len(k), p["block"], len(k[0]), len(q[0])
    mass, seen = [], _blocks(T, S, block, lambda i, j: at[1][j] <= at[0][i])
    for h, head in enumerate(q):
        W = [[0.0] * len(_parts(S, block)) for _ in _parts(T, block)]
        for i in range(T):
            scores = {j: p["scale"] * _dot(head[i], k[h // group][j]) for j in range(S) if at[1][j] <= at[0][i]}
            for j, weight in _softmax(scores).items():
                W[i // block][j // block] += weight
        mass.append(W)

    def kept(W, sparsity):
        rows = []
        for i, row in enumerate(W):
            n = sum(seen[i])
            count = max(math.floor((1 - sparsity) * n + 0.5 + 1e-9), 1)
            rows.append(_best({j: x for j, x in enumerate(row) if seen[i][j]}, count))
        return rows

    each = [p["sparsity"]] * len(q)
    if p["adaptive"] and 3 * p["sparsity"] >= 1:
        recall = {h: math.fsum(W[i][j] for i, row in enumerate(kept(W, p["sparsity"])) for j in row) / T
                  for h, W in enumerate(mass)}  # fmt: skip
        if any(abs(x - 0.8) < 1e-3 for x in recall.values()):
            raise Unclear
        n = min(sum(x > 0.8 for x in recall.values()), len(q) // 2)
        for h in _best(recall, n):
            each[h] = (1 + p["sparsity"]) / 2
        for h in _best({h: -x for h, x in recall.items()}, n):
            each[h] = (3 * p["sparsity"] - 1) / 2
    masks = [kept(W, s) for W, s in zip(mass, each, strict=True)]
    text = lambda part, n: part.stop > n - p["text"]
    blocks = [
        [
            [
                int(seen[i][j] and (j in row or text(rows, T) or text(keys, S)))
                for j, keys in enumerate(_parts(S, block))
            ]
            for (i, row), rows in zip(enumerate(mask), _parts(T, block), strict=True)
        ]
        for mask in masks
    ]
    return {"mass": mass, "sparsity": each, "blocks": blocks}


def adaspa_suite() -> SuiteSpec:
    """The suite attention/adaspa."""
    header = [
        "Inputs as in attention/minference. Params scale, sparsity s, block, text, adaptive. mass f64 [H, nq, nk]: sum "
        "over the queries and keys of two blocks of the softmax weights (so a row sums to its queries). A block row "
        "keeps the max(1, floor((1 - s_h) n + 1/2)) blocks with the largest mass, of the n in which a query "
        "sees a key. "
        "sparsity f64 [H]: s_h = s, but with adaptive and s >= 1/3: n' = min(heads whose kept share of mass at s is "
        "above 0.8, H div 2); the n' highest shares get (1 + s) / 2, the n' lowest (3 s - 1) / 2. blocks u8: "
        "kept ones, "
        "and all visible ones in block rows or columns with one of the last `text` tokens.",
    ]
    notes = {
        "Mass": note("BASIC", "Mass is the sum of weights, not of their logarithms or scores."),
        "PerRow": note("LAYOUT", "Every block row keeps its own best.", "Rows without any block."),
        "HalfOfHeads": note("DEGENERATE", "At most half of the heads give more.", "The mean sparsity changes."),
        "Rounding": note("ROUNDING", "(1 - s) n is rounded, halves up."),
        "Text": note("LAYOUT", "Rows and columns of text blocks are kept whole."),
        "Causal": note("ORDER", "n counts the blocks that are visible."),
    }
    p = {"scale": 1.0, "sparsity": 0.5, "block": 2, "text": 0, "adaptive": False}
    r = lambda a, b: list(range(a, b))
    full = lambda n: ([n] * n, r(0, n))
    of = lambda *a, **changed: _case(*a[:3], _adaspa, a[3], a[4], p | changed, a[5], exp2=-5)
    cases = [
        of(1, "5 blocks, half kept: 3", "Mass PerRow Rounding", ((1, 10, 2), (1, 10, 2)), full(10), "mass blocks"),
        of(2, "three heads", "HalfOfHeads", ((3, 8, 3), (3, 8, 3)), full(8), "sparsity blocks",
           adaptive=True, sparsity=0.5, scale=4.0),
        of(3, "3 tokens of text", "Text", ((1, 10, 2), (1, 10, 2)), full(10), "blocks", text=3, sparsity=0.8),
        of(4, "causal", "Causal", ((1, 10, 2), (1, 10, 2)), (r(0, 10), r(0, 10)), "blocks", sparsity=0.6),
        _rejected(40, "sparsity 1", p | {"sparsity": 1.0}),
        _rejected(41, "more text than tokens", p | {"text": 3}),
    ]  # fmt: skip
    return _suite("adaspa", "Attention mass of blocks and what is kept of it", header, notes, cases)


# --- attention/rainfusion --------------------------------------------------------------------------------------------


def _rainfusion(q, k, at, p) -> dict:
    group, N = len(q) // len(k), len(k[0])
    T, Y, X = p["frames"], p["height"], p["width"]
    place = [(t, y, x) for t in range(T) for y in range(Y) for x in range(X)]
    band = {"t": T, "y": Y, "x": X}
    near = lambda name, a, b: abs(a - b) <= math.floor(p["bandwidth"] * (band[name] - 1) + 0.5)

    def keeps(kind, i, j):
        if max(i, j) >= len(place):
            return True
        (t, y, x), (u, b, a) = place[i], place[j]
        return (near("t", t, u) or u == 0) if kind == "spatial" else near("y", y, b) and near("x", x, a)

    recalls, rows = {"temporal": [], "spatial": []}, range(0, len(place), T)
    for h, head in enumerate(q):
        weights = {
            i: _softmax({j: p["scale"] * _dot(head[i], key) for j, key in enumerate(k[h // group])}) for i in rows
        }
        for kind, found in recalls.items():
            kept = [math.fsum(x for j, x in weights[i].items() if keeps(kind, i, j)) for i in rows]
            found.append(math.fsum(kept) / len(kept))
    order = sorted(range(len(place)), key=lambda i: (place[i][0], place[i][1] // 8, place[i][2] // 8, *place[i][1:]))
    order += range(len(place), N)
    block, blocks = p["block"], []
    for h, head in enumerate(q):
        rows_of, keys_of = ([x[i] for i in order] for x in (head, k[h // group]))
        mask = []
        sink = lambda part: part.start < Y * X or part.stop > len(place)
        parts = _parts(N, block)
        for i, scores in enumerate(_pooled(rows_of, keys_of, ([N] * N, at[1]), p["scale"], block)):
            best = _best(scores, math.ceil(len(scores) * (1 - p["sparsity"]) - 1e-9))
            mask.append([int(j in best or sink(parts[i]) or sink(part)) for j, part in enumerate(parts)])
        blocks.append(mask)
    return {"recalls": [recalls["temporal"], recalls["spatial"]], "order": order, "blocks": blocks}


def rainfusion_suite() -> SuiteSpec:
    """The suite attention/rainfusion."""
    header = [
        "Inputs as in attention/minference; every query sees every key. Params scale, frames, height, width, "
        "bandwidth, "
        "sparsity, block. Tokens lie on the grid frame by frame, row by row; further ones are text. recalls "
        "f64 [2, H]: "
        "the share of the softmax that the temporal and the spatial mask keep, mean over the rows 0, frames, 2 frames "
        "... of the grid. spatial: |frame - frame'| <= floor(bandwidth (frames - 1) + 1/2), or the key is in frame 0; "
        "temporal: the same rule for rows and for columns, all frames. Text is kept by both.",
        "order i64: tokens frame by frame, in windows of 8 x 8, row by row inside; text stays behind. blocks u8 [H, n, "
        "n], in that order: ceil(n (1 - sparsity)) of the n blocks of a row with the largest softmax(scale q_mean "
        "k_mean), and all in rows or columns that hold a token of the first frame or of the text.",
    ]
    notes = {
        "FrameZero": note("BASIC", "Spatial heads keep frame 0 as well."),
        "AllFrames": note("LAYOUT", "Temporal heads keep a place's neighbours in all frames."),
        "Bandwidth": note("ROUNDING", "Bands widen by the rounded share of n - 1."),
        "Windows": note("LAYOUT", "Windows are 8 x 8 and inside of one frame."),
        "Text": note("LAYOUT", "Text blocks are kept as rows and as columns."),
        "FirstFrame": note("LAYOUT", "Blocks of the first frame are kept as rows and as columns."),
        "Count": note("ROUNDING", "ceil(n (1 - sparsity)) blocks of a row."),
    }
    p = {"scale": 1.0, "frames": 3, "height": 2, "width": 3, "bandwidth": 0.25, "sparsity": 0.65, "block": 2}
    full = lambda n: ([n] * n, list(range(n)))
    of = lambda *a, **changed: _case(*a[:3], _rainfusion, a[3], a[4], p | changed, a[5], exp2=-5)
    cases = [
        of(1, "3 frames of 2 x 3, 2 tokens of text", "FrameZero AllFrames Bandwidth Text FirstFrame Count",
           ((1, 20, 2), (1, 20, 2)), full(20), "recalls blocks"),
        of(2, "rows and columns of different bands, two heads on one", "AllFrames Bandwidth FrameZero",
           ((2, 30, 2), (1, 30, 2)), full(30), "recalls", frames=5, height=1, width=6, bandwidth=0.4),
        of(3, "2 frames of 2 x 16", "Windows", ((1, 64, 1), (1, 64, 1)), full(64), "order",
           frames=2, width=16, block=8),
        _rejected(40, "a grid of more tokens than there are", p),
    ]  # fmt: skip
    return _suite("rainfusion", "Masks, recalls and blocks of heads of video models", header, notes, cases)
