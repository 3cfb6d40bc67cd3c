"""MX and NVFP4 against a twin in fractions, the identities that the scale rules must have, and all edges.

The twin works on one block at a time; it shares the element formats, which have tests of their own, and nothing else.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.dtypes import E8M0, FP4_E2M1, FP8_E4M3FN, INT8
from refllm.formats.microscale import (
    CONVENTIONS,
    MX_FORMATS,
    MXFP4,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    SCALE_RULES,
)

NAN, INF = float("nan"), float("inf")
# max, exponent of max, mantissa bits, bits per weight
TABLE = {
    "MXFP8_E4M3": (448, 8, 3, 8.25),
    "MXFP8_E5M2": (57344, 15, 2, 8.25),
    "MXFP6_E2M3": (7.5, 2, 3, 6.25),
    "MXFP6_E3M2": (28, 4, 2, 6.25),
    "MXFP4": (6, 2, 1, 4.25),
    "MXINT8": (127 / 64, 0, 6, 8.25),
}
forms = pytest.mark.parametrize("form", MX_FORMATS.values(), ids=lambda form: form.name)
rules = pytest.mark.parametrize("rule", SCALE_RULES)


def log2_floor(x):
    k = 0
    while Fraction(2) ** k > x:
        k -= 1
    while Fraction(2) ** (k + 1) <= x:
        k += 1
    return k


def twin_scale(amax, name, rule):
    """The E8M0 code, from the sentences of the module."""
    largest, emax, mantissa, _ = TABLE[name]
    amax = Fraction(float(amax))
    if amax == 0:
        return 0
    if rule == "rceil":
        quotient = Fraction(float(np.float32(float(amax)) / np.float32(largest)))
        if quotient == 0:
            return 0
        s = log2_floor(quotient)
        s += Fraction(2) ** s < quotient
    else:
        k = log2_floor(amax)
        s = k - emax
        s += rule == "ceil" and Fraction(2) ** k < amax
        s += rule == "even" and amax + Fraction(2) ** (k - mantissa - 1) >= Fraction(2) ** (k + 1)
    return min(max(s, -127), 127) + 127


def some_blocks(seed, count=200):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 32)) * np.exp2(rng.integers(-140, 120, (count, 1)))
    x[: count // 2, 0] = np.resize([1, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 2 - 2.0**-23, 1 + 2.0**-23], count // 2)
    x[: count // 2, 0] *= np.exp2(rng.integers(-100, 100, count // 2))
    x[: count // 2, 1:] *= (np.abs(x[: count // 2, :1]) / np.abs(x[: count // 2, 1:]).max(1, keepdims=True)) / 2
    return x.astype(np.float32)


@forms
@rules
def test_scales_and_elements_are_those_of_the_twin(form, rule):
    x = some_blocks(1)
    codes, scales = form.encode(x, rule)
    assert codes.shape == x.shape and scales.shape == (len(x), 1) and codes.dtype == scales.dtype == np.uint8
    for row, row_codes, scale in zip(x, codes, scales[:, 0], strict=True):
        assert scale == twin_scale(np.abs(row).max(), form.name, rule)
        scaled = [float(Fraction(float(v)) / Fraction(2) ** (int(scale) - 127)) for v in row]
        if form is MXINT8:
            expected = [min(max(round(v * 64), -127), 127) % 256 for v in scaled]
            assert row_codes.tolist() == expected
        else:
            np.testing.assert_array_equal(row_codes, form.element.encode(np.array(scaled)))


@forms
def test_table(form):
    largest, _, mantissa, bits = TABLE[form.name]
    assert (form.max, form.mantissa_bits, form.bits_per_weight, form.block_size) == (largest, mantissa, bits, 32)
    assert NVFP4.bits_per_weight == 4.5 and NVFP4.block_size == 16


@forms
@rules
def test_the_rules_clip_or_waste_as_they_promise(form, rule):
    """ceil and rceil never clip, floor may; no rule leaves the largest element below a quarter of the range."""
    x = some_blocks(2)
    x = x[np.abs(x).max(1) > 2.0**-100]
    _, scales = form.encode(x, rule)
    top = np.abs(x.astype(np.float64)).max(1) / E8M0.decode(scales)[:, 0] / form.max
    assert top.min() > 0.25 / 1.0001
    if rule in ("ceil", "rceil"):
        assert top.max() <= 1 + 2.0**-23
    if rule == "floor":
        assert 1 < top.max() < 2


@forms
@rules
@pytest.mark.parametrize("k", [-20, 3])
def test_times_a_power_of_two_moves_only_the_scale(form, rule, k):
    x = np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    codes, scales = form.encode(x, rule)
    again, moved = form.encode(x * np.float32(2.0**k), rule)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(moved.astype(int), scales.astype(int) + k)


@forms
@rules
def test_blocks_of_the_format_are_kept(form, rule):
    """Numbers that are elements times a power of two, one of them of the largest exponent, survive exactly."""
    rng = np.random.default_rng(4)
    values = form.element.decode(np.arange(1 << form.element.bits, dtype=np.uint8)) * np.float32(form.unit)
    top = 2.0 ** TABLE[form.name][1]
    values = values[np.abs(values) <= top]
    scaled = rng.choice(values, (50, 32))
    scaled[:, 0] = top
    x = scaled * np.exp2(rng.integers(-30, 30, (50, 1))).astype(np.float32)
    np.testing.assert_array_equal(form.decode(*form.encode(x, rule)), x)


def test_six_sevenths_clip_under_floor_only():
    x = np.zeros(32, np.float32)
    x[0] = 7
    decoded = {rule: MXFP4.decode(*MXFP4.encode(x, rule))[0] for rule in SCALE_RULES}
    assert decoded == {"floor": 6, "ceil": 8, "rceil": 8, "even": 8}
    x[0] = 6.5
    decoded = {rule: MXFP4.decode(*MXFP4.encode(x, rule))[0] for rule in SCALE_RULES}
    assert decoded == {"floor": 6, "ceil": 6, "rceil": 6, "even": 6}, "6.5 / 2 = 3.25 is nearer to 3"
    assert [MXFP4.encode(x, rule)[1].tolist() for rule in SCALE_RULES] == [[127], [128], [128], [127]]


@forms
@rules
def test_zeros_and_their_signs(form, rule):
    codes, scales = form.encode(np.float32([0.0, -0.0] * 32), rule)
    assert scales.tolist() == [0, 0]
    decoded = form.decode(codes, scales)
    assert (decoded == 0).all() and np.signbit(decoded).tolist() == [False, form is not MXINT8] * 32


@forms
def test_the_ends_of_the_scale(form):
    x = np.zeros((4, 32), np.float32)
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = 2.0**-149, 2.0**-126, 2.0**127, np.finfo(np.float32).max
    _, emax, *_ = TABLE[form.name]
    codes, scales = form.encode(x)
    assert scales[:, 0].tolist() == [0, max(1 - emax, 0), 254 - emax, 254 - emax]
    decoded = form.decode(codes, scales)
    assert decoded[1:3, 0].tolist() == [2.0**-126, 2.0**127]


@forms
@rules
def test_nan_and_infinity(form, rule):
    x = np.ones((4, 32), np.float32)
    x[0, 3], x[1, 4], x[2, 5:7] = NAN, -INF, (INF, NAN)
    with pytest.raises(ValueError, match=f"{form.name}: a number is not finite"):
        form.encode(x, rule)
    codes, scales = form.encode(x, rule, nonfinite="nan")
    assert (scales[:, 0] == 255).tolist() == [True, True, True, False] and (codes[:3] == 0).all()
    assert np.isnan(form.decode(codes, scales)[:3]).all() and (form.decode(codes, scales)[3] == 1).all()
    codes, scales = form.encode(x, rule, nonfinite="saturate")
    assert (scales[:, 0] == 255).tolist() == [True, False, True, False]
    assert form.element.decode(codes)[1, 4] * form.unit == -form.max


@forms
def test_stochastic_elements_have_the_right_mean(form):
    x = np.full((3000, 32), 0.7, np.float32)
    x[:, 0] = 1
    codes, scales = form.encode(x, rounding="stochastic", rng=np.random.default_rng(5))
    decoded = form.decode(codes, scales)[:, 1:].astype(np.float64)
    low, high = decoded.min(), decoded.max()
    assert low < np.float32(0.7) < high and set(np.unique(decoded)) == {low, high}
    assert abs(decoded.mean() - np.float32(0.7)) < 4 * (high - low) / 2 / np.sqrt(decoded.size)
    assert MXFP4.encode(np.float32([2.5] + [0] * 30 + [4]), ties="away")[0][0] == 5


def test_mxint8_reads_but_never_writes_minus_128():
    codes, scales = MXINT8.encode(np.float32([-1.999] * 32))
    assert codes.tolist() == [256 - 127] * 32 and scales.tolist() == [127]
    assert MXINT8.decode(np.uint8([128] * 32), scales)[0] == -2
    assert INT8.decode(np.uint8([128])) == -128


def test_float64_is_rounded_once():
    x = np.zeros(32)
    x[:2] = 4, 0.25 + 2.0**-40
    assert MXFP4.encode(x)[0][1] == 1 and MXFP4.encode(x.astype(np.float32))[0][1] == 0


def e4m3(x):
    return FP8_E4M3FN.decode(FP8_E4M3FN.encode(np.float32(x)))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_nvfp4_number_by_number(convention):
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((6, 48)) * np.exp2(rng.integers(-9, 4, (6, 3))).repeat(16, 1)).astype(np.float32)
    x[2, 16:32] = 0
    codes, scales, g = NVFP4.encode(x, convention)
    f, amax = np.float32, np.abs(x).max()
    multiplier = convention == "compressed-tensors"
    assert g.dtype == np.float32 and g == (f(2688) * (f(1) / amax) if multiplier else amax / f(2688))
    assert codes.shape == (6, 48) and scales.shape == (6, 3)
    for r in range(6):
        for b in range(3):
            block = x[r, 16 * b : 16 * b + 16]
            top = np.abs(block).max()
            if multiplier:
                s = e4m3(g * (top / f(6))) or f(0.125)
                scaled, step = block / (s / g), s / g
            elif convention == "modelopt":
                s = e4m3(top / (f(6) * g) or f(1))
                scaled, step = block / (s * g), s * g
            else:
                s = e4m3(max((top / f(6)) / g, f(2.0**-6)))
                scaled, step = block * ((f(1) / g) / s), s * g
            assert FP8_E4M3FN.decode(scales[r : r + 1, b]) == s
            np.testing.assert_array_equal(codes[r, 16 * b : 16 * b + 16], FP4_E2M1.encode(scaled))
            decoded = NVFP4.decode(codes, scales, g, convention)[r, 16 * b : 16 * b + 16]
            np.testing.assert_array_equal(decoded, FP4_E2M1.decode(FP4_E2M1.encode(scaled)) * step)


def test_the_two_conventions_of_the_tensor_scale_are_reciprocals():
    x = np.random.default_rng(7).standard_normal((4, 64)).astype(np.float32)
    ct, mo = NVFP4.encode(x, "compressed-tensors"), NVFP4.encode(x, "modelopt")
    assert np.isclose(ct[2] * mo[2], 1, rtol=1e-6)
    right = NVFP4.decode(*ct)
    np.testing.assert_allclose(NVFP4.decode(*mo, "modelopt"), right, rtol=0.4, atol=0.3)
    assert np.abs(x - right).max() < np.abs(x).max() / 6
    assert np.abs(NVFP4.decode(*ct, "modelopt")).max() > 1000 * np.abs(x).max(), "the mistake is loud"


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_nvfp4_zeros_and_a_given_scale(convention):
    codes, scales, g = NVFP4.encode(np.float32([0.0, -0.0] * 8), convention)
    assert codes.tolist() == [0, 8] * 8 and g == 1 and np.isfinite(NVFP4.decode(codes, scales, g, convention)).all()
    x = np.random.default_rng(8).standard_normal((2, 32)).astype(np.float32)
    assert NVFP4.encode(x, convention, global_scale=2.0)[2] == 2
    for bad in (0.0, -1.0, NAN, INF, [1.0, 2.0]):
        with pytest.raises(ValueError, match="global_scale is one positive number"):
            NVFP4.encode(x, convention, global_scale=np.float32(bad))


def test_fused_layers_share_a_tensor_scale():
    """Two projections with scales of their own are not read right with one of the two."""
    rng = np.random.default_rng(9)
    gate, up = rng.standard_normal((2, 8, 32)).astype(np.float32) * np.float32([[[1]], [[8]]])
    fused = NVFP4.encode(np.concatenate([gate, up]))[2]
    codes, scales, _ = NVFP4.encode(gate, global_scale=fused)
    good = np.abs(NVFP4.decode(codes, scales, fused) - gate).max()
    codes, scales, _ = NVFP4.encode(gate)
    assert good < 0.5 < np.abs(NVFP4.decode(codes, scales, fused) - gate).max()


def test_any_layout_is_accepted():
    x = np.random.default_rng(10).standard_normal((3, 64, 64)).astype(np.float32)
    x.flags.writeable = False
    for form in (MXFP8_E4M3, NVFP4):
        for view in (x.transpose(2, 0, 1), x[::-1, :, ::2], x.astype(">f4"), x.astype(np.float64)):
            copy = np.ascontiguousarray(view).astype(np.float32)
            for got, expected in zip(form.encode(view), form.encode(copy), strict=True):
                np.testing.assert_array_equal(got, expected)
        empty = form.encode(x[:0])
        assert empty[0].shape == (0, 64, 64) and empty[1].shape == (0, 64, 64 // form.block_size)
        assert form.decode(*empty).shape == (0, 64, 64)
        assert form.decode(*(part for part in form.encode(x[:, :, :0]))).shape == (3, 64, 0)


def test_wrong_arguments():
    x = np.ones((2, 64), np.float32)
    for form, size in ((MXFP4, 32), (NVFP4, 16)):
        with pytest.raises(ValueError, match=f"{form.name} has blocks of {size} along the last axis, got the shape"):
            form.encode(x[:, :40])
        with pytest.raises(ValueError, match="has blocks of"):
            form.encode(np.float32(1))
        with pytest.raises(ValueError, match="takes float16, float32 or float64, got int64"):
            form.encode(np.arange(64))
        codes, scales, *rest = form.encode(x)
        with pytest.raises(ValueError, match="scales of the shape"):
            form.decode(codes, scales[:1], *rest)
        with pytest.raises(ValueError, match="FP4_E2M1 has the codes 0 to 15"):
            form.decode(codes + 16, scales, *rest)
        with pytest.raises(ValueError, match="decode takes uint8 codes"):
            form.decode(codes, scales.astype(np.int16), *rest)
    with pytest.raises(ValueError, match=r"scale_rule is one of floor, ceil, rceil, even .* got 'round'"):
        MXFP8_E5M2.encode(x, "round")
    with pytest.raises(ValueError, match="got 'floor' and 'zero'"):
        MXFP8_E5M2.encode(x, nonfinite="zero")
    for call in (lambda: NVFP4.encode(x, "nvidia"), lambda: NVFP4.decode(*NVFP4.encode(x), "nvidia")):
        with pytest.raises(ValueError, match="one of compressed-tensors, modelopt, torchao, got 'nvidia'"):
            call()
    for bad in (NAN, INF, 1e39):
        with pytest.raises(ValueError, match="not finite in float32"):
            NVFP4.encode(np.array([bad] + [1.0] * 15))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32), st.sampled_from(SCALE_RULES))
def test_the_error_is_bounded_by_the_largest_number(values, rule):
    x = np.array(values, np.float32)
    for form in MX_FORMATS.values():
        error = np.abs(form.decode(*form.encode(x, rule)).astype(np.float64) - x)
        # half a step of the largest binade, or what floor clips: amax (1 - max / 2^(emax + 1)); 2^-127 steps below.
        bound = np.abs(x).max().astype(np.float64) * 2.0**-(form.mantissa_bits)
        assert (error <= bound + 2.0**-127).all()
