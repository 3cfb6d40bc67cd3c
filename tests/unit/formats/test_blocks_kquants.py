"""K-quants: bits by hand, exact blocks, and searches that equal slow ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.blocks import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K, scale_search
from tests.strategies import PROPERTY, mixed_weights

I = np.arange(256)
H, K, L = I // 128, I % 128 // 32, I % 32


def f16(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


def six_bits(scales, minima) -> list[int]:
    """The twelve bytes of Q4_K and Q5_K."""
    packed = [0] * 12
    for j in range(4):
        packed[j] = scales[j] | scales[j + 4] >> 4 << 6
        packed[j + 4] = minima[j] | minima[j + 4] >> 4 << 6
        packed[j + 8] = scales[j + 4] & 15 | (minima[j + 4] & 15) << 4
    return packed


def test_q2_k_by_hand():
    codes, scales, minima = I * 7 % 4, np.arange(16), 15 - np.arange(16)
    block = np.zeros(84, np.uint8)
    block[:16] = scales | minima << 4
    for n, code in enumerate(codes):
        block[16 + 32 * H[n] + L[n]] |= code << 2 * K[n]
    block[80:] = f16(0.5) + f16(0.25)
    np.testing.assert_array_equal(Q2_K.decode(block), 0.5 * scales[I // 16] * codes - 0.25 * minima[I // 16])


def test_q3_k_by_hand():
    codes, scales = I * 3 % 8, np.arange(16) * 4 + 3  # 3..63
    block = np.zeros(110, np.uint8)
    for n, code in enumerate(codes):
        block[L[n]] |= (code >> 2) << n // 32
        block[32 + 32 * H[n] + L[n]] |= (code & 3) << 2 * K[n]
    for j, scale in enumerate(scales):
        block[96 + j % 8] |= (scale & 15) << 4 * (j // 8)
        block[104 + j % 4] |= (scale >> 4) << 2 * (j // 4)
    block[108:] = f16(-0.5)
    np.testing.assert_array_equal(Q3_K.decode(block), -0.5 * (scales[I // 16] - 32.0) * (codes - 4.0))


def test_six_bit_scales_by_hand():
    scales, minima = np.arange(8) * 9, 63 - np.arange(8) * 9  # 0..63 and 63..0: every bit is used
    block = np.zeros((1, 144), np.uint8)
    block[0, 4:16] = six_bits(scales, minima)
    got = Q4_K.layout.unpack(block)
    assert [*got["sc_low"][0], *got["sc_high"][0]] == scales.tolist()
    assert [*got["mn_low"][0], *got["mn_high"][0]] == minima.tolist()


@pytest.mark.parametrize("form", [Q4_K, Q5_K], ids=lambda form: form.name)
def test_q4_k_and_q5_k_by_hand(form):
    """Sub-block j has scale j + 1 and minimum 2j."""
    j = I // 32
    codes = (I + j) % (16 if form is Q4_K else 32)
    block = np.zeros(form.bytes_per_block, np.uint8)
    block[:4] = f16(0.5) + f16(0.25)
    block[4:16] = six_bits(np.arange(8) + 1, 2 * np.arange(8))
    for n, code in enumerate(codes):
        block[form.bytes_per_block - 128 + 32 * (n // 64) + L[n]] |= (code & 15) << 4 * (n % 64 // 32)
        if form is Q5_K:
            block[16 + L[n]] |= (code >> 4) << n // 32
    np.testing.assert_array_equal(form.decode(block), 0.5 * (j + 1) * codes - 0.25 * 2 * j)


def test_q6_k_by_hand():
    codes, scales = I * 7 % 64, np.arange(16) - 8
    block = np.zeros(210, np.uint8)
    for n, code in enumerate(codes):
        block[64 * H[n] + 32 * (K[n] % 2) + L[n]] |= (code & 15) << 4 * (K[n] // 2)
        block[128 + 32 * H[n] + L[n]] |= (code >> 4) << 2 * K[n]
    block[192:208] = scales.astype(np.int8).view(np.uint8)
    block[208:] = f16(0.25)
    np.testing.assert_array_equal(Q6_K.decode(block), 0.25 * scales[I // 16] * (codes - 32.0))


def test_q8_k_by_hand():
    x = np.float32((I * 5) % 255 - 127)
    data = Q8_K.encode(x)
    fields = Q8_K.layout.unpack(data[None])
    assert fields["d"].item() == 1.0  # the largest magnitude, -127, gets the code 127 of a negated scale ... of 127
    np.testing.assert_array_equal(fields["q"][0], x)
    np.testing.assert_array_equal(fields["sums"][0], x.reshape(16, 16).sum(axis=1))
    assert data[260:262].view("<i2").item() == x[:16].sum()
    assert not Q8_K.encode(np.zeros(256, np.float32)).any()


def test_what_a_block_can_say_comes_back():
    """Numbers on the grid of one scale for all sub-blocks are found exactly."""
    sub = np.tile(np.r_[0:16, 15:-1:-1], 8).astype(np.float32)
    np.testing.assert_allclose(Q4_K.decode(Q4_K.encode(sub * 63)), sub * 63, rtol=1e-3)
    signed = np.tile(np.r_[-32:-24, 24:32], 16).astype(np.float32)
    np.testing.assert_allclose(Q6_K.decode(Q6_K.encode(signed * 128)), signed * 128, rtol=4e-3)
    assert not Q6_K.encode(np.full(256, 1e-16, np.float32)).any()  # an empty block is all zero bytes


@pytest.mark.parametrize("form", [Q2_K, Q3_K, Q4_K, Q5_K, Q6_K], ids=lambda form: form.name)
@given(data=st.data())
def test_the_error_is_within_a_step_of_the_plain_grid(form, data):
    """A share of the largest magnitude that a plain grid of so many bits, with rounded scales, would reach."""
    x = data.draw(mixed_weights(rows=2, columns=256))
    error = np.abs(form.decode(form.encode(x)).astype(np.float64) - x).max(axis=1)
    top = np.abs(x.astype(np.float64)).max(axis=1)
    share = {"Q2_K": 0.7, "Q3_K": 0.5, "Q4_K": 0.2, "Q5_K": 0.12, "Q6_K": 0.06}[form.name]
    assert (error <= share * 2 * top + 2**-24 * 63 * 31).all()


def slow_qx(x, nmax, w):
    """make_qx for one block, a number at a time."""
    f = np.float32
    largest = f(0)
    for v in x:
        if abs(v) > abs(largest):
            largest = v
    if abs(largest) < f(1e-15):
        return f(0)
    scale = best = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(f(nmax) + f(0.1) * f(step)) / largest
        sumlx = suml2 = f(0)
        for v, weight in zip(x, w, strict=True):
            l = f(min(max(int(np.rint(inverse * v)), -nmax), nmax - 1))
            sumlx, suml2 = sumlx + weight * v * l, suml2 + weight * l * l
        if best is None or (suml2 > 0 and sumlx * sumlx > best * suml2):
            scale = sumlx / suml2 if suml2 else f(0)
            best = scale * sumlx
    return scale


@PROPERTY
@given(mixed_weights(rows=st.integers(1, 4), columns=16), st.sampled_from([4, 32]))
def test_make_qx_equals_the_slow_text(x, nmax):
    x = np.where(np.abs(x) < 1e-12, np.float32(0), x)
    with np.errstate(all="ignore"):
        scale, codes = scale_search.make_qx(x, nmax, x * x)
        expected = [slow_qx(row, nmax, row * row) for row in x]
    assert scale.tolist() == expected
    assert codes.min() >= 0 and codes.max() < 2 * nmax


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**16))
def test_sums_run_in_order(k, n, seed):
    terms = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    expected = [np.float32(0)] * n
    for row in terms:
        expected = [a + b for a, b in zip(expected, row, strict=True)]
    assert scale_search.total(terms).tolist() == [float(v) for v in expected]
    assert scale_search.total(np.full((k, n), -0.0, np.float32)).tobytes() == bytes(4 * n)  # 0 + -0 = +0


def test_nearest_int_is_rint_and_then_what_the_bits_say():
    v = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 4194303, -4194303, 0.49999997])
    assert scale_search.nearest_int(v).tolist() == np.rint(v).astype(int).tolist()
    odd = np.float32([np.nan, np.inf, -np.inf, 1e10])
    with np.errstate(all="ignore"):
        assert scale_search.nearest_int(odd).tolist()[:3] == [0, -(2**22), -(2**22)]


def test_a_search_is_no_worse_than_its_start():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 32)).astype(np.float32)
    w = np.abs(x) + 1
    with np.errstate(all="ignore"):
        scale, low, codes = scale_search.make_qkx(x, 15, w, -1.0, 0.1, 20)
    assert (low >= 0).all() and codes.min() >= 0 and codes.max() <= 15
    start = (x.max(axis=1) - x.min(axis=1)) / 15
    plain = start[:, None] * np.rint((x - x.min(axis=1, keepdims=True)) / start[:, None]) + x.min(axis=1, keepdims=True)
    error = (w * (scale[:, None] * codes - low[:, None] - x) ** 2).sum(axis=1)
    assert (error <= (w * (plain - x) ** 2).sum(axis=1) * 1.001).all()
