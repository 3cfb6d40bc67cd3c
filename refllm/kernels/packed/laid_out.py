"""Activations as tile products read them: laid out in panels, as they are or rounded.

One text lays out any number of tokens for every kind of product. The NumPy text of the rounding is activations.py.

Activations (of `n` tokens together, a panel) as a kernel reads them, each behind an address:

    x      [panel, block, n, 32]   float32, or int8 codes
    scale  [panel, block, n]       float32: x = scale * code; not read with float32 activations
    sums   [panel, block, 3, n]    sum of the 32 numbers x, of the first 16, of the last 16: as float32; or, for forms
                                   with a constant zero and int8 codes, -zero times it as int32 (laid_kind)

Beside levels, int8 codes of SUPER columns have one scale and those of a block a shift (activations.quantize_shifted):

    scale  [panel, block, n]       the same for all blocks of a super-block
    sums   [panel, super, 32, n]   words 0 to 23: as above, int32 [8, 3, n], or for minimum levels split_words of
                                   products.py; 24 to 31: the shifts, int32
"""

from functools import cache

import numpy as np
from numba import types

from refllm.kernels.packed.activations import SHIFTS
from refllm.kernels.packed.compile import compile_address, jitable
from refllm.kernels.packed.lane_math import divide, lane_sum, larger_bits, largest_of_bits, magnitude_bits, nearest
from refllm.kernels.packed.lane_memory import (
    load_floats,
    store_codes,
    store_float,
    store_floats,
    store_split,
    store_whole,
)
from refllm.kernels.packed.lanes import every, splat
from refllm.kernels.packed.products import split_words
from refllm.kernels.packed.simd import target_features
from refllm.kernels.packed.tiling import BLOCK, SUPER, Form

