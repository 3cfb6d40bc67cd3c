"""Plant outliers without changing the function: the same logits from weights that are hard to quantise.

Large language models have a few channels whose activations, and weights that read them, are tens of times larger than
the rest (Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339); small ones do not. A factor s that cancels makes them:

    norm     gain[c] *= s                                     every linear that reads the norm: W[:, c] /= s
    v -> o   v row of channel c *= s                          o columns that read it /= s, in every head of the group
    q, k     q rows j, j + D/2 *= s, in every head of the group          k rows j, j + D/2 /= s

The pair of a rotary embedding turns together, so both halves take the same factor. Powers of two change only exponents:
products and sums round as before and the logits agree to the last bits; other factors agree within rounding.
This is the equivalence SmoothQuant and its relatives use to remove outliers (Xiao et al. 2023, arXiv:2211.10438),
run backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refllm.model.config import ModelConfig
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
    weights = dict(model.weights)
    for layer in range(model.config.num_layers):
        prefix = f"model.layers.{layer}."
        if "norm" in kinds:
            _plant_norms(weights, prefix, model.config, channels, factors, rng)
        if "vo" in kinds:
            _plant_value_output(weights, prefix + "self_attn.", model.config, channels, factors, rng)
        if "qk" in kinds:
            _plant_query_key(weights, prefix + "self_attn.", model.config, channels, factors, rng)
    if "norm" in kinds and not model.config.tied_embeddings:
        scale = _factors(model.config.hidden_size, channels, factors, rng)
        _scale_gain(weights, "model.norm.weight", scale, model.config.norm_offset)
        _scale(weights, "lm_head.weight", columns=1 / scale)
    return replace(model, weights=weights)


def _check(model: Model, factors: Sequence[float], kinds: Sequence[str]) -> None:
    packed = [name for name, weight in model.weights.items() if not isinstance(weight, np.ndarray)]
    if packed:
        raise ValueError(
            f"outliers are planted in dense weights, but {packed[0]} is packed; load the uncompressed model"
        )
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


def _scale(weights: dict, name: str, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> None:
    """A scaled copy of a weight, and of its bias when rows are scaled; the dtype stays."""
    weight = weights[name]
    if rows is not None:
        weight = weight * rows.astype(weight.dtype)[:, None]
        bias = name.removesuffix("weight") + "bias"
        if bias in weights:
            weights[bias] = weights[bias] * rows.astype(weights[bias].dtype)
    if columns is not None:
        weight = weight * columns.astype(weight.dtype)
    weights[name] = weight


def _scale_gain(weights: dict, name: str, scale: np.ndarray, offset: float) -> None:
    """The norm multiplies by (offset + gain): that sum takes the factor."""
    gain = weights[name]
    weights[name] = ((gain + offset) * scale - offset).astype(gain.dtype)


def _plant_norms(weights, prefix, config: ModelConfig, channels, factors, rng) -> None:
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        before_mlp: ("mlp.gate_proj", "mlp.up_proj"),
    }
    for norm, linears in readers.items():
        scale = _factors(config.hidden_size, channels, factors, rng)
        _scale_gain(weights, f"{prefix}{norm}.weight", scale, config.norm_offset)
        for linear in linears:
            _scale(weights, f"{prefix}{linear}.weight", columns=1 / scale)


def _plant_value_output(weights, prefix, config: ModelConfig, channels, factors, rng) -> None:
    D, group = config.head_dim, config.num_heads // config.num_kv_heads
    scale = np.stack([_factors(D, channels, factors, rng) for _ in range(config.num_kv_heads)])  # [Hk, D]
    _scale(weights, prefix + "v_proj.weight", rows=scale.ravel())
    _scale(weights, prefix + "o_proj.weight", columns=1 / np.repeat(scale, group, axis=0).ravel())


def _plant_query_key(weights, prefix, config: ModelConfig, channels, factors, rng) -> None:
    D, group = config.head_dim, config.num_heads // config.num_kv_heads
    half = np.stack([_factors(D // 2, channels, factors, rng) for _ in range(config.num_kv_heads)])
    scale = np.concatenate([half, half], axis=1)  # both halves of a rotary pair
    _scale(weights, prefix + "q_proj.weight", rows=np.repeat(scale, group, axis=0).ravel())
    _scale(weights, prefix + "k_proj.weight", rows=1 / scale.ravel())
