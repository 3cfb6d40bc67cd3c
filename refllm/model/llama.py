"""The forward pass: one decoder block, written once, for Llama 1-3, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 3, DeepSeek.

    x = E[ids]
    for each layer:   x += o( attend(rope(q(norm(x))), rope(k(norm(x))), v(norm(x))) )
                      x += down( act(gate(norm(x))) * up(norm(x)) )
    logits = head(norm(x))

What differs between architectures is data in ModelConfig; a branch that is built otherwise has a module of its own:
mla.py (latent attention), mfa.py (factored queries), palu.py (low-rank keys and values), moe.py (experts). Three
arguments are the seams every later method uses: `cache` (what is kept of keys and values), `attend` (how they are
read), `observe` (what calibration sees). Packed weights need none: `matmul`, and `rows` for the embedding, take either
kind. Where none of the three is given, the compiled twin of this text (compiled.py) may run in its place. Lesson:
lessons/01-forward-pass.md.
"""

from collections.abc import Callable

import numpy as np

from refllm.kernels import attention
from refllm.kernels.nn import rms_norm
from refllm.kernels.packed import matmul, rows
from refllm.kernels.rope import cos_sin, rotate
from refllm.model import mfa, mla, moe, palu
from refllm.model.cache import KVCache
from refllm.model.compiled import compiled_for
from refllm.model.config import ModelConfig
from refllm.model.linear import gated, linear
from refllm.model.model import Model


def forward(
    model: Model,
    ids,
    *,
    cache: KVCache | None = None,
    attend: Callable | None = None,
    observe: Callable | None = None,
    last_only: bool = False,
) -> np.ndarray:
    """Logits of every position: prefill without a cache, or prefill, chunked prefill and decode through one.

    Parameters
    ----------
    model : Model
    ids : (T,) or (B, T) integers
        Token ids; a batch holds sequences of one length.
    cache : KVCache, optional
        From `new_cache(model)`. The ids continue what it has seen, and it is extended in place.
    attend : callable, optional
        Same call as `refllm.kernels.attention.attend`; None takes the model's own.
    observe : callable, optional
        Called as observe(names, x) with the input x (B, T, in) that the linears `names` share, before each product.
    last_only : bool
        Compute the head for the last position only (all that decoding needs); the logits then have T = 1.

    Returns
    -------
    (T, V) or (B, T, V); float32, or float64 where the weights are float64

    Raises
    ------
    ValueError
        No ids, ids outside the vocabulary, more positions than the context, another batch size than the cache holds.
    """
    config = model.config
    ids = check_ids(ids, config.vocab_size)
    start = 0 if cache is None else cache.length
    limit = config.context_length if cache is None else cache.context_length
    if start + ids.shape[-1] > limit or ids.shape[-1] > config.context_length:
        raise ValueError(
            f"the context of {config.context_length} tokens is full: {start} seen, {ids.shape[-1]} more given; "
            "shorten the prompt"
        )
    ids_2d = np.atleast_2d(ids)
    if cache is not None:
        cache.check_batch(len(ids_2d))
    plain = attend is None and observe is None and len(ids_2d) == 1
    fast = compiled_for(model, cache, ids.size) if plain else None
    if fast is None:
        x = _all_blocks(model, ids_2d, start, cache, attend, observe)
    elif ids.size == 1:
        return _soft_cap(model, fast.decode(int(ids_2d[0, 0]))).reshape(*ids.shape, -1)
    else:
        x = fast.prefill(ids_2d[0])[None]
    if last_only:
        x = x[:, -1:]
    logits = head(model, x, observe)
    return logits[0] if ids.ndim == 1 else logits


def _all_blocks(model, ids, start, cache, attend, observe):
    """Hidden states (B, T, d) of ids (B, T) at the positions from `start` on."""
    x = embed(model, ids)
    positions = np.arange(start, start + ids.shape[-1])
    for layer in range(model.config.num_layers):
        store = None if cache is None else cache.stores[layer]
        x = block(model, layer, x, positions, store=store, attend=attend, observe=observe)
    if cache is not None:
        cache.length = start + ids.shape[-1]
    return x


def check_ids(ids, vocab_size: int) -> np.ndarray:
    """Token ids as an int64 array (T,) or (B, T), or a ValueError that says what is wrong with them."""
    if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < vocab_size:
        return np.array(ids)  # what decoding gives, a few hundred times a second
    try:
        ids = np.asarray(ids)
    except ValueError:
        raise ValueError("token ids are ragged: a batch must hold sequences of one length") from None
    if ids.size == 0:
        raise ValueError("no token ids: give at least one (an empty prompt needs a BOS token)")
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers of shape (T,) or (B, T), got {ids.dtype} of shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
        raise ValueError(f"token id {wrong} is outside the vocabulary 0..{vocab_size - 1}")
    return ids.astype(np.int64)


def embed(model: Model, ids: np.ndarray) -> np.ndarray:
    """Token vectors (B, T, d) of ids (B, T)."""
    x = rows(model.weights["model.embed_tokens.weight"], ids)
    scale = model.config.embedding_scale
    return x if scale == 1.0 else x * x.dtype.type(scale)  # stays in x's type


def head(model: Model, x: np.ndarray, observe: Callable | None = None) -> np.ndarray:
    """Logits (B, T, V) of hidden states (B, T, d): final norm, head (the embedding where tied), soft-cap."""
    config, weights = model.config, model.weights
    x = rms_norm(x, weights["model.norm.weight"], config.norm_eps, config.norm_offset)
    name = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    if observe is not None:
        observe((name,), x)
    return _soft_cap(model, matmul(x, weights[name], model.runtime.activations))


