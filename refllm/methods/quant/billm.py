"""billm: one sign for most weights, two for the columns that matter, and a bit that says how far out a weight lies.

    S = w^2 / U_cc^2                    importance; U as in gptq, H^-1 = U^T U
    salient columns                     largest sum of |S|; w ~ m +- a +- b: signs of w - m, then of what they leave
    all others, |S| < p and |S| >= p    w ~ m +- a in each of the two groups

Block by block of columns (128): the number of salient columns (1 to 49) and p (one of the 10 % to 90 % quantiles) are
those of least squared error, means m and scales a, b are those of a row in the block, a is the mean of |w - m|. The
errors of a block then go to later blocks as in gptq; inside a block nothing is made up for.

A sign is one bit, but p splits weights, not columns, so that each weight stores a second bit for its group. Salient
columns have a second sign in its place. With seven float16 numbers for every row of a block of 128 that is
2 + 7 * 16 / 128 = 2.88 bits a weight; the 1.08 of the paper count first signs and the second ones of salient columns.

Paper: Huang et al. 2024, "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs",
arXiv:2402.04291.
Differs from the published code: means and scales are float16, a salient column's two means are stored as their sum,
and a weight that is exactly its mean counts as plus (there it stays the mean, which no bit can say); a block of fewer
than 49 columns has at most as many salient ones as columns; quantiles and all sums are float64; of equal columns the
first is salient, of equal errors the fewest columns and the lowest p win. by="hessian" is the default, as in its README
(its option says "magnitude": S = w). search="weights" measures errors on W, where the code measures them on S.
Stage: memory, decode
Inventory: 14
Lesson: lessons/16-sub-2-bit.md
Golden: quant/billm
Baseline: binary:group=16
"""

import numpy as np

from refllm.kernels.grids import checked_weight
from refllm.kernels.obs import obs_sweep
from refllm.kernels.packed.records import BinaryBlocks, as_float
from refllm.kernels.stats import Stats
from refllm.methods.quant.gptq import prepared

MOST_SALIENT = 49  # columns of a block
QUANTILES = np.arange(10, 91) / 100
ROWS = 64  # taken at a time while searching: they stay in cache
BY = ("hessian", "magnitude")
SEARCH = ("importance", "weights")


def billm(
    W: np.ndarray,
    stats: Stats,
    *,
    block: int = 128,
    damp: float = 0.01,
    by: str = "hessian",
    search: str = "importance",
) -> BinaryBlocks:
    """Binarise, with a residual for salient columns and two groups for the others.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : Stats
        Calibration inputs X (n, in).
    block : int
        Columns that share means, scales and thresholds, and whose errors go to later blocks together. The last block
        may have fewer. 7 * 16 / block bits a weight are theirs.
    damp : float
        As in gptq.
    by : str
        "hessian": S = w^2 / U_cc^2; "magnitude": S = w.
    search : str
        The matrix that the number of salient columns and p are tried on: "importance", S as in the published code; or
        "weights", W, where p is a magnitude of weights.

    Returns
    -------
    BinaryBlocks

    Raises
    ------
    ValueError
        NaN or Inf in W, inputs of another width, a knob out of range, a mean or scale beyond float16, an H that is
        singular although damped.

    Examples
    --------
    Two salient columns, two weights near zero and two far out:

    >>> W = np.array([[1.0, -1.0, 3.0, -3.0, 8.0, -8.0]])
    >>> billm(W, Stats(np.eye(6)), search="weights").dense().tolist()
    [[1.0, -1.0, 3.0, -3.0, 8.0, -8.0]]
    """
    W = checked_weight(W)
    if block < 1:
        raise ValueError(f"block must be at least 1 column, got {block}")
    if by not in BY:
        raise ValueError(f"by must be one of {', '.join(BY)}, got {by!r}")
    if search not in SEARCH:
        raise ValueError(f"search must be one of {', '.join(SEARCH)}, got {search!r}")
    W, order, _, U = prepared(W, stats, damp, False)
    diagonal, number = np.diag(U), order // block
    # Errors go to later blocks only: inside a block U keeps nothing but its diagonal.
    U = np.where((number[:, None] == number) & (order[:, None] != order), 0, U)
    done: list[BinaryBlocks] = []
    values = np.empty_like(W)

    def project(w, j, W_now):
        here = slice(j, j + block)
        if j % block == 0:
            now = W_now[:, here]
            S = now**2 / diagonal[here] ** 2 if by == "hessian" else now
            done.append(binarised(now, *groups_of(S, S if search == "importance" else now)))
            values[:, here] = done[-1].dense()
        return values[:, j]

    obs_sweep(W, U, project, block)
    signs, second, salient = (
        np.concatenate(planes, axis=-1) for planes in zip(*(b.unpacked() for b in done), strict=True)
    )
    mean, scale = (np.concatenate([getattr(b, name) for b in done], axis=1) for name in ("mean", "scale"))
    return BinaryBlocks.pack(signs, second, salient, mean, scale, block)


