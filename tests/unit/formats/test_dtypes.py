"""Every format against exact fractions: all codes, all midpoints and what lies beside them, all policies.

The twin below knows a format by its parameters alone and rounds with fractions, one number at a time.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.dtypes import (
    BF16,
    BINARY,
    CODEBOOKS,
    E8M0,
    FLOATS,
    FORMATS,
    FP4_BNB,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3FN,
    FP8_E4M3FNUZ,
    FP8_E5M2,
    FP8_E5M2FNUZ,
    FP16,
    INT4,
    INTEGERS,
    NF4,
    TERNARY,
    TF32,
    UE4M3,
)

# name: (bits, largest, smallest normal, smallest subnormal, infinities, NaNs)
TABLE = {
    "FP16": (16, 65504, 2.0**-14, 2.0**-24, 2, 2046),
    "BF16": (16, 255 * 2.0**120, 2.0**-126, 2.0**-133, 2, 254),
    "TF32": (19, 2047 * 2.0**117, 2.0**-126, 2.0**-136, 2, 2046),
    "FP8_E4M3FN": (8, 448, 2.0**-6, 2.0**-9, 0, 2),
    "FP8_E5M2": (8, 57344, 2.0**-14, 2.0**-16, 2, 6),
    "FP8_E4M3FNUZ": (8, 240, 2.0**-7, 2.0**-10, 0, 1),
    "FP8_E5M2FNUZ": (8, 57344, 2.0**-15, 2.0**-17, 0, 1),
    "FP6_E2M3": (6, 7.5, 1, 2.0**-3, 0, 0),
    "FP6_E3M2": (6, 28, 2.0**-2, 2.0**-4, 0, 0),
    "FP4_E2M1": (4, 6, 1, 0.5, 0, 0),
    "E8M0": (8, 2.0**127, 2.0**-127, 2.0**-126, 0, 1),
    "UE4M3": (7, 448, 2.0**-6, 2.0**-9, 0, 1),
}
ids = lambda form: form.name
NAN, INF = float("nan"), float("inf")


def all_codes(form):
    count = form.high - form.low + 1 if form in INTEGERS else 1 << form.bits
    return np.arange(count).astype(form.code_dtype)


def magnitude(form, code):
    """(exact value, code) of a code without sign, as if every exponent existed; from the parameters."""
    m = form.mantissa_bits
    field, fraction = code >> m, code & ((1 << m) - 1)
    implicit = 1 << m if field or not form.has_zero else 0
    exponent = max(field, int(form.has_zero)) - form.bias - m
    return Fraction(fraction + implicit) * Fraction(2) ** exponent, code


def chosen(form):
    """All codes of a format of up to 8 bits; of the others those near the ends of both and every 523rd."""
    if form.bits <= 8:
        return range(form.max_code + 1)
    step = 523 if form.bits == 16 else 5003
    ends = [*range(300), *range(form.max_code - 299, form.max_code + 1)]
    return sorted({*ends, *range(0, form.max_code, step)})


def nearest(x, low, high, ties):
    """The one of two neighbours (value, code), lower first, that a magnitude rounds to."""
    to_low, to_high = x - low[0], high[0] - x
    if to_low != to_high:
        return low if to_low < to_high else high
    return {"even": low if low[1] % 2 == 0 else high, "away": high, "zero": low}[ties]


@pytest.mark.parametrize("form", FLOATS, ids=ids)
def test_the_table_of_the_formats(form):
    bits, largest, normal, subnormal, infinities, nans = TABLE[form.name]
    assert (form.bits, form.max) == (bits, largest)
    values = form.decode(all_codes(form))
    assert values.dtype == np.float32
    assert (np.isinf(values).sum(), np.isnan(values).sum()) == (infinities, nans)
    assert values[np.isfinite(values)].max() == largest
    assert {normal, subnormal} <= set(values.tolist())
    assert form.min_subnormal == (subnormal if form.has_zero else normal)
    assert values[(values > 0)].min() == form.min_subnormal


@pytest.mark.parametrize("form", FLOATS, ids=ids)
def test_values_are_those_of_the_twin(form):
    codes = np.array(chosen(form)).astype(form.code_dtype)
    twin = np.array([float(magnitude(form, int(code))[0]) for code in codes])
    np.testing.assert_array_equal(form.decode(codes), twin)
    if form.signed:
        codes, twin = (codes[1:], twin[1:]) if form.specials == "fnuz" else (codes, twin)
        negative = form.decode(codes | form.code_dtype(form.sign_bit))
        np.testing.assert_array_equal(negative, -twin)
        assert np.signbit(negative).all()


@pytest.mark.parametrize("form", FORMATS.values(), ids=ids)
def test_every_code_survives_the_round_trip(form):
    codes = all_codes(form)
    values = form.decode(codes)
    if form is FP4_BNB:
        codes[8] = 0  # its second zero
    real = ~np.isnan(values)
    for x in (values[real], values[real].astype(np.float64)):
        again = form.encode(x)
        assert again.dtype == form.code_dtype
        np.testing.assert_array_equal(again, codes[real])
    if not real.all():
        again = form.decode(form.encode(values[~real]))
        assert np.isnan(again).all()
        if form.signed and form.specials != "fnuz":
            np.testing.assert_array_equal(np.signbit(again), np.signbit(values[~real]))


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f is not TF32], ids=ids)
def test_encoding_is_monotone(form):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(20000) * 10.0**e for e in (-40, -3, 0, 3, 39)])
    x = np.sort(np.abs(x) if form in (E8M0, UE4M3) else x)
    assert (np.diff(form.decode(form.encode(x)).astype(np.float64)) >= 0).all()


@pytest.mark.parametrize("ties", ["even", "away", "zero"])
@pytest.mark.parametrize("form", FLOATS, ids=ids)
def test_midpoints_and_their_neighbours_round_as_the_exact_twin_says(form, ties):
    """Around every midpoint of two neighbours: it, and the floats next to it, of all three input precisions."""
    pairs = [(magnitude(form, code), magnitude(form, code + 1)) for code in chosen(form)]
    for dtype in (np.float16, np.float32, np.float64):
        x, expected = [], []
        for low, high in pairs:
            middle = (low[0] + high[0]) / 2
            with np.errstate(all="ignore"):
                near = dtype(float(middle))
                candidates = (np.nextafter(near, dtype(0)), near, np.nextafter(near, dtype(INF)))
            for candidate in candidates:
                if np.isfinite(candidate) and low[0] <= Fraction(float(candidate)) <= high[0]:
                    x.append(candidate)
                    expected.append(nearest(Fraction(float(candidate)), low, high, ties)[1])
        over = np.array(expected) > form.max_code
        codes = np.minimum(expected, form.max_code).astype(form.code_dtype)
        x = np.array(x, dtype)
        np.testing.assert_array_equal(form.encode(x, ties=ties), codes)
        if form.signed:
            signed = form.encode(-x, ties=ties)
            keeps = (codes > 0) | (form.specials != "fnuz")
            np.testing.assert_array_equal(signed, codes | np.where(keeps, form.sign_bit, 0))
        if form.specials != "finite":
            codes[over] = form.nan_code if form.inf_code is None else form.inf_code
            np.testing.assert_array_equal(form.encode(x, "ieee", ties=ties), codes)


@pytest.mark.parametrize("form", [FP16, BF16, TF32], ids=ids)
def test_all_midpoints_of_the_larger_formats(form):
    """float64 holds the midpoints and more, so which of the two neighbours is nearest is plain."""
    codes = np.arange(form.max_code)
    values = form.decode(codes.astype(form.code_dtype)).astype(np.float64)
    middle = (values[:-1] + values[1:]) / 2
    codes = codes[:-1]
    np.testing.assert_array_equal(form.encode(middle), codes + codes % 2)
    np.testing.assert_array_equal(form.encode(middle, ties="away"), codes + 1)
    np.testing.assert_array_equal(form.encode(np.nextafter(middle, 0)), codes)
    np.testing.assert_array_equal(form.encode(np.nextafter(middle, INF)), codes + 1)


@pytest.mark.parametrize("form", FLOATS, ids=ids)
def test_directed_rounding_brackets_the_number(form):
    rng = np.random.default_rng(2)
    x = np.exp2(rng.uniform(np.log2(form.min_subnormal), np.log2(form.max), 4000)).astype(np.float32)
    down = form.decode(form.encode(x, rounding="toward_zero"))
    up = form.decode(form.encode(x, rounding="away_from_zero"))
    assert ((down <= x) & (x <= up)).all()
    exact = down == x
    np.testing.assert_array_equal(up[exact], x[exact])
    codes = form.encode(x[~exact], rounding="toward_zero")
    np.testing.assert_array_equal(form.encode(x[~exact], rounding="away_from_zero"), codes + 1)
    if form.signed:
        np.testing.assert_array_equal(form.decode(form.encode(-x, rounding="toward_zero")), -down)


@pytest.mark.parametrize(
    ("form", "x", "codes"),
    [  # codes by overflow: saturate, satfinite, ieee; None is an error
        (FP8_E4M3FN, 464, (0x7E, 0x7E, 0x7E)),  # a tie, 448 is even
        (FP8_E4M3FN, np.nextafter(np.float32(464), np.float32(INF)), (0x7E, 0x7E, 0x7F)),
        (FP8_E4M3FN, -480, (0xFE, 0xFE, 0xFF)),
        (FP8_E4M3FN, INF, (0x7E, 0x7E, 0x7F)),
        (FP8_E5M2, 61439, (0x7B, 0x7B, 0x7B)),
        (FP8_E5M2, 61440, (0x7B, 0x7B, 0x7C)),  # a tie, 65536 would be even
        (FP8_E5M2, -INF, (0xFC, 0xFB, 0xFC)),
        (FP8_E4M3FNUZ, 248, (0x7F, 0x7F, 0x80)),
        (FP8_E4M3FNUZ, -INF, (0xFF, 0xFF, 0x80)),
        (FP8_E5M2FNUZ, 61439, (0x7F, 0x7F, 0x7F)),
        (FP8_E5M2FNUZ, -61440, (0xFF, 0xFF, 0x80)),
        (FP6_E2M3, 7.75, (0x1F, 0x1F, None)),
        (FP6_E3M2, -INF, (0x3F, 0x3F, None)),
        (FP4_E2M1, 1e30, (0x7, 0x7, None)),
        (FP4_E2M1, 5, (0x6, 0x6, None)),
        (UE4M3, 1e30, (0x7E, 0x7E, 0x7F)),
        (E8M0, INF, (0xFE, 0xFE, 0xFF)),
        (E8M0, 1.5 * 2.0**127, (0xFE, 0xFE, 0xFE)),  # a tie, and 254 is even
        (E8M0, 1.75 * 2.0**127, (0xFE, 0xFE, 0xFF)),
        (E8M0, 0.0, (0x00, 0x00, 0xFF)),
        (E8M0, 2.0**-149, (0x00, 0x00, 0x00)),
        (FP16, 65519.996, (0x7BFF, 0x7BFF, 0x7BFF)),
        (FP16, 65520, (0x7BFF, 0x7BFF, 0x7C00)),
        (BF16, 3.4e38, (0x7F7F, 0x7F7F, 0x7F80)),
        (BF16, -INF, (0xFF80, 0xFF7F, 0xFF80)),
        (TF32, INF, (0x3FC00, 0x3FBFF, 0x3FC00)),
    ],
)
def test_overflow_policies(form, x, codes):
    for overflow, code in zip(("saturate", "satfinite", "ieee"), codes, strict=True):
        if code is None:
            with pytest.raises(ValueError, match="neither infinity nor NaN"):
                form.encode(np.float32(x), overflow)
        else:
            assert form.encode(np.float32(x), overflow) == code, overflow
    refused = codes[2] not in (codes[0], None) or (np.isinf(x) and form.inf_code is None)
    if refused or (form.specials == "finite" and x > form.max) or (form is E8M0 and x < 1):
        with pytest.raises(ValueError, match=f"{form.name} cannot hold"):
            form.encode(np.float32(x), "error")
    else:
        assert form.encode(np.float32(x), "error") == codes[0]


def test_truncation_stops_at_the_largest_number_as_ieee_says():
    assert FP8_E5M2.encode(np.float32([1e9, -1e9]), "ieee", rounding="toward_zero").tolist() == [0x7B, 0xFB]
    assert FP8_E5M2.encode(np.float32([INF, 57345]), "ieee", rounding="away_from_zero").tolist() == [0x7C, 0x7C]


@pytest.mark.parametrize("form", [FP6_E2M3, FP6_E3M2, FP4_E2M1], ids=ids)
def test_nan_policies_of_formats_without_nan(form):
    x = np.float32([1, NAN, -NAN])
    with pytest.raises(ValueError, match=f"{form.name} has no NaN"):
        form.encode(x)
    assert form.encode(x, nan="zero")[1:].tolist() == [0, 0]
    assert form.encode(x, nan="negative_zero")[1:].tolist() == [form.sign_bit] * 2
    assert form.encode(x, nan="max")[1:].tolist() == [form.max_code] * 2


def test_negative_policies_of_formats_without_sign():
    for form, one in ((UE4M3, 0x38), (E8M0, 127)):
        x = np.float32([1, -1, -0.0])
        assert form.encode(x).tolist() == [one, form.nan_code, 0]
        assert form.encode(x, negative="zero").tolist() == [one, 0, 0]
        assert form.encode(x, negative="magnitude").tolist() == [one, one, 0]
        with pytest.raises(ValueError, match=f"{form.name} has no sign"):
            form.encode(x, negative="error")
        assert form.encode(np.float32([1, -0.0]), negative="error").tolist() == [one, 0]
        assert form.encode(np.float32([NAN, -INF])).tolist() == [form.nan_code] * 2


def test_signed_zeros_and_what_rounds_to_them():
    tiny = np.float32([0.0, -0.0, 1e-30, -1e-30])
    for form in FLOATS:
        if form.signed and form.specials != "fnuz" and form.exponent_bits < 8:
            assert form.encode(tiny).tolist() == [0, form.sign_bit, 0, form.sign_bit]
    for form in (FP8_E4M3FNUZ, FP8_E5M2FNUZ):
        assert form.encode(tiny).tolist() == [0] * 4, "0x80 would be NaN"


@pytest.mark.parametrize("form", FLOATS, ids=ids)
def test_subnormals_half_of_the_smallest_is_a_tie(form):
    smallest = form.min_subnormal
    half = smallest / 2
    x = np.array([smallest, half, np.nextafter(half, 1), np.nextafter(half, 0), 1.5 * smallest])
    expected = [1, 0, 1, 0, 2] if form.has_zero else [0, 0, 0, 0, 0]
    assert form.encode(x).tolist() == expected
    assert form.encode(x, ties="away").tolist() == ([1, 1, 1, 0, 2] if form.has_zero else [0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("form", "x", "code"),
    [  # x, float64: rounding to float32 or to bf16 first gives another code
        (FP16, 1 + 2.0**-11 + 2.0**-40, 0x3C01),
        (BF16, 1 + 2.0**-8 + 2.0**-40, 0x3F81),
        (TF32, 1 + 2.0**-11 + 2.0**-40, 0x1FC01),
        (FP8_E4M3FN, 1 + 2.0**-4 + 2.0**-40, 0x39),
        (FP8_E4M3FN, 464 + 2.0**-40, 0x7F),
        (FP8_E5M2, 1 + 2.0**-3 + 2.0**-30, 0x3D),
        (FP4_E2M1, 0.25 + 2.0**-40, 1),
        (FP4_E2M1, 2.0**-200, 0),
        (E8M0, 1.5 - 2.0**-40, 127),
    ],
)
def test_one_rounding_from_float64(form, x, code):
    assert form.encode(np.float64(x), "saturate" if form is FP4_E2M1 else "ieee") == code


def test_one_rounding_from_float32_where_two_differ():
    x = np.float32([1 + 2.0**-4 + 2.0**-10])
    assert FP8_E4M3FN.encode(x) == 0x39
    assert FP8_E4M3FN.encode(BF16.decode(BF16.encode(x))) == 0x38


def test_e8m0_rounding_is_a_named_choice():
    x = np.float32([1, np.nextafter(np.float32(1), np.float32(2)), 1.4, 1.5, 1.6, 3, 6, 2.0**-126, 2.0**-149])
    assert E8M0.encode(x).tolist() == [127, 127, 127, 128, 128, 128, 130, 1, 0]
    assert E8M0.encode(x, ties="away").tolist() == [127, 127, 127, 128, 128, 129, 130, 1, 0]
    assert E8M0.encode(x, ties="zero").tolist() == [127, 127, 127, 127, 128, 128, 129, 1, 0]
    assert E8M0.encode(x, rounding="toward_zero").tolist() == [127, 127, 127, 127, 127, 128, 129, 1, 0]
    assert E8M0.encode(x, rounding="away_from_zero").tolist() == [127, 128, 128, 128, 128, 129, 130, 1, 0]


@pytest.mark.parametrize("form", [*FLOATS, *INTEGERS], ids=ids)
def test_stochastic_rounding(form):
    """Numbers of the format never move; others go to a neighbour, so often that the mean is the number."""
    codes = all_codes(form)
    values = form.decode(codes)
    codes, values = codes[np.isfinite(values)], values[np.isfinite(values)]
    kept = form.encode(values, rounding="stochastic", rng=np.random.default_rng(3))
    np.testing.assert_array_equal(kept, codes)
    n = 20000
    low, high = (0.5, 1.0) if form.bits > 2 or form is E8M0 else (0.0, 1.0)
    low, high = form.decode(form.encode(np.float32([low, high]))).tolist()
    first, second = form.decode(form.encode(np.float32([high, low])))
    for part in (0.1, 0.5, 0.93):
        x = second + (first - second) * part
        drawn = form.encode(np.full(n, x), rounding="stochastic", rng=np.random.default_rng(4))
        drawn = form.decode(drawn).astype(np.float64)
        below = form.decode(form.encode(np.float64(x), rounding="toward_zero"))
        above = form.decode(form.encode(np.float64(x), rounding="away_from_zero"))
        assert set(np.unique(drawn)) <= {below, above}
        p = (x - below) / (above - below) if above > below else 0.0
        sigma = (above - below) * np.sqrt(p * (1 - p) / n)
        assert abs(drawn.mean() - x) <= 4 * sigma + 1e-12
    again = [form.encode(np.full(50, x), rounding="stochastic", rng=np.random.default_rng(5)) for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_stochastic_rounding_of_negative_numbers_has_the_right_mean_too():
    x = np.full(40000, -1.03125)
    drawn = FP8_E4M3FN.decode(FP8_E4M3FN.encode(x, rounding="stochastic", rng=np.random.default_rng(6))).astype(float)
    assert set(drawn) == {-1.0, -1.125}
    assert abs(drawn.mean() + 1.03125) < 4 * 0.125 * np.sqrt(0.25 * 0.75 / x.size)


@pytest.mark.parametrize("form", [*INTEGERS], ids=ids)
def test_integers(form):
    low, high = form.low, form.high
    x = [low - 1e300, low - 1, low, low + 0.5, -0.5, -0.0, 0.5, high - 0.5, high, high + 0.5, 1e300, -INF, INF]
    x = np.array(x)
    expected = [min(max(int(np.rint(max(min(v, 1e6), -1e6))), low), high) for v in x]
    assert form.decode(form.encode(x)).tolist() == expected
    away = form.decode(form.encode(np.array([-0.5, 0.5]), ties="away"))
    assert away.tolist() == [-1, 1]
    assert form.decode(form.encode(np.array([-0.9, 0.9]), rounding="toward_zero")).tolist() == [0, 0]
    span = high - low + 1
    wrapped = form.decode(form.encode(np.array([high + 1, low - 1, high + span, 5.0 * span]), "wrap"))
    assert wrapped.tolist() == [low, high, high, 0]
    with pytest.raises(ValueError, match=f"{form.name} holds {low} to {high}, got {high + 1}"):
        form.encode(np.array([0, high + 1.0]), "error")
    with pytest.raises(ValueError, match="has no NaN"):
        form.encode(np.array([NAN]))
    with pytest.raises(ValueError, match="an infinity cannot wrap"):
        form.encode(np.array([INF]), "wrap")


def test_ternary_and_binary_codes():
    assert TERNARY.encode(np.float32([-9, -0.5, -0.0, 0.5, 0.51])).tolist() == [0, 1, 1, 1, 2]
    assert BINARY.encode(np.float32([-INF, -1e-9, -0.0, 0.0, 3])).tolist() == [0, 0, 1, 1, 1]
    assert BINARY.decode(np.uint8([0, 1])).tolist() == [-1, 1]
    with pytest.raises(ValueError, match="TERNARY has the codes 0 to 2, got 3"):
        TERNARY.decode(np.uint8([3]))


def test_nf4_is_the_published_table():
    published = """-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
        -0.18477343022823334 -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634
        0.33791524171829224
        0.44070982933044434 0.5626170039176941 0.7229568362236023 1"""
    np.testing.assert_array_equal(NF4.values, np.array(published.split(), np.float32))


def test_fp4_of_bitsandbytes_is_its_table_of_bit_patterns():
    table = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    assert FP4_BNB.values.tobytes() == np.concatenate([table, 0 - table]).tobytes()  # both zeros without a sign


@pytest.mark.parametrize("form", CODEBOOKS, ids=ids)
def test_codebooks_round_to_the_nearest_value(form):
    values = np.unique(form.values)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    decoded = lambda x, **knobs: form.decode(form.encode(x, **knobs))
    np.testing.assert_array_equal(decoded(middles, ties="lower"), values[:-1])
    np.testing.assert_array_equal(decoded(middles, ties="upper"), values[1:])
    np.testing.assert_array_equal(decoded(np.nextafter(middles, np.float32(-2))), values[:-1])
    np.testing.assert_array_equal(decoded(np.nextafter(middles, np.float32(2))), values[1:])
    np.testing.assert_array_equal(decoded(middles), values[1:] if form is BINARY else values[:-1])
    assert decoded(np.float32([-INF, -7, 7, INF])).tolist() == [values[0], values[0], values[-1], values[-1]]
    x = np.random.default_rng(7).uniform(-1.2, 1.2, 3000)
    best = np.abs(x[:, None] - values.astype(np.float64)).min(1)
    np.testing.assert_allclose(np.abs(decoded(x) - x), best, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="has no NaN"):
        form.encode(np.float32([NAN]))
    with pytest.raises(ValueError, match=f"{form.name} holds -1 to 1, got 1.5"):
        form.encode(np.float32([1, 1.5]), "error")


@pytest.mark.parametrize("form", FORMATS.values(), ids=ids)
def test_any_layout_is_accepted_and_the_input_is_not_touched(form):
    x = np.linspace(0.1, 0.9, 24, dtype=np.float32).reshape(4, 6)
    x.flags.writeable = False
    codes = form.encode(x)
    np.testing.assert_array_equal(form.encode(x.T), codes.T)
    np.testing.assert_array_equal(form.encode(x[::-1, ::2]), codes[::-1, ::2])
    np.testing.assert_array_equal(form.encode(x.astype(">f4")), codes)
    np.testing.assert_array_equal(form.encode(x.astype("<f8")), codes)
    assert form.encode(x[0, 0]).shape == () and form.encode(x[:0]).shape == (0, 6)
    values = form.decode(codes)
    assert values.flags.c_contiguous and values.dtype == np.float32
    np.testing.assert_array_equal(form.decode(codes.T), values.T)
    np.testing.assert_array_equal(form.decode(codes.astype(codes.dtype.newbyteorder(">"))), values)
    assert form.decode(codes[:0]).shape == (0, 6)


@pytest.mark.parametrize("form", FORMATS.values(), ids=ids)
def test_wrong_arguments(form):
    with pytest.raises(ValueError, match=f"{form.name}.encode takes float16, float32 or float64, got int64"):
        form.encode(np.arange(3))
    with pytest.raises(ValueError, match=f"{form.name}.encode takes float16"):
        form.encode(np.array([1j]))
    with pytest.raises(ValueError, match=f"{form.name}.decode takes uint.* codes, got float32"):
        form.decode(np.float32([1]))
    with pytest.raises(ValueError, match="overflow must be one of saturate"):
        form.encode(np.float32([1]), "clip")
    with pytest.raises(ValueError, match="ties must be one of"):
        form.encode(np.float32([1]), ties="odd")
    if form.bits not in (8, 16):
        with pytest.raises(ValueError, match="has the codes 0 to"):
            form.decode(np.array([(1 << form.bits)], form.code_dtype))
    if form not in CODEBOOKS:
        with pytest.raises(ValueError, match="rounding must be one of"):
            form.encode(np.float32([1]), rounding="up")
        with pytest.raises(ValueError, match="go together"):
            form.encode(np.float32([1]), rounding="stochastic")
        with pytest.raises(ValueError, match="go together"):
            form.encode(np.float32([1]), rng=np.random.default_rng(0))


def test_a_nan_with_only_low_bits_stays_a_nan():
    sneaky = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)  # truncated, these would be infinities
    for form in (BF16, TF32, FP16, FP8_E5M2):
        assert np.isnan(form.decode(form.encode(sneaky))).all()
        assert np.signbit(form.decode(form.encode(sneaky))).tolist() == [False, True]


def test_large_arrays_are_worked_on_in_chunks():
    x = np.random.default_rng(8).standard_normal((3, 20001)).astype(np.float32)
    whole = FP8_E4M3FN.encode(x)
    np.testing.assert_array_equal(whole, np.stack([FP8_E4M3FN.encode(row) for row in x]))
    drawn = FP4_E2M1.encode(x, rounding="stochastic", rng=np.random.default_rng(9))
    u = np.random.default_rng(9).random(x.shape)
    below = FP4_E2M1.decode(FP4_E2M1.encode(x, rounding="toward_zero")).astype(np.float64)
    above = FP4_E2M1.decode(FP4_E2M1.encode(x, rounding="away_from_zero")).astype(np.float64)
    part = np.divide(x - below, above - below, out=np.zeros(x.shape), where=above != below)
    np.testing.assert_array_equal(FP4_E2M1.decode(drawn), np.where(u < part, above, below))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), st.sampled_from(FLOATS))
def test_the_error_is_at_most_half_the_distance_of_the_neighbours(values, form):
    x = np.abs(np.array(values, np.float32)) if not form.signed else np.array(values, np.float32)
    x = x[(np.abs(x) <= form.max) & (np.abs(x) >= (0 if form.has_zero else form.min_subnormal))].astype(np.float64)
    down = form.decode(form.encode(x, rounding="toward_zero")).astype(np.float64)
    up = form.decode(form.encode(x, rounding="away_from_zero")).astype(np.float64)
    got = form.decode(form.encode(x)).astype(np.float64)
    assert (np.minimum(np.abs(x - down), np.abs(x - up)) == np.abs(got - x)).all()


@given(st.integers(4, 8))
def test_int4_is_twos_complement(n):
    assert INT4.encode(np.float64(-n)) == 16 - n
