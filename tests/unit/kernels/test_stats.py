"""Stats: sums against loops, and that they are taken in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.stats import Stats
from tests.strategies import inputs


@given(st.integers(1, 8).flatmap(lambda columns: inputs(columns)))
def test_sums_equal_the_loops(X):
    stats = Stats(X)
    rows, columns = X.shape
    assert stats.n == rows
    for j in range(columns):
        column = [float(x) for x in X[:, j]]
        assert stats.absmax[j] == max(abs(x) for x in column)
        assert stats.sum_squares[j] == pytest.approx(sum(x * x for x in column), rel=1e-12)
        for k in range(columns):
            product = [x * float(y) for x, y in zip(column, X[:, k], strict=True)]
            assert stats.H[j, k] == pytest.approx(sum(product), rel=1e-12, abs=1e-12 * sum(map(abs, product)))


def test_by_hand():
    stats = Stats(np.array([[1.0, -2.0], [3.0, 0.5]], np.float32))
    assert stats.sum_squares.tolist() == [10.0, 4.25]
    assert stats.absmax.tolist() == [3.0, 2.0]
    assert stats.H.tolist() == [[10.0, -0.5], [-0.5, 4.25]]


def test_sums_are_float64():
    """A million ones after one 2^13: 2^26 + 1 does not exist in float32. Float16-sized squares do not overflow."""
    X = np.ones((1001, 1), np.float32)
    X[0] = 2.0**13
    stats = Stats(X)
    assert stats.sum_squares[0] == stats.H[0, 0] == 2.0**26 + 1000
    assert Stats(np.full((2, 1), 1e30, np.float32)).sum_squares[0] == pytest.approx(2e60)
    assert {stats.sum_squares.dtype, stats.absmax.dtype, stats.H.dtype} == {np.dtype(np.float64)}


@given(inputs(5), st.integers(-4, 4))
def test_scaling_by_a_power_of_two_is_exact(X, power):
    factor = np.float32(2.0**power)
    a, b = Stats(X), Stats(X * factor)
    np.testing.assert_array_equal(b.sum_squares, a.sum_squares * 4.0**power)
    np.testing.assert_array_equal(b.absmax, a.absmax * 2.0**power)
    np.testing.assert_array_equal(b.H, a.H * 4.0**power)


def test_memory_order_does_not_matter_and_inputs_stay():
    X = np.random.default_rng(0).integers(-8, 9, (6, 4)).astype(np.float32)
    X.flags.writeable = False
    strided = np.zeros((12, 8), np.float32)
    strided[::2, ::2] = X
    for other in (np.asfortranarray(X), strided[::2, ::2]):
        assert Stats(other).sum_squares.tolist() == Stats(X).sum_squares.tolist()
        assert Stats(other).H.tolist() == Stats(X).H.tolist()


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((0, 3)), r"at least one row, got shape \(0, 3\)"),
        (np.zeros((3, 0)), r"got shape \(3, 0\)"),
        (np.zeros(3), r"got shape \(3,\)"),
        (np.zeros((1, 2, 3)), r"got shape \(1, 2, 3\)"),
        (np.array([[0.0], [1.0], [np.nan], [np.inf]]), "NaN or infinity .first in row 2"),
        (np.array([[-np.inf, 0.0]]), "NaN or infinity .first in row 0"),
    ],
)
def test_bad_input_is_one_clear_line(X, message):
    with pytest.raises(ValueError, match=message):
        Stats(X)
