"""How ggml chooses the scales of a block: small searches, vectorised over blocks, that end with ggml's very bytes.

    make_qx     x ~ s l,      l signed           inverse scales around -nmax / (largest), weighted least squares
    make_q3     x ~ s l,      l signed           one start, then one code at a time is moved while that helps
    make_qkx    x ~ s l - m,  l >= 0, m >= 0     inverse scales around nmax / (max - min), two-parameter least squares
    make_qp     x ~ s l,      x >= 0             scales of scales: make_qx's grid by squared error, make_q3's sweeps
    fit_levels  x ~ s v[l],   a table v          inverse scales around v[0] / (largest)

Every operation is rounded to float32, sums run in element order and products are not fused with sums (no FMA), as a C
compiler does it without -ffast-math: the result decides between codes, so the last bit matters.

Source: ggml's make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants (the same as qkx2 with other numbers),
make_qp_quants and quantize_row_iq4_nl_impl in ggml-quants.c. There is no paper.
Deviations: none. Where ggml converts a number that its integer cannot hold, x86's result is meant.
"""

import numpy as np

EMPTY = np.float32(1e-15)  # a block whose largest magnitude is below this is taken for zeros
_MAGIC = np.float32(1.5 * 2**23)


def nearest_int(v: np.ndarray) -> np.ndarray:
    """The nearest integer, ties to even, as ggml finds it: by the low bits of v + 1.5 2^23.

    Parameters
    ----------
    v : float32 array

    Returns
    -------
    int32 array
        rint(v) for abs(v) < 2^22; beyond it some number from -2^22 to 2^22 - 1; 0 for NaN.

    Examples
    --------
    >>> nearest_int(np.float32([0.5, 1.5, -2.5, np.nan])).tolist()
    [0, 2, -2, 0]
    """
    bits = (np.asarray(v, np.float32) + _MAGIC).view(np.int32)
    return (bits & 0x7FFFFF) - 0x400000


def signed_largest(x: np.ndarray) -> np.ndarray:
    """The element of largest magnitude of each row, with its sign; the first of several: (n, k) -> (n, 1).

    Of zeros it is +0, whatever their signs.
    """
    return np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1) + np.float32(0)


def smallest(x: np.ndarray) -> np.ndarray:
    """The least element of each row, of several (zeros of both signs) the first: (n, k) -> (n, 1)."""
    place = (x + np.float32(0)).argmin(axis=1, keepdims=True)  # NumPy's argmin tells -0 from +0
    return np.take_along_axis(x, place, axis=1)


def total(terms: np.ndarray) -> np.ndarray:
    """Sums over the first axis, one term after the other from 0 on: (k, n) -> (n,) float32."""
    if terms.shape[1] == 1:  # NumPy would see one contiguous vector and add it pairwise
        return np.add.accumulate(np.append(np.float32(0), terms[:, 0]), dtype=np.float32)[-1:]
    return np.add.reduce(terms, axis=0, initial=np.float32(0))


