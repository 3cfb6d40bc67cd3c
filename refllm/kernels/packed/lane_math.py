"""Words of the tile kernels (lanes.py) that compute: element by element, and across the lanes of a vector."""

import math

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from refllm.kernels.packed.lanes import HALF_FLOATS, WIDE, Several, emit_join, emit_splat, emit_split, several
from refllm.kernels.packed.simd import F32, F64, I32, I64, LANES, Doubles, Floats, Ints, constant, shuffle


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
        low, high = (b.fptrunc(half, HALF_FLOATS) for half in emit_split(b, sig.args[0], args[0], 2))
        return b.shuffle_vector(low, high, ir.Constant(Ints.llvm, list(range(LANES))))

    return Floats(several(Doubles, 2)), generate


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
        parts = [emit_split(b, of, value, kind.n) for of, value in zip(sig.args, args, strict=True)]
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
def divide(typing, x, y):
    """x / y."""
    return _typer((x, y))(x, y), _divide


@intrinsic
def magnitude(typing, x):
    """|x|."""
    return Floats(Floats), lambda context, b, sig, args: _call(b, "fabs", args[0])


@intrinsic
def usable(typing, scale):
    """Scales to divide by: one of 0 has only zeros to divide and one that is not finite makes products NaN, so Inf."""

    def generate(context, b, sig, args):
        infinite = constant(Floats.llvm, math.inf)
        positive = b.fcmp_ordered(">", args[0], constant(Floats.llvm, 0.0))
        return b.select(b.and_(positive, b.fcmp_ordered("<", args[0], infinite)), args[0], infinite)

    return Floats(Floats), generate


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
def lane_sum(typing, x):
    """The sum of all lanes, halves first."""
    return _number(x)(x), lambda context, b, sig, args: emit_sum(b, args[0], b.fadd)


@intrinsic
def pair_sum(typing, x):
    """The sum of all lanes of two vectors: of both, then halves first."""

    def generate(context, b, sig, args):
        return emit_sum(b, b.fadd(*emit_split(b, x, args[0], 2)), b.fadd)

    return _number(x.vector)(x), generate


@intrinsic
def lane_max(typing, x):
    """The largest lane."""

    def generate(context, b, sig, args):
        return emit_sum(b, args[0], lambda x, y: _call(b, "maxnum", x, y))

    return _number(x)(x), generate


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
