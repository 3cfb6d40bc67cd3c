"""Words that multiply vectors of columns, which codes name, with activations (vectors.VectorWeight).

A lane is a column here: the vectors of a codebook lie in memory as they are added, so a code of a vector of eight
columns costs one load, and one multiplication for each token. Every row has a sum of eight lanes for each token, in
which its columns are added eight after eight; at the end of a group of columns the sum is scaled and added to the
row's total, whose lanes are added in the end, halves first. So the result depends neither on how many rows nor on how
many tokens go together.
"""

from functools import cache

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from refllm.kernels.packed import tables
from refllm.kernels.packed.lane_math import emit_fma, emit_sum
from refllm.kernels.packed.lane_memory import emit_load
from refllm.kernels.packed.lanes import emit_join, emit_splat, emit_together, several
from refllm.kernels.packed.simd import F32, I16, I32, Vector, constant, emit_half_to_float
from refllm.kernels.packed.tiling import BLOCK, Form

EIGHT = 8  # columns at a time
Eights = Vector(F32, EIGHT)


def rows_together(n: int) -> int:
    """Rows at a time: as many as have their sums in registers, for rows after another read the activations anew."""
    return 8 if n == 1 else 2


@cache
def no_sums(count: int):
    """A word: so many sums of nothing."""
    kind = several(Eights, count)

    @intrinsic
    def zero_sums(typing):
        return kind(), lambda context, b, sig, args: ir.Constant(kind.llvm, [constant(Eights.llvm, 0.0)] * count)

    return zero_sums


@cache
def vector_products(form: Form, n: int, rows: int):
    """A word: sums, of each row n tokens, with a block of 32 columns added.

    Its arguments are the sums; the address of the block's codes of the first row, and the bytes from row to row; that
    of n times 32 floats; that of the codebooks; and that of four bytes for every code of a row, which say where the
    code's book begins.
    """
    d, books, code_bytes = form.columns, form.parts, form.bits // 8
    size, piece = 2 if form.table == tables.HALF else 4, min(form.columns, EIGHT)
    kind = several(Eights, n * rows)

    @intrinsic
    def add_products(typing, sums, codes, stride, x, table, where):
        def begin(b, table, where, number):
            """The book of one code."""
            return b.add(table, b.zext(emit_load(b, where, 4 * number, I32), table.type))

        def vector(b, book, codes, number, within):
            """The vector that a code names, from column `within` on, or all of it."""
            code = b.zext(emit_load(b, codes, code_bytes * number, ir.IntType(8 * code_bytes)), book.type)
            place = b.add(book, b.mul(code, ir.Constant(book.type, d * size)))
            stored = emit_load(b, place, size * within, ir.VectorType(I16 if size == 2 else F32, piece))
            return emit_half_to_float(b, stored) if size == 2 else stored

        def generate(context, b, sig, args):
            packed, codes, stride, x, table, where = args
            sums = [b.extract_value(packed, i) for i in range(n * rows)]
            of_rows = [b.add(codes, b.mul(stride, ir.Constant(stride.type, row))) for row in range(rows)]
            for first in range(0, BLOCK, EIGHT):
                some = [emit_load(b, x, 4 * (BLOCK * i + first), Eights.llvm) for i in range(n)]
                pieces = [divmod(column, d) for column in range(first, first + EIGHT, piece)]
                begins = {j: [begin(b, table, where, books * j + m) for m in range(books)] for j, _ in pieces}
                for row, of_row in enumerate(of_rows):
                    found = []
                    for j, within in pieces:
                        each = [vector(b, book, of_row, books * j + m, within) for m, book in enumerate(begins[j])]
                        total = each[0]
                        for one in each[1:]:
                            total = b.fadd(total, one)
                        found.append(total)
                    columns = emit_together(b, found)
                    for i in range(n):
                        sums[row * n + i] = emit_fma(b, columns, some[i], sums[row * n + i])
            return emit_join(b, kind, sums)

        return kind(kind, types.intp, types.intp, types.intp, types.intp, types.intp), generate

    return add_products


@cache
def scale_sums(n: int, rows: int):
    """A word: totals with the sums of a group of columns added, times the scales of consecutive rows at an address."""
    kind = several(Eights, n * rows)

    @intrinsic
    def add_scaled(typing, totals, sums, scale):
        def generate(context, b, sig, args):
            totals, sums, scale = args
            out = []
            for row in range(rows):
                factor = emit_splat(b, emit_load(b, scale, 4 * row, F32), EIGHT)
                for i in range(row * n, row * n + n):
                    out.append(emit_fma(b, b.extract_value(sums, i), factor, b.extract_value(totals, i)))
            return emit_join(b, kind, out)

        return kind(kind, kind, types.intp), generate

    return add_scaled


@cache
def store_sums(n: int, rows: int):
    """A word: the sums of consecutive rows to an address; `stride` bytes from token to token."""

    @intrinsic
    def store_rows(typing, address, stride, sums):
        def generate(context, b, sig, args):
            address, stride, sums = args
            for i in range(n):
                at = b.add(address, b.mul(stride, ir.Constant(stride.type, i)))
                for row in range(rows):
                    place = b.add(at, ir.Constant(at.type, 4 * row))
                    total = emit_sum(b, b.extract_value(sums, row * n + i), b.fadd)
                    b.store(total, b.inttoptr(place, F32.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, several(Eights, n * rows)), generate

    return store_rows
