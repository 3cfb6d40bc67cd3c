"""Numba products of IntWeight records on their stored layout: 2-, 4- and 8-bit codes, float32 or int8 activations.

Four rows of codes are read side by side, 64 bytes (one block) of each at a time as sixteen 32-bit lanes; a lane holds
32 / bits consecutive columns. Activations are laid out once per call so that the same column of every lane stands
together (planes). Each block gives sixteen partial sums, which are scaled lane by lane (a block may span several
groups, a group several blocks), and the lanes are added once at the end of the row. The order of every sum is fixed.
The NumPy text is reference.py.
"""

from functools import cache

import numpy as np
from numba import types
from numba.extending import register_jitable

from refllm.kernels.grids import PER_TENSOR, group_count
from refllm.kernels.packed.compile import compile_kernel
from refllm.kernels.packed.quantized import IntWeight
from refllm.kernels.packed.simd import LANES
from refllm.kernels.packed.threads import over_rows
from refllm.kernels.packed.tiles import (
    BLOCK_BYTES,
    ROWS,
    add_int_products,
    constant_floats,
    constant_ints,
    float_products,
    load_codes,
    multiply_add,
    spread,
    store_row_sums,
    target_has_byte_dot,
    to_floats,
)

FUSED_BITS = (2, 4, 8)
MOST_COLUMNS = 1 << 20  # sixteen int32 lanes hold the sum of that many products


