"""Emitters of the products of bytes: a block's codes, four columns at a time, times activations, added to sums.

Sums of four byte products are written in several ways, chosen by the features of Numba's target (which the environment
variable NUMBA_CPU_FEATURES may set apart from this machine's): as vpdpbusd (AVX512-VNNI, AVX-VNNI), as vpmaddubsw +
vpmaddwd (AVX2; pairs are added in 16 bits, which products of 8-bit codes could overflow), as ARM's usdot or sdot, or in
the 16-bit form that LLVM turns into multiply-adds of pairs on any processor. All give the same integers. Look-ups have
a portable form, too.
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from refllm.kernels.packed import tables
from refllm.kernels.packed.lane_memory import emit_load
from refllm.kernels.packed.lanes import emit_splat, emit_together
from refllm.kernels.packed.simd import I8, I16, I32, LANES, Ints, constant, shuffle, target_features
from refllm.kernels.packed.tiling import BLOCK, OPENED, PLANES, Form

BYTES = ir.VectorType(I8, 4 * LANES)
SHORTS = ir.VectorType(I16, 2 * LANES)
QUADS = BLOCK // 4  # fours of columns in a block
X86_BYTE_DOT, X86_HALF_DOT, X86_BYTE_PAIRS, PORTABLE = "vpdpbusd", "vpdpbusd of 32 bytes", "vpmaddubsw", "portable"
ARM_DOT, ARM_WIDE_DOT, ARM_MIXED_DOT = "sdot", "sdot of 8 bits", "usdot"


def dot_form(bits: int) -> str:
    """How Numba's target adds four byte products of codes of so many bits."""
    features = target_features()
    if {"+avx512bw", "+avx512vnni"} <= features:
        return X86_BYTE_DOT
    if "+avxvnni" in features:
        return X86_HALF_DOT
    if "+i8mm" in features:
        return ARM_MIXED_DOT
    if "+dotprod" in features:
        return ARM_DOT if bits < 8 else ARM_WIDE_DOT
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
    name = shuffle_of_sixteen()
    return (name, 16) if name else None


