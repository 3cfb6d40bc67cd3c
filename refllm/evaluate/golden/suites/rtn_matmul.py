"""The suite quant/rtn_matmul: products with packed weights, summed in exact fractions."""

from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, Values, manifest_head, values
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, pack_low_first, splitmix64, to_f64
from refllm.evaluate.golden.suites.rtn_notes import LAYOUT, note

HEADER = [
    "Inputs: x f32 [tokens, columns]; packed u8 [out, ceil(columns * bits / 8)]; scale [out, groups], [1, 1] per "
    "tensor; "
    "packed_zero_point u8 [out, ceil(groups * bits / 8)] unless symmetric, when every zero point is 2^(bits-1). "
    "Layouts and "
    "params are those of quant/rtn; columns is a param because the packed width does not tell it.",
    "Output: y f32 [tokens, out], y = x w^T with w = scale * (codes - zero_point).",
    "Where x is the identity every product is exact and y is compared bit for bit (the sign of zero aside). "
    "Elsewhere y may be "
    "summed in any order, and the zero point may be taken out of the sum, in float32 or better: the error is at most "
    "gamma_k "
    "times y_abs = sum |x| scale (code + zero_point), with k = columns + 3 roundings a term can go through.",
]

NOTES = {
    name: LAYOUT[name]
    for name in (
        "NibbleOrder",
        "BitStream",
        "OddSize",
        "OffsetBinary",
        "Transposed",
        "Granularity",
        "ZeroPoint",
        "ZeroPointPacking",
        "UnsignedSubtract",
    )
} | {
    "Random": note("BASIC", "Random codes, scales and activations."),
    "GroupBoundary": note(
        "LAYOUT", "Scales of neighbouring groups differ by factors: each code needs the scale of its own group."
    ),
    "Saturation": note(
        "OVERFLOW",
        "The largest activations meet the largest codes: pairwise sums leave the range of int16.",
        "Saturated partial sums; ordinary data never shows it.",
        "ikawrakow/ik_llama.cpp/pull/427",
    ),
    "Accumulator": note(
        "PRECISION",
        "Sums beyond float16's range and precision: accumulate in float32.",
        "Infinities, or sums that stop growing.",
    ),
    "ExactSums": note(
        "PRECISION",
        "Every product and partial sum is an integer below 2^24: float32 gets them exactly, in any order.",
        "Activations or products were rounded to fewer bits than float32 has.",
    ),
    "TokenIndependence": note(
        "BASIC",
        "One token is 10^6 times the others: no token may change another's result.",
        "Batch size changes the output.",
    ),
    "Subnormal": note("SUBNORMAL", "Scales that are float16 subnormals.", "Rows of zeros where scales are flushed."),
    "Float32Scale": note("PRECISION", "The scale is float32."),
    "PaddingBits": note("MALFORMED", "The unused bits of a row's last byte are set: reject it, or ignore them."),
    "NonFinite": note("NON_FINITE", "A NaN or infinite scale is no weight."),
    "BadShape": note("SHAPE", "Arrays whose shapes contradict each other or the params."),
    "EmptyBatch": note("SHAPE", "No tokens: reject it, or return no rows."),
}


def _case(
    id, comment, flags, codes, scale, zero, x, *, bits=4, group_size=-1, scale_dtype="f16", exact=False, **options
):
    """One product of rows of numbers; zero None is symmetric, `packed` in the options replaces the packed rows."""
    rows, columns, symmetric = len(codes), len(codes[0]), zero is None
    g = columns if group_size <= 0 else group_size
    exact_scale = [[Fraction(s) for s in row] for row in scale]
    at = lambda table, r, c: table[0][0] if group_size == 0 else table[r][c // g]
    zeros = lambda r, c: 1 << (bits - 1) if symmetric else at(zero, r, c)
    term = lambda t, r, c: Fraction(x[t][c]) * at(exact_scale, r, c)
    y, y_abs = [], []
    for t in range(len(x)):
        y.append([sum(term(t, r, c) * (codes[r][c] - zeros(r, c)) for c in range(columns)) for r in range(rows)])
        y_abs.append(
            [sum(abs(term(t, r, c)) * (codes[r][c] + zeros(r, c)) for c in range(columns)) for r in range(rows)]
        )
    packing = {"bits": bits, "order": "low_first"} if bits != 8 else None
    inputs = {
        "x": values("f32", [[float(v) for v in row] for row in x], recipe=options.get("recipe")),
        "packed": values("u8", options.get("packed") or [pack_low_first(row, bits) for row in codes], packing=packing),
        "scale": values(scale_dtype, [[float(s) for s in row] for row in scale]),
    }
    if not symmetric:
        inputs["packed_zero_point"] = values("u8", [pack_low_first(row, bits) for row in zero], packing=packing)
    params = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "columns": columns}
    return CaseSpec(
        id,
        comment,
        tuple(flags.split()),
        inputs,
        _expected(y, y_abs, columns, exact),
        options.get("result", "valid"),
        None,
        params,
    )


