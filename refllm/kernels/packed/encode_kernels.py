"""Numba twins of refllm.formats.blocks.scale_search, block by block: the same numbers, bit for bit.

Texts only; `encode` compiles them. Sums run over the elements of a block in order, so nothing may be reordered; what
has no order (codes, products, errors) is put into small arrays first, in loops that a compiler can turn into vectors.

Every text takes blocks (n, k) and fills outputs; it is called for slices of blocks.
"""

import numpy as np
from numba import types

from refllm.kernels.packed.compile import jitable

EMPTY = np.float32(1e-15)
_MAGIC = np.float32(1.5 * 2**23)
ZERO, ONE = np.float32(0), np.float32(1)


@jitable
def _nearest(v):
    """scale_search.nearest_int of one number."""
    return (np.float32(v + _MAGIC).view(np.int32) & np.int32(0x7FFFFF)) - np.int32(0x400000)


@jitable
def _clipped(v, low, high):
    return np.float32(min(max(_nearest(v), low), high))


@jitable
def _largest(x, b):
    """The number of largest magnitude of block b, the first of several."""
    largest, magnitude = x[b, 0], abs(x[b, 0])
    for i in range(1, x.shape[1]):
        if abs(x[b, i]) > magnitude:
            largest, magnitude = x[b, i], abs(x[b, i])
    return largest


@jitable
def _two_sums(first, second):
    """Sums of two arrays, in order."""
    a = b = ZERO
    for i in range(len(first)):
        a += first[i]
        b += second[i]
    return a, b


@jitable
def _qx_sums(x, w, b, iscale, low, high, products, squares):
    """Sums of w x l and w l^2 for the codes of one inverse scale."""
    for i in range(x.shape[1]):
        l = _clipped(iscale * x[b, i], low, high)
        products[i] = w[b, i] * x[b, i] * l
        squares[i] = w[b, i] * l * l
    return _two_sums(products, squares)


def make_qx(x, nmax, w, scales, codes):
    """See scale_search.make_qx; scales (n,) float32, codes (n, k) int32."""
    n, k = x.shape
    products, squares = np.empty(k, np.float32), np.empty(k, np.float32)
    low, high = np.int32(-nmax), np.int32(nmax - 1)
    for b in range(n):
        largest = _largest(x, b)
        if abs(largest) < EMPTY:
            scales[b] = ZERO
            codes[b] = 0
            continue
        chosen = np.float32(-nmax) / largest
        sumlx, suml2 = _qx_sums(x, w, b, chosen, low, high, products, squares)
        scale = sumlx / suml2 if suml2 != ZERO else ZERO
        best = scale * sumlx
        for step in range(-9, 10):
            if step == 0:
                continue
            iscale = -(np.float32(nmax) + np.float32(0.1) * np.float32(step)) / largest
            sumlx, suml2 = _qx_sums(x, w, b, iscale, low, high, products, squares)
            if suml2 > ZERO and sumlx * sumlx > best * suml2:
                scale = sumlx / suml2
                best = scale * sumlx
                chosen = iscale
        scales[b] = scale
        for i in range(k):
            codes[b, i] = np.int32(nmax) + min(max(_nearest(chosen * x[b, i]), low), high)


def make_q3(x, nmax, scales, codes):
    """See scale_search.make_q3."""
    n, k = x.shape
    low, high = np.int32(-nmax), np.int32(nmax - 1)
    w, wx, l = np.empty(k, np.float32), np.empty(k, np.float32), np.empty(k, np.float32)
    products, squares = np.empty(k, np.float32), np.empty(k, np.float32)
    for b in range(n):
        largest = _largest(x, b)
        if abs(largest) < EMPTY:
            scales[b] = ZERO
            codes[b] = 0
            continue
        iscale = np.float32(-nmax) / largest
        for i in range(k):
            w[i] = x[b, i] * x[b, i]
            wx[i] = w[i] * x[b, i]
            l[i] = _clipped(iscale * x[b, i], low, high)
            products[i] = wx[i] * l[i]
            squares[i] = w[i] * l[i] * l[i]
        sumlx, suml2 = _two_sums(products, squares)
        for _ in range(5):
            changed = False
            for i in range(k):
                slx = sumlx - wx[i] * l[i]
                if slx > ZERO:
                    sl2 = suml2 - w[i] * l[i] * l[i]
                    new = _clipped(x[b, i] * sl2 / slx, low, high)
                    if new != l[i]:
                        slx += wx[i] * new
                        sl2 += w[i] * new * new
                        if sl2 > ZERO and slx * slx * suml2 > sumlx * sumlx * sl2:
                            l[i], sumlx, suml2 = new, slx, sl2
                            changed = True
            if not changed:
                break
        scales[b] = sumlx / suml2 if suml2 > ZERO else ZERO
        for i in range(k):
            codes[b, i] = np.int32(nmax) + np.int32(l[i])


