"""kvtuner: fronts, groups and choices against definitions written out, and the search on models."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.formats.files import data_path
from refllm.kernels.nn import log_softmax
from refllm.methods.apply import check, needs_calibration
from refllm.methods.kvcache.kvtuner import (
    PAIRS,
    front,
    kvtuner,
    output_errors,
    pairs_text,
    parse_pairs,
    search,
    search_pairs,
)
from refllm.methods.kvcache.qserve import qserve
from refllm.model.cache import new_cache
from refllm.model.equivalent import divide_keys
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model

errors = st.lists(st.integers(0, 6), min_size=9, max_size=9)
TYPICAL = [[8, 7, 4, 3, 0], [8, 5, 4, 1, 0]]


@settings(max_examples=200, deadline=None)
@given(errors)
def test_no_pair_of_the_front_is_beaten_and_every_other_one_is(error):
    kept = front(np.array(error, float))
    cost = [(sum(pair), e) for pair, e in zip(PAIRS, error, strict=True)]
    beats = lambda a, b: cost[a][0] <= cost[b][0] and cost[a][1] <= cost[b][1] and (cost[a] != cost[b] or a < b)
    for i in range(9):
        assert (i in kept) == (not any(beats(j, i) for j in range(9) if j != i))
    assert [sum(PAIRS[i]) for i in kept] == sorted({sum(PAIRS[i]) for i in kept}, reverse=True)


@settings(max_examples=60, deadline=None)
@given(
    which=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    table=st.lists(st.integers(0, 9), min_size=18, max_size=18),
    bits=st.sampled_from([2.0, 3.0, 4.25, 5.5, 8.0]),
)
def test_the_exhaustive_search_is_the_best_of_all(which, table, bits):
    fronts = [TYPICAL[w] for w in which]
    price = np.array(table).reshape(2, 9)
    loss = lambda pairs: sum(price[i % 2, PAIRS.index(pair)] for i, pair in enumerate(pairs))
    best = None
    for way in product(*fronts):
        if len({(w, i) for w, i in zip(which, way, strict=True)}) > len(set(which)):
            continue  # layers of a group differ
        pairs = [PAIRS[i] for i in way]
        used = sum(map(sum, pairs)) / (2 * len(pairs))
        rank = (loss(pairs), used, pairs)
        if used <= bits and (best is None or rank < best):
            best = rank
    assert search(fronts, loss, bits, trials=1000) == best[2]


@settings(max_examples=60, deadline=None)
@given(table=st.lists(st.integers(0, 9), min_size=18, max_size=18), bits=st.sampled_from([2.0, 3.0, 4.25, 5.5, 8.0]))
def test_the_greedy_search_meets_the_limit_within_the_fronts_and_asks_little(table, bits):
    price, asked = np.sort(np.array(table).reshape(2, 9))[:, ::-1], []

    def loss(pairs):
        asked.append(pairs)
        return sum(price[i, PAIRS.index(pair)] for i, pair in enumerate(pairs))

    found = search(TYPICAL, loss, bits, trials=1)
    assert sum(map(sum, found)) / 4 <= bits and all(PAIRS.index(p) in f for p, f in zip(found, TYPICAL, strict=True))
    assert len(asked) <= 1 + 2 * 8
    if bits == 8:
        assert found == [(8, 8), (8, 8)]


def test_the_greedy_search_by_hand():
    """Group 0 loses 1 for two bits, group 1 loses 2 for four: equal a bit, so the one that leaves fewer bits."""
    fronts = [[8, 7], [8, 4]]
    loss = lambda pairs: {(8, 8): 0, (8, 4): 2}[pairs[0]] + {(8, 8): 0, (4, 4): 4}[pairs[1]]
    assert search(fronts, loss, 7.5, trials=1) == [(8, 8), (4, 4)]
    assert search(fronts, loss, 7.5, trials=4) == [(8, 4), (8, 8)]  # all four ways: the least loss


def test_layers_with_the_same_front_take_the_same_pair_and_layers_can_be_permuted():
    fronts = [TYPICAL[i] for i in (0, 1, 0, 1, 1)]
    price = {pair: 1 / sum(pair) for pair in PAIRS}
    loss = lambda pairs: sum(price[pair] * (1 + (i == 0)) for i, pair in enumerate(pairs))
    found = search(fronts, loss, 4.0, trials=100)
    assert found[0] == found[2] and found[1] == found[3] == found[4]
    back = search(fronts[::-1], lambda pairs: loss(pairs[::-1]), 4.0, trials=100)
    assert back == found[::-1]


def test_a_limit_that_cannot_be_met_is_said():
    with pytest.raises(ValueError, match="cannot reach 3 bits: the smallest pairs of the fronts need 4"):
        search([[8, 4]], lambda pairs: 0, 3, 100)


@pytest.fixture(scope="module")
def tiny():
    model = refllm.load("tiny")
    return model, np.array(model.tokenizer.encode(data_path("tiny/eval.txt").read_text(encoding="utf-8"))[:200])


def test_errors_of_outputs_against_attention_through_a_cache(tiny):
    """One layer's output with coded keys and values, computed the long way."""
    model, ids = tiny
    found = output_errors(model, ids)
    assert found.shape == (4, 9)
    # more bits on both sides err less
    for i, (k, v) in enumerate(PAIRS):
        for j, (more_k, more_v) in enumerate(PAIRS):
            if more_k >= 2 * k and more_v >= 2 * v:
                assert (found[:, j] < found[:, i]).all()
    assert (found[:, PAIRS.index((8, 8))] < 0.02).all()


