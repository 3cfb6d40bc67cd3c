"""bitsandbytes checkpoints: NF4 and FP4 in flat blocks, double quantisation, and int8 with one scale a row.

4 bits: the weight is one row-major list of codes; blocks of `blocksize` run across rows. Units are pairs.

    weight                                 U8 [ceil(n / 2), 1]   byte j: code 2 j in its HIGH nibble, 2 j + 1 in the low
    weight.absmax                          F32 [blocks]          or U8 codes, if double quantised
    weight.quant_map                       F32 [16]              value of each code
    weight.quant_state.bitsandbytes__nf4   U8                    JSON: quant_type, blocksize, dtype, shape, and
                                                                 nested_blocksize, nested_dtype, nested_offset
    weight.nested_absmax                   F32 [blocks / 256]    only if double quantised
    weight.nested_quant_map                F32 [256]

    w[k] = quant_map[code[k]] absmax[k // blocksize]
    absmax[b] = nested_quant_map[code[b]] nested_absmax[b // 256] + nested_offset       if double quantised

8 bits: weight I8 [out, in], SCB F32 [out] = the row's largest magnitude (not divided by 127), weight_format U8 = 0.

    w[o, i] = (weight[o, i] SCB[o]) (1 / 127)

Source: bitsandbytes 0.50, functional.py (QuantState, create_dynamic_map) and csrc; Dettmers et al. 2023, "QLoRA",
arXiv:2305.14314.
"""

import json
from typing import NamedTuple

import numpy as np

from refllm.formats.checkpoints.base import check_codes, pack_axis, stored, unpack_axis
from refllm.formats.checkpoints.describe import Stored, Tensor
from refllm.formats.checkpoints.dynamic_map import NESTED_BLOCK, dynamic_map, encode_absmax
from refllm.formats.layouts import Layout, codes

HIGH_FIRST = Layout("bitsandbytes pair", 1, 2, (codes("q", 2, 4, "0", "4 - 4 * i", "codes"),))
QUANT_TYPES = ("nf4", "fp4")
_ZERO_CODE = {"nf4": 7, "fp4": 0}  # fills the last byte of an odd number of codes
_DTYPES = ("float32", "float16", "bfloat16")


def _description(quant_type: str, double: bool) -> Stored:
    state = Tensor(f"weight.quant_state.bitsandbytes__{quant_type}", "JSON text", None, "", ("bytes",), "U8")
    if double:
        absmax = Tensor("weight.absmax", "codes of the blocks' scales", None, "flat", ("blocks",), "U8")
        nested = (
            Tensor("weight.nested_absmax", "scales of the scales", None, "flat", ("ceil(blocks / 256)",), "F32"),
            Tensor("weight.nested_quant_map", "value of each code of a scale", None, "", ("256",), "F32"),
        )
    else:
        absmax, nested = Tensor("weight.absmax", "largest magnitude", None, "flat", ("blocks",), "F32", "per block"), ()
    return Stored(
        "bitsandbytes",
        f"{quant_type}{', double quantised' if double else ''}",
        "quant_map[weight[k]] * absmax[k // blocksize], k = o * in + i",
        "none",
        (
            Tensor("weight", "codes", HIGH_FIRST, "flat", ("ceil(out * in / 2)", "1"), "U8", "blocks run across rows"),
            absmax,
            Tensor("weight.quant_map", "value of each code", None, "", ("16",), "F32"),
            *nested,
            state,
        ),
        "bitsandbytes",
    )


STORED = (
    *(_description(quant_type, double) for quant_type in QUANT_TYPES for double in (False, True)),
    Stored(
        "bitsandbytes",
        "int8",
        "weight[o, i] * SCB[o] / 127",
        "none",
        (
            Tensor("weight", "signed codes", None, "", ("out", "in"), "I8", "-127..127"),
            Tensor("SCB", "largest magnitude of each row", None, "", ("out",), "F32", "not divided by 127"),
            Tensor("weight_format", "0: rows", None, "", (), "U8"),
        ),
        "bitsandbytes",
    ),
)


class Blocks(NamedTuple):
    """Codes of 4 bits with a scale per block of the flat weight.

    codes : (out, in) uint8
    scale : float32; (out, in / blocksize) where blocks do not cross rows, else (blocks,)
    quant_map : (16,) float32
    quant_type : "nf4" or "fp4"
    blocksize : int
    dtype : of the weight that was quantised: "float32", "float16" or "bfloat16"
    """

    codes: np.ndarray
    scale: np.ndarray
    quant_map: np.ndarray
    quant_type: str
    blocksize: int
    dtype: str


