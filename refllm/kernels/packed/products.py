"""Words that multiply the codes of a block with activations: what every tile product does most of the time.

Each is made for one form of tiles (tiling.py), one part of a block and one number of tokens, since all of that is
constant to the compiler. A lane belongs to a row, so no sum crosses lanes. How bytes are multiplied: dots.py.
"""

from functools import cache

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from refllm.kernels.packed.dots import (
    BYTES,
    QUADS,
    dot_form,
    emit_bare_quads,
    emit_begin,
    emit_bytes,
    emit_code_quads,
    emit_dot,
    emit_dots,
    emit_picked_bytes,
    quads_of,
)
from refllm.kernels.packed.lane_math import emit_fma
from refllm.kernels.packed.lane_memory import emit_load
from refllm.kernels.packed.lanes import emit_join, several
from refllm.kernels.packed.simd import F32, I8, I32, Floats, Ints, constant
from refllm.kernels.packed.tiling import BLOCK, Form


@cache
def open_codes(form: Form):
    """A word: the codes of a block, opened (tiling.OPENED), to an address; further that of the block."""

    @intrinsic
    def open_block(typing, place, codes):
        def generate(context, b, sig, args):
            for i, some in enumerate(emit_bytes(b, form, args[1])):
                at = b.inttoptr(b.add(args[0], args[0].type(64 * i)), BYTES.as_pointer())
                b.store(some, at, align=64)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return open_block


@cache
def integer_products(form: Form, part: int, parts: int, n: int, begins: bool):
    """A word: sums of code * x over a block (parts = 1) or one half of it (parts = 2), as floats: exact.

    Its arguments are the address of the block's codes; that of n times 32 int8 numbers, one token after another; and
    that of n int32 numbers, with which the sums begin if `begins`.
    """
    quads, kind = quads_of(part, parts), several(Floats, n)

    @intrinsic
    def sums_of_products(typing, codes, x, begin):
        def generate(context, b, sig, args):
            codes, x, begin = args
            sums = emit_dots(b, form, quads, [codes], x, emit_begin(b, begin, n, begins))
            return emit_join(b, kind, [b.sitofp(total, Floats.llvm) for total in sums])

        return kind(types.intp, types.intp, types.intp), generate

    return sums_of_products


@cache
def block_products(form: Form, n: int, tiles: int):
    """A word: sums and, added to them, code * x over a block of each of `tiles` tiles, as integers.

    Its arguments are the sums, of n / tiles tokens of the first tile, then of the next; the address of the block's
    codes; the bytes from there to those of the next tile; and the address of 32 int8 numbers of every token.
    """
    kind = several(Ints, n)

    @intrinsic
    def add_products(typing, total, codes, beside, x):
        def generate(context, b, sig, args):
            total, codes, beside, x = args
            sums = [b.extract_value(total, i) for i in range(n)]
            places = [codes, b.add(codes, beside)][:tiles]
            return emit_join(b, kind, emit_dots(b, form, range(QUADS), places, x, sums))

        return kind(kind, *[types.intp] * 3), generate

    return add_products


@cache
def sum_words(n: int, integers: bool):
    """Two words for one vector of the sums of n tokens, as they stand laid out: int32, or float32.

    The one adds those at an address, where n > 1 reading beyond them what is never used; the other stores them as
    floats.
    """
    kind, element = (Ints, I32) if integers else (Floats, F32)

    @intrinsic
    def add_sums(typing, sums, address):
        def generate(context, b, sig, args):
            if n == 1:
                zero = constant(kind.llvm, 0)
                some = b.insert_element(zero, emit_load(b, args[1], 0, element), I32(0))
            else:
                some = emit_load(b, args[1], 0, kind.llvm)
            return b.add(args[0], some) if integers else b.fadd(args[0], some)

        return kind(kind, types.intp), generate

    @intrinsic
    def store_sums(typing, address, sums):
        def generate(context, b, sig, args):
            value = b.sitofp(args[1], Floats.llvm) if integers else args[1]
            b.store(value, b.inttoptr(args[0], Floats.llvm.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(types.intp, kind), generate

    return add_sums, store_sums


@intrinsic
def as_floats(typing, values):
    """Vectors of integers as floats: exact below 2^24."""
    kind = several(Floats, values.n)

    def generate(context, b, sig, args):
        return emit_join(b, kind, [b.sitofp(b.extract_value(args[0], i), Floats.llvm) for i in range(kind.n)])

    return kind(values), generate


@intrinsic(prefer_literal=True)
def whole_zeros(typing, n):
    """n vectors of the integer 0."""
    kind = several(Ints, n.literal_value)
    return kind(n), lambda context, b, sig, args: ir.Constant(kind.llvm, [constant(Ints.llvm, 0)] * kind.n)


@cache
def picked_products(form: Form, part: int, n: int):
    """A word for 2:4: sums of (code - zero) * x over the kept columns of a half of a block, as floats: exact.

    Its arguments are those of float_products, x of int8.
    """
    quads, kind, dot = quads_of(part, 2), several(Floats, n), dot_form(form.width)

    @intrinsic
    def sums_of_products(typing, codes, x, zero):
        def generate(context, b, sig, args):
            codes, x, zero = args
            sums, of = ([constant(Ints.llvm, 0)] * n for _ in range(2))
            index = emit_bare_quads(b, codes, 2, quads, form.code_bytes)
            for place, (some, where) in enumerate(zip(emit_code_quads(b, codes, form, quads), index, strict=True)):
                for i in range(n):
                    picked = emit_picked_bytes(b, emit_load(b, x, BLOCK * i + 8 * place, ir.VectorType(I8, 8)), where)
                    sums[i] = emit_dot(b, dot, sums[i], some, picked)
                    of[i] = emit_dot(b, dot, of[i], constant(BYTES, 1), picked)
            whole = lambda number: b.sitofp(number, Floats.llvm)
            differences = [emit_fma(b, b.fneg(zero), whole(y), whole(x)) for x, y in zip(sums, of, strict=True)]
            return emit_join(b, kind, differences)

        return kind(types.intp, types.intp, zero), generate

    return sums_of_products
