"""Words that multiply super-blocks of K-quants with activations: codes, levels and powers of two, all as integers."""

from functools import cache

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from refllm.kernels.packed.dots import (
    BYTES,
    SHORTS,
    X86_BYTE_DOT,
    adds_pairs,
    dot_form,
    emit_begin,
    emit_dot,
    emit_dots,
    emit_four,
    emit_function,
    emit_pair_dots,
    quads_of,
)
from refllm.kernels.packed.lane_memory import emit_load
from refllm.kernels.packed.lanes import emit_join, emit_splat, several
from refllm.kernels.packed.simd import (
    I8,
    I16,
    I32,
    LANES,
    Floats,
    Ints,
    constant,
    emit_half_to_float,
    shuffle,
    target_features,
)
from refllm.kernels.packed.tiling import BLOCK, SUPER, Form

HALVES = ir.VectorType(I16, LANES)
VECTOR, OPEN_VECTORS = 64, 8  # bytes of a vector; vectors of an open super-block


@cache
def level_products(form: Form, part: int, n: int, begins: bool):
    """A word for levels: total + level * 2^shift * (sum of code * x over a part of a block), all of it integers.

    Its arguments are n totals, the three addresses of integer_products, those of sixteen levels and of n shifts. The
    total of a super-block stays below 2^30: 16 parts of 16 columns with codes to 32, levels to 128, shifts to 3 (Q6_K).
    """
    quads, kind = quads_of(part, form.parts), several(Ints, n)

    @intrinsic
    def add_level_products(typing, total, codes, x, begin, levels, shifts):
        def generate(context, b, sig, args):
            total, codes, x, begin, levels, shifts = args
            shifted = lambda i, value: _shifted(b, value, emit_load(b, shifts, 4 * i, I32))
            if adds_pairs() and not begins:
                factors = _twice(b, _level(b, form, levels))
                products = emit_pair_dots(b, form, quads, [codes], x, n, factors)
                products = [shifted(i, one) for i, one in enumerate(products)]
            else:
                sums = emit_dots(b, form, quads, [codes], x, emit_begin(b, begin, n, begins))
                level = _level(b, form, levels)
                products = [b.mul(level, shifted(i, some)) for i, some in enumerate(sums)]
            return emit_join(b, kind, [b.add(b.extract_value(total, i), one) for i, one in enumerate(products)])

        return kind(kind, *[types.intp] * 5), generate

    return add_level_products


def _level(b: ir.IRBuilder, form: Form, address: ir.Value) -> ir.Value:
    """Sixteen levels as integers."""
    level = emit_load(b, address, 0, ir.VectorType(I8, LANES))
    if form.shared_levels:
        return b.lshr(b.zext(level, Ints.llvm), constant(Ints.llvm, 2))
    return b.sext(level, Ints.llvm)


def _twice(b: ir.IRBuilder, level: ir.Value) -> ir.Value:
    """Levels as 16-bit numbers, each twice in its lane."""
    low = b.and_(level, constant(Ints.llvm, 0xFFFF))
    return b.bitcast(b.or_(b.shl(level, constant(Ints.llvm, 16)), low), SHORTS)


def _shifted(b: ir.IRBuilder, value: ir.Value, count: ir.Value) -> ir.Value:
    """Integers shifted left by one count. LLVM would shift all lanes by a register, which takes longer to fill."""
    counts = emit_splat(b, count)
    if "+avx512f" not in target_features():
        return b.shl(value, counts)
    return b.call(emit_function(b, "llvm.x86.avx512.psllv.d.512", *[Ints.llvm] * 3), [value, counts])


def fits_pairs(form: Form) -> bool:
    """Whether `pair_words` serve a form on Numba's target."""
    return form.shared_levels and dot_form(form.bits) == X86_BYTE_DOT


@cache
def pair_words(n: int):
    """Two words that multiply the sums of two blocks by their levels at once: a lane holds both, 16 bits each.

    All of them must fit 16 bits. The one word makes room for the second block's sums below those of the first and
    begins them with 2^15, so that none takes anything away from above. The other turns that bit back and adds both
    products to n totals; its further arguments are the addresses of a vector of levels as `open_super_block` leaves
    them and of n pairs of shifts, the first block's in the upper half.
    """
    kind, half, begin = several(Ints, n), constant(Ints.llvm, 16), constant(Ints.llvm, 1 << 15)

    @intrinsic
    def make_room(typing, sums):
        def generate(context, b, sig, args):
            b.fence("acq_rel", "singlethread")  # LLVM would finish one token after another, each waiting for itself
            each = [b.extract_value(args[0], i) for i in range(n)]
            return emit_join(b, kind, [b.or_(b.shl(one, half), begin) for one in each])

        return kind(kind), generate

    @intrinsic
    def add_pair(typing, total, sums, levels, shifts):
        def generate(context, b, sig, args):
            total, sums, levels, shifts = args
            b.fence("acq_rel", "singlethread")
            call = emit_function(b, "llvm.x86.avx512.vpdpwssd.512", *[Ints.llvm] * 4)
            made, levels = [], emit_load(b, levels, 0, SHORTS)
            for i in range(n):
                both = b.xor(b.extract_value(sums, i), begin)
                shift = b.bitcast(emit_splat(b, emit_load(b, shifts, 4 * i, I32)), SHORTS)
                factor = b.bitcast(b.shl(levels, shift), Ints.llvm)
                made.append(b.call(call, [b.extract_value(total, i), both, factor]))
            return emit_join(b, kind, made)

        return kind(kind, kind, *[types.intp] * 2), generate

    return make_room, add_pair


