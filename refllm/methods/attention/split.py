"""flash_decoding: one new token, long context: the keys are cut into parts that run side by side, and merged.

FlashAttention hands out query tiles. A decode step has one row per head, so most of a machine would idle while a few
units walk along all keys. Cut the keys into n parts, attend each by itself, and put the finished results together:

    o_i, LSE_i = attention over part i     LSE = ln sum exp(LSE_i)     o = sum exp(LSE_i - LSE) o_i

The g query heads that share a key-value head become g rows of one tile, so keys are read once for all of them. The
result does not depend on n, nor does the number of keys read; n is chosen so that all units have work: the fewest parts
whose waves are at least 85 % as full as the best.

Paper: Dao et al. 2023, "Flash-Decoding for long-context inference", crfm.stanford.edu/2023/10/12/flashdecoding.html;
the choice of n: Dao-AILab/flash-attention, hopper/heuristics.h and csrc/flash_attn/flash_api.cpp.
Differs from the authors' kernels: chunks are whole key blocks here, too, but may be given; no rule for the L2 cache.
Stage: decode
Inventory: 108
Lesson: lessons/23-flash-attention.md
Golden: attention/flash
Baseline: flash
"""

import math

import numpy as np

from refllm.kernels.online_softmax import by_kv_head, merge_outputs, tiles, walk_tiles


def flash_decoding(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int = 0,
    units: int = 132,
    block_q: int = 64,
    block_k: int = 64,
) -> np.ndarray:
    """`attend` with the keys cut into parts.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    splits : int
        Parts; 0: chosen by `split_count`.
    units : int
        Of the machine that work side by side (an H100 has 132).
    block_q, block_k : int
        Rows of a query tile, after packing, and of a key tile.

    Returns
    -------
    (..., H, T, Dv); a query that sees no key gives zeros

    Raises
    ------
    ValueError
        Head counts that do not divide, splits below 0, units or a block size below 1.

    Examples
    --------
    >>> one, at = np.ones((1, 4, 1)), np.arange(4)
    >>> v = np.array([[[0.0], [4.0], [2.0], [2.0]]])
    >>> flash_decoding(one[:, :1], one, v, at[3:], at, scale=1.0, splits=3, block_k=1)[0, :, 0].tolist()
    [2.0]
    """
    how = dict(splits=splits, units=units, block_q=block_q, block_k=block_k)
    rule = dict(scale=scale, window=window, softcap=softcap)
    return flash_decoding_with_lse(q, k, v, q_positions, k_positions, **rule, **how)[0]


def flash_decoding_with_lse(
    q, k, v, q_positions, k_positions, *, scale, window=None, softcap=None, splits=0, units=132, block_q=64,
    block_k=64, traffic=None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What `flash_decoding` returns, and the log-sum-exp of every row, (..., H, T)."""
    if splits < 0:
        raise ValueError(f"splits must be at least 1, or 0 to choose, got {splits}")
    grouped = by_kv_head(q, k.shape[-3])
    *lead, group, queries, dim = grouped.shape
    packed = grouped.reshape(*lead, group * queries, dim)  # row r is query r % T of head r // T of its group
    blocks = len(tiles(k.shape[-2], block_k, "block_k"))
    if not splits:
        work = math.prod(lead) * len(tiles(group * queries, block_q, "block_q"))
        splits = split_count(work, units, blocks)
    step = max(1, -(-blocks // splits)) * block_k
    rule = dict(scale=scale, window=window, softcap=softcap, block_q=block_q, block_k=block_k, traffic=traffic)
    at = np.tile(q_positions, group)
    parts = [
        walk_tiles(packed, k[..., part, :], v[..., part, :], at, k_positions[..., part], **rule)
        for part in tiles(k.shape[-2], step, "block_k")
    ]
    o, lse = merge_outputs(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))
    return o.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


def split_count(work: int, units: int, blocks: int, most: int = 128) -> int:
    """How many parts to cut the keys into.

    Parameters
    ----------
    work : int
        Tiles there are without a cut: batch x key-value heads x query tiles.
    units : int
        Tiles that run at once.
    blocks : int
        Key blocks; a part has at least one.
    most : int

    Returns
    -------
    int
        1 where the tiles fill 80 % of the machine or there are at most 4 key blocks. Else the fewest parts whose waves
        are at least 85 % as full as the fullest; numbers of parts whose chunks are no shorter than with one part less
        are left out.

    Examples
    --------
    >>> split_count(8, 132, 512), split_count(120, 132, 512), split_count(8, 132, 4)
    (14, 1, 1)
    """
    if units < 1:
        raise ValueError(f"units must be at least 1, got {units}")
    if work >= 0.8 * units or blocks <= 4:
        return 1
    chunk = lambda n: -(-blocks // n)
    counts = [n for n in range(1, min(most, units, blocks) + 1) if n == 1 or chunk(n) != chunk(n - 1)]
    full = {n: (work * n / units) / math.ceil(work * n / units) for n in counts}
    return next(n for n in counts if full[n] >= 0.85 * max(full.values()))
