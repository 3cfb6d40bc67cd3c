"""smoothquant: move the size of loud input channels into the weights, so that both round well.

    X W^T = (X / s) (W diag(s))^T        s_k = max(1e-5, a_k^alpha / w_k^(1 - alpha))
    a_k = max over tokens of |X_k|       w_k = max(1e-5, max over all rows of all readers of |W_k|)

Inputs are hard to round where channels differ in size, for they can only have a scale per token; weights are easy.
Dividing a channel by s_k and multiplying its weights moves some of the difficulty. With alpha = 1 every channel of X
ends at 1 and the weights carry everything; with alpha = 0 it is the other way round; with 1/2 both end at
sqrt(a_k w_k). One s serves all linears that read the same norm (q, k and v; gate and up), and is divided out of the
norm's gain: there is nothing left to do at run time. o and down have no norm before them and stay as they are, unless
`all_linears` asks for the same step through the rows of v and of up.

With `inverted` inputs are multiplied by s and weights divided, so that inputs stand out from each other more: a part of
Outstanding-sparse, which drops inputs (`amber`) and rounds the rest, with alpha = 0.1. Channels that calibration never
excites, or whose weights are zero, then keep their size.

The stage rounds nothing: `smoothquant+rtn:bits=8,symmetric=true,group=-1+dynamic` is W8A8.

Paper: Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, section 4; inverted: Huawei 2025, "Amber Pruner", arXiv:2508.02128, after summaries of it.
Differs from the authors' code: `all_linears` is not theirs; scales and folded weights are computed in float64. A
channel that calibration never excites has a_k = 0 and with it, as there, s_k = 1e-5: if a later token does excite it,
it is 100000 times too loud. Calibrate with text that is long enough.
Stage: prefill
Inventory: 26
Lesson: lessons/12-outliers.md
Golden: transform/smoothquant
Baseline: rtn:bits=8,symmetric=true,group=-1+dynamic
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from refllm.methods.record import Report
from refllm.model.config import ModelConfig
from refllm.model.equivalent import check_foldable, divide_gated, divide_norm, divide_values, norm_readers
from refllm.model.model import Model
from refllm.model.walk import walk

FLOOR = 1e-5


def smoothquant(
    model: Model,
    ids: np.ndarray,
    *,
    on_report: Callable[[Report], None] | None = None,
    alpha: float = 0.5,
    all_linears: bool = False,
    inverted: bool = False,
) -> Model:
    """Smooth the inputs of q, k, v and of gate, up.

    Parameters
    ----------
    model : Model
        Dense weights; not changed.
    ids : (T,) integers
        Calibration tokens.
    on_report : ignored
        Nothing is rounded here; the stage that rounds reports.
    alpha : float
        0 to 1: how much of the difficulty goes to the weights. The authors take 0.5 for OPT and BLOOM, 0.8 to 0.9 for
        the models of the Llama family.
    all_linears : bool
        o and down, too. Query heads of one group read the same values, so o has one s for the channels they share.
    inverted : bool
        1 / s in place of s.

    Returns
    -------
    Model
        The same function.

    Raises
    ------
    ValueError
        Packed weights, alpha out of range, calibration inputs that are not finite.
    """
    check_foldable(model, "SmoothQuant moves scales")
    weights, rule = dict(model.weights), inverted_scales if inverted else scales
    for layer, stats in walk(model, ids):
        for norm, readers in norm_readers(model.config, layer).items():
            s = rule(stats[readers[0]].absmax, [model.weights[name] for name in readers], alpha)
            divide_norm(weights, model.config, norm, readers, s)
        if all_linears:
            o, down = (f"model.layers.{layer}.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj"))
            shared = partial(_of_values, config=model.config)
            s = rule(shared(stats[o].absmax), [shared(np.abs(model.weights[o]))], alpha)
            divide_values(weights, model.config, layer, s)
            divide_gated(weights, layer, rule(stats[down].absmax, [model.weights[down]], alpha))
    return replace(model, weights=weights)


def _of_values(columns: np.ndarray, config: ModelConfig) -> np.ndarray:
    """(..., H D) numbers of the inputs of o -> (..., Hk D), the largest of the heads that read the same values."""
    heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    return columns.reshape(*columns.shape[:-1], heads, group, -1).max(axis=-2).reshape(*columns.shape[:-1], -1)


def scales(absmax: np.ndarray, weights: Sequence[np.ndarray], alpha: float = 0.5) -> np.ndarray:
    """s of one input that several weights share.

    Parameters
    ----------
    absmax : (in,)
        Largest magnitude of each input channel.
    weights : sequence of (out, in)
    alpha : float

    Returns
    -------
    (in,) float64

    Examples
    --------
    >>> scales(np.array([100.0, 1.0]), [np.array([[0.5, -0.25]]), np.array([[-1.0, 0.0]])]).tolist()
    [10.0, 2.0]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    w = np.max([np.abs(W).max(axis=0) for W in weights], axis=0).astype(np.float64)
    return np.maximum(FLOOR, absmax.astype(np.float64) ** alpha / np.maximum(FLOOR, w) ** (1 - alpha))


def inverted_scales(absmax: np.ndarray, weights: Sequence[np.ndarray], alpha: float = 0.1) -> np.ndarray:
    """1 / s of `scales`, for inputs that are to stand out; 1 for a channel that is zero, or whose weights are.

    Examples
    --------
    >>> inverted_scales(np.array([100.0, 1.0, 0.0]), [np.array([[1.0, -0.25, 3.0]])], 0.5).tolist()
    [0.1, 0.5, 1.0]
    """
    dead = (absmax == 0) | ~np.any([np.any(W, axis=0) for W in weights], axis=0)
    return np.where(dead, 1.0, 1 / scales(absmax, weights, alpha))
