"""Attention from packed keys and values is attention over the dequantised ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import types

from refllm.formats.bits import pack_bits
from refllm.kernels.attention import attend
from refllm.kernels.packed.compile import compile_kernel
from refllm.kernels.packed.lane_codes import codes_run
from refllm.kernels.packed.lane_memory import store_tokens
from refllm.kernels.packed.lanes import in_order
from refllm.methods.kvcache.kivi import KiviStore
from tests.strategies import KERNEL, gamma


def tokens(rng, count, heads, dim, size=1.0):
    shape = (1, heads, count, dim)
    return (size * rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 2, shape)).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@KERNEL
@given(data=st.data())
def test_equals_attention_over_the_dequantised_cache(bits, data):
    group = data.draw(st.sampled_from([16, 32]))
    residual, dim = group * data.draw(st.integers(1, 3)), group * data.draw(st.integers(1, 3))
    kv_heads, shared = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    window = data.draw(st.none() | st.integers(1, 80))
    softcap = data.draw(st.none() | st.just(5.0))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    fast, text = KiviStore(bits, group, residual), KiviStore(bits, group, residual)
    start = 0
    for count in [*data.draw(st.lists(st.sampled_from([1, 1, 1, 7, 40, 65]), min_size=1, max_size=6)), 1]:
        q = tokens(rng, count, kv_heads * shared, dim, data.draw(st.sampled_from([0.0, 1.0, 30.0])))
        k, v = tokens(rng, count, kv_heads, dim), tokens(rng, count, kv_heads, dim)
        positions = np.arange(start, start + count)
        start += count
        how = dict(scale=dim**-0.5, window=window, softcap=softcap)
        y = fast.attend(q, k, v, positions, **how)
        K, V, key_positions = text.extend(k, v, positions, q)
        exact = attend(*(x.astype(np.float64) for x in (q, K, V)), positions, key_positions, **how)
        # Sums of (q scale) code and of q minimum, where |scale code| <= 2 |K| and |minimum| <= |K|, are off by
        # gamma(dim) times the sum of both. That moves the shares by as much, and each is rounded in turn; values
        # likewise.
        spread = 3 * np.abs(q).astype(np.float64).max() * np.abs(K).max() * dim**0.5
        error = gamma(dim + 16) * spread if softcap is None else gamma(dim + 16) * spread + gamma(64) * softcap
        bound = (np.expm1(2 * error) + 3 * gamma(start + 80)) * np.abs(V).max()
        assert y.dtype == np.float32 and np.abs(y - exact).max() <= bound
        assert fast.nbytes == text.nbytes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 4])
def test_codes_of_a_run_come_back_in_order(bits, n):
    def unpack(codes, out):
        store_tokens(out, 64, in_order(codes_run(codes, bits, n), n))

    codes = np.random.default_rng(bits).integers(0, 1 << bits, 16 * n).astype(np.uint8)
    codes[[0, -1]] = (1 << bits) - 1
    packed, out = pack_bits(codes, bits), np.empty(16 * n, np.float32)
    assert packed.size == 2 * bits * n  # nothing beyond is read
    compile_kernel(unpack, types.void(types.intp, types.intp), f"{bits}_{n}")(packed.ctypes.data, out.ctypes.data)
    assert (out == codes).all()


def test_not_a_number_is_refused_and_the_store_unchanged():
    store = KiviStore(2, 16, 32)
    k = np.ones((1, 1, 1, 16), np.float32)
    store.attend(k, k, k, np.arange(1), scale=1.0)
    with pytest.raises(ValueError, match="finite"):
        store.attend(k, k * np.nan, k, np.arange(1, 2), scale=1.0)
    assert store.length == 1


def test_a_query_that_is_not_a_number_gives_nothing_else():
    store = KiviStore(2, 16, 32)
    k = np.ones((1, 2, 40, 16), np.float32)
    store.extend(k, k, np.arange(40))
    q = np.ones((1, 2, 1, 16), np.float32)
    q[0, 1, 0, 3] = np.nan
    y = store.attend(q, k[:, :, :1], k[:, :, :1], np.arange(40, 41), scale=1.0)
    assert np.isfinite(y[0, 0]).all() and np.isnan(y[0, 1]).all()
