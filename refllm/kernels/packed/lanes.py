"""Words of the tile kernels: sixteen rows of a weight in the sixteen lanes of a vector.

A *tile* is sixteen rows. Its codes lie so that one 64-byte vector holds four consecutive columns of every row
(tiling.py draws it), so lane r of every value here belongs to row r, a product needs no sum across lanes, and its
activations are four bytes, or one float, repeated in every lane.

Kernels work on several tokens at once; a value of type Several(vector, n) is n vectors, one a token. Numba sees a
struct, LLVM registers. Addresses are plain integers (intp): what stands there is checked in Python, before any kernel
runs, by those who fill in the weight's table of addresses (tiling.Tiles.table).
"""

import math
from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from refllm.kernels.packed.simd import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    Floats,
    Ints,
    constant,
    emit_columns,
    emit_half_to_float,
    emit_small_float,
    shuffle,
)
from refllm.kernels.packed.tables import SMALL

I64 = ir.IntType(64)


class Several(types.Type):
    """The Numba type of n vectors."""

    def __init__(self, vector: types.Type, n: int):
        self.vector, self.n = vector, n
        self.llvm = ir.ArrayType(vector.llvm, n)
        super().__init__(name=f"Several({vector.name}, {n})")


@register_model(Several)
class _SeveralModel(models.PrimitiveModel):
    def __init__(self, manager, several):
        super().__init__(manager, several, several.llvm)


@cache
def several(vector: types.Type, n: int) -> Several:
    """The type, one object for each pair."""
    return Several(vector, n)


def emit_join(b: ir.IRBuilder, kind: Several, values: list[ir.Value]) -> ir.Value:
    """n vectors as one value."""
    out = ir.Constant(kind.llvm, ir.Undefined)
    for i, value in enumerate(values):
        out = b.insert_value(out, value, i)
    return out


def _split(b: ir.IRBuilder, kind: types.Type, value: ir.Value, n: int) -> list[ir.Value]:
    """The n vectors of a value; a single vector counts n times."""
    return [b.extract_value(value, i) for i in range(n)] if isinstance(kind, Several) else [value] * n


