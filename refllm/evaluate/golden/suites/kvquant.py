"""The suites kvcache/kvquant and kvcache/kvquant_learn. Ids are never reused: new cases take new numbers."""

from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import (
    Unclear,
    dyadic,
    dyadic_recipe,
    f16_margin,
    first_clear,
    pack_low_first,
    to_f16,
    to_f32,
)
from refllm.evaluate.golden.suites.rtn_notes import note

BITS = {"class": "bits"}
CODES = {"class": "bits", "zero_sign": "ignore"}
NEAR = {"class": "allclose", "rtol": 1e-5, "atol": 1e-6}
MARGIN = Fraction(1, 200)
Rows = list[list[Fraction]]  # tokens of all their channels


def _fractions(nested) -> Rows:
    return [[Fraction(x) for x in row] for row in nested]


def _floats(nested: Rows) -> list[list[float]]:
    return [[float(x) for x in row] for row in nested]


def _rows(heads: list[Rows]) -> Rows:
    """[Hk][T][D] -> [T][Hk D]."""
    return [[x for head in heads for x in head[token]] for token in range(len(heads[0]))]


def _quantile(x: list[Fraction], q: Fraction) -> Fraction:
    x = sorted(x)
    place = q * (len(x) - 1)
    i = min(int(place), len(x) - 2)
    return x[i] + (x[i + 1] - x[i]) * (place - i)


def _percentiles(x: list[Fraction], outliers: Fraction) -> tuple[Fraction, Fraction]:
    return _quantile(x, outliers / 2), _quantile(x, 1 - outliers / 2)


def _check(margin: Fraction, what: str) -> None:
    if margin < MARGIN:
        raise Unclear(f"{what} lies near a rounding boundary")


def _f16(x: Fraction, near: bool = False) -> Fraction:
    if x and not near:
        _check(f16_margin(x), "a float16")
    return to_f16(x)


def _clear(made, start: int) -> CaseSpec:
    """The first seed that keeps away from every rounding boundary."""

    return first_clear(made, start)


