"""rtn: codes and scales bit for bit against loops, the error bound, and the properties a grid promises."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refllm.methods.quant import rtn
from tests.strategies import KINDS, weights

NORMAL_SCALES = tuple(kind for kind in KINDS if kind not in ("tiny", "zeros"))
BITS = st.integers(2, 8)


def slow_rtn(W, bits, group_size, symmetric):
    """One group after another in Python numbers; scales are divided in float32 and stored as float16."""
    out, columns = W.shape
    width = columns if group_size == -1 else group_size
    codes, scales, zeros = [], [], []
    if group_size == 0:
        groups = [W.ravel()]
    else:
        groups = [W[i, j : j + width] for i in range(out) for j in range(0, columns, width)]
    for group in groups:
        low, high = min(0.0, *map(float, group), 0.0), max(0.0, *map(float, group), 0.0)
        if symmetric:
            largest = max(-low, high) or 1.0
            scale, zero = np.float16(np.float32(largest) / np.float32(2 ** (bits - 1) - 1)), 2 ** (bits - 1)
        else:
            if low == high == 0:
                low, high = -1.0, 1.0
            scale = np.float16((np.float32(high) - np.float32(low)) / np.float32(2**bits - 1))
        scale = max(scale, np.float16(2.0**-24))
        if not symmetric:
            zero = min(round(float(np.float32(-low) / np.float32(scale))), 2**bits - 1)
        for w in group:
            code = round(float(np.float32(w) / np.float32(scale))) + zero  # Python rounds half to even
            codes.append(min(max(code, 1 if symmetric else 0), 2**bits - 1))
        scales.append(scale)
        zeros.append(zero)
    return np.array(codes).reshape(W.shape), np.array(scales), np.array(zeros)


def step_of(record):
    """(out, in) scale of each weight, float64; skips scales below the normal float16 numbers: not within 2^-11."""
    scale = record.scale.astype(np.float64)
    assume((scale >= 2.0**-14).all())
    return np.broadcast_to(np.repeat(scale, record.shape[1] // scale.shape[1], axis=1), record.shape)


@given(weights(columns=st.sampled_from((4, 8, 24))), BITS, st.sampled_from((4, 2, -1, 0)), st.booleans())
def test_equals_the_loops_bit_for_bit(W, bits, group_size, symmetric):
    record = rtn(W, bits=bits, group_size=group_size, symmetric=symmetric)
    slow_codes, slow_scale, slow_zero = slow_rtn(W, bits, group_size, symmetric)
    scale, zero_point = record.scales()
    np.testing.assert_array_equal(record.unpacked(), slow_codes)
    assert scale.ravel().tobytes() == slow_scale.tobytes()
    np.testing.assert_array_equal(zero_point.ravel(), slow_zero)
    assert (record.zero_point is None) == symmetric


def test_affine_by_hand():
    # lo = -1, hi = 2: scale 3 / 3 = 1, zero point 1. 0.5 and 1.5 are ties: they round to the even 0 and 2.
    record = rtn(np.array([[-1.0, 0.5, 1.5, 2.0]]), bits=2, group_size=-1)
    scale, zero_point = record.scales()
    assert (record.unpacked().tolist(), scale.tolist(), zero_point.tolist()) == ([[0, 1, 3, 3]], [[1.0]], [[1]])
    assert record.codes.tolist() == [[0b11_11_01_00]]  # four codes of two bits, the first in the lowest bits
    assert record.dense().tolist() == [[-1.0, 0.0, 2.0, 2.0]]


def test_symmetric_by_hand():
    # amax = 3: scale 3 / 3 = 1 for 3 bits, stored codes are q + 4, 0 is never used.
    record = rtn(np.array([[-3.0, 0.5, 1.5, 2.6]]), bits=3, group_size=-1, symmetric=True)
    assert (record.unpacked().tolist(), record.scale.tolist()) == ([[1, 4, 6, 7]], [[1.0]])
    assert record.zero_point is None
    assert record.dense().tolist() == [[-3.0, 0.0, 2.0, 3.0]]


def test_int8_symmetric_never_uses_minus_128():
    W = np.array([[-127.0, 127.0, -126.6, 0.0]])
    codes = rtn(W, bits=8, group_size=-1, symmetric=True).unpacked()
    assert (codes.astype(int) - 128).tolist() == [[-127, 127, -127, 0]]


def test_codes_use_the_stored_scale():
    """2.2 / 3 is 0.7333333 in float32 and 0.7333984 as stored; 1.1000977 / 2.2 * 3 rounds differently in the two."""
    W = np.array([[2.2, 1.1000488]], np.float32)
    record = rtn(W, bits=3, group_size=-1, symmetric=True)
    stored, exact = np.float32(record.scale[0, 0]), W[0, 0] / np.float32(3)
    assert np.rint(W[0, 1] / stored) != np.rint(W[0, 1] / exact)
    assert record.dense()[0, 1] == stored * np.rint(W[0, 1] / stored)


@given(weights(columns=st.sampled_from((4, 8, 24)), kinds=NORMAL_SCALES), BITS, st.sampled_from((4, -1, 0)))
def test_symmetric_error_is_at_most_half_a_step(W, bits, group_size):
    """The stored scale is within 2^-11 of amax / L and L <= 127, so amax / scale < L + 0.07: nothing is clipped.

    The quotient is rounded to float32, by at most 2^-24 of at most 128: a step more than half by 2^-17.
    """
    record = rtn(W, bits=bits, group_size=group_size, symmetric=True)
    error = np.abs(W.astype(np.float64) - record.dense())
    assert (error <= step_of(record) * (0.5 + 2.0**-17)).all()


@given(weights(columns=st.sampled_from((4, 8, 24)), kinds=NORMAL_SCALES), BITS, st.sampled_from((4, -1, 0)))
def test_affine_error_is_at_most_half_a_step_and_what_the_scale_lost(W, bits, group_size):
    """(hi - lo) / scale is within levels * 2^-11 of levels; an extreme may lie that far beyond the last half step."""
    record = rtn(W, bits=bits, group_size=group_size)
    levels = 2**bits - 1
    error = np.abs(W.astype(np.float64) - record.dense())
    assert (error <= step_of(record) * (0.5 + levels * 2.0**-11 * 1.001 + 2.0**-16)).all()


@given(weights(columns=st.sampled_from((4, 8))), BITS, st.booleans())
def test_rounding_twice_changes_nothing(W, bits, symmetric):
    """Symmetric: from the weight alone, where scales are normal float16 numbers (amax is then decoded to scale * L).

    Affine, whose extremes may have moved: given the same scale and zero point.
    """
    record = rtn(W, bits=bits, group_size=4, symmetric=symmetric)
    if symmetric and (record.scale >= 2.0**-14).all():
        again = rtn(record.dense(), bits=bits, group_size=4, symmetric=True)
        # A group whose every code is zero has lost its scale.
        lost = (record.dense().reshape(len(W), -1, 4) == 0).all(axis=-1)
        np.testing.assert_array_equal(again.scale[~lost], record.scale[~lost])
        np.testing.assert_array_equal(again.dense(), record.dense())
    scale, zero_point = record.scales()
    again = record.grid.encode(record.dense(), scale, None if symmetric else zero_point)
    np.testing.assert_array_equal(again, record.unpacked())


@given(weights(columns=st.sampled_from((4, 8)), kinds=NORMAL_SCALES), BITS, st.booleans(), st.integers(-2, 2))
def test_scaling_by_a_power_of_two_scales_the_result(W, bits, symmetric, power):
    """Exact as long as the scales stay normal float16 numbers; zero groups have scales of their own."""
    plain = rtn(W, bits=bits, group_size=4, symmetric=symmetric)
    scaled = rtn(W * np.float32(2.0**power), bits=bits, group_size=4, symmetric=symmetric)
    assume(min(plain.scale.min(), scaled.scale.min()) >= 2.0**-14)
    np.testing.assert_array_equal(scaled.codes, plain.codes)
    np.testing.assert_array_equal(scaled.dense(), plain.dense() * np.float32(2.0**power))


@given(weights(columns=st.sampled_from((4, 8))), BITS, st.sampled_from((4, -1, 0)), st.booleans())
def test_rows_are_independent_and_zero_stays_zero(W, bits, group_size, symmetric):
    order = np.random.default_rng(0).permutation(len(W))
    dense = rtn(W, bits=bits, group_size=group_size, symmetric=symmetric).dense()
    shuffled = rtn(W[order], bits=bits, group_size=group_size, symmetric=symmetric).dense()
    np.testing.assert_array_equal(shuffled, dense[order])
    assert not dense[W == 0].any()


@given(weights(columns=st.sampled_from((4, 8))), BITS, st.booleans())
def test_one_group_a_row_is_per_channel_and_one_row_per_tensor(W, bits, symmetric):
    group = rtn(W, bits=bits, group_size=W.shape[1], symmetric=symmetric)
    channel = rtn(W, bits=bits, group_size=-1, symmetric=symmetric)
    row = rtn(W[:1], bits=bits, group_size=-1, symmetric=symmetric)
    tensor = rtn(W[:1], bits=bits, group_size=0, symmetric=symmetric)
    for a, b in ((group, channel), (row, tensor)):
        assert a.codes.tobytes() == b.codes.tobytes() and a.scale.tobytes() == b.scale.tobytes()
        np.testing.assert_array_equal(a.dense(), b.dense())


def test_smaller_groups_and_more_bits_help_on_average():
    W = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    error = lambda **knobs: np.mean((W - rtn(W, **knobs).dense()) ** 2)
    by_group = [error(group_size=g) for g in (32, 128, -1, 0)]
    assert by_group == sorted(by_group)
    # Uniform rounding noise is scale^2 / 12, and scale shrinks by 255 / 15 from 4 to 8 bits.
    assert error(bits=4) / error(bits=8) == pytest.approx((255 / 15) ** 2, rel=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_groups_decode_to_zeros_beside_others(symmetric):
    W = np.array([[0.0, 0.0, -0.0, 0.0, 1.0, -2.0, 0.5, 0.0]], np.float32)
    record = rtn(W, group_size=4, symmetric=symmetric)
    assert not record.dense()[0, :4].any()
    assert np.isfinite(record.scale).all() and (record.scale > 0).all()


def test_weights_below_float16_keep_a_positive_scale():
    W = np.full((1, 4), 1e-9, np.float32)
    record = rtn(W, group_size=-1)
    assert record.scale[0, 0] == np.float16(2.0**-24)
    assert not record.dense().any()


def test_stored_bytes_at_4_bits():
    """Codes 4 bits, per group of 64 a float16 scale and a 4-bit zero point: 4.3125 bits; without zero point 4.25."""
    W = np.random.default_rng(2).normal(size=(128, 256)).astype(np.float32)
    assert 8 * rtn(W).nbytes / W.size == 4 + (16 + 4) / 64
    assert 8 * rtn(W, symmetric=True).nbytes / W.size == 4 + 16 / 64
    assert rtn(W, scale_dtype="float32", symmetric=True).scale.dtype == np.float32


def test_memory_order_type_and_read_only_do_not_matter():
    W = np.random.default_rng(3).normal(size=(6, 64)).astype(np.float32)
    W.flags.writeable = False
    plain = rtn(W)
    strided = np.zeros((12, 128), np.float32)
    strided[::2, ::2] = W
    for other in (np.asfortranarray(W), strided[::2, ::2]):
        assert rtn(other).codes.tobytes() == plain.codes.tobytes()
    assert rtn(W.astype(np.float64)).dense().dtype == np.float32


@pytest.mark.parametrize(
    ("W", "knobs", "message"),
    [
        (np.array([[1.0, np.nan]]), {"group_size": -1}, "NaN or Inf"),
        (np.array([[1.0, -np.inf]]), {"group_size": -1, "symmetric": True}, "NaN or Inf"),
        (np.ones((2, 100)), {}, "group_size 64 does not divide the 100 columns"),
        (np.ones((2, 4)), {"bits": 1, "group_size": -1}, "bits must be 2 to 8, got 1"),
        (np.ones((2, 4)), {"bits": 9, "group_size": -1}, "bits must be 2 to 8, got 9"),
        (np.ones((2, 4)), {"group_size": -2}, "group_size must be positive"),
        (np.ones((2, 4)), {"group_size": -1, "scale_dtype": "int8"}, "scale_dtype"),
        (np.full((2, 4), 1e6), {"group_size": -1, "bits": 2}, "does not fit float16"),
        (np.ones(4), {"group_size": -1}, "matrix"),
        (np.ones((0, 4)), {"group_size": -1}, "non-empty"),
    ],
)
def test_bad_input_is_one_clear_line(W, knobs, message):
    with pytest.raises(ValueError, match=message) as caught:
        rtn(W, **knobs)
    assert "\n" not in str(caught.value)
