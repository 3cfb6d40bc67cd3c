"""Split keys: any number of parts gives the same, reads the same, and the number chosen is the published one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.online_softmax import Traffic, merge_outputs
from refllm.methods.attention.flash import flash_with_lse
from refllm.methods.attention.split import flash_decoding, flash_decoding_with_lse, split_count
from tests.twins import slow_attend


def example(seed, queries, keys, heads=4, kv_heads=2):
    rng = np.random.default_rng(seed)
    shapes = ((heads, queries, 6), (kv_heads, keys, 6), (kv_heads, keys, 5))
    return [rng.normal(size=shape) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 4),
    past=st.integers(0, 30),
    splits=st.integers(0, 40),
    block_k=st.integers(1, 9),
    window=st.none() | st.integers(1, 20),
    group=st.sampled_from([1, 2, 4]),
)
def test_split_equals_whole(seed, queries, past, splits, block_k, window, group):
    q, k, v = example(seed, queries, queries + past, kv_heads=4 // group)
    at, rule = (np.arange(past, past + queries), np.arange(past + queries)), dict(scale=0.6, window=window)
    o, lse = flash_decoding_with_lse(q, k, v, *at, **rule, splits=splits, block_k=block_k)
    np.testing.assert_allclose(o, slow_attend(q, k, v, *at, **rule), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, flash_with_lse(q, k, v, *at, **rule)[1], rtol=1e-12, atol=1e-12)


def test_grouped_heads_equal_repeated_keys():
    q, k, v = example(0, 1, 20)
    at = np.array([19]), np.arange(20)
    wide = flash_decoding(q, np.repeat(k, 2, axis=0), np.repeat(v, 2, axis=0), *at, scale=0.5, splits=3, block_k=2)
    np.testing.assert_allclose(flash_decoding(q, k, v, *at, scale=0.5, splits=3, block_k=2), wide, rtol=1e-12)


def test_keys_read_do_not_depend_on_the_parts():
    q, k, v = example(0, 1, 64)
    counts = []
    for splits in (1, 2, 8, 16):
        traffic = Traffic()
        flash_decoding_with_lse(
            q, k, v, np.array([63]), np.arange(64), scale=0.5, splits=splits, block_k=4, traffic=traffic
        )
        counts.append(traffic.reads - splits * q.size)  # every part reads the queries
    assert set(counts) == {k.size + v.size}


def test_merging_is_associative_and_a_part_without_keys_counts_for_nothing():
    rng = np.random.default_rng(1)
    o, lse = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 3)) * 20
    lse[2, 1], o[2, 1] = -np.inf, np.nan
    whole = merge_outputs(o, lse)
    one = merge_outputs(o[:2], lse[:2])
    for step in (2, 3):
        one = merge_outputs(np.stack([one[0], o[step]]), np.stack([one[1], lse[step]]))
    for a, b in zip(one, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    nothing = merge_outputs(np.zeros((2, 1, 2)), np.full((2, 1), -np.inf))
    assert not nothing[0].any() and np.isneginf(nothing[1]).all()
    only = merge_outputs(np.stack([o[0], np.full_like(o[0], np.nan)]), np.stack([lse[0], np.full(3, -np.inf)]))
    np.testing.assert_array_equal(only[0], o[0])


def slow_count(work, units, blocks, most):
    """The rule of the published code, one number after another."""
    if work >= 0.8 * units or blocks <= 4:
        return 1
    most = min(most, units, blocks)
    full = {}
    for n in range(1, most + 1):
        if n > 1 and math.ceil(blocks / n) == math.ceil(blocks / (n - 1)):
            continue
        waves = work * n / units
        full[n] = waves / math.ceil(waves)
    return min(n for n in full if full[n] >= 0.85 * max(full.values()))


@settings(max_examples=100, deadline=None)
@given(work=st.integers(1, 200), units=st.integers(1, 150), blocks=st.integers(1, 300), most=st.integers(1, 130))
def test_the_number_of_parts(work, units, blocks, most):
    n = split_count(work, units, blocks, most)
    assert n == slow_count(work, units, blocks, most) and 1 <= n <= max(1, min(most, units, blocks))


def test_bad_knobs():
    q, k, v = example(0, 1, 4)
    for knobs, message in (
        (dict(splits=-1), "splits must be at least 1, or 0 to choose, got -1"),
        (dict(units=0), "units must be at least 1, got 0"),
        (dict(block_k=0), "block_k must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_decoding(q, k, v, np.array([3]), np.arange(4), scale=1.0, **knobs)