def _suite(name: str, title: str, header: list[str], notes: dict, cases: list[CaseSpec]) -> SuiteSpec:
    head = manifest_head(
        __name__,
        f"kvcache/{name}",
        title,
        header,
        "lessons/30-learned-caches.md",
        op=f"kvcache.{name.replace('_', '.')}",
    )
    source = {"kind": "first_principles", "name": "the header, in exact fractions, roots with 40 digits"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


# --- kvquant ---------------------------------------------------------------------------------------------------------


def _far(x: Fraction, low: Fraction, high: Fraction) -> Fraction:
    spread = (high - low) / 2
    return abs(x - (low + high) / 2) / spread if spread else Fraction(10**9)


def _key_token(x: list[Fraction], ranges: list[tuple[Fraction, Fraction]], outliers, cap: int):
    apart = []
    for beyond in (lambda n, r: n > r[1], lambda n, r: n < r[0]):
        places = [i for i, n in enumerate(x) if outliers and beyond(n, ranges[i])]
        places.sort(key=lambda i: (-_far(x[i], *ranges[i]), i))
        apart += places[:cap] if cap else places
    return sorted(apart), [((a + b) / 2, (b - a) / 2) for a, b in ranges]


def _value_token(x: list[Fraction], outliers: Fraction, near: bool):
    apart, rest = [], x
    if outliers:
        low, high = _percentiles(x, outliers)
        middle = sorted(x)[(len(x) - 1) // 2]
        apart = [i for i, n in enumerate(x) if (n <= low or n >= high) and n != middle]
        rest = [middle if i in apart else n for i, n in enumerate(x)]
    own = _f16((max(rest) + min(rest)) / 2, near), _f16((max(rest) - min(rest)) / 2, near)
    return apart, [own] * len(x)


def _token(x, apart: list[int], limits, table: Rows, near: bool) -> tuple[list[int], list[Fraction], list[Fraction]]:
    codes, rests, back = [], [], []
    middles = [(a + b) / 2 for a, b in pairwise(table[0])]
    for i, (n, (offset, spread)) in enumerate(zip(x, limits, strict=True)):
        if i in apart:
            rests.append(_f16(n - offset, near))
            codes.append(0)
            back.append(offset + rests[-1])
            continue
        u = (n - offset) / spread if spread else Fraction(-(10**9))
        if spread and not near:
            _check(min(abs(u - m) for m in middles), "a number between two entries")
        codes.append(sum(u > m for m in middles))
        back.append(offset + spread * table[-1][codes[-1]])
    return codes, rests, back


def _side(side: str, rows: Rows, split, table: Rows, bits: int, near: bool) -> dict[str, tuple[str, list]]:
    packed, counts, places, rests, backs, own = [], [], [], [], [], []
    for x in rows:
        apart, limits = split(x)
        codes, rest, back = _token(x, apart, limits, table, near)
        packed.append(pack_low_first(codes, bits))
        counts.append(len(apart))
        places += apart
        rests += rest
        backs.append([float(to_f32(n)) for n in back])
        own.append(limits[0])
    found = {"codes": ("u8", packed), "hat": ("f32", backs)}
    if places:
        found |= {"counts": ("u8", counts), "places": ("u8", places), "rest": ("f16", [float(n) for n in rests])}
    if side == "v":
        found |= {name: ("f16", [float(o[i]) for o in own]) for i, name in enumerate(("offset", "spread"))}
    return {f"{side}_{name}": found[name] for name in found}


def _case(id, comment, flags, x, k_range, tables, only, *, bits=2, outliers=0.25, cap=0, near=False) -> CaseSpec:
    """A case; x [Hk][T][D], or (Hk, T, D, bits of a number, exponent) of numbers that are drawn."""

    def made(seed: int) -> CaseSpec:
        heads, recipe = x, None
        if isinstance(x, tuple):
            Hk, T, D, *shape = x
            flat = iter(dyadic(seed, *shape, Hk * T * D))
            heads, recipe = [[[next(flat) for _ in range(D)] for _ in range(T)] for _ in range(Hk)], None
            recipe = dyadic_recipe(seed, *shape)
        heads = [_fractions(head) for head in heads]
        rows, share = _rows(heads), Fraction(outliers)
        ranges = list(zip(*_fractions(k_range), strict=True))
        table = {side: _fractions(rows_of) for side, rows_of in zip("kv", tables, strict=True)}
        found = _side("k", rows, lambda t: _key_token(t, ranges, share, cap), table["k"], bits, near)
        found |= _side("v", rows, lambda t: _value_token(t, share, near), table["v"], bits, near)
        inputs = {
            "x": values("f32", [_floats(head) for head in heads], recipe=recipe),
            "k_range": values("f16", k_range),
            "k_table": values("f32", tables[0]),
            "v_table": values("f32", tables[1]),
        }
        expected = {
            name: Output(CODES if dtype == "f32" else BITS, values(dtype, found[name][1]))
            for name, (dtype, _) in found.items()
            if name in only.split()
        }
        params = {"bits": bits, "outliers": outliers, "cap": cap}
        return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)

    return _clear(made, 100 * id)


UNEVEN = [[-1.0, -0.25, 0.375, 0.875]]
OTHER = [[-0.875, -0.5, 0.25, 1.0]]
EIGHT = [[-4.0, -3.5, -4.5, -1.0, -4.0, -2.0, 0.5, -3.0], [3.0, 4.0, 2.5, 5.0, 4.5, 1.0, 4.0, 3.75]]


def kvquant_suite() -> SuiteSpec:
    """The suite kvcache/kvquant."""
    header = [
        "x f32 [Hk, T, D] is one side of a cache; outputs k_ take it for keys (before RoPE), v_ for values. All "
        "Hk D channels of a token are a row, head after head. k_range f16 [2, Hk D]: lower and upper limits of "
        "the channels; tables f32 [1 or 2, 2^bits], the first row rising. The first tokens and the last are not "
        "kept in full.",
        "Keys: offset and spread of a channel are (high + low) / 2 and (high - low) / 2. Outlier: x > high or x < "
        "low; with cap above 0 at most so many above and so many below in a token, the largest |x - offset| / "
        "spread, the first of equals.",
        "Values: outlier where x is at or beyond the percentiles outliers / 2 and 1 - outliers / 2 of its token "
        "(linear between neighbours), unless it equals the token's median (the lower of two). max and min of the "
        "token with outliers replaced by the median give v_offset f16((max + min) / 2) and v_spread f16((max - "
        "min) / 2).",
        "outliers = 0: none on either side. u = (x - offset) / spread with what is stored; codes u8: the nearest "
        "entry of the first row, halfway the lower; 0 where x is an outlier or the spread is 0; one little-endian "
        "bit stream a token. counts: outliers of each token; places: their channels, rest: f16(x - offset), token "
        "by token, channels rising. hat f32: offset + spread * (last row)[code], of outliers offset + rest; as "
        "rows [T, Hk D].",
    ]
    notes = {
        "Channels": note("LAYOUT", "A row has the channels of all heads, head after head; so has its range."),
        "Offline": note("BASIC", "Keys take the limits that were learned, not percentiles of what is there now."),
        "Strict": note("OFF_BY_ONE", "A key on its limit is no outlier."),
        "Inclusive": note("OFF_BY_ONE", "A value on the percentile is an outlier."),
        "Range": note("BASIC", "Outliers do not widen the range of a token's values."),
        "Offset": note("BASIC", "What is stored of an outlier is x - offset; the offset is added again."),
        "Zero": note("ORDER", "A code under an outlier adds nothing: no entry of the table is 0."),
        "Order": note("LAYOUT", "Outliers stand token by token, not channel by channel."),
        "Packed": note("LAYOUT", "Low bits first."),
        "Stored": note("PRECISION", "Codes and rests are computed with the offset and spread that are stored."),
        "Norm": note("ORDER", "Q-Norm: the first row decides, the second one decodes."),
        "Cap": note("BASIC", "The farthest outliers stay, counted in spreads; the others take the end of the table."),
        "Constant": note("DEGENERATE", "Equal numbers have spread 0 and come back as the offset, without outliers."),
        "Ties": note("ROUNDING", "A number halfway between two entries takes the lower one."),
        "NoOutliers": note("BASIC", "Without outliers, what is beyond takes the end of the table."),
    }
    side = lambda *names: " ".join(f"{s}_{n}" for n in names for s in "kv")
    limits = [[-2.0, -1.0, 0.0, -4.0, -1.0], [2.0, 3.0, 4.0, 4.0, 1.0]]
    cases = [
        _case(
            1,
            "two heads, two tokens",
            "Channels Offline Range Offset Zero Order Packed",
            (2, 2, 4, 8, -4),
            EIGHT,
            (UNEVEN, OTHER),
            side("codes", "places", "hat") + " k_rest",
        ),
        _case(
            2,
            "numbers on the limits",
            "Strict Inclusive",
            [[[2.0, 3.25, 0.0, -4.0, 0.5], [-2.0, 1.0, 4.5, 4.0, -1.5]]],
            limits,
            (UNEVEN, OTHER),
            side("counts", "places"),
            outliers=0.5,
        ),
        _case(
            3,
            "far from zero, three-bit codes",
            "Stored",
            [[[101.34375, 98.8125, 99.59375, 100.453125, 100.15625, 97.0, 103.53125, 99.046875]]],
            [[98.0] * 8, [102.0] * 8],
            ([[-1.0, -0.75, -0.375, -0.125, 0.125, 0.375, 0.75, 1.0]],) * 2,
            "k_rest v_rest v_codes v_offset",
            bits=3,
            outliers=0.125,
            near=True,
        ),
        _case(
            4,
            "Q-Norm",
            "Norm",
            (2, 1, 4, 6, -3),
            EIGHT,
            ([*UNEVEN, [-1.125, -0.25, 0.5, 1.0]], [*OTHER, [-1.0, -0.625, 0.25, 1.125]]),
            "k_codes k_hat v_hat",
        ),
        _case(
            5,
            "more outliers than the cap",
            "Cap",
            [[[3.0, 5.0, 6.25, -5.0, -1.5]]],
            limits,
            (UNEVEN, UNEVEN),
            "k_places k_hat",
            cap=1,
        ),
        _case(
            6,
            "equal numbers, and a channel that never moves",
            "Constant",
            [[[0.75] * 5, [0.75, 0.25, -1.0, 3.0, 0.5]]],
            [[0.75, -1.0, 0.0, -4.0, -1.0], [0.75, 3.0, 4.0, 4.0, 1.0]],
            (UNEVEN, OTHER),
            "k_places k_hat v_counts v_hat",
            near=True,
        ),
        _case(
            7,
            "numbers halfway, no outliers",
            "Ties NoOutliers",
            [[[0.75, 0.0, 1.25, -3.0, 1.0, 0.0, -1.0, 0.0]]],
            [[-2.0] * 8, [2.0] * 8],
            ([[-1.0, -0.25, 0.25, 1.0]], [[-0.75, -0.25, 0.25, 0.75]]),
            side("codes"),
            near=True,
            outliers=0,
        ),
    ]
    return _suite("kvquant", "Keys by channel, values by token, a table, outliers apart", header, notes, cases)


# --- what is learned -------------------------------------------------------------------------------------------------


def _outward(x: Fraction, up: bool) -> Fraction:
    """The float16 on that side."""
    near = to_f16(x)
    if (near < x) if up else (near > x):
        near = Fraction(float(np.nextafter(np.float16(float(near)), np.float16(np.inf if up else -np.inf))))
    return near


def _root(x: Fraction) -> Fraction:
    with localcontext() as context:
        context.prec = 40
        return Fraction((Decimal(x.numerator) / Decimal(x.denominator)).sqrt())


def _best(points: list[tuple[Fraction, Fraction]], clusters: int) -> list[Fraction]:
    """Means of the intervals with the least weighted squared error; ValueError if others come near."""
    points = sorted(points)

    def interval(i, j):
        weight = sum(w for _, w in points[i:j])
        mean = sum(w * u for u, w in points[i:j]) / weight
        return sum(w * (u - mean) ** 2 for u, w in points[i:j]), mean

    of = {(i, j): interval(i, j) for i in range(len(points)) for j in range(i + 1, len(points) + 1)}
    ways = []
    for cuts in combinations(range(1, len(points)), clusters - 1):
        parts = [of[part] for part in pairwise((0, *cuts, len(points)))]
        ways.append((sum(error for error, _ in parts), [mean for _, mean in parts]))
    ways.sort()
    if ways[1][0] < ways[0][0] * (1 + MARGIN):
        raise Unclear("another table is as good")
    return ways[0][1]


def _moments(x: list[Fraction]) -> tuple[Fraction, Fraction]:
    mean = sum(x) / len(x)
    return mean, _root(sum((n - mean) ** 2 for n in x) / len(x))


def _table(points: list[tuple[Fraction, Fraction]], bits: int, norm: bool) -> Rows:
    table = _best(points, 1 << bits)
    if not norm:
        return [table]
    mean, deviation = _moments([u for u, _ in points])
    coded, narrowed = _moments([min(table, key=lambda c: abs(c - u)) for u, _ in points])
    return [table, [(c - coded) * deviation / narrowed + mean for c in table]]


def _learned(k: Rows, v: Rows, fk: Rows, fv: Rows, bits: int, outliers: Fraction, norm: bool) -> dict:
    exact = [_percentiles(list(channel), outliers) for channel in zip(*k, strict=True)]
    limits = [(_outward(low, False), _outward(high, True)) for low, high in exact]
    found = {"k_range": [list(row) for row in zip(*limits, strict=True)]}
    for side, rows, weights in (("k", k, fk), ("v", v, fv)):
        points = []
        for row, squares in zip(rows, weights, strict=True):
            ends = limits if side == "k" else [_percentiles(row, outliers)] * len(row)
            for x, weight, (low, high) in zip(row, squares, ends, strict=True):
                if min(abs(x - low), abs(x - high)) * 200 < high - low:
                    raise Unclear("a number on its limit")
                if low < x < high:
                    points.append(((2 * x - low - high) / (high - low), weight))
        found[f"{side}_table"] = _table(points, bits, norm)
    return found


def _learn_case(id, comment, flags, shape, number, *, bits=1, outliers=0.25, sinks=0, norm=False) -> CaseSpec:
    windows, Hk, T, D = shape
    size = windows * Hk * T * D

    def made(seed: int) -> CaseSpec:
        flat, rows = {}, {}
        for n, name in enumerate(("k", "v", "k_squares", "v_squares")):
            drawn = dyadic(seed + n, 8, -4, size) if n > 1 else dyadic(seed + n, *number, size)
            flat[name] = [abs(x) + Fraction(1, 16) for x in drawn] if n > 1 else drawn
            at = iter(flat[name])
            nested = [[[[next(at) for _ in range(D)] for _ in range(T)] for _ in range(Hk)] for _ in range(windows)]
            rows[name] = [token for window in nested for token in _rows(window)[sinks:]]
        found = _learned(*rows.values(), bits, Fraction(outliers), norm)
        inputs = {}
        for n, (name, numbers) in enumerate(flat.items()):
            array = np.array([float(x) for x in numbers]).reshape(shape)
            inputs[name] = values("f32", array, **({} if n > 1 else {"recipe": dyadic_recipe(seed + n, *number)}))
        expected = {"k_range": Output(BITS, values("f16", _floats(found["k_range"])))}
        for name in ("k_table", "v_table"):
            expected[name] = Output(NEAR, values("f32", [[float(to_f32(c)) for c in row] for row in found[name]]))
        params = {"bits": bits, "outliers": outliers, "sinks": sinks, "norm": norm}
        return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)

    return _clear(made, 1000 * id)


