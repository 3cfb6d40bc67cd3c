"""The shared strategies draw what their names say; a property test over tame inputs proves nothing."""

import numpy as np
import pytest
from hypothesis import find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from tests.strategies import (
    ACTIVATION_ROWS,
    KINDS,
    WEIGHT_ROWS,
    activation_row,
    activations,
    gamma,
    group_sizes,
    inputs,
    mixed_weights,
    weight_row,
    weights,
)

SEARCH = settings(max_examples=2000, derandomize=True, database=None)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda W: (W == 0).all(axis=1).any(),
        lambda W: np.abs(W).max() == 1000,
        lambda W: (np.abs(W).max(axis=1) < 1e-38).any() and np.abs(W).max() > 1e-38,
        lambda W: ((W == 0) & np.signbit(W)).any(),
        lambda W: ((W * 2 == np.rint(W * 2)).all(axis=1) & (W != np.rint(W)).any(axis=1)).any(),
        lambda W: (W > 0).all() and len(np.unique(W)) > 1,
        lambda W: len(W) >= 3 and len({np.abs(row).max() > 900 for row in W}) == 2,
    ],
)
def test_weights_contain(wanted):
    find(mixed_weights(columns=8), wanted, settings=SEARCH)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda x: (x == 127).all(),
        lambda x: (x == -127).all(),
        lambda x: (x == 0).all(),
        lambda x: np.count_nonzero(x) == 1,
        lambda x: np.abs(x).max() > 1e12 and np.abs(x[x != 0]).min() < 1e-6,
        lambda x: 0 < np.abs(x).max() < 1e-38,
        lambda x: len(x) == 3,
        lambda x: x.max() == 127 and (x == np.rint(x)).all() and len(np.unique(x)) > 5,
        lambda x: x.max() == 127 and (x * 2 == np.rint(x * 2)).all() and (x != np.rint(x)).any(),
    ],
)
def test_activations_contain(wanted):
    find(activations(8), wanted, settings=SEARCH)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda W: (W == W[0, 0]).all() and W.size > 3 and W[0, 0] != 0,
        lambda W: (W == 0).all(axis=1).any() and (W != 0).any(),
        lambda W: (W == 0).all(),
        lambda W: W.max() == 100,
        lambda W: W.size > 4 and ((W > 0).all() or (W < 0).all()) and len(np.unique(W)) > 1,
        lambda W: 0 < np.abs(W).max() < 1e-5,
        lambda W: len(W) > 1 and np.abs(W).max(axis=1).max() > 50 * np.abs(W).max(axis=1).min() > 0,
        lambda W: W.shape[1] == 1,
    ],
)
def test_whole_matrices_contain(wanted):
    find(weights(), wanted, settings=SEARCH)
    assert len(KINDS) == 9


@pytest.mark.parametrize(
    "wanted",
    [
        lambda X: len(X) < X.shape[1],
        lambda X: (X == 0).all(axis=0).any(),
        lambda X: len(X) > 1 and (X == X[0]).all(),
        lambda X: np.abs(X).max() > 50,
        lambda X: len(X) > 1 and 0 < np.ptp(X, axis=1).max() < 0.1,  # columns nearly equal
    ],
)
def test_calibration_inputs_contain(wanted):
    find(inputs(4), lambda X: wanted(X.astype(np.float64)), settings=SEARCH)


def test_every_kind_of_row_is_float32_and_finite():
    for kind in WEIGHT_ROWS:
        assert weight_row(kind, 5, 1).dtype == np.float32 and np.isfinite(weight_row(kind, 5, 1)).all()
    for kind in ACTIVATION_ROWS:
        assert activation_row(kind, 5, 1).dtype == np.float32 and np.isfinite(activation_row(kind, 5, 1)).all()
    with pytest.raises(ValueError, match="unknown kind"):
        weight_row("nothing", 5, 1)


def test_group_sizes_divide_and_all_are_drawn():
    for g in (-1, 0, 1, 2, 3, 4, 6, 12):
        assert find(group_sizes(12), lambda drawn, g=g: drawn == g, settings=SEARCH) == g
    with pytest.raises(NoSuchExample):
        find(
            group_sizes(12),
            lambda drawn: drawn == 5,
            settings=settings(max_examples=200, derandomize=True, database=None),
        )


def test_rows_and_columns_may_be_strategies():
    W = find(mixed_weights(st.just(3), st.integers(2, 5)), lambda W: W.shape == (3, 5), settings=SEARCH)
    assert W.dtype == np.float32


def test_gamma():
    assert gamma(1) == pytest.approx(2**-24, rel=1e-6) and gamma(1000) > 1000 * 2**-24