def test_keys_with_loud_channels_need_more_bits_than_values(tiny):
    """As in large models; this one, as it is, has even keys, and its values need more."""
    model, ids = tiny
    K4V2, K2V4 = PAIRS.index((4, 2)), PAIRS.index((2, 4))
    assert (output_errors(model, ids)[:, K4V2] > output_errors(model, ids)[:, K2V4]).all()
    weights = dict(model.weights)
    factors = np.ones((model.config.num_kv_heads, model.config.head_dim // 2))
    factors[:, [3, 11]] = 0.02  # keys of these pairs of channels become 50 times as loud, queries as quiet
    for layer in range(model.config.num_layers):
        divide_keys(weights, model.config, layer, factors)
    found = output_errors(replace(model, weights=weights), ids)
    assert (found[:, K4V2] < found[:, K2V4]).all()


def kl(model, ids, policy):
    half = len(ids) // 2
    cache = new_cache(model, policy)
    forward(model, ids[:half], cache=cache)
    exact, got = log_softmax(forward(model, ids)[half:]), log_softmax(forward(model, ids[half:], cache=cache))
    return float((np.exp(exact) * (exact - got)).sum(axis=-1).mean())


def test_eight_bits_everywhere_are_as_good_as_no_rounding(tiny):
    model, ids = tiny
    assert kl(model, ids, lambda layer: kvtuner(layer, pairs="8.8")) < 1e-3


def test_the_error_of_outputs_is_not_the_loss_of_predictions(tiny):
    """On this model fronts hold (2, 4) and not (4, 2), which moves the predictions less."""
    model, ids = tiny
    assert all(PAIRS.index((4, 2)) not in front(e) for e in output_errors(model, ids))
    assert 2 * kl(model, ids, lambda layer: kvtuner(layer, pairs="4.2")) < kl(
        model, ids, lambda layer: kvtuner(layer, pairs="2.4")
    )


def test_mixed_pairs_beat_equal_ones_of_as_many_bits(tiny):
    model, ids = tiny
    pairs = search_pairs(model, ids, bits=3.0, trials=12)
    assert sum(map(sum, pairs)) / 8 <= 3.0
    mixed = kl(model, ids, lambda layer: kvtuner(layer, pairs=pairs_text(pairs)))
    assert mixed <= kl(model, ids, lambda layer: qserve(layer, bits=2))
    assert search_pairs(model, ids, bits=3.0, trials=12) == pairs


def test_what_is_searched_is_stored_and_not_searched_again(tmp_path, monkeypatch):
    model = random_model("llama")
    ids = np.random.default_rng(0).integers(0, 64, 40)
    assert needs_calibration("kvtuner") and not needs_calibration("kvtuner:pairs=4.4")
    with pytest.raises(ValueError, match="kvtuner needs calibration tokens"):
        refllm.compress(model, "kvtuner")
    check(model, "kvtuner:bits=3", ids)
    small = refllm.compress(model, "rtn:bits=8,group=8+kvtuner:bits=3.5", ids)
    assert ",pairs=" in small.recipe and "search" not in small.recipe
    save_native(small, tmp_path / "m")
    monkeypatch.setitem(kvtuner.prepare.__globals__, "search_pairs", None)
    caches = [new_cache(m) for m in (small, refllm.load(tmp_path / "m"))]
    logits = [forward(m, ids, cache=c) for m, c in zip((small, refllm.load(tmp_path / "m")), caches, strict=True)]
    np.testing.assert_array_equal(*logits)
    pairs = parse_pairs(small.recipe.partition("pairs=")[2])
    assert caches[0].nbytes == sum(2 * 40 * (bits + 4) for pair in pairs for bits in pair)  # 8 channels: a byte a bit


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(), "needs pairs of bits"),
        (dict(pairs="8"), "K.V of every layer joined by /, such as 8.4/4.2, got '8'"),
        (dict(pairs="8.x"), "K.V of every layer"),
        (dict(pairs="9.4"), "kvtuner bits must be 2 to 8, got 9"),
        (dict(pairs="4.4/4.4/4.4"), "pairs of 3 layers, but there is a layer 3"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        kvtuner(3, **knobs)


@pytest.mark.parametrize("knobs", [dict(bits=1.5), dict(trials=0)])
def test_bad_limits(knobs):
    with pytest.raises(ValueError, match="bits must be 2 to 8 and trials 1 or more"):
        kvtuner.prepare(None, **knobs)
    with pytest.raises(ValueError, match="two calibration tokens or more, got 1"):
        search_pairs(random_model(), [1])