def _soft_cap(model: Model, logits: np.ndarray) -> np.ndarray:
    """Logits, pressed into +-cap where the architecture does so."""
    cap = model.config.logit_softcap
    return logits if cap is None else logits.dtype.type(cap) * np.tanh(logits / logits.dtype.type(cap))


def block(
    model: Model,
    layer: int,
    x: np.ndarray,
    positions: np.ndarray,
    *,
    store=None,
    attend: Callable | None = None,
    observe: Callable | None = None,
) -> np.ndarray:
    """One decoder layer: hidden states (B, T, d) in, (B, T, d) out; a new array.

    Parameters
    ----------
    layer : int
    positions : (T,) integer
        Absolute positions of the T tokens.
    store : optional
        The layer's store in the cache (`refllm.model.cache`).
    attend, observe :
        As in `forward`.
    """
    x = attention_half(model, layer, x, positions, store=store, attend=attend, observe=observe)
    return mlp_half(model, layer, x, observe=observe)


def attention_half(
    model: Model,
    layer: int,
    x: np.ndarray,
    positions: np.ndarray,
    *,
    store=None,
    attend: Callable | None = None,
    observe: Callable | None = None,
) -> np.ndarray:
    """Hidden states (B, T, d) with what attention adds to them; a new array. Parameters as in `block`."""
    h = _norm(model, layer, "input_layernorm", x)
    h = _attention_of(model.config)(model, layer, h, positions, store=store, attend=attend, observe=observe)
    if model.config.post_norms:  # Gemma normalises what each branch returns, too
        h = _norm(model, layer, "post_attention_layernorm", h)
    return x + h


def mlp_half(model: Model, layer: int, x: np.ndarray, *, observe: Callable | None = None) -> np.ndarray:
    """Hidden states (B, T, d) with what the feed-forward part adds to them; a new array. Parameters as in `block`."""
    post_norms = model.config.post_norms
    branch = moe.mlp_branch if model.config.has_experts(layer) else mlp_branch
    h = _norm(model, layer, "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm", x)
    h = branch(model, layer, h, observe=observe)
    if post_norms:
        h = _norm(model, layer, "post_feedforward_layernorm", h)
    return x + h


def _norm(model: Model, layer: int, name: str, x: np.ndarray) -> np.ndarray:
    config = model.config
    return rms_norm(x, model.weights[f"model.layers.{layer}.{name}.weight"], config.norm_eps, config.norm_offset)


def _attention_of(config: ModelConfig) -> Callable:
    """The attention branch of this architecture."""
    if config.latent is not None:
        return mla.attention_branch
    if config.low_rank_kv is not None:
        return palu.attention_branch
    if config.factored is not None and config.factored.reuse_keys:
        return mfa.attention_branch
    return attention_branch


def attention_branch(
    model: Model,
    layer: int,
    x: np.ndarray,
    positions: np.ndarray,
    *,
    store=None,
    attend: Callable | None = None,
    observe: Callable | None = None,
) -> np.ndarray:
    """The attention branch: normed states (B, T, d) -> (B, T, d), through q (B, H, T, D) and k, v (B, Hk, S, D).

    T new tokens attend over S: themselves and what `store` returns of earlier ones. Parameters as in `block`.
    """
    config, prefix = model.config, f"model.layers.{layer}.self_attn."
    batch, tokens, _ = x.shape
    if config.factored is None:
        q, k, v = linear(model, (prefix + "q_proj", prefix + "k_proj", prefix + "v_proj"), x, observe)
    else:
        q, k, v = mfa.project(model, prefix, x, observe)
    heads = lambda y: y.reshape(batch, tokens, -1, config.head_dim).swapaxes(1, 2)  # (B, heads, T, D)
    q, k, v = heads(q), heads(k), heads(v)
    if config.qk_norm:  # before the rotation; v is never normed
        q = rms_norm(q, model.weights[prefix + "q_norm.weight"], config.norm_eps, config.norm_offset)
        k = rms_norm(k, model.weights[prefix + "k_norm.weight"], config.norm_eps, config.norm_offset)
    rope = config.layer_rope(layer)
    cos, sin = cos_sin(rope, config.head_dim, positions, x.dtype)
    q = rotate(q, cos, sin)
    # Some stores keep keys unrotated, to quantise or re-place them: model/cache.py.
    pre_rope = store is not None and store.pre_rope
    if not pre_rope:
        k = rotate(k, cos, sin)
    attend = attend or model.runtime.attend
    how = dict(scale=config.score_scale, window=config.window(layer), softcap=config.attention_softcap)
    if attend is None and hasattr(store, "attend"):
        out = store.attend(q, k, v, positions, **how)
    else:
        key_positions = positions
        if store is not None:
            k, v, key_positions = store.extend(k, v, positions, q)  # by q a store may rank what it keeps
        if pre_rope:
            k = rotate(k, *cos_sin(rope, config.head_dim, key_positions, x.dtype))
        out = (attend or attention.attend)(q, k, v, positions, key_positions, **how)
    out = out.swapaxes(1, 2).reshape(batch, tokens, -1)  # (B, T, H*D)
    return linear(model, (prefix + "o_proj",), out, observe)[0]


def mlp_branch(model: Model, layer: int, x: np.ndarray, *, observe: Callable | None = None) -> np.ndarray:
    """The feed-forward branch: normed states (B, T, d) -> (B, T, d), gated at the intermediate width."""
    return gated(model, f"model.layers.{layer}.mlp.", x, observe)
