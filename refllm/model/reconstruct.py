"""Teaching one layer to give what it should, window by window: what the methods that learn block by block share."""

from collections.abc import Callable, Mapping

import numpy as np

from refllm.kernels.autograd import Tensor
from refllm.kernels.optimizers import Optimizer, Schedule
from refllm.kernels.stats import Stats
from refllm.model.llama import block
from refllm.model.model import Model
from refllm.model.train import train


def observe(
    model: Model, layer: int, inputs: list[np.ndarray], positions: np.ndarray
) -> tuple[dict[str, Stats], list[np.ndarray]]:
    """What the linears of a layer see of `inputs`, windows (1, T, d), by weight name; and what the layer gives."""
    seen: dict[tuple[str, ...], list] = {}
    note = lambda names, x: seen.setdefault(names, []).append(x.reshape(-1, x.shape[-1]))
    outputs = [block(model, layer, x, positions, observe=note) for x in inputs]
    shared = {names: Stats(np.concatenate(parts)) for names, parts in seen.items()}
    return {name: stats for names, stats in shared.items() for name in names}, outputs


def mean_square(out: Tensor, targets: list[np.ndarray]) -> Tensor:
    """Mean square of the difference between `out` and each target, summed over the targets.

    Examples
    --------
    >>> mean_square(Tensor(np.array([1.0, 2.0])), [np.array([1.0, 4.0]), np.array([1.0, 2.0])]).data.item()
    2.0
    """
    squares = [(change * change).sum() for change in (out - Tensor(target) for target in targets)]
    return sum(squares[1:], squares[0]) / float(out.data.size)


def improve(
    first: dict[str, np.ndarray],
    loss: Callable[[Mapping[str, Tensor], int], Tensor],
    count: int,
    optimizer: Optimizer,
    epochs: int,
) -> dict[str, np.ndarray]:
    """Passes over the windows, one window a step; what makes the mean loss of all windows larger is dropped.

    Parameters
    ----------
    first : dict
        Values as they begin; not changed.
    loss : callable
        `loss(values, i)`, of window i.
    count : int
        Windows.
    optimizer : Optimizer
        Its rates stay as they are in all steps.
    epochs : int
        Passes; 0 keeps the first values.

    Returns
    -------
    dict
        The learned values, or `first` itself.
    """
    if not first or not epochs:
        return first
    steps = epochs * count
    schedule = Schedule(steps, decay_from=steps)
    learned = train(first, loss, lambda step, part, parts: step % count, optimizer=optimizer, schedule=schedule)
    mean = lambda values: sum(float(loss(constants(values), i).data) for i in range(count))
    return learned if mean(learned) <= mean(first) else first


def constants(values: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Values that take no gradient."""
    return {name: Tensor(value) for name, value in values.items()}
