"""Attention of one new token over packed keys and values, without unpacking them to memory.

    keys    codes of R consecutive tokens of one channel, a scale and a minimum for every G of them
    values  codes of the channels of one token, a scale and a minimum for every G of them
    x = scale * code + minimum, and behind both some tokens in float32 (KIVI's layout: methods/kvcache/kivi)

Nothing is dequantised: a score is the sum over channels of (q * scale) * code, and of q * minimum, which is the same
for all tokens of a group. So scales and minima meet the queries, once for a group, and codes are unpacked for sixteen
tokens, a token to a lane, and multiplied with every query head that shares the keys while they lie in registers.
Values likewise: scales and minima meet the shares of their tokens, and sixteen channels are taken at a time. The sums
over channels, or over up to AGAIN tokens, are in float32, all else in float64. The NumPy text is attend over the
dequantised arrays.

A cache is a row of WORDS: addresses of packed codes, scales, minima and of what is in float32, for keys and values, and
the bytes from head to head; then how many blocks and tokens there are.
"""

from functools import cache

import numpy as np
from numba import types

from refllm.kernels.packed.compile import compile_address, compile_kernel, jitable
from refllm.kernels.packed.lane_codes import codes_run
from refllm.kernels.packed.lane_math import fma, narrow, times
from refllm.kernels.packed.lane_memory import (
    add_widened,
    double_grid,
    load_double,
    load_float,
    load_floats,
    load_half,
    load_halves,
    splats_apart,
    store_double,
    store_float,
    store_floats,
    store_tokens,
    word,
)
from refllm.kernels.packed.lanes import every, in_order, over_again, pair, repeated
from refllm.kernels.packed.team import call
from refllm.kernels.packed.token_attention import (
    AGAIN,
    KNOBS,
    MOST,
    attention_room,
    clear,
    finish,
    heads_together,
    needed,
    own_doubles,
    scale_up,
    soften,
    words,
)

SOME = 16  # tokens, or channels, at a time
_SIDE = ("codes", "scale", "low", "rest", "codes_head", "scale_head", "rest_head")
WORDS = (
    *(f"{side}_{name}" for side in "kv" for name in _SIDE),
    "k_blocks", "k_tail", "v_tokens", "v_tail", "residual", "start",
)  # fmt: skip
_AT = {name: place for place, name in enumerate(WORDS)}


def _side_loader(side: str):
    """Addresses of codes, scales, minima and rest of one head of one side."""
    codes, scale, low, rest, codes_head, scale_head, rest_head = (_AT[f"{side}_{name}"] for name in _SIDE)

    @jitable
    def of_head(table, j):
        apart = j * word(table, scale_head)  # the minima are as far apart as the scales
        return (
            word(table, codes) + j * word(table, codes_head),
            word(table, scale) + apart,
            word(table, low) + apart,
            word(table, rest) + j * word(table, rest_head),
        )

    return of_head


_keys_of, _values_of = _side_loader("k"), _side_loader("v")
_BLOCKS, _K_TAIL, _TOKENS, _V_TAIL, _RESIDUAL, _START = range(2 * len(_SIDE), len(WORDS))


@cache  # kernels share it: it is compiled once in a process
def _sum_run(bits: int, n: int, vectors: int):
    """add_block for `vectors` times sixteen codes of every row that share scales."""

    @jitable
    def add_run(scaled, apart, step, count, codes, code_bytes, lows, lows_apart, out, stride):
        """out[h] += low[h] + sum over i of scaled[h, i] * code i; numbers of a head `apart` bytes from the next's."""
        total = repeated(splats_apart(lows, lows_apart, n), vectors)
        for i in range(count):
            some = codes_run(codes + i * code_bytes, bits, vectors)
            total = fma(over_again(some, n), repeated(splats_apart(scaled + i * step, apart, n), vectors), total)
        add_widened(out, stride, in_order(total, vectors), n)

    return add_run


@jitable
def _pitch(count):
    """Numbers from head to head, for `count` of each: whole vectors."""
    return (count + SOME - 1) // SOME * SOME


