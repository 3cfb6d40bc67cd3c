"""speculative yields what plain decoding yields: the same greedy tokens, the same distribution."""

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from refllm.methods.kvcache.kivi import kivi
from refllm.methods.runtime.speculative import (
    Counts,
    accept,
    expected_speedup,
    expected_tokens_per_pass,
    first_layers,
    operations_factor,
    prompt_lookup,
    speculative,
)
from refllm.model.cache import KVCache, new_cache
from refllm.model.llama import forward
from refllm.model.model import Runtime
from refllm.model.sample import Sampling, generate_ids, probabilities
from tests.models import ARCHITECTURES, random_model

MODULE = sys.modules["refllm.methods.runtime.speculative"]  # its name in the package is the function

DRAFTS = (
    dict(draft="ngram"),
    dict(draft="ngram", ngram=1, gamma=7),
    dict(draft="layers", gamma=1),
    dict(draft="layers", draft_layers=2),
)


class Scripted:
    """A generator of random numbers that returns given ones."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


# --- accepting: exact enumeration ------------------------------------------------------------------------------------


def test_accepting_gives_exactly_p_on_a_grid():
    """Every uniform number (k + 1/2) / 64 once: the shares are exact, because all thresholds are multiples of 1/64."""
    q = np.array([[1 / 2, 1 / 4, 1 / 8, 1 / 8]])
    p = np.array([[1 / 4, 1 / 4, 1 / 4, 1 / 4], [0, 0, 0, 1]])
    grid = (np.arange(64) + 0.5) / 64
    share, accepted_share = np.zeros(4), 0.0
    for drafted in range(4):
        for first in grid:
            accepted, token = accept(p, q, [drafted], Scripted(first, 0.5))
            if accepted:
                assert token == 3  # the bonus token comes from the row after the last draft
                share[drafted] += q[0, drafted] / 64
                accepted_share += q[0, drafted] / 64
                continue
            for second in grid:
                _, token = accept(p, q, [drafted], Scripted(first, second))
                share[token] += q[0, drafted] / 64 / 64
    assert share.tolist() == [0.25] * 4
    assert accepted_share == np.minimum(p[0], q[0]).sum() == 1 - np.abs(p[0] - q[0]).sum() / 2


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 6), zeros=st.sampled_from([0.0, 0.4]))
def test_acceptance_thresholds_and_the_residual_add_up_to_p(seed, vocab, zeros):
    """q(x) min(1, p/q) + (1 - beta) rest(x) = p(x), with both factors measured from `accept` itself."""
    rng = np.random.default_rng(seed)
    p, q = (rng.random(vocab) * (rng.random(vocab) >= zeros) for _ in range(2))
    p[rng.integers(vocab)] += 0.1
    q[rng.integers(vocab)] += 0.1
    p, q = p / p.sum(), q / q.sum()
    share = np.zeros(vocab)
    rows = np.stack([p, np.ones(vocab) / vocab])
    for x in np.flatnonzero(q):
        threshold = min(1.0, p[x] / q[x])
        for number, taken in ((threshold * (1 - 1e-9), threshold > 0), (threshold * (1 + 1e-9), False)):
            if number < 1:
                assert accept(rows, q[None], [x], Scripted(number, 0.5))[0] == taken
        share[x] += q[x] * threshold
        if threshold < 1 - 1e-9:
            cut = np.concatenate([[0], np.cumsum(np.maximum(p - q, 0)) / np.maximum(p - q, 0).sum()])
            for y in np.flatnonzero(np.diff(cut) > 1e-6):
                middle = (cut[y] + cut[y + 1]) / 2
                assert accept(rows, q[None], [x], Scripted(1 - 1e-12, middle)) == (0, y)
                share[y] += q[x] * (1 - threshold) * (cut[y + 1] - cut[y])
    np.testing.assert_allclose(share, p, atol=1e-5)


def test_equal_distributions_accept_everything_and_disjoint_ones_nothing():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=4)
    for _ in range(200):
        drafted = [int(rng.choice(5, p=row)) for row in p[:3]]
        assert accept(p, p[:3], drafted, rng)[0] == 3
    p, q = np.array([[0.0, 0.0, 0.5, 0.5]] * 2), np.array([[0.5, 0.5, 0.0, 0.0]])
    drawn = [accept(p, q, [i % 2], rng) for i in range(200)]
    assert {accepted for accepted, _ in drawn} == {0}
    assert {token for _, token in drawn} == {2, 3}


def test_a_residual_lost_to_rounding_falls_back_to_p():
    """p = q up to the last bit, and the one number that rejects: nothing of max(p - q, 0) is left but p is."""
    p = np.array([[0.5, 0.5 - 2**-54], [1.0, 0.0]])
    q = np.array([[0.5, 0.5]])
    assert accept(p, q, [1], Scripted(1 - 2**-53, 0.2)) == (0, 0)


def test_later_drafts_are_not_looked_at_after_a_rejection():
    p, q = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    assert accept(p, q, [0, 0], Scripted(0.3, 0.3)) == (0, 1)


def transition_p_value(tokens, table):
    """chi-squared p-value of observed transitions against the rows of a Markov chain."""
    counts = np.zeros_like(table)
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    expected = counts.sum(axis=1, keepdims=True) * table
    assert not counts[table == 0].any()  # a token that the filters removed never comes
    seen = expected > 0
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    return chi2.sf(statistic, seen.sum() - (counts.sum(axis=1) > 0).sum())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.7, top_k=4, seed=2),
        Sampling(1.3, top_p=0.8, min_p=0.1),
    ],
)
@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_sampled_text_has_the_distribution_of_the_model(monkeypatch, sampling, draft):
    """A long text of a Markov chain, whose forward pass is a table: transitions against the table by chi-squared."""
    rng = np.random.default_rng(5)
    tables = {name: rng.normal(size=(6, 6)) * 1.5 for name in ("target", "draft")}

    def table_forward(model, ids, *, cache, last_only=False):
        cache.length += len(ids)
        logits = tables[model.name][np.asarray(ids)]
        return logits[-1:] if last_only else logits

    monkeypatch.setattr(MODULE, "forward", table_forward)
    target = replace(random_model(vocab_size=6, context_length=10**6), name="target")
    drafting = dict(draft_model=replace(target, name="draft")) if draft == "model" else dict(draft="ngram", ngram=1)
    counts = Counts()
    tokens = list(speculative(target, [0], 3000, sampling, stop_ids=(), gamma=3, counts=counts, **drafting))
    assert len(tokens) == 3000
    wanted, drafted = (probabilities(tables[name], sampling) for name in ("target", "draft"))
    assert transition_p_value(np.array(tokens), wanted) > 1e-3
    assert 0.05 < counts.acceptance < 0.95  # both branches were taken, often
    if draft == "model":
        # The measure has teeth: with the draft's own rows in place of the model's it fails by far.
        assert transition_p_value(np.array(tokens), np.where(drafted > 0, drafted, 1e-9)) < 1e-9
        beta = np.minimum(wanted, drafted).sum(axis=1)
        assert beta.min() - 0.05 < counts.acceptance < beta.max() + 0.05
        # alpha gives tokens per pass by the formula, had every token the same chance; here within 15%.
        assert abs(counts.tokens_per_pass / expected_tokens_per_pass(counts.acceptance, 3) - 1) < 0.15


# --- greedy: the same tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("knobs", DRAFTS, ids=str)
def test_greedy_tokens_are_those_of_plain_decoding(architecture, knobs):
    model = random_model(architecture, np.float64)
    rng = np.random.default_rng(3)
    for length in (1, 2, 9):
        ids = rng.integers(0, 64, length)
        ids[length // 2 :] = ids[: length - length // 2]  # something to look up
        expected = list(generate_ids(model, ids, 40, stop_ids=()))
        assert list(speculative(model, ids, 40, stop_ids=(), **knobs)) == expected


def exact_model(seed):
    """A model of integers: each token's logits are small whole numbers, so sums are exact and ties frequent."""
    model = random_model(norm_eps=0.0, num_layers=1, vocab_size=12, hidden_size=8, seed=seed)
    rng = np.random.default_rng(seed)
    weights = dict(model.weights)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"] = weights[f"model.layers.0.{name}.weight"] * 0
    weights["model.embed_tokens.weight"] = rng.choice([-1.0, 1.0], (12, 8)).astype(np.float32)  # mean square 1
    weights["model.norm.weight"] = np.ones(8, np.float32)
    weights["lm_head.weight"] = rng.integers(-1, 2, (12, 8)).astype(np.float32)
    return replace(model, weights=weights)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ids=st.lists(st.integers(0, 11), min_size=1, max_size=8),
    gamma=st.integers(1, 6),
    draft_seed=st.integers(0, 3),
    max_tokens=st.integers(0, 20),
    stop=st.sets(st.integers(0, 11), max_size=2),
)
def test_greedy_is_identical_in_exact_arithmetic(seed, ids, gamma, draft_seed, max_tokens, stop):
    """No rounding anywhere, ties included: lowest id, whatever the draft proposes."""
    model = exact_model(seed)
    logits = forward(model, np.arange(12))
    assert np.array_equal(logits, np.rint(logits))
    expected = list(generate_ids(model, ids, max_tokens, stop_ids=tuple(stop)))
    for knobs in (dict(), dict(draft_model=exact_model(draft_seed))):
        assert list(speculative(model, ids, max_tokens, stop_ids=tuple(stop), gamma=gamma, **knobs)) == expected


