"""Words of the tile kernels (lanes.py) for stored numbers of fewer bits: codes, levels, small floats.

Addresses are those of lane_memory.py.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from refllm.kernels.packed.lane_memory import emit_load, loader
from refllm.kernels.packed.lanes import emit_join, emit_splat, emit_together, several
from refllm.kernels.packed.simd import F32, I8, I32, I64, LANES, Floats, Ints, constant, emit_columns, emit_small_float
from refllm.kernels.packed.tables import SMALL

load_signed = loader(Floats, ir.VectorType(I8, LANES), lambda b, v: b.sitofp(v, Floats.llvm))
load_unsigned = loader(Floats, ir.VectorType(I8, LANES), lambda b, v: b.uitofp(v, Floats.llvm))
load_six = loader(Floats, ir.VectorType(I8, LANES), lambda b, v: b.uitofp(b.lshr(v, constant(v.type, 2)), Floats.llvm))
load_ue4m3 = loader(
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
def store_codes(typing, address, low, high, most):
    """Thirty-two whole numbers as bytes from -most to most, those beyond at the ends, NaN as 0.

    Returns their sums: of the first sixteen, of the others, and of all that are positive.
    """
    few, many = ir.VectorType(I8, LANES), ir.VectorType(I8, 2 * LANES)

    def generate(context, b, sig, args):
        address, low, high, most = args
        most = emit_splat(b, b.sitofp(most, F32))
        least, zero = b.fneg(most), constant(many, 0)

        def rounded(x):
            number = b.select(b.fcmp_ordered("==", x, x), x, constant(Floats.llvm, 0.0))
            number = b.select(b.fcmp_ordered("<", number, most), number, most)
            number = b.select(b.fcmp_ordered(">", number, least), number, least)
            return b.trunc(b.fptosi(number, Ints.llvm), few)

        def total(codes, offset):
            """Sums of unsigned bytes have an instruction on many processors."""
            wide = ir.VectorType(I32, codes.type.count)
            add = ir.FunctionType(I32, [wide])
            call = cgutils.get_or_insert_function(b.module, add, f"llvm.vector.reduce.add.v{wide.count}i32")
            unsigned = b.zext(b.xor(codes, constant(codes.type, offset)), wide)
            return b.sext(b.sub(b.call(call, [unsigned]), I32(-offset * wide.count)), I64)

        halves = rounded(low), rounded(high)
        codes = emit_together(b, list(halves))
        b.store(codes, b.inttoptr(address, many.as_pointer()), align=1)
        positive = b.select(b.icmp_signed(">", codes, zero), codes, zero)
        sums = [total(half, -128) for half in halves] + [total(positive, 0)]
        return context.make_tuple(b, sig.return_type, sums)

    return types.UniTuple(types.intp, 3)(types.intp, Floats, Floats, types.intp), generate
