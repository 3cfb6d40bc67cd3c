"""The suites model/rope and model/rope_permute. Ids are never reused and never renumbered."""

from decimal import Decimal, localcontext
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Input x, f32 [heads, T, D]; positions i64 [T], from 0. Params: layout; theta; factor, if given, divides the "
    "frequencies (linear scaling).",
    "Pair i (0 <= i < D/2) is the elements i and i + D/2 (layout half_split, as in Hugging Face), or 2 i and 2 i + 1 "
    "(interleaved, as in GGUF's llama and Meta's own code). At position p it turns by the angle p theta^(-2 i / D) / "
    "factor: (a, b) -> (a cos - b sin, a sin + b cos).",
    "Output: y f32 [heads, T, D]. Expected values are exact to float64. The bound holds for float32 throughout: an "
    "angle that takes 4 roundings is off by at most 4 u angle, so k = 12 times u times y_abs = (1 + angle) (|a| + "
    "|b|).",
]
PERMUTE_HEADER = [
    "Input w, f32 [rows, in]: a q or k projection, rows ordered by heads. Params: num_heads, num_kv_heads; tensor q or "
    "k; direction to_half_split or to_interleaved.",
    "Output permuted: the rows of each head reordered, so that rotating the other layout gives the same scores. q has "
    "num_heads heads, k has num_kv_heads. to_half_split: within a head of D rows, row 2 i goes to i and row 2 i + 1 to "
    "i + D/2; to_interleaved is the inverse.",
]
NOTES = {
    "RopeLayout": note(
        "LAYOUT",
        "Half-split and interleaved pairs are two layouts of one rotation: weights made for one do not fit the other.",
        "Fluent for a word or two, then noise; at position 0 everything is right.",
        "jzhang38/TinyLlama/issues/24",
    ),
    "Position": note(
        "OFF_BY_ONE",
        "Positions are absolute: a decode step goes on where the cache ends, and the first token has position 0.",
        "Every generated token believes to be the first.",
    ),
    "Theta": note("BASIC", "The base is a param: 10000, 500000, 1000000 are all in use."),
    "Frequency": note(
        "BASIC", "D = 8: four pairs, with frequencies theta^0, theta^(-1/4), theta^(-1/2), theta^(-3/4)."
    ),
    "LinearScaling": note("BASIC", "A factor divides the frequencies (position interpolation)."),
    "Heads": note("SHAPE", "All heads turn alike."),
    "Random": note("BASIC", "Dyadic random numbers."),
}
PERMUTE_NOTES = {
    "RopePermuteGqa": note(
        "LAYOUT",
        "k has fewer heads than q: permute it with its own number.",
        "Converted models write gibberish; without grouped queries it does not show.",
        "ggml-org/llama.cpp/pull/3364",
        "huggingface/transformers/pull/31788",
        "Dao-AILab/flash-attention/pull/546",
    ),
    "Direction": note("LAYOUT", "To GGUF and from GGUF are inverse to each other; with D = 4 they are the same."),
    "RopeLayout": note("LAYOUT", "Rows within a head change places; heads do not."),
    "Random": note("BASIC", "Every row has values of its own."),
}
_DIGITS = 50
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def _sine(x: Decimal) -> Decimal:
    x %= 2 * _PI
    term, total, n = x, x, 1
    while abs(term) > Decimal(10) ** -45:
        term *= -x * x / ((n + 1) * (n + 2))
        total, n = total + term, n + 2
    return total


def _decimal(x: float) -> Decimal:
    exact = Fraction(x)
    return Decimal(exact.numerator) / Decimal(exact.denominator)


