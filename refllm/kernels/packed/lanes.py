"""Words of the tile kernels: sixteen rows of a weight in the sixteen lanes of a vector.

A *tile* is sixteen rows. Its codes lie so that one 64-byte vector holds four consecutive columns of every row
(tiling.py draws it), so lane r of every value here belongs to row r, a product needs no sum across lanes, and its
activations are four bytes, or one float, repeated in every lane.

Kernels work on several tokens at once; a value of type Several(vector, n) is n vectors, one a token. Numba sees a
struct, LLVM registers. Sums that must not depend on their order are taken in float64: sixteen floats widened are
Several(Doubles, 2).

Here are the types, and words that repeat vectors and put them in order; lane_memory.py and lane_codes.py read and write
them, lane_math.py computes.
"""

from functools import cache

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from refllm.kernels.packed.simd import F32, I32, LANES, Doubles, Floats, Ints, constant, shuffle

WIDE = LANES // 2  # doubles in a vector
HALF_FLOATS = ir.VectorType(F32, WIDE)


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


def emit_split(b: ir.IRBuilder, kind: types.Type, value: ir.Value, n: int) -> list[ir.Value]:
    """The n vectors of a value; a single vector counts n times."""
    return [b.extract_value(value, i) for i in range(n)] if isinstance(kind, Several) else [value] * n


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
            return emit_join(b, kind, emit_split(b, values, args[0], values.n)[start : start + kind.n])

        return kind(values), generate

    return half


first_half, second_half = _half(second=False), _half(second=True)


@intrinsic(prefer_literal=True)
def repeated(typing, values, n):
    """Each of some vectors n times, then the next."""
    kind = several(values.vector, values.n * n.literal_value)

    def generate(context, b, sig, args):
        parts = emit_split(b, values, args[0], values.n)
        return emit_join(b, kind, [part for part in parts for _ in range(n.literal_value)])

    return kind(values, n), generate


@intrinsic(prefer_literal=True)
def over_again(typing, values, n):
    """Some vectors one after another, n times over."""
    kind = several(values.vector, values.n * n.literal_value)

    def generate(context, b, sig, args):
        return emit_join(b, kind, emit_split(b, values, args[0], values.n) * n.literal_value)

    return kind(values, n), generate


@intrinsic(prefer_literal=True)
def in_order(typing, values, n):
    """Sums over what `codes_run` of this n gave, lane by lane in the order of the codes."""

    def generate(context, b, sig, args):
        parts = emit_split(b, values, args[0], values.n)
        if n.literal_value % 2:
            return args[0]
        lanes = [i // 2 + i % 2 * LANES for i in range(2 * LANES)]
        take = lambda x, y, order: b.shuffle_vector(x, y, ir.Constant(Ints.llvm, order))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return emit_join(b, values, [take(*xy, half) for xy in pairs for half in (lanes[:LANES], lanes[LANES:])])

    return values(values, n), generate


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


@intrinsic
def splat(typing, x):
    """A float32, or a float64, in every lane."""
    vector = Floats if x == types.float32 else Doubles
    return vector(x), lambda context, b, sig, args: emit_splat(b, args[0], vector.llvm.count)
