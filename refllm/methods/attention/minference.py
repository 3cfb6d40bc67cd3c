"""minference: prefill over the blocks where a head's attention is expected to be, one of three patterns a head.

    a_shape          the first `sink` keys and the last `local` before a query
    vertical_slash   columns that the last 64 queries look at, and diagonals: the same distance from every query
    block            per query block the `top` key blocks with the largest softmax(scale q_mean k_mean^T)

Vertical and slash are seen in the weights of the last queries: A = softmax(scale q_last k^T), a column's sum says how
much all look at one key, a diagonal's sum how much at a distance. The first 30 keys and the nearest 100 distances are
always kept. Which pattern suits a head is found once, offline, at equal cost: `choose`.

Paper: Jiang et al. 2024, "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
arXiv:2407.02490.
Differs from the authors' kernels: distances are those of positions, not of places; a diagonal's blocks are computed
whole and columns are gathered one by one, as there; one query alone (decode) attends to everything.
Stage: prefill
Inventory: 63
Lesson: lessons/24-sparse-attention.md
Golden: attention/minference
Baseline: flash
"""

import numpy as np

from refllm.kernels.attention import attend, visible
from refllm.kernels.nn import softmax
from refllm.kernels.online_softmax import Traffic
from refllm.kernels.sparse_attention import (
    block_scores,
    blocks_of,
    keep_best,
    per_query_head,
    sparse_attend,
    visible_blocks,
)

PATTERNS = ("a_shape", "vertical_slash", "block")
FIRST, NEAREST = 30, 100  # keys and distances that vertical_slash always keeps


def minference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    pattern: str = "vertical_slash",
    vertical: int = 1000,
    slash: int = 6096,
    last: int = 64,
    sink: int = 1024,
    local: int = 4096,
    top: int = 100,
    block: int = 64,
) -> np.ndarray:
    """Attention over the blocks of one pattern.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    pattern : str
        a_shape, vertical_slash or block, for all heads.
    vertical, slash, last : int
        Columns and diagonals kept, seen from so many queries at the end.
    sink, local : int
        Of a_shape.
    top : int
        Key blocks per query block of the pattern block.
    block : int

    Returns
    -------
    (..., H, T, Dv)

    Raises
    ------
    ValueError
        Another pattern, a count below 1, head counts that do not divide.

    Examples
    --------
    >>> one, at = np.ones((1, 4, 1)), np.arange(4)
    >>> v = np.array([[[8.0], [0.0], [0.0], [0.0]]])
    >>> minference(one, one, v, at, at, scale=1.0, pattern="a_shape", sink=1, local=1, block=1)[0, :, 0].tolist()
    [8.0, 4.0, 4.0, 4.0]
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    knobs = dict(pattern=pattern, vertical=vertical, slash=slash, last=last, sink=sink, local=local, top=top)
    return minference_with_lse(q, k, v, q_positions, k_positions, **rule, **knobs, block=block)[0]


def minference_with_lse(
    q, k, v, q_positions, k_positions, *, scale, window=None, softcap=None, pattern="vertical_slash", vertical=1000,
    slash=6096, last=64, sink=1024, local=4096, top=100, block=64, traffic: Traffic | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """What `minference` returns, and the log-sum-exp over the kept keys; None where one query attends to everything."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    counts = dict(vertical=vertical, slash=slash, last=last, sink=sink, local=local, top=top, block=block)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    rule = dict(scale=scale, window=window, softcap=softcap)
    if q.shape[-2] == 1 or q.shape[-3] % k.shape[-3]:
        return attend(q, k, v, q_positions, k_positions, **rule), None
    columns = None
    if pattern == "a_shape":
        blocks = a_shape(q_positions, k_positions, sink, local, block, q.shape[-3])
        blocks = np.broadcast_to(blocks, (*q.shape[:-2], *blocks.shape[1:]))
    elif pattern == "block":
        allowed = per_query_head(visible_blocks(q_positions, k_positions, window, block, block), q.shape[-3])
        blocks = keep_best(block_scores(q, k, allowed, scale, block, block), np.array(top), allowed)
    else:
        A = last_weights(q, k, q_positions, k_positions, min(last, q.shape[-2]), scale, window)
        columns = top_columns(A, vertical)
        offsets = top_offsets(A, q_positions, k_positions, slash)
        blocks = slash_blocks(offsets, q_positions, k_positions, block)
    tiling = dict(block_q=block, block_k=block, columns=columns, traffic=traffic)
    return sparse_attend(q, k, v, q_positions, k_positions, blocks, **rule, **tiling)


