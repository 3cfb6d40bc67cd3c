"""gptq: round one input column after another, and let the columns not yet rounded make up for the error.

Minimise ||(W - Q) X^T||^2 over the grid. H = X^T X + damp mean(diag) I, H^-1 = U^T U with U upper; for every column j:

    q_j = round(w_j)          e_j = (w_j - q_j) / U_jj          w_k -= e_j U_jk  for k > j

A row's scale is that of its own original weights. In groups of g columns, a group's scales are fitted when the loop
reaches it, to the weights as they are by then; with static_groups, before it starts. act_order takes the columns with
the largest inputs first, while most others are left to make up for them. An input that was never active gets weight 0.

Paper: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, Algorithm 1; act_order, static_groups and groups as in its published code.
Differs from the published code: scales are rounded to float16 before they are used; H, its factor and the errors are
float64 (there float32), what is divided by a scale is rounded to float32 as there; ties in act_order go to the first
column; H is X^T X, not 2 / sequences times that, which shows only where an input is dead (its H_jj becomes 1);
symmetric groups without a negative number are not clipped (see refllm.kernels.grids).
Stage: memory, decode
Inventory: 11
Lesson: lessons/10-gptq.md
Golden: quant/gptq
Baseline: rtn
"""

from dataclasses import replace

import numpy as np

from refllm.kernels.grids import PER_CHANNEL, AffineGrid, FullRangeGrid
from refllm.kernels.linalg import damped, inverse_factor
from refllm.kernels.margins import Margins, margins, sweep_bound
from refllm.kernels.obs import obs_sweep
from refllm.kernels.packed.records import IntWeight, Reordered
from refllm.kernels.stats import Stats

GROUP_GRIDS = ("published", "updated")


def gptq(
    W: np.ndarray,
    stats: Stats,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    group_grid: str = "published",
    block: int = 128,
    scale_dtype: str = "float16",
) -> IntWeight | Reordered:
    """Round with second-order compensation.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : Stats
        Calibration inputs X (n, in).
    bits : int
        2 to 8.
    group_size : int
        g > 0: g columns, consecutive in the order in which they are rounded, share a scale, g must divide `in`; -1: one
        scale per row; 0: one for the whole tensor.
    symmetric : bool
        True: scale 2 amax / (2^bits - 1), zero in the middle, no zero point stored. False: min-max scale with a zero
        point.
    damp : float
        Fraction of the mean of diag H that is added to the diagonal.
    act_order : bool
        Columns in descending order of diag H instead of their own.
    static_groups : bool
        Groups of the original columns with scales from the original weights: with act_order, columns then need no
        reordering when the weight is used.
    group_grid : str
        What the scales of a group are fitted to if they are not static. "published": the weights as the last finished
        block has left them, as the published code does. "updated": as all columns before have left them. The same where
        `block` divides group_size.
    block : int
        Columns whose errors reach the columns of later blocks together; changes nothing but "published" groups.
    scale_dtype : str
        float16 or float32: the type scales are stored in and codes are computed with.

    Returns
    -------
    IntWeight; with act_order and groups that are not static a Reordered one, whose groups lie in rounding order

    Raises
    ------
    ValueError
        NaN or Inf in W, inputs of another width, a group_size that does not divide `in`, a knob out of range, a scale
        beyond its type, an H that is singular although damped.

    Examples
    --------
    The second and third input are always equal. Nearest to 0.4 is 0; the third weight takes over what the second lost:

    >>> W, X = np.array([[3.0, 0.4, 0.4]]), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    >>> gptq(W, Stats(X), bits=2, group_size=-1).dense().tolist()
    [[3.0, 0.0, 1.0]]
    """
    if group_grid not in GROUP_GRIDS:
        raise ValueError(f"group_grid must be {' or '.join(GROUP_GRIDS)}, got {group_grid!r}")
    grid = (FullRangeGrid if symmetric else AffineGrid)(bits, group_size, scale_dtype)
    grid.fit(W)  # refuses what the grid cannot take, before the long part
    W, order, _, U = prepared(W, stats, damp, act_order)
    codes, scale, zero_point = _sweep(W, U, order, grid, static_groups, group_grid == "updated", block)
    if act_order and not static_groups and group_size > 0:
        return Reordered(IntWeight.pack(grid, codes, scale, zero_point), order.astype(np.int32))
    own = np.empty_like(codes)
    own[:, order] = codes
    return IntWeight.pack(grid, own, scale, zero_point)


