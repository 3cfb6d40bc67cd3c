"""safetensors: everything malformed is refused with its byte offset; what is written is stable and others read it."""

import json
import math
import struct
import time
import tracemalloc

import numpy as np
import pytest

from refllm.formats.errors import FormatError
from refllm.formats.tensors import DTYPES, open_folder, read_safetensors, write_safetensors


def file_bytes(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(1,), begin=0, end=4) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def read(tmp_path, data: bytes) -> dict:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return read_safetensors(path)[0]


A = entry()
TEXT = json.dumps(A)
ONE = struct.pack("<f", 1.5)


def with_field(field: str, value: str) -> bytes:
    """A header whose one tensor has this JSON text in one of its fields."""
    fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | {field: value}
    return ('{"a":{' + ",".join(f'"{key}":{text}' for key, text in fields.items()) + "}}").encode()


HUGE = 2**63
MALFORMED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header length 0": struct.pack("<Q", 0),
    "header length beyond the file": file_bytes(b"{}", length=3),
    "header length 2^63": file_bytes(b"{}", length=HUGE),
    "header length 2^64-1": file_bytes(b"{}", length=2**64 - 1),
    "header over the limit": file_bytes(b"{" + b" " * (8 << 20) + b"}"),
    "truncated JSON": file_bytes(b'{"a":{"dtype"'),
    "not UTF-8": file_bytes(b'{"\xff":' + TEXT.encode() + b"}", ONE),
    "byte order mark": file_bytes(b"\xef\xbb\xbf{}"),
    "leading space": file_bytes(b" " + json.dumps({"a": A}).encode(), ONE),
    "array": file_bytes(b"[]"),
    "garbage after the header": file_bytes(b"{}x"),
    "NULs after the header": file_bytes(b"{}\0\0"),
    "duplicate tensor": file_bytes(f'{{"a":{TEXT},"a":{TEXT}}}'.encode(), ONE),
    "duplicate metadata": file_bytes(b'{"__metadata__":{},"__metadata__":{}}'),
    "metadata null": file_bytes({"__metadata__": None}),
    "metadata number": file_bytes({"__metadata__": {"a": 1}}),
    "metadata nested": file_bytes({"__metadata__": {"a": {"b": "c"}}}),
    "nested 3000 deep": file_bytes(b'{"a":' * 3000 + b"1" + b"}" * 3000),
    "nested arrays": file_bytes(b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"),
    "brackets": file_bytes(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
    "unknown dtype": file_bytes({"a": entry("F33")}, ONE),
    "lower-case dtype": file_bytes({"a": entry("f32")}, ONE),
    "dtype not a string": file_bytes(with_field("dtype", "[]"), ONE),
    "half a byte": file_bytes({"a": entry("F4", (3,), 0, 1)}, b"\0"),
    "product overflow": file_bytes({"a": entry(shape=[2**62, 2**62])}, ONE),
    "product wraps to the right size": file_bytes({"a": entry("U8", [2**62, 4], 0, 0)}),
    "size 2^63": file_bytes({"a": entry(shape=[HUGE, 0], end=0)}),
    "many dimensions": file_bytes({"a": entry(shape=[1] * 1000)}, ONE),
    "too few bytes": file_bytes({"a": entry(shape=[2])}, ONE),
    "too many bytes": file_bytes({"a": entry(end=8)}, ONE * 2),
    "offsets reversed": file_bytes({"a": entry(begin=4, end=0)}, ONE),
    "past the end": file_bytes({"a": entry()}, b"\0\0\0"),
    "offset 2^63": file_bytes({"a": entry(begin=HUGE, end=HUGE + 4)}, ONE),
    "full overlap": file_bytes({"a": A, "b": A}, ONE),
    "partial overlap": file_bytes({"a": entry(shape=[2], end=8), "b": entry(begin=4, end=8)}, ONE * 2),
    "gap at the front": file_bytes({"a": entry(begin=4, end=8)}, ONE * 2),
    "gap in the middle": file_bytes({"a": A, "b": entry(begin=8, end=12)}, ONE * 3),
    "trailing bytes": file_bytes({"a": A}, ONE + b"\0"),
    "data without tensors": file_bytes(b"{}", b"\0"),
    "missing key": file_bytes({"a": {"dtype": "F32", "shape": [1]}}, ONE),
    "extra key": file_bytes({"a": A | {"more": 1}}, ONE),
    "entry not an object": file_bytes(b'{"a":[1,2,3]}'),
    "empty name": file_bytes({"": A}, ONE),
    "NUL in a name": file_bytes({"a\0b": A}, ONE),
    "line end in a name": file_bytes({"a\nb": A}, ONE),
    **{f"shape {text}": file_bytes(with_field("shape", text), ONE)
       for text in ("[NaN]", "[1e0]", "[true]", "[1.0]", "[-1]", '["1"]', '"1"', "1", "null", "{}")},
    **{f"offsets {text}": file_bytes(with_field("data_offsets", text), ONE)
       for text in ("[0]", "[0,2,4]", "[-4,0]", "[0,4.0]", "[false,4]", '["0","4"]', "4", "null", "[0,Infinity]")},
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_with_an_offset(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[name])
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(FormatError, match=r"model\.safetensors: .*\(byte \d+\)$") as caught:
        read_safetensors(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 <= caught.value.offset <= len(MALFORMED[name])
    assert "\n" not in str(caught.value)
    assert seconds < 1
    assert peak < 100e6


def test_offsets_point_at_the_fault(tmp_path):
    header = {"first": entry(), "second": entry(begin=8, end=12)}
    with pytest.raises(FormatError, match="gap") as caught:
        read(tmp_path, file_bytes(header, ONE * 3))
    assert caught.value.offset == 8 + len(json.dumps(header)) + 4
    header = {"first": entry(), "second": entry("F99", begin=4, end=8)}
    with pytest.raises(FormatError, match=r"'second': unknown dtype 'F99'") as caught:
        read(tmp_path, file_bytes(header, ONE * 2))
    assert caught.value.offset == 8 + json.dumps(header).index('"second"')


def test_unusual_but_valid_files_load(tmp_path):
    assert read(tmp_path, file_bytes(b"{}")) == {}
    assert read(tmp_path, file_bytes(b"{}     ")) == {}
    scalar = read(tmp_path, file_bytes({"s": entry(shape=[])}, ONE))["s"].stored()
    assert scalar.shape == () and scalar == 1.5
    empty = {"e": entry(shape=[0, 3], end=0), "a": A, "f": entry("U8", [0], 4, 4)}
    tensors = read(tmp_path, file_bytes(empty, ONE))
    assert tensors["e"].stored().shape == (0, 3)
    odd = {"pad": entry("U8", [3], 0, 3), "a": entry(begin=3, end=7)}  # unaligned
    assert read(tmp_path, file_bytes(odd, b"\0\0\0" + ONE))["a"].floats().tolist() == [1.5]
    path_like = read(tmp_path, file_bytes({"../../etc/passwd": A}, ONE))  # only ever a dictionary key
    assert list(path_like) == ["../../etc/passwd"]


def test_every_dtype_is_read(tmp_path):
    for dtype, (bits, code) in DTYPES.items():
        n = 8 // math.gcd(bits, 8)
        data = bytes(i % 2 if dtype == "BOOL" else i for i in range(n * bits // 8))
        tensor = read(tmp_path, file_bytes({"a": entry(dtype, [n], 0, len(data))}, data))["a"]
        stored = tensor.stored()
        assert stored.tobytes() == data
        assert stored.dtype == (bool if dtype == "BOOL" else np.dtype(code))
        assert tensor.dtype == dtype
        if dtype not in ("F64", "F32", "F16", "BF16"):
            with pytest.raises(FormatError, match=f"'a' is {dtype}; F64, F32, F16 or BF16 was expected"):
                tensor.floats()
        else:
            assert tensor.floats().dtype == (np.float64 if dtype == "F64" else np.float32)


def test_a_bool_other_than_0_and_1_is_refused(tmp_path):
    tensor = read(tmp_path, file_bytes({"a": entry("BOOL", [2], 0, 2)}, b"\1\2"))["a"]
    with pytest.raises(FormatError, match="other than 0 and 1") as caught:
        tensor.stored()
    assert caught.value.offset == tensor.offset + 1


def test_what_is_written_is_read_by_others_and_by_us(tmp_path):
    from safetensors.numpy import load_file

    rng = np.random.default_rng(0)
    arrays = {
        "transposed": rng.standard_normal((3, 5)).astype(np.float32).T,
        "strided": np.arange(12, dtype=np.int64)[::3],
        "codes": np.arange(5, dtype=np.uint8),
        "flags": np.array([True, False, True]),
        "scalar": np.float16(2.5)[()].reshape(()),
        "empty": np.zeros((0, 4), np.float64),
        "big endian": np.arange(3, dtype=">i4"),
    }
    path = tmp_path / "model.safetensors"
    write_safetensors(path, arrays)
    theirs, (ours, _) = load_file(path), read_safetensors(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name].stored(), array)
        assert ours[name].offset % max(array.dtype.itemsize, 1) == 0


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    arrays = {"b": np.ones(3, np.float32), "a": np.zeros(2, np.uint8), "c": np.ones(1, np.float64)}
    write_safetensors(tmp_path / "1", arrays, {"x": "1", "y": "2"})
    write_safetensors(tmp_path / "2", dict(reversed(arrays.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert read_safetensors(tmp_path / "1")[1] == {"x": "1", "y": "2"}


def test_logical_dtypes(tmp_path):
    codes = np.array([0x3F80, 0xC000], np.uint16)
    write_safetensors(tmp_path / "m", {"w": codes, "f": np.uint8([1])}, dtypes={"w": "BF16", "f": "F8_E4M3"})
    tensors, _ = read_safetensors(tmp_path / "m")
    assert tensors["w"].floats().tolist() == [1.0, -2.0]
    np.testing.assert_array_equal(tensors["w"].stored(), codes)
    assert tensors["f"].dtype == "F8_E4M3"


def test_the_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match="'w' has dtype object"):
        write_safetensors(tmp_path / "m", {"w": np.array([None])})
    with pytest.raises(ValueError, match="BF16 has 16 bits, the array's items have 32"):
        write_safetensors(tmp_path / "m", {"w": np.float32([1])}, dtypes={"w": "BF16"})
    with pytest.raises(ValueError, match="cannot be the name"):
        write_safetensors(tmp_path / "m", {"__metadata__": np.float32([1])})
    assert not list(tmp_path.iterdir())


def shards(folder, weight_map=None, **files):
    """A sharded checkpoint: shard name -> tensor names."""
    for file, names in files.items():
        write_safetensors(folder / f"{file}.safetensors", {name: np.float32([1]) for name in names})
    known = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 4}, "weight_map": known if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_joined(tmp_path):
    shards(tmp_path, one=["a", "b"], two=["c"])
    assert set(open_folder(tmp_path)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "name",
    ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "..\\one.safetensors", "C:one.safetensors",
     ".one.safetensors", "one.bin", "one.safetensors\0.safetensors", ""],
)  # fmt: skip
def test_an_index_names_only_plain_files_of_its_folder(tmp_path, name):
    shards(tmp_path, weight_map={"a": name}, one=["a"])
    with pytest.raises(FormatError, match=r"a plain \.safetensors name in this folder is expected"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'one.safetensors' lacks b"),
        ({}, "no tensor"),
        ({"a": "two.safetensors"}, "'two.safetensors' is missing"),
        ({"a": 1}, "must map tensor names"),
        ([], "must map tensor names"),
    ],
)
def test_an_index_must_agree_with_its_shards(tmp_path, weight_map, message):
    shards(tmp_path, weight_map=weight_map, one=["a"])
    with pytest.raises(FormatError, match=message):
        open_folder(tmp_path)


def test_a_tensor_the_index_does_not_list_is_reported(tmp_path):
    shards(tmp_path, weight_map={"a": "one.safetensors"}, one=["a", "x"])
    with pytest.raises(FormatError, match="holds, unlisted by the index, x"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(FormatError, match=f"{name}: is a pickle"):
        open_folder(tmp_path)
    with pytest.raises(FormatError, match=r"convert it to \.safetensors"):
        read_safetensors(tmp_path / name)


def test_folders_without_or_with_two_checkpoints_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"no model\.safetensors"):
        open_folder(tmp_path)
    shards(tmp_path, one=["a"])
    write_safetensors(tmp_path / "model.safetensors", {"a": np.float32([1])})
    with pytest.raises(FormatError, match="both"):
        open_folder(tmp_path)