def emit_load(b: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """What stands `offset` bytes behind an address."""
    pointer = b.inttoptr(b.add(address, ir.Constant(address.type, offset)), kind.as_pointer())
    return b.load(pointer, align=1)


def emit_splat(b: ir.IRBuilder, number: ir.Value, count: int = LANES) -> ir.Value:
    """A number in every lane."""
    kind = ir.VectorType(number.type, count)
    return shuffle(b, b.insert_element(ir.Constant(kind, ir.Undefined), number, I32(0)), [0] * count)


def emit_together(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """Vectors one after another, a power of two of them."""
    while len(parts) > 1:
        mask = ir.Constant(ir.VectorType(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [b.shuffle_vector(x, y, mask) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@intrinsic
def word(typing, address, index):
    """The 64-bit integer number `index` of a table."""

    def generate(context, b, sig, args):
        pointer = b.inttoptr(b.add(args[0], b.shl(args[1], ir.Constant(args[1].type, 3))), I64.as_pointer())
        return b.load(pointer)

    return types.intp(types.intp, types.intp), generate


def _loader(result: types.Type, stored: ir.Type, widen=None):
    """A word that reads sixteen numbers at an address."""

    @intrinsic
    def load_vector(typing, address):
        def generate(context, b, sig, args):
            value = emit_load(b, args[0], 0, stored)
            return value if widen is None else widen(b, value)

        return result(types.intp), generate

    return load_vector


load_floats = _loader(Floats, Floats.llvm)
load_halves = _loader(Floats, ir.VectorType(I16, LANES), emit_half_to_float)
load_signed = _loader(Floats, ir.VectorType(I8, LANES), lambda b, v: b.sitofp(v, Floats.llvm))
load_unsigned = _loader(Floats, ir.VectorType(I8, LANES), lambda b, v: b.uitofp(v, Floats.llvm))
load_ue4m3 = _loader(
    Floats, ir.VectorType(I8, LANES), lambda b, v: emit_small_float(b, b.zext(v, Ints.llvm), 0, SMALL["UE4M3"])
)
splat_at = _loader(Floats, F32, lambda b, v: emit_splat(b, v))


@intrinsic
def load_whole(typing, address):
    """One unsigned 32-bit integer."""
    return types.intp(types.intp), lambda context, b, sig, args: b.zext(emit_load(b, args[0], 0, I32), I64)


@intrinsic
def load_powers(typing, address):
    """2^(e - 128) for sixteen bytes e below 255: the exponent of a float32, or one of its last two subnormals."""

    def generate(context, b, sig, args):
        e = b.zext(emit_load(b, args[0], 0, ir.VectorType(I8, LANES)), Ints.llvm)
        number = lambda value: constant(Ints.llvm, value)
        normal = b.shl(b.sub(e, number(1)), number(23))
        small = b.shl(number(1 << 21), b.and_(e, number(1)))
        return b.bitcast(b.select(b.icmp_unsigned("<", e, number(2)), small, normal), Floats.llvm)

    return Floats(types.intp), generate


@intrinsic
def load_float(typing, address):
    """One float."""
    return types.float32(types.intp), lambda context, b, sig, args: emit_load(b, args[0], 0, F32)


@intrinsic
def load_half(typing, address):
    """One finite float16."""
    return types.float32(types.intp), lambda context, b, sig, args: emit_half_to_float(b, emit_load(b, args[0], 0, I16))


@intrinsic(prefer_literal=True)
def load_codes(typing, address, bits):
    """Sixteen consecutive codes of a bit stream (formats.bits), as floats: the 2 * bits bytes at an address."""

    def generate(context, b, sig, args):
        codes = emit_columns(b, b.inttoptr(args[0], I8.as_pointer()), bits.literal_value)
        return b.uitofp(codes, Floats.llvm)

    return Floats(types.intp, bits), generate


@intrinsic(prefer_literal=True)
def splats(typing, address, n):
    """n consecutive floats, each in every lane of its own vector."""
    kind = several(Floats, n.literal_value)

    def generate(context, b, sig, args):
        return emit_join(b, kind, [emit_splat(b, emit_load(b, args[0], 4 * i, F32)) for i in range(kind.n)])

    return kind(types.intp, n), generate


@intrinsic(prefer_literal=True)
def splats_apart(typing, address, stride, n):
    """n floats, `stride` bytes apart, each in every lane of its own vector."""
    kind = several(Floats, n.literal_value)

    def generate(context, b, sig, args):
        at = [b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i))) for i in range(kind.n)]
        return emit_join(b, kind, [emit_splat(b, emit_load(b, one, 0, F32)) for one in at])

    return kind(types.intp, types.intp, n), generate


@intrinsic(prefer_literal=True)
def load_apart(typing, address, stride, n):
    """n vectors of floats, `stride` bytes apart."""
    kind = several(Floats, n.literal_value)

    def generate(context, b, sig, args):
        at = [b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i))) for i in range(kind.n)]
        return emit_join(b, kind, [emit_load(b, one, 0, Floats.llvm) for one in at])

    return kind(types.intp, types.intp, n), generate


@intrinsic(prefer_literal=True)
def zeros(typing, n):
    """n vectors of 0.0."""
    kind = several(Floats, n.literal_value)
    return kind(n), lambda context, b, sig, args: ir.Constant(kind.llvm, [constant(Floats.llvm, 0.0)] * kind.n)


@intrinsic(prefer_literal=True)
def every(typing, value):
    """One compile-time number in every lane."""
    number = float(value.literal_value)
    return Floats(value), lambda context, b, sig, args: constant(Floats.llvm, number)


def _elementwise(operation):
    """A word on floats: each argument is a vector, or Several of one count; so is the result."""

    def typer(kinds):
        counts = {kind.n for kind in kinds if isinstance(kind, Several)}
        return Floats if not counts else several(Floats, counts.pop())

    def generate(context, b, sig, args):
        kind = sig.return_type
        if not isinstance(kind, Several):
            return operation(b, *args)
        parts = [_split(b, of, value, kind.n) for of, value in zip(sig.args, args, strict=True)]
        return emit_join(b, kind, [operation(b, *some) for some in zip(*parts, strict=True)])

    return typer, generate


