"""wanda: drop the weights that matter least to the output, weight times the size of what it multiplies.

    a_j = sqrt(sum over calibration rows of x_j^2)        S_ij = |W_ij| a_j

S is compared within each output row: a row is one neuron, and its weights compete for the same sum. The lowest go; the
rest keep their values, there is no update and no gradient. S_ij^2 is exactly what zeroing W_ij alone adds to
||X (W - W')^T||^2. For N:M the comparison is within M consecutive columns of a row.

Paper: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695,
section 3.
Differs from the authors' code: a_j is not divided by the number of sequences (a common factor changes no comparison);
int(sparsity * in) weights go from every row, equal scores lowest column first; N:M names the number kept, where the
code names the number removed. Kept values are stored as float16, rounded to nearest even.
Stage: memory, decode; prefill on hardware with 2:4 units
Inventory: 50
Lesson: lessons/08-zeros-and-ranks.md
Golden: prune/wanda
Baseline: magnitude:per_row=true
"""

import numpy as np

from refllm.kernels.packed.records import Sparse24, SparseBitmask
from refllm.kernels.stats import Stats
from refllm.methods.prune.patterns import check_weight, prune


def wanda(
    W: np.ndarray,
    stats: Stats,
    *,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    dtype: str = "float16",
) -> Sparse24 | SparseBitmask:
    """Prune by |W| times the norm of the inputs.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : Stats
        Calibration inputs X (n, in).
    pattern : str
        "unstructured", or "N:M": N kept of every M consecutive columns of a row.
    sparsity : float, optional
        Fraction of every row removed; 0.5 unless given. Unstructured only.
    dtype : str
        float16 or float32, of the kept values.

    Returns
    -------
    Sparse24 for 2:4, SparseBitmask for everything else

    Raises
    ------
    ValueError
        NaN or Inf in W, inputs of another width, an unknown pattern, a width that M does not divide, a sparsity outside
        [0, 1], a value beyond dtype.

    Examples
    --------
    The second input is ten times the others, so the small weight on it stays:

    >>> W, X = np.array([[4.0, 1.0, 3.0, 2.0]]), np.array([[1.0, 10.0, 1.0, 1.0]])
    >>> wanda(W, Stats(X)).dense().tolist()
    [[4.0, 1.0, 0.0, 0.0]]
    """
    return prune(W, scores(W, stats), pattern, sparsity, dtype, per_row=True)


def scores(W: np.ndarray, stats: Stats) -> np.ndarray:
    """S_ij = |W_ij| sqrt(sum_n X_nj^2), (out, in) float64."""
    W = check_weight(W)
    if stats.sum_squares.shape != W.shape[1:]:
        raise ValueError(f"calibration inputs have {stats.sum_squares.size} columns, the weight has {W.shape[1]}")
    return np.abs(W.astype(np.float64)) * np.sqrt(stats.sum_squares)
