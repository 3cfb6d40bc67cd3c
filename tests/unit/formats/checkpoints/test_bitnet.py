"""BitNet: where each ternary code of I2_S lies, for x86 and ARM, and the bytes of the Hugging Face form."""

import numpy as np
import pytest

from refllm.formats.checkpoints import (
    bitnet_dequantize,
    bitnet_pack,
    bitnet_unpack,
    i2_s_dequantize,
    i2_s_pack,
    i2_s_unpack,
)


@pytest.mark.parametrize(("order", "unit"), [("x86", 128), ("arm", 64)])
def test_i2_s_code_by_code(order, unit):
    """The slow twin: code j of a unit lies in byte j % (unit / 4), at the bits 6 - 2 (j // (unit / 4))."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (4, 96), dtype=np.uint8)
    data = i2_s_pack(codes, -1.5, order=order)
    assert data.shape == (96 + 32,)
    quarter = unit // 4
    for k, code in enumerate(codes.ravel()):
        byte = k // unit * quarter + k % quarter
        assert data[byte] >> (6 - 2 * (k % unit // quarter)) & 3 == code
    assert data[96:100].tobytes() == np.float32(-1.5).tobytes() and not data[100:].any()
    back, scale = i2_s_unpack(data, (4, 96), order=order)
    assert np.array_equal(back, codes) and scale == -1.5
    assert np.array_equal(i2_s_dequantize(data, (4, 96), order=order), (codes.astype(float) - 1) * -1.5)


def test_i2_s_by_hand():
    codes = np.ones((1, 128), int)
    codes[0, [0, 32, 64, 96]] = 2, 0, 1, 2
    assert i2_s_pack(codes, 1.0)[:2].tolist() == [0b10000110, 0b01010101]


def test_the_two_orders_differ():
    codes = np.random.default_rng(0).integers(0, 3, (2, 128))
    assert not np.array_equal(i2_s_pack(codes, 1.0), i2_s_pack(codes, 1.0, order="arm"))


def test_hugging_face_rows_a_quarter_apart():
    codes = np.array([[0], [1], [2], [2], [1], [0], [0], [2]])
    tensors = bitnet_pack(codes, 0.5)
    assert tensors["weight"].tolist() == [[0 | 2 << 2 | 1 << 4 | 0 << 6], [1 | 2 << 2 | 0 << 4 | 2 << 6]]
    back, scale = bitnet_unpack(tensors)
    assert np.array_equal(back, codes) and scale == 0.5
    assert bitnet_dequantize(tensors).ravel().tolist() == [-2, 0, 2, 2, 0, -2, -2, 2]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("out \\* in must be a multiple of 128", lambda: i2_s_pack(np.zeros((1, 64), int), 1.0)),
        ("ternary codes", lambda: i2_s_pack(np.full((1, 128), 3), 1.0)),
        ("scale must be finite", lambda: i2_s_pack(np.zeros((1, 128), int), np.nan)),
        ("order must be one of", lambda: i2_s_pack(np.zeros((1, 128), int), 1.0, order="cuda")),
        ("is 64 bytes, got uint8", lambda: i2_s_unpack(np.zeros(63, np.uint8), (1, 128))),
        ("ternary codes", lambda: i2_s_unpack(np.full(64, 255, np.uint8), (1, 128))),
        ("out must be a multiple of 4", lambda: bitnet_pack(np.zeros((3, 2), int), 1.0)),
        ("not 0", lambda: bitnet_pack(np.zeros((4, 2), int), 0.0)),
        ("weight_scale must be one number", lambda: bitnet_unpack(_hf(np.ones(2, np.float32)))),
        ("ternary codes", lambda: bitnet_unpack(_hf(np.ones(1, np.float32), 255))),
    ],
)
def test_what_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def _hf(scale, byte=0):
    return {"weight": np.full((1, 2), byte, np.uint8), "weight_scale": scale}
