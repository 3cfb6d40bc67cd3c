"""Numba text of the tile products of K-quants: levels, small integer scales, under a float16 one for SUPER columns."""

from refllm.kernels.packed.compile import jitable
from refllm.kernels.packed.laid_out import FLOAT, PAIRS_AT, REACH_AT, SHIFTS_AT, SUPER_WORDS, TOKENS, begins
from refllm.kernels.packed.lane_codes import load_shared, load_signed, load_six, load_unsigned
from refllm.kernels.packed.lane_math import plus, times
from refllm.kernels.packed.lane_memory import (
    load_halves,
    load_tokens,
    load_whole,
    prefetch,
    room,
    splats,
    store_tokens,
    word,
)
from refllm.kernels.packed.lanes import every, zeros
from refllm.kernels.packed.level_products import (
    OPEN_VECTORS,
    VECTOR,
    fits_pairs,
    level_products,
    open_super_block,
    opened_product,
    pair_words,
    super_block_product,
)
from refllm.kernels.packed.products import block_products, whole_zeros
from refllm.kernels.packed.tile_runs import PANELS, ask_ahead, open_run, opened_form, opens, part_products
from refllm.kernels.packed.tiling import BLOCK, ROWS, SUPER, Form

NEAR = 9 << 16  # bytes of codes of activations that stay in the second-level cache beside all else


def levels_text(form: Form, kind: int, n: int, asks: bool):
    """product_text of K-quants: small integer scales under a float16 one for SUPER columns."""
    integers = kind != FLOAT
    if integers and n == TOKENS and (fits_pairs(form) or opens(form, n)):
        return _waiting_text(form, n)
    above = SUPER // BLOCK
    code_bytes, level_bytes, top_bytes = above * form.block_bytes, above * ROWS * form.parts, 2 * ROWS * form.tops
    x_bytes, step_bytes = above * n * BLOCK * (1 if integers else 4), above * 4 * n
    sum_bytes = 4 * n * (SUPER_WORDS if integers else 3 * above)
    add_super, low_bytes = (_integer_super if integers else _float_super)(form, n, asks), _low_bytes(form)

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
                        total = add_super(total, code, level, lowest, top, some, steps, sums)
                        code, top = code + code_bytes, top + top_bytes
                        level, lowest = level + level_bytes, lowest + low_bytes
                        some, steps, sums = some + x_bytes, steps + step_bytes, sums + sum_bytes
                    store_tokens(y + panel * n * stride + tile * 4 * ROWS, stride, total)

    return tile_product


