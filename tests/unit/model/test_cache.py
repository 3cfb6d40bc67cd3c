"""refllm.model.cache: bytes by formula, rollback, growth, and what a dense store gives back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.model.cache import DenseStore, KVCache, new_cache
from refllm.model.llama import forward
from refllm.model.model import Runtime
from tests.models import ARCHITECTURES, random_model

IDS = np.random.default_rng(3).integers(0, 64, 37)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_are_the_formula(architecture, dtype):
    """2 L Hk D b per token and sequence, at a length that is no multiple of anything, growth room not counted."""
    model = random_model(architecture, dtype)
    c, b = model.config, np.dtype(dtype).itemsize
    cache = new_cache(model)
    assert cache.nbytes == 0
    for length in (1, 17, 37):
        forward(model, np.stack([IDS[cache.length : length]] * 3), cache=cache)
        assert cache.nbytes == 3 * length * 2 * c.num_layers * c.num_kv_heads * c.head_dim * b
    cache.truncate(5)
    assert cache.nbytes == 3 * 5 * 2 * c.num_layers * c.num_kv_heads * c.head_dim * b


def test_half_precision_store_halves_the_bytes_and_returns_float32():
    model = random_model("llama")
    half, full = new_cache(model, policy=lambda layer: DenseStore(np.float16)), new_cache(model)
    a, b = forward(model, IDS, cache=half), forward(model, IDS, cache=full)
    assert a.dtype == np.float32
    assert 2 * half.nbytes == full.nbytes
    assert 0 < np.abs(a - b).max() < 0.02 * np.abs(b).max()
    K, V, _ = DenseStore(np.float16).extend(np.full((1, 1, 1, 2), 0.1, np.float32), np.ones((1, 1, 1, 2)), np.arange(1))
    assert (K.dtype, V.dtype) == (np.float32, np.float64)
    assert K[0, 0, 0, 0] == np.float32(np.float16(0.1))


def kv(tokens, start=0, dtype=np.float32):
    """Keys that carry their position, values that carry its negative."""
    k = np.broadcast_to(np.arange(start, start + tokens, dtype=dtype)[:, None], (1, 2, tokens, 4))
    return k, -k, np.arange(start, start + tokens)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_store_returns_everything_in_order_whatever_the_chunks(sizes):
    store, start = DenseStore(), 0
    for size in sizes:
        K, V, positions = store.extend(*kv(size, start))
        start += size
        np.testing.assert_array_equal(positions, np.arange(start))
        np.testing.assert_array_equal(K, kv(start)[0])
        np.testing.assert_array_equal(V, kv(start)[1])
    assert store.nbytes == 2 * start * 2 * 4 * 4


def test_values_may_have_another_width():
    store = DenseStore()
    K, V, _ = store.extend(np.zeros((1, 2, 3, 8)), np.ones((1, 2, 3, 5)), np.arange(3))
    assert (K.shape, V.shape) == ((1, 2, 3, 8), (1, 2, 3, 5))
    assert store.nbytes == (8 + 5) * 2 * 3 * 8


def test_store_does_not_keep_the_callers_arrays():
    store = DenseStore()
    k, v, positions = (x.copy() for x in kv(3))
    K, _, _ = store.extend(k, v, positions)
    k[:], positions[:] = 99, 99
    np.testing.assert_array_equal(K, kv(3)[0])
    np.testing.assert_array_equal(store.extend(*kv(1, 3))[2], np.arange(4))


def test_room_doubles_so_that_decoding_copies_seldom():
    store, buffers = DenseStore(), []
    for position in range(1000):
        K, _, _ = store.extend(*kv(1, position))
        if not buffers or not np.shares_memory(K, buffers[-1]):
            buffers.append(K)
    assert len(buffers) == 7  # 16, 32, ... 1024


@given(st.integers(1, 30), st.data())
def test_rollback_then_other_tokens_equals_never_having_seen_them(seen, data):
    length = data.draw(st.integers(0, seen))
    model = random_model("gemma3", np.float64, num_layers=1, sliding_layers=(True,))
    cache = new_cache(model)
    forward(model, IDS[:seen], cache=cache)
    cache.truncate(length)
    assert cache.length == length
    other = (IDS[length:] + 1) % 64
    got = forward(model, other, cache=cache)
    expected = forward(model, np.concatenate([IDS[:length], other]))[length:]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)


def test_rollback_of_a_fresh_cache_to_nothing():
    cache = KVCache(2, 8)
    cache.truncate(0)
    assert (cache.length, cache.nbytes) == (0, 0)


@pytest.mark.parametrize("length", [-1, 6])
def test_rollback_beyond_what_was_seen_is_refused(length):
    model = random_model()
    cache = new_cache(model)
    forward(model, IDS[:5], cache=cache)
    with pytest.raises(ValueError, match=f"cannot roll the cache back to {length} tokens: it has seen 5"):
        cache.truncate(length)
    assert cache.length == 5


def test_policy_argument_goes_before_the_models_own():
    own, given_layers = [], []

    def policy(log):
        return lambda layer: log.append(layer) or DenseStore()

    model = random_model(runtime=Runtime(cache_policy=policy(own)))
    assert len(new_cache(model).stores) == 2
    new_cache(model, policy=policy(given_layers))
    assert (own, given_layers) == ([0, 1], [0, 1])
    assert new_cache(model).context_length == model.config.context_length
