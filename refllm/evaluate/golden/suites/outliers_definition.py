"""What the suites about rounded inputs expect, number by number in fractions, each operation rounded to float32."""

from fractions import Fraction
from math import sqrt

from refllm.evaluate.golden.suites.exact import Unclear, f16_margin, nearest, to_f16, to_f32

Rows = list[list[Fraction]]
MARGIN = Fraction(1, 1000)


class Rounder:
    """rint that remembers how near it came to a tie; `exact` says that ties are meant."""

    def __init__(self, exact: bool = False):
        self.exact = exact

    def __call__(self, x: Fraction) -> int:
        """The nearest integer, ties to even."""
        rest = abs(x - x.numerator // x.denominator - Fraction(1, 2))
        if not self.exact and rest < MARGIN:
            raise Unclear(f"{float(x)} is too near a tie")
        return nearest(x)


def exact(rows: list) -> Rows:
    """Rows of numbers as fractions."""
    return [[Fraction(x) for x in row] for row in rows]


def floats(rows: list) -> list[list[float]]:
    """The other way."""
    return [[float(x) for x in row] for row in rows]


def clamp(x: int, low: int, high: int) -> int:
    """x within [low, high]."""
    return min(max(x, low), high)


def token(row: list[Fraction], bits: int, ratio: float, rint: Rounder) -> tuple[list[int], Fraction]:
    """Codes and scale of one token, symmetric."""
    most = (1 << (bits - 1)) - 1
    scale = to_f32(max(map(abs, row)) / most)
    if ratio != 1:
        scale = to_f32(scale * to_f32(Fraction(ratio)))
    if not scale:
        return [0] * len(row), scale
    return [clamp(rint(to_f32(x / scale)), -most, most) for x in row], scale


def token_affine(row: list[Fraction], bits: int, ratio: float, rint: Rounder) -> tuple[list[int], Fraction, int]:
    """Codes, scale and zero point of one token, codes and zero point less 2^(bits-1)."""
    r, top, middle = to_f32(Fraction(ratio)), (1 << bits) - 1, 1 << (bits - 1)
    lo, hi = (to_f32(f(*row, Fraction(0)) * r) for f in (min, max))
    scale = to_f32(to_f32(hi / top) - to_f32(lo / top))
    if not scale:
        return [-middle] * len(row), scale, -middle
    zero = rint(to_f32(-lo / scale))
    codes = [clamp(rint(to_f32(x / scale)) + zero, 0, top) for x in row]
    return [c - middle for c in codes], scale, zero - middle


def vector_wise(row: list[Fraction], rint: Rounder) -> tuple[list[int], Fraction]:
    """Codes x 127 (1 / amax) and amax."""
    amax = max(map(abs, row))
    factor = to_f32(127 * to_f32(1 / amax)) if amax else Fraction(0)
    return [rint(to_f32(x * factor)) for x in row], amax


def outlier_columns(x: Rows, threshold: float) -> list[int]:
    """Columns in which some token reaches the threshold."""
    t = Fraction(threshold)
    return [k for k in range(len(x[0])) if t > 0 and any(abs(row[k]) >= t for row in x)]


def llm_int8(w: Rows, x: Rows, threshold: float, rint: Rounder) -> dict:
    """Codes, maxima, outlier columns and products (these without a rounding)."""
    coded = [vector_wise(row, rint) for row in w]
    columns, t = outlier_columns(x, threshold), Fraction(threshold)
    rest = [[Fraction(0) if t > 0 and abs(v) >= t else v for v in row] for row in x]
    seen = [vector_wise(row, rint) for row in rest]
    q = [[0 if k in columns else c for k, c in enumerate(codes)] for codes, _ in seen]
    product = lambda i, o: (
        sum(a * b for a, b in zip(q[i], coded[o][0], strict=True)) * seen[i][1] * (coded[o][1] or 1) / 127**2
        + sum(x[i][k] * coded[o][0][k] * (coded[o][1] or 1) / 127 for k in columns)
    )
    return {
        "w_codes": [codes for codes, _ in coded],
        "w_scale": [[to_f32((amax or Fraction(1)) / 127)] for _, amax in coded],
        "x_codes": q,
        "x_scale": [[to_f32(amax / 127)] for _, amax in seen],
        "outliers": [[int(k in columns) for k in range(len(x[0]))]],
        "y": [[product(i, o) for o in range(len(w))] for i in range(len(x))],
    }


def _half(x: Fraction, ties: bool = False) -> Fraction:
    if not ties and f16_margin(x) < MARGIN:
        raise Unclear(f"{float(x)} is too near the middle of two float16")
    return to_f16(x) or Fraction(1, 2**24)


def twos(group: list[Fraction], bits: int, rint: Rounder) -> tuple[list[int], Fraction, list[Fraction]]:
    """Codes with 2^(bits-1) added, scale and decoded weights of one group of zeroquant."""
    half = 1 << (bits - 1)
    scale = _half(to_f32((max(map(abs, group)) or Fraction(1)) / half), rint.exact)
    codes = [clamp(rint(to_f32(x / scale)), -half, half - 1) for x in group]
    return [c + half for c in codes], scale, [to_f32(scale * c) for c in codes]


FP4 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def power_above(x: Fraction) -> Fraction:
    """The least power of two that is not below x."""
    power = Fraction(1)
    while power < x:
        power *= 2
    while power / 2 >= x:
        power /= 2
    return power


def fp4_scales(groups: list[Rows], constraint: str) -> Rows:
    """Scales of all groups of a weight, as stored."""
    plain = [[(max(map(abs, g)) or Fraction(1)) / 6 for g in row] for row in groups]
    top = max(max(row) for row in plain)
    rule = {"none": lambda s: s, "m1": power_above, "m2": lambda s: top / power_above(top / s)}[constraint]
    return [[_half(rule(s), constraint != "none") for s in row] for row in plain]


def fp4(x: Fraction, scale: Fraction, ties: bool) -> int:
    """The code of x / scale: nearest, ties to even, bit 3 the sign."""
    step = to_f32(x / scale)
    gaps = sorted((abs(abs(step) - value), code % 2, code) for code, value in enumerate(FP4))
    if not ties and gaps[1][0] - gaps[0][0] < MARGIN:
        raise Unclear(f"{float(step)} is too near a tie")
    return gaps[0][2] + (8 if x < 0 else 0)


def smooth_scales(absmax: list[float], weights: list[list[list[float]]], alpha: float) -> list[float]:
    """s of SmoothQuant, in float64."""
    found = []
    for k, a in enumerate(absmax):
        w = max(1e-5, max(abs(row[k]) for W in weights for row in W))
        root = {0.0: lambda v: 1.0, 0.5: sqrt, 1.0: lambda v: v, 0.25: lambda v: sqrt(sqrt(v)), 0.75: _three_quarters}
        found.append(max(1e-5, root[alpha](a) / root[1 - alpha](w)))
    return found


def _three_quarters(v: float) -> float:
    return sqrt(v) * sqrt(sqrt(v))


def osplus(x: Rows, w: Rows, bits: int, steps: int) -> tuple[list[float], float, list[float]]:
    """Scales, threshold and losses of the search with f(x, w) = x w^T, in float64 but for the rounding itself."""
    columns = range(len(x[0]))
    high, low = ([f(row[k] for row in x) for k in columns] for f in (max, min))
    top = float(max(*high, -min(low), 0))
    tried = [top - i * (top - 0.1) / steps for i in range(steps + 1)]
    losses, found = [], []
    for t in tried:
        s = [max(1.0, float(max(high[k], -low[k])) / t) for k in columns]
        losses.append(_loss(x, w, s, bits))
        found.append(s)
    best = min(range(len(tried)), key=losses.__getitem__)
    return found[best], tried[best], losses


def _loss(x: Rows, w: Rows, s: list[float], bits: int) -> float:
    most, total = (1 << (bits - 1)) - 1, 0.0
    w_hat = [_float_token([float(v) * f for v, f in zip(row, s, strict=True)], most) for row in w]
    for row in x:
        seen = _float_token([float(v) / f for v, f in zip(row, s, strict=True)], most)
        for o, weights in enumerate(w):
            y = sum(float(a) * float(b) for a, b in zip(row, weights, strict=True))
            total += (sum(a * b for a, b in zip(seen, w_hat[o], strict=True)) - y) ** 2
    return total / len(x)


def _float_token(row: list[float], most: int) -> list[float]:
    scale = float(to_f32(Fraction(max(map(abs, row))) / most))
    return [nearest(Fraction(v / scale)) * scale for v in row]
