"""minicache: the shared direction against complex and loop twins, what is kept, what two layers store together."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.kernels.rope import Rope, cos_sin, rotate
from refllm.methods.kvcache.minicache import kept, merge, minicache
from refllm.methods.transform import palu
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from tests.models import random_model

IDS = np.random.default_rng(0).integers(0, 64, 50)


def pair_of(tokens=20, D=8, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(2, 1, 2, tokens, D)).astype(dtype)


def slow_direction(a, b, t):
    """One token: the point at the fraction t of the great circle from a to b, in the plane they span."""
    u, w = a / np.linalg.norm(a), b / np.linalg.norm(b)
    across = w - (u @ w) * u
    angle = math.atan2(np.linalg.norm(across), u @ w)
    return math.cos(t * angle) * u + math.sin(t * angle) * across / np.linalg.norm(across)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_directions_equal_the_slow_twin_and_lengths_are_exact(D, t, seed):
    a, b = pair_of(5, D, seed)
    both = merge(a, b, t, gamma=0.0)
    for head in range(2):
        for token in range(5):
            expected = slow_direction(a[0, head, token], b[0, head, token], t)
            np.testing.assert_allclose(both.direction[0, head, token], expected, atol=1e-7)
    for which, x in enumerate((a, b)):
        norms = np.linalg.norm(both.restored(which), axis=-1)
        np.testing.assert_allclose(norms, np.linalg.norm(x, axis=-1), rtol=1e-12)


@pytest.mark.parametrize(("t", "which"), [(0.0, 0), (1.0, 1)])
def test_the_ends_reproduce_one_layer(t, which):
    a, b = pair_of()
    np.testing.assert_allclose(merge(a, b, t, gamma=0.0).restored(which), (a, b)[which], atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_layers_of_one_direction_lose_nothing(factor):
    a, _ = pair_of()
    both = merge(a, factor * a, gamma=0.0)
    np.testing.assert_allclose(both.restored(0), a, atol=1e-12)
    np.testing.assert_allclose(both.restored(1), factor * a, atol=1e-12)


@pytest.mark.parametrize("rule", ["threshold", "top"])
def test_gamma_of_one_loses_nothing(rule):
    for a, b in (pair_of(), pair_of() * 0 + 1.0):
        both = merge(a, b, gamma=1.0, rule=rule)
        np.testing.assert_array_equal(both.restored(0), a)
        np.testing.assert_array_equal(both.restored(1), b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.0], [3.0, 4.0]),
        ([3.0, 4.0], [0.0, 0.0]),
        ([1.0, 0.0], [-2.0, 0.0]),
        ([1.0, 0.0], [-2.0, 1e-9]),
        ([1e-30, 0.0], [0.0, 1e30]),
        ([-0.0, 1.0], [0.0, 1.0]),
    ],
)
@pytest.mark.parametrize("t", [0.5, 0.6])
def test_zeros_and_opposite_directions_are_finite_and_keep_their_length(a, b, t, dtype):
    a, b = (np.array([[x], [[1.0, 1.0]]], dtype) for x in (a, b))  # the second head has nothing to do with it
    both = merge(a, b, t, gamma=0.0)
    both.keep[:] = False
    for which, x in enumerate((a, b)):
        got = np.linalg.norm(both.length[which][..., None] * both.direction.astype(np.float64), axis=-1)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, np.linalg.norm(x.astype(np.float64), axis=-1), rtol=1e-5)


def test_merging_and_rotating_may_be_exchanged():
    a, b = pair_of()
    angles = cos_sin(Rope(100.0), 8, np.arange(20), np.float64)
    before, after = merge(a, b, gamma=0.1), merge(rotate(a, *angles), rotate(b, *angles), gamma=0.1)
    np.testing.assert_array_equal(before.keep, after.keep)
    for which in (0, 1):
        np.testing.assert_allclose(rotate(before.restored(which), *angles), after.restored(which), atol=1e-9)


# What keeps its originals


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1))
def test_the_most_distant_are_kept(delta, gamma):
    delta = np.array(delta)
    for rule in ("threshold", "top"):
        keep = kept(delta, gamma, rule)
        if keep.any() and not keep.all():
            assert delta[keep].min() >= delta[~keep].max()
    assert kept(delta, gamma, "threshold")[delta.argmax()]
    assert kept(delta, gamma, "top").sum() == math.ceil(gamma * len(delta) - 1e-9)
    assert kept(delta, 1.0, "threshold").all()


def test_ties_go_to_the_earlier_token():
    assert kept(np.zeros(4), 0.5, "top").tolist() == [True, True, False, False]


# Two layers


def feed(stores, layers, cuts):
    start = 0
    for stop in cuts:
        out = [
            store.extend(x[..., start:stop, :], 2 * x[..., start:stop, :], np.arange(start, stop))
            for store, x in zip(stores, layers, strict=True)
        ]
        start = stop
    return out


def stores_of(count, **knobs):
    stores = [minicache(layer, **knobs) for layer in range(count)]
    for store in stores:
        store.join(stores)
    return stores


def test_pairs_start_in_the_middle():
    """Card: first = half of the layers, in steps of two; what is left over stays alone."""
    pairs = lambda count, **knobs: sorted({tuple(s.layer for s in x.pair) for x in stores_of(count, **knobs) if x.pair})
    assert pairs(32)[0] == (15, 16) and pairs(32)[-1] == (29, 30) and len(pairs(32)) == 8
    assert pairs(4) == [(1, 2)] and pairs(2) == [(0, 1)] and pairs(1) == []
    assert pairs(6, first=1) == [(0, 1), (2, 3), (4, 5)]


def test_a_call_sees_new_tokens_in_full_and_old_blocks_merged():
    layers, stores = pair_of(20), stores_of(2, block=8, gamma=0.0)
    for (K, V, at), x in zip(feed(stores, layers, (20,)), layers, strict=True):  # nothing is merged before
        np.testing.assert_array_equal(K, x)
        np.testing.assert_array_equal(V, 2 * x)
        assert at.tolist() == list(range(20))
    stores = stores_of(2, block=8, gamma=0.0)
    out = feed(stores, layers, (19, 20))
    for which, (K, V, _) in enumerate(out):
        blocks = [merge(*(x[..., i : i + 8, :] for x in layers), gamma=0.0).restored(which) for i in (0, 8)]
        expected = np.concatenate([*blocks, layers[which][..., 16:, :]], axis=-2)
        np.testing.assert_allclose(K, expected, atol=1e-12)
        np.testing.assert_allclose(V, 2 * expected, atol=1e-12)


@pytest.mark.parametrize("rule", ["threshold", "top"])
def test_bytes_are_half_and_a_little(rule):
    layers, stores = pair_of(64, 32, dtype=np.float32), stores_of(2, block=64, gamma=0.125, rule=rule)
    feed(stores, layers, (64,))
    merged = stores[1].merged[0]
    fraction = merged.keep.mean()
    dense = 2 * 2 * layers[0].nbytes
    places = 2 * np.count_nonzero(merged.keep) * 4
    assert sum(store.nbytes for store in stores) == dense * (1 / 2 + 1 / 32 + fraction) + places
    assert fraction == 0.125 if rule == "top" else 0 < fraction < 0.5


def test_layers_of_different_shapes_are_refused():
    stores = stores_of(2, block=2)
    stores[0].extend(np.ones((1, 1, 2, 4)), np.ones((1, 1, 2, 4)), np.arange(2))
    with pytest.raises(ValueError, match="merges layers of one shape"):
        stores[1].extend(np.ones((1, 1, 2, 6)), np.ones((1, 1, 2, 6)), np.arange(2))


def test_an_interrupted_call_is_taken_up_again():
    """The first layer has seen the new tokens, the second has not; the same call comes again."""
    layers = pair_of(20)
    one, other = stores_of(2, block=8), stores_of(2, block=8)
    for stores in (one, other):
        feed(stores, layers, (12,))
    one[0].extend(layers[0][..., 12:15, :], layers[0][..., 12:15, :], np.arange(12, 15))
    for stores in (one, other):
        for store, x in zip(stores, layers, strict=True):
            store.extend(x[..., 12:, :], 2 * x[..., 12:, :], np.arange(12, 20))
    for a, b in zip(one, other, strict=True):
        for name, part in a.parts().items():
            np.testing.assert_array_equal(part, b.parts()[name])


# In a model


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "deepseek_v3"])
def test_models_run_and_nothing_is_lost_with_gamma_one(architecture):
    model = random_model(architecture, np.float64, num_layers=5)
    policy = lambda layer: minicache(layer, block=8, gamma=1.0)
    cache, logits = new_cache(model, policy), []
    for part in (IDS[:30], IDS[30:31], IDS[31:]):
        logits.append(forward(model, part, cache=cache))
    np.testing.assert_allclose(np.concatenate(logits), forward(model, IDS), atol=1e-9)
    small, dense = new_cache(model, lambda layer: minicache(layer, block=8, gamma=0.0, first=1)), new_cache(model)
    for cache in (small, dense):
        forward(model, IDS, cache=cache)
    assert small.nbytes < 0.85 * dense.nbytes


def test_rolled_back_through_the_cache():
    model = random_model("llama", np.float64, num_layers=4)
    cache = new_cache(model, lambda layer: minicache(layer, block=8))
    forward(model, IDS[:30], cache=cache)
    before = cache.nbytes
    forward(model, IDS[30:31], cache=cache)
    cache.truncate(30)
    assert cache.nbytes == before
    with pytest.raises(ValueError, match="cannot go back from 30 to 10 tokens: 24 are merged; set rollback = 20"):
        cache.truncate(10)


def test_in_a_recipe_with_other_stages():
    model = random_model("llama", np.float32, num_layers=4)
    small = refllm.compress(model, "gqa:kv_heads=1+rtn:bits=8,group=16+minicache:block=8", IDS)
    cache = new_cache(small)
    assert np.isfinite(forward(small, IDS, cache=cache)).all()
    assert cache.stores[2].merged[0].tokens == 48
    even = palu(random_model("llama", np.float32, num_layers=4), IDS, ratio=0.5, search="uniform", block=4)
    cache = new_cache(even, lambda layer: minicache(layer, block=8))
    assert np.isfinite(forward(even, IDS, cache=cache)).all()


@pytest.mark.parametrize("knobs", [dict(t=1.1), dict(gamma=-0.1), dict(block=0), dict(first=0), dict(rule="nearest")])
def test_bad_knobs_are_one_clear_line(knobs):
    with pytest.raises(ValueError, match=r"minicache .* must (be|lie) "):
        minicache(0, **knobs)
