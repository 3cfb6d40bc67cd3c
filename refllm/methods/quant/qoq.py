"""qoq: round rows to int8, and groups of that int8 to 4 bits with whole numbers as scales: weights of QServe (W4A8).

    level 1, a row      s0 = amax / 119 (float16)                      q0 = clip(rint(w / s0), -119, 119)
    level 2, a group    s1 = max(1, rint((hi - lo) / 15))              q  = clip(rint(q0 / s1 + z1), 0, 15)
                        z1 = clip(rint(-lo / s1), 0, 15)               lo = min(q0, 0), hi = max(q0, 0)
    decoded             q s1 - z1 s1, an int8; then times s0

An int8 product needs int8 weights; with a float scale a group every product would have to be converted in the middle.
Here the inner scales are integers of 1 to 16, and what they give fits into a byte: 119, not 127, because rounding s1
and z1 may carry the decoded extremes outwards, from 120 to -128 already (`test_qoq.py` tries every pair). Codes are
multiplied first and z1 s1 subtracted then, so that four can be done at once in a 32-bit register.

`smoothattention+qoq+dynamic:bits=8+kivi:bits=4` is near to QServe's W4A8KV4. Products run on the integer kernels of
`IntWeight` with the exact float scale s0 s1, or on their NumPy text: the same whole numbers meet.

Paper: Lin et al. 2024, "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", arXiv:2405.04532,
section 4.1.
Differs from it: round to nearest (their recipe rotates and smooths block inputs, orders channels and walks like GPTQ);
s1 is stored less 1 in 4 bits; the packing for tensor cores is left out.
Stage: prefill, decode, memory
Inventory: 13
Lesson: lessons/13-rotations.md
Golden: quant/qoq
Baseline: none, it is rtn with two levels of scales and has an error 1% larger for arithmetic in integers
"""

import numpy as np

from refllm.kernels.grids import PER_TENSOR, group_count
from refllm.kernels.packed.base import as_float
from refllm.kernels.packed.two_level import TwoLevel
from refllm.kernels.stats import Stats

PROTECTED = 119  # the largest p for which every group within [-p, p] decodes to [-127, 127]
MOST = 15  # code of 4 bits
_SMALLEST = np.float16(2.0**-24)


def qoq(W: np.ndarray, stats: Stats | None = None, *, group_size: int = 128) -> TwoLevel:
    """Progressive group quantization.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    group_size : int
        g > 0: g consecutive columns share an integer scale, g must divide `in`; -1: a row.

    Returns
    -------
    TwoLevel

    Raises
    ------
    ValueError
        NaN or Inf in W, a group_size that does not divide `in` or is 0, a scale beyond float16.

    Examples
    --------
    >>> record = qoq(np.array([[-119.0, 0.0, 1.0, 119.0]]), group_size=2)
    >>> record.levels()[0].tolist(), record.dense().tolist()
    ([[8, 8]], [[-120.0, 0.0, 0.0, 120.0]])
    """
    if group_size == PER_TENSOR:
        raise ValueError("group_size must be positive or -1 (a row), got 0: every row has a scale of its own")
    out, columns = W.shape
    groups = group_count(columns, group_size)
    if not np.isfinite(W).all():
        raise ValueError(f"the weight holds NaN or Inf (shape {W.shape})")
    scale = as_float(np.abs(W).max(axis=1, keepdims=True) / W.dtype.type(PROTECTED), "float16")
    scale = np.maximum(scale, _SMALLEST)
    q0 = np.clip(np.rint(W / scale.astype(W.dtype)), -PROTECTED, PROTECTED).astype(np.int64)
    q0 = q0.reshape(out, groups, -1)
    level, zero = second_level(np.minimum(q0.min(axis=2), 0), np.maximum(q0.max(axis=2), 0))
    codes = np.clip(np.rint(q0 / level[..., None] + zero[..., None]), 0, MOST)
    return TwoLevel.pack(codes.reshape(out, columns), level, zero, scale, group_size)


def second_level(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integer scale and zero point of groups that reach from low <= 0 to high >= 0 (integers): s1, z1, int64."""
    level = np.maximum(np.rint((high - low) / MOST), 1).astype(np.int64)
    return level, np.clip(np.rint(-low / level), 0, MOST).astype(np.int64)
