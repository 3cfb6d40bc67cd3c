"""zeroquant and zeroquant_fp: codes by loops, scale constraints, and inputs that go with the weight."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.packed import matmul
from refllm.kernels.packed.activations import quantize_activations
from refllm.methods.apply import compress
from refllm.methods.quant import rtn, zeroquant, zeroquant_fp
from refllm.methods.quant.zeroquant import constrain
from refllm.model.cache import new_cache
from refllm.model.compiled import compiled_for
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model
from tests.strategies import PROPERTY, mixed_weights

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@PROPERTY
@given(mixed_weights(columns=st.just(12)), st.sampled_from([2, 4, 8]))
def test_integers_equal_the_loops(W, bits):
    record = zeroquant(W, bits=bits, group_size=4)
    half = 1 << (bits - 1)
    for i, row in enumerate(W):
        for g in range(3):
            group, scale = row[4 * g : 4 * g + 4], record.weight.scale[i, g]
            amax = max(map(abs, group)) or np.float32(1)
            assert scale == max(np.float16(amax / np.float32(half)), np.float16(2.0**-24))
            codes = [int(np.clip(np.rint(w / np.float32(scale)), -half, half - 1)) for w in group]
            assert record.dense()[i, 4 * g : 4 * g + 4].tolist() == [float(np.float32(scale) * c) for c in codes]


def nearest_fp4(x):
    """By distance, ties to the even code."""
    best = min(range(8), key=lambda code: (abs(abs(x) - FP4[code]), code % 2))
    return math.copysign(FP4[best], x)


@PROPERTY
@given(mixed_weights(columns=st.just(12)), st.sampled_from(["none", "m1", "m2"]))
def test_floats_equal_the_loops(W, constraint):
    record = zeroquant_fp(W, group_size=4, constraint=constraint).weight
    amax = np.abs(W.reshape(len(W), 3, 4)).max(axis=2).astype(np.float64)
    wanted = constrain(np.where(amax > 0, amax, 1) / 6, constraint).astype(np.float16)
    assert np.array_equal(record.scale, np.maximum(wanted, np.float16(2.0**-24)))
    for i, row in enumerate(W):
        scales = record.scale[i].repeat(4).astype(np.float32)
        assert record.dense()[i].tolist() == [
            float(np.float32(nearest_fp4(float(w / s))) * s) for w, s in zip(row, scales, strict=True)
        ]


@PROPERTY
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_constraints(scales):
    scales = np.array(scales)
    m1, m2 = constrain(scales, "m1"), constrain(scales, "m2")
    for s, one, two in zip(scales, m1, m2, strict=True):
        assert math.frexp(one)[0] == 0.5 and s <= one < 2 * s  # the power of two from s on
        ratio = Fraction(two) / Fraction(scales.max())
        assert ratio.numerator == 1 and ratio.denominator & (ratio.denominator - 1) == 0
        assert s / 2 < two * (1 + 1e-15) and two <= s * (1 + 1e-15)
    assert np.array_equal(constrain(scales, "none"), scales)


def test_powers_of_two_stay():
    powers = np.exp2(np.arange(-20.0, 20))
    assert np.array_equal(constrain(powers, "m1"), powers) and np.array_equal(constrain(powers, "m2"), powers)


def test_m1_never_clips_and_m2_may():
    W = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    for constraint, clips in (("none", False), ("m1", False), ("m2", True)):
        record = zeroquant_fp(W, group_size=16, constraint=constraint).weight
        most = 6 * record.scale.astype(np.float32)
        over = np.abs(W.reshape(64, 4, 16)).max(axis=2) > most * (1 + 2.0**-11)
        assert over.any() == clips


def test_inputs_are_rounded_with_the_weight():
    W = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    X = np.random.default_rng(1).standard_normal((5, 64), np.float32)
    for bits in (8, 6):
        codes, scale = quantize_activations(X, bits=bits)
        record = zeroquant(W, activation_bits=bits)
        np.testing.assert_allclose(matmul(X, record), (codes * scale) @ record.dense().T, rtol=1e-4, atol=1e-4)
    fine = np.linalg.norm(zeroquant_fp(W).rounded(X) - X) / np.linalg.norm(X)
    assert 0.01 < fine < 2.0**-4  # three bits behind the point


def test_floats_round_loud_tokens_better_than_integers():
    """The paper's reason: with one channel 100 times the rest, int8 has few codes left and FP8 as many as before."""
    W = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    X = np.random.default_rng(1).standard_normal((50, 64), np.float32)
    X[:, 7] *= 100
    quiet = np.arange(64) != 7
    error = lambda record: np.linalg.norm((record.rounded(X) - X)[:, quiet])
    assert error(zeroquant_fp(W)) < error(zeroquant(W)) / 3


def test_deepspeeds_step_is_finer_than_the_textbooks():
    W = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    error = lambda record: np.square(record.dense() - W).sum()
    assert error(zeroquant(W)) < 0.95 * error(rtn(W, symmetric=True))


def test_a_stored_model_rounds_its_inputs(tmp_path):
    model, ids = random_model("llama", np.float32), np.arange(30)
    for recipe in ("zeroquant:group=16", "zeroquant_fp:group=16,constraint=m2+lorc:rank=2", "zeroquant:group=8+lorc"):
        small = compress(model, recipe)
        back = refllm.load(save_native(small, tmp_path / str(len(recipe))))
        assert np.array_equal(forward(back, ids), forward(small, ids))


def test_the_compiled_pass_rounds_inputs_as_the_record_says(monkeypatch):
    """The same numbers as the readable pass, and as integers of the run-time stage."""
    model, ids = random_model("llama", np.float32), np.arange(40)
    small = compress(model, "zeroquant:group=32,bits=8,only=attn+zeroquant:group=16,activation_bits=4,only=mlp")
    monkeypatch.setenv("REFLLM_KERNELS", "numba")
    cache = new_cache(small)
    cache.check_batch(1)
    assert compiled_for(small, cache, 1) is not None
    fast = forward(small, ids)
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    np.testing.assert_allclose(fast, forward(small, ids), rtol=0, atol=2e-2 * np.abs(fast).max())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W: zeroquant(W, bits=9), "bits must be 2 to 8, got 9"),
        (lambda W: zeroquant(W, activation_bits=1), "activation_bits must be 2 to 8, got 1"),
        (lambda W: zeroquant(1e9 * W), "does not fit float16"),
        (lambda W: zeroquant_fp(W, constraint="m3"), "constraint must be one of none, m1, m2, got 'm3'"),
        (lambda W: zeroquant_fp(W, group_size=0), "group_size must be positive or -1"),
        (lambda W: zeroquant_fp(W, group_size=48), "group_size 48 does not divide the 64 columns"),
        (lambda W: zeroquant_fp(1e9 * W), "too large for float16"),
    ],
)
def test_bad_knobs(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((4, 64), np.float32))
