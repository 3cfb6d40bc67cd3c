"""Rounding margins: by hand, and that the bound holds and is not idle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import solve_triangular

from refllm.kernels.linalg import damped, inverse_factor
from refllm.kernels.margins import Margins, margins, sweep_bound, total
from refllm.kernels.obs import obs_sweep
from refllm.kernels.stats import Stats
from tests.strategies import PROPERTY, SEEDS, inputs


def test_distances_by_hand():
    assert margins(np.array([0.25, -1.125]), 0.125) == Margins(2, 0.25, 2.0, 0)
    assert margins(np.array([[0.5]]), 0.0) == Margins(1, 0.0, 0.0, 1)  # a tie is never safe
    assert margins(np.array([0.25]), 0.25) == Margins(1, 0.25, 1.0, 1)
    assert margins(np.array([0.25]), 0.0).safety == np.inf
    assert margins(np.zeros(0), 0.0) == Margins(0, np.inf, np.inf, 0)


def test_nothing_is_decided_beyond_the_ends():
    assert margins(np.array([15.5, 17.0, -0.5, -3.0]), 0.1, 0, 15).closest == 1.0
    assert margins(np.array([14.5]), 0.1, 0, 15).closest == 0.0
    assert margins(np.array([0.4]), 0.1, 0, 15).closest == pytest.approx(0.1)


@PROPERTY
@given(st.integers(-130, 130), st.floats(-3, 3))
def test_float32_moves_a_boundary_past_its_half(whole, steps):
    """Less than the distance to it changes no code, a hair more does."""
    value = whole + 0.5 + steps * np.spacing(np.float32(abs(whole + 0.5))).item()
    code = lambda v: int(np.rint(np.float32(v)))
    distance = margins(np.array([value]), 0.0, by_float32=True).closest
    nearer, beyond = distance * (1 - 2.0**-20), distance * (1 + 2.0**-20) + 2.0**-44
    assert {code(value - nearer), code(value + nearer)} == {code(value)}
    assert {code(value - beyond), code(value + beyond)} != {code(value)}


def test_total():
    one, other = Margins(3, 0.25, 4.0, 0), Margins(2, 0.125, 0.5, 1)
    assert total([one, other]) == total(iter([other, one])) == Margins(5, 0.125, 0.5, 1)
    assert total([]) == Margins(0, np.inf, np.inf, 0)


def swept(W, U, fixed=None):
    """Values before rounding; with `fixed`, rounded to these whatever the values are."""
    seen = np.empty(W.shape)

    def project(w, j, W_now):
        seen[:, j] = w
        return np.rint(4 * w) / 4 if fixed is None else fixed[:, j]

    return (seen, *obs_sweep(W, U, project))


@PROPERTY
@given(st.integers(1, 16).flatmap(lambda n: inputs(n)), SEEDS)
def test_another_order_of_sums_stays_within_the_bound(X, seed):
    """H by BLAS from shuffled tokens and U by LAPACK's factor and inverse; the same numbers fixed on the way."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(3, X.shape[1]))
    H = damped(Stats(X).H)
    U = inverse_factor(H)
    values, Q, E = swept(W, U)
    x = X[rng.permutation(len(X))].astype(np.float64)
    L = np.linalg.cholesky(damped(x.T @ x)[::-1, ::-1])
    theirs = solve_triangular(L, np.eye(len(L)), lower=True)[::-1, ::-1]
    bound = sweep_bound(W, Q, E, U, H, len(X))
    assert (np.abs(swept(W, theirs, Q)[0] - values) <= bound).all()


def test_the_bound_is_small_for_a_real_size():
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(1000, 200)) @ rng.normal(size=(200, 200))).astype(np.float32)
    W, H = rng.normal(size=(20, 200)), damped(Stats(X).H)
    U = inverse_factor(H)
    values, Q, E = swept(W, U)
    bound = sweep_bound(W, Q, E, U, H, 1000)
    assert 0 < bound.max() < 1e-6
    assert (bound[:, 0] < 1e-14).all()  # the first column has seen no sum
    assert margins(4 * values, 4 * bound).unsafe == 0
