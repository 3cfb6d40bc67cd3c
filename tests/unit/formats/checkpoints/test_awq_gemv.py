"""AWQ (GEMV): words by hand, the padding of scales, round trips, and what must be refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.checkpoints import awq_gemv_dequantize, awq_gemv_pack, awq_gemv_unpack
from tests.strategies import PROPERTY

# groups of a size -> words of zero points in a row: what AutoAWQ's calculate_zeros_width gives, by hand
WIDTHS = {(1, 128): 1, (8, 128): 1, (9, 128): 2, (17, 256): 3, (1, 64): 2, (16, 64): 2, (17, 64): 4, (3, 32): 4,
          (32, 32): 4, (33, 32): 8}  # fmt: skip


@PROPERTY
@given(st.integers(1, 2), st.sampled_from([(1, 32), (3, 32), (2, 64), (2, 128), (1, 136)]), st.integers(0, 2**32 - 1))
def test_round_trip_and_bit_by_bit(eights, sizes, seed):
    rng, (groups, size) = np.random.default_rng(seed), sizes
    out, columns = 8 * eights, groups * size
    codes = rng.integers(0, 16, (out, columns), dtype=np.uint8)
    zero = rng.integers(0, 16, (out, groups), dtype=np.uint8)
    scale = rng.standard_normal((out, groups)).astype(np.float16)
    tensors = awq_gemv_pack(codes, scale, zero)
    for o in range(out):
        words = [word & 0xFFFFFFFF for word in tensors["qweight"][o].tolist()]
        assert [words[i // 8] >> 4 * (i % 8) & 15 for i in range(columns)] == codes[o].tolist()
        words = [word & 0xFFFFFFFF for word in tensors["qzeros"][o].tolist()]
        padded = [words[g // 8] >> 4 * (g % 8) & 15 for g in range(8 * len(words))]
        assert padded == zero[o].tolist() + [0] * (len(padded) - groups)
    back = awq_gemv_unpack(tensors, size)
    assert np.array_equal(back.codes, codes) and np.array_equal(back.zero_point, zero)
    assert back.scale.tobytes() == scale.tobytes() and not tensors["scales"][:, groups:].any()
    w = awq_gemv_dequantize(tensors, -1 if groups == 1 else size)
    assert w[-1, -1] == float(scale[-1, -1]) * (int(codes[-1, -1]) - int(zero[-1, -1]))


@pytest.mark.parametrize(("groups", "size"), WIDTHS)
def test_widths(groups, size):
    tensors = awq_gemv_pack(np.zeros((8, groups * size), np.uint8), np.ones((8, groups)))
    assert tensors["qzeros"].shape == (8, WIDTHS[groups, size])
    assert tensors["scales"].shape == (8, 8 * WIDTHS[groups, size])
    assert (awq_gemv_unpack(tensors, size).zero_point == 8).all()


@pytest.mark.parametrize(
    ("message", "codes", "scale"),
    [
        ("out must be a multiple of 8", (4, 32), (4, 1)),
        ("in must be a multiple of 8", (8, 132), (8, 1)),
        ("3 groups do not divide 128", (8, 128), (8, 3)),
        ("groups of 32, 64, or 128 and more columns, got 16", (8, 32), (8, 2)),
    ],
)
def test_what_cannot_be_packed(message, codes, scale):
    with pytest.raises(ValueError, match=message):
        awq_gemv_pack(np.zeros(codes, int), np.ones(scale))


@pytest.mark.parametrize(
    ("message", "size", "change"),
    [
        ("qzeros is missing", 64, {"qzeros": None}),
        (r"stores \[out, in / 8\], \[out, 2\] and \[out, 16\]", 64, {"scales": np.ones((8, 8), np.float16)}),
        (r"stores \[out, in / 8\], \[out, 4\]", 32, {}),
        ("groups of 48 columns do not divide 128", 48, {}),
        ("groups of 0 columns", 0, {}),
        ("groups of -1 columns do not divide 0", -1, {"qweight": np.zeros((8, 0), np.int32)}),
        ("scales must be float16 or float32", 64, {"scales": np.ones((8, 16))}),
    ],
)
def test_what_cannot_be_unpacked(message, size, change):
    tensors = awq_gemv_pack(np.zeros((8, 128), int), np.ones((8, 2))) | change
    with pytest.raises(ValueError, match=message):
        awq_gemv_unpack({name: t for name, t in tensors.items() if t is not None}, size)
