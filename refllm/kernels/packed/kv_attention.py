"""Attention of one new token over packed keys and values, without unpacking them to memory.

    keys    codes of R consecutive tokens of one channel, a scale and a minimum for every G of them
    values  codes of the channels of one token, a scale and a minimum for every G of them
    x = scale * code + minimum, and behind both some tokens in float32 (KIVI's layout: methods/kvcache/kivi)

Tokens of a key channel that have one scale are unpacked with one multiply-add for sixteen of them, a token to a lane,
and multiplied with every query head that shares the keys while they lie in registers; values likewise, sixteen
channels at a time. Products of keys, and values of up to AGAIN tokens, are summed in float32, all else in float64. The
NumPy text is attend over the dequantised arrays.

A cache is a row of WORDS: addresses of packed codes, scales, minima and of what is in float32, for keys and values, and
the bytes from head to head; then how many blocks and tokens there are.
"""

from functools import cache

import numpy as np
from numba import types

from refllm.kernels.packed.compile import compile_address, compile_kernel, jitable
from refllm.kernels.packed.lanes import (
    add_widened,
    codes_run,
    fma,
    load_double,
    load_float,
    load_half,
    over_again,
    repeated,
    splat,
    splats,
    store_double,
    store_float,
    store_widened,
    word,
    zeros,
)
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


def _score_some(bits: int, n: int, vectors: int):
    """packed_scores of `vectors` times sixteen tokens that share scales."""
    sums = n * vectors

    @jitable
    def score_some(turned, dim, codes, code_bytes, scale, low, apart, scores, room):
        """turned : (dim, n) float32, the scaled queries; codes, scale, low : of the first channel."""
        total = zeros(sums)
        for d in range(dim):
            step, lowest = splat(load_half(scale + d * apart)), splat(load_half(low + d * apart))
            keys = fma(codes_run(codes + d * code_bytes, bits, vectors), step, lowest)
            total = fma(over_again(keys, n), repeated(splats(turned + 4 * n * d, n), vectors), total)
        store_widened(scores, 8 * room, total, n)

    return score_some


def _add_some(bits: int, n: int, vectors: int):
    """packed_values of `vectors` times sixteen channels that share scales."""
    sums_of = n * vectors

    @jitable
    def add_some(shares, first, last, codes, code_bytes, scale, low, apart, sums, dim, c):
        """shares : (last - first, n) float32; codes, scale, low : of token 0; sums : (n, dim) float64, from c on."""
        total = zeros(sums_of)
        for i in range(first, last):
            step, lowest = splat(load_half(scale + i * apart)), splat(load_half(low + i * apart))
            values = fma(codes_run(codes + i * code_bytes, bits, vectors), step, lowest)
            total = fma(over_again(values, n), repeated(splats(shares + 4 * n * (i - first), n), vectors), total)
        add_widened(sums + 8 * c, 8 * dim, total, n)

    return add_some


def _text(bits: int, group: int, n: int):
    """Attention of one token in n heads that share keys and values."""
    dot_keys, add_values = words(n)
    vectors = min(group // SOME, 8 // n)  # as many sums as the registers hold
    score_several, score_one = _score_some(bits, n, vectors), _score_some(bits, n, 1)
    add_several, add_one = _add_some(bits, n, vectors), _add_some(bits, n, 1)
    whole = group // (SOME * vectors) * vectors * SOME  # tokens or channels of a group that are taken together

    @jitable
    def packed_scores(turned, dim, codes, scale, low, residual, blocks, scores, room):
        """scores[h, i] (float64) of blocks * residual tokens."""
        per_block, code_bytes = residual // group, residual * bits // 8
        for g in range(blocks * per_block):
            at = dim * (g // per_block) * per_block + g % per_block  # of the first channel's scale
            code = codes + dim * (g // per_block) * code_bytes + g % per_block * group * bits // 8
            s, m, apart, to = scale + 2 * at, low + 2 * at, 2 * per_block, scores + 8 * g * group
            for t in range(0, whole, SOME * vectors):
                score_several(turned, dim, code + bits * t // 8, code_bytes, s, m, apart, to + 8 * t, room)
            for t in range(whole, group, SOME):
                score_one(turned, dim, code + bits * t // 8, code_bytes, s, m, apart, to + 8 * t, room)

    @jitable
    def packed_values(shares, room, dim, codes, scale, low, tokens, sums, some):
        """sums[h] += sum over i of shares[h, i] * value i (float64); some : room for (AGAIN, n) float32."""
        groups, code_bytes, columns = dim // group, dim * bits // 8, SOME * vectors
        for first in range(0, tokens, AGAIN):
            last = min(tokens, first + AGAIN)
            for i in range(first, last):
                for h in range(n):
                    share = np.float32(load_double(shares + 8 * (room * h + i)))
                    store_float(some + 4 * (n * (i - first) + h), share)
            for g in range(groups):
                for c in range(g * group, g * group + whole, columns):
                    code, at = codes + c * bits // 8, 2 * g
                    add_several(some, first, last, code, code_bytes, scale + at, low + at, 2 * groups, sums, dim, c)
                for c in range(g * group + whole, (g + 1) * group, SOME):
                    code, at = codes + c * bits // 8, 2 * g
                    add_one(some, first, last, code, code_bytes, scale + at, low + at, 2 * groups, sums, dim, c)

    def attend_coded(queries, table, j, count, dim, own, out):
        scale, cap = load_double(own), load_double(own + 8)
        room, start, packed = attention_room(count), word(table, _START), word(table, _BLOCKS) * word(table, _RESIDUAL)
        wide = own + 8 * KNOBS
        sums, turned, some = wide + 8 * n * dim, wide + 16 * n * dim, wide + 24 * n * dim
        scores = some + 4 * n * AGAIN
        for h in range(n):
            for d in range(dim):
                store_float(turned + 4 * (n * d + h), np.float32(scale) * load_float(queries + 4 * (dim * h + d)))
        scale_up(queries, n * dim, scale, wide)
        codes, s, low, rest = _keys_of(table, j)
        packed_scores(turned, dim, codes, s, low, word(table, _RESIDUAL), word(table, _BLOCKS), scores, room)
        dot_keys(wide, rest, word(table, _K_TAIL), dim, scores + 8 * packed, room)
        clear(sums, n * dim)
        for h in range(n):  # the queries are not needed any more: their place takes the totals
            mine = scores + 8 * room * h
            store_double(wide + 8 * h, soften(mine + 8 * start, count - start, cap))
            clear(mine, start)
        codes, s, low, rest = _values_of(table, j)
        tokens = word(table, _TOKENS)
        packed_values(scores, room, dim, codes, s, low, tokens, sums, some)
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
    own = np.empty(own_doubles(MOST, dim, count))
    kernels = kernel_table(bits, group, heads, heads // kv_heads)
    q, out = np.ascontiguousarray(q), np.empty((heads, dim), np.float32)
    addresses = kernels.ctypes.data, table.ctypes.data, q.ctypes.data
    knobs = float(scale), float(softcap or 0)
    _kernel()(*addresses, heads, kv_heads, dim, count, *knobs, own.ctypes.data, out.ctypes.data)
    return out
