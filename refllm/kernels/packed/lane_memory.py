"""Words of the tile kernels (lanes.py) that read and write memory.

Addresses are plain integers (intp): what stands there is checked in Python, before any kernel runs, by those who fill
in the weight's table of addresses (tiling.Tiles.table).
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from refllm.kernels.packed.lanes import HALF_FLOATS, WIDE, emit_join, emit_splat, emit_split, several
from refllm.kernels.packed.simd import (
    F32,
    F64,
    I16,
    I32,
    I64,
    LANES,
    Doubles,
    Floats,
    emit_half_to_float,
)


def emit_load(b: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """What stands `offset` bytes behind an address."""
    pointer = b.inttoptr(b.add(address, ir.Constant(address.type, offset)), kind.as_pointer())
    return b.load(pointer, align=1)


@intrinsic
def word(typing, address, index):
    """The 64-bit integer number `index` of a table."""

    def generate(context, b, sig, args):
        pointer = b.inttoptr(b.add(args[0], b.shl(args[1], ir.Constant(args[1].type, 3))), I64.as_pointer())
        return b.load(pointer)

    return types.intp(types.intp, types.intp), generate


def loader(result: types.Type, stored: ir.Type, widen=None):
    """A word that reads sixteen numbers at an address."""

    @intrinsic
    def load_vector(typing, address):
        def generate(context, b, sig, args):
            value = emit_load(b, args[0], 0, stored)
            return value if widen is None else widen(b, value)

        return result(types.intp), generate

    return load_vector


load_floats = loader(Floats, Floats.llvm)
load_doubles = loader(Doubles, Doubles.llvm)
load_halves = loader(Floats, ir.VectorType(I16, LANES), emit_half_to_float)


def _grid_loader(stored: ir.Type, widen=None):
    """A word that reads n rows, `stride` bytes apart, of m consecutive vectors of doubles each."""

    @intrinsic(prefer_literal=True)
    def load_grid(typing, address, stride, n, m):
        kind, width = several(Doubles, n.literal_value * m.literal_value), stored.count * (4 if widen else 8)

        def generate(context, b, sig, args):
            values = []
            for i in range(n.literal_value):
                row = b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i)))
                values += [emit_load(b, row, width * j, stored) for j in range(m.literal_value)]
            return emit_join(b, kind, values if widen is None else [widen(b, value) for value in values])

        return kind(types.intp, types.intp, n, m), generate

    return load_grid


double_grid = _grid_loader(Doubles.llvm)
float_grid = _grid_loader(HALF_FLOATS, lambda b, v: b.fpext(v, Doubles.llvm))  # of floats, widened


@intrinsic(prefer_literal=True)
def store_grid(typing, address, stride, values, n):
    """Write n rows, `stride` bytes apart, of doubles: as many consecutive vectors each as there are."""

    def generate(context, b, sig, args):
        m = values.n // n.literal_value
        for i, value in enumerate(emit_split(b, values, args[2], values.n)):
            place = b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i // m)))
            place = b.add(place, ir.Constant(place.type, 64 * (i % m)))
            b.store(value, b.inttoptr(place, Doubles.llvm.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, values, n), generate


@intrinsic(prefer_literal=True)
def add_widened(typing, address, stride, values, n):
    """store_grid of floats, added to the doubles that stand there."""

    def generate(context, b, sig, args):
        m = values.n // n.literal_value
        for i, value in enumerate(emit_split(b, values, args[2], values.n)):
            place = b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i // m)))
            wide = b.fpext(value, ir.VectorType(F64, LANES))
            pointer = b.inttoptr(b.add(place, ir.Constant(place.type, 128 * (i % m))), wide.type.as_pointer())
            b.store(b.fadd(wide, b.load(pointer, align=8)), pointer, align=8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, values, n), generate


@intrinsic
def load_whole(typing, address):
    """One unsigned 32-bit integer."""
    return types.intp(types.intp), lambda context, b, sig, args: b.zext(emit_load(b, args[0], 0, I32), I64)


@intrinsic
def load_float(typing, address):
    """One float."""
    return types.float32(types.intp), lambda context, b, sig, args: emit_load(b, args[0], 0, F32)


@intrinsic
def load_double(typing, address):
    """One double."""
    return types.float64(types.intp), lambda context, b, sig, args: emit_load(b, args[0], 0, F64)


@intrinsic
def load_half(typing, address):
    """One finite float16."""
    return types.float32(types.intp), lambda context, b, sig, args: emit_half_to_float(b, emit_load(b, args[0], 0, I16))


@intrinsic(prefer_literal=True)
def splats(typing, address, n):
    """n consecutive floats, each in every lane of its own vector."""
    kind = several(Floats, n.literal_value)

    def generate(context, b, sig, args):
        return emit_join(b, kind, [emit_splat(b, emit_load(b, args[0], 4 * i, F32)) for i in range(kind.n)])

    return kind(types.intp, n), generate


def _splats_apart(vector: types.Type, element: ir.Type):
    @intrinsic(prefer_literal=True)
    def splats_of_rows(typing, address, stride, n):
        """n numbers, `stride` bytes apart, each in every lane of its own vector."""
        kind = several(vector, n.literal_value)

        def generate(context, b, sig, args):
            at = [b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i))) for i in range(kind.n)]
            return emit_join(b, kind, [emit_splat(b, emit_load(b, one, 0, element), vector.llvm.count) for one in at])

        return kind(types.intp, types.intp, n), generate

    return splats_of_rows


splats_apart, double_splats_apart = _splats_apart(Floats, F32), _splats_apart(Doubles, F64)


@intrinsic
def store_tokens(typing, address, stride, values):
    """Write the vectors of all tokens, `stride` bytes apart."""

    def generate(context, b, sig, args):
        for i, value in enumerate(emit_split(b, values, args[2], values.n)):
            place = b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i)))
            b.store(value, b.inttoptr(place, Floats.llvm.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, values), generate


@intrinsic(prefer_literal=True)
def load_tokens(typing, address, stride, n):
    """What store_tokens has written."""
    kind = several(Floats, n.literal_value)

    def generate(context, b, sig, args):
        places = [b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i))) for i in range(kind.n)]
        return emit_join(b, kind, [emit_load(b, place, 0, Floats.llvm) for place in places])

    return kind(types.intp, types.intp, n), generate


@intrinsic(prefer_literal=True)
def room(typing, count):
    """The address of `count` vectors on the stack, free until the function returns."""

    def generate(context, b, sig, args):
        place = cgutils.alloca_once(b, ir.ArrayType(Floats.llvm, count.literal_value))
        place.align = 64
        return b.ptrtoint(place, args[0].type)

    return types.intp(count), generate


@intrinsic
def prefetch(typing, address):
    """Ask for the 64 bytes at an address, which need not exist."""

    def generate(context, b, sig, args):
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        to_read, keep, data = I32(0), I32(3), I32(1)
        call = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(call, [b.inttoptr(args[0], pointer), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic(prefer_literal=True)
def store_sums(typing, address, stride, values, n):
    """The lane sums of vectors of doubles, in the order of lane_sum: n rows of them, `stride` bytes apart.

    A row has a power of two of them; they are added together, half of what is left of each in one vector.
    """

    def generate(context, b, sig, args):
        def joined(x, y, width):
            """Every `width` lanes of x, then of y: their first half plus their second."""
            first = [i for i in range(x.type.count) if i % width < width // 2]
            first += [i + x.type.count for i in first] if y is not x else []
            second = [i + width // 2 for i in first]
            take = lambda order: b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(order)), order))
            return b.fadd(take(first), take(second))

        parts = emit_split(b, values, args[2], values.n)
        for i in range(n.literal_value):
            row, width = parts[i * values.n // n.literal_value : (i + 1) * values.n // n.literal_value], WIDE
            while width > 1:
                pairs = list(zip(row[::2], row[1::2], strict=True)) if len(row) > 1 else [(row[0], row[0])]
                row, width = [joined(x, y, width) for x, y in pairs], width // 2
            place = b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i)))
            b.store(row[0], b.inttoptr(place, row[0].type.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, values, n), generate


@intrinsic
def store_floats(typing, address, values):
    """Sixteen floats to an address."""

    def generate(context, b, sig, args):
        b.store(args[1], b.inttoptr(args[0], Floats.llvm.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, Floats), generate


@intrinsic
def store_doubles(typing, address, values):
    """Eight doubles to an address."""

    def generate(context, b, sig, args):
        b.store(args[1], b.inttoptr(args[0], Doubles.llvm.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(types.intp, Doubles), generate


def _number_store(number: types.Type, element: ir.Type):
    @intrinsic
    def store_number(typing, address, value):
        """One number to an address."""

        def generate(context, b, sig, args):
            b.store(args[1], b.inttoptr(args[0], element.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(types.intp, number), generate

    return store_number


store_float, store_double = _number_store(types.float32, F32), _number_store(types.float64, F64)


@intrinsic
def store_whole(typing, address, value):
    """A whole number as a 32-bit integer to an address."""

    def generate(context, b, sig, args):
        b.store(b.trunc(args[1], I32), b.inttoptr(args[0], I32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate
