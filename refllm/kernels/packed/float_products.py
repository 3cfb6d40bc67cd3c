"""Words that multiply numbers with float activations: what a block's codes stand for, looked up or computed.

As in products.py each is made for one form of tiles, one part of a block and one number of tokens.
"""

from functools import cache

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from refllm.kernels.packed import tables
from refllm.kernels.packed.dots import (
    emit_bare_quads,
    emit_chosen,
    emit_code_quads,
    emit_function,
    emit_parts,
    quads_of,
    shuffle_of_sixteen,
)
from refllm.kernels.packed.lane_math import emit_fma
from refllm.kernels.packed.lane_memory import emit_load
from refllm.kernels.packed.lanes import emit_join, emit_splat, emit_together, several
from refllm.kernels.packed.simd import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    Floats,
    Ints,
    constant,
    emit_half_to_float,
    emit_small_float,
    shuffle,
    target_features,
)
from refllm.kernels.packed.tiling import BLOCK, ROWS, Form


@cache
def float_products(form: Form, part: int, parts: int, n: int):
    """A word: sums of number * x over a block or one half of it, in two sums that do not wait for each other.

    Its arguments are the address of the block's codes; that of n times 32 floats; zero : Floats, whole numbers that are
    subtracted from codes that are numbers; and the table: sixteen Floats, or the address of 256, or that of as many
    Floats as there are codes, one lane a row, or anything.
    """
    quads, kind = quads_of(part, parts), several(Floats, n)

    activations = _picked_floats if form.layout == "pairs" else _repeated_floats

    @intrinsic
    def sums_of_products(typing, codes, x, zero, table):
        def generate(context, b, sig, args):
            codes, x, zero, table = args
            sums = [[constant(Floats.llvm, 0.0)] * 2 for _ in range(n)]
            each = activations(b, form, codes, x, quads)
            for quad, c, number in _numbers(b, form, codes, quads, zero, table):
                for i in range(n):
                    sums[i][c % 2] = emit_fma(b, number, each(i, quad, c), sums[i][c % 2])
            return emit_join(b, kind, [b.fadd(*pair) for pair in sums])

        return kind(types.intp, types.intp, zero, table), generate

    return sums_of_products


def _repeated_floats(b: ir.IRBuilder, form: Form, codes: ir.Value, x: ir.Value, quads: range):
    """Activations beside codes: the number of token i in column 4 quad + c, in every lane."""
    return lambda i, quad, c: emit_splat(b, emit_load(b, x, 4 * (BLOCK * i + 4 * quad + c), F32))


