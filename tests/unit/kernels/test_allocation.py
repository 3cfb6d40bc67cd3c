"""allocate and anneal: against every choice there is, and their promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.allocation import _next_step, allocate, anneal
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


@PROPERTY
@given(problems(), st.integers(0, 2**32 - 1))
def test_from_any_start_only_gains_within_the_budget(problem, seed):
    loss, nbytes, budget = problem
    every, rng = np.arange(len(loss)), np.random.default_rng(seed)
    start = rng.integers(loss.shape[1], size=len(loss))
    if nbytes[every, start].sum() > budget:
        with pytest.raises(ValueError, match="raise the target"):
            allocate(loss, nbytes, budget, start)
        return
    choice = allocate(loss, nbytes, budget, start)
    assert nbytes[every, choice].sum() <= budget
    assert (loss[every, choice] <= loss[every, start]).all()
    for t in every:  # nothing that loses less is free
        assert not ((loss[t] < loss[t, choice[t]]) & (nbytes[t] <= nbytes[t, choice[t]])).any()


@PROPERTY
@given(problems(), st.integers(0, 99))
def test_annealing_keeps_the_budget_and_cold_only_gains(problem, seed):
    loss, nbytes, budget = problem
    every, rng = np.arange(len(loss)), np.random.default_rng(seed)
    chains = anneal(np.stack([loss, 2 * loss]), nbytes, budget, np.geomspace(40, 0.05, 60), 12, rng)
    assert chains.shape == (2, len(loss)) and (nbytes[every, chains].sum(axis=1) <= budget).all()
    least = allocate(loss, nbytes, int(nbytes.min(axis=1).sum()))  # the cheapest, of equals the best
    cold = anneal(loss[None], nbytes, budget, np.full(20, 1e-9), 2, rng)[0]
    assert (loss[every, cold] <= loss[every, least]).all()


def test_annealing_finds_what_the_hull_misses():
    """Sixteen chains on the example that costs the walk along the hull one: nearly all end at the best."""
    loss, nbytes = np.array([[9.0, 1, 0], [4, 3, 0]]), np.array([[2, 4, 8], [2, 4, 8]])
    ends = anneal(np.tile(loss, (16, 1, 1)), nbytes, 8, np.geomspace(5, 0.05, 100), 5, np.random.default_rng(1))
    assert (loss[[0, 1], ends].sum(axis=1) == 4).mean() > 0.9
    assert loss[[0, 1], allocate(loss, nbytes, 8)].sum() == 5


def test_annealing_is_warm_at_first():
    """At a temperature far above all losses every choice is as likely as any other; at 1, Boltzmann's law."""
    loss, nbytes = np.tile(np.array([[0.0, 1.0, 2.0]]), (3000, 1, 1)), np.ones((1, 3), int)
    ends = anneal(loss, nbytes, 1, np.full(6, 1e6), 4, np.random.default_rng(0))[:, 0]
    assert np.abs(np.bincount(ends, minlength=3) / 3000 - 1 / 3).max() < 0.04
    half = np.exp(-np.arange(3) / 1.0) / np.exp(-np.arange(3) / 1.0).sum()
    ends = anneal(loss, nbytes, 1, np.full(40, 1.0), 2, np.random.default_rng(0))[:, 0]
    assert np.abs(np.bincount(ends, minlength=3) / 3000 - half).max() < 0.04


def test_annealing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="the cheapest options take 4 bytes, the budget is 3: raise the target"):
        anneal(np.zeros((1, 2, 1)), np.array([[2], [2]]), 3, np.ones(1), 1, np.random.default_rng(0))
