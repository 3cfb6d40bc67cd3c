"""The bundled model: what its log claims, a sample measured again, and planted outliers that change nothing."""

import hashlib
import json
import re

import numpy as np
import pytest

from refllm.formats.files import data_path
from refllm.model.llama import forward
from refllm.model.load import load
from refllm.model.planter import plant_outliers
from refllm.model.probe import head_scores, measure
from refllm.model.tiny import held_out, token_index
from refllm.model.world import World

BINS = ["0-25", "25-50", "50-100", "100-200", "200-300", "300-400"]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def index(tiny):
    return token_index(tiny.tokenizer.backend, World())


@pytest.fixture(scope="module")
def report():
    lines = data_path("tiny/training_log.jsonl").read_text("utf-8").splitlines()
    return json.loads(lines[-1])


def test_the_log_ends_with_a_full_report_that_reaches_what_was_asked(report):
    assert report["ratio"] <= 1.10
    for group in ("objects", "people"):
        assert min(report["recall"][group][at][1] for at in BINS) >= 300
    objects = [report["recall"]["objects"][at][0] for at in BINS]
    assert min(objects[:4]) >= 0.97 and min(objects[4:]) >= 0.95
    assert min(report["recall"]["people"][at][0] for at in BINS[:3]) >= 0.85
    assert report["songs"][0] >= 0.80
    assert max(max(row) for row in report["heads"]["previous"]) >= 0.3
    assert max(max(row) for row in report["heads"]["induction"]) >= 0.2


def test_a_sample_measured_again_agrees_with_the_log(tiny, index, report):
    found = measure(lambda ids: forward(tiny, ids), held_out(World(), 12), index, tiny.config.bos_token_id)
    assert found["ratio"] == pytest.approx(report["ratio"], abs=0.03)
    right = sum(share * n for share, n in found["recall"]["objects"].values())
    assert right / sum(n for _, n in found["recall"]["objects"].values()) >= 0.95
    ids = np.array(sorted(index.values()))
    heads = head_scores(tiny, ids, tiny.config.bos_token_id, rows=4)
    for name in ("previous", "induction"):
        assert np.argmax(heads[name]) // 4 == np.argmax(report["heads"][name]) // 4  # the same layer


def test_planted_outliers_leave_the_float64_logits(tiny, index):
    model = load("tiny", dtype="float64")
    ids = model.tokenizer.encode(held_out(World(), 1)[0].text, add_bos=True)[:200]
    plain, planted = forward(model, ids), forward(plant_outliers(model), ids)
    assert np.abs(planted - plain).max() <= 1e-9
    gains = plant_outliers(model).weights["model.layers.0.input_layernorm.weight"]
    assert gains.max() > 8 * np.median(gains)


def test_source_names_the_bytes():
    text = data_path("tiny/SOURCE.md").read_text("utf-8")
    hashes = re.findall(r"([0-9a-f]{64})  (\S+)", text)
    assert sorted(name for _, name in hashes) == ["calib.txt", "eval.txt", "model.safetensors", "tokenizer.json"]
    for sha256, name in hashes:
        data = data_path(f"tiny/{name}").read_bytes()
        if not name.endswith(".safetensors"):
            data = data.replace(b"\r\n", b"\n")  # a checkout on Windows
        assert hashlib.sha256(data).hexdigest() == sha256


def test_it_fits_in_git():
    assert data_path("tiny/model.safetensors").stat().st_size <= 8 << 20
