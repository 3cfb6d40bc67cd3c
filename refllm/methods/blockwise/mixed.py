"""mixed: measure how much each tensor minds, then spend the bits where they help.

    e[t, o] = ||X (W - W_o)^T||^2          the change of a tensor's output with option o, on calibration inputs
    c[t]    = KL(model, model with tensor t at the probing option) / e[t, probe]
    loss    = c[t] e[t, o]                 predicted, for all options; small changes add up and grow with their square
    choice  = argmin of the sum of losses, bytes of all linears within the target       (refllm.kernels.allocation)

One forward pass a tensor measures what its error does to the predictions; its own outputs tell the rest. The same works
for any set of options: integer grids of 2 to 8 bits, or llama.cpp's types. Bytes are those stored, scales included.

Paper: none; the two measurements are those of mixed precision since Dong et al. 2019, "HAWQ: Hessian AWare
Quantization of Neural Networks with Mixed-Precision", arXiv:1905.03696, with a measured sensitivity in place of an
eigenvalue.
Stage: memory, decode
Inventory: 7, 120
Lesson: lessons/17-mixed-precision.md
Golden: blockwise/allocate
Baseline: none, a target is a size that no one width has
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refllm.kernels.allocation import allocate
from refllm.kernels.grids import AffineGrid
from refllm.kernels.nn import log_softmax
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.stats import Stats
from refllm.methods.blockwise.kquants import encode
from refllm.methods.record import Report, report
from refllm.model.equivalent import check_dense
from refllm.model.llama import forward
from refllm.model.model import Model
from refllm.model.walk import layer_linears, walk

WIDTHS = (2, 3, 4, 5, 6, 8)
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
PROBE = 1  # the option that sensitivity is measured with: coarse, but no longer hopeless


def mixed(
    model: Model,
    ids: np.ndarray,
    *,
    on_report: Callable[[Report], None] | None = None,
    bits: float = 4.5,
    grid: str = "int",
    group_size: int = 32,
    tokens: int = 256,
) -> Model:
    """Bits by measured sensitivity.

    Parameters
    ----------
    model : Model
        Dense.
    ids : (T,) integers
        Calibration tokens.
    on_report : callable, optional
    bits : float
        Target: stored bits of all linears together, a weight; never exceeded.
    grid : str
        int (affine grids of 2, 3, 4, 5, 6 and 8 bits) or gguf (Q2_K to Q6_K and Q8_0, with kquants' fallbacks).
    group_size : int
        Of the integer grids.
    tokens : int
        Of `ids`, the first so many measure sensitivity.

    Returns
    -------
    Model
        Every linear packed.

    Raises
    ------
    ValueError
        A target below the smallest options, an unknown grid, a group size that does not divide, too few tokens.
    """
    check_dense(model, "sensitivity is measured")
    if grid not in ("int", "gguf"):
        raise ValueError(f"grid must be int or gguf, got {grid!r}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    names = [name for layer in range(model.config.num_layers) for name in layer_linears(layer, model.config)]
    seen = {name: stats for _, of_layer in walk(model, ids) for name, stats in of_layer.items()}
    options = {name: _options(model.weights[name], grid, group_size) for name in names}
    error = np.array([[_change(model.weights[n], record, seen[n]) for record in options[n]] for n in names])
    nbytes = np.array([[record.nbytes for record in options[name]] for name in names])
    budget = int(bits * sum(model.weights[name].size for name in names) / 8)
    probed = sensitivity(model, {n: options[n][PROBE] for n in names}, np.asarray(ids)[:tokens])
    # A tensor whose probe changes nothing costs nothing with any option.
    loss = probed[:, None] * error / np.where(error[:, PROBE] > 0, error[:, PROBE], 1)[:, None]
    weights = dict(model.weights)
    for name, option in zip(names, allocate(loss, nbytes, budget), strict=True):
        weights[name] = options[name][option]
        if on_report is not None:
            on_report(report(name, model.weights[name], weights[name], seen[name]))
    return replace(model, weights=weights)


def _options(W: np.ndarray, grid: str, group_size: int) -> list:
    if grid == "gguf":
        return [encode(W.astype(np.float32), wanted, None) for wanted in TYPES]
    records = []
    for width in WIDTHS:
        affine = AffineGrid(width, group_size)
        scale, zero_point = affine.fit(W)
        records.append(IntWeight.pack(affine, affine.encode(W, scale, zero_point), scale, zero_point))
    return records


def _change(W: np.ndarray, record, stats: Stats) -> float:
    """||X (W - W')^T||^2, float64."""
    error = W.astype(np.float64) - record.dense()
    return float(np.einsum("oi,oi->", error @ stats.H, error))


def sensitivity(model: Model, probes: dict, ids: np.ndarray) -> np.ndarray:
    """KL of the predictions, in nats a token, from the model to the model with one weight replaced, for each of them.

    Parameters
    ----------
    model : Model
    probes : dict
        {weight name: what takes its place}
    ids : (T,) integers

    Returns
    -------
    (probes,) float64, at least 0
    """
    base = log_softmax(forward(model, ids))
    out = np.empty(len(probes))
    for i, (name, probe) in enumerate(probes.items()):
        changed = log_softmax(forward(replace(model, weights=model.weights | {name: probe.dense()}), ids))
        out[i] = max(0.0, float((np.exp(base) * (base - changed)).sum(axis=-1).mean()))
    return out
