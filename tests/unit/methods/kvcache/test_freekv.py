"""freekv against a twin that ranks the pages of one head key by key; exact where nothing is left out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.methods.apply import compress, load
from refllm.methods.kvcache.freekv import FreeKVStore, freekv, page_scores
from refllm.methods.runtime.speculative import speculative
from refllm.model.cache import DenseStore, new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.sample import generate_ids
from tests.models import random_model
from tests.unit.methods.kvcache import laws


def drawn(seed, tokens=40):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 1, 2, tokens, 4))
    return k, v, rng.normal(size=(1, 4, tokens, 4))


def make(tau=-1.0, page=3, sinks=2, recent=6, budget=6, **rest):
    return freekv(0, page=page, sinks=sinks, recent=recent, budget=budget, tau=tau, skip_layers=0, **rest)


def ranked(k, q, page, sinks, candidates):
    """Scores of pages of one key-value head (tokens, D) for its queries (g, D)."""
    total = [0.0] * candidates
    for head in q:
        bounds = []
        for j in range(candidates):
            rows = k[sinks + j * page : sinks + (j + 1) * page]
            bounds.append(sum(max(x * min(c), x * max(c)) for x, c in zip(head, rows.T, strict=True)))
        top = max(bounds)
        whole = sum(math.exp(b - top) for b in bounds)
        total = [t + math.exp(b - top) / whole / len(q) for t, b in zip(total, bounds, strict=True)]
    return total


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99), page=st.integers(1, 5), sinks=st.integers(0, 5), recent=st.integers(0, 9),
    budget=st.integers(0, 12), tau=st.sampled_from([-2.0, 0.2, 2.0]), pool=st.sampled_from(["mean", "max"]),
)  # fmt: skip
def test_attends_over_what_the_twin_attends_over(seed, page, sinks, recent, budget, tau, pool):
    k, v, q = drawn(seed)
    store = make(tau, page, sinks, recent, budget, pool=pool)
    laws.feed(store, (k[..., :30, :], v[..., :30, :], q[..., :30, :]))
    for t in range(30, 40):
        at = store.extend(*laws.part_of((k, v), t, t + 1), np.array([t]), q[..., t : t + 1, :])[2]
        at, S = np.broadcast_to(at, (2, at.shape[-1])), t + 1
        if S <= sinks + recent + budget:
            assert at[0].tolist() == list(range(S))
            continue
        full, rest = divmod(S - sinks, page)
        near = max(recent // page - (rest > page / 2), 1 if rest == 0 else 0)
        n = full - near
        for head in range(2):
            mine = q[0, 2 * head : 2 * head + 2]
            pairs = zip(mine[:, t], mine[:, t - 1], strict=True)
            cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
            cosine = np.mean(cosines) if pool == "mean" else max(cosines)
            probe = mine[:, t] if cosine < tau else mine[:, t - 1]
            scores = ranked(k[0, head], probe, page, sinks, n)
            best = sorted(sorted(range(n), key=lambda j: (-round(scores[j], 12), j))[: budget // page])
            pages = [sinks + j * page + i for j in best for i in range(page)]
            assert at[head].tolist() == [*range(sinks), *pages, *range(sinks + n * page, S)]
            assert store.corrected[0, head] == (cosine < tau)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 39), unique=True, max_size=6).map(sorted))
def test_a_budget_of_the_length_is_no_op(seed, cuts):
    laws.budget_of_length_is_no_op(lambda n: make(budget=n - 8), drawn(seed), cuts)
    laws.keep_all_equals_dense(lambda: make(sinks=40, recent=0, budget=0), drawn(seed), cuts)
    laws.keep_all_equals_dense(lambda: make(budget=400), drawn(seed), cuts)


@given(seed=st.integers(0, 999))
def test_the_bound_is_above_every_product_of_the_page(seed):
    rng = np.random.default_rng(seed)
    q, keys = rng.normal(size=4), rng.normal(size=(5, 3, 4))
    bound = np.maximum(q * keys.min(axis=1), q * keys.max(axis=1)).sum(axis=-1)
    assert (bound[:, None] >= keys @ q - 1e-12).all()
    whole = page_scores(q[None], keys.min(axis=1)[None], keys.max(axis=1)[None])[0]
    np.testing.assert_allclose(whole, np.exp(bound) / np.exp(bound).sum(), rtol=1e-12)


def test_above_one_tau_is_retrieval_by_the_present_query_and_below_minus_one_it_never_corrects():
    k, v, q = drawn(1)
    always, never, changed = make(2.0), make(-2.0), make(2.0)
    other = q.copy()
    other[..., :39, :] = 7.0  # the queries before do not matter
    at = [laws.feed(s, (k, v, x), (36, 37, 38, 39))[2] for s, x in ((always, q), (changed, other))]
    np.testing.assert_array_equal(*at)
    assert always.corrected.all()
    laws.feed(never, (k, v, q), (36, 37, 38, 39))
    assert not never.corrected.any()
    last = q.copy()
    last[..., 39:, :] = 7.0  # nor does the present one
    again = make(-2.0)
    laws.feed(again, (k, v, last), (36, 37, 38, 39))
    np.testing.assert_array_equal(never.chosen, again.chosen)


def test_only_pages_that_change_are_fetched():
    k, v, q = drawn(2)
    q[..., 29:, :] = q[..., 29:30, :]  # the same query from step to step
    store = make()
    laws.feed(store, (k[..., :31, :], v[..., :31, :], q[..., :31, :]), (30,))
    page = 3 * 2 * 4 * 8
    assert store.recalled == 2 * 2 * page  # two heads, two pages
    before, chosen = store.recalled, store.chosen
    for t in range(31, 40):
        store.extend(*laws.part_of((k, v), t, t + 1), np.array([t]), q[..., t : t + 1, :])
        changed = sum(len(set(a) - set(b)) for a, b in zip(store.chosen[0].tolist(), chosen[0].tolist(), strict=True))
        assert store.recalled - before == changed * page
        before, chosen = store.recalled, store.chosen


def test_device_and_host_bytes():
    """All tokens once; on the device sinks, pages, the tail, digests, a query and which pages these are."""
    tokens = tuple(x.astype(np.float32) for x in drawn(3, 33))
    store = make()
    laws.feed(store, tokens, (32,))
    token = 2 * 2 * 4 * 4
    tail = 33 - store.first_recent
    extra = 10 * token + 4 * 4 * 4 + 2 * 2 * 8  # ten digests of two keys, four queries, four page numbers
    assert store.nbytes == 33 * token + 6 * token + extra
    assert store.device_nbytes == (2 + 6 + tail) * token + extra
    store = make()
    laws.feed(store, laws.part_of(tokens, 0, 12))
    assert store.device_nbytes == store.nbytes


def test_tokens_are_taken_back_with_their_pages():
    tokens = drawn(4)
    store = make()
    laws.feed(store, tokens, (30, 31))  # nine tokens in one step
    store.truncate(33)
    assert store._digests.shape[-2] == 10
    fresh = make(2.0)  # chooses with its own query, as does a step after one that was taken back
    laws.feed(fresh, laws.part_of(tokens, 0, 33), (30,))
    results = [s.extend(*laws.part_of(tokens[:2], 33, 34), np.array([33]), tokens[2][..., 33:34, :])
               for s in (store, fresh)]  # fmt: skip
    laws.same_results(*results)


def test_in_a_recipe_stored_loaded_and_with_speculation(tmp_path):
    model = random_model(num_layers=2)
    small = compress(model, "rtn:bits=8,group=16+freekv:page=4,sinks=2,recent=4,budget=8")
    loaded = load(save_native(small, tmp_path / "m"))
    ids = np.arange(40) % 7
    assert list(generate_ids(loaded, ids, 9, stop_ids=())) == list(generate_ids(small, ids, 9, stop_ids=()))
    assert len(list(speculative(small, ids, 20, stop_ids=()))) == 20
    cache = new_cache(small)
    assert [type(s) for s in cache.stores] == [DenseStore, FreeKVStore]
    forward(small, ids, cache=cache)
    forward(small, [3], cache=cache)
    assert cache.device_nbytes < cache.nbytes


@pytest.mark.parametrize("knobs", [dict(page=0), dict(skip_layers=-1), dict(budget=-1), dict(pool="sum")])
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match="freekv"):
        freekv(0, **knobs)