def shuffle_of_sixteen() -> str | None:
    """The same of 16 bytes; an index of 128 or more gives 0."""
    features = target_features()
    if "+neon" in features:
        return "llvm.aarch64.neon.tbl1.v16i8"
    return "llvm.x86.ssse3.pshuf.b.128" if "+ssse3" in features else None


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
    if form in (X86_BYTE_DOT, X86_HALF_DOT):
        return _dot_of_words(b, LANES if form == X86_BYTE_DOT else LANES // 2, total, codes, x)
    if form == X86_BYTE_PAIRS:
        return b.add(total, _emit_pair_sums(b, _emit_pairs(b, codes, x), constant(SHORTS, 1)))
    if form in (ARM_DOT, ARM_MIXED_DOT):
        return _dot_by_quarters(b, form, total, codes, x)
    if form == ARM_WIDE_DOT:  # code = (code - 128) + 64 + 64
        signed, half = b.xor(codes, constant(BYTES, 128)), constant(BYTES, 64)
        for part in (signed, half, half):
            total = _dot_by_quarters(b, ARM_DOT, total, part, x)
        return total
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


def _dot_of_words(b: ir.IRBuilder, lanes: int, total: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """emit_dot by vpdpbusd of so many lanes."""
    # The operands are declared as LLVM up to 20 had them; later versions upgrade the call when they read it.
    words = ir.VectorType(I32, lanes)
    call = emit_function(b, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", *[words] * 4)
    operands = total, b.bitcast(codes, Ints.llvm), b.bitcast(x, Ints.llvm)
    parts = zip(*[emit_parts(b, operand, lanes) for operand in operands], strict=True)
    return emit_together(b, [b.call(call, part) for part in parts])


def _emit_pairs(b: ir.IRBuilder, codes: ir.Value, x: ir.Value) -> ir.Value:
    """codes[2 r] x[2 r] + codes[2 r + 1] x[2 r + 1], unsigned times signed bytes, in 16 bits."""
    bytes_, shorts = ir.VectorType(I8, 2 * LANES), ir.VectorType(I16, LANES)
    call = emit_function(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, bytes_, bytes_)
    halves = zip(emit_parts(b, codes, 2 * LANES), emit_parts(b, x, 2 * LANES), strict=True)
    return emit_together(b, [b.call(call, half) for half in halves])


def _emit_pair_sums(b: ir.IRBuilder, pairs: ir.Value, factors: ir.Value) -> ir.Value:
    """pairs[2 r] factors[2 r] + pairs[2 r + 1] factors[2 r + 1], 16-bit numbers, in 32 bits."""
    shorts, words = ir.VectorType(I16, LANES), ir.VectorType(I32, LANES // 2)
    call = emit_function(b, "llvm.x86.avx2.pmadd.wd", words, shorts, shorts)
    halves = zip(emit_parts(b, pairs, LANES), emit_parts(b, factors, LANES), strict=True)
    return emit_together(b, [b.call(call, half) for half in halves])


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
    if adds_pairs():
        products = emit_pair_dots(b, form, quads, codes, x, len(sums))
        return [b.add(*both) for both in zip(sums, products, strict=True)]
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


def adds_pairs() -> bool:
    """Whether Numba's target multiplies bytes by vpmaddubsw."""
    return dot_form(4) == X86_BYTE_PAIRS


def emit_pair_dots(
    b: ir.IRBuilder, form: Form, quads: range, codes: list, x: ir.Value, n: int, factors: ir.Value | None = None
) -> list[ir.Value]:
    """The products that emit_dots adds to n sums, where pairs of columns are added in 16 bits as far as these reach.

    Codes of 8 bits are multiplied as two of 4. factors : what all products of codes of fewer bits are multiplied with,
    a 16-bit number of every row, twice in its lane.
    """
    sums, tokens = [constant(Ints.llvm, 0)] * n, n // len(codes)
    (bits, begins), width = _few_bits(form), PLANES[form.bits][0]
    by_vectors = sorted(quads, key=lambda quad: quad % width)  # or LLVM keeps what it has read of codes on the stack
    reach = 0x7FFF // (2 * 128 * ((1 << bits) - 1))
    for low in begins:
        if low:
            b.fence("acq_rel", "singlethread")  # or it keeps all of x
        factor = constant(SHORTS, 1 << low) if factors is None else factors
        for start in range(0, len(quads), reach):
            pairs = [None] * n
            for quad in by_vectors[start : start + reach]:
                found = [_emit_few_bits(b, form, place, quad, low) for place in codes]
                for i in range(tokens):
                    four = emit_four(b, x, BLOCK * i + 4 * quad)
                    for at, some in zip(range(i, n, tokens), found, strict=True):
                        pair = _emit_pairs(b, some, four)
                        pairs[at] = pair if pairs[at] is None else _emit_kept(b, b.add(pairs[at], pair))
            sums = [b.add(total, _emit_pair_sums(b, pair, factor)) for total, pair in zip(sums, pairs, strict=True)]
    return sums


def _few_bits(form: Form) -> tuple[int, tuple[int, ...]]:
    """Bits of a code that are multiplied at once, and the lowest of them each time."""
    return (4, (0, 4)) if form.width == 8 else (form.width, (0,))


def _emit_few_bits(b: ir.IRBuilder, form: Form, codes: ir.Value, quad: int, low: int) -> ir.Value:
    """Codes of four columns, or, of those of 8 bits, four bits from bit `low` on."""
    if form.layout == OPENED:
        return emit_load(b, codes, 64 * (quad + (QUADS if low else 0)), BYTES)
    (found,) = emit_code_quads(b, codes, form, [quad])
    if form.width < 8:
        return found
    moved = b.bitcast(b.lshr(b.bitcast(found, SHORTS), constant(SHORTS, low)), BYTES)
    return b.and_(moved, constant(BYTES, 15))


def emit_bytes(b: ir.IRBuilder, form: Form, codes: ir.Value) -> list[ir.Value]:
    """A block's codes, opened (tiling.OPENED)."""
    _, begins = _few_bits(form)
    return [_emit_few_bits(b, form, codes, quad, low) for low in begins for quad in range(QUADS)]


def _emit_kept(b: ir.IRBuilder, sums: ir.Value) -> ir.Value:
    """Sums in 16 bits that LLVM takes as they are: it would add in another order, and run out of registers."""
    half = ir.VectorType(I16, LANES)
    same = ir.InlineAsm(ir.FunctionType(half, [half]), "", "=x,0")
    return emit_together(b, [b.call(same, [part]) for part in emit_parts(b, sums, LANES)])


def emit_four(b: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    """Four bytes behind an address, repeated in every lane."""
    return b.bitcast(emit_splat(b, emit_load(b, address, offset, I32)), BYTES)


def emit_picked_bytes(b: ir.IRBuilder, eight: ir.Value, index: ir.Value) -> ir.Value:
    """Of every four bytes of the index the first two name one of the first four of `eight`, the others of the last."""
    if instruction := byte_shuffle():
        table = shuffle(b, eight, list(range(8)) * 8)
        return _shuffle_bytes(b, instruction, table, b.or_(index, ir.Constant(BYTES, [0, 0, 4, 4] * LANES)))
    return emit_chosen(b, [shuffle(b, eight, [k, k, 4 + k, 4 + k] * LANES) for k in range(4)], index)
