"""Decode and prefill: all programs read the same tokens, are compared before they are timed, and closed afterwards."""

from dataclasses import replace

import numpy as np
import pytest

from refllm.evaluate.bench import generation
from refllm.evaluate.bench.generation import (
    PROMPT,
    RefllmModel,
    agreements,
    measure_decode,
    measure_prefill,
    text_ids,
    weight_bytes_per_token,
)
from refllm.formats.files import data_path
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.bytemodel import byte_model
from tests.models import random_model

SMALL = {"rounds": 2, "read_bytes": 1 << 16}


class FakePeer:
    """The same model by way of float32 activations; keeps what it was told."""

    name = "peer"

    def __init__(self, model, sign: int = 1):
        self.model, self.sign, self.calls, self.closed = model, sign, [], False

    def open_model(self, path, context):
        self.context = context
        inner, outer = RefllmModel(self.model, "float32"), self

        class Open:
            program, detail = outer.name, ""

            def start(self, ids):
                outer.calls.append(("start", len(ids)))
                inner.start(ids)

            def step(self, token):
                outer.calls.append(("step", token))
                inner.step(token)

            def logits(self):
                return outer.sign * inner.logits()

            def close(self):
                outer.closed = True

        return Open()


@pytest.fixture(scope="module")
def model():
    return byte_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "bytes"
    save_native(model, folder)
    return folder


def test_decode(model, folder):
    peer = FakePeer(model)
    found = measure_decode(folder, tokens=12, peers=[peer], **SMALL)
    mine, theirs = found["rows"]
    assert (mine["program"], mine["detail"], theirs["program"]) == ("refllm", "int8", "peer")
    assert mine["ratios"] == {"peer": pytest.approx(mine["tokens_per_s"] / theirs["tokens_per_s"])}
    assert theirs["ratios"] == {} and mine["same_top1"] == theirs["same_top1"] == 1  # nothing is packed here
    assert mine["file"] == "bytes" and mine["tokens"] == 12 and 0 < mine["lower"] <= mine["tokens_per_s"]
    assert mine["gbytes_per_s"] == pytest.approx(mine["tokens_per_s"] * mine["weight_bytes"] / 1e9)
    assert peer.closed and peer.context == PROMPT + 12
    calls = [what for what, _ in peer.calls]
    compared, turn = ["start", *["step"] * (PROMPT + 12 - 1)], ["start", *["step"] * 12]
    assert calls == [*compared, *3 * turn]  # a warm-up and two rounds


def test_caches_of_fewer_bits_behind_a_longer_context(folder):
    found = measure_decode(folder, tokens=12, context=60, caches=["none", "qserve:bits=8"], **SMALL)
    plain, coded = found["rows"]
    assert (plain["detail"], coded["detail"]) == ("int8", "int8 qserve:bits=8") and coded["context"] == 60
    assert plain["ratios"] == {"first cache": 1}
    assert coded["ratios"] == {"first cache": pytest.approx(coded["tokens_per_s"] / plain["tokens_per_s"])}


def test_prefill(model, folder):
    peer = FakePeer(model)
    row = measure_prefill(folder, tokens=40, peers=[peer], **SMALL)["rows"][0]
    assert [n for what, n in peer.calls if what == "start"] == [1, 40, 40, 40]
    assert row["gbytes_per_s"] == pytest.approx(row["tokens_per_s"] * row["weight_bytes"] / 40 / 1e9)


def test_programs_that_disagree_are_not_timed_but_closed(model, folder):
    peer = FakePeer(model, sign=-1)
    with pytest.raises(ValueError, match="peer and refllm int8 predict the same token at 0%"):
        measure_decode(folder, tokens=12, peers=[peer], **SMALL)
    assert peer.closed


def test_a_context_that_is_too_short(folder):
    with pytest.raises(ValueError, match="bytes has a context of 128 tokens, 208 are needed"):
        measure_decode(folder, tokens=200, **SMALL)


def test_refllm_steps_are_the_forward_pass(model):
    program, ids = RefllmModel(model, "float32"), text_ids(model, 10)
    program.start(ids[:4])
    for token in ids[4:]:
        program.step(int(token))
    np.testing.assert_allclose(program.logits(), forward(model, ids)[-1], rtol=1e-4, atol=1e-4)
    assert agreements([program], ids) == {"refllm float32": 1.0}


def test_text_is_text_and_made_up_where_there_is_none(model):
    text = data_path("tiny/eval.txt").read_text("utf-8")
    assert text.startswith(model.tokenizer.decode(text_ids(model, 60)[1:].tolist()))
    made_up = text_ids(replace(model, tokenizer=None), 60)
    assert len(made_up) == 60 and made_up.max() < 259 and len(set(made_up.tolist())) > 20


def test_weight_bytes_of_tied_and_untied_models():
    tied = random_model("llama", tied_embeddings=True)
    total = sum(weight.nbytes for weight in tied.weights.values())
    assert weight_bytes_per_token(tied) == total
    untied = random_model("llama", tied_embeddings=False)
    embedding = untied.weights["model.embed_tokens.weight"]
    total = sum(weight.nbytes for weight in untied.weights.values())
    assert weight_bytes_per_token(untied) == total - embedding.nbytes + embedding[0].nbytes


def test_default_files(tmp_path, monkeypatch):
    from refllm.evaluate.bench import files

    monkeypatch.setenv("REFLLM_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="refllm fetch smollm2 && refllm bench files"):
        files.default_files()
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.gguf").write_bytes(b"GGUF")
    assert files.default_files() == [tmp_path / "bench" / "a.gguf"]
    assert generation.ACTIVATIONS == ("int8",)
