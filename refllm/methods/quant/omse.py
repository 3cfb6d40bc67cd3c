"""omse: the range that loses least, not the range that holds everything.

    r* = argmin over r of  sum over the group of |w - Q_r(w)|^p           Q_r: the grid whose range is r [lo, hi]

r = 1, 0.99 ... 0.21. A smaller range clips the few weights at its ends and rounds all others more finely; with 4 bits
and normal weights the best end lies near 2.6 standard deviations. Every group has its own r, the largest of equals. The
error is that of the weight itself, clipping included, and with r = 1 among the candidates it is never above rounding to
the full range, measured by p.

`dual=true` stores a second weight of as many bits, fitted to what the first one missed: w = s1 q1 + s2 q2.

Paper: Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference", arXiv:1902.06822,
sections 3 and 4 (p = 2, symmetric, a range for every kernel; two tensors for layers that need it).
Differs from the paper: the range is searched on the grid of GPTQ's published code (its `mse` option, there with
p = 2.4) instead of by golden section; groups of columns and affine grids are possible; `dual` is asked for, not chosen
by layer.
Stage: memory, decode
Inventory: 22
Lesson: lessons/09-choosing-the-range.md
Golden: quant/omse
Baseline: rtn
"""

import numpy as np

from refllm.kernels.grids import PER_TENSOR, AffineGrid, SymmetricGrid, group_count
from refllm.kernels.packed.records import IntWeight, Sum
from refllm.kernels.stats import Stats

STEPS, PARTS = 80, 100


def omse(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    p: float = 2.0,
    dual: bool = False,
    scale_dtype: str = "float16",
) -> IntWeight | Sum:
    """Round to the range of least error.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    bits, group_size, symmetric, scale_dtype :
        As in rtn. The published method is symmetric with one scale per row (-1).
    p : float
        Power of the error, above 0: 2 the mean square; 2.4 in GPTQ's code.
    dual : bool
        Store the rounded residual too, at twice the size.

    Returns
    -------
    IntWeight, or the Sum of two

    Raises
    ------
    ValueError
        As rtn; p not above 0.

    Examples
    --------
    The many small weights are worth more than the last one, unless the power of the error is high:

    >>> W = np.array([[0.45, -0.45] * 8 + [1.0]])
    >>> largest = lambda p: omse(W, bits=2, group_size=-1, symmetric=True, p=p).dense().max()
    >>> round(float(largest(2)), 2), round(float(largest(16)), 2)
    (0.48, 0.7)
    """
    if not p > 0:
        raise ValueError(f"p must be above 0, got {p}")
    grid = (SymmetricGrid if symmetric else AffineGrid)(bits, group_size, scale_dtype)
    first = _pack(grid, W, p)
    if not dual:
        return first
    return Sum(first, _pack(grid, np.asarray(W, np.float64) - first.dense(), p))


def _pack(grid: SymmetricGrid | AffineGrid, W: np.ndarray, p: float) -> IntWeight:
    scale, zero_point = least_error_range(grid, W, p)
    return IntWeight.pack(grid, grid.encode(W, scale, zero_point), scale, zero_point)


def least_error_range(
    grid: SymmetricGrid | AffineGrid, W: np.ndarray, p: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and zero points of least error, shapes as from grid.fit."""
    W = np.asarray(W)
    best = grid.fit(W)  # checks W
    least = np.full(best[0].shape, np.inf)
    lo, hi = (np.minimum(_groups(grid, W).min(axis=-1), 0), np.maximum(_groups(grid, W).max(axis=-1), 0))
    for step in range(STEPS):
        r = W.dtype.type(1 - step / PARTS)
        ends = np.stack([r * lo, r * hi], axis=-1)  # a matrix with this range in every group
        found = grid.fit(ends.reshape(len(ends), -1)) if grid.group_size <= 0 else _fit_pairs(grid, ends)
        error = _groups(grid, grid.decode(grid.encode(W, *found), *found).astype(np.float64) - W)
        error = (np.square(error) if p == 2 else np.abs(error) ** p).sum(axis=-1)
        better = error < least
        least[better] = error[better]
        for kept, new in zip(best, found, strict=True):
            if kept is not None:
                kept[better] = new[better]
    return best


def _fit_pairs(grid: SymmetricGrid | AffineGrid, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Fit groups of which only the two ends are given, (out, groups, 2)."""
    of_pairs = type(grid)(grid.bits, 2, grid.scale_dtype)
    return of_pairs.fit(ends.reshape(len(ends), -1))


def _groups(grid: SymmetricGrid | AffineGrid, W: np.ndarray) -> np.ndarray:
    """(out, in) -> (out, groups, g); (1, 1, out * in) per tensor."""
    if grid.group_size == PER_TENSOR:
        return W.reshape(1, 1, W.size)
    return W.reshape(len(W), group_count(W.shape[1], grid.group_size), -1)
