"""MatMulNBits: bytes by hand, odd numbers of blocks, short last blocks, missing zero points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.checkpoints import matmul_nbits_dequantize, matmul_nbits_pack, matmul_nbits_unpack
from tests.strategies import PROPERTY


@PROPERTY
@given(st.data())
def test_round_trip_and_bit_by_bit(data):
    bits, size = data.draw(st.sampled_from((2, 4, 8))), data.draw(st.sampled_from((16, 32, 64)))
    out, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 200))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    blocks = -(-columns // size)
    codes = rng.integers(0, 1 << bits, (out, columns), dtype=np.uint8)
    zero = rng.integers(0, 1 << bits, (out, blocks), dtype=np.uint8) if data.draw(st.booleans()) else None
    scale = rng.standard_normal((out, blocks)).astype(data.draw(st.sampled_from(("f2", "f4"))))
    kind = {"bits": bits, "block_size": size}
    tensors = matmul_nbits_pack(codes, scale, zero, **kind)
    row = int.from_bytes(tensors["B"][-1].tobytes(), "little")
    assert [row >> bits * i & (1 << bits) - 1 for i in range(columns)] == codes[-1].tolist()
    assert row >> bits * columns == 0
    if zero is not None:
        row = int.from_bytes(tensors["zero_points"][-1].tobytes(), "little")
        assert [row >> bits * b & (1 << bits) - 1 for b in range(blocks)] == zero[-1].tolist()
    if data.draw(st.booleans()):
        tensors |= {name: tensors[name].reshape(-1) for name in ("scales", "zero_points") if name in tensors}
    back = matmul_nbits_unpack(tensors, columns, **kind)
    assert np.array_equal(back.codes, codes) and np.array_equal(back.scale, scale)
    assert zero is None if back.zero_point is None else np.array_equal(back.zero_point, zero)
    w = matmul_nbits_dequantize(tensors, columns, **kind)
    middle = 1 << (bits - 1) if zero is None else int(zero[-1, -1])
    assert w[-1, -1] == np.float32(scale[-1, -1]) * np.float32(int(codes[-1, -1]) - middle)


def test_low_nibble_first():
    tensors = matmul_nbits_pack(np.arange(16).reshape(1, 16), np.ones((1, 1), np.float32), block_size=16)
    assert tensors["B"].tobytes().hex() == "1032547698badcfe" and "zero_points" not in tensors


def test_zero_points_of_each_row_begin_with_a_byte():
    zero = np.array([[1, 2, 3], [4, 5, 6]])
    tensors = matmul_nbits_pack(np.zeros((2, 48), int), np.ones((2, 3), np.float32), zero, block_size=16)
    assert tensors["zero_points"].tolist() == [[0x21, 0x03], [0x54, 0x06]]


def test_missing_zero_points_are_the_middle():
    for bits, middle in ((2, 2), (4, 8), (8, 128)):
        tensors = matmul_nbits_pack(np.full((1, 16), middle + 1), np.ones((1, 1), np.float32), bits=bits, block_size=16)
        assert matmul_nbits_dequantize(tensors, 16, bits=bits, block_size=16)[0].tolist() == [1] * 16


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("2, 4 or 8 bits, got 3", {"bits": 3}),
        ("block_size must be", {"block_size": 8}),
        ("block_size must be a power of two", {"block_size": 48}),
        ("codes must lie in 0..15", {"codes": np.full((2, 40), 16)}),
        (r"scale must be float16 or float32 \(2, 2\)", {"scale": np.ones((2, 1), np.float32)}),
        (r"scale must be float16 or float32 \(2, 2\)", {"scale": np.ones((2, 2))}),
        ("zero_point must be", {"zero_point": np.ones((2, 1), int)}),
    ],
)
def test_what_cannot_be_packed(message, change):
    with pytest.raises(ValueError, match=message):
        matmul_nbits_pack(**({"codes": np.zeros((2, 40), int), "scale": np.ones((2, 2), np.float32)} | change))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("B of 40 columns in blocks of 32 must be", {"B": np.zeros((2, 3, 16), np.uint8)}),
        ("B must be uint8 with 3 axes", {"B": np.zeros((2, 32), np.uint8)}),
        ("scales must have the shape", {"scales": np.ones((2, 3), np.float32)}),
        ("scales is missing", {"scales": None}),
        ("zero_points must have the shape", {"zero_points": np.zeros((2, 2), np.uint8)}),
    ],
)
def test_what_cannot_be_unpacked(message, change):
    tensors = matmul_nbits_pack(np.zeros((2, 40), int), np.ones((2, 2), np.float32)) | change
    with pytest.raises(ValueError, match=message):
        matmul_nbits_unpack({name: t for name, t in tensors.items() if t is not None}, 40)


def test_any_memory_order_and_byte_order():
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (3, 48), dtype=np.uint8), rng.random((3, 2)).astype(np.float32)
    expected = matmul_nbits_pack(codes, scale)
    swapped = {name: np.asfortranarray(t.astype(t.dtype.newbyteorder(">"))) for name, t in expected.items()}
    assert np.array_equal(matmul_nbits_dequantize(swapped, 48), matmul_nbits_dequantize(expected, 48))
