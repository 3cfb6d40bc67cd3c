"""Words of the tile kernels: sixteen rows of a weight in the sixteen lanes of a vector.

A *tile* is sixteen rows. Its codes lie so that one 64-byte vector holds four consecutive columns of every row
(tiling.py draws it), so lane r of every value here belongs to row r, a product needs no sum across lanes, and its
activations are four bytes, or one float, repeated in every lane.

Kernels work on several tokens at once; a value of type Several(vector, n) is n vectors, one a token. Numba sees a
struct, LLVM registers. Sums that must not depend on their order are taken in float64: sixteen floats widened are
Several(Doubles, 2). Addresses are plain integers (intp): what stands there is checked in Python, before any kernel
runs, by those who fill in the weight's table of addresses (tiling.Tiles.table).
"""

import math
from functools import cache

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from refllm.kernels.packed.simd import (
    F32,
    F64,
    I8,
    I16,
    I32,
    LANES,
    Doubles,
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


WIDE = LANES // 2  # doubles in a vector
_HALF_FLOATS = ir.VectorType(F32, WIDE)
load_floats = _loader(Floats, Floats.llvm)
load_doubles = _loader(Doubles, Doubles.llvm)
load_halves = _loader(Floats, ir.VectorType(I16, LANES), emit_half_to_float)
load_signed = _loader(Floats, ir.VectorType(I8, LANES), lambda b, v: b.sitofp(v, Floats.llvm))
load_unsigned = _loader(Floats, ir.VectorType(I8, LANES), lambda b, v: b.uitofp(v, Floats.llvm))
load_six = _loader(Floats, ir.VectorType(I8, LANES), lambda b, v: b.uitofp(b.lshr(v, constant(v.type, 2)), Floats.llvm))
load_ue4m3 = _loader(
    Floats, ir.VectorType(I8, LANES), lambda b, v: emit_small_float(b, b.zext(v, Ints.llvm), 0, SMALL["UE4M3"])
)


@intrinsic
def load_shared(typing, level, low, shift):
    """A block's sixteen minimum levels: two bits at one address, four at the other, `shift` bits up (tiling.py)."""

    def generate(context, b, sig, args):
        level, low = (b.zext(emit_load(b, address, 0, ir.VectorType(I8, LANES)), Ints.llvm) for address in args[:2])
        number = lambda value: constant(Ints.llvm, value)
        low = b.and_(b.lshr(low, emit_splat(b, b.trunc(args[2], I32))), number(15))
        return b.uitofp(b.or_(b.and_(b.shl(level, number(4)), number(48)), low), Floats.llvm)

    return Floats(*[types.intp] * 3), generate


splat_at = _loader(Floats, F32, lambda b, v: emit_splat(b, v))


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
float_grid = _grid_loader(_HALF_FLOATS, lambda b, v: b.fpext(v, Doubles.llvm))  # of floats, widened


@intrinsic(prefer_literal=True)
def store_grid(typing, address, stride, values, n):
    """Write n rows, `stride` bytes apart, of doubles: as many consecutive vectors each as there are."""

    def generate(context, b, sig, args):
        m = values.n // n.literal_value
        for i, value in enumerate(_split(b, values, args[2], values.n)):
            place = b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i // m)))
            place = b.add(place, ir.Constant(place.type, 64 * (i % m)))
            b.store(value, b.inttoptr(place, Doubles.llvm.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, values, n), generate


def _widened(add: bool):
    @intrinsic(prefer_literal=True)
    def to_doubles(typing, address, stride, values, n):
        """store_grid of floats, as doubles; or their sums with the doubles that stand there."""

        def generate(context, b, sig, args):
            m = values.n // n.literal_value
            for i, value in enumerate(_split(b, values, args[2], values.n)):
                place = b.add(args[0], b.mul(args[1], ir.Constant(args[1].type, i // m)))
                wide = b.fpext(value, ir.VectorType(F64, LANES))
                pointer = b.inttoptr(b.add(place, ir.Constant(place.type, 128 * (i % m))), wide.type.as_pointer())
                b.store(b.fadd(wide, b.load(pointer, align=8)) if add else wide, pointer, align=8)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, values, n), generate

    return to_doubles


store_widened, add_widened = _widened(add=False), _widened(add=True)


@intrinsic
def pair(typing, x, y):
    """Two vectors as one value."""
    kind = several(x, 2)
    return kind(x, y), lambda context, b, sig, args: emit_join(b, kind, list(args))


def _half(second: bool):
    @intrinsic
    def half(typing, values):
        """Half of some vectors."""
        kind, start = several(values.vector, values.n // 2), values.n // 2 if second else 0

        def generate(context, b, sig, args):
            return emit_join(b, kind, _split(b, values, args[0], values.n)[start : start + kind.n])

        return kind(values), generate

    return half


first_half, second_half = _half(second=False), _half(second=True)


@intrinsic(prefer_literal=True)
def repeated(typing, values, n):
    """Each of some vectors n times, then the next."""
    kind = several(values.vector, values.n * n.literal_value)

    def generate(context, b, sig, args):
        parts = _split(b, values, args[0], values.n)
        return emit_join(b, kind, [part for part in parts for _ in range(n.literal_value)])

    return kind(values, n), generate


@intrinsic(prefer_literal=True)
def over_again(typing, values, n):
    """Some vectors one after another, n times over."""
    kind = several(values.vector, values.n * n.literal_value)

    def generate(context, b, sig, args):
        return emit_join(b, kind, _split(b, values, args[0], values.n) * n.literal_value)

    return kind(values, n), generate


@intrinsic
def widen(typing, x):
    """Sixteen floats as two vectors of doubles."""
    kind = several(Doubles, 2)

    def generate(context, b, sig, args):
        halves = [shuffle(b, args[0], list(range(i, i + WIDE))) for i in (0, WIDE)]
        return emit_join(b, kind, [b.fpext(half, Doubles.llvm) for half in halves])

    return kind(Floats), generate


@intrinsic
def narrow(typing, x):
    """Two vectors of doubles, each number rounded to float32."""

    def generate(context, b, sig, args):
        low, high = (b.fptrunc(half, _HALF_FLOATS) for half in _split(b, sig.args[0], args[0], 2))
        return b.shuffle_vector(low, high, ir.Constant(Ints.llvm, list(range(LANES))))

    return Floats(several(Doubles, 2)), generate


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
def load_double(typing, address):
    """One double."""
    return types.float64(types.intp), lambda context, b, sig, args: emit_load(b, args[0], 0, F64)


@intrinsic
def load_half(typing, address):
    """One finite float16."""
    return types.float32(types.intp), lambda context, b, sig, args: emit_half_to_float(b, emit_load(b, args[0], 0, I16))


@intrinsic(prefer_literal=True)
def codes_run(typing, address, bits, n):
    """n times sixteen consecutive codes of a bit stream (formats.bits) as floats: the 2 * bits * n bytes at an address.

    Where n is even a lane takes two codes at once, as one of twice as many bits, so that half as many bytes are moved
    to lanes: two vectors have every other code each, which `in_order` mends.
    """
    kind, width = several(Floats, n.literal_value), bits.literal_value
    wide = width if n.literal_value % 2 else 2 * width

    def generate(context, b, sig, args):
        made = []
        for at in range(0, kind.n * width, wide):
            place = b.inttoptr(b.add(args[0], ir.Constant(args[0].type, 2 * at)), I8.as_pointer())
            codes = emit_columns(b, place, wide)
            mask, up = constant(Ints.llvm, (1 << width) - 1), constant(Ints.llvm, width)
            made += [codes] if wide == width else [b.and_(codes, mask), b.lshr(codes, up)]
        return emit_join(b, kind, [b.uitofp(codes, Floats.llvm) for codes in made])

    return kind(types.intp, bits, n), generate


@intrinsic(prefer_literal=True)
def in_order(typing, values, n):
    """Sums over what `codes_run` of this n gave, lane by lane in the order of the codes."""

    def generate(context, b, sig, args):
        parts = _split(b, values, args[0], values.n)
        if n.literal_value % 2:
            return args[0]
        lanes = [i // 2 + i % 2 * LANES for i in range(2 * LANES)]
        take = lambda x, y, order: b.shuffle_vector(x, y, ir.Constant(Ints.llvm, order))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return emit_join(b, values, [take(*xy, half) for xy in pairs for half in (lanes[:LANES], lanes[LANES:])])

    return values(values, n), generate


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


def _zeros(vector: types.Type):
    @intrinsic(prefer_literal=True)
    def no_numbers(typing, n):
        """n vectors of 0.0."""
        kind = several(vector, n.literal_value)
        return kind(n), lambda context, b, sig, args: ir.Constant(kind.llvm, [constant(vector.llvm, 0.0)] * kind.n)

    return no_numbers


def _every(vector: types.Type):
    @intrinsic(prefer_literal=True)
    def one_number(typing, value):
        """One compile-time number in every lane."""
        number = float(value.literal_value)
        return vector(value), lambda context, b, sig, args: constant(vector.llvm, number)

    return one_number


@intrinsic
def whole_zero(typing):
    """A vector of the integer 0."""
    return Ints(), lambda context, b, sig, args: constant(Ints.llvm, 0)


zeros, wide_zeros = _zeros(Floats), _zeros(Doubles)
every, wide_every = _every(Floats), _every(Doubles)


def _elementwise(operation):
    """A word on floats or doubles: each argument is a vector, or Several of one count; so is the result."""

    def typer(kinds):
        vector = getattr(kinds[0], "vector", kinds[0])
        counts = {kind.n for kind in kinds if isinstance(kind, Several)}
        return several(vector, counts.pop()) if counts else vector

    def generate(context, b, sig, args):
        kind = sig.return_type
        if not isinstance(kind, Several):
            return operation(b, *args)
        parts = [_split(b, of, value, kind.n) for of, value in zip(sig.args, args, strict=True)]
        return emit_join(b, kind, [operation(b, *some) for some in zip(*parts, strict=True)])

    return typer, generate


def emit_fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, addend: ir.Value) -> ir.Value:
    """x * y + addend, rounded once."""
    return _call(b, "fma", x, y, addend)


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """LLVM's own function of this name for numbers of one type."""
    kind = args[0].type
    element = getattr(kind, "element", kind)
    count = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
    name = f"llvm.{name}.{count}{'f64' if element == F64 else 'f32'}"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * len(args)), name), args)


_typer, _times = _elementwise(lambda b, x, y: b.fmul(x, y))
_, _plus = _elementwise(lambda b, x, y: b.fadd(x, y))
_, _minus = _elementwise(lambda b, x, y: b.fsub(x, y))
_, _fma = _elementwise(emit_fma)
_, _minus_product = _elementwise(lambda b, x, y, z: emit_fma(b, b.fneg(y), z, x))
_, _divide = _elementwise(lambda b, x, y: b.fdiv(x, y))


@intrinsic
def times(typing, x, y):
    """x * y."""
    return _typer((x, y))(x, y), _times


@intrinsic
def plus(typing, x, y):
    """x + y."""
    return _typer((x, y))(x, y), _plus


@intrinsic
def minus(typing, x, y):
    """x - y."""
    return _typer((x, y))(x, y), _minus


@intrinsic
def fma(typing, x, y, addend):
    """x * y + addend, rounded once."""
    return _typer((x, y, addend))(x, y, addend), _fma


@intrinsic
def minus_product(typing, x, y, z):
    """x - y * z, rounded once: exact where all are integers below 2^24."""
    return _typer((x, y, z))(x, y, z), _minus_product


@intrinsic
def store_tokens(typing, address, stride, values):
    """Write the vectors of all tokens, `stride` bytes apart."""

    def generate(context, b, sig, args):
        for i, value in enumerate(_split(b, values, args[2], values.n)):
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
def splat(typing, x):
    """A float32, or a float64, in every lane."""
    vector = Floats if x == types.float32 else Doubles
    return vector(x), lambda context, b, sig, args: emit_splat(b, args[0], vector.llvm.count)


@intrinsic
def divide(typing, x, y):
    """x / y."""
    return _typer((x, y))(x, y), _divide


@intrinsic
def magnitude(typing, x):
    """|x|."""
    return Floats(Floats), lambda context, b, sig, args: _call(b, "fabs", args[0])


@intrinsic
def magnitude_bits(typing, x):
    """The bits of |x| as whole numbers: in the order of the numbers, infinity and NaN above them."""

    def generate(context, b, sig, args):
        return b.and_(b.bitcast(args[0], Ints.llvm), constant(Ints.llvm, 0x7FFFFFFF))

    return Ints(Floats), generate


def _emit_larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_unsigned(">", x, y), x, y)


@intrinsic
def larger_bits(typing, x, y):
    """The larger of two unsigned whole numbers."""
    return Ints(Ints, Ints), lambda context, b, sig, args: _emit_larger(b, *args)


@intrinsic
def largest_of_bits(typing, x):
    """The float whose bits are the largest lane."""

    def generate(context, b, sig, args):
        return b.bitcast(emit_sum(b, args[0], lambda x, y: _emit_larger(b, x, y)), F32)

    return types.float32(Ints), generate


@intrinsic
def larger(typing, x, y):
    """The larger of two numbers; of NaN and a number the number."""
    return x(x, x), lambda context, b, sig, args: _call(b, "maxnum", *args)


def emit_sum(b: ir.IRBuilder, value: ir.Value, join) -> ir.Value:
    """All lanes joined, always in the same order: halves, until one number is left."""
    half = value.type.count // 2
    while half:
        value = join(shuffle(b, value, list(range(half))), shuffle(b, value, list(range(half, 2 * half))))
        half //= 2
    return b.extract_element(value, I32(0))


def _number(vector: types.Type) -> types.Type:
    """The type of one lane."""
    return types.float64 if vector == Doubles else types.float32


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


@intrinsic
def lane_sum(typing, x):
    """The sum of all lanes, halves first."""
    return _number(x)(x), lambda context, b, sig, args: emit_sum(b, args[0], b.fadd)


@intrinsic
def pair_sum(typing, x):
    """The sum of all lanes of two vectors: of both, then halves first."""

    def generate(context, b, sig, args):
        return emit_sum(b, b.fadd(*_split(b, x, args[0], 2)), b.fadd)

    return _number(x.vector)(x), generate


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

        parts = _split(b, values, args[2], values.n)
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
def lane_max(typing, x):
    """The largest lane."""

    def generate(context, b, sig, args):
        return emit_sum(b, args[0], lambda x, y: _call(b, "maxnum", x, y))

    return _number(x)(x), generate


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


@intrinsic
def store_split(typing, high, low, value):
    """A whole number of magnitude 32,512 or less, 256 high + low, as two signed bytes to two addresses."""

    def generate(context, b, sig, args):
        rest = b.trunc(args[2], I8)
        most = b.trunc(b.ashr(b.sub(args[2], b.sext(rest, I64)), I64(8)), I8)
        for address, part in ((args[0], most), (args[1], rest)):
            b.store(part, b.inttoptr(address, I8.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def store_codes(typing, address, x, most):
    """Sixteen whole numbers as bytes from -most to most, those beyond at the ends, NaN as 0; returns their sum."""

    def generate(context, b, sig, args):
        bytes_ = ir.VectorType(I8, LANES)
        number = b.select(b.fcmp_ordered("==", args[1], args[1]), args[1], constant(Floats.llvm, 0.0))
        # Beyond, by less than half, only where the scale was rounded to one of the smallest numbers there are.
        whole, most = b.fptosi(number, Ints.llvm), emit_splat(b, b.trunc(args[2], I32))
        whole = b.select(b.icmp_signed("<", whole, most), whole, most)
        least = b.neg(most)
        codes = b.trunc(b.select(b.icmp_signed(">", whole, least), whole, least), bytes_)
        b.store(codes, b.inttoptr(args[0], bytes_.as_pointer()), align=1)
        # Sums of unsigned bytes have an instruction on many processors.
        unsigned = b.zext(b.xor(codes, constant(bytes_, -128)), Ints.llvm)
        name = "llvm.vector.reduce.add.v16i32"
        call = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [Ints.llvm]), name)
        return b.sext(b.sub(b.call(call, [unsigned]), I32(128 * LANES)), I64)

    return types.intp(types.intp, Floats, types.intp), generate


@intrinsic
def nearest(typing, x):
    """Rounded to the nearest whole number, ties to even."""
    return Floats(Floats), lambda context, b, sig, args: _call(b, "rint", args[0])


def _emit_exponential(b: ir.IRBuilder, argument: ir.Value) -> ir.Value:
    """e^x of doubles: 2^n e^r with r = x - n ln 2, and e^r by its series up to r^12 (the next term is below 2e-16)."""
    number = lambda value: constant(Doubles.llvm, float(value))
    whole = ir.VectorType(I64, WIDE)
    x = _call(b, "minnum", _call(b, "maxnum", argument, number(-708)), number(709))
    # Added to 1.5 * 2^52 a number is rounded to a whole one, which the last bits of the sum are.
    shifted = emit_fma(b, x, number(1 / math.log(2)), number(1.5 * 2**52))
    n = b.fsub(shifted, number(1.5 * 2**52))
    r = emit_fma(b, n, number(-_LN2_REST), emit_fma(b, n, number(-math.log(2)), x))
    power = number(1 / math.factorial(12))
    for k in range(11, -1, -1):
        power = emit_fma(b, power, r, number(1 / math.factorial(k)))
    exponent = b.add(b.shl(b.bitcast(shifted, whole), constant(whole, 52)), constant(whole, 1023 << 52))
    value = b.fmul(power, b.bitcast(exponent, Doubles.llvm))
    value = b.select(b.fcmp_ordered("<", argument, number(-708)), number(0), value)
    return b.select(b.fcmp_unordered("uno", argument, argument), argument, value)


_LN2_REST = 2.3190468138462996e-17  # what float64 leaves of ln 2
_, _exponential = _elementwise(_emit_exponential)


@intrinsic
def exponential(typing, x):
    """e^x of doubles. Below -708, where float64 has no normal numbers left, 0; above 709 as at 709; NaN stays NaN."""
    return x(x), _exponential


@intrinsic
def numbered(typing, first):
    """first, first + 1 ... first + 7 as doubles."""

    def generate(context, b, sig, args):
        lanes = b.add(
            emit_splat(b, b.trunc(args[0], I32), WIDE), ir.Constant(ir.VectorType(I32, WIDE), list(range(WIDE)))
        )
        return b.sitofp(lanes, Doubles.llvm)

    return Doubles(types.intp), generate


@intrinsic
def where_below(typing, x, limit, yes, no):
    """yes where x < limit, else no."""

    def generate(context, b, sig, args):
        return b.select(b.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return x(x, x, x, x), generate
