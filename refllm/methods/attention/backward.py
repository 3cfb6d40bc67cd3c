"""The backward pass of FlashAttention: gradients tile by tile from o and LSE, without the T x S matrix of weights.

Forward keeps two things for every row, o and LSE. With them a tile's weights are computed again, and the sum over all
keys that the gradient of a softmax needs is a product of a row with itself:

    P = exp(S - LSE)     delta = rowsum(dO o)     dV = P^T dO     dS = P (dO V^T - delta)
    dQ = scale dS K      dK = scale dS^T Q

With a cap, S = c tanh(t / c), dS is multiplied by 1 - (S / c)^2 before it goes on. Query heads that share a key-value
head add up in dK and dV.

Paper: Dao et al. 2022, "FlashAttention", arXiv:2205.14135, Algorithm 4. Lesson: lessons/23-flash-attention.md.
"""

import numpy as np

from refllm.kernels.online_softmax import Traffic, by_kv_head, dot, tile_scores, tiles


def backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    o: np.ndarray,
    lse: np.ndarray,
    d_o: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    traffic: Traffic | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of attention.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap, block_q, block_k, traffic :
        As in `flash_with_lse`.
    o : (..., H, T, Dv), lse : (..., H, T)
        What the forward pass returned.
    d_o : (..., H, T, Dv)
        Gradient of the loss by o.

    Returns
    -------
    dq, dk, dv : like q, k, v

    Examples
    --------
    >>> q, k, v = np.ones((1, 1, 1)), np.array([[[0.0], [0.0]]]), np.array([[[1.0], [3.0]]])
    >>> at = np.array([1]), np.array([0, 1])
    >>> o, lse = np.full((1, 1, 1), 2.0), np.full((1, 1), np.log(2))
    >>> dq, dk, dv = backward(q, k, v, o, lse, np.ones((1, 1, 1)), *at, scale=1.0)
    >>> dk.round(12).tolist(), dv.round(12).tolist()
    ([[[-0.5], [0.5]]], [[[0.5], [0.5]]])
    """
    traffic = Traffic() if traffic is None else traffic
    grouped, d_grouped = by_kv_head(q, k.shape[-3]), by_kv_head(d_o, k.shape[-3])
    lse = lse.reshape(grouped.shape[:-1])
    delta = (d_grouped * o.reshape(d_grouped.shape)).sum(axis=-1)  # (..., Hk, g, T)
    dq, dk, dv = np.zeros_like(grouped), np.zeros_like(k), np.zeros_like(v)
    traffic.reads += o.size + d_o.size
    for columns in tiles(k.shape[-2], block_k, "block_k"):
        k_tile, v_tile = k[..., columns, :], v[..., columns, :]
        traffic.reads += k_tile.size + v_tile.size
        for rows in tiles(q.shape[-2], block_q, "block_q"):
            q_tile, d_tile = grouped[..., rows, :], d_grouped[..., rows, :]
            at = q_positions[rows], k_positions[..., columns]
            scores = tile_scores(q_tile, k_tile, *at, scale, window, softcap)
            if scores is None:
                traffic.skipped += 1
                continue
            traffic.tiles += 1
            traffic.reads += 2 * q_tile.size + d_tile.size + 2 * lse[..., rows].size  # q, dq, dO; LSE, delta
            rows_lse = lse[..., rows, None]
            P = np.exp(scores - np.where(np.isneginf(rows_lse), 0, rows_lse))  # a row without keys has scores of -inf
            dv[..., columns, :] += np.matmul(np.swapaxes(P, -1, -2), d_tile).sum(axis=-3)
            dS = P * (dot(d_tile, v_tile) - delta[..., rows, None])
            if softcap is not None:
                dS = dS * (1 - (np.where(P > 0, scores, 0) / softcap) ** 2)
            dS = (dS * scale).astype(q.dtype, copy=False)
            dq[..., rows, :] += np.matmul(dS, k_tile[..., None, :, :])
            dk[..., columns, :] += np.matmul(np.swapaxes(dS, -1, -2), q_tile).sum(axis=-3)
            traffic.writes += q_tile.size
        traffic.writes += k_tile.size + v_tile.size
    return dq.reshape(q.shape), dk, dv