@pytest.mark.parametrize("knobs", DRAFTS, ids=str)
@pytest.mark.parametrize("prompt", [1, 2, 13, 14, 15, 16])
def test_a_full_context_ends_the_text_as_in_plain_decoding(knobs, prompt):
    model = random_model(dtype=np.float64, context_length=16)
    ids = np.arange(prompt) % 5
    for max_tokens in (0, 1, 2, 50):
        expected = list(generate_ids(model, ids, max_tokens, stop_ids=()))
        assert list(speculative(model, ids, max_tokens, stop_ids=(), **knobs)) == expected
        assert len(expected) == min(max_tokens, 17 - prompt)


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="context of 16 tokens is full"):
        list(speculative(random_model(context_length=16), np.zeros(17, int), 1))


def test_a_draft_model_with_a_shorter_context_stops_drafting():
    model = random_model(dtype=np.float64, context_length=40)
    small = random_model(dtype=np.float64, context_length=12, seed=1)
    counts = Counts()
    got = list(speculative(model, [3, 4], 60, stop_ids=(), draft_model=small, counts=counts))
    assert got == list(generate_ids(model, [3, 4], 60, stop_ids=()))
    assert 0 < counts.drafted <= 4 * 10


def test_every_stop_position_ends_the_text_before_the_stop_token():
    model = random_model(dtype=np.float64)
    full = list(generate_ids(model, [7, 8], 30, stop_ids=()))
    for knobs in (dict(), dict(draft_model=model, gamma=5)):  # stops among accepted tokens, and as the token after
        for token in set(full):
            got = list(speculative(model, [7, 8], 30, stop_ids=(token,), **knobs))
            assert got == full[: full.index(token)]
    stopping = replace(model, config=replace(model.config, eos_token_ids=(full[5],)))
    assert list(speculative(stopping, [7, 8], 30)) == full[: full.index(full[5])]


