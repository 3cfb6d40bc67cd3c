"""What blockwise/omniquant expects: one linear, its loss and the slopes of it, number by number.

Slopes are found forward: every number carries its own along (v, d), and each run follows one learned number.
"""

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

CLEAR = Fraction(1, 1000)
LEAST, MOST = 1e-5, 1e4


class _Moving:
    """A number and its slope."""

    def __init__(self, v: float, d: float = 0.0):
        self.v, self.d = float(v), d

    def __add__(self, other):
        other = _moving(other)
        return _Moving(self.v + other.v, self.d + other.d)

    def __neg__(self):
        return _Moving(-self.v, -self.d)

    def __sub__(self, other):
        return self + -_moving(other)

    def __mul__(self, other):
        other = _moving(other)
        return _Moving(self.v * other.v, self.d * other.v + self.v * other.d)

    def __truediv__(self, other):
        other = _moving(other)
        return _Moving(self.v / other.v, (self.d - self.v / other.v * other.d) / other.v)


def _moving(x) -> _Moving:
    return x if isinstance(x, _Moving) else _Moving(x)


def _sigmoid(c: _Moving) -> _Moving:
    y = 1 / (1 + math.exp(-c.v))
    return _Moving(y, y * (1 - y) * c.d)


def _clip(x: _Moving, low: float, high: float) -> _Moving:
    return x if low <= x.v <= high else _Moving(min(max(x.v, low), high))


