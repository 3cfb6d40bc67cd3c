"""The second-order column loop: against explicit elimination of H^-1, its identities, and its edges."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.linalg import damped, inverse_factor
from refllm.kernels.obs import obs_sweep
from refllm.kernels.stats import Stats
from tests.strategies import PROPERTY, SEEDS, inputs
from tests.unit.kernels.test_linalg import dyadic_factor, exact_inverse


def to_quarters(w, j, W_now):
    return np.rint(4 * w) / 4


def drop_small(w, j, W_now):
    return np.where(np.abs(w) < 0.5, 0, w)


def eliminate(W, H_inverse, project):
    """Optimal brain surgery as written: one column goes, then its row and column leave H^-1. In fractions."""
    rows, columns = W.shape
    W = [[Fraction(float(x)) for x in row] for row in W]
    A = [[Fraction(float(x)) for x in row] for row in H_inverse]
    Q = np.empty((rows, columns))
    for j in range(columns):
        for i in range(rows):
            q = Fraction(float(project(np.array([float(W[i][j])]), j, None)[0]))
            Q[i, j] = float(q)
            step = (W[i][j] - q) / A[j][j]
            for k in range(j, columns):
                W[i][k] -= step * A[j][k]
            assert W[i][j] == q
        pivot = list(A[j])
        for m in range(columns):
            for k in range(columns):
                A[m][k] -= pivot[m] * pivot[k] / pivot[j]
    return Q


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 8), SEEDS, st.sampled_from((to_quarters, drop_small)), st.integers(1, 9))
def test_equals_elimination_bit_for_bit_on_dyadic_numbers(rows, columns, seed, project, block):
    R = dyadic_factor(columns, seed)
    W = np.random.default_rng(seed).integers(-64, 65, (rows, columns)) / 32.0
    inverse = exact_inverse(R)
    Q, E = obs_sweep(W, inverse_factor(R @ R.T), project, block)
    np.testing.assert_array_equal(Q, eliminate(W, inverse.T @ inverse, project))
    np.testing.assert_array_equal(E @ inverse, W - Q)


@PROPERTY
@given(st.integers(1, 20).flatmap(lambda n: inputs(n)), st.integers(1, 25), st.integers(1, 25), SEEDS)
def test_the_block_size_changes_no_bit(X, one, other, seed):
    W = np.random.default_rng(seed).normal(size=(3, X.shape[1])).astype(np.float32)
    U = inverse_factor(damped(Stats(X).H))
    first, second = obs_sweep(W, U, to_quarters, one), obs_sweep(W, U, to_quarters, other)
    assert [a.tobytes() for a in first] == [a.tobytes() for a in second]


@PROPERTY
@given(st.integers(1, 12).flatmap(lambda n: inputs(n)), SEEDS, st.sampled_from((to_quarters, drop_small)))
def test_errors_telescope(X, seed, project):
    """W - Q = E U, so the sum of the squared errors is the error of the outputs."""
    W = np.random.default_rng(seed).normal(size=(3, X.shape[1]))
    H = damped(Stats(X).H)
    U = inverse_factor(H)
    Q, E = obs_sweep(W, U, project)
    np.testing.assert_allclose(E @ U, W - Q, rtol=0, atol=1e-10 * max(1, np.abs(E @ U).max()))
    assert np.sum(E**2) == pytest.approx(np.trace((W - Q) @ H @ (W - Q).T), rel=1e-6, abs=1e-9)


@PROPERTY
@given(st.integers(1, 10), SEEDS)
def test_a_diagonal_hessian_passes_nothing_on(columns, seed):
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(4, columns))
    Q, _ = obs_sweep(W, inverse_factor(np.diag(np.exp(rng.normal(size=columns)))), to_quarters)
    np.testing.assert_array_equal(Q, to_quarters(W, 0, W))


def test_each_step_is_the_least_squares_answer():
    """After column 0 is fixed, the rest is what minimises the output error: solved directly."""
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(50, 5)), rng.normal(size=(2, 5))
    H = X.T @ X
    seen = []
    obs_sweep(W, inverse_factor(H), lambda w, j, W_now: (seen.append(W_now.copy()), np.rint(w))[1])
    rest = np.linalg.lstsq(X[:, 1:], X @ W.T - X[:, :1] @ np.rint(W[:, :1]).T, rcond=None)[0].T
    np.testing.assert_allclose(seen[1][:, 1:], rest, rtol=1e-9)


def test_what_project_sees():
    """Columns of the block are up to date, later ones lack the errors of this block, all in one view of W's shape."""
    W, U = np.array([[1.25, 1.0, 1.0, 1.0]]), np.triu(np.ones((4, 4)))
    seen = []
    Q, E = obs_sweep(W, U, lambda w, j, W_now: (seen.append(W_now[0].tolist()), np.floor(w))[1], block=2)
    assert seen[0] == [1.25, 1.0, 1.0, 1.0]
    assert seen[1] == [1.25, 0.75, 1.0, 1.0]  # e = 0.25, passed on inside the block only
    assert seen[2] == [1.25, 0.75, 0.0, 0.0]  # less 0.25 and 0.75, when the block is done
    assert Q.tolist() == [[1.0, 0.0, 0.0, 0.0]] and E.tolist() == [[0.25, 0.75, 0.0, 0.0]]
    assert W.tolist() == [[1.25, 1.0, 1.0, 1.0]]


def test_the_last_column_gives_nothing_and_the_first_gets_nothing():
    rng = np.random.default_rng(1)
    W, H = rng.normal(size=(3, 6)), damped(Stats(rng.normal(size=(20, 6))).H)
    Q, _ = obs_sweep(W, inverse_factor(H), to_quarters)
    np.testing.assert_array_equal(Q[:, 0], to_quarters(W[:, 0], 0, W))
    other = W.copy()
    other[:, -1] += 0.5
    changed, _ = obs_sweep(other, inverse_factor(H), to_quarters)
    np.testing.assert_array_equal(changed[:, :-1], Q[:, :-1])


def test_projecting_to_itself_changes_nothing():
    W = np.random.default_rng(2).normal(size=(3, 7)).astype(np.float32)
    U = np.triu(np.random.default_rng(3).normal(size=(7, 7))) + 9 * np.eye(7)
    Q, E = obs_sweep(np.asfortranarray(W), U, lambda w, j, W_now: w)
    np.testing.assert_array_equal(Q, W)
    assert not E.any()


@pytest.mark.parametrize(
    ("U", "block", "message"),
    [(np.eye(3), 1, r"U must be \(2, 2\) for a weight of 2 columns, got \(3, 3\)"), (np.eye(2), 0, "block .* got 0")],
)
def test_bad_input_is_one_clear_line(U, block, message):
    with pytest.raises(ValueError, match=message):
        obs_sweep(np.ones((1, 2)), U, to_quarters, block)