def test_prefill_is_reported_once_before_the_first_token():
    calls = []
    tokens = speculative(random_model(), [1, 5], 3, stop_ids=(), on_prefill=lambda: calls.append(1))
    assert calls == []
    next(tokens)
    assert calls == [1]
    list(tokens)
    assert calls == [1]


def test_generate_ids_hands_over_to_it():
    counts = Counts()
    plain = random_model(dtype=np.float64)
    model = replace(plain, runtime=Runtime(generate=partial(speculative, gamma=3, counts=counts)))
    assert list(generate_ids(model, [4, 4, 4], 20, stop_ids=())) == list(
        generate_ids(plain, [4, 4, 4], 20, stop_ids=())
    )
    assert counts.passes > 0


# --- sampling: same seed, same text; q = p accepts everything --------------------------------------------------------


def test_a_seed_gives_one_text_and_the_model_as_its_own_draft_is_always_accepted():
    model = random_model(dtype=np.float64)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=11)
    counts = Counts()
    first = list(speculative(model, [9], 40, sampling, stop_ids=(), draft_model=model, counts=counts))
    assert first == list(speculative(model, [9], 40, sampling, stop_ids=(), draft_model=model))
    assert first != list(speculative(model, [9], 40, replace(sampling, seed=12), stop_ids=(), draft_model=model))
    assert counts.acceptance == 1.0
    # 40 tokens: one from the prefill, then 7 passes of 4 + 1 and a last one of 3 + 1.
    assert (counts.passes, counts.drafted, counts.accepted) == (8, 31, 31)
    assert counts.tokens_per_pass == 39 / 8
    assert (Counts().acceptance, Counts().tokens_per_pass) == (0.0, 0.0)


