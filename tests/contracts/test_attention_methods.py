"""Every attention method computes what refllm.kernels.attention.attend defines, within a bound it states here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.kernels.attention import attend
from refllm.methods import attention
from refllm.methods.apply import compress
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model

# What an approximate method may differ from attend by, relative to the largest |v|, beyond rounding; 0 for exact ones.
ALLOWED = {"flash": 0.0, "flash_v1": 0.0, "flash_decoding": 0.0}
# Sparse methods: what these sizes and knobs let them skip is nothing.
ALLOWED |= {"minference": 0.0, "adaspa": 0.0, "rainfusion": 0.0, "rainfusion2": 0.0}
# Methods on codes: an output is an average of values whatever the codes are, so no more than this, and on average
# ROUNDED, both relative to the largest |v|. Dimension 6 is the hardest: few products to average over.
ROUNDED = {"flash_fp8": 0.1, "sage": 0.02, "sage2": 0.2, "sage2pp": 0.08}
ALLOWED |= dict.fromkeys(ROUNDED, 2.0)
KNOBS = {
    "flash": dict(block_q=3, block_k=4),
    "flash_v1": dict(sram=100),
    "flash_decoding": dict(splits=3, block_q=3, block_k=2),
    "flash_fp8": dict(block_q=3, block_k=4, granularity="head", incoherent=False),
    "minference": dict(pattern="block", block=4),
    "adaspa": dict(sparsity=0.0, block=4),
    "rainfusion": dict(),
    "rainfusion2": dict(sparsity=0.0, block=4),
    "sage": dict(granularity="thread", smooth_v=True),
    "sage2": dict(bits=8),
    "sage2pp": dict(),
}

ALL = pytest.mark.parametrize("name", attention.__all__)


def bound(name, q, k, v, scale):
    """Rounding of two computations of the same sums in any order, in the type of q.

    A score s is a sum of D products: off by (D + 4) eps max|s| with scale, cap and the subtraction of the maximum. A
    weight exp(s) / sum is off by twice that and by 2 S + 8 roundings of exp, sums and rescalings; weights sum to 1.
    """
    eps = np.finfo(q.dtype).eps
    largest_score = scale * np.abs(q).sum(axis=-1).max() * np.abs(k).max()
    relative = 2 * (q.shape[-1] + 4) * eps * largest_score + (2 * k.shape[-2] + 8) * eps
    return (2 * relative + ALLOWED[name]) * np.abs(v).max()


@ALL
def test_every_method_states_its_bound(name):
    assert name in ALLOWED and name in KNOBS


@ALL
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 10),
    past=st.integers(0, 12),
    group=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 24),
    softcap=st.none() | st.sampled_from([0.5, 30.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
    lead=st.sampled_from([(), (1,), (3,), (2, 2)]),
    small_tiles=st.booleans(),
)
def test_equals_attend(name, seed, queries, past, group, window, softcap, dtype, lead, small_tiles):
    rng = np.random.default_rng(seed)
    shapes = ((4, queries, 6), (4 // group, queries + past, 6), (4 // group, queries + past, 5))
    q, k, v = (rng.normal(size=(*lead, *shape)).astype(dtype) for shape in shapes)
    for x in (q, k, v):
        x.flags.writeable = False
    at = np.arange(past, past + queries), np.arange(past + queries)
    rule = dict(scale=6**-0.5, window=window, softcap=softcap)
    got = getattr(attention, name)(q, k, v, *at, **rule, **(KNOBS[name] if small_tiles else {}))
    expected = attend(q, k, v, *at, **rule)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound(name, q, k, v, rule["scale"]))
    if name in ROUNDED:
        assert np.sqrt(np.mean((got - expected) ** 2)) <= ROUNDED[name] * np.abs(v).max()


@ALL
@pytest.mark.parametrize("window", [None, 3])
def test_positions_as_a_cache_may_leave_them(name, window):
    """Gaps, another order, other tokens in each key-value head, and queries that see nothing (zeros)."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, heads, count, 4)) for heads, count in ((6, 5), (3, 9), (3, 9)))
    q_at = np.array([0, 30, 7, 12, 3])
    for k_at in (rng.permutation(30)[:9] + 2, np.stack([rng.permutation(30)[:9] + 2 for _ in range(3)])):
        rule = dict(scale=0.5, window=window)
        expected = attend(q, k, v, q_at, k_at, **rule)
        assert not expected[..., 0, :].any()
        for knobs in ({}, KNOBS[name]):
            got = getattr(attention, name)(q, k, v, q_at, k_at, **rule, **knobs)
            np.testing.assert_allclose(got, expected, rtol=0, atol=bound(name, q, k, v, 0.5))


@ALL
def test_large_scores_neither_overflow_nor_lose_the_winner(name):
    q, k = (np.full((1, 4, 1), x, np.float32) for x in (300.0, 300.0))
    k[:, 2] = 301 if name != "flash_fp8" else 400  # three bits of mantissa
    v = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    at = np.arange(4), np.arange(4)
    got = getattr(attention, name)(q, k, v, *at, scale=1.0, **KNOBS[name])
    coarse = name in ROUNDED and name != "sage"  # values of three bits of mantissa: off by up to 2^-4
    np.testing.assert_allclose(got, [[[0.0], [0.5], [2.0], [2.0]]], atol=2**-3 if coarse else 1e-6)


@ALL
def test_heads_that_do_not_divide(name):
    q, k = np.ones((3, 1, 2)), np.ones((2, 1, 2))
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        getattr(attention, name)(q, k, k, np.arange(1), np.arange(1), scale=1.0)


@ALL
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_model_runs_on_it(name, architecture):
    """Prefill, chunked prefill and decode in float64."""
    model = random_model(architecture, np.float64, attention_softcap=5.0)
    ids = np.random.default_rng(1).integers(0, 64, (2, 25))
    method = getattr(attention, name)
    expected = forward(model, ids)
    close = 1e-11 if name not in ROUNDED else np.abs(expected).max() / 2
    np.testing.assert_allclose(forward(model, ids, attend=method), expected, rtol=0, atol=close)
    cache = new_cache(model)
    chunks = (ids[:, :10], ids[:, 10:22], *np.split(ids[:, 22:], 3, axis=1))
    logits = np.concatenate([forward(model, chunk, cache=cache, attend=method) for chunk in chunks], axis=1)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=close)


@ALL
def test_a_stored_model_runs_on_it(name, tmp_path):
    """Behind a stage that packs, with knobs in the recipe; what is loaded gives the same logits."""
    ids = np.random.default_rng(2).integers(0, 64, 12)
    knobs = ",".join(f"{key}={value}" for key, value in KNOBS[name].items())
    small = compress(random_model("llama"), f"rtn:bits=8,group=-1+{name}" + (f":{knobs}" if knobs else ""))
    save_native(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    assert again.runtime.attend.func is getattr(attention, name) and again.runtime.attend.keywords == KNOBS[name]
    np.testing.assert_array_equal(forward(again, ids), forward(small, ids))
