"""load: names, folders, files; GGUF conventions undone; errors that say how to go on."""

import json
from dataclasses import replace

import numpy as np
import pytest

from refllm.formats.blocks import BLOCKS
from refllm.formats.errors import FormatError
from refllm.formats.gguf import read_gguf, write_gguf
from refllm.formats.gguf_vocab import tokenizer_from_gguf
from refllm.kernels.packed.records import GGUFBlocks
from refllm.kernels.rope import cos_sin, rotate, rotate_interleaved
from refllm.model.from_gguf import parse_config, read_model
from refllm.model.load import densify, load, resolve
from refllm.model.to_gguf import to_gguf
from refllm.model.to_hf import to_hf
from tests.models import ARCHITECTURES, random_model
from tests.unit.formats.test_tokenizer import byte_level_metadata


@pytest.fixture
def llama(tmp_path):
    """A GGUF file of a random model whose rows blocks divide, 4 heads over 2 kv heads."""
    model = random_model("llama", hidden_size=32, intermediate_size=64, attention_bias=True)
    to_gguf(model, tmp_path / "m.gguf")
    return model, tmp_path / "m.gguf"


def edit(path, metadata=None, tensors=None, drop=()):
    """Rewrite a GGUF file with some keys and tensors changed or dropped."""
    file = read_gguf(path)
    stored = {name: (t.type_name, t.floats()) for name, t in file.tensors.items()} | (tensors or {})
    keys = file.metadata | (metadata or {})
    drop_in = lambda values: {key: value for key, value in values.items() if key not in drop}
    write_gguf(path, drop_in(keys), drop_in(stored))


def test_q_and_k_rows_are_interleaved_in_the_file_and_half_split_in_memory(llama):
    model, path = llama
    stored = read_gguf(path).tensors
    loaded = load(path).weights
    x = np.random.default_rng(1).standard_normal((1, 32)).astype(np.float32)
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        cos, sin = cos_sin(model.config.rope, 8, np.array([29]))
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.{ours}"
            w = stored[f"blk.{layer}.{theirs}.weight"].floats()
            assert not np.array_equal(w, model.weights[f"{name}.weight"])
            np.testing.assert_array_equal(loaded[f"{name}.weight"], model.weights[f"{name}.weight"])
            np.testing.assert_array_equal(loaded[f"{name}.bias"], model.weights[f"{name}.bias"])
            # The same rotation of the same pairs: the interleaved result is the half-split one, reordered.
            there = rotate_interleaved((x @ w.T).reshape(heads, 8), cos, sin)
            here = rotate((x @ loaded[f"{name}.weight"].T).reshape(heads, 8), cos, sin)
            np.testing.assert_allclose(
                here, np.concatenate([there[:, 0::2], there[:, 1::2]], axis=1), rtol=2e-5, atol=1e-5
            )


def test_quantised_tensors_stay_packed_and_are_permuted_as_bytes(llama):
    model, path = llama
    to_gguf(model, path, "Q8_0")
    loaded = load(path)
    q8 = BLOCKS["Q8_0"]
    for name, weight in model.weights.items():
        got = loaded.weights[name]
        if weight.ndim == 1:
            np.testing.assert_array_equal(got, weight)
        else:
            assert isinstance(got, GGUFBlocks)
            assert got.type_name == "Q8_0"
            np.testing.assert_array_equal(got.data, q8.encode(weight))
    dense = load(path, dense=True)
    name = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(dense.weights[name], q8.decode(q8.encode(model.weights[name])))
    assert load(path, dtype="float64").weights[name].dtype == np.float64


def test_gemma_norms_stay_as_the_file_has_them(tmp_path):
    model = random_model("gemma3")
    to_gguf(model, tmp_path / "m.gguf")
    loaded = load(tmp_path / "m.gguf")
    assert (model.config.norm_offset, loaded.config.norm_offset) == (1.0, 0.0)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_norm.weight"):
        np.testing.assert_array_equal(loaded.weights[name], model.weights[name] + 1)
    same = "model.layers.1.self_attn.q_proj.weight"  # rows of Gemma are not permuted
    np.testing.assert_array_equal(loaded.weights[same], model.weights[same])


@pytest.mark.parametrize(
    ("metadata", "drop", "message"),
    [
        ({}, ["general.architecture"], "general.architecture must be one of llama, qwen2, qwen3, gemma3, got None"),
        ({"general.architecture": "rwkv6"}, [], "got 'rwkv6'"),
        ({}, ["llama.rope.freq_base"], "key llama.rope.freq_base is missing"),
        ({}, ["llama.block_count"], "key llama.block_count is missing"),
        ({"llama.block_count": "2"}, [], "key llama.block_count must be int, got '2'"),
        ({"llama.block_count": True}, [], "must be int, got True"),
        ({"llama.attention.head_count": 0}, ["llama.attention.key_length"], "not a multiple of 0 heads"),
        ({"llama.attention.head_count_kv": 3}, [], "must be a multiple of num_kv_heads"),
        ({"llama.attention.head_count_kv": np.int32([2, 2])}, [], "must be int, got array"),
        ({"llama.attention.value_length": 16}, [], "value_length must equal the head size 8"),
        ({"llama.rope.dimension_count": 4}, [], "dimension_count must equal the head size 8"),
        ({"llama.vocab_size": 63}, [], "contradicts the 64 rows"),
        ({"llama.rope.scaling.type": "longrope"}, [], "got 'longrope'"),
        ({"llama.rope.scaling.type": "linear"}, [], "rope.scaling.factor is missing"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
            [],
            "original_context_length is missing",
        ),
        ({"llama.attention.sliding_window_pattern": np.array([True])}, [], "sliding_window_pattern is not understood"),
        ({"llama.feed_forward_length": 65}, [], "ffn_gate|gate_proj.weight has shape"),
        ({"llama.block_count": 3}, [], r"lacks model\.layers\.2"),
        ({"llama.block_count": 1}, [], r"does not call for: .*blk|model\.layers\.1"),
        ({}, ["token_embd.weight"], "token_embd.weight is missing"),
        ({}, ["blk.1.attn_q.bias"], r"lacks model\.layers\.1\.self_attn\.q_proj\.bias"),
    ],
)
def test_a_gguf_file_that_does_not_fit_is_one_line(llama, metadata, drop, message):
    edit(llama[1], metadata, drop=drop)
    with pytest.raises(FormatError, match=rf"m\.gguf: .*({message})") as caught:
        read_model(read_gguf(llama[1]))
    assert "\n" not in str(caught.value)


