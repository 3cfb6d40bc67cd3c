"""Numba texts of the tile products: some tiles of a weight times some tokens, laid out as laid_out.py says.

One text serves every form of tiles (tiling.Form), any number of tokens and both kinds of activations; what differs is
constant to the compiler. The sums run block by block along a row in a fixed order, each row in its own lane, so neither
the number of threads nor of tokens changes a bit of the result. The NumPy text is reference.py.
"""

from functools import cache

from numba import types

from refllm.kernels.packed.base import RUN
from refllm.kernels.packed.compile import compile_address, jitable
from refllm.kernels.packed.laid_out import (
    BLOCKS,
    FLOAT,
    FOUR,
    SHIFTS_AT,
    SUPER_WORDS,
    TOKEN,
    TOKENS,
    begins,
)
from refllm.kernels.packed.lane_math import fma, minus_product, plus, times
from refllm.kernels.packed.lane_memory import (
    load_floats,
    load_halves,
    load_powers,
    load_shared,
    load_signed,
    load_six,
    load_tokens,
    load_ue4m3,
    load_unsigned,
    load_whole,
    prefetch,
    room,
    splats,
    store_tokens,
    word,
)
from refllm.kernels.packed.lanes import every, first_half, over_again, pair, repeated, second_half, whole_zero, zeros
from refllm.kernels.packed.products import (
    as_floats,
    block_products,
    float_products,
    integer_products,
    kept_products,
    level_products,
    picked_products,
    sixteen_in_registers,
    sum_words,
    super_block_product,
    whole_zeros,
)
from refllm.kernels.packed.tables import MANY, OF_ROWS, SIXTEEN
from refllm.kernels.packed.tiling import BLOCK, ROWS, SUPER, Form
from refllm.kernels.packed.vector_products import no_sums, rows_together, scale_sums, store_sums, vector_products

# Products of one token read weights once and in order. Processors fetch ahead by themselves, but not past the end of a
# page of 4096 bytes, so what lies in the next one is asked for.
AHEAD = 4096
PANELS = 192 // TOKENS  # activations of so many panels are used again while they lie in the second-level cache
SUMMED = RUN // BLOCK  # blocks under one scale that are summed in integers beside a scale per token
TILES = 2 if TOKENS == 12 else 1  # side by side then; 24 sums in 32 registers
# Of a table of addresses: codes, scale, low, tops, blocks, per, values, factor, first, where, blocks of a kept one.
FIELDS = 11
SCALES = {"half": (load_halves, 2), "float": (load_floats, 4), "power": (load_powers, 1), "ue4m3": (load_ue4m3, 1)}


def _ask_ahead(stream_bytes: int, block_bytes: int, n: int):
    """Asks for what will be read AHEAD bytes of codes later, of a stream of `stream_bytes` a block; for one token."""
    away = AHEAD // block_bytes * stream_bytes if n == 1 else 0

    @jitable
    def ask_ahead(address):
        if away:
            for line in range(0, stream_bytes, 64):
                prefetch(address + away + line)

    return ask_ahead


def _products(form: Form, kind: int, n: int, part: int):
    """total + scale * (sum of (code - zero) x) over a block or a half of it, x in its steps; and the sum of x."""
    if form.layout == "pairs":
        return _picked_products(form, kind, n, part)
    integers, stepped = kind != FLOAT, kind == BLOCKS
    parts, minimum, own_zero = form.parts, form.low in ("minimum", "levels"), form.low == "zero"
    at = 4 * n * (part + parts - 1)  # of the sums of this part
    if integers:
        products = integer_products(form, part, parts, n, begins(form, integers))
    else:
        products = float_products(form, part, parts, n)

    @jitable(forceinline=True)  # or LLVM hands the sums over through memory
    def add_products(total, codes, x, step, sums, scale, zero, lowest, table):
        of = splats(sums + at, n)
        if integers:
            p = products(codes, x, sums + at)
            p = minus_product(p, zero, of) if own_zero else p
            p = times(p, step) if stepped else p
        else:
            p = products(codes, x, zero, table)
        total = fma(p, scale, total)
        if minimum:
            total = fma(lowest, times(of, step) if stepped else of, total)
        return total

    return add_products