# Tokens of a panel where there are many: as many sums, and as many parts of sums, as the registers hold. Sixteen lanes
# take one of 32 registers of AVX-512 and two of the 16 of AVX2.
TOKENS = 12 if "+avx512f" in target_features() else 6
# Kinds of activations: as they are; int8 with a scale per 32 columns, per token, or (for levels, and only for them) per
# SUPER columns with a shift per 32; and FOUR added: 4 bits of the 8.
FLOAT, BLOCKS, TOKEN, SUPERS, FOUR = 0, 1, 2, 3, 4
KINDS = 3  # bits of a kind
HALVES_AT, SHIFTS_AT, SUPER_WORDS = split_words(2 * SUPER // BLOCK), 24, 32


def begins(form: Form, integers: bool) -> bool:
    """Whether the sums of a product begin with -offset * (sum of x), so that a constant zero costs nothing."""
    return integers and form.low == "constant" and form.offset > 0 and form.layout != "pairs"


def rounded_kind(block: int, bits: int) -> int:
    """The kind of activations rounded to 8 or 4 bits, so many columns with one scale (reference.activation_block)."""
    return {0: TOKEN, BLOCK: BLOCKS, SUPER: SUPERS}[block] + (FOUR if bits == 4 else 0)


def laid_kind(form: Form, kind: int) -> int:
    """The kind of activations that a form wants: `kind`, and above it the offset of sums that begin with it."""
    return kind | form.offset << KINDS if begins(form, kind != FLOAT) else kind


@jitable
def _amax(x, columns):
    """The largest magnitude of `columns` floats (a multiple of 32): of any NaN is one."""
    even, odd = magnitude_bits(load_floats(x)), magnitude_bits(load_floats(x + 64))
    for c in range(BLOCK, columns, BLOCK):
        even = larger_bits(even, magnitude_bits(load_floats(x + 4 * c)))
        odd = larger_bits(odd, magnitude_bits(load_floats(x + 4 * c + 64)))
    return largest_of_bits(larger_bits(even, odd))


@jitable
def _halves(source, known):
    """A block of activations; zeros for a token that fills a panel up."""
    return (load_floats(source), load_floats(source + 64)) if known else (every(0), every(0))


@jitable
def _store_rounded(x, low, high, scale, most):
    """A block's codes; returns the sums of their halves."""
    # A scale of 0 has only zeros to divide, one that is not finite makes every product NaN.
    divisor = splat(scale if scale > 0 and scale < np.inf else np.float32(np.inf))
    first = store_codes(x, nearest(divide(low, divisor)), most)
    return first, store_codes(x + BLOCK // 2, nearest(divide(high, divisor)), most)


@jitable
def _store_begins(sums, n, offset, first, second):
    """What the sums of a product begin with."""
    store_whole(sums, -offset * (first + second))
    store_whole(sums + 4 * n, -offset * first)
    store_whole(sums + 8 * n, -offset * second)


@jitable
def _store_sums(sums, n, first, second):
    store_float(sums, first + second)
    store_float(sums + 4 * n, first)
    store_float(sums + 8 * n, second)


@jitable
def _lay_super(source, known, n, most, offset, x, x_scale, sums):
    """A super-block of one token; reference: quantize_shifted."""
    amax = _amax(source, SUPER) if known else np.float32(0)
    scale = amax / np.float32(most) * np.float32(0.5**SHIFTS)
    for block in range(SUPER // BLOCK):
        here = source + 4 * BLOCK * block
        own, step, shift = _amax(here, BLOCK) if known else np.float32(0), scale, 0
        for _ in range(SHIFTS):  # until the codes reach far enough
            own += own
            if not own <= amax:
                step, shift = step + step, shift + 1
        low, high = _halves(here, known)
        first, second = _store_rounded(x + n * BLOCK * block, low, high, step, most)
        store_float(x_scale + 4 * n * block, scale)
        store_whole(sums + 4 * n * (SHIFTS_AT + block), shift)
        if offset > 0:
            _store_begins(sums + 12 * n * block, n, offset, first, second)
        else:
            at = sums + 4 * n * (block // 4) + block % 4
            store_split(at, at + 8 * n, first + second << shift)
            at = sums + 4 * n * (HALVES_AT + block // 2) + block % 2 * 2
            store_split(at, at + 16 * n, first << shift)
            store_split(at + 1, at + 16 * n + 1, second << shift)


def lay_out_text(n: int):
    """Activations of the panels first <= panel < last as the products read them; reference: activations.py.

    source : address of float32 [token, column]; columns are a multiple of 32. kind : laid_kind.
    """

    def lay_out(source, tokens, columns, kind, x, x_scale, x_sums, first, last):
        blocks, offset, kind = columns // BLOCK, kind >> KINDS, kind & (1 << KINDS) - 1
        most, kind = 7 if kind & FOUR else 127, kind & ~FOUR
        for panel in range(first, last):
            for i in range(n):
                token, here = panel * n + i, source + (panel * n + i) * 4 * columns
                known, at = token < tokens, panel * blocks * n + i
                if kind == SUPERS:
                    sums = x_sums + 4 * (panel * (blocks * BLOCK // SUPER) * SUPER_WORDS * n + i)
                    for _ in range(blocks * BLOCK // SUPER):
                        _lay_super(here, known, n, most, offset, x + BLOCK * at, x_scale + 4 * at, sums)
                        here, at, sums = here + 4 * SUPER, at + SUPER // BLOCK * n, sums + 4 * SUPER_WORDS * n
                    continue
                scale, sums = np.float32(kind == FLOAT), x_sums + 4 * (panel * blocks * 3 * n + i)
                if kind == TOKEN and known:
                    scale = _amax(here, columns) / np.float32(most)
                for _ in range(blocks):
                    low, high = _halves(here, known)
                    if kind == FLOAT:
                        store_floats(x + 4 * BLOCK * at, low)
                        store_floats(x + 4 * BLOCK * at + 64, high)
                        _store_sums(sums, n, lane_sum(low), lane_sum(high))
                    else:
                        if kind == BLOCKS and known:
                            scale = _amax(here, BLOCK) / np.float32(most)
                        first_half, second_half = _store_rounded(x + BLOCK * at, low, high, scale, most)
                        if offset > 0:
                            _store_begins(sums, n, offset, first_half, second_half)
                        else:
                            _store_sums(sums, n, np.float32(first_half), np.float32(second_half))
                    store_float(x_scale + 4 * at, scale)
                    here, at, sums = here + 4 * BLOCK, at + n, sums + 12 * n

    return lay_out


@cache
def lay_out_address(n: int) -> int:
    """Address of the compiled lay_out."""
    return compile_address(lay_out_text(n), types.void(*[types.intp] * 9), f"_{n}")
