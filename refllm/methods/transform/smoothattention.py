"""smoothattention: keys of even channels, for a cache of few bits: what they lose the queries gain.

    lambda_j = lambda_(j + D/2) = max over tokens of max(|k_j|, |k_(j + D/2)|) ^ alpha      Q lambda, K / lambda

measured after RoPE, which turns channels j and j + D/2 together: only one factor for both passes through it and can be
folded into the rows of q and k. Query heads of one group read the same keys and take the same factors. Scores stay.
It helps a cache that rounds a key token by token, as QServe's does; one whose key channels have scales of their own
(`kivi`) does not see it.

Paper: Lin et al. 2024, "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", arXiv:2405.04532,
section 4.2.
Differs from it: a pair of channels that was never active keeps the factor 1.
Stage: memory, decode
Inventory: 13
Lesson: lessons/13-rotations.md
Golden: transform/smoothattention
Baseline: none, a transform alone does not compress
"""

from dataclasses import replace

import numpy as np

from refllm.kernels.rope import cos_sin, rotate
from refllm.model.equivalent import check_foldable, divide_keys
from refllm.model.model import Model
from refllm.model.walk import walk

WINDOW = 512  # calibration tokens that see each other


def smoothattention(model: Model, ids, *, on_report=None, alpha: float = 0.5) -> Model:
    """Move the size of key channels into queries.

    Parameters
    ----------
    model : Model
        Dense weights.
    ids : (T,) integers
        Calibration tokens.
    on_report : ignored
        Part of every model method's call.
    alpha : float
        0 to 1: how much of it. 0 changes nothing.

    Returns
    -------
    Model
        The same function.

    Raises
    ------
    ValueError
        Packed weights, a model that norms q and k, alpha out of range.
    """
    check_foldable(model, "SmoothAttention moves scales")
    config, weights = model.config, dict(model.weights)
    tokens = min(WINDOW, config.context_length, np.size(ids))
    for layer, stats in walk(model, ids, WINDOW):
        name = f"model.layers.{layer}.self_attn.k_proj."
        X = stats[name + "weight"].X
        keys = X @ weights[name + "weight"].T + weights.get(name + "bias", 0)
        keys = keys.reshape(-1, tokens, config.num_kv_heads, config.head_dim).swapaxes(1, 2)
        keys = rotate(keys, *cos_sin(config.layer_rope(layer), config.head_dim, np.arange(tokens), keys.dtype))
        divide_keys(weights, config, layer, factors(np.abs(keys).max(axis=(0, 2)), alpha))
    return replace(model, weights=weights)


def factors(absmax: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """What keys are divided by.

    Parameters
    ----------
    absmax : (Hk, D)
        Largest magnitude of every channel of keys after RoPE, halves as there: pairs are j and j + D/2.
    alpha : float

    Returns
    -------
    (Hk, D / 2) float64

    Examples
    --------
    >>> factors(np.array([[16.0, 0.0, 4.0, 0.0]])).tolist()
    [[4.0, 1.0]]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    half = absmax.shape[1] // 2
    pairs = np.maximum(absmax[:, :half], absmax[:, half:]).astype(np.float64)
    return np.where(pairs > 0, pairs, 1) ** alpha