# --- caches ----------------------------------------------------------------------------------------------------------


def spy_on_caches(monkeypatch):
    """The caches that a generation opens, the model's first... in order of opening."""
    opened = []

    def recording(model, policy=None):
        opened.append(new_cache(model, policy))
        return opened[-1]

    monkeypatch.setattr(MODULE, "new_cache", recording)
    return opened


@pytest.mark.parametrize("knobs", [DRAFTS[0], DRAFTS[1], DRAFTS[2], dict(draft="layers", gamma=5)], ids=str)
def test_after_rollbacks_the_caches_equal_a_fresh_prefill(monkeypatch, knobs):
    model = random_model(dtype=np.float64)
    opened = spy_on_caches(monkeypatch)
    counts = Counts()
    ids = [5, 6, 5, 6, 5]
    text = ids + list(speculative(model, ids, 30, stop_ids=(), counts=counts, **knobs))
    assert counts.accepted < counts.drafted  # something was rolled back
    *draft_caches, cache = opened
    assert len(draft_caches) == (knobs["draft"] == "layers")
    assert cache.length == len(text) - 1  # the last token is never read
    for cache in opened:
        # The draft rolls back when it is next asked: what it read of the last pass may still be wrong.
        length = cache.length if cache is opened[-1] else cache.length - knobs["gamma"]
        cache.truncate(length)
        read_again = forward(first_layers(model, len(cache.stores)), text[length:], cache=cache)
        fresh = forward(first_layers(model, len(cache.stores)), text)[length:]
        np.testing.assert_allclose(read_again, fresh, rtol=0, atol=1e-12)


def test_a_quantised_cache_can_be_rolled_back(monkeypatch):
    """kivi puts quantising off by gamma tokens; as long as nothing is quantised, the tokens are the plain ones."""
    roomy, tight = (partial(kivi, group_size=8, residual=r) for r in (128, 8))
    plain = random_model(dtype=np.float64)
    expected = list(generate_ids(plain, [3, 3, 3], 60, stop_ids=()))
    opened = spy_on_caches(monkeypatch)
    for knobs in (dict(draft="layers"), dict(draft="ngram", gamma=8)):
        for policy in (roomy, tight):
            model = replace(plain, runtime=Runtime(cache_policy=policy))
            counts = Counts()
            got = list(speculative(model, [3, 3, 3], 60, stop_ids=(), counts=counts, **knobs))
            assert len(got) == 60 and 0 < counts.accepted < counts.drafted
            if policy is roomy:
                assert got == expected
            else:
                store = opened[-1].stores[0]
                assert store.length == 62 and store.parts()["v_codes"].shape[-2] >= 62 - 8 - knobs.get("gamma", 4)


