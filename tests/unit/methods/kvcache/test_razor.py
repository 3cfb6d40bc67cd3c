"""razor: heads found by twins in loops, a planted induction head, and a compensation token that counts N_d times."""

import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.attention import attend
from refllm.methods.apply import check, compress, load
from refllm.methods.kvcache.razor import choose, copied, head_scores, heads_text, parse_heads, razor, retrieval_heads
from refllm.methods.runtime.speculative import speculative
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.load import load as load_plain
from refllm.model.native import save_native
from refllm.model.probe import attention_weights
from refllm.model.sample import generate_ids
from tests.models import random_model
from tests.twins import slow_attend
from tests.unit.methods.kvcache import laws

counts = dict(sinks=st.integers(0, 4), recent=st.integers(0, 6), divisor=st.integers(1, 9), seed=st.integers(0, 99))


def drawn(seed, tokens=20):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 1, 2, tokens, 4))
    return k, v, rng.normal(size=(1, 4, tokens, 4))


@settings(max_examples=40, deadline=None)
@given(
    **counts, heads=st.sampled_from(["none", "0.0", "0.1", "all"]), window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.just(2.0), moving=st.booleans(),
)  # fmt: skip
def test_one_token_that_counts_is_as_many_tokens(sinks, recent, divisor, seed, heads, window, softcap, moving):
    """attend, with ln N_d, is attention over what extend returns: the mean in place of each dropped token."""
    k, v, q = drawn(seed)
    make = lambda: razor(0, heads=heads, sinks=sinks, recent=recent, divisor=divisor, moving=moving)
    rule = dict(scale=0.5, window=window, softcap=softcap)
    one, other = make(), make()
    for start, stop in ((0, 14), (14, 15), (15, 18), (18, 20)):
        part = (..., slice(start, stop), slice(None))
        at = np.arange(start, stop)
        got = one.attend(q[part], k[part], v[part], at, **rule)
        K, V, key_at = other.extend(k[part], v[part], at, q[part])
        np.testing.assert_allclose(got, attend(q[part], K, V, at, key_at, **rule), rtol=0, atol=1e-12)
    laws.same_state(one, other)


@settings(max_examples=40, deadline=None)
@given(**counts)
def test_what_a_head_keeps(sinks, recent, divisor, seed):
    """A twin of the second head, one token at a time; the first head is left alone."""
    k, v, q = drawn(seed)
    store = razor(0, heads="0.0", sinks=sinks, recent=recent, divisor=divisor)
    K, V, at = laws.feed(store, (k, v, q), (17,))
    window = max(recent, 17 // divisor)
    gone = list(range(sinks, 17 - window))
    gone = gone if len(gone) >= 2 else []
    expected = k[0].copy()
    for j in gone:
        expected[1, j] = np.mean([k[0, 1, i] for i in gone], axis=0)
    np.testing.assert_allclose(K[0], expected, rtol=0, atol=1e-12)
    assert store.dropped == len(gone) and at.tolist() == list(range(20))
    out = slow_attend(q[0, :, 19:], expected, V[0], [19], at, scale=0.5)
    assert np.isfinite(out).all()
    size = (20 + 20 - len(gone)) * 8 * 8 + (8 * 8 if gone else 0)  # tokens of both heads, and one sum in float64
    assert store.nbytes == size


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 19), unique=True).map(sorted))
def test_exact_where_nothing_is_lost(seed, cuts):
    tokens = drawn(seed)
    laws.keep_all_equals_dense(lambda: razor(0, heads="all", sinks=0, recent=0), tokens, cuts)
    laws.budget_of_length_is_no_op(lambda n: razor(0, heads="none", sinks=0, recent=n), tokens, cuts)
    laws.budget_of_length_is_no_op(lambda n: razor(0, heads="none", sinks=3, recent=n - 4), tokens)  # one is too few
    alike = (np.broadcast_to(tokens[0][..., :1, :], tokens[0].shape), *tokens[1:])
    store = razor(0, heads="none", sinks=1, recent=2)
    store.extend(*(x[..., :19, :] for x in alike[:2]), np.arange(19))
    got = store.attend(alike[2][..., 19:, :], *(x[..., 19:, :] for x in alike[:2]), np.array([19]), scale=0.5)
    at = np.arange(20)
    np.testing.assert_allclose(got, attend(alike[2][..., 19:, :], *alike[:2], at[19:], at, scale=0.5), atol=1e-12)


def test_a_moving_window_keeps_its_length():
    tokens = drawn(0, 60)
    still, moving = (razor(0, heads="none", sinks=2, recent=5, divisor=100, moving=m) for m in (False, True))
    for store in (still, moving):
        laws.feed(store, tokens, (30, *range(31, 60)))
    assert (still.others.count, still.dropped, moving.others.count, moving.dropped) == (37, 23, 7, 53)
    np.testing.assert_allclose(moving.compensation(float)[0][0, :, 0], tokens[0][0, :, 2:55].mean(axis=1), atol=1e-12)
    at_once = laws.with_prompt(razor(0, heads="none", sinks=2, recent=5, divisor=100, moving=True), 30)
    laws.feed(at_once, tokens, (30,))
    laws.same_state(moving, at_once)