def bitsandbytes_pack(
    codes: np.ndarray,
    scale: np.ndarray,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    dtype: str = "float16",
    double_quant: bool = False,
    offset: float | None = None,
) -> dict[str, np.ndarray]:
    """Codes and scales -> the tensors of a 4-bit bitsandbytes checkpoint.

    Parameters
    ----------
    codes : (out, in) integers 0..15
    scale : float, ceil(out in / blocksize) numbers, (out, groups) or (blocks,)
        The largest magnitude of each block of the row-major weight.
    quant_type : str
        "nf4" or "fp4".
    blocksize : int
    dtype : str
        Of the weight that was quantised; only noted.
    double_quant : bool
        Store the scales as 8-bit codes.
    offset : float, optional
        Of the double quantisation; see `encode_absmax`.

    Returns
    -------
    dict of weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__TYPE, and, if double quantised,
    weight.nested_absmax and weight.nested_quant_map

    Raises
    ------
    ValueError
        Wrong shapes or ranges.

    Examples
    --------
    >>> tensors = bitsandbytes_pack(np.array([[1, 2, 3, 4]]), np.ones((1, 1)))
    >>> [hex(b) for b in tensors["weight"].ravel()]
    ['0x12', '0x34']
    """
    if quant_type not in QUANT_TYPES or dtype not in _DTYPES:
        raise ValueError(
            f"quant_type must be one of {', '.join(QUANT_TYPES)} and dtype one of {', '.join(_DTYPES)}, "
            f"got {quant_type!r} and {dtype!r}"
        )
    if blocksize < 1:
        raise ValueError(f"blocksize must be at least 1, got {blocksize}")
    codes, scale = check_codes(codes, 4), np.asarray(scale)
    blocks = -(-codes.size // blocksize)
    if scale.dtype.kind != "f" or scale.size != blocks or scale.ndim > 2 or not np.isfinite(scale).all():
        expected = f"scale must be {blocks} finite floats for {codes.size} weights in blocks of {blocksize}"
        raise ValueError(f"{expected}, got {scale.dtype} of shape {scale.shape}")
    if codes.size == 0:
        raise ValueError(f"bitsandbytes cannot hold an empty weight, got shape {codes.shape}")
    absmax = np.ascontiguousarray(scale, np.float32).reshape(-1)
    state = {"quant_type": quant_type, "blocksize": blocksize, "dtype": dtype, "shape": list(codes.shape)}
    flat = np.full(codes.size + codes.size % 2, _ZERO_CODE[quant_type], np.uint8)
    flat[: codes.size] = codes.reshape(-1)
    tensors = {"weight": pack_axis(flat, HIGH_FIRST, 0, "u1").reshape(-1, 1)}
    if double_quant:
        tensors["weight.absmax"], tensors["weight.nested_absmax"], offset = encode_absmax(absmax, offset)
        tensors["weight.nested_quant_map"] = dynamic_map().copy()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        tensors["weight.absmax"] = absmax
    tensors["weight.quant_map"] = _quant_map(quant_type)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {**tensors, f"weight.quant_state.bitsandbytes__{quant_type}": text.copy()}


def bitsandbytes_unpack(tensors: dict[str, np.ndarray]) -> Blocks:
    """The tensors of a 4-bit bitsandbytes checkpoint -> codes and scales; double quantised scales are decoded.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype, or the JSON text does not say what it must.
    """
    state = _read_state(tensors)
    (out, columns), blocksize = state["shape"], state["blocksize"]
    n = out * columns
    packed = np.asarray(tensors.get("weight", np.empty(0)))
    if packed.dtype != np.uint8 or packed.size != (n + 1) // 2:
        raise ValueError(f"weight must be {(n + 1) // 2} bytes for {n} codes, got {packed.dtype} {packed.shape}")
    codes = unpack_axis(packed.reshape(-1), HIGH_FIRST, 0, n).reshape(out, columns)
    scale = _read_absmax(tensors, state, -(-n // blocksize))
    quant_map = stored(tensors, "weight.quant_map", ("float32",), 1)
    if quant_map.shape != (16,):
        raise ValueError(f"weight.quant_map must have 16 values, got shape {quant_map.shape}")
    if columns % blocksize == 0:
        scale = scale.reshape(out, columns // blocksize)
    return Blocks(codes, scale, quant_map, state["quant_type"], blocksize, state["dtype"])


def bitsandbytes_dequantize(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The tensors of a 4-bit bitsandbytes checkpoint -> (out, in) float32: one product, rounded once."""
    codes, scale, quant_map, _, blocksize, _ = bitsandbytes_unpack(tensors)
    absmax = np.repeat(scale.reshape(-1), blocksize)[: codes.size].reshape(codes.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return quant_map[codes] * absmax


def int8_pack(codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """Signed codes (out, in) int8 and row maxima (out,) or (out, 1) float -> weight, SCB, weight_format.

    Raises
    ------
    ValueError
        Wrong shapes or dtypes; a scale that is not finite.
    """
    codes, scale = np.asarray(codes), np.asarray(scale)
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise ValueError(f"codes must be (out, in) int8, got {codes.dtype} of shape {codes.shape}")
    if scale.dtype.kind != "f" or scale.shape not in ((len(codes),), (len(codes), 1)) or not np.isfinite(scale).all():
        raise ValueError(f"scale must be {len(codes)} finite floats, got {scale.dtype} of shape {scale.shape}")
    scb = np.ascontiguousarray(scale, np.float32).reshape(-1)
    return {"weight": np.ascontiguousarray(codes), "SCB": scb, "weight_format": np.array(0, np.uint8)}


def int8_unpack(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """weight, SCB -> signed codes (out, in) int8 and row maxima (out, 1) float32.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype, or weight_format is not 0 (one of the GPU's own orders).
    """
    codes, scb = stored(tensors, "weight", ("int8",), 2), stored(tensors, "SCB", ("float32",), 1)
    if len(scb) != len(codes):
        raise ValueError(f"SCB must have {len(codes)} numbers, got {len(scb)}")
    if int(np.asarray(tensors.get("weight_format", 0)).reshape(-1)[0]) != 0:
        raise ValueError(f"weight_format {tensors['weight_format']} is a GPU's own order; only 0 (rows) can be read")
    return codes, scb.reshape(-1, 1)


def int8_dequantize(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """weight, SCB -> (out, in) float32, in bitsandbytes' order: (code SCB) (1 / 127), two roundings."""
    codes, scb = int8_unpack(tensors)
    with np.errstate(over="ignore", invalid="ignore"):
        return codes.astype(np.float32) * scb * np.float32(1 / 127)


def _quant_map(quant_type: str) -> np.ndarray:
    from refllm.formats.dtypes import FP4_BNB, NF4

    return {"nf4": NF4, "fp4": FP4_BNB}[quant_type].values.copy()


def _read_state(tensors: dict[str, np.ndarray]) -> dict:
    prefix = "weight.quant_state.bitsandbytes__"
    names = [name for name in tensors if name.startswith(prefix)]
    if len(names) != 1:
        raise ValueError(f"one tensor {prefix}nf4 or {prefix}fp4 is needed, got {names or sorted(tensors)}")
    text = stored(tensors, names[0], ("uint8",), 1).tobytes()
    try:
        state = json.loads(text)
        shape, nested = state["shape"], "nested_offset" in state
        fine = (
            state["quant_type"] == names[0].removeprefix(prefix)
            and state["quant_type"] in QUANT_TYPES
            and isinstance(state["dtype"], str)
            and len(shape) == 2
            and all(type(x) is int and x > 0 for x in (*shape, state["blocksize"]))
            and (not nested or (type(state["nested_blocksize"]) is int and state["nested_blocksize"] > 0))
            and (not nested or isinstance(state["nested_offset"], float | int))
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        fine = False
    if not fine:
        raise ValueError(f"{names[0]} does not describe a 4-bit weight: {text[:200]!r}")
    return state


def _read_absmax(tensors: dict[str, np.ndarray], state: dict, blocks: int) -> np.ndarray:
    nested = "nested_offset" in state
    absmax = stored(tensors, "weight.absmax", ("uint8",) if nested else ("float32",), 1)
    if absmax.shape != (blocks,):
        raise ValueError(f"weight.absmax must have {blocks} numbers, got shape {absmax.shape}")
    if not nested:
        return absmax
    table = stored(tensors, "weight.nested_quant_map", ("float32",), 1)
    scale, size = stored(tensors, "weight.nested_absmax", ("float32",), 1), state["nested_blocksize"]
    if table.shape != (256,) or scale.shape != (-(-blocks // size),):
        expected = f"nested_quant_map and nested_absmax must have 256 and {-(-blocks // size)} numbers"
        raise ValueError(f"{expected}, got {table.shape} and {scale.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        return table[absmax] * scale[np.arange(blocks) // size] + np.float32(state["nested_offset"])