def blocking(weight: IntWeight) -> tuple[int, int, int] | None:
    """How the groups of a weight lie in blocks of 64 bytes.

    Returns
    -------
    (outer, inner, per) : int
        per = 0: a row is `outer` groups of `inner` whole blocks. per = 1, 2, 4, 8 or 16: it is `outer` blocks of `per`
        groups each, and inner = 1. None if the groups do not fall on lanes, and the weight must be decoded instead.
    """
    if weight.bits not in FUSED_BITS or weight.columns > MOST_COLUMNS:
        return None
    block = BLOCK_BYTES * 8 // weight.bits
    lane = block // LANES
    groups = group_count(weight.columns, weight.group_size)
    group = weight.columns // groups
    if groups == 1:
        return 1, -(-weight.columns // block), 0
    if group % block == 0:
        return (groups, 1, 1) if group == block else (groups, group // block, 0)
    if block % group == 0 and group % lane == 0:
        return -(-weight.columns // block), 1, block // group
    return None


@register_jitable
def _unpack_zeros(packed, first, bits, groups, one, out):
    """out[:groups] = `one` times the packed zero points of the row that begins at byte `first`."""
    per_byte = 8 // bits
    for i in range((groups + per_byte - 1) // per_byte):
        byte = np.int32(packed[first + i])
        for j in range(per_byte):
            out[i * per_byte + j] = ((byte >> (j * bits)) & ((1 << bits) - 1)) * one


@register_jitable
def _copy_rows(source, row, apart, count, width, out, stride):
    """`count` rows of `width` numbers, `apart` rows from each other, to rows of `stride` numbers of out."""
    for k in range(count):
        for i in range(width):
            out[k * stride + i] = source[(row + k * apart) * width + i]


def _kernel_text(bits: int, x_kind: str, per: int, symmetric: bool):
    """The product of one weight with every token, rows first to last. The four arguments are constants to the compiler.

    per = 0: a row is `outer` groups of `inner` blocks. per >= 1: it is `outer` blocks of `per` groups.
    """
    integers = x_kind != "float32"
    one = 0x10001 if x_kind == "int16" else 1  # a zero point in both 16-bit halves of a lane
    offset = (1 << (bits - 1)) * one
    span = BLOCK_BYTES * 8 // bits
    step = per or 1

    def int_matmul(codes, scale, zero, shape, x, x_scale, y, first, last):
        row_bytes, groups, own_scale, outer, inner = shape  # own_scale: 1, or 0 if one scale serves every row
        blocks, zero_bytes = outer * inner, (groups * bits + 7) // 8
        row_scales = own_scale * groups
        zero_stride = outer * step + 8
        zeros = np.zeros(ROWS * zero_stride, np.int32 if integers else np.float32)
        spare_codes = np.zeros(ROWS * blocks * BLOCK_BYTES, np.uint8)
        spare_scale = np.zeros(ROWS * outer * step, scale.dtype)
        sums = np.empty(ROWS, np.float32)
        # A tile takes its rows a quarter of the range apart: four long streams of memory, each in pages of its own.
        apart = (last - first + ROWS - 1) // ROWS
        for row in range(first, first + apart):
            count = min(ROWS, (last - row + apart - 1) // apart)
            end = row + (count - 1) * apart
            # Too few rows are left for a tile, or its last block lies partly behind the end of the array.
            aside = count < ROWS or end * row_bytes + blocks * BLOCK_BYTES > codes.size
            aside = aside or end * row_scales + outer * step > scale.size
            stride, scale_stride = apart * row_bytes, apart * row_scales
            if aside:
                stride, scale_stride = blocks * BLOCK_BYTES, outer * step
                _copy_rows(codes, row, apart, count, row_bytes, spare_codes, stride)
                if own_scale:
                    _copy_rows(scale, row, apart, count, groups, spare_scale, scale_stride)
                else:
                    spare_scale[:] = scale[0]
            if not symmetric:
                for k in range(count):
                    at = own_scale * (row + k * apart) * zero_bytes
                    _unpack_zeros(zero, at, bits, groups, one, zeros[k * zero_stride : (k + 1) * zero_stride])
            for token in range(y.shape[0]):
                total = constant_floats(0)
                at = token * blocks * span
                for g in range(outer):
                    if not symmetric:
                        z = spread(zeros, 0, zeros, False, zero_stride, g * step, step)
                    elif integers:
                        z = constant_ints(offset)
                    else:
                        z = constant_floats(offset)
                    s = spread(scale, row * row_scales, spare_scale, aside, scale_stride, g * step, step)
                    if integers:
                        part = constant_ints(0)
                        for b in range(g * inner, (g + 1) * inner):
                            some = load_codes(codes, row * row_bytes, spare_codes, aside, stride, b * BLOCK_BYTES)
                            part = add_int_products(part, some, z, x, at + b * span, bits)
                        total = multiply_add(to_floats(part), s, total)
                    else:
                        for b in range(g * inner, (g + 1) * inner):
                            some = load_codes(codes, row * row_bytes, spare_codes, aside, stride, b * BLOCK_BYTES)
                            total = multiply_add(float_products(some, z, x, at + b * span, bits), s, total)
                store_row_sums(sums, total)
                for k in range(count):
                    y[token, row + k * apart] = sums[k] * x_scale[token]

    return int_matmul


@register_jitable
def _put_planes(row, columns_per_lane, lanes, out):
    """out (blocks, columns_per_lane, lanes) = row, regrouped so that a plane has one column of every lane."""
    block = columns_per_lane * lanes
    whole = len(row) // block
    for b in range(whole):
        some = row[b * block : (b + 1) * block]
        for lane in range(lanes):
            for i in range(columns_per_lane):
                out[b, i, lane] = some[lane * columns_per_lane + i]
    for c in range(len(row) - whole * block):
        out[whole, c % columns_per_lane, c // columns_per_lane] = row[whole * block + c]


def _float_planes_text(x, columns_per_lane, lanes, out):
    """Planes of float32: out (tokens, blocks, columns_per_lane, lanes)."""
    for token in range(x.shape[0]):
        _put_planes(x[token], columns_per_lane, lanes, out[token])


def _int8_planes_text(x, columns_per_lane, lanes, out, scale):
    """quantize_activations per token, written as planes of int8 or int16; scale (tokens,) float32."""
    codes = np.empty(x.shape[1], np.int8)
    for token in range(x.shape[0]):
        row = x[token]
        amax = np.float32(0)
        alarm = np.float32(0)
        for c in range(len(row)):
            amax = max(amax, abs(row[c]))
            alarm += row[c] * np.float32(0)  # NaN if anything is not finite
        scale[token] = amax / np.float32(127) + alarm
        if scale[token] > 0:
            divisor = scale[token]
            for c in range(len(row)):
                codes[c] = np.int8(min(max(np.rint(row[c] / divisor), np.float32(-127)), np.float32(127)))
            _put_planes(codes, columns_per_lane, lanes, out[token])


def _array(kind: types.Type, ndim: int, readonly: bool = True) -> types.Array:
    return types.Array(kind, ndim, "C", readonly=readonly)


@cache
def _matmul_kernel(bits: int, x_kind: str, half: bool, per: int, symmetric: bool):
    """Compiled for one width of codes, kind of activations, type of scale, `per` and kind of grid."""
    key = f"_w{bits}_{x_kind}_{half:d}_{per}_{symmetric:d}"
    signature = types.void(
        _array(types.uint8, 1),
        _array(types.uint16 if half else types.float32, 1),
        _array(types.uint8, 1),
        types.UniTuple(types.intp, 5),
        _array(getattr(types, x_kind), 1),
        _array(types.float32, 1),
        _array(types.float32, 2, readonly=False),
        types.intp,
        types.intp,
    )
    return compile_kernel(_kernel_text(bits, x_kind, per, symmetric), signature, key)


@cache
def _planes_kernel(x_kind: str):
    source = _array(types.float32, 2)
    sizes = (types.intp, types.intp)
    target, scale = _array(getattr(types, x_kind), 4, readonly=False), _array(types.float32, 1, readonly=False)
    if x_kind == "float32":
        return compile_kernel(_float_planes_text, types.void(source, *sizes, target))
    return compile_kernel(_int8_planes_text, types.void(source, *sizes, target, scale), f"_{x_kind}")


def kind_of_x(integers: bool) -> str:
    """How activations are laid out: float32, or int8 codes kept as int8 or, without a byte multiply-add, as int16."""
    if not integers:
        return "float32"
    return "int8" if target_has_byte_dot() else "int16"


def planes(x: np.ndarray, bits: int, x_kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Lay activations out for int_matmul.

    Parameters
    ----------
    x : (tokens, in) float32, C-contiguous
    bits : int
        Of the weight.
    x_kind : str
        As kind_of_x gives it.

    Returns
    -------
    planes : (tokens, blocks, columns per lane, lanes) of that type, zero after the last column
    scale : (tokens,) float32
    """
    width = {"float32": 32, "int16": 16, "int8": 8}[x_kind]
    per_lane, lanes = width // bits, BLOCK_BYTES * 8 // width
    blocks = -(-x.shape[1] // (per_lane * lanes))
    out = np.zeros((len(x), blocks, per_lane, lanes), x_kind)
    if x_kind == "float32":
        _planes_kernel(x_kind)(x, per_lane, lanes, out)
        return out, np.ones(len(x), np.float32)
    scale = np.empty(len(x), np.float32)
    _planes_kernel(x_kind)(x, per_lane, lanes, out, scale)
    return out, scale


def flat(array: np.ndarray) -> np.ndarray:
    """A flat, contiguous, aligned view of an array; a copy only where it must be."""
    flags = array.flags
    good = array if flags.c_contiguous and flags.aligned else np.require(array, requirements=["C", "A"])
    return good.reshape(-1)


def int_matmul(x: np.ndarray, weight: IntWeight, integers: bool) -> np.ndarray:
    """x W^T: (tokens, in) float32 -> (tokens, out) float32. `blocking(weight)` must not be None."""
    outer, inner, per = blocking(weight)
    rows, columns = weight.shape
    groups = group_count(columns, weight.group_size)
    x_kind = kind_of_x(integers)
    x_planes, x_scale = planes(flat(x).reshape(x.shape), weight.bits, x_kind)
    half = weight.scale.dtype == np.float16
    arguments = (
        flat(weight.codes),
        flat(weight.scale).view(np.uint16 if half else np.float32),
        np.empty(0, np.uint8) if weight.zero_point is None else flat(weight.zero_point),
        (weight.codes.shape[1], groups, int(weight.group_size != PER_TENSOR), outer, inner),
        x_planes.reshape(-1),
        x_scale,
    )
    y = np.empty((len(x), rows), np.float32)
    run = _matmul_kernel(weight.bits, x_kind, half, per, weight.zero_point is None)
    over_rows(lambda first, last: run(*arguments, y, first, last), rows, rows * columns * len(x))
    return y
