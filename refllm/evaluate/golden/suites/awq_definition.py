"""What blockwise/awq expects: one linear, judged by its own output, number by number."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, values
from refllm.evaluate.golden.suites.exact import (
    Unclear,
    dyadic,
    dyadic_recipe,
    f16_margin,
    first_clear,
    nearest,
    to_f16,
    to_f32,
)

CLEAR = 1e-3  # rounding decisions keep away from their boundary by so much of a step
APART = 1e-4  # the least error is below the next by so much of it


def _grid(group: list[Fraction], bits: int, margins: list) -> tuple[Fraction, int]:
    """Scale and zero point of the min-max grid of one group."""
    levels, lo, hi = (1 << bits) - 1, min(group), max(group)
    exact = to_f32(max(to_f32(hi - lo), to_f32(Fraction(1, 100000))) / levels)
    scale = to_f16(exact) or Fraction(1, 2**24)
    zero = to_f32(-lo / scale)
    margins += [f16_margin(exact), _margin(zero)]
    return scale, min(max(nearest(zero), 0), levels)


def _margin(x: Fraction) -> Fraction:
    return abs(x - math.floor(x) - Fraction(1, 2))


def _codes(group: list[Fraction], scale: Fraction, zero: int, bits: int, margins: list) -> list[int]:
    steps = [to_f32(w / scale) for w in group]
    margins += [_margin(step) for step in steps]
    return [min(max(nearest(step) + zero, 0), (1 << bits) - 1) for step in steps]


def _rounded(row: list[Fraction], g: int, bits: int, margins: list) -> list[tuple[Fraction, int, list[int]]]:
    """(scale, zero point, codes) of every group of a row."""
    found = []
    for first in range(0, len(row), g):
        scale, zero = _grid(row[first : first + g], bits, margins)
        found.append((scale, zero, _codes(row[first : first + g], scale, zero, bits, margins)))
    return found


def _decoded(groups: list[tuple]) -> list[Fraction]:
    return [scale * (code - zero) for scale, zero, codes in groups for code in codes]


def _ratio_scales(w: list[list], x: list[list], g: int, duo: bool, ratio: float) -> list[float]:
    """s of one ratio, in float64."""
    columns = range(len(w[0]))
    a = [math.fsum(abs(row[k]) for row in x) / len(x) for k in columns]
    s = [v**ratio for v in a]
    if duo:
        top = lambda row, k: max(abs(v) for v in row[k // g * g : k // g * g + g])
        mean = [math.fsum(abs(row[k]) / (top(row, k) + 1e-6) for row in w) / len(w) for k in columns]
        s = [v / (m ** (1 - ratio) + 1e-4) for v, m in zip(s, mean, strict=True)]
    s = [max(v, 1e-4) for v in s]
    return [v / math.sqrt(max(s) * min(s)) for v in s]


def _scaled(w: list[list], s: list[float]) -> list[list[Fraction]]:
    return [[to_f32(Fraction(v) * Fraction(f)) for v, f in zip(row, s, strict=True)] for row in w]


def _error(w: list[list], x: list[list], s: list[float], g: int, bits: int) -> float:
    """Mean square of X (W^ - W)^T, W^ = Q(W s) / s."""
    total = []
    for row, scaled in zip(w, _scaled(w, s), strict=True):
        back = [float(v) / f for v, f in zip(_decoded(_rounded(scaled, g, bits, [])), s, strict=True)]
        change = [b - v for b, v in zip(back, row, strict=True)]
        total += [math.fsum(c * t for c, t in zip(change, token, strict=True)) ** 2 for token in x]
    return math.fsum(total) / len(total)


def _first_least(errors: list[float]) -> int:
    """Place of the least error, which must stand apart from all others unless these equal it exactly."""
    best = errors.index(min(errors))
    near = [e for e in errors if e != errors[best] and e < errors[best] * (1 + APART) + 1e-12]
    if near:
        raise Unclear(f"two errors are nearly equal: {errors[best]!r}, {near[0]!r}")
    return best


def _clip_step(group: list[Fraction], tokens: list[list[float]], bits: int) -> int:
    """i of the limit amax (1 - i / 20) with the least error of the group's own part of the output."""
    amax, errors = max(map(abs, group)), []
    for i in range(10):
        limit = to_f32(amax * to_f32(Fraction(1 - i / 20)))
        cut = [min(max(v, -limit), limit) for v in group]
        back = _decoded(_rounded(cut, len(group), bits, []))
        change = [float(b - v) for b, v in zip(back, group, strict=True)]
        errors.append(math.fsum(math.fsum(c * t for c, t in zip(change, x, strict=True)) ** 2 for x in tokens))
    return _first_least(errors)


