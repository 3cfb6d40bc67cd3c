"""One token through all layers in one compiled call: the twin of model/llama.py for a single new token.

The text below reads like the forward pass. What a model needs is data: a record for each layer (plan.py: addresses of
weights, gains, biases, keys and values), so one compiled text serves every model. Each product goes through the address
of its own kernel: tile products (tile_kernels.py) or, for weights stored as float32, `dense_product` below.

The text runs on a team of threads (team.py). Every member normalises and rounds the activations for itself, since they
are small, and takes its share of the rows of each product and of the heads.
"""

from functools import cache

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from refllm.kernels.packed.compile import compile_address, compile_kernel
from refllm.kernels.packed.lanes import (
    divide,
    every,
    exponential,
    fma,
    lane_max,
    lane_sum,
    larger,
    load_apart,
    load_float,
    load_floats,
    plus,
    splat,
    store_float,
    store_floats,
    store_four_sums,
    store_tokens,
    times,
    word,
    zeros,
)
from refllm.kernels.packed.plan import BUFFERS, HEAD, LAYER
from refllm.kernels.packed.team import barrier, call, share
from refllm.kernels.packed.tiling import BLOCK, ROWS
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


@register_jitable
def _dot(a, b, count):
    """Sum of a[i] b[i] of two arrays at addresses."""
    total = every(0)
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        total = fma(load_floats(a + 4 * i), load_floats(b + 4 * i), total)
    rest = lane_sum(total)
    for i in range(whole, count):
        rest += load_float(a + 4 * i) * load_float(b + 4 * i)
    return rest


@register_jitable
def norm(x, count, gain, eps, out, padded):
    """out = x / sqrt(mean(x^2) + eps) * gain, and zeros from `count` to `padded`."""
    root = np.sqrt(_dot(x, x, count) / np.float32(count) + eps)
    whole = count // 16 * 16
    divisor = splat(root)
    for i in range(0, whole, 16):
        store_floats(out + 4 * i, times(divide(load_floats(x + 4 * i), divisor), load_floats(gain + 4 * i)))
    for i in range(whole, count):
        store_float(out + 4 * i, load_float(x + 4 * i) / root * load_float(gain + 4 * i))
    for i in range(count, padded):
        store_float(out + 4 * i, np.float32(0))


@register_jitable
def copy(x, count, out):
    """out = x."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store_floats(out + 4 * i, load_floats(x + 4 * i))
    for i in range(whole, count):
        store_float(out + 4 * i, load_float(x + 4 * i))


@register_jitable
def rotate(x, dim, cos, sin, out):
    """Half-split rotary embedding of one head."""
    half = dim // 2
    for i in range(half):
        a, b = load_float(x + 4 * i), load_float(x + 4 * (i + half))
        c, s = load_float(cos + 4 * i), load_float(sin + 4 * i)
        store_float(out + 4 * i, a * c - b * s)
        store_float(out + 4 * (i + half), a * s + b * c)


@register_jitable
def tanh(x):
    """1 - 2 / (e^2x + 1)."""
    return plus(every(1), divide(every(-2), plus(exponential(plus(x, x)), every(1))))


@register_jitable
def activate(gate, up, count, gelu):
    """gate = act(gate) * up, sixteen numbers at a time."""
    for i in range(0, count, 16):
        a = load_floats(gate + 4 * i)
        if gelu:
            cubed = times(times(times(a, a), a), splat(np.float32(0.044715)))
            inside = times(plus(a, cubed), splat(np.float32(np.sqrt(2 / np.pi))))
            a = times(times(a, splat(np.float32(0.5))), plus(every(1), tanh(inside)))
        else:
            a = divide(a, plus(every(1), exponential(times(a, every(-1)))))
        store_floats(gate + 4 * i, times(a, load_floats(up + 4 * i)))


@register_jitable
def dot_keys(query, keys, count, dim, scale, scores):
    """scores[i] = scale * (query . key i), four keys at a time."""
    together = count // 4 * 4 if dim % 16 == 0 else 0
    for i in range(0, together, 4):
        total = zeros(4)
        for c in range(0, dim, 16):
            some = load_apart(keys + 4 * (dim * i + c), 4 * dim, 4)
            total = fma(times(load_floats(query + 4 * c), splat(scale)), some, total)
        store_four_sums(scores + 4 * i, total)
    for i in range(together, count):
        store_float(scores + 4 * i, _dot(query, keys + 4 * dim * i, dim) * scale)


@register_jitable
def soften(scores, count, cap):
    """Softmax without its division, in place: e^(score - largest), soft-capped before; returns the sum.

    Up to the next multiple of 16 the scores become 0.
    """
    padded = (count + 15) // 16 * 16
    if cap > 0:
        for i in range(0, padded, 16):
            store_floats(scores + 4 * i, times(splat(cap), tanh(divide(load_floats(scores + 4 * i), splat(cap)))))
    for i in range(count, padded):
        store_float(scores + 4 * i, np.float32(-np.inf))
    top = splat(np.float32(-np.inf))
    for i in range(0, padded, 16):
        top = larger(top, load_floats(scores + 4 * i))
    most, total = splat(-lane_max(top)), every(0)
    for i in range(0, padded, 16):
        some = exponential(plus(load_floats(scores + 4 * i), most))
        store_floats(scores + 4 * i, some)
        total = plus(total, some)
    return lane_sum(total)


@register_jitable
def add_values(shares, values, count, dim, out):
    """out += sum over i of shares[i] * value i, 64 columns at a time: four sums that do not wait for each other."""
    fours, whole = dim // 64 * 64, dim // 16 * 16
    for c in range(0, fours, 64):
        total = load_apart(out + 4 * c, 64, 4)
        for i in range(count):
            share = splat(load_float(shares + 4 * i))
            total = fma(load_apart(values + 4 * (dim * i + c), 64, 4), share, total)
        store_tokens(out + 4 * c, 64, total)
    for c in range(fours, whole, 16):
        one = load_floats(out + 4 * c)
        for i in range(count):
            one = fma(load_floats(values + 4 * (dim * i + c)), splat(load_float(shares + 4 * i)), one)
        store_floats(out + 4 * c, one)
    for c in range(whole, dim):
        rest = load_float(out + 4 * c)
        for i in range(count):
            rest += load_float(shares + 4 * i) * load_float(values + 4 * (dim * i + c))
        store_float(out + 4 * c, rest)


@register_jitable
def fill(out, count, value):
    """out = value."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store_floats(out + 4 * i, splat(value))
    for i in range(whole, count):
        store_float(out + 4 * i, value)


