"""The block-sparse primitive against a softmax over exactly the kept keys, the work it counts, and its mask helpers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.attention import attend, visible
from refllm.kernels.online_softmax import Traffic
from refllm.kernels.sparse_attention import (
    block_scores,
    blocks_of,
    keep_best,
    pooled,
    sparse_attend,
    visible_blocks,
)


def example(seed, queries, keys, lead=()):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(*lead, heads, n, 4)) for heads, n in ((4, queries), (2, keys), (2, keys))]


def slow(q, k, v, kept, scale, softcap=None):
    """Key by key over kept (H, T, S)."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for h, t in np.ndindex(*q.shape[:2]):
        total = np.zeros(q.shape[-1] + 1)
        for s in np.flatnonzero(kept[h, t]):
            score = scale * (q[h, t] @ k[h // 2, s])
            score = score if softcap is None else softcap * np.tanh(score / softcap)
            total += np.exp(score) * np.append(v[h // 2, s], 1)
        if total[-1]:
            out[h, t], lse[h, t] = total[:-1] / total[-1], np.log(total[-1])
    return out, lse


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 9),
    past=st.integers(0, 6),
    block_q=st.integers(1, 6),
    block_k=st.integers(1, 6),
    window=st.none() | st.integers(1, 9),
    softcap=st.none() | st.just(1.5),
    more=st.sampled_from(["", "columns", "tokens"]),
)
def test_softmax_over_the_kept_keys(seed, queries, past, block_q, block_k, window, softcap, more):
    q, k, v = example(seed, queries, queries + past)
    rng, keys = np.random.default_rng(seed), queries + past
    blocks = rng.random((4, -(-queries // block_q), -(-keys // block_k))) < 0.5
    at = np.arange(past, keys), np.arange(keys)
    wide = np.repeat(np.repeat(blocks, block_q, axis=1)[:, :queries], block_k, axis=2)[..., :keys]
    extra = {}
    if more == "columns":
        extra["columns"] = rng.random((4, keys)) < 0.3
        wide = wide | extra["columns"][:, None]
    elif more == "tokens":
        extra["tokens"] = rng.random((4, queries, keys)) < 0.6
        wide = wide & extra["tokens"]
    got = sparse_attend(
        q, k, v, *at, blocks, scale=0.6, window=window, softcap=softcap, block_q=block_q, block_k=block_k, **extra
    )
    for one, other in zip(got, slow(q, k, v, wide & visible(*at, window), 0.6, softcap), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), block=st.integers(1, 9), window=st.none() | st.integers(1, 9))
def test_all_blocks_kept_is_dense(seed, block, window):
    q, k, v = example(seed, 6, 8, lead=(2,))
    at = np.arange(2, 8), np.arange(8)
    blocks = np.ones((2, 4, -(-6 // block), -(-8 // block)), bool)
    got = sparse_attend(q, k, v, *at, blocks, scale=0.5, window=window, block_q=block, block_k=block)[0]
    np.testing.assert_allclose(got, attend(q, k, v, *at, scale=0.5, window=window), rtol=1e-12, atol=1e-12)


def test_what_is_skipped_is_not_read():
    q, k, v = example(0, 8, 8)
    k[:, 2:4], v[:, 2:4] = np.nan, np.nan  # would show
    at, blocks, traffic = (np.full(8, 8), np.arange(8)), np.ones((4, 4, 4), bool), Traffic()
    blocks[..., 1] = False
    o, _ = sparse_attend(q, k, v, *at, blocks, scale=0.5, block_q=2, block_k=2, traffic=traffic)
    assert np.isfinite(o).all()
    assert (traffic.tiles, traffic.skipped) == (4 * 4 * 3, 4 * 4) and traffic.reads == 4 * 4 * 6 * 8


def test_a_mask_of_another_shape():
    q, k, v = example(0, 4, 4)
    with pytest.raises(ValueError, match=r"shape \(4, 2, 2\), got \(4, 1, 2\)"):
        sparse_attend(q, k, v, np.arange(4), np.arange(4), np.ones((4, 1, 2), bool), scale=1.0, block_q=2, block_k=2)


def test_blocks_means_and_best():
    tokens = np.zeros((5, 7), bool)
    tokens[4, 3] = True
    assert blocks_of(tokens, 2, 3).tolist() == [[False] * 3, [False] * 3, [False, True, False]]
    at = np.arange(5)
    assert visible_blocks(at, at, None, 2, 2).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert visible_blocks(at, at, 1, 2, 2).tolist() == np.eye(3, dtype=bool).tolist()
    assert pooled(np.array([[1.0], [3.0], [8.0]]), 2).tolist() == [[2.0], [8.0]]
    best = keep_best(
        np.array([[2.0, 2, 5, 9], [0, 0, 0, 0]]), np.array([2, 1]), np.array([[1, 1, 1, 0], [0, 0, 0, 0]]) > 0
    )
    assert best.tolist() == [[True, False, True, False], [False] * 4]


def test_scores_of_blocks_sum_to_one_over_the_allowed():
    q, k, _ = example(1, 6, 6)
    allowed = np.tril(np.ones((3, 3), bool))
    scores = block_scores(q, k, allowed, 0.5, 2, 2)
    np.testing.assert_allclose(scores.sum(axis=-1), 1, rtol=1e-12)
    assert not scores[:, ~allowed].any()
