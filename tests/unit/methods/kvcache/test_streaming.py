"""streaming against a twin that counts positions inside the cache, as the authors do, query by query."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.attention import attend
from refllm.kernels.rope import Rope, cos_sin, rotate
from refllm.methods.apply import compress, load
from refllm.methods.kvcache.streaming import streaming
from refllm.methods.runtime.speculative import speculative
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.sample import generate_ids
from tests.models import random_model
from tests.twins import slow_attend
from tests.unit.methods.kvcache import laws

ROPE = Rope(theta=100.0)


def turned(x, positions):
    return rotate(x, *cos_sin(ROPE, x.shape[-1], np.asarray(positions), x.dtype))


def in_the_cache(k, v, q, sinks, recent, prompt):
    """Outputs of all queries: keys and the query get their index in the cache as position."""
    out = []
    for t in range(k.shape[-2]):
        kept = range(t + 1)
        if t >= prompt:
            kept = [j for j in kept if j < sinks or j > t - max(recent, 1)]
        n = len(kept)
        at = np.arange(n)
        q_t = turned(q[:, t : t + 1], [n - 1])
        out.append(slow_attend(q_t, turned(k[:, kept], at), v[:, kept], [n - 1], at, scale=0.5))
    return np.concatenate(out, axis=1)


@settings(max_examples=40, deadline=None)
@given(
    sinks=st.integers(0, 6), recent=st.integers(0, 9), prompt=st.integers(1, 12), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_positions_inside_the_cache(sinks, recent, prompt, seed):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 2, 20, 4))
    q = rng.normal(size=(4, 20, 4))
    store, out = streaming(0, sinks=sinks, recent=recent), []
    for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, 20))):
        at = np.arange(start, stop)
        K, V, key_at = store.extend(k[:, start:stop], v[:, start:stop], at, None)
        assert key_at.max() - key_at.min() < max(stop if start == 0 else 0, sinks + max(recent, 1))
        out.append(attend(turned(q[:, start:stop], at), turned(K, key_at), V, at, key_at, scale=0.5))
    np.testing.assert_allclose(
        np.concatenate(out, axis=1), in_the_cache(k, v, q, sinks, recent, prompt), rtol=0, atol=1e-12
    )


def test_what_is_evicted_does_not_matter():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 2, 20, 4))
    changed = tokens.copy()
    changed[..., 3:11, :] = 7.0
    make = lambda: streaming(0, sinks=3, recent=5)
    results = [laws.feed(make(), tuple(x), (15,)) for x in (tokens, changed)]
    laws.same_results(*results)


@given(recent=st.integers(20, 30), sinks=st.integers(0, 5), cuts=st.lists(st.integers(1, 19), unique=True).map(sorted))
def test_a_cache_as_long_as_the_text_is_no_op(recent, sinks, cuts):
    tokens = tuple(np.random.default_rng(0).normal(size=(3, 2, 20, 4)))
    laws.keep_all_equals_dense(lambda: streaming(0, sinks=sinks, recent=recent), tokens, cuts)
    laws.budget_of_length_is_no_op(lambda n: streaming(0, sinks=4, recent=n - 4), tokens, cuts)


def test_text_longer_than_the_context_goes_on():
    """The model was made for 16 positions and writes 60 tokens; a dense cache ends where its context does."""
    model = random_model(dtype=np.float64, context_length=16)
    small = compress(model, "streaming:sinks=2,recent=10")
    ids = np.arange(12)
    assert len(list(generate_ids(model, ids, 60, stop_ids=()))) == 5
    long = list(generate_ids(small, ids, 60, stop_ids=()))
    assert len(long) == 60
    cache = new_cache(small)
    with pytest.raises(ValueError, match="context of 16 tokens is full"):
        forward(small, np.arange(17), cache=cache)  # the prompt attends over all of itself
    forward(small, ids, cache=cache)
    for token in long[:-1]:
        logits = forward(small, [token], cache=cache)
    assert int(np.argmax(logits[-1])) == long[-1]
    assert cache.stores[0].tokens.count == 12 and cache.length == 71


def test_in_a_recipe_stored_loaded_and_with_speculation(tmp_path):
    model = random_model(dtype=np.float32)
    small = compress(model, "rtn:bits=8,group=16+streaming:sinks=2,recent=40")
    loaded = load(save_native(small, tmp_path / "m"))
    ids = np.arange(30) % 7
    plain = list(generate_ids(loaded, ids, 12, stop_ids=()))
    assert plain == list(generate_ids(small, ids, 12, stop_ids=()))
    assert plain == list(speculative(small, ids, 12, stop_ids=()))  # nothing is given up yet
    assert len(list(speculative(compress(model, "streaming:recent=8"), ids, 30, stop_ids=()))) == 30


@pytest.mark.parametrize("knobs", [dict(sinks=-1), dict(recent=-1)])
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match="0 or more"):
        streaming(0, **knobs)