@register_jitable
def shrink(out, count, divisor):
    """out /= divisor."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store_floats(out + 4 * i, divide(load_floats(out + 4 * i), splat(divisor)))
    for i in range(whole, count):
        store_float(out + 4 * i, load_float(out + 4 * i) / divisor)


@register_jitable
def _attend(query, keys, values, start, end, dim, scale, cap, scores, out):
    """softmax(scale q K^T) V of one head over the tokens start <= i < end; scores : room for end - start + 16."""
    count, skipped = end - start, 4 * dim * start
    dot_keys(query, keys + skipped, count, dim, scale, scores)
    total = soften(scores, count, cap)
    fill(out, dim, np.float32(0))
    add_values(scores, values + skipped, count, dim, out)
    shrink(out, dim, total)


@register_jitable
def _tiles(product, source, columns, laid_out, buffers, x, y, first, last):
    """Some tiles of one product; see _product."""
    blocks = (columns + BLOCK - 1) // BLOCK
    scale = x + 4 * BLOCK * blocks
    sums = scale + 4 * blocks
    if product.kind != laid_out:
        call(buffers.lay_out, (source, 1, blocks * BLOCK, 0, product.kind, x, scale, sums, 0, 1))
    if first < last:
        call(product.kernel, (product.table, x, scale, sums, y, 0, 1, first, last))
    return product.kind


@register_jitable
def add_rows(y, other, first, last):
    """y += other, some tiles of rows."""
    for i in range(first * ROWS, last * ROWS, 16):
        store_floats(y + 4 * i, plus(load_floats(y + 4 * i), load_floats(other + 4 * i)))


@register_jitable
def clear_tail(between, rank):
    """Zeros behind the numbers of one token, to the end of the block: products read whole blocks."""
    for i in range(rank, (rank + BLOCK - 1) // BLOCK * BLOCK):
        store_float(between + 4 * i, np.float32(0))


@register_jitable
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


@register_jitable
def _turned(linear, source, columns, out, scratch):
    """Where the inputs of a linear stand: at the source, or turned at `out`, with its padding."""
    if not linear.turn:
        return source
    copy(source, (columns + BLOCK - 1) // BLOCK * BLOCK, out)
    turn(out, columns, linear.inner, linear.base, linear.turn, scratch)
    return out


@register_jitable
def _add_branch(x, branch, hidden, gain, eps, mine, tiles, meeting, thread, threads):
    """x += branch, or its norm; this member's rows."""
    first, last = share(tiles, thread, threads)
    if gain:
        barrier(meeting, threads)
        norm(branch, hidden, gain, eps, mine, 0)
        branch = mine
    for i in range(first * ROWS, min(last * ROWS, hidden)):
        store_float(x + 4 * i, load_float(x + 4 * i) + load_float(branch + 4 * i))
    barrier(meeting, threads)


def decode_step(thread, threads, sizes, numbers, layers, heads_and_buffers, own, own_bytes, position):
    """Logits of one token whose vector stands in buffers.x; its keys and values are appended to the cache.

    sizes : (hidden, heads, kv heads, head dim, intermediate, activation: 0 silu, 1 gelu_tanh)
    numbers : (eps, attention scale, attention softcap or 0) float32
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
    scores = laid + 4 * most + most
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
        head_bytes = layer.room * dim * 4
        for h in range(first_kv, last_kv):
            key, value, at = buffers.k + 4 * dim * h, buffers.v + 4 * dim * h, h * head_bytes + 4 * dim * position
            if layer.k_norm:
                norm(key, dim, layer.k_norm, eps, key, 0)
            rotate(key, dim, layer.cos, layer.sin, layer.keys + at)
            copy(value, dim, layer.values + at)
        barrier(meeting, threads)
        start = max(0, position + 1 - layer.window) if layer.window else 0
        for h in range(first_head, last_head):
            query, of = buffers.q + 4 * dim * h, h // per_group * head_bytes
            if layer.q_norm:
                norm(query, dim, layer.q_norm, eps, query, 0)
            rotate(query, dim, layer.cos, layer.sin, normed)
            keys, values = layer.keys + of, layer.values + of
            _attend(normed, keys, values, start, position + 1, dim, scale, cap, scores, mixed + 4 * dim * h)
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


def own_bytes(most: int, room: int) -> int:
    """Bytes that each member needs: `most` columns at once (a multiple of 32), `room` tokens in the cache.

    A normed vector, one laid out (numbers, scales, sums: 4 + 1 / 2 bytes a column), scores.
    """
    return 9 * most + 4 * (room + 32)


@cache
def step_kernel():
    """The compiled decode_step; releases the interpreter lock."""
    signature = types.void(
        types.intp,
        types.intp,
        types.UniTuple(types.intp, 6),
        types.UniTuple(types.float32, 3),
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
