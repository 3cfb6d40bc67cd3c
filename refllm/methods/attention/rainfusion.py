"""rainfusion: heads of video models look at a frame, at a place or at a texture; each kind has a mask of its own.

Tokens lie on a grid of frames x height x width, frame by frame, text after them, and attention is not causal:

    spatial    a token sees its own frame (and near ones) and frame 0
    temporal   a token sees places near its own, in all frames: a periodic band
    textural   a token sees 1 / tau of all places, a checkerboard (row mod tau == column mod tau)

Which kind a head is, is measured while the model runs: the share of the exact softmax that a mask keeps, its recall, on
a few rows. Temporal if that mask keeps alpha of it, else spatial if that one does, else textural. `rainfusion2` drops
the kinds: it reorders each frame into windows, so that a block of tokens is a neighbourhood, and keeps the best blocks
by softmax(scale q_mean k_mean^T); text and the first frame are always kept. Without a grid that is a method for causal
language models, too, whose first block takes the part of the first frame.

Paper: Chen et al. 2025, "RainFusion: Adaptive Video Generation Acceleration via Multi-Dimensional Visual Redundancy",
arXiv:2505.21036; "RainFusion2.0", arXiv:2512.24086, with the code of Ascend/MindIE-SD.
Differs from the papers: version 1 has no published code and leaves alpha and the sample open, here 0.9 and every T-th
token of T frames; bandwidth b widens bands by round(b (n - 1)) of n frames, rows or columns.
Stage: prefill
Inventory: 63
Lesson: lessons/24-sparse-attention.md
Golden: attention/rainfusion
Baseline: flash
"""

import numpy as np

from refllm.kernels.attention import attend
from refllm.kernels.nn import softmax
from refllm.kernels.sparse_attention import (
    block_scores,
    blocks_of,
    keep_best,
    per_query_head,
    sparse_attend,
    visible_blocks,
)

WINDOW = 8


def rainfusion(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    frames: int = 0,
    height: int = 0,
    width: int = 0,
    alpha: float = 0.9,
    bandwidth: float = 0.125,
    tau: int = 2,
    block: int = 16,
) -> np.ndarray:
    """Attention with the mask of each head's kind.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`. For video all queries get the last position.
    frames, height, width : int
        The grid; further tokens are text. 0: no grid, attention to everything.
    alpha : float
        Recall that makes a head temporal or spatial.
    bandwidth : float
        In [0, 1]: of the spatial and temporal masks.
    tau : int
        Textural heads keep 1 / tau of the places.
    block : int
        Tokens of a block that is skipped where none of its tokens is kept.

    Returns
    -------
    (..., H, T, Dv)

    Raises
    ------
    ValueError
        A grid of more tokens than there are, a knob out of range.
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    if not frames:
        return attend(q, k, v, q_positions, k_positions, **rule)
    grid = check_grid(frames, height, width, k.shape[-2], q.shape[-2])
    kinds = np.array(classify(q, k, grid, scale=scale, alpha=alpha, bandwidth=bandwidth))
    masks = {kind: kind_mask(kind, grid, k.shape[-2], bandwidth, tau) for kind in set(kinds.reshape(-1))}
    tokens = np.stack([masks[kind] for kind in kinds.reshape(-1)]).reshape(*q.shape[:-1], k.shape[-2])
    tiling = dict(block_q=block, block_k=block, tokens=tokens)
    blocks = blocks_of(tokens, block, block)
    return sparse_attend(q, k, v, q_positions, k_positions, blocks, **rule, **tiling)[0]


def rainfusion2(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    frames: int = 0,
    height: int = 0,
    width: int = 0,
    sparsity: float = 0.8,
    block: int = 128,
) -> np.ndarray:
    """RainFusion 2.0: windows become blocks, blocks are ranked by their means.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap, frames, height, width :
        As in `rainfusion`; without a grid the order of the tokens stays.
    sparsity : float
        In [0, 1): ceil(n (1 - sparsity)) of the n blocks a row may see are kept, and all as good as the last of them.
    block : int

    Returns
    -------
    (..., H, T, Dv)

    Raises
    ------
    ValueError
        As `rainfusion`.
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    order, grid = np.arange(k.shape[-2]), None
    if frames:
        grid = check_grid(frames, height, width, k.shape[-2], q.shape[-2])
        order = window_order(grid, k.shape[-2])
        q, q_positions = q[..., order, :], q_positions[order]
    k, v, k_positions = k[..., order, :], v[..., order, :], k_positions[..., order]
    blocks = window_blocks(q, k, q_positions, k_positions, grid, sparsity, block, scale=scale, window=window)
    o = sparse_attend(q, k, v, q_positions, k_positions, blocks, **rule, block_q=block, block_k=block)[0]
    return o[..., np.argsort(order), :] if frames else o


