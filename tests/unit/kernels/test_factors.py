"""Factors of a truncated matrix: Eckart and Young, the sign rule, equal scales."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.factors import truncated
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