def rounding_margins(
    W: np.ndarray,
    stats: Stats,
    record: IntWeight | Reordered,
    *,
    damp: float = 0.01,
    act_order: bool = False,
) -> Margins:
    """How safe the codes of a record of `gptq` are from float64 sums in another order, its scales taken as given.

    Parameters
    ----------
    W, stats, damp, act_order
        What gptq was given.
    record : IntWeight or Reordered
        What it returned.

    Returns
    -------
    Margins
        Its unsafe codes may differ in another correct implementation, and those after them in the same rows.

    Examples
    --------
    >>> W, X = np.array([[3.0, 0.4, 0.4]]), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    >>> rounding_margins(W, Stats(X), gptq(W, Stats(X), bits=2, group_size=-1)).unsafe
    0
    """
    W, order, H, U = prepared(W, stats, damp, act_order)
    inner = record.weight if isinstance(record, Reordered) else record
    stored = slice(None) if isinstance(record, Reordered) else order
    Q = inner.dense()[:, stored].astype(np.float64)
    values = np.empty_like(Q)

    def project(w, j, W_now):
        values[:, j] = w
        return Q[:, j]

    _, E = obs_sweep(W[:, order], U, project)
    spread = lambda a: np.repeat(a.astype(np.float64), inner.columns // a.shape[1], axis=1)[:, stored]
    scale, zero_point = map(spread, inner.scales())
    errors = sweep_bound(W[:, order], Q, E, U, H, stats.n) / scale
    most = (1 << inner.bits) - 1
    return margins(values / scale, errors, -zero_point, most - zero_point, by_float32=True)


def prepared(W, stats, damp, act_order):
    """W in float64 with dead inputs at zero; the rounding order; the damped H and U in that order.

    Parameters
    ----------
    W, stats, damp, act_order
        As in gptq; W is finite.

    Returns
    -------
    W : (out, in) float64
        Its columns in their own order.
    order : (in,) int64
    H, U : (in, in) float64
        See refllm.kernels.linalg.

    Raises
    ------
    ValueError
        Inputs of another width, an H that is singular although damped.
    """
    columns = np.shape(W)[1]
    if stats.X.shape[1] != columns:
        raise ValueError(f"calibration inputs have {stats.X.shape[1]} columns, the weight has {columns}")
    diagonal = np.diag(stats.H)
    order = np.arange(columns)
    if act_order:
        order = np.argsort(-np.where(diagonal > 0, diagonal, 1.0), kind="stable")
    H = damped(stats.H, damp)[np.ix_(order, order)]
    return np.where(diagonal > 0, W, 0.0).astype(np.float64), order, H, inverse_factor(H)


def _sweep(W, U, order, grid, static, updated, block):
    """Codes in rounding order, scales and zero points."""
    g, columns = grid.group_size, len(order)
    column_grid = replace(grid, group_size=PER_CHANNEL)
    codes = np.empty(W.shape, np.uint8)
    moving = g > 0 and not static
    scale, zero_point = grid.fit(W)  # of moving groups, overwritten one by one
    group_of = np.zeros(columns, int) if g <= 0 else (np.arange(columns) if moving else order) // g
    if updated and moving:
        block = max(1, block // g) * g  # whole groups: their columns are then up to date when one opens
    outer = W

    def project(w, j, W_now):
        nonlocal outer
        if j % block == 0:
            outer = W_now if updated else W_now.copy()
        here = slice(group_of[j], group_of[j] + 1)
        if moving and j % g == 0:
            s, z = column_grid.fit(outer[:, j : j + g])
            scale[:, here] = s
            if z is not None:
                zero_point[:, here] = z
        own = scale[:, here], None if zero_point is None else zero_point[:, here]
        codes[:, j : j + 1] = column_grid.encode(w[:, None], *own)
        return column_grid.decode(codes[:, j : j + 1], *own)[:, 0]

    obs_sweep(W[:, order], U, project, block)
    return codes, scale, zero_point