def _picked_products(form: Form, kind: int, n: int, part: int):
    """The same for 2:4, where x is a block of activations and a half of a block of kept columns takes two of four."""
    integers, stepped = kind != FLOAT, kind == BLOCKS
    products = picked_products(form, part, n) if integers else float_products(form, part, 2, n)

    @jitable(forceinline=True)
    def add_products(total, codes, x, step, sums, scale, zero, lowest, table):
        if integers:
            p = products(codes, x, zero)
            return fma(times(p, step) if stepped else p, scale, total)
        total = fma(products(codes, x, zero, table), scale, total)
        return fma(splats(sums, n), every(0), total)  # NaN if any of the activations is, picked or not

    return add_products


@jitable
def _table_in_registers(weight, tile):
    return load_floats(word(weight, 6))


@jitable
def _table_address(weight, tile):
    return word(weight, 6)


@jitable
def _no_table(weight, tile):
    return every(0)


def _load_table(form: Form):
    """What float_products takes as its table, from the table of addresses and the number of a tile."""
    if form.table == OF_ROWS:
        table_bytes = 4 * ROWS << form.bits

        @jitable
        def table_of_tile(weight, tile):
            return word(weight, 6) + tile * table_bytes

        return table_of_tile
    if form.table == SIXTEEN and sixteen_in_registers():
        return _table_in_registers
    return _table_address if form.table in (SIXTEEN, MANY) else _no_table


def _group_bytes(form: Form) -> tuple[int, int]:
    """Bytes from group to group of scales and of what is subtracted."""
    return form.parts * ROWS * SCALES[form.scale][1], form.parts * ROWS * (2 if form.low == "minimum" else 1)


def _group_loader(form: Form):
    """Reads a group's scale, and what is subtracted."""
    load_scale, (own_zero, minimum), offset = SCALES[form.scale][0], _lows(form), form.offset

    @jitable(forceinline=True)
    def load_group(scale, low):
        s = load_scale(scale)
        return s, load_unsigned(low) if own_zero else load_halves(low) if minimum else every(offset)

    return load_group


def _lows(form: Form) -> tuple[bool, bool]:
    """Whether groups have a zero point, and whether they have a minimum."""
    return form.low == "zero", form.low == "minimum"


def _run_of_blocks(form: Form, kind: int, n: int):
    """Adds the products of consecutive blocks of a row of tiles.

    Of 2:4 the halves of a block of kept columns meet one block of activations each; the last may have one half only.
    """
    if _is_summed(form, kind):
        return _run_of_sums(form, n, 1)
    block_bytes, parts, pairs, wide = form.block_bytes, form.parts, form.layout == "pairs", _wide(form)
    group_scale, group_low = _group_bytes(form)
    two, scale_bytes, low_bytes, load_group = parts == 2, group_scale // parts, group_low // parts, _group_loader(form)
    minimum, offset = form.low == "minimum", form.offset
    x_bytes, step_bytes, sum_bytes = n * BLOCK * (4 if kind == FLOAT else 1), 4 * n, 12 * n
    add_first, add_second = (_products(form, kind, n, part) for part in (0, 1 if pairs else parts - 1))
    streams = block_bytes, group_scale, group_low if any(_lows(form)) else 0
    ask_codes, ask_scale, ask_low = (_ask_ahead(size, block_bytes, n) for size in streams)

    @jitable(forceinline=True)
    def add_run(total, groups, per, left, code, scale, low, x, steps, sums, table):
        """Adds `groups` times `per` blocks, of 2:4 as far as `left` blocks of activations reach.

        Addresses: codes, scales and lows; activations, their steps and sums.
        """
        for _ in range(groups):
            s, m = load_group(scale, low)
            ask_scale(scale)
            ask_low(low)
            for _ in range(per):
                ask_codes(code)
                step = splats(steps, n)
                zero = every(offset) if minimum else m
                total = add_first(total, code, x, step, sums, s, zero, m, table)
                if two:
                    s, m = load_group(scale + scale_bytes, low + low_bytes)
                    zero = every(offset) if minimum else m
                if pairs:
                    left -= 2
                    if left >= 0:
                        x, step, sums = x + x_bytes, splats(steps + step_bytes, n), sums + sum_bytes
                        total = add_second(total, code, x, step, sums, s, zero, m, table)
                elif two:
                    total = add_second(total, code, x, step, sums, s, zero, m, table)
                code += block_bytes
                x += x_bytes
                steps += wide * step_bytes
                sums += sum_bytes
            scale += group_scale
            low += group_low
        return total

    return add_run


def _wide(form: Form) -> int:
    """Blocks of activations beside one of codes."""
    return 2 if form.layout == "pairs" else 1