def learn_suite() -> SuiteSpec:
    """The suite kvcache/kvquant_learn."""
    header = [
        "k, v f32 [windows, Hk, T, D]: what one layer's cache is handed on a calibration text, keys before RoPE; "
        "k_squares, v_squares: squared gradients of the loss. The first `sinks` tokens of every window are left "
        "out.",
        "k_range f16 [2, Hk D]: percentiles outliers / 2 and 1 - outliers / 2 of every channel over all tokens, "
        "linear between neighbours, rounded outwards. Limits of values: the same percentiles of every token, not "
        "rounded. Within its limits a number is u = (x - (high + low) / 2) / ((high - low) / 2).",
        "k_table, v_table f32 [1, 2^bits], rising: the entries with the least sum of square * (u - nearest "
        "entry)^2 over all u of the side, the true optimum. With norm a second row (entry - m2) s1 / s2 + m1, "
        "where m1, s1 are mean and deviation of u and m2, s2 those of the nearest entries, all numbers counting "
        "the same.",
    ]
    notes = {
        "Percentile": note("BASIC", "Half of the outliers lie at each end; percentiles lie between two numbers."),
        "Sides": note("LAYOUT", "Keys by channel, values by token."),
        "Fisher": note("BASIC", "Every number weighs the squared gradient by it."),
        "Inliers": note("BASIC", "Outliers have no part in the table."),
        "Outwards": note("ROUNDING", "Limits are rounded to float16 outwards."),
        "Sinks": note("OFF_BY_ONE", "The first tokens of every window are left out, of percentiles and tables."),
        "Norm": note("ORDER", "Mean and deviation of what is decoded become those of u.", "", "SqueezeAILab/KVQuant"),
    }
    cases = [
        _learn_case(1, "one window", "Percentile Sides Fisher Inliers", (1, 2, 5, 2), (8, -4)),
        _learn_case(2, "numbers of 14 bits", "Outwards", (1, 1, 5, 4), (14, -9), bits=2),
        _learn_case(3, "two windows and Q-Norm", "Sinks Norm", (2, 1, 3, 4), (8, -4), sinks=1, norm=True),
    ]
    return _suite(
        "kvquant_learn", "Percentiles of keys and tables of codes from a calibration text", header, notes, cases
    )
