"""h2o against a twin that keeps a dictionary of scores a head and attends key by key."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.methods.apply import compress, load
from refllm.methods.kvcache.h2o import h2o
from refllm.methods.runtime.speculative import speculative
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.sample import generate_ids
from tests.models import random_model
from tests.unit.methods.kvcache import laws


def slowly(k, v, q, heavy, recent, prompt, window=None):
    """Outputs of all queries, and the tokens each head has kept in the end with their scores."""
    group, out, kept = q.shape[0] // k.shape[0], np.zeros((*q.shape[:2], v.shape[-1])), []
    for head in range(k.shape[0]):
        scores = {}
        for t in range(k.shape[1]):
            scores[t] = 0.0
            seen = [j for j in scores if window is None or j > t - window]
            for h in range(head * group, (head + 1) * group):
                logits = {j: 0.5 * float(q[h, t] @ k[head, j]) for j in seen}
                total = sum(math.exp(x) for x in logits.values())
                for j, x in logits.items():
                    scores[j] += math.exp(x) / total
                    out[h, t] += math.exp(x) / total * v[head, j]
            if t >= prompt - 1 and len(scores) > heavy + recent:
                old = sorted(scores)[: len(scores) - recent]
                for j in sorted(old, key=lambda j: (-scores[j], j))[heavy:]:
                    del scores[j]
        kept.append(scores)
    return out, kept


@settings(max_examples=40, deadline=None)
@given(
    heavy=st.integers(0, 6), recent=st.integers(0, 6), prompt=st.integers(1, 12), seed=st.integers(0, 99),
    window=st.none() | st.integers(1, 9),
)  # fmt: skip
def test_equals_a_dictionary_of_scores(heavy, recent, prompt, seed, window):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 1, 2, 18, 4))
    q = rng.normal(size=(1, 4, 18, 4))
    store, out = h2o(0, heavy=heavy, recent=recent), []
    for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, 18))):
        part = slice(start, stop)
        out.append(store.attend(q[:, :, part], k[:, :, part], v[:, :, part], np.arange(start, stop), scale=0.5,
                                window=window))  # fmt: skip
    expected, kept = slowly(k[0], v[0], q[0], heavy, recent, prompt, window)
    np.testing.assert_allclose(np.concatenate(out, axis=2)[0], expected, rtol=0, atol=1e-12)
    at = np.broadcast_to(store.tokens.positions, store.scores.shape)[0]
    for head in range(2):
        assert at[head].tolist() == sorted(kept[head])
        np.testing.assert_allclose(store.scores[0, head], [kept[head][j] for j in sorted(kept[head])], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(heavy=st.integers(0, 5), recent=st.integers(0, 5), seed=st.integers(0, 99))
def test_what_is_gone_never_returns(heavy, recent, seed):
    tokens = np.random.default_rng(seed).normal(size=(3, 1, 1, 20, 4))
    store, gone = h2o(0, heavy=heavy, recent=recent), set()
    for t in range(20):
        k, v, q = laws.part_of(tuple(tokens), t, t + 1)
        at = store.extend(k, v, np.array([t]), q)[2]
        assert not gone & set(at.ravel().tolist()) and t in at
        gone = set(range(t + 1)) - set(store.tokens.positions.ravel().tolist())
        assert store.tokens.count == min(t + 1, heavy + recent)


@settings(max_examples=20, deadline=None)
@given(heavy=st.integers(0, 20), cuts=st.lists(st.integers(1, 19), unique=True).map(sorted), seed=st.integers(0, 99))
def test_a_budget_of_the_length_is_no_op(heavy, cuts, seed):
    tokens = tuple(np.random.default_rng(seed).normal(size=(3, 2, 2, 20, 4)))
    laws.budget_of_length_is_no_op(lambda n: h2o(0, heavy=heavy, recent=n - heavy), tokens, cuts)


def test_shares_count_the_prompt_and_round_down():
    tokens = tuple(np.random.default_rng(0).normal(size=(3, 1, 1, 30, 4)))
    store = h2o(0, heavy=0.1, recent=0.25)
    laws.feed(store, tokens, (19,))  # 1 and 4, and one step of eleven tokens
    assert store.prompt == 19 and store.tokens.count == 5


def test_equal_scores_keep_the_earlier_token():
    """Through a window of one every token is seen by itself only: all have the score 1."""
    k = np.zeros((1, 1, 8, 2))
    store = h2o(0, heavy=2, recent=1)
    store.attend(k, k, k, np.arange(8), scale=1.0, window=1)
    assert store.tokens.positions[0, 0].tolist() == [0, 1, 7] and store.scores.tolist() == [[[1.0, 1.0, 1.0]]]


@settings(max_examples=20, deadline=None)
@given(back=st.integers(1, 6), seed=st.integers(0, 99))
def test_scores_of_tokens_taken_back_are_taken_back(back, seed):
    tokens = tuple(np.random.default_rng(seed).normal(size=(3, 1, 2, 20, 4)))
    one, other = h2o(0, heavy=3, recent=3), h2o(0, heavy=3, recent=3)
    one.rollback = 6
    laws.feed(one, tokens, (12, 13))
    one.truncate(20 - back)
    one._settle()
    other.rollback = 6
    laws.feed(other, laws.part_of(tokens, 0, 20 - back), (12, 13))
    other._settle()
    laws.same_state(one, other)


def test_in_a_recipe_stored_loaded_and_with_speculation(tmp_path):
    model = random_model()
    small = compress(model, "rtn:bits=8,group=16+h2o:heavy=8,recent=8")
    loaded = load(save_native(small, tmp_path / "m"))
    ids = np.arange(30) % 7
    assert list(generate_ids(loaded, ids, 9, stop_ids=())) == list(generate_ids(small, ids, 9, stop_ids=()))
    assert len(list(speculative(small, ids, 30, stop_ids=()))) == 30
    cache = new_cache(small)
    forward(small, ids, cache=cache)
    store = cache.stores[0]
    # 16 tokens of 2 heads: key and value of 8 float32, an int32 position, a float64 score.
    assert store.nbytes == 16 * 2 * (2 * 8 * 4 + 4 + 8) and cache.nbytes == 2 * store.nbytes
    with pytest.raises(ValueError, match=r"h2o cannot go back from 30 to 29 tokens.*rollback = 1"):
        cache.truncate(29)


@pytest.mark.parametrize("knobs", [dict(heavy=-1), dict(recent=-0.5), dict(heavy=float("nan"))])
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match="a share of the prompt"):
        h2o(0, **knobs)
