"""Multi-matrix factorization attention: many query heads over one wide key-value head, queries through a bottleneck.

    q_h = Q_h norm(S_q x)      k = S_k x      v = S_v x            one k and one v of width C a token, for all heads
    MFA-KR:  v = k + alpha * (k N^T)                               values are made from keys, before their rotation

It is attention with a single key-value head (`refllm.model.llama.attention_branch` runs it) whose query matrices
Q_h S_q share their right factor, so that heads can be many and C wide without the weights of as many full matrices.
With keys reused only the unrotated key is cached, C numbers a token, and rotated when it is read. What makes values of
keys is linear and the weights of attention are numbers, so it acts on what attention has mixed, once a query and not
once a cached token: sum_j p_j (k_j + alpha * (k_j N^T)) = u + alpha * (u N^T) with u = sum_j p_j k_j.

Hu et al. 2024, "Multi-matrix Factorization Attention", arXiv:2412.19255, section 3. `transform/mfa` makes such a layer
of an existing one. Lesson: lessons/26-latent-caches.md.
"""

from collections.abc import Callable

import numpy as np

from refllm.kernels import attention
from refllm.kernels.nn import rms_norm
from refllm.kernels.rope import cos_sin, rotate
from refllm.model.linear import linear
from refllm.model.model import Model


def project(model: Model, prefix: str, x: np.ndarray, observe: Callable | None = None) -> list[np.ndarray]:
    """Queries, keys and values (or queries and keys alone, where keys are reused), heads not yet split.

    Parameters
    ----------
    prefix : str
        model.layers.LAYER.self_attn.
    x : (B, T, d)

    Returns
    -------
    list of (B, T, H * C), (B, T, C) and, unless keys are reused, (B, T, C)
    """
    factored = model.config.factored
    names = ("q_a_proj", "k_proj") if factored.reuse_keys else ("q_a_proj", "k_proj", "v_proj")
    shared, *kv = linear(model, tuple(prefix + name for name in names), x, observe)
    if factored.query_norm:
        shared = rms_norm(shared, model.weights[prefix + "q_a_layernorm.weight"], model.config.norm_eps)
    return [linear(model, (prefix + "q_b_proj",), shared, observe)[0], *kv]


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
    """The attention branch with reused keys: normed states (B, T, d) -> (B, T, d). Parameters as in `llama.block`."""
    config, prefix = model.config, f"model.layers.{layer}.self_attn."
    batch, tokens, _ = x.shape
    q, k = project(model, prefix, x, observe)
    q = q.reshape(batch, tokens, -1, config.head_dim).swapaxes(1, 2)  # (B, H, T, C)
    k = k[:, None]  # (B, 1, T, C), not rotated
    angles = lambda at: cos_sin(config.layer_rope(layer), config.head_dim, at, x.dtype)
    q, key_positions = rotate(q, *angles(positions)), positions
    if store is not None:
        k, _, key_positions = store.extend(k, k[..., :0], positions, q)
    mixed = (attend or model.runtime.attend or attention.attend)(
        q, rotate(k, *angles(key_positions)), k, positions, key_positions,
        scale=config.score_scale, window=config.window(layer), softcap=config.attention_softcap,
    )  # fmt: skip
    mixed = mixed.swapaxes(1, 2)  # (B, T, H, C)
    gate = model.weights[prefix + "v_gate.weight"]
    out = mixed + gate * linear(model, (prefix + "v_proj",), mixed, observe)[0]
    return linear(model, (prefix + "o_proj",), out.reshape(batch, tokens, -1), observe)[0]
