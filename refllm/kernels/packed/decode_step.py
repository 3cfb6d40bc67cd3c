"""One token through all layers in one compiled call: the twin of model/llama.py for a single new token.

The text below reads like the forward pass. What a model needs is data: a record for each layer (plan.py: addresses of
weights, gains, biases, keys and values), so one compiled text serves every model. Each product goes through the address
of its own kernel: tile products (tile_kernels.py) or, for weights stored as float32, `dense_product` below.

The text runs on a team of threads (team.py). Every member normalises and rounds the activations for itself, since they
are small, and takes its share of the rows of each product and of the heads.

Sums, roots and exponentials are float64 and rounded once, as in the readable pass: so both get the same float32 nearly
always, and rounded activations the same codes (kernels/nn.py).
"""

from functools import cache

import numba
import numpy as np
from numba import types

from refllm.kernels.packed.compile import compile_address, compile_kernel, jitable
from refllm.kernels.packed.lane_math import (
    divide,
    exponential,
    fma,
    lane_sum,
    minus,
    narrow,
    pair_sum,
    plus,
    times,
    widen,
)
from refllm.kernels.packed.lane_memory import load_float, load_floats, store_double, store_float, store_floats, word
from refllm.kernels.packed.lanes import every, splat, wide_every, wide_zeros
from refllm.kernels.packed.plan import BUFFERS, HEAD, LAYER
from refllm.kernels.packed.team import barrier, call, share
from refllm.kernels.packed.tiling import BLOCK, ROWS
from refllm.kernels.packed.token_attention import MOST, heads_together, own_doubles
from refllm.kernels.packed.turn_kernels import turn


def dense_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
    """A tile product of a row-major float32 matrix and one token; lanes run along the columns.

    weight : address of four words: the matrix, its rows, its columns, bytes of a row.
    """
    matrix, rows, columns, row_bytes = word(weight, 0), word(weight, 1), word(weight, 2), word(weight, 3)
    whole = columns // 16 * 16
    for row in range(first * ROWS, min(last * ROWS, rows)):
        at = matrix + row * row_bytes
        even, odd = every(0), every(0)
        for c in range(0, whole - 16, 32):
            even = fma(load_floats(at + 4 * c), load_floats(x + 4 * c), even)
            odd = fma(load_floats(at + 4 * c + 64), load_floats(x + 4 * c + 64), odd)
        if whole % 32:
            even = fma(load_floats(at + 4 * whole - 64), load_floats(x + 4 * whole - 64), even)
        total = lane_sum(plus(even, odd))
        for c in range(whole, columns):
            total += load_float(at + 4 * c) * load_float(x + 4 * c)
        store_float(y + 4 * row, total)


@jitable
def norm(x, count, gain, eps, out, padded):
    """out = x / sqrt(mean(x^2) + eps) * gain, and zeros from `count` to `padded`."""
    whole = count // 16 * 16
    squares = wide_zeros(2)
    for i in range(0, whole, 16):
        some = widen(load_floats(x + 4 * i))
        squares = fma(some, some, squares)
    total = pair_sum(squares)
    for i in range(whole, count):
        total += np.float64(load_float(x + 4 * i)) * np.float64(load_float(x + 4 * i))
    root = np.float32(np.sqrt(total / count + eps))
    divisor = splat(root)
    for i in range(0, whole, 16):
        store_floats(out + 4 * i, times(divide(load_floats(x + 4 * i), divisor), load_floats(gain + 4 * i)))
    for i in range(whole, count):
        store_float(out + 4 * i, load_float(x + 4 * i) / root * load_float(gain + 4 * i))
    for i in range(count, padded):
        store_float(out + 4 * i, np.float32(0))


@jitable
def copy(x, count, out):
    """out = x."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store_floats(out + 4 * i, load_floats(x + 4 * i))
    for i in range(whole, count):
        store_float(out + 4 * i, load_float(x + 4 * i))


@jitable
def add(x, y, count):
    """x += y."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store_floats(x + 4 * i, plus(load_floats(x + 4 * i), load_floats(y + 4 * i)))
    for i in range(whole, count):
        store_float(x + 4 * i, load_float(x + 4 * i) + load_float(y + 4 * i))


@jitable
def rotate(x, dim, cos, sin, out):
    """Half-split rotary embedding of one head."""
    half, whole = dim // 2, dim // 32 * 16
    for i in range(0, whole, 16):
        left, right = load_floats(x + 4 * i), load_floats(x + 4 * (i + half))
        c, s = load_floats(cos + 4 * i), load_floats(sin + 4 * i)
        store_floats(out + 4 * i, minus(times(left, c), times(right, s)))
        store_floats(out + 4 * (i + half), plus(times(left, s), times(right, c)))
    for i in range(whole, half):
        a, b = load_float(x + 4 * i), load_float(x + 4 * (i + half))
        c, s = load_float(cos + 4 * i), load_float(sin + 4 * i)
        store_float(out + 4 * i, a * c - b * s)
        store_float(out + 4 * (i + half), a * s + b * c)


