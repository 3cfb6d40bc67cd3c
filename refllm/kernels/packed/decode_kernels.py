"""Numba texts that unpack rows of a packed weight into float32, one per layout; the twins of the records' own `rows`.

They round exactly as the NumPy texts do (a product, then a sum, each to float32), so the results are equal bit for bit.
Arrays of bytes and results are flat; `data` holds whole rows of `row_bytes`, and row `first` goes to the start of
`out`.
"""

import numpy as np
from numba import types

from refllm.kernels.packed.compile import jitable
from refllm.kernels.packed.simd import (
    add_floats,
    add_ints,
    bit_field,
    half_to_float,
    load_bit_lanes,
    load_bytes,
    load_columns,
    multiply,
    shift_left,
    splat,
    store_floats,
    to_floats,
)


@jitable
def _half(data, at):
    """The little-endian float16 at two bytes, in every lane."""
    return splat(half_to_float(np.uint16(data[at]) | np.uint16(data[at + 1]) << np.uint16(8)))


@jitable
def _scaled(q, offset, scale):
    """scale * (q + offset)."""
    return multiply(to_floats(add_ints(q, splat(offset))), scale)


@jitable
def _fifth_bits(data, at):
    """Sixteen bits, each as the fifth bit of a code."""
    return shift_left(load_bit_lanes(data, at), 4)


