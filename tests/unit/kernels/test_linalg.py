"""Damping and the inverse factor: by hand, exactly, against LAPACK, and errors."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels import linalg
from refllm.kernels.linalg import damped, inverse_factor
from refllm.kernels.stats import Stats
from tests.strategies import PROPERTY, SEEDS, inputs


def dyadic_factor(n, seed):
    """R upper with powers of two on its diagonal and multiples of 1/4 above: R, R R^T and R^-1 are exact."""
    rng = np.random.default_rng(seed)
    R = np.triu(rng.integers(-4, 5, (n, n)) / 4.0, 1)
    return R + np.diag(2.0 ** rng.integers(-1, 2, n))


def exact_inverse(R):
    """R^-1 of an upper triangular matrix in fractions, row by row from the last."""
    n = len(R)
    rows = [[Fraction(0)] * n for _ in range(n)]
    for i in reversed(range(n)):
        for k in range(i, n):
            total = Fraction(int(i == k)) - sum(Fraction(float(R[i, j])) * rows[j][k] for j in range(i + 1, n))
            rows[i][k] = total / Fraction(float(R[i, i]))
    return np.array([[float(x) for x in row] for row in rows])


@PROPERTY
@given(st.integers(1, 9), SEEDS)
def test_dyadic_factors_are_exact(n, seed):
    R = dyadic_factor(n, seed)
    np.testing.assert_array_equal(inverse_factor(R @ R.T), exact_inverse(R))


@PROPERTY
@given(st.integers(1, 12).flatmap(lambda columns: inputs(columns)))
def test_it_is_the_upper_factor_of_the_inverse(X):
    H = damped(Stats(X).H)
    U = inverse_factor(H)
    np.testing.assert_array_equal(U, np.triu(U))
    assert (np.diag(U) > 0).all()
    n = len(H)
    # Backward errors of the two triangular steps, times the condition of H (at most n / 0.01 + 1 after damping).
    np.testing.assert_allclose(U @ H @ U.T, np.eye(n), atol=20 * n * 2.0**-53 * np.linalg.cond(H))
    np.testing.assert_allclose(U.T @ U @ H, np.eye(n), atol=20 * n * 2.0**-53 * np.linalg.cond(H) ** 1.5)


def test_row_j_is_the_inverse_of_what_is_left():
    H = damped(Stats(np.random.default_rng(0).normal(size=(30, 6))).H)
    U = inverse_factor(H)
    for j in range(6):
        first = np.linalg.inv(H[j:, j:])[0]
        np.testing.assert_allclose(U[j, j:], first / np.sqrt(first[0]), rtol=1e-10)


def test_it_is_neither_the_lower_factor_nor_that_of_h():
    H = np.array([[2.0, 1.0], [1.0, 1.0]])
    U = inverse_factor(H)
    np.testing.assert_allclose(U, np.linalg.cholesky(np.linalg.inv(H)).T)
    assert not np.allclose(U, np.linalg.cholesky(H).T) and U[1, 0] == 0


@pytest.mark.parametrize("n", [63, 64, 65, 130, 200])
def test_blocks_and_text_change_no_bit(n, monkeypatch):
    H = damped(Stats(np.random.default_rng(n).normal(size=(n, n)).astype(np.float32)).H)
    U = inverse_factor(H)
    for block in (1, 7, n):
        monkeypatch.setattr(linalg, "BLOCK", block)
        assert inverse_factor(H).tobytes() == U.tobytes()
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    monkeypatch.setattr(linalg, "BLOCK", 50)
    assert inverse_factor(H).tobytes() == U.tobytes()


@PROPERTY
@given(st.integers(1, 8).flatmap(lambda columns: inputs(columns)), st.integers(-6, 6))
def test_a_power_of_four_comes_out_as_its_root(X, power):
    """Without dead inputs: their 1 does not scale."""
    H = Stats(X).H + np.eye(X.shape[1])
    U = inverse_factor(damped(H))
    np.testing.assert_array_equal(inverse_factor(damped(H * 4.0**power)), U * 2.0**-power)


def test_damping_counts_dead_inputs_and_leaves_h_alone():
    H = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    H.flags.writeable = False
    assert damped(H, 0.75).tolist() == [[6.0, 1.0, 0.0], [1.0, 5.0, 0.0], [0.0, 0.0, 3.0]]  # mean (4 + 3 + 1) / 3
    assert damped(H, 0).tolist() == [[4.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 1.0]]
    assert damped(np.zeros((2, 2))).tolist() == [[1.01, 0.0], [0.0, 1.01]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: damped(np.ones((2, 3))), r"square .* got shape \(2, 3\)"),
        (lambda: damped(np.ones(3)), r"square .* got shape \(3,\)"),
        (lambda: damped(np.zeros((0, 0))), "square"),
        (lambda: damped(np.array([[np.nan]])), "NaN or Inf"),
        (lambda: damped(np.array([[1.0, np.inf], [0.0, 1.0]])), "NaN or Inf"),
        (lambda: damped(np.array([[-1.0]])), "negative number on its diagonal, -1"),
        (lambda: damped(np.eye(2), -0.1), "damp must be .* got -0.1"),
        (lambda: damped(np.eye(2), np.nan), "damp must be .* got nan"),
        (lambda: damped(np.eye(2), np.inf), "damp must be .* got inf"),
        (lambda: inverse_factor(np.ones((2, 2))), "of 2 inputs, number 0 depends on those after it; raise damp"),
        (lambda: inverse_factor(np.array([[1.0, 2.0], [2.0, 1.0]])), "not positive definite"),
        (lambda: inverse_factor(np.zeros((2, 2))), "of 2 inputs, number 1"),
        (lambda: inverse_factor(np.full((2, 2), np.nan)), "singular or not positive definite"),
        (lambda: inverse_factor(Stats(np.random.default_rng(0).normal(size=(5, 40))).H), "of 40 inputs.*raise damp"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
