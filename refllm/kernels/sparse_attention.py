"""Attention over chosen blocks: the one primitive that sparse prefill methods share; they only build its mask.

A query tile visits the key blocks that its row of the mask names, and single columns beside them; nothing else is read
or multiplied. Inside a visited block the causal mask holds as ever. The softmax is over what is kept: the weights of
skipped keys go to the kept ones. Lesson: lessons/24-sparse-attention.md.
"""

import numpy as np

from refllm.kernels.attention import visible
from refllm.kernels.nn import softmax
from refllm.kernels.online_softmax import Traffic, by_kv_head, empty_state, finish, fold, tiles


def sparse_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    blocks: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    columns: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    traffic: Traffic | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over the blocks that a mask names.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    blocks : (..., H, ceil(T / block_q), ceil(S / block_k)) bool
    block_q, block_k : int
    columns : (..., H, S) bool, optional
        Keys that every query tile visits besides.
    tokens : (..., H, T, S) bool, optional
        What is kept inside of what is visited.
    traffic : Traffic, optional
        Tiles counts visited blocks, skipped the others that some query could have seen; reads counts keys and values.

    Returns
    -------
    o : (..., H, T, Dv); 0 for a query that is left no key
    lse : (..., H, T)

    Raises
    ------
    ValueError
        A mask of another shape, head counts that do not divide.

    Examples
    --------
    >>> one, at = np.ones((1, 4, 1)), np.arange(4)
    >>> v, mask = np.array([[[0.0], [4.0], [2.0], [2.0]]]), np.array([[[True, False], [False, True]]])
    >>> sparse_attend(one, one, v, at, at, mask, scale=1.0, block_q=2, block_k=2)[0][0, :, 0].tolist()
    [0.0, 2.0, 2.0, 2.0]
    """
    traffic = Traffic() if traffic is None else traffic
    rows, keys = tiles(q.shape[-2], block_q, "block_q"), tiles(k.shape[-2], block_k, "block_k")
    group = by_kv_head(q, k.shape[-3]).shape[-3]
    expected = (*q.shape[:-2], len(rows), len(keys))
    if blocks.shape != expected:
        raise ValueError(f"the mask of blocks must have the shape {expected}, got {blocks.shape}")
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.empty(q.shape[:-1], q.dtype)
    for head in np.ndindex(*q.shape[:-2]):
        of = (*head[:-1], head[-1] // group)
        at = k_positions if k_positions.ndim == 1 else k_positions[head[-1] // group]
        extra = np.zeros(k.shape[-2], bool) if columns is None else columns[head]
        for i, row in enumerate(rows):
            seen = visible(q_positions[row], at, window)
            if tokens is not None:
                seen &= tokens[head][row]
            wanted = extra.copy()
            for j, part in enumerate(keys):
                if blocks[head][i, j]:
                    wanted[part] = True
                if visible(q_positions[row], at[part], window).any():
                    traffic.tiles += int(blocks[head][i, j])
                    traffic.skipped += int(not blocks[head][i, j])
            chosen = np.flatnonzero(wanted & seen.any(axis=0))
            state = empty_state((row.stop - row.start,), v.shape[-1], q.dtype)
            for start in range(0, len(chosen), block_k):
                some = chosen[start : start + block_k]
                scores = q[head][row] @ k[of][some].T * q.dtype.type(scale)
                if softcap is not None:
                    scores = q.dtype.type(softcap) * np.tanh(scores / q.dtype.type(softcap))
                state = fold(state, np.where(seen[:, some], scores, -np.inf), v[of][some])
            traffic.reads += len(chosen) * (k.shape[-1] + v.shape[-1])
            out[head][row], lse[head][row] = finish(state)
    return out, lse


def blocks_of(tokens: np.ndarray, block_q: int, block_k: int) -> np.ndarray:
    """Blocks that hold a kept token: (..., T, S) bool -> (..., ceil(T / block_q), ceil(S / block_k))."""
    rows = [tokens[..., row, :].any(axis=-2) for row in tiles(tokens.shape[-2], block_q, "block_q")]
    by_row = np.stack(rows, axis=-2)
    return np.stack([by_row[..., part].any(axis=-1) for part in tiles(tokens.shape[-1], block_k, "block_k")], axis=-1)


def visible_blocks(q_positions, k_positions, window, block_q: int, block_k: int) -> np.ndarray:
    """Blocks in which some query sees some key: (nq, nk), or (Hk, nq, nk) where heads keep other tokens."""
    return blocks_of(visible(q_positions, k_positions, window), block_q, block_k)


def per_query_head(mask: np.ndarray, heads: int) -> np.ndarray:
    """(nq, nk) or (Hk, nq, nk) -> (H, nq, nk)."""
    mask = mask[None] if mask.ndim == 2 else mask
    return np.repeat(mask, heads // len(mask), axis=0)


def pooled(x: np.ndarray, block: int) -> np.ndarray:
    """Means of blocks of rows: (..., T, D) -> (..., ceil(T / block), D)."""
    return np.stack([x[..., part, :].mean(axis=-2) for part in tiles(x.shape[-2], block, "block")], axis=-2)


def block_scores(q: np.ndarray, k: np.ndarray, allowed: np.ndarray, scale: float, block_q: int, block_k: int):
    """softmax(scale q_mean k_mean^T) over the allowed blocks: (..., H, nq, nk) float64; rows without any are 0."""
    means_q, means_k = pooled(q.astype(np.float64), block_q), pooled(k.astype(np.float64), block_k)
    means_k = np.repeat(means_k, by_kv_head(q, k.shape[-3]).shape[-3], axis=-3)
    return softmax(np.where(allowed, scale * means_q @ np.swapaxes(means_k, -1, -2), -np.inf))


def keep_best(scores: np.ndarray, counts: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The highest of each row.

    Parameters
    ----------
    scores : (..., nq, nk)
    counts : integer, broadcast to (..., nq)
    allowed : bool, broadcast to scores
        Others are never kept.

    Returns
    -------
    (..., nq, nk) bool; among equals the lower index

    Examples
    --------
    >>> keep_best(np.array([[1.0, 3.0, 3.0]]), 1, np.array([True, True, True])).tolist()
    [[False, True, False]]
    """
    allowed = np.broadcast_to(allowed, scores.shape)
    order = np.argsort(np.where(allowed, -scores, np.inf), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return (rank < np.asarray(counts)[..., None]) & allowed