def q4_0(data, row_bytes, out, first, last):
    """18 bytes per 32 columns: scale, 16 bytes of nibbles (column j low, j + 16 high); scale * (q - 8)."""
    for b in range((last - first) * row_bytes // 18):
        at, to = first * row_bytes + b * 18, b * 32
        scale, codes = _half(data, at), load_bytes(data, at + 2)
        store_floats(out, to, _scaled(bit_field(codes, 0, 4), -8, scale))
        store_floats(out, to + 16, _scaled(bit_field(codes, 4, 4), -8, scale))


def q4_1(data, row_bytes, out, first, last):
    """20 bytes per 32 columns: scale, minimum, nibbles as in q4_0; scale * q + minimum."""
    for b in range((last - first) * row_bytes // 20):
        at, to = first * row_bytes + b * 20, b * 32
        scale, minimum, codes = _half(data, at), _half(data, at + 2), load_bytes(data, at + 4)
        store_floats(out, to, add_floats(_scaled(bit_field(codes, 0, 4), 0, scale), minimum))
        store_floats(out, to + 16, add_floats(_scaled(bit_field(codes, 4, 4), 0, scale), minimum))


def q5_0(data, row_bytes, out, first, last):
    """22 bytes per 32 columns: scale, 32 fifth bits, nibbles as in q4_0; scale * (q - 16)."""
    for b in range((last - first) * row_bytes // 22):
        at, to = first * row_bytes + b * 22, b * 32
        scale, codes = _half(data, at), load_bytes(data, at + 6)
        low = add_ints(bit_field(codes, 0, 4), _fifth_bits(data, at + 2))
        high = add_ints(bit_field(codes, 4, 4), _fifth_bits(data, at + 4))
        store_floats(out, to, _scaled(low, -16, scale))
        store_floats(out, to + 16, _scaled(high, -16, scale))


def q5_1(data, row_bytes, out, first, last):
    """24 bytes per 32 columns: scale, minimum, fifth bits, nibbles; scale * q + minimum."""
    for b in range((last - first) * row_bytes // 24):
        at, to = first * row_bytes + b * 24, b * 32
        scale, minimum, codes = _half(data, at), _half(data, at + 2), load_bytes(data, at + 8)
        low = add_ints(bit_field(codes, 0, 4), _fifth_bits(data, at + 4))
        high = add_ints(bit_field(codes, 4, 4), _fifth_bits(data, at + 6))
        store_floats(out, to, add_floats(_scaled(low, 0, scale), minimum))
        store_floats(out, to + 16, add_floats(_scaled(high, 0, scale), minimum))


def q8_0(data, row_bytes, out, first, last):
    """34 bytes per 32 columns: scale, 32 signed bytes; scale * q."""
    signed = data.view(np.int8)
    for b in range((last - first) * row_bytes // 34):
        at, to = first * row_bytes + b * 34, b * 32
        scale = _half(data, at)
        store_floats(out, to, multiply(to_floats(load_bytes(signed, at + 2)), scale))
        store_floats(out, to + 16, multiply(to_floats(load_bytes(signed, at + 18)), scale))


def q4_k(data, row_bytes, out, first, last):
    """144 bytes per 256 columns: d, dmin, eight 6-bit scales and minima, nibbles; (d * sc) * q - (dmin * mn)."""
    for b in range((last - first) * row_bytes // 144):
        at, to = first * row_bytes + b * 144, b * 256
        d, dmin = _half(data, at), _half(data, at + 2)
        for pair in range(4):  # sub-blocks 2 pair (low nibbles) and 2 pair + 1 (high nibbles) share 32 bytes
            for part in range(2):
                i = 2 * pair + part
                if i < 4:
                    scale, minimum = data[at + 4 + i] & 63, data[at + 8 + i] & 63
                else:
                    scale = data[at + 8 + i] & 15 | data[at + i] >> 6 << 4
                    minimum = data[at + 8 + i] >> 4 | data[at + 4 + i] >> 6 << 4
                step = multiply(d, splat(np.float32(scale)))
                low = multiply(dmin, splat(np.float32(-np.float32(minimum))))
                for half in range(2):
                    codes = load_bytes(data, at + 16 + 32 * pair + 16 * half)
                    codes = bit_field(codes, 4, 4) if part else bit_field(codes, 0, 4)
                    store_floats(out, to + 32 * i + 16 * half, add_floats(_scaled(codes, 0, step), low))


def q6_k(data, row_bytes, out, first, last):
    """210 bytes per 256 columns: low nibbles, high bit pairs, sixteen int8 scales, d; (d * sc) * (q - 32)."""
    signed = data.view(np.int8)
    for b in range((last - first) * row_bytes // 210):
        at, to = first * row_bytes + b * 210, b * 256
        d = _half(data, at + 208)
        for h in range(2):
            for l in range(0, 32, 16):
                near, far = load_bytes(data, at + 64 * h + l), load_bytes(data, at + 64 * h + 32 + l)
                pairs = load_bytes(data, at + 128 + 32 * h + l)
                lows = bit_field(near, 0, 4), bit_field(far, 0, 4), bit_field(near, 4, 4), bit_field(far, 4, 4)
                highs = bit_field(pairs, 0, 2), bit_field(pairs, 2, 2), bit_field(pairs, 4, 2), bit_field(pairs, 6, 2)
                for k in range(4):
                    step = multiply(d, splat(np.float32(signed[at + 192 + 8 * h + 2 * k + l // 16])))
                    q = add_ints(lows[k], shift_left(highs[k], 4))
                    store_floats(out, to + 128 * h + 32 * k + l, _scaled(q, -32, step))


def integers_text(bits: int):
    """IntWeight rows of one width, a constant to the compiler."""

    def integers(codes, row_bytes, columns, scale, zero, out, first, last):
        """scale, zero : (rows, groups) float32 and int32 of rows `first` on, or one row of them per tensor."""
        group = columns // scale.shape[1]
        vectors = group * bits % 8 == 0 or scale.shape[1] == 1  # every group begins with a byte
        for row in range(first, last):
            start, to = row * row_bytes, (row - first) * columns
            of = row - first if len(scale) > 1 else 0
            for g in range(scale.shape[1]):
                s, z = scale[of, g], zero[of, g]
                done = g * group
                if vectors:
                    for c in range(g * group, (g + 1) * group - 15, 16):
                        q = load_columns(codes, start + c * bits // 8, bits)
                        store_floats(out, to + c, _scaled(q, -z, splat(s)))
                        done = c + 16
                for c in range(done, (g + 1) * group):
                    bit = c * bits
                    word = np.int32(codes[start + (bit >> 3)])
                    if (bit & 7) + bits > 8:
                        word |= np.int32(codes[start + (bit >> 3) + 1]) << 8
                    out[to + c] = np.float32(((word >> (bit & 7)) & ((1 << bits) - 1)) - z) * s

    return integers


def sparse24(values, indices, columns, out, first, last):
    """Two float32 values of every four columns; `values` is flat and holds the rows from `first` on."""
    row_bytes = (columns + 7) // 8
    for row in range(first, last):
        for g in range(columns // 4):
            pair = np.uint64(indices[row * row_bytes + (g >> 1)] >> np.uint8(g % 2 * 4))
            at = np.uint64((row - first) * (columns // 4) + g)
            four = np.uint64(4) * at
            for i in range(4):
                out[four + np.uint64(i)] = 0
            out[four + (pair & np.uint64(3))] = values[np.uint64(2) * at]
            out[four + (pair >> np.uint64(2) & np.uint64(3))] = values[np.uint64(2) * at + np.uint64(1)]


def bitmask(values, bits, offsets, columns, out, first, last):
    """The float32 values whose bits are set, in order; `values` has one number to spare at its end."""
    row_bytes = (columns + 7) // 8
    for row in range(first, last):
        at, to = np.uint64(offsets[row]), np.uint64((row - first) * columns)
        for c in range(columns):
            kept = bits[row * row_bytes + (c >> 3)] >> np.uint8(c & 7) & np.uint8(1)
            value = values[at]  # read always, so that no branch is needed
            out[to + np.uint64(c)] = value if kept else np.float32(0)
            at += np.uint64(kept)


def _array(kind: types.Type, ndim: int = 1, readonly: bool = True) -> types.Array:
    return types.Array(kind, ndim, "C", readonly=readonly)


BYTES, VALUES, NUMBERS = _array(types.uint8), _array(types.float32), _array(types.float32, readonly=False)
BLOCK_SIGNATURE = types.void(BYTES, types.intp, NUMBERS, types.intp, types.intp)
INTEGERS_SIGNATURE = types.void(
    BYTES,
    types.intp,
    types.intp,
    _array(types.float32, 2),
    _array(types.int32, 2),
    NUMBERS,
    types.intp,
    types.intp,
)
SPARSE24_SIGNATURE = types.void(VALUES, BYTES, types.intp, NUMBERS, types.intp, types.intp)
BITMASK_SIGNATURE = types.void(VALUES, BYTES, _array(types.uint32), types.intp, NUMBERS, types.intp, types.intp)
GGUF_TEXTS = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q6_K": q6_k,
}
