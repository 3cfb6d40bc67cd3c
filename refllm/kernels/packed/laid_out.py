"""Activations as tile products read them: laid out in panels, as they are or rounded.

One text lays out any number of tokens for every kind of product. The NumPy text of the rounding is activations.py.

Activations (of `n` tokens together, a panel) as a kernel reads them, each behind an address:

    x      [panel, block, n, 32]   float32, or int8 codes
    scale  [panel, block, n]       float32: x = scale * code; not read with float32 activations
    sums   [panel, block, 3, n]    sum of the 32 numbers x, of the first 16, of the last 16: as float32; or, for forms
                                   with a constant zero and int8 codes, -zero times it as int32 (laid_kind)

Beside levels, int8 codes of SUPER columns have one scale and those of a block a shift (activations.quantize_shifted):

    scale  [panel, block, n]       the same for all blocks of a super-block
    sums   [panel, super, 32, n]   int32 words; 0 to 23: as above, [8, 3, n], or, for minimum levels, 0 to 11:
                                   split_words of level_products.py; 12 to 15: the shifts of two blocks each, the
                                   first's in the upper half; 16: a number for the panel, its reach: how large the sum
                                   of a block's positive codes gets, or that of its negative ones; 24 to 31: the shifts
"""

from functools import cache

import numpy as np
from numba import types

from refllm.kernels.packed.activations import SHIFTS
from refllm.kernels.packed.compile import compile_address, jitable
from refllm.kernels.packed.lane_codes import store_codes, store_split
from refllm.kernels.packed.lane_math import (
    divide,
    lane_sum,
    larger_bits,
    largest_of_bits,
    magnitude_bits,
    nearest,
    usable,
)
from refllm.kernels.packed.lane_memory import (
    load_float,
    load_floats,
    load_whole,
    prefetch,
    room,
    store_float,
    store_floats,
    store_whole,
)
from refllm.kernels.packed.lanes import every, splat
from refllm.kernels.packed.level_products import split_words
from refllm.kernels.packed.simd import target_features
from refllm.kernels.packed.tiling import BLOCK, SUPER, Form

