"""exl2: try mixes of widths on every half of a layer, then choose them to fit an average number of bits.

    1. measure    for each layer's attention and feed-forward part and each of some 18 options:
                  error = mean over windows of ||Y_q - Y|| / ||Y||, Y the residual stream behind that part
    2. choose     minimise sum error^p, stored bits within the target; simulated annealing for 80 powers p from 1.5
                  to 3.5, for 80 around the one whose largest error is least, and 80 times at the best; then spend
                  what is left
    3. quantise   layer after layer, on inputs that the compressed layers before it give

An option gives each linear a mix: its columns in descending order of their inputs, the first few per cent with more
bits than the others (exl2_mixes). Rounding is GPTQ's, with a scale for a group of columns and 4-bit levels of rows
under it.

Paper: none; turboderp 2023, "ExLlamaV2" (github.com/turboderp-org/exllamav2), EXL2, its published conversion code.
Differs from the published code: embedding and head are left alone (there the head has 6 bits); H is a sum, not a mean
over batches, which only shows where it is damped by 1e-5 (all inputs zero); ties in the order go to the first column;
steps are exact products of stored numbers (there of float16), all else is float64; annealing has a seed and fewer moves
(there 1000 at each of 1976 temperatures), begins with the cheapest options and spends what is left by error saved per
byte.
Stage: memory, decode
Inventory: 8, 19
Lesson: lessons/17-mixed-precision.md
Golden: blockwise/exl2, blockwise/exl2_choose
Baseline: none, a target is a size that no one width has
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from refllm.kernels.allocation import allocate, anneal
from refllm.kernels.linalg import inverse_factor
from refllm.kernels.packed.records import Reordered
from refllm.kernels.stats import Stats
from refllm.methods.blockwise.exl2_mixes import ATTENTION, DAMP, MLP, POWER_STEPS, quantised
from refllm.methods.record import Report, report
from refllm.model.equivalent import check_foldable
from refllm.model.llama import attention_half, check_ids, embed, mlp_half
from refllm.model.model import Model
from refllm.model.walk import layer_linears, walk, windows

OPTIMIZERS = ("anneal", "hull")
POWERS = np.linspace(1.5, 3.5, 80)
NEAR = np.linspace(-0.075, 0.075, 80)
TEMPERATURES = 2 * 0.995 ** np.arange(1976)  # down to 1e-4
WINDOW = 512
LEAST_LEFT = 1e-6  # of accuracy: an error counts as 1 less this at most


def exl2(
    model: Model,
    ids: np.ndarray,
    *,
    on_report: Callable[[Report], None] | None = None,
    bits: float = 4.125,
    optimizer: str = "anneal",
    moves: int = 8,
    rows: int = 16,
    steps: int = POWER_STEPS,
    seed: int = 0,
) -> Model:
    """Mixed widths within and between matrices.

    Parameters
    ----------
    model : Model
        Dense.
    ids : (T,) integers
        Calibration tokens.
    on_report : callable, optional
    bits : float
        Target: stored bits of all linears together, a weight; never exceeded.
    optimizer : str
        "anneal", or "hull": for each power p the walk along the lower hulls (refllm.kernels.allocation), which has no
        luck to depend on.
    moves : int
        Of annealing, at each of 1976 temperatures.
    rows : int
        Windows of 512 tokens at most: the first so many of `ids` measure errors.
    steps : int
        In which the scale of a group is searched.
    seed : int

    Returns
    -------
    Model
        Every linear packed.

    Raises
    ------
    ValueError
        A target below the smallest options, an unknown optimizer, a knob out of range, NaN or Inf in a weight.
    """
    check_foldable(model, "EXL2 measures the halves of layers")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if min(moves, rows, steps) < 1:
        raise ValueError(f"moves, rows and steps must be at least 1, got {moves}, {rows} and {steps}")
    measured = list(measure(model, ids, rows, steps))
    names = [name for layer in range(model.config.num_layers) for name in layer_linears(layer)]
    budget = int(bits * sum(model.weights[name].size for name in names) / 8)
    error, nbytes = table(measured, budget)
    choice, _ = choose(error, nbytes, budget, optimizer, moves, seed)
    mixes = {}
    for half, option in zip(measured, choice, strict=True):
        mixes |= dict(zip(half.names, half.options[option], strict=True))
    model = replace(model, weights=dict(model.weights))
    for layer, stats in walk(model, ids):
        rounder = Rounder(steps)
        for name in layer_linears(layer):
            W = model.weights[name]
            model.weights[name] = rounder(W, stats[name], mixes[name])
            if on_report is not None:
                on_report(report(name, W, model.weights[name], stats[name]))
    return model


@dataclass(frozen=True)
class Half:
    """What was measured of half a layer.

    names : its linears; options : mixes of these, one tuple an option; error : (options,); nbytes : (options,) int
    """

    names: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    error: np.ndarray
    nbytes: np.ndarray


class Rounder:
    """Quantises linears; linears that share inputs share the order of columns and the factor of H^-1."""

    def __init__(self, steps: int):
        self._steps = steps
        self._prepared: dict[int, tuple] = {}

    def __call__(self, W: np.ndarray, stats: Stats, mix: str) -> Reordered:
        """One linear in one mix."""
        if not np.isfinite(W).all():
            raise ValueError("a weight holds NaN or Inf; quantization needs finite values")
        if id(stats) not in self._prepared:
            self._prepared[id(stats)] = ordered(stats.H)
        return quantised(W, *self._prepared[id(stats)], mix, self._steps)


def ordered(H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns in descending order of their inputs, (in,), and U of the damped H^-1 = U^T U in that order, (in, in)."""
    diagonal = np.diag(H)
    order = np.argsort(-diagonal, kind="stable")
    H = H[np.ix_(order, order)]
    mean = diagonal.sum() / len(diagonal)
    return order, inverse_factor(H + max(DAMP * mean, 1e-5) * np.eye(len(H)))


