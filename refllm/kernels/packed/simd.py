"""A small SIMD vocabulary for Numba: vector values, and the words the packed kernels need.

Numba has no vector type, and LLVM does not vectorise its loops over packed codes. Here a Numba type stands for an
LLVM vector of 64 bytes (`<16 x float>`, `<16 x i32>`, `<8 x double>`) and every word is an intrinsic that emits a few
lines of portable LLVM IR. No instruction of a particular processor is named: LLVM splits the vectors on narrower
machines.

Words that read or write take (array, index) and do not check bounds: callers pass only what shape checks in Python have
admitted. tiles.py adds the words that work on four rows at once.
"""

from functools import cache

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import config, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model

LANES = 16
F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
F64 = ir.DoubleType()


class Vector(types.Type):
    """The Numba type of an LLVM vector of floats, doubles or 32-bit integers."""

    def __init__(self, element: ir.Type, lanes: int = LANES):
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=f"Vector({element} x {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


Floats, Ints, Doubles = Vector(F32), Vector(I32), Vector(F64, LANES // 2)


@cache
def target_features() -> frozenset[str]:
    """Features of Numba's target, which NUMBA_CPU_FEATURES may set apart from this machine's: {"+avx", ...}."""
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return frozenset((features or ",".join(_apples_features())).split(","))


def _apples_features() -> list[str]:
    """What Macs have, of which LLVM says nothing but the processor's name."""
    name = config.CPU_NAME or llvm.get_host_cpu_name()
    if not name.startswith("apple-"):
        return []
    return ["+neon", "+dotprod"] if name == "apple-m1" else ["+neon", "+dotprod", "+i8mm"]


def target_has_half() -> bool:
    """Whether Numba's target converts float16 in hardware: F16C, or any 64-bit ARM."""
    return llvm.get_default_triple().startswith(("aarch64", "arm64")) or {"+avx", "+f16c"} <= target_features()


def constant(kind: ir.Type, value: float) -> ir.Constant:
    """A number as a constant of an LLVM type; in every lane of a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def shuffle(b: ir.IRBuilder, value: ir.Value, order: list[int]) -> ir.Value:
    """Lanes of a vector in another order; `order` may repeat and leave out lanes."""
    mask = ir.Constant(ir.VectorType(I32, len(order)), order)
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def address(context, b: ir.IRBuilder, array_type: types.Array, array: ir.Value, index: ir.Value) -> ir.Value:
    """Pointer to element `index` of a contiguous array."""
    return b.gep(context.make_array(array_type)(context, b, array).data, [index])


def load(b: ir.IRBuilder, pointer: ir.Value, kind: ir.Type) -> ir.Value:
    """The value of type `kind` at a pointer, aligned or not."""
    return b.load(b.bitcast(pointer, kind.as_pointer()), align=1)


def emit_columns(b: ir.IRBuilder, pointer: ir.Value, width: int) -> ir.Value:
    """Sixteen consecutive codes of `width` bits, the 2 * width bytes at a pointer, one to a lane."""
    stored = load(b, pointer, ir.VectorType(I8, 2 * width))
    first, begins = zip(*(divmod(lane * width, 8) for lane in range(LANES)), strict=True)
    codes = b.zext(shuffle(b, stored, first), Ints.llvm)
    for further in range(1, -(-(max(begins) + width) // 8)):  # bytes that a code may reach into
        following = b.zext(shuffle(b, stored, [min(byte + further, 2 * width - 1) for byte in first]), Ints.llvm)
        codes = b.or_(codes, b.shl(following, constant(Ints.llvm, 8 * further)))
    shifts = ir.Constant(Ints.llvm, begins)
    return b.and_(b.lshr(codes, shifts), constant(Ints.llvm, (1 << width) - 1))


@intrinsic(prefer_literal=True)
def load_columns(typing, array, index, bits):
    """Sixteen consecutive codes of a packed row, one to a lane: the 2 * bits bytes from `index` on."""

    def generate(context, b, sig, args):
        return emit_columns(b, address(context, b, sig.args[0], args[0], args[1]), bits.literal_value)

    return Ints(array, types.intp, bits), generate


@intrinsic
def load_bytes(typing, array, index):
    """Sixteen bytes, one to a lane; signed if the array is int8."""

    def generate(context, b, sig, args):
        stored = load(b, address(context, b, sig.args[0], *args), ir.VectorType(I8, LANES))
        return (b.sext if sig.args[0].dtype == types.int8 else b.zext)(stored, Ints.llvm)

    return Ints(array, types.intp), generate


@intrinsic
def load_bit_lanes(typing, array, index):
    """Sixteen bits (two bytes, low bit first), one to a lane."""

    def generate(context, b, sig, args):
        stored = load(b, address(context, b, sig.args[0], *args), I16)
        word = shuffle(
            b, b.insert_element(ir.Constant(Ints.llvm, ir.Undefined), b.zext(stored, I32), I32(0)), [0] * LANES
        )
        return b.and_(b.lshr(word, ir.Constant(Ints.llvm, list(range(LANES)))), constant(Ints.llvm, 1))

    return Ints(array, types.intp), generate


@intrinsic
def store_floats(typing, array, index, x):
    """array[index : index + 16] = x."""

    def generate(context, b, sig, args):
        pointer = b.bitcast(address(context, b, sig.args[0], *args[:2]), Floats.llvm.as_pointer())
        b.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, Floats), generate


@intrinsic
def splat(typing, x):
    """One number in every lane: a float32 gives floats, an integer 32-bit integers."""
    vector = Floats if x == types.float32 else Ints

    def generate(context, b, sig, args):
        number = args[0] if vector is Floats else b.trunc(args[0], I32)
        return shuffle(b, b.insert_element(ir.Constant(vector.llvm, ir.Undefined), number, I32(0)), [0] * LANES)

    return vector(types.float32 if vector is Floats else types.intp), generate


@intrinsic(prefer_literal=True)
def bit_field(typing, x, shift, bits):
    """(x >> shift) & (2^bits - 1), shift and bits constants."""
    amount, mask = shift.literal_value, (1 << bits.literal_value) - 1

    def generate(context, b, sig, args):
        return b.and_(b.lshr(args[0], constant(Ints.llvm, amount)), constant(Ints.llvm, mask))

    return Ints(Ints, shift, bits), generate


@intrinsic(prefer_literal=True)
def shift_left(typing, x, shift):
    """x << shift, shift a constant."""
    amount = shift.literal_value
    return Ints(Ints, shift), lambda context, b, sig, args: b.shl(args[0], constant(Ints.llvm, amount))


@intrinsic
def multiply(typing, x, y):
    """x * y, rounded: never fused with a following sum."""
    return Floats(Floats, Floats), lambda context, b, sig, args: b.fmul(*args)


@intrinsic
def add_floats(typing, x, y):
    """x + y."""
    return Floats(Floats, Floats), lambda context, b, sig, args: b.fadd(*args)


@intrinsic
def add_ints(typing, x, y):
    """x + y."""
    return Ints(Ints, Ints), lambda context, b, sig, args: b.add(*args)


@intrinsic
def to_floats(typing, x):
    """Integers to floats, rounded to nearest."""
    return Floats(Ints), lambda context, b, sig, args: b.sitofp(args[0], Floats.llvm)


def emit_half_to_float(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Finite float16 numbers, given as a 16-bit integer or a vector of them, as float32."""
    if target_has_half():
        half, single = (_like(bits.type, element) for element in (ir.HalfType(), F32))
        return b.fpext(b.bitcast(bits, half), single)
    return _half_to_float_portable(b, bits)


def _half_to_float_portable(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The same in plain integer and float arithmetic, for machines without the instruction.

    Exponent and mantissa are shifted into place, which leaves a number 2^112 too small (also for subnormals); one exact
    multiplication mends that.
    """
    word, single = (_like(bits.type, element) for element in (I32, F32))
    wide = b.zext(bits, word)
    magnitude = b.shl(b.and_(wide, constant(word, 0x7FFF)), constant(word, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, single), constant(single, 2.0**112)), word)
    sign = b.shl(b.and_(wide, constant(word, 0x8000)), constant(word, 16))
    return b.bitcast(b.or_(scaled, sign), single)


def emit_small_float(b: ir.IRBuilder, lanes: ir.Value, byte: int, small) -> ir.Value:
    """The finite small float that is the code in one byte of every lane.

    As above: sign, exponent and mantissa are shifted into their places, and one multiplication mends the exponent.

    Parameters
    ----------
    lanes : vector of 32-bit integers
    byte : int
        0 to 3, lowest first.
    small : refllm.formats.dtypes.FloatFormat
        Of at most 8 bits, with a zero.
    """
    up = 32 - 8 * byte - small.bits  # brings the code to the top
    down = 9 - small.signed - small.exponent_bits  # and its exponent to bit 23
    fields = b.shl(lanes, constant(lanes.type, up)) if up else lanes
    fields = (b.ashr if small.signed else b.lshr)(fields, constant(lanes.type, down))
    kept = ((1 << (small.exponent_bits + small.mantissa_bits)) - 1) << (23 - small.mantissa_bits)
    placed = b.and_(fields, constant(lanes.type, kept | (small.signed << 31)))
    single = _like(lanes.type, F32)
    return b.fmul(b.bitcast(placed, single), constant(single, 2.0 ** (127 - small.bias)))


def _like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """`element`, or a vector of as many of them as `kind` has."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


@intrinsic
def half_to_float(typing, bits):
    """A finite float16, given as its 16 bits, as float32."""
    return types.float32(types.uint16), lambda context, b, sig, args: emit_half_to_float(b, args[0])


@intrinsic
def half_to_float_portable(typing, bits):
    """half_to_float as machines without the instruction compute it."""
    return types.float32(types.uint16), lambda context, b, sig, args: _half_to_float_portable(b, args[0])