def _is_summed(form: Form, kind: int) -> bool:
    """Whether integers are summed over SUMMED blocks before a scale meets them."""
    return kind == TOKEN and form.layout in ("", "blocks") and form.parts == 1


def _run_of_sums(form: Form, n: int, tiles: int):
    """_run_of_blocks beside a scale per token: of `tiles` tiles, with n / tiles tokens each.

    SUMMED blocks under one scale are summed in integers.
    """
    block_bytes, tokens, load_group, (group_scale, group_low) = (
        form.block_bytes, n // tiles, _group_loader(form), _group_bytes(form),
    )  # fmt: skip
    x_bytes, sum_bytes, from_zero, (own_zero, minimum) = tokens * BLOCK, 12 * tokens, begins(form, True), _lows(form)
    low_read = group_low if own_zero or minimum else 0
    add_products, streams = block_products(form, n, tiles), (block_bytes, group_scale, low_read)
    add_sums, store_sums_of_x = sum_words(tokens, from_zero)
    ask_codes, ask_scale, ask_low = (_ask_ahead(size, block_bytes, n) for size in streams)
    needs_sums, two = own_zero or minimum or from_zero, tiles == 2

    @jitable
    def nothing():
        return whole_zero() if from_zero else every(0)

    @jitable
    def load_one(scale, low, scale_beside, low_beside):
        return load_group(scale, low)

    @jitable
    def load_two(scale, low, scale_beside, low_beside):
        s, m = load_group(scale, low)
        other, lower = load_group(scale + scale_beside, low + low_beside)
        return repeated(pair(s, other), tokens), repeated(pair(m, lower), tokens)

    load_groups = load_two if two else load_one

    @jitable(forceinline=True)
    def add_run(total, groups, per, beside, code, scale, low, x, steps, sums, table):
        """Adds `groups` times `per` blocks. beside : of two tiles, blocks and groups from the one to the other."""
        code_beside, scale_beside, low_beside = 0, 0, 0
        if two:
            code_beside, scale_beside, low_beside = (
                beside[0] * block_bytes,
                beside[1] * group_scale,
                beside[1] * group_low,
            )
        place = room(1)
        for _ in range(groups):
            s, m = load_groups(scale, low, scale_beside, low_beside)
            ask_scale(scale)
            ask_low(low)
            for done in range(0, per, SUMMED):
                whole, of, left = whole_zeros(n), nothing(), min(SUMMED, per - done)
                while True:  # at least once, or LLVM converts the sums at every turn
                    ask_codes(code)
                    whole = add_products(whole, code, code_beside, x)
                    of = add_sums(of, sums) if needs_sums else of
                    code, x, sums, left = code + block_bytes, x + x_bytes, sums + sum_bytes, left - 1
                    if left <= 0:
                        break
                p = as_floats(whole)
                if needs_sums:
                    store_sums_of_x(place, of)
                of_x = over_again(splats(place, tokens), tiles)
                p = minus_product(p, m, of_x) if own_zero else plus(p, of_x) if from_zero else p
                total = fma(p, s, total)
                total = fma(m, of_x, total) if minimum else total
            scale += group_scale
            low += group_low
        return total

    return add_run


def product_text(form: Form, kind: int, n: int):
    """y = x W^T for the tiles first <= tile < last, where all groups have one scale of their own (no levels).

    With a scale per token, the sums are multiplied with it at the end.

    weight : address of FIELDS words. y : address of float32 [token, row], rows `stride` bytes apart.
    """
    if form.scale == "levels":
        return _levels_text(form, kind, n)
    if form.layout == "bitmask":
        return _bitmask_text(form, n)
    if form.layout == "blocks":
        return _blocks_text(form, kind, n)
    if form.layout == "vectors":
        return _vectors_text(form, n)
    if _is_summed(form, kind):
        return _summed_text(form, n)
    x_bytes, step_bytes, sum_bytes = n * BLOCK * (4 if kind == FLOAT else 1), 4 * n, 12 * n
    block_bytes, (scale_bytes, low_bytes), wide = form.block_bytes, _group_bytes(form), _wide(form)
    add_run, load_table, factor = _run_of_blocks(form, kind, n), _load_table(form), form.scale == "ue4m3"
    per_token = kind == TOKEN

    def tile_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
        codes, scale, low = word(weight, 0), word(weight, 1), word(weight, 2)
        blocks, per = word(weight, 4), word(weight, 5)
        groups = (blocks + wide - 1) // wide // per
        for start in range(0, panels, PANELS):
            for tile in range(first, last):
                table, group = load_table(weight, tile), tile * groups
                code, s, m = codes + group * per * block_bytes, scale + group * scale_bytes, low + group * low_bytes
                for panel in range(start, min(start + PANELS, panels)):
                    at = panel * blocks
                    some, steps, sums = x + at * x_bytes, x_scale + at * step_bytes, x_sums + at * sum_bytes
                    total = add_run(zeros(n), groups, per, blocks, code, s, m, some, steps, sums, table)
                    if per_token:
                        total = times(total, splats(steps, n))
                    if factor:
                        total = times(total, load_floats(word(weight, 7) + 4 * ROWS * tile))
                    store_tokens(y + panel * n * stride + tile * 4 * ROWS, stride, total)

    return tile_product


