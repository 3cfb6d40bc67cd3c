"""Many tokens through all layers in one compiled call: the twin of model/llama.py for a prompt.

The text is decode_step's for many tokens. Tokens are divided among the members of the team where a step works token by
token (norms, laying activations out, the rotation), rows of weights in the products, heads and queries in attention.

Attention goes over keys in blocks with a running softmax (FlashAttention's recurrence: methods/attention/flash.py
explains it), in float64 as in token_attention.py: eight queries at a time, one to a lane, and for all heads that share
the keys, so that each block is widened once.
"""

from functools import cache

import numpy as np
from numba import types

from refllm.kernels.packed.compile import compile_kernel, jitable
from refllm.kernels.packed.decode_step import activate, add, add_rows, clear_tail, copy, norm, records, rotate
from refllm.kernels.packed.laid_out import TOKENS
from refllm.kernels.packed.lane_math import divide, exponential, fma, larger, minus, numbered, plus, times, where_below
from refllm.kernels.packed.lane_memory import (
    double_grid,
    double_splats_apart,
    load_double,
    load_doubles,
    load_float,
    store_double,
    store_doubles,
    store_float,
    store_grid,
)
from refllm.kernels.packed.lanes import WIDE, splat, wide_every, wide_zeros
from refllm.kernels.packed.plan import BUFFERS, LAYER
from refllm.kernels.packed.simd import target_features
from refllm.kernels.packed.team import barrier, call, share
from refllm.kernels.packed.tiling import BLOCK, ROWS
from refllm.kernels.packed.token_attention import scale_up, tanh
from refllm.kernels.packed.turn_kernels import turn

SOME = 8 if "+avx512f" in target_features() else 4  # keys, or columns of values, at a time
KEY_BLOCK = 32
NOTHING, OTHERS = -1, -2  # instead of a kind: nothing stands laid out, or the activations of another product


@jitable
def _scores(query, keys, count, dim, cap, out):
    """out[j] = key j . each of eight queries, capped; float64: query (dim, 8), keys (count, dim), out (count, 8)."""
    whole = count // SOME * SOME
    for j in range(0, whole, SOME):
        total = wide_zeros(SOME)
        for c in range(dim):
            some = double_splats_apart(keys + 8 * (dim * j + c), 8 * dim, SOME)
            total = fma(load_doubles(query + 64 * c), some, total)
        store_grid(out + 64 * j, 64, total, SOME)
    for j in range(whole, count):
        one = wide_every(0)
        for c in range(dim):
            one = fma(load_doubles(query + 64 * c), splat(load_double(keys + 8 * (dim * j + c))), one)
        store_doubles(out + 64 * j, one)
    if cap > 0:
        for j in range(count):
            store_doubles(out + 64 * j, times(splat(cap), tanh(divide(load_doubles(out + 64 * j), splat(cap)))))


@jitable
def _mask(scores, first_key, count, queries, window):
    """-inf where a key is later than the query, or further back than the window."""
    never = splat(-np.inf)
    for j in range(count):
        some = load_doubles(scores + 64 * j)
        key = splat(np.float64(first_key + j))
        some = where_below(queries, key, never, some)
        if window:
            some = where_below(key, plus(queries, splat(np.float64(1 - window))), never, some)
        store_doubles(scores + 64 * j, some)


@jitable
def _add_values(shares, values, count, dim, fade, out):
    """out = fade * out + sum over keys of share * value; shares : (count, 8), values : (count, dim), out : (dim, 8)."""
    whole = dim // SOME * SOME
    for c in range(0, whole, SOME):
        total = times(double_grid(out + 64 * c, 64, SOME, 1), fade)
        for j in range(count):
            total = fma(load_doubles(shares + 64 * j), double_splats_apart(values + 8 * (dim * j + c), 8, SOME), total)
        store_grid(out + 64 * c, 64, total, SOME)
    for c in range(whole, dim):
        one = times(load_doubles(out + 64 * c), fade)
        for j in range(count):
            one = fma(load_doubles(shares + 64 * j), splat(load_double(values + 8 * (dim * j + c))), one)
        store_doubles(out + 64 * c, one)


