"""Searches for the range of a grid: what a scale is made from, when it is not simply the largest weight.

clip_limits    per row and group, the largest |w| worth keeping, judged by the outputs of the group
clip           values cut at these limits
"""

import numpy as np

from refllm.kernels.grids import AffineGrid, group_count, grouped

CLIP_STEPS = 20  # of the largest magnitude; the search goes down to half of it
CLIP_TOKENS = 512


def clip_limits(W: np.ndarray, X: np.ndarray, grid: AffineGrid) -> np.ndarray:
    """Largest magnitude to keep in every group, so that the group's part of the output changes least.

    For m = amax (1 - i / 20), i = 0 .. 9, the error is the mean over tokens of (x_g . Q(clip(w, -m, m)) - x_g . w)^2,
    with x_g and w the part of one group: parts of a row are judged one by one, before they are added up. The largest m
    with the least error is kept.

    Parameters
    ----------
    W : (out, in) float32 or float64
    X : (n, in)
        Inputs; every floor(n / 512)-th is looked at, which is 512 to 1023 of them.
    grid : AffineGrid or MinMaxGrid
        With a group size, or -1 for whole rows.

    Returns
    -------
    (out, groups) of the type of W

    References
    ----------
    Lin et al. 2023, "AWQ", arXiv:2306.00978, as in its published code. There the products are summed token by token;
    here d^T (X_g^T X_g) d of the change d of the weights: the same number in another order, in float64.
    """
    groups = group_count(W.shape[1], grid.group_size)
    tokens = X[:: max(1, len(X) // CLIP_TOKENS)].astype(np.float64)
    inputs = tokens.reshape(len(tokens), groups, -1).transpose(1, 2, 0)  # [groups, g, n]
    H = inputs @ inputs.swapaxes(1, 2)  # [groups, g, g]
    amax = np.abs(grouped(W, grid.group_size)).max(axis=-1)
    best, least = amax.copy(), np.full(amax.shape, np.inf)
    for step in range(CLIP_STEPS // 2):
        limit = amax * W.dtype.type(1 - step / CLIP_STEPS)
        cut = clip(W, limit, grid.group_size)
        found = grid.fit(cut)
        change = grid.decode(grid.encode(cut, *found), *found).astype(np.float64) - W
        change = change.reshape(len(W), groups, -1).swapaxes(0, 1)  # [groups, out, g]
        error = ((change @ H) * change).sum(axis=-1).T
        better = error < least
        best[better], least[better] = limit[better], error[better]
    return best


def clip(W: np.ndarray, limit: np.ndarray, group_size: int) -> np.ndarray:
    """W with every group cut at +-limit. limit : (out, groups); returns (out, in)."""
    return np.clip(grouped(W, group_size), -limit[..., None], limit[..., None]).reshape(W.shape)
