"""Comparison classes: when is an implementation's output right?

    bits        the same bit patterns; NaN: any NaN or the same payload; zero_sign: strict or ignore
    ulp         at most max_ulp steps of the output's own type apart
    allclose    |y - e| <= atol + rtol |e|
    dot_bound   |y - e| <= factor * gamma_k * S,  gamma_k = k u / (1 - k u),  S = sum |a||b| shipped in float64
                Holds for every order of summation: Higham 2002, "Accuracy and Stability of Numerical Algorithms",
                eq. 3.5; k times the smallest subnormal of the type is added for underflow.
    rms_peak    root mean square and largest |y - e|
    statistical n random answers along a last axis that e does not have. Test mean: |mean(y) - e| <= bound. Test chi2: y
                are codes and e[..., c] is the probability of code c; Pearson's chi-squared is at most the value that a
                right implementation exceeds with probability alpha, a code of probability 0 never occurs. `bound` is
                chosen with alpha too, e.g. by Hoeffding 1963, "Probability Inequalities for Sums of Bounded Random
                Variables", theorem 2.

Shape and dtype are always exact. In the tolerant classes NaN and infinities must stand where they are expected, and the
sign of zero does not matter.
"""

from dataclasses import dataclass

import numpy as np

from refllm.formats.dtypes import BF16

# What each class takes beside "class": (required, optional). Lint refuses everything else.
CLASSES = {
    "bits": ((), ("nan", "zero_sign")),
    "ulp": (("max_ulp",), ("nan", "zero_sign")),
    "allclose": (("rtol", "atol"), ()),
    "dot_bound": (("k", "factor", "abs_ref", "unit"), ()),
    "rms_peak": (("rms", "peak"), ()),
    "statistical": (("test", "n", "alpha"), ("bound",)),
}
TESTS = {"mean": True, "chi2": False}  # of class statistical: does it take a bound?
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
# Floats stored as codes: sign bit (0 = none) and the NaN codes' test.
_CODED = {
    "bf16": (0x8000, lambda c: (c & 0x7FFF) > 0x7F80),
    "f8_e4m3fn": (0x80, lambda c: (c & 0x7F) == 0x7F),
    "f8_e5m2": (0x80, lambda c: (c & 0x7F) > 0x7C),
    "f8_e4m3fnuz": (0, lambda c: c == 0x80),
    "f8_e5m2fnuz": (0, lambda c: c == 0x80),
    "f8_e8m0fnu": (0, lambda c: c == 0xFF),
    "f6_e2m3fn": (0x20, lambda c: c != c),
    "f6_e3m2fn": (0x20, lambda c: c != c),
    "f4_e2m1fn": (0x08, lambda c: c != c),
}
_UNITS = {"f32": (24, -149), "f16": (11, -24), "bf16": (8, -133)}  # precision, exponent of the smallest subnormal


@dataclass(frozen=True)
class Expected:
    """What one output is compared with.

    array : expected values in storage type; dtype : logical dtype; compare : the manifest's `compare`;
    abs_ref : float64 array, only for dot_bound.
    """

    array: np.ndarray
    dtype: str
    compare: dict
    abs_ref: np.ndarray | None = None


def mismatch(actual: object, expected: Expected) -> str | None:
    """Why an output is wrong, in one line, or None when it is right.

    Parameters
    ----------
    actual : ndarray
        What the implementation returned.
    expected : Expected

    Examples
    --------
    >>> mismatch(np.uint8([8, 7]), Expected(np.uint8([8, 6]), "u8", {"class": "bits"}))
    '1 of 2 differ, first at [1]: got 7, expected 6'
    """
    if not isinstance(actual, np.ndarray):
        return f"an array was expected, got {type(actual).__name__}"
    actual = actual.astype(actual.dtype.newbyteorder("="), copy=False)
    wanted = returned_dtype(expected)
    if actual.dtype != wanted:
        return f"dtype {wanted} was expected, got {actual.dtype}"
    shape = returned_shape(expected)
    if actual.shape != shape:
        return f"shape {shape} was expected, got {actual.shape}"
    if actual.size == 0:
        return None
    kind = expected.compare["class"]
    with np.errstate(all="ignore"):
        if kind == "rms_peak":
            return _rms_peak(actual, expected)
        if kind == "statistical":
            return {"mean": _mean, "chi2": _chi2}[expected.compare["test"]](actual, expected)
        bad, bound = _RULES[kind](actual, expected)
    return _describe(actual, expected, np.atleast_1d(bad), bound) if np.any(bad) else None


def returned_dtype(expected: Expected) -> np.dtype:
    """The type an implementation returns: that of the array, but of the unit within a bound, and codes for chi2."""
    if expected.compare["class"] == "dot_bound":
        unit = expected.compare["unit"]
        return np.dtype(np.uint16 if unit == "bf16" else FLOATS[unit])
    if expected.compare.get("test") == "chi2":
        return np.min_scalar_type(max(expected.array.shape[-1] - 1, 0))
    return expected.array.dtype


def returned_shape(expected: Expected) -> tuple[int, ...]:
    """The shape an implementation returns: that of the array, but with an axis of n answers for a statistical test."""
    if expected.compare["class"] != "statistical":
        return expected.array.shape
    rows = expected.array.shape[:-1] if expected.compare["test"] == "chi2" else expected.array.shape
    return (*rows, expected.compare["n"])


def _bits(actual, expected):
    a, e = _codes(actual), _codes(expected.array)
    bad = a != e
    nan, zero = _nan_and_zero(expected.dtype)
    if expected.compare.get("nan", "any") == "any":
        bad &= ~(nan(a) & nan(e))
    if expected.compare.get("zero_sign", "strict") == "ignore":
        bad &= ~(zero(a) & zero(e))
    return bad, None