@jitable
def _shares(scores, count, state):
    """Scores of a block become shares, relative to the largest score so far.

    state : of each query, float64: the largest score and the sum of shares, updated, and what turns earlier shares into
    such relative to the new largest score.
    """
    most = load_doubles(state)
    top = most
    for j in range(count):
        top = larger(top, load_doubles(scores + 64 * j))
    # A lane that has seen no key yet has the maximum -inf; 0 in its place keeps -inf - -inf away.
    base = where_below(top, splat(-1e300), wide_every(0), top)
    fade = exponential(minus(most, base))
    total = times(load_doubles(state + 64), fade)
    for j in range(count):
        some = exponential(minus(load_doubles(scores + 64 * j), base))
        store_doubles(scores + 64 * j, some)
        total = plus(total, some)
    store_doubles(state, top)
    store_doubles(state + 64, total)
    store_doubles(state + 128, fade)


@jitable
def _attend_some(query, heads, keys, values, first, tokens, dim, scale, cap, window, own, out, stride):
    """Attention of up to eight queries at the positions first, first + 1 ... over the keys 0 .. first + tokens - 1.

    query, out : rows of `heads` heads that share keys and values, `stride` bytes apart; own : room, as in own_bytes.
    """
    wide, of_heads, each = own, own + 8 * KEY_BLOCK * dim, _bytes_of_a_head(dim)
    # Of each head: queries (dim, 8), sums (dim, 8), scores (KEY_BLOCK, 8), state (3, 8).
    sums, scores, state = 64 * dim, 128 * dim, 128 * dim + 64 * KEY_BLOCK
    for h in range(heads):
        mine = of_heads + each * h
        for c in range(dim):
            store_doubles(mine + 64 * c, wide_every(0))
            store_doubles(mine + sums + 64 * c, wide_every(0))
            for i in range(tokens):
                number = np.float64(load_float(query + stride * i + 4 * (dim * h + c)))
                store_double(mine + 64 * c + 8 * i, scale * number)
        store_doubles(mine + state, splat(-np.inf))
        store_doubles(mine + state + 64, wide_every(0))
    queries = numbered(first)
    begin = max(0, first + 1 - window) // KEY_BLOCK * KEY_BLOCK if window else 0
    for start in range(begin, first + tokens, KEY_BLOCK):
        count = min(KEY_BLOCK, first + tokens - start)
        scale_up(keys + 4 * dim * start, count * dim, 1.0, wide)
        for h in range(heads):
            mine = of_heads + each * h
            _scores(mine, wide, count, dim, cap, mine + scores)
            if start + count > first or window:
                _mask(mine + scores, start, count, queries, window)
            _shares(mine + scores, count, mine + state)
        scale_up(values + 4 * dim * start, count * dim, 1.0, wide)
        for h in range(heads):
            mine = of_heads + each * h
            _add_values(mine + scores, wide, count, dim, load_doubles(mine + state + 128), mine + sums)
    for h in range(heads):
        mine = of_heads + each * h
        total = load_doubles(mine + state + 64)
        for c in range(dim):
            at = mine + sums + 64 * c
            store_doubles(at, divide(load_doubles(at), total))
            for i in range(tokens):
                store_float(out + stride * i + 4 * (dim * h + c), np.float32(load_double(at + 8 * i)))


@jitable
def _bytes_of_a_head(dim):
    return 64 * (2 * dim + KEY_BLOCK + 3)


@jitable
def _laid(buffers, tokens, columns):
    """Where activations of so many columns stand laid out: numbers, scales, sums."""
    blocks, panels = (columns + BLOCK - 1) // BLOCK, (tokens + TOKENS - 1) // TOKENS
    scale = buffers.laid + 4 * BLOCK * blocks * TOKENS * panels
    return buffers.laid, scale, scale + 4 * blocks * TOKENS * panels