def measure(model: Model, ids: np.ndarray, rows: int, steps: int) -> Iterator[Half]:
    """Errors and bytes of every option of every half layer, all on inputs of the model as it is.

    Parameters
    ----------
    rows, steps :
        As in `exl2`.
    """
    ids = check_ids(ids, model.config.vocab_size)
    tokens = windows(ids, min(WINDOW, model.config.context_length))[:rows]
    positions = np.arange(tokens.shape[1])
    states = [embed(model, row[None]) for row in tokens]
    for layer, stats in walk(model, ids):
        rounder, names = Rounder(steps), layer_linears(layer)
        attention = lambda changed, x, layer=layer: attention_half(changed, layer, x, positions)
        mlp = lambda changed, x, layer=layer: mlp_half(changed, layer, x)
        for run, linears, options in ((attention, names[:4], ATTENTION), (mlp, names[4:], MLP)):
            after = [run(model, x) for x in states]
            made: dict[tuple[str, str], tuple[np.ndarray, int]] = {}
            for name, mix in dict.fromkeys(pair for option in options for pair in zip(linears, option, strict=True)):
                record = rounder(model.weights[name], stats[name], mix)
                made[name, mix] = record.dense(), record.nbytes
            error, nbytes = [], []
            for option in options:
                pairs = list(zip(linears, option, strict=True))
                changed = replace(model, weights=model.weights | {name: made[name, mix][0] for name, mix in pairs})
                ratios = [relative(run(changed, x), y) for x, y in zip(states, after, strict=True)]
                error.append(min(float(np.mean(ratios)), 1 - LEAST_LEFT))
                nbytes.append(sum(made[pair][1] for pair in pairs))
            yield Half(linears, options, np.array(error), np.array(nbytes))
            states = after


def relative(y: np.ndarray, expected: np.ndarray) -> float:
    """||y - expected|| / ||expected||, Frobenius; 0 where both are."""
    change = np.sqrt(np.sum((y - expected).astype(np.float64) ** 2))
    whole = np.sqrt(np.sum(expected.astype(np.float64) ** 2))
    return float(change / whole) if whole else float(change > 0)


def table(measured: list[Half], budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and bytes, (halves, options); where a half has fewer options, some that no budget allows."""
    most = max(len(half.error) for half in measured)
    error, nbytes = np.ones((len(measured), most)), np.full((len(measured), most), budget + 1, np.int64)
    for i, half in enumerate(measured):
        error[i, : len(half.error)], nbytes[i, : len(half.error)] = half.error, half.nbytes
    return error, nbytes


def choose(
    error: np.ndarray, nbytes: np.ndarray, budget: int, optimizer: str = "anneal", moves: int = 8, seed: int = 0
) -> tuple[np.ndarray, float]:
    """An option for every half layer.

    Parameters
    ----------
    error : (halves, options) float
        Of 0 to 1.
    nbytes : (halves, options) integer
    budget : int
    optimizer, moves, seed :
        As in `exl2`.

    Returns
    -------
    choice : (halves,) int64
    p : float
        The power of errors whose sum it is to make small.

    Raises
    ------
    ValueError
        The cheapest options do not fit in.

    Examples
    --------
    >>> choose(np.array([[0.5, 0.1], [0.3, 0.2]]), np.array([[2, 3], [2, 3]]), 5)[0].tolist()
    [1, 0]
    """
    rng, every = np.random.default_rng(seed), np.arange(len(error))

    def solve(powers):
        loss = error ** powers[:, None, None]
        if optimizer == "hull":
            return np.array([allocate(of_one, nbytes, budget) for of_one in loss])
        return anneal(loss, nbytes, budget, TEMPERATURES, moves, rng)

    def least_worst(powers):
        """The power whose choice has the smallest largest error, and that error."""
        worst = error[every, solve(powers)].max(axis=1)
        return float(powers[np.argmin(worst)]), worst.min()

    p, worst = least_worst(POWERS)
    nearer, better = least_worst(p + NEAR)
    p = nearer if better < worst else p
    choices = solve(np.full(len(POWERS), p))
    best = choices[np.argmin((error[every, choices] ** p).sum(axis=1))]
    return allocate(error**p, nbytes, budget, best), p
