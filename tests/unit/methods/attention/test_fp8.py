"""flash_fp8 against the same rounding one number at a time, and what its three precautions are for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.formats.dtypes import FP8_E4M3FN
from refllm.kernels.attention import attend
from refllm.methods.attention.fp8 import encode, flash_fp8, flash_fp8_with_lse, turned, weigh

E4M3 = FP8_E4M3FN.decode(np.arange(127, dtype=np.uint8)).astype(np.float64)  # all that are not negative


def nearest(x):
    """The nearest E4M3 number by search; the even code on a tie, 448 beyond it."""
    gap = np.abs(E4M3 - min(abs(x), 448.0))
    codes = np.flatnonzero(gap == gap.min())
    return np.copysign(E4M3[min(codes, key=lambda code: code % 2)], x)


def slow_rounded(x, block):
    """Rows of a head, with a scale for every `block` of them."""
    out = np.empty_like(x)
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        s = float(np.float32(np.abs(rows).max() / 448)) or 1.0
        out[start : start + block] = [[s * nearest(value / s) for value in row] for row in rows]
    return out


def slow_fp8(q, k, v, q_at, k_at, scale, block_q, block_k):
    out, lse = np.zeros((*q.shape[:2], v.shape[-1])), np.full(q.shape[:2], -np.inf)
    for h in range(len(q)):
        of = h // (len(q) // len(k))
        Q, K, V = slow_rounded(q[h], block_q), slow_rounded(k[of], block_k), slow_rounded(v[of], block_k)
        for t in range(len(Q)):
            m, l, o = -np.inf, 0.0, np.zeros(v.shape[-1])
            for start in range(0, len(K), block_k):
                seen = [s for s in range(start, min(start + block_k, len(K))) if k_at[s] <= q_at[t]]
                if not seen:
                    continue
                scores = [scale * (Q[t] @ K[s]) for s in seen]
                new = max(m, *scores)
                fade = np.exp(m - new)
                p = [np.exp(s - new) for s in scores]
                l = fade * l + sum(p)
                o = fade * o + sum(nearest(256 * x) / 256 * V[s] for x, s in zip(p, seen, strict=True))
                m = new
            if l:
                out[h, t], lse[h, t] = o / l, m + np.log(l)
    return out, lse


def example(seed, queries=5, keys=9, dim=8):
    rng = np.random.default_rng(seed)
    shapes = ((4, queries, dim), (2, keys, dim), (2, keys, 3))
    return [rng.normal(size=shape) * rng.choice([1e-3, 1, 30], size=(*shape[:2], 1)) for shape in shapes]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), block_q=st.integers(1, 6), block_k=st.integers(1, 10))
def test_one_number_at_a_time(seed, block_q, block_k):
    q, k, v = example(seed)
    at = np.array([0, 8, 3, 1, 9]), np.arange(1, 10)
    knobs = dict(scale=0.3, block_q=block_q, block_k=block_k)
    got = flash_fp8_with_lse(q, k, v, *at, **knobs, incoherent=False)
    for a, b in zip(got, slow_fp8(q, k, v, *at, **knobs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_one_scale_per_key_value_head_is_shared_by_its_queries():
    x = np.array([[[1.0, 2.0], [4.0, 0.0]], [[8.0, 0.0], [448.0, 1.0]]])[None]  # (Hk = 1, g = 2, T, D)
    codes, scale = encode(x, None, "q", joint=True)
    assert scale.tolist() == [[[1.0, 1.0], [1.0, 1.0]]]
    assert FP8_E4M3FN.decode(codes).tolist() == x.tolist()
    assert encode(x, None, "q")[1][0, 0, 0] == np.float32(4 / 448)


@pytest.mark.parametrize("dim", [8, 12, 7])
def test_the_rotation_changes_no_product(dim):
    q, k, _ = example(0, dim=dim)
    for head in range(4):
        a, b = q[head], k[head // 2]
        np.testing.assert_allclose(turned(a) @ turned(b).T, a @ b.T, rtol=1e-10, atol=1e-10)
    assert not np.allclose(turned(q), turned(q, seed=1))


def test_rotation_helps_where_there_are_outliers():
    """N(0, 1) + N(0, 100) for one number in a thousand: the setting of the paper."""
    rng = np.random.default_rng(0)
    draw = lambda: (
        rng.normal(size=(1, 512, 128)) + 10 * rng.normal(size=(1, 512, 128)) * (rng.random((1, 512, 128)) < 0.001)
    )
    q, k, v = draw(), draw(), draw()
    at = np.full(512, 512), np.arange(512)
    exact = attend(q, k, v, *at, scale=128**-0.5)
    error = {}
    for incoherent in (False, True):
        got = flash_fp8(q, k, v, *at, scale=128**-0.5, granularity="head", incoherent=incoherent)
        error[incoherent] = np.sqrt(np.mean((got - exact) ** 2))
    assert error[True] < error[False] < 0.05


def test_the_offset_saves_small_weights():
    """2^-10 alone rounds to 0 or 2^-9 as E4M3; as 2^-2 it is exact. Powers of two cancel: large ones are the same."""
    p, v = np.array([[2.0**-10, 2.0**-16, 1.0]]), np.eye(3)
    assert weigh(p, v).tolist() == [[2.0**-10, 2.0**-16, 1.0]]
    assert FP8_E4M3FN.decode(FP8_E4M3FN.encode(p))[0, :2].tolist() == [0.0, 0.0]


def test_zeros_and_refusals():
    zero, at = np.zeros((1, 2, 4)), (np.arange(2), np.arange(2))
    assert not flash_fp8(zero, zero, zero, *at, scale=1.0).any()
    bad = zero.copy()
    bad[0, 1, 2] = np.nan
    for place, name in enumerate("qkv"):
        arrays = [zero] * 3
        arrays[place] = bad
        with pytest.raises(ValueError, match=f"{name} holds NaN or Inf"):
            flash_fp8(*arrays, *at, scale=1.0, incoherent=False)
    with pytest.raises(ValueError, match="granularity must be block or head, got 'row'"):
        flash_fp8(zero, zero, zero, *at, scale=1.0, granularity="row")
