"""awq: scale up the input channels that carry large activations, then round all weights.

    a_k = mean |X_k|                                s = max(a^r, 1e-4), divided by sqrt(max(s) min(s))
    X W^T = (X / s) (W diag(s))^T                   W^ = Q(W diag(s)) diag(s)^-1

The rounding error of a weight depends on the step of its group, hardly on its own size: times s_k, rounded and divided
by s_k, the error in column k is s_k times smaller as long as the largest weight of the group stays. s depends on one
number r; of 0, 0.05 .. 0.95 the one is kept that changes the output of the inspected module least, the first of equals:

    what s moves out of     linears that read it     inspected
    input norm              q, k, v                  the attention branch
    v rows                  o                        o itself; only where v and o have equal shapes (no GQA)
    norm before the MLP     gate, up                 the feed-forward branch
    up rows                 down                     down itself

s is folded into the gain of the norm or the rows of v and up, so nothing is left to do at run time. Then the ranges of
all linears but q and k are searched (refllm.kernels.scales.clip_limits) with the scaled inputs, and every weight, none
excepted, is rounded to its group's own min-max grid. Layer follows layer; what a layer sees are the outputs of the
uncompressed layers before it, and the four searches inside a layer its uncompressed activations, as in the authors'
code.

`duo_scaling=true` is the form of AutoAWQ: s = max(a^r / (w^(1-r) + 1e-4), 1e-4) with w_k = mean over the rows of all
readers of |W_k| / (amax of its group + 1e-6). There no r leaves the weights as they are.

Paper: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv:2306.00978, section 3.
Differs from the authors' code: scales of groups are rounded to float16 before codes are computed, in the searches too;
losses are sums of float64; a width that 128 does not divide takes a smaller group.
Stage: decode, memory
Inventory: 12
Lesson: lessons/11-awq.md
Golden: blockwise/awq
Baseline: rtn with the same bits and group
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from refllm.kernels import scales
from refllm.kernels.grids import MinMaxGrid, group_for, grouped
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.stats import Stats
from refllm.methods.record import Report, report
from refllm.model.equivalent import check_foldable, divide_gated, divide_norm, divide_values, norm_readers
from refllm.model.llama import attention_branch, mlp_branch
from refllm.model.model import Model
from refllm.model.walk import layer_linears, walk, windows

RATIOS = tuple(i / 20 for i in range(20))
WINDOW = 512
UNCLIPPED = ("q_proj.weight", "k_proj.weight")  # their outputs meet in a product: hard to judge one by one


def awq(
    model: Model,
    ids: np.ndarray,
    *,
    on_report: Callable[[Report], None] | None = None,
    bits: int = 4,
    group_size: int | None = None,
    duo_scaling: bool = False,
    auto_scale: bool = True,
    auto_clip: bool = True,
    search_tokens: int = 2048,
    scale_dtype: str = "float16",
) -> Model:
    """Activation-aware weight quantization.

    Parameters
    ----------
    model : Model
        Dense weights; not changed.
    ids : (T,) integers
        Calibration tokens.
    on_report : callable, optional
        Called with the Report of every linear: its scaled weight against the record, on the scaled inputs.
    bits : int
        2 to 8.
    group_size : int, optional
        Columns that share a scale, or -1: whole rows. None: 128, or what 128 and the width have in common.
    duo_scaling : bool
        AutoAWQ's scales, from activations and weights.
    auto_scale, auto_clip : bool
        Whether the two searches are done; without both it is rounding to nearest.
    search_tokens : int
        The outputs of branches are compared on about so many tokens, in whole windows of 512; the calibration's own
        means and those of single linears use all.
    scale_dtype : str
        float16 or float32, of the stored scales.

    Returns
    -------
    Model
        IntWeight linears, and the gains the scales were folded into.

    Raises
    ------
    ValueError
        Packed weights, a group_size that does not divide a width, bits or scale_dtype unknown, weights or inputs that
        are not finite.
    """
    check_foldable(model, "AWQ searches scales")
    weights = dict(model.weights)
    grid_of = partial(grid_for, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
    if search_tokens < 1:
        raise ValueError(f"search_tokens must be at least 1, got {search_tokens}")
    count, length = windows(np.asarray(ids), min(WINDOW, model.config.context_length)).shape
    compared = lambda X: X.reshape(count, length, -1)[:: max(1, count * length // search_tokens)]
    for layer, stats in walk(model, ids, WINDOW):  # of the model as it came: later layers see uncompressed ones
        inputs = {name: stats[name] for name in layer_linears(layer)}
        if auto_scale:
            for pair, s in search_layer(model, layer, stats, compared, grid_of, duo_scaling):
                pair.fold(weights, s)
                X = stats[pair.readers[0]].X
                inputs |= dict.fromkeys(pair.readers, Stats((X / s).astype(X.dtype)))
        for name, seen in inputs.items():
            W = weights[name]
            weights[name] = pack(W, grid_of(W), seen.X if auto_clip and not name.endswith(UNCLIPPED) else None)
            if on_report is not None:
                on_report(report(name, W, weights[name], seen))
    return replace(model, weights=weights)


def grid_for(W: np.ndarray, bits: int, group_size: int | None, scale_dtype: str) -> MinMaxGrid:
    """The grid of a weight: of groups of `group_size`, or of 128 or what 128 and the width have in common."""
    return MinMaxGrid(bits, group_for(W.shape[1], group_size), scale_dtype)


def pack(W: np.ndarray, grid: MinMaxGrid, X: np.ndarray | None = None) -> IntWeight:
    """Round to the grid; with inputs X, the ranges of the groups are searched first."""
    if X is not None:
        W = scales.clip(W, scales.clip_limits(W, X, grid), grid.group_size)
    found = grid.fit(W)
    return IntWeight.pack(grid, grid.encode(W, *found), *found)


@dataclass(frozen=True)
class Pair:
    """Linears that share an input, and where their scale can be moved from.

    Parameters
    ----------
    readers : tuple of str
        Names of their weights.
    change : callable
        change({reader: its weight, rounded}) -> mean square of what that changes in the inspected output.
    fold : callable
        fold(weights, s): divides what makes the input, multiplies the columns of the readers.
    """

    readers: tuple[str, ...]
    change: Callable[[dict[str, np.ndarray]], float]
    fold: Callable[[dict, np.ndarray], None]


def search_layer(
    model: Model, layer: int, stats: dict[str, Stats], compared: Callable, grid_of: Callable, duo_scaling: bool = False
) -> list[tuple[Pair, np.ndarray]]:
    """Every pair of a layer with its scale (in,), all from the weights as they are in the model.

    Parameters
    ----------
    stats : {weight name: Stats}
        From `walk`.
    compared : callable
        compared(X (n, d)) -> the windows (B, T, d) on which outputs of branches are compared.
    grid_of : callable
        grid_of(W) -> the grid of a weight.
    """
    found = []
    for pair in layer_pairs(model, layer, stats, compared):
        readers = {name: model.weights[name] for name in pair.readers}
        s, _ = best_scale(readers, stats[pair.readers[0]], pair.change, grid_of, duo_scaling)
        found.append((pair, s))
    return found


def layer_pairs(model: Model, layer: int, stats: dict[str, Stats], compared: Callable) -> list[Pair]:
    """What of a layer can be scaled, in the order in which it runs. Parameters as in `search_layer`."""
    config = model.config
    v, o, down = (f"model.layers.{layer}.{name}_proj.weight" for name in ("self_attn.v", "self_attn.o", "mlp.down"))
    branches = (
        lambda changed, x: attention_branch(changed, layer, x, np.arange(x.shape[1])),
        lambda changed, x: mlp_branch(changed, layer, x),
    )
    attention, mlp = (
        Pair(
            readers,
            _branch_change(model, branch, compared(stats[readers[0]].X)),
            lambda weights, s, norm=norm, readers=readers: divide_norm(weights, config, norm, readers, s),
        )
        for branch, (norm, readers) in zip(branches, norm_readers(config, layer).items(), strict=True)
    )
    linear = lambda name, fold: Pair((name,), linear_change(model.weights[name], stats[name]), fold)
    values = linear(o, lambda weights, s: divide_values(weights, config, layer, s))
    gated = linear(down, lambda weights, s: divide_gated(weights, layer, s))
    alike = model.weights[v].shape == model.weights[o].shape  # with grouped queries one v row feeds several o columns
    return [attention, *([values] if alike else []), mlp, gated]


def _branch_change(model: Model, branch: Callable, X: np.ndarray) -> Callable[[dict], float]:
    """The change of a branch's output on windows X (B, T, d), one window at a time."""
    expected = [branch(model, x[None]) for x in X]

    def change(rounded: dict) -> float:
        changed = replace(model, weights=model.weights | rounded)
        errors = (branch(changed, x[None]) - y for x, y in zip(X, expected, strict=True))
        return sum(np.sum(np.square(e), dtype=np.float64) for e in errors) / X.size

    return change


