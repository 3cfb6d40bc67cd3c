"""A Hugging Face folder is opened without reading weights; quantised checkpoints are not taken for plain ones."""

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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'"),
        ("config.json", {"quantization_config": 3}, "3"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "'bits': 4"),
        ("quantization_config.json", {"quant_method": "gptq"}, "'gptq'"),
    ],
)
def test_quantised_checkpoints_are_named(folder, name, content, message):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=f"{name}: quantised checkpoint.*{message}"):
        open_hf(folder)
