"""static: round the inputs of a packed weight with one scale for all tokens, found in calibration and stored.

    symmetric    s = amax / (2^(b-1) - 1)          q = clip(rint(x / s), -(2^(b-1) - 1), 2^(b-1) - 1)
    affine       s = (hi - lo) / (2^b - 1)         q = clip(rint(x / s) + z, 0, 2^b - 1)        z = rint(-lo / s)

    Y = s s_o (q_x q_w^T - z sum_k q_w)

At run time nothing is measured: no pass over the inputs for their maximum, no scale per token. The price is that the
scale is the same for a quiet token and a loud one, and that what calibration has not seen saturates. amax, or lo and
hi, of the calibration inputs are

    max           the extremes themselves
    percentile    the given percentile of |x|, or of x from both sides: rare extremes saturate, the rest is finer
    average       the extremes of each batch of 512 tokens, averaged as m <- momentum m + (1 - momentum) extreme

The stage follows one that packs: `rtn:bits=8,symmetric=true,group=-1+static`. Codes on a grid multiply in whole
numbers; any other record meets the rounded inputs as floats.

Paper: Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, section 2 (static and dynamic, O3); the moving average: Jacob et al. 2018, "Quantization and Training
of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3.1.
Differs from them: inputs that are all zero take the scale of an amax of 1; a token that holds NaN or Inf gives NaN.
Stage: prefill
Inventory: 7, 9
Lesson: lessons/12-outliers.md
Golden: finish/static
Baseline: none, dynamic rounding costs time for what this one lacks
"""

import numpy as np

from refllm.kernels.packed.activations import Rounding
from refllm.kernels.packed.inputs import StaticInputs
from refllm.kernels.packed.records import Record
from refllm.kernels.stats import Stats

BATCH = 512
OBSERVERS = ("max", "percentile", "average")


def static(
    record: Record,
    W: np.ndarray,
    stats: Stats,
    *,
    bits: int = 8,
    symmetric: bool = True,
    observer: str = "max",
    percentile: float = 99.99,
    momentum: float = 0.9,
) -> StaticInputs:
    """Inputs rounded with a stored scale.

    Parameters
    ----------
    record : packed record whose inputs are not rounded yet
    W : ignored
        Part of every finishing stage's call.
    stats : Stats
        Calibration inputs.
    bits : int
        2 to 8.
    symmetric : bool
        False: a zero point, for inputs that lean to one side.
    observer : str
        max, percentile or average.
    percentile : float
        Above 50, at most 100.
    momentum : float
        In [0, 1): how much of the average each further batch leaves.

    Returns
    -------
    StaticInputs

    Raises
    ------
    ValueError
        Inputs of another width, a knob out of range, a record whose inputs are already rounded.

    Examples
    --------
    >>> from refllm.kernels.packed.sparse import Plain
    >>> record = static(Plain(np.ones((1, 2), np.float32)), None, Stats(np.array([[1.0, -2.0], [0.5, 0.0]])))
    >>> round(record.scale.item() * 127, 6)
    2.0
    """
    Rounding(bits)
    if stats.X.shape[1] != record.shape[1]:
        raise ValueError(f"calibration inputs have {stats.X.shape[1]} columns, the weight has {record.shape[1]}")
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, got {observer!r}")
    if not 50 < percentile <= 100 or not 0 <= momentum < 1:
        raise ValueError(
            f"percentile must lie above 50 and not above 100, momentum in [0, 1), got {percentile} and {momentum}"
        )
    X = np.abs(stats.X) if symmetric else stats.X
    lo, hi = (0.0, _high(X, observer, percentile, momentum))
    if symmetric:
        scale, zero_point = (hi or 1.0) / ((1 << (bits - 1)) - 1), None
    else:
        lo, hi = min(0.0, -_high(-X, observer, percentile, momentum)), max(0.0, hi)
        scale = (hi - lo or 1.0) / ((1 << bits) - 1)
    stored = np.maximum(np.float32(scale), np.finfo(np.float32).smallest_subnormal).reshape(1, 1)
    if not symmetric:
        zero_point = np.clip(np.rint(np.float32(-lo) / stored), 0, (1 << bits) - 1).astype(np.uint8)
    return StaticInputs(record, stored, zero_point, bits)


def _high(X: np.ndarray, observer: str, percentile: float, momentum: float) -> float:
    """The upper end of the range, float64."""
    if observer == "percentile":
        return float(np.percentile(X.astype(np.float64), percentile))
    if observer == "max":
        return float(X.max())
    high, *later = (float(X[start : start + BATCH].max()) for start in range(0, len(X), BATCH))
    for extreme in later:
        high = momentum * high + (1 - momentum) * extreme
    return high
