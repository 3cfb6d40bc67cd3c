"""refllm.kernels.attention against loops over heads, queries and keys, and the masks by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.attention import attend, visible
from tests.twins import slow_attend


def qkv(heads=4, kv_heads=2, queries=6, keys=6, dim=5, v_dim=None, seed=0, dtype=np.float64, batch=()):
    rng = np.random.default_rng(seed)
    shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, v_dim or dim)
    return [rng.normal(size=(*batch, *shape)).astype(dtype) for shape in shapes]


@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    seen=st.integers(0, 5),
    queries=st.integers(1, 6),
    window=st.none() | st.integers(1, 8),
    softcap=st.none() | st.just(2.0),
    seed=st.integers(0, 2**31),
)
def test_equals_loops(kv_heads, group, seen, queries, window, softcap, seed):
    """Any grouping, prefill or continuation (bottom-right causal mask), window, soft-cap, value width of its own."""
    q, k, v = qkv(kv_heads * group, kv_heads, queries, seen + queries, v_dim=3, seed=seed)
    q_positions, k_positions = np.arange(seen, seen + queries), np.arange(seen + queries)
    options = dict(scale=0.7, window=window, softcap=softcap)
    out = attend(q, k, v, q_positions, k_positions, **options)
    np.testing.assert_allclose(out, slow_attend(q, k, v, q_positions, k_positions, **options), atol=1e-13)


def test_window_counts_the_query_itself():
    np.testing.assert_array_equal(visible(np.arange(5), np.arange(5), window=3).sum(axis=1), [1, 2, 3, 3, 3])
    np.testing.assert_array_equal(visible(np.array([7]), np.arange(10), window=3)[0].nonzero()[0], [5, 6, 7])
    np.testing.assert_array_equal(visible(np.arange(4), np.arange(4), window=1), np.eye(4, dtype=bool))


def test_mask_without_a_window_is_the_lower_triangle():
    np.testing.assert_array_equal(visible(np.arange(4), np.arange(4)), np.tri(4, dtype=bool))
    np.testing.assert_array_equal(visible(np.arange(2, 4), np.arange(4)), np.tri(4, dtype=bool)[2:])  # bottom right


@pytest.mark.parametrize("window", [6, 7, 100])
def test_window_of_all_tokens_equals_full(window):
    q, k, v = qkv()
    p = np.arange(6)
    np.testing.assert_array_equal(attend(q, k, v, p, p, scale=1.0, window=window), attend(q, k, v, p, p, scale=1.0))
    assert np.abs(attend(q, k, v, p, p, scale=1.0, window=5) - attend(q, k, v, p, p, scale=1.0)).max() > 1e-3


def test_keys_outside_the_window_can_be_thrown_away():
    """A rolling buffer of W keys gives what the mask over all keys gives."""
    q, k, v = qkv(queries=1, keys=9)
    full = attend(q, k, v, np.array([8]), np.arange(9), scale=0.4, window=4)
    rolling = attend(q, k[:, 5:], v[:, 5:], np.array([8]), np.arange(5, 9), scale=0.4)
    np.testing.assert_allclose(rolling, full, atol=1e-15)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_equals_multi_head_with_repeated_keys(kv_heads):
    q, k, v = qkv(heads=4, kv_heads=kv_heads)
    p = np.arange(6)
    repeated = [np.repeat(x, 4 // kv_heads, axis=0) for x in (k, v)]
    np.testing.assert_allclose(attend(q, k, v, p, p, scale=0.4), attend(q, *repeated, p, p, scale=0.4), atol=1e-14)
    if kv_heads > 1:  # the classic mistake: tile instead of repeat
        tiled = [np.tile(x, (2, 1, 1)) for x in (k, v)]
        assert np.abs(attend(q, *tiled, p, p, scale=0.4) - attend(q, k, v, p, p, scale=0.4)).max() > 0.1


def test_order_of_keys_does_not_matter_when_positions_follow():
    q, k, v = qkv()
    order = np.random.default_rng(3).permutation(6)
    shuffled = attend(q, k[:, order], v[:, order], np.arange(6), order, scale=0.4, window=3)
    np.testing.assert_allclose(shuffled, attend(q, k, v, np.arange(6), np.arange(6), scale=0.4, window=3), atol=1e-14)


def test_each_head_may_keep_other_tokens():
    q, k, v = qkv(queries=1, keys=8)
    kept = np.array([[0, 3, 7], [1, 2, 7]])
    taken = [np.take_along_axis(x, kept[..., None], axis=1) for x in (k, v)]
    out = attend(q, *taken, np.array([7]), kept, scale=0.4, window=5)
    for head in range(2):  # one at a time with one-dimensional positions
        group = slice(2 * head, 2 * head + 2)
        alone = attend(q[group], taken[0][[head]], taken[1][[head]], np.array([7]), kept[head], scale=0.4, window=5)
        np.testing.assert_allclose(out[group], alone, atol=1e-15)


def test_a_query_that_sees_no_key_gives_zeros():
    q, k, v = qkv(queries=2, keys=3)
    out = attend(q, k, v, np.array([0, 5]), np.array([3, 4, 5]), scale=1.0)
    np.testing.assert_array_equal(out[:, 0], 0)
    assert np.all(out[:, 1] != 0)


def test_one_visible_key_returns_its_value():
    q, k, v = qkv()
    p = np.arange(6)
    np.testing.assert_allclose(attend(q, k, v, p, p, scale=1.0)[:, 0], np.repeat(v[:, 0], 2, axis=0), rtol=1e-15)


def test_softcap_bounds_scores_before_the_mask():
    q, k, v = (np.ones((1, 2, 1)), np.array([[[100.0], [-100.0]]]), np.array([[[1.0], [0.0]]]))
    out = attend(q, k, v, np.arange(2), np.arange(2), scale=1.0, softcap=0.5)
    # query 1: capped scores +-0.5, so the first value has weight 1 / (1 + e^-1); query 0 sees key 0 only
    np.testing.assert_allclose(out[0, :, 0], [1, 1 / (1 + np.exp(-1))], rtol=1e-14)


def test_huge_scores_do_not_overflow():
    q, k, v = qkv(dtype=np.float32)
    p = np.arange(6)
    out = attend(q * np.float32(1e4), k * np.float32(1e4), v, p, p, scale=1.0)
    assert out.dtype == np.float32 and np.isfinite(out).all()


def test_batch_dimensions_are_independent():
    q, k, v = qkv(batch=(2, 3))
    p = np.arange(6)
    out = attend(q, k, v, p, p, scale=0.4)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(out[i, j], attend(q[i, j], k[i, j], v[i, j], p, p, scale=0.4), atol=1e-15)


def test_read_only_strided_float32_input():
    q, k, v = (x.swapaxes(0, 1).copy().swapaxes(0, 1) for x in qkv(dtype=np.float32))
    for x in (q, k, v):
        x.flags.writeable = False
    p = np.arange(6)
    out = attend(q, k, v, p, p, scale=0.4, window=3, softcap=5.0)
    assert out.dtype == np.float32
    exact = slow_attend(q, k, v, p, p, scale=0.4, window=3, softcap=5.0)
    np.testing.assert_allclose(out, exact, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (2, 4)])
def test_heads_that_do_not_divide_are_refused(heads, kv_heads):
    q, k, v = qkv(heads, kv_heads)
    with pytest.raises(ValueError, match=f"{heads} query heads cannot share {kv_heads} key-value heads"):
        attend(q, k, v, np.arange(6), np.arange(6), scale=1.0)
