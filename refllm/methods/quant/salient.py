"""salient: round to nearest, but keep the few input channels with the largest activations in 16 bits.

    a_k = mean |X_k|        the floor(fraction * in) channels of largest a_k, at least one, keep their column of W

The experiment that led to AWQ, and only that: the one percent shows *which* weights matter, it is not how AWQ stores
them. AWQ rounds every weight (refllm.methods.blockwise.awq); columns of another type among the codes are what it wants
to avoid. Judged by |W| instead of X, the same number of channels helps little, which is the point of the experiment.

Paper: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv:2306.00978, section 3.1 (table 1).
Differs from the authors' code: really stored, as codes plus kept columns, of which a bit per column says where; kept
columns stand in the codes as zero; at least one channel is kept; channels that are equally large go by their number.
Stage: memory, decode
Inventory: none, the experiment behind row 12
Lesson: lessons/11-awq.md
Golden: quant/salient
Baseline: none, it stores more than rtn does
"""

import numpy as np

from refllm.kernels.grids import AffineGrid
from refllm.kernels.packed.records import BlockSparse, IntWeight, Sum
from refllm.kernels.stats import Stats

BY = ("activation", "weight")


def salient(
    W: np.ndarray,
    stats: Stats,
    *,
    bits: int = 4,
    group_size: int = 64,
    fraction: float = 0.01,
    by: str = "activation",
    scale_dtype: str = "float16",
) -> Sum:
    """Round to nearest beside a few columns in float16.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : Stats
        Calibration inputs X (n, in).
    bits, group_size, scale_dtype :
        As in rtn; the grid is fitted to all columns.
    fraction : float
        Of the input channels kept, above 0, at most 1.
    by : str
        "activation": channels of largest mean |X|; "weight": of largest norm of their column.

    Returns
    -------
    Sum
        Of IntWeight and BlockSparse.

    Raises
    ------
    ValueError
        What rtn refuses, inputs of another width, a fraction or `by` unknown, a kept weight beyond float16.

    Examples
    --------
    >>> W, X = np.array([[-1.0, 0.125, 2.0]]), np.array([[1.0, 9.0, 1.0]])
    >>> salient(W, Stats(X), bits=2, group_size=-1).dense().tolist()
    [[-1.0, 0.125, 2.0]]
    """
    grid = AffineGrid(bits, group_size, scale_dtype)
    scale, zero_point = grid.fit(W)
    kept = kept_channels(W, stats, fraction, by)
    codes = grid.encode(W, scale, zero_point)
    codes[:, kept] = grid.encode(np.zeros_like(W), scale, zero_point)[:, kept]  # exactly zero: the column stands apart
    mask = np.zeros((1, W.shape[1]), bool)
    mask[0, kept] = True
    return Sum(IntWeight.pack(grid, codes, scale, zero_point), BlockSparse.compress(W, mask, (len(W), 1)))


def kept_channels(W: np.ndarray, stats: Stats, fraction: float, by: str) -> np.ndarray:
    """Numbers of the channels that keep their columns, rising."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    if by not in BY:
        raise ValueError(f"by must be one of {', '.join(BY)}, got {by!r}")
    if stats.mean_abs.shape != W.shape[1:]:
        raise ValueError(f"calibration inputs have {stats.mean_abs.size} columns, the weight has {W.shape[1]}")
    sizes = stats.mean_abs if by == "activation" else np.sum(W.astype(np.float64) ** 2, axis=0)
    return np.sort(np.argsort(-sizes, kind="stable")[: max(1, int(fraction * W.shape[1]))])
