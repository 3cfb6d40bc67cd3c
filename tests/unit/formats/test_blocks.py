"""GGUF blocks: what all formats have in common, and the simple ones byte for byte, worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.blocks import BLOCKS, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1
from refllm.formats.blocks.simple import row_weights
from tests.strategies import weights

FORMATS = list(BLOCKS.values())
SIMPLE = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0]


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
    assert Q4_0.encode(-row()).tolist() == Q4_0.encode(row()).tolist()


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


def check_error(form, x):
    error = np.abs(form.decode(form.encode(x)).astype(np.float64) - x).reshape(-1, 32)
    blocks = x.astype(np.float64).reshape(-1, 32)
    levels = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127, "Q4_1": 15, "Q5_1": 31}[form.name]
    affine = form.name.endswith("_1")
    top, low, high = np.abs(blocks).max(axis=1), blocks.min(axis=1), blocks.max(axis=1)
    span, minimum = (high - low, np.abs(low)) if affine else (top, 0 * top)
    step = span / levels
    # Half a step; a whole one at the clipped end of the signed grids; scale and minimum are rounded to float16, whose
    # relative error is 2^-11 (2^-25 absolute among its subnormals): of the scale times the largest code that is 2^-11
    # of the span. A thousandth more for what float32 rounds.
    halves = 2 if form.name in ("Q4_0", "Q5_0") else 1
    bound = 1.001 * (halves * step / 2 + 2**-11 * (span + minimum)) + 2**-25 * (levels + affine)
    assert (error.max(axis=1) <= bound).all()


@pytest.mark.parametrize("form", SIMPLE, ids=lambda form: form.name)
@given(data=st.data())
def test_the_error_stays_within_the_grid(form, data):
    check_error(form, data.draw(weights(columns=st.sampled_from([32, 64]))))


def test_roundings_of_scale_and_minimum_add_up():
    """Both halfway between two float16 numbers, both rounded down, and an element just below the middle of its step."""
    scale, minimum = (1 + 2**-11) / 8, -(1 + 3 * 2**-11)
    x = row(*(minimum + scale * np.arange(16)), minimum + 14.4999 * scale)
    x[x == 0] = minimum
    assert Q4_1.encode(x)[:4].tolist() == f16(1 / 8) + f16(-(1 + 4 * 2**-11))
    check_error(Q4_1, x)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
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


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_encode_refuses_what_it_cannot_hold(form):
    good = np.ones(form.block_size, np.float32)
    for bad in (np.nan, np.inf, -np.inf, 1e300):
        with pytest.raises(ValueError, match="NaN or infinity"):
            form.encode(np.where(np.arange(form.block_size) == 3, bad, 1.0))
    if form.name not in ("Q8_K", "MXFP4", "NVFP4"):  # a float32 scale, an exponent, a scale that saturates
        with pytest.raises(ValueError, match="overflows float16"):
            form.encode(np.where(np.arange(form.block_size) % 2, 3e38, -3e38))
    with pytest.raises(ValueError, match=rf"multiple of {form.block_size}, got shape \({form.block_size - 1},\)"):
        form.encode(good[1:])
    with pytest.raises(ValueError, match="multiple of"):
        form.decode(np.zeros(form.bytes_per_block + 1, np.uint8))
    with pytest.raises(ValueError, match="got float32"):
        form.decode(np.zeros(form.bytes_per_block, np.float32))
    if not form.takes_importance:
        with pytest.raises(ValueError, match="without importance"):
            form.encode(good, good)
        return
    for importance, why in ((good[1:], "must have the shape"), (-good, "not negative"), (good * np.nan, "finite")):
        with pytest.raises(ValueError, match=why):
            form.encode(good, importance)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_zeros_and_tiny_numbers_come_back_as_zeros(form):
    """Also where 1/d overflows, and with importance, whatever it says."""
    for scale in (0.0, -0.0, 1e-44, -1e-39):
        x = np.full(form.block_size, scale, np.float32)
        x[1] *= -1
        assert np.abs(form.decode(form.encode(x))).max() <= 1e-38
        if form.takes_importance:
            assert np.abs(form.decode(form.encode(x, np.zeros(form.block_size)))).max() <= 1e-38


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_blocks_are_encoded_alike_wherever_they_lie(form):
    """One block at a time, all at once, in any memory order; inputs are left alone."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2 * form.block_size)).astype(np.float32)
    data = form.encode(x)
    alone = [form.encode(block) for block in x.reshape(-1, form.block_size)]
    np.testing.assert_array_equal(data.reshape(-1, form.bytes_per_block), alone)
    wide = np.asfortranarray(np.repeat(x, 2, axis=0))[::2]
    wide.flags.writeable = False
    np.testing.assert_array_equal(form.encode(wide.astype(">f4")), data)
    assert form.encode(x[:0]).shape == (0, 2 * form.bytes_per_block)


@pytest.mark.parametrize("form", [form for form in FORMATS if form.takes_importance], ids=lambda form: form.name)
def test_importance_lowers_the_error_where_it_is_large(form):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(512)).astype(np.float32)
    error = lambda data: float((importance * (form.decode(data).astype(np.float64) - x) ** 2).sum())
    assert error(form.encode(x, importance)) < error(form.encode(x))
    # Powers of two change no rounding; the same importance for every row is the importance of all of them.
    np.testing.assert_array_equal(form.encode(x, importance), form.encode(x, np.tile(4 * importance, (64, 1))))


def test_row_weights_by_hand():
    x, importance = np.float32([[3, 4, 0, -1]]), np.float32([1, 2, 3, 4])
    np.testing.assert_allclose(row_weights(x, importance), importance * np.sqrt(26 / 4 + x**2), rtol=1e-6)


def test_q8_1_holds_the_sum_of_its_codes():
    data = Q8_1.encode(row(127, -3.5, 2.5))
    fields = Q8_1.layout.unpack(data[None])
    assert (fields["d"].item(), fields["s"].item()) == (1.0, 127 - 4 + 3)
    assert fields["q"][0, :3].tolist() == [127, -4, 3]
    np.testing.assert_array_equal(Q8_1.decode(data)[:3], [127, -4, 3])


def test_finer_types_err_less():
    x = np.random.default_rng(2).standard_normal((16, 512)).astype(np.float32)
    error = lambda name: np.square(BLOCKS[name].decode(BLOCKS[name].encode(x)) - x).mean()
    for names in (("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), ("Q4_0", "Q5_0", "Q8_0"), ("Q4_1", "Q5_1", "Q8_1")):
        errors = [error(name) for name in names]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_finite_bytes_are_told_from_others(form):
    data = np.random.default_rng(3).integers(0, 256, (200, form.bytes_per_block), dtype=np.uint8)
    finite = [form.is_finite(block) for block in data]
    expected = np.isfinite(form.decode(data)).all(axis=1)
    if form is Q8_1:  # the sum counts as well
        expected &= np.isfinite(form.layout.unpack(data)["s"][:, 0])
    assert finite == expected.tolist()
    assert form.is_finite(np.zeros((2, form.bytes_per_block), np.uint8))
    if form.name != "NVFP4":  # every byte is finite there
        assert not form.is_finite(np.full((2, form.bytes_per_block), 0xFF, np.uint8))


def test_type_ids_are_those_of_gguf_files():
    from refllm.formats.gguf import TENSOR_TYPES

    for form in FORMATS:
        assert TENSOR_TYPES[form.type_id] == (form.name, form.block_size, form.bytes_per_block)
    assert {form.name for form in FORMATS if form.activations_only} == {"Q8_1", "Q8_K"}
