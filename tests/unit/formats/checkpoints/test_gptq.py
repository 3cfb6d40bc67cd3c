"""GPTQ: words by hand, both zero-point conventions, act-order, and what must be refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.checkpoints import gptq_dequantize, gptq_pack, gptq_unpack
from tests.strategies import PROPERTY

UNIT = {2: 16, 3: 32, 4: 8, 8: 4}


@st.composite
def weights(draw):
    bits = draw(st.sampled_from((2, 3, 4, 8)))
    groups, size = draw(st.integers(1, 4)), draw(st.sampled_from((1, 2, 4, 8))) * UNIT[bits] // 4
    columns, out = groups * size, draw(st.integers(1, 3)) * UNIT[bits]
    columns = -(-columns // UNIT[bits]) * UNIT[bits]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g_idx = None
    if columns % groups or draw(st.booleans()):
        g_idx = rng.integers(0, groups, columns)
    checkpoint_format = draw(st.sampled_from(("gptq", "gptq_v2")))
    codes = rng.integers(0, 1 << bits, (out, columns), dtype=np.uint8)
    zero = rng.integers(checkpoint_format == "gptq", 1 << bits, (out, groups), dtype=np.uint8)
    scale = rng.standard_normal((out, groups)).astype(np.float16)
    return bits, codes, scale, zero, g_idx, checkpoint_format


@PROPERTY
@given(case=weights())
def test_round_trip_and_bit_by_bit(case):
    bits, codes, scale, zero, g_idx, checkpoint_format = case
    kind = {"bits": bits, "checkpoint_format": checkpoint_format}
    tensors = gptq_pack(codes, scale, zero, g_idx=g_idx, **kind)
    back = gptq_unpack(tensors, **kind)
    assert np.array_equal(back.codes, codes) and np.array_equal(back.zero_point, zero)
    assert back.scale.tobytes() == scale.tobytes()
    groups = back.g_idx if g_idx is None else g_idx
    assert np.array_equal(back.g_idx, groups)
    # the slow twin: one column of qweight and one row of qzeros are one little-endian integer each
    column = int.from_bytes(np.ascontiguousarray(tensors["qweight"][:, -1], "<i4").tobytes(), "little")
    assert [column >> bits * i & (1 << bits) - 1 for i in range(codes.shape[1])] == codes[-1].tolist()
    row = int.from_bytes(np.ascontiguousarray(tensors["qzeros"][-1], "<i4").tobytes(), "little")
    stored = [row >> bits * i & (1 << bits) - 1 for i in range(len(codes))]
    assert stored == (zero[:, -1] - (checkpoint_format == "gptq")).tolist()
    w = gptq_dequantize(tensors, **kind)
    o, i = len(codes) - 1, codes.shape[1] // 2
    g = int(groups[i])
    assert w[o, i] == float(scale[o, g]) * (int(codes[o, i]) - int(zero[o, g]))


def test_words_by_hand():
    one = np.ones((8, 1))
    inputs = gptq_pack(np.tile(np.arange(8), (8, 1)), one)
    assert [hex(w) for w in inputs["qweight"][0]] == ["0x76543210"] * 8 and inputs["qweight"].shape == (1, 8)
    outputs = gptq_pack(np.zeros((8, 8), int), one, np.arange(8).reshape(8, 1), checkpoint_format="gptq_v2")
    assert hex(outputs["qzeros"][0, 0]) == "0x76543210"


def test_symmetric_zero_words_of_both_versions():
    codes, one = np.zeros((8, 8), int), np.ones((8, 1))
    assert hex(gptq_pack(codes, one)["qzeros"][0, 0]) == "0x77777777"
    v2 = gptq_pack(codes, one, checkpoint_format="gptq_v2")["qzeros"]
    assert hex(v2.view(np.uint32)[0, 0]) == "0x88888888"


def test_three_bits_over_three_words():
    """Value 10 has its low two bits on top of word 0, value 21 its low bit on top of word 1."""
    codes = np.zeros((32, 32), int)
    codes[0, 10], codes[1, 21], codes[2, 22] = 7, 7, 5
    words = gptq_pack(codes, np.ones((32, 1)), bits=3)["qweight"].view(np.uint32)
    assert words[:, 0].tolist() == [3 << 30, 1, 0]
    assert words[:, 1].tolist() == [0, 1 << 31, 3]
    assert words[:, 2].tolist() == [0, 0, 5 << 2]


def test_act_order_takes_the_group_of_each_column():
    codes = np.arange(8).reshape(1, 8).repeat(8, axis=0)
    scale = np.array([[1, 10]]).repeat(8, axis=0).astype(np.float16)
    g_idx = np.array([0, 1, 1, 0, 1, 0, 0, 1])
    tensors = gptq_pack(codes, scale, np.full((8, 2), 1), g_idx=g_idx)
    assert gptq_dequantize(tensors)[3].tolist() == [-1, 0, 10, 2, 30, 4, 5, 60]


def test_zero_point_0_cannot_be_stored_in_v1():
    zero = np.ones((8, 1), int)
    zero[3] = 0
    with pytest.raises(ValueError, match=r"zero_point\[3, 0\] is 0.*gptq_v2"):
        gptq_pack(np.zeros((8, 8), int), np.ones((8, 1)), zero)
    tensors = gptq_pack(np.zeros((8, 8), int), np.ones((8, 1)), zero, checkpoint_format="gptq_v2")
    assert gptq_unpack(tensors, checkpoint_format="gptq_v2").zero_point[3, 0] == 0


def test_what_a_full_zero_in_v1_means_must_be_said():
    tensors = gptq_pack(np.zeros((8, 8), int), np.ones((8, 1)), np.full((8, 1), 15), checkpoint_format="gptq_v2")
    with pytest.raises(ValueError, match="qzeros hold 15"):
        gptq_unpack(tensors)
    assert gptq_unpack(tensors, full_zero="zero").zero_point.max() == 0
    assert gptq_unpack(tensors, full_zero="plus_one").zero_point.min() == 16
    eight = gptq_pack(np.zeros((4, 4), int), np.ones((4, 1)), np.full((4, 1), 255), bits=8, checkpoint_format="gptq_v2")
    assert gptq_unpack(eight, bits=8, full_zero="plus_one").zero_point.min() == 256
    assert gptq_dequantize(eight, bits=8, full_zero="plus_one").max() == -256


def test_the_scale_is_rounded_to_float16_and_must_fit():
    codes = np.zeros((8, 8), int)
    assert gptq_pack(codes, np.full((8, 1), 1 + 2.0**-11))["scales"][0, 0] == 1
    with pytest.raises(ValueError, match="70000 overflows"):
        gptq_pack(codes, np.full((8, 1), 70000.0))
    with pytest.raises(ValueError, match="NaN or infinity"):
        gptq_pack(codes, np.full((8, 1), np.nan))


def test_any_memory_order_and_byte_order():
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (16, 24), dtype=np.uint8), rng.random((16, 3)).astype(np.float32)
    zero = rng.integers(1, 16, (16, 3))
    expected = gptq_pack(codes, scale, zero)
    codes.flags.writeable = False
    other = gptq_pack(np.asfortranarray(codes), scale.astype(">f4")[:, ::1], zero.astype(">i8"))
    swapped = {name: np.asfortranarray(t.astype(t.dtype.newbyteorder(">"))) for name, t in expected.items()}
    for name in expected:
        assert other[name].tobytes() == expected[name].tobytes()
    back = gptq_unpack(swapped)
    assert np.array_equal(back.codes, codes) and np.array_equal(back.zero_point, zero) and back.codes.dtype == np.uint8
    assert back.scale.dtype.isnative


def test_g_idx_may_be_missing_where_groups_are_even():
    tensors = gptq_pack(np.ones((8, 16), int), np.ones((8, 2)))
    del tensors["g_idx"]
    assert gptq_unpack(tensors).g_idx.tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("in must be a multiple of 8", {"codes": np.zeros((8, 12), int)}),
        ("out must be a multiple of 8", {"codes": np.zeros((4, 8), int), "scale": np.ones((4, 1))}),
        ("in must be a multiple of 32", {"codes": np.zeros((32, 16), int), "scale": np.ones((32, 1)), "bits": 3}),
        ("codes must lie in 0..15", {"codes": np.full((8, 8), 16)}),
        ("codes must lie in 0..15", {"codes": np.full((8, 8), -1)}),
        ("codes must be .* integers, got float64", {"codes": np.zeros((8, 8))}),
        ("codes must be", {"codes": np.zeros(8, int)}),
        ("got bool", {"codes": np.zeros((8, 8), bool)}),
        ("2, 3, 4 or 8 bits, got 5", {"bits": 5}),
        ("checkpoint_format", {"checkpoint_format": "v1"}),
        ("3 groups do not divide 8", {"scale": np.ones((8, 3))}),
        ("0 groups do not divide", {"scale": np.ones((8, 0))}),
        ("groups do not divide 0 columns", {"codes": np.zeros((8, 0), int)}),
        ("scale must be", {"scale": np.ones((7, 1))}),
        ("scale must be", {"scale": np.ones((8, 1), int)}),
        ("zero_point must be", {"zero_point": np.ones((8, 2), int)}),
        ("zero_point must lie in 0..15", {"zero_point": np.full((8, 1), 16)}),
        ("g_idx must be", {"g_idx": np.zeros(7, int)}),
        ("g_idx names groups 0..1", {"g_idx": np.array([0, 1] * 4)}),
    ],
)
def test_what_cannot_be_packed(message, change):
    with pytest.raises(ValueError, match=message):
        gptq_pack(**({"codes": np.zeros((8, 8), int), "scale": np.ones((8, 1))} | change))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("qweight is missing", {"qweight": None}),
        ("qweight must be int32 or uint32 with 2 axes, got int64", {"qweight": np.zeros((1, 8), np.int64)}),
        (r"qweight \(1, 16\) and scales \(1, 8\)", {"qweight": np.zeros((1, 16), np.int32)}),
        ("qzeros must have the shape", {"qzeros": np.zeros((1, 2), np.int32)}),
        ("g_idx must be", {"g_idx": np.zeros(9, np.int32)}),
        ("g_idx names groups 3..3, there are 1", {"g_idx": np.full(8, 3, np.int32)}),
        ("out must be a multiple of 8", {"scales": np.ones((1, 4), np.float16)}),
    ],
)
def test_what_cannot_be_unpacked(message, change):
    tensors = gptq_pack(np.zeros((8, 8), int), np.ones((8, 1))) | change
    with pytest.raises(ValueError, match=message):
        gptq_unpack({name: t for name, t in tensors.items() if t is not None})


def test_no_rows():
    tensors = gptq_pack(np.zeros((0, 8), int), np.ones((0, 1)))
    assert tensors["qweight"].shape == (1, 0) and gptq_dequantize(tensors).shape == (0, 8)
