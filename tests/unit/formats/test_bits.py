"""pack_bits and unpack_bits: the bit order byte by byte, and round trips over bits x shape x width."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.bits import pack_bits, packed_size, padding_is_zero, unpack_bits
from tests.strategies import PROPERTY


def test_bit_order_drawn_by_hand():
    # 3 bits, codes 1 2 3 4 5 6 7 0 as one stream, low bit first: 001 010 011 100 101 110 111 000
    stream = sum(code << (3 * i) for i, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0]))
    assert pack_bits(np.array([1, 2, 3, 4, 5, 6, 7, 0]), 3).tobytes() == stream.to_bytes(3, "little")
    assert pack_bits(np.array([[0xA, 0xB, 0xC]]), 4).tolist() == [[0xBA, 0x0C]]
    assert pack_bits(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert pack_bits(np.array([7, 255]), 8).tolist() == [7, 255]
    assert pack_bits(np.array([0xABC, 0x123]), 12).tolist() == [0xBC, 0x3A, 0x12]
    assert pack_bits(np.array([0xABCD]), 16).tolist() == [0xCD, 0xAB]


@PROPERTY
@given(st.integers(1, 16), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 70), st.integers(0, 2**16))
def test_round_trip(bits, lead, n, seed):
    dtype = np.uint8 if bits <= 8 else np.uint16
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (*lead, n), dtype=dtype)
    packed = pack_bits(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (*lead, packed_size(n, bits)) == (*lead, -(-n * bits // 8))
    unpacked = unpack_bits(packed, bits, n)
    assert unpacked.dtype == dtype and np.array_equal(unpacked, codes)
    if packed.size:
        assert padding_is_zero(packed, bits, n)


@PROPERTY
@given(st.integers(1, 16), st.integers(1, 40), st.integers(0, 2**16))
def test_every_code_stands_where_the_stream_says(bits, n, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, n)
    stream = int.from_bytes(pack_bits(codes, bits).tobytes(), "little")
    assert [stream >> (bits * i) & ((1 << bits) - 1) for i in range(n)] == codes.tolist()
    assert stream < 1 << (bits * n)


def test_strided_and_read_only_input():
    codes = np.arange(48, dtype=np.uint8).reshape(2, 24) % 16
    strided = codes[:, ::2]
    strided.flags.writeable = False
    packed = pack_bits(strided, 4)
    assert np.array_equal(unpack_bits(np.repeat(packed, 2, axis=0)[::2], 4, 12), strided)


def test_what_padding_holds_is_ignored_but_found():
    assert unpack_bits(np.array([0xFF], np.uint8), 3, 2).tolist() == [7, 7]
    assert not padding_is_zero(np.array([[0xFF]], np.uint8), 3, 2)
    assert padding_is_zero(np.array([[0xFF]], np.uint8), 4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_bits(np.array([4]), 2), r"\[0, 3\]"),
        (lambda: pack_bits(np.array([-1]), 2), r"\[0, 3\]"),
        (lambda: pack_bits(np.array([0.5]), 2), "integer"),
        (lambda: pack_bits(np.array(1), 2), "integer array"),
        (lambda: pack_bits(np.array([1]), 17), "bits must be 1 to 16"),
        (lambda: pack_bits(np.array([4096]), 12), r"\[0, 4095\]"),
        (lambda: unpack_bits(np.zeros(2, np.uint8), 4, 5), "5 codes of 4 bits need uint8 rows of 3 bytes"),
        (lambda: unpack_bits(np.zeros(3, np.int8), 4, 5), "uint8"),
        (lambda: unpack_bits(np.zeros(1, np.uint8), 0, 5), "bits must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
