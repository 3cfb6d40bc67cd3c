"""Report: what compressing one weight cost, computed from what is stored and never claimed by a method.

The record itself (the packed arrays) is a dataclass of `refllm.kernels.packed.records`: what is stored is what is run.
"""

from dataclasses import dataclass

import numpy as np

from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import RoundedInputs
from refllm.kernels.packed.rotated import Rotated
from refllm.kernels.stats import Stats


@dataclass(frozen=True)
class Report:
    """One compressed weight.

    Parameters
    ----------
    name : str
    shape : (out, in)
    nbytes : int
        Bytes of every stored array: codes, scales, zero points, indices.
    bits_per_weight : float
        8 nbytes / (out * in).
    weight_error : float
        ||W - W'||^2 / ||W||^2, Frobenius.
    output_error : float or None
        ||X (W - W')^T||^2 / ||X W^T||^2 on the calibration inputs X, rounded where the record says that its inputs
        are; None without calibration.
    """

    name: str
    shape: tuple[int, int]
    nbytes: int
    bits_per_weight: float
    weight_error: float
    output_error: float | None


def report(name: str, W: np.ndarray, record, stats: Stats | None = None) -> Report:
    """Measure a packed record against the weight it replaces.

    Parameters
    ----------
    W : (out, in) float
    record : packed record
    stats : Stats, optional
        Calibration inputs of this weight.
    """
    error = W.astype(np.float64) - record.dense()
    output_error = None
    if stats is not None:
        changed = _output_energy(error, stats)
        if isinstance(record.weight if isinstance(record, Rotated) else record, RoundedInputs):
            changed = np.sum((stats.X @ W.T - matmul(stats.X, record)).astype(np.float64) ** 2)
        output_error = _ratio(changed, _output_energy(W.astype(np.float64), stats))
    return Report(
        name,
        W.shape,
        record.nbytes,
        8 * record.nbytes / W.size,
        _ratio(np.sum(error**2), np.sum(W.astype(np.float64) ** 2)),
        output_error,
    )


def _output_energy(W: np.ndarray, stats: Stats) -> float:
    if "H" in vars(stats):  # a method has asked for it: far fewer products than tokens times inputs
        return max(0.0, float(np.sum((W @ stats.H) * W)))
    return np.sum((stats.X @ W.T.astype(stats.X.dtype)).astype(np.float64) ** 2)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("inf" if part else 0)
