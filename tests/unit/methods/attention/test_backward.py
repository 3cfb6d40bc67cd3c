"""Gradients of tiled attention against finite differences of attention written key by key, and their tiles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.online_softmax import Traffic
from refllm.methods.attention.backward import backward
from refllm.methods.attention.flash import flash_with_lse
from tests.twins import slow_attend


def example(seed, queries=3, keys=5, heads=4, kv_heads=2):
    rng = np.random.default_rng(seed)
    shapes = ((heads, queries, 4), (kv_heads, keys, 4), (kv_heads, keys, 3), (heads, queries, 3))
    return [rng.normal(size=shape) for shape in shapes]


def gradients(q, k, v, d_o, at, rule, **tiling):
    o, lse = flash_with_lse(q, k, v, *at, **rule)
    return backward(q, k, v, o, lse, d_o, *at, **rule, **tiling)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_finite_differences(window, softcap):
    """Central differences, h = 1e-5: their own error is h^2 of the third derivative and eps / h, below 1e-8 here."""
    q, k, v, d_o = example(1)
    at, rule = (np.array([0, 3, 4]), np.arange(1, 6)), dict(scale=0.7, window=window, softcap=softcap)
    loss = lambda *arrays: (slow_attend(*arrays, *at, **rule) * d_o).sum()
    for which, got in enumerate(gradients(q, k, v, d_o, at, rule, block_q=2, block_k=2)):
        for place in np.ndindex(got.shape):
            sides = []
            for h in (1e-5, -1e-5):
                arrays = [x.copy() for x in (q, k, v)]
                arrays[which][place] += h
                sides.append(loss(*arrays))
            assert got[place] == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 7),
    past=st.integers(0, 6),
    block_q=st.integers(1, 9),
    block_k=st.integers(1, 14),
    window=st.none() | st.integers(1, 9),
)
def test_tile_sizes_do_not_matter(seed, queries, past, block_q, block_k, window):
    q, k, v, d_o = example(seed, queries, queries + past)
    at, rule = (np.arange(past, past + queries), np.arange(past + queries)), dict(scale=0.5, window=window)
    whole = gradients(q, k, v, d_o, at, rule, block_q=99, block_k=99)
    for one, other in zip(gradients(q, k, v, d_o, at, rule, block_q=block_q, block_k=block_k), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_shared_keys_add_up_the_gradients_of_their_heads():
    q, k, v, d_o = example(2)
    at, rule = (np.arange(2, 5), np.arange(5)), dict(scale=0.5)
    dq, dk, dv = gradients(q, k, v, d_o, at, rule)
    wide = gradients(q, np.repeat(k, 2, axis=0), np.repeat(v, 2, axis=0), d_o, at, rule)
    np.testing.assert_allclose(dq, wide[0], rtol=1e-12)
    for grouped, each in ((dk, wide[1]), (dv, wide[2])):
        np.testing.assert_allclose(grouped, each.reshape(2, 2, *each.shape[1:]).sum(axis=1), rtol=1e-12)


def test_a_query_that_sees_nothing_has_no_gradient_and_float32_stays():
    q, k, v, d_o = (x.astype(np.float32) for x in example(3))
    dq, dk, dv = gradients(q, k, v, d_o, (np.array([0, 4, 5]), np.arange(1, 6)), dict(scale=0.5))
    assert not dq[:, 0].any() and dq[:, 1].any() and {dq.dtype, dk.dtype, dv.dtype} == {np.dtype(np.float32)}
    assert np.isfinite(dk).all() and np.isfinite(dv).all()


def test_traffic_falls_with_the_tiles():
    """Every query sees every key: q, dq, dO, LSE and delta go past once for each key tile."""
    q, k, v, d_o = example(4, 8, 8, 1, 1)
    at, counts = (np.full(8, 8), np.arange(8)), {}
    for block_k in (2, 4):
        counts[block_k] = Traffic()
        gradients(q, k, v, d_o, at, dict(scale=0.5), block_q=4, block_k=block_k, traffic=counts[block_k])
        per_key_tile = 8 * (4 + 4 + 3 + 2)
        assert counts[block_k].reads == 2 * 8 * 3 + 8 * (4 + 3) + 8 // block_k * per_key_tile
        assert counts[block_k].writes == 8 * (4 + 3) + 8 // block_k * 8 * 4
    assert counts[2].tiles == 2 * counts[4].tiles == 8 and counts[2].skipped == 0
