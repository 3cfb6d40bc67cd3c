"""spark: a sign and a magnitude in four bits where it is small, in eight where it is not.

    s = amax / 255      v = rint(|w| / s), 0 ... 255      v <= 7: 4 bits, exact      v > 7: 8 bits, half of them rounded

The first bit of a code says how long it is, at the cost of one bit of precision where numbers are large and nobody
misses it (refllm.formats.spark has the table). Bits a weight: 1 for the sign, and 8 - 4 P(v <= 7). So it pays where
most numbers are small beside the largest, as those with outliers are; one scale for everything (`group=0`, the paper's)
makes v small, and groups, which fit the scale to each neighbourhood, make it large. A row of normal weights has P near
0.1, and nothing is saved.

`inputs=true` rounds the inputs to the same code, with a scale per token.

Paper: Liu et al. 2024, "SPARK: Scalable and Precision-Aware Acceleration of Neural Networks via Efficient Encoding",
HPCA 2024, pp. 1029-1042.
Differs from the paper: its table is that of unsigned 8-bit numbers and it does not say what becomes of signs; here they
are stored apart, one bit each, and counted. Scales are float16; rows begin on a byte of their own, and their lengths
are stored; zeros alone have the scale 2 / 255 of an affine grid.
Stage: memory, decode
Inventory: 76
Lesson: lessons/18-pairs-and-lengths.md
Golden: quant/spark
Baseline: none, its size depends on the weights: above that of rtn:bits=8 on normal ones
"""

import numpy as np

from refllm.kernels.grids import PER_CHANNEL, AffineGrid
from refllm.kernels.packed.inputs import SPARK, TokenInputs
from refllm.kernels.packed.records import SparkWeight
from refllm.kernels.stats import Stats


def spark(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    group_size: int = PER_CHANNEL,
    inputs: bool = False,
    scale_dtype: str = "float16",
) -> SparkWeight | TokenInputs:
    """Magnitudes in codes of two lengths.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    group_size : int
        As in `rtn`: columns that share a scale; -1: whole rows; 0: the whole weight.
    inputs : bool
        Round the inputs to the same code, token by token.
    scale_dtype : str
        float16 or float32.

    Returns
    -------
    SparkWeight, or a TokenInputs around it

    Raises
    ------
    ValueError
        NaN or Inf in W, a group_size that does not divide, a scale beyond its type.

    Examples
    --------
    >>> record = spark(np.array([[255.0, -5.0, 3.0, 18.0]]))
    >>> record.dense().tolist(), record.stream.size
    ([[255.0, -5.0, 3.0, 15.0]], 3)
    """
    W = np.asarray(W)
    grid = AffineGrid(8, group_size, scale_dtype)
    size = np.abs(W)
    scale, _ = grid.fit(size)  # from 0 to amax
    numbers = grid.encode(size, scale, np.zeros(scale.shape, np.uint8))
    weight = SparkWeight.pack(numbers, W < 0, scale)
    return TokenInputs(weight, SPARK) if inputs else weight
