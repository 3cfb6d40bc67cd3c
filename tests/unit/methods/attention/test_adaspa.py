"""adaspa: masses sum to the number of queries, the mean sparsity stays, kept blocks beat random ones."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.attention import attend
from refllm.kernels.online_softmax import walk_tiles
from refllm.kernels.sparse_attention import keep_best, sparse_attend, visible_blocks
from refllm.methods.attention.adaspa import adaspa, block_mask, block_mass, head_sparsities, schedule, text_blocks


def example(seed=0, n=48, heads=4, kv_heads=2, sharp=2.0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(h, n, 8)) for h in (heads, kv_heads, kv_heads))
    return sharp * q, k, v, (np.full(n, n), np.arange(n))


def masses(q, k, v, at, block=8, **rule):
    lse = walk_tiles(q, k, v, *at, scale=0.5, **rule)[1]
    return block_mass(q, k, lse, *at, scale=0.5, block=block, **rule)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), block=st.integers(1, 12), window=st.none() | st.integers(1, 9))
def test_a_block_row_has_the_mass_of_its_queries(seed, n, block, window):
    q, k, v, _ = example(seed, n)
    at = np.arange(n), np.arange(n)
    W = masses(q, k, v, at, block, window=window)
    sizes = [min(block, n - start) for start in range(0, n, block)]
    np.testing.assert_allclose(W.sum(axis=-1), np.broadcast_to(sizes, W.shape[:-1]), rtol=1e-10)
    assert not W[:, ~visible_blocks(*at, window, block, block)].any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), heads=st.integers(1, 9), sparsity=st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.8, 0.95]))
def test_mean_sparsity_is_unchanged(seed, heads, sparsity):
    W = np.random.default_rng(seed).random((heads, 3, 10)) ** 8
    each = head_sparsities(W, np.ones(W.shape, bool), sparsity)
    assert each.mean() == pytest.approx(sparsity) and (each >= -1e-12).all() and (each < 1).all()


def test_concentrated_heads_give_more():
    W = np.full((4, 2, 10), 0.1)
    W[0, :, 0] = W[2, :, 3] = 50
    W[2, :, 4] = 5
    each = head_sparsities(W, np.ones(W.shape, bool), 0.8)
    assert each.tolist() == pytest.approx([0.9, 0.7, 0.9, 0.7])
    kept = block_mask(W, np.ones(W.shape, bool), 0.8)
    assert kept.sum(axis=-1).tolist() == [[1, 1], [3, 3], [1, 1], [3, 3]]
    assert block_mask(W, np.ones(W.shape, bool), 0.8, adaptive=False).sum(axis=-1).tolist() == [[2, 2]] * 4


def test_at_most_half_of_the_heads_give_more():
    """All five heads are concentrated: two may take more, two less, or the mean would change."""
    W = np.full((5, 1, 10), 0.1)
    W[..., 0] = 100 + np.arange(5)[:, None]
    assert head_sparsities(W, np.ones(W.shape, bool), 0.8).tolist() == pytest.approx([0.7, 0.7, 0.8, 0.9, 0.9])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), causal=st.booleans(), block=st.integers(2, 12))
def test_sparsity_0_is_dense(seed, causal, block):
    q, k, v, at = example(seed)
    at = (at[1], at[1]) if causal else at
    np.testing.assert_allclose(
        adaspa(q, k, v, *at, scale=0.5, sparsity=0.0, block=block),
        attend(q, k, v, *at, scale=0.5),
        rtol=1e-10,
        atol=1e-12,
    )


def test_the_order_of_queries_inside_a_block_does_not_matter():
    q, k, v, at = example(3)
    order = np.arange(48)
    order[8:16] = order[8:16][::-1]
    np.testing.assert_allclose(masses(q[:, order], k, v, at), masses(q, k, v, at), rtol=1e-10)


def test_recall_rises_with_what_is_kept_and_kept_beats_random():
    q, k, v, at = example(1, 96, sharp=4.0)
    W, exact = masses(q, k, v, at), attend(q, k, v, *at, scale=0.5)
    every = np.ones(W.shape, bool)
    recalls = [np.where(keep_best(W, np.array(n), every), W, 0).sum() / W.sum() for n in range(1, 13)]
    assert all(b >= a for a, b in pairwise(recalls)) and recalls[-1] == pytest.approx(1)
    rng = np.random.default_rng(0)
    chance = keep_best(rng.random(W.shape), np.array(3), every)
    run = lambda mask: sparse_attend(q, k, v, *at, mask, scale=0.5, block_q=8, block_k=8)[0]
    error = lambda o: np.linalg.norm(o - exact)
    assert error(run(keep_best(W, np.array(3), every))) < 0.8 * error(run(chance))


def test_masses_with_an_old_lse_rank_the_same_where_the_drift_is_even():
    q, k, v, at = example(2)
    old = walk_tiles(q, k, v, *at, scale=0.5)[1]
    drift = np.repeat(np.random.default_rng(0).normal(size=(4, 6)), 8, axis=1)  # the same for all queries of a block
    exact = block_mass(q, k, old, *at, scale=0.5, block=8)
    stale = block_mass(q, k, old + drift, *at, scale=0.5, block=8)
    every = np.ones(exact.shape, bool)
    np.testing.assert_array_equal(
        block_mask(stale, every, 0.5, adaptive=False), block_mask(exact, every, 0.5, adaptive=False)
    )


def test_text_is_kept_whole():
    assert text_blocks(10, 10, 3, 4).tolist() == [[False, True, True], [True] * 3, [True] * 3]
    assert not text_blocks(10, 10, 0, 4).any()
    q, k, v, at = example(0)
    got, exact = adaspa(q, k, v, *at, scale=0.5, sparsity=0.9, block=8, text=8), attend(q, k, v, *at, scale=0.5)
    np.testing.assert_allclose(got[:, 40:], exact[:, 40:], rtol=1e-10)
    assert not np.allclose(got[:, :40], exact[:, :40])


def test_schedule_and_refusals():
    assert [schedule(s) for s in range(50)].count("reuse") == 38 and schedule(9) == "dense"
    q, k, v, at = example()
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1.0"):
        adaspa(q, k, v, *at, scale=0.5, sparsity=1.0)
    with pytest.raises(ValueError, match="text must lie between 0 and the 48 tokens, got 49"):
        adaspa(q, k, v, *at, scale=0.5, text=49)
