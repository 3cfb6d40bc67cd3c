"""allocate: against every choice there is, and its promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.allocation import _next_step, allocate
from tests.strategies import PROPERTY


@st.composite
def problems(draw):
    tensors, options = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    numbers = lambda low, high: st.lists(st.integers(low, high), min_size=options, max_size=options)
    rows = st.lists(numbers(0, 40), min_size=tensors, max_size=tensors)
    loss, nbytes = np.array(draw(rows), float), np.array(draw(rows)) + 1
    least = nbytes.min(axis=1).sum()
    return loss, nbytes, int(draw(st.integers(least, nbytes.max(axis=1).sum() + 2)))


def best_of_all(loss, nbytes, budget):
    """Least loss within the budget, by trying all choices."""
    tensors = range(len(loss))
    tried = itertools.product(range(loss.shape[1]), repeat=len(loss))
    return min(
        sum(loss[t, o] for t, o in zip(tensors, choice, strict=True))
        for choice in tried
        if sum(nbytes[t, o] for t, o in zip(tensors, choice, strict=True)) <= budget
    )


@PROPERTY
@given(problems())
def test_within_the_budget_and_within_one_step_of_the_best(problem):
    loss, nbytes, budget = problem
    choice = allocate(loss, nbytes, budget)
    tensors = np.arange(len(loss))
    spent, lost = nbytes[tensors, choice].sum(), loss[tensors, choice].sum()
    assert spent <= budget
    best = best_of_all(loss, nbytes, budget)
    assert best <= lost + 1e-9
    left = [_next_step(loss[t], nbytes[t], choice[t]) for t in tensors]
    unfit = [loss[t, choice[t]] - loss[t, step[1]] for t, step in enumerate(left) if step is not None]
    assert lost - best <= max(unfit, default=0) + 1e-9  # nothing left to do: the best there is


@PROPERTY
@given(problems())
def test_enough_for_everything_gives_the_least_loss_and_more_budget_never_hurts(problem):
    loss, nbytes, budget = problem
    tensors = np.arange(len(loss))
    lost = lambda b: loss[tensors, allocate(loss, nbytes, b)].sum()
    cheapest = nbytes[tensors, allocate(loss, nbytes, nbytes.min(axis=1).sum())]
    reachable = np.where(nbytes >= cheapest[:, None], loss, np.inf).min(axis=1)
    assert lost(nbytes.sum()) == reachable.sum()
    assert lost(nbytes.sum()) <= lost(budget)


def test_ties_go_to_the_first_tensor():
    loss, nbytes = np.array([[2.0, 0], [2, 0]]), np.array([[1, 2], [1, 2]])
    assert allocate(loss, nbytes, 3).tolist() == [1, 0]


def test_a_step_that_does_not_fit_leaves_room_for_smaller_ones():
    loss, nbytes = np.array([[100.0, 0], [1, 0]]), np.array([[1, 50], [1, 3]])
    assert allocate(loss, nbytes, 10).tolist() == [0, 1]


def test_what_is_refused():
    loss, nbytes = np.array([[2.0, 0]]), np.array([[5, 9]])
    with pytest.raises(ValueError, match="take 5 bytes, the budget is 4"):
        allocate(loss, nbytes, 4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        allocate(np.array([[np.nan, 0]]), nbytes, 9)
    with pytest.raises(ValueError, match="alike"):
        allocate(loss, nbytes[:, :1], 9)
