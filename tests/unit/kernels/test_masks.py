"""Scores to masks: exact counts, stable ties, errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.masks import keep_n_of_m, keep_top, keep_top_per_row
from tests.strategies import PROPERTY, mixed_weights


@PROPERTY
@given(mixed_weights(columns=12), st.floats(0, 1))
def test_exact_counts_and_nothing_kept_below_what_went(W, sparsity):
    scores = np.abs(W)
    whole, rows = keep_top(scores, sparsity), keep_top_per_row(scores, sparsity)
    assert (~whole).sum() == int(sparsity * W.size)
    assert ((~rows).sum(axis=1) == int(sparsity * 12)).all()
    if whole.any() and not whole.all():
        assert scores[whole].min() >= scores[~whole].max()


@PROPERTY
@given(mixed_weights(columns=12), st.sampled_from([(2, 4), (1, 4), (4, 4), (0, 4), (1, 2), (3, 6)]))
def test_n_of_m_keeps_the_best_n_of_each_group(W, pattern):
    n, m = pattern
    scores = np.abs(W)
    mask = keep_n_of_m(scores, n, m)
    assert (mask.reshape(-1, m).sum(axis=1) == n).all()
    best = np.sort(scores.reshape(-1, m), axis=1)[:, m - n :].sum(axis=1, dtype=np.float64)
    kept = (scores * mask).reshape(-1, m).sum(axis=1, dtype=np.float64)
    assert np.allclose(kept, best, rtol=1e-6, atol=0)


def test_among_ties_the_lowest_index_goes_first():
    ties = np.ones((2, 4))
    assert keep_top(ties, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert keep_top_per_row(ties, 0.5).tolist() == [[False, False, True, True]] * 2
    assert keep_n_of_m(ties, 2, 4).tolist() == [[False, False, True, True]] * 2


def test_scaling_scores_changes_nothing():
    scores = np.abs(np.random.default_rng(0).standard_normal((5, 16)))
    assert np.array_equal(keep_top(scores, 0.3), keep_top(scores * 8, 0.3))
    assert np.array_equal(keep_n_of_m(scores, 2, 4), keep_n_of_m(scores * 8, 2, 4))
    assert keep_top(scores, 0).all() and not keep_top(scores, 1).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keep_top(np.array([[np.nan]]), 0.5), "NaN"),
        (lambda: keep_top(np.ones(3), 0.5), r"\[out, in\]"),
        (lambda: keep_top(np.ones((1, 3)), 1.5), "between 0 and 1"),
        (lambda: keep_n_of_m(np.ones((1, 6)), 2, 4), "multiple of 4 columns, got 6"),
        (lambda: keep_n_of_m(np.ones((1, 4)), 5, 4), "5:4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