def emit_fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, addend: ir.Value) -> ir.Value:
    """x * y + addend, rounded once."""
    kind = x.type
    name = f"llvm.fma.v{kind.count}f32" if isinstance(kind, ir.VectorType) else "llvm.fma.f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * 3), name), [x, y, addend])


_typer_2, _times = _elementwise(lambda b, x, y: b.fmul(x, y))
_, _plus = _elementwise(lambda b, x, y: b.fadd(x, y))
_, _fma = _elementwise(emit_fma)
_, _minus_product = _elementwise(lambda b, x, y, z: emit_fma(b, b.fneg(y), z, x))


@intrinsic
def times(typing, x, y):
    """x * y."""
    return _typer_2((x, y))(x, y), _times


@intrinsic
def plus(typing, x, y):
    """x + y."""
    return _typer_2((x, y))(x, y), _plus


@intrinsic
def fma(typing, x, y, addend):
    """x * y + addend, rounded once."""
    return _typer_2((x, y, addend))(x, y, addend), _fma


@intrinsic
def minus_product(typing, x, y, z):
    """x - y * z, rounded once: exact where all are integers below 2^24."""
    return _typer_2((x, y, z))(x, y, z), _minus_product


@intrinsic
def store_tokens(typing, address, stride, values):
    """Write the vectors of all tokens, `stride` bytes apart."""

    def generate(context, b, sig, args):
        for i, value in enumerate(_split(b, values, args[2], values.n)):
            place = b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i)))
            b.store(value, b.inttoptr(place, Floats.llvm.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, values), generate


def _wide(name: str) -> str:
    return f"llvm.{name}.v{LANES}f32"


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    kind = args[0].type
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * len(args)), name), args)


@intrinsic
def splat(typing, x):
    """A float32 in every lane."""
    return Floats(types.float32), lambda context, b, sig, args: emit_splat(b, args[0])


@intrinsic
def divide(typing, x, y):
    """x / y."""
    return Floats(Floats, Floats), lambda context, b, sig, args: b.fdiv(*args)


@intrinsic
def magnitude(typing, x):
    """|x|."""
    return Floats(Floats), lambda context, b, sig, args: _call(b, _wide("fabs"), args[0])


@intrinsic
def larger(typing, x, y):
    """The larger of two numbers; of NaN and a number the number."""
    return Floats(Floats, Floats), lambda context, b, sig, args: _call(b, _wide("maxnum"), *args)


def emit_sum(b: ir.IRBuilder, value: ir.Value, join) -> ir.Value:
    """All lanes joined, always in the same order: halves, until one number is left."""
    half = value.type.count // 2
    while half:
        value = join(shuffle(b, value, list(range(half))), shuffle(b, value, list(range(half, 2 * half))))
        half //= 2
    return b.extract_element(value, I32(0))


@intrinsic
def lane_sum(typing, x):
    """The sum of all lanes, halves first."""
    return types.float32(Floats), lambda context, b, sig, args: emit_sum(b, args[0], b.fadd)


