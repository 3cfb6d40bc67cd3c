"""The differentiable parts of a transformer, each one operator whose backward pass is written out by hand.

Written with the operators of `refllm.kernels.autograd` they would be several times slower: in NumPy the elementwise
passes and their temporaries dominate, so each of these computes in place what it can and keeps only what its gradient
needs. float32 or float64, as the operands are.
"""

from __future__ import annotations

import numpy as np

from refllm.kernels.autograd import Tensor, record


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T. x : [n, in]; weight : [out, in]; returns [n, out]."""

    def pull(g):
        return (
            g @ weight.data if x.needs_grad else None,
            g.T @ x.data if weight.needs_grad else None,
        )

    return record(x.data @ weight.data.T, (x, weight), pull)


def embedding(table: Tensor, ids: np.ndarray) -> Tensor:
    """Rows of a table. table : [V, d]; ids : integers [n]; returns [n, d]."""
    ids = np.asarray(ids).ravel()

    def pull(g):
        # Sort, then sum runs of equal ids: the order of summation is fixed and no slow scatter-add is needed.
        order = np.argsort(ids, kind="stable")
        rows, starts = np.unique(ids[order], return_index=True)
        gradient = np.zeros_like(table.data)
        gradient[rows] = np.add.reduceat(g[order], starts, axis=0)
        return (gradient,)

    return record(table.data[ids], (table,), pull)


def rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain * x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    x : [n, d]; gain : [d]; returns [n, d]. With r = 1/sqrt(mean(x^2) + eps) and u = x r the gradient is
    dx = r (g gain - u mean(g gain u)).
    """
    d = x.shape[-1]
    r = np.einsum("nd,nd->n", x.data, x.data)[:, None]
    r /= d
    r += eps
    np.sqrt(r, out=r)
    np.divide(1.0, r, out=r)
    unit = x.data * r

    def pull(g):
        weighted = g * unit
        dot = (weighted @ gain.data)[:, None]
        dot /= d
        dx = g * gain.data
        dx -= unit * dot
        dx *= r
        return dx, weighted.sum(axis=0)

    return record(unit * gain.data, (x, gain), pull)


