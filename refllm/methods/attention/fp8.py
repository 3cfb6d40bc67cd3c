"""flash_fp8: FlashAttention-3 with 8-bit floats: q, k, v and the weights of a tile are E4M3 codes.

    q^ = E4M3(q M / s_q)     k^ = E4M3(k M / s_k)     v^ = E4M3(v / s_v)     s = largest |x| of a block / 448
    S  = scale s_q s_k q^ k^T     P^ = E4M3(2^8 P)     l' = a l + sum P     O' = a O + 2^-8 s_v P^ v^

Three things keep the error small. A block of rows has a scale of its own. M is a rotation with random signs, after
which an outlier channel is spread over all channels; q M (k M)^T = q k^T, so M needs no undoing, but it must come after
RoPE. And weights in [0, 1] are shifted by 2^8 before they are rounded, because E4M3 ends at 2^-9: a weight of a long
row would become 0. The sum l takes the weights as they were before rounding; a power of two cancels exactly.

Paper: Shah et al. 2024, "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision",
arXiv:2407.08608, section 3.3.
Differs from the authors' kernels: these take one scale per key-value head from outside (`granularity="head"`) and leave
M to the caller; natural exponentials; sums in float64. A width without a Hadamard matrix takes a random rotation.
Stage: prefill
Inventory: 9, 29
Lesson: lessons/23-flash-attention.md
Golden: attention/fp8
Baseline: flash
"""

import numpy as np

from refllm.formats.dtypes import FP8_E4M3FN
from refllm.kernels.hadamard import has_hadamard, random_hadamard, random_orthogonal
from refllm.kernels.online_softmax import by_kv_head, dot, tiles, walk_tiles

OFFSET = 256.0


def flash_fp8(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    granularity: str = "block",
    incoherent: bool = True,
    seed: int = 0,
    block_q: int = 64,
    block_k: int = 64,
) -> np.ndarray:
    """Attention whose four operands are E4M3 codes.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    granularity : str
        block: a scale for block_q x D of a query head, block_k x D of a key-value head. head: one per key-value head,
        for the queries that share it, too.
    incoherent : bool
        Turn q and k by M first.
    seed : int
        Of the signs of M.
    block_q, block_k : int

    Returns
    -------
    (..., H, T, Dv); a query that sees no key gives zeros

    Raises
    ------
    ValueError
        NaN or Inf, another granularity, head counts that do not divide, a block size below 1.

    Examples
    --------
    >>> one, at = np.ones((1, 2, 4)), np.arange(2)
    >>> flash_fp8(one, one, np.array([[[1.0], [448.0]]]), at, at, scale=1.0)[0, :, 0].tolist()
    [1.0, 224.5]
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    how = dict(granularity=granularity, incoherent=incoherent, seed=seed, block_q=block_q, block_k=block_k)
    return flash_fp8_with_lse(q, k, v, q_positions, k_positions, **rule, **how)[0]


def flash_fp8_with_lse(
    q, k, v, q_positions, k_positions, *, scale, window=None, softcap=None, granularity="block", incoherent=True,
    seed=0, block_q=64, block_k=64, traffic=None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What `flash_fp8` returns, and the log-sum-exp of every row, (..., H, T)."""
    if granularity not in ("block", "head"):
        raise ValueError(f"granularity must be block or head, got {granularity!r}")
    kv_heads, blocks = k.shape[-3], (block_q, block_k) if granularity == "block" else (None, None)
    if incoherent:
        q, k = (turned(x, seed) for x in (q, k))
    shared = by_kv_head(q, kv_heads)
    q_codes, q_scale = encode(shared, blocks[0], "q", joint=granularity == "head")
    k_codes, k_scale = encode(k, blocks[1], "k")
    v_codes, v_scale = encode(v, blocks[1], "v")
    q_hat, k_hat = (FP8_E4M3FN.decode(codes).astype(np.float64) for codes in (q_codes, k_codes))

    def products(rows, columns):
        scales = q_scale[..., rows, None].astype(np.float64) * k_scale[..., None, None, columns]
        return scales * dot(q_hat[..., rows, :], k_hat[..., columns, :])

    o, lse = walk_tiles(
        q.astype(np.float64), k_hat, FP8_E4M3FN.decode(v_codes) * v_scale[..., None].astype(np.float64),
        q_positions, k_positions, scale=scale, window=window, softcap=softcap, block_q=block_q, block_k=block_k,
        products=products, weigh=weigh, traffic=traffic,
    )  # fmt: skip
    return o.astype(v.dtype), lse.astype(v.dtype)


def turned(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """x M in float64, M = diag(+-1) H / sqrt(D), or a random rotation where there is no Hadamard matrix H."""
    D, rng = x.shape[-1], np.random.default_rng(seed)
    return x.astype(np.float64) @ (random_hadamard if has_hadamard(D) else random_orthogonal)(D, rng)


def encode(x: np.ndarray, block: int | None, name: str, joint: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 codes with one scale for a block of rows.

    Parameters
    ----------
    x : (..., T, D)
    block : int or None
        Rows of a block; None: all.
    name : str
        For errors.
    joint : bool
        One scale for all of the axis before the rows as well.

    Returns
    -------
    codes : (..., T, D) uint8
    scale : (..., T) float32, repeated for the rows of its block; 1 for a block of zeros

    Examples
    --------
    >>> codes, scale = encode(np.array([[448.0, 1.0], [2.0, 0.0], [0.0, 0.0]]), 1, "x")
    >>> FP8_E4M3FN.decode(codes).tolist(), (448 * scale).round(3).tolist()
    ([[448.0, 1.0], [448.0, 0.0], [0.0, 0.0]], [448.0, 2.0, 448.0])
    """
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or Inf; codes need finite numbers")
    largest = np.abs(x).max(axis=-1)
    if joint:
        largest = np.broadcast_to(largest.max(axis=-2, keepdims=True), largest.shape)
    scale = np.empty(largest.shape, np.float32)
    for rows in tiles(x.shape[-2], x.shape[-2] if block is None else block, "block"):
        scale[..., rows] = largest[..., rows].max(axis=-1, keepdims=True) / FP8_E4M3FN.max
    scale = np.where(scale > 0, scale, np.float32(1))
    return FP8_E4M3FN.encode(x / scale[..., None].astype(np.float64)), scale


def weigh(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """P^ v with the weights of a tile as E4M3 codes of 2^8 p."""
    return np.matmul(FP8_E4M3FN.decode(FP8_E4M3FN.encode(OFFSET * p)).astype(np.float64), v) / OFFSET
