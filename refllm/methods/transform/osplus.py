"""osplus: shift channels to their middle, then shrink only those that stick out, as far as the block's output likes it.

    z_k = (max_t X_k + min_t X_k) / 2        X' = X - z        W X = W X' + W z
    s_k = max(1, max_t X'_k / t, -min_t X'_k / t)              X' W^T = (X' / s) (W diag(s))^T

One threshold t decides for all channels: those inside +-t stay as they are, those outside are brought to it. It is
searched from the largest |X'| downwards; of every t the error of what the block makes of rounded inputs and rounded
weights is measured,

    L(t) = mean over tokens of |f(Q(X' / s), Q(W diag(s))) - f(X', W)|^2

where f is the whole function up to the next linear (attention for q, k and v; act(gate) up for the feed-forward), and
the first of the least is kept. At t = max |X'| nothing changes, so the search never does worse than rounding alone, on
the tokens it has seen.

The shift needs a norm with a bias to go into: LayerNorm (beta - z, and each reader's bias + W z). RMSNorm, and with it
every architecture here, has none: the stage scales only, as the authors do for Llama. `shift` and `fold` are the whole
step on arrays.

Like SmoothQuant it rounds nothing: `osplus:bits=8+rtn:bits=8,symmetric=true,group=-1+dynamic`.

Paper: Wei et al. 2023, "Outlier Suppression+: Accurate quantization of large language models by equivalent and optimal
shifting and scaling", arXiv:2304.09145, section 4.
Differs from the authors' code: losses are sums of float64; steps are counted, not subtracted one from the other; where
the largest input is below 0.1 nothing is searched.
Stage: prefill
Inventory: 27
Lesson: lessons/12-outliers.md
Golden: transform/osplus
Baseline: rtn:bits=8,symmetric=true,group=-1+dynamic
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from refllm.kernels.grids import PER_CHANNEL, SymmetricGrid
from refllm.kernels.packed.activations import Rounding
from refllm.methods.record import Report
from refllm.model.equivalent import check_foldable, divide_norm, norm_readers
from refllm.model.llama import attention_branch, mlp_branch
from refllm.model.model import Model
from refllm.model.walk import walk, windows

LOWEST = 0.1  # threshold
WINDOW = 512


def osplus(
    model: Model,
    ids: np.ndarray,
    *,
    on_report: Callable[[Report], None] | None = None,
    bits: int = 8,
    activation_bits: int | None = None,
    symmetric: bool = True,
    steps: int | None = None,
    tokens: int = 2048,
) -> Model:
    """Scale the loud inputs of q, k, v and of gate, up.

    Parameters
    ----------
    model : Model
        Dense weights; not changed.
    ids : (T,) integers
        Calibration tokens.
    on_report : ignored
        Nothing is rounded here; the stage that rounds reports.
    bits : int
        2 to 8, of the weights (a symmetric scale per row) while thresholds are tried. Give the following stages the
        same.
    activation_bits : int, optional
        Of the inputs (a scale per token); None takes `bits`.
    symmetric : bool
        Of the inputs: False tries a grid from the least to the largest number of each token.
    steps : int, optional
        Thresholds tried below the largest input; None: 100, or 2 max X where that is more.
    tokens : int
        Calibration tokens that thresholds are tried on, in whole windows of 512; ranges come from all.

    Returns
    -------
    Model
        The same function.

    Raises
    ------
    ValueError
        Packed weights, bits or steps out of range, calibration inputs that are not finite.
    """
    check_foldable(model, "OS+ moves scales")
    rounding = Rounding(bits if activation_bits is None else activation_bits, symmetric=symmetric)
    grid = SymmetricGrid(bits, PER_CHANNEL, "float32")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    weights, width = dict(model.weights), windows(np.asarray(ids), min(WINDOW, model.config.context_length)).shape[1]
    for layer, stats in walk(model, ids, WINDOW):
        for norm, readers in norm_readers(model.config, layer).items():
            X = stats[readers[0]].X
            some = X[: max(1, tokens // width) * width].reshape(-1, width, X.shape[1])
            f = block_function(model, layer, readers)
            loss = rounded_loss(f, some, [model.weights[name] for name in readers], rounding, grid)
            s, _ = search(X.max(axis=0), X.min(axis=0), loss, steps)
            divide_norm(weights, model.config, norm, readers, s)
    return replace(model, weights=weights)


def block_function(model: Model, layer: int, readers: tuple[str, ...]) -> Callable:
    """f(x, weights): what the next linear after `readers` is given, (B, T, width), when they read x (B, T, in)."""
    branch = attention_branch if len(readers) == 3 else mlp_branch

    def f(x: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
        changed = replace(model, weights=model.weights | dict(zip(readers, weights, strict=True)))
        seen = []
        place = (np.arange(x.shape[1]),) if branch is attention_branch else ()
        branch(changed, layer, x, *place, observe=lambda names, h: seen.append(h))
        return seen[-1]

    return f


def rounded_loss(
    f: Callable, X: np.ndarray, weights: Sequence[np.ndarray], rounding: Rounding, grid: SymmetricGrid
) -> Callable[[np.ndarray], float]:
    """L(s): mean over tokens of |f(Q(X / s), Q(W diag(s))) - f(X, W)|^2, float64. X : (B, T, in)."""
    exact = f(X, weights)

    def loss(s: np.ndarray) -> float:
        codes, scale, zero = rounding.steps((X / s).reshape(-1, X.shape[-1]).astype(np.float32))
        x = ((codes - (np.float32(0) if zero is None else zero)) * scale).reshape(X.shape).astype(X.dtype)
        error = f(x, [_rounded(W * s, grid).astype(W.dtype) for W in weights]).astype(np.float64) - exact
        return float(np.sum(error**2) / (X.shape[0] * X.shape[1]))

    return loss


def _rounded(W: np.ndarray, grid: SymmetricGrid) -> np.ndarray:
    scale, _ = grid.fit(W)
    return grid.decode(grid.encode(W, scale), scale)


def search(
    high: np.ndarray, low: np.ndarray, loss: Callable[[np.ndarray], float], steps: int | None = None
) -> tuple[np.ndarray, float]:
    """The scales with the least loss, the first of equals, and their threshold.

    Parameters
    ----------
    high, low : (in,)
        Largest and least input of each channel.
    loss : callable
        loss(s) for scales (in,) float64.
    steps : int, optional
        As in osplus.

    Returns
    -------
    s : (in,) float64, at least 1
    t : float

    Examples
    --------
    >>> s, t = search(np.array([8.0, 1.0]), np.array([-2.0, -4.0]), lambda s: abs(s[0] - 4.0), steps=79)
    >>> s.round(6).tolist(), round(t, 6)
    ([4.0, 2.0], 2.0)
    """
    best = None
    for t in thresholds(high, low, steps):
        s = shrink(high, low, t)
        found = loss(s)
        if best is None or found < best[0]:
            best = found, s, t
    return best[1], best[2]


def thresholds(high: np.ndarray, low: np.ndarray, steps: int | None = None) -> Iterator[float]:
    """t from the largest magnitude down to 0.1, in equal steps."""
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    top = float(max(high.max(), -low.min(), 0))
    count = max(100, int(max(float(high.max()), 0) / 0.5)) if steps is None else steps
    yield top
    for i in range(1, count + 1 if top > LOWEST else 1):
        yield top - i * (top - LOWEST) / count


def shrink(high: np.ndarray, low: np.ndarray, t: float) -> np.ndarray:
    """s_k = max(1, high_k / t, -low_k / t); all ones for t = 0, inputs that are all zero."""
    if t <= 0:
        return np.ones(len(high))
    return np.maximum(1.0, np.maximum(high, -low).astype(np.float64) / t)


def shift(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """z_k = (high_k + low_k) / 2, float64: then the largest input of a channel is minus the least one.

    Examples
    --------
    >>> shift(np.array([90.0, 2.0]), np.array([70.0, -2.0])).tolist()
    [80.0, 0.0]
    """
    return (high.astype(np.float64) + low) / 2


def fold(gain, bias, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray], z: np.ndarray, s: np.ndarray):
    """A LayerNorm and its readers with the output first shifted by -z, then divided by s.

    Parameters
    ----------
    gain, bias : (in,) float
        Of the LayerNorm.
    weights : sequence of (out, in)
    biases : sequence of (out,)
        Of the readers; zeros where they have none.
    z, s : (in,)

    Returns
    -------
    gain, bias, weights, biases : float64
        gain / s, (bias - z) / s, W diag(s), b + W z with the W that came.
    """
    wide = lambda array: np.asarray(array, np.float64)
    moved = [wide(b) + wide(W) @ z for W, b in zip(weights, biases, strict=True)]
    return wide(gain) / s, (wide(bias) - z) / s, [wide(W) * s for W in weights], moved
