"""Protocols against explicit twins that score one token at a time and know nothing of windows of logits."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.evaluate.perplexity import (
    PROTOCOLS,
    Window,
    evaluate_perplexity,
    perplexity,
    plan,
    token_nll,
    window_logits,
)
from refllm.methods.apply import compress
from refllm.model.llama import forward
from tests.bytemodel import byte_tokenizer
from tests.models import random_model

MODEL = random_model("llama", np.float64, context_length=40)
RNG = np.random.default_rng(5)
IDS = RNG.integers(3, MODEL.config.vocab_size, 100)


def nll_of(context, token, model=MODEL) -> float:
    """-log p(token | context), by the definition."""
    logits = forward(model, np.array(context))[-1]
    p = np.exp(logits - logits.max())
    return -np.log(p[token] / p.sum())


def mean_of(contexts_and_tokens) -> tuple[float, int]:
    values = [nll_of(context, token) for context, token in contexts_and_tokens]
    return float(np.mean(values)), len(values)


def check(result, expected):
    mean, count = expected
    assert result.tokens_scored == count
    assert abs(result.nll - mean) < 1e-9
    assert abs(result.perplexity - np.exp(mean)) < 1e-6


@pytest.mark.parametrize("window", [2, 7, 33])
def test_gptq_scores_all_but_the_first_of_each_whole_window(window):
    starts = range(0, len(IDS) - window + 1, window)
    twin = [(IDS[i : i + j], IDS[i + j]) for i in starts for j in range(1, window)]
    check(evaluate_perplexity(MODEL, IDS, protocol="gptq", window=window), mean_of(twin))


@pytest.mark.parametrize("window", [3, 8, 33])
@pytest.mark.parametrize("add_bos", [True, False])
def test_llamacpp_scores_the_second_half_behind_a_replaced_first_token(window, add_bos):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token_id, tokenizer.add_bos = 1, add_bos
    twin = []
    for i in range(0, len(IDS) - window + 1, window):
        fed = IDS[i : i + window].copy()
        if add_bos:
            fed[0] = 1
        twin += [(fed[:j], IDS[i + j]) for j in range(window // 2 + 1, window)]
    model = replace(MODEL, tokenizer=tokenizer)
    check(evaluate_perplexity(model, IDS, protocol="llamacpp", window=window), mean_of(twin))


def test_llamacpp_scores_255_of_512():
    model = random_model("llama", context_length=512)
    windows = plan(model, np.zeros(1100, int), "llamacpp", 512)
    assert [len(window.targets) for window in windows] == [255, 255]


@pytest.mark.parametrize(("window", "stride"), [(40, 1), (10, 3), (10, 10), (2, 1), (2, 2)])
def test_strided_gives_every_token_the_context_of_its_window(window, stride):
    twin, begin, scored = [], 0, 1
    while scored < len(IDS):
        begin = min(begin, scored - 1)
        end = min(begin + window, len(IDS))
        twin += [(IDS[begin:j], IDS[j]) for j in range(scored, end)]
        begin, scored = begin + stride, end
    check(evaluate_perplexity(MODEL, IDS, protocol="strided", window=window, stride=stride), mean_of(twin))


def test_strided_by_one_is_exact_while_the_text_fits_into_a_window():
    ids = IDS[:40]
    exact = mean_of([(ids[:j], ids[j]) for j in range(1, 40)])
    check(evaluate_perplexity(MODEL, ids, protocol="strided", window=40, stride=1), exact)


def test_document_scores_every_token_once_from_its_own_prefix():
    documents = [IDS[:3], IDS[3:60], IDS[60:61]]
    twin = []
    for document in documents:
        fed = [1, *document]
        for j, token in enumerate(document):
            first = j // 20 * 20  # disjoint windows of 20 that begin with the token before
            if first + 20 >= len(document):
                first = max(0, len(document) - 20)  # the last one reaches back
            twin.append((fed[first : j + 1], token))
    check(evaluate_perplexity(MODEL, documents, protocol="document", window=20), mean_of(twin))


def test_document_takes_a_bos_that_is_there_as_its_prefix():
    with_bos = evaluate_perplexity(MODEL, [[1, *IDS[:9]]], protocol="document", window=20)
    assert with_bos == evaluate_perplexity(MODEL, [IDS[:9]], protocol="document", window=20)


@given(n=st.integers(2, 90), window=st.integers(2, 40), data=st.data())
def test_strided_scores_every_token_but_the_first_once(n, window, data):
    stride = data.draw(st.integers(1, window))
    windows = plan(MODEL, np.arange(n) % 60, "strided", window, stride)
    scored = np.concatenate([w.targets for w in windows])
    assert scored.tolist() == (np.arange(1, n) % 60).tolist()
    assert max(len(w.ids) for w in windows) <= window
    assert all(len(w.ids) >= len(w.targets) for w in windows)


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), window=st.integers(2, 40))
def test_document_windows_cover_every_token_once(lengths, window):
    documents = [3 + np.arange(n) % 60 for n in lengths]
    windows = plan(MODEL, documents, "document", window)
    assert np.concatenate([w.targets for w in windows]).tolist() == np.concatenate(documents).tolist()
    assert max(len(w.ids) for w in windows) <= window


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_uniform_logits_give_the_size_of_the_vocabulary(protocol):
    weights = {**MODEL.weights, "lm_head.weight": np.zeros_like(MODEL.weights["lm_head.weight"])}
    ids = [IDS] if protocol == "document" else IDS
    value = perplexity(replace(MODEL, weights=weights), ids, protocol=protocol, window=16)
    assert isinstance(value, float) and abs(value - 64) < 1e-9


def test_chunks_through_a_dense_cache_change_nothing():
    window = Window(IDS[:31], IDS[5:32])
    whole = window_logits(MODEL, window)
    for chunk in (1, 4, 30, 31, 50):
        np.testing.assert_allclose(window_logits(MODEL, window, chunk), whole, rtol=1e-10, atol=1e-10)


def test_a_lossy_cache_is_seen():
    small = compress(MODEL, "kivi:bits=2,group=8,residual=8")
    plain = evaluate_perplexity(MODEL, IDS, window=40)
    assert evaluate_perplexity(small, IDS, window=40, chunk=40).nll == pytest.approx(plain.nll, abs=1e-9)
    assert abs(evaluate_perplexity(small, IDS, window=40).nll - plain.nll) > 1e-4


def test_token_nll_of_large_logits_is_finite():
    logits = np.array([[1e30, 0.0], [-1e30, 0.0]], np.float32)
    assert token_nll(logits, np.array([0, 1])).tolist() == [0.0, 0.0]
    assert token_nll(np.zeros((130, 5), np.float32), np.zeros(130, int)) == pytest.approx(np.full(130, np.log(5)))


def test_the_mean_is_over_tokens_and_not_over_windows():
    result = evaluate_perplexity(MODEL, IDS[:41], protocol="strided", window=40, stride=20)
    parts = [token_nll(window_logits(MODEL, w), w.targets) for w in plan(MODEL, IDS[:41], "strided", 40, 20)]
    assert len({len(part) for part in parts}) > 1  # or the test would show nothing
    assert result.nll == pytest.approx(np.concatenate(parts).mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "wikitext"}, "unknown protocol 'wikitext'; known: gptq, strided, llamacpp, document"),
        ({"window": 41}, "from 2 to the model's context of 40"),
        ({"window": 1}, "from 2 to"),
        ({"window": 2, "protocol": "llamacpp"}, "scores none"),
        ({"window": 8, "stride": 4}, "a stride belongs to the protocol strided"),
        ({"window": 8, "stride": 9, "protocol": "strided"}, "stride must be from 1 to the window of 8"),
        ({"window": 8, "stride": 0, "protocol": "strided"}, "stride must be from 1"),
        ({"window": 8, "protocol": "document"}, "takes a list of documents"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, IDS, **options)


def test_bad_texts_are_named():
    with pytest.raises(ValueError, match="has 9 tokens, fewer than one window of 10"):
        perplexity(MODEL, IDS[:9], window=10)
    with pytest.raises(ValueError, match="at least 2"):
        perplexity(MODEL, IDS[:1], protocol="strided", window=10)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        perplexity(MODEL, np.full(20, 64), window=10)
    with pytest.raises(ValueError, match="at least one token"):
        perplexity(MODEL, [IDS[:3], []], protocol="document", window=10)
