"""GGUF blocks byte for byte: vectors worked by hand, and gguf-py as the oracle for random values and random bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.blocks import BLOCKS, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q6_K, Q8_0
from tests.strategies import weights

WRITABLE = [form for form in BLOCKS.values() if form.encode_fields]


def f16(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


def row(*values: float) -> np.ndarray:
    x = np.zeros(32, np.float32)
    x[: len(values)] = values
    return x


def test_q4_0_by_hand():
    # The largest magnitude is -8, so d = -8/-8 = 1 and code = x + 8; elements 0..15 are low nibbles, 16..31 high ones.
    x = np.arange(32, dtype=np.float32) % 16 - 8
    assert Q4_0.encode(x).tolist() == f16(1.0) + [code << 4 | code for code in range(16)]
    # The sign of the largest goes into d: +8 gives d = -1, its code is 0 and zero's is 8.
    assert Q4_0.encode(row(8)).tolist() == f16(-1.0) + [0x80] + [0x88] * 15
    assert Q4_0.decode(Q4_0.encode(row(8))).tolist() == row(8).tolist()


def test_q4_0_halves_round_up_and_the_top_code_is_clipped():
    codes = Q4_0.encode(row(-8, 0.5, -0.5, 7.5, 7.4, 1.5))[2:8] & 15
    assert codes.tolist() == [0, 9, 8, 15, 15, 10]


def test_a_zero_block_keeps_the_minus_zero_scale():
    assert Q4_0.encode(row()).tolist() == [0x00, 0x80] + [0x88] * 16
    for form in WRITABLE:
        assert not form.decode(form.encode(row())).any()


def test_q4_1_by_hand():
    x = np.arange(32, dtype=np.float32) % 16 * 0.5 - 2  # from -2 to 5.5: d = 0.5, m = -2
    data = Q4_1.encode(x)
    assert data.tolist() == f16(0.5) + f16(-2) + [code << 4 | code for code in range(16)]
    np.testing.assert_array_equal(Q4_1.decode(data), x)


def test_q5_0_puts_the_fifth_bit_where_the_element_is():
    x = np.arange(32, dtype=np.float32) - 16  # d = 1, codes 0..31
    data = Q5_0.encode(x)
    assert data[:6].tolist() == [*f16(1.0), 0x00, 0x00, 0xFF, 0xFF]  # elements 16..31 have codes 16..31
    assert data[6:].tolist() == [code << 4 | code for code in range(16)]
    np.testing.assert_array_equal(Q5_0.decode(data), x)


def test_q5_1_by_hand():
    x = np.arange(31, -1, -1, dtype=np.float32)
    data = Q5_1.encode(x)
    assert data[:8].tolist() == f16(1) + f16(0) + [0xFF, 0xFF, 0x00, 0x00]
    np.testing.assert_array_equal(Q5_1.decode(data), x)


def test_q8_0_halves_go_away_from_zero():
    data = Q8_0.encode(row(127, 0.5, 1.5, 2.5, -0.5, -2.5, 0.49999997))
    assert data[:2].tolist() == f16(1.0)
    assert data[2:9].view(np.int8).tolist() == [127, 1, 2, 3, -1, -3, 0]


def test_six_bit_scales_by_hand():
    scales, minima = np.arange(8) * 9, 63 - np.arange(8) * 9  # 0..63 and 63..0: every bit is used
    block = np.zeros((1, 144), np.uint8)
    for j in range(4):
        block[0, 4 + j] = scales[j] | scales[j + 4] >> 4 << 6
        block[0, 8 + j] = minima[j] | minima[j + 4] >> 4 << 6
        block[0, 12 + j] = scales[j + 4] & 15 | (minima[j + 4] & 15) << 4
    got = Q4_K.layout.unpack(block)
    assert [*got["sc_low"][0], *got["sc_high"][0]] == scales.tolist()
    assert [*got["mn_low"][0], *got["mn_high"][0]] == minima.tolist()


def test_q4_k_by_hand():
    """Sub-block j has scale j + 1 and minimum 2j; element i has code (i + j) % 16."""
    i = np.arange(256)
    j, codes = i // 32, (i + i // 32) % 16
    block = np.zeros(144, np.uint8)
    block[:4] = f16(0.5) + f16(0.25)
    for k in range(4):
        block[4 + k], block[8 + k] = k + 1, 2 * k
        block[12 + k] = (k + 5) | (2 * (k + 4)) << 4
    for n, code in enumerate(codes):
        block[16 + 32 * (n // 64) + n % 32] |= code << 4 * (n % 64 // 32)
    np.testing.assert_array_equal(Q4_K.decode(block), 0.5 * (j + 1) * codes - 0.25 * 2 * j)


def test_q6_k_by_hand():
    i = np.arange(256)
    codes, scales = i * 7 % 64, np.arange(16) - 8
    block = np.zeros(210, np.uint8)
    for n, code in enumerate(codes):
        half, k, place = n // 128, n % 128 // 32, n % 32
        block[64 * half + 32 * (k % 2) + place] |= (code & 15) << 4 * (k // 2)
        block[128 + 32 * half + place] |= (code >> 4) << 2 * k
    block[192:208] = scales.astype(np.int8).view(np.uint8)
    block[208:] = f16(0.25)
    np.testing.assert_array_equal(Q6_K.decode(block), 0.25 * scales[i // 16] * (codes - 32.0))


@pytest.mark.parametrize("form", WRITABLE, ids=lambda form: form.name)
@given(data=st.data())
def test_the_error_stays_within_the_grid(form, data):
    x = data.draw(weights(columns=st.sampled_from([32, 64])))
    error = np.abs(form.decode(form.encode(x)).astype(np.float64) - x).reshape(-1, 32)
    blocks = x.astype(np.float64).reshape(-1, 32)
    levels = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127, "Q4_1": 15, "Q5_1": 31}[form.name]
    affine = form.name.endswith("_1")
    top = np.abs(blocks).max(axis=1)
    step = (blocks.max(axis=1) - blocks.min(axis=1) if affine else top) / levels
    # Half a step; a whole one at the clipped end of the signed grids; scale and minimum are rounded to float16, whose
    # relative error is 2^-11 (2^-25 absolute among its subnormals) times the largest code.
    bound = (1.0 if form.name in ("Q4_0", "Q5_0") else 0.5) * step * 1.001 + 2**-10 * top + 2**-24 * levels
    assert (error.max(axis=1) <= bound).all()


@pytest.mark.parametrize("form", BLOCKS.values(), ids=lambda form: form.name)
def test_shapes_and_memory_order(form):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (2, 3, 2 * form.bytes_per_block), dtype=np.uint8)
    values = form.decode(data)
    assert values.shape == (2, 3, 2 * form.block_size)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(form.decode(data[:, ::2]), values[:, ::2])
    data.flags.writeable = False
    np.testing.assert_array_equal(form.decode(data[1, 2]), values[1, 2])
    assert form.decode(data[:0]).shape == (0, 3, 2 * form.block_size)
    assert form.bits_per_weight == 8 * form.bytes_per_block / form.block_size


@pytest.mark.parametrize("form", WRITABLE, ids=lambda form: form.name)
def test_encode_refuses_what_it_cannot_hold(form):
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            form.encode(row(1, bad))
    with pytest.raises(ValueError, match="overflows float16"):
        form.encode(row(3e38, -3e38) if form is Q8_0 else row(1e38, -1e38))
    with pytest.raises(ValueError, match=r"multiple of 32, got shape \(31,\)"):
        form.encode(np.zeros(31, np.float32))
    with pytest.raises(ValueError, match="multiple of"):
        form.decode(np.zeros(form.bytes_per_block + 1, np.uint8))
    with pytest.raises(ValueError, match="got float32"):
        form.decode(np.zeros(form.bytes_per_block, np.float32))
    tiny = form.encode(row(1e-44, -1e-44))  # 1/d overflows
    assert not form.decode(tiny).any()


def test_formats_that_are_only_read_say_so():
    with pytest.raises(ValueError, match="Q4_K can be read but not written"):
        Q4_K.encode(np.zeros(256, np.float32))


def test_finite_scales_mean_finite_numbers():
    for form in BLOCKS.values():
        data = np.zeros((3, form.bytes_per_block), np.uint8)
        assert form.is_finite(data)
        floats = [field.name for field in form.layout.fields if field.dtype == "f2"]
        assert floats
        for name in floats:
            fields = form.layout.unpack(data)
            fields[name][1] = np.inf
            assert not form.is_finite(form.layout.pack(**fields))


@pytest.mark.oracle
@pytest.mark.parametrize("form", BLOCKS.values(), ids=lambda form: form.name)
def test_random_bytes_decode_as_in_gguf_py(form):
    from gguf import GGMLQuantizationType, quants

    data = np.random.default_rng(1).integers(0, 256, (300, 2 * form.bytes_per_block), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(data, GGMLQuantizationType[form.name])
    np.testing.assert_array_equal(form.decode(data), expected)
    assert form.type_id == GGMLQuantizationType[form.name]


@pytest.mark.oracle
@pytest.mark.parametrize("form", WRITABLE, ids=lambda form: form.name)
def test_values_encode_as_in_gguf_py(form):
    from gguf import GGMLQuantizationType, quants

    rng = np.random.default_rng(2)
    x = rng.standard_normal((3000, 64)) * np.exp(3 * rng.standard_normal((3000, 1)))
    x[:1000] = np.round(x[:1000] * 4) / 8  # ties
    edges = [row(), -row(), row(8), row(-8), row(1, -1), np.full(32, -3.0), np.arange(32) - 16.0, np.arange(32) / 2 - 8]
    x = np.concatenate([x.reshape(-1, 32), edges]).astype(np.float32)
    np.testing.assert_array_equal(form.encode(x), quants.quantize(x, GGMLQuantizationType[form.name]))
