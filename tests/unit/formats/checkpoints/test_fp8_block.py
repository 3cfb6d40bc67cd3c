"""Block-FP8: squares of 128, the last ones smaller; the scale multiplies."""

import numpy as np
import pytest

from refllm.formats.checkpoints import fp8_block_dequantize, fp8_block_pack, fp8_block_unpack

ONE = 0x38  # 1.0 in E4M3


def test_each_square_has_its_scale():
    codes = np.full((130, 257), ONE, np.uint8)
    scale = np.array([[1, 2, 3], [4, 5, 6]], np.float64)
    w = fp8_block_dequantize(fp8_block_pack(codes, scale))
    for o in (0, 127, 128, 129):
        for i in (0, 127, 128, 255, 256):
            assert w[o, i] == scale[o // 128, i // 128]


def test_every_code_is_rounded_once():
    from refllm.formats.dtypes import FP8_E4M3FN

    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    third = np.float32(1) / np.float32(3)
    w = fp8_block_dequantize(fp8_block_pack(codes, np.array([[third]])))
    assert w.tobytes() == (FP8_E4M3FN.decode(codes) * third).tobytes() and np.isnan(w).sum() == 2


def test_other_squares_and_any_memory_order():
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 127, (6, 9), dtype=np.uint8), rng.random((3, 3)).astype(np.float32)
    tensors = fp8_block_pack(np.asfortranarray(codes), scale.astype(">f4"), block_size=(2, 4))
    back = fp8_block_unpack({n: np.asfortranarray(t) for n, t in tensors.items()}, block_size=(2, 4))
    assert np.array_equal(back[0], codes) and np.array_equal(back[1], scale)
    w = fp8_block_dequantize(tensors, block_size=(2, 4))
    ones = fp8_block_dequantize(fp8_block_pack(codes, np.ones((1, 1))))
    assert w[5, 8] == ones[5, 8] * scale[2, 2]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"scale must be finite floats of shape \(2, 1\)",
            lambda: fp8_block_pack(np.zeros((129, 3), int), np.ones((1, 1))),
        ),
        ("scale must be finite", lambda: fp8_block_pack(np.zeros((1, 3), int), np.full((1, 1), np.inf))),
        ("codes must lie in 0..255", lambda: fp8_block_pack(np.full((1, 3), 256), np.ones((1, 1)))),
        ("two positive sizes", lambda: fp8_block_pack(np.zeros((1, 3), int), np.ones((1, 1)), block_size=(0, 128))),
        ("weight_scale_inv is missing", lambda: fp8_block_unpack({"weight": np.zeros((1, 3), np.uint8)})),
        (
            r"weight_scale_inv of a weight \(1, 3\) must be \(1, 1\)",
            lambda: fp8_block_unpack(
                {"weight": np.zeros((1, 3), np.uint8), "weight_scale_inv": np.ones((1, 2), np.float32)}
            ),
        ),
    ],
)
def test_what_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
