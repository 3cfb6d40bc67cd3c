"""Numba texts of the tile products: some tiles of a weight times some tokens, laid out as laid_out.py says.

One text serves every form of tiles (tiling.Form), any number of tokens and both kinds of activations; what differs is
constant to the compiler. The sums run block by block along a row in a fixed order, each row in its own lane, so neither
the number of threads nor of tokens changes a bit of the result. The NumPy text is reference.py.
"""

from functools import cache

from numba import types

from refllm.kernels.packed.compile import compile_address, jitable
from refllm.kernels.packed.float_products import kept_products
from refllm.kernels.packed.laid_out import BLOCKS, FLOAT, FOUR, TOKEN, TOKENS
from refllm.kernels.packed.lane_math import fma, plus, times
from refllm.kernels.packed.lane_memory import (
    load_floats,
    load_tokens,
    load_whole,
    prefetch,
    room,
    splats,
    store_tokens,
    word,
)
from refllm.kernels.packed.lanes import every, first_half, over_again, second_half, zeros
from refllm.kernels.packed.level_kernels import levels_text
from refllm.kernels.packed.tile_runs import (
    PANELS,
    SUMMED,
    group_bytes,
    is_summed,
    leave_run,
    open_run,
    opened_form,
    opens,
    run_of_blocks,
    run_of_sums,
    table_loader,
    wide_blocks,
)
from refllm.kernels.packed.tiling import BLOCK, ROWS, Form
from refllm.kernels.packed.vector_products import no_sums, rows_together, scale_sums, store_sums, vector_products

TILES = 2 if TOKENS == 12 else 1  # side by side then; 24 sums in 32 registers
# Of a table of addresses: codes, scale, low, tops, blocks, per, values, factor, first, where, blocks of a kept one.
FIELDS = 11


