"""The suite attention/flash. Ids are never reused and never renumbered: new cases take new numbers."""

from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil, frexp, ldexp

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs q, f32 [H, T, D]; k, f32 [Hk, S, D]; v, f32 [Hk, S, Dv]; q_positions i64 [T]; k_positions i64 [S], "
    "or [Hk, S] "
    "where each head keeps other tokens. Params: scale; window and softcap, if given. Query head h reads "
    "key-value head "
    "h // (H / Hk).",
    "score = scale * (q . k), with a softcap c then c * tanh(score / c). A query sees a key whose position is "
    "not above its "
    "own and, with a window W, above its own - W. Outputs: o f32 [H, T, Dv], the values of the keys it sees "
    "weighted by "
    "softmax of their scores; lse f32 [H, T], the natural logarithm of the sum of exp(score). A query that sees "
    "no key gives "
    "o = 0 and lse = -inf.",
    "Expected values are exact to float64. The bounds hold for float32 arithmetic in any order and any tiling: "
    "an exponent is "
    "off by at most (D + 12) u t, where t is the largest scale * sum |q||k| among the keys seen, whether the scale is "
    "multiplied before or after and whatever maximum is subtracted; a weight takes up to 6 S + 8 roundings, in "
    "the numerator "
    "and in the sum: k = 2 (D + 12) + 12 S + 16 times u times o_abs = (1 + t) * sum of weights |v|, or lse_abs = "
    "1 + t + |lse|.",
]
NOTES = {
    "GqaOrder": note(
        "LAYOUT",
        "Query head h reads key-value head h // (H / Hk): heads that share one are neighbours, not h % Hk.",
        "Fluent nonsense; with Hk = 1 or Hk = H it does not show.",
    ),
    "CausalOffset": note(
        "OFF_BY_ONE",
        "Fewer queries than keys: positions decide, the mask is aligned bottom-right.",
        "A decode step sees only the first key, or the future.",
    ),
    "CausalSelf": note("OFF_BY_ONE", "A query sees the key of its own position."),
    "WindowSelf": note(
        "OFF_BY_ONE", "A window of W keys includes the query's own: W = 1 is the key itself.", "A window one too wide."
    ),
    "PositionsNotOrder": note(
        "LAYOUT",
        "Keys stand in any order, with gaps: visibility follows their positions, not their places.",
        "After eviction or reordering tokens see the future.",
    ),
    "HeadPositions": note(
        "LAYOUT", "Each key-value head keeps other tokens: positions [Hk, S].", "Head 0's mask for all."
    ),
    "Softcap": note("ORDER", "The cap comes before the mask, after the scale: c * tanh(scale * q.k / c)."),
    "FullyMasked": note(
        "DEGENERATE",
        "A query that sees no key: zeros and -inf, not the mean of v and no NaN.",
        "-inf - -inf is NaN; a finite mask value gives the mean of what must not be seen.",
    ),
    "ScoreRange": note(
        "OVERFLOW", "Scores of +-10^4: subtract the maximum of the keys that are seen.", "exp overflows: inf / inf."
    ),
    "MaskedMaximum": note(
        "OVERFLOW",
        "The largest score belongs to a key that is not seen: all others vanish when it is subtracted.",
        "0 / 0, or zeros.",
    ),
    "OneKey": note("DEGENERATE", "One key: o is its value, whatever the score; lse is the score."),
    "Scale": note("BASIC", "The scale is a param: it need not be 1 / sqrt(D)."),
    "ValueDim": note("SHAPE", "Values of another width than keys."),
    "Lse": note("BASIC", "lse is the natural logarithm of the sum, of the scaled and capped scores."),
    "Normalise": note("BASIC", "One division by the sum of all weights, whatever the number of tiles."),
    "TileRescale": note(
        "ORDER",
        "Scores rise from key to key: what is summed so far must be rescaled by exp(old maximum - new).",
        "The first tiles count too much.",
    ),
    "Precision": note("PRECISION", "Weights and sums in float32: a weight rounded to 16 bits is off by 10^-3."),
    "HeadCount": note("SHAPE", "Heads that do not share evenly are rejected."),
    "Random": note("BASIC", "Dyadic random queries, keys and values."),
}
DIGITS = 40


def _decimal(x: Fraction) -> Decimal:
    return Decimal(x.numerator) / Decimal(x.denominator)