def _summed_text(form: Form, n: int):
    """product_text beside a scale per token, where integers are summed over SUMMED blocks.

    So long the codes of one tile, or of two that share what is read of activations, stay in the first-level cache and
    meet all panels, whose sums wait meanwhile.
    """
    tiles = TILES if n > 1 else 1
    values, together, x_bytes, step_bytes, sum_bytes = n * tiles, PANELS * n * tiles, n * BLOCK, 4 * n, 12 * n
    block_bytes, (scale_bytes, low_bytes), line = form.block_bytes, _group_bytes(form), 4 * ROWS
    add_run, two = _run_of_sums(form, values, tiles), tiles == 2

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
        groups, kept = blocks // per, room(together)
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
                    for panel in range(start, end):
                        if left > 0:
                            ask_block(following)
                            ask_block(following + other * blocks * block_bytes)
                            following, left = following + block_bytes, left - 1
                        at = panel * blocks + done
                        total = load_tokens(here, line, values) if done else zeros(values)
                        numbers, sums = x + at * x_bytes, x_sums + at * sum_bytes
                        total = add_run(total, some, each, beside, code, s, m, numbers, 0, sums, 0)
                        store_tokens(here, line, total)
                        here += line * values
                    done += some * each
                here = kept
                for panel in range(start, end):
                    steps = over_again(splats(x_scale + panel * blocks * step_bytes, n), tiles)
                    total = times(load_tokens(here, line, values), steps)
                    store_tiles(y + panel * n * stride + tile * line, stride, total, other)
                    here += line * values

    return tile_product


