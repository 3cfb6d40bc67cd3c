"""Attention of one new token over packed keys and values, without unpacking them to memory.

    keys    codes of R consecutive tokens of one channel, a scale and a minimum for every G of them
    values  codes of the channels of one token, a scale and a minimum for every G of them
    x = scale * code + minimum, and behind both some tokens in float32 (KIVI's layout: methods/kvcache/kivi)

Sixteen tokens of a key channel have one scale and minimum, so they are unpacked with one multiply-add, into a table of
sixteen tokens by all channels that stays in the first-level cache; every query head that shares these keys then reads
it, a token to a lane. Values are unpacked sixteen channels at a time and added to the sums of the same heads. Softmax
and sums are float64. The NumPy text is attend over the dequantised arrays.
"""

from functools import cache

import numpy as np
from numba import types
from numba.extending import register_jitable

from refllm.kernels.packed.compile import compile_kernel
from refllm.kernels.packed.decode_step import records
from refllm.kernels.packed.lanes import (
    double_grid,
    every,
    fma,
    load_codes,
    load_double,
    load_float,
    load_floats,
    load_half,
    plus,
    splat,
    store_double,
    store_float,
    store_floats,
    store_grid,
    widen,
)
from refllm.kernels.packed.token_attention import clear, finish, scale_up, soften, words

SOME = 16  # tokens, or channels, at a time
_SIDE = ("codes", "scale", "low", "rest", "codes_head", "scale_head", "rest_head")
# Addresses of packed codes, scales, minima and of what is in float32, for keys and values; bytes from head to head.
CACHE = np.dtype(
    [(f"{side}_{name}", np.int64) for side in "kv" for name in _SIDE]
    + [(name, np.int64) for name in ("k_blocks", "k_tail", "v_tokens", "v_tail", "residual", "heads", "kv_heads")]
    + [("dim", np.int64), ("start", np.int64)]
)