def test_a_cache_that_cannot_roll_back_says_so(monkeypatch):
    class Forgetful:
        pre_rope = False
        nbytes = 0

        def extend(self, k, v, positions, queries=None):
            return k, v, positions

        def truncate(self, length):
            raise ValueError("gone is gone")

    model = replace(random_model(), runtime=Runtime(cache_policy=lambda layer: Forgetful()))
    assert isinstance(new_cache(model), KVCache)
    with pytest.raises(ValueError, match="gone is gone"):
        list(speculative(model, [1, 2, 1, 2, 1], 30, stop_ids=()))


# --- drafts and formulas ---------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.integers(0, 2), min_size=1, max_size=12), ngram=st.integers(1, 4), count=st.integers(1, 6))
def test_lookup_reads_on_after_the_latest_longest_match(text, ngram, count):
    got = prompt_lookup(text, ngram, count)
    matches = [
        (n, start)
        for n in range(1, min(ngram, len(text) - 1) + 1)
        for start in range(len(text) - n)
        if text[start : start + n] == text[len(text) - n :]
    ]
    if not matches:
        assert got == []
        return
    n, start = max(matches)
    assert len(got) == count
    grown = text + got
    assert all(grown[len(text) + i] == grown[start + n + i] for i in range(count))


def test_first_layers_share_weights_and_run_the_same_head():
    model = random_model("gemma3", num_layers=3)
    cut = first_layers(model, 1)
    assert cut.weights is model.weights
    assert cut.config.num_layers == 1 and cut.config.sliding_layers == (True,)
    assert forward(cut, [1, 2, 3]).shape == (3, 64)
    same = first_layers(model, 3)
    np.testing.assert_array_equal(forward(same, [1, 2, 3]), forward(model, [1, 2, 3]))
    for count in (0, 4, -1):
        with pytest.raises(ValueError, match=f"draft_layers must be 1 to 3.*got {count}"):
            first_layers(model, count)


@pytest.mark.parametrize(
    "knobs, message",
    [
        (dict(draft="oracle"), "draft must be ngram or layers, got 'oracle'"),
        (dict(gamma=0), "gamma must be at least 1, got 0"),
        (dict(ngram=0), "ngram must be at least 1, got 0"),
        (dict(draft="layers", draft_layers=3), "draft_layers must be 1 to 2"),
        (dict(draft_model=random_model(vocab_size=63)), "vocabulary of 64 tokens, it has 63"),
    ],
    ids=str,
)
def test_knobs_out_of_range(knobs, message):
    with pytest.raises(ValueError, match=message):
        next(speculative(random_model(), [1], 4, **knobs))


def test_formulas():
    """Golden numbers of the paper's formula; the sum form against the closed form; limits."""
    for (alpha, gamma), golden in {(0.8, 4): 3.3616, (0.7, 3): 2.533, (0.9, 8): 6.1258}.items():
        tokens = expected_tokens_per_pass(alpha, gamma)
        assert abs(tokens - golden) < 5e-5
        np.testing.assert_allclose(tokens, (1 - alpha ** (gamma + 1)) / (1 - alpha), rtol=1e-14)
        np.testing.assert_allclose(expected_speedup(alpha, gamma, 0.1), tokens / (gamma * 0.1 + 1), rtol=1e-14)
        factor = (1 - alpha) * (gamma * 0.1 + gamma + 1) / (1 - alpha ** (gamma + 1))
        np.testing.assert_allclose(operations_factor(alpha, gamma, 0.1), factor, rtol=1e-14)
    assert expected_tokens_per_pass(1.0, 4) == 5 and expected_tokens_per_pass(0.0, 4) == 1
