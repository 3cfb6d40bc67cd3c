"""A Llama that can be trained: the differentiable twin of `refllm.model.llama`, its loss and its first weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from refllm.kernels import fused
from refllm.kernels.autograd import Tensor
from refllm.kernels.rope import cos_sin, inverse_frequencies
from refllm.model.config import ModelConfig
from refllm.model.names import expected_shapes


def hidden_states(
    params: Mapping[str, Tensor], config: ModelConfig, ids: np.ndarray, *, at_cache: Callable | None = None
) -> Tensor:
    """Final normed hidden states, the differentiable twin of `refllm.model.llama.forward` before the head.

    Parameters
    ----------
    params : mapping of Hugging Face names to Tensor
    config : ModelConfig
        A plain Llama: SiLU, no biases, no q/k norm, no window, no soft-capping.
    ids : integers [B, T]
    at_cache : callable, optional
        As in `block_states`.

    Returns
    -------
    Tensor [B * T, d]

    Raises
    ------
    ValueError
        If the architecture has a part this forward pass lacks.
    """
    check_plain(config)
    B, T = ids.shape
    x = fused.embedding(params["model.embed_tokens.weight"], ids)
    for layer in range(config.num_layers):
        x = block_states(params, config, layer, x, B, T, at_cache=at_cache)
    return fused.rmsnorm(x, params["model.norm.weight"], config.norm_eps)


def block_states(
    params: Mapping[str, Tensor],
    config: ModelConfig,
    layer: int,
    x: Tensor,
    B: int,
    T: int,
    *,
    at_linears: Callable[[Tensor], Tensor] | None = None,
    at_attention: Callable[[Tensor], Tensor] | None = None,
    at_cache: Callable[[int, str, Tensor], Tensor] | None = None,
) -> Tensor:
    """One decoder layer, the differentiable twin of `refllm.model.llama.block`.

    Parameters
    ----------
    params : mapping of Hugging Face names to Tensor
        At least those of the layer.
    x : Tensor [B * T, d]
        Hidden states, in and out.
    at_linears, at_attention : callable, optional
        What the linears see of their inputs [B * T, in], and the attention of queries, keys and values [B, T, heads, D]
        after the rotation: rounding, say.
    at_cache : callable, optional
        at_cache(layer, part, x) -> Tensor: what becomes of keys before the rotation ("k") and after it ("rotated") and
        of values ("v"), each [B, T, Hk, D].
    """
    H, Hk, D = config.num_heads, config.num_kv_heads, config.head_dim
    seen, read = at_linears or _unchanged, at_attention or _unchanged
    cos, sin = cos_sin(config.rope, D, np.arange(T), x.data.dtype)
    scale = D**-0.5 if config.attention_scale is None else config.attention_scale
    weight = lambda name: params[f"model.layers.{layer}.{name}.weight"]
    h = seen(fused.rmsnorm(x, weight("input_layernorm"), config.norm_eps))
    q = fused.linear(h, weight("self_attn.q_proj")).reshape(B, T, H, D)
    k = fused.linear(h, weight("self_attn.k_proj")).reshape(B, T, Hk, D)
    v = fused.linear(h, weight("self_attn.v_proj")).reshape(B, T, Hk, D)
    if at_cache is not None:
        k, v = at_cache(layer, "k", k), at_cache(layer, "v", v)
    k = fused.rotate(k, cos, sin)
    if at_cache is not None:
        k = at_cache(layer, "rotated", k)
    mixed = fused.causal_attention(read(fused.rotate(q, cos, sin)), read(k), read(v), scale)
    x = x + fused.linear(seen(mixed.reshape(B * T, H * D)), weight("self_attn.o_proj"))
    h = seen(fused.rmsnorm(x, weight("post_attention_layernorm"), config.norm_eps))
    gate, up = fused.linear(h, weight("mlp.gate_proj")), fused.linear(h, weight("mlp.up_proj"))
    return x + fused.linear(seen(fused.swiglu(gate, up)), weight("mlp.down_proj"))


def _unchanged(x: Tensor) -> Tensor:
    return x


def check_plain(config: ModelConfig) -> None:
    """Raise ValueError for an architecture with a part that the differentiable pass lacks."""
    lacks = {
        "activation": config.activation != "silu",
        "biases": config.attention_bias or config.output_bias or config.mlp_bias,
        "q/k norm": config.qk_norm,
        "norm offset": config.norm_offset != 0,
        "post norms": config.post_norms,
        "embedding scale": config.embedding_scale != 1,
        "soft-capping": config.attention_softcap is not None or config.logit_softcap is not None,
        "sliding window": any(config.sliding_layers),
        config.special or "other branches": config.special is not None,
    }
    if wrong := [name for name, present in lacks.items() if present]:
        raise ValueError(f"training knows plain Llama only; {config.architecture} here also has: {', '.join(wrong)}")


def head_name(config: ModelConfig) -> str:
    """Name of the output embedding: the input table when tied."""
    return "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"


@dataclass(frozen=True)
class NextToken:
    """Loss: mean nats per scored next token.

    Called with (params, (ids, targets)) or (params, (ids, targets, weights)), all [B, T]; target -1 = not scored.

    Parameters
    ----------
    config : ModelConfig
    at_cache : callable, optional
        As in `block_states`.
    """

    config: ModelConfig
    at_cache: Callable | None = None

    def __call__(self, params: Mapping[str, Tensor], batch: tuple[np.ndarray, ...]) -> Tensor:
        ids, *scoring = batch
        hidden = hidden_states(params, self.config, ids, at_cache=self.at_cache)
        return fused.cross_entropy(hidden, params[head_name(self.config)], *scoring)


def initial_weights(config: ModelConfig, seed: int, std: float = 0.05) -> dict[str, np.ndarray]:
    """Random float32 weights to start training from.

    Normal with `std`, o and down narrower by sqrt(2 L) (GPT-2's rule), norms 1, and three additions that save most of
    the tokens a small model needs before it recalls anything:

    * All token vectors share one random direction of +-std. Queries and keys have no biases, so a head that attends by
      position alone needs something that is the same at every position. In a tied head it adds the same to all logits.
    * The first layer's heads but the last start near fixed offsets 1, 2, 3, ...: queries and keys see the shared
      direction with phases that make the rotary kernel peak there. Training is free to change them.
    * Queries equal keys in the other layers, and o is the transpose of v in all (the first layer's heads share one v).
      A position is first drawn to near ones that resemble it, and what is read keeps its direction, so that a later
      layer can compare what two heads have read. In the spirit of Trockman and Kolter 2023, "Mimetic initialization of
      self-attention layers", arXiv:2305.09828; there q k has noise on top, and o v the opposite sign.
    """
    rng = np.random.default_rng(seed)
    narrow = (2 * config.num_layers) ** -0.5
    weights = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
        else:
            factor = narrow if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            weights[name] = (factor * std * rng.standard_normal(shape)).astype(np.float32)
    signs = np.where(rng.random(config.hidden_size) < 0.5, -1, 1).astype(np.float32)
    weights["model.embed_tokens.weight"] += std * signs
    _start_with_matches(weights, config, narrow)
    _start_with_offsets(weights, config, signs)
    return weights


def _start_with_matches(weights: dict[str, np.ndarray], config: ModelConfig, narrow: float) -> None:
    """Set q = k (but in the first layer) and o = narrow v^T, head by head; one v for the first layer's heads."""
    D, share = config.head_dim, config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        q, k, v, o = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
        if layer == 0:
            v[:] = np.tile(v[:D], (config.num_kv_heads, 1))
        for head in range(config.num_heads):
            own, shared = (slice(i * D, (i + 1) * D) for i in (head, head // share))
            o[:, own] = np.float32(narrow) * v[shared].T
            if layer:
                q[own] = k[shared]


def _start_with_offsets(
    weights: dict[str, np.ndarray], config: ModelConfig, signs: np.ndarray, peak: float = 6.0
) -> None:
    """Add to the first layer's q and k what turns the shared direction into kernels peaked at offsets 1, 2, 3, ...

    With a query of phase -w o and a key of phase 0 in the pair of frequency w, their product at distance t is
    cos(w (t - o)) times the lengths; the four fastest frequencies, `peak` each after the scaling by D^-0.5, suffice.
    """
    D, pairs = config.head_dim, min(4, config.head_dim // 2)
    frequency = inverse_frequencies(config.rope, D)[:pairs]
    # After the first norm the shared direction is half of each token's mean square: signs / sqrt(2).
    row = (peak * D**0.5) ** 0.5 * 2**0.5 / config.hidden_size * signs
    q, k = (weights[f"model.layers.0.self_attn.{name}_proj.weight"].reshape(-1, 2, D // 2, len(signs)) for name in "qk")
    k[:, 0, :pairs] += row
    for head in range(config.num_heads - 1):
        phase = -frequency * (head + 1)
        q[head, 0, :pairs] += np.cos(phase)[:, None] * row
        q[head, 1, :pairs] += np.sin(phase)[:, None] * row
