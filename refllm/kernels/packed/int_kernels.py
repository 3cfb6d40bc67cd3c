"""Numba products of IntWeight records on their stored layout: 2-, 4- and 8-bit codes, float32 or int8 activations.

A row of codes is read 64 bytes (one block) at a time as sixteen 32-bit lanes; a lane holds 32 / bits consecutive columns.
Activations are laid out once per call so that the same column of every lane stands together (planes). Each block gives
sixteen partial sums, which are scaled lane by lane (a block may span several groups, a group several blocks), and the lanes
are added once at the end of the row. The order of every sum is fixed. The NumPy text is reference.py.
"""

from functools import cache

import numpy as np
from numba import types
from numba.extending import register_jitable

from refllm.kernels.grids import PER_TENSOR, group_count
from refllm.kernels.packed.compile import compile_kernel
from refllm.kernels.packed.quantized import IntWeight
from refllm.kernels.packed.simd import (
    BLOCK_BYTES,
    LANES,
    add_floats,
    add_ints,
    float_products,
    int_products,
    load_codes,
    multiply_add,
    spread,
    sum_lanes,
    to_floats,
    zero_floats,
    zero_ints,
)
from refllm.kernels.packed.threads import over_rows

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


def _kernel_text(bits: int, integers: bool, per: int):
    """The product of one weight with every token, rows first to last. The three arguments are constants to the compiler.

    per = 0: a row is `outer` groups of `inner` blocks. per >= 1: it is `outer` blocks of `per` groups.
    """
    one = 0x10001 if integers else 1  # a zero point in both 16-bit halves of a lane
    span = BLOCK_BYTES * 8 // bits
    step = per or 1

    def int_matmul(codes, scale, zero, shape, x, x_scale, y, first, last):
        row_bytes, groups, rows_per_scale, outer, inner = shape
        blocks = outer * inner
        zero_bytes = (groups * bits + 7) // 8
        zeros = np.full(outer * step + 8, (1 << (bits - 1)) * one, np.int32 if integers else np.float32)
        spare_codes = np.zeros(blocks * BLOCK_BYTES, np.uint8)
        spare_scale = np.zeros(outer * step, scale.dtype)
        for row in range(first, last):
            start = row * row_bytes
            scale_start = row * rows_per_scale * groups
            if zero.size:
                _unpack_zeros(zero, row * rows_per_scale * zero_bytes, bits, groups, one, zeros)
            # The last block of the last rows would be read past the end of the arrays.
            beyond = start + blocks * BLOCK_BYTES > codes.size or scale_start + outer * step > scale.size
            if beyond:
                for i in range(row_bytes):
                    spare_codes[i] = codes[start + i]
                for g in range(groups):
                    spare_scale[g] = scale[scale_start + g]
            for token in range(y.shape[0]):
                total = zero_floats()
                at = token * blocks * span
                for g in range(outer):
                    z = spread(zeros, 0, zeros, False, g * step, step)
                    s = spread(scale, scale_start, spare_scale, beyond, g * step, step)
                    if per:
                        some = load_codes(codes, start, spare_codes, beyond, g * BLOCK_BYTES)
                        if integers:
                            part = to_floats(int_products(some, z, x, at + g * span, bits))
                        else:
                            part = float_products(some, z, x, at + g * span, bits)
                    elif integers:
                        even = zero_ints()
                        odd = zero_ints()
                        for b in range(g * inner, (g + 1) * inner):
                            some = load_codes(codes, start, spare_codes, beyond, b * BLOCK_BYTES)
                            some = int_products(some, z, x, at + b * span, bits)
                            even, odd = odd, add_ints(even, some)  # take turns: neither sum waits for the other
                        part = to_floats(add_ints(even, odd))
                    else:
                        part = zero_floats()
                        for b in range(g * inner, (g + 1) * inner):
                            some = load_codes(codes, start, spare_codes, beyond, b * BLOCK_BYTES)
                            part = add_floats(part, float_products(some, z, x, at + b * span, bits))
                    total = multiply_add(part, s, total)
                y[token, row] = sum_lanes(total) * x_scale[token]

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
    """quantize_activations per token, written as planes of int16; scale (tokens,) float32."""
    codes = np.empty(x.shape[1], np.int16)
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
                codes[c] = np.int16(min(max(np.rint(row[c] / divisor), np.float32(-127)), np.float32(127)))
            _put_planes(codes, columns_per_lane, lanes, out[token])


def _array(kind: types.Type, ndim: int, readonly: bool = True) -> types.Array:
    return types.Array(kind, ndim, "C", readonly=readonly)


@cache
def _matmul_kernel(bits: int, integers: bool, half: bool, per: int):
    """Compiled for one width of codes, kind of activations, type of scale and `per`."""
    signature = types.void(
        _array(types.uint8, 1),
        _array(types.uint16 if half else types.float32, 1),
        _array(types.uint8, 1),
        types.UniTuple(types.intp, 5),
        _array(types.int16 if integers else types.float32, 1),
        _array(types.float32, 1),
        _array(types.float32, 2, readonly=False),
        types.intp,
        types.intp,
    )
    return compile_kernel(_kernel_text(bits, integers, per), signature, f"_w{bits}_{integers:d}{half:d}_{per}")


@cache
def _planes_kernel(integers: bool):
    source = _array(types.float32, 2)
    sizes = (types.intp, types.intp)
    if integers:
        target, scale = _array(types.int16, 4, readonly=False), _array(types.float32, 1, readonly=False)
        return compile_kernel(_int8_planes_text, types.void(source, *sizes, target, scale))
    return compile_kernel(_float_planes_text, types.void(source, *sizes, _array(types.float32, 4, readonly=False)))


def planes(x: np.ndarray, bits: int, integers: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lay activations out for int_matmul.

    Parameters
    ----------
    x : (tokens, in) float32, C-contiguous
    bits : int
        Of the weight.
    integers : bool
        Round to int8 (kept in int16 for the 16-bit multiply-add) or keep float32.

    Returns
    -------
    planes : (tokens, blocks, columns per lane, lanes) int16 or float32, zero after the last column
    scale : (tokens,) float32
    """
    per_lane, lanes = (16 // bits, 2 * LANES) if integers else (32 // bits, LANES)
    blocks = -(-x.shape[1] // (per_lane * lanes))
    out = np.zeros((len(x), blocks, per_lane, lanes), np.int16 if integers else np.float32)
    if integers:
        scale = np.empty(len(x), np.float32)
        _planes_kernel(True)(x, per_lane, lanes, out, scale)
        return out, scale
    _planes_kernel(False)(x, per_lane, lanes, out)
    return out, np.ones(len(x), np.float32)


def flat(array: np.ndarray) -> np.ndarray:
    """A flat, contiguous, aligned view of an array; a copy only where it must be."""
    return np.require(array, requirements=["C", "A"]).reshape(-1)


def int_matmul(x: np.ndarray, weight: IntWeight, integers: bool) -> np.ndarray:
    """x W^T: (tokens, in) float32 -> (tokens, out) float32. `blocking(weight)` must not be None."""
    outer, inner, per = blocking(weight)
    rows, columns = weight.shape
    groups = group_count(columns, weight.group_size)
    x_planes, x_scale = planes(np.require(x, np.float32, ["C", "A"]), weight.bits, integers)
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
    run = _matmul_kernel(weight.bits, integers, half, per)
    over_rows(lambda first, last: run(*arguments, y, first, last), rows, rows * columns * len(x))
    return y