@cache
def open_super_block(form: Form):
    """A word: the levels and tops of a super-block, as they are multiplied, to OPEN_VECTORS vectors at an address.

    Four of levels, those of two blocks in a lane, the first in the upper half; two of minimum levels, four blocks in a
    lane; the tops as floats. Further arguments: the addresses of levels, minimum levels and tops.
    """

    @intrinsic
    def open_levels(typing, place, levels, lowest, tops):
        def generate(context, b, sig, args):
            place, levels, lowest, tops = args
            own = [_level(b, form, b.add(levels, levels.type(LANES * i))) for i in range(SUPER // BLOCK)]
            pairs = zip(own[::2], own[1::2], strict=True)
            made = [b.or_(b.shl(first, constant(Ints.llvm, 16)), second) for first, second in pairs]
            made += [_minimum_levels(b, form, levels, lowest, w) for w in range(2)]
            made += [_top(b, tops, i) for i in range(2)]
            for i, vector in enumerate(made):
                at = b.inttoptr(b.add(place, place.type(VECTOR * i)), vector.type.as_pointer())
                b.store(vector, at, align=VECTOR)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), generate

    return open_levels


@cache
def opened_product(n: int):
    """super_block_product from the address of what `open_super_block` wrote, and that of the sums."""
    kind = several(Floats, n)

    @intrinsic
    def scaled(typing, total, opened, sums):
        def generate(context, b, sig, args):
            total, opened, sums = args
            fours = [emit_load(b, opened, VECTOR * (4 + w), BYTES) for w in range(2)]
            tops = [emit_load(b, opened, VECTOR * (6 + i), Floats.llvm) for i in range(2)]
            return emit_join(b, kind, _scaled(b, total, tops, fours, sums, n))

        return kind(total, *[types.intp] * 2), generate

    return scaled


@cache
def super_block_product(form: Form, n: int):
    """A word for levels: top * total - bottom top * (sum over parts of minimum level * sum of x), as floats.

    Its arguments are the total of level_products and the addresses of the super-block's tops, levels, minimum levels
    and sums.
    """
    kind, groups = several(Floats, n), SUPER // BLOCK * form.parts

    @intrinsic
    def scaled(typing, total, tops, levels, lowest, sums):
        def generate(context, b, sig, args):
            total, tops, levels, lowest, sums = args
            fours = [_minimum_levels(b, form, levels, lowest, w) for w in range(groups // 4 * (form.low == "levels"))]
            tops = [_top(b, tops, i) for i in range(form.tops)]
            return emit_join(b, kind, _scaled(b, total, tops, fours, sums, n))

        return kind(total, *[types.intp] * 4), generate

    return scaled


def _top(b: ir.IRBuilder, tops: ir.Value, i: int) -> ir.Value:
    return emit_half_to_float(b, emit_load(b, tops, 2 * LANES * i, HALVES))


def _scaled(b: ir.IRBuilder, total: ir.Value, tops: list, fours: list, sums: ir.Value, n: int) -> list[ir.Value]:
    """super_block_product of what it has loaded; `fours` are minimum levels, or there are none."""
    as_float = lambda whole: b.sitofp(whole, Floats.llvm)
    made = [b.fmul(as_float(b.extract_value(total, i)), tops[0]) for i in range(n)]
    if fours:
        minima = _minimum_sums(b, fours, sums, n)
        made = [b.fsub(x, b.fmul(as_float(y), tops[1])) for x, y in zip(made, minima, strict=True)]
    return made


def _minimum_levels(b: ir.IRBuilder, form: Form, levels: ir.Value, lowest: ir.Value, w: int) -> ir.Value:
    """Minimum levels of groups 4 w to 4 w + 3, one of each, row by row."""
    if form.shared_levels:
        bits = lambda value, mask: b.and_(value, constant(Ints.llvm, mask))
        few, low = emit_load(b, levels, 64 * w, Ints.llvm), emit_load(b, lowest, 0, Ints.llvm)
        low, few = b.lshr(low, constant(Ints.llvm, 4 * w)), b.shl(few, constant(Ints.llvm, 4))
        some = b.bitcast(b.or_(bits(few, 0x30303030), bits(low, 0x0F0F0F0F)), BYTES)
    else:
        some = emit_load(b, lowest, 64 * w, BYTES)
    return shuffle(b, some, [LANES * c + r for r in range(LANES) for c in range(4)])


def _minimum_sums(b: ir.IRBuilder, fours: list[ir.Value], sums: ir.Value, n: int) -> list[ir.Value]:
    """Sum over the groups of a super-block of level * 2^shift * sum of x, the latter as two bytes (split_words)."""
    words, first, minima = len(fours), split_words(4 * len(fours)), []
    for i in range(n):  # token by token, or the sums of all of them need more registers than there are
        total = constant(Ints.llvm, 0)
        for start in (first, first + words):
            for w, some in enumerate(fours):
                total = emit_dot(b, dot_form(6), total, some, emit_four(b, sums, 4 * (n * (start + w) + i)))
            if start == first:  # the high bytes
                total = b.shl(total, constant(Ints.llvm, 8))
        minima.append(total)
    return minima


def split_words(groups: int) -> int:
    """Where, among the words of a super-block's sums, those of so many groups begin.

    2^shift times the sum of codes takes two bytes, 256 high + low, so that it is multiplied as codes are. Four groups
    share a word: words 0 and 1 have the high bytes of the 8 blocks, 2 and 3 the low ones, 4 to 7 and 8 to 11 those of
    the 16 halves.
    """
    return 0 if groups == SUPER // BLOCK else 4
