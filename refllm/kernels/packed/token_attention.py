"""Attention of one token: words that several query heads run together, since they share keys and values.

Keys and values are float32; each is read and widened once for all heads that share it. Scores, softmax and sums are in
float64, and the result is rounded once: sums in any order then round to the same float32 nearly always, which rounded
activations need (kernels/nn.py). The NumPy text is kernels/attention.py.
"""

from functools import cache

import numpy as np
from numba import types

from refllm.kernels.packed.compile import compile_address, jitable
from refllm.kernels.packed.lane_math import (
    divide,
    exponential,
    fma,
    lane_max,
    lane_sum,
    larger,
    narrow,
    plus,
    times,
    widen,
)
from refllm.kernels.packed.lane_memory import (
    double_grid,
    double_splats_apart,
    float_grid,
    load_double,
    load_doubles,
    load_float,
    load_floats,
    store_double,
    store_doubles,
    store_float,
    store_floats,
    store_grid,
    store_sums,
)
from refllm.kernels.packed.lanes import WIDE, over_again, repeated, splat, wide_every, wide_zeros
from refllm.kernels.packed.simd import LANES, target_features

MOST = 4  # heads at once
KNOBS = WIDE  # places for scale and cap, so that what follows stays aligned
KEYS = COLUMNS = 4 if "+avx512f" in target_features() else 2  # keys, or vectors of a value, at once
AGAIN = 64  # values that stay in the first-level cache while their columns are added


@jitable
def tanh(x):
    """1 - 2 / (e^2x + 1)."""
    return plus(wide_every(1), divide(wide_every(-2), plus(exponential(plus(x, x)), wide_every(1))))


@jitable
def soften(scores, count, cap):
    """Softmax without its division, in place: e^(score - largest), soft-capped before; returns the sum.

    scores : float64; up to the next multiple of 8 they become 0.
    """
    padded = (count + WIDE - 1) // WIDE * WIDE
    if cap > 0:
        for i in range(0, padded, WIDE):
            some = load_doubles(scores + 8 * i)
            store_doubles(scores + 8 * i, times(splat(cap), tanh(divide(some, splat(cap)))))
    for i in range(count, padded):
        store_double(scores + 8 * i, -np.inf)
    top = splat(-np.inf)
    for i in range(0, padded, WIDE):
        top = larger(top, load_doubles(scores + 8 * i))
    most, total = splat(-lane_max(top)), wide_every(0)
    for i in range(0, padded, WIDE):
        some = exponential(plus(load_doubles(scores + 8 * i), most))
        store_doubles(scores + 8 * i, some)
        total = plus(total, some)
    return lane_sum(total)


