"""AutoAWQ checkpoints, `version: gemv`: 4 bits, packed along `in` in plain order, scales padded to whole words.

Units run along `in` for codes and along the groups for zero points; nothing is transposed.

    qweight  I32 [out, in / 8]      word c of row o: inputs 8 c ... 8 c + 7 of output o, low nibble first
    qzeros   I32 [out, width]       zero points as they are, in the same order; padded with 0
    scales   F16 [out, 8 width]     padded with 0

    w[o, i] = scale[o, i // group_size] (q[o, i] - zero_point[o, i // group_size])

width = ceil(ceil(groups / 8) / m) m words, m = 1 for groups of 128 and more, 2 for 64, 4 for 32; there are no other
sizes. Source: AutoAWQ's WQLinear_GEMV. Its `gemv_fast` is a third layout and is not read.
"""

import numpy as np

from refllm.formats.checkpoints.base import (
    Grouped,
    as_scale,
    check_codes,
    check_groups,
    check_multiple,
    dense_words,
    dequantize,
    group_index,
    pack_axis,
    stored,
    unpack_axis,
)
from refllm.formats.checkpoints.describe import Stored, Tensor

WORD = dense_words(4)
STORED = (
    Stored(
        "awq",
        "gemv, 4 bits",
        "scales[o, i // group_size] * (qweight[o, i] - qzeros[o, i // group_size])",
        "as it is",
        (
            Tensor("qweight", "codes", WORD, "in", ("out", "in / 8"), "I32", "`gemv_fast` differs and is not read"),
            Tensor("qzeros", "zero points", WORD, "groups", ("out", "width"), "I32", "padded with 0"),
            Tensor(
                "scales", "scales", None, "", ("out", "8 * width"), "F16",
                "padded with 0; width = ceil(ceil(groups / 8) / m) m, m = 1, 2, 4 for groups of 128 and more, 64, 32",
            ),
        ),
        "AutoAWQ",
    ),
)  # fmt: skip


def awq_gemv_pack(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Codes, scales and zero points -> the tensors of an AWQ (GEMV) checkpoint.

    Parameters
    ----------
    codes : (out, in) integers, 0..15
        out and in must be multiples of 8.
    scale : (out, groups) float
        Rounded to float16; groups of 32, 64, or 128 and more columns.
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
    >>> row = np.arange(32).reshape(1, 32) % 16
    >>> tensors = awq_gemv_pack(np.repeat(row, 8, axis=0), np.ones((8, 1), np.float16))
    >>> hex(tensors["qweight"][0, 0]), tensors["qzeros"].shape, tensors["scales"].shape
    ('0x76543210', (8, 4), (8, 32))
    """
    codes = check_codes(codes, 4)
    scale, zero_point = check_groups(codes, scale, zero_point, 4)
    (out, columns), groups = codes.shape, scale.shape[1]
    check_multiple("out", out, 8, "AutoAWQ asks for it")
    check_multiple("in", columns, 8, "codes fill whole words along it")
    group_index(columns, groups)
    padding = (0, 0), (0, 8 * _width(groups, columns // groups) - groups)
    zero_point = np.full(scale.shape, 8, np.uint8) if zero_point is None else zero_point
    return {
        "qweight": pack_axis(codes, WORD, 1, "i4"),
        "qzeros": pack_axis(np.pad(zero_point, padding), WORD, 1, "i4"),
        "scales": as_scale(np.pad(scale, padding), "f2"),
    }


def awq_gemv_unpack(tensors: dict[str, np.ndarray], group_size: int) -> Grouped:
    """The tensors of an AWQ (GEMV) checkpoint -> codes, scales, zero points.

    Parameters
    ----------
    tensors : dict of qweight, qzeros, scales
    group_size : int
        Columns of a group, or -1: one group a row. The padding hides how many there are.

    Returns
    -------
    Grouped
        scale keeps its dtype, float16 or float32.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype; a group size that does not fit.
    """
    scales = stored(tensors, "scales", ("float16", "float32"), 2)
    qweight, qzeros = (stored(tensors, name, ("int32", "uint32"), 2) for name in ("qweight", "qzeros"))
    out, columns = qweight.shape[0], 8 * qweight.shape[1]
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size or not columns:
        raise ValueError(f"groups of {group_size} columns do not divide {columns}")
    groups = columns // size
    width = _width(groups, size)
    if qzeros.shape != (out, width) or scales.shape != (out, 8 * width):
        shapes = f"qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.shape}"
        raise ValueError(f"AWQ (gemv) stores [out, in / 8], [out, {width}] and [out, {8 * width}], got {shapes}")
    zero_point = unpack_axis(qzeros, WORD, 1, 8 * width)[:, :groups]
    arrays = unpack_axis(qweight, WORD, 1, columns), scales[:, :groups], zero_point
    return Grouped(*map(np.ascontiguousarray, arrays))


def awq_gemv_dequantize(tensors: dict[str, np.ndarray], group_size: int) -> np.ndarray:
    """The tensors of an AWQ (GEMV) checkpoint -> the weight, (out, in) float32."""
    return dequantize(awq_gemv_unpack(tensors, group_size), 4)


def _width(groups: int, size: int) -> int:
    """Words of zero points in a row, with those that pad."""
    unit = 1 if size >= 128 else {64: 2, 32: 4}.get(size)
    if unit is None:
        raise ValueError(f"AWQ (gemv) has groups of 32, 64, or 128 and more columns, got {size}")
    return -(-groups // (8 * unit)) * unit
