"""Words that multiply the codes of a block with activations: what every tile product does most of the time.

Each is made for one form of tiles (tiling.py), one part of a block and one number of tokens, since all of that is
constant to the compiler. A lane belongs to a row, so no sum crosses lanes.

Sums of four byte products are written in several ways, chosen by the features of Numba's target (which the environment
variable NUMBA_CPU_FEATURES may set apart from this machine's): as vpdpbusd (AVX512-VNNI), as vpmaddubsw + vpmaddwd
(AVX2, codes of at most 7 bits: 8-bit codes could overflow its 16-bit sums), as ARM's usdot or, for codes of at most 7
bits, sdot, or in the 16-bit form that LLVM turns into multiply-adds of pairs on any processor. All give the same
integers. Look-ups have a portable form, too.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from refllm.kernels.packed import tables
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
    shuffle,
    target_features,
)
from refllm.kernels.packed.tiling import BLOCK, PLANES, Form

BYTES = ir.VectorType(I8, 4 * LANES)
SHORTS = ir.VectorType(I16, 2 * LANES)
QUADS = BLOCK // 4  # fours of columns in a block
X86_BYTE_DOT, X86_BYTE_PAIRS, PORTABLE = "vpdpbusd", "vpmaddubsw", "portable"
ARM_DOT, ARM_MIXED_DOT = "sdot", "usdot"


def dot_form(bits: int) -> str:
    """How Numba's target adds four byte products of codes of so many bits."""
    features = target_features()
    if {"+avx512bw", "+avx512vnni"} <= features:
        return X86_BYTE_DOT
    if "+i8mm" in features:
        return ARM_MIXED_DOT
    if "+dotprod" in features and bits < 8:
        return ARM_DOT
    return X86_BYTE_PAIRS if "+avx2" in features and bits < 8 else PORTABLE


