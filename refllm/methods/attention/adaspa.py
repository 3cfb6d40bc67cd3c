"""adaspa: keep the key blocks that hold the most attention mass, found from exact log-sum-exps.

    pass 1   attention over everything, which gives LSE of every query
    pass 2   W[p, q] = sum of exp(score - LSE) over the queries of block p and the keys of block q
    mask     in each block row the round((1 - s) n) blocks with the largest W, of n

A block row of W sums to the number of its queries, so W is the share of the output that a block makes. It costs as much
as attention; it pays in a video model, where the same attention is computed in 50 denoising steps: `schedule` says when
to search, and a second search (`cached`) does pass 2 alone with the LSE of the first. Heads differ: those whose mass is
concentrated take the sparsity (1 + s) / 2, as many others (3 s - 1) / 2, which leaves the mean as it is.

Paper: Xia et al. 2025, "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation",
arXiv:2502.21079.
Differs from the paper: its pseudo-code prints a logarithm for W, here it is the mass itself; a block row keeps at least
one block; where a causal mask leaves fewer blocks to a row, n counts these.
Stage: prefill
Inventory: 64
Lesson: lessons/24-sparse-attention.md
Golden: attention/adaspa
Baseline: flash
"""

import numpy as np

from refllm.kernels.online_softmax import Traffic, by_kv_head, tile_scores, tiles, walk_tiles
from refllm.kernels.sparse_attention import keep_best, per_query_head, sparse_attend, visible_blocks

WELL_RECALLED = 0.8
SEARCHES = (10, 30)


def adaspa(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sparsity: float = 0.8,
    block: int = 64,
    text: int = 0,
    adaptive: bool = True,
) -> np.ndarray:
    """Attention over the blocks with the most mass, searched and used in one call.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`. For video, which is not causal, all queries get the last position.
    sparsity : float
        In [0, 1): share of the blocks of a row that are skipped.
    block : int
    text : int
        Tokens at the end that are text: their block rows and columns are kept whole.
    adaptive : bool
        Sparsity head by head.

    Returns
    -------
    (..., H, T, Dv)

    Raises
    ------
    ValueError
        sparsity or text out of range, head counts that do not divide.

    Examples
    --------
    >>> q, at = np.ones((1, 2, 1)), np.ones(2, int)
    >>> k, v = np.array([[[0.0], [9.0]]]), np.array([[[1.0], [2.0]]])
    >>> adaspa(q, k, v, at, np.arange(2), scale=1.0, sparsity=0.5, block=1)[0, :, 0].tolist()
    [2.0, 2.0]
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    lse = walk_tiles(q, k, v, q_positions, k_positions, **rule)[1]
    W = block_mass(q, k, lse, q_positions, k_positions, **rule, block=block)
    allowed = per_query_head(visible_blocks(q_positions, k_positions, window, block, block), q.shape[-3])
    blocks = block_mask(W, allowed, sparsity, adaptive=adaptive)
    blocks |= text_blocks(q.shape[-2], k.shape[-2], text, block) & allowed
    return sparse_attend(q, k, v, q_positions, k_positions, blocks, **rule, block_q=block, block_k=block)[0]


def block_mass(
    q, k, lse, q_positions, k_positions, *, scale, window=None, softcap=None, block=64, traffic: Traffic | None = None
) -> np.ndarray:
    """Attention mass of every pair of blocks.

    Parameters
    ----------
    lse : (..., H, T)
        Of attention over all keys; of an earlier step, masses are approximate.
    block : int
    traffic : Traffic, optional
        Tiles are counted in place. The rest as in `adaspa`.

    Returns
    -------
    (..., H, nq, nk) float64
    """
    traffic = Traffic() if traffic is None else traffic
    rows, keys = tiles(q.shape[-2], block, "block"), tiles(k.shape[-2], block, "block")
    grouped, lse = by_kv_head(q, k.shape[-3]).astype(np.float64), by_kv_head(lse[..., None], k.shape[-3])
    W = np.zeros((*grouped.shape[:-2], len(rows), len(keys)))
    for i, row in enumerate(rows):
        base = np.where(np.isneginf(lse[..., row, :]), 0, lse[..., row, :])
        for j, part in enumerate(keys):
            at = q_positions[row], k_positions[..., part]
            scores = tile_scores(grouped[..., row, :], k[..., part, :].astype(np.float64), *at, scale, window, softcap)
            if scores is None:
                traffic.skipped += 1
                continue
            traffic.tiles += 1
            W[..., i, j] = np.exp(scores - base).sum(axis=(-1, -2))
    return W.reshape(*q.shape[:-2], len(rows), len(keys))


def block_mask(W: np.ndarray, allowed: np.ndarray, sparsity: float, *, adaptive: bool = True) -> np.ndarray:
    """Which blocks are computed.

    Parameters
    ----------
    W : (..., H, nq, nk)
    allowed : bool, broadcast to W
        Blocks in which a query sees a key.
    sparsity : float in [0, 1)
    adaptive : bool

    Returns
    -------
    (..., H, nq, nk) bool: in every row round((1 - sparsity) n) of the n allowed blocks, halves up, at least one
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    allowed = np.broadcast_to(allowed, W.shape)
    each = head_sparsities(W, allowed, sparsity) if adaptive else np.full(W.shape[:-2], sparsity)
    return keep_best(W, _kept(allowed, each), allowed)


