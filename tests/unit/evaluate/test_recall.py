"""recall: questions whose answers stand in the text, answers counted by hand, and methods that keep or lose them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from refllm.evaluate.compare import compare, setting
from refllm.evaluate.perplexity import Window, window_logits
from refllm.evaluate.recall import answers, prompts, questions, recall, share_found
from refllm.evaluate.tables import compare_table
from refllm.methods.apply import compress, load
from refllm.model.llama import forward
from tests.models import random_model

TINY = load("tiny")


@pytest.mark.parametrize("task", ["facts", "passkey"])
def test_the_answer_stands_in_the_prompt_and_nothing_else_does(task):
    asked = questions(task, 16)
    assert [q.prompt for q in asked] == [q.prompt for q in questions(task, 20)[:16]]
    for q in asked:
        assert q.prompt.endswith("?")
        value = q.answer.split()[-1].removesuffix(".")
        assert value in q.prompt
        ids = TINY.tokenizer.encode(" ".join((q.prompt, q.answer)))
        assert len(ids) - len(TINY.tokenizer.encode(q.prompt)) == q.new_tokens and len(ids) <= 512
        if task == "passkey":
            assert q.prompt.count(q.answer) == 1
    if task == "passkey":  # eight depths, from the first to nearly the last sentence
        places = [q.prompt.index(q.answer) / len(q.prompt) for q in asked[:8]]
        assert places == sorted(places) and places[0] == 0 and places[-1] > 0.8


def test_answers_are_those_of_plain_greedy_decoding():
    given = prompts(TINY, questions("facts", 2))
    found = answers(TINY, given)
    for (ids, count), written in zip(given, found["written"], strict=True):
        text = list(ids)
        for _ in range(count):
            text.append(int(forward(TINY, text)[-1].argmax()))
        assert written == text[len(ids) :]
    assert found["stored_bytes_per_token"] == found["device_bytes_per_token"] == 2048
    assert found["recalled_bytes_per_step"] == 0


def test_an_answer_has_room_in_the_tokens_of_the_model():
    """Of a tokenizer that takes a token a character."""

    class Characters:
        encode = staticmethod(lambda text: [ord(letter) for letter in text])

    asked = questions("passkey", 1)
    ((ids, count),) = prompts(replace(TINY, tokenizer=Characters), asked)
    assert count == len(asked[0].answer) + 1 and len(ids) == TINY.config.context_length - count
    assert prompts(TINY, asked)[0][1] == asked[0].new_tokens


def test_a_file_of_prompts_and_answers(tmp_path):
    path = tmp_path / "keys.jsonl"
    rows = [{"prompt": "The lamp is at Oldgate. Where is the lamp?", "answer": "oldgate"}] * 3
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert recall(TINY, str(path), 2)["items"] == 2 and recall(TINY, str(path))["recall"] == 1.0
    path.write_text(json.dumps({"context": "a", "continuation": "b"}), encoding="utf-8")
    with pytest.raises(ValueError, match="needs items with prompt and answer, these are of kind 'word'"):
        questions(str(path))


def test_share_found_ignores_case():
    class Words:
        def decode(self, ids):
            return " The Lamp is at oldgate."

    asked = questions("passkey", 2)
    assert share_found(Words(), [asked[0].__class__("", "The lamp is at Oldgate.", 1), asked[1]], [[1], [2]]) == 0.5


# About a third of the 2048 bytes that a token costs in full; of retrieval methods beside the attention.
KEEPERS = ("razor:induction=0.25,recent=16,divisor=12", "freekv:sinks=4,recent=8,page=8,budget=64,skip_layers=0",
           "pqcache:ratio=0.25,sinks=4,bits=5")  # fmt: skip
LOSERS = ("h2o:heavy=0.16,recent=0.16", "streaming:sinks=4,recent=140")


@pytest.mark.parametrize("recipe", KEEPERS)
def test_a_third_of_the_cache_keeps_what_was_said(recipe):
    found = recall(compress(TINY, recipe), "passkey", 8)
    assert found["recall"] == 1.0 and found["device_bytes_per_token"] <= 2048 / 3
    assert (found["recalled_bytes_per_step"] > 0) == (not recipe.startswith("razor"))


@pytest.mark.parametrize("recipe", LOSERS)
def test_an_evictor_with_as_much_loses_it(recipe):
    assert recall(compress(TINY, recipe), "passkey", 8)["recall"] <= 0.5


def test_half_a_window_is_the_prompt_of_a_cache_that_compresses_one():
    model = random_model()
    ids = np.random.default_rng(0).integers(3, 64, 41)
    window = Window(ids[:-1], ids[1:])
    plain = window_logits(model, window)
    small = window_logits(compress(model, "snapkv:capacity=5,voters=2"), window)
    assert small.shape == plain.shape
    np.testing.assert_allclose(small[:20], plain[:20], atol=1e-4)
    assert np.abs(small[20:] - plain[20:]).max() > 1e-2
    whole = window_logits(compress(model, "snapkv:capacity=64"), window)
    np.testing.assert_allclose(whole, plain, atol=1e-4)


def test_compare_asks_and_counts(monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    ids = TINY.tokenizer.encode(questions("facts", 1)[0].prompt)
    chosen = setting(TINY, ids, max_tokens=64, window=32, repeats=1, threads=1, tasks=("facts",), items=2)
    result = compare(TINY, ["none", "razor:heads=1.0/1.1,recent=16,divisor=12"], chosen)
    base, razor = result["rows"]
    assert base["recall"] == razor["recall"] == {"facts": 1.0}
    assert base["cache_bytes"]["stored_bytes_per_token"] == 2048 > 2.5 * razor["cache_bytes"]["stored_bytes_per_token"]
    text = compare_table(result)
    assert "facts\n" not in text and "recall" in text and "100.0%" in text and "on device" in text
    with pytest.raises(ValueError, match="need a model with a tokenizer"):
        compare(random_model(), ["none"], chosen)
