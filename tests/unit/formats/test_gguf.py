"""GGUF: everything malformed is refused with its byte offset; what is written comes back, and gguf-py reads it."""

import struct
import time
import tracemalloc

import numpy as np
import pytest

from refllm.formats.blocks import BLOCKS
from refllm.formats.errors import FormatError
from refllm.formats.gguf import TENSOR_TYPES, read_gguf, write_gguf

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def key(name, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def tensor(name="t", dims=(32,), kind=0, offset=0, n_dims=None) -> bytes:
    head = text(name) + struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def build(keys=(), tensors=(), data=b"", version=3, n_tensors=None, n_keys=None, magic=b"GGUF", align=32) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + (b"\0" * (-len(head) % align) + data if data else b"")


ROW = np.arange(32, dtype="<f4").tobytes()  # 128 bytes
ARCH = key("general.architecture", STRING, text("llama"))
VALID = build([ARCH], [tensor(), tensor("u", (16, 2), 1, 128)], ROW + ROW[:64])

MALFORMED = {
    "empty": b"",
    "only the magic": b"GGUF",
    "other magic": build(magic=b"GGML"),
    "version 0": build(version=0),
    "version 1": build(version=1),
    "version 4": build(version=4),
    "big endian": build(version=3 << 24),
    "one key too many": build([ARCH], [tensor()], ROW, n_keys=2),
    "one tensor too many": build([ARCH], [tensor()], ROW, n_tensors=2),
    "2^32 keys": build(n_keys=2**32),
    "2^63 keys": build(n_keys=2**63),
    "2^64-1 tensors": build(n_tensors=2**64 - 1),
    "key length 2^63": build([text("", 2**63) + b"\0" * 40], n_keys=1),
    "key of 70000 bytes": build([key("k" * 70000, U8, b"\1")]),
    "empty key": build([key("", U8, b"\1")]),
    "key with a NUL": build([key("a\0", U8, b"\1")]),
    "key not UTF-8": build([key(b"\xff", U8, b"\1")]),
    "duplicate key": build([ARCH, ARCH]),
    "unknown value type": build([key("a", 13, b"\0" * 8)]),
    "string past the end": build([key("a", STRING, text("abc", 4))]),
    "string of 2^64-1": build([key("a", STRING, text("abc", 2**64 - 1))]),
    "string not UTF-8": build([key("a", STRING, text(b"ok\xff"))]),
    "value cut off": build([key("a", U64, b"\0\0")]),
    "bool 2": build([key("a", BOOL, b"\2")]),
    "bool array with 2": build([key("a", ARRAY, array(BOOL, 2, b"\1\2"))]),
    "array of 2^32": build([key("a", ARRAY, array(U8, 2**32, b"\0" * 8))]),
    "array of 2^63": build([key("a", ARRAY, array(U32, 2**63, b"\0" * 8))]),
    "string array of 2^32": build([key("a", ARRAY, array(STRING, 2**32, b"\0" * 8))]),
    "string array of 2^63": build([key("a", ARRAY, array(STRING, 2**63, b"\0" * 8))]),
    "string array one too long": build([key("a", ARRAY, array(STRING, 2, text("x") + b"\0" * 7))]),
    "string array runs past the end": build([key("a", ARRAY, array(STRING, 2, text("x") + text("", 9) + b"x"))]),
    "array of arrays": build([key("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))]),
    "array of unknown type": build([key("a", ARRAY, array(99, 1, b"\0" * 8))]),
    **{f"alignment {n}": build([key("general.alignment", U32, struct.pack("<I", n))]) for n in (0, 1, 4, 7, 48)},
    "alignment as u64": build([key("general.alignment", U64, struct.pack("<Q", 32))]),
    "alignment as text": build([key("general.alignment", STRING, text("32"))]),
    "split file": build([key("split.count", 2, struct.pack("<H", 2))]),
    "split count is an array": build([key("split.count", ARRAY, array(U8, 2, b"\1\1"))]),
    "empty tensor name": build([], [tensor("")], ROW),
    "tensor name of 65 bytes": build([], [tensor("n" * 65)], ROW),
    "tensor name with a line end": build([], [tensor("a\nb")], ROW),
    "duplicate tensor": build([], [tensor(), tensor(offset=128)], ROW * 2),
    "no dimensions": build([], [tensor(dims=())], ROW),
    "5 dimensions": build([], [tensor(dims=(2,) * 5)], ROW),
    "2^32-1 dimensions": build([], [tensor(n_dims=2**32 - 1)], ROW),
    "dimension 0": build([], [tensor(dims=(32, 0))], ROW),
    "unknown tensor type": build([], [tensor(kind=4)], ROW),
    "row not a multiple of the block": build([], [tensor(dims=(48,), kind=8)], ROW),
    "dimensions overflow": build([], [tensor(dims=(2**62, 4))], ROW),
    "dimensions wrap to the right size": build([], [tensor(dims=(2**32, 2**32, 32))], ROW),
    "sizes that add up to less by wrapping": build(
        [], [tensor("a", (2**61,), offset=0), tensor("b", (2**61,), offset=2**63)], ROW
    ),
    "offset not aligned": build([], [tensor(offset=4)], ROW + b"\0" * 4),
    "offset past the end": build([], [tensor(offset=128)], ROW),
    "offset 2^64-1": build([], [tensor(offset=2**64 - 1)], ROW),
    "overlap": build([], [tensor("a"), tensor("b", offset=0)], ROW),
    "partial overlap": build([], [tensor("a"), tensor("b", offset=96)], ROW * 2),
    "gap at the front": build([], [tensor(offset=32)], ROW + b"\0" * 32),
    "gap": build([], [tensor("a"), tensor("b", offset=160)], ROW * 2 + b"\0" * 32),
    "trailing bytes": build([], [tensor()], ROW + b"\0"),
    "trailing bytes without tensors": build([ARCH]) + b"\0" * 32,
    "data cut off": build([], [tensor()], ROW[:-1]),
    "tensor larger than the file": build([], [tensor(dims=(32, 10**9))], ROW),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_with_an_offset(tmp_path, name):
    path = tmp_path / "model.gguf"
    path.write_bytes(MALFORMED[name])
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(FormatError, match=r"model\.gguf: .*\(byte \d+\)$") as caught:
        read_gguf(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 <= caught.value.offset <= len(MALFORMED[name])
    assert "\n" not in str(caught.value)
    assert seconds < 1
    assert peak < 100e6


def test_the_control_is_valid(tmp_path):
    (tmp_path / "m.gguf").write_bytes(VALID)
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata == {"general.architecture": "llama"}
    assert file.types == {"general.architecture": "STRING"}
    assert file.tensors["t"].floats().tolist() == list(range(32))
    assert file.tensors["u"].shape == (2, 16)  # the fastest dimension comes first in the file
    assert file.tensors["u"].stored().shape == (2, 32)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    for size in range(len(VALID)):
        path.write_bytes(VALID[:size])
        with pytest.raises(FormatError):
            read_gguf(path)


def test_versions_alignment_and_padding(tmp_path):
    path = tmp_path / "m.gguf"
    align = key("general.alignment", U32, struct.pack("<I", 8))
    path.write_bytes(build([align], [tensor("a", (1,)), tensor("b", (1,), offset=8)], b"\0" * 12, version=2, align=8))
    file = read_gguf(path)
    assert (file.version, file.alignment, len(file.tensors)) == (2, 8, 2)
    path.write_bytes(build([align], [tensor("a", (1,))], b"\0" * 8, align=8))  # the last tensor may be padded
    assert list(read_gguf(path).tensors) == ["a"]
    path.write_bytes(build())
    assert read_gguf(path).tensors == {}


def test_tensors_may_be_listed_in_any_order(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(build([], [tensor("second", (1,), offset=32), tensor("first", (1,))], b"\0" * 32 + ROW[4:8]))
    tensors = read_gguf(path).tensors
    assert list(tensors) == ["second", "first"]
    assert tensors["second"].floats().tolist() == [1.0]


METADATA = {
    "text": "grüße\n",
    "yes": True,
    "small": 7,
    "large": 2**40,
    "negative": -3,
    "float": 0.5,
    "exact": np.float64(0.1),
    "byte": np.uint8(200),
    "names": ["a", "", "ü"],
    "ints": np.array([1, -2], np.int32),
    "floats": np.array([0.5, 1.5], np.float32),
    "flags": np.array([True, False]),
}
TYPES = ["STRING", "BOOL", "UINT32", "UINT64", "INT32", "FLOAT32", "FLOAT64", "UINT8"]
TYPES += [f"ARRAY of {kind}" for kind in ("STRING", "INT32", "FLOAT32", "BOOL")]


def test_what_is_written_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "f32": ("F32", rng.standard_normal((3, 5)).astype(np.float32).T),
        "f16": ("F16", rng.standard_normal(7).astype(np.float16)),
        "bf16": ("BF16", np.array([[0x3F80, 0xC000]], np.uint16)),
        "f64": ("F64", np.array([0.1])),
        **{name: (name, form.encode(rng.standard_normal((2, 256)).astype(np.float32)))
           for name, form in BLOCKS.items()},
    }  # fmt: skip
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, tensors)
    file = read_gguf(path)
    assert file.version == 3
    assert list(file.tensors) == list(tensors)
    for name, value in METADATA.items():
        np.testing.assert_array_equal(file.metadata[name], value)
    assert file.types == dict(zip(METADATA, TYPES, strict=True))
    for name, (type_name, stored) in tensors.items():
        assert file.tensors[name].type_name == type_name
        assert file.tensors[name].stored().tobytes() == np.ascontiguousarray(stored).tobytes()
        assert file.tensors[name].offset % 32 == 0
        if type_name in BLOCKS:
            np.testing.assert_array_equal(file.tensors[name].floats(), BLOCKS[type_name].decode(stored))
    np.testing.assert_array_equal(file.tensors["bf16"].floats(), [[1.0, -2.0]])
    np.testing.assert_array_equal(file.tensors["f64"].floats(), [0.1])
    write_gguf(tmp_path / "again.gguf", METADATA, tensors)
    assert path.read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_a_type_without_a_decoder_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, {"t": ("IQ2_XXS", np.zeros((1, 66), np.uint8))})
    assert read_gguf(path).tensors["t"].shape == (1, 256)
    with pytest.raises(FormatError, match="'t' has type IQ2_XXS, which is not decoded"):
        read_gguf(path).tensors["t"].floats()


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, {"n" * 65: ("F32", np.float32([1]))}, "1 to 64 printable bytes"),
        ({}, {"t": ("Q9", np.float32([1]))}, "unknown GGUF type 'Q9'"),
        ({}, {"t": ("F32", np.float64([1]))}, "got float64"),
        ({}, {"t": ("F32", np.float32(1))}, "1 to 4 axes"),
        ({}, {"t": ("Q8_0", np.zeros(33, np.uint8))}, "33 bytes are not a multiple of 34"),
        ({"k": None}, {}, "'k' cannot hold NoneType"),
        ({"k": 2**64}, {}, "cannot hold int"),
        ({"k": []}, {}, "cannot hold list"),
    ],
)
def test_the_writer_refuses(tmp_path, metadata, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "m.gguf", metadata, tensors)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_of_50000_strings_is_read_fast(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"tokens": [f"token{i}" for i in range(50_000)]}, {})
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(read_gguf(tmp_path / "m.gguf").metadata["tokens"]) == 50_000
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.oracle
def test_gguf_py_reads_what_is_written_and_we_read_what_it_writes(tmp_path):
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    metadata = {"general.architecture": "llama"} | METADATA
    write_gguf(tmp_path / "ours.gguf", metadata, {"x": ("F32", x), "q": ("Q5_1", BLOCKS["Q5_1"].encode(x))})
    theirs = GGUFReader(tmp_path / "ours.gguf")
    for name, value in metadata.items():
        np.testing.assert_array_equal(theirs.fields[name].contents(), value)
    by_name = {t.name: t for t in theirs.tensors}
    np.testing.assert_array_equal(by_name["x"].data, x)
    np.testing.assert_array_equal(by_name["q"].data, BLOCKS["Q5_1"].encode(x))

    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("flags", [True, False])
    writer.add_float32("eps", 1e-5)
    writer.add_tensor("x", x)
    writer.add_tensor("q", BLOCKS["Q4_0"].encode(x), raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = read_gguf(tmp_path / "theirs.gguf")
    assert ours.metadata["llama.block_count"] == 2
    assert ours.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert ours.metadata["flags"].tolist() == [True, False]
    np.testing.assert_array_equal(ours.tensors["x"].floats(), x)
    np.testing.assert_array_equal(ours.tensors["q"].stored(), BLOCKS["Q4_0"].encode(x))


@pytest.mark.oracle
def test_block_sizes_are_those_of_gguf_py():
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    theirs = {int(t): (t.name, *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType if t in GGML_QUANT_SIZES}
    activation_only = {9, 15}  # Q8_1 never stands in a file; gguf-py counts Q8_K without its bsums as ggml has them
    for type_id, row in theirs.items():
        if type_id not in activation_only:
            assert TENSOR_TYPES[type_id] == row
