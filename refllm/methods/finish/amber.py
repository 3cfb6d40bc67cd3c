"""amber: of every m neighbouring inputs the n best count (8:16), which sparse tensor cores multiply at twice the rate.

    score of input j = |x_j| ||W'_:,j||_2        W' = W clipped to its 0.5 and 99.5 percentiles, standardised

An input matters by what its column does with it, so magnitudes are weighed with a factor for each column, found once
and divided by the smallest. Clipping keeps a few outliers of the weight from deciding. With `score=magnitude` it is
plain n:m sparsity of inputs; with `block` above 1 whole blocks of inputs compete by their norms, so that a tile of a
product can leave them out. This is about arithmetic in prefill: decoding is better left dense.

Not all layers bear it: the paper spares k, v, o and up everywhere, and q and gate in layers found sensitive.
`rtn:bits=8+amber:only=down_proj+amber:only=q_proj` names what is to be sparse.

With `bits` the inputs that count are rounded besides, each token with the scale of what is left of it. The paper's
Outstanding-sparse, W8A8 in patterns behind an inverted SmoothQuant, is `smoothquant:alpha=0.1,inverted=true+
rtn:bits=8,symmetric=true,group=-1+amber:bits=8,only=down_proj+amber:bits=8,only=q_proj+dynamic`. Scores weighed with
columns hardly notice the inversion, which cancels in |x_j| ||W_:,j||; magnitudes do.

Paper: Huawei 2025, "Amber Pruner: Leveraging N:M Activation Sparsity for Efficient Prefill in Large Language Models",
arXiv:2508.02128.
Differs from the paper, which has no published code: ties go to the lower index; a column that holds nothing but the
mean has the factor 0, and the smallest of the others divides.
Stage: prefill
Inventory: 61
Lesson: lessons/25-activation-sparsity.md
Golden: finish/amber
Baseline: none, it costs quality for arithmetic
"""

import numpy as np

from refllm.kernels.packed.kept import PatternInputs
from refllm.kernels.packed.records import Record
from refllm.kernels.stats import Stats

SCORES = ("amber", "magnitude")
PERCENTILES = (0.5, 99.5)


def amber(
    record: Record,
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    n: int = 8,
    m: int = 16,
    score: str = "amber",
    block: int = 1,
    bits: int = 0,
) -> PatternInputs:
    """The n best of every m inputs count.

    Parameters
    ----------
    record : packed record whose inputs are not rounded
    W : (out, in) float
        What was packed: gives the factors.
    stats : ignored
        Part of every finishing stage's call.
    n, m : int
        2:4, 4:8, 8:16.
    score : str
        amber, or magnitude: |x| alone.
    block : int
        Inputs that count or do not count together.
    bits : int
        2 to 8: those that count are rounded, every token with the scale that they need. 0: they stay as they are.

    Returns
    -------
    PatternInputs

    Raises
    ------
    ValueError
        A width that is no multiple of m block, n above m, another score, a record whose inputs are already rounded.

    Examples
    --------
    >>> from refllm.kernels.packed.sparse import Plain
    >>> W = np.float32([[1.0, 0.0, 3.0, 0.0]])
    >>> amber(Plain(W), W, n=1, m=2, score="magnitude").rounded(np.float32([[1, -2, 3, 3]])).tolist()
    [[0.0, -2.0, 3.0, 0.0]]
    """
    if score not in SCORES:
        raise ValueError(f"score must be {' or '.join(SCORES)}, got {score!r}")
    return PatternInputs(record, column_factors(W) if score == "amber" else None, n, m, block, bits)


def column_factors(W: np.ndarray) -> np.ndarray:
    """Norms of the columns of a clipped and standardised weight over the smallest of them, (1, in) float32.

    Examples
    --------
    >>> (100 * column_factors(np.array([[1.0, -3.0], [-1.0, 3.0]]))).round().tolist()
    [[100.0, 297.0]]
    """
    W = W.astype(np.float64)
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf")
    clipped = np.clip(W, *np.percentile(W, PERCENTILES))
    spread = clipped.std()
    norms = np.sqrt((((clipped - clipped.mean()) / (spread if spread > 0 else 1)) ** 2).sum(axis=0, keepdims=True))
    norms = np.where(norms > 1e-9 * norms.max(), norms, 0)  # a mean is rounded
    positive = norms[norms > 0]
    return (norms / (positive.min() if positive.size else 1)).astype(np.float32)
