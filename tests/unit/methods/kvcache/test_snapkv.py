"""snapkv against a twin that counts the votes of one head, one query and one key at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.methods.apply import compress, load
from refllm.methods.kvcache.snapkv import pooled, snapkv
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.sample import generate_ids
from tests.models import random_model
from tests.unit.methods.kvcache import laws


def votes_slowly(k, q, window):
    """Votes of one group (g, N, D) on the keys (N, D) before the window."""
    n = len(k)
    votes = [0.0] * (n - window)
    for head in q:
        for t in range(n - window, n):
            weights = [math.exp(0.5 * float(head[t] @ k[j])) for j in range(t + 1)]
            for j in range(n - window):
                votes[j] += weights[j] / sum(weights)
    return votes


def kept_slowly(k, q, capacity, window, kernel, pool):
    n = len(k)
    if n <= capacity:
        return list(range(n))
    window = min(window, capacity)
    if not window:
        return []
    votes = votes_slowly(k, q, window)
    half, near = kernel // 2, []
    for j in range(len(votes)):
        around = [votes[i] if 0 <= i < len(votes) else 0.0 for i in range(j - half, j + half + 1)]
        near.append(sum(around) / kernel if pool == "mean" else max(around))
    # 12 digits: equal sums that differ in rounding are equal.
    best = sorted(range(len(near)), key=lambda j: (-round(near[j], 12), j))[: capacity - window]
    return sorted(best) + list(range(n - window, n))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20), capacity=st.integers(0, 22), window=st.integers(1, 24), kernel=st.sampled_from([1, 3, 5, 9]),
    pool=st.sampled_from(["mean", "max"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_keeps_what_the_twin_keeps(n, capacity, window, kernel, pool, seed):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 1, 2, n + 1, 4))
    q = rng.normal(size=(1, 4, n + 1, 4))
    store = snapkv(0, capacity=capacity, voters=window, kernel=kernel, pool=pool)
    at = laws.feed(store, (k, v, q), (n,))[2]
    for head in range(2):
        got = np.broadcast_to(at, (2, at.shape[-1]))[head].tolist()
        expected = kept_slowly(k[0, head, :n], q[0, 2 * head : 2 * head + 2, :n], capacity, window, kernel, pool)
        if pool == "max" and kernel > 1:  # neighbours of one maximum tie exactly: the earlier is kept in both
            assert len(got) == len(expected) + 1
        assert got == [*expected, n]


@given(st.lists(st.floats(0, 9), min_size=1, max_size=12))
def test_a_kernel_of_one_leaves_the_votes(votes):
    for pool in ("mean", "max"):
        np.testing.assert_array_equal(pooled(np.array(votes), 1, pool), votes)


def test_the_mean_divides_by_the_kernel_at_the_ends():
    assert pooled(np.ones(3), 5, "mean").tolist() == [0.6, 0.6, 0.6]


def test_neighbours_of_a_planted_token_stay_with_it():
    """The last query looks at token 5 only; with a kernel of three, 4 and 6 come along."""
    k = np.zeros((1, 1, 12, 2))
    k[..., 5, 0] = 20.0
    q = np.zeros_like(k)
    q[..., -1, 0] = 5.0
    for kernel, expected in ((1, [0, 1, 5, 11]), (3, [4, 5, 6, 11])):
        store = snapkv(0, capacity=4, voters=1, kernel=kernel)
        store.extend(k, k, np.arange(12), q)
        assert store.tokens.positions[0, 0].tolist() == expected


@settings(max_examples=20, deadline=None)
@given(capacity=st.integers(20, 30), window=st.integers(1, 40), cuts=st.lists(st.integers(1, 19), unique=True))
def test_a_prompt_within_the_capacity_is_left_alone(capacity, window, cuts):
    tokens = tuple(np.random.default_rng(0).normal(size=(3, 2, 2, 20, 4)))
    laws.keep_all_equals_dense(lambda: snapkv(0, capacity=capacity, voters=window), tokens, sorted(cuts))
    laws.budget_of_length_is_no_op(lambda n: snapkv(0, capacity=n, voters=window), tokens, sorted(cuts))
    laws.keep_all_equals_dense(lambda: snapkv(0, capacity=1.0, voters=window), tokens, sorted(cuts))


def test_new_tokens_are_never_given_up():
    tokens = tuple(np.random.default_rng(0).normal(size=(3, 1, 1, 40, 4)))
    store = snapkv(0, capacity=5, voters=2)
    at = laws.feed(store, tokens, (10, 20, 25))[2]
    assert at.shape == (1, 35) and at[0, 5:].tolist() == list(range(10, 40))


def test_the_rule_of_the_model_decides_the_votes():
    """A cap that flattens all scores, and a scale, change which tokens stay."""
    tokens = tuple(5 * x for x in np.random.default_rng(0).normal(size=(3, 1, 1, 60, 4)))
    kept = []
    for rule in (dict(scale=0.5), dict(scale=0.5, softcap=0.01), dict(scale=-0.5), dict(scale=0.5, window=9)):
        store = snapkv(0, capacity=12, voters=4, kernel=1)
        store.attend(tokens[2], tokens[0], tokens[1], np.arange(60), **rule)
        kept.append(store.tokens.positions[0, 0].tolist())
    assert len({tuple(places) for places in kept}) == 4
    assert set(kept[3]) >= set(range(51, 60))  # what no voter can see gets no vote


def test_in_a_recipe_stored_and_loaded(tmp_path):
    small = compress(random_model(), "rtn:bits=8,group=16+snapkv:capacity=12,voters=4,pool=max")
    loaded = load(save_native(small, tmp_path / "m"))
    ids = np.arange(30) % 7
    assert list(generate_ids(loaded, ids, 9, stop_ids=())) == list(generate_ids(small, ids, 9, stop_ids=()))
    cache = new_cache(small)
    forward(small, ids, cache=cache)
    assert cache.nbytes == 2 * 12 * 2 * (2 * 8 * 4 + 4)
    cache = new_cache(small, prompt_length=30)
    forward(small, ids[:20], cache=cache)
    assert cache.nbytes == 2 * (20 * 2 * 2 * 8 * 4 + 4 * 4 * 8 * 4)  # and four queries of four heads


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(capacity=-1), "share of the prompt"),
        (dict(voters=0), "voters from 1"),
        (dict(kernel=4), "odd"),
        (dict(pool="sum"), "mean or max"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        snapkv(0, **knobs)
