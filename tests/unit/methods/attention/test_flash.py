"""flash and flash_v1 against attention written key by key, and the traffic they count against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.attention import attend
from refllm.methods.attention.flash import (
    Traffic,
    empty_state,
    finish,
    flash,
    flash_v1,
    flash_v1_with_lse,
    flash_with_lse,
    fold,
    merge,
    standard_traffic,
)
from tests.twins import slow_attend


def random_qkv(queries, keys, *, heads=4, kv_heads=2, dim=6, value_dim=5, lead=(), seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim))
    return [rng.normal(size=(*lead, *shape)).astype(dtype) for shape in shapes]


def slow_lse(q, k, q_positions, k_positions, scale, window=None, softcap=None):
    out = np.full(q.shape[:-1], -np.inf)
    for h, t in np.ndindex(*q.shape[:-1]):
        kv = h // (q.shape[0] // k.shape[0])
        for s in range(k.shape[1]):
            distance = q_positions[t] - k_positions[s]
            if distance >= 0 and (window is None or distance < window):
                score = scale * (q[h, t] @ k[kv, s])
                score = score if softcap is None else softcap * np.tanh(score / softcap)
                out[h, t] = np.logaddexp(out[h, t], score)
    return out


# --- the state -------------------------------------------------------------------------------------------------------


def state_of(scores, v):
    return fold(empty_state(scores.shape[:-1], v.shape[-1], scores.dtype), scores, v)


def assert_same_state(one, other):
    """Equal outputs and LSE: (m, l, O) itself may be scaled differently."""
    for a, b in zip(finish(one), finish(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), keys=st.integers(1, 20), spread=st.sampled_from([1.0, 30.0, 1e4]))
def test_any_split_and_order_of_keys_gives_the_same(data, keys, spread):
    rng = np.random.default_rng(keys)
    scores, v = rng.normal(size=(3, keys)) * spread, rng.normal(size=(keys, 4))
    scores[:, rng.random(keys) < 0.3] = -np.inf
    order = np.array(data.draw(st.permutations(range(keys))))
    cuts = sorted(data.draw(st.sets(st.integers(0, keys), max_size=5)))
    blocks = np.split(order, cuts)  # some of them empty
    states = [state_of(scores[:, b], v[b]) if b.size else empty_state((3,), 4, np.float64) for b in blocks]
    whole = state_of(scores, v)
    folded = merged = merged_back = empty_state((3,), 4, np.float64)
    for block, state in zip(blocks, states, strict=True):
        if block.size:
            folded = fold(folded, scores[:, block], v[block])
        merged = merge(merged, state)
        merged_back = merge(state, merged_back)
    for other in (folded, merged, merged_back):
        assert_same_state(other, whole)


def test_merge_is_associative_and_commutative():
    rng = np.random.default_rng(0)
    a, b, c = (state_of(rng.normal(size=(3, n)) * 10, rng.normal(size=(n, 2))) for n in (1, 4, 7))
    assert_same_state(merge(merge(a, b), c), merge(a, merge(b, c)))
    for one, other in zip(merge(a, b), merge(b, a), strict=True):
        np.testing.assert_array_equal(one, other)
    nothing = empty_state((3,), 2, np.float64)
    for one, other in zip(merge(a, nothing), a, strict=True):
        np.testing.assert_array_equal(one, other)


def test_states_follow_the_normalised_merge():
    """LSE = logaddexp(L1, L2), o = sum e^(L_i - LSE) o_i: what merging finished results would give."""
    rng = np.random.default_rng(1)
    states = [state_of(rng.normal(size=(3, 5)), rng.normal(size=(5, 2))) for _ in range(2)]
    (o1, l1), (o2, l2) = (finish(s) for s in states)
    o, lse = finish(merge(*states))
    np.testing.assert_allclose(lse, np.logaddexp(l1, l2), rtol=1e-13)
    np.testing.assert_allclose(o, np.exp(l1 - lse)[:, None] * o1 + np.exp(l2 - lse)[:, None] * o2, rtol=1e-12)


@pytest.mark.parametrize("shift", [-1e4, -3.0, 1e4])
def test_shifted_scores_shift_the_lse_only(shift):
    rng = np.random.default_rng(2)
    scores, v = rng.normal(size=(3, 6)), rng.normal(size=(6, 2))
    o, lse = finish(state_of(scores, v))
    shifted_o, shifted_lse = finish(state_of(scores + shift, v))
    np.testing.assert_allclose(shifted_o, o, rtol=1e-10)
    np.testing.assert_allclose(shifted_lse, lse + shift, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_without_keys_and_huge_scores(dtype):
    scores = np.array([[-np.inf, -np.inf], [1e4, -1e4], [-1e4, -np.inf]], dtype)
    v = np.array([[1.0], [2.0]], dtype)
    o, lse = finish(fold(state_of(scores, v), scores[:, ::-1], v[::-1]))
    assert o.dtype == lse.dtype == dtype
    assert o[:, 0].tolist() == [0.0, 1.0, 1.0]
    np.testing.assert_allclose(lse, [-np.inf, 1e4 + np.log(2), -1e4 + np.log(2)], rtol=1e-7)


# --- the whole -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 9),
    past=st.integers(0, 9),
    block_q=st.integers(1, 12),
    block_k=st.integers(1, 20),
    sram=st.integers(1, 400),
    window=st.none() | st.integers(1, 20),
    softcap=st.none() | st.sampled_from([1.0, 20.0]),
    group=st.sampled_from([1, 2, 4]),
)
def test_any_tiles_equal_the_slow_twin(queries, past, block_q, block_k, sram, window, softcap, group):
    keys = queries + past
    q, k, v = random_qkv(queries, keys, kv_heads=4 // group, seed=keys)
    at = np.arange(past, keys), np.arange(keys)
    rule = dict(scale=0.7, window=window, softcap=softcap)
    expected = slow_attend(q, k, v, *at, **rule)
    lse = slow_lse(q, k, *at, **rule)
    for got in (
        flash_with_lse(q, k, v, *at, **rule, block_q=block_q, block_k=block_k),
        flash_v1_with_lse(q, k, v, *at, **rule, sram=sram),
    ):
        np.testing.assert_allclose(got[0], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got[1], lse, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.none() | st.integers(1, 12), block=st.integers(1, 8))
def test_positions_in_any_order_and_per_head(seed, window, block):
    """What a cache that evicts leaves: other, unordered positions in each key-value head; some queries see nothing."""
    rng = np.random.default_rng(seed)
    q, k, v = random_qkv(5, 7, lead=(2,), seed=seed)
    q_at = rng.permutation(20)[:5]
    k_at = np.stack([rng.permutation(20)[:7] for _ in range(2)])
    rule = dict(scale=0.4, window=window)
    expected = np.zeros((2, 4, 5, 5))
    for b in range(2):
        for kv in range(2):
            heads = slice(2 * kv, 2 * kv + 2)
            expected[b, heads] = slow_attend(q[b, heads], k[b, kv : kv + 1], v[b, kv : kv + 1], q_at, k_at[kv], **rule)
    tiled = flash(q, k, v, q_at, k_at, **rule, block_q=block, block_k=block)
    np.testing.assert_allclose(tiled, expected, atol=1e-12)
    np.testing.assert_allclose(flash_v1(q, k, v, q_at, k_at, **rule, sram=24 * block), expected, atol=1e-12)


def test_a_query_before_all_keys_gives_zero_and_minus_infinity():
    q, k, v = random_qkv(3, 4)
    at = np.array([0, 5, 9]), np.array([5, 6, 7, 8])
    for got in (flash_with_lse, flash_v1_with_lse):
        o, lse = got(q, k, v, *at, scale=1.0)
        assert not o[:, 0].any() and np.isneginf(lse[:, 0]).all()
        np.testing.assert_allclose(o[:, 1], np.repeat(v[:, 0], 2, axis=0), rtol=1e-12)  # sees one key
        assert np.isfinite(lse[:, 1:]).all()


def test_scores_of_ten_thousand_do_not_overflow():
    q, k, v = random_qkv(8, 8, dtype=np.float32)
    at = np.arange(8), np.arange(8)
    out = flash(q, k, v, *at, scale=1e4, block_q=3, block_k=3)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, attend(q, k, v, *at, scale=1e4), atol=1e-5)


def test_window_of_the_length_is_causal_bit_for_bit():
    q, k, v = random_qkv(9, 12)
    at = np.arange(3, 12), np.arange(12)
    tiles = dict(scale=0.5, block_q=4, block_k=5)
    np.testing.assert_array_equal(flash(q, k, v, *at, window=12, **tiles), flash(q, k, v, *at, **tiles))


def test_decode_step_over_no_more_than_the_window():
    """One query: only key blocks that reach into the window are read."""
    q, k, v = random_qkv(1, 100, dim=4, value_dim=4)
    traffic = Traffic()
    flash_with_lse(q, k, v, np.array([99]), np.arange(100), scale=1.0, window=10, block_k=10, traffic=traffic)
    assert (traffic.tiles, traffic.skipped) == (1, 9)
    assert traffic.reads == q.size + 2 * 2 * 10 * 4


def test_bad_sizes():
    q, k, v = random_qkv(2, 2, heads=3, kv_heads=2)
    at = np.arange(2), np.arange(2)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        flash(q, k, v, *at, scale=1.0)
    q, k, v = random_qkv(2, 2)
    with pytest.raises(ValueError, match="block_q must be at least 1, got 0"):
        flash(q, k, v, *at, scale=1.0, block_q=0)
    with pytest.raises(ValueError, match="block_k must be at least 1, got -1"):
        flash(q, k, v, *at, scale=1.0, block_k=-1)
    with pytest.raises(ValueError, match="sram must be at least 1 element, got 0"):
        flash_v1(q, k, v, *at, scale=1.0, sram=0)


# --- traffic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries, keys", [(1, 1), (16, 16), (17, 17), (5, 23), (23, 40)])
@pytest.mark.parametrize("block_q, block_k", [(4, 4), (5, 3), (3, 8), (64, 64)])
def test_tiles_above_the_diagonal_are_skipped(queries, keys, block_q, block_k):
    """FlashAttention-2: query block i visits ceil((its end + S - T) / block_k) key blocks."""
    q, k, v = random_qkv(queries, keys)
    traffic = Traffic()
    at = np.arange(keys - queries, keys), np.arange(keys)
    flash_with_lse(q, k, v, *at, scale=1.0, block_q=block_q, block_k=block_k, traffic=traffic)
    ends = [min(start + block_q, queries) for start in range(0, queries, block_q)]
    visited = sum(-(-(end + keys - queries) // block_k) for end in ends)
    assert traffic.tiles == visited
    assert traffic.tiles + traffic.skipped == len(ends) * -(-keys // block_k)


def test_counted_traffic_equals_the_closed_forms_and_falls_with_memory():
    """Every key before every query, so nothing is skipped: flash ~ T S D^2 / M, standard ~ T S, and v1 moves O, too."""
    T, S, D, heads = 256, 256, 16, 2
    q, k, v = random_qkv(T, S, heads=heads, kv_heads=heads, dim=D, value_dim=D)
    at = np.full(T, S), np.arange(S)
    inner = []
    for sram in (512, 1024, 2048, 4096):
        block_k = sram // (4 * D)
        block_q = min(block_k, D)
        first, second = Traffic(), Traffic()
        flash_v1_with_lse(q, k, v, *at, scale=1.0, sram=sram, traffic=first)
        assert first.reads == heads * (2 * S * D + S // block_k * T * (2 * D + 2))
        assert first.writes == heads * S // block_k * T * (D + 2)
        flash_with_lse(q, k, v, *at, scale=1.0, block_q=block_q, block_k=block_k, traffic=second)
        assert second.reads == heads * (T * D + T // block_q * 2 * S * D)
        assert second.writes == heads * T * (D + 1)
        assert first.tiles == second.tiles == (T // block_q) * (S // block_k)
        assert second.writes < first.writes
        inner.append(first.reads + first.writes - heads * 2 * S * D)
    assert inner == [inner[0] // n for n in (1, 2, 4, 8)]  # proportional to 1 / M
    standard = standard_traffic(T, S, D)
    # Written out step by step: q k^T, softmax, weights times v.
    assert standard.reads == (T * D + S * D) + T * S + (T * S + S * D)
    assert standard.writes == T * S + T * S + T * D
    assert first.reads + first.writes < heads * (standard.reads + standard.writes)


def test_grouped_queries_read_keys_once():
    grouped, single = Traffic(), Traffic()
    at = np.arange(8), np.arange(8)
    for kv_heads, traffic in ((1, grouped), (4, single)):
        q, k, v = random_qkv(8, 8, kv_heads=kv_heads)
        flash_with_lse(q, k, v, *at, scale=1.0, traffic=traffic)
    assert 4 * (grouped.reads - 4 * 8 * 6) == single.reads - 4 * 8 * 6