def _rint(x: _Moving, margins: list) -> _Moving:
    """The slope passes."""
    exact = Fraction(x.v)
    margins.append(abs(exact - exact.numerator // exact.denominator - Fraction(1, 2)))
    return _Moving(nearest(exact), x.d)


def _group(w: list[_Moving], c_hi: _Moving, c_lo: _Moving, params: dict, margins: list) -> tuple:
    """Scale, zero point, codes and decoded numbers of one group."""
    bits, levels = params["bits"], (1 << params["bits"]) - 1
    nought = _Moving(0)
    hi = _sigmoid(c_hi) * max([nought, *w], key=lambda x: x.v)
    lo = _sigmoid(c_lo) * min([nought, *w], key=lambda x: x.v)
    if params["symmetric"]:
        step = (hi if hi.v >= -lo.v else -lo) / ((1 << (bits - 1)) - 1)
    else:
        step = (hi - lo) / levels
    step = _clip(step, LEAST, MOST)
    margins.append(f16_margin(Fraction(step.v)))
    scale = _Moving(to_f16(Fraction(step.v)), step.d)
    zero = _Moving(1 << (bits - 1)) if params["symmetric"] else _clip(_rint(-lo / scale, margins), 0, levels)
    codes = [_clip(_rint(x / scale, margins) + zero, 0, levels) for x in w]
    return scale, zero, codes, [(code - zero) * scale for code in codes]


def _linear(w: list, x: list, s: list, c_hi: list, c_lo: list, params: dict, moving: tuple | None, margins: list):
    """(loss with its slope, scales, zero points, codes); `moving` names the number whose slope is 1."""
    g = params["group_size"]
    one = lambda name, value, *at: _Moving(value, float(moving == (name, *at)))
    scales = [one("s", v, k) for k, v in enumerate(s)]
    found, decoded = [], []
    for r, row in enumerate(w):
        found.append([])
        decoded.append([])
        for group in range(len(row) // g):
            part = range(g * group, g * group + g)
            ends = (one("c_hi", c_hi[r][group], r, group), one("c_lo", c_lo[r][group], r, group))
            *stored, numbers = _group([scales[k] * row[k] for k in part], *ends, params, margins)
            found[-1].append(stored)
            decoded[-1] += numbers
    loss = _Moving(0)
    for token in x:
        for row, numbers in zip(w, decoded, strict=True):
            y = _Moving(0)
            for k, value in enumerate(token):
                y = y + _Moving(value) / scales[k] * numbers[k] - value * row[k]
            loss = loss + y * y
    return loss / (len(x) * len(w)), found


def case(
    id: int, comment: str, flags: str, w: list, x: list, s: list, c_hi: list, c_lo: list, *, bits: int = 2,
    group_size: int = 4, symmetric: bool = False, recipes: dict | None = None,
) -> CaseSpec:  # fmt: skip
    """A valid case; ValueError where a decision in it is not clear."""
    params = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    margins: list[Fraction] = []
    run = lambda moving, noted: _linear(w, x, s, c_hi, c_lo, params, moving, noted)
    loss, found = run(None, margins)
    if min(margins) < CLEAR:
        raise Unclear(f"case {id}: a value lies {float(min(margins)):.2g} steps from a rounding boundary")
    slope = lambda *moving: run(moving, [])[0].d
    rows, columns, groups = len(w), len(s), len(c_hi[0])
    ends = [[[slope(name, r, group) for group in range(groups)] for r in range(rows)] for name in ("c_hi", "c_lo")]
    each = lambda get: [[get(*group) for group in row] for row in found]
    bits_equal = {"class": "bits"}
    expected = {
        "scale": Output(bits_equal, values("f16", each(lambda scale, zero, codes: scale.v))),
        "codes": Output(bits_equal, values("u8", [[int(c.v) for group in row for c in group[2]] for row in found])),
        "loss": near(loss.v),
        "of_c": near(ends),
        "of_s": near([slope("s", k) for k in range(columns)]),
    }
    if not symmetric:
        expected["zero_point"] = Output(bits_equal, values("u8", each(lambda scale, zero, codes: int(zero.v))))
    inputs = {"w": w, "x": x, "s": s, "c": [c_hi, c_lo]}
    recipes = recipes or {}
    tensors = {name: values("f64", nested, recipe=recipes.get(name)) for name, nested in inputs.items()}
    return CaseSpec(id, comment, tuple(flags.split()), tensors, expected, params=params)


def near(nested) -> Output:
    """Numbers that are given to 24 bits."""
    cut = lambda x: [cut(v) for v in x] if isinstance(x, list) else float(to_f32(Fraction(x)))
    return Output({"class": "allclose", "rtol": 1e-6, "atol": 1e-9}, values("f64", cut(nested)))


def first_case(id: int, comment: str, flags: str, amax: list, w: list, alpha: float) -> CaseSpec:
    """Where the scales begin."""
    least = lambda v: max(1e-5, abs(v))
    columns = [max(map(least, column)) for column in zip(*w, strict=True)]
    first = [max(least(a) ** alpha / c ** (1 - alpha), 1e-2) for a, c in zip(amax, columns, strict=True)]
    tensors = {"w": values("f64", w), "amax": values("f64", amax)}
    return CaseSpec(id, comment, tuple(flags.split()), tensors, {"s": near(first)}, params={"alpha": alpha})


def random_case(id: int, comment: str, flags: str, rows: int, groups: int, tokens: int, accept=None, **params):
    """A case on dyadic random numbers whose every decision is clear; `accept(case)` says what it must show."""
    g = params.get("group_size", 4)

    def made(seed):
        cut = lambda flat, n: [[float(v) for v in flat[i : i + n]] for i in range(0, len(flat), n)]
        w = cut(dyadic(seed, 9, -8, rows * groups * g), groups * g)
        x = cut(dyadic(seed + 1, 7, -5, tokens * groups * g), groups * g)
        s = [abs(float(v)) + 0.5 for v in dyadic(seed + 2, 5, -4, groups * g)]
        c_hi, c_lo = (cut([v + 1 for v in dyadic(seed + i, 6, -4, rows * groups)], groups) for i in (3, 4))
        recipes = {"w": dyadic_recipe(seed, 9, -8), "x": dyadic_recipe(seed + 1, 7, -5)}
        found = case(id, comment, flags, w, x, s, c_hi, c_lo, recipes=recipes, **params)
        if accept is not None and not accept(found):
            raise Unclear
        return found

    return first_clear(made, 1000 * id)


def invalid(id: int, comment: str, flags: str, w: object, x: object, error: str, **params) -> CaseSpec:
    """A case that must be rejected; scales of 1, nothing clipped."""
    inputs = {"w": w, "x": x, "s": [1.0] * len(w[0]), "c": [[[4.0]], [[4.0]]]}
    tensors = {name: values("f64", nested) for name, nested in inputs.items()}
    params = {"bits": 2, "group_size": 4, "symmetric": False} | params
    return CaseSpec(id, comment, tuple(flags.split()), tensors, result="invalid", error=error, params=params)
