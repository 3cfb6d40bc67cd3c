"""refllm.kernels.nn: values by hand, edge values without a warning (pytest makes warnings errors), types kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refllm.kernels.nn import ACTIVATIONS, cross_entropy, gelu_tanh, log_softmax, rms_norm, silu, softmax

FLOATS = (np.float32, np.float64)
moderate = st.floats(-50, 50, allow_subnormal=False)


def vectors(n_max=9):
    return st.integers(1, n_max).flatmap(lambda n: arrays(np.float64, n, elements=moderate))


# RMSNorm


def test_rms_norm_by_hand():
    # the mean square of (1, 2, 2, 4) is 6.25, its root 2.5
    x = np.array([[1.0, 2.0, 2.0, 4.0]])
    gain = np.array([1.0, 0.5, -1.0, 2.0])
    np.testing.assert_array_equal(rms_norm(x, gain, 0.0), [[0.4, 0.4, -0.8, 3.2]])


def test_rms_norm_eps_is_inside_the_root():
    x = np.array([1e-3])
    assert rms_norm(x, np.ones(1), 1e-6)[0] == pytest.approx(1e-3 / np.sqrt(2e-6), rel=1e-15)


def test_rms_norm_does_not_subtract_the_mean():
    np.testing.assert_allclose(rms_norm(np.full(4, 3.0), np.ones(4), 0.0), np.ones(4), rtol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_of_zero_is_zero_and_the_type_is_kept(dtype):
    x = np.zeros((2, 5), dtype)
    for offset in (0.0, 1.0):
        y = rms_norm(x, np.ones(5, dtype), 1e-5, offset)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, x)


@given(vectors(), st.floats(0.01, 100))
def test_rms_norm_ignores_a_positive_scale(x, c):
    if np.abs(x).max() < 1e-3:
        return
    gain = np.linspace(0.5, 2, len(x))
    np.testing.assert_allclose(rms_norm(c * x, gain, 0.0), rms_norm(x, gain, 0.0), rtol=1e-13)


@given(vectors())
def test_gemma_gain_is_llama_gain_plus_one(x):
    w = np.linspace(-0.5, 0.5, len(x))
    np.testing.assert_array_equal(rms_norm(x, w, 1e-6, offset=1.0), rms_norm(x, w + 1, 1e-6))


def test_rms_norm_float32_error_is_rounding_only():
    rng = np.random.default_rng(0)
    x, gain = rng.normal(size=(7, 64)), rng.normal(size=64)
    exact = rms_norm(x.astype(np.float32).astype(np.float64), gain.astype(np.float32).astype(np.float64), 1e-5)
    # pairwise sum of 64 squares, root, quotient, product: below (log2(64) + 4) roundings of 2^-24 each
    np.testing.assert_allclose(rms_norm(x.astype(np.float32), gain.astype(np.float32), 1e-5), exact, rtol=10 * 2.0**-23)


# Activations


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_activations_at_the_ends(name, dtype):
    f = ACTIVATIONS[name]
    x = np.array([-1e4, -0.0, 0.0, 1e4], dtype)
    y = f(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, [0, 0, 0, 1e4])


@pytest.mark.parametrize("f", [silu, gelu_tanh])
@given(x=vectors())
def test_activations_are_half_identity_half_even(f, x):
    # both are x * s(x) with s(x) + s(-x) = 1
    np.testing.assert_allclose(f(x) - f(-x), x, rtol=1e-14, atol=1e-14)


def test_silu_values():
    np.testing.assert_allclose(silu(np.array([1.0, -2.0])), [1 / (1 + np.exp(-1)), -2 / (1 + np.exp(2))], rtol=1e-15)


def test_gelu_is_the_tanh_form_not_the_erf_form():
    # tanh form 0.84119199, erf form 0.84134475
    assert gelu_tanh(np.array([1.0]))[0] == pytest.approx(0.8411919906, abs=1e-9)


# Softmax and losses


@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax_of_extremes(dtype):
    x = np.array([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4], [0, -np.inf, -np.inf], [-np.inf] * 3], dtype)
    y = softmax(x)
    assert y.dtype == dtype
    third = dtype(1) / dtype(3)
    np.testing.assert_array_equal(y, np.array([[0.5, 0, 0.5], [third] * 3, [1, 0, 0], [0, 0, 0]], dtype))


@given(vectors(), moderate)
def test_softmax_sums_to_one_and_ignores_a_shift(x, c):
    y = softmax(x)
    assert y.sum() == pytest.approx(1, rel=1e-14)
    np.testing.assert_allclose(softmax(x + c), y, rtol=1e-12)
    np.testing.assert_allclose(y, np.exp(x) / np.exp(x).sum(), rtol=1e-12)


@given(vectors())
def test_log_softmax_is_the_logarithm_of_softmax(x):
    np.testing.assert_allclose(log_softmax(x), np.log(softmax(x)), rtol=1e-12, atol=1e-12)


def test_log_softmax_works_in_float64_and_keeps_masked_entries():
    y = log_softmax(np.array([1e4, -1e4, -np.inf], np.float32))
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, [0.0, -2e4, -np.inf])


def test_cross_entropy_of_uniform_logits_is_log_vocab():
    nll = cross_entropy(np.zeros((2, 3, 7), np.float32), np.array([[0, 1, 2], [3, 4, 6]]))
    assert nll.shape == (2, 3) and nll.dtype == np.float64
    np.testing.assert_allclose(nll, np.log(7), rtol=1e-15)


def test_cross_entropy_picks_the_target():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
    np.testing.assert_allclose(cross_entropy(logits, [1, 2]), -np.log([0.25, 0.75]), rtol=1e-15)


@pytest.mark.parametrize("target", [-1, -100, 4])
def test_cross_entropy_refuses_targets_outside_the_vocabulary(target):
    with pytest.raises(ValueError, match=r"targets must be ids 0\.\.3, got"):
        cross_entropy(np.zeros((2, 4)), [1, target])
