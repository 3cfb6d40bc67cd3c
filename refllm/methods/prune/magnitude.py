"""magnitude: drop the smallest weights.

    S_ij = |W_ij|

Among all masks with as many zeros (and the same scope) it is the one with the least ||W - W'||^2; it does not know
which inputs are large. The baseline of every pruning method.

Paper: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv:1506.02626,
section 3.
Differs from the paper: one shot, no retraining; exactly int(sparsity * n) weights go, equal ones lowest index first,
where common code takes a threshold with <= and drops one more. Kept values are stored as float16.
Stage: memory
Inventory: none
Lesson: lessons/08-zeros-and-ranks.md
Golden: prune/magnitude
Baseline: none, this is the baseline
"""

import numpy as np

from refllm.kernels.packed.records import Sparse24, SparseBitmask
from refllm.kernels.stats import Stats
from refllm.methods.prune.patterns import check_weight, prune


def magnitude(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    per_row: bool = False,
    dtype: str = "float16",
) -> Sparse24 | SparseBitmask:
    """Prune by |W|.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    pattern : str
        "unstructured", or "N:M": N kept of every M consecutive columns of a row.
    sparsity : float, optional
        Fraction removed; 0.5 unless given. Unstructured only.
    per_row : bool
        Unstructured: True removes the same number from every row, False compares over the whole matrix.
    dtype : str
        float16 or float32, of the kept values.

    Returns
    -------
    Sparse24 for 2:4, SparseBitmask for everything else

    Raises
    ------
    ValueError
        NaN or Inf in W, an unknown pattern, a width that M does not divide, a sparsity outside [0, 1], a value beyond
        dtype.

    Examples
    --------
    >>> magnitude(np.array([[4.0, -1.0], [3.0, 2.0]])).dense().tolist()
    [[4.0, 0.0], [3.0, 0.0]]
    """
    W = check_weight(W)
    return prune(W, np.abs(W), pattern, sparsity, dtype, per_row)