def _expected(y, y_abs, columns, exact) -> dict[str, Output]:
    if exact:
        return {
            "y": Output({"class": "bits", "zero_sign": "ignore"}, values("f32", [[float(v) for v in row] for row in y]))
        }
    compare = {"class": "dot_bound", "k": columns + 3, "factor": 1, "abs_ref": "y_abs", "unit": "f32"}
    as_f64 = lambda rows: values("f64", [[float(to_f64(v)) for v in row] for row in rows])
    return {"y": Output(compare, as_f64(y)), "y_abs": Output({"class": "bits"}, as_f64(y_abs))}


def _random(id, comment, flags, tokens, rows, columns, *, bits, group_size, affine):
    """Random codes, power-of-two-free scales, dyadic activations."""
    seed = 100 * id
    g = columns if group_size <= 0 else group_size
    groups = columns // g
    scales = (1, 1) if group_size == 0 else (rows, groups)
    take = lambda stream, r, c: [stream[i * c : (i + 1) * c] for i in range(r)]
    codes = take([z >> (64 - bits) for z in splitmix64(seed, rows * columns)], rows, columns)
    scale = take(
        [(1024 + (z >> 54)) / 2.0 ** (14 + i % 3) for i, z in enumerate(splitmix64(seed + 1, scales[0] * scales[1]))],
        *scales,
    )
    zero = take([z >> (64 - bits) for z in splitmix64(seed + 2, scales[0] * scales[1])], *scales) if affine else None
    recipe = dyadic_recipe(seed + 3, 20, -17)
    x = take(dyadic(seed + 3, 20, -17, tokens * columns), tokens, columns)
    return _case(id, comment, flags, codes, scale, zero, x, bits=bits, group_size=group_size, recipe=recipe)


def _identity(n: int) -> list[list[int]]:
    return [[int(r == c) for c in range(n)] for r in range(n)]


def _exact_cases() -> list[CaseSpec]:
    spread = lambda bits, r, c: [[(5 * i * i + 3 * i * (j + 1) + j) % (1 << bits) for j in range(c)] for i in range(r)]
    return [
        _case(1, "codes 0 to 15 in order", "NibbleOrder UnsignedSubtract", [list(range(8)), list(range(8, 16))], [[1],
              [1]], [[0], [0]], _identity(8), exact=True),
        _case(2, "2-bit codes", "BitStream UnsignedSubtract", spread(2, 3, 8), [[1], [0.5], [3]], [[1], [2], [3]],
              _identity(8), bits=2, exact=True),
        _case(3, "3-bit codes in order, rows of 24 bits", "BitStream UnsignedSubtract", [list(range(8)), list(range(7,
              -1, -1))], [[1], [0.75]], [[3], [4]], _identity(8), bits=3, exact=True),
        _case(4, "every kind of 8-bit code", "UnsignedSubtract OffsetBinary", [[0, 1, 127, 128, 129, 254, 255, 64],
              [255, 0, 128, 127, 1, 2, 3, 4]], [[1], [0.125]], None, _identity(8), bits=8, exact=True),
        _case(5, "symmetric: the zero point is 8", "OffsetBinary UnsignedSubtract", [[8, 9, 7, 15], [1, 0, 8, 12]],
              [[1], [2]], None, _identity(4), exact=True),
        _case(6, "zero points 0, 15 and between", "ZeroPoint UnsignedSubtract", [[0, 1, 14, 15]] * 4, [[1]] * 4, [[0],
              [15], [1], [14]], _identity(4), exact=True),
        _case(7, "3 groups a row: an odd number of zero points", "ZeroPointPacking GroupBoundary", spread(4, 3, 6),
              [[1, 8, 64], [64, 1, 8], [8, 64, 1]], [[1, 15, 7], [0, 9, 14], [12, 3, 5]], _identity(6), group_size=2,
              exact=True),
        _case(8, "7 columns: rows end in half a byte", "OddSize NibbleOrder", spread(4, 3, 7), [[1], [2], [4]], [[5],
              [6], [7]], _identity(7), exact=True),
        _case(9, "5 columns of 3 bits", "OddSize BitStream", spread(3, 4, 5), [[1], [2], [4], [8]], [[1], [2], [3],
              [4]], _identity(5), bits=3, exact=True),
        _case(10, "per tensor", "Granularity", spread(4, 3, 4), [[0.375]], [[6]], _identity(4), group_size=0,
              exact=True),
        _case(11, "scales are float16 subnormals", "Subnormal", spread(4, 2, 4), [[2.0**-24], [5 * 2.0**-24]], [[7],
              [3]], _identity(4), exact=True),
        _case(12, "the padding bits are set", "PaddingBits OddSize", [[1, 2, 3], [4, 5, 6]], [[1], [1]], [[2], [2]],
              _identity(3), exact=True, packed=[[0x21, 0xF3], [0x54, 0xF6]], result="acceptable"),
        _case(13, "float32 scale", "Float32Scale", [[0, 15, 3, 9]], [[float.fromhex("0x1.555556p-3")]], None, [[1,
              0.5, -0.25, 0.125]], scale_dtype="f32"),
    ]  # fmt: skip


