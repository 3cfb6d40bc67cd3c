"""BF16 and FP16: nearest, ties to even, NaN stays NaN, every code decodes and encodes to itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.dtypes import BF16, FP16

ALL_CODES = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("form", [BF16, FP16])
def test_every_code_survives_the_round_trip(form):
    values = form.decode(ALL_CODES)
    assert values.dtype == np.float32
    again = form.encode(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(again[~nan], ALL_CODES[~nan])
    assert np.isnan(form.decode(again[nan])).all()
    exponents, mantissas = 1 << form.exponent_bits, 1 << form.mantissa_bits
    assert exponents * mantissas == 1 << 15
    assert nan.sum() == 2 * (mantissas - 1)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (1.0, 0x3F80),
        (-0.0, 0x8000),
        (1 + 2**-8, 0x3F80),  # a tie goes to the even code below
        (1 + 3 * 2**-8, 0x3F82),  # and to the even code above
        (1 + 2**-8 + 2**-20, 0x3F81),  # just above a tie
        (3.4e38, 0x7F80),  # rounds up to infinity
        (float(np.finfo(np.float32).smallest_subnormal), 0x0000),
        (np.inf, 0x7F80),
        (-np.inf, 0xFF80),
    ],
)
def test_bf16_rounds_to_nearest_even(value, code):
    assert BF16.encode(np.float32(value)) == code


def test_a_nan_with_only_low_bits_stays_a_nan():
    sneaky = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)  # truncated, these would be infinities
    assert np.isnan(BF16.decode(BF16.encode(sneaky))).all()
    assert np.signbit(BF16.decode(BF16.encode(sneaky))).tolist() == [False, True]


def test_fp16_overflow_and_ties():
    codes = FP16.encode(np.float32([65504, 65519.996, 65520, 2**-25, 2**-24]))
    assert codes.tolist() == [0x7BFF, 0x7BFF, 0x7C00, 0, 1]


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bf16_error_is_at_most_half_a_step(values):
    x = np.array(values, np.float32)
    x = x[np.isfinite(x) & (np.abs(x) < 3e38)]
    error = np.abs(BF16.decode(BF16.encode(x)).astype(np.float64) - x)
    step = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(x.astype(np.float64)), 2.0**-126))) - 7), 2.0**-133)
    assert (error <= step / 2).all()


@pytest.mark.parametrize("form", [BF16, FP16])
def test_any_layout_is_accepted_and_the_input_is_not_touched(form):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    x.flags.writeable = False
    np.testing.assert_array_equal(form.decode(form.encode(x.T[::2])), x.T[::2])
    assert form.encode(np.float32(1)).shape == ()
    with pytest.raises(ValueError, match="float32 or float16, got float64"):
        form.encode(np.float64(1))
    with pytest.raises(ValueError, match="uint16 codes, got int64"):
        form.decode(np.arange(3))


@pytest.mark.oracle
def test_the_codes_are_those_of_ml_dtypes():
    import ml_dtypes

    x = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(BF16.encode(x), x.astype(ml_dtypes.bfloat16).view(np.uint16))
