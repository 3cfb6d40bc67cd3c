"""Bits for many tensors under one budget: which option each tensor takes.

The problem is a knapsack with one choice a tensor: least total loss, total bytes within a budget. The greedy way along
the lower convex hulls is exact for some budgets and never far off for the others.
"""

import numpy as np


def allocate(loss: np.ndarray, nbytes: np.ndarray, budget: int) -> np.ndarray:
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

    Returns
    -------
    (tensors,) int64
        Total loss is above that of the best choice by less than what the best step that did not fit in would save.

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
    choice = np.lexsort((loss, nbytes), axis=-1)[:, 0]
    left = int(budget) - int(nbytes[tensors, choice].sum())
    if left < 0:
        raise ValueError(
            f"the cheapest options take {int(budget) - left} bytes, the budget is {budget}: raise the target"
        )
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


def _next_step(loss: np.ndarray, nbytes: np.ndarray, at: int) -> tuple[float, int] | None:
    """Loss saved per byte and the option, or None where nothing better is left."""
    better = np.flatnonzero((loss < loss[at]) & (nbytes > nbytes[at]))
    if not better.size:
        return None
    slope = (loss[at] - loss[better]) / (nbytes[better] - nbytes[at])
    steepest = better[slope == slope.max()]
    return float(slope.max()), int(steepest[np.argmax(nbytes[steepest])])
