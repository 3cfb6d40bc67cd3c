"""Tasks: the three ways to choose differ where they should, and log-likelihoods are those of the definition."""

import json
from dataclasses import replace

import numpy as np
import pytest

from refllm.evaluate import tasks
from refllm.evaluate.tasks import Item, log_likelihood, read_task, score
from refllm.model.llama import forward
from tests.bytemodel import byte_model

MODEL = byte_model()
ROWS = {
    "choice": [
        {"query": "Question: which? \n", "choices": ["one", "two"], "gold": 1},
        {"ctx": "a man", "endings": ["runs.", "sits.", "eats."], "label": 2},
        {"question": "Which?", "choices": ["x", "y", "z", "w"], "answer": 3, "subject": "s"},
        {"context_options": ["so Ann", "so Tom"], "continuation": "won.", "gold": 0},
    ],
    "word": [{"context": "this is a", "continuation": "sign"}],
    "contains": [{"prompt": "the key is 12. The key is", "answer": "12", "depth": 0.1}],
    "number": [{"question": "1 + 1?", "answer": "it is\n#### 1,002"}],
}


def write(tmp_path, rows):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ROWS)
def test_every_form_is_recognised(tmp_path, kind):
    found, items = read_task(write(tmp_path, ROWS[kind]))
    assert found == kind and len(items) == len(ROWS[kind])


def test_prompts_are_those_of_the_harness(tmp_path):
    items = read_task(write(tmp_path, ROWS["choice"]))[1]
    assert items[0].pairs[1] == ("Question: which?\nAnswer:", " two")
    assert items[1].pairs[2] == ("a man", " eats.")
    assert items[2].pairs[3] == ("Which?\nA. x\nB. y\nC. z\nD. w\nAnswer:", " D")
    assert items[3].pairs == (("so Ann", " won."), ("so Tom", " won."))
    assert read_task(write(tmp_path, ROWS["number"]))[1][0].gold == "1002"


def test_limit_reads_no_further(tmp_path):
    assert len(read_task(write(tmp_path, [*ROWS["choice"], {"bad": 1}]), limit=2)[1]) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"something": 1}], "line 1: not an item of a known task"),
        ([ROWS["word"][0], ROWS["contains"][0]], "line 2: 'contains' after items of kind 'word'"),
        ([{"query": "q", "choices": ["a"], "gold": 1}], "line 1: not an item"),
        ([["list"]], "line 1"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_task(write(tmp_path, rows))


def twin(context, continuation):
    """Token by token, each from its own forward pass."""
    ids, total = MODEL.tokenizer.encode(context), 0.0
    greedy = True
    for token in MODEL.tokenizer.encode(continuation, add_bos=False):
        logits = forward(MODEL, ids)[-1].astype(np.float64)
        total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        greedy &= int(logits.argmax()) == token
        ids = [*ids, token]
    return total, greedy


def test_log_likelihood_is_the_chain_rule():
    for context, continuation in (("a man", " eats."), ("x", "y"), ("", "begin")):
        total, greedy = log_likelihood(MODEL, context, continuation)
        expected, expected_greedy = twin(context, continuation)
        assert total == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy
    parts = log_likelihood(MODEL, "ab", "cd")[0] + log_likelihood(MODEL, "abcd", "ef")[0]
    assert log_likelihood(MODEL, "ab", "cdef")[0] == pytest.approx(parts, abs=1e-4)


def test_spaces_at_the_end_of_the_context_move_over():
    assert log_likelihood(MODEL, "a man ", "eats") == log_likelihood(MODEL, "a man", " eats")


def test_text_beyond_the_window_loses_its_left_end():
    text = "x" * 300
    total, _ = log_likelihood(MODEL, text, " y")
    fed = MODEL.tokenizer.encode(text + " y")[:-1][-128:]
    logits = forward(MODEL, fed)[-2:].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = MODEL.tokenizer.encode(" y", add_bos=False)
    assert total == pytest.approx(log_p[0, ids[0]] + log_p[1, ids[1]], abs=1e-4)


def test_without_bos_an_empty_context_takes_the_first_special_token():
    plain = byte_model(add_bos=False)
    assert log_likelihood(plain, "", "hi")[0] == pytest.approx(log_likelihood(MODEL, "", "hi")[0], abs=1e-5)


def test_acc_and_acc_norm_differ(monkeypatch):
    # Sums -10 and -12 over 2 and 4 characters (one of them outside ASCII): -5 and -3 a character.
    sums = {" ab": -10.0, " abcé": -12.0}
    monkeypatch.setattr(tasks, "log_likelihood", lambda model, context, continuation: (sums[continuation], False))
    item = Item((("c", " ab"), ("c", " abcé")), 1, (2, 4))
    assert score(MODEL, "choice", [item]) == {"items": 1, "acc": 0.0, "acc_norm": 1.0}
    assert score(MODEL, "choice", [item, replace(item, gold=0)]) == {"items": 2, "acc": 0.5, "acc_norm": 0.5}


def test_word_gives_accuracy_and_perplexity(monkeypatch):
    answers = iter([(-1.0, True), (-3.0, False)])
    monkeypatch.setattr(tasks, "log_likelihood", lambda *pair: next(answers))
    result = score(MODEL, "word", [Item((("c", " w"),), 0)] * 2)
    assert result == {"items": 2, "acc": 0.5, "perplexity": pytest.approx(np.exp(2.0))}


@pytest.mark.parametrize(
    ("kind", "gold", "text", "right"),
    [
        ("contains", "84606", "is 84606. So", 1.0),
        ("contains", "84606", "is 8460", 0.0),
        ("number", "1002", "so 3 + 999 = 1,002 dollars.\nQuestion: 7", 1.0),
        ("number", "1002", "1002, no, 5", 0.0),
        ("number", "1002", "none", 0.0),
    ],
)
def test_generated_answers(monkeypatch, kind, gold, text, right):
    monkeypatch.setattr(tasks, "_continued", lambda model, item: text)
    assert score(MODEL, kind, [Item((("p", ""),), gold, new_tokens=4)])["acc"] == right


def test_generation_leaves_room_for_the_answer():
    item = Item((("x" * 400, ""),), "none", new_tokens=16)
    assert score(MODEL, "contains", [item])["acc"] == 0.0
    with pytest.raises(ValueError, match="no room for 128"):
        score(MODEL, "contains", [replace(item, new_tokens=128)])
