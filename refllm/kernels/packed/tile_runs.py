"""Parts of the tile products: what is added to the sums of some tokens by a run of consecutive blocks of a tile.

Sums run block by block along a row in a fixed order, each row in its own lane.
"""

from dataclasses import replace
from functools import cache

from refllm.kernels.packed.base import RUN
from refllm.kernels.packed.compile import jitable
from refllm.kernels.packed.dots import adds_pairs
from refllm.kernels.packed.float_products import float_products, sixteen_in_registers
from refllm.kernels.packed.laid_out import BLOCKS, FLOAT, TOKEN, TOKENS, begins
from refllm.kernels.packed.lane_codes import load_powers, load_ue4m3, load_unsigned
from refllm.kernels.packed.lane_math import fma, minus_product, plus, times
from refllm.kernels.packed.lane_memory import (
    load_floats,
    load_halves,
    prefetch,
    room,
    splats,
    word,
)
from refllm.kernels.packed.lanes import every, over_again, pair, repeated, whole_zero
from refllm.kernels.packed.products import (
    as_floats,
    block_products,
    integer_products,
    open_codes,
    picked_products,
    sum_words,
    whole_zeros,
)
from refllm.kernels.packed.tables import MANY, OF_ROWS, SIXTEEN
from refllm.kernels.packed.tiling import BLOCK, OPENED, ROWS, Form

# Products of one token read weights once and in order. Processors fetch ahead by themselves, but not past the end of a
# page of 4096 bytes, so what lies in the next one is asked for: of codes, since a line of scales lasts for several
# blocks; and where one thread reads, since several get all that memory gives without, and 3 % less with it. Two pages
# ahead: behind the end of a weight of a few hundred kilobytes are the codes of the next (tiled.py), which come while a
# token passes norms and attention.
AHEAD = 8192
WIDE = 512  # bytes of a block of 8-bit codes
PANELS = 192 // TOKENS  # activations of so many panels are used again while they lie in the second-level cache
SUMMED = RUN // BLOCK  # blocks under one scale that are summed in integers beside a scale per token
SCALES = {"half": (load_halves, 2), "float": (load_floats, 4), "power": (load_powers, 1), "ue4m3": (load_ue4m3, 1)}


def ask_ahead(block_bytes: int, n: int, asks: bool):
    """Asks for the codes of a block that will be read AHEAD bytes later; for one token, if at all."""
    return _ask_away(block_bytes) if n == 1 and asks else _ask_nothing


@cache  # a part that kernels have in common is compiled once in a process
def _ask_away(block_bytes: int):
    away = AHEAD // block_bytes * block_bytes

    @jitable
    def ask_away(address):
        for line in range(0, block_bytes, 64):
            prefetch(address + away + line)

    return ask_away


@jitable
def _ask_nothing(address):
    pass


def ask_beside(block_bytes: int, n: int):
    """Asks beside a block of many tokens for codes of the next tile, and says what to ask for beside the next block.

    All that a panel may ask for at once would fill the queue of what is on its way, and cost more than it saves. Codes
    of fewer bits come in time by themselves.

    address, step : of the codes to ask for now, and bytes from there to those of the next block.
    """
    return _ask_next if n > 1 and block_bytes >= WIDE else _pass_next


@jitable
def _ask_next(address, step):
    prefetch(address)
    return address + step, step


@jitable
def _pass_next(address, step):
    return address + step, step


@cache
def part_products(form: Form, kind: int, n: int, part: int):
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


def table_loader(form: Form):
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


def group_bytes(form: Form) -> tuple[int, int]:
    """Bytes from group to group of scales and of what is subtracted."""
    return form.parts * ROWS * SCALES[form.scale][1], form.parts * ROWS * (2 if form.low == "minimum" else 1)


@cache
def _group_loader(scale: str, low: str, offset: int):
    """Reads a group's scale, and what is subtracted, as a form says."""
    load_scale, own_zero, minimum = SCALES[scale][0], low == "zero", low == "minimum"

    @jitable(forceinline=True)
    def load_group(scale, low):
        s = load_scale(scale)
        return s, load_unsigned(low) if own_zero else load_halves(low) if minimum else every(offset)

    return load_group