def linear_change(W: np.ndarray, stats: Stats) -> Callable[[dict], float]:
    """Mean square of X (W^ - W)^T, the change of one linear's own output; through X^T X where X has more rows."""

    def change(rounded: dict) -> float:
        (only,) = rounded.values()
        D = only.astype(np.float64) - W
        if stats.n < W.shape[1]:
            return float(np.mean(np.square(stats.X @ D.T)))
        return float(np.sum((D @ stats.H) * D)) / (stats.n * len(W))

    return change


def best_scale(
    readers: dict[str, np.ndarray], stats: Stats, change: Callable, grid_of: Callable, duo_scaling: bool = False
) -> tuple[np.ndarray, list[float]]:
    """The scale (in,) float64 of the ratio that changes the inspected output least, and the errors of all ratios."""
    of_weights = _mean_relative(list(readers.values()), grid_of) if duo_scaling else None
    tried = [scale_at(ratio, stats.mean_abs, of_weights) for ratio in RATIOS]
    errors = [change({name: _rounded(W, s, grid_of(W)) for name, W in readers.items()}) for s in tried]
    return tried[int(np.argmin(errors))], errors


def scale_at(ratio: float, of_inputs: np.ndarray, of_weights: np.ndarray | None = None) -> np.ndarray:
    """s of one ratio, from mean |X_k| and, for AutoAWQ's form, the mean relative size of the weights; (in,) float64."""
    s = of_inputs**ratio
    if of_weights is not None:
        s = s / (of_weights ** (1 - ratio) + 1e-4)
    s = np.maximum(s, 1e-4)
    return s / np.sqrt(s.max() * s.min())


def _mean_relative(weights: list[np.ndarray], grid_of: Callable) -> np.ndarray:
    """Mean over the rows of all weights of |W| / (amax of its group + 1e-6), (in,)."""
    W = np.abs(np.concatenate(weights).astype(np.float64))
    groups = grouped(W, grid_of(W).group_size)
    return (groups / (groups.max(axis=-1, keepdims=True) + 1e-6)).reshape(W.shape).mean(axis=0)


def _rounded(W: np.ndarray, s: np.ndarray, grid: MinMaxGrid) -> np.ndarray:
    """Q(W diag(s)) diag(s)^-1, of the type of W."""
    scaled = (W * s).astype(W.dtype)
    found = grid.fit(scaled)
    return (grid.decode(grid.encode(scaled, *found), *found) / s).astype(W.dtype)
