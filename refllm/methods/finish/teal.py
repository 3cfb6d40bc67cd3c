"""teal: small inputs are taken as zero, so their columns of the weight are not read.

    tau = the s-quantile of |x| over the calibration inputs        y = W[:, kept] x[kept],  kept: |x| > tau

A decode step waits for weight bytes; with half of the inputs at zero, half of the columns stay where they are. Nothing
is trained: inputs of linear layers are bell-shaped around zero, and the many small ones carry little. It helps one
token at a time: in a batch a column is read if any token wants it, which leaves s^B of them for B independent tokens.

The stage follows one that packs: `rtn:bits=8+teal:sparsity=0.4`. After a stage that prunes it is joint sparsity of
weights and inputs: `wanda:sparsity=0.5+teal` multiplies d_W d_x of all pairs, if masks are independent. `allocate`
shares a block's sparsity out among its projections, always to the one that it hurts least. Two older ideas for the
feed-forward network alone stand in refllm/methods/activations/gated.py.

Paper: Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models", arXiv:2408.14690.
Differs from the authors' code: the quantile of |x| itself, where that reads F^-1(1/2 + s/2) off a histogram of x of
10,000 bins, the same for symmetric inputs; every token is treated alike, where that leaves the first half of a prompt.
Stage: decode
Inventory: 61, 62
Lesson: lessons/25-activation-sparsity.md
Golden: finish/teal
Baseline: none, it costs quality for what is not read
"""

from collections.abc import Callable

import numpy as np

from refllm.kernels.packed.kept import KeptInputs, ThresholdInputs
from refllm.kernels.packed.records import Record, SparseBitmask
from refllm.kernels.stats import Stats


def teal(record: Record, W: np.ndarray, stats: Stats, *, sparsity: float = 0.5) -> ThresholdInputs:
    """Inputs up to a threshold are taken as zero.

    Parameters
    ----------
    record : packed record whose inputs are not rounded
    W : ignored
        Part of every finishing stage's call.
    stats : Stats
        Calibration inputs.
    sparsity : float
        In [0, 1): share of the calibration inputs that become zero, at least. 0: only zeros themselves.

    Returns
    -------
    ThresholdInputs

    Raises
    ------
    ValueError
        sparsity out of range, inputs of another width, a record whose inputs are already rounded.

    Examples
    --------
    >>> from refllm.kernels.packed.sparse import Plain
    >>> stats = Stats(np.array([[1.0, -2.0], [3.0, -4.0]]))
    >>> record = teal(Plain(np.ones((1, 2), np.float32)), None, stats, sparsity=0.5)
    >>> record.threshold.item(), record.rounded(np.float32([[2.0, -3.0]])).tolist()
    (2.0, [[0.0, -3.0]])
    """
    if stats.X.shape[1] != record.shape[1]:
        raise ValueError(f"calibration inputs have {stats.X.shape[1]} columns, the weight has {record.shape[1]}")
    return ThresholdInputs(record, np.full((1, 1), threshold(stats.X, sparsity), np.float32))


def threshold(x: np.ndarray, sparsity: float) -> np.float32:
    """The smallest number that at least `sparsity` of all |x| do not exceed; 0 for a sparsity of 0."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    count = int(np.ceil(sparsity * x.size - 1e-9))
    if not count:
        return np.float32(0)
    return np.partition(np.abs(x.astype(np.float32)).reshape(-1), count - 1)[count - 1]


def allocate(sizes: dict[str, int], error: Callable[[dict[str, float]], float], target: float, step: float = 0.05):
    """Sparsity of each projection of a block, raised step by step where that costs least.

    Parameters
    ----------
    sizes : dict
        Weights of each projection. A step removes the same number of weights everywhere: step times the largest.
    error : callable
        Of the block's output, for sparsities by name.
    target : float
        In [0, 1): of all weights together.
    step : float

    Returns
    -------
    dict of float, by name: the first whose weighted mean reaches the target

    Examples
    --------
    >>> cost = lambda s: 3 * s["q"] + s["up"]
    >>> {name: round(x, 2) for name, x in allocate({"q": 1, "up": 1}, cost, 0.25).items()}
    {'q': 0.0, 'up': 0.5}
    """
    chosen, total, largest = dict.fromkeys(sizes, 0.0), sum(sizes.values()), max(sizes.values())
    mean = lambda: sum(sizes[name] * s for name, s in chosen.items()) / total
    while mean() < target - 1e-9:
        tried = {}
        for name, size in sizes.items():
            raised = chosen[name] + step * largest / size
            if raised < 1:
                tried[name] = (error(chosen | {name: raised}), raised)
        if not tried:
            raise ValueError(f"no projection can take more: {mean():.3f} of the target {target} is reached")
        best = min(tried, key=lambda name: tried[name][0])
        chosen[best] = tried[best][1]
    return chosen


def multiplications(record: KeptInputs, x: np.ndarray) -> int:
    """Pairs of a kept weight and a kept input over all tokens; all weights of a record that is not sparse are kept."""
    kept = record.kept(x).sum(axis=0)
    return int((_kept_weights(record) * kept).sum())


def joint_bytes(record: KeptInputs, x: np.ndarray) -> int:
    """Bytes of a bitmask weight that a call reads: kept weights of the columns it needs, and the mask of these."""
    needed = record.kept(x).any(axis=0)
    inner = record.weight
    if not isinstance(inner, SparseBitmask):
        return record.bytes_read(x)
    kept = int(_kept_weights(record)[needed].sum())
    bits = 8 * inner.values.nbytes * kept / max(int(_kept_weights(record).sum()), 1) + inner.shape[0] * needed.sum()
    return int(-(-bits // 8))


def _kept_weights(record: KeptInputs) -> np.ndarray:
    """Weights of each column that are stored, (in,)."""
    inner = record.weight
    if isinstance(inner, SparseBitmask):
        return np.unpackbits(inner.bitmask, axis=1, bitorder="little", count=inner.shape[1]).sum(axis=0, dtype=np.int64)
    return np.full(record.shape[1], record.shape[0], np.int64)
