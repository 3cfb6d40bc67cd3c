"""attend(q, k, v): the one definition of attention by which every faster or sparser variant is judged.

    scores = scale * q k^T        (capped: c * tanh(scores / c))
    visible(i, j) = k_position_j <= q_position_i  and, with a window W,  k_position_j > q_position_i - W
    out = softmax(scores where visible) v

Query head h reads key-value head h // (H / Hk): repeat-interleave order, never h % Hk. Positions are explicit, so a
cache that evicts or reorders keys needs no other mask. Vaswani et al. 2017, "Attention Is All You Need",
arXiv:1706.03762, Eq. 1; grouped queries: Ainslie et al. 2023, arXiv:2305.13245. All of it is float64 and the result is
rounded once to the type of q, for the reason in nn.py. Lesson: lessons/01-forward-pass.md.
"""

import numpy as np

from refllm.kernels.nn import softmax


def visible(q_positions: np.ndarray, k_positions: np.ndarray, window: int | None = None) -> np.ndarray:
    """Which keys each query may see.

    Parameters
    ----------
    q_positions : (..., T) integer
    k_positions : (..., S) integer
    window : int, optional
        Keys seen at most, the query's own position included.

    Returns
    -------
    (..., T, S) bool

    Examples
    --------
    >>> visible(np.arange(3), np.arange(3), window=2).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Causal grouped-query attention, written out.

    Parameters
    ----------
    q : (..., H, T, D) float32 or float64, rotated
    k : (..., Hk, S, D), v : (..., Hk, S, Dv)
        Hk divides H.
    q_positions : (T,) integer
    k_positions : (S,) integer, or (..., Hk, S) where a cache keeps other tokens in each head
    scale : float
    window : int, optional
        Keys visible to a query, itself included.
    softcap : float, optional
        Scores become softcap * tanh(scores / softcap), before the mask.

    Returns
    -------
    (..., H, T, Dv); a query that sees no key gives zeros

    Raises
    ------
    ValueError
        Head counts that do not divide.

    Examples
    --------
    >>> one = np.ones((1, 2, 1))
    >>> attend(one, one, np.array([[[0.0], [4.0]]]), np.arange(2), np.arange(2), scale=1.0)[0, :, 0].tolist()
    [0.0, 2.0]
    """
    _check_heads(q, k)
    shared = q.shape[-3] // k.shape[-3]
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    for j in range(k.shape[-3]):  # one at a time, with the queries that share it: a head's scores take much memory
        weights = _head_weights(j, q, k, q_positions, k_positions, scale, window, softcap)
        out[..., j * shared : (j + 1) * shared, :, :] = np.matmul(weights, v[..., j, None, :, :].astype(np.float64))
    return out


def _check_heads(q: np.ndarray, k: np.ndarray) -> None:
    if q.shape[-3] % k.shape[-3]:
        raise ValueError(f"{q.shape[-3]} query heads cannot share {k.shape[-3]} key-value heads evenly")


def _head_weights(j: int, q, k, q_positions, k_positions, scale, window, softcap) -> np.ndarray:
    """Weights of the queries that share key-value head j, (..., g, T, S) float64."""
    shared = q.shape[-3] // k.shape[-3]
    key = k[..., j, None, :, :].astype(np.float64)  # (..., 1, S, D)
    scores = scale * np.matmul(q[..., j * shared : (j + 1) * shared, :, :], np.swapaxes(key, -1, -2))
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    at = k_positions if k_positions.ndim == 1 else k_positions[..., j, :]
    seen = visible(q_positions, at if at.ndim == 1 else at[..., None, :], window)  # of a batch (B, 1, T, S)
    return softmax(np.where(seen, scores, -np.inf))


def attention_weights(
    q: np.ndarray,
    k: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """The softmax weights of `attend`, whose parameters these are.

    Returns
    -------
    (..., Hk, H / Hk, T, S) float64; zeros for a query that sees no key
    """
    _check_heads(q, k)
    rule = q_positions, k_positions, scale, window, softcap
    return np.stack([_head_weights(j, q, k, *rule) for j in range(k.shape[-3])], axis=-4)


def mix(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values weighted, to the bit as in `attend`: (..., Hk, g, T, S) and (..., Hk, S, Dv) -> (..., Hk * g, T, Dv)."""
    mixed = np.matmul(weights, v[..., None, :, :].astype(np.float64))
    return mixed.reshape(*v.shape[:-3], -1, *mixed.shape[-2:]).astype(v.dtype)
