"""Bits for many tensors under one budget: which option each tensor takes.

The problem is a knapsack with one choice a tensor: least total loss, total bytes within a budget. The greedy way along
the lower convex hulls (allocate) is exact for some budgets and never far off for the others. Simulated annealing
(anneal) tries random changes, and takes bad ones more rarely the colder it gets.
"""

import numpy as np


def allocate(loss: np.ndarray, nbytes: np.ndarray, budget: int, start: np.ndarray | None = None) -> np.ndarray:
    """Choose an option for every tensor.

    All tensors begin with their cheapest option (the one of least loss among equally cheap ones). From where a tensor
    stands, its next step goes to the option that saves most loss per byte, of equals the largest: a walk along the
    lower convex hull. The best step of all tensors is taken, of equals that of the first tensor, as long as it fits in;
    a tensor whose next step does not fit in stays where it is.

    Parameters
    ----------
    loss : (tensors, options) float, finite
        What each option costs in quality; only sums matter.
    nbytes : (tensors, options) integer
    budget : int
        Bytes of all tensors together.
    start : (tensors,) integer, optional
        Options to begin with in place of the cheapest. What loses less and is no larger is then taken first.

    Returns
    -------
    (tensors,) int64
        Without `start`, total loss is above that of the best choice by less than what the best step that did not fit
        in would save.

    Raises
    ------
    ValueError
        The cheapest options do not fit in; losses that are not finite; shapes that differ.

    References
    ----------
    Dantzig's greedy rule for the linear relaxation, for multiple choice: Sinha and Zoltners 1979, "The Multiple-Choice
    Knapsack Problem".

    Examples
    --------
    >>> loss, nbytes = np.array([[9, 1, 0], [4, 3, 0]]), np.array([[2, 4, 8], [2, 4, 8]])
    >>> allocate(loss, nbytes, 6).tolist(), allocate(loss, nbytes, 12).tolist()
    ([1, 0], [1, 2])
    """
    loss, nbytes = np.asarray(loss, np.float64), np.asarray(nbytes, np.int64)
    if loss.ndim != 2 or loss.size == 0 or loss.shape != nbytes.shape:
        raise ValueError(f"loss and nbytes must be [tensors, options] alike, got {loss.shape} and {nbytes.shape}")
    if not np.isfinite(loss).all():
        raise ValueError("a loss is NaN or infinite")
    tensors = np.arange(len(loss))
    choice = np.lexsort((loss, nbytes), axis=-1)[:, 0] if start is None else np.array(start, np.int64)
    left = _left(nbytes, choice, budget)
    steps = [_next_step(loss[t], nbytes[t], choice[t]) for t in tensors]
    while any(step is not None for step in steps):
        best = max((t for t in tensors if steps[t] is not None), key=lambda t: (steps[t][0], -t))
        _, option = steps[best]
        cost = int(nbytes[best, option] - nbytes[best, choice[best]])
        if cost > left:
            steps[best] = None
            continue
        choice[best], left = option, left - cost
        steps[best] = _next_step(loss[best], nbytes[best], option)
    return choice


def anneal(
    loss: np.ndarray, nbytes: np.ndarray, budget: int, temperatures: np.ndarray, moves: int, rng: np.random.Generator
) -> np.ndarray:
    """Options by simulated annealing, for several losses at once.

    All tensors begin with their cheapest option. A move proposes a random option for a random tensor; it is taken if
    the bytes then fit in, and if the loss falls or, where it rises by d, with probability exp(-d / temperature).

    Parameters
    ----------
    loss : (chains, tensors, options) float, finite
        A chain sees losses of its own and moves of its own.
    nbytes : (tensors, options) integer
        An option of more than the budget is never taken: so tensors may have different numbers of options.
    budget : int
    temperatures : (n,) float, positive
        In falling order.
    moves : int
        At each temperature.
    rng : numpy Generator

    Returns
    -------
    (chains, tensors) int64
        What each chain ended with, which need not be the best that it saw.

    Raises
    ------
    ValueError
        The cheapest options do not fit in.

    References
    ----------
    Kirkpatrick, Gelatt, Vecchi 1983, "Optimization by Simulated Annealing".

    Examples
    --------
    >>> loss, nbytes = np.array([[[9, 1, 0], [4, 3, 0]]]), np.array([[2, 4, 8], [2, 4, 8]])
    >>> anneal(loss, nbytes, 8, np.geomspace(5, 0.1, 50), 10, np.random.default_rng(0)).tolist()
    [[1, 1]]
    """
    chains, tensors, options = loss.shape
    chain = np.arange(chains)
    choice = np.tile(np.lexsort((loss[0], nbytes), axis=-1)[:, 0], (chains, 1))
    left = np.full(chains, _left(nbytes, choice[0], budget))
    for temperature in temperatures:
        tensor, option = rng.integers(tensors, size=(moves, chains)), rng.integers(options, size=(moves, chains))
        luck = rng.random((moves, chains))
        for t, new, lucky in zip(tensor, option, luck, strict=True):
            old = choice[chain, t]
            rise = np.maximum(loss[chain, t, new] - loss[chain, t, old], 0)
            after = left - nbytes[t, new] + nbytes[t, old]
            taken = (after >= 0) & (lucky < np.exp(-rise / temperature))
            choice[chain, t], left = np.where(taken, new, old), np.where(taken, after, left)
    return choice


def _left(nbytes: np.ndarray, choice: np.ndarray, budget: int) -> int:
    """Bytes that a choice leaves."""
    taken = int(nbytes[np.arange(len(choice)), choice].sum())
    if taken > budget:
        raise ValueError(f"the cheapest options take {taken} bytes, the budget is {budget}: raise the target")
    return int(budget) - taken


def _next_step(loss: np.ndarray, nbytes: np.ndarray, at: int) -> tuple[float, int] | None:
    """Loss saved per byte and the option, or None where nothing better is left."""
    better = np.flatnonzero(loss < loss[at])
    if not better.size:
        return None
    saved, more = loss[at] - loss[better], nbytes[better] - nbytes[at]
    slope = np.where(more > 0, saved / np.maximum(more, 1), np.inf)
    steepest = better[slope == slope.max()]
    return float(slope.max()), int(steepest[np.argmax(nbytes[steepest])])