def product_text(form: Form, kind: int, n: int, asks: bool = True):
    """y = x W^T for the tiles first <= tile < last, where all groups have one scale of their own (no levels).

    With a scale per token, the sums are multiplied with it at the end.

    weight : address of FIELDS words. y : address of float32 [token, row], rows `stride` bytes apart. asks : whether
    codes are asked for ahead (tile_runs.AHEAD).
    """
    if form.scale == "levels":
        return levels_text(form, kind, n, asks)
    if form.layout == "bitmask":
        return _bitmask_text(form, n)
    if form.layout == "blocks":
        return _blocks_text(form, kind, n, asks)
    if form.layout == "vectors":
        return _vectors_text(form, n)
    if is_summed(form, kind) or (kind == BLOCKS and form.parts == 1 and opens(form, n)):
        return _waiting_text(form, kind, n, asks)
    x_bytes, step_bytes, sum_bytes = n * BLOCK * (4 if kind == FLOAT else 1), 4 * n, 12 * n
    block_bytes, (scale_bytes, low_bytes), wide = form.block_bytes, group_bytes(form), wide_blocks(form)
    add_run, load_table, factor = run_of_blocks(form, kind, n, asks), table_loader(form), form.scale == "ue4m3"
    per_token = kind == TOKEN

    def tile_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
        codes, scale, low = word(weight, 0), word(weight, 1), word(weight, 2)
        blocks, per = word(weight, 4), word(weight, 5)
        groups = (blocks + wide - 1) // wide // per
        for start in range(0, panels, PANELS):
            end = min(start + PANELS, panels)
            step = -(-block_bytes // (end - start))
            for tile in range(first, last):
                table, group = load_table(weight, tile), tile * groups
                code, s, m = codes + group * per * block_bytes, scale + group * scale_bytes, low + group * low_bytes
                following = code + groups * per * block_bytes
                for panel in range(start, end):
                    at = panel * blocks
                    some, steps, sums = x + at * x_bytes, x_scale + at * step_bytes, x_sums + at * sum_bytes
                    ask = following + (panel - start) * groups * per * step, step
                    total = add_run(zeros(n), groups, per, blocks, code, s, m, some, steps, sums, table, ask)
                    if per_token:
                        total = times(total, splats(steps, n))
                    if factor:
                        total = times(total, load_floats(word(weight, 7) + 4 * ROWS * tile))
                    store_tokens(y + panel * n * stride + tile * 4 * ROWS, stride, total)

    return tile_product


def _waiting_text(form: Form, kind: int, n: int, asks: bool):
    """product_text where SUMMED blocks or so of one tile meet all panels, whose sums wait meanwhile.

    So long their codes stay in the first-level cache: opened where that pays; else beside a scale per token, where
    integers are summed, and of two tiles that share what is read of activations.
    """
    opened, per_token = opens(form, n), kind == TOKEN
    tiles = TILES if n > 1 and not opened else 1
    values, together, x_bytes, step_bytes, sum_bytes = n * tiles, PANELS * n * tiles, n * BLOCK, 4 * n, 12 * n
    block_bytes, (scale_bytes, low_bytes), line, two = form.block_bytes, group_bytes(form), 4 * ROWS, tiles == 2
    met = opened_form(form) if opened else form
    add_run = run_of_sums(met, values, tiles, asks) if per_token else run_of_blocks(met, kind, n, asks)
    vectors, open_some = SUMMED * met.block_bytes // line if opened else 0, open_run(form) if opened else leave_run

    @jitable
    def store_one(y, stride, total, beside):
        store_tokens(y, stride, total)

    @jitable
    def store_two(y, stride, total, beside):
        store_tokens(y, stride, first_half(total))
        store_tokens(y + beside * line, stride, second_half(total))

    @jitable
    def ask_block(address):
        if n > 1:
            for line in range(0, block_bytes, 64):
                prefetch(address + line)

    store_tiles = store_two if two else store_one

    def tile_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
        codes, scale, low = word(weight, 0), word(weight, 1), word(weight, 2)
        blocks, per = word(weight, 4), word(weight, 5)
        groups, kept, unpacked = blocks // per, room(together), room(vectors)
        for start in range(0, panels, PANELS):
            end = min(start + PANELS, panels)
            for tile in range(first, last, tiles):
                other = 1 if two and tile + 1 < last else 0  # the last of an odd number is taken twice
                done = 0
                while done < blocks:
                    some, each = _next_blocks(done, blocks, per)
                    group, here = tile * groups + done // per, kept
                    code, beside = codes + (tile * blocks + done) * block_bytes, (other * blocks, other * groups)
                    s, m = scale + group * scale_bytes, low + group * low_bytes
                    following, left = code + some * each * block_bytes, some * each
                    code = open_some(unpacked, code, some * each)
                    for panel in range(start, end):
                        if left > 0:
                            ask_block(following)
                            ask_block(following + other * blocks * block_bytes)
                            following, left = following + block_bytes, left - 1
                        at = panel * blocks + done
                        total = load_tokens(here, line, values) if done else zeros(values)
                        numbers, steps, sums = x + at * x_bytes, x_scale + at * step_bytes, x_sums + at * sum_bytes
                        total = add_run(total, some, each, beside, code, s, m, numbers, steps, sums, every(0), (0, 0))
                        store_tokens(here, line, total)
                        here += line * values
                    done += some * each
                here = kept
                for panel in range(start, end):
                    total = load_tokens(here, line, values)
                    if per_token:
                        total = times(total, over_again(splats(x_scale + panel * blocks * step_bytes, n), tiles))
                    store_tiles(y + panel * n * stride + tile * line, stride, total, other)
                    here += line * values

    return tile_product


@jitable
def _next_blocks(done, blocks, per):
    """What comes together behind `done` blocks: so many groups, and blocks of each; or a part of one group."""
    if per <= SUMMED:
        return min(SUMMED // per, (blocks - done) // per), per
    return 1, min(SUMMED, per - done % per)


def _blocks_text(form: Form, kind: int, n: int, asks: bool):
    """product_text where whole blocks are left out: each tile meets its kept ones."""
    integers, per_token = kind != FLOAT, kind == TOKEN
    x_bytes, step_bytes, sum_bytes = n * BLOCK * (1 if integers else 4), 4 * n, 12 * n
    block_bytes, (scale_bytes, low_bytes), summed = form.block_bytes, group_bytes(form), is_summed(form, kind)
    add_run, load_table = run_of_blocks(form, kind, n, asks), table_loader(form)

    def tile_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
        codes, scale, low = word(weight, 0), word(weight, 1), word(weight, 2)
        blocks, per, table = word(weight, 4), word(weight, 5), load_table(weight, 0)
        begin, where, run = word(weight, 8), word(weight, 9), word(weight, 10)
        for start in range(0, panels, PANELS):
            for tile in range(first, last):
                for panel in range(start, min(start + PANELS, panels)):
                    at = panel * blocks
                    some, steps, sums = x + at * x_bytes, x_scale + at * step_bytes, x_sums + at * sum_bytes
                    total = zeros(n)
                    for block in range(blocks):  # NaN if any of the activations is, met by a kept block or not
                        of = splats(steps + block * step_bytes if integers else sums + block * sum_bytes, n)
                        total = fma(of, every(0), total)
                    for kept in range(load_whole(begin + 4 * tile), load_whole(begin + 4 * tile + 4)):
                        at = load_whole(where + 4 * kept)
                        mine, step, of = some + at * x_bytes, steps + at * step_bytes, sums + at * sum_bytes
                        groups, group = run // per, kept * (run // per)
                        code, s = codes + kept * run * block_bytes, scale + group * scale_bytes
                        m, beside = low + group * low_bytes, (0, 0) if summed else run
                        total = add_run(total, groups, per, beside, code, s, m, mine, step, of, table, (0, 0))
                    if per_token:
                        total = times(total, splats(steps, n))
                    store_tokens(y + panel * n * stride + tile * 4 * ROWS, stride, total)

    return tile_product


def _bitmask_text(form: Form, n: int):
    """product_text where a bitmask says which values are kept; those of a block lie one after another."""
    mask_bytes, value_bytes, x_bytes, products = form.block_bytes, form.bits // 8, n * BLOCK * 4, kept_products(form, n)

    def tile_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
        masks, starts, blocks, values = word(weight, 0), word(weight, 1), word(weight, 4), word(weight, 6)
        for start in range(0, panels, PANELS):
            for tile in range(first, last):
                for panel in range(start, min(start + PANELS, panels)):
                    total = zeros(n)
                    mask, some = masks + tile * blocks * mask_bytes, x + panel * blocks * x_bytes
                    for block in range(blocks):
                        begin = values + value_bytes * load_whole(starts + 4 * (tile * blocks + block))
                        total = plus(total, products(mask, some, begin))
                        mask += mask_bytes
                        some += x_bytes
                    store_tokens(y + panel * n * stride + tile * 4 * ROWS, stride, total)

    return tile_product


def _vectors_text(form: Form, n: int):
    """product_text where codes name vectors of columns; lanes run along the columns."""
    rows, codes_of_block, x_bytes = rows_together(n), form.parts * BLOCK // form.columns, n * BLOCK * 4
    block_bytes, where_bytes = codes_of_block * form.bits // 8, codes_of_block * 4
    zero_sums, add_products = no_sums(n * rows), vector_products(form, n, rows)
    add_scaled, store_rows = scale_sums(n, rows), store_sums(n, rows)

    def tile_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
        codes, scales, blocks, per = word(weight, 0), word(weight, 1), word(weight, 4), word(weight, 5)
        table, books = word(weight, 6), word(weight, 9)
        groups, row_bytes = blocks // per, blocks * block_bytes
        for panel in range(panels):  # few rows together read the activations often: one panel stays near
            for row in range(first * ROWS, last * ROWS, rows):
                total, code, some, where = zero_sums(), codes + row * row_bytes, x + panel * blocks * x_bytes, books
                scale = scales + 4 * (row // ROWS * ROWS * groups + row % ROWS)
                for _ in range(groups):
                    sums = zero_sums()
                    for _ in range(per):
                        sums = add_products(sums, code, row_bytes, some, table, where)
                        code += block_bytes
                        some += x_bytes
                        where += where_bytes
                    total = add_scaled(total, sums, scale)
                    scale += 4 * ROWS
                store_rows(y + panel * n * stride + 4 * row, stride, total)

    return tile_product


@cache
def product_address(form: Form, kind: int, n: int, alone: bool = True) -> int:
    """Address of the compiled product: void(weight, x, x_scale, x_sums, y, stride, panels, first, last).

    kind : of activations; 4 bits make no difference. alone : whether one thread reads memory.
    """
    asks, kind = n == 1 and alone, kind & ~FOUR
    key = f"_{form.key}_{('float', 'blocks', 'token', 'supers')[kind]}_{n}{'_asks' * asks}"
    return compile_address(product_text(form, kind, n, asks), types.void(*[types.intp] * 9), key)
