"""A small SIMD vocabulary for Numba: vector values and the dozen words the packed kernels need.

Numba has no vector type, and its loops over packed codes are not vectorised by LLVM (a float sum may not be reordered). Here
a Numba type stands for an LLVM vector (`<16 x float>`, `<16 x i32>`) and every word is an intrinsic that emits a few lines of
portable LLVM IR. No instruction of a particular processor is named: LLVM splits the vectors on narrower machines and finds
the multiply-add of 16-bit pairs (vpmaddwd, vpdpwssd, smlal) by itself.

Reading words take (array, index) and do not check bounds: callers pass only what shape checks in Python have admitted.

How codes become floats: OR-ing a code q into the low mantissa bits of 2^23 gives the float 2^23 + q exactly; a code that sits
n bits higher in its word takes 2^(23-n) instead, whose last mantissa bits weigh 2^-n. Subtracting 2^(23-n) + zero_point gives
q - zero_point exactly, with no shift and no conversion.
"""

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.core.config import CPU_FEATURES, CPU_NAME
from numba.extending import intrinsic, models, register_model

LANES = 16
BLOCK_BYTES = 64  # one vector of codes
F32, I16, I32, I8 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(8)


class Vector(types.Type):
    """The Numba type of an LLVM vector of LANES floats or 32-bit integers."""

    def __init__(self, element: ir.Type):
        self.llvm = ir.VectorType(element, LANES)
        super().__init__(name=f"Vector({element} x {LANES})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


Floats, Ints = Vector(F32), Vector(I32)
SHORTS = ir.VectorType(I16, 2 * LANES)  # the same 64 bytes as pairs of 16-bit numbers


def target_has_half() -> bool:
    """Whether Numba's target converts float16 in hardware (F16C, or any 64-bit ARM)."""
    if "aarch64" in llvm.get_default_triple() or "arm64" in llvm.get_default_triple():
        return True
    features = get_host_cpu_features() if CPU_FEATURES is None else CPU_FEATURES
    return "+f16c" in features.split(",") and CPU_NAME != "generic"


def _constant(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _shuffle(b: ir.IRBuilder, value: ir.Value, order: list[int]) -> ir.Value:
    mask = ir.Constant(ir.VectorType(I32, len(order)), order)
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _address(context, b: ir.IRBuilder, array_type: types.Array, array: ir.Value, index: ir.Value) -> ir.Value:
    """Pointer to element `index` of a contiguous array."""
    return b.gep(context.make_array(array_type)(context, b, array).data, [index])


def _load(b: ir.IRBuilder, pointer: ir.Value, kind: ir.Type) -> ir.Value:
    return b.load(b.bitcast(pointer, kind.as_pointer()), align=1)


@intrinsic
def zero_floats(typing):
    """Sixteen zeros."""
    return Floats(), lambda context, b, sig, args: _constant(Floats.llvm, 0.0)


@intrinsic
def zero_ints(typing):
    """Sixteen integer zeros."""
    return Ints(), lambda context, b, sig, args: _constant(Ints.llvm, 0)


@intrinsic
def load_codes(typing, codes, start, spare, use_spare, offset):
    """64 bytes as sixteen 32-bit words, from codes[start + offset] or, if use_spare, from spare[offset]."""

    def generate(context, b, sig, args):
        return _load(b, _either(context, b, sig, args), Ints.llvm)

    return Ints(codes, types.intp, spare, types.boolean, types.intp), generate


def _either(context, b: ir.IRBuilder, sig, args) -> ir.Value:
    """Pointer to array[start + index] or spare[index], for the arguments (array, start, spare, use_spare, index)."""
    inside = _address(context, b, sig.args[0], args[0], b.add(args[1], args[4]))
    aside = _address(context, b, sig.args[2], args[2], args[4])
    return b.select(args[3], aside, inside)


@intrinsic(prefer_literal=True)
def load_columns(typing, array, index, bits):
    """Sixteen consecutive codes of a packed row, one to a lane; they begin with the byte at `index` (2 * bits bytes)."""
    width = bits.literal_value

    def generate(context, b, sig, args):
        stored = _load(b, _address(context, b, sig.args[0], args[0], args[1]), ir.VectorType(I8, 2 * width))
        first = [lane * width // 8 for lane in range(LANES)]
        codes = b.zext(_shuffle(b, stored, first), Ints.llvm)
        if 8 % width:  # a code may reach into the next byte
            following = b.zext(_shuffle(b, stored, [min(byte + 1, 2 * width - 1) for byte in first]), Ints.llvm)
            codes = b.or_(codes, b.shl(following, _constant(Ints.llvm, 8)))
        shifts = ir.Constant(Ints.llvm, [lane * width % 8 for lane in range(LANES)])
        return b.and_(b.lshr(codes, shifts), _constant(Ints.llvm, (1 << width) - 1))

    return Ints(array, types.intp, bits), generate


@intrinsic
def load_bytes(typing, array, index):
    """Sixteen bytes, one to a lane; signed if the array is int8."""

    def generate(context, b, sig, args):
        stored = _load(b, _address(context, b, sig.args[0], *args), ir.VectorType(I8, LANES))
        return (b.sext if sig.args[0].dtype == types.int8 else b.zext)(stored, Ints.llvm)

    return Ints(array, types.intp), generate


@intrinsic
def load_bit_lanes(typing, array, index):
    """Sixteen bits (two bytes, low bit first), one to a lane."""

    def generate(context, b, sig, args):
        stored = _load(b, _address(context, b, sig.args[0], *args), I16)
        word = _shuffle(b, b.insert_element(ir.Constant(Ints.llvm, ir.Undefined), b.zext(stored, I32), I32(0)), [0] * LANES)
        return b.and_(b.lshr(word, ir.Constant(Ints.llvm, list(range(LANES)))), _constant(Ints.llvm, 1))

    return Ints(array, types.intp), generate


@intrinsic
def store_floats(typing, array, index, x):
    """array[index : index + 16] = x."""

    def generate(context, b, sig, args):
        pointer = b.bitcast(_address(context, b, sig.args[0], *args[:2]), Floats.llvm.as_pointer())
        b.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, Floats), generate


@intrinsic
def splat(typing, x):
    """One number in every lane: a float32 gives floats, an integer 32-bit integers."""
    vector = Floats if x == types.float32 else Ints

    def generate(context, b, sig, args):
        number = args[0] if vector is Floats else b.trunc(args[0], I32)
        return _shuffle(b, b.insert_element(ir.Constant(vector.llvm, ir.Undefined), number, I32(0)), [0] * LANES)

    return vector(types.float32 if vector is Floats else types.intp), generate


@intrinsic(prefer_literal=True)
def bit_field(typing, x, shift, bits):
    """(x >> shift) & (2^bits - 1), shift and bits constants."""
    amount, mask = shift.literal_value, (1 << bits.literal_value) - 1

    def generate(context, b, sig, args):
        return b.and_(b.lshr(args[0], _constant(Ints.llvm, amount)), _constant(Ints.llvm, mask))

    return Ints(Ints, shift, bits), generate


@intrinsic(prefer_literal=True)
def shift_left(typing, x, shift):
    """x << shift, shift a constant."""
    amount = shift.literal_value
    return Ints(Ints, shift), lambda context, b, sig, args: b.shl(args[0], _constant(Ints.llvm, amount))


@intrinsic
def multiply(typing, x, y):
    """x * y, rounded: never fused with a following sum."""
    return Floats(Floats, Floats), lambda context, b, sig, args: b.fmul(*args)


@intrinsic(prefer_literal=True)
def spread(typing, values, start, spare, use_spare, index, per):
    """The `per` numbers at values[start + index] or, if use_spare, at spare[index], each repeated over LANES / per lanes.

    values : float32, int32, or uint16 holding the bits of finite float16 numbers, which become floats.
    per : a compile-time constant: 1, 2, 4, 8 or 16.
    """
    vector = Ints if values.dtype == types.int32 else Floats
    element = I16 if values.dtype == types.uint16 else vector.llvm.element
    count = per.literal_value

    def generate(context, b, sig, args):
        few = _load(b, _either(context, b, sig, args), ir.VectorType(element, count))
        lanes = _shuffle(b, few, [lane * count // LANES for lane in range(LANES)])
        return _half_to_float(b, lanes) if element == I16 else lanes

    return vector(values, types.intp, spare, types.boolean, types.intp, per), generate


@intrinsic(prefer_literal=True)
def float_products(typing, codes, zero, x, index, bits):
    """Lane sums of (code - zero) * x over the codes of one block.

    codes : Ints; lane l holds the codes of columns l * 32/bits ... of the block. zero : Floats.
    x : float32 array; at `index` stand 32/bits planes of 16 numbers: plane i is column i of every lane.
    """
    width = bits.literal_value
    planes = 32 // width
    mask = (1 << width) - 1

    def generate(context, b, sig, args):
        v, z, base = args[0], args[1], _address(context, b, sig.args[2], args[2], args[3])
        halves = (v, b.lshr(v, _constant(Ints.llvm, 16)))
        sums = [None] * 4
        for plane in range(planes):
            shift = plane * width % 16
            magic = ir.Constant(F32, 2.0 ** (23 - shift))
            magic_bits = _constant(Ints.llvm, (127 + 23 - shift) << 23)
            code = b.or_(b.and_(halves[plane * width // 16], _constant(Ints.llvm, mask << shift)), magic_bits)
            step = b.fsub(b.bitcast(code, Floats.llvm), b.fadd(z, ir.Constant(Floats.llvm, [magic] * LANES)))
            numbers = _load(b, b.gep(base, [ir.Constant(args[3].type, plane * LANES)]), Floats.llvm)
            sums[plane % 4] = _multiply_add(b, step, numbers, sums[plane % 4])
        return b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))

    return Floats(Ints, Floats, x, types.intp, bits), generate


def _multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, addend: ir.Value | None) -> ir.Value:
    """x * y + addend, fused where the machine has it."""
    if addend is None:
        return b.fmul(x, y)
    kind = ir.FunctionType(Floats.llvm, [Floats.llvm] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fmuladd.v16f32"), [x, y, addend])


@intrinsic(prefer_literal=True)
def int_products(typing, codes, zero, x, index, bits):
    """Integer lane sums of (code - zero) * x over the codes of one block.

    codes : Ints as in float_products. zero : Ints, the zero point in both 16-bit halves of each lane.
    x : int16 array; at `index` stand 16/bits planes of 32 numbers: plane i is column i of every 16-bit half lane.
    """
    width = bits.literal_value

    def generate(context, b, sig, args):
        v, z = (b.bitcast(value, SHORTS) for value in args[:2])
        base = _address(context, b, sig.args[2], args[2], args[3])
        total = None
        for plane in range(16 // width):
            code = b.lshr(v, _constant(SHORTS, plane * width)) if plane else v
            step = b.sub(b.and_(code, _constant(SHORTS, (1 << width) - 1)), z)
            numbers = _load(b, b.gep(base, [ir.Constant(args[3].type, plane * 2 * LANES)]), SHORTS)
            total = _pairs(b, step, numbers, total)
        return total

    return Ints(Ints, Ints, x, types.intp, bits), generate


def _pairs(b: ir.IRBuilder, x: ir.Value, y: ir.Value, addend: ir.Value | None) -> ir.Value:
    """addend[i] + x[2i] y[2i] + x[2i+1] y[2i+1] in 32 bits: the shape LLVM knows as a 16-bit multiply-add."""
    wide = ir.VectorType(I32, 2 * LANES)
    product = b.mul(b.sext(x, wide), b.sext(y, wide))
    even = _shuffle(b, product, list(range(0, 2 * LANES, 2)))
    odd = _shuffle(b, product, list(range(1, 2 * LANES, 2)))
    total = b.add(even, odd)
    return total if addend is None else b.add(addend, total)


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


@intrinsic
def multiply_add(typing, x, y, addend):
    """x * y + addend."""
    return Floats(Floats, Floats, Floats), lambda context, b, sig, args: _multiply_add(b, *args)


@intrinsic
def sum_lanes(typing, x):
    """The sum of sixteen lanes, always in the same order: halves are added until one is left."""

    def generate(context, b, sig, args):
        value, half = args[0], LANES // 2
        while half:
            value = b.fadd(_shuffle(b, value, list(range(half))), _shuffle(b, value, list(range(half, 2 * half))))
            half //= 2
        return b.extract_element(value, ir.Constant(I32, 0))

    return types.float32(Floats), generate


def _half_to_float(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
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
    magnitude = b.shl(b.and_(wide, _constant(word, 0x7FFF)), _constant(word, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, single), _constant(single, 2.0**112)), word)
    sign = b.shl(b.and_(wide, _constant(word, 0x8000)), _constant(word, 16))
    return b.bitcast(b.or_(scaled, sign), single)


def _like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """`element`, or a vector of as many of them as `kind` has."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


@intrinsic
def half_to_float(typing, bits):
    """A finite float16, given as its 16 bits, as float32."""
    return types.float32(types.uint16), lambda context, b, sig, args: _half_to_float(b, args[0])


@intrinsic
def half_to_float_portable(typing, bits):
    """half_to_float as machines without the instruction compute it."""
    return types.float32(types.uint16), lambda context, b, sig, args: _half_to_float_portable(b, args[0])