def quads_of(part: int, parts: int) -> range:
    """The fours of columns in one of the equal parts of a block."""
    return range(QUADS // parts * part, QUADS // parts * (part + 1))


def emit_bare_quads(b: ir.IRBuilder, codes: ir.Value, bits: int, quads: range, start: int = 0) -> list[ir.Value]:
    """The codes of some fours of columns of a block as vectors of bytes: byte 4 r + c is column 4 quad + c of row r.

    A plane of w bits is w vectors; bits w s .. of vector v belong to the quad w s + v.
    """
    made, low = {}, 0
    for width in PLANES[bits]:
        vectors = {}
        for quad in quads:
            v, s = quad % width, quad // width
            if v not in vectors:
                vectors[v] = emit_load(b, codes, start + 64 * v, BYTES)
            piece = vectors[v]
            if width < 8:
                moved = b.lshr(b.bitcast(piece, SHORTS), constant(SHORTS, width * s)) if s else piece
                piece = b.and_(b.bitcast(moved, BYTES), constant(BYTES, (1 << width) - 1))
            if low:
                piece = b.bitcast(b.shl(b.bitcast(piece, SHORTS), constant(SHORTS, low)), BYTES)
                piece = b.or_(made[quad], piece)
            made[quad] = piece
        start, low = start + 64 * width, low + width
    return [made[quad] for quad in quads]


def emit_code_quads(b: ir.IRBuilder, codes: ir.Value, form: Form, quads: range) -> list[ir.Value]:
    """The same with codes of whole numbers replaced by these, as bytes from 0 on."""
    found = emit_bare_quads(b, codes, form.bits, quads)
    if form.table not in tables.WHOLE:
        return found
    values, _ = tables.whole_bytes(form.table)
    return [_look_up_bytes(b, values, some) for some in found]


def emit_parts(b: ir.IRBuilder, value: ir.Value, count: int) -> list[ir.Value]:
    """A vector cut into vectors of `count` elements."""
    return [shuffle(b, value, list(range(i, i + count))) for i in range(0, value.type.count, count)]


def emit_function(b: ir.IRBuilder, name: str, kind: ir.Type, *of: ir.Type) -> ir.Function:
    """LLVM's own function of this name, which takes values of the types `of` and gives one of type `kind`."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, of), name)


def byte_shuffle() -> tuple[str, int] | None:
    """LLVM's name for the instruction that looks bytes up within 16, and the bytes it takes at once; None without."""
    features = target_features()
    if "+avx512bw" in features:
        return "llvm.x86.avx512.pshuf.b.512", 64
    if "+avx2" in features:
        return "llvm.x86.avx2.pshuf.b", 32
    return ("llvm.x86.ssse3.pshuf.b.128", 16) if "+ssse3" in features else None


def _shuffle_bytes(b: ir.IRBuilder, instruction: tuple[str, int], table: ir.Value, index: ir.Value) -> ir.Value:
    """Byte i of the result is byte index[i] of the same sixteen bytes of the table; 64 bytes each."""
    name, count = instruction
    kind = ir.VectorType(I8, count)
    call = emit_function(b, name, kind, kind, kind)
    parts = zip(emit_parts(b, table, count), emit_parts(b, index, count), strict=True)
    return emit_together(b, [b.call(call, part) for part in parts])


def _look_up_bytes(b: ir.IRBuilder, values: np.ndarray, index: ir.Value) -> ir.Value:
    """values[index], 2 to 16 values."""
    if instruction := byte_shuffle():
        table = ir.Constant(BYTES, np.resize(np.resize(values, 16), 64).tolist())
        return _shuffle_bytes(b, instruction, table, index)
    return emit_chosen(b, [constant(BYTES, int(value)) for value in values], index)


def emit_chosen(b: ir.IRBuilder, choices: list[ir.Value], index: ir.Value) -> ir.Value:
    """choices[index], element by element: halved by one bit of the index after another."""
    bit = 1
    while len(choices) > 1:
        odd = b.icmp_unsigned("!=", b.and_(index, constant(index.type, bit)), constant(index.type, 0))
        choices = [b.select(odd, y, x) for x, y in zip(choices[::2], choices[1::2], strict=True)]
        bit *= 2
    return choices[0]


def emit_dot(b: ir.IRBuilder, form: str, total: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """total[r] + sum over c of codes[4 r + c] x[4 r + c], unsigned times signed bytes."""
    if form == X86_BYTE_DOT:
        # The operands are declared as LLVM up to 20 had them; later versions upgrade the call when they read it.
        call = emit_function(b, "llvm.x86.avx512.vpdpbusd.512", *[Ints.llvm] * 4)
        return b.call(call, [total, b.bitcast(codes, Ints.llvm), b.bitcast(x, Ints.llvm)])
    if form == X86_BYTE_PAIRS:
        return b.add(total, _dot_by_pairs(b, codes, x))
    if form in (ARM_DOT, ARM_MIXED_DOT):
        return _dot_by_quarters(b, form, total, codes, x)
    eight = constant(SHORTS, 8)
    codes, x = b.bitcast(codes, SHORTS), b.bitcast(x, SHORTS)
    even = b.and_(codes, constant(SHORTS, 255)), b.ashr(b.shl(x, eight), eight)
    odd = b.lshr(codes, eight), b.ashr(x, eight)
    wide = ir.VectorType(I32, 2 * LANES)
    for code, number in (even, odd):
        product = b.mul(b.sext(code, wide), b.sext(number, wide))
        pairs = shuffle(b, product, list(range(0, 2 * LANES, 2))), shuffle(b, product, list(range(1, 2 * LANES, 2)))
        total = b.add(total, b.add(*pairs))
    return total


def _dot_by_pairs(b: ir.IRBuilder, codes: ir.Value, x: ir.Value) -> ir.Value:
    """The four byte products of every lane through 16-bit pairs, 256 bits at a time."""
    bytes_, shorts = ir.VectorType(I8, 2 * LANES), ir.VectorType(I16, LANES)
    words = ir.VectorType(I32, LANES // 2)
    pairs = emit_function(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, bytes_, bytes_)
    fours = emit_function(b, "llvm.x86.avx2.pmadd.wd", words, shorts, shorts)
    halves = zip(emit_parts(b, codes, 2 * LANES), emit_parts(b, x, 2 * LANES), strict=True)
    return emit_together(b, [b.call(fours, [b.call(pairs, half), constant(shorts, 1)]) for half in halves])


def _dot_by_quarters(b: ir.IRBuilder, form: str, total: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """emit_dot by ARM's products of 128-bit vectors: signed by signed (codes below 128 are both), or mixed."""
    words, bytes_ = ir.VectorType(I32, 4), ir.VectorType(I8, 16)
    call = emit_function(b, f"llvm.aarch64.neon.{form}.v4i32.v16i8", words, words, bytes_, bytes_)
    quarters = zip(emit_parts(b, total, 4), emit_parts(b, codes, 16), emit_parts(b, x, 16), strict=True)
    return emit_together(b, [b.call(call, quarter) for quarter in quarters])


def emit_begin(b: ir.IRBuilder, address: ir.Value, n: int, begins: bool) -> list[ir.Value]:
    """What sums of n tokens begin with: the int32 at an address, or 0."""
    return [emit_splat(b, emit_load(b, address, 4 * i, I32)) if begins else constant(Ints.llvm, 0) for i in range(n)]


def emit_dots(b: ir.IRBuilder, form: Form, quads: range, codes: list, x: ir.Value, sums: list) -> list[ir.Value]:
    """Sums and, added to them, code * x over some fours of columns: of the tokens of one tile, then of the next.

    codes : of each tile, the address of the block. Of several tiles the vectors of codes come one by one, or LLVM reads
    all of them first and has no registers for them; of one tile that is as well.
    """
    sums, tokens, width = list(sums), len(sums) // len(codes), PLANES[form.bits][0]
    together = (
        [[quad for quad in quads if quad % width == v] for v in range(width)] if len(codes) > 1 else [list(quads)]
    )
    for some in together:
        of_tiles = [emit_code_quads(b, place, form, some) for place in codes]
        for number, quad in enumerate(some):
            for i in range(tokens):
                four = emit_four(b, x, BLOCK * i + 4 * quad)
                for at, found in zip(range(i, len(sums), tokens), of_tiles, strict=True):
                    sums[at] = emit_dot(b, dot_form(form.width), sums[at], found[number], four)
    return sums


def emit_four(b: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    """Four bytes behind an address, repeated in every lane."""
    return b.bitcast(emit_splat(b, emit_load(b, address, offset, I32)), BYTES)


@cache
def integer_products(form: Form, part: int, parts: int, n: int, begins: bool):
    """A word: sums of code * x over a block (parts = 1) or one half of it (parts = 2), as floats: exact.

    Its arguments are the address of the block's codes; that of n times 32 int8 numbers, one token after another; and
    that of n int32 numbers, with which the sums begin if `begins`.
    """
    quads, kind = quads_of(part, parts), several(Floats, n)

    @intrinsic
    def sums_of_products(typing, codes, x, begin):
        def generate(context, b, sig, args):
            codes, x, begin = args
            sums = emit_dots(b, form, quads, [codes], x, emit_begin(b, begin, n, begins))
            return emit_join(b, kind, [b.sitofp(total, Floats.llvm) for total in sums])

        return kind(types.intp, types.intp, types.intp), generate

    return sums_of_products


@cache
def block_products(form: Form, n: int, tiles: int):
    """A word: sums and, added to them, code * x over a block of each of `tiles` tiles, as integers.

    Its arguments are the sums, of n / tiles tokens of the first tile, then of the next; the address of the block's
    codes; the bytes from there to those of the next tile; and the address of 32 int8 numbers of every token.
    """
    kind = several(Ints, n)

    @intrinsic
    def add_products(typing, total, codes, beside, x):
        def generate(context, b, sig, args):
            total, codes, beside, x = args
            sums = [b.extract_value(total, i) for i in range(n)]
            places = [codes, b.add(codes, beside)][:tiles]
            return emit_join(b, kind, emit_dots(b, form, range(QUADS), places, x, sums))

        return kind(kind, *[types.intp] * 3), generate

    return add_products


@cache
def sum_words(n: int, integers: bool):
    """Two words for one vector of the sums of n tokens, as they stand laid out: int32, or float32.

    The one adds those at an address, where n > 1 reading beyond them what is never used; the other stores them as
    floats.
    """
    kind, element = (Ints, I32) if integers else (Floats, F32)

    @intrinsic
    def add_sums(typing, sums, address):
        def generate(context, b, sig, args):
            if n == 1:
                zero = constant(kind.llvm, 0)
                some = b.insert_element(zero, emit_load(b, args[1], 0, element), I32(0))
            else:
                some = emit_load(b, args[1], 0, kind.llvm)
            return b.add(args[0], some) if integers else b.fadd(args[0], some)

        return kind(kind, types.intp), generate

    @intrinsic
    def store_sums(typing, address, sums):
        def generate(context, b, sig, args):
            value = b.sitofp(args[1], Floats.llvm) if integers else args[1]
            b.store(value, b.inttoptr(args[0], Floats.llvm.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(types.intp, kind), generate

    return add_sums, store_sums


@intrinsic
def as_floats(typing, values):
    """Vectors of integers as floats: exact below 2^24."""
    kind = several(Floats, values.n)

    def generate(context, b, sig, args):
        return emit_join(b, kind, [b.sitofp(b.extract_value(args[0], i), Floats.llvm) for i in range(kind.n)])

    return kind(values), generate


@intrinsic(prefer_literal=True)
def whole_zeros(typing, n):
    """n vectors of the integer 0."""
    kind = several(Ints, n.literal_value)
    return kind(n), lambda context, b, sig, args: ir.Constant(kind.llvm, [constant(Ints.llvm, 0)] * kind.n)


@cache
def picked_products(form: Form, part: int, n: int):
    """A word for 2:4: sums of (code - zero) * x over the kept columns of a half of a block, as floats: exact.

    Its arguments are those of float_products, x of int8.
    """
    quads, kind, dot = quads_of(part, 2), several(Floats, n), dot_form(form.width)

    @intrinsic
    def sums_of_products(typing, codes, x, zero):
        def generate(context, b, sig, args):
            codes, x, zero = args
            sums, of = ([constant(Ints.llvm, 0)] * n for _ in range(2))
            index = emit_bare_quads(b, codes, 2, quads, form.code_bytes)
            for place, (some, where) in enumerate(zip(emit_code_quads(b, codes, form, quads), index, strict=True)):
                for i in range(n):
                    picked = _pick_bytes(b, emit_load(b, x, BLOCK * i + 8 * place, ir.VectorType(I8, 8)), where)
                    sums[i] = emit_dot(b, dot, sums[i], some, picked)
                    of[i] = emit_dot(b, dot, of[i], constant(BYTES, 1), picked)
            whole = lambda number: b.sitofp(number, Floats.llvm)
            differences = [emit_fma(b, b.fneg(zero), whole(y), whole(x)) for x, y in zip(sums, of, strict=True)]
            return emit_join(b, kind, differences)

        return kind(types.intp, types.intp, zero), generate

    return sums_of_products


def _pick_bytes(b: ir.IRBuilder, eight: ir.Value, index: ir.Value) -> ir.Value:
    """Of every four bytes of the index the first two name one of the first four of `eight`, the others of the last."""
    if instruction := byte_shuffle():
        table = shuffle(b, eight, list(range(8)) * 8)
        return _shuffle_bytes(b, instruction, table, b.or_(index, ir.Constant(BYTES, [0, 0, 4, 4] * LANES)))
    return emit_chosen(b, [shuffle(b, eight, [k, k, 4 + k, 4 + k] * LANES) for k in range(4)], index)
