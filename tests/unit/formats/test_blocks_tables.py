"""Blocks with tables and blocks of one and two bits: bits by hand, exact values, ties, the ends of the scales."""

import numpy as np
import pytest

from refllm.formats.blocks import IQ4_NL, IQ4_XS, MXFP4, NVFP4, Q1_0, Q2_0, TQ1_0, TQ2_0
from refllm.formats.blocks.lookup import IQ4_LEVELS
from refllm.formats.blocks.scale_search import nearest_level

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
I = np.arange(256)


def f16(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


def test_iq4_nl_by_hand():
    block = np.array(f16(0.5) + [(15 - code) << 4 | code for code in range(16)], np.uint8)
    np.testing.assert_array_equal(IQ4_NL.decode(block), 0.5 * np.r_[IQ4_LEVELS, IQ4_LEVELS[::-1]].astype(float))


def test_iq4_xs_by_hand():
    codes, scales = I * 3 % 16, np.array([0, 9, 18, 27, 36, 45, 54, 63])
    block = np.zeros(136, np.uint8)
    block[:2] = f16(0.25)
    high = sum(int(scale >> 4) << 2 * j for j, scale in enumerate(scales))
    block[2:4] = [high & 255, high >> 8]
    for j, scale in enumerate(scales):
        block[4 + j // 2] |= (scale & 15) << 4 * (j % 2)
    for n, code in enumerate(codes):
        block[8 + 16 * (n // 32) + n % 16] |= code << 4 * (n % 32 // 16)
    expected = 0.25 * (scales[I // 32] - 32.0) * IQ4_LEVELS[codes].astype(float)
    np.testing.assert_array_equal(IQ4_XS.decode(block), expected)


def test_levels_come_back_exactly():
    levels = np.repeat(IQ4_LEVELS, 2).astype(np.float32)
    np.testing.assert_array_equal(IQ4_NL.decode(IQ4_NL.encode(levels)), levels)
    np.testing.assert_array_equal(IQ4_XS.decode(IQ4_XS.encode(np.tile(levels, 8) * 32)), np.tile(levels, 8) * 32)


def test_nearest_level_is_nearest_and_halves_go_up():
    v = np.arange(-140, 140, 1 / 8, dtype=np.float32)
    distance = np.abs(v[:, None] - IQ4_LEVELS.astype(np.float32))
    expected = 15 - distance[:, ::-1].argmin(axis=1)  # the higher of two
    np.testing.assert_array_equal(nearest_level(v, IQ4_LEVELS), expected)
    assert nearest_level(np.float32([-np.inf, np.inf, np.nan, 1e30]), IQ4_LEVELS).tolist() == [0, 15, 15, 15]


def test_mxfp4_by_hand():
    for e, scale in ((0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (252, 2.0**125)):
        block = np.array([e] + [(15 - code) << 4 | code for code in range(16)], np.uint8)
        np.testing.assert_array_equal(MXFP4.decode(block), scale * np.array(FP4 + FP4[::-1]))
        assert MXFP4.is_finite(block)
    assert not MXFP4.is_finite(np.array([253, 7] + [0] * 15, np.uint8))


def test_mxfp4_halves_go_toward_zero_and_never_to_minus_zero():
    x = np.zeros(32, np.float32)
    x[:17] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -0.0, 0.2501]
    data = MXFP4.encode(x)
    assert data[0] == 127
    assert MXFP4.decode(data)[:17].tolist() == [6, 0, 0.5, 1, 1.5, 2, 3, 4, 0, -0.5, -1, -1.5, -2, -3, -4, 0, 0.5]
    assert not np.signbit(MXFP4.decode(data)[[8, 15]]).any()


@pytest.mark.parametrize(
    ("largest", "e"),
    [
        (0, 0),
        (1e-45, 0),
        (2.0**-126, 0),
        (2.0**-125, 0),
        (2.0**-124, 1),
        (4, 127),
        (7.99, 127),
        (8, 128),
        (3.4e38, 252),
    ],
)
def test_mxfp4_exponents(largest, e):
    x = np.zeros(32, np.float32)
    x[5] = -largest
    data = MXFP4.encode(x)
    assert data[0] == e
    assert MXFP4.is_finite(data)


def test_mxfp4_takes_a_number_just_below_a_power_of_two_for_it():
    """float32(log2(16 - 2^-20)) is 4."""
    x = np.zeros(32, np.float32)
    x[0] = np.nextafter(np.float32(16), np.float32(0))
    assert MXFP4.encode(x)[0] == 4 - 2 + 127


def test_nvfp4_by_hand():
    scales = {
        0x00: 0,
        0x01: 2.0**-9,
        0x07: 7 * 2.0**-9,
        0x08: 2.0**-6,
        0x38: 1,
        0x3C: 1.5,
        0x7E: 448,
        0x7F: 0,
        0x81: 2.0**-9,
    }
    for code, scale in scales.items():
        block = np.zeros(36, np.uint8)
        block[:4] = [code, 0x38, code, 0x40]
        for s in range(4):
            block[4 + 8 * s : 12 + 8 * s] = [(k + 8) << 4 | k for k in range(8)]
        expected = np.outer([scale, 1, scale, 2], FP4).reshape(-1)
        np.testing.assert_array_equal(NVFP4.decode(block), expected)


@pytest.mark.parametrize(
    ("largest", "code"),
    [
        (0, 0), (6, 0x38), (6 * 1.0625, 0x39), (6 * 1.0624, 0x38), (6 * 1.96875, 0x40),
        (6 * 2.0**-10, 1), (5.99 * 2.0**-10, 0), (6 * 7.6 * 2.0**-9, 7), (6 * 2.0**-6, 8),
        (6 * 247, 0x77), (6 * 248, 0x7E), (1e30, 0x7E),
    ],
)  # fmt: skip
def test_nvfp4_scales(largest, code):
    """Halves up; subnormals stop at 7; what would have the largest exponent becomes 448."""
    x = np.zeros(64, np.float32)
    x[16] = largest
    assert NVFP4.encode(x)[:4].tolist() == [0, code, 0, 0]


def test_tq1_0_by_hand():
    digits = I * 5 % 3
    block = np.zeros(54, np.uint8)
    for m in range(32):
        block[m] = -(-sum(int(digits[m + 32 * n]) * 3 ** (4 - n) for n in range(5)) * 256 // 243)
    for m in range(16):
        block[32 + m] = -(-sum(int(digits[160 + m + 16 * n]) * 3 ** (4 - n) for n in range(5)) * 256 // 243)
    for m in range(4):
        block[48 + m] = -(-sum(int(digits[240 + m + 4 * n]) * 3 ** (4 - n) for n in range(4)) * 256 // 243)
    block[52:] = f16(0.5)
    x = (0.5 * (digits - 1)).astype(np.float32)
    np.testing.assert_array_equal(TQ1_0.decode(block), x)
    np.testing.assert_array_equal(TQ1_0.encode(x), block)


def test_tq2_0_by_hand():
    codes = I * 5 % 3
    block = np.zeros(66, np.uint8)
    for n, code in enumerate(codes):
        block[32 * (n // 128) + n % 32] |= code << 2 * (n % 128 // 32)
    block[64:] = f16(2)
    x = np.float32(2 * (codes - 1))
    np.testing.assert_array_equal(TQ2_0.encode(x), block)
    np.testing.assert_array_equal(TQ2_0.decode(block), x)


def test_q1_0_by_hand():
    x = np.where(np.arange(128) % 3, 1.0, -2.0).astype(np.float32)
    x[5], x[6] = 0.0, -0.0
    data = Q1_0.encode(x)
    bits = sum(int(v >= 0) << i for i, v in enumerate(x))
    assert data.tolist() == f16(np.abs(x).mean()) + list(bits.to_bytes(16, "little"))
    np.testing.assert_array_equal(Q1_0.decode(data), np.float16(np.abs(x).mean()) * np.where(x >= 0, 1.0, -1.0))


def test_q2_0_by_hand():
    x = np.zeros(64, np.float32)
    x[:6] = [4, -4, 2, -2, 1.99, -1.99]  # a half of the scale goes away from zero
    data = Q2_0.encode(x)
    assert data.tolist() == f16(4) + [0b00_10_00_10, 0b01_01_01_01] + [0b01010101] * 14
    np.testing.assert_array_equal(Q2_0.decode(np.array(f16(4) + [0b11_10_01_00] * 16, np.uint8)), [-4, 0, 4, 8] * 16)
