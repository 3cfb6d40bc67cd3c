"""A Hugging Face folder is opened without reading weights; how it is quantised is found wherever it is written."""

import json

import numpy as np
import pytest

from refllm.formats.errors import FormatError
from refllm.formats.hf import open_hf
from refllm.formats.tensors import write_safetensors


@pytest.fixture
def folder(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"w": np.float32([1])})
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    return tmp_path


def test_config_generation_and_tensors(folder):
    opened = open_hf(folder)
    assert (opened.config, opened.generation, list(opened.tensors)) == ({"hidden_size": 4}, {}, ["w"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_hf(folder).generation == {"eos_token_id": [1, 2]}


def test_a_folder_without_config_is_no_model(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"no config\.json"):
        open_hf(folder)


GPTQ = {"bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("files", "found", "place"),
    [
        ({"config.json": {"quantization_config": {"quant_method": "awq"}}}, {"quant_method": "awq"}, "config.json"),
        ({"config.json": {"quantization_config": 3}}, 3, "config.json"),
        ({"quantize_config.json": GPTQ}, GPTQ | {"quant_method": "gptq"}, "quantize_config.json"),
        ({"quantization_config.json": {"quant_method": "fp8"}}, {"quant_method": "fp8"}, "quantization_config.json"),
        (
            {"config.json": {"quantization_config": GPTQ}, "quantize_config.json": GPTQ | {"damp": 1}},
            GPTQ,
            "config.json",
        ),
    ],
)
def test_where_a_quantisation_is_described(folder, files, found, place):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    opened = open_hf(folder)
    assert (opened.quantization, opened.quantization_path) == (found, folder / place)


def test_a_plain_folder_has_no_quantisation(folder):
    assert open_hf(folder).quantization is None


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_two_descriptions_that_contradict_each_other(folder, key):
    (folder / "config.json").write_text(json.dumps({"quantization_config": GPTQ}))
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ | {key: 8}))
    with pytest.raises(FormatError, match=rf"quantize_config\.json: {key} differs"):
        open_hf(folder)


def test_the_key_of_old_compressed_tensors(folder):
    (folder / "config.json").write_text('{"compression_config": {}}')
    with pytest.raises(FormatError, match="compression_config"):
        open_hf(folder)
