"""compressed-tensors checkpoints with integer codes: pack-quantized, int-quantized and naive-quantized.

Units run along `in` for the codes and along `out` for the zero points; nothing is transposed.

    pack-quantized   weight_packed      I32 [out, ceil(in bits / 32)]
                     weight_shape       I64 [2]                            (out, in): the width does not tell it
                     weight_scale       [out, groups]
                     weight_zero_point  I32 [ceil(out bits / 32), groups]  only if not symmetric
                     weight_g_idx       I32 [in]                           only after act-order
    int-quantized,   weight             I8 [out, in]
    naive-quantized  weight_scale       [out, groups]
                     weight_zero_point  I8 [out, groups]

The software thinks of codes as signed, -2^(bits-1) .. 2^(bits-1) - 1; int-quantized stores them so, pack-quantized with
2^(bits-1) added. Here codes and zero points are 0 .. 2^bits - 1 in both, so that a symmetric grid has 2^(bits-1).
Strategy "tensor" has one scale, and one zero point that is a signed I8 in all formats; model/quantized reads it.

    w[o, i] = weight_scale[o, g] (q[o, i] - zero_point[o, g])

Source: compressed-tensors (vLLM, llm-compressor), compressors/. Codes are one bit stream a row since the version that
packs all of 1..8 bits densely; before, a word held 32 // bits codes and the rest of it was empty (`words="padded"`).
The two differ for 3, 5, 6 and 7 bits. The formats with float codes are in compressed_floats.py.
"""

import numpy as np

from refllm.formats.checkpoints.base import (
    Grouped,
    check_codes,
    check_g_idx,
    check_groups,
    dense_words,
    dequantize,
    group_index,
    pack_axis,
    stored,
    unpack_axis,
    word_count,
)
from refllm.formats.checkpoints.describe import Stored, Tensor
from refllm.formats.layouts import Layout, stream

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_SCALES = ("float16", "float32")


def padded_words(bits: int) -> Layout:
    """A 32-bit word with 32 // bits codes, low bits first, and empty high bits where bits does not divide 32."""
    count = 32 // bits
    return Layout(f"{count} {bits}-bit codes in a word", 4, count, (stream("q", count, bits),))


_WEIGHT = "weight_scale[o, g] * (weight[o, i] - zero_point[o, g])"
_SCALE = Tensor("weight_scale", "scales", None, "", ("out", "groups"), "scale", "one group: [out, 1]")
_G_IDX = Tensor("weight_g_idx", "group of each input", None, "", ("in",), "I32", "only after act-order")


def _packed(bits: int) -> Stored:
    words = dense_words(bits)
    return Stored(
        "pack-quantized",
        f"{bits} bits",
        _WEIGHT,
        f"stored with {1 << (bits - 1)} added, like the codes; absent: symmetric",
        (
            Tensor("weight_packed", "codes", words, "in", ("out", f"ceil(in * {bits} / 32)"), "I32"),
            Tensor("weight_shape", "out and in", None, "", ("2",), "I64"),
            _SCALE,
            Tensor(
                "weight_zero_point",
                "zero points",
                words,
                "out",
                (f"ceil(out * {bits} / 32)", "groups"),
                "I32",
                "only if not symmetric; packed along out, unlike the codes; strategy tensor: one signed I8",
            ),
            _G_IDX,
        ),
        "compressed-tensors",
    )


STORED = (
    *map(_packed, range(1, 9)),
    Stored(
        "int-quantized",
        "up to 8 bits",
        _WEIGHT,
        "signed, as it is; absent: symmetric, 0",
        (
            Tensor("weight", "signed codes", None, "", ("out", "in"), "I8"),
            _SCALE,
            Tensor("weight_zero_point", "signed zero points", None, "", ("out", "groups"), "I8"),
            _G_IDX,
        ),
        "compressed-tensors; naive-quantized is the same",
    ),
)


