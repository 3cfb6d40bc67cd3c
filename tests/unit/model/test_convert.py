"""Hugging Face folder -> GGUF -> folder: bit for bit, ids equal; and what `describe` says of both."""

from dataclasses import replace

import numpy as np
import pytest

from refllm.formats.blocks import BLOCKS
from refllm.formats.dtypes import BF16
from refllm.formats.gguf import read_gguf
from refllm.formats.gguf_vocab import tokenizer_from_gguf
from refllm.formats.tensors import read_safetensors
from refllm.kernels.rope import Rope
from refllm.model.convert import convert
from refllm.model.describe import describe
from refllm.model.llama import forward
from refllm.model.load import load
from refllm.model.native import save_native
from refllm.model.to_gguf import to_gguf
from refllm.model.to_hf import hf_config, to_hf
from tests.models import ARCHITECTURES, random_config, random_model
from tests.unit.formats.test_tokenizer import TEXTS, byte_level_metadata, pieces_metadata

IDS = np.arange(40) * 7 % 64  # more than 20 positions: a wrong rotary order shows late


def same(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back_bit_for_bit(tmp_path, architecture):
    model = random_model(architecture)
    if architecture == "gemma3":  # w + 1 - 1 is exact for w of at most 24 bits above the unit
        for name, weight in model.weights.items():
            if name.endswith("norm.weight"):
                weight[:] = np.round(weight * 256) / 256
    to_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    first, middle, back = load(tmp_path / "hf"), load(tmp_path / "m.gguf"), load(tmp_path / "back")
    assert same(model.weights, first.weights)
    assert same(first.weights, back.weights)
    assert first.config == back.config == model.config
    logits = forward(model, IDS)
    for other in (first, middle, back):
        np.testing.assert_array_equal(forward(other, IDS) if other is not middle else logits, logits)
    np.testing.assert_allclose(forward(middle, IDS), logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("metadata", [byte_level_metadata(), pieces_metadata({"▁": -3, "h": -2, "▁h": -1})])
def test_token_ids_stay_equal(tmp_path, metadata):
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.chat_template": "<|im_start|>"})
    model = replace(random_model(vocab_size=300), tokenizer=tokenizer)
    to_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    for place in ("hf", "m.gguf", "back"):
        again = load(tmp_path / place).tokenizer
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert (again.bos_token_id, again.eos_token_ids) == (tokenizer.bos_token_id, tokenizer.eos_token_ids)
        assert again.chat_format.name == "chatml"


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4"])
def test_gguf_types_hold_the_encoded_matrix_and_float32_norms(tmp_path, type_name):
    model = random_model(intermediate_size=64)
    to_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf", type_name)
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    assert {t.type_name for t in tensors.values() if len(t.shape) == 2} == {type_name}
    assert {t.type_name for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    loaded = load(tmp_path / "m.gguf", dense=True).weights
    for name, weight in model.weights.items():
        if weight.ndim == 1:
            expected = weight
        elif type_name in BLOCKS:
            expected = BLOCKS[type_name].decode(BLOCKS[type_name].encode(weight))
        else:
            expected = weight.astype(np.float16) if type_name == "F16" else BF16.decode(BF16.encode(weight))
        np.testing.assert_array_equal(loaded[name], expected)


def test_a_quantised_file_becomes_the_folder_of_its_values(tmp_path):
    to_hf(random_model(intermediate_size=64), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf", "Q4_1")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    assert same(load(tmp_path / "m.gguf", dense=True).weights, load(tmp_path / "back").weights)


@pytest.mark.parametrize(("type_name", "dtype"), [("BF16", "BF16"), ("F16", "F16")])
def test_folders_of_half_precision(tmp_path, type_name, dtype):
    to_hf(random_model(), tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "half", type_name)
    tensors, metadata = read_safetensors(tmp_path / "half" / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert {t.dtype for t in tensors.values() if len(t.shape) == 2} == {dtype}
    assert {t.dtype for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    assert report["type"] == type_name
    convert(tmp_path / "half", tmp_path / "m.gguf", type_name)  # once rounded, nothing is lost any more
    assert same(load(tmp_path / "half").weights, load(tmp_path / "m.gguf").weights)


def test_rows_no_block_divides_are_kept_in_f16_and_reported(tmp_path):
    to_hf(random_model(intermediate_size=48), tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "m.gguf", "Q8_0")
    assert report["other_types"] == {f"model.layers.{i}.mlp.down_proj.weight": "F16" for i in range(2)}
    assert read_gguf(tmp_path / "m.gguf").tensors["blk.0.ffn_down.weight"].type_name == "F16"
    assert report["bytes"] == (tmp_path / "m.gguf").stat().st_size


def test_rows_no_super_block_divides_get_the_type_llama_quantize_chooses(tmp_path):
    to_hf(random_model(intermediate_size=256), tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "m.gguf", "Q4_K")
    types = {name: t.type_name for name, t in read_gguf(tmp_path / "m.gguf").tensors.items() if len(t.shape) == 2}
    assert types["blk.0.ffn_down.weight"] == "Q4_K" and types["blk.0.ffn_up.weight"] == "Q5_0"
    assert set(report["other_types"].values()) == {"Q5_0"} and len(report["other_types"]) == len(types) - 2
    assert load(tmp_path / "m.gguf", dense=True).weights["model.layers.0.mlp.down_proj.weight"].shape[1] == 256


def test_the_same_model_gives_the_same_bytes(tmp_path):
    to_hf(random_model(), tmp_path / "hf")
    for name in ("1.gguf", "2.gguf"):
        convert(tmp_path / "hf", tmp_path / name)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_refusals(tmp_path):
    model = random_model()
    to_hf(model, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"type must be one of F32, F16, BF16, Q4_0, .* got 'Q8_K'"):
        convert(tmp_path / "hf", tmp_path / "m.gguf", "Q8_K")
    with pytest.raises(ValueError, match=r"type must be one of F32, BF16, F16, NF4, .* for out, got 'Q8_0'"):
        convert(tmp_path / "hf", tmp_path / "out", "Q8_0")
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="give another name or --overwrite"):
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"
    with pytest.raises(FileExistsError, match="already holds a model"):
        convert(tmp_path / "hf", tmp_path / "hf")
    model.weights["lm_head.weight"][0, 0] = 1e6
    to_hf(model, tmp_path / "hf", overwrite=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight: a value is beyond the range of F16"):
        convert(tmp_path / "hf", tmp_path / "n.gguf", "F16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "m.gguf"]


ROPES = [
    Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
    Rope(1e4, "linear", 4.0),
    Rope(1e6, "yarn", 4.0, original_context=64, beta_fast=16.0),
]


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_goes_there_and_back(tmp_path, rope):
    to_hf(random_model(rope=rope, head_dim=64), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    assert load(tmp_path / "hf").config.rope == rope
    assert load(tmp_path / "back").config.rope == rope
    if rope.scaling == "llama3":
        divisors = load(tmp_path / "m.gguf").config.rope.freq_divisors
        assert (divisors[0], divisors[-1]) == (1.0, rope.factor)


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("llama", dict(attention_bias=True), "cannot say which of these projections have a bias"),
        ("qwen2", dict(attention_bias=False), "cannot say which"),
        ("mistral", dict(sliding_layers=(True, False)), "only some layers slide"),
        ("llama", dict(rope=Rope(1e4, freq_divisors=(1.0, 2.0, 3.0, 4.0))), "rope frequency divisors"),
    ],
)
def test_what_config_json_cannot_say_is_refused(architecture, overrides, message):
    with pytest.raises(ValueError, match=message):
        hf_config(random_config(architecture, **overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(rope=Rope(1e4, "yarn", 4.0, original_context=64, attention_factor=1.5)), "attention_factor"),
        (dict(rope_local=Rope(1e4, "linear", 2.0), sliding_window=3, sliding_layers=(True, False)), "sliding layers"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        to_gguf(random_model(**overrides), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_describe_a_folder_and_a_file(tmp_path):
    model = replace(
        random_model(intermediate_size=64, vocab_size=300), tokenizer=tokenizer_from_gguf(byte_level_metadata())
    )
    to_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf", "Q8_0")
    folder, file = describe(tmp_path / "hf"), describe(tmp_path / "m.gguf")
    count = sum(weight.size for weight in model.weights.values())
    assert folder["parameters"] == file["parameters"] == count
    assert folder["bytes"] == 4 * count
    assert (folder["format"], file["format"]) == ("Hugging Face", "GGUF v3")
    assert (folder["architecture"], file["architecture"]) == ("LlamaForCausalLM", "llama")
    assert folder["types"] == {"F32": len(model.weights)}
    assert set(file["types"]) == {"F32", "Q8_0"}
    assert "interleaved" in file["conventions"]["rope layout"]
    assert "half-split" in folder["conventions"]["rope layout"]
    packing = {name: text for name, text in file["conventions"].items() if "packing" in name}
    assert packing == {"packing of Q8_0": "32 numbers along in are 34 bytes: d scale; q signed codes"}
    assert not any("packing" in name for name in folder["conventions"])
    assert file["conventions"]["head"] == folder["conventions"]["head"] == "separate"
    assert file["config"]["num_kv_heads"] == folder["config"]["num_kv_heads"] == 2
    assert file["metadata"]["tokenizer.ggml.tokens"].startswith("300 values")
    down = next(tensor for tensor in file["tensors"] if tensor["name"] == "blk.1.ffn_down.weight")
    assert down == {"name": "blk.1.ffn_down.weight", "shape": [32, 64], "dtype": "Q8_0", "bytes": 32 * 68}
    assert describe(tmp_path / "hf" / "model.safetensors")["format"] == "safetensors"


def test_describe_a_compressed_folder(tmp_path):
    model = replace(random_model(hidden_size=32, intermediate_size=64), name="small", recipe="some:bits=8")
    to_gguf(model, tmp_path / "m.gguf", "Q8_0")
    packed = load(tmp_path / "m.gguf")
    save_native(replace(packed, recipe="some:bits=8"), tmp_path / "native")
    report = describe(tmp_path / "native")
    assert (report["format"], report["architecture"]) == ("refllm", "llama")
    assert report["conventions"]["recipe"] == "some:bits=8"
    assert report["bytes"] == sum(weight.nbytes for weight in packed.weights.values())
    again = load(tmp_path / "native")
    assert (again.name, again.config) == ("m", packed.config)
    np.testing.assert_array_equal(forward(again, IDS), forward(packed, IDS))


def test_describe_says_why_a_model_cannot_be_run(tmp_path):
    to_hf(random_model(), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    text = path.read_text()
    path.write_text(text.replace("LlamaForCausalLM", "FalconForCausalLM"))
    report = describe(tmp_path / "hf")
    assert report["config"] is None
    assert "FalconForCausalLM" in report["reason"]
    path.write_text(text[:-1] + ', "quantization_config": {"quant_method": "gptq", "bits": 4}}')
    report = describe(tmp_path / "hf")
    assert report["format"] == "Hugging Face, gptq"
    assert "quantization_config (gptq): group_size missing" in report["reason"]


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_folders(tmp_path, architecture):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = random_model(architecture, rope=Rope(1e6)) if architecture == "gemma3" else random_model(architecture)
    to_hf(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS[None])).logits[0].numpy()
    np.testing.assert_allclose(forward(model, IDS), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
