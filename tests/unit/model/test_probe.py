"""The measurements: a perfect predictor scores 1 everywhere, a known error shows up where it was made."""

import numpy as np
import pytest

from refllm.kernels.attention import attend
from refllm.kernels.nn import softmax
from refllm.model.llama import forward
from refllm.model.probe import attention_weights, encode_stories, filled_stories, full_report, head_scores, measure
from refllm.model.world import World
from tests.models import random_model

WORLD = World()
INDEX = {token: i + 2 for i, token in enumerate(WORLD.vocabulary)}
V = len(INDEX) + 2
STORIES = [WORLD.story(seed, 200) for seed in range(6)]


def oracle(stories, *, wrong=lambda story, at: False, confidence=5.0):
    """logits_of that knows the stories: the true next token gets `confidence`, all others 0, but where `wrong` says."""
    rows = {}
    for story in stories:
        ids, targets = encode_stories([story], INDEX, 0)
        rows[tuple(ids[0])] = (story, targets[0])

    def logits_of(ids):
        logits = np.zeros((*ids.shape, V))
        for b, row in enumerate(ids):
            story, targets = next(v for k, v in rows.items() if tuple(row[: len(k)]) == k)
            for at, target in enumerate(targets):
                logits[b, at, 1 if wrong(story, at) else target] = confidence
        return logits

    return logits_of


def test_encoding_shifts_by_one_and_pads():
    ids, targets = encode_stories(STORIES[:2], INDEX, 0)
    for row, story in enumerate(STORIES[:2]):
        n = len(story.tokens)
        assert targets[row, :n].tolist() == [INDEX[token] for token in story.tokens]
        assert ids[row, 0] == 0 and ids[row, 1:n].tolist() == targets[row, : n - 1].tolist()
        assert (targets[row, n:] == -1).all()


def test_a_perfect_predictor():
    found = measure(oracle(STORIES), STORIES, INDEX, 0, rows=4)
    tokens = sum(len(story.tokens) for story in STORIES)
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(np.log(1 + (V - 1) * np.exp(-5.0)), abs=1e-5)
    assert found["floor"] == pytest.approx(-sum(s.log_probability for s in STORIES) / tokens, abs=1e-5)
    assert found["ratio"] == pytest.approx(np.exp(found["loss"] - found["floor"]), rel=1e-4)
    assert found["songs"][0] == found["sums"][0] == 1
    spans = [span for story in STORIES for span in story.spans if span.kind not in ("song", "sum")]
    for group in ("objects", "people"):
        assert all(share == 1 for share, _ in found["recall"][group].values())
    counted = sum(n for group in found["recall"].values() for _, n in group.values())
    assert counted == len(spans) == sum(n for _, n in found["kinds"].values())


def test_one_wrong_token_spoils_one_answer():
    story = STORIES[0]
    spans = [span for span in story.spans if span.kind in ("object-place", "object-person")]
    target = spans[len(spans) // 2]
    found = measure(oracle(STORIES, wrong=lambda s, at: s is story and at == target.stop - 2), STORIES, INDEX, 0)
    right, n = found["kinds"][target.kind]
    assert right == round((n - 1) / n, 4)
    bins = found["recall"]["objects"]
    assert sum(round(share * count) for share, count in bins.values()) == sum(count for _, count in bins.values()) - 1


def test_bins_are_filled():
    stories = filled_stories(WORLD, needed=4, plain=3)
    assert [story.text for story in stories[:3]] == [WORLD.story(f"probe {i}", 511).text for i in range(3)]
    found = measure(lambda ids: np.zeros((*ids.shape, V)), stories, INDEX, 0)
    for group in ("objects", "people"):
        shares = {at: n for at, (_, n) in found["recall"][group].items() if at != "400+"}
        assert list(shares) == ["0-25", "25-50", "50-100", "100-200", "200-300", "300-400"]
        assert min(shares.values()) >= 4


def test_attention_weights_are_caught_and_the_logits_stay():
    model = random_model("llama", np.float64)
    ids = np.random.default_rng(0).integers(0, 64, (2, 12))
    weights = attention_weights(model, ids)
    assert [w.shape for w in weights] == [(2, 4, 12, 12)] * 2
    for w in weights:
        assert np.allclose(w.sum(axis=-1), 1, atol=1e-12) and (np.triu(w, 1) == 0).all()
    # The first layer by hand: the softmax of the masked scores, as `attend` is given them.
    seen = []

    def look(q, k, v, *positions, **settings):
        k = np.repeat(k, 2, axis=1)
        scores = q @ k.swapaxes(-1, -2) * settings["scale"]
        seen.append(softmax(np.where(np.tri(12, dtype=bool), scores, -np.inf)))
        return attend(q, k, np.repeat(v, 2, axis=1), *positions, **settings)

    plain = forward(model, ids, attend=look)
    assert all(np.allclose(a, b, atol=1e-12) for a, b in zip(weights, seen, strict=True))
    assert np.allclose(plain, forward(model, ids), atol=1e-12)


def test_a_previous_token_head_is_found(monkeypatch):
    """One head of a random model is replaced by exact attention to the position before; one by exact induction."""
    model = random_model("llama", np.float64)
    length = 10

    def fake(model, ids):
        n = ids.shape[1]
        weights = [np.full((len(ids), 4, n, n), 1 / n) for _ in range(2)]
        for t in range(1, n):
            weights[0][:, 2, t], weights[1][:, 3, t] = 0, 0
            weights[0][:, 2, t, t - 1] = 1
            weights[1][:, 3, t, max(0, t - length + 1)] = 1
        return weights

    monkeypatch.setattr("refllm.model.probe.attention_weights", fake)
    found = head_scores(model, np.arange(2, 60), 1, length=length, rows=4)
    even = round(1 / 21, 4)
    assert found["previous"] == [[even, even, 1.0, even], [even, even, even, 0.0]]
    assert found["induction"] == [[even, even, 0.0, even], [even, even, even, 1.0]]
    assert 0 <= found["copied"] <= 0.3


def test_full_report_of_an_untrained_model():
    model = random_model("llama", vocab_size=V, context_length=512)
    report = full_report(model, INDEX, WORLD, needed=1, plain=2)
    assert report["loss"] > np.log(V) - 1 and report["ratio"] > 10
    assert min(n for bins in report["recall"].values() for _, n in bins.values()) >= 1
    assert np.array(report["heads"]["previous"]).shape == (2, 4)
