"""Comparison classes at their edges: the last value that passes, the first that does not, NaN, Inf, signed zeros."""

import numpy as np
import pytest

from refllm.evaluate.golden.compare import Expected, mismatch

NAN, INF = np.nan, np.inf


def check(actual, expected, dtype="f32", reference=None, **compare):
    kind = {"f16": np.float16, "f32": np.float32, "f64": np.float64}.get(dtype, np.uint8)
    array = np.array(expected, kind)
    if not isinstance(actual, np.ndarray):
        actual = np.array(actual, np.float32 if compare["class"] == "dot_bound" else kind)
    return mismatch(actual, Expected(array, dtype, compare, reference))


@pytest.mark.parametrize("kind", ["bits", "ulp", "allclose", "rms_peak"])
def test_shape_dtype_and_type_are_exact_in_every_class(kind):
    knobs = {"max_ulp": 9, "rtol": 9, "atol": 9, "rms": 9, "peak": 9}
    one = np.float32([1, 2])
    assert check(one, [1, 2], **knobs, **{"class": kind}) is None
    assert "float64" in check(one.astype(np.float64), [1, 2], **knobs, **{"class": kind})
    assert "shape (2,) was expected, got (1, 2)" in check(one[None], [1, 2], **knobs, **{"class": kind})
    assert mismatch([1, 2], Expected(one, "f32", {"class": kind})) == "an array was expected, got list"


def test_memory_layout_and_byte_order_do_not_matter():
    expected = Expected(np.float32([[1, 2], [3, 4]]), "f32", {"class": "bits"})
    for same in (np.asfortranarray(expected.array), expected.array.astype(">f4"), expected.array[::-1][::-1]):
        assert mismatch(same, expected) is None


def test_empty_and_zero_dimensional():
    assert check([], [], **{"class": "bits"}) is None
    assert check(1.0, 1.0, **{"class": "ulp"}, max_ulp=0) is None
    assert "first at []" in check(1.0, 2.0, **{"class": "ulp"}, max_ulp=0)


def test_bits_on_zeros_and_nans():
    bits = {"class": "bits"}
    other_nan = np.uint32([0xFFC00001]).view(np.float32)
    assert check([-0.0], [0.0], **bits) == "1 of 1 differ, first at [0]: got -0.0, expected 0.0 (signs of zero differ)"
    assert check([-0.0], [0.0], **bits, zero_sign="ignore") is None
    assert check(other_nan, [NAN], **bits) is None
    assert check(other_nan, [NAN], **bits, nan="payload") is not None
    assert check([NAN], [1.0], **bits) is not None and check([INF], [-INF], **bits) is not None
    assert check([1.0, 1.0 + 2.0**-23], [1.0, 1.0], **bits).startswith("1 of 2 differ, first at [1]")


@pytest.mark.parametrize(
    ("dtype", "nans", "zeros"),
    [
        ("f8_e4m3fn", [0x7F, 0xFF], [0, 0x80]),
        ("f8_e5m2", [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF], [0, 0x80]), ("f8_e4m3fnuz", [0x80], [0]),
        ("f8_e8m0fnu", [0xFF], [0]), ("f4_e2m1fn", [], [0, 8]), ("f6_e3m2fn", [], [0, 0x20]), ("u8", [], [0]),
    ],
)  # fmt: skip
def test_bits_on_coded_floats(dtype, nans, zeros):
    """All pairs of codes: equal codes, two NaNs, and (if signs are ignored) two zeros."""
    a, b = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for sign in ("strict", "ignore"):
        for x, y in ((5, 5), (5, 6), *[(p, q) for p in nans for q in nans], *[(p, q) for p in zeros for q in zeros]):
            good = x == y or (x in nans and y in nans) or (sign == "ignore" and x in zeros and y in zeros)
            result = mismatch(np.uint8([x]), Expected(np.uint8([y]), dtype, {"class": "bits", "zero_sign": sign}))
            assert (result is None) == good, (x, y, sign)
    wrong = mismatch(a, Expected(b, dtype, {"class": "bits"}))
    assert wrong.startswith(f"{65536 - 256 - len(nans) * (len(nans) - 1)} of 65536 differ")


@pytest.mark.parametrize("dtype", ["f16", "f32", "f64"])
def test_ulp(dtype):
    kind = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[dtype]
    two = {"class": "ulp", "max_ulp": 2, "dtype": dtype}
    for start in (1.0, -1.0, 65504.0, -(2.0**-14), 0.0):
        x = kind(start)
        up = np.nextafter(np.nextafter(x, kind(-3)), kind(-3))
        assert check([up], [x], **two) is None and check([x], [up], **two) is None
        assert check([np.nextafter(up, kind(-3))], [x], **two) is not None
    largest = np.finfo(kind).max
    assert check([INF], [largest], **two) is not None and check([largest], [-largest], **two) is not None
    assert check([INF], [INF], **two) is None and check([NAN], [NAN], **two) is None
    assert check([NAN], [1.0], **two) is not None and check([1.0], [NAN], **two) is not None
    assert check([-0.0], [0.0], **two) is not None and check([-0.0], [0.0], **two, zero_sign="ignore") is None


