"""MXFP4 of gpt-oss: nibbles by hand, scales, experts, the two readings of the scale 255."""

import numpy as np
import pytest

from refllm.formats.checkpoints import gpt_oss_dequantize, gpt_oss_pack, gpt_oss_unpack

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_pairs_low_nibble_first():
    codes = np.tile(np.arange(16), 2).reshape(1, 1, 32)
    tensors = gpt_oss_pack(codes, np.array([[[128]]], np.uint8))
    assert tensors["blocks"].shape == (1, 1, 1, 16) and tensors["blocks"].tobytes().hex() == "1032547698badcfe" * 2
    assert gpt_oss_dequantize(tensors)[0, 0].tolist() == [2 * x for x in E2M1 * 2]


@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 32), (1, 2, 3, 96)])
def test_round_trip_and_code_by_code(shape):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    scale = rng.integers(100, 140, (*shape[:-1], shape[-1] // 32), dtype=np.uint8)
    tensors = gpt_oss_pack(np.asfortranarray(codes), scale)
    back = gpt_oss_unpack({name: np.asfortranarray(t) for name, t in tensors.items()})
    assert np.array_equal(back[0], codes) and np.array_equal(back[1], scale)
    w = gpt_oss_dequantize(tensors)
    for at in np.ndindex(*shape):
        assert w[at] == E2M1[codes[at]] * 2.0 ** (int(scale[*at[:-1], at[-1] // 32]) - 127)


def test_ends_of_the_scale():
    codes = np.full((1, 96), 7)
    tensors = gpt_oss_pack(codes, np.array([[0, 254, 255]], np.uint8))
    w = gpt_oss_dequantize(tensors)[0, ::32]
    assert w[0] == 6 * 2.0**-127 and np.isposinf(w[1]) and np.isnan(w[2])
    half = gpt_oss_pack(np.full((1, 32), 1), np.array([[255]], np.uint8))
    assert (gpt_oss_dequantize(half, nan_scale=False) == 2.0**127).all()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("in must be a multiple of 32", lambda: gpt_oss_pack(np.zeros((1, 16), int), np.zeros((1, 1), np.uint8))),
        ("uint8 codes of shape", lambda: gpt_oss_pack(np.zeros((1, 32), int), np.zeros((1, 2), np.uint8))),
        ("holds numbers 0..15", lambda: gpt_oss_pack(np.full((1, 32), 16), np.zeros((1, 1), np.uint8))),
        ("codes must be", lambda: gpt_oss_pack(np.zeros(32, int), np.zeros(1, np.uint8))),
        ("blocks is missing", lambda: gpt_oss_unpack({"scales": np.zeros((1, 1), np.uint8)})),
        ("scales is missing", lambda: gpt_oss_unpack({})),
        (
            "16 bytes each",
            lambda: gpt_oss_unpack({"scales": np.zeros((1, 1), np.uint8), "blocks": np.zeros((1, 1, 8), np.uint8)}),
        ),
    ],
)
def test_what_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