@jitable
def _next_blocks(done, blocks, per):
    """What comes together behind `done` blocks: so many groups, and blocks of each; or a part of one group."""
    if per <= SUMMED:
        return min(SUMMED // per, (blocks - done) // per), per
    return 1, min(SUMMED, per - done % per)


def _blocks_text(form: Form, kind: int, n: int):
    """product_text where whole blocks are left out: each tile meets its kept ones."""
    integers, per_token = kind != FLOAT, kind == TOKEN
    x_bytes, step_bytes, sum_bytes = n * BLOCK * (1 if integers else 4), 4 * n, 12 * n
    block_bytes, (scale_bytes, low_bytes), summed = form.block_bytes, _group_bytes(form), _is_summed(form, kind)
    add_run, load_table = _run_of_blocks(form, kind, n), _load_table(form)

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
                        total = add_run(total, groups, per, beside, code, s, m, mine, step, of, table)
                    if per_token:
                        total = times(total, splats(steps, n))
                    store_tokens(y + panel * n * stride + tile * 4 * ROWS, stride, total)

    return tile_product


def _levels_text(form: Form, kind: int, n: int):
    """product_text of K-quants: small integer scales under a float16 one for SUPER columns."""
    integers = kind != FLOAT
    above = SUPER // BLOCK
    code_bytes, level_bytes, top_bytes = above * form.block_bytes, above * ROWS * form.parts, 2 * ROWS * form.tops
    x_bytes, step_bytes = above * n * BLOCK * (1 if integers else 4), above * 4 * n
    sum_bytes = 4 * n * (SUPER_WORDS if integers else 3 * above)
    low_levels = form.low == "levels"
    add_super = (_integer_super if integers else _float_super)(form, n)
    low_bytes = level_bytes // (2 if form.shared_levels else 1) if low_levels else 0
    streams = level_bytes, low_bytes, top_bytes
    ask_levels, ask_lowest, ask_tops = (_ask_ahead(size, code_bytes, n) for size in streams)

    def tile_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
        codes, scale, low, tops = word(weight, 0), word(weight, 1), word(weight, 2), word(weight, 3)
        blocks = word(weight, 4)
        supers = blocks // above
        for start in range(0, panels, PANELS):
            for tile in range(first, last):
                for panel in range(start, min(start + PANELS, panels)):
                    total = zeros(n)
                    code, top = codes + tile * supers * code_bytes, tops + tile * supers * top_bytes
                    level, lowest = scale + tile * supers * level_bytes, low + tile * supers * low_bytes
                    at = panel * supers
                    some, steps, sums = x + at * x_bytes, x_scale + at * step_bytes, x_sums + at * sum_bytes
                    for _ in range(supers):
                        ask_levels(level)
                        ask_lowest(lowest)
                        ask_tops(top)
                        total = add_super(total, code, level, lowest, top, some, steps, sums)
                        code, top = code + code_bytes, top + top_bytes
                        level, lowest = level + level_bytes, lowest + low_bytes
                        some, steps, sums = some + x_bytes, steps + step_bytes, sums + sum_bytes
                    store_tokens(y + panel * n * stride + tile * 4 * ROWS, stride, total)

    return tile_product


def _float_super(form: Form, n: int):
    """Adds the product of a super-block and float activations."""
    low_levels, two, block_bytes = form.low == "levels", form.parts == 2, form.block_bytes
    above, levels, offset, x_bytes, step_bytes, sum_bytes = (
        SUPER // BLOCK, ROWS * form.parts, form.offset, 4 * n * BLOCK, 4 * n, 12 * n,
    )  # fmt: skip
    add_first, add_second = (_products(form, FLOAT, n, part) for part in (0, form.parts - 1))
    ask_codes, shared = _ask_ahead(block_bytes, block_bytes, n), form.shared_levels

    @jitable(forceinline=True)
    def load_levels(level, lowest, block):
        if shared:
            return load_six(level), load_shared(level, lowest + ROWS * (block % 4), block // 4 * 4)
        return load_signed(level), load_unsigned(lowest + levels * block) if low_levels else every(0)

    @jitable(forceinline=True)
    def add_super(total, code, level, lowest, top, x, steps, sums):
        zero, table, d = every(offset), every(0), load_halves(top)
        dmin = times(load_halves(top + 2 * ROWS), every(-1)) if low_levels else d
        for block in range(above):
            ask_codes(code)
            step = splats(steps, n)
            own, least = load_levels(level, lowest, block)
            total = add_first(total, code, x, step, sums, times(d, own), zero, times(dmin, least), table)
            if two:
                own, least = load_levels(level + ROWS, lowest + ROWS, block)
                total = add_second(total, code, x, step, sums, times(d, own), zero, times(dmin, least), table)
            code, level = code + block_bytes, level + levels
            x, steps, sums = x + x_bytes, steps + step_bytes, sums + sum_bytes
        return total

    return add_super


def _integer_super(form: Form, n: int):
    """Adds the product of a super-block and codes with one scale: the scale times whole numbers times float16 ones."""
    above, levels, two, block_bytes = SUPER // BLOCK, ROWS * form.parts, form.parts == 2, form.block_bytes
    x_bytes, sum_bytes, first_sums, second_sums = n * BLOCK, 12 * n, 4 * n * (form.parts - 1), 8 * n
    shift_bytes, shifts_at = 4 * n, 4 * n * SHIFTS_AT
    add_first, add_second = (level_products(form, part, n, begins(form, True)) for part in (0, form.parts - 1))
    scaled, ask_codes = super_block_product(form, n), _ask_ahead(block_bytes, block_bytes, n)

    @jitable(forceinline=True)
    def add_super(total, code, level, lowest, top, x, steps, sums):
        whole, begin, shift, first = whole_zeros(n), sums, sums + shifts_at, level
        for _ in range(above):
            ask_codes(code)
            whole = add_first(whole, code, x, begin + first_sums, level, shift)
            if two:
                whole = add_second(whole, code, x, begin + second_sums, level + ROWS, shift)
            code, level, x = code + block_bytes, level + levels, x + x_bytes
            begin, shift = begin + sum_bytes, shift + shift_bytes
        return plus(total, times(scaled(whole, top, first, lowest, sums), splats(steps, n)))

    return add_super


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
def product_address(form: Form, kind: int, n: int) -> int:
    """Address of the compiled product: void(weight, x, x_scale, x_sums, y, stride, panels, first, last).

    kind : of activations; 4 bits make no difference.
    """
    kind &= ~FOUR
    key = f"_{form.key}_{('float', 'blocks', 'token', 'supers')[kind]}_{n}"
    return compile_address(product_text(form, kind, n), types.void(*[types.intp] * 9), key)
