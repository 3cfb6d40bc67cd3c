"""The online softmax: attention of a row from blocks of keys, and the walk over tiles that all tiled attentions share.

One row of the softmax needs three numbers per key block: the largest score so far m, the sum l of exp(s - m), and the
un-normalised output O. A further block of scores s with values V updates them:

    m' = max(m, max s)     a = exp(m - m')     p = exp(s - m')     l' = a l + sum p     O' = a O + p V

and at the end o = O / l, LSE = m + ln l. Partial states merge in the same way, in any order and for any split of the
keys; finished ones, too: LSE = ln sum exp(LSE_i), o = sum exp(LSE_i - LSE) o_i.

Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867.
Lesson: lessons/23-flash-attention.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refllm.kernels.attention import visible


@dataclass
class Traffic:
    """Elements moved between large and small memory, and tiles computed; pass one to count.

    Parameters
    ----------
    reads, writes : int
        Elements of q, k, v, o and of the row statistics.
    tiles, skipped : int
        Query block x key block pairs computed, and those that no query sees. One count covers all heads and batches.
    """

    reads: int = 0
    writes: int = 0
    tiles: int = 0
    skipped: int = 0


def empty_state(rows: tuple[int, ...], value_dim: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The state (m, l, O) of rows that have seen no key: -inf, 0, 0.

    Parameters
    ----------
    rows : shape of the rows, (..., T)
    value_dim : int

    Returns
    -------
    m, l : (..., T); O : (..., T, Dv)
    """
    return np.full(rows, -np.inf, dtype), np.zeros(rows, dtype), np.zeros((*rows, value_dim), dtype)


