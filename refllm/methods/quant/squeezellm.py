"""squeezellm: a table of values for every row, made by k-means that knows which weights the loss is sensitive to.

    F = mean over samples of (d loss / d w)^2        min over v, c of  sum_j F_j (w_j - v[c_j])^2  for every row
    w^ = v[c] + sparse                               sparse: the few weights that a table serves badly

F is the diagonal of the Fisher information: to second order, rounding w by e costs F e^2 / 2 of loss. Two kinds of
weights are taken out first and stored beside the codes, with float16 values and their columns: the most sensitive
ones (largest F) and the largest ones (outliers, which would pull a value to themselves). They weigh nothing in the
k-means of the others.

Paper: Kim et al. 2024, "SqueezeLLM: Dense-and-Sparse Quantization", ICML, arXiv:2306.07629, sections 4.1 and 4.2.
Differs from the authors' code: k-means starts from the even grid of the row and from the optimum of a coarse copy of
it, and keeps the better result (scikit-learn: k-means++); tables are float16, and codes are computed with the stored
table; exactly int(fraction * size) weights are taken out, equal ones in row-major order, where the code compares
with thresholds (outliers: from quartiles, with a factor tuned to such a fraction). Taken-out weights are stored as what
the table lacks there, as in the code. Without gradients (a direct call) F_j is the mean square of input j, to which the
layer's own output error is sensitive.
Stage: memory, decode
Inventory: 17
Lesson: lessons/14-codebooks.md
Golden: quant/squeezellm
Baseline: rtn:bits=3,group=8
"""

import numpy as np

from refllm.kernels.kmeans_1d import near_best_1d, nearest_1d
from refllm.kernels.packed.records import SparseRows, Sum, TableRows, as_float
from refllm.kernels.stats import Stats


def squeezellm(
    W: np.ndarray,
    stats: Stats,
    *,
    bits: int = 3,
    sensitive: float = 0.0005,
    outliers: float = 0.0045,
    fisher: np.ndarray | None = None,
) -> Sum | TableRows:
    """Weighted k-means in every row, with a few weights kept apart.

    Parameters
    ----------
    W : (out, in) float, finite
    stats : Stats
        Calibration inputs X (n, in), from which F follows where `fisher` is not given.
    bits : int
        1 to 8; 2^bits values a row. They cost 16 * 2^bits / in bits a weight.
    sensitive : float
        Fraction of the weights that is kept apart for its F.
    outliers : float
        Fraction kept apart for its size, of those left.
    fisher : (out, in) float, optional
        Mean squared gradients of the loss, which `refllm.compress` fills in.

    Returns
    -------
    Sum of a TableRows and a SparseRows; TableRows alone where nothing is kept apart

    Raises
    ------
    ValueError
        NaN or Inf in W, inputs or a fisher of another shape, a fraction outside [0, 1), a value beyond float16.

    Examples
    --------
    Two values for four weights; the one with a large F keeps its own:

    >>> W, F = np.array([[0.0, 1.0, 2.0, 8.0]]), np.array([[1.0, 1.0, 1e6, 1.0]])
    >>> squeezellm(W, None, bits=1, sensitive=0, outliers=0, fisher=F).dense().round(2).tolist()
    [[2.0, 2.0, 2.0, 8.0]]
    """
    W = _checked(W, bits)
    F = _sensitivity(W, stats, fisher)
    apart = kept_apart(W, F, sensitive, outliers)
    rest, weights = np.where(apart, 0, W), np.where(apart, 0, F)
    weights[~(weights > 0).any(axis=1)] = 1
    tables = as_float(near_best_1d(rest, weights, 1 << bits), "float16")
    codes = nearest_1d(rest, tables)
    lut = TableRows.pack(codes, tables)
    if not apart.any():
        return lut
    return Sum(lut, SparseRows.compress(W - lut.dense(), apart))


def _checked(W: np.ndarray, bits: int) -> np.ndarray:
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; quantization needs finite values")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    return W.astype(np.float64)


def _sensitivity(W: np.ndarray, stats: Stats | None, fisher: np.ndarray | None) -> np.ndarray:
    """F of every weight, (out, in) float64."""
    if fisher is None:
        if stats.sum_squares.shape != W.shape[1:]:
            raise ValueError(f"calibration inputs have {stats.sum_squares.size} columns, the weight has {W.shape[1]}")
        return np.broadcast_to(stats.sum_squares / stats.n, W.shape)
    if fisher.shape != W.shape or not np.isfinite(fisher).all() or (fisher < 0).any():
        raise ValueError(f"fisher must be finite, not negative and of shape {W.shape}, got shape {fisher.shape}")
    return fisher.astype(np.float64)


def kept_apart(W: np.ndarray, F: np.ndarray, sensitive: float, outliers: float) -> np.ndarray:
    """Which weights are stored beside the codes, (out, in) bool: the largest F, then the largest of the others."""
    for name, fraction in (("sensitive", sensitive), ("outliers", outliers)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must be a fraction from 0 to less than 1, got {fraction}")
    apart = np.zeros(W.size, bool)
    apart[np.argsort(-F.ravel(), kind="stable")[: int(sensitive * W.size)]] = True
    size = np.where(apart, -1, np.abs(W).ravel())
    largest = np.argsort(-size, kind="stable")[: int(outliers * W.size)]
    apart[largest[size[largest] > 0]] = True
    return apart.reshape(W.shape)
