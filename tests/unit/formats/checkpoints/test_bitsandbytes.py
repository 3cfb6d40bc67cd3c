"""bitsandbytes: nibbles and tables by hand, blocks across rows, double quantisation, the JSON state, int8."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.checkpoints import (
    bitsandbytes_dequantize,
    bitsandbytes_pack,
    bitsandbytes_unpack,
    int8_dequantize,
    int8_pack,
    int8_unpack,
)
from refllm.formats.checkpoints.dynamic_map import dynamic_map, encode_absmax
from tests.strategies import PROPERTY

STATE = "weight.quant_state.bitsandbytes__nf4"


@PROPERTY
@given(st.data())
def test_round_trip_and_code_by_code(data):
    out, columns, blocksize = (data.draw(st.integers(1, n)) for n in (6, 20, 9))
    quant_type, double = data.draw(st.sampled_from(("nf4", "fp4"))), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 16, (out, columns), dtype=np.uint8)
    blocks = -(-out * columns // blocksize)
    absmax = rng.random(blocks).astype(np.float32)
    tensors = bitsandbytes_pack(codes, absmax, quant_type=quant_type, blocksize=blocksize, double_quant=double)
    flat = [n for byte in tensors["weight"].ravel().tolist() for n in (byte >> 4, byte & 15)]
    assert flat[: codes.size] == codes.ravel().tolist()
    assert len(flat) == codes.size or (len(flat) == codes.size + 1 and flat[-1] == {"nf4": 7, "fp4": 0}[quant_type])
    back = bitsandbytes_unpack(tensors)
    assert np.array_equal(back.codes, codes) and (back.quant_type, back.blocksize) == (quant_type, blocksize)
    assert back.scale.shape == ((out, columns // blocksize) if columns % blocksize == 0 else (blocks,))
    scale = back.scale.ravel()
    if double:  # 8 bits of a value in [-1, 1]: the coarsest step of the map is 0.0141
        span = np.abs(absmax - np.float32(absmax.astype(float).mean())).max()
        assert np.abs(scale - absmax).max() <= 0.0075 * span + 1e-7
    else:
        assert scale.tobytes() == absmax.tobytes()
    w = bitsandbytes_dequantize(tensors).ravel()
    for k in range(codes.size):
        assert w[k] == tensors["weight.quant_map"][codes.flat[k]] * scale[k // blocksize]


def test_the_first_code_lies_in_the_high_nibble():
    tensors = bitsandbytes_pack(np.arange(16).reshape(2, 8), np.ones((1, 1)))
    assert tensors["weight"].tobytes().hex() == "0123456789abcdef" and tensors["weight"].shape == (8, 1)


def test_an_odd_number_of_codes_is_filled_with_the_code_of_zero():
    assert bitsandbytes_pack(np.array([[1, 2, 3]]), np.ones(1))["weight"].tobytes().hex() == "1237"
    assert bitsandbytes_pack(np.array([[1, 2, 3]]), np.ones(1), quant_type="fp4")["weight"].tobytes().hex() == "1230"


def test_tables():
    nf4 = bitsandbytes_pack(np.array([[0, 0]]), np.ones(1))["weight.quant_map"]
    assert (nf4[[0, 7, 15]] == [-1, 0, 1]).all() and (np.diff(nf4) > 0).all()
    fp4 = bitsandbytes_pack(np.array([[0, 0]]), np.ones(1), quant_type="fp4")["weight.quant_map"]
    expected = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(
        12
    )
    assert fp4.tobytes() == expected.tobytes()


def test_the_dynamic_map():
    table = dynamic_map()
    assert table.dtype == np.float32 and table.shape == (256,) and (np.diff(table) > 0).all()
    assert table[127] == 0 and table[-1] == 1 and np.array_equal(table[:127], -table[254:127:-1])
    # the largest exponent has 64 steps between 0.1 and 1, the smallest one
    assert table[-2] == pytest.approx(1 - 0.9 / 128, rel=1e-7) and table[128] == pytest.approx(0.55e-6, rel=1e-6)


def test_blocks_run_across_rows():
    codes = np.zeros((2, 3), int)
    w = bitsandbytes_dequantize(bitsandbytes_pack(codes, np.array([1.0, 2.0]), blocksize=4))
    assert w.tolist() == [[-1, -1, -1], [-1, -2, -2]]


def test_double_quantisation_by_hand():
    codes, nested, offset = encode_absmax(np.array([1, 3, 2, 2], np.float32))
    assert offset == 2 and nested.tolist() == [1] and codes.tolist() == [0, 255, 127, 127]
    assert encode_absmax(np.ones(3, np.float32))[0].tolist() == [127] * 3  # nothing is left: the code of 0
    many = encode_absmax(np.arange(600, dtype=np.float32))
    assert many[1].shape == (3,) and many[2] == 299.5
    middle = (dynamic_map()[200] + dynamic_map()[201]) / np.float32(2)
    codes, _, _ = encode_absmax(np.array([middle, np.nextafter(middle, np.float32(1)), 1], np.float32), 0.0)
    assert codes.tolist() == [200, 201, 255]


def test_the_state_is_json():
    tensors = bitsandbytes_pack(np.zeros((2, 64), int), np.ones((2, 1)), dtype="bfloat16")
    text = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}'
    assert tensors[STATE].tobytes().decode() == text
    double = bitsandbytes_pack(np.zeros((2, 64), int), np.ones((2, 1)), double_quant=True)
    state = json.loads(double[STATE].tobytes())
    assert state["nested_blocksize"] == 256 and state["nested_dtype"] == "float32" and state["nested_offset"] == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "nonsense",
        '{"quant_type": "fp4", "blocksize": 64, "dtype": "float16", "shape": [1, 2]}',
        '{"quant_type": "nf4", "blocksize": 0, "dtype": "float16", "shape": [1, 2]}',
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [1, -2]}',
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2]}',
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": null}',
        '{"quant_type": "nf4", "blocksize": 64, "dtype": 3, "shape": [1, 2]}',
        '{"quant_type": "nf4", "blocksize": 1.5, "dtype": "float16", "shape": [1, 2]}',
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [1, 2], "nested_offset": 1}',
        "[" * 100_000,
    ],
)
def test_a_state_that_says_something_else_is_refused(text):
    tensors = bitsandbytes_pack(np.zeros((1, 2), int), np.ones((1, 1)))
    with pytest.raises(ValueError, match="does not describe a 4-bit weight"):
        bitsandbytes_unpack(tensors | {STATE: np.frombuffer(text.encode(), np.uint8)})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("weight must be 64 bytes for 128 codes", {"weight": np.zeros((63, 1), np.uint8)}),
        ("weight must be 64 bytes", {"weight": np.zeros((64, 1), np.int8)}),
        ("weight.absmax is missing", {"weight.absmax": None}),
        ("weight.absmax must have 2 numbers", {"weight.absmax": np.ones(3, np.float32)}),
        ("weight.absmax must be float32", {"weight.absmax": np.ones(2, np.uint8)}),
        ("must have 16 values", {"weight.quant_map": np.ones(15, np.float32)}),
        ("one tensor", {STATE: None}),
        ("one tensor", {STATE.replace("nf4", "fp4"): np.zeros(3, np.uint8)}),
    ],
)
def test_what_cannot_be_unpacked(message, change):
    tensors = bitsandbytes_pack(np.zeros((2, 64), int), np.ones((2, 1))) | change
    with pytest.raises(ValueError, match=message):
        bitsandbytes_unpack({name: t for name, t in tensors.items() if t is not None})


def test_wrong_nested_sizes_are_refused():
    tensors = bitsandbytes_pack(np.zeros((2, 64), int), np.ones((2, 1)), double_quant=True)
    with pytest.raises(ValueError, match="nested_quant_map and nested_absmax must have 256 and 1"):
        bitsandbytes_unpack(tensors | {"weight.nested_absmax": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("codes must lie in 0..15", {"codes": np.full((1, 64), 16)}),
        ("scale must be 1 finite floats", {"scale": np.ones(2)}),
        ("scale must be 1 finite floats", {"scale": np.full(1, np.inf)}),
        ("quant_type must be one of", {"quant_type": "int4"}),
        ("dtype one of", {"dtype": "float64"}),
        ("blocksize must be at least 1", {"blocksize": 0}),
        ("cannot hold an empty weight", {"codes": np.zeros((0, 64), int), "scale": np.ones(0)}),
    ],
)
def test_what_cannot_be_packed(message, change):
    with pytest.raises(ValueError, match=message):
        bitsandbytes_pack(**({"codes": np.zeros((1, 64), int), "scale": np.ones(1)} | change))


def test_any_memory_order_and_byte_order():
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (8, 16), dtype=np.uint8), rng.random((8, 2))
    expected = bitsandbytes_pack(codes, scale, blocksize=8, double_quant=True)
    other = bitsandbytes_pack(np.asfortranarray(codes), np.asfortranarray(scale), blocksize=8, double_quant=True)
    assert {n: t.tobytes() for n, t in other.items()} == {n: t.tobytes() for n, t in expected.items()}
    swapped = {name: t.astype(t.dtype.newbyteorder(">")) for name, t in expected.items()}
    assert np.array_equal(bitsandbytes_dequantize(swapped), bitsandbytes_dequantize(expected))


def test_int8():
    codes = np.array([[127, -127, 0, 1]], np.int8)
    tensors = int8_pack(codes, np.array([[2.54]]))
    assert tensors["SCB"].shape == (1,) and tensors["weight_format"] == 0
    w = int8_dequantize(tensors)
    assert w.dtype == np.float32 and w[0].tolist() == [
        float(np.float32(q) * np.float32(2.54) * np.float32(1 / 127)) for q in (127, -127, 0, 1)
    ]
    back = int8_unpack(tensors)
    assert np.array_equal(back[0], codes) and back[1].tolist() == [[np.float32(2.54)]]
    for message, change in (
        ("SCB is missing", {"SCB": None}),
        ("SCB must have 1 numbers", {"SCB": np.ones(2, np.float32)}),
        ("weight_format 2", {"weight_format": np.array(2, np.uint8)}),
    ):
        with pytest.raises(ValueError, match=message):
            int8_unpack({name: t for name, t in (tensors | change).items() if t is not None})
    with pytest.raises(ValueError, match="codes must be"):
        int8_pack(codes.astype(int), np.ones(1))
    with pytest.raises(ValueError, match="scale must be 1 finite"):
        int8_pack(codes, np.full(1, np.nan))
