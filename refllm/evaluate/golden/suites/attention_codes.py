"""Suites of attention on codes: attention/fp8 and attention/sage. Ids are never reused and never renumbered."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, dyadic_recipe, first_clear, nearest, to_f32
from refllm.evaluate.golden.suites.rtn_notes import note

_BITS = {"class": "bits", "zero_sign": "ignore"}
_NEAR = {"class": "allclose", "rtol": 1e-5, "atol": 1e-6}
_MARGIN = Fraction(1, 1000)
_MOST = 448


class Rounder:
    """Nearest whole number; off ties by a margin unless they are meant."""

    def __init__(self, ties: str, meant: bool):
        self.ties, self.meant = ties, meant

    def __call__(self, x: Fraction) -> int:
        """The nearest integer."""
        if not self.meant and abs(x - x.numerator // x.denominator - Fraction(1, 2)) < _MARGIN:
            raise Unclear
        return nearest(x, self.ties)


def _e4m3(x: Fraction, rint) -> tuple[int, Fraction]:
    """Code and value of the nearest E4M3 number; beyond 448 it is 448."""
    a = min(abs(x), Fraction(_MOST))
    exponent = -6
    while Fraction(2) ** (exponent + 1) <= a:
        exponent += 1
    steps = rint(a / Fraction(2) ** (exponent - 3))  # 8 to 16; below 8 it is subnormal
    value = min(steps * Fraction(2) ** (exponent - 3), Fraction(_MOST))
    code = steps + 8 * (exponent + 6)  # the exponent's 8 steps are those that a mantissa's carry needs
    return min(code, 0x7E) + (128 if x < 0 else 0), -value if x < 0 else value


def _fp8_rows(rows, block, rint):
    """Codes, values and scales of the rows of a head."""
    codes, hat, scales = [], [], []
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        scale = to_f32(max(abs(x) for row in part for x in row) / _MOST) or Fraction(1)
        for row in part:
            pairs = [_e4m3(x / scale, rint) for x in row]
            codes.append([code for code, _ in pairs])
            hat.append([scale * value for _, value in pairs])
            scales.append(scale)
    return codes, hat, scales


def _attend(products, v, seen, scale, block, weigh):
    """One query over its tiles: o and lse, in floats."""
    m, l, o = -math.inf, 0.0, [0.0] * len(v[0])
    for start in range(0, len(products), block):
        keys = [j for j in range(start, min(start + block, len(products))) if seen[j]]
        if not keys:
            continue
        scores = [float(scale * products[j]) for j in keys]
        new = max(m, *scores)
        fade, p = math.exp(m - new), [math.exp(s - new) for s in scores]
        hat = [weigh(x) for x in p]
        l = fade * l + math.fsum(p)
        o = [fade * x + math.fsum(w * float(v[j][d]) for w, j in zip(hat, keys, strict=True)) for d, x in enumerate(o)]
        m = new
    return ([x / l for x in o], m + math.log(l)) if l else (o, -math.inf)


def _exact(heads):
    return [[[Fraction(x) for x in row] for row in head] for head in heads]


def _spec(id, comment, flags, given, recipes, found, only, params) -> CaseSpec:
    q, k, v, at = given
    inputs = {n: values("f32", x, recipe=recipes.get(n)) for n, x in (("q", q), ("k", k), ("v", v))}
    inputs |= {"q_positions": values("i64", at[0]), "k_positions": values("i64", at[1])}
    code = "i8" if "bits" in params else "u8"
    expected = {}
    for name in only.split():
        near = name in ("o", "lse")
        nested = _floats(found[name]) if not name.endswith("codes") else found[name]
        expected[name] = Output(_NEAR if near else _BITS, values(code if name.endswith("codes") else "f32", nested))
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _floats(nested):
    """The nearest float32 of every number."""
    return [_floats(x) for x in nested] if isinstance(nested, list) else float(to_f32(Fraction(nested)))


def _drawn(make, id, shapes, exp2=-4):
    """A case on the first random heads all of whose decisions are clear."""

    def heads(seed, shape):
        flat = iter(dyadic(seed, 8, exp2, math.prod(shape)))
        return [[[float(next(flat)) for _ in range(shape[2])] for _ in range(shape[1])] for _ in range(shape[0])]

    def attempt(seed):
        names = dict(zip("qkv", shapes, strict=True))
        recipes = {n: dyadic_recipe(seed + i, 8, exp2) for i, n in enumerate(names)}
        return make([heads(seed + i, shape) for i, shape in enumerate(names.values())], recipes)

    return first_clear(attempt, 1000 * id)


def _suite(name: str, title: str, header: list[str], notes: dict, cases: list[CaseSpec]) -> SuiteSpec:
    head = manifest_head(__name__, f"attention/{name}", title, header, "lessons/23-flash-attention.md")
    source = {"kind": "first_principles", "name": "the header above: codes in fractions, exponentials in float64"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


def _rejected(id, comment, flag, params, value=1.0, **changed) -> CaseSpec:
    inputs = {n: values("f32", [[[1.0, value if n == "k" else 1.0]]]) for n in "qkv"}
    inputs |= {"q_positions": values("i64", [0]), "k_positions": values("i64", [0])}
    return CaseSpec(id, comment, (flag,), inputs, result="invalid", error="value", params=params | changed)


# --- attention/fp8 ---------------------------------------------------------------------------------------------------

_FP8 = {"scale": 0.5, "granularity": "block", "block_q": 2, "block_k": 2}


def _fp8(id, comment, flags, qkv, only, *, at=None, recipes=None, meant=True, **changed) -> CaseSpec:
    params, rint = _FP8 | changed, Rounder("even", meant)
    q, k, v = (_exact(x) for x in qkv)
    at = at or ([len(k[0]) - 1] * len(q[0]), list(range(len(k[0]))))
    block, group = params["granularity"] == "block", len(q) // len(k)
    if block:
        q_found = [_fp8_rows(head, params["block_q"], rint) for head in q]
    else:  # the queries of a key-value head one below another
        q_found = []
        for start in range(0, len(q), group):
            rows = [row for head in q[start : start + group] for row in head]
            parts = _fp8_rows(rows, len(rows), rint)
            T = len(q[0])
            q_found += [tuple(part[i * T : (i + 1) * T] for part in parts) for i in range(group)]
    side = lambda x: [_fp8_rows(head, params["block_k"] if block else len(head), rint) for head in x]
    k_found, v_found = side(k), side(v)
    weigh = lambda p: float(_e4m3(Fraction(256 * p), Rounder("even", meant and p == 1))[1] / 256)
    rows = []
    for h, (_, hat, _) in enumerate(q_found):
        keys, numbers = k_found[h // group][1], v_found[h // group][1]
        for t, row in enumerate(hat):
            products = [sum(a * b for a, b in zip(row, key, strict=True)) for key in keys]
            seen = [p <= at[0][t] for p in at[1]]
            rows.append(_attend(products, numbers, seen, Fraction(params["scale"]), params["block_k"], weigh))
    T = len(q[0])
    found = {n: [[rows[h * T + t][i] for t in range(T)] for h in range(len(q))] for i, n in enumerate(("o", "lse"))}
    for name, parts in (("q", q_found), ("k", k_found), ("v", v_found)):
        found |= {f"{name}_codes": [p[0] for p in parts], f"{name}_scale": [p[2] for p in parts]}
    return _spec(id, comment, flags, (*qkv, at), recipes or {}, found, only, params)


def fp8_suite() -> SuiteSpec:
    """The suite attention/fp8."""
    header = [
        "Inputs q f32 [H, T, D], k f32 [Hk, S, D], v f32 [Hk, S, Dv], positions as in attention/flash. Params scale, "
        "granularity, block_q, block_k. Codes are E4M3 (nearest, ties to even, 448 beyond), of x / s with s = "
        "float32(largest |x| / 448), 1 where that is 0. granularity block: s for block_q rows of a query head, block_k "
        "rows of a key-value head; head: for all rows of a key-value head, and all queries that read it.",
        "Tiles of block_k keys in order, m the largest score so far, p = exp(score - m), of scores from decoded codes. "
        "l sums p; o sums E4M3(256 p) / 256 times decoded values; both are faded by exp(m before - m). Outputs: codes "
        "u8, scales f32 for every row, o f32, lse f32. No rotation.",
    ]
    notes = {
        "BlockScale": note("LAYOUT", "A block of rows has a scale of its own."),
        "HeadScale": note("LAYOUT", "Query heads that share a key-value head share a scale.", "A scale too many."),
        "Offset": note("PRECISION", "Weights are rounded as 256 p.", "Small weights of long rows are 0."),
        "RowSum": note("ORDER", "l sums the weights before they are rounded."),
        "TieToEven": note("ROUNDING", "Ties go to the even code."),
        "ZeroBlock": note("DEGENERATE", "A block of zeros: scale 1, codes 0."),
        "NonFinite": note("NON_FINITE", "NaN is rejected."),
        "BadParams": note("MALFORMED", "Another granularity."),
        "Random": note("BASIC", "Dyadic random heads."),
    }
    one = [[[1.0]]]
    cases = [
        _fp8(1, "two large keys, two zeros, two small ones halfway between codes", "BlockScale TieToEven ZeroBlock",
             [one, [[[448.0], [19], [0], [0], [1.75], [-0.06640625]]], [[[1.0]] * 6]], "k_codes k_scale"),
        _fp8(2, "a quiet query head beside a loud one", "HeadScale",
             [[[[1.0]], [[448.0]]], one, one], "q_codes q_scale", granularity="head"),
        _fp8(3, "weights near 2^-10", "Offset RowSum",
             [one, [[[0.0], [-7.0], [-6.0]]], [[[1.0], [448], [448]]]], "o", scale=1.0, block_k=4),
        _drawn(lambda qkv, recipes: _fp8(4, "random", "Random RowSum", qkv, "o lse", recipes=recipes, meant=False),
               4, ((2, 1, 3), (1, 3, 3), (1, 3, 2))),
        _rejected(40, "granularity row", "BadParams", _FP8, granularity="row"),
        _rejected(41, "NaN in k", "NonFinite", _FP8, math.nan),
    ]  # fmt: skip
    return _suite("fp8", "Attention on E4M3 codes, tile by tile", header, notes, cases)


# --- attention/sage --------------------------------------------------------------------------------------------------

_SAGE = {"scale": 0.5, "bits": 8, "granularity": "block", "smooth_k": True, "smooth_q": False, "values": "fp8"}


def _group(i: int, granularity: str, side: str):
    if granularity == "block":
        return i // (128 if side == "q" else 64)
    return (i // 32, i % 8) if side == "q" else (i // 64, i // 2 % 4)


def _int_rows(rows, params, side, rint):
    """Codes, decoded rows and scales of a head."""
    most, thread = (1 << (params["bits"] - 1)) - 1, params["granularity"] == "thread"
    largest = {}
    for i, row in enumerate(rows):
        of = _group(i, params["granularity"], side)
        largest[of] = max(largest.get(of, 0), *map(abs, row))
    scale = {of: to_f32(x / most + (Fraction(1e-7) if thread else 0)) if x else Fraction(1)
             for of, x in largest.items()}  # fmt: skip
    scales = [scale[_group(i, params["granularity"], side)] for i in range(len(rows))]
    codes = [[max(-most, min(most, rint(x / s))) for x in row] for row, s in zip(rows, scales, strict=True)]
    return codes, [[c * s for c in row] for row, s in zip(codes, scales, strict=True)], scales


def _mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _less(rows, mean):
    return [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]


def _inner(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def _sage(id, comment, flags, qkv, only, *, recipes=None, meant=True, **changed) -> CaseSpec:
    params, rint = _SAGE | changed, Rounder("away", meant)
    q, k, v = (_exact(x) for x in qkv)
    at = [len(k[0]) - 1] * len(q[0]), list(range(len(k[0])))
    group, zeros = len(q) // len(k), [Fraction(0)] * len(k[0][0])
    k_mean = [_mean(head) if params["smooth_k"] else zeros for head in k]
    keys = [_less(head, mean) for head, mean in zip(k, k_mean, strict=True)]
    q_mean = [_mean(head) if params["smooth_q"] else zeros for head in q]  # no case has more than 128 queries
    q_found = [_int_rows(_less(head, m), params, "q", rint) for head, m in zip(q, q_mean, strict=True)]
    k_found = [_int_rows(head, params, "k", rint) for head in keys]
    numbers = []
    for head in v:
        columns = []
        for column in zip(*head, strict=True):
            s = to_f32(max(map(abs, column)) / _MOST) or Fraction(1)
            columns.append([s * _e4m3(x / s, Rounder("even", meant))[1] for x in column])
        numbers.append(list(zip(*columns, strict=True)))
    weigh = lambda p: float(_e4m3(Fraction(448 * p), Rounder("even", meant or p == 1))[1] / 448)
    o, lse = [], []
    for h, (_, hat, _) in enumerate(q_found):
        of, rows = h // group, []
        for t, row in enumerate(hat):
            products = [_inner(row, a) + _inner(q_mean[h], b) for a, b in zip(k_found[of][1], keys[of], strict=True)]
            scale = Fraction(params["scale"])
            found = _attend(products, numbers[of], [True] * len(products), scale, 64, weigh)
            rows.append((found[0], found[1] + float(scale * _inner(q[h][t], k_mean[of]))))
        o.append([row[0] for row in rows])
        lse.append([row[1] for row in rows])
    found = {"o": o, "lse": lse}
    for name, parts in (("q", q_found), ("k", k_found)):
        found |= {f"{name}_codes": [p[0] for p in parts], f"{name}_scale": [p[2] for p in parts]}
    return _spec(id, comment, flags, (*qkv, at), recipes or {}, found, only, params)


def sage_suite() -> SuiteSpec:
    """The suite attention/sage."""
    header = [
        "Inputs as in attention/fp8; every query sees every key. Params scale, bits, granularity, smooth_k, smooth_q, "
        "values (fp8). k' = k - the mean over the tokens of its head, with smooth_k; q' = q - the mean of 128 queries, "
        "with smooth_q. Codes of rows: x / s rounded half away from zero, within +-(2^(bits-1) - 1); s = "
        "float32(largest |x| / (2^(bits-1) - 1)), 1 for zeros, of 128 queries or 64 keys (block), or (thread; the "
        "quotient plus 1e-7) of the rows within 32 queries with equal i mod 8, within 64 keys with equal (i div 2) "
        "mod 4.",
        "Score = scale (q'^ k'^ + q_mean k'). Values: E4M3 with float32(largest |v| / 448) per channel. Weights exp("
        "score - largest of the tile of 64 keys) go into o as E4M3(448 p) / 448, into the sum as they are. lse = ln "
        "sum exp(score) + scale q k_mean: that of the scores without smoothing. Outputs: q_codes, k_codes i8, q_scale, "
        "k_scale f32 for every row, o f32, lse f32.",
    ]
    notes = {
        "HalfAway": note("ROUNDING", "Halves go away from zero.", "Codes one off where rint is used."),
        "SmoothK": note("LAYOUT", "The mean is over tokens, one for each channel.", "Another softmax."),
        "PerHead": note("LAYOUT", "Each key-value head has a mean of its own."),
        "LseBack": note("ORDER", "What smoothing takes from all scores comes back into lse.", "Merged parts disagree."),
        "SmoothQ": note("ORDER", "The queries' mean times k' is added to the product of codes."),
        "PerThread": note("LAYOUT", "Rows of a scale are interleaved: i mod 8, and (i div 2) mod 4."),
        "PerBlock": note("LAYOUT", "A scale for 64 keys, 128 queries."),
        "Channel": note("LAYOUT", "Values have a scale for each channel."),
        "ZeroGroup": note("DEGENERATE", "A group of zeros: scale 1, codes 0."),
        "NonFinite": note("NON_FINITE", "NaN is rejected."),
        "BadParams": note("MALFORMED", "bits out of range."),
    }
    random = lambda id, comment, flags, only, shapes, **rest: _drawn(
        lambda qkv, recipes: _sage(id, comment, flags, qkv, only, recipes=recipes, meant=False, **rest), id, shapes
    )
    cases = [
        _sage(1, "halves, and a head of zeros", "HalfAway ZeroGroup",
              [[[[1.0]], [[1.0]]], [[[127.0], [0.5], [1.5], [-2.5]], [[0.0]] * 4], [[[1.0]] * 4] * 2],
              "k_codes k_scale", smooth_k=False),
        _sage(2, "two heads with different means", "PerHead SmoothK LseBack",
              [[[[1.0, 1]], [[1.0, -1]]], [[[101.0, 1], [99, 3]], [[-5.0, 2], [-7, 4]]], [[[1.0]] * 2] * 2],
              "k_codes lse"),
        _sage(4, "queries around (4, 2), 4 bits", "SmoothQ",
              [[[[5.0, 2], [3, 2], [4, 3.75], [4, 0.25]]], [[[1.0, 2], [0, -1]]], [[[1.0]] * 2]], "q_codes lse", bits=4,
              smooth_q=True),
        random(5, "10 queries and keys by thread", "PerThread", "q_scale k_scale q_codes",
               ((1, 10, 2), (1, 10, 2), (1, 10, 1)), granularity="thread", smooth_k=False),
        random(6, "66 keys", "PerBlock", "k_scale", ((1, 1, 1), (1, 66, 1), (1, 66, 1)), smooth_k=False),
        random(7, "values and weights", "Channel", "o", ((2, 1, 2), (1, 4, 2), (1, 4, 2))),
        _rejected(40, "9 bits", "BadParams", _SAGE, bits=9),
        _rejected(41, "NaN in k", "NonFinite", _SAGE, math.nan),
    ]  # fmt: skip
    return _suite("sage", "Attention on integer codes of smoothed keys", header, notes, cases)
