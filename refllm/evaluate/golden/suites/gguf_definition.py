"""How ggml encodes blocks, one number at a time in float32 scalars: the definition of formats/gguf_encode."""

import math

import numpy as np

from refllm.evaluate.golden.suites.gguf_bits import FP4, SIZES, f32, half, half_bits, half_ue4m3, write
from refllm.evaluate.golden.suites.gguf_search import (
    EMPTY,
    ZERO,
    away,
    clip,
    fit_iq4,
    largest,
    make_q3,
    make_qkx,
    make_qp,
    make_qx,
    nearest_iq4,
    rint,
    total,
)

SEARCHED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def weigh(x, importance, mean):
    """importance sqrt(mean + x^2)."""
    return [a * np.sqrt(mean + v * v) for a, v in zip(importance, x, strict=True)]


def _parts(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def _again(x, scale, low, old, least, most):
    """Codes under a decoded scale; the old ones if it is 0."""
    return [clip(rint((v + low) / scale), least, most) - least for v in x] if scale else old


def _simple(name, x, w):
    """Q4_0, Q4_1, Q5_0, Q5_1."""
    levels = 16 if name[1] == "4" else 32
    if name.endswith("_0"):
        if w is not None:
            d, q = make_qx(x, levels // 2, w)
        else:
            d = largest(x) / f32(-levels // 2)
            inverse = f32(1) / d if d else ZERO
            q = [min(int(v * inverse + f32(levels / 2 + 0.5)), levels - 1) for v in x]
        return {"d": [half_bits(d)], "q": q}
    if w is not None:
        d, low, q = make_qkx(x, levels - 1, w, -0.9, 0.05, 36, False)
        return {"d": [half_bits(d)], "m": [half_bits(-low)], "q": q}
    low = high = x[0]
    for v in x:
        low, high = v if v < low else low, v if v > high else high
    d = (high - low) / f32(levels - 1)
    inverse = f32(1) / d if d else ZERO
    q = [min(int((v - low) * inverse + f32(0.5)), levels - 1) for v in x]
    return {"d": [half_bits(d)], "m": [half_bits(low)], "q": q}


def _eight(name, x, w):
    if name == "Q8_K":
        top = largest(x)
        inverse = f32(-127) / top if top else ZERO
        q = [min(rint(inverse * v), 127) for v in x]
        d = f32(1) / inverse if top else ZERO
        return {"d": [int(d.view(np.uint32))], "q": q, "sums": [sum(part) for part in _parts(q, 16)]}
    d = abs(largest(x)) / f32(127)
    inverse = f32(1) / d if d else ZERO
    q = [away(v * inverse) for v in x]
    return {"d": [half_bits(d)], "q": q} | ({"s": [half_bits(f32(sum(q)) * d)]} if name == "Q8_1" else {})


def _affine_k(name, x, importance):
    size, nmax, most = (16, 3, 15) if name == "Q2_K" else (32, 15 if name == "Q4_K" else 31, 63)
    parts, fits, sums = _parts(x, size), [], []
    mean = f32(1 if name == "Q2_K" else 2) * total(v * v for v in x) / f32(256)
    for j, part in enumerate(parts):
        if importance is not None:
            w = weigh(part, importance[size * j : size * j + size], mean)
            fits.append(make_qkx(part, nmax, w, -0.9, 0.05, 36, False))
            sums.append(total(w))
        elif name == "Q2_K":
            fits.append(make_qkx(part, nmax, [abs(v) for v in part], -0.5, 0.1, 15, True))
        else:
            rms = np.sqrt(total(v * v for v in part) / f32(32))
            rest = (-1.0, 0.1, 20) if name == "Q4_K" else (-0.5, 0.1, 15)
            fits.append(make_qkx(part, nmax, [rms + abs(v) for v in part], *rest, False))

    def second(numbers):
        if importance is not None:
            return make_qp(numbers, most, sums)
        high = max([ZERO, *numbers])
        inverse = f32(most) / high if high > 0 else ZERO
        return high / f32(most), [min(rint(inverse * v), most) for v in numbers]

    (d, sc), (dmin, mn) = second([fit[0] for fit in fits]), second([fit[1] for fit in fits])
    d, dmin = half_bits(d), half_bits(dmin)
    q = []
    for part, fit, s, m in zip(parts, fits, sc, mn, strict=True):
        q += _again(part, half(d) * f32(s), half(dmin) * f32(m), fit[2], 0, nmax)
    return {"d": [d], "dmin": [dmin], "sc": sc, "mn": mn, "q": q}


def _q3_k(name, x, importance):
    parts = _parts(x, 16)
    if importance is None:
        fits = [make_q3(part) for part in parts]
        top = largest([fit[0] for fit in fits])
        inverse = f32(-32) / top if top else ZERO
        sc = [clip(rint(inverse * fit[0]), -32, 31) + 32 if top else 0 for fit in fits]
        d = f32(1) / inverse if top else ZERO
    else:
        mean = f32(2) * total(v * v for v in x) / f32(256)
        ws = [weigh(part, importance[16 * j : 16 * j + 16], mean) for j, part in enumerate(parts)]
        fits = [make_qx(part, 4, w) for part, w in zip(parts, ws, strict=True)]
        d, sc = make_qx([fit[0] for fit in fits], 32, [total(w) for w in ws])
    d = half_bits(d)
    q = []
    for part, fit, s in zip(parts, fits, sc, strict=True):
        q += _again(part, half(d) * f32(s - 32), ZERO, fit[1], -4, 3)
    return {"d": [d], "sc": sc, "q": q}


def _q6_k(name, x, importance):
    parts = _parts(x, 16)
    ws = _parts([v * v for v in x] if importance is None else importance, 16)
    fits = [make_qx(part, 32, w) for part, w in zip(parts, ws, strict=True)]
    top = largest([fit[0] for fit in fits])
    if abs(top) < EMPTY:
        return {"d": [0], "sc": [0] * 16, "q": [0] * 256}
    inverse = f32(-128) / top
    d, sc = half_bits(f32(1) / inverse), [min(127, rint(inverse * fit[0])) for fit in fits]
    q = []
    for part, fit, s in zip(parts, fits, sc, strict=True):
        q += _again(part, half(d) * f32(s), ZERO, fit[1], -32, 31)
    return {"d": [d], "sc": sc, "q": q}


def _iq4(name, x, importance):
    mean = total(v * v for v in x) * f32(2 / len(x))
    w = [v * v for v in x] if importance is None else weigh(x, importance, mean)
    scales = [fit_iq4(part, of) for part, of in zip(_parts(x, 32), _parts(w, 32), strict=True)]
    if name == "IQ4_NL":
        inverse = f32(1) / scales[0] if scales[0] else ZERO
        return {"d": [half_bits(scales[0])], "q": [nearest_iq4(inverse * v) for v in x]}
    d = -largest(scales) / f32(32)
    inverse = f32(1) / d if d else ZERO
    sc = [clip(rint(inverse * scale), -32, 31) for scale in scales]
    q = []
    for part, s in zip(_parts(x, 32), sc, strict=True):
        step = d * f32(s)
        step = f32(1) / step if step else ZERO
        q += [nearest_iq4(step * v) for v in part]
    return {"d": [half_bits(d)], "sc": [s + 32 for s in sc], "q": q}


def _few_bits(name, x, w):
    """TQ1_0, TQ2_0, Q2_0, Q1_0."""
    if name == "Q1_0":
        d = total(abs(v) for v in x) / f32(128)
        return {"d": [half_bits(d)], "q": [int(v >= 0) for v in x]}
    d = abs(largest(x))
    inverse = f32(1) / d if d else ZERO
    return {"d": [half_bits(d)], "q": [away(v * inverse) + 1 for v in x]}


def nearest_fp4(v, half_scale) -> int:
    """The nearest of FP4 times half_scale, of two the one with the lower code."""
    if not half_scale:
        return 0
    return min(range(16), key=lambda c: (abs(FP4[c] * float(half_scale) - float(v)), c))


def ue4m3(v) -> int:
    """The nearest UE4M3 of v >= 0, halves up; from 248 on 448."""
    v = float(v)
    if v < 2**-6:
        return min(math.floor(v * 512 + 0.5), 7)
    mantissa, exponent = math.frexp(v)
    code = math.floor(mantissa * 16 + 0.5) - 8 + 8 * (exponent - 1 + 7)
    return 0x7E if code >= 15 * 8 else code


def _fp4(name, x, w):
    if name == "NVFP4":
        s = [ue4m3(abs(largest(part)) / f32(6)) for part in _parts(x, 16)]
        return {"s": s, "q": [nearest_fp4(v, half_ue4m3(s[i // 16])) for i, v in enumerate(x)]}
    top = abs(largest(x))
    e = max(math.floor(f32(math.log2(float(top)))) - 2 + 127, 0) if top else 0
    return {"e": [e], "q": [nearest_fp4(v, f32(math.ldexp(1, e - 128))) for v in x]}


ENCODERS = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1"), _simple),
    **dict.fromkeys(("Q8_0", "Q8_1", "Q8_K"), _eight),
    **dict.fromkeys(("Q2_K", "Q4_K", "Q5_K"), _affine_k),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), _iq4),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0", "Q1_0"), _few_bits),
    **dict.fromkeys(("MXFP4", "NVFP4"), _fp4),
    "Q3_K": _q3_k,
    "Q6_K": _q6_k,
}


def encode_row(name: str, row: list, importance: list | None) -> bytes:
    """The blocks of one row of float32 numbers."""
    size = SIZES[name][0]
    if importance is not None and ENCODERS[name] is _simple:
        mean = total(v * v for v in row) / f32(len(row))
        importance = weigh(row, importance, mean)
    blocks = b""
    for i in range(0, len(row), size):
        w = None if importance is None else importance[i : i + size]
        with np.errstate(all="ignore"):
            blocks += write(name, ENCODERS[name](name, row[i : i + size], w))
    return blocks