def head_sparsities(W: np.ndarray, allowed: np.ndarray, sparsity: float) -> np.ndarray:
    """Sparsity of every head, (..., H): their mean is `sparsity`.

    n = min(heads whose kept mass at uniform sparsity is above 0.8, H // 2); the n highest get (1 + s) / 2, the n lowest
    (3 s - 1) / 2, and the others s. Nothing changes below s = 1/3, where the second would be negative.
    """
    each = np.full(W.shape[:-2], float(sparsity))
    if 3 * sparsity < 1:
        return each
    kept = keep_best(W, _kept(allowed, each), allowed)
    total = W.sum(axis=(-1, -2))
    recall = np.where(kept, W, 0).sum(axis=(-1, -2)) / np.where(total > 0, total, 1)
    heads = W.shape[-3]
    for lead in np.ndindex(*W.shape[:-3]):
        n = min(int((recall[lead] > WELL_RECALLED).sum()), heads // 2)
        order = np.argsort(-recall[lead], kind="stable")
        each[lead][order[:n]] = (1 + sparsity) / 2
        each[lead][order[heads - n :]] = (3 * sparsity - 1) / 2
    return each


def text_blocks(queries: int, keys: int, text: int, block: int) -> np.ndarray:
    """Rows and columns of blocks that hold one of the last `text` tokens, (nq, nk) bool."""
    if not 0 <= text <= min(queries, keys):
        raise ValueError(f"text must lie between 0 and the {min(queries, keys)} tokens, got {text}")
    ends = lambda n: np.array([part.stop > n - text for part in tiles(n, block, "block")])
    return ends(queries)[:, None] | ends(keys)[None, :]


def schedule(step: int, searches: tuple[int, int] = SEARCHES) -> str:
    """What a denoising step does: dense, search (passes 1 and 2), cached (pass 2 with the old LSE) or reuse.

    Examples
    --------
    >>> [schedule(step) for step in (0, 9, 10, 11, 30, 49)]
    ['dense', 'dense', 'search', 'reuse', 'cached', 'reuse']
    """
    first, second = searches
    if step < first:
        return "dense"
    return {first: "search", second: "cached"}.get(step, "reuse")


def _kept(allowed: np.ndarray, sparsity: np.ndarray) -> np.ndarray:
    n = allowed.sum(axis=-1)
    return np.maximum(np.floor((1 - sparsity[..., None]) * n + 0.5 + 1e-9), 1).astype(int)  # 0.2 * 5 is 1, not 1 - eps