# Tokens of a panel where there are many: as many sums, and as many parts of sums, as the registers hold. Sixteen lanes
# take one of 32 registers of AVX-512 and two of the 16 of AVX2.
TOKENS = 12 if "+avx512f" in target_features() else 5
# Kinds of activations: as they are; int8 with a scale per 32 columns, per token, or (for levels, and only for them) per
# SUPER columns with a shift per 32; and FOUR added: 4 bits of the 8.
FLOAT, BLOCKS, TOKEN, SUPERS, FOUR = 0, 1, 2, 3, 4
KINDS, GIVEN = 3, 32  # where the offset begins above a kind, and the bits of a scale that is given (laid_kind)
SMALLEST = np.float32(0.5**SHIFTS)  # what the step of a super-block's largest number is multiplied with: shift 0
ABOVE = SUPER // BLOCK
HALVES_AT, PAIRS_AT, REACH_AT, SHIFTS_AT, SUPER_WORDS = split_words(2 * SUPER // BLOCK), 12, 16, 24, 32


def begins(form: Form, integers: bool) -> bool:
    """Whether the sums of a product begin with -offset * (sum of x), so that a constant zero costs nothing."""
    return integers and form.low == "constant" and form.offset > 0 and form.layout != "pairs"


def rounded_kind(block: int, bits: int) -> int:
    """The kind of activations rounded to 8 or 4 bits, so many columns with one scale (reference.activation_block)."""
    return {0: TOKEN, BLOCK: BLOCKS, SUPER: SUPERS}[block] + (FOUR if bits == 4 else 0)


def laid_kind(form: Form, kind: int, scale: float = 0) -> int:
    """The kind of activations that a form wants: `kind`, above it the offset of sums that begin with it, then a scale.

    Parameters
    ----------
    form : Form
    kind : int
    scale : float32
        Beside TOKEN: positive, of all tokens, none of which is then measured; or 0, each has its own.
    """
    given = int(np.float32(scale).view(np.uint32)) << GIVEN
    return kind | given | (form.offset << KINDS if begins(form, kind != FLOAT) else 0)


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


@jitable(forceinline=True)  # or sums that nobody wants are made
def _store_rounded(x, low, high, scale, most):
    """A block's codes; returns what store_codes does."""
    steps = usable(splat(scale))
    return store_codes(x, nearest(divide(low, steps)), nearest(divide(high, steps)), most)


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


@jitable(forceinline=True)
def _lay_super(source, known, n, most, offset, x, x_scale, sums):
    """A super-block of one token; returns its reach. reference: quantize_shifted."""
    amax = _amax(source, SUPER) if known else np.float32(0)
    scale = amax / np.float32(most) * SMALLEST
    steps, shifts, reach = room(1), sums + 4 * n * SHIFTS_AT, 0
    for block in range(ABOVE):  # of all blocks first, or each waits for the one before
        own, shift = _amax(source + 4 * BLOCK * block, BLOCK) if known else np.float32(0), SHIFTS
        for k in range(SHIFTS):  # until the codes reach far enough
            shift -= np.intp(own * np.float32(2 << k) <= amax)
        store_float(steps + 4 * block, scale * np.float32(1 << shift))
        store_whole(shifts + 4 * n * block, shift)
    for block in range(ABOVE):
        low, high = _halves(source + 4 * BLOCK * block, known)
        step, shift = load_float(steps + 4 * block), load_whole(shifts + 4 * n * block)
        first, second, positive = _store_rounded(x + n * BLOCK * block, low, high, step, most)
        store_float(x_scale + 4 * n * block, scale)
        if offset > 0:
            _store_begins(sums + 12 * n * block, n, offset, first, second)
            continue
        at = sums + 4 * n * (block // 4) + block % 4
        store_split(at, at + 8 * n, first + second << shift)
        at = sums + 4 * n * (HALVES_AT + block // 2) + block % 2 * 2
        store_split(at, at + 16 * n, first << shift)
        store_split(at + 1, at + 16 * n + 1, second << shift)
        if block % 2:
            both = load_whole(shifts + 4 * n * (block - 1)) << 16 | shift
            store_whole(sums + 4 * n * (PAIRS_AT + block // 2), both)
        reach = max(reach, positive, positive - first - second)
    return reach


@jitable(forceinline=True)
def _lay_blocks(source, known, n, most, offset, kind, scale, count, x, x_scale, sums):
    """ABOVE blocks, or fewer, of one token that has a scale itself or for each; reference: quantize_activations."""
    scales = room(1)
    for block in range(count):  # of all blocks first, as above
        if kind == BLOCKS and known:
            scale = _amax(source + 4 * BLOCK * block, BLOCK) / np.float32(most)
        store_float(scales + 4 * block, scale)
    for block in range(count):
        low, high = _halves(source + 4 * BLOCK * block, known)
        scale, here, of = load_float(scales + 4 * block), x + n * BLOCK * block, sums + 12 * n * block
        store_float(x_scale + 4 * n * block, scale)
        if kind == FLOAT:
            here += 3 * n * BLOCK * block
            store_floats(here, low)
            store_floats(here + 64, high)
            _store_sums(of, n, lane_sum(low), lane_sum(high))
            continue
        first, second, _ = _store_rounded(here, low, high, scale, most)
        if offset > 0:
            _store_begins(of, n, offset, first, second)
        else:
            _store_sums(of, n, np.float32(first), np.float32(second))


def lay_out_text(n: int):
    """Activations of the panels first <= panel < last as the products read them; reference: activations.py.

    source : address of float32 [token, column]; columns are a multiple of 32. kind : laid_kind.
    """

    def lay_out(source, tokens, columns, kind, x, x_scale, x_sums, first, last):
        given, blocks = kind >> GIVEN, columns // BLOCK
        offset, kind = (kind & (1 << GIVEN) - 1) >> KINDS, kind & (1 << KINDS) - 1
        most, kind, scales = 7 if kind & FOUR else 127, kind & ~FOUR, room(1)
        x_bytes = BLOCK * (4 if kind == FLOAT else 1)
        for panel in range(first, last):
            for i in range(n):
                token, scale = panel * n + i, np.float32(kind == FLOAT)
                if kind == TOKEN and token < tokens:
                    scale = _amax(source + 4 * token * columns, columns) / np.float32(most)
                store_float(scales + 4 * i, scale)
                if given and scale < np.inf:  # else the token holds NaN or Inf, and so will its products
                    store_whole(scales + 4 * i, given)
            for start in range(0, blocks, ABOVE):  # token by token: they write to the same lines of the cache
                for i in range(n):
                    at, token = (panel * blocks + start) * n + i, panel * n + i
                    here, known = source + 4 * (token * columns + start * BLOCK), token < tokens
                    codes, steps = x + x_bytes * at, x_scale + 4 * at
                    for line in range(4 * SUPER, 8 * SUPER, 64):
                        prefetch(here + line)
                    if kind == SUPERS:
                        sums = x_sums + 4 * ((panel * blocks + start) // ABOVE * SUPER_WORDS * n + i)
                        reach = _lay_super(here, known, n, most, offset, codes, steps, sums)
                        if offset == 0:
                            of_panel = sums - 4 * i + 4 * n * REACH_AT
                            store_whole(of_panel, max(reach, load_whole(of_panel)) if i else reach)
                    else:
                        sums, count = x_sums + 12 * (at - i) + 4 * i, min(ABOVE, blocks - start)
                        scale = load_float(scales + 4 * i)
                        _lay_blocks(here, known, n, most, offset, kind, scale, count, codes, steps, sums)

    return lay_out


@cache
def lay_out_address(n: int) -> int:
    """Address of the compiled lay_out."""
    return compile_address(lay_out_text(n), types.void(*[types.intp] * 9), f"_{n}")