def test_unknown_and_unusable_gguf_tensors_are_named(llama):
    _, path = llama
    original = path.read_bytes()
    for tensors, message in (
        ({"blk.0.attn_rot_embd": ("F32", np.float32([1]))}, "does not call for: blk.0.attn_rot_embd"),
        ({"output_norm.weight": ("F32", np.full(32, np.nan, np.float32))}, "'output_norm.weight' holds NaN"),
        ({"output_norm.weight": ("Q8_0", np.zeros(34, np.uint8))}, "is quantised but has 1 dimensions"),
        ({"output.weight": ("I8", np.zeros((64, 32), np.int8))}, "has type I8, which is not decoded"),
        ({"output.weight": ("Q8_0", np.full((64, 34), 0x7C, np.uint8))}, "'output.weight' holds NaN or infinity"),
    ):
        path.write_bytes(original)
        edit(path, tensors=tensors)
        with pytest.raises(FormatError, match=message):
            load(path)


def test_tied_by_the_absence_of_the_head(llama):
    assert not load(llama[1]).config.tied_embeddings
    edit(llama[1], drop=["output.weight"])
    assert load(llama[1]).config.tied_embeddings


def test_rope_frequency_divisors(llama):
    divisors = np.float32([1, 1, 4, 8])
    edit(llama[1], tensors={"rope_freqs.weight": ("F32", divisors)})
    assert parse_config(read_gguf(llama[1])).rope.freq_divisors == (1, 1, 4, 8)
    edit(llama[1], {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    with pytest.raises(FormatError, match=r"both rope_freqs\.weight and rope scaling 'linear'"):
        parse_config(read_gguf(llama[1]))


def test_float32_keys_come_back_as_the_decimals_that_were_meant(llama):
    assert read_gguf(llama[1]).metadata["llama.attention.layer_norm_rms_epsilon"] != 1e-5
    assert load(llama[1]).config.norm_eps == 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_of_models(tmp_path, architecture):
    model = random_model(architecture)
    to_hf(model, tmp_path / "some-model")
    assert load(tmp_path / "some-model").name == "some-model"
    assert load(str(tmp_path / "some-model")).config.architecture == architecture
    to_gguf(model, tmp_path / "other.gguf")
    assert load(tmp_path / "other.gguf").name == "other"


def test_what_is_no_model_says_what_to_give(tmp_path, monkeypatch):
    wanted = r"no such file or folder 'nope': give tiny or tiny-outliers or smollm2, a folder .* or a \.gguf file"
    with pytest.raises(FileNotFoundError, match=wanted):
        load("nope")
    monkeypatch.setenv("REFLLM_CACHE", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="refllm fetch smollm2"):
        load("smollm2")
    (tmp_path / "x.safetensors").write_bytes(b"12345678")
    with pytest.raises(FormatError, match=r"begins with b'1234'\).*; give the folder it is in"):
        load(tmp_path / "x.safetensors")
    (tmp_path / "x.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FormatError, match="is a pickle"):
        load(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="dtype must be float32 or float64, got 'float16'"):
        load("tiny", dtype="float16")
    with pytest.raises(FormatError, match=r"no config\.json"):
        load(tmp_path)


def test_an_existing_path_goes_before_a_built_in_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny").samefile(tmp_path / "tiny")


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(tmp_path):
    model = replace(random_model(), tokenizer=tokenizer_from_gguf(byte_level_metadata()))
    to_hf(model, tmp_path / "m")
    with pytest.raises(FormatError, match=r"the tokenizer has \d+ ids, the embedding 64 rows"):
        load(tmp_path / "m")


def test_densify_keeps_everything_else(llama):
    model, path = llama
    to_gguf(model, path, "Q4_0")
    packed = load(path)
    dense = densify(packed, "float64")
    assert {weight.dtype for weight in dense.weights.values()} == {np.dtype(np.float64)}
    assert replace(dense, weights={}) == replace(packed, weights={})


def test_a_folder_of_transformers_4_and_5_keys_agree(tmp_path):
    to_hf(random_model("llama"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    old = json.loads(path.read_text())
    first = load(tmp_path / "m").config
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    path.write_text(json.dumps(new | {"rope_parameters": {"rope_type": "default", "rope_theta": old["rope_theta"]}}))
    assert load(tmp_path / "m").config == first