@jitable
def _lay_out(product, laid_out, source, tokens, columns, buffers, thread, threads):
    """This member's panels of the activations that a product takes, unless they stand there; then all wait.

    source : rows as long as `columns` padded to blocks. Returns the kind that stands there now.
    """
    if product.kind != laid_out:
        if laid_out != NOTHING:  # others may still read what stands there
            barrier(buffers.meeting, threads)
        padded = (columns + BLOCK - 1) // BLOCK * BLOCK
        x, scale, sums = _laid(buffers, tokens, columns)
        first, last = share((tokens + TOKENS - 1) // TOKENS, thread, threads)
        call(buffers.lay_out, (source, tokens, padded, product.kind, x, scale, sums, first, last))
        barrier(buffers.meeting, threads)
    return product.kind


@jitable
def _tiles(product, laid_out, source, tokens, columns, buffers, y, out_bytes, thread, threads):
    """This member's rows of one product for all tokens; see _product."""
    laid_out = _lay_out(product, laid_out, source, tokens, columns, buffers, thread, threads)
    x, scale, sums = _laid(buffers, tokens, columns)
    panels = (tokens + TOKENS - 1) // TOKENS
    first, last = share(product.tiles, thread, threads)
    if first < last:
        call(product.kernel, (product.table, x, scale, sums, y, out_bytes, panels, first, last))
    return laid_out


@jitable
def _product(linear, laid_out, source, tokens, columns, buffers, y, out_bytes, thread, threads):
    """This member's rows of one linear for all tokens, its bias added; y has rows of `out_bytes`.

    laid_out : kind of activations that stand laid out, NOTHING or OTHERS. Returns what stands there now.
    """
    if linear.main.kernel:
        laid_out = _tiles(linear.main, laid_out, source, tokens, columns, buffers, y, out_bytes, thread, threads)
    out, other = y, linear.other
    if other.kernel:
        if linear.main.kernel:
            out = buffers.extra
        if linear.before.kernel:
            between, rank = linear.between, linear.rank
            row_bytes = 4 * ((rank + BLOCK - 1) // BLOCK * BLOCK)
            _tiles(linear.before, laid_out, source, tokens, columns, buffers, between, row_bytes, thread, threads)
            begin, end = share(linear.before.tiles, thread, threads)
            if begin < end == linear.before.tiles:
                for t in range(tokens):
                    clear_tail(between + row_bytes * t, rank)
            barrier(buffers.meeting, threads)
            _tiles(other, NOTHING, between, tokens, rank, buffers, out, out_bytes, thread, threads)
            laid_out = OTHERS
        else:
            laid_out = _tiles(other, laid_out, source, tokens, columns, buffers, out, out_bytes, thread, threads)
    first, last = share(linear.tiles, thread, threads)
    for t in range(tokens):
        if out != y:
            add_rows(y + out_bytes * t, out + out_bytes * t, first, last)
        if linear.bias:
            add_rows(y + out_bytes * t, linear.bias, first, last)
    return laid_out


@jitable
def _turn(linear, source, stride, first, last, columns, own):
    """Turn the inputs of some tokens in place, where a linear wants it: those that this member lays out afterwards."""
    if linear.turn:
        for t in range(first, last):
            turn(source + stride * t, columns, linear.inner, linear.base, linear.turn, own)


@jitable
def _heads(x, stride, first, last, heads, dim, gain, eps, cos, sin, own):
    """Norm (where there is a gain) and rotate the heads of some tokens, in place."""
    for t in range(first, last):
        for h in range(heads):
            place = x + stride * t + 4 * dim * h
            if gain:
                norm(place, dim, gain, eps, place, 0)
            rotate(place, dim, cos + 2 * dim * t, sin + 2 * dim * t, own)
            copy(own, dim, place)


@jitable
def _add_branch(x, branch, stride, first, last, hidden, gain, eps, own):
    """x += branch, or its norm, for some tokens."""
    for t in range(first, last):
        other = branch + stride * t
        if gain:
            norm(other, hidden, gain, eps, own, 0)
            other = own
        add(x + stride * t, other, hidden)


@jitable
def _norms(x, stride, first, last, hidden, gain, eps, out):
    padded = (hidden + BLOCK - 1) // BLOCK * BLOCK
    for t in range(first, last):
        norm(x + stride * t, hidden, gain, eps, out + stride * t, padded)


def prefill(thread, threads, sizes, numbers, layers, buffers, own, own_bytes, start, tokens):
    """Hidden states of tokens whose vectors stand in buffers.x, in place; keys and values are appended to the cache.

    The arguments are decode_step's; the buffers have room for all tokens.
    """
    hidden, heads, kv_heads, dim, wide, gelu = sizes
    eps, scale, cap = numbers
    buffers = buffers[0]
    x, meeting, branch, gate, up = buffers.x, buffers.meeting, buffers.branch, buffers.gate, buffers.up
    q, k, v, mixed = buffers.q, buffers.k, buffers.v, buffers.mixed
    mine = own + thread * own_bytes
    row_bytes = 4 * ((hidden + BLOCK - 1) // BLOCK * BLOCK)
    q_bytes = 4 * ((heads * dim + BLOCK - 1) // BLOCK * BLOCK)
    kv_bytes = 4 * ((kv_heads * dim + BLOCK - 1) // BLOCK * BLOCK)
    wide_bytes = 4 * ((wide + BLOCK - 1) // BLOCK * BLOCK)
    per_group, query_blocks = heads // kv_heads, (tokens + WIDE - 1) // WIDE
    first, last = share((tokens + TOKENS - 1) // TOKENS, thread, threads)
    first, last = min(first * TOKENS, tokens), min(last * TOKENS, tokens)  # the tokens that this member lays out
    for n in range(len(layers)):
        layer = layers[n]
        _norms(x, row_bytes, first, last, hidden, layer.input_norm, eps, branch)
        kind = _product(layer.q, NOTHING, branch, tokens, hidden, buffers, q, q_bytes, thread, threads)
        kind = _product(layer.k, kind, branch, tokens, hidden, buffers, k, kv_bytes, thread, threads)
        _product(layer.v, kind, branch, tokens, hidden, buffers, v, kv_bytes, thread, threads)
        barrier(meeting, threads)
        room = layer.room * dim * 4
        _heads(q, q_bytes, first, last, heads, dim, layer.q_norm, eps, layer.cos, layer.sin, mine)
        _heads(k, kv_bytes, first, last, kv_heads, dim, layer.k_norm, eps, layer.cos, layer.sin, mine)
        for t in range(first, last):
            for h in range(kv_heads):
                at, of = h * room + 4 * dim * (start + t), kv_bytes * t + 4 * dim * h
                copy(k + of, dim, layer.keys + at)
                copy(v + of, dim, layer.values + at)
        barrier(meeting, threads)
        for unit in range(thread, kv_heads * query_blocks, threads):  # by turns: late queries see more keys
            h, block = unit % kv_heads, unit // kv_heads
            at, of = q_bytes * WIDE * block + 4 * dim * per_group * h, h * room
            _attend_some(
                q + at, per_group, layer.keys + of, layer.values + of, start + WIDE * block,
                min(WIDE, tokens - WIDE * block), dim, scale, cap, layer.window, mine, mixed + at, q_bytes,
            )  # fmt: skip
        barrier(meeting, threads)
        _turn(layer.o, mixed, q_bytes, first, last, heads * dim, mine)
        _product(layer.o, NOTHING, mixed, tokens, heads * dim, buffers, branch, row_bytes, thread, threads)
        barrier(meeting, threads)
        _add_branch(x, branch, row_bytes, first, last, hidden, layer.attention_norm, eps, mine)
        _norms(x, row_bytes, first, last, hidden, layer.mlp_norm, eps, branch)
        kind = _product(layer.gate, NOTHING, branch, tokens, hidden, buffers, gate, wide_bytes, thread, threads)
        _product(layer.up, kind, branch, tokens, hidden, buffers, up, wide_bytes, thread, threads)
        first_tile, last_tile = share(layer.gate.tiles, thread, threads)
        for t in range(tokens):  # the same rows of both: no need to wait
            at = wide_bytes * t + 4 * ROWS * first_tile
            activate(gate + at, up + at, (last_tile - first_tile) * ROWS, gelu)
        barrier(meeting, threads)
        _turn(layer.down, gate, wide_bytes, first, last, wide, mine)
        _product(layer.down, NOTHING, gate, tokens, wide, buffers, branch, row_bytes, thread, threads)
        barrier(meeting, threads)
        _add_branch(x, branch, row_bytes, first, last, hidden, layer.output_norm, eps, mine)


def own_bytes(most: int, dim: int, per_group: int) -> int:
    """Bytes that each member needs: a vector of `most` columns, or what attention of eight queries needs.

    A block of keys, or of values, in float64, and what _attend_some keeps of each head that shares them.
    """
    return max(4 * most, 8 * KEY_BLOCK * dim + per_group * 64 * (2 * dim + KEY_BLOCK + 3))


def laid_bytes(most: int, tokens: int) -> int:
    """Bytes of the activations of all tokens laid out: numbers, scales, sums."""
    panels = -(-tokens // TOKENS)
    return (4 * most + most // 8 * 5) * TOKENS * panels


@cache
def prefill_kernel():
    """The compiled prefill; releases the interpreter lock."""
    sizes, numbers = types.UniTuple(types.intp, 6), types.UniTuple(types.float64, 3)
    return compile_kernel(
        prefill,
        types.void(types.intp, types.intp, sizes, numbers, records(LAYER), records(BUFFERS), *[types.intp] * 4),
    )