def make_qx(x: np.ndarray, nmax: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes -nmax .. nmax - 1: the scale with the least weighted squared error among 19 starts.

    Parameters
    ----------
    x, weights : (n, k) float32
    nmax : int

    Returns
    -------
    scale : (n,) float32
        Signed: its sign is that of the largest magnitude, negated.
    codes : (n, k) int32
        nmax + l; all 0 for an empty block.
    """
    x, w, largest, empty = _signed(x, weights)
    wx = w * x

    def sums(iscale):
        codes = _clipped(iscale * x, -nmax, nmax - 1)
        w_codes = w * codes
        w_codes *= codes
        codes *= wx
        return total(codes), total(w_codes)

    chosen = np.float32(-nmax) / largest
    sumlx, suml2 = sums(chosen)
    scale = np.where(suml2 != 0, sumlx / suml2, np.float32(0))
    best = scale * sumlx
    for step in (*range(-9, 0), *range(1, 10)):
        iscale = -(np.float32(nmax) + np.float32(0.1) * np.float32(step)) / largest
        sumlx, suml2 = sums(iscale)
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        scale = np.where(better, sumlx / suml2, scale)
        best = np.where(better, scale * sumlx, best)
        chosen = np.where(better, iscale, chosen)
    codes = nmax + np.clip(nearest_int(chosen * x), -nmax, nmax - 1)
    return np.where(empty, np.float32(0), scale), np.where(empty, 0, codes).T


def make_q3(x: np.ndarray, nmax: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes -nmax .. nmax - 1, improved one at a time; weights x^2.

    Parameters
    ----------
    x : (n, k) float32
    nmax : int

    Returns
    -------
    scale, codes
        As of make_qx.
    """
    x, w, largest, empty = _signed(x, x * x)
    wx = w * x
    l = _clipped(np.float32(-nmax) / largest * x, -nmax, nmax - 1)
    sumlx, suml2 = total(wx * l), total(w * l * l)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            slx, sl2 = sumlx - wx[i] * l[i], suml2 - w[i] * l[i] * l[i]
            new = _clipped(x[i] * sl2 / slx, -nmax, nmax - 1)
            moved = (slx > 0) & (new != l[i])
            slx, sl2 = slx + wx[i] * new, sl2 + w[i] * new * new
            moved &= (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            changed |= bool(moved.any())
            l[i] = np.where(moved, new, l[i])
            sumlx, suml2 = np.where(moved, slx, sumlx), np.where(moved, sl2, suml2)
        if not changed:
            break
    scale = np.where(suml2 > 0, sumlx / suml2, np.float32(0))
    return np.where(empty, np.float32(0), scale), np.where(empty, 0, nmax + l.astype(np.int32)).T


def make_qkx(
    x: np.ndarray, nmax: int, weights: np.ndarray, rmin: float, rdelta: float, nstep: int, absolute: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes 0 .. nmax with a scale and a minimum: the pair with the least weighted error among nstep + 2.

    Parameters
    ----------
    x, weights : (n, k) float32
    nmax : int
    rmin, rdelta, nstep : float, float, int
        Inverse scales (nmax + rmin + rdelta t) / (max - min), t = 0 .. nstep.
    absolute : bool
        Weigh absolute errors instead of squares.

    Returns
    -------
    scale, minimum : (n,) float32
        x ~ scale l - minimum, minimum >= 0.
    codes : (n, k) int32
    """
    low = smallest(x)[:, 0]
    x, w = _columns(x), _columns(weights)
    low, high = np.where(low > 0, np.float32(0), low), x.max(axis=0)
    constant = high == low
    sum_w, sum_x = total(w), total(w * x)

    def error(scale, low, codes):
        off = scale * codes
        off += low
        off -= x
        np.abs(off, out=off) if absolute else np.multiply(off, off, out=off)
        off *= w
        return total(off)

    chosen, chosen_low = np.float32(nmax) / (high - low), low
    scale = np.float32(1) / chosen
    best = error(scale, low, _clipped(chosen * (x - low), 0, nmax))
    for step in range(nstep + 1):
        # `low` is the best minimum so far, not the smallest x: ggml moves it inside the loop.
        iscale = (np.float32(rmin) + np.float32(rdelta) * np.float32(step) + np.float32(nmax)) / (high - low)
        codes = _clipped(iscale * (x - low), 0, nmax)
        w_codes = w * codes
        sum_l, sum_l2 = total(w_codes), total(w_codes * codes)
        w_codes *= x
        sum_xl = total(w_codes)
        D = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / D
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / D
        new_scale = np.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low = np.where(new_low > 0, np.float32(0), new_low)
        now = error(new_scale, new_low, codes)
        better = (D > 0) & (now < best)
        best, scale = np.where(better, now, best), np.where(better, new_scale, scale)
        chosen, chosen_low = np.where(better, iscale, chosen), np.where(better, low, chosen_low)
        low = np.where(better, new_low, low)
    codes = np.clip(nearest_int(chosen * (x - chosen_low)), 0, nmax)
    return np.where(constant, np.float32(0), scale), -low, np.where(constant, 0, codes).T


def make_qp(x: np.ndarray, nmax: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0 .. nmax of numbers that are (but for accidents) not negative.

    Parameters
    ----------
    x, weights : (n, k) float32
    nmax : int

    Returns
    -------
    scale : (n,) float32
    codes : (n, k) int32
        A byte each: a negative code, an accident, is stored plus 256.
    """
    x, w = _columns(x), _columns(weights)
    high = np.maximum(x.max(axis=0), np.float32(0))
    iscale = np.float32(nmax) / high
    off = x - np.float32(1) / iscale * (nearest_int(iscale * x) & 255).astype(np.float32)
    best = total(w * off * off)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = (np.float32(0.1) * np.float32(step) + np.float32(nmax)) / high
        off = x - np.float32(1) / trial * _at_most(trial * x, nmax)
        now = total(w * off * off)
        iscale, best = np.where(now < best, trial, iscale), np.where(now < best, now, best)
    l, wx = _at_most(iscale * x, nmax), w * x
    sumlx, suml2 = total(wx * l), total(w * l * l)
    l = _byte(l)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            slx, sl2 = sumlx - wx[i] * l[i], suml2 - w[i] * l[i] * l[i]
            new = _at_most(x[i] * sl2 / slx, nmax)
            moved = (slx > 0) & (sl2 > 0) & (new != l[i])
            slx, sl2 = slx + wx[i] * new, sl2 + w[i] * new * new
            moved &= slx * slx * suml2 > sumlx * sumlx * sl2
            changed |= bool(moved.any())
            l[i] = np.where(moved, _byte(new), l[i])
            sumlx, suml2 = np.where(moved, slx, sumlx), np.where(moved, sl2, suml2)
        if not changed:
            break
    empty = high < EMPTY
    scale = np.where(suml2 > 0, sumlx / suml2, np.float32(0))
    return np.where(empty, np.float32(0), scale), np.where(empty, 0, l.astype(np.int32)).T


def fit_levels(x: np.ndarray, levels: np.ndarray, weights: np.ndarray, tries: int) -> np.ndarray:
    """The scale under which a table of levels (ascending, -128 .. 127, halfway numbers to the higher) fits best.

    Parameters
    ----------
    x, weights : (n, k) float32
    levels : (16,) int
    tries : int
        Inverse scales (levels[0] + t) / (largest magnitude), t = -tries .. tries.

    Returns
    -------
    (n,) float32
    """
    x, w, largest, empty = _signed(x, weights)
    of_half = levels_of_half_steps(levels)
    first = np.float32(levels[0])

    def sums(iscale):
        q = np.take(of_half, _half_steps(iscale * x))
        w_q = w * q
        q *= w_q
        w_q *= x
        return total(w_q), total(q)

    sumqx, sumq2 = sums(np.float32(1) / (-largest / first))
    scale = np.where(sumq2 > 0, sumqx / sumq2, np.float32(0))
    best = scale * sumqx
    for step in range(-tries, tries + 1):
        sumqx, sumq2 = sums((np.float32(step) + first) / largest)
        better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
        scale = np.where(better, sumqx / sumq2, scale)
        best = np.where(better, scale * sumqx, best)
    return np.where(empty, np.float32(0), scale)


def levels_of_half_steps(levels: np.ndarray) -> np.ndarray:
    """The nearest level of each of -128, -127.5 .. 127.5, the higher one when halfway: (512,) float32."""
    return levels.astype(np.float32)[_index_table(levels)]


def nearest_level(v: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of the nearest level, as of fit_levels; halfway numbers go to the higher one: uint8."""
    return _index_table(levels)[_half_steps(v)]


def _half_steps(v: np.ndarray) -> np.ndarray:
    """floor(2 v) + 256, within 0 .. 511; NaN counts as large. Midpoints of integers are multiples of a half."""
    with np.errstate(all="ignore"):
        step = np.fmin(np.floor(v * np.float32(2)), np.float32(255))
    return (np.maximum(step, np.float32(-256)) + 256).astype(np.intp)


def _index_table(levels: np.ndarray) -> np.ndarray:
    """Index of the nearest level for each of the half steps -128, -127.5 .. 127.5: (512,) uint8."""
    middle = levels[:-1].astype(np.int64) + levels[1:]  # twice the midpoint
    return np.searchsorted(middle, np.arange(-256, 256), side="right").astype(np.uint8)


def _columns(x: np.ndarray) -> np.ndarray:
    """(n, k) -> (k, n), contiguous: what is done to one element of all blocks is one long vector operation."""
    return np.ascontiguousarray(x.T)


def _signed(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x and weights as columns; the number of largest magnitude (the first of several); whether the block is empty."""
    largest = signed_largest(x)[:, 0]
    return _columns(x), _columns(weights), largest, np.abs(largest) < EMPTY


def _clipped(v: np.ndarray, low: int, high: int) -> np.ndarray:
    """The nearest integer within bounds, as float32."""
    codes = nearest_int(v)
    return np.clip(codes, low, high, out=codes).astype(np.float32)


def _at_most(v: np.ndarray, high: int) -> np.ndarray:
    return np.minimum(nearest_int(v), high).astype(np.float32)


def _byte(codes: np.ndarray) -> np.ndarray:
    """What is left of whole numbers in a byte."""
    return (codes.astype(np.int32) & 255).astype(np.float32)
