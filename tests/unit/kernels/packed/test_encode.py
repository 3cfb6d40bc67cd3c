"""Compiled encoders give the bytes of the NumPy text, for ordinary and for adversarial blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.formats.blocks import BLOCKS, scale_search
from refllm.formats.blocks.lookup import IQ4_LEVELS
from refllm.kernels.packed import encode, encode_gguf, threads
from tests.strategies import PROPERTY, SEEDS, mixed_weights

SEARCHED = [name for name, form in BLOCKS.items() if form.takes_importance]
KINDS = (
    "normal",
    "zeros",
    "signed zeros",
    "constant",
    "outlier",
    "ties",
    "tiny",
    "huge",
    "negative",
    "denormal",
    "mixed",
)


def blocks(kind: str, n: int, k: int, seed: int) -> np.ndarray:
    """(n, k) float32 of one kind; "mixed": every row of another."""
    rng = np.random.default_rng(seed)
    if kind == "mixed":
        return np.concatenate([blocks(KINDS[i % (len(KINDS) - 1)], 1, k, seed + i) for i in range(n)])
    x = rng.standard_normal((n, k))
    if kind == "zeros":
        x[:] = 0
    elif kind == "signed zeros":
        x = np.where(rng.random((n, k)) < 0.5, 0.0, -0.0)
    elif kind == "constant":
        x[:] = x[:, :1]
    elif kind == "outlier":
        x[:, rng.integers(k)] = 1e4 * rng.choice([-1, 1])
    elif kind == "ties":
        x = rng.integers(-16, 17, (n, k)) / 2
    elif kind == "negative":
        x = -np.abs(x) - rng.random()
    else:
        x *= {"tiny": 1e-15, "huge": 1e4, "denormal": 1e-40}.get(kind, 1.0)
    return x.astype(np.float32)


def weights(kind: str, n: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = {"uniform": rng.random((n, k)), "zeros": np.zeros((n, k)), "wide": np.exp(8 * rng.standard_normal((n, k)))}
    w["sparse"] = np.where(rng.random((n, k)) < 0.8, 0, w["uniform"])
    return w[kind].astype(np.float32)


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        if a.dtype.kind == "f":
            assert np.array_equal(np.signbit(a[~np.isnan(a)]), np.signbit(b[~np.isnan(b)]))


CALLS = {
    "make_qx": lambda search, x, w: search.make_qx(x, 32, w),
    "make_qx 4": lambda search, x, w: search.make_qx(x, 4, w),
    "make_q3": lambda search, x, w: search.make_q3(x, 4),
    "make_qkx squares": lambda search, x, w: search.make_qkx(x, 15, w, -0.9, 0.05, 36),
    "make_qkx absolute": lambda search, x, w: search.make_qkx(x, 3, w, -0.5, 0.1, 15, True),
    "make_qp": lambda search, x, w: search.make_qp(x, 63, w),
    "fit_levels": lambda search, x, w: (search.fit_levels(x, IQ4_LEVELS, w, 7),),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@PROPERTY
@given(
    st.sampled_from(KINDS),
    st.sampled_from(["uniform", "zeros", "wide", "sparse"]),
    st.integers(1, 12),
    st.sampled_from([8, 16, 32]),
    SEEDS,
)
def test_searches_bit_for_bit(call, kind, weight_kind, n, k, seed):
    x, w = blocks(kind, n, k, seed), weights(weight_kind, n, k, seed)
    with np.errstate(all="ignore"):
        same(call(encode.CompiledSearch, x, w), call(scale_search, x, w))


@pytest.mark.parametrize("name", SEARCHED)
@settings(PROPERTY, max_examples=20)
@given(mixed_weights(rows=st.integers(1, 3), columns=512), st.booleans(), SEEDS)
def test_bytes_are_those_of_the_text(name, x, important, seed):
    importance = weights("uniform", 1, 512, seed)[0] if important else None
    assert np.array_equal(encode_gguf(name, x, importance), BLOCKS[name].encode(x, importance))


def test_threads_change_nothing(monkeypatch):
    x = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    one = encode_gguf("Q4_K", x)
    monkeypatch.setattr(threads, "MINIMUM_WORK", 1)
    monkeypatch.setenv("REFLLM_THREADS", "3")
    assert np.array_equal(encode_gguf("Q4_K", x), one)


def test_the_numpy_text_runs_on_demand(monkeypatch):
    x = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    expected = encode_gguf("Q6_K", x)
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    monkeypatch.setattr(encode, "_kernel", None)  # whoever asks for a kernel falls
    assert np.array_equal(encode_gguf("Q6_K", x), expected)


def test_refusals_are_those_of_the_format():
    with pytest.raises(ValueError, match="unknown GGUF block type 'Q9_K'; known: Q4_0"):
        encode_gguf("Q9_K", np.zeros(256))
    with pytest.raises(ValueError, match="Q4_K needs rows that are a multiple of 256"):
        encode_gguf("Q4_K", np.zeros((2, 255)))
    with pytest.raises(ValueError, match="Q4_K cannot hold NaN"):
        encode_gguf("Q4_K", np.full(256, np.nan))
    with pytest.raises(ValueError, match="too large for Q4_K"):
        encode_gguf("Q4_K", np.full(256, -3e38))
    with pytest.raises(ValueError, match="Q8_0 is encoded without importance"):
        encode_gguf("Q8_0", np.zeros(32), np.ones(32))
    assert encode_gguf("Q4_K", np.zeros((0, 256))).shape == (0, 144)
