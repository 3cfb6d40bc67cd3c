"""compressed-tensors with integer codes: words by hand, old and new packing, int8, and what must be refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.checkpoints import (
    compressed_tensors_dequantize,
    compressed_tensors_pack,
    compressed_tensors_unpack,
)
from tests.strategies import PROPERTY


@PROPERTY
@given(st.data())
def test_round_trip_and_bit_by_bit(data):
    bits = data.draw(st.integers(1, 8))
    out, groups, size = (data.draw(st.integers(1, n)) for n in (9, 4, 13))
    kind = {
        "bits": bits,
        "format": data.draw(st.sampled_from(("pack-quantized", "int-quantized", "naive-quantized"))),
        "words": data.draw(st.sampled_from(("dense", "padded"))),
    }
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    columns = groups * size
    codes = rng.integers(0, 1 << bits, (out, columns), dtype=np.uint8)
    zero = rng.integers(0, 1 << bits, (out, groups), dtype=np.uint8) if data.draw(st.booleans()) else None
    g_idx = rng.permutation(np.arange(columns) // size) if data.draw(st.booleans()) else None
    scale = rng.standard_normal((out, groups)).astype(data.draw(st.sampled_from(("f2", "f4"))))
    tensors = compressed_tensors_pack(codes, scale, zero, g_idx=g_idx, **kind)
    back = compressed_tensors_unpack(tensors, **kind)
    for name, given_ in (("codes", codes), ("scale", scale), ("zero_point", zero), ("g_idx", g_idx)):
        assert np.array_equal(getattr(back, name), given_) if given_ is not None else getattr(back, name) is None
    if kind["format"] == "pack-quantized":
        place = (
            (lambda i: bits * i)
            if kind["words"] == "dense"
            else (lambda i: i // (32 // bits) * 32 + i % (32 // bits) * bits)
        )
        row = int.from_bytes(tensors["weight_packed"][-1].astype("<i4").tobytes(), "little")
        assert [row >> place(i) & (1 << bits) - 1 for i in range(columns)] == codes[-1].tolist()
        if zero is not None:
            column = int.from_bytes(tensors["weight_zero_point"][:, -1].astype("<i4").tobytes(), "little")
            assert [column >> place(o) & (1 << bits) - 1 for o in range(out)] == zero[:, -1].tolist()
    else:
        assert np.array_equal(tensors["weight"].astype(int), codes.astype(int) - 2 ** (bits - 1))
    g = (np.arange(columns) // size if g_idx is None else g_idx)[-1]
    middle = 2 ** (bits - 1) if zero is None else int(zero[-1, g])
    w = compressed_tensors_dequantize(tensors, **kind)[-1, -1]
    assert w == scale[-1, g].astype(np.float32) * np.float32(int(codes[-1, -1]) - middle)


def test_words_by_hand():
    codes, one = np.arange(8).reshape(1, 8), np.ones((1, 1))
    pack = lambda bits, **kind: compressed_tensors_pack(codes, one.astype("f4"), bits=bits, **kind)["weight_packed"]
    assert [hex(w) for w in pack(4)[0]] == ["0x76543210"]
    assert [hex(w) for w in pack(8)[0]] == ["0x3020100", "0x7060504"]
    assert pack(3)[0].tolist() == [sum(i << 3 * i for i in range(8))]
    number = sum(i << 5 * i for i in range(8))
    assert pack(5).view(np.uint32)[0].tolist() == [number & 0xFFFFFFFF, number >> 32]
    assert pack(5, words="padded")[0].tolist() == [sum(i << 5 * i for i in range(6)), 6 + (7 << 5)]


def test_zero_points_are_packed_along_out():
    zero = np.arange(8).reshape(8, 1)
    tensors = compressed_tensors_pack(np.zeros((8, 3), int), np.ones((8, 1), np.float32), zero)
    assert tensors["weight_zero_point"].shape == (1, 1) and hex(tensors["weight_zero_point"][0, 0]) == "0x76543210"


def test_old_and_new_packing_agree_where_bits_divide_32():
    codes, scale = np.arange(40).reshape(2, 20), np.ones((2, 1), np.float32)
    for bits in range(1, 9):
        dense, padded = (
            compressed_tensors_pack(codes % (1 << bits), scale, bits=bits, words=words)["weight_packed"]
            for words in ("dense", "padded")
        )
        assert np.array_equal(dense, padded) == (32 % bits == 0)


def test_any_memory_order_and_byte_order():
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 8, (5, 6), dtype=np.uint8), rng.random((5, 2)).astype(np.float32)
    expected = compressed_tensors_pack(codes, scale, codes[:, :2], bits=3)
    other = compressed_tensors_pack(np.asfortranarray(codes), scale.astype(">f4"), codes[:, :2], bits=3)
    assert {n: t.tobytes() for n, t in other.items()} == {n: t.tobytes() for n, t in expected.items()}
    swapped = {name: np.asfortranarray(t.astype(t.dtype.newbyteorder(">"))) for name, t in expected.items()}
    assert np.array_equal(compressed_tensors_unpack(swapped, bits=3).codes, codes)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("bits must be 1 to 8", {"bits": 0}),
        ("bits must be 1 to 8", {"bits": 9}),
        ("format must be one of", {"format": "marlin-24"}),
        ("words must be", {"words": "loose"}),
        ("codes must lie in 0..15", {"codes": np.full((2, 4), 16)}),
        ("3 groups do not divide 4", {"scale": np.ones((2, 3), np.float32)}),
        ("scale must be float16 or float32", {"scale": np.ones((2, 1))}),
        ("g_idx names groups", {"g_idx": np.array([0, 0, 0, 1])}),
        ("do not divide 0 columns", {"codes": np.zeros((2, 0), int)}),
    ],
)
def test_what_cannot_be_packed(message, change):
    with pytest.raises(ValueError, match=message):
        compressed_tensors_pack(**({"codes": np.zeros((2, 4), int), "scale": np.ones((2, 1), np.float32)} | change))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("weight_shape is missing", {"weight_shape": None}),
        ("weight_shape must hold two sizes", {"weight_shape": np.array([2, -4])}),
        ("weight_packed of a 2 x 9 weight must be", {"weight_shape": np.array([2, 9])}),
        ("weight_packed must be int32", {"weight_packed": np.zeros((2, 1))}),
        ("weight_scale must have 2 rows", {"weight_scale": np.ones((3, 1), np.float32)}),
        ("weight_zero_point must have the shape", {"weight_zero_point": np.zeros((2, 1), np.int32)}),
        ("g_idx must be", {"weight_g_idx": np.zeros(3, np.int32)}),
        ("3 groups do not divide 4", {"weight_scale": np.ones((2, 3), np.float32)}),
    ],
)
def test_what_cannot_be_unpacked(message, change):
    tensors = compressed_tensors_pack(np.zeros((2, 4), int), np.ones((2, 1), np.float32)) | change
    with pytest.raises(ValueError, match=message):
        compressed_tensors_unpack({name: t for name, t in tensors.items() if t is not None})


def test_a_signed_code_that_needs_more_bits_is_refused():
    tensors = {"weight": np.array([[-9, 7]], np.int8), "weight_scale": np.ones((1, 1), np.float32)}
    with pytest.raises(ValueError, match=r"4-bit codes are -8..7, got -9..7"):
        compressed_tensors_unpack(tensors, format="int-quantized")
    assert compressed_tensors_dequantize(tensors, bits=8, format="int-quantized").tolist() == [[-9, 7]]
