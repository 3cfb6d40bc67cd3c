"""Words for products of packed codes: every value is a tile, sixteen lanes of each of four rows of the weight.

Four rows at once read activations once for all four and give the processor four streams of memory to run ahead in.

How codes become floats: OR-ing a code q into the low mantissa bits of 2^23 gives the float 2^23 + q exactly; a code
that sits n bits higher in its word takes 2^(23-n) instead, whose last mantissa bits weigh 2^-n. Subtracting 2^(23-n)
+ zero_point gives q - zero_point exactly, with no shift and no conversion. Integer products are written in the shape
that LLVM knows as a multiply-add of 16-bit pairs (vpmaddwd, vpdpwssd, smlal); where Numba's target has it, a byte
multiply-add takes their place.
"""

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from refllm.kernels.packed.simd import (
    I8,
    I16,
    I32,
    LANES,
    Floats,
    Ints,
    address,
    constant,
    emit_half_to_float,
    load,
    shuffle,
    target_features,
)

ROWS = 4
BLOCK_BYTES = 64  # of codes in one row of a tile
SHORTS = ir.VectorType(I16, 2 * LANES)  # the same 64 bytes as pairs of 16-bit numbers
BYTES = ir.VectorType(I8, 4 * LANES)


def target_has_byte_dot() -> bool:
    """Whether Numba's target has vpdpbusd on 512-bit vectors (AVX512-VNNI): four byte products added per lane."""
    return {"+avx512bw", "+avx512vnni"} <= target_features()


