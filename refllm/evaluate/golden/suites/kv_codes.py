"""The suites of caches that code every token by itself. Ids are never reused: new cases take new numbers.

kvcache/qserve, kvcache/llmqat, kvcache/kvtuner.
"""

from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import (
    Unclear,
    dyadic,
    dyadic_recipe,
    f16_margin,
    first_clear,
    nearest,
    pack_low_first,
    to_f16,
    to_f32,
)
from refllm.evaluate.golden.suites.rtn_notes import note

BITS = {"class": "bits"}
CODES = {"class": "bits", "zero_sign": "ignore"}
MARGIN = Fraction(1, 1000)
Heads = list[list[list[Fraction]]]  # of tokens of numbers


def _away(x: Fraction) -> Fraction:
    """How far x lies from the middle of two whole numbers."""
    return abs(x - x.numerator // x.denominator - Fraction(1, 2))


def _drawn(seed: int, heads: int, tokens: int, dim: int) -> tuple[Heads, dict]:
    flat = iter(dyadic(seed, 8, -5, heads * tokens * dim))
    nested = [[[next(flat) for _ in range(dim)] for _ in range(tokens)] for _ in range(heads)]
    return nested, dyadic_recipe(seed, 8, -5)


def _given(nested) -> Heads:
    return [[[Fraction(x) for x in token] for token in head] for head in nested]


def _array(dtype: str, nested, recipe: dict | None = None):
    floats = [[[float(x) for x in token] for token in head] for head in nested]
    return values(dtype, floats, recipe=recipe)


def _clear(made, start: int) -> CaseSpec:
    """The first seed that keeps away from every rounding boundary."""

    return first_clear(made, start)


def _check(id: int, margins: list[Fraction], near: bool) -> None:
    if not near and min(margins, default=Fraction(1, 2)) < MARGIN:
        raise Unclear(f"case {id}: a value lies {float(min(margins)):.2g} steps from a rounding boundary")


def _suite(name: str, title: str, header: list[str], notes: dict, cases: list[CaseSpec]) -> SuiteSpec:
    head = manifest_head(__name__, f"kvcache/{name}", title, header, "lessons/27-quantised-caches.md")
    source = {"kind": "first_principles", "name": "the header, in exact fractions rounded where it says so"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


# --- qserve ----------------------------------------------------------------------------------------------------------


def _qserve_head(x: list[Fraction], bits: int, margins: list) -> tuple[list[int], Fraction, Fraction]:
    levels = (1 << bits) - 1
    exact = (max(x) - min(x)) / levels
    scale = to_f16(exact)
    if scale:
        margins.append(f16_margin(exact))
        try:
            zero = to_f16(-min(x) / scale)
        except OverflowError:
            scale = Fraction(0)
    if not scale:
        return [0] * len(x), to_f16((max(x) + min(x)) / 2), Fraction(-1)
    margins.append(f16_margin(-min(x) / scale) if min(x) else Fraction(1, 2))
    steps = [min(max(number / scale + zero, Fraction(0)), Fraction(levels)) for number in x]
    margins += map(_away, steps)
    return [nearest(step) for step in steps], scale, zero


def _qserve(id, comment, flags, x: Heads, bits=4, *, near=False, recipe=None, only="") -> CaseSpec:
    margins: list[Fraction] = []
    stored = [[_qserve_head(token, bits, margins) for token in head] for head in x]
    _check(id, margins, near)
    back = [[[to_f32((c - z) * s) for c in codes] for codes, s, z in head] for head in stored]
    part = lambda place: [[[token[place]] for token in head] for head in stored]
    packed = [[pack_low_first(token[0], bits) for token in head] for head in stored]
    expected = {
        "codes": Output(BITS, values("u8", packed)),
        "scale": Output(CODES, _array("f16", part(1))),
        "zero": Output(CODES, _array("f16", part(2))),
        "x_hat": Output(CODES, _array("f32", back)),
    }
    expected = {name: output for name, output in expected.items() if not only or name in only.split()}
    return CaseSpec(id, comment, tuple(flags.split()), {"x": _array("f32", x, recipe)}, expected, params={"bits": bits})


def _qserve_random(id, comment, flags, heads, tokens, dim, bits, only="") -> CaseSpec:
    def made(seed):
        x, recipe = _drawn(seed, heads, tokens, dim)
        return _qserve(id, comment, flags, x, bits, recipe=recipe, only=only)

    return _clear(made, 100 * id)


def qserve_suite() -> SuiteSpec:
    """The suite kvcache/qserve."""
    header = [
        "Input x f32 [heads, tokens, D], one side of a cache. Every head of every token by itself: s = f16((max - min) "
        "/ (2^bits - 1)), z = f16(-min / s), code = rint(clip(x / s + z, 0, 2^bits - 1)), halves to even; decoded "
        "f32((code - z) * s). All else is exact (float64 is enough).",
        "Where s is 0 or z beyond float16: s = f16((max + min) / 2), z = -1, codes 0.",
        "Outputs: codes u8, one little-endian bit stream a head; scale, zero f16 [heads, tokens, 1]; x_hat f32.",
    ]
    notes = {
        "Zero": note("ROUNDING", "The zero is not a whole number.", "Half a step lost."),
        "Stored": note("PRECISION", "z and the codes are computed with the s that is stored."),
        "Head": note("LAYOUT", "Every head of every token has its own s and z."),
        "Divisor": note("OFF_BY_ONE", "The range is divided by 2^bits - 1."),
        "Packed": note("LAYOUT", "The first code of a byte is in its low bits."),
        "Constant": note("DEGENERATE", "Equal numbers: no 0 / 0."),
        "Narrow": note("OVERFLOW", "z would be infinite in float16."),
        "Ties": note("ROUNDING", "Halves to the even code."),
    }
    loud = _given([[[60.0, 61.9375, 60.6875]]])
    equal = _given([[[3.5, 3.5, 3.5], [1000, 1000.0625, 1000.125]]])
    cases = [
        _qserve(1, "steps of a half", "Divisor Ties", _given([[[-0.5, 0.75, 7.0]]]), near=True, only="codes x_hat"),
        _qserve_random(2, "two heads", "Zero Head Packed", 2, 1, 4, 4),
        _qserve(3, "far from zero", "Stored", loud, 8, only="codes zero"),
        _qserve(4, "equal numbers, and nearly", "Constant Narrow", equal, near=True, only="scale zero x_hat"),
    ]
    return _suite("qserve", "Four bits a token and head, the zero a fraction", header, notes, cases)


# --- llmqat ----------------------------------------------------------------------------------------------------------


def _llmqat(id, comment, flags, x: Heads, bits, *, near=False, recipe=None, only="") -> CaseSpec:
    most = (1 << (bits - 1)) - 1
    tokens = range(len(x[0]))
    steps = [to_f32(max(abs(n) for head in x for n in head[t]) / most) for t in tokens]
    ratios = [[[n / (steps[t] or 1) for n in head[t]] for t in tokens] for head in x]
    margins = [_away(r) for head in ratios for token in head for r in token]
    _check(id, margins, near)
    codes = [[[min(max(nearest(r), -most), most) for r in token] for token in head] for head in ratios]
    back = [[[to_f32(c * steps[t]) for c in head[t]] for t in tokens] for head in codes]
    packed = [[pack_low_first([c + most for c in token], bits) for token in head] for head in codes]
    gradient = [[[int(abs(n) < 2) for n in token] for token in head] for head in x]
    expected = {
        "codes": Output(BITS, values("u8", packed)),
        "step": Output(BITS, values("f32", [float(s) for s in steps])),
        "x_hat": Output(CODES, _array("f32", back)),
        "gradient": Output(CODES, _array("f32", gradient)),
    }
    expected = {name: output for name, output in expected.items() if not only or name in only.split()}
    return CaseSpec(id, comment, tuple(flags.split()), {"x": _array("f32", x, recipe)}, expected, params={"bits": bits})


def llmqat_suite() -> SuiteSpec:
    """The suite kvcache/llmqat."""
    header = [
        "Input x f32 [heads, tokens, D], one side of a cache before RoPE. A token, all its heads together: q = 2^(bits "
        "- 1) - 1, step = f32(largest magnitude / q), code = clip(rint(x / step), -q, q), halves to even; decoded "
        "f32(step * code); a step of 0 gives codes 0. All else is exact (float64 is enough).",
        "Outputs: codes u8, code + q as one little-endian bit stream a head; step f32 [tokens]; x_hat f32; gradient "
        "f32, of the sum of x_hat: 1 where |x| < 2, else 0.",
    ]
    notes = {
        "Heads": note("LAYOUT", "One step for all heads of a token.", "Errors too small."),
        "Tokens": note("LAYOUT", "Every token has a step of its own."),
        "Divisor": note("OFF_BY_ONE", "The largest magnitude is code q = 2^(bits - 1) - 1."),
        "Offset": note("LAYOUT", "q is added before packing."),
        "Gradient": note("BASIC", "Straight through, but nothing from magnitude 2 on.", "Gradients that never stop."),
        "Limit": note("OFF_BY_ONE", "At exactly 2 there is no gradient, and the value is not clipped."),
        "ZeroToken": note("DEGENERATE", "A token of zeros."),
        "Ties": note("ROUNDING", "Halves to the even code."),
    }

    def drawn(seed):
        x, recipe = _drawn(seed, 2, 2, 4)
        return _llmqat(2, "two heads, two tokens", "Heads Tokens Gradient Offset", x, 4, recipe=recipe)

    hand = _given([[[7.0, -2.5, 0.5]], [[1.5, 2.0, -1.96875]]])
    cases = [
        _llmqat(1, "a step of one", "Divisor Ties Limit", hand, 4, near=True, only="x_hat gradient"),
        _clear(drawn, 200),
        _llmqat(3, "zeros", "ZeroToken", _given([[[0, 0], [3, 1]]]), 3, near=True, only="codes step"),
    ]
    return _suite("llmqat", "Signed codes, one step for all heads of a token, and the gradient", header, notes, cases)


# --- kvtuner ---------------------------------------------------------------------------------------------------------

PAIRS = [(k, v) for k in (2, 4, 8) for v in (2, 4, 8)]


def _beaten(errors: list[int], i: int) -> bool:
    """Whether a pair has no more bits and no larger error than pair i, and is better in one, or comes first."""
    rank = lambda j: (sum(PAIRS[j]), errors[j])
    others = [j for j in range(9) if j != i and all(a <= b for a, b in zip(rank(j), rank(i), strict=True))]
    return any(rank(j) != rank(i) or j < i for j in others)


def _tuned(fronts: list[tuple], loss: list[list[int]], bits: Fraction, trials: int) -> list[int]:
    """The place of every layer's pair."""
    kinds = sorted(set(fronts), key=fronts.index)
    layers_of = [[i for i, f in enumerate(fronts) if f == kind] for kind in kinds]

    def rank(way):
        at = [way[kinds.index(f)] for f in fronts]
        price = sum(loss[i][p] for i, p in enumerate(at))
        return price, Fraction(sum(sum(PAIRS[p]) for p in at), 2 * len(at)), [PAIRS[p] for p in at]

    ways = [[]]
    for kind in kinds:
        ways = [[*way, p] for way in ways for p in kind]
    if len(ways) <= trials:
        best = min((way for way in ways if rank(way)[1] <= bits), key=rank)
    else:
        best = [kind[0] for kind in kinds]
        while rank(best)[1] > bits:
            price, used, _ = rank(best)
            steps = []
            for g, kind in enumerate(kinds):
                for lower in kind[kind.index(best[g]) + 1 :][:1]:
                    way = [*best[:g], lower, *best[g + 1 :]]
                    then, after, pairs = rank(way)
                    steps.append((Fraction(then - price) / (used - after), after, pairs, way))
            best = min(steps)[3]
    of_layer = {i: best[g] for g, layers in enumerate(layers_of) for i in layers}
    return [of_layer[i] for i in range(len(fronts))]


def _kvtuner(id, comment, flags, errors, loss, bits, trials, only="front pairs") -> CaseSpec:
    fronts = []
    for row in errors:
        kept = [i for i in range(9) if not _beaten(row, i)]
        fronts.append(tuple(sorted(kept, key=lambda i: -sum(PAIRS[i]))))
    chosen = _tuned(fronts, loss, Fraction(bits), trials)
    expected = {
        "front": Output(BITS, values("u8", [[int(i in f) for i in range(9)] for f in fronts])),
        "pairs": Output(BITS, values("i64", [list(PAIRS[i]) for i in chosen])),
    }
    expected = {name: output for name, output in expected.items() if name in only.split()}
    inputs = {"errors": values("f32", errors), "loss": values("f32", loss)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"bits": bits, "trials": trials})


def kvtuner_suite() -> SuiteSpec:
    """The suite kvcache/kvtuner."""
    header = [
        "Inputs f32 [layers, 9], the pairs (K, V) in the order 2.2 2.4 2.8 4.2 4.4 4.8 8.2 8.4 8.8: errors of outputs; "
        "loss, to be added up over the layers.",
        "front u8 [layers, 9]: 1 unless another pair has no more bits K + V and no larger error, and is better in one "
        "or comes first. Layers of the same front are a group and take one pair of it; C = sum of K + V / (2 layers).",
        "pairs i64 [layers, 2]: up to `trials` ways: least loss with C <= bits. Else greedy: all begin with most bits; "
        "while C > bits the group whose next pair costs least loss for the C saved takes it. Of equals: less C, then "
        "the list of pairs that comes first.",
    ]
    notes = {
        "Front": note("BASIC", "Only pairs that no other beats."),
        "Equal": note("DEGENERATE", "More bits that buy nothing are beaten."),
        "Group": note("LAYOUT", "Layers of the same front share a decision."),
        "Weighted": note("OFF_BY_ONE", "C counts layers, not groups."),
        "Limit": note("OFF_BY_ONE", "C may be equal to the limit."),
        "Exhaustive": note("ORDER", "Few ways: all of them are tried."),
        "Greedy": note("ORDER", "Many ways: least loss for the C saved, not the least loss."),
        "Ties": note("DEGENERATE", "Of equal losses the one with less C."),
    }
    long, short = [9, 8, 8, 6, 4, 3, 6, 2, 1], [9, 5, 5, 7, 3, 3, 7, 3, 1]
    a, b = [60, 40, 40, 30, 20, 9, 30, 8, 0], [90, 50, 50, 50, 30, 30, 50, 30, 0]
    three = [
        [51, 38, 30, 18, 16, 10, 4, 2, 0],
        [58, 54, 48, 43, 38, 37, 36, 32, 30],
        [56, 51, 48, 40, 33, 33, 23, 16, 0],
    ]
    cases = [
        _kvtuner(1, "two groups", "Front Equal Group Exhaustive Weighted Limit", [long, short, long], three, 5.0, 99),
        _kvtuner(2, "greedy", "Greedy", [long, short], [a, b], 5.0, 1, "pairs"),
        _kvtuner(3, "equal losses", "Ties", [long], [[1] * 9], 8.0, 99, "pairs"),
    ]
    return _suite("kvtuner", "Bits of keys and of values by layer", header, notes, cases)
