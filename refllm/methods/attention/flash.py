"""flash: exact attention tile by tile, so that the T x S matrix of scores never exists.

One row of the softmax needs three numbers per key block: the largest score so far m, the sum l of exp(s - m), and the
un-normalised output O. A further block of scores s with values V updates them:

    m' = max(m, max s)     a = exp(m - m')     p = exp(s - m')     l' = a l + sum p     O' = a O + p V

and at the end o = O / l, LSE = m + ln l. Two partial states merge in the same way, in any order and for any split of
the keys. `flash` walks query blocks outside and key blocks inside, divides once, and skips tiles that no query sees
(FlashAttention-2); `flash_v1` walks key blocks outside and keeps O normalised, so O, l and m travel once per key block
(FlashAttention). What is saved is traffic, not arithmetic: `Traffic` counts the elements.

Paper: Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691.
Also: Dao et al. 2022, "FlashAttention", arXiv:2205.14135, Algorithm 1 (`flash_v1`); Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax", arXiv:1805.02867 (`fold`).
Differs from the authors' kernels: natural exponentials instead of exp2 with log2(e) folded into the scale; masks come
from explicit positions; a row that sees no key gives output 0 and LSE -inf. The backward pass is not here.
Stage: prefill
Inventory: 107, 108
Lesson: lessons/01-forward-pass.md
Golden: attention/flash
Baseline: refllm.kernels.attention.attend
"""

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
    traffic = Traffic() if traffic is None else traffic
    grouped = _by_kv_head(q, k)  # (..., Hk, g, T, D)
    out = np.empty((*grouped.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.empty(grouped.shape[:-1], q.dtype)
    for rows in _blocks(q.shape[-2], block_q, "block_q"):
        q_tile, q_at = grouped[..., rows, :], q_positions[rows]
        state = empty_state(q_tile.shape[:-1], v.shape[-1], q.dtype)
        traffic.reads += q_tile.size
        for columns in _blocks(k.shape[-2], block_k, "block_k"):
            k_tile, v_tile = k[..., columns, :], v[..., columns, :]
            scores = _scores(q_tile, k_tile, q_at, k_positions[..., columns], scale, window, softcap)
            if scores is None:
                traffic.skipped += 1
                continue
            traffic.tiles += 1
            traffic.reads += k_tile.size + v_tile.size
            state = fold(state, scores, v_tile[..., None, :, :])
        out[..., rows, :], lse[..., rows] = finish(state)
    traffic.writes += out.size + lse.size
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


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
    grouped = _by_kv_head(q, k)
    top, total, out = empty_state(grouped.shape[:-1], v.shape[-1], q.dtype)  # these live in large memory
    for columns in _blocks(k.shape[-2], block_k, "block_k"):
        k_tile, v_tile = k[..., columns, :], v[..., columns, :]
        traffic.reads += k_tile.size + v_tile.size
        for rows in _blocks(q.shape[-2], block_q, "block_q"):
            q_tile = grouped[..., rows, :]
            at = (q_positions[rows], k_positions[..., columns])
            scores = _scores(q_tile, k_tile, *at, scale, window, softcap)
            if scores is None:
                traffic.skipped += 1
                continue
            traffic.tiles += 1
            m, l, o = top[..., rows], total[..., rows], out[..., rows, :]
            traffic.reads += q_tile.size + o.size + l.size + m.size
            new = fold(empty_state(m.shape, v.shape[-1], q.dtype), scores, v_tile[..., None, :, :])
            m, l, o = merge((m, l, l[..., None] * o), new)  # o is kept normalised between the visits
            top[..., rows], total[..., rows], out[..., rows, :] = m, l, _divide(o, l)
            traffic.writes += o.size + l.size + m.size
    lse = finish((top, total, out))[1]
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


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


def fold(state, scores: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Update a state with one more block of keys: the equations at the top of this file.

    Parameters
    ----------
    state : (m, l, O)
    scores : (..., T, S), -inf where a key is not visible
    v : (..., S, Dv)

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
    return new_top, a * total + p.sum(axis=-1), a[..., None] * out + np.matmul(p, v)


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


def finish(state) -> tuple[np.ndarray, np.ndarray]:
    """o = O / l and LSE = m + ln l of a state; 0 and -inf for rows that have seen no key."""
    top, total, out = state
    return _divide(out, total), np.where(total == 0, -np.inf, top + np.log(np.where(total == 0, 1, total)))


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


def _finite(top: np.ndarray) -> np.ndarray:
    """What is subtracted before exp: 0 instead of -inf, or -inf - -inf would be NaN."""
    return np.where(np.isneginf(top), top.dtype.type(0), top)


def _divide(out: np.ndarray, total: np.ndarray) -> np.ndarray:
    return out / np.where(total == 0, total.dtype.type(1), total)[..., None]


def _by_kv_head(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """(..., H, T, D) -> (..., Hk, g, T, D): the query heads that share a key-value head side by side."""
    *batch, heads, queries, dim = q.shape
    if heads % k.shape[-3]:
        raise ValueError(f"{heads} query heads cannot share {k.shape[-3]} key-value heads evenly")
    return q.reshape(*batch, k.shape[-3], heads // k.shape[-3], queries, dim)


def _blocks(length: int, size: int, name: str) -> list[slice]:
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q, k, q_positions, k_positions, scale, window, softcap) -> np.ndarray | None:
    """Scores (..., Hk, g, Tq, Tk) of one tile, -inf where not visible; None where no query sees a key."""
    mask = visible(q_positions, k_positions, window)
    if not mask.any():
        return None
    scores = np.matmul(q, np.swapaxes(k, -1, -2)[..., None, :, :]) * q.dtype.type(scale)
    if softcap is not None:
        scores = q.dtype.type(softcap) * np.tanh(scores / q.dtype.type(softcap))
    if mask.all():  # all but the tiles on the edge of what is visible
        return scores
    if mask.ndim == 3:
        mask = mask[:, None]  # (Hk, 1, Tq, Tk): positions differ by key-value head
    return np.where(mask, scores, -np.inf)