@jitable
def _spread(x, room, n, count, side, out):
    """out[h, i * side + g] = x[h, i] for all g < side: (n, _pitch) float32 from (n, room) float64.

    By scalars for the odd part of `side`; then all are doubled as often as it takes, from the last to the first.
    """
    odd, pitch = side, _pitch(count * side)
    while odd % 2 == 0:
        odd //= 2
    for h in range(n):
        row, mine = x + 8 * room * h, out + 4 * pitch * h
        if odd == 1:
            for i in range(0, count, SOME):
                store_floats(mine + 4 * i, narrow(double_grid(row + 8 * i, 0, 1, 2)))
        else:
            for i in range(count):
                for g in range(odd):
                    store_float(mine + 4 * (i * odd + g), np.float32(load_double(row + 8 * i)))
        width = odd
        while width < side:
            for i in range((count * width - 1) // SOME * SOME, -1, -SOME):
                some = load_floats(mine + 4 * i)
                store_tokens(mine + 8 * i, 4 * SOME, in_order(pair(some, some), 2))
            width *= 2


@cache
def _fold_scales(n: int):
    """Scales and minima of several groups side by side, for all heads."""

    @jitable
    def fold(x, scale, low, count, side, scaled, ring, lows):
        """scaled[h, f] = x[h, f] * scale[f]; lows[h, g] the sum of x[h, f] * low[f] over f = g, g + side, ...

        x, scaled : (n, _pitch) float32; scale, low : (count) float16; ring : room for (n, SOME * side) float32.
        """
        pitch = _pitch(count)
        turn = side  # the least multiple of both sizes: then lane 0 belongs to group 0 again
        while turn % SOME:
            turn += side
        for i in range(0, n * turn, SOME):
            store_floats(ring + 4 * i, every(0))
        whole, at = count // SOME * SOME, 0
        for f in range(0, whole, SOME):
            s, m = load_halves(scale + 2 * f), load_halves(low + 2 * f)
            for h in range(n):
                some, mine = load_floats(x + 4 * (h * pitch + f)), ring + 4 * (h * turn + at)
                store_floats(mine, fma(some, m, load_floats(mine)))
                store_floats(scaled + 4 * (h * pitch + f), times(some, s))
            at = at + SOME if at + SOME < turn else 0
        for f in range(whole, count):
            s, m = load_half(scale + 2 * f), load_half(low + 2 * f)
            for h in range(n):
                some, mine = load_float(x + 4 * (h * pitch + f)), ring + 4 * (h * turn + f % turn)
                store_float(mine, load_float(mine) + some * m)
                store_float(scaled + 4 * (h * pitch + f), some * s)
        for h in range(n):
            for g in range(side):
                total = np.float32(0)
                for i in range(g, turn, side):
                    total += load_float(ring + 4 * (h * turn + i))
                store_float(lows + 4 * (h * side + g), total)

    return fold


def _text(bits: int, group: int, n: int):
    """Attention of one token in n heads that share keys and values."""
    dot_keys, add_values = words(n)
    vectors = min(group // SOME, 8 // n)  # as many sums as the registers hold
    add_several, add_one, fold = _sum_run(bits, n, vectors), _sum_run(bits, n, 1), _fold_scales(n)
    whole = group // (SOME * vectors) * vectors * SOME  # codes of a group that are taken together

    @jitable
    def add_block(x, scale, low, count, side, codes, code_bytes, out, stride):
        """out[h, c] += sum over i of x[h, i] (scale[i, g] code[i, c] + low[i, g]), g = c // group < side.

        x : as _spread leaves it, and room behind it (own_doubles); out : float64, `stride` bytes from head to head.
        """
        apart = 4 * _pitch(count * side)
        scaled, lows = x + n * apart, x + 2 * n * apart
        fold(x, scale, low, count * side, side, scaled, lows + 4 * n * side, lows)
        for g in range(side):
            some, of_low = scaled + 4 * g, lows + 4 * g
            for c in range(g * group, g * group + whole, SOME * vectors):
                code, to = codes + bits * c // 8, out + 8 * c
                add_several(some, apart, 4 * side, count, code, code_bytes, of_low, 4 * side, to, stride)
            for c in range(g * group + whole, (g + 1) * group, SOME):
                code, to = codes + bits * c // 8, out + 8 * c
                add_one(some, apart, 4 * side, count, code, code_bytes, of_low, 4 * side, to, stride)

    def attend_coded(queries, table, j, count, dim, own, out):
        scale, cap = load_double(own), load_double(own + 8)
        residual, blocks, start = word(table, _RESIDUAL), word(table, _BLOCKS), word(table, _START)
        room, packed = attention_room(count), blocks * residual
        wide = own + 8 * KNOBS
        sums, scores = wide + 8 * n * dim, wide + 16 * n * dim
        some = scores + 8 * n * room
        scale_up(queries, n * dim, scale, wide)
        codes, s, low, rest = _keys_of(table, j)
        side, code_bytes = residual // group, bits * residual // 8
        for h in range(n):
            clear(scores + 8 * room * h, packed)
        _spread(wide, dim, n, dim, side, some)
        for b in range(blocks):
            at, code, to = 2 * dim * side * b, codes + dim * code_bytes * b, scores + 8 * residual * b
            add_block(some, s + at, low + at, dim, side, code, code_bytes, to, 8 * room)
        dot_keys(wide, rest, word(table, _K_TAIL), dim, scores + 8 * packed, room)
        clear(sums, n * dim)
        for h in range(n):  # the queries are not needed any more: their place takes the totals
            mine = scores + 8 * room * h
            store_double(wide + 8 * h, soften(mine + 8 * start, count - start, cap))
            clear(mine, start)
        codes, s, low, rest = _values_of(table, j)
        tokens, side, code_bytes = word(table, _TOKENS), dim // group, dim * bits // 8
        for first in range(0, tokens, AGAIN):
            together, at = min(AGAIN, tokens - first), 2 * side * first
            _spread(scores + 8 * first, room, n, together, side, some)
            add_block(some, s + at, low + at, together, side, codes + first * code_bytes, code_bytes, sums, 8 * dim)
        add_values(scores + 8 * tokens, room, rest, word(table, _V_TAIL), dim, sums)
        for h in range(n):
            finish(sums + 8 * dim * h, dim, load_double(wide + 8 * h), out + 4 * dim * h)

    return attend_coded


@cache
def coded_address(bits: int, group: int, n: int) -> int:
    """Address of the compiled attention of n heads that share keys and values, n <= MOST, over a packed cache.

    void(queries, cache, kv head, count, dim, own, out): cache : address of a row of WORDS; count : its tokens; the
    rest as in token_attention.attend_address.
    """
    return compile_address(_text(bits, group, n), types.void(*[types.intp] * 7), f"_{bits}_{group}_{n}")


def kv_attention(kernels, table, queries, heads, kv_heads, dim, count, factor, cap, own, out):
    """All heads, one group of them after another; kernels : address of a table of coded_address."""
    store_double(own, factor)
    store_double(own + 8, cap)
    per_group, h = heads // kv_heads, 0
    while h < heads:
        together = heads_together(h, heads, per_group)
        what = queries + 4 * dim * h, table, h // per_group, count, dim, own, out + 4 * dim * h
        call(word(kernels, together), what)
        h += together


@cache
def _kernel():
    arguments = [types.intp] * 7 + [types.float64] * 2 + [types.intp] * 2
    return compile_kernel(kv_attention, types.void(*arguments))


@cache
def kernel_table(bits: int, group: int, heads: int, per_group: int, threads: int = 1) -> np.ndarray:
    """Place i: the kernel of i heads together; for as many as a team of so many threads meets."""
    table = np.zeros(MOST + 1, np.int64)
    for together in needed(heads, per_group, threads):
        table[together] = coded_address(bits, group, together)
    return table


def attend_packed(
    q: np.ndarray,
    keys: tuple,
    values: tuple,
    *,
    bits: int,
    group: int,
    residual: int,
    scale: float,
    start: int = 0,
    softcap: float | None = None,
) -> np.ndarray:
    """Attention of one token's query heads over a packed cache.

    Parameters
    ----------
    q : (H, D) float32
    keys : tuple of arrays
        codes (Hk, blocks, D, bytes of `residual` codes) uint8, scale and minimum (Hk, blocks, D, residual / group)
        float16, and the tokens behind them (Hk, rest, D) float32. The first three may be None.
    values : tuple of arrays
        codes (Hk, tokens, bytes of D codes), scale and minimum (Hk, tokens, D / group), and the rest (Hk, rest, D).
    bits, group, residual : int
        As in methods.kvcache.kivi; `group` is a multiple of 16 and divides D.
    scale : float
        Of the scores.
    start : int
        Tokens before it are not seen (a sliding window).
    softcap : float, optional

    Returns
    -------
    (H, D) float32
    """
    heads, dim = q.shape
    found, kept = dict.fromkeys(WORDS, 0), []
    for side, arrays in (("k", keys), ("v", values)):
        for name, array in zip(_SIDE, arrays, strict=False):
            if array is not None and array.size:
                array = array if array[0].flags.c_contiguous else np.ascontiguousarray(array)
                kept.append(array)
                found |= {f"{side}_{name}": array.ctypes.data, f"{side}_{name}_head": array.strides[0]}
        found[f"{side}_tail"] = arrays[3].shape[1]
    found["k_blocks"], found["v_tokens"] = (0 if side[0] is None else side[0].shape[1] for side in (keys, values))
    found["residual"], found["start"] = residual, start
    table = np.array([found[name] for name in WORDS], np.int64)
    count, kv_heads = found["k_blocks"] * residual + found["k_tail"], len(keys[3])
    own = np.empty(own_doubles(MOST, dim, count, max(residual, dim) // group))
    kernels = kernel_table(bits, group, heads, heads // kv_heads)
    q, out = np.ascontiguousarray(q), np.empty((heads, dim), np.float32)
    addresses = kernels.ctypes.data, table.ctypes.data, q.ctypes.data
    knobs = float(scale), float(softcap or 0)
    _kernel()(*addresses, heads, kv_heads, dim, count, *knobs, own.ctypes.data, out.ctypes.data)
    return out
