"""llm_int8: 8-bit products for all inputs but the few columns that hold an outlier.

    c_o = max |W[o]|                  q_w = rint(W 127 / c_o)                       once, row by row
    O   = {k : some token has |x_k| >= 6}                                           in every product anew
    a_t = max over entries below 6 of |x_t|        q_x = rint(x 127 / a_t), 0 in the columns O
    Y   = (q_x q_w^T) a_t c_o / 127^2  +  X[:, O] (q_w[:, O] c_o / 127)^T

An outlier is taken out before the maximum of its token, so it does not cost the others their precision; where one token
has an outlier, the whole column goes the exact way. In the models it was made for that are 0.1 % of the columns. The
weights stay in 8 bits either way: those of outlier columns are decoded when they are needed. Nothing is calibrated.

`keep_columns=true` calibrates after all: columns that reach the threshold there are never rounded, keep their weights
as float16 beside the codes, and do not count in c_o.

Paper: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339,
section 3; the order of operations is that of bitsandbytes on the CPU: 127 (1 / a), each step rounded to float32.
Differs from bitsandbytes: inputs are not rounded to float16 first; 1/127^2 is exact where bitsandbytes takes
6.200124e-5; a row of zeros has c_o = 1; keep_columns (there, weights kept as float16 are kept whole).
Stage: memory, prefill
Inventory: 25
Lesson: lessons/12-outliers.md
Golden: quant/llm_int8
Baseline: none, rtn leaves the inputs alone
"""

import numpy as np

from refllm.kernels.grids import PER_CHANNEL, SymmetricGrid
from refllm.kernels.packed.inputs import OutlierInputs, vector_wise
from refllm.kernels.packed.records import IntWeight, as_float
from refllm.kernels.stats import Stats

GRID = SymmetricGrid(8, PER_CHANNEL, "float32")


def llm_int8(
    W: np.ndarray, stats: Stats | None = None, *, threshold: float = 6.0, keep_columns: bool = False
) -> OutlierInputs:
    """Weights in 8 bits, inputs in 8 bits but for outliers.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : Stats, optional
        Calibration inputs; looked at for keep_columns only.
    threshold : float
        Magnitude from which on an input is an outlier; 0: none is.
    keep_columns : bool
        Float16 weights for the columns that reach the threshold in calibration.

    Returns
    -------
    OutlierInputs

    Raises
    ------
    ValueError
        NaN or Inf in W, a negative or undefined threshold, keep_columns without calibration.

    Examples
    --------
    >>> record = llm_int8(np.array([[1.0, -0.5, 0.25]]))
    >>> (record.weight.unpacked().astype(int) - 128).tolist()
    [[127, -64, 32]]
    """
    W = np.asarray(W)
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold}")
    GRID.fit(W)  # refuses what is no finite matrix
    columns = kept = None
    if keep_columns:
        if stats is None:
            raise ValueError("keep_columns needs calibration inputs, to know which columns hold outliers")
        if stats.X.shape[1] != W.shape[1]:
            raise ValueError(f"calibration inputs have {stats.X.shape[1]} columns, the weight has {W.shape[1]}")
        found = np.flatnonzero(stats.absmax >= threshold) if threshold > 0 else np.arange(0)
        if len(found):
            columns, kept = found.astype(np.int32), as_float(W[:, found], "float16")
            W = W.copy()
            W[:, found] = 0
    codes, amax = vector_wise(W.astype(np.float32))
    scale = np.where(amax > 0, amax, np.float32(1)) / np.float32(127)
    weight = IntWeight.pack(GRID, (codes.astype(np.int16) + GRID.offset).astype(np.uint8), scale, None)
    return OutlierInputs(weight, columns, kept, float(threshold))