def rotate(x: Tensor, cos: np.ndarray, sin: np.ndarray) -> Tensor:
    """Rotary position embedding, half-split layout (Su et al. 2021, arXiv:2104.09864).

    x : [B, T, heads, D]; cos, sin : [T, D/2]; returns the same shape as x. The pair (j, j + D/2) of position t turns by
    the angle whose cosine is cos[t, j]. The gradient turns back by the same angle.
    """
    B, T, heads, D = x.shape
    # Tables as wide as a whole row, so that NumPy's inner loops run over heads * D numbers instead of D/2.
    wide_cos = np.tile(np.concatenate([cos, cos], axis=1), (1, heads)).astype(x.data.dtype, copy=False)
    wide_sin = np.tile(np.concatenate([-sin, sin], axis=1), (1, heads)).astype(x.data.dtype, copy=False)

    def turn(values, sine):
        swapped = np.empty((B, T, heads, 2, D // 2), values.dtype)
        halves = values.reshape(B, T, heads, 2, D // 2)
        swapped[..., 0, :] = halves[..., 1, :]
        swapped[..., 1, :] = halves[..., 0, :]
        swapped = swapped.reshape(B, T, heads * D)
        swapped *= sine
        turned = values.reshape(B, T, heads * D) * wide_cos
        turned += swapped
        return turned.reshape(B, T, heads, D)

    return record(turn(x.data, wide_sin), (x,), lambda g: (turn(g, -wide_sin),))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up with silu(z) = z sigmoid(z) (Shazeer 2020, arXiv:2002.05202). Any equal shapes."""
    sigmoid = np.negative(gate.data)
    np.minimum(sigmoid, 80.0, out=sigmoid)  # exp(80) is finite in float32, and sigmoid(-80) as good as 0
    np.exp(sigmoid, out=sigmoid)
    sigmoid += 1.0
    np.divide(1.0, sigmoid, out=sigmoid)
    silu = gate.data * sigmoid

    def pull(g):
        # silu' = s + z s (1 - s) = s + silu (1 - s) = s + silu - silu s
        slope = silu * sigmoid
        np.subtract(silu, slope, out=slope)
        slope += sigmoid
        slope *= up.data
        slope *= g
        return slope, g * silu

    return record(silu * up.data, (gate, up), pull)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: int = 128) -> Tensor:
    """Causal softmax attention with grouped queries, in tiles of query rows.

    Query t sees keys 0..t. A tile of queries is multiplied only with the keys before its end, so most of the upper
    triangle is never computed; the G = H/Hk query heads that share a key head are stacked into one matrix product.

    Parameters
    ----------
    q : Tensor [B, T, H, D]
    k, v : Tensor [B, T, Hk, D]
    scale : float
        Factor on the dot products, usually D ** -0.5.
    tile : int
        Query rows a step.

    Returns
    -------
    Tensor [B, T, H, D]

    Notes
    -----
    With P the softmax and O = P V the gradients are
    dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = scale dS K,  dK = scale dS^T Q.
    """
    B, T, H, D = q.shape
    Hk = k.shape[2]
    G = H // Hk
    out = np.empty_like(q.data)
    heads_first = (0, 2, 3, 1, 4)  # [B, T, Hk, G, D] -> [B, Hk, G, T, D]
    q5, out5 = (a.reshape(B, T, Hk, G, D).transpose(heads_first) for a in (q.data, out))
    k4, v4 = k.data.transpose(0, 2, 1, 3), v.data.transpose(0, 2, 1, 3)  # [B, Hk, T, D]
    hidden = np.where(np.tri(tile, dtype=bool), 0.0, -np.inf).astype(q.data.dtype)
    keep = any(t.needs_grad for t in (q, k, v))
    saved = []
    for b in range(B):
        for start in range(0, T, tile):
            stop = min(start + tile, T)
            n = stop - start
            queries = np.multiply(q5[b, :, :, start:stop], scale).reshape(Hk, G * n, D)
            scores = queries @ k4[b, :, :stop].transpose(0, 2, 1)  # [Hk, G n, stop]
            diagonal = scores.reshape(Hk, G, n, stop)[..., start:]
            diagonal += hidden[:n, :n]
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            out5[b, :, :, start:stop] = (scores @ v4[b, :, :stop]).reshape(Hk, G, n, D)
            if keep:
                saved.append((b, start, stop, queries, scores))

    def pull(g):
        dq, dk, dv = np.empty_like(q.data), np.zeros_like(k.data), np.zeros_like(v.data)
        dq5, g5 = (a.reshape(B, T, Hk, G, D).transpose(heads_first) for a in (dq, g))
        dk4, dv4 = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
        dot = np.einsum("bthd,bthd->bth", g, out).reshape(B, T, Hk, G).transpose(0, 2, 3, 1)  # rowsum(dO * O)
        for b, start, stop, queries, probs in saved:
            n = stop - start
            tile_g = np.ascontiguousarray(g5[b, :, :, start:stop]).reshape(Hk, G * n, D)
            dv4[b, :, :stop] += probs.transpose(0, 2, 1) @ tile_g
            dscores = tile_g @ v4[b, :, :stop].transpose(0, 2, 1)
            dscores -= dot[b, :, :, start:stop].reshape(Hk, G * n, 1)
            dscores *= probs
            dk4[b, :, :stop] += dscores.transpose(0, 2, 1) @ queries  # queries carry the scale already
            np.multiply((dscores @ k4[b, :, :stop]).reshape(Hk, G, n, D), scale, out=dq5[b, :, :, start:stop])
        saved.clear()
        return dq, dk, dv

    return record(out, (q, k, v), pull)


def cross_entropy(
    x: Tensor, head: Tensor, targets: np.ndarray, weights: np.ndarray | None = None, chunk: int = 512
) -> Tensor:
    """Mean of -log softmax(x @ head.T)[target] over the targets that are not negative, fused with the head.

    The logits of a chunk of rows become their own gradient, softmax - onehot, while they are still in the cache, so
    the [n, V] logits never exist as a whole.

    Parameters
    ----------
    x : Tensor [n, d]
    head : Tensor [V, d]
        Output embedding (the input table when tied).
    targets : integers [n]
        -1 = not scored.
    weights : float [n], optional
        Factor on the loss of each target. The mean still divides by the number of scored targets, so that the mean over
        equal parts of a batch is the mean over the batch.

    Returns
    -------
    Tensor, scalar
        Nats per scored target.
    """
    targets = np.asarray(targets).ravel()
    scored = int((targets >= 0).sum())
    if scored == 0:
        raise ValueError("cross_entropy needs at least one target that is not -1, got none")
    share = np.where(targets >= 0, 1.0 if weights is None else np.ravel(weights), 0.0)[:, None] / scored
    share = share.astype(x.data.dtype)
    grads = x.needs_grad or head.needs_grad
    dx = np.empty_like(x.data) if grads else None
    dhead = np.zeros_like(head.data) if grads else None
    loss = 0.0
    for start in range(0, len(targets), chunk):
        rows, wanted = x.data[start : start + chunk], targets[start : start + chunk]
        on = np.flatnonzero(wanted >= 0)
        logits = rows @ head.data.T
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[on, wanted[on]]
        np.exp(logits, out=logits)
        norm = logits.sum(axis=-1, keepdims=True)
        part = share[start : start + chunk]
        loss += float(((np.log(norm[on, 0]) - chosen) * part[on, 0]).sum(dtype=np.float64))
        if grads:
            logits *= part / norm
            logits[on, wanted[on]] -= part[on, 0]
            np.matmul(logits, head.data, out=dx[start : start + chunk])
            dhead += logits.T @ rows
    return record(np.asarray(loss, x.data.dtype), (x, head), lambda g: (dx * g, dhead * g))