def _capped(score: Decimal, softcap: float | None) -> Decimal:
    if softcap is None:
        return score
    e = (2 * score / Decimal(softcap)).exp()
    return Decimal(softcap) * (e - 1) / (e + 1)


def _query(q, keys, vs, scale, softcap):
    """One query over the keys it sees: o, its reference size, lse and its."""
    if not keys:
        return [0.0] * len(vs), [0.0] * len(vs), float("-inf"), 1.0
    products = [[Fraction(a) * Fraction(b) * Fraction(scale) for a, b in zip(q, key, strict=True)] for key, _ in keys]
    scores = [_capped(_decimal(sum(p)), softcap) for p in products]
    largest = max(sum(map(abs, p)) for p in products)
    weights = [(s - max(scores)).exp() for s in scores]
    total = sum(weights)
    columns = [[_decimal(Fraction(x)) for x in column] for column in zip(*(v for _, v in keys), strict=True)]
    mix = lambda column: sum(w * x for w, x in zip(weights, column, strict=True)) / total
    lse = max(scores) + total.ln()
    size = 1 + _decimal(largest)
    o_abs = [_rounded_up(size * mix([abs(x) for x in column])) for column in columns]
    return [float(mix(column)) for column in columns], o_abs, float(lse), _rounded_up(size + abs(lse))


def _rounded_up(x: Decimal) -> float:
    """A number of 8 bits, at least x: what only scales a bound need not fill a page."""
    mantissa, exponent = frexp(float(x))
    return ldexp(ceil(mantissa * 256), exponent - 8)


