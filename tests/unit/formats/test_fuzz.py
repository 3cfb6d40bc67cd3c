"""Damaged files load or raise FormatError, nothing else: no other exception, no hang, no large allocation."""

import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refllm.formats.errors import FormatError
from refllm.formats.gguf import read_gguf, write_gguf
from refllm.formats.gguf_vocab import tokenizer_from_gguf
from refllm.formats.tensors import read_safetensors, write_safetensors

EDGES = (0, 1, 7, 31, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def valid_safetensors(path) -> bytes:
    arrays = {"a.weight": np.float32([[1, 2], [3, 4]]), "b": np.uint8([1, 2, 3]), "c": np.array([True, False])}
    write_safetensors(path, arrays, {"format": "pt"})
    return path.read_bytes()


def valid_gguf(path) -> bytes:
    tokens = ["<s>", "</s>", "a", "b", "ab"]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": np.int32([3, 3, 1, 1, 1]),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    q8 = np.zeros((2, 34), np.uint8)
    write_gguf(path, metadata, {"t": ("F32", np.float32([[1, 2], [3, 4]])), "q": ("Q8_0", q8)})
    return path.read_bytes()


def load_safetensors(path) -> None:
    for tensor in read_safetensors(path)[0].values():
        tensor.stored()


def load_gguf(path) -> None:
    file = read_gguf(path)
    for tensor in file.tensors.values():
        tensor.stored()
    tokenizer_from_gguf(file.metadata, path)


FORMATS = {"safetensors": (valid_safetensors, load_safetensors), "gguf": (valid_gguf, load_gguf)}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The undamaged bytes of each format."""
    return {form: make(tmp_path_factory.mktemp(form) / "f") for form, (make, _) in FORMATS.items()}


def survives(load, path, data: bytes) -> None:
    """Loads or raises FormatError, in time and memory."""
    path.write_bytes(data)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        load(path)
    except FormatError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.perf_counter() - start < 1
    assert peak < 100e6


@pytest.mark.parametrize("form", FORMATS)
def test_the_undamaged_file_loads(tmp_path, valid, form):
    (tmp_path / "f").write_bytes(valid[form])
    FORMATS[form][1](tmp_path / "f")


@pytest.mark.parametrize("form", FORMATS)
def test_truncation_at_every_offset(tmp_path, valid, form):
    whole = valid[form]
    for size in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:size])
        try:
            FORMATS[form][1](tmp_path / "f")
        except FormatError:
            continue
        assert not any(whole[size:]), f"cut at {size} of {len(whole)} and not noticed"  # only final padding may go


@pytest.mark.parametrize("form", FORMATS)
@QUICK
@given(data=st.data())
def test_flipped_bytes(tmp_path, valid, form, data):
    damaged = bytearray(valid[form])
    flips = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for at, value in data.draw(st.lists(flips, min_size=1, max_size=4)):
        damaged[at] = value
    survives(FORMATS[form][1], tmp_path / "f", bytes(damaged))


@pytest.mark.parametrize("form", FORMATS)
@QUICK
@given(data=st.data())
def test_edge_values_in_any_eight_bytes(tmp_path, valid, form, data):
    damaged = bytearray(valid[form])
    at = data.draw(st.integers(0, len(damaged) - 8))
    damaged[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from(EDGES)))
    survives(FORMATS[form][1], tmp_path / "f", bytes(damaged))


@QUICK
@given(st.binary(max_size=200), st.sampled_from([b"", b"GGUF\3\0\0\0", b"\2\0\0\0\0\0\0\0{}"]))
def test_random_bytes(tmp_path, body, start):
    survives(load_gguf, tmp_path / "f", start + body)
    survives(load_safetensors, tmp_path / "f", start + body)