def _codes(array: np.ndarray) -> np.ndarray:
    """The bit patterns as unsigned integers."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def _nan_and_zero(dtype: str):
    """Tests on bit patterns: is it a NaN, is it a zero of either sign?"""
    if dtype in FLOATS:
        info = np.finfo(FLOATS[dtype])
        sign = 1 << (info.bits - 1)
        infinity = ((1 << info.iexp) - 1) << info.nmant
        unsigned = np.dtype(f"u{info.bits // 8}").type
        magnitude = lambda c: c & unsigned(sign - 1)
        return lambda c: magnitude(c) > unsigned(infinity), lambda c: magnitude(c) == 0
    if dtype in _CODED:
        sign, nan = _CODED[dtype]
        return nan, lambda c: (c & ~np.array(sign, c.dtype)) == 0
    never = lambda c: np.zeros(c.shape, bool)
    return never, never


def _ulp(actual, expected):
    a, e = _ordered(actual), _ordered(expected.array)
    distance = np.where(a > e, a - e, e - a).view(np.uint64)  # wraps to the true distance as unsigned
    bad = distance > np.uint64(expected.compare["max_ulp"])
    infinite = np.isinf(actual) | np.isinf(expected.array)
    bad = np.where(infinite, actual != expected.array, bad)
    nan = np.isnan(actual) | np.isnan(expected.array)
    bad_bits, _ = _bits(actual, expected)
    zeros = (actual == 0) & (expected.array == 0)
    return np.where(nan | zeros, bad_bits, bad), f"{expected.compare['max_ulp']} ulp"


def _ordered(array: np.ndarray) -> np.ndarray:
    """Floats as integers in the same order, both zeros at 0."""
    codes = _codes(array)
    sign = 1 << (8 * array.dtype.itemsize - 1)
    magnitude = (codes & codes.dtype.type(sign - 1)).astype(np.int64)
    return np.where(codes >= codes.dtype.type(sign), -magnitude, magnitude)


def _within(actual, expected, bound):
    """Outside an absolute bound, or not special where something special was expected."""
    a, e = actual.astype(np.float64), expected.array.astype(np.float64)
    special = ~np.isfinite(a) | ~np.isfinite(e)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    return np.where(special, ~same, ~(np.abs(a - e) <= bound))


def _allclose(actual, expected):
    bound = expected.compare["atol"] + expected.compare["rtol"] * np.abs(expected.array.astype(np.float64))
    return _within(actual, expected, bound), bound


def _dot_bound(actual, expected):
    precision, tiny = _UNITS[expected.compare["unit"]]
    ku = expected.compare["k"] * 2.0**-precision
    gamma = expected.compare["factor"] * ku / (1 - ku)
    bound = gamma * expected.abs_ref + expected.compare["k"] * 2.0**tiny
    value = BF16.decode(actual) if expected.compare["unit"] == "bf16" else actual
    return _within(value, expected, bound), bound


def _rms_peak(actual, expected):
    a, e = actual.astype(np.float64), expected.array.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(e)):
        return "NaN or infinity where a finite value was expected, or the reverse"
    difference = np.abs(a - e)[np.isfinite(e)]
    rms, peak = (float(np.sqrt(np.mean(difference**2))), float(difference.max())) if difference.size else (0.0, 0.0)
    limits = expected.compare
    if rms <= limits["rms"] and peak <= limits["peak"]:
        return None
    return f"rms {rms:.3g} (at most {limits['rms']:.3g}), peak {peak:.3g} (at most {limits['peak']:.3g})"


def _mean(actual, expected):
    means = actual.mean(-1, dtype=np.float64)
    bad = ~(np.abs(means - expected.array) <= expected.compare["bound"])
    if not bad.any():
        return None
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return (
        f"{np.count_nonzero(bad)} of {bad.size} means are off, first at {list(at)}: got {means[at]:.9g}, expected "
        f"{expected.array[at]:.9g} within {expected.compare['bound']:.3g}"
    )


def _chi2(actual, expected):
    from scipy.special import chdtri

    n, alpha = expected.compare["n"], expected.compare["alpha"]
    probabilities = expected.array.reshape(-1, expected.array.shape[-1]).astype(np.float64)
    for row, (codes, probability) in enumerate(zip(actual.reshape(-1, n), probabilities, strict=True)):
        counts = np.bincount(codes, minlength=probability.size)
        possible = np.flatnonzero(probability)
        stray = np.setdiff1d(codes, possible)
        if stray.size:
            return f"row {row}: got {stray[0]}, expected only {', '.join(map(str, possible))}"
        wanted = n * probability[possible]
        statistic = float(np.sum((counts[possible] - wanted) ** 2 / wanted))
        limit = float(chdtri(possible.size - 1, alpha)) if possible.size > 1 else 0.0
        if statistic > limit:
            seen = ", ".join(f"{c}: {counts[c]} (expected {n * probability[c]:.1f})" for c in possible)
            return f"row {row}: chi-squared {statistic:.3g}, at most {limit:.3g}; {seen}"
    return None


_RULES = {"bits": _bits, "ulp": _ulp, "allclose": _allclose, "dot_bound": _dot_bound}


def _describe(actual, expected, bad, bound) -> str:
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    at = where if actual.ndim else ()
    got, want = actual[at].item(), expected.array[at].item()
    text = f"{np.count_nonzero(bad)} of {bad.size} differ, first at {list(at)}: got {got!r}, expected {want!r}"
    if isinstance(got, float) and got == want:
        text += " (signs of zero differ)" if got == 0 else ""
    if bound is not None:
        text += (
            f" within {bound if isinstance(bound, str) else f'{float(np.broadcast_to(bound, actual.shape)[at]):.3g}'}"
        )
    return text
