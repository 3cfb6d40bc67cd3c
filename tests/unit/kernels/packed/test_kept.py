"""Inputs that count: the sparse product is the masked dense one, and what is read is what is kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.packed import matmul
from refllm.kernels.packed.kept import PatternInputs, ThresholdInputs
from refllm.kernels.packed.sparse import Plain
from tests.strategies import PROPERTY, inputs

W = np.random.default_rng(0).standard_normal((6, 16), np.float32)
AT = lambda x: np.full((1, 1), x, np.float32)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_sparse_product_is_the_masked_dense_one(backend, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    X = np.random.default_rng(1).standard_normal((5, 16), np.float32)
    factor = np.abs(W[:1])
    for record, kept in (
        (ThresholdInputs(Plain(W), AT(0.7)), np.abs(X) > 0.7),
        (PatternInputs(Plain(W), factor, 2, 4, 1), slow_pattern(np.abs(X) * factor, 2, 4, 1)),
        (PatternInputs(Plain(W), None, 1, 2, 4), slow_pattern(np.abs(X), 1, 2, 4)),
    ):
        np.testing.assert_array_equal(record.kept(X), kept)
        np.testing.assert_allclose(matmul(X, record), np.where(kept, X, 0) @ W.T, rtol=1e-5, atol=1e-5)
        assert record.columns_read(X) == kept.any(axis=0).sum() and record.columns_read(X[:1]) == kept[0].sum()
        assert record.bytes_read(X[:1]) == 6 * 4 * kept[0].sum()


def slow_pattern(score, n, m, block):
    kept = np.zeros(score.shape, bool)
    for t, row in enumerate(score):
        units = [sum(float(s) ** 2 for s in row[i : i + block]) for i in range(0, len(row), block)]
        for start in range(0, len(units), m):
            for unit in sorted(range(start, start + m), key=lambda i: (-units[i], i))[:n]:
                kept[t, unit * block : (unit + 1) * block] = True
    return kept


@PROPERTY
@given(inputs(16), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_exactly_n_of_m_survive_and_all_of_m_is_the_identity(X, n, block):
    record = PatternInputs(Plain(W), None, n, 4, block)
    assert (record.kept(X).reshape(len(X), -1, 4, block).all(axis=-1).sum(axis=-1) == n).all()
    whole = PatternInputs(Plain(W), None, 4, 4, block)
    assert (
        whole.rounded(X).tobytes() == np.where(X == 0, np.float32(0) * X, X).tobytes() or (whole.rounded(X) == X).all()
    )


def test_ties_go_to_the_lower_index_and_nan_shows():
    record = PatternInputs(Plain(W[:, :4]), None, 2, 4, 1)
    assert record.kept(np.float32([[1, 1, -1, 1], [0, 0, 0, 0]])).tolist() == [[True, True, False, False]] * 2
    for made in (record, ThresholdInputs(Plain(W[:, :4]), AT(1))):
        y = matmul(np.float32([[0, np.nan, 9, 9], [0, 0, 9, 9]]), made)
        assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_a_batch_needs_the_union():
    """s^B of the columns are spared, if tokens are independent: within 4 standard deviations."""
    X = np.random.default_rng(2).standard_normal((8, 4096), np.float32)
    record = ThresholdInputs(Plain(np.ones((1, 4096), np.float32)), AT(1.0))
    s = 0.6826895  # of a normal number within one deviation
    for B in (1, 2, 4, 8):
        spared = 1 - record.columns_read(X[:B]) / 4096
        assert abs(spared - s**B) < 4 * np.sqrt(s**B * (1 - s**B) / 4096)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThresholdInputs(Plain(W), AT(-1)), "threshold must not be negative, got -1.0"),
        (lambda: PatternInputs(Plain(W), None, 5, 4, 1), "got 5:4 of 1"),
        (lambda: PatternInputs(Plain(W), None, 1, 3, 1), "need a multiple of 3 columns, got 16"),
        (lambda: PatternInputs(Plain(W), -np.ones((1, 16), np.float32), 1, 2, 1), "factor must not be negative"),
        (lambda: ThresholdInputs(ThresholdInputs(Plain(W), AT(1)), AT(1)), "whose inputs are not rounded"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
