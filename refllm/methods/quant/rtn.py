"""rtn: round every weight to the nearest point of an integer grid, one scale per group, channel or tensor.

    symmetric    s = amax / (2^(b-1) - 1)     q = rint(w / s)                             w^ = s q
    affine       s = (hi - lo) / (2^b - 1)    q = clip(rint(w / s) + z, 0, 2^b - 1)       w^ = s (q - z)
                 z = rint(-lo / s)            lo = min(w, 0), hi = max(w, 0) over the group

Nothing is looked at but the weight itself: the baseline of every method that does better at the same size. s is rounded
to the type it is stored in before anything is divided by it. While it is a normal number of that type, an error is at
most s / 2 (affine, float16: plus 2^-11 of the range, where the rounded zero point pushes an extreme over the edge). An
all-zero group decodes to zeros.

Paper: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339,
section 2 (absmax); Frantar et al. 2022, "GPTQ", arXiv:2210.17323 (the min-max grid of its published code).
Differs from them: scales are stored as float16, and a group whose scale would round to zero takes the smallest float16.
Stage: memory, decode
Inventory: 3
Lesson: lessons/03-rounding-to-a-grid.md
Golden: quant/rtn, quant/rtn_matmul
Baseline: none, this is the baseline
"""

import numpy as np

from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.stats import Stats


def rtn(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    scale_dtype: str = "float16",
) -> IntWeight:
    """Round to nearest.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    bits : int
        2 to 8.
    group_size : int
        g > 0: g consecutive columns share a scale, g must divide `in`; -1: one scale per row (channel); 0: one for the
        whole tensor.
    symmetric : bool
        True: absmax scale, zero in the middle and no zero point stored. False: min-max scale with a zero point.
    scale_dtype : str
        float16 or float32: the type scales are stored in and codes are computed with.

    Returns
    -------
    IntWeight

    Raises
    ------
    ValueError
        NaN or Inf in W, a group_size that does not divide `in`, bits or scale_dtype unknown, a scale beyond its type.

    Examples
    --------
    >>> record = rtn(np.array([[-1.0, 0.0, 0.6, 2.0]]), bits=2, group_size=-1)
    >>> record.dense().tolist()
    [[-1.0, 0.0, 1.0, 2.0]]
    """
    grid = (SymmetricGrid if symmetric else AffineGrid)(bits, group_size, scale_dtype)
    scale, zero_point = grid.fit(W)
    return IntWeight.pack(grid, grid.encode(W, scale, zero_point), scale, zero_point)
