"""Keys and values of low rank: a latent for each group of key-value heads is cached, keys are rebuilt when read.

    z_k = R_k x      z_v = R_v x                       cached, before RoPE: r numbers a group
    k = rope(L_k z_k)                                  rebuilt for every cached token: a rotation does not pass L
    o = sum over heads of (W_o,h L_v) (p_h z_v)        values are never rebuilt: L_v has been multiplied into W_o

R are the k_proj and v_proj of such a model, L_k its k_up_proj, one a group. Head h of a group reads the latent of the
group, so attention mixes latents, and o_proj takes H * r_v inputs. `transform/palu` makes such a model. A store that
ranks tokens by queries gets L_k^T q: scores with its latents are those of queries and keys before RoPE.

Chang et al. 2024, "Palu", arXiv:2407.21118, section 3. Lesson: lessons/26-latent-caches.md.
"""

from collections.abc import Callable

import numpy as np

from refllm.kernels import attention
from refllm.kernels.nn import rms_norm
from refllm.kernels.packed.base import is_record
from refllm.kernels.rope import cos_sin, rotate
from refllm.model.linear import linear
from refllm.model.model import Model


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
    """The attention branch: normed states (B, T, d) -> (B, T, d). Parameters as in `refllm.model.llama.block`."""
    config, groups, prefix = model.config, model.config.low_rank_kv.groups, f"model.layers.{layer}.self_attn."
    batch, tokens, _ = x.shape
    split = lambda y, parts: y.reshape(*y.shape[:2], parts, -1).swapaxes(1, 2)  # (B, parts, T, -)
    normed = lambda y, name: rms_norm(y, model.weights[f"{prefix}{name}.weight"], config.norm_eps, config.norm_offset)
    q, of_key, of_value = linear(model, (prefix + "q_proj", prefix + "k_proj", prefix + "v_proj"), x, observe)
    q = split(q, config.num_heads)
    of_key, of_value = split(of_key, groups), split(of_value, groups)  # (B, G, T, r)
    angles = lambda at: cos_sin(config.layer_rope(layer), config.head_dim, at, x.dtype)
    q = normed(q, "q_norm") if config.qk_norm else q
    key_positions = positions
    if store is not None:
        of_key, of_value, key_positions = store.extend(of_key, of_value, positions, _in_latents(model, prefix, q))
    share = config.num_kv_heads // groups
    if key_positions.ndim > 1:  # kept group by group: every head of a group sees the same
        key_positions = np.repeat(key_positions, share, axis=-2)
    rebuilt = [linear(model, (f"{prefix}k_up_proj.{g}",), of_key[:, g], observe)[0] for g in range(groups)]
    k = np.concatenate([split(y, share) for y in rebuilt], axis=1)  # (B, Hk, S, D)
    k = rotate(normed(k, "k_norm") if config.qk_norm else k, *angles(key_positions))
    out = (attend or model.runtime.attend or attention.attend)(
        rotate(q, *angles(positions)), k, np.repeat(of_value, share, axis=1), positions, key_positions,
        scale=config.score_scale, window=config.window(layer), softcap=config.attention_softcap,
    )  # fmt: skip
    out = out.swapaxes(1, 2).reshape(batch, tokens, -1)  # (B, T, H * r)
    return linear(model, (prefix + "o_proj",), out, observe)[0]


def _in_latents(model: Model, prefix: str, q: np.ndarray) -> np.ndarray:
    """Queries (B, H, T, D), not rotated, as they meet latents: (B, H, T, r)."""
    config = model.config
    up = [model.weights[f"{prefix}k_up_proj.{g}.weight"] for g in range(config.low_rank_kv.groups)]
    up = np.concatenate([w.dense() if is_record(w) else w for w in up]).astype(q.dtype)  # (Hk * D, r)
    up = up.reshape(config.num_kv_heads, config.head_dim, -1)
    return q @ np.repeat(up, config.num_heads // config.num_kv_heads, axis=0)