@cache
def words(n: int):
    """dot_keys and add_values of n heads that share keys and values."""

    def dot_some(together: int):
        sums = n * together

        @jitable
        def dot_run(queries, keys, first, last, dim, scores, room):
            """dot_keys for first <= i < last, `together` keys at once."""
            for i in range(first, last, together):
                total = wide_zeros(sums)
                for c in range(0, dim // WIDE * WIDE, WIDE):
                    some = over_again(float_grid(keys + 4 * (dim * i + c), 4 * dim, together, 1), n)
                    total = fma(repeated(double_grid(queries + 8 * c, 8 * dim, n, 1), together), some, total)
                store_sums(scores + 8 * i, 8 * room, total, n)

        return dot_run

    dot_several, dot_one = dot_some(KEYS), dot_some(1)

    @jitable
    def dot_keys(queries, keys, count, dim, scores, room):
        """scores[h, i] = query h . key i; queries (n, dim) and scores (n, room) float64, keys (count, dim) float32."""
        together = count // KEYS * KEYS
        dot_several(queries, keys, 0, together, dim, scores, room)
        dot_one(queries, keys, together, count, dim, scores, room)
        for c in range(dim // WIDE * WIDE, dim):
            for h in range(n):
                for i in range(count):
                    at, key = scores + 8 * (room * h + i), np.float64(load_float(keys + 4 * (dim * i + c)))
                    store_double(at, load_double(at) + load_double(queries + 8 * (dim * h + c)) * key)

    def add_some(columns: int):
        @jitable
        def add_run(shares, room, values, first, last, dim, c, sums):
            """add_values for first <= i < last and `columns` vectors of columns from c on."""
            total = double_grid(sums + 8 * c, 8 * dim, n, columns)
            for i in range(first, last):
                some = over_again(float_grid(values + 4 * (dim * i + c), 0, 1, columns), n)
                total = fma(some, repeated(double_splats_apart(shares + 8 * i, 8 * room, n), columns), total)
            store_grid(sums + 8 * c, 8 * dim, total, n)

        return add_run

    add_several, add_one = add_some(COLUMNS), add_some(1)

    @jitable
    def add_values(shares, room, values, count, dim, sums):
        """sums[h] += sum over i of shares[h, i] * value i; shares (n, room) and sums (n, dim) float64."""
        for first in range(0, count, AGAIN):
            last = min(count, first + AGAIN)
            whole = dim // (WIDE * COLUMNS) * WIDE * COLUMNS
            for c in range(0, whole, WIDE * COLUMNS):
                add_several(shares, room, values, first, last, dim, c, sums)
            for c in range(whole, dim // WIDE * WIDE, WIDE):
                add_one(shares, room, values, first, last, dim, c, sums)
            for c in range(dim // WIDE * WIDE, dim):
                for h in range(n):
                    rest = load_double(sums + 8 * (dim * h + c))
                    for i in range(first, last):
                        share = load_double(shares + 8 * (room * h + i))
                        rest += share * np.float64(load_float(values + 4 * (dim * i + c)))
                    store_double(sums + 8 * (dim * h + c), rest)

    return dot_keys, add_values


@jitable
def scale_up(x, count, factor, out):
    """out = factor * x, float64 from float32."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store_grid(out + 8 * i, 0, times(widen(load_floats(x + 4 * i)), splat(factor)), 1)
    for i in range(whole, count):
        store_double(out + 8 * i, factor * np.float64(load_float(x + 4 * i)))


@jitable
def clear(sums, count):
    """sums = 0, float64."""
    whole = count // WIDE * WIDE
    for i in range(0, whole, WIDE):
        store_doubles(sums + 8 * i, wide_every(0))
    for i in range(whole, count):
        store_double(sums + 8 * i, 0.0)


@jitable
def finish(sums, count, total, out):
    """out = sums / total, float32 from float64."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store_floats(out + 4 * i, narrow(divide(double_grid(sums + 8 * i, 0, 1, 2), splat(total))))
    for i in range(whole, count):
        store_float(out + 4 * i, np.float32(load_double(sums + 8 * i) / total))


@jitable
def attention_room(count):
    """Places for the scores of so many tokens, whichever the first is that is seen: softmax works on whole vectors."""
    return (count + 2 * WIDE - 1) // WIDE * WIDE


def _attend_text(n: int):
    """Attention of one token in n heads that share keys and values."""
    dot_keys, add_values = words(n)

    def attend_together(queries, keys, values, count, dim, own, out):
        scale, cap = load_double(own), load_double(own + 8)
        room = attention_room(count)
        wide = own + 8 * KNOBS
        sums, scores = wide + 8 * n * dim, wide + 16 * n * dim
        scale_up(queries, n * dim, scale, wide)
        dot_keys(wide, keys, count, dim, scores, room)
        clear(sums, n * dim)
        for h in range(n):  # the queries are not needed any more: their place takes the totals
            store_double(wide + 8 * h, soften(scores + 8 * room * h, count, cap))
        add_values(scores, room, values, count, dim, sums)
        for h in range(n):
            finish(sums + 8 * dim * h, dim, load_double(wide + 8 * h), out + 4 * dim * h)

    return attend_together


@cache
def attend_address(n: int) -> int:
    """Address of the compiled softmax(scale q K^T) V of n heads that share keys and values, n <= MOST.

    void(queries, keys, values, count, dim, own, out); queries and out : (n, dim), keys and values : (count, dim),
    float32; own : room for own_doubles(n, dim, count), of which the first two are scale and soft-cap (0: none).
    """
    return compile_address(_attend_text(n), types.void(*[types.intp] * 7), f"_{n}")


@jitable
def heads_together(head, last, per_group):
    """Heads from `head` on, before `last`, that one call takes: those that share keys and values."""
    return min(per_group - head % per_group, last - head, MOST)


def needed(heads: int, per_group: int, threads: int) -> set[int]:
    """All numbers of heads together that the members of a team meet.

    Examples
    --------
    >>> needed(9, 3, 1), needed(9, 3, 2)
    ({3}, {1, 2, 3})
    """
    found = set()
    for thread in range(threads):
        head, last = heads * thread // threads, heads * (thread + 1) // threads
        while head < last:
            found.add(together := heads_together(head, last, per_group))
            head += together
    return found


def own_doubles(n: int, dim: int, count: int, side: int = 0) -> int:
    """Float64 numbers that attention of n heads over so many tokens needs.

    Knobs, queries, sums and scores. Of codes, up to `side` groups of a channel or a token side by side, besides:
    queries or shares of some tokens, for every group, twice, and sixteen sums and one for each (kv_attention.py), all
    of them float32.
    """
    return KNOBS + n * (2 * dim + count + 2 * WIDE) + n * side * (max(dim, AGAIN) + (LANES + 2) // 2)
