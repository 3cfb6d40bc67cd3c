"""Inputs that count: the sparse product is the masked dense one, and what is read is what is kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.errors import FormatError
from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import TokenInputs
from refllm.kernels.packed.kept import PatternInputs, ThresholdInputs
from refllm.kernels.packed.records import from_parts, meta, parts
from refllm.kernels.packed.sparse import Plain
from refllm.methods.quant.rtn import rtn
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


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_counts_is_rounded_with_a_scale_of_its_own(backend, bits, monkeypatch):
    """Integer products of masked inputs; where all count, those of TokenInputs."""
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    X = np.random.default_rng(3).standard_normal((5, 16), np.float32)
    X[:, 1] *= 100  # not kept: its factor is 0
    factor = np.ones((1, 16), np.float32)
    factor[0, 1] = 0
    weight = rtn(W, bits=8, symmetric=True, group_size=-1)
    record = PatternInputs(weight, factor, 2, 4, 1, bits)
    masked = np.where(slow_pattern(np.abs(X) * factor, 2, 4, 1), X, np.float32(0))
    steps, scale, zero = record.steps(X)
    most = (1 << (bits - 1)) - 1
    np.testing.assert_array_equal(scale, np.abs(masked).max(axis=1, keepdims=True) / np.float32(most))
    np.testing.assert_array_equal(steps, np.rint(masked / scale))
    assert steps.dtype == np.int8 and zero is None and scale.max() < 1 + 99 * (bits == 2)
    np.testing.assert_array_equal(matmul(X, record), matmul(masked, TokenInputs(weight, f"int{bits}")))
    whole = PatternInputs(weight, None, 4, 4, 1, bits)
    np.testing.assert_array_equal(matmul(X, whole), matmul(X, TokenInputs(weight, f"int{bits}")))
    X[2, 5] = np.nan
    assert np.isnan(matmul(X, record)).all(axis=1).tolist() == [False, False, True, False, False]


def test_a_record_stored_before_inputs_could_be_rounded_is_read():
    record = PatternInputs(Plain(W), None, 2, 4, 1)
    described = meta(record)
    assert described.pop("bits") == 0
    again = from_parts(record.kind, dict(parts(record)), described)
    assert again.bits == 0 and again.m == 4
    del described["m"]
    with pytest.raises(FormatError, match="meta 'm' must be int, got None"):
        from_parts(record.kind, dict(parts(record)), described)


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
        (lambda: PatternInputs(Plain(W), None, 1, 2, 1, 9), "bits of inputs must be 2 to 8, or 0 for none, got 9"),
        (lambda: PatternInputs(Plain(W), None, 1, 3, 1), "need a multiple of 3 columns, got 16"),
        (lambda: PatternInputs(Plain(W), -np.ones((1, 16), np.float32), 1, 2, 1), "factor must not be negative"),
        (lambda: ThresholdInputs(ThresholdInputs(Plain(W), AT(1)), AT(1)), "whose inputs are not rounded"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
