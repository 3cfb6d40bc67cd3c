"""AWQ (GEMM): the order of the nibbles by hand, round trips, and what must be refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.checkpoints import awq_dequantize, awq_pack, awq_unpack
from tests.strategies import PROPERTY

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_round_trip_and_bit_by_bit(eights, groups, size, seed):
    rng = np.random.default_rng(seed)
    out, columns = 8 * eights, groups * size
    codes = rng.integers(0, 16, (out, columns), dtype=np.uint8)
    zero = rng.integers(0, 16, (out, groups), dtype=np.uint8)
    scale = rng.standard_normal((out, groups)).astype(np.float16)
    tensors = awq_pack(codes, scale, zero)
    for name, matrix in (("qweight", codes), ("qzeros", zero)):
        for i, row in enumerate(tensors[name].tolist()):
            for c, word in enumerate(row):
                nibbles = [(word & 0xFFFFFFFF) >> 4 * n & 15 for n in range(8)]
                assert nibbles == [matrix[8 * c + ORDER[n], i] for n in range(8)]
    back = awq_unpack(tensors)
    assert np.array_equal(back.codes, codes) and np.array_equal(back.zero_point, zero)
    assert back.scale.tobytes() == scale.tobytes()
    w, g = awq_dequantize(tensors), (columns - 1) // size
    assert w[-1, -1] == float(scale[-1, g]) * (int(codes[-1, -1]) - int(zero[-1, g]))


def test_codes_in_order():
    codes = np.arange(8).reshape(8, 1)
    assert hex(awq_pack(codes, np.ones((8, 1)), codes)["qweight"][0, 0]) == "0x75316420"
    assert hex(awq_pack(codes, np.ones((8, 1)), codes)["qzeros"][0, 0]) == "0x75316420"


def test_zero_points_are_stored_as_they_are():
    zero = np.array([0, 15] * 4).reshape(8, 1)
    assert awq_unpack(awq_pack(np.zeros((8, 3), int), np.ones((8, 1)), zero)).zero_point.tolist() == zero.tolist()
    assert awq_unpack(awq_pack(np.zeros((8, 3), int), np.ones((8, 1)))).zero_point.tolist() == [[8]] * 8


def test_any_memory_order_and_byte_order():
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (16, 6), dtype=np.uint8), rng.random((16, 2))
    expected = awq_pack(codes, scale)
    swapped = {name: np.asfortranarray(t.astype(t.dtype.newbyteorder(">"))) for name, t in expected.items()}
    assert np.array_equal(awq_unpack(swapped).codes, codes)
    assert awq_pack(codes[::-1][::-1], np.asfortranarray(scale))["qweight"].tobytes() == expected["qweight"].tobytes()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("out must be a multiple of 8", {"codes": np.zeros((4, 4), int), "scale": np.ones((4, 1))}),
        ("codes must lie in 0..15", {"codes": np.full((8, 4), 16)}),
        ("3 groups do not divide 4", {"scale": np.ones((8, 3))}),
        ("zero_point must lie in 0..15", {"zero_point": np.full((8, 1), 16)}),
        ("overflows", {"scale": np.full((8, 1), 1e6)}),
    ],
)
def test_what_cannot_be_packed(message, change):
    with pytest.raises(ValueError, match=message):
        awq_pack(**({"codes": np.zeros((8, 4), int), "scale": np.ones((8, 1))} | change))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("qzeros is missing", {"qzeros": None}),
        (r"AWQ stores \[in, out / 8\]", {"qweight": np.zeros((1, 8), np.int32)}),
        (r"AWQ stores \[in, out / 8\]", {"scales": np.ones((1, 12), np.float16)}),
        ("3 groups do not divide 4", {"scales": np.ones((3, 8), np.float16), "qzeros": np.zeros((3, 1), np.int32)}),
        ("scales must be float16 or float32", {"scales": np.ones((1, 8))}),
    ],
)
def test_what_cannot_be_unpacked(message, change):
    tensors = awq_pack(np.zeros((8, 4), int), np.ones((8, 1))) | change
    with pytest.raises(ValueError, match=message):
        awq_unpack({name: t for name, t in tensors.items() if t is not None})