def case(
    id: int, comment: str, flags: str, w: list[list], x: list[list], *, bits: int = 3, group_size: int = 4,
    duo_scaling: bool = False, recipes: dict | None = None,
) -> CaseSpec:  # fmt: skip
    """A valid case; ValueError where a decision in it is not clear."""
    g = group_size
    tried = [_ratio_scales(w, x, g, duo_scaling, i / 20) for i in range(20)]
    best = _first_least([_error(w, x, s, g, bits) for s in tried])
    s, margins = tried[best], []
    limits, rounded = [], []
    for row in _scaled(w, s):
        limits.append([])
        cut = []
        for first in range(0, len(row), g):
            tokens = [[to_f32(Fraction(t) / Fraction(f)) for t, f in zip(token, s, strict=True)] for token in x]
            group = row[first : first + g]
            step = _clip_step(group, [[float(t) for t in token[first : first + g]] for token in tokens], bits)
            limit = to_f32(max(map(abs, group)) * to_f32(Fraction(1 - step / 20)))
            limits[-1].append(step)
            cut += [min(max(v, -limit), limit) for v in group]
        rounded.append(_rounded(cut, g, bits, margins))
    if min(margins) < CLEAR:
        raise Unclear(f"case {id}: a value lies {float(min(margins)):.2g} steps from a rounding boundary")
    bits_equal = {"class": "bits"}
    expected = {
        "ratio": Output(bits_equal, values("i64", best)),
        "s": Output({"class": "allclose", "rtol": 1e-9, "atol": 0.0}, values("f64", s)),
        "clip_step": Output(bits_equal, values("i64", limits)),
        "codes": Output(bits_equal, values("u8", [[c for group in row for c in group[2]] for row in rounded])),
        "scale": Output(bits_equal, values("f16", [[float(group[0]) for group in row] for row in rounded])),
        "zero_point": Output(bits_equal, values("u8", [[group[1] for group in row] for row in rounded])),
    }
    recipes = recipes or {}
    inputs = {"w": values("f32", w, recipe=recipes.get("w")), "x": values("f32", x, recipe=recipes.get("x"))}
    params = {"bits": bits, "group_size": group_size, "duo_scaling": duo_scaling}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def random_case(id: int, comment: str, flags: str, shape: tuple[int, int], tokens: int, accept=None, **params):
    """A case on dyadic random weights and inputs whose every decision is clear.

    Parameters
    ----------
    accept : callable, optional
        accept(case) -> bool: what the case must show.
    """
    rows, columns = shape

    def made(seed):
        cut = lambda flat: [[float(v) for v in flat[i : i + columns]] for i in range(0, len(flat), columns)]
        w, x = cut(dyadic(seed, 9, -7, rows * columns)), cut(dyadic(seed + 1, 9, -4, tokens * columns))
        recipes = {"w": dyadic_recipe(seed, 9, -7), "x": dyadic_recipe(seed + 1, 9, -4)}
        found = case(id, comment, flags, w, x, recipes=recipes, **params)
        if accept is not None and not accept(found):
            raise Unclear
        return found

    return first_clear(made, 1000 * id)


def invalid(id: int, comment: str, flags: str, w: object, x: object, error: str, **params) -> CaseSpec:
    """A case that must be rejected."""
    inputs = {"w": values("f32", w), "x": values("f32", x)}
    params = {"bits": 3, "group_size": 4, "duo_scaling": False} | params
    return CaseSpec(id, comment, tuple(flags.split()), inputs, result="invalid", error=error, params=params)
