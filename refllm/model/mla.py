"""Multi-head latent attention: the cache holds one latent and one rotated key a token, whatever the number of heads.

    c = norm(A x)[:r]      k_r = rope((A x)[r:])           of one token, cached: r + rope_dim numbers
    k_h = (U_h c, k_r)     v_h = V_h c                     U_h, V_h: the rows of kv_b_proj of head h
    s_h = scale (q_n . U_h c + q_r . k_r)                  o_h = V_h sum_j p_j c_j

The position lives in k_r alone, so U_h c need not be turned, and U_h can go to the other side of the product:

    naive      k_h and v_h of every cached token are made, then H heads attend over keys of nope_dim + rope_dim
    absorbed   (U_h^T q_n, q_r) attends over the cached (c, k_r) itself, as one key-value head; V_h comes afterwards

Both give the same numbers. `multiply_adds` counts them: making k_h and v_h pays off where many queries read them
(prefill), absorbing where few do (decode), and the branch takes what is cheaper. The latent goes through the ordinary
store of the cache as keys k_r (B, 1, S, rope_dim) and values c (B, 1, S, r). What ranks keys by queries there sees the
part of the scores that carries the position.

DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437. Lesson:
lessons/26-latent-caches.md.
"""

from collections.abc import Callable

import numpy as np

from refllm.kernels import attention
from refllm.kernels.nn import rms_norm
from refllm.kernels.packed.base import is_record
from refllm.kernels.rope import cos_sin, rotate, rotate_interleaved
from refllm.model.config import Latent
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
    config, latent, prefix = model.config, model.config.latent, f"model.layers.{layer}.self_attn."
    batch, tokens, _ = x.shape
    norm = lambda name, y: rms_norm(y, model.weights[f"{prefix}{name}.weight"], latent.norm_eps)
    if latent.q_rank is None:
        q, compressed = linear(model, (prefix + "q_proj", prefix + "kv_a_proj_with_mqa"), x, observe)
    else:
        q, compressed = linear(model, (prefix + "q_a_proj", prefix + "kv_a_proj_with_mqa"), x, observe)
        q = linear(model, (prefix + "q_b_proj",), norm("q_a_layernorm", q), observe)[0]
    q = q.reshape(batch, tokens, config.num_heads, config.head_dim).swapaxes(1, 2)  # (B, H, T, nope + rope)
    c = norm("kv_a_layernorm", compressed[..., : latent.kv_rank])[:, None]  # (B, 1, T, r): cached after the norm
    k_r = compressed[:, None, :, latent.kv_rank :]

    turn = rotate_interleaved if latent.interleaved else rotate
    angles = lambda at: cos_sin(config.layer_rope(layer), latent.rope_dim, at, x.dtype)
    q_n, q_r = q[..., : latent.nope_dim], turn(q[..., latent.nope_dim :], *angles(positions))
    pre_rope = store is not None and store.pre_rope
    if not pre_rope:
        k_r = turn(k_r, *angles(positions))
    key_positions = positions
    if store is not None:
        k_r, c, key_positions = store.extend(k_r, c, positions, q_r)
    if pre_rope:
        k_r = turn(k_r, *angles(key_positions))

    attend = attend or model.runtime.attend or attention.attend
    how = dict(scale=config.score_scale, window=config.window(layer), softcap=config.attention_softcap)
    naive, absorbed = multiply_adds(latent, config.num_heads, tokens, c.shape[2])
    if observe is not None or naive <= absorbed:  # calibration is to see the input of kv_b_proj
        kv = linear(model, (prefix + "kv_b_proj",), c[:, 0], observe)[0]
        if key_positions.ndim > 1:  # kept head by head; there is one, and all heads that are made see the same
            key_positions = np.repeat(key_positions, config.num_heads, axis=-2)
        out = attend_naive(latent, q_n, q_r, kv, k_r, lambda *qkv: attend(*qkv, positions, key_positions, **how))
    else:
        up = model.weights[prefix + "kv_b_proj.weight"]
        up = up.dense().astype(x.dtype) if is_record(up) else up
        out = attend_absorbed(latent, q_n, q_r, c, k_r, up, lambda *qkv: attend(*qkv, positions, key_positions, **how))
    out = out.swapaxes(1, 2).reshape(batch, tokens, -1)  # (B, T, H * value_dim)
    return linear(model, (prefix + "o_proj",), out, observe)[0]


def attend_naive(latent: Latent, q_n, q_r, kv, k_r, attend: Callable) -> np.ndarray:
    """Attention with keys and values of every head made from the latent.

    Parameters
    ----------
    q_n : (B, H, T, nope_dim), q_r : (B, H, T, rope_dim)
        The two parts of the queries; q_r rotated.
    kv : (B, S, H * (nope_dim + value_dim))
        What kv_b_proj makes of the latents.
    k_r : (B, 1, S, rope_dim)
        Rotated.
    attend : callable
        attend(q, k, v) -> (B, H, T, value_dim).
    """
    kv = kv.reshape(*kv.shape[:2], q_n.shape[1], -1).swapaxes(1, 2)  # (B, H, S, nope + value)
    k_n, v = kv[..., : latent.nope_dim], kv[..., latent.nope_dim :]
    k_r = np.broadcast_to(k_r, (*k_n.shape[:-1], latent.rope_dim))
    return attend(np.concatenate([q_n, q_r], axis=-1), np.concatenate([k_n, k_r], axis=-1), v)


def attend_absorbed(latent: Latent, q_n, q_r, c, k_r, up: np.ndarray, attend: Callable) -> np.ndarray:
    """Attention over the latents themselves, as one key-value head of width kv_rank + rope_dim.

    Parameters
    ----------
    c : (B, 1, S, kv_rank)
    up : (H * (nope_dim + value_dim), kv_rank)
        The weight of kv_b_proj. Other parameters as in `attend_naive`.
    """
    up = up.reshape(q_n.shape[1], -1, latent.kv_rank)
    of_keys, of_values = up[:, : latent.nope_dim], up[:, latent.nope_dim :]
    q = np.concatenate([q_n @ of_keys, q_r], axis=-1)  # (B, H, T, r + rope)
    mixed = attend(q, np.concatenate([c, k_r], axis=-1), c)  # (B, H, T, r)
    return mixed @ of_values.swapaxes(1, 2)


def multiply_adds(latent: Latent, heads: int, tokens: int, seen: int) -> tuple[int, int]:
    """Multiplications of the naive and of the absorbed form, for `tokens` queries over `seen` keys.

    Every query is counted with every key; what both forms do alike is left out.

    Examples
    --------
    >>> v3 = Latent(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    >>> naive, absorbed = multiply_adds(v3, heads=128, tokens=1, seen=4096)
    >>> round(naive / absorbed, 1)
    117.3
    """
    n, p, r, v = latent.nope_dim, latent.rope_dim, latent.kv_rank, latent.value_dim
    naive = heads * (seen * r * (n + v) + tokens * seen * (n + p + v))
    absorbed = heads * (tokens * r * (n + v) + tokens * seen * (r + p + r))
    return naive, absorbed