class Tile(types.Type):
    """The Numba type of ROWS vectors."""

    def __init__(self, vector: types.Type):
        self.vector = vector
        self.llvm = ir.ArrayType(vector.llvm, ROWS)
        super().__init__(name=f"Tile({vector.name} x {ROWS})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile):
        super().__init__(manager, tile, tile.llvm)


FloatTile, IntTile = Tile(Floats), Tile(Ints)


def _tile(b: ir.IRBuilder, kind: Tile, row: Callable[[int], ir.Value]) -> ir.Value:
    """A tile whose row i is row(i)."""
    tile = ir.Constant(kind.llvm, ir.Undefined)
    for i in range(ROWS):
        tile = b.insert_value(tile, row(i), i)
    return tile


@intrinsic(prefer_literal=True)
def constant_floats(typing, value):
    """A tile of one compile-time number, as floats."""
    number = constant(Floats.llvm, float(value.literal_value))
    return FloatTile(value), lambda context, b, sig, args: ir.Constant(FloatTile.llvm, [number] * ROWS)


@intrinsic(prefer_literal=True)
def constant_ints(typing, value):
    """A tile of one compile-time number, as integers."""
    number = constant(Ints.llvm, value.literal_value)
    return IntTile(value), lambda context, b, sig, args: ir.Constant(IntTile.llvm, [number] * ROWS)


def _row_pointer(context, b: ir.IRBuilder, sig, args, i: int) -> ir.Value:
    """Where row i begins, for arguments that start with (array, start, spare, use_spare, stride, index)."""
    offset = b.add(args[5], b.mul(args[4], ir.Constant(args[4].type, i)))
    inside = address(context, b, sig.args[0], args[0], b.add(args[1], offset))
    aside = address(context, b, sig.args[2], args[2], offset)
    return b.select(args[3], aside, inside)


@intrinsic
def load_codes(typing, codes, start, spare, use_spare, stride, index):
    """64 bytes of each row i, from codes[start + i * stride + index] or, if use_spare, spare[i * stride + index]."""

    def generate(context, b, sig, args):
        return _tile(b, IntTile, lambda i: load(b, _row_pointer(context, b, sig, args, i), Ints.llvm))

    return IntTile(codes, types.intp, spare, types.boolean, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def spread(typing, values, start, spare, use_spare, stride, index, per):
    """`per` numbers of each row, from where load_codes would read, each repeated over LANES / per lanes.

    values : float32, int32, or uint16 holding the bits of finite float16 numbers, which become floats.
    per : a compile-time constant: 1, 2, 4, 8 or 16.
    """
    kind = IntTile if values.dtype == types.int32 else FloatTile
    element = I16 if values.dtype == types.uint16 else kind.vector.llvm.element
    count = per.literal_value

    def generate(context, b, sig, args):
        def row(i):
            few = load(b, _row_pointer(context, b, sig, args, i), ir.VectorType(element, count))
            lanes = shuffle(b, few, [lane * count // LANES for lane in range(LANES)])
            return emit_half_to_float(b, lanes) if element == I16 else lanes

        return _tile(b, kind, row)

    return kind(values, types.intp, spare, types.boolean, types.intp, types.intp, per), generate


@intrinsic(prefer_literal=True)
def float_products(typing, codes, zero, x, index, bits):
    """Lane sums of (code - zero) * x over one block of each row.

    codes : IntTile; lane l of a row holds the codes of columns l * 32/bits ... of the block. zero : FloatTile.
    x : float32 array; at `index` stand 32/bits planes of 16 numbers: plane i is column i of every lane.
    """
    width = bits.literal_value

    def generate(context, b, sig, args):
        base = address(context, b, sig.args[2], args[2], args[3])
        planes = [
            load(b, b.gep(base, [ir.Constant(args[3].type, plane * LANES)]), Floats.llvm)
            for plane in range(32 // width)
        ]

        def row(i):
            return _float_row(b, b.extract_value(args[0], i), b.extract_value(args[1], i), planes, width)

        return _tile(b, FloatTile, row)

    return FloatTile(IntTile, FloatTile, x, types.intp, bits), generate


def _float_row(b: ir.IRBuilder, codes: ir.Value, zero: ir.Value, planes: list[ir.Value], width: int) -> ir.Value:
    """float_products of one row, in four sums that do not wait for each other."""
    halves = codes, b.lshr(codes, constant(Ints.llvm, 16))
    sums = [None] * 4
    for plane, numbers in enumerate(planes):
        shift = plane * width % 16
        field = b.and_(halves[plane * width // 16], constant(Ints.llvm, ((1 << width) - 1) << shift))
        raised = b.bitcast(b.or_(field, constant(Ints.llvm, (127 + 23 - shift) << 23)), Floats.llvm)
        step = b.fsub(raised, b.fadd(zero, constant(Floats.llvm, 2.0 ** (23 - shift))))
        sums[plane % 4] = _multiply_add(b, step, numbers, sums[plane % 4])
    return b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))


def _multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, addend: ir.Value | None) -> ir.Value:
    """x * y + addend, fused where the machine has it."""
    if addend is None:
        return b.fmul(x, y)
    kind = ir.FunctionType(Floats.llvm, [Floats.llvm] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fmuladd.v16f32"), [x, y, addend])


@intrinsic(prefer_literal=True)
def add_int_products(typing, total, codes, zero, x, index, bits):
    """total + integer lane sums of (code - zero) * x over one block of each row.

    codes : IntTile as in float_products.
    x : int16 array: at `index` stand 16/bits planes of 32 numbers, plane i is column i of every 16-bit half lane; any
    machine.
        int8 array: 8/bits planes of 64 numbers, plane i is column i of every byte of a lane; needs
        target_has_byte_dot().
    zero : IntTile. The zero point, for int16 in both 16-bit halves of a lane.
    """
    width = bits.literal_value
    kind, row_of = (BYTES, _byte_row) if x.dtype == types.int8 else (SHORTS, _short_row)
    count = kind.element.width // width

    def generate(context, b, sig, args):
        base = address(context, b, sig.args[3], args[3], args[4])
        planes = [load(b, b.gep(base, [ir.Constant(args[4].type, i * kind.count)]), kind) for i in range(count)]
        row = row_of(b, planes, width)
        return _tile(b, IntTile, lambda i: row(*(b.extract_value(tile, i) for tile in args[:3])))

    return IntTile(IntTile, IntTile, IntTile, x, types.intp, bits), generate


def _short_row(b: ir.IRBuilder, planes: list[ir.Value], width: int) -> Callable:
    """total[i] + x[2i] y[2i] + x[2i+1] y[2i+1], plane by plane, in the shape LLVM knows as a 16-bit multiply-add."""
    wide = ir.VectorType(I32, 2 * LANES)

    def row(total, codes, zero):
        codes, zero = b.bitcast(codes, SHORTS), b.bitcast(zero, SHORTS)
        for plane, numbers in enumerate(planes):
            field = b.and_(b.lshr(codes, constant(SHORTS, plane * width)), constant(SHORTS, (1 << width) - 1))
            product = b.mul(b.sext(b.sub(field, zero), wide), b.sext(numbers, wide))
            even = shuffle(b, product, list(range(0, 2 * LANES, 2)))
            odd = shuffle(b, product, list(range(1, 2 * LANES, 2)))
            total = b.add(total, b.add(even, odd))
        return total

    return row


def _byte_row(b: ir.IRBuilder, planes: list[ir.Value], width: int) -> Callable:
    """The same with the sum of four unsigned by signed bytes: sum code x - zero sum x, all in 32-bit integers."""

    def dot(total, codes, numbers):
        # The operands are declared as LLVM up to 20 had them; later versions upgrade the call when they read it.
        word = ir.FunctionType(Ints.llvm, [Ints.llvm] * 3)
        name = "llvm.x86.avx512.vpdpbusd.512"
        operands = total, b.bitcast(codes, Ints.llvm), b.bitcast(numbers, Ints.llvm)
        return b.call(cgutils.get_or_insert_function(b.module, word, name), operands)

    x_sum = constant(Ints.llvm, 0)
    for numbers in planes:
        x_sum = dot(x_sum, constant(BYTES, 1), numbers)

    def row(total, codes, zero):
        for plane, numbers in enumerate(planes):
            moved = b.lshr(b.bitcast(codes, SHORTS), constant(SHORTS, plane * width))
            total = dot(total, b.and_(b.bitcast(moved, BYTES), constant(BYTES, (1 << width) - 1)), numbers)
        return b.sub(total, b.mul(zero, x_sum))

    return row


@intrinsic
def multiply_add(typing, x, y, addend):
    """x * y + addend."""

    def generate(context, b, sig, args):
        return _tile(b, FloatTile, lambda i: _multiply_add(b, *(b.extract_value(tile, i) for tile in args)))

    return FloatTile(FloatTile, FloatTile, FloatTile), generate


@intrinsic
def to_floats(typing, x):
    """Integers to floats, rounded to nearest."""

    def generate(context, b, sig, args):
        return _tile(b, FloatTile, lambda i: b.sitofp(b.extract_value(args[0], i), Floats.llvm))

    return FloatTile(IntTile), generate


@intrinsic
def store_row_sums(typing, out, x):
    """out[i] = the sum of row i's lanes, always in the same order: halves are added until one number is left."""

    def generate(context, b, sig, args):
        for i in range(ROWS):
            value, half = b.extract_value(args[1], i), LANES // 2
            while half:
                value = b.fadd(shuffle(b, value, list(range(half))), shuffle(b, value, list(range(half, 2 * half))))
                half //= 2
            b.store(
                b.extract_element(value, I32(0)),
                address(context, b, sig.args[0], args[0], ir.Constant(ir.IntType(64), i)),
            )
        return context.get_dummy_value()

    return types.void(out, FloatTile), generate