def groups_of(S: np.ndarray, M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which columns of a block are salient, and which weights of the others lie far out.

    Parameters
    ----------
    S : (out, n) float64
        Importance: columns are ranked by the sum of its magnitudes.
    M : (out, n) float64
        The matrix on which the number of columns, and then the threshold p, is the one of least squared error.

    Returns
    -------
    salient : (n,) bool
    far : (out, n) bool
        |M| >= p, False in salient columns.

    Examples
    --------
    >>> M = np.array([[1.0, -1.0, 3.0, -3.0, 8.0, -8.0]])
    >>> salient, far = groups_of(M, M)
    >>> np.flatnonzero(salient).tolist(), np.flatnonzero(far).tolist()
    ([4, 5], [2, 3])
    """
    n = M.shape[1]
    parts = [M[a : a + ROWS] for a in range(0, len(M), ROWS)]
    ranked = np.argsort(-np.abs(S).sum(axis=0), kind="stable")
    left = lambda columns: sum(residual(rows[:, columns], True, 2)[-1] for rows in parts)
    counts = range(1, min(MOST_SALIENT, n) + 1)
    # As published, the others are tried with two signs each, too; they get one.
    errors = [left(ranked[:k]) + left(ranked[k:]) for k in counts]
    salient = np.zeros(n, bool)
    salient[ranked[: counts[np.argmin(errors)]]] = True
    size = np.where(salient, 0, np.abs(M))  # salient columns are zeros that quantiles count
    thresholds = np.quantile(size, QUANTILES)
    errors = np.zeros(len(thresholds))
    for rows in parts:
        for i, p in enumerate(thresholds):
            far = ~salient & (np.abs(rows) >= p)
            errors[i] += residual(rows, ~salient & ~far, 1)[-1] + residual(rows, far, 1)[-1]
    return salient, ~salient & (size >= thresholds[np.argmin(errors)])


def binarised(W: np.ndarray, salient: np.ndarray, far: np.ndarray) -> BinaryBlocks:
    """A block of columns as it is stored: (out, n) float64, (n,) bool, (out, n) bool."""
    near_mean, (near,), (plus,), _ = residual(W, ~salient & ~far, 1)
    far_mean, (out,), (far_plus,), _ = residual(W, far, 1)
    mean, scales, signs, _ = residual(W, np.broadcast_to(salient, W.shape), 2)
    return BinaryBlocks.pack(
        np.where(salient, signs[0], np.where(far, far_plus, plus)),
        np.where(salient, signs[1], far),
        salient,
        as_float(np.stack([near_mean, far_mean, mean], axis=-1), "float16")[:, None],
        as_float(np.stack([near, out, *scales], axis=-1), "float16")[:, None],
        W.shape[1],
    )


def residual(x: np.ndarray, mask: np.ndarray | bool, order: int) -> tuple:
    """x ~ mean + sum of +- scales for the numbers of each row that a mask names; every scale is for what is left.

    Parameters
    ----------
    x : (out, n) float64
    mask : (out, n) bool, or True: all
        A row without any has a mean and scales of 0.
    order : int
        Signs a number.

    Returns
    -------
    mean : (out,) float64
    scales : list of (out,) float64, one an order
        Mean magnitudes.
    signs : list of (out, n) bool
        True = plus; anything outside the mask.
    error : float
        Sum of the squares of what is left.

    Examples
    --------
    >>> mean, scales, signs, error = residual(np.array([[1.0, 2.0, 5.0, 9.0]]), True, 1)
    >>> mean.tolist(), scales[0].tolist(), signs[0].tolist(), error
    ([4.25], [2.75], [[False, False, True, True]], 8.5)
    """
    inside = (lambda a: a) if mask is True else (lambda a: a * mask)
    count = np.maximum(np.broadcast_to(mask, x.shape).sum(axis=1, keepdims=True), 1)
    average = lambda a: inside(a).sum(axis=1, keepdims=True) / count
    total, scales, signs = np.zeros(len(x)), [], []
    for _ in range(order):
        mean = average(x)
        x = x - mean
        scale, plus = average(np.abs(x)), x >= 0
        x = x - np.where(plus, scale, -scale)
        total, scales, signs = total + mean[:, 0], [*scales, scale[:, 0]], [*signs, plus]
    return total, scales, signs, float(np.sum(inside(x) ** 2))