@jitable
def _qkx_error(x, w, b, scale, low, l, absolute, errors):
    """Weighted error of codes under a scale and a minimum."""
    k = x.shape[1]
    if absolute:
        for i in range(k):
            errors[i] = w[b, i] * abs(scale * l[i] + low - x[b, i])
    else:
        for i in range(k):
            off = scale * l[i] + low - x[b, i]
            errors[i] = w[b, i] * (off * off)
    error = ZERO
    for i in range(k):
        error += errors[i]
    return error


def make_qkx(x, nmax, w, rmin, rdelta, nstep, absolute, scales, minima, codes):
    """See scale_search.make_qkx; minima (n,) float32."""
    n, k = x.shape
    top, most = np.float32(nmax), np.int32(nmax)
    l, errors = np.empty(k, np.float32), np.empty(k, np.float32)
    of_l, of_l2, of_xl = np.empty(k, np.float32), np.empty(k, np.float32), np.empty(k, np.float32)
    for b in range(n):
        low, high, sum_w, sum_x = x[b, 0], x[b, 0], ZERO, ZERO
        for i in range(k):
            if x[b, i] < low:  # not min(): of zeros the first counts
                low = x[b, i]
            high = max(high, x[b, i])
            sum_w += w[b, i]
            sum_x += w[b, i] * x[b, i]
        if low > ZERO:
            low = ZERO
        if high == low:
            scales[b], minima[b] = ZERO, -low
            codes[b] = 0
            continue
        chosen, chosen_low = top / (high - low), low
        scale = ONE / chosen
        for i in range(k):
            l[i] = _clipped(chosen * (x[b, i] - low), np.int32(0), most)
        best = _qkx_error(x, w, b, scale, low, l, absolute, errors)
        for step in range(nstep + 1):
            iscale = (rmin + rdelta * np.float32(step) + top) / (high - low)
            for i in range(k):
                l[i] = _clipped(iscale * (x[b, i] - low), np.int32(0), most)
                of_l[i] = w[b, i] * l[i]
                of_l2[i] = of_l[i] * l[i]
                of_xl[i] = of_l[i] * x[b, i]
            sum_l = sum_l2 = sum_xl = ZERO
            for i in range(k):
                sum_l += of_l[i]
                sum_l2 += of_l2[i]
                sum_xl += of_xl[i]
            D = sum_w * sum_l2 - sum_l * sum_l
            if D > ZERO:
                new_scale = (sum_w * sum_xl - sum_x * sum_l) / D
                new_low = (sum_l2 * sum_x - sum_l * sum_xl) / D
                if new_low > ZERO:
                    new_scale, new_low = sum_xl / sum_l2, ZERO
                now = _qkx_error(x, w, b, new_scale, new_low, l, absolute, errors)
                if now < best:
                    best, scale, chosen, chosen_low, low = now, new_scale, iscale, low, new_low
        scales[b], minima[b] = scale, -low
        for i in range(k):
            codes[b, i] = min(max(_nearest(chosen * (x[b, i] - chosen_low)), np.int32(0)), most)