def _waiting_text(form: Form, n: int):
    """levels_text of many tokens with codes, where a super-block is opened once for all panels, whose sums wait."""
    above, line, parts = SUPER // BLOCK, 4 * ROWS, form.parts
    x_bytes, step_bytes, sum_bytes = above * n * BLOCK, above * 4 * n, 4 * n * SUPER_WORDS
    code_bytes, level_bytes, top_bytes = above * form.block_bytes, above * ROWS * parts, 2 * ROWS * form.tops
    low_bytes, together = _low_bytes(form), PANELS * n
    vectors, open_super, product = (_paired_super if fits_pairs(form) else _opened_super)(form, n)

    def tile_product(weight, x, x_scale, x_sums, y, stride, panels, first, last):
        codes, scale, low, tops = word(weight, 0), word(weight, 1), word(weight, 2), word(weight, 3)
        supers, opened, kept = word(weight, 4) // above, room(vectors), room(together)
        some_panels = _panels_together(panels, supers * x_bytes)
        for start in range(0, panels, some_panels):
            end = min(start + some_panels, panels)
            ask = -(-code_bytes // (line * (end - start)))  # lines of the next super-block's codes beside each
            for tile in range(first, last):
                for panel in range(end - start):
                    store_tokens(kept + panel * n * line, line, zeros(n))
                for done in range(supers):
                    at = tile * supers + done
                    code, levels = codes + at * code_bytes, scale + at * level_bytes
                    lowest, top = low + at * low_bytes, tops + at * top_bytes
                    open_super(opened, code, levels, lowest, top)
                    prefetch(levels + level_bytes)  # of the next super-block, as its codes below
                    prefetch(levels + level_bytes + line)
                    prefetch(lowest + low_bytes)
                    prefetch(top + top_bytes)
                    here, following = kept, code + code_bytes
                    for panel in range(start, end):
                        for _ in range(ask):
                            prefetch(following)
                            following += line
                        at = panel * supers + done
                        some, steps, sums = x + at * x_bytes, x_scale + at * step_bytes, x_sums + at * sum_bytes
                        one = product(opened, code, levels, lowest, top, some, steps, sums)
                        store_tokens(here, line, plus(load_tokens(here, line, n), one))
                        here += line * n
                for panel in range(start, end):
                    total = load_tokens(kept + (panel - start) * n * line, line, n)
                    store_tokens(y + panel * n * stride + tile * line, stride, total)

    return tile_product


def _low_bytes(form: Form) -> int:
    """Bytes of a super-block's minimum levels: in `low` only four bits each, where they are shared."""
    level_bytes = SUPER // BLOCK * ROWS * form.parts
    return level_bytes // (2 if form.shared_levels else 1) if form.low == "levels" else 0


def _opened_super(form: Form, n: int):
    """Vectors of an open super-block, what opens it, and its product: here of opened codes (tile_runs.opens)."""
    above, met, open_some = SUPER // BLOCK, opened_form(form), open_run(form)
    product_of_bytes = _integer_product(met, n, asks=False)

    @jitable
    def open_super(opened, code, levels, lowest, top):
        open_some(opened, code, above)

    @jitable(forceinline=True)
    def product(opened, code, levels, lowest, top, x, steps, sums):
        return product_of_bytes(opened, levels, lowest, top, x, steps, sums)

    return above * met.block_bytes // VECTOR, open_super, product


def _paired_super(form: Form, n: int):
    """_opened_super where two blocks are multiplied by their levels at once (pair_words), which are opened instead."""
    above, line, block_bytes, x_bytes = SUPER // BLOCK, 4 * ROWS, form.block_bytes, n * BLOCK
    add_products, (make_room, add_pair) = block_products(form, n, 1), pair_words(n)
    open_levels, add_one = open_super_block(form), level_products(form, 0, n, begins=False)
    scaled = opened_product(n)
    most = 0x7FFF // ((1 << form.bits) - 1)  # a panel's reach up to which sums of codes times activations fit 16 bits

    @jitable
    def open_super(opened, code, levels, lowest, top):
        open_levels(opened, levels, lowest, top)

    @jitable(forceinline=True)
    def add_pairs(code, x, levels, shifts):
        """The sum of a super-block in integers; addresses of the pairs of levels and of shifts."""
        whole = whole_zeros(n)
        for _ in range(above // 2):
            first = add_products(whole_zeros(n), code, 0, x)
            both = add_products(make_room(first), code + block_bytes, 0, x + x_bytes)
            whole = add_pair(whole, both, levels, shifts)
            code, x, levels, shifts = code + 2 * block_bytes, x + 2 * x_bytes, levels + line, shifts + 4 * n
        return whole

    @jitable(forceinline=True)
    def add_blocks(code, x, levels, shifts):
        """The same block by block; addresses of the levels as they are stored and of shifts."""
        whole = whole_zeros(n)
        for _ in range(above):
            whole = add_one(whole, code, x, 0, levels, shifts)
            code, x, levels, shifts = code + block_bytes, x + x_bytes, levels + ROWS, shifts + 4 * n
        return whole

    @jitable(forceinline=True)
    def product(opened, code, levels, lowest, top, x, steps, sums):
        if load_whole(sums + 4 * n * REACH_AT) <= most:
            whole = add_pairs(code, x, opened, sums + 4 * n * PAIRS_AT)
        else:
            whole = add_blocks(code, x, levels, sums + 4 * n * SHIFTS_AT)
        return times(scaled(whole, opened, sums), splats(steps, n))

    return OPEN_VECTORS, open_super, product


@jitable
def _panels_together(panels, panel_bytes):
    """How many of the panels meet a super-block at once: equal shares, of PANELS or what NEAR has room for.

    Where it has none for half of PANELS, activations come from further away however few they are.
    """
    fit = NEAR // panel_bytes
    most = min(fit, PANELS) if 2 * fit >= PANELS else PANELS
    return -(-panels // -(-panels // most))


def _float_super(form: Form, n: int, asks: bool):
    """Adds the product of a super-block and float activations."""
    low_levels, two, block_bytes = form.low == "levels", form.parts == 2, form.block_bytes
    above, levels, offset, x_bytes, step_bytes, sum_bytes = (
        SUPER // BLOCK, ROWS * form.parts, form.offset, 4 * n * BLOCK, 4 * n, 12 * n,
    )  # fmt: skip
    add_first, add_second = (part_products(form, FLOAT, n, part) for part in (0, form.parts - 1))
    ask_codes, shared = ask_ahead(block_bytes, n, asks), form.shared_levels

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


def _integer_super(form: Form, n: int, asks: bool):
    """Adds the product of a super-block and codes with one scale."""
    product = _integer_product(form, n, asks)

    @jitable(forceinline=True)
    def add_super(total, code, level, lowest, top, x, steps, sums):
        return plus(total, product(code, level, lowest, top, x, steps, sums))

    return add_super


def _integer_product(form: Form, n: int, asks: bool):
    """The product of a super-block and codes with one scale: the scale times whole numbers times float16 ones."""
    above, levels, two, block_bytes = SUPER // BLOCK, ROWS * form.parts, form.parts == 2, form.block_bytes
    x_bytes, sum_bytes, first_sums, second_sums = n * BLOCK, 12 * n, 4 * n * (form.parts - 1), 8 * n
    shift_bytes, shifts_at = 4 * n, 4 * n * SHIFTS_AT
    add_first, add_second = (level_products(form, part, n, begins(form, True)) for part in (0, form.parts - 1))
    scaled, ask_codes = super_block_product(form, n), ask_ahead(block_bytes, n, asks)

    @jitable(forceinline=True)
    def product(code, level, lowest, top, x, steps, sums):
        whole, begin, shift, first = whole_zeros(n), sums, sums + shifts_at, level
        for _ in range(above):
            ask_codes(code)
            whole = add_first(whole, code, x, begin + first_sums, level, shift)
            if two:
                whole = add_second(whole, code, x, begin + second_sums, level + ROWS, shift)
            code, level, x = code + block_bytes, level + levels, x + x_bytes
            begin, shift = begin + sum_bytes, shift + shift_bytes
        return times(scaled(whole, top, first, lowest, sums), splats(steps, n))

    return product