def fold(
    state, scores: np.ndarray, v: np.ndarray, product: Callable = np.matmul
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Update a state with one more block of keys: the equations at the top of this file.

    Parameters
    ----------
    state : (m, l, O)
    scores : (..., T, S), -inf where a key is not visible
    v : (..., S, Dv)
    product : callable
        p V from p and v. One that rounds p changes O alone: l sums what p was before.

    Returns
    -------
    (m, l, O), new arrays

    Examples
    --------
    >>> state = empty_state((1,), 1, np.float64)
    >>> for score, value in ((0.0, 1.0), (0.0, 3.0)):
    ...     state = fold(state, np.array([[score]]), np.array([[value]]))
    >>> o, lse = finish(state)
    >>> o.tolist(), lse.round(4).tolist()
    ([[2.0]], [0.6931])
    """
    top, total, out = state
    new_top = np.maximum(top, scores.max(axis=-1))
    shift = _finite(new_top)
    a = np.exp(top - shift)
    p = np.exp(scores - shift[..., None])
    return new_top, a * total + p.sum(axis=-1), a[..., None] * out + product(p, v)


def merge(one, other) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The state of two disjoint sets of keys from the state of each; associative and commutative.

    Parameters
    ----------
    one, other : (m, l, O)

    Returns
    -------
    (m, l, O), new arrays
    """
    (m1, l1, o1), (m2, l2, o2) = one, other
    top = np.maximum(m1, m2)
    shift = _finite(top)
    a1, a2 = np.exp(m1 - shift), np.exp(m2 - shift)
    return top, a1 * l1 + a2 * l2, a1[..., None] * o1 + a2[..., None] * o2


def merge_outputs(outputs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention over all keys from the finished attention over disjoint parts of them.

    Parameters
    ----------
    outputs : (parts, ..., T, Dv)
    lses : (parts, ..., T)
        -inf where a row has seen no key of a part: it has the weight 0, whatever its output is.

    Returns
    -------
    o : (..., T, Dv); 0 where no part has seen a key
    lse : (..., T)

    Examples
    --------
    >>> o, lse = merge_outputs(np.array([[[1.0]], [[3.0]]]), np.log([[1.0], [3.0]]))
    >>> o.round(12).tolist(), np.exp(lse).round(12).tolist()
    ([[2.5]], [4.0])
    """
    top = lses.max(axis=0)
    weights = np.exp(lses - _finite(top))
    total = weights.sum(axis=0)
    parts = np.where(weights[..., None] > 0, outputs, outputs.dtype.type(0))
    return divide((weights[..., None] * parts).sum(axis=0), total), _log_sum(top, total)


def finish(state) -> tuple[np.ndarray, np.ndarray]:
    """o = O / l and LSE = m + ln l of a state; 0 and -inf for rows that have seen no key."""
    top, total, out = state
    return divide(out, total), _log_sum(top, total)


def divide(out: np.ndarray, total: np.ndarray) -> np.ndarray:
    """O / l, and 0 where l is 0."""
    return out / np.where(total == 0, total.dtype.type(1), total)[..., None]


def by_kv_head(q: np.ndarray, kv_heads: int) -> np.ndarray:
    """(..., H, T, D) -> (..., Hk, g, T, D): the query heads that share a key-value head side by side."""
    *batch, heads, queries, dim = q.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly")
    return q.reshape(*batch, kv_heads, heads // kv_heads, queries, dim)


def tiles(length: int, size: int, name: str) -> list[slice]:
    """Slices of `size`, the last perhaps shorter; `name` is what an error calls the size."""
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def tile_mask(q_positions: np.ndarray, k_positions: np.ndarray, window: int | None) -> np.ndarray | None:
    """Which keys of a tile each query sees, (Tq, Tk) or (..., Hk, 1, Tq, Tk); None where no query sees any."""
    mask = visible(q_positions, k_positions, window)
    if not mask.any():
        return None
    return mask[..., None, :, :] if mask.ndim > 2 else mask  # positions that differ by key-value head


def bend(products: np.ndarray, mask: np.ndarray, scale: float, softcap: float | None) -> np.ndarray:
    """Products q k to scores: scaled, capped, -inf where not visible."""
    real = products.dtype.type
    scores = products * real(scale)
    if softcap is not None:
        scores = real(softcap) * np.tanh(scores / real(softcap))
    return scores if mask.all() else np.where(mask, scores, -np.inf)  # all but tiles on the edge of what is visible


def tile_scores(q, k, q_positions, k_positions, scale, window, softcap) -> np.ndarray | None:
    """Scores (..., Hk, g, Tq, Tk) of one tile, -inf where not visible; None where no query sees a key."""
    mask = tile_mask(q_positions, k_positions, window)
    return None if mask is None else bend(dot(q, k), mask, scale, softcap)


def dot(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """q (..., Hk, g, Tq, D) times k (..., Hk, Tk, D) -> (..., Hk, g, Tq, Tk)."""
    return np.matmul(q, np.swapaxes(k, -1, -2)[..., None, :, :])


def walk_tiles(
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
    products: Callable | None = None,
    weigh: Callable = np.matmul,
    traffic: Traffic | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention with query tiles outside and key tiles inside; tiles that no query sees are not computed.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    block_q, block_k : int
    products : callable, optional
        (rows, columns) -> q k of two slices, (..., Hk, g, Tq, Tk): from codes, where q and k are rounded.
    weigh : callable
        See `fold`.
    traffic : Traffic, optional
        Counted in place.

    Returns
    -------
    o : (..., H, T, Dv)
    lse : (..., H, T)
    """
    traffic = Traffic() if traffic is None else traffic
    grouped = by_kv_head(q, k.shape[-3])  # (..., Hk, g, T, D)
    if products is None:
        products = lambda rows, columns: dot(grouped[..., rows, :], k[..., columns, :])
    out = np.empty((*grouped.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.empty(grouped.shape[:-1], q.dtype)
    for rows in tiles(q.shape[-2], block_q, "block_q"):
        lead = grouped[..., rows, :].shape
        state = empty_state(lead[:-1], v.shape[-1], q.dtype)
        traffic.reads += int(np.prod(lead))
        for columns in tiles(k.shape[-2], block_k, "block_k"):
            mask = tile_mask(q_positions[rows], k_positions[..., columns], window)
            if mask is None:
                traffic.skipped += 1
                continue
            traffic.tiles += 1
            traffic.reads += k[..., columns, :].size + v[..., columns, :].size
            scores = bend(products(rows, columns).astype(q.dtype, copy=False), mask, scale, softcap)
            state = fold(state, scores, v[..., None, columns, :], weigh)
        out[..., rows, :], lse[..., rows] = finish(state)
    traffic.writes += out.size + lse.size
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


def _finite(top: np.ndarray) -> np.ndarray:
    """What is subtracted before exp: 0 instead of -inf, or -inf - -inf would be NaN."""
    return np.where(np.isneginf(top), top.dtype.type(0), top)


def _log_sum(top: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.where(total == 0, -np.inf, top + np.log(np.where(total == 0, 1, total)))
