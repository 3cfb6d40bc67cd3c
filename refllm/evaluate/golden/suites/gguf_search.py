"""How ggml searches the scale of a block, one number at a time in float32 scalars: part of formats/gguf_encode."""

import math

from refllm.evaluate.golden.suites.gguf_bits import IQ4, f32

EMPTY = f32(1e-15)
ZERO = f32(0)


def rint(v) -> int:
    """The nearest integer, ties to even; 0 for NaN. The cases stay within 22 bits."""
    return 0 if math.isnan(v) else round(float(v))


def away(v) -> int:
    """The nearest integer, ties away from zero."""
    return int(math.copysign(math.floor(abs(float(v)) + 0.5), v))


def clip(v: int, low: int, high: int) -> int:
    """v, but at least low and at most high."""
    return min(max(v, low), high)


def largest(x):
    """The number of largest magnitude, the first of several; +0 of zeros."""
    found = ZERO
    for v in x:
        if abs(v) > abs(found):
            found = v
    return found


def total(terms):
    """A sum in order, rounded to float32 each time."""
    result = ZERO
    for term in terms:
        result = result + term
    return result


def make_qx(x, nmax, w):
    """Scale and codes 0 .. 2 nmax - 1."""
    top = largest(x)
    if abs(top) < EMPTY:
        return ZERO, [0] * len(x)
    kept = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        iscale = -(f32(nmax) + f32(0.1) * f32(step)) / top
        l = [clip(rint(iscale * v), -nmax, nmax - 1) for v in x]
        sumlx = total(a * v * f32(c) for a, v, c in zip(w, x, l, strict=True))
        suml2 = total(a * f32(c) * f32(c) for a, c in zip(w, l, strict=True))
        if kept is None:
            scale = sumlx / suml2 if suml2 else ZERO
            best, kept = scale * sumlx, l
        elif suml2 > 0 and sumlx * sumlx > best * suml2:
            scale = sumlx / suml2
            best, kept = scale * sumlx, l
    return scale, [nmax + c for c in kept]


def _sweep(x, w, l, sumlx, suml2, low, high, both):
    """Five rounds of moving one code at a time; `both`: the rest of the squares must be positive too."""
    for _ in range(5):
        changed = False
        for i, (v, a) in enumerate(zip(x, w, strict=True)):
            slx, sl2 = sumlx - a * v * f32(l[i]), suml2 - a * f32(l[i]) * f32(l[i])
            if slx > 0 and (sl2 > 0 or not both):
                new = clip(rint(v * sl2 / slx), low, high)
                if new != l[i]:
                    slx, sl2 = slx + a * v * f32(new), sl2 + a * f32(new) * f32(new)
                    if sl2 > 0 and slx * slx * suml2 > sumlx * sumlx * sl2:
                        l[i], sumlx, suml2, changed = new, slx, sl2, True
        if not changed:
            break
    return sumlx / suml2 if suml2 > 0 else ZERO


def make_q3(x):
    """Scale and codes 0 .. 7."""
    top = largest(x)
    if abs(top) < EMPTY:
        return ZERO, [0] * len(x)
    iscale = f32(-4) / top
    w = [v * v for v in x]
    l = [clip(rint(iscale * v), -4, 3) for v in x]
    sumlx = total(a * v * f32(c) for a, v, c in zip(w, x, l, strict=True))
    suml2 = total(a * f32(c) * f32(c) for a, c in zip(w, l, strict=True))
    return _sweep(x, w, l, sumlx, suml2, -4, 3, False), [4 + c for c in l]


def make_qkx(x, nmax, w, rmin, rdelta, nstep, absolute):
    """Scale, minimum (>= 0, subtracted) and codes 0 .. nmax."""
    low = high = x[0]
    for v in x:
        low, high = v if v < low else low, v if v > high else high
    low = ZERO if low > 0 else low
    if high == low:
        return ZERO, -low, [0] * len(x)
    sum_w, sum_x = total(w), total(a * v for a, v in zip(w, x, strict=True))

    def error(scale, low, l):
        off = [scale * f32(c) + low - v for c, v in zip(l, x, strict=True)]
        return total(a * (abs(o) if absolute else o * o) for a, o in zip(w, off, strict=True))

    iscale = f32(nmax) / (high - low)
    scale = f32(1) / iscale
    kept = [clip(rint(iscale * (v - low)), 0, nmax) for v in x]
    best = error(scale, low, kept)
    for step in range(nstep + 1):
        iscale = (f32(rmin) + f32(rdelta) * f32(step) + f32(nmax)) / (high - low)
        l = [clip(rint(iscale * (v - low)), 0, nmax) for v in x]
        sum_l = total(a * f32(c) for a, c in zip(w, l, strict=True))
        sum_l2 = total(a * f32(c) * f32(c) for a, c in zip(w, l, strict=True))
        sum_xl = total(a * f32(c) * v for a, c, v in zip(w, l, x, strict=True))
        D = sum_w * sum_l2 - sum_l * sum_l
        if not D > 0:
            continue
        new, new_low = (sum_w * sum_xl - sum_x * sum_l) / D, (sum_l2 * sum_x - sum_l * sum_xl) / D
        if new_low > 0:
            new, new_low = sum_xl / sum_l2, ZERO
        now = error(new, new_low, l)
        if now < best:
            best, scale, low, kept = now, new, new_low, l
    return scale, -low, kept


def make_qp(x, nmax, w):
    """Scale and codes 0 .. nmax of numbers >= 0."""
    high = max([ZERO, *x])
    if high < EMPTY:
        return ZERO, [0] * len(x)

    def error(iscale):
        off = [v - f32(1) / iscale * f32(min(rint(iscale * v), nmax)) for v in x]
        return total(a * o * o for a, o in zip(w, off, strict=True))

    iscale = f32(nmax) / high
    best = error(iscale)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = (f32(0.1) * f32(step) + f32(nmax)) / high
        now = error(trial)
        if now < best:
            best, iscale = now, trial
    l = [min(rint(iscale * v), nmax) for v in x]
    sumlx = total(a * v * f32(c) for a, v, c in zip(w, x, l, strict=True))
    suml2 = total(a * f32(c) * f32(c) for a, c in zip(w, l, strict=True))
    return _sweep(x, w, l, sumlx, suml2, 0, nmax, True), l


def nearest_iq4(v) -> int:
    """The nearest level, of two the higher."""
    return min(range(16), key=lambda c: (abs(float(v) - IQ4[c]), -c))


def fit_iq4(x, w):
    """The scale of IQ4."""
    top = largest(x)
    if abs(top) < EMPTY:
        return ZERO
    scale = None
    for step in (None, *range(-7, 8)):
        iscale = f32(1) / (-top / f32(-127)) if step is None else f32(step - 127) / top
        q = [f32(IQ4[nearest_iq4(iscale * v)]) for v in x]
        sumqx = total(a * c * v for a, c, v in zip(w, q, x, strict=True))
        sumq2 = total(a * c * c for a, c in zip(w, q, strict=True))
        if scale is None:
            scale = sumqx / sumq2 if sumq2 > 0 else ZERO
            best = scale * sumqx
        elif sumq2 > 0 and sumqx * sumqx > best * sumq2:
            scale = sumqx / sumq2
            best = scale * sumqx
    return scale
