"""binary: a sign for every weight, and two numbers for a group of them.

    m = mean w          a = mean |w - m|          w ~ m + a sign(w - m)

Of all values that one bit can choose between around m, m +- a have the least squared error; the error is the variance
less a^2, a third of the energy of normal weights (1 - 2 / pi). Groups of g weights cost 1 + 2 * 16 / g bits each.

Paper: Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", ECCV,
arXiv:1603.05279, section 3.1 (m = 0); with the mean as in the first order of BiLLM, arXiv:2402.04291.
Differs from XNOR-Net: the mean is taken out, inputs stay floats, and nothing is trained. m - a and 2 a are what is
stored, in float16; a weight that is exactly m counts as plus.
Stage: memory, decode
Inventory: none, what rows 14 and 15 start from
Lesson: lessons/16-sub-2-bit.md
Golden: quant/binary
Baseline: none, no other method has one bit
"""

import numpy as np

from refllm.formats.bits import pack_bits
from refllm.kernels.grids import PER_TENSOR, checked_weight, grouped
from refllm.kernels.packed.records import MinWeight, as_float
from refllm.kernels.stats import Stats


def binary(W: np.ndarray, stats: Stats | None = None, *, group_size: int = 64) -> MinWeight:
    """Signs around the mean of each group.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : Stats, optional
        Not looked at.
    group_size : int
        g columns that share a mean and a scale, g must divide `in`; or -1: a row.

    Returns
    -------
    MinWeight
        Of 1 bit.

    Raises
    ------
    ValueError
        NaN or Inf in W, a group_size that does not divide `in`, a number beyond float16.

    Examples
    --------
    >>> binary(np.array([[1.0, 2.0, 5.0, 8.0]]), group_size=-1).dense().tolist()
    [[1.5, 1.5, 6.5, 6.5]]
    """
    if group_size == PER_TENSOR:
        raise ValueError("group_size must be positive or -1 (a row), got 0")
    groups = grouped(checked_weight(W).astype(np.float64), group_size)
    mean = groups.mean(axis=2, keepdims=True)
    scale = np.abs(groups - mean).mean(axis=2)
    plus = (groups >= mean).reshape(W.shape)
    stored = as_float(2 * scale, "float16"), as_float(mean[..., 0] - scale, "float16")
    return MinWeight(pack_bits(plus.astype(np.uint8), 1), *stored, 1, group_size, W.shape[1])
