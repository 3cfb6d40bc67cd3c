"""AutoAWQ checkpoints, `version: gemm`: 4 bits, packed along `out` in the order 0 2 4 6 1 3 5 7.

Units run along `out` for codes and zero points; the matrices are stored transposed, [in, out].

    qweight  I32 [in, out / 8]       word c of row i: outputs 8 c ... 8 c + 7 of input i
    qzeros   I32 [groups, out / 8]   zero points as they are, in the same order
    scales   F16 [groups, out]

    w[o, i] = scale[o, i // group_size] (q[o, i] - zero_point[o, i // group_size])

Nibble n of a word, counted from the low end, holds output 8 c + (0 2 4 6 1 3 5 7)[n]. The order lets a GPU kernel turn
a word into four pairs of float16 with one shift and one mask per pair. Source: AutoAWQ's WQLinear_GEMM.
"""

import numpy as np

from refllm.formats.checkpoints.base import (
    Grouped,
    as_scale,
    check_codes,
    check_groups,
    check_multiple,
    dequantize,
    group_index,
    pack_axis,
    stored,
    unpack_axis,
)
from refllm.formats.checkpoints.describe import Stored, Tensor
from refllm.formats.layouts import Layout, codes

AWQ_WORD = Layout(
    "AWQ word", 4, 8, (codes("q", 8, 4, "(i % 2 * 4 + i // 2) // 2", "(i % 2 * 4 + i // 2) % 2 * 4", "codes"),)
)
STORED = (
    Stored(
        "awq",
        "gemm, 4 bits",
        "scales[i // group_size, o] * (qweight[i, o] - qzeros[i // group_size, o])",
        "as it is",
        (
            Tensor("qweight", "codes", AWQ_WORD, "out", ("in", "out / 8"), "I32", "transposed: [in, out]"),
            Tensor("qzeros", "zero points", AWQ_WORD, "out", ("groups", "out / 8"), "I32"),
            Tensor("scales", "scales", None, "", ("groups", "out"), "F16"),
        ),
        "AutoAWQ",
    ),
)


def awq_pack(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Codes, scales and zero points -> the tensors of an AWQ (GEMM) checkpoint.

    Parameters
    ----------
    codes : (out, in) integers, 0..15
        out must be a multiple of 8.
    scale : (out, groups) float
        Rounded to float16; the groups must divide the columns.
    zero_point : (out, groups) integers 0..15, optional
        None: 8.

    Returns
    -------
    dict of qweight, qzeros, scales

    Raises
    ------
    ValueError
        Wrong shapes or ranges.

    Examples
    --------
    >>> column = np.arange(8).reshape(8, 1)
    >>> hex(awq_pack(column, np.ones((8, 1), np.float16))["qweight"][0, 0])
    '0x75316420'
    """
    codes = check_codes(codes, 4)
    scale, zero_point = check_groups(codes, scale, zero_point, 4)
    check_multiple("out", len(codes), 8, "codes fill whole words along it")
    group_index(codes.shape[1], scale.shape[1])
    zero_point = np.full(scale.shape, 8, np.uint8) if zero_point is None else zero_point
    return {
        "qweight": pack_axis(codes.T, AWQ_WORD, 1, "i4"),
        "qzeros": pack_axis(zero_point.T, AWQ_WORD, 1, "i4"),
        "scales": as_scale(scale.T, "f2"),
    }


def awq_unpack(tensors: dict[str, np.ndarray]) -> Grouped:
    """The tensors of an AWQ (GEMM) checkpoint -> codes, scales, zero points.

    Parameters
    ----------
    tensors : dict of qweight, qzeros, scales

    Returns
    -------
    Grouped
        scale keeps its dtype, float16 or float32.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype.
    """
    scales = stored(tensors, "scales", ("float16", "float32"), 2)
    groups, out = scales.shape
    qweight = stored(tensors, "qweight", ("int32", "uint32"), 2)
    qzeros = stored(tensors, "qzeros", ("int32", "uint32"), 2)
    columns = len(qweight)
    if qweight.shape != (columns, out // 8) or qzeros.shape != (groups, out // 8) or out % 8:
        shapes = f"qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.shape}"
        raise ValueError(f"AWQ stores [in, out / 8], [groups, out / 8] and [groups, out], got {shapes}")
    group_index(columns, groups)
    arrays = unpack_axis(qweight, AWQ_WORD, 1, out).T, scales.T, unpack_axis(qzeros, AWQ_WORD, 1, out).T
    return Grouped(*map(np.ascontiguousarray, arrays))


def awq_dequantize(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The tensors of an AWQ (GEMM) checkpoint -> the weight, (out, in) float32."""
    return dequantize(awq_unpack(tensors), 4)