def test_allclose():
    close = {"class": "allclose", "rtol": 0.25, "atol": 0.5}
    assert check([4.5, -1.75, 0.5], [4.0, -1.0, 0.0], **close) is None
    assert check([5.5], [4.0], **close) is None and check([5.625], [4.0], **close) is not None
    assert check([-0.0], [0.0], **close) is None
    assert check([NAN, INF], [NAN, INF], **close) is None
    for bad in (NAN, INF, -INF):
        assert check([bad], [1.0], **close) is not None and check([1.0], [bad], **close) is not None
    assert check([-INF], [INF], **close) is not None
    assert "within 1.5" in check([9.0], [4.0], **close)


def test_dot_bound_is_the_a_priori_bound():
    compare = {"class": "dot_bound", "k": 10, "factor": 1, "abs_ref": "s", "unit": "f32"}
    u = 2.0**-24
    bound = 10 * u / (1 - 10 * u) * 8 + 10 * 2.0**-149
    reference = np.array([8.0])
    steps = int(bound / 2.0**-23)  # float32 neighbours of 1 are 2^-23 apart upwards
    assert check(np.float32([1 + steps * 2.0**-23]), [1.0], "f64", reference, **compare) is None
    assert check(np.float32([1 + (steps + 1) * 2.0**-23]), [1.0], "f64", reference, **compare) is not None
    assert "float32 was expected" in check(np.array([1.0]), [1.0], "f64", reference, **compare)
    assert check(np.float32([NAN]), [1.0], "f64", reference, **compare) is not None


def test_dot_bound_holds_for_any_order_and_not_for_float16():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200)).astype(np.float32)
    exact, size = np.dot(a.astype(np.float64), b), np.dot(np.abs(a.astype(np.float64)), np.abs(b))
    compare = {"class": "dot_bound", "k": 200, "factor": 1, "abs_ref": "s"}
    for order in (slice(None), slice(None, None, -1), np.argsort(np.abs(a * b)), np.argsort(-np.abs(a * b))):
        y = np.float32(0)
        for term in (a * b)[order]:
            y += term
        assert check(np.array(y), exact, "f64", np.array(size), unit="f32", **compare) is None
    half = np.array(exact, np.float16)
    assert check(half, exact, "f64", np.array(size), unit="f16", **compare) is None
    bf16 = np.array(np.array(exact, np.float32).view(np.uint32) >> 16, np.uint16)
    y = np.float16(0)
    for term in a * b:
        y += np.float16(term)
    assert check(np.array(y, np.float32), exact, "f64", np.array(size), unit="f32", **compare) is not None
    assert check(bf16, exact, "f64", np.array(size), unit="bf16", **compare) is None


def test_rms_peak():
    limits = {"class": "rms_peak", "rms": 1.0, "peak": 2.0}
    assert check([2, 0, 0, 0], [0, 0, 0, 0], **limits) is None
    assert check([2.25, 0, 0, 0], [0, 0, 0, 0], **limits).startswith("rms 1.12 (at most 1), peak 2.25")
    assert check([1.5] * 4, [0] * 4, **limits) is not None
    assert check([NAN, 0], [0, 0], **limits) is not None
    assert check([NAN], [NAN], **limits) is None


def test_statistical_mean():
    limits = {"class": "statistical", "test": "mean", "n": 4, "alpha": 1e-6, "bound": 0.25}
    assert check(np.float32([[0, 0, 1, 1], [1, 1, 1, 1]]), [0.25, 0.75], **limits) is None
    problem = check(np.float32([[0, 0, 1, 1], [0, 1, 1, 1]]), [0.25, 0.25], **limits)
    assert problem == "1 of 2 means are off, first at [1]: got 0.75, expected 0.25 within 0.25"
    assert check(np.float32([[NAN, 0, 0, 0]]), [0.25], **limits).startswith("1 of 1 means are off")
    assert check(np.float32([0.25]), [0.25], **limits) == "shape (1, 4) was expected, got (1,)"


def test_statistical_chi2():
    """23.928 is the quantile 1 - 1e-6 of chi-squared with one degree of freedom: 400 draws, +-48.9 from 200."""
    limits = {"class": "statistical", "test": "chi2", "n": 400, "alpha": 1e-6}
    answer = lambda ones: np.repeat(np.uint8([0, 1]), [400 - ones, ones])[None]
    fair = [[0.5, 0.5, 0.0]]
    assert check(answer(248), fair, **limits) is None and check(answer(152), fair, **limits) is None
    assert check(answer(249), fair, **limits).startswith("row 0: chi-squared 24, at most 23.9; 0: 151 (expected 200.0)")
    assert check(answer(151), fair, **limits) is not None
    stray = np.where(np.arange(400) == 7, 2, answer(200))
    assert check(stray.astype(np.uint8), fair, **limits) == "row 0: got 2, expected only 0, 1"
    assert check(stray.astype(np.uint8) + np.uint8(1), fair, **limits) == "row 0: got 2, expected only 0, 1"
    assert check(answer(400), [[0.0, 1.0]], **limits) is None
    assert check(answer(399), [[0.0, 1.0]], **limits) == "row 0: got 0, expected only 1"
    assert check(answer(200)[0], fair, **limits) == "shape (1, 400) was expected, got (400,)"
    assert "dtype uint8" in check(answer(200).astype(np.int64), fair, **limits)