@intrinsic
def store_four_sums(typing, address, values):
    """The lane sums of four vectors, in the order of lane_sum, as four floats to an address."""

    def generate(context, b, sig, args):
        def added(x, y, width, lanes):
            """Every `width` lanes of x, then of y: their first half plus their second, `lanes` in all."""
            first = [i for i in range(lanes) if i % width < width // 2]
            first += [i + x.type.count for i in first] if y is not x else []
            second = [i + width // 2 for i in first]
            take = lambda order: b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(order)), order))
            return b.fadd(take(first), take(second))

        one, two, three, four = _split(b, sig.args[1], args[1], 4)
        left, right = added(one, two, 16, 16), added(three, four, 16, 16)  # [8 of one, 8 of two], ...
        fours = added(left, right, 8, 16)
        pairs = added(fours, fours, 4, 16)
        sums = added(pairs, pairs, 2, 8)
        b.store(sums, b.inttoptr(args[0], sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, values), generate


@intrinsic
def lane_max(typing, x):
    """The largest lane."""

    def generate(context, b, sig, args):
        return emit_sum(b, args[0], lambda x, y: _call(b, f"llvm.maxnum.v{x.type.count}f32", x, y))

    return types.float32(Floats), generate


@intrinsic
def store_floats(typing, address, values):
    """Sixteen floats to an address."""

    def generate(context, b, sig, args):
        b.store(args[1], b.inttoptr(args[0], Floats.llvm.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, Floats), generate


@intrinsic
def store_float(typing, address, value):
    """One float to an address."""

    def generate(context, b, sig, args):
        b.store(args[1], b.inttoptr(args[0], F32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate


@intrinsic
def store_whole(typing, address, value):
    """A float that is a whole number, as a 32-bit integer to an address."""

    def generate(context, b, sig, args):
        b.store(b.fptosi(args[1], I32), b.inttoptr(args[0], I32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate


@intrinsic
def store_codes(typing, address, x, most):
    """Sixteen whole numbers as bytes from -most to most, those beyond at the ends, NaN as 0; returns what it stored."""

    def generate(context, b, sig, args):
        bytes_ = ir.VectorType(I8, LANES)
        number = b.select(b.fcmp_ordered("==", args[1], args[1]), args[1], constant(Floats.llvm, 0.0))
        # Beyond only where the scale was rounded to one of the smallest numbers there are.
        number = _call(b, _wide("minnum"), number, emit_splat(b, args[2]))
        number = _call(b, _wide("maxnum"), number, emit_splat(b, b.fneg(args[2])))
        codes = b.fptosi(number, bytes_)
        b.store(codes, b.inttoptr(args[0], bytes_.as_pointer()), align=1)
        return b.sitofp(codes, Floats.llvm)

    return Floats(types.intp, Floats, types.float32), generate


@intrinsic
def nearest(typing, x):
    """Rounded to the nearest whole number, ties to even."""
    return Floats(Floats), lambda context, b, sig, args: _call(b, _wide("rint"), args[0])


@intrinsic
def exponential(typing, x):
    """e^x: 2^n e^r with r = x - n ln 2, and e^r by its series up to r^7 (the next term is below 6e-9).

    Below -87, where float32 has no normal numbers left, 0; above 88 as at 88; NaN stays NaN.
    """

    def generate(context, b, sig, args):
        number = lambda value: constant(Floats.llvm, float(np.float32(value)))
        x = _call(b, _wide("minnum"), _call(b, _wide("maxnum"), args[0], number(-88)), number(88))
        n = _call(b, _wide("rint"), b.fmul(x, number(1 / math.log(2))))
        high = np.float32(0.693359375)  # ln 2 in two parts: the first has few bits, so that n times it is exact
        r = emit_fma(b, n, number(-(math.log(2) - float(high))), emit_fma(b, n, number(-high), x))
        power = number(1 / math.factorial(7))
        for k in range(6, -1, -1):
            power = emit_fma(b, power, r, number(1 / math.factorial(k)))
        exponent = b.shl(b.add(b.fptosi(n, Ints.llvm), constant(Ints.llvm, 127)), constant(Ints.llvm, 23))
        value = b.fmul(power, b.bitcast(exponent, Floats.llvm))
        value = b.select(b.fcmp_ordered("<", args[0], number(-87)), number(0), value)
        return b.select(b.fcmp_unordered("uno", args[0], args[0]), args[0], value)

    return Floats(Floats), generate


@intrinsic
def numbered(typing, first):
    """first, first + 1 ... first + 15 as floats."""

    def generate(context, b, sig, args):
        lanes = b.add(emit_splat(b, b.trunc(args[0], I32)), ir.Constant(Ints.llvm, list(range(LANES))))
        return b.sitofp(lanes, Floats.llvm)

    return Floats(types.intp), generate


@intrinsic
def where_below(typing, x, limit, yes, no):
    """yes where x < limit, else no."""

    def generate(context, b, sig, args):
        return b.select(b.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return Floats(Floats, Floats, Floats, Floats), generate