def _picked_floats(b: ir.IRBuilder, form: Form, codes: ir.Value, x: ir.Value, quads: range):
    """Activations beside kept codes: each lane has that of its own column among the four that column c is one of."""
    index = dict(zip(quads, emit_bare_quads(b, codes, 2, quads, form.code_bytes), strict=True))

    def each(i, quad, c):
        four = emit_load(b, x, 4 * (BLOCK * i + 8 * (quad % len(quads)) + 4 * (c // 2)), ir.VectorType(F32, 4))
        return _pick(b, four, b.lshr(b.bitcast(index[quad], Ints.llvm), constant(Ints.llvm, 8 * c)))

    return each


def _pick(b: ir.IRBuilder, four: ir.Value, index: ir.Value) -> ir.Value:
    """four[index & 3] in every lane."""
    features = target_features()
    if "+avx" not in features:
        return emit_chosen(b, [shuffle(b, four, [k] * LANES) for k in range(4)], index)
    name, count = ("avx512.vpermilvar.ps.512", 16) if "+avx512f" in features else ("avx.vpermilvar.ps.256", 8)
    floats = ir.VectorType(F32, count)
    permute = emit_function(b, f"llvm.x86.{name}", floats, floats, ir.VectorType(I32, count))
    some = shuffle(b, four, list(range(4)) * (count // 4))
    return emit_together(b, [b.call(permute, [some, part]) for part in emit_parts(b, index, count)])


@cache
def kept_products(form: Form, n: int):
    """A word for bitmasks: sums of value * x over a block, in two sums as float_products has them.

    Its arguments are the addresses of the block's masks, of n times 32 floats and of the block's first value. Sixteen
    values behind the last one must be readable.
    """
    kind = several(Floats, n)

    @intrinsic
    def sums_of_products(typing, masks, x, values):
        def generate(context, b, sig, args):
            masks, x, place = args
            sums = [[constant(Floats.llvm, 0.0)] * 2 for _ in range(n)]
            for column in range(BLOCK):
                mask = emit_load(b, masks, 2 * column, I16)
                number, place = _expand(b, form.table == tables.HALF, mask, place)
                for i in range(n):
                    each = emit_splat(b, emit_load(b, x, 4 * (BLOCK * i + column), F32))
                    sums[i][column % 2] = emit_fma(b, number, each, sums[i][column % 2])
            return emit_join(b, kind, [b.fadd(*pair) for pair in sums])

        return kind(types.intp, types.intp, types.intp), generate

    return sums_of_products


def _expand(b: ir.IRBuilder, half: bool, mask: ir.Value, place: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Consecutive values in the lanes of a mask, zeros in the others; and the address behind them."""
    if "+avx512f" in target_features():
        return _expand_at_once(b, half, mask, place)
    return (_expand_by_fours if shuffle_of_sixteen() else _expand_one_by_one)(b, half, mask, place)


def _load_values(b: ir.IRBuilder, half: bool, place: ir.Value, count: int) -> ir.Value:
    """Consecutive values as floats."""
    values = emit_load(b, place, 0, ir.VectorType(I16 if half else F32, count))
    return emit_half_to_float(b, values) if half else values


def _expand_at_once(b: ir.IRBuilder, half: bool, mask: ir.Value, place: ir.Value) -> tuple[ir.Value, ir.Value]:
    count = b.call(emit_function(b, "llvm.ctpop.i16", I16, I16), [mask])
    bits = b.bitcast(mask, ir.VectorType(ir.IntType(1), LANES))
    call = emit_function(b, "llvm.x86.avx512.mask.expand.v16f32", Floats.llvm, Floats.llvm, Floats.llvm, bits.type)
    number = b.call(call, [_load_values(b, half, place, LANES), constant(Floats.llvm, 0.0), bits])
    return number, b.add(place, b.mul(b.zext(count, place.type), place.type(2 if half else 4)))


# For each mask of four lanes: which bytes of four consecutive floats come there (from 128 on: zeros), and how many
# lanes have one, the numbers of all masks in one word.
_FOURS = [[mask >> lane & 1 for lane in range(4)] for mask in range(16)]
_BYTES_OF_FOUR = [
    4 * sum(kept[:lane]) + byte if kept[lane] else 128 for kept in _FOURS for lane in range(4) for byte in range(4)
]
_COUNTS = sum(sum(kept) << 4 * mask for mask, kept in enumerate(_FOURS))


def _expand_by_fours(b: ir.IRBuilder, half: bool, mask: ir.Value, place: ir.Value) -> tuple[ir.Value, ir.Value]:
    table = cgutils.global_constant(b.module, "bytes_of_four", ir.Constant(ir.ArrayType(I8, 256), _BYTES_OF_FOUR))
    table, mask, sixteen = b.ptrtoint(table, place.type), b.zext(mask, place.type), ir.VectorType(I8, 16)
    call, fours = emit_function(b, shuffle_of_sixteen(), sixteen, sixteen, sixteen), []
    for first in range(0, LANES, 4):
        four = b.and_(b.lshr(mask, mask.type(first)), mask.type(15))
        index = emit_load(b, b.add(table, b.shl(four, four.type(4))), 0, sixteen)
        values = b.bitcast(_load_values(b, half, place, 4), sixteen)
        fours.append(b.bitcast(b.call(call, [values, index]), ir.VectorType(F32, 4)))
        count = b.and_(b.lshr(four.type(_COUNTS), b.shl(four, four.type(2))), four.type(15))
        place = b.add(place, b.shl(count, count.type(1 if half else 2)))
    return emit_together(b, fours), place


def _expand_one_by_one(b: ir.IRBuilder, half: bool, mask: ir.Value, place: ir.Value) -> tuple[ir.Value, ir.Value]:
    stored, zero, size = (I16, 0, 2) if half else (F32, 0.0, 4)
    vector = constant(ir.VectorType(stored, LANES), zero)
    for lane in range(LANES):
        kept = b.trunc(b.lshr(mask, I16(lane)), ir.IntType(1))
        value = b.select(kept, emit_load(b, place, 0, stored), stored(zero))
        vector = b.insert_element(vector, value, I32(lane))
        place = b.add(place, b.select(kept, place.type(size), place.type(0)))
    return emit_half_to_float(b, vector) if half else vector, place


def _numbers(b: ir.IRBuilder, form: Form, codes: ir.Value, quads: range, zero: ir.Value, table: ir.Value):
    """The numbers of some fours of columns, a column of all rows at a time: (quad, c, Floats)."""
    if form.table in (tables.HALF, tables.SINGLE):
        stored = ir.VectorType(I16 if form.table == tables.HALF else F32, LANES)
        for quad in quads:
            for c in range(4):
                number = emit_load(b, codes, form.bits // 8 * ROWS * (4 * quad + c), stored)
                yield quad, c, emit_half_to_float(b, number) if form.table == tables.HALF else number
        return
    if form.table == tables.OF_ROWS:
        choices = [emit_load(b, table, 4 * ROWS * code, Floats.llvm) for code in range(1 << form.bits)]
    for quad, some in zip(quads, emit_code_quads(b, codes, form, quads), strict=True):
        lanes = b.bitcast(some, Ints.llvm)
        for c in range(4):
            if form.table in tables.SMALL:
                number = emit_small_float(b, lanes, c, tables.SMALL[form.table])
            elif form.table == tables.SIXTEEN:
                number = _look_up_sixteen(b, table, b.lshr(lanes, constant(Ints.llvm, 8 * c)))
            elif form.table == tables.MANY:
                number = _look_up_many(b, table, b.lshr(lanes, constant(Ints.llvm, 8 * c)), 255)
            elif form.table == tables.OF_ROWS:
                number = emit_chosen(b, choices, b.lshr(lanes, constant(Ints.llvm, 8 * c)))
            else:
                number = _whole_number(b, lanes, c, form.width, zero)
            yield quad, c, number


def _whole_number(b: ir.IRBuilder, lanes: ir.Value, c: int, width: int, zero: ir.Value) -> ir.Value:
    """code - zero of byte c of every lane.

    A code q in the low mantissa bits of 2^23 makes the float 2^23 + q; one that sits k bits higher takes 2^(23-k). So
    subtracting 2^(23-k) + zero, which is exact, gives q - zero with no conversion.
    """
    at = 8 * c
    if at + width > 23:
        lanes, at = b.lshr(lanes, constant(Ints.llvm, at)), 0
    field = b.and_(lanes, constant(Ints.llvm, ((1 << width) - 1) << at))
    number = b.bitcast(b.or_(field, constant(Ints.llvm, (127 + 23 - at) << 23)), Floats.llvm)
    return b.fsub(number, b.fadd(zero, constant(Floats.llvm, 2.0 ** (23 - at))))


def sixteen_in_registers() -> bool:
    """Whether Numba's target looks floats up within a vector; else products take the table's address."""
    return "+avx2" in target_features()


def _look_up_sixteen(b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """table[index & 15] of sixteen floats."""
    if not sixteen_in_registers():
        return _look_up_many(b, table, index, 15)
    if "+avx512f" in target_features():
        return b.call(
            emit_function(b, "llvm.x86.avx512.permvar.sf.512", Floats.llvm, Floats.llvm, Ints.llvm), [table, index]
        )
    eight, numbers = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
    permute = emit_function(b, "llvm.x86.avx2.permps", eight, eight, numbers)
    found = []
    for some in emit_parts(b, index, 8):
        low, high = (b.call(permute, [half, some]) for half in emit_parts(b, table, 8))
        in_high = b.icmp_unsigned("!=", b.and_(some, constant(numbers, 8)), constant(numbers, 0))
        found.append(b.select(in_high, high, low))
    return emit_together(b, found)


def _look_up_many(b: ir.IRBuilder, table: ir.Value, index: ir.Value, mask: int) -> ir.Value:
    """The floats at an address by number, one lane after another."""
    index = b.and_(index, constant(Ints.llvm, mask))
    values = ir.Constant(Floats.llvm, ir.Undefined)
    for lane in range(LANES):
        offset = b.shl(b.zext(b.extract_element(index, I32(lane)), table.type), ir.Constant(table.type, 2))
        values = b.insert_element(values, emit_load(b, b.add(table, offset), 0, F32), I32(lane))
    return values
