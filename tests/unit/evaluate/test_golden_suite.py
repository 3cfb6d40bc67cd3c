"""Reading suites: recipes give the published numbers, hashes are of little-endian bytes, tampering is noticed."""

import hashlib

import numpy as np
import pytest

from refllm.evaluate.golden.suite import (
    CorruptVectors,
    array_hash,
    read_schema,
    read_suite,
    read_suites,
    splitmix64,
    suite_names,
)
from tests.golden_tiny import write, write_manifest


def test_splitmix64_check_values():
    assert splitmix64(1234567, 1).tolist() == [6457827717110365317]
    assert [hex(z) for z in splitmix64(0x1234, 2).tolist()] == ["0x5f642f87d5e23888", "0x5a4d78533d034cb5"]
    assert splitmix64(2**64 - 1, 0).tolist() == []


def test_generator_and_reader_make_the_same_random_numbers():
    """Two texts: Python integers in the generator, uint64 arrays in the reader."""
    from refllm.evaluate.golden.suites import exact

    for seed in (0, 1, 0x1234, 2**64 - 1):
        assert exact.splitmix64(seed, 50) == splitmix64(seed, 50).tolist()


def suite_array(tmp_path, **entry):
    return read_suite(write(tmp_path), "demo/double").array({"shape": [4], **entry})


@pytest.mark.parametrize(
    ("recipe", "dtype", "expected"),
    [
        ({"kind": "arange", "start": 5, "step": -2}, "i8", [5, 3, 1, -1]),
        ({"kind": "full", "value": "-0x1.8p+1"}, "f16", [-3.0] * 4),
        ({"kind": "full", "value": "7"}, "u8", [7] * 4),
        ({"kind": "all_bit_patterns"}, "u16", [0, 1, 2, 3]),
        ({"kind": "splitmix64_dyadic", "seed": "0x0000000000001234", "bits": 8, "exp2": -4}, "f32",
         [(0x5F - 128) / 16, (0x5A - 128) / 16]),
    ],
)  # fmt: skip
def test_recipes(tmp_path, recipe, dtype, expected):
    array = suite_array(tmp_path, dtype=dtype, recipe=recipe)
    assert array[: len(expected)].tolist() == expected


def test_all_bit_patterns_of_float16_are_all_float16(tmp_path):
    suite = read_suite(write(tmp_path), "demo/double")
    entry = {"dtype": "f16", "shape": [65536], "recipe": {"kind": "all_bit_patterns"}}
    assert len(np.unique(suite.array(entry).view(np.uint16))) == 65536
    with pytest.raises(CorruptVectors, match="more than the bit patterns"):
        suite.array({"dtype": "u8", "shape": [257], "recipe": {"kind": "all_bit_patterns"}})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "f32", "shape": [3], "inline": ["0x1p+0", "0x1p+0"]}, "2 values for the shape"),
        ({"dtype": "u8", "shape": [1], "inline": [300]}, "cannot be built"),
        ({"dtype": "f32", "shape": [1], "inline": ["one"]}, "cannot be built"),
        ({"dtype": "f32", "shape": [1], "key": "gone"}, "gone"),
        ({"dtype": "f16", "shape": [40], "key": "2/y"}, "the manifest says float16"),
        ({"dtype": "f32", "shape": [41], "key": "2/y"}, "the manifest says"),
        ({"dtype": "f32", "shape": [1 << 40], "recipe": {"kind": "arange", "start": 0, "step": 1}}, "at most"),
        ({"dtype": "f32", "shape": [1], "inline": ["0x1p+0"], "sha256": "0" * 64}, "sha256"),
    ],
)
def test_a_tensor_that_lies_is_corrupt(tmp_path, entry, message):
    with pytest.raises(CorruptVectors, match=message):
        read_suite(write(tmp_path), "demo/double").array(entry)


def test_inline_knows_signed_zero_nan_and_infinity(tmp_path):
    entry = {"dtype": "f32", "shape": [2, 2], "inline": ["-0x0p+0", "nan", "-inf", "0x1p-149"]}
    array = read_suite(write(tmp_path), "demo/double").array(entry)
    assert array.dtype == np.float32 and array.flags.writeable
    assert np.signbit(array[0, 0]) and np.isnan(array[0, 1]) and array[1].tolist() == [-np.inf, 2.0**-149]


def test_the_hash_is_of_little_endian_c_order_bytes():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(a.astype("<f4").tobytes()).hexdigest()
    for same in (a, a.astype(">f4"), np.asfortranarray(a), np.repeat(a, 2, axis=1)[:, ::2]):
        assert array_hash(same) == expected
    assert array_hash(a.T) != expected


FILES = ("SHA256SUMS", "demo/double.json", "demo/double.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_one_changed_byte_anywhere_is_noticed(tmp_path, file):
    path = write(tmp_path) / file
    data = path.read_bytes()
    for at in range(0, len(data), max(len(data) // 25, 1)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CorruptVectors):
            read_suite(tmp_path, "demo/double")
            read_schema(tmp_path)
    path.write_bytes(data)
    assert len(read_suite(tmp_path, "demo/double").cases) == 5


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_cut_file_is_corrupt(tmp_path, file):
    path = write(tmp_path) / file
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    with pytest.raises(CorruptVectors):
        list(read_suites(tmp_path))
    path.unlink()
    with pytest.raises(CorruptVectors):
        read_suite(tmp_path, "demo/double")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["data"].update(file="../../etc/passwd"), "data.file must be"),
        (lambda m: m["data"].update(sha256="0" * 64), "data.sha256"),
        (lambda m: m.pop("data"), "data"),
        (lambda m: m.update(data=[]), "list indices"),
    ],
)
def test_a_manifest_that_does_not_fit_its_data_is_corrupt(tmp_path, change, message):
    with pytest.raises(CorruptVectors, match=message):
        read_suite(write_manifest(tmp_path, change), "demo/double")


def test_names_are_found(tmp_path):
    assert suite_names(write(tmp_path)) == ["demo/double"]
