"""Rotated: the product with turned inputs, where they are rounded, and what a file or a caller may not say."""

import numpy as np
import pytest

from refllm.kernels.hadamard import hadamard, turn
from refllm.kernels.packed import has_codes, matmul
from refllm.kernels.packed.records import Rotated
from refllm.methods.quant import rtn

rng = np.random.default_rng(0)
W = rng.normal(size=(10, 48)).astype(np.float32)
X = rng.normal(size=(5, 48)).astype(np.float32)


@pytest.mark.parametrize("inner", [1, 2, 3, 4, 12, 48])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_turned_weight_and_turned_inputs_give_the_same_product(inner, dtype):
    record = Rotated.of(W.astype(dtype), inner)
    y = matmul(X.astype(dtype), record)
    assert y.dtype == dtype and record.weight.dtype == dtype and record.nbytes == W.size * y.itemsize
    np.testing.assert_allclose(y, X.astype(dtype) @ W.T, atol=1e-4 if dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(record.dense(), W, atol=1e-6)


def test_stored_is_w_times_q():
    Q = np.kron(hadamard(12), np.eye(4)) / 12**0.5
    np.testing.assert_allclose(Rotated.of(W, 4).weight, W @ Q, atol=1e-6)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("activations", ["float32", "int8", "int4"])
def test_activations_are_rounded_after_the_turn(activations, backend, monkeypatch):
    """A spike, which alone would take the whole range of a token, is spread before anything is rounded."""
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    inside = rtn(turn(W), bits=8, group_size=16)
    record = Rotated(inside, 1)
    assert has_codes(record) and not has_codes(Rotated.of(W))
    assert np.array_equal(matmul(X, record, activations), matmul(turn(X), inside, activations))
    if activations == "int4":
        spiked = X + 20 * (np.arange(48) == 7).astype(np.float32)
        exact = spiked @ record.dense().T
        error = lambda y: np.linalg.norm(y - exact)
        plain = rtn(W, bits=8, group_size=16)
        assert 2 * error(matmul(spiked, record, activations)) < error(matmul(spiked, plain, activations))


def test_what_cannot_be_turned_is_refused():
    with pytest.raises(ValueError, match="is 9 wide"):
        Rotated(np.zeros((2, 36), np.float32), 4)
    with pytest.raises(ValueError, match="inner must divide the width 48, got 5"):
        Rotated(W, 5)
    with pytest.raises(ValueError, match="weight must be a non-empty matrix"):
        Rotated(W[0], 1)
    with pytest.raises(ValueError, match="weight must be float16 or float32 or float64"):
        Rotated(W.astype(np.int8), 1)
    with pytest.raises(ValueError, match="NaN or Inf"):
        Rotated(W * np.nan, 1)