def _bounded_cases() -> list[CaseSpec]:
    huge = [
        [1e6 * (-1) ** c for c in range(32)],
        [0.5 + c / 64 for c in range(32)],
        [2.0**-10 * (c - 16) for c in range(32)],
    ]
    mixed = [[(7 * r + 3 * c) % 16 for c in range(32)] for r in range(4)]
    return [
        _random(20, "4 bits in groups of 32", "Random GroupBoundary Transposed", 3, 8, 128, bits=4, group_size=32,
                affine=True),
        _random(21, "one token, 8 bits, one scale a row", "Random", 1, 12, 256, bits=8, group_size=-1, affine=False),
        _random(22, "3 bits in groups of 24", "Random BitStream GroupBoundary", 2, 6, 72, bits=3, group_size=24,
                affine=True),
        _random(23, "2 bits in groups of 16", "Random BitStream GroupBoundary", 2, 6, 64, bits=2, group_size=16,
                affine=True),
        _random(24, "per tensor, 61 columns", "Random Granularity OddSize", 4, 3, 61, bits=4, group_size=0,
                affine=False),
        _case(25, "127 and -127 on codes 255 and 0", "Saturation UnsignedSubtract", [[255] * 64, [0] * 64, [255,
              0] * 32], [[1]] * 3, [[0], [255], [128]], [[127] * 64, [-127] * 64, [127, -127] * 32], bits=8),
        _case(26, "sums of 10^6 and more", "Accumulator", [[15] * 256, [15, 14] * 128], [[0.5]] * 2, [[0], [1]],
              [[2048 + c % 3 for c in range(256)]]),
        _case(27, "integers: 14-bit activations, 4-bit codes", "ExactSums", mixed[:3], [[1]] * 3, [[0], [7], [15]],
              [[2 * ((c * c * 37 + 11 * c) % 8192) - 8191 for c in range(32)]], exact=True),
        _case(28, "a token of 10^6 beside small ones", "TokenIndependence", mixed, [[0.25], [0.5], [1], [2]], [[3],
              [8], [0], [15]], huge),
    ]  # fmt: skip


def _rejected_cases() -> list[CaseSpec]:
    u8 = lambda rows: values("u8", rows)
    x, packed, scale, zero = values("f32", [[1, 2, 3, 4]]), u8([[0x21, 0x43]]), values("f16", [[1]]), u8([[3]])
    good = {"x": x, "packed": packed, "scale": scale, "packed_zero_point": zero}

    def bad(id, comment, flags, error, **replaced):
        params = {"bits": 4, "group_size": -1, "symmetric": False, "columns": 4}
        return CaseSpec(id, comment, (flags,), good | replaced, result="invalid", error=error, params=params)

    empty = Values("f32", x.array[:0])
    nothing = {"y": Output({"class": "bits"}, Values("f32", x.array[:0, :1]))}
    params = {"bits": 4, "group_size": -1, "symmetric": False, "columns": 4}
    return [
        bad(40, "x has 3 columns", "BadShape", "shape", x=values("f32", [[1, 2, 3]])),
        bad(41, "packed rows are one byte short", "BadShape", "shape", packed=u8([[0x21]])),
        bad(42, "two scales a row, one group", "BadShape", "shape", scale=values("f16", [[1, 1]])),
        bad(43, "a NaN scale", "NonFinite", "value", scale=values("f16", [[float("nan")]])),
        bad(44, "an infinite scale", "NonFinite", "value", scale=values("f16", [[float("inf")]])),
        bad(45, "zero points of two rows, weights of one", "BadShape", "shape", packed_zero_point=u8([[3], [3]])),
        CaseSpec(46, "no tokens", ("EmptyBatch",), good | {"x": empty}, nothing, "acceptable", None, params),
    ]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite quant/rtn_matmul."""
    head = manifest_head(
        __name__,
        "quant/rtn_matmul",
        "Products of float32 activations with packed integer weights",
        HEADER,
        "lessons/03-rounding-to-a-grid.md",
        op="quant.rtn.matmul",
    )
    source = {"kind": "first_principles", "name": "the header above, in exact fractions"}
    groups = (_exact_cases(), _bounded_cases(), _rejected_cases())
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in groups])
