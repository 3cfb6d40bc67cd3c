"""pqcache: codes that lose nothing rank exactly, tables are products with decoded keys, and what is chosen is exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.nn import softmax
from refllm.methods.apply import compress, load
from refllm.methods.kvcache._books import encode
from refllm.methods.kvcache.pqcache import approximate_scores, pqcache, train
from refllm.methods.runtime.speculative import speculative
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.sample import generate_ids
from tests.models import random_model
from tests.unit.methods.kvcache import laws


def drawn(seed, tokens=40):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 1, 2, tokens, 4))
    return k, v, rng.normal(size=(1, 4, tokens, 4))


def decoded(codes, centroids):
    """Keys that the codes stand for, one vector at a time: (..., Hk, tokens, D)."""
    out = np.empty((*codes.shape[:-1], codes.shape[-1] * centroids.shape[-1]))
    for place in np.ndindex(codes.shape[:-1]):
        books = centroids[place[:-1]]
        out[place] = np.concatenate([books[part][code] for part, code in enumerate(codes[place])])
    return out


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), m=st.sampled_from([1, 2, 4]), bits=st.integers(1, 4))
def test_tables_are_products_with_decoded_keys(seed, m, bits):
    k, _, q = drawn(seed)
    centroids = train(k, m, bits, 5, (seed, 0))
    codes = encode(k, centroids)
    keys = decoded(codes, centroids)
    for part in range(m):  # each code names the nearest centroid
        width = 4 // m
        sub, books = k.reshape(1, 2, 40, m, width)[..., part, :], centroids[..., part, :, :]
        distance = ((sub[..., None, :] - books[..., None, :, :]) ** 2).sum(axis=-1)
        np.testing.assert_array_equal(codes[..., part], distance.argmin(axis=-1))
    scores = np.einsum("bhgd,bhsd->bhgs", q[:, :, 7].reshape(1, 2, 2, 4), keys) / 2
    expected = softmax(scores).sum(axis=2)
    np.testing.assert_allclose(approximate_scores(q[:, :, 7], codes, centroids), expected, rtol=1e-5, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), ratio=st.floats(0, 1), sinks=st.integers(0, 6))
def test_keys_that_are_centroids_rank_exactly(seed, ratio, sinks):
    """Eight different keys, eight centroids: the twin ranks by the true products."""
    rng = np.random.default_rng(seed)
    k, v, q = drawn(seed)
    k = rng.normal(size=(1, 2, 8, 4)).astype(np.float32).astype(float)[:, :, np.arange(40) % 8]
    store = pqcache(0, ratio=ratio, sinks=sinks, parts=1, bits=3)
    at = laws.feed(store, (k, v, q), (30, *range(31, 40)))[2]
    at = np.broadcast_to(at, (2, at.shape[-1]))
    near = int(ratio * (30 - sinks)) // 2
    start = 40 - max(near, 1)
    for head in range(2):
        scores = softmax(q[0, 2 * head : 2 * head + 2, 39] @ k[0, head, sinks:start].T / 2).sum(axis=0)
        best = np.sort(sorted(range(len(scores)), key=lambda j: (-round(scores[j], 12), j))[:near]) + sinks
        expected = [*range(sinks), *best, *range(start, 40)] if near < start - sinks else list(range(40))
        assert at[head].tolist() == expected


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 39), unique=True, max_size=5).map(sorted))
def test_exact_where_nothing_is_left_out(seed, cuts):
    laws.budget_of_length_is_no_op(lambda n: pqcache(0, sinks=n, bits=2), drawn(seed), cuts)
    laws.keep_all_equals_dense(lambda: pqcache(0, ratio=2.0, sinks=0, bits=2), drawn(seed), (39,))
    laws.keep_all_equals_dense(lambda: pqcache(0, ratio=0.0, sinks=2, bits=6), drawn(seed), cuts)  # too short for codes


def test_more_bits_and_parts_find_more_of_the_best_tokens():
    """Recall of the 20 best of 200 keys, against brute force, mean over 40 queries."""
    rng = np.random.default_rng(0)
    k, queries = rng.normal(size=(1, 1, 200, 8)), rng.normal(size=(40, 1, 1, 8))
    found = {}
    for m, bits in ((1, 2), (2, 2), (2, 4), (2, 6), (4, 6)):
        centroids = train(k, m, bits, 10, (0, 0))
        codes, hits = encode(k, centroids), 0
        for q in queries:
            near = np.argsort(-approximate_scores(q, codes, centroids)[0, 0], kind="stable")[:20]
            hits += len(set(near) & set(np.argsort(-(k[0, 0] @ q[0, 0]))[:20]))
        found[m, bits] = hits / 800
    order = list(found.values())
    assert order == sorted(order) and order[0] < 0.4 and order[-1] > 0.9


def test_seed_and_layer_decide_the_centroids():
    tokens = drawn(0)
    books = []
    for layer, seed in ((0, 0), (0, 0), (1, 0), (0, 1)):
        store = pqcache(layer, sinks=2, bits=3, seed=seed)
        laws.feed(store, tokens)
        books.append(store.centroids)
    np.testing.assert_array_equal(books[0], books[1])
    assert (books[0] != books[2]).any() and (books[0] != books[3]).any()


def test_bytes_of_codes_and_of_the_device():
    tokens = tuple(x.astype(np.float32) for x in drawn(1, 41))
    store = pqcache(0, ratio=0.5, sinks=4, bits=3)
    laws.feed(store, tokens, (40,))
    token = 2 * 2 * 4 * 4
    codes = 37 * 2 * 1 + 2 * 2 * 8 * 2 * 4  # 6 bits in a byte; 2 heads, 2 parts of 8 centroids of 2 float32
    fetched = 9 * token + 9 * 2 * 8
    assert (store.top, store.near) == (9, 9)
    assert store.nbytes == 41 * token + codes + fetched
    assert store.device_nbytes == (4 + 9) * token + codes + fetched
    assert store.recalled == 9 * token
    again = tokens[2][..., 40:, :]
    store.extend(*(x[..., 40:, :] for x in tokens[:2]), np.array([41]), again)
    assert 9 * token <= store.recalled < 18 * token  # mostly the same tokens


def test_in_a_recipe_stored_loaded_and_with_speculation(tmp_path):
    model = random_model(num_layers=2)
    small = compress(model, "rtn:bits=8,group=16+pqcache:ratio=0.4,sinks=2,bits=3")
    loaded = load(save_native(small, tmp_path / "m"))
    ids = np.arange(40) % 7
    assert list(generate_ids(loaded, ids, 9, stop_ids=())) == list(generate_ids(small, ids, 9, stop_ids=()))
    assert len(list(speculative(small, ids, 20, stop_ids=()))) == 20
    cache = new_cache(small)
    forward(small, ids, cache=cache)
    forward(small, [3], cache=cache)
    assert cache.device_nbytes < cache.nbytes
    with pytest.raises(ValueError, match="pqcache cannot go back from 41 to 20"):
        cache.truncate(20)
    cache.truncate(40)


@pytest.mark.parametrize("knobs", [dict(parts=0), dict(bits=9), dict(iterations=-1), dict(sinks=-1), dict(ratio=-0.5)])
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match="pqcache"):
        pqcache(0, **knobs)


def test_parts_that_do_not_divide():
    with pytest.raises(ValueError, match="parts 3 do not divide the head dimension 4"):
        laws.feed(pqcache(0, parts=3), drawn(0))
