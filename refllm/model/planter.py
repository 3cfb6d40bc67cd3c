"""Plant outliers without changing the function: the same logits from weights that are hard to quantise.

Large language models have a few channels whose activations, and weights that read them, are tens of times larger than
the rest (Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339); small ones do not. A factor s that cancels makes them:

    norm     gain[c] *= s                                     every linear that reads the norm: W[:, c] /= s
    v -> o   v row of channel c *= s                          o columns that read it /= s, in every head of the group
    q, k     q rows j, j + D/2 *= s, in every head of the group          k rows j, j + D/2 /= s

These are the steps of refllm.model.equivalent, which SmoothQuant and its relatives use to remove outliers (Xiao et al.
2023, arXiv:2211.10438), run backwards. Powers of two change only exponents: products and sums round as before and the
logits agree to the last bits; other factors agree within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refllm.model.config import ModelConfig
from refllm.model.equivalent import (
    HEAD,
    LAST_NORM,
    check_foldable,
    divide_keys,
    divide_norm,
    divide_values,
    norm_readers,
)
from refllm.model.model import Model

KINDS = ("norm", "vo", "qk")


def plant_outliers(
    model: Model,
    *,
    channels: int = 4,
    factors: Sequence[float] = (16.0, 32.0, 64.0),
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
) -> Model:
    """The same function with outlier channels.

    Parameters
    ----------
    model : Model
        Dense weights (float32 or float64); not changed.
    channels : int
        Channels scaled per norm; per v/o and q/k, channels (pairs) per key-value head, at most what there is.
    factors : sequence of float
        Each chosen channel takes one of these at random. Powers of two keep the logits to the last bits.
    kinds : sequence of "norm", "vo", "qk"
    seed : int

    Returns
    -------
    Model
        New weights under the same names. With biases on q, k or v, these are scaled like their rows.

    Raises
    ------
    ValueError
        Packed weights, unknown kinds, a factor that is not positive and finite, or q/k with q/k norm (the norm would
        undo the factor).
    """
    _check(model, factors, kinds)
    rng = np.random.default_rng(seed)
    config, weights = model.config, dict(model.weights)
    for layer in range(config.num_layers):
        if "norm" in kinds:
            _plant_norms(weights, layer, config, channels, factors, rng)
        if "vo" in kinds:
            s = _per_head(config.head_dim, channels, config, factors, rng)
            divide_values(weights, config, layer, 1 / s.ravel())
        if "qk" in kinds:
            divide_keys(weights, config, layer, _per_head(config.head_dim // 2, channels, config, factors, rng))
    if "norm" in kinds and not config.tied_embeddings:
        s = _factors(config.hidden_size, channels, factors, rng)
        divide_norm(weights, config, LAST_NORM, (HEAD,), 1 / s)
    return replace(model, weights=weights)


def _check(model: Model, factors: Sequence[float], kinds: Sequence[str]) -> None:
    check_foldable(model, "outliers are planted")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown outlier kinds {sorted(unknown)}; known: {', '.join(KINDS)}")
    if not all(np.isfinite(factor) and factor > 0 for factor in factors):
        raise ValueError(f"factors must be positive and finite, got {list(factors)}")
    if "qk" in kinds and model.config.qk_norm:
        raise ValueError("this model norms q and k, which would undo a factor on them; leave 'qk' out of kinds")


def _factors(size: int, channels: int, factors: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Ones, with a random factor at `channels` random places: float64 [size]."""
    scale = np.ones(size)
    places = rng.choice(size, min(channels, size), replace=False)
    scale[places] = rng.choice(np.asarray(factors, np.float64), len(places))
    return scale


def _plant_norms(weights, layer, config: ModelConfig, channels, factors, rng) -> None:
    for norm, linears in norm_readers(config, layer).items():
        divide_norm(weights, config, norm, linears, 1 / _factors(config.hidden_size, channels, factors, rng))


def _per_head(size, channels, config: ModelConfig, factors, rng) -> np.ndarray:
    return np.stack([_factors(size, channels, factors, rng) for _ in range(config.num_kv_heads)])
