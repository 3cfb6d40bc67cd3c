"""nvfp4, mxfp4 and float-quantized: nibbles and scales by hand, every code, and what must be refused."""

import numpy as np
import pytest

from refllm.formats.checkpoints import (
    float_quantized_dequantize,
    float_quantized_pack,
    float_quantized_unpack,
    mxfp4_dequantize,
    mxfp4_pack,
    mxfp4_unpack,
    nvfp4_dequantize,
    nvfp4_pack,
    nvfp4_unpack,
)

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
ONE = 0x38  # 1.0 in E4M3


def test_even_columns_lie_in_the_low_nibble():
    codes = np.arange(16).reshape(1, 16)
    tensors = nvfp4_pack(codes, np.array([[ONE]], np.uint8), 1.0)
    assert tensors["weight_packed"].tobytes().hex() == "1032547698badcfe"
    assert nvfp4_dequantize(tensors)[0].tolist() == E2M1
    assert np.signbit(nvfp4_dequantize(tensors)[0, 8])
    assert np.array_equal(nvfp4_unpack(tensors).codes, codes)


def test_the_global_scale_divides():
    codes = np.full((1, 32), 2)
    tensors = nvfp4_pack(codes, np.array([[ONE, ONE + 8]], np.uint8), 4.0)
    assert nvfp4_dequantize(tensors)[0, [0, 15, 16, 31]].tolist() == [0.25, 0.25, 0.5, 0.5]
    third = nvfp4_dequantize(nvfp4_pack(np.full((1, 16), 5), np.array([[ONE]], np.uint8), 3.0))[0, 0]
    assert third == np.float32(1) / np.float32(3) * np.float32(3)


def test_mxfp4_scales_are_powers_of_two():
    codes = np.full((1, 96), 7)
    w = mxfp4_dequantize(mxfp4_pack(codes, np.array([[127, 0, 130]], np.uint8)))
    assert w[0, [0, 32, 64]].tolist() == [6, 6 * 2.0**-127, 48]
    tensors = mxfp4_pack(codes[:, :32], np.array([[255]], np.uint8))
    assert np.isnan(mxfp4_dequantize(tensors)).all()
    assert np.array_equal(mxfp4_unpack(tensors).scale, [[255]])


def test_float_quantized():
    codes = np.array([[ONE, 0x7E, 0xFE, 0x01]], np.uint8)
    tensors = float_quantized_pack(codes, np.array([[0.5]], np.float32))
    assert float_quantized_dequantize(tensors)[0].tolist() == [0.5, 224, -224, 2.0**-10]
    assert np.isnan(float_quantized_dequantize(float_quantized_pack(codes | 0x7F, np.ones((1, 2), np.float32)))).all()
    flat = float_quantized_unpack({"weight": codes.repeat(2, axis=0), "weight_scale": np.array([1, 2], np.float16)})
    assert flat.scale.tolist() == [[1], [2]]
    assert float_quantized_unpack({"weight": codes, "weight_scale": np.array([3], np.float32)}).scale.tolist() == [[3]]


def test_any_memory_order():
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (5, 64), dtype=np.uint8), rng.integers(0, 255, (5, 4), dtype=np.uint8)
    expected = nvfp4_pack(codes, scale, 2.0)
    tensors = nvfp4_pack(np.asfortranarray(codes), scale[::-1][::-1], 2.0)
    assert {n: t.tobytes() for n, t in tensors.items()} == {n: t.tobytes() for n, t in expected.items()}
    strided = {name: np.asfortranarray(t) for name, t in expected.items()}
    assert np.array_equal(nvfp4_unpack(strided).codes, codes)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("in must be a multiple of 16", lambda: nvfp4_pack(np.zeros((1, 8), int), np.zeros((1, 1), np.uint8), 1)),
        ("in must be a multiple of 32", lambda: mxfp4_pack(np.zeros((1, 48), int), np.zeros((1, 1), np.uint8))),
        ("codes must lie in 0..15", lambda: nvfp4_pack(np.full((1, 16), 16), np.zeros((1, 1), np.uint8), 1)),
        ("uint8 codes of shape", lambda: nvfp4_pack(np.zeros((1, 16), int), np.zeros((1, 1)), 1)),
        ("uint8 codes of shape", lambda: mxfp4_pack(np.zeros((1, 32), int), np.zeros((1, 2), np.uint8))),
        ("global_scale", lambda: nvfp4_pack(np.zeros((1, 16), int), np.zeros((1, 1), np.uint8), 0.0)),
        ("global_scale", lambda: nvfp4_pack(np.zeros((1, 16), int), np.zeros((1, 1), np.uint8), np.inf)),
        ("weight_scale must have the shape", lambda: nvfp4_unpack(mxfp4_pack(*_fine(32)))),
        ("weight_global_scale is missing", lambda: nvfp4_unpack(_without(nvfp4_pack(*_fine(16), 1)))),
        ("must be one number", lambda: nvfp4_unpack(nvfp4_pack(*_fine(16), 1) | _divisors(2))),
        ("weight_scale must have the shape", lambda: mxfp4_unpack(nvfp4_pack(*_fine(16, 64), 1))),
        ("finite floats", lambda: float_quantized_pack(np.zeros((1, 4), int), np.full((1, 1), np.nan))),
        ("3 groups do not divide", lambda: float_quantized_pack(np.zeros((1, 4), int), np.ones((1, 3)))),
        ("weight_scale is missing", lambda: float_quantized_unpack({"weight": np.zeros((2, 4), np.uint8)})),
        ("weight must be uint8", lambda: float_quantized_unpack({"weight": np.zeros((2, 4))})),
    ],
)
def test_what_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def _fine(block, columns=None):
    columns = columns or block
    return np.zeros((1, columns), int), np.zeros((1, columns // block), np.uint8)


def _divisors(n):
    return {"weight_global_scale": np.ones(n, np.float32)}


def _without(tensors):
    return {name: t for name, t in tensors.items() if name != "weight_global_scale"}