@jitable
def activate(gate, up, count, gelu):
    """gate = act(gate) * up, sixteen numbers at a time; both activations are x / (1 + e^-y)."""
    for i in range(0, count, 16):
        a = widen(load_floats(gate + 4 * i))
        y = a
        if gelu:
            cubed = times(times(times(a, a), a), splat(0.044715))
            y = times(plus(a, cubed), splat(2 * np.sqrt(2 / np.pi)))
        a = divide(a, plus(exponential(times(y, wide_every(-1))), wide_every(1)))
        store_floats(gate + 4 * i, times(narrow(a), load_floats(up + 4 * i)))


@jitable
def _tiles(product, source, columns, laid_out, buffers, x, y, first, last):
    """Some tiles of one product; see _product."""
    blocks = (columns + BLOCK - 1) // BLOCK
    scale = x + 4 * BLOCK * blocks
    sums = scale + 4 * blocks
    if product.kind != laid_out:
        call(buffers.lay_out, (source, 1, blocks * BLOCK, product.kind, x, scale, sums, 0, 1))
    if first < last:
        call(product.kernel, (product.table, x, scale, sums, y, 0, 1, first, last))
    return product.kind


@jitable
def add_rows(y, other, first, last):
    """y += other, some tiles of rows."""
    add(y + 4 * ROWS * first, other + 4 * ROWS * first, (last - first) * ROWS)