def _turned(row: list[float], position: int, params: dict) -> tuple[list[float], list[float]]:
    """One head's vector at a position, and the reference size of each element."""
    D = len(row)
    y, y_abs = [0.0] * D, [0.0] * D
    for i in range(D // 2):
        first, second = (i, i + D // 2) if params["layout"] == "half_split" else (2 * i, 2 * i + 1)
        frequency = _decimal(params["theta"]) ** (Decimal(-2 * i) / D) / _decimal(params.get("factor", 1.0))
        angle = position * frequency
        sin, cos = _sine(angle), _sine(angle + _PI / 2)
        a, b = _decimal(row[first]), _decimal(row[second])
        y[first], y[second] = float(a * cos - b * sin), float(a * sin + b * cos)
        y_abs[first] = y_abs[second] = float((1 + abs(angle)) * (abs(a) + abs(b)))
    return y, y_abs


def _case(id, comment, flags, heads, D, positions, layout, theta=10000.0, **more) -> CaseSpec:
    seed, T = 700 + id, len(positions)
    flat = [float(x) for x in dyadic(seed, 8, -6, heads * T * D)]
    x = [[flat[(h * T + t) * D : (h * T + t + 1) * D] for t in range(T)] for h in range(heads)]
    params = {"layout": layout, "theta": theta, **more}
    with localcontext() as context:
        context.prec = _DIGITS
        done = [[_turned(row, p, params) for row, p in zip(head, positions, strict=True)] for head in x]
    part = lambda n: values("f64", [[one[n] for one in head] for head in done])
    bound = {"class": "dot_bound", "k": 12, "factor": 1, "abs_ref": "y_abs", "unit": "f32"}
    inputs = {"x": values("f32", x, recipe=dyadic_recipe(seed, 8, -6)), "positions": values("i64", positions)}
    expected = {"y": Output(bound, part(0)), "y_abs": Output({"class": "bits"}, part(1))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def suite() -> SuiteSpec:
    """The suite model/rope."""
    cases = [
        _case(1, "half-split, positions 0, 1, 7", "RopeLayout", 1, 4, [0, 1, 7], "half_split"),
        _case(2, "interleaved, positions 0, 1, 7", "RopeLayout", 1, 4, [0, 1, 7], "interleaved"),
        _case(3, "four pairs, half-split", "Frequency RopeLayout", 1, 8, [1, 2, 30], "half_split"),
        _case(4, "four pairs, interleaved", "Frequency RopeLayout", 1, 8, [1, 2, 30], "interleaved"),
        _case(5, "a decode step at position 7", "Position", 2, 4, [7], "half_split"),
        _case(6, "positions with a gap, in any order", "Position", 1, 4, [9, 2, 3], "half_split"),
        _case(7, "theta 1000000", "Theta", 1, 8, [0, 5, 63], "half_split", 1e6),
        _case(8, "theta 500000, interleaved", "Theta RopeLayout", 1, 8, [3, 40], "interleaved", 5e5),
        _case(9, "a factor of 4", "LinearScaling", 1, 8, [2, 31], "half_split", factor=4.0),
        _case(10, "three heads", "Heads Random", 3, 6, [0, 1, 2, 3, 4], "half_split"),
    ]
    source = {"kind": "first_principles", "name": "the header above, sines with 45 digits"}
    head = _head("rope", "model.rope.apply", "Rotary position embedding in both layouts", HEADER)
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases)])


def _head(name: str, op: str, title: str, header: list[str]) -> dict:
    return manifest_head(__name__, f"model/{name}", title, header, "lessons/01-forward-pass.md", op=op)


def _permuted(id, comment, flags, heads, kv_heads, tensor, D, direction) -> CaseSpec:
    own = heads if tensor == "q" else kv_heads
    w = [[float(100 * h + r), float(-r)] for h in range(own) for r in range(D)]
    out = [[0.0, 0.0]] * len(w)
    for h in range(own):
        for i in range(D // 2):
            for k in range(2):
                interleaved, half = h * D + 2 * i + k, h * D + i + k * (D // 2)
                old, new = (interleaved, half) if direction == "to_half_split" else (half, interleaved)
                out[new] = w[old]
    params = {"num_heads": heads, "num_kv_heads": kv_heads, "tensor": tensor, "direction": direction}
    expected = {"permuted": Output({"class": "bits"}, values("f32", out))}
    return CaseSpec(id, comment, tuple(flags.split()), {"w": values("f32", w)}, expected, params=params)


def permute_suite() -> SuiteSpec:
    """The suite model/rope_permute."""
    to, back = "to_half_split", "to_interleaved"
    cases = [
        _permuted(1, "q, 4 heads", "RopeLayout", 4, 2, "q", 8, to),
        _permuted(2, "k, 2 of 4 heads, from GGUF", "RopePermuteGqa", 4, 2, "k", 8, to),
        _permuted(3, "k, 2 of 4 heads, to GGUF", "RopePermuteGqa Direction", 4, 2, "k", 8, back),
        _permuted(4, "k, 2 of 6 heads", "RopePermuteGqa", 6, 2, "k", 12, to),
        _permuted(5, "k, 4 of 8 heads, to GGUF", "RopePermuteGqa", 8, 4, "k", 8, back),
        _permuted(6, "k, one head for all", "RopePermuteGqa Direction", 4, 1, "k", 8, to),
        _permuted(7, "q, to GGUF", "Direction", 3, 3, "q", 6, back),
        _permuted(8, "k without grouped queries", "Random", 4, 4, "k", 8, to),
    ]
    source = {"kind": "first_principles", "name": "the header above, row by row"}
    title = "Rows of q and k projections between the two layouts of rotary embedding"
    head = _head("rope_permute", "model.rope.permute", title, PERMUTE_HEADER)
    return SuiteSpec(head, PERMUTE_NOTES, [({"params": {}, "source": source}, cases)])