def test_copies_are_counted_and_bos_is_not():
    weights = np.arange(2 * 8 * 9, dtype=float).reshape(2, 8, 9)  # BOS and four tokens twice
    induction, echo = copied(weights, 0, 4, 1)
    rows, ends = range(4, 8), range(1, 5)
    assert echo.tolist() == [sum(weights[h, i, j] for i, j in zip(rows, ends, strict=True)) for h in range(2)]
    assert induction.tolist() == [sum(weights[h, i, j + 1] for i, j in zip(rows, ends, strict=True)) for h in range(2)]


def test_scores_by_the_whole_matrix():
    """head_scores goes through blocks of queries; a twin takes the whole matrix of weights and loops."""
    model = random_model(dtype=np.float64, num_layers=2)
    induction, echo = head_scores(model, tokens=20, repeats=3, seed=4)
    rng = np.random.default_rng(4)
    text = rng.choice([i for i in range(64) if i not in (1, 2)], 20, replace=False)
    whole = attention_weights(model, np.concatenate([[1], np.tile(text, 3)])[None])
    for layer, matrix in enumerate(whole):
        found = np.zeros((2, 4))
        for h in range(4):
            for i in range(20, 60):
                for j in range(i % 20, i, 20):
                    found[0, h] += matrix[0, h, i + 1, j + 2] / 40
                    found[1, h] += matrix[0, h, i + 1, j + 1] / 40
        np.testing.assert_allclose(induction[layer], found[0].reshape(2, 2).max(axis=1), atol=1e-12)
        np.testing.assert_allclose(echo[layer], found[1].reshape(2, 2).max(axis=1), atol=1e-12)


def test_the_induction_heads_of_the_bundled_model_are_found():
    """Random tokens written twice, the measure of `probe.head_scores`, put both in layer 1."""
    model = load_plain("tiny")
    assert retrieval_heads(model, induction=0.25, echo=0) == [(1, 0), (1, 1)]
    assert retrieval_heads(model, induction=0.125, echo=0.125) == [(1, 1)]


def test_a_recipe_says_how_many_tokens_the_search_reads(monkeypatch):
    model, read = random_model(num_layers=2), []
    module = sys.modules["refllm.methods.kvcache.razor"]
    searched = module.head_scores
    monkeypatch.setattr(module, "head_scores", lambda model, **how: read.append(how) or searched(model, **how))
    found = compress(model, "razor:tokens=5,induction=0.5,recent=4").recipe
    assert read == [{"tokens": 5}]
    assert found.endswith("heads=" + heads_text(choose(*searched(model, tokens=5), 0.5, 0.01)))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), unique=True).map(sorted))
def test_heads_as_text(heads):
    text = heads_text(heads)
    assert [(layer, head) for layer in range(10) for head in parse_heads(text, layer)] == heads


def test_ranking_takes_all_layers_together():
    scores = np.array([[0.9, 0.8], [0.1, 0.2]])
    assert choose(scores, np.zeros((2, 2)), 0.5, 0.0) == [(0, 0), (0, 1)]
    assert choose(scores, scores.T, 0.25, 0.5) == [(0, 0), (1, 0)]
    assert choose(scores, scores, 1.0, 0.0) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert choose(np.zeros((2, 2)), scores, 0.14, 0.01) == [(0, 0)]  # of equal ones the first; 0.04 heads are none


def test_searched_once_and_stored_with_the_model(tmp_path, monkeypatch):
    model = random_model(num_layers=2)
    small = compress(model, "rtn:bits=8,group=16+razor:sinks=2,recent=4,induction=0.5")
    assert small.recipe.startswith("rtn:bits=8,group=16+razor:sinks=2,recent=4,induction=0.5,heads=")
    module = sys.modules["refllm.methods.kvcache.razor"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "head_scores", lambda *args, **kw: pytest.fail("searched again"))
        loaded = load(save_native(small, tmp_path / "m"))
    ids = np.arange(40) % 7
    plain = list(generate_ids(loaded, ids, 9, stop_ids=()))
    assert plain == list(generate_ids(small, ids, 9, stop_ids=()))
    assert plain == list(speculative(small, ids, 9, stop_ids=()))
    cache = new_cache(small)
    forward(small, ids, cache=cache)
    assert cache.nbytes < 0.8 * 40 * 2 * 2 * 2 * 8 * 4
    by_hand = compress(model, "razor:heads=1.0,sinks=2,recent=4")
    assert by_hand.recipe == "razor:heads=1.0,sinks=2,recent=4"
    check(model, "razor:recent=8")
    asked_for = compress(model, "razor:heads=none").recipe, compress(model, "razor:heads=search,recent=9").recipe
    assert asked_for[0] == "razor:heads=none" and asked_for[1].startswith("razor:recent=9,heads=")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(), "a recipe searches them"),
        (dict(heads="1,2"), "like 0.1/2.0"),
        (dict(heads="none", divisor=0), "divisor from 1"),
        (dict(heads="none", recent=-1), "share of the prompt"),
        (dict(heads="none", induction=1.5), "shares from 0 to 1"),
        (dict(heads="none", tokens=0), "tokens must be positive"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        razor(0, **knobs)


def test_a_head_the_model_does_not_have():
    with pytest.raises(ValueError, match="key-value head 2, the model has 2 a layer"):
        forward(random_model(), [1, 2], cache=new_cache(random_model(), partial(razor, heads="0.2")))
