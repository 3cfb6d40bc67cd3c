"""Factors of a truncated matrix: Eckart and Young, the sign rule, equal scales."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.factors import truncated, whitened, whitening
from tests.strategies import PROPERTY, weights


@PROPERTY
@given(weights(dtype=np.float64), st.integers(1, 6))
def test_what_is_lost_are_the_squares_of_the_dropped_singular_values(W, rank):
    rank = min(rank, *W.shape)
    A, B = truncated(W, rank)
    S = np.linalg.svd(W, compute_uv=False)
    scale = S[0] or 1.0
    assert np.sum((W - A @ B) ** 2) / scale**2 <= np.sum(S[rank:] ** 2) / scale**2 + 1e-10
    np.testing.assert_allclose(np.sum(A**2, axis=0), S[:rank], atol=1e-9 * scale)
    np.testing.assert_allclose(np.sum(B**2, axis=1), S[:rank], atol=1e-9 * scale)
    assert (B[np.arange(rank), np.abs(B).argmax(axis=1)] >= 0).all()


@PROPERTY
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_whitening_is_a_root_of_the_gram_matrix_also_of_dependent_inputs(columns, tokens, seed):
    X = np.random.default_rng(seed).normal(size=(tokens, columns))
    S = whitening(X.T @ X)
    np.testing.assert_allclose(S @ S.T, X.T @ X, atol=2e-6 * np.trace(X.T @ X) + 1e-12)
    assert (np.triu(S, 1) == 0).all() and (np.diag(S) > 0).all()


@PROPERTY
@given(weights(dtype=np.float64), st.integers(1, 6), st.integers(0, 2**31))
def test_no_factors_of_this_rank_are_nearer_in_the_outputs(W, rank, seed):
    rank, rng = min(rank, *W.shape), np.random.default_rng(seed)
    X = rng.normal(size=(3 * W.shape[1], W.shape[1])) * np.geomspace(1, 100, W.shape[1])
    A, B = whitened(W, whitening(X.T @ X), rank)
    best = np.sqrt(np.sum(np.linalg.svd(W @ X.T, compute_uv=False)[rank:] ** 2))
    np.testing.assert_allclose(np.linalg.norm((W - A @ B) @ X.T), best, atol=1e-5 * np.linalg.norm(W @ X.T) + 1e-12)


@pytest.mark.parametrize("gram", [np.zeros((2, 2)), np.array([[1.0, np.nan], [np.nan, 1.0]])])
def test_inputs_that_say_nothing(gram):
    with pytest.raises(ValueError, match="must be finite and not zero"):
        whitening(gram)