def _text(bits: int, group: int):
    """Attention of one token for one width of codes and size of groups."""
    dot_keys, add_values = words(1)

    @register_jitable
    def packed_scores(queries, heads, dim, codes, scale, low, residual, blocks, factor, own, scores, room):
        """Scores (float64) of blocks * residual tokens for `heads` queries that share these keys."""
        per_block, code_bytes = residual // group, residual * bits // 8
        steps, lows, turned = own, own + 4 * dim, own + 8 * dim
        for group_number in range(blocks * per_block):
            block, g = group_number // per_block, group_number % per_block
            for d in range(dim):
                at = 2 * ((block * dim + d) * per_block + g)
                store_float(steps + 4 * d, load_half(scale + at) * factor)
                store_float(lows + 4 * d, load_half(low + at) * factor)
            for t in range(0, group, SOME):
                for d in range(dim):
                    at = (block * dim + d) * code_bytes + (g * group + t) * bits // 8
                    unpacked = fma(
                        load_codes(codes + at, bits), splat(load_float(steps + 4 * d)), splat(load_float(lows + 4 * d))
                    )
                    store_floats(turned + 64 * d, unpacked)
                for h in range(heads):
                    query, even, odd = queries + 4 * dim * h, every(0), every(0)
                    for d in range(0, dim, 2):
                        even = fma(load_floats(turned + 64 * d), splat(load_float(query + 4 * d)), even)
                        odd = fma(load_floats(turned + 64 * d + 64), splat(load_float(query + 4 * d + 4)), odd)
                    store_grid(scores + 8 * (h * room + group_number * group + t), 0, widen(plus(even, odd)), 1)

    @register_jitable
    def packed_values(shares, room, heads, dim, codes, scale, low, tokens, sums):
        """sums += sum over tokens of share * value (float64), for `heads` queries that share these values."""
        groups, code_bytes = dim // group, dim * bits // 8
        for t in range(tokens):
            for g in range(groups):
                step = splat(load_half(scale + 2 * (t * groups + g)))
                lowest = splat(load_half(low + 2 * (t * groups + g)))
                for c in range(g * group, (g + 1) * group, SOME):
                    value = widen(fma(load_codes(codes + t * code_bytes + c * bits // 8, bits), step, lowest))
                    for h in range(heads):
                        share = splat(load_double(shares + 8 * (h * room + t)))
                        at = sums + 8 * (h * dim + c)
                        store_grid(at, 0, fma(value, share, double_grid(at, 0, 1, 2)), 1)

    def kv_attention(cache, queries, factor, cap, own, scores, room, out):
        kv = cache[0]
        dim, shared, start = kv.dim, kv.heads // kv.kv_heads, kv.start
        packed = kv.k_blocks * kv.residual
        tokens = packed + kv.k_tail
        sums = own + 72 * dim
        wide, totals = sums + 8 * shared * dim, sums + 8 * (shared + 1) * dim
        for j in range(kv.kv_heads):
            some, to = queries + 4 * dim * shared * j, out + 4 * dim * shared * j
            codes, low = kv.k_codes + j * kv.k_codes_head, j * kv.k_scale_head
            packed_scores(
                some, shared, dim, codes, kv.k_scale + low, kv.k_low + low, kv.residual, kv.k_blocks,
                np.float32(factor), own, scores, room,
            )  # fmt: skip
            clear(sums, shared * dim)
            for h in range(shared):
                mine = scores + 8 * h * room
                scale_up(some + 4 * dim * h, dim, factor, wide)
                dot_keys(wide, kv.k_rest + j * kv.k_rest_head, kv.k_tail, dim, mine + 8 * packed, room)
                store_double(totals + 8 * h, soften(mine + 8 * start, tokens - start, cap))
                clear(mine, start)
            codes, low = kv.v_codes + j * kv.v_codes_head, j * kv.v_scale_head
            packed_values(scores, room, shared, dim, codes, kv.v_scale + low, kv.v_low + low, kv.v_tokens, sums)
            for h in range(shared):
                mine, of = scores + 8 * (h * room + kv.v_tokens), sums + 8 * dim * h
                add_values(mine, room, kv.v_rest + j * kv.v_rest_head, kv.v_tail, dim, of)
                finish(of, dim, load_double(totals + 8 * h), to + 4 * dim * h)

    return kv_attention


@cache
def _kernel(bits: int, group: int):
    arguments = [records(CACHE), types.intp, types.float64, types.float64, *[types.intp] * 4]
    return compile_kernel(_text(bits, group), types.void(*arguments), f"_{bits}_{group}")


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
    cache, kept = np.zeros(1, CACHE), []
    for side, arrays in (("k", keys), ("v", values)):
        for name, array in zip(_SIDE, arrays, strict=False):
            if array is not None and array.size:
                array = array if array[0].flags.c_contiguous else np.ascontiguousarray(array)
                kept.append(array)
                cache[f"{side}_{name}"] = array.ctypes.data
                if name != "low":  # as far apart as the scales
                    cache[f"{side}_{name}_head"] = array.strides[0]
        cache[f"{side}_tail"] = arrays[3].shape[1]
    cache["k_blocks"], cache["v_tokens"] = (0 if side[0] is None else side[0].shape[1] for side in (keys, values))
    cache["heads"], cache["kv_heads"], cache["dim"] = heads, len(keys[3]), dim
    cache["residual"], cache["start"] = residual, start
    tokens = int(cache["k_blocks"][0] * residual + cache["k_tail"][0])
    room = tokens + 32  # the softmax works on whole vectors
    shared = heads // len(keys[3])
    # Unpacked keys with their scales and minima (18 dim float32), sums of all heads that share them, a query, totals.
    own, scores = np.empty((9 + shared + 1) * dim + shared), np.empty(shared * room)
    q, out = np.ascontiguousarray(q), np.empty((heads, dim), np.float32)
    pointers = own.ctypes.data, scores.ctypes.data, room, out.ctypes.data
    _kernel(bits, group)(cache, q.ctypes.data, float(scale), float(softcap or 0), *pointers)
    return out
