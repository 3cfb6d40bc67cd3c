"""flash: exact attention tile by tile, so that the T x S matrix of scores never exists.

One row of the softmax needs three numbers per key block: the largest score so far m, the sum l of exp(s - m), and the
un-normalised output O. A further block of scores s with values V updates them:

    m' = max(m, max s)     a = exp(m - m')     p = exp(s - m')     l' = a l + sum p     O' = a O + p V

and at the end o = O / l, LSE = m + ln l. Two partial states merge in the same way, in any order and for any split of
the keys. `flash` walks query blocks outside and key blocks inside, divides once, and skips tiles that no query sees
(FlashAttention-2); `flash_v1` walks key blocks outside and keeps O normalised, so O, l and m travel once per key block
(FlashAttention). What is saved is traffic, not arithmetic: `Traffic` counts the elements.

Paper: Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691.
Also: Dao et al. 2022, "FlashAttention", arXiv:2205.14135, Algorithm 1 (`flash_v1`); the state of a row, its update and
its merging: refllm/kernels/online_softmax.py; the backward pass: backward.py.
Differs from the authors' kernels: natural exponentials instead of exp2 with log2(e) folded into the scale; masks come
from explicit positions; a row that sees no key gives output 0 and LSE -inf.
Stage: prefill
Inventory: 107, 108
Lesson: lessons/23-flash-attention.md
Golden: attention/flash
Baseline: refllm.kernels.attention.attend
"""

import numpy as np

from refllm.kernels.online_softmax import (
    Traffic,
    by_kv_head,
    divide,
    empty_state,
    finish,
    fold,
    merge,
    tile_scores,
    tiles,
    walk_tiles,
)


def flash(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> np.ndarray:
    """`attend` in the order of FlashAttention-2.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    block_q, block_k : int
        Rows of a query tile and of a key tile; neither changes the result beyond rounding.

    Returns
    -------
    (..., H, T, Dv); a query that sees no key gives zeros

    Raises
    ------
    ValueError
        Head counts that do not divide, a block size below 1.

    Examples
    --------
    >>> one = np.ones((1, 2, 1))
    >>> at = np.arange(2)
    >>> flash(one, one, np.array([[[0.0], [4.0]]]), at, at, scale=1.0, block_q=1, block_k=1)[0, :, 0].tolist()
    [0.0, 2.0]
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    return flash_with_lse(q, k, v, q_positions, k_positions, block_q=block_q, block_k=block_k, **rule)[0]


def flash_v1(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sram: int = 32768,
) -> np.ndarray:
    """`attend` in the order of the first FlashAttention.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    sram : int
        M, elements of small memory: key tiles have ceil(M / 4D) rows, query tiles min(ceil(M / 4D), D).

    Returns
    -------
    (..., H, T, Dv); a query that sees no key gives zeros

    Raises
    ------
    ValueError
        Head counts that do not divide, sram below 1.

    Examples
    --------
    >>> one = np.ones((1, 2, 1))
    >>> at = np.arange(2)
    >>> flash_v1(one, one, np.array([[[0.0], [4.0]]]), at, at, scale=1.0, sram=4)[0, :, 0].tolist()
    [0.0, 2.0]
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    return flash_v1_with_lse(q, k, v, q_positions, k_positions, sram=sram, **rule)[0]


def flash_with_lse(
    q, k, v, q_positions, k_positions, *, scale, window=None, softcap=None, block_q=64, block_k=64, traffic=None
) -> tuple[np.ndarray, np.ndarray]:
    """What `flash` returns, and the log-sum-exp of every row, which merging and a backward pass need.

    Parameters
    ----------
    traffic : Traffic, optional
        Counted in place. The other parameters are those of `flash`.

    Returns
    -------
    o : (..., H, T, Dv)
    lse : (..., H, T)
        Natural logarithm of the sum of exp(score) over the keys a query sees; -inf where there is none.
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    tiling = dict(block_q=block_q, block_k=block_k, traffic=traffic)
    return walk_tiles(q, k, v, q_positions, k_positions, **rule, **tiling)


def flash_v1_with_lse(
    q, k, v, q_positions, k_positions, *, scale, window=None, softcap=None, sram=32768, traffic=None
) -> tuple[np.ndarray, np.ndarray]:
    """What `flash_v1` returns, and the log-sum-exp of every row; as `flash_with_lse`."""
    if sram < 1:
        raise ValueError(f"sram must be at least 1 element, got {sram}")
    traffic = Traffic() if traffic is None else traffic
    head_dim = q.shape[-1]
    block_k = -(-sram // (4 * head_dim))
    block_q = min(block_k, head_dim)
    grouped = by_kv_head(q, k.shape[-3])
    top, total, out = empty_state(grouped.shape[:-1], v.shape[-1], q.dtype)  # these live in large memory
    for columns in tiles(k.shape[-2], block_k, "block_k"):
        k_tile, v_tile = k[..., columns, :], v[..., columns, :]
        traffic.reads += k_tile.size + v_tile.size
        for rows in tiles(q.shape[-2], block_q, "block_q"):
            q_tile = grouped[..., rows, :]
            at = (q_positions[rows], k_positions[..., columns])
            scores = tile_scores(q_tile, k_tile, *at, scale, window, softcap)
            if scores is None:
                traffic.skipped += 1
                continue
            traffic.tiles += 1
            m, l, o = top[..., rows], total[..., rows], out[..., rows, :]
            traffic.reads += q_tile.size + o.size + l.size + m.size
            new = fold(empty_state(m.shape, v.shape[-1], q.dtype), scores, v_tile[..., None, :, :])
            m, l, o = merge((m, l, l[..., None] * o), new)  # o is kept normalised between the visits
            top[..., rows], total[..., rows], out[..., rows, :] = m, l, divide(o, l)
            traffic.writes += o.size + l.size + m.size
    lse = finish((top, total, out))[1]
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


def standard_traffic(queries: int, keys: int, head_dim: int) -> Traffic:
    """Elements that attention moves per head when scores and weights are written out: O(T D + S D + T S).

    Reads q, k, the scores, the weights, v; writes the scores, the weights, o.

    Examples
    --------
    >>> standard_traffic(1024, 1024, 64)
    Traffic(reads=2293760, writes=2162688, tiles=0, skipped=0)
    """
    matrix = queries * keys
    return Traffic(reads=queries * head_dim + 2 * keys * head_dim + 2 * matrix, writes=2 * matrix + queries * head_dim)
