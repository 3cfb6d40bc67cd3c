"""GPTQ checkpoints: 2, 3, 4 and 8 bits, both conventions of the zero point, any order of columns.

Units run along `in` for the codes and along `out` for the zero points; the matrices are stored transposed, [in, out].

    qweight  I32 [in bits / 32, out]       word r of column o: inputs 32 r / bits ... of output o, low bits first
    qzeros   I32 [groups, out bits / 32]   "gptq" (v1): zero point - 1; "gptq_v2": as it is
    scales   F16 [groups, out]
    g_idx    I32 [in]                      the group of each input; not sorted after act-order

    w[o, i] = scale[o, g_idx[i]] (q[o, i] - zero_point[o, g_idx[i]])

Source: AutoGPTQ and GPTQModel (`checkpoint_format`). Three-bit codes are one bit stream over three words.
"""

import numpy as np

from refllm.formats.checkpoints.base import (
    Grouped,
    as_scale,
    check_codes,
    check_g_idx,
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

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
_FULL = ("error", "zero", "plus_one")


def _description(bits: int) -> Stored:
    words = dense_words(bits)
    return Stored(
        "gptq",
        f"{bits} bits",
        "scales[g_idx[i], o] * (qweight[i, o] - zero_point[g_idx[i], o])",
        "gptq (v1): qzeros hold the zero point minus 1; gptq_v2: the zero point",
        (
            Tensor("qweight", "codes", words, "in", (f"in * {bits} / 32", "out"), "I32", "transposed: [in, out]"),
            Tensor("qzeros", "zero points", words, "out", ("groups", f"out * {bits} / 32"), "I32"),
            Tensor("scales", "scales", None, "", ("groups", "out"), "F16"),
            Tensor("g_idx", "group of each input", None, "", ("in",), "I32", "i // group_size unless act-order"),
        ),
        "AutoGPTQ, GPTQModel",
    )


STORED = tuple(map(_description, BITS))


def gptq_pack(
    codes: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None = None,
    *,
    bits: int = 4,
    g_idx: np.ndarray | None = None,
    checkpoint_format: str = "gptq",
) -> dict[str, np.ndarray]:
    """Codes, scales and zero points -> the tensors of a GPTQ checkpoint.

    Parameters
    ----------
    codes : (out, in) integers, 0 .. 2^bits - 1
        Both sizes must fill whole words: multiples of 32 / bits, of 32 for 3 bits.
    scale : (out, groups) float
        Rounded to float16.
    zero_point : (out, groups) integers, optional
        None: 2^(bits-1), the symmetric grid.
    bits : int
        2, 3, 4 or 8.
    g_idx : (in,) integers, optional
        The group of each column; None: consecutive columns in groups of in / groups.
    checkpoint_format : str
        "gptq" stores the zero point minus 1, "gptq_v2" as it is.

    Returns
    -------
    dict of qweight, qzeros, scales, g_idx

    Raises
    ------
    ValueError
        Wrong shapes or ranges; a zero point 0 in the format "gptq", which would have to be stored as -1.

    Examples
    --------
    >>> one = np.ones((8, 1), np.float16)
    >>> tensors = gptq_pack(np.tile(np.arange(8), (8, 1)), one)
    >>> hex(tensors["qweight"][0, 0]), hex(tensors["qzeros"][0, 0])
    ('0x76543210', '0x77777777')
    """
    _check_options(bits, checkpoint_format)
    codes = check_codes(codes, bits)
    scale, zero_point = check_groups(codes, scale, zero_point, bits)
    (out, columns), groups, words = codes.shape, scale.shape[1], dense_words(bits)
    _check_sizes(out, columns, bits)
    g_idx = group_index(columns, groups) if g_idx is None else check_g_idx(g_idx, columns, groups)
    zero_point = np.full(scale.shape, 1 << (bits - 1), np.uint8) if zero_point is None else zero_point
    if checkpoint_format == "gptq":
        if (zero_point == 0).any():
            at = tuple(map(int, np.argwhere(zero_point == 0)[0]))
            raise ValueError(
                f"zero_point{list(at)} is 0, which the format 'gptq' cannot store (it stores zero_point - 1); "
                "use checkpoint_format='gptq_v2'"
            )
        zero_point = zero_point - np.uint8(1)
    return {
        "qweight": pack_axis(codes.T, words, 0, "i4"),
        "qzeros": pack_axis(zero_point.T, words, 1, "i4"),
        "scales": as_scale(scale.T, "f2"),
        "g_idx": g_idx,
    }


def gptq_unpack(
    tensors: dict[str, np.ndarray], *, bits: int = 4, checkpoint_format: str = "gptq", full_zero: str = "error"
) -> Grouped:
    """The tensors of a GPTQ checkpoint -> codes, scales, zero points.

    Parameters
    ----------
    tensors : dict
        qweight, qzeros, scales; g_idx may be missing where the groups divide the columns.
    bits, checkpoint_format
        As in `gptq_pack`. A checkpoint may say "gptq" and hold zero points as they are: nothing in the file tells.
    full_zero : str
        What 2^bits - 1 in qzeros means in the format "gptq", where programs differ: "zero" = the zero point 0 that a
        writer wrapped around, "plus_one" = 2^bits, "error".

    Returns
    -------
    Grouped
        g_idx is always given. scale keeps its dtype, float16 or float32.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype; a zero point that the format cannot mean.
    """
    _check_options(bits, checkpoint_format)
    if full_zero not in _FULL:
        raise ValueError(f"full_zero must be one of {', '.join(_FULL)}, got {full_zero!r}")
    words = dense_words(bits)
    scales = stored(tensors, "scales", ("float16", "float32"), 2)
    groups, out = scales.shape
    qweight = stored(tensors, "qweight", ("int32", "uint32"), 2)
    columns = len(qweight) * 32 // bits
    _check_sizes(out, columns, bits)
    if qweight.shape[1] != out:
        raise ValueError(f"qweight {qweight.shape} and scales {scales.shape} differ in their outputs")
    qzeros = stored(tensors, "qzeros", ("int32", "uint32"), 2)
    if qzeros.shape != (groups, out * bits // 32):
        raise ValueError(f"qzeros must have the shape {(groups, out * bits // 32)}, got {qzeros.shape}")
    if tensors.get("g_idx") is None:
        g_idx = group_index(columns, groups)
    else:
        g_idx = check_g_idx(stored(tensors, "g_idx", ("int32", "int64"), 1), columns, groups)
    zero_point = unpack_axis(qzeros, words, 1, out).T
    if checkpoint_format == "gptq":
        zero_point = _plus_one(zero_point, bits, full_zero)
    codes = unpack_axis(qweight, words, 0, columns).T
    return Grouped(*map(np.ascontiguousarray, (codes, scales.T, zero_point, g_idx)))


def gptq_dequantize(
    tensors: dict[str, np.ndarray], *, bits: int = 4, checkpoint_format: str = "gptq", full_zero: str = "error"
) -> np.ndarray:
    """The tensors of a GPTQ checkpoint -> the weight, (out, in) float32. Arguments as in `gptq_unpack`."""
    return dequantize(gptq_unpack(tensors, bits=bits, checkpoint_format=checkpoint_format, full_zero=full_zero), bits)


def _plus_one(stored_zero: np.ndarray, bits: int, full_zero: str) -> np.ndarray:
    top = (1 << bits) - 1
    if full_zero == "plus_one" and bits == 8:
        return stored_zero.astype(np.uint16) + np.uint16(1)  # 256 is no uint8
    if full_zero == "error" and (stored_zero == top).any():
        raise ValueError(
            f"qzeros hold {top}, which 'gptq' cannot mean: it stores the zero point minus 1. Either the file is "
            "'gptq_v2', or a zero point 0 wrapped around (full_zero='zero')"
        )
    if full_zero == "zero":
        return (stored_zero + np.uint8(1)) & np.uint8(top)
    return stored_zero + np.uint8(1)


def _check_options(bits: int, checkpoint_format: str) -> None:
    if bits not in BITS:
        raise ValueError(f"GPTQ checkpoints have 2, 3, 4 or 8 bits, got {bits}")
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format must be 'gptq' or 'gptq_v2', got {checkpoint_format!r}")


def _check_sizes(out: int, columns: int, bits: int) -> None:
    unit = dense_words(bits).elements
    check_multiple("in", columns, unit, "codes fill whole words along it")
    check_multiple("out", out, unit, "zero points fill whole words along it")