def compressed_tensors_pack(
    codes: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None = None,
    *,
    bits: int = 4,
    format: str = "pack-quantized",
    g_idx: np.ndarray | None = None,
    words: str = "dense",
) -> dict[str, np.ndarray]:
    """Codes, scales and zero points -> the tensors of a compressed-tensors checkpoint.

    Parameters
    ----------
    codes : (out, in) integers, 0 .. 2^bits - 1
    scale : (out, groups) float16 or float32
        Stored as it is. Without g_idx the groups must divide the columns.
    zero_point : (out, groups) integers, optional
        In the same range as the codes; None: symmetric, 2^(bits-1).
    bits : int
        1 .. 8.
    format : str
        pack-quantized, int-quantized or naive-quantized.
    g_idx : (in,) integers, optional
        The group of each column.
    words : str
        "dense", or "padded" as old versions packed 3, 5, 6 and 7 bits.

    Returns
    -------
    dict of the tensors named above

    Raises
    ------
    ValueError
        Wrong shapes or ranges.

    Examples
    --------
    >>> tensors = compressed_tensors_pack(np.arange(8).reshape(1, 8), np.ones((1, 1), np.float16), bits=3)
    >>> hex(tensors["weight_packed"][0, 0]), tensors["weight_shape"].tolist()
    ('0xfac688', [1, 8])
    """
    layout = _layout(bits, format, words)
    codes = check_codes(codes, bits)
    scale, zero_point = check_groups(codes, scale, zero_point, bits)
    if scale.dtype.newbyteorder("=").name not in _SCALES:
        raise ValueError(f"scale must be float16 or float32, got {scale.dtype}")
    scale = np.ascontiguousarray(scale, scale.dtype.newbyteorder("="))
    extra = {}
    if g_idx is None:
        group_index(codes.shape[1], scale.shape[1])
    else:
        extra["weight_g_idx"] = check_g_idx(g_idx, codes.shape[1], scale.shape[1])
    if format == "pack-quantized":
        if zero_point is not None:
            extra["weight_zero_point"] = pack_axis(zero_point, layout, 0, "i4")
        shape = np.array(codes.shape, np.int64)
        packed = pack_axis(codes, layout, 1, "i4")
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape, **extra}
    middle = 1 << (bits - 1)
    signed = lambda numbers: (numbers.astype(np.int16) - middle).astype(np.int8)
    if zero_point is not None:
        extra["weight_zero_point"] = signed(zero_point)
    return {"weight": signed(codes), "weight_scale": scale, **extra}


def compressed_tensors_unpack(
    tensors: dict[str, np.ndarray], *, bits: int = 4, format: str = "pack-quantized", words: str = "dense"
) -> Grouped:
    """The tensors of a compressed-tensors checkpoint -> codes, scales, zero points. Arguments as in the packer.

    Returns
    -------
    Grouped
        zero_point and g_idx are None where the checkpoint has none.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype; a code of int-quantized needs more bits.
    """
    layout = _layout(bits, format, words)
    scale = stored(tensors, "weight_scale", _SCALES, 2)
    packed = format == "pack-quantized"
    codes = _unpack_codes(tensors, layout) if packed else _unsigned(stored(tensors, "weight", ("int8",), 2), bits)
    rows, columns = codes.shape
    if len(scale) != rows:
        raise ValueError(f"weight_scale must have {rows} rows, got shape {scale.shape}")
    groups = scale.shape[1]
    zero_point = g_idx = None
    if tensors.get("weight_zero_point") is not None:
        zero_point = stored(tensors, "weight_zero_point", ("int32",) if packed else ("int8",), 2)
        expected = word_count(rows, layout, "i4") if packed else rows, groups
        if zero_point.shape != expected:
            raise ValueError(f"weight_zero_point must have the shape {expected}, got {zero_point.shape}")
        zero_point = unpack_axis(zero_point, layout, 0, rows) if packed else _unsigned(zero_point, bits)
    if tensors.get("weight_g_idx") is not None:
        g_idx = check_g_idx(stored(tensors, "weight_g_idx", ("int32", "int64"), 1), columns, groups)
    else:
        group_index(columns, groups)
    return Grouped(codes, np.ascontiguousarray(scale), zero_point, g_idx)


def compressed_tensors_dequantize(
    tensors: dict[str, np.ndarray], *, bits: int = 4, format: str = "pack-quantized", words: str = "dense"
) -> np.ndarray:
    """The tensors of a compressed-tensors checkpoint -> the weight, (out, in) float32."""
    return dequantize(compressed_tensors_unpack(tensors, bits=bits, format=format, words=words), bits)


def _unpack_codes(tensors: dict[str, np.ndarray], layout: Layout) -> np.ndarray:
    packed = stored(tensors, "weight_packed", ("int32",), 2)
    shape = stored(tensors, "weight_shape", ("int64", "int32"), 1)
    if shape.shape != (2,) or shape.min() < 0:
        raise ValueError(f"weight_shape must hold two sizes, got {shape.tolist()}")
    rows, columns = map(int, shape)
    expected = rows, word_count(columns, layout, "i4")
    if packed.shape != expected:
        raise ValueError(f"weight_packed of a {rows} x {columns} weight must be {expected}, got {packed.shape}")
    return unpack_axis(packed, layout, 1, columns)


def _unsigned(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes -> codes from 0 on."""
    middle = 1 << (bits - 1)
    if numbers.size and (numbers.min() < -middle or numbers.max() >= middle):
        came = f"{numbers.min()}..{numbers.max()}"
        raise ValueError(f"{bits}-bit codes are {-middle}..{middle - 1}, got {came}")
    return (numbers.astype(np.int16) + middle).astype(np.uint8)


def _layout(bits: int, format: str, words: str) -> Layout:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if words not in ("dense", "padded"):
        raise ValueError(f"words must be 'dense' or 'padded', got {words!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    return dense_words(bits) if words == "dense" else padded_words(bits)