def _loader_of(form: Form):
    return _group_loader(form.scale, form.low, form.offset)


def run_of_blocks(form: Form, kind: int, n: int, asks: bool):
    """Adds the products of consecutive blocks of a row of tiles.

    Of 2:4 the halves of a block of kept columns meet one block of activations each; the last may have one half only.
    """
    if is_summed(form, kind):
        return run_of_sums(form, n, 1, asks)
    block_bytes, parts, pairs, wide = form.block_bytes, form.parts, form.layout == "pairs", wide_blocks(form)
    group_scale, group_low = group_bytes(form)
    two, scale_bytes, low_bytes, load_group = parts == 2, group_scale // parts, group_low // parts, _loader_of(form)
    minimum, offset = form.low == "minimum", form.offset
    x_bytes, step_bytes, sum_bytes = n * BLOCK * (4 if kind == FLOAT else 1), 4 * n, 12 * n
    add_first, add_second = (part_products(form, kind, n, part) for part in (0, 1 if pairs else parts - 1))
    ask_codes, ask_next = ask_ahead(block_bytes, n, asks), ask_beside(block_bytes, n)

    @jitable(forceinline=True)
    def add_run(total, groups, per, left, code, scale, low, x, steps, sums, table, ask):
        """Adds `groups` times `per` blocks, of 2:4 as far as `left` blocks of activations reach.

        Addresses: codes, scales and lows; activations, their steps and sums. ask : see ask_beside.
        """
        for _ in range(groups):
            s, m = load_group(scale, low)
            for _ in range(per):
                ask_codes(code)
                ask = ask_next(*ask)
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


def wide_blocks(form: Form) -> int:
    """Blocks of activations beside one of codes."""
    return 2 if form.layout == "pairs" else 1


def is_summed(form: Form, kind: int) -> bool:
    """Whether integers are summed over SUMMED blocks before a scale meets them."""
    return kind == TOKEN and form.layout in ("", "blocks", OPENED) and form.parts == 1


def opens(form: Form, n: int) -> bool:
    """Whether a block's codes are opened before they meet n tokens: what a panel would do is done once for all.

    Where a byte product is one instruction, beside which others cost nothing, it would not pay.
    """
    return n == TOKENS and adds_pairs() and form.layout == ""


def opened_form(form: Form) -> Form:
    """What a form's codes are when they are opened."""
    return replace(form, layout=OPENED)


def open_run(form: Form):
    """Opens consecutive blocks to an address, which it returns."""
    open_block, block_bytes, opened_bytes = open_codes(form), form.block_bytes, opened_form(form).block_bytes

    @jitable
    def open_run(place, codes, blocks):
        for i in range(blocks):
            open_block(place + i * opened_bytes, codes + i * block_bytes)
        return place

    return open_run


@jitable
def leave_run(place, codes, blocks):
    """open_run of codes that are met where they are."""
    return codes


def run_of_sums(form: Form, n: int, tiles: int, asks: bool):
    """run_of_blocks beside a scale per token: of `tiles` tiles, with n / tiles tokens each.

    SUMMED blocks under one scale are summed in integers.
    """
    block_bytes, tokens, load_group, (group_scale, group_low) = (
        form.block_bytes, n // tiles, _loader_of(form), group_bytes(form),
    )  # fmt: skip
    x_bytes, sum_bytes, own_zero, minimum = tokens * BLOCK, 12 * tokens, form.low == "zero", form.low == "minimum"
    from_zero = begins(form, True)
    add_products, ask_codes = block_products(form, n, tiles), ask_ahead(block_bytes, n, asks)
    add_sums, store_sums_of_x = sum_words(tokens, from_zero)
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
    def add_run(total, groups, per, beside, code, scale, low, x, steps, sums, table, ask):
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
