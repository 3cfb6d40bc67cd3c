"""The suite kvcache/rotatekv. Ids are never reused: new cases take new numbers."""

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
)
from refllm.evaluate.golden.suites.rtn_notes import note

BITS = {"class": "bits", "zero_sign": "ignore"}
NEAR = {"class": "allclose", "rtol": 1e-5, "atol": 1e-5}  # sums of a few dozen float32
MARGIN = Fraction(1, 200)
Rows = list[list[Fraction]]
Heads = list[Rows]


def _hadamard(n: int) -> Rows:
    """Sylvester's matrix of n = 4^k over its root: entries +-2^-k."""
    sign = lambda i, j: -1 if (i & j).bit_count() % 2 else 1
    return [[Fraction(sign(i, j), 1 << (n.bit_length() // 2)) for j in range(n)] for i in range(n)]


def _turned(x: list[Fraction], size: int) -> list[Fraction]:
    """Every `size` neighbours times the matrix, which is symmetric and its own inverse."""
    H = _hadamard(size)
    parts = [x[i : i + size] for i in range(0, len(x), size)]
    return [sum((h * v for h, v in zip(row, part, strict=True)), Fraction(0)) for part in parts for row in H]


def _key_rows(x: Heads, heads: int) -> Rows:
    tokens = [[n for head in x for n in head[t]] for t in range(len(x[0]))]
    return [_turned(row, heads * len(x[0][0])) for row in tokens]


def _down(x: Fraction) -> Fraction:
    """The largest float16 that is at most x."""
    near, step = to_f16(x), Fraction(1, 1 << 24)
    while near > x:
        near, step = to_f16(x - step), 2 * step
    return near


def _group(x: list[Fraction], bits: int) -> tuple[list[int], Fraction, Fraction]:
    """Codes, scale, low; ValueError where a decision is close."""
    keep, levels = (Fraction(4, 5) if bits == 2 else 1), (1 << bits) - 1
    middle, half = (max(x) + min(x)) / 2, keep * (max(x) - min(x)) / 2
    x = [min(max(n, middle - half), middle + half) for n in x]
    low = _down(min(x))
    exact = (max(x) - low) / levels
    scale = to_f16(exact)
    steps = [min(max((n - low) / (scale or 1), Fraction(0)), Fraction(levels)) for n in x]
    away = [abs(s - s.numerator // s.denominator - Fraction(1, 2)) for s in steps]
    if min(x) != low:
        away.append(Fraction(1, 2) - f16_margin(min(x)))  # close to a float16, where "down" is a matter of rounding
    if min(*away, f16_margin(exact) if exact else Fraction(1)) < MARGIN:
        raise Unclear("close to a boundary")
    return [nearest(step) for step in steps], scale, low


def _coded(row: list[Fraction], size: int, bits: int) -> tuple[list, list, list, list[Fraction]]:
    """Packed codes, scales, lows and what they stand for."""
    groups = [_group(row[i : i + size], bits) for i in range(0, len(row), size)]
    codes = [c for group in groups for c in group[0]]
    back = [low + scale * c for of_group, scale, low in groups for c in of_group]
    return pack_low_first(codes, bits), [float(s) for _, s, _ in groups], [float(z) for *_, z in groups], back


def _keys(x: Heads, text: Heads, bits: int, group_size: int, heads: int) -> dict:
    D = len(x[0][0])
    sums = [sum(column) for column in zip(*_key_rows(text, heads), strict=True)]
    order = sorted(range(len(sums)), key=lambda c: sums[c])
    found = [_coded([row[c] for c in order], group_size, bits) for row in _key_rows(x, heads)]
    backs = [_turned([back[order.index(c)] for c in range(len(order))], heads * D) for *_, back in found]
    by_head = [[[float(n) for n in row[h * D : h * D + D]] for row in backs] for h in range(len(x))]
    part = lambda place: [token[place] for token in found]
    return {"order": order, "codes": part(0), "scale": part(1), "low": part(2), "x_hat": by_head}


def _values(x: Heads, bits: int) -> dict:
    D = len(x[0][0])
    found = [[_coded(_turned(token, D), D, bits) for token in head] for head in x]
    part = lambda place: [[token[place] for token in head] for head in found]
    backs = [[[float(n) for n in _turned(token[3], D)] for token in head] for head in found]
    return {"codes": part(0), "scale": part(1), "low": part(2), "x_hat": backs}


TYPES = {"order": "u16", "codes": "u8", "scale": "f16", "low": "f16", "x_hat": "f32"}


def _spec(id, comment, flags, only, x: Heads, text: Heads | None, recipes, bits, group_size=16, heads=4) -> CaseSpec:
    floats = lambda nested: [[[float(n) for n in token] for token in head] for head in nested]
    inputs = {"x": values("f32", floats(x), recipe=recipes[0])}
    if text is None:
        found, params = _values(x, bits), {"side": "v", "bits": bits}
    else:
        inputs["text"] = values("f32", floats(text), recipe=recipes[1])
        found = _keys(x, text, bits, group_size, heads)
        params = {"side": "k", "bits": bits, "group_size": group_size, "heads": heads}
    expected = {
        name: Output(NEAR if name == "x_hat" else BITS, values(TYPES[name], found[name])) for name in only.split()
    }
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _random(id, comment, flags, only, count, tokens, side="k", **knobs) -> CaseSpec:
    """Numbers of D = 4 channels, the first seed that keeps away from every rounding boundary."""

    def made(seed):
        nested = lambda drawn, n: [[[next(drawn) for _ in range(4)] for _ in range(n)] for _ in range(count)]
        x = nested(iter(dyadic(seed, 7, -4, count * tokens * 4)), tokens)
        text = nested(iter(dyadic(seed + 1, 6, -3, count * 2 * 4)), 2) if side == "k" else None
        recipes = dyadic_recipe(seed, 7, -4), dyadic_recipe(seed + 1, 6, -3)
        return _spec(id, comment, flags, only, x, text, recipes, **knobs)

    return first_clear(made, 100 * id)


def _turned_to(id, comment, flags, only, wanted: Rows, bits) -> CaseSpec:
    """Values that are these after turning: one head."""
    x = [[_turned([Fraction(n) for n in token], 4) for token in wanted]]
    return _spec(id, comment, flags, only, x, None, (None,), bits)


def suite() -> SuiteSpec:
    """The suite kvcache/rotatekv."""
    header = [
        "Inputs f32: x [Hk, tokens, D], one side of a cache; for keys text [Hk, n, D]. H_n: Sylvester's matrix over "
        "the root of n. Keys: the numbers of each `heads` heads of a token in one row times H; order u16: channels of "
        "all rows by their sum over the text, rising, equal ones as they stand; row[order] in groups of group_size. "
        "Values: every head times H, one group.",
        "Group: clipped to 0.8 of its range (2 bits; else all of it) about its middle; low = the largest float16 that "
        "is not above its smallest number; scale = f16((largest - low) / (2^bits - 1)); code = rint((x - low) / "
        "scale), 0 where scale is 0.",
        "Outputs: order; codes u8, one little-endian bit stream a row; scale, low f16, one a group; x_hat f32: low + "
        "scale code, in the old order, times H.",
    ]
    notes = {
        "Heads": note("LAYOUT", "Keys of several heads are turned by one matrix."),
        "Order": note("ORDER", "Channels by their signed sums, not by magnitude."),
        "Equal": note("ORDER", "Equal sums keep the order of the channels."),
        "Inverse": note("LAYOUT", "Reading takes the inverse of the order.", "Heads are scrambled."),
        "Clip": note("BASIC", "Two bits keep 0.8 of the range."),
        "Middle": note("DEGENERATE", "The range shrinks about its middle, not about 0.", "All numbers become one."),
        "Divisor": note("OFF_BY_ONE", "2^bits - 1 steps; bits^2 - 1 is right for 2 and 4 bits only."),
        "Low": note("ROUNDING", "The low end rounds down, so that no number is below it."),
        "Constant": note("DEGENERATE", "Equal numbers: the scale is 0 and all codes are."),
        "Values": note("LAYOUT", "Values are turned head by head."),
        "Packed": note("LAYOUT", "Low bits first."),
    }
    zeros = [[[Fraction(0)] * 4] for _ in range(4)]
    cases = [
        _random(1, "two groups of four heads", "Heads Order Inverse Clip", "order codes x_hat", 8, 1, bits=2),
        _random(2, "three bits", "Divisor Packed", "codes scale low", 4, 1, bits=3, group_size=8),
        _random(3, "values of two heads", "Values Low", "codes scale low x_hat", 2, 2, side="v", bits=2),
        _turned_to(4, "far from zero", "Middle", "codes low", [[10, Fraction(41, 4), Fraction(21, 2), 11]], 2),
        _turned_to(5, "equal numbers", "Constant", "codes scale low", [[10, 10, 10, 10]], 4),
        _spec(6, "equal sums", "Equal", "order", zeros, zeros, (None, None), 4),
    ]
    head = manifest_head(
        __name__,
        "kvcache/rotatekv",
        "Keys turned over several heads, channels in order of their sums, two bits a number",
        header,
        "lessons/29-random-rotations-of-caches.md",
    )
    source = {"kind": "first_principles", "name": "the header, in exact fractions rounded where it says so"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])