def make_qp(x, nmax, w, scales, codes):
    """See scale_search.make_qp."""
    n, k = x.shape
    top, most = np.float32(nmax), np.int32(nmax)
    l = np.empty(k, np.float32)
    for b in range(n):
        high = ZERO
        for i in range(k):
            high = max(high, x[b, i])
        if high < EMPTY:
            scales[b] = ZERO
            codes[b] = 0
            continue
        iscale = top / high
        best = ZERO
        for i in range(k):
            off = x[b, i] - ONE / iscale * np.float32(_nearest(iscale * x[b, i]) & np.int32(255))
            best += w[b, i] * off * off
        for step in range(-4, 5):
            if step == 0:
                continue
            trial = (np.float32(0.1) * np.float32(step) + top) / high
            now = ZERO
            for i in range(k):
                off = x[b, i] - ONE / trial * np.float32(min(_nearest(trial * x[b, i]), most))
                now += w[b, i] * off * off
            if now < best:
                best, iscale = now, trial
        sumlx = suml2 = ZERO
        for i in range(k):
            whole = min(_nearest(iscale * x[b, i]), most)
            code = np.float32(whole)
            sumlx += w[b, i] * x[b, i] * code
            suml2 += w[b, i] * code * code
            l[i] = np.float32(whole & np.int32(255))
        for _ in range(5):
            changed = False
            for i in range(k):
                slx = sumlx - w[b, i] * x[b, i] * l[i]
                sl2 = suml2 - w[b, i] * l[i] * l[i]
                if slx > ZERO and sl2 > ZERO:
                    whole = min(_nearest(x[b, i] * sl2 / slx), most)
                    new = np.float32(whole)
                    if new != l[i]:
                        slx += w[b, i] * x[b, i] * new
                        sl2 += w[b, i] * new * new
                        if slx * slx * suml2 > sumlx * sumlx * sl2:
                            l[i], sumlx, suml2 = np.float32(whole & np.int32(255)), slx, sl2
                            changed = True
            if not changed:
                break
        scales[b] = sumlx / suml2 if suml2 > ZERO else ZERO
        for i in range(k):
            codes[b, i] = np.int32(l[i])


@jitable
def _level_sums(x, w, b, iscale, of_half, products, squares):
    """Sums of w q x and w q^2 for the levels of one inverse scale; of_half: the level of each half step."""
    for i in range(x.shape[1]):
        v = np.floor(iscale * x[b, i] * np.float32(2))
        if not v <= np.float32(255):  # NaN counts as large
            v = np.float32(255)
        q = of_half[np.int32(max(v, np.float32(-256))) + np.int32(256)]
        products[i] = w[b, i] * q * x[b, i]
        squares[i] = w[b, i] * q * q
    return _two_sums(products, squares)


def fit_levels(x, of_half, first, w, tries, scales):
    """See scale_search.fit_levels; of_half (512,) float32: the nearest level of every half from -128 on."""
    n, k = x.shape
    products, squares = np.empty(k, np.float32), np.empty(k, np.float32)
    for b in range(n):
        largest = _largest(x, b)
        if abs(largest) < EMPTY:
            scales[b] = ZERO
            continue
        sumqx, sumq2 = _level_sums(x, w, b, ONE / (-largest / first), of_half, products, squares)
        scale = sumqx / sumq2 if sumq2 > ZERO else ZERO
        best = scale * sumqx
        for step in range(-tries, tries + 1):
            sumqx, sumq2 = _level_sums(x, w, b, (np.float32(step) + first) / largest, of_half, products, squares)
            if sumq2 > ZERO and sumqx * sumqx > best * sumq2:
                scale = sumqx / sumq2
                best = scale * sumqx
        scales[b] = scale


def _array(kind, ndim=2, readonly=False):
    return types.Array(kind, ndim, "C", readonly=readonly)


_IN, _SCALES, _CODES = _array(types.float32, 2, True), _array(types.float32, 1), _array(types.int32)
SIGNATURES = {
    "make_qx": types.void(_IN, types.intp, _IN, _SCALES, _CODES),
    "make_q3": types.void(_IN, types.intp, _SCALES, _CODES),
    "make_qkx": types.void(
        _IN, types.intp, _IN, types.float32, types.float32, types.intp, types.boolean, _SCALES, _SCALES, _CODES
    ),
    "make_qp": types.void(_IN, types.intp, _IN, _SCALES, _CODES),
    "fit_levels": types.void(_IN, _array(types.float32, 1, True), types.float32, _IN, types.intp, _SCALES),
}