@jitable
def clear_tail(between, rank):
    """Zeros behind the numbers of one token, to the end of the block: products read whole blocks."""
    for i in range(rank, (rank + BLOCK - 1) // BLOCK * BLOCK):
        store_float(between + 4 * i, np.float32(0))


@jitable
def _product(linear, source, columns, laid_out, buffers, x, y, thread, threads):
    """This member's rows of one linear, its bias added.

    laid_out : kind of activations that stand laid out at x, or -1. Returns the kind that stands there now.
    """
    first, last = share(linear.tiles, thread, threads)
    if linear.main.kernel:
        laid_out = _tiles(linear.main, source, columns, laid_out, buffers, x, y, first, last)
    if linear.other.kernel:
        out = buffers.extra if linear.main.kernel else y
        if linear.before.kernel:
            begin, end = share(linear.before.tiles, thread, threads)
            _tiles(linear.before, source, columns, laid_out, buffers, x, linear.between, begin, end)
            if begin < end == linear.before.tiles:
                clear_tail(linear.between, linear.rank)
            barrier(buffers.meeting, threads)
            _tiles(linear.other, linear.between, linear.rank, -1, buffers, x, out, first, last)
            laid_out = -1
        else:
            laid_out = _tiles(linear.other, source, columns, laid_out, buffers, x, out, first, last)
        if linear.main.kernel:
            add_rows(y, out, first, last)
    if linear.bias:
        add_rows(y, linear.bias, first, last)
    return laid_out


@jitable
def _turned(linear, source, columns, out, scratch):
    """Where the inputs of a linear stand: at the source, or turned at `out`, with its padding."""
    if not linear.turn:
        return source
    copy(source, (columns + BLOCK - 1) // BLOCK * BLOCK, out)
    turn(out, columns, linear.inner, linear.base, linear.turn, scratch)
    return out


@jitable
def _add_branch(x, branch, hidden, gain, eps, mine, tiles, meeting, thread, threads):
    """x += branch, or its norm; this member's rows."""
    first, last = share(tiles, thread, threads)
    if gain:
        barrier(meeting, threads)
        norm(branch, hidden, gain, eps, mine, 0)
        branch = mine
    add(x + 4 * ROWS * first, branch + 4 * ROWS * first, max(0, min(last * ROWS, hidden) - first * ROWS))
    barrier(meeting, threads)


def decode_step(thread, threads, sizes, numbers, layers, heads_and_buffers, own, own_bytes, position):
    """Logits of one token whose vector stands in buffers.x; its keys and values are appended to the cache.

    sizes : (hidden, heads, kv heads, head dim, intermediate, activation: 0 silu, 1 gelu_tanh)
    numbers : (eps, attention scale, attention softcap or 0) float64
    layers : (layers,) LAYER. heads_and_buffers : (1,) HEAD and (1,) BUFFERS. own : address of `own_bytes` a member.
    """
    hidden, heads, kv_heads, dim, wide, gelu = sizes
    eps, scale, cap = numbers
    head, buffers = heads_and_buffers[0][0], heads_and_buffers[1][0]
    x, meeting, mixed, gate, up, branch = (
        buffers.x, buffers.meeting, buffers.mixed, buffers.gate, buffers.up, buffers.branch,
    )  # fmt: skip
    padded = (hidden + BLOCK - 1) // BLOCK * BLOCK
    most = (max(hidden, wide, heads * dim) + BLOCK - 1) // BLOCK * BLOCK
    normed = own + thread * own_bytes
    laid = normed + 4 * most
    scratch = laid + 5 * most
    store_double(scratch, scale)
    store_double(scratch + 8, cap)
    per_group = heads // kv_heads
    first_head, last_head = share(heads, thread, threads)
    first_kv, last_kv = share(kv_heads, thread, threads)
    for i in range(len(layers)):
        layer = layers[i]
        norm(x, hidden, layer.input_norm, eps, normed, padded)
        kind = _product(layer.q, normed, hidden, -1, buffers, laid, buffers.q, thread, threads)
        kind = _product(layer.k, normed, hidden, kind, buffers, laid, buffers.k, thread, threads)
        _product(layer.v, normed, hidden, kind, buffers, laid, buffers.v, thread, threads)
        barrier(meeting, threads)
        head_bytes, value_bytes = layer.room * dim * 4, layer.value_room * dim * 4
        for h in range(first_kv, last_kv):
            key, value, at = buffers.k + 4 * dim * h, buffers.v + 4 * dim * h, 4 * dim * position
            if layer.k_norm:
                norm(key, dim, layer.k_norm, eps, key, 0)
            rotate(key, dim, layer.cos, layer.sin, layer.keys + at + h * head_bytes)
            copy(value, dim, layer.values + at + h * value_bytes)
        barrier(meeting, threads)
        start = max(0, position + 1 - layer.window) if layer.window else 0
        h = first_head
        while h < last_head:  # this member's heads, those that share keys and values together
            together = heads_together(h, last_head, per_group)
            for i in range(together):
                query = buffers.q + 4 * dim * (h + i)
                if layer.q_norm:
                    norm(query, dim, layer.q_norm, eps, query, 0)
                rotate(query, dim, layer.cos, layer.sin, normed + 4 * dim * i)
            keys, values, count = layer.coded, h // per_group, position + 1
            if not layer.coded:
                of = h // per_group * head_bytes + 4 * dim * start
                keys, values, count = layer.keys + of, layer.values + of, position + 1 - start
            what = normed, keys, values, count, dim, scratch, mixed + 4 * dim * h
            call(word(buffers.attend, together), what)
            h += together
        barrier(meeting, threads)
        inputs = _turned(layer.o, mixed, heads * dim, normed, laid)
        _product(layer.o, inputs, heads * dim, -1, buffers, laid, branch, thread, threads)
        _add_branch(x, branch, hidden, layer.attention_norm, eps, normed, layer.o.tiles, meeting, thread, threads)
        norm(x, hidden, layer.mlp_norm, eps, normed, padded)
        kind = _product(layer.gate, normed, hidden, -1, buffers, laid, gate, thread, threads)
        _product(layer.up, normed, hidden, kind, buffers, laid, up, thread, threads)
        first, last = share(layer.gate.tiles, thread, threads)  # the same rows of both: no need to wait
        activate(gate + 4 * ROWS * first, up + 4 * ROWS * first, (last - first) * ROWS, gelu)
        barrier(meeting, threads)
        _product(
            layer.down, _turned(layer.down, gate, wide, normed, laid), wide, -1, buffers, laid, branch, thread, threads
        )
        _add_branch(x, branch, hidden, layer.output_norm, eps, normed, layer.down.tiles, meeting, thread, threads)
    norm(x, hidden, head.norm, eps, normed, padded)
    _product(head.linear, normed, hidden, -1, buffers, laid, buffers.logits, thread, threads)


def own_bytes(most: int, dim: int, room: int, side: int) -> int:
    """Bytes that each member needs: `most` columns at once (a multiple of 32), `room` tokens in the cache.

    side : groups of codes side by side in the cache, 0 without codes.

    A normed vector, one laid out (numbers, scales, sums: 4 + 5 / 8 bytes a column), and what attention needs.
    """
    return 9 * most + 8 * own_doubles(MOST, dim, room, side)


@cache
def step_kernel():
    """The compiled decode_step; releases the interpreter lock."""
    signature = types.void(
        types.intp,
        types.intp,
        types.UniTuple(types.intp, 6),
        types.UniTuple(types.float64, 3),
        records(LAYER),
        types.Tuple((records(HEAD), records(BUFFERS))),
        types.intp,
        types.intp,
        types.intp,
    )
    return compile_kernel(decode_step, signature)


def records(kind: np.dtype) -> types.Array:
    """The Numba type of a row of records."""
    return types.Array(numba.from_dtype(kind), 1, "C")


@cache
def dense_address() -> int:
    """Address of the compiled dense_product."""
    return compile_address(dense_product, types.void(*[types.intp] * 9))