def window_blocks(
    q,
    k,
    q_positions,
    k_positions,
    grid: tuple[int, int, int] | None,
    sparsity: float,
    block: int,
    *,
    scale,
    window=None,
) -> np.ndarray:
    """The blocks of `rainfusion2`, (..., H, nq, nk) bool, of tokens in the order of windows.

    Kept whole are rows and columns that hold a token of the first frame or of the text; without a grid the column of
    the first block.
    """
    allowed = per_query_head(visible_blocks(q_positions, k_positions, window, block, block), q.shape[-3])
    blocks = top_blocks(block_scores(q, k, allowed, scale, block, block), allowed, sparsity)
    if grid is None:
        return blocks | (np.arange(blocks.shape[-1]) == 0) & allowed
    frame, places, n = grid[1] * grid[2], grid[0] * grid[1] * grid[2], k.shape[-2]
    starts = np.arange(0, n, block)
    whole = (starts < frame) | (np.minimum(starts + block, n) > places)
    return blocks | (whole[:, None] | whole[None, :]) & allowed


def check_grid(frames: int, height: int, width: int, keys: int, queries: int) -> tuple[int, int, int]:
    """The grid, if there are tokens for it."""
    if min(frames, height, width) < 1 or frames * height * width > keys or queries != keys:
        raise ValueError(f"a grid of {frames} x {height} x {width} needs as many tokens, got {queries} and {keys}")
    return frames, height, width


def coordinates(grid: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame, row and column of every token on the grid, frame by frame."""
    return tuple(x.reshape(-1) for x in np.indices(grid))


def kind_mask(kind: str, grid: tuple[int, int, int], tokens: int, bandwidth: float = 0.125, tau: int = 2) -> np.ndarray:
    """The mask of a kind of head.

    Parameters
    ----------
    kind : str
        spatial, temporal or textural.
    grid : (frames, height, width)
    tokens : int
        Text behind the grid sees everything and is seen by everything.
    bandwidth : float in [0, 1]
    tau : int

    Returns
    -------
    (tokens, tokens) bool

    Examples
    --------
    >>> [round(float(kind_mask(kind, (4, 8, 8), 256).mean()), 4) for kind in ("spatial", "temporal", "textural")]
    [0.4375, 0.1182, 0.5]
    """
    if not 0 <= bandwidth <= 1 or tau < 1:
        raise ValueError(f"bandwidth must lie in [0, 1] and tau be at least 1, got {bandwidth} and {tau}")
    t, y, x = coordinates(grid)
    near = lambda a, n: np.abs(a[:, None] - a[None, :]) <= int(bandwidth * (n - 1) + 0.5)
    if kind == "spatial":
        kept = near(t, grid[0]) | (t == 0)[None, :]
    elif kind == "temporal":
        kept = near(y, grid[1]) & near(x, grid[2])
    else:
        kept = np.broadcast_to((y % tau == x % tau)[None, :], (len(t), len(t)))
    mask = np.ones((tokens, tokens), bool)
    mask[: len(t), : len(t)] = kept
    return mask


def recall(q: np.ndarray, k: np.ndarray, mask: np.ndarray, rows: np.ndarray, *, scale: float) -> np.ndarray:
    """The share of the exact softmax that a mask keeps, mean over some rows: (..., H) float64."""
    keys = np.repeat(k.astype(np.float64), q.shape[-3] // k.shape[-3], axis=-3)
    weights = softmax(scale * q[..., rows, :].astype(np.float64) @ np.swapaxes(keys, -1, -2))
    return np.where(mask[rows], weights, 0).sum(axis=-1).mean(axis=-1)


def classify(
    q: np.ndarray, k: np.ndarray, grid: tuple[int, int, int], *, scale: float, alpha: float = 0.9, bandwidth=0.125
) -> np.ndarray:
    """The kind of every head, (..., H) strings, from the rows of every T-th token of T frames."""
    tokens, rows = k.shape[-2], np.arange(0, grid[0] * grid[1] * grid[2], grid[0])
    kept = {
        kind: recall(q, k, kind_mask(kind, grid, tokens, bandwidth), rows, scale=scale)
        for kind in ("temporal", "spatial")
    }
    rest = np.where(kept["spatial"] >= alpha, "spatial", "textural")
    return np.where(kept["temporal"] >= alpha, "temporal", rest)


def window_order(grid: tuple[int, int, int], tokens: int, size: int = WINDOW) -> np.ndarray:
    """Places of the tokens, frame by frame and window by window; what comes behind the grid stays behind it."""
    t, y, x = coordinates(grid)
    order = np.lexsort((x, y, x // size, y // size, t))
    return np.concatenate([order, np.arange(len(order), tokens)])


def top_blocks(scores: np.ndarray, allowed: np.ndarray, sparsity: float) -> np.ndarray:
    """In each row ceil(n (1 - sparsity)) of the n allowed blocks, and those as good as the last of them."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    allowed = np.broadcast_to(allowed, scores.shape)
    counts = np.ceil(allowed.sum(axis=-1) * (1 - sparsity) - 1e-9).astype(int)
    kept = keep_best(scores, counts, allowed)
    threshold = np.where(kept, scores, np.inf).min(axis=-1, keepdims=True)
    return (scores >= threshold) & allowed
