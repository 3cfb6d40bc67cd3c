"""Products with inputs that are rounded outside the kernels: steps . codes in integers, then the scales.

    x^ = s_x (q_x - z_x)        y = x^ W^T = s_x (P(q_x) - z_x P(1))        P(q) = q W^T

P adds up in integers inside each group of codes (`codes_times` of reference.py and fast.py), so no sum is rounded
before it meets a scale. The zero point costs the product of one more token whose codes are all 1: the row sums.
"""

from types import ModuleType

import numpy as np

from refllm.kernels.packed.activations import Rounding
from refllm.kernels.packed.codes import Reordered
from refllm.kernels.packed.inputs import OutlierInputs, RoundedInputs
from refllm.kernels.packed.sparse import LowRank, Sum


def matmul_inputs(x: np.ndarray, record: RoundedInputs, text: ModuleType) -> np.ndarray:
    """x^ W^T with the inputs as the record rounds them.

    Parameters
    ----------
    x : (tokens, in) float32 or float64
    record : RoundedInputs
    text : module
        reference or fast.

    Returns
    -------
    (tokens, out) of the type of x
    """
    single = x.astype(np.float32)
    y = _scaled(*record.steps(single), record.weight, text)
    if isinstance(record, OutlierInputs):
        if (exact := record.outliers(single)).any():
            y += text.matmul_float(np.where(exact, single, np.float32(0)), record.weight)
        if record.columns is not None:
            y += single[:, record.columns] @ record.kept.T.astype(np.float32)
    return y.astype(x.dtype)


def matmul_tokens(x: np.ndarray, weight, how: Rounding, text: ModuleType) -> np.ndarray:
    """x^ W^T with every token rounded as `how` says; the rest as in matmul_inputs."""
    return _scaled(*how.steps(x.astype(np.float32)), weight, text).astype(x.dtype)


def _scaled(steps, scale, zero, weight, text: ModuleType) -> np.ndarray:
    if zero is None:
        y = times(steps, weight, text)
    else:
        y = times(np.concatenate([steps, np.ones((1, steps.shape[1]), steps.dtype)]), weight, text)
        y = y[:-1] - zero * y[-1]
    with np.errstate(invalid="ignore"):
        return y * scale


def times(steps: np.ndarray, weight, text: ModuleType) -> np.ndarray:
    """P(steps) for any weight, float32 (tokens, out); parts of a sum and factors one by one."""
    if isinstance(weight, np.ndarray):
        return steps.astype(np.float32) @ weight.T
    if isinstance(weight, Sum):
        first, second = weight.terms
        return times(steps, first, text) + times(steps, second, text)
    if isinstance(weight, Reordered):
        return times(steps[:, weight.order], weight.weight, text)
    if isinstance(weight, LowRank):
        A, B = weight.factors
        return times(times(steps, B, text), A, text)
    if steps.dtype == np.int8:
        return text.codes_times(steps, weight)
    return text.matmul_float(steps, weight)
