"""Zeros of a gate: the sparse network is the masked dense one, and reads what is open."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.nn import silu
from refllm.methods.activations.gated import gate_values, sparse_mlp
from tests.strategies import PROPERTY

rng = np.random.default_rng(0)
GATE, UP, DOWN = rng.normal(size=(12, 5)), rng.normal(size=(12, 5)), rng.normal(size=(5, 12))


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 99.0]), st.booleans())
def test_sparse_equals_masked_dense(seed, tau, relu):
    x = np.random.default_rng(seed).normal(size=5)
    a = gate_values(x[None], GATE, tau=tau, relu=relu)[0]
    exact = np.maximum(GATE @ x, 0) if relu else silu(GATE @ x)
    masked = np.where(np.abs(exact) > tau, exact, 0)
    y, read = sparse_mlp(x, a, UP, DOWN)
    np.testing.assert_allclose(y, DOWN @ (masked * (UP @ x)), rtol=1e-10, atol=1e-12)
    assert read == np.count_nonzero(masked) * (5 + 5)
    if relu and tau == 0:
        assert np.array_equal(a > 0, GATE @ x > 0)