def last_weights(q, k, q_positions, k_positions, last: int, scale: float, window: int | None = None) -> np.ndarray:
    """Softmax of the last queries over all keys they see, (..., H, last, S) float64."""
    keys = np.repeat(k.astype(np.float64), q.shape[-3] // k.shape[-3], axis=-3)
    scores = scale * q[..., -last:, :].astype(np.float64) @ np.swapaxes(keys, -1, -2)
    seen = per_query_head(visible(q_positions[-last:], k_positions, window), q.shape[-3])
    return softmax(np.where(seen, scores, -np.inf))


def top_columns(A: np.ndarray, count: int) -> np.ndarray:
    """The `count` keys with the largest sums of weights, the first 30 among them in any case: (..., H, S) bool."""
    sums = A.sum(axis=-2, keepdims=True)
    sums[..., :FIRST] = np.inf
    return keep_best(sums, np.array(max(count, FIRST)), np.array(True))[..., 0, :]


def top_offsets(A: np.ndarray, q_positions, k_positions, count: int) -> np.ndarray:
    """The `count` distances with the largest sums of weights, the nearest 100 among them: (..., H, distances) bool."""
    last, heads = A.shape[-2], A.shape[-3]
    distance = per_query_head(q_positions[-last:, None] - k_positions[..., None, :], heads)  # (H, last, S)
    width = int(max(q_positions.max() - k_positions.min() + 1, 1))
    sums = np.zeros((*A.shape[:-2], 1, width))
    for head in range(heads):
        seen = distance[head] >= 0
        for lead in np.ndindex(*A.shape[:-3]):
            np.add.at(sums[(*lead, head, 0)], distance[head][seen], A[(*lead, head)][seen])
    sums[..., :NEAREST] = np.inf
    return keep_best(sums, np.array(max(count, NEAREST)), np.array(True))[..., 0, :]


def slash_blocks(offsets: np.ndarray, q_positions, k_positions, block: int) -> np.ndarray:
    """Blocks that a kept diagonal crosses, (..., H, nq, nk) bool."""
    heads = offsets.shape[-2]
    distance = per_query_head(q_positions[:, None] - k_positions[..., None, :], heads)
    kept = np.stack([offsets[..., h, np.maximum(distance[h], 0)] & (distance[h] >= 0) for h in range(heads)], axis=-3)
    return blocks_of(kept, block, block)


def a_shape(q_positions, k_positions, sink: int, local: int, block: int, heads: int) -> np.ndarray:
    """Blocks of the first `sink` positions and of the `local` positions up to each query, (H, nq, nk) bool."""
    near = visible(q_positions, k_positions, local)
    first = np.broadcast_to(k_positions[..., None, :] < sink, near.shape) & visible(q_positions, k_positions)
    return per_query_head(blocks_of(near | first, block, block), heads)


def choose(q, k, v, q_positions, k_positions, candidates: dict[str, dict], *, scale: float) -> list[str]:
    """For every head the candidate whose output is nearest to full attention; they should cost the same.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale :
        As in `minference`; no batch.
    candidates : dict
        Name -> knobs of `minference`.

    Returns
    -------
    list of str, one name per query head; the first of equals
    """
    exact = attend(q, k, v, q_positions, k_positions, scale=scale)
    errors = {}
    for name, knobs in candidates.items():
        got = minference(q, k, v, q_positions, k_positions, scale=scale, **knobs)
        errors[name] = ((got - exact).astype(np.float64) ** 2).sum(axis=(-1, -2))
    return [min(errors, key=lambda name: errors[name][head]) for head in range(len(q))]