def case(
    id, comment, flags, q, k, v, q_positions, k_positions, *, scale=0.5, window=None, softcap=None, recipes=None,
    only="o lse",
) -> CaseSpec:  # fmt: skip
    """A valid case from heads of rows of numbers."""
    share = len(q) // len(k)
    rows = []
    for h, head in enumerate(q):
        at = k_positions[h // share] if isinstance(k_positions[0], list) else k_positions
        pairs = list(zip(at, k[h // share], v[h // share], strict=True))
        for position, x in zip(q_positions, head, strict=True):
            seen = [(b, c) for p, b, c in pairs if p <= position and (window is None or p > position - window)]
            with localcontext() as context:
                context.prec = DIGITS
                rows.append(_query(x, seen, v[0][0], scale, softcap))
    T = len(q_positions)
    heads = lambda part: [[rows[h * T + t][part] for t in range(T)] for h in range(len(q))]
    bound = {"class": "dot_bound", "k": 2 * (len(q[0][0]) + 12) + 12 * len(k[0]) + 16, "factor": 1, "unit": "f32"}
    expected = {}
    for name, part in (("o", 0), ("lse", 2)):
        if name in only.split():
            expected[name] = Output(bound | {"abs_ref": f"{name}_abs"}, values("f64", heads(part)))
            expected[f"{name}_abs"] = Output({"class": "bits"}, values("f64", heads(part + 1)))
    params = {"scale": scale} | {n: x for n, x in (("window", window), ("softcap", softcap)) if x is not None}
    inputs = {n: values("f32", x, recipe=(recipes or {}).get(n)) for n, x in (("q", q), ("k", k), ("v", v))}
    inputs |= {"q_positions": values("i64", q_positions), "k_positions": values("i64", k_positions)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _drawn(seed, heads, tokens, dim, bits=6, exp2=-4):
    flat = iter([float(x) for x in dyadic(seed, bits, exp2, heads * tokens * dim)])
    nested = [[[next(flat) for _ in range(dim)] for _ in range(tokens)] for _ in range(heads)]
    return nested, dyadic_recipe(seed, bits, exp2)


def _random(id, comment, flags, shape, q_positions, k_positions, **rest) -> CaseSpec:
    """Random arrays; shape is H, Hk, D, Dv."""
    H, Hk, D, Dv = shape
    S = len(k_positions[0]) if isinstance(k_positions[0], list) else len(k_positions)
    drawn = {
        "q": _drawn(10 * id, H, len(q_positions), D),
        "k": _drawn(10 * id + 1, Hk, S, D),
        "v": _drawn(10 * id + 2, Hk, S, Dv),
    }
    arrays, recipes = ({n: pair[i] for n, pair in drawn.items()} for i in (0, 1))
    return case(id, comment, flags, *arrays.values(), q_positions, k_positions, recipes=recipes, **rest)


def _masks() -> list[CaseSpec]:
    r = lambda n: list(range(n))
    return [
        _random(1, "4 heads on 2", "GqaOrder CausalSelf ValueDim", (4, 2, 4, 2), r(2), r(2), only="o"),
        _random(3, "2 queries at the end of 5 keys", "CausalOffset CausalSelf", (1, 1, 4, 2), [3, 4], r(5)),
        _random(4, "one query at position 6 of 7", "CausalOffset Normalise Scale", (2, 1, 4, 2), [6], r(7),
            scale=0.25, only="o"),
        _random(5, "window 2", "WindowSelf", (1, 1, 4, 2), r(4), r(4), window=2),
        _random(6, "window 1: each its own key", "WindowSelf OneKey CausalSelf", (1, 1, 4, 2), r(3), r(3), window=1),
        _random(7, "keys in the order 4 0 3 1 of positions up to 5", "PositionsNotOrder CausalOffset", (1, 1, 4, 2),
                [2, 3, 5], [4, 0, 3, 1], only="o"),
        _random(9, "each head keeps other tokens", "HeadPositions GqaOrder", (4, 2, 4, 2), [3, 5],
                [[0, 1, 2, 3], [0, 3, 4, 5]], only="o"),
        _random(10, "softcap 1.5", "Softcap Lse", (1, 1, 4, 2), r(3), r(3), softcap=1.5),
        _random(11, "the first two queries see nothing", "FullyMasked", (1, 1, 4, 2), [0, 1, 2], [2, 3]),
        _random(12, "the keys have left the window", "FullyMasked WindowSelf", (2, 1, 4, 2), [9], [0, 1, 2], window=4),
        _random(13, "one key", "OneKey Lse", (2, 1, 4, 2), [0], [0]),
        _random(16, "head_dim 8, 12 keys, scale 8^-0.5", "Random Normalise Precision", (2, 1, 8, 4), [9, 10, 11], r(12),
                scale=8**-0.5),
    ]  # fmt: skip


def _ranges() -> list[CaseSpec]:
    r = lambda n: list(range(n))
    v4 = [[[1.0, -2], [3, 5], [-7, 0.5], [2, 8]]]
    return [
        case(30, "scores -10^4 to 10^4", "ScoreRange", [[[100.0], [-100]]], [[[-100.0], [100], [100], [-100]]], v4,
             [3, 3], r(4), scale=1.0),
        case(31, "all scores -10^4", "ScoreRange Lse", [[[100.0]]], [[[-100.0]] * 4], v4, [3], r(4), scale=1.0),
        case(32, "a key that is not seen has the score 200", "MaskedMaximum CausalSelf", [[[1.0], [1]]],
             [[[0.0], [0.5], [1], [200]]], v4, [1, 2], r(4), scale=1.0),
        case(33, "scores rise by 3 from key to key", "TileRescale Normalise Lse", [[[1.0], [0.5]]],
            [[[float(3 * i)] for i in
             range(7)]], [[[float((-2) ** i), 1] for i in range(7)]], [6, 6], r(7), scale=1.0),
        case(34, "small differences of large values", "Precision", [[[0.0, 0]]], [[[1.0, 1]] * 3],
             [[[4095.0, 1], [4095.5, 1], [4096.25, 1]]], [2], r(3)),
    ]  # fmt: skip


def _rejected() -> list[CaseSpec]:
    ones = lambda *shape: values("f32", [[[1.0] * shape[2]] * shape[1]] * shape[0])
    inputs = {"q": ones(3, 1, 2), "k": ones(2, 2, 2), "v": ones(2, 2, 2)}
    inputs |= {"q_positions": values("i64", [1]), "k_positions": values("i64", [0, 1])}
    return [CaseSpec(50, "3 heads on 2", ("HeadCount",), inputs, {}, "invalid", "shape", {"scale": 0.5})]


def suite() -> SuiteSpec:
    """The suite attention/flash."""
    head = manifest_head(
        __name__,
        "attention/flash",
        "Exact causal attention with grouped heads, in any order of computation: outputs and log-sum-exp",
        HEADER,
        "lessons/01-forward-pass.md",
        op="attention.attend",
    )
    source = {"kind": "first_principles", "name": f"the header above, scores in fractions, exp with {DIGITS} digits"}
    groups = (_masks(), _ranges(), _rejected())
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in groups])
