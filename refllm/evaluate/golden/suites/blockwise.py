"""The suite quant/blockwise: nf4 and fp4 of weights. Ids are never reused: new cases take new numbers."""

import itertools
import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.checkpoint_bitsandbytes import TABLES, double, dynamic_map
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, dyadic_recipe, to_f32
from refllm.evaluate.golden.suites.rtn_notes import note
from refllm.evaluate.golden.suites.small_number_definition import encode

HEADER = [
    "Input w, f32 [out, in]. Params: table (nf4, fp4), block_size, double_quant. The weight is one row-major list; "
    "block b is its elements b block_size .. (b + 1) block_size - 1, the last block may be shorter.",
    "absmax = max |w| of the block. x = w (1 / max(absmax, 1e-38)), the reciprocal and the product rounded to float32; "
    "in a last block that is shorter x = w / max(absmax, 1e-38), and that floor is stored. codes u8 [out, in]: the "
    "nearest of the 16 values, exactly halfway (in float32) the lower value.",
    "absmax f32 [blocks]. With double_quant instead absmax u8 [blocks], nested_absmax f32 [ceil(blocks / 256)] and "
    "offset f32 [1], the mean of absmax: c = absmax - offset; nested_absmax = the largest |c| of 256; the code is the "
    "number of middles of neighbouring values of the dynamic map below c (1 / nested_absmax). Sums that give offset "
    "are exact here.",
    "w_hat = value[code] scale, f32 [out, in]; scale = absmax, or map[absmax] nested_absmax + offset, each step "
    "rounded to float32.",
    "NaN, infinities, anything that is not a matrix, and block sizes but 32, 64, 128 .. 4096 are rejected.",
]
NOTES = {
    "FlatBlocks": note(
        "LAYOUT", "Blocks run through the row-major weight, across the ends of rows.", "Right scales, wrong weights."
    ),
    "Table": note(
        "BASIC",
        "NF4 has 8 positive values, 0 and 7 negative; FP4 is not E2M1, and its codes are not in order of value.",
        "A model that is slightly or entirely wrong.",
    ),
    "Midpoint": note("ROUNDING", "Halfway between two values the lower one is taken."),
    "Reciprocal": note(
        "PRECISION", "Weights are multiplied by the rounded reciprocal of absmax, not divided by it.",
        "Codes that differ where a weight lies near a middle.",
    ),
    "ShortBlock": note("SHAPE", "The last block of a weight may be shorter; it has a scale of its own."),
    "ZeroBlock": note("DEGENERATE", "A block of zeros: scale 0, codes of 0, no NaN."),
    "DoubleQuant": note(
        "LAYOUT", "The mean of the scales is taken away first, blocks of scales are 256 long.",
        "Scales that are all positive use half of a signed map.",
    ),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "BadParams": note("MALFORMED", "A block size that bitsandbytes does not have."),
    "BadShape": note("SHAPE", "A weight is a matrix with elements."),
    "Random": note("BASIC", "Dyadic random weights."),
}  # fmt: skip
FLOOR = to_f32(Fraction(1e-38))
FORMS = {"nf4": "NF4", "fp4": "FP4_BNB"}


def quantize(w: list[list[float]], table: str, block: int, double_quant: bool) -> dict:
    """The op, weight by weight: {output: (dtype, nested)}."""
    flat, columns = [Fraction(x) for row in w for x in row], len(w[0])
    codes, absmax = [], []
    for first in range(0, len(flat), block):
        part = flat[first : first + block]
        largest = max(map(abs, part))
        floor = max(largest, FLOOR)
        whole = len(part) == block
        inverse = to_f32(1 / floor)
        scaled = [to_f32(x * inverse) if whole else to_f32(x / floor) for x in part]
        codes += [encode(FORMS[table], float(min(max(x, -1), 1))) for x in scaled]
        absmax.append(largest if whole else floor)
    scale, outputs = absmax, {"absmax": ("f32", list(map(float, absmax)))}
    if double_quant:
        offset = sum(absmax) / len(absmax)
        if to_f32(offset) != offset:
            raise Unclear("the mean of the scales is no float32")
        names, nested = double(list(map(float, absmax)), float(offset))
        values_of = [Fraction(x) for x in dynamic_map()]
        product = lambda b: to_f32(values_of[names[b]] * Fraction(nested[b // 256]))
        scale = [to_f32(product(b) + offset) for b in range(len(absmax))]
        outputs = {"absmax": ("u8", names), "nested_absmax": ("f32", nested), "offset": ("f32", [float(offset)])}
    numbers = [Fraction(x) for x in TABLES[table]]
    w_hat = [float(to_f32(numbers[c] * scale[i // block])) for i, c in enumerate(codes)]
    rows = lambda flat: [flat[i : i + columns] for i in range(0, len(flat), columns)]
    return outputs | {"codes": ("u8", rows(codes)), "w_hat": ("f32", rows(w_hat))}


def _case(id, comment, flags, w, table="nf4", block_size=32, double_quant=False, recipe=None) -> CaseSpec:
    outputs = quantize(w, table, block_size, double_quant)
    compare = {"class": "bits", "zero_sign": "ignore"}
    expected = {
        name: Output(compare if name == "w_hat" else {"class": "bits"}, values(dtype, nested))
        for name, (dtype, nested) in outputs.items()
    }
    params = {"table": table, "block_size": block_size, "double_quant": double_quant}
    return CaseSpec(id, comment, tuple(flags.split()), {"w": values("f32", w, recipe=recipe)}, expected, params=params)


def _random(id, comment, flags, shape, seed, **knobs) -> CaseSpec:
    flat = [float(x) for x in dyadic(seed, 16, -15, shape[0] * shape[1])]
    w = [flat[i : i + shape[1]] for i in range(0, len(flat), shape[1])]
    return _case(id, comment, flags, w, recipe=dyadic_recipe(seed, 16, -15), **knobs)


def _halves(table: str) -> list[list[float]]:
    """32 numbers with absmax 1: the 15 middles of neighbouring values, and one float32 step above each."""
    ordered = sorted({Fraction(x) for x in TABLES[table]})
    middles = [to_f32(a + b) / 2 for a, b in itertools.pairwise(ordered)]
    above = [m + Fraction(1, 2**26) if m >= 0 else m + Fraction(1, 2**25) for m in middles]
    found = [1.0, -1.0, *(float(to_f32(x)) for x in (*middles, *above))]
    return [found + [0.0] * (-len(found) % 32)]


def _beside_reciprocal() -> list[list[float]]:
    """A block of weights that lie on other sides of a middle when they are divided by absmax."""
    ordered = sorted({Fraction(x) for x in TABLES["nf4"]})
    middles = [to_f32(a + b) / 2 for a, b in itertools.pairwise(ordered)]
    for largest in dyadic(77, 16, -14, 200):
        largest, found = abs(largest), []
        inverse = to_f32(1 / largest)
        for m in middles:
            for step in range(-2, 3):
                w = to_f32(m * largest * (1 + step * Fraction(1, 2**24)))
                if (to_f32(w * inverse) > m) != (to_f32(w / largest) > m):
                    found.append(float(w))
        if len(found) >= 3:
            return [[float(largest), *found, *[0.0] * (31 - len(found))]]
    raise ValueError("no such block was found")


def _valid() -> list[CaseSpec]:
    every = lambda table: [[float(x) / 2 for x in TABLES[table]] + [0.5, -0.5, 0.25, -0.25] * 4]
    rows = [[1.0] * 20, [0.5] * 12 + [8.0] * 8, [-4.0, 1.0] * 10, [0.25] * 20]
    scales = [[(-1.0) ** i * (i // 16 * 8 + 8) / 16 for i in range(16 * j, 16 * j + 16)] for j in range(8)]
    return [
        _case(1, "all values, halved", "Table", every("nf4")),
        _case(2, "all values of FP4, halved", "Table", every("fp4"), "fp4"),
        _case(3, "middles, and one step above them", "Midpoint Table", _halves("nf4")),
        _case(4, "the same of FP4", "Midpoint Table", _halves("fp4"), "fp4"),
        _case(5, "rows of 20 in blocks of 32: two and a half blocks", "FlatBlocks ShortBlock", rows),
        _case(6, "a block of zeros beside another", "ZeroBlock", [[0.0, -0.0] * 16, [1.0, -3.0] * 16]),
        _case(7, "zeros alone, shorter than a block", "ZeroBlock ShortBlock", [[0.0] * 3]),
        _case(8, "the smallest numbers: the floor of 1e-38 divides", "ZeroBlock", [[2.0**-149, -(2.0**-140)] * 16]),
        _case(14, "a divided weight lies on the other side of a middle", "Reciprocal", _beside_reciprocal()),
        _random(9, "4 x 48", "Random FlatBlocks", (4, 48), 9000),
        _random(10, "FP4, 3 x 40 in blocks of 64", "Random FlatBlocks ShortBlock", (3, 40), 9001, table="fp4",
                block_size=64),
        _case(11, "scales 1/2 .. 4 in steps: their mean is 2.25", "DoubleQuant", scales, double_quant=True),
        _random(12, "8 blocks", "DoubleQuant Random", (8, 32), 9002, double_quant=True),
        _random(13, "FP4, 4 blocks", "DoubleQuant Random", (2, 64), 9003, table="fp4", double_quant=True),
    ]  # fmt: skip


def _rejected() -> list[CaseSpec]:
    def bad(id, comment, flag, error, w, block_size=32):
        params = {"table": "nf4", "block_size": block_size, "double_quant": False}
        return CaseSpec(id, comment, (flag,), {"w": values("f32", w)}, result="invalid", error=error, params=params)

    return [
        bad(30, "NaN", "NonFinite", "value", [[1.0, math.nan]]),
        bad(31, "-Inf", "NonFinite", "value", [[1.0, -math.inf]]),
        bad(32, "blocks of 48", "BadParams", "value", [[1.0, 2.0]], 48),
        bad(33, "blocks of 0", "BadParams", "value", [[1.0, 2.0]], 0),
        bad(34, "a vector", "BadShape", "shape", [1.0, 2.0]),
    ]


def suite() -> SuiteSpec:
    """The suite quant/blockwise."""
    head = manifest_head(
        __name__,
        "quant/blockwise",
        "NF4 and FP4 in blocks of the flat weight, scales in float32 or as 8-bit codes",
        HEADER,
        "lessons/14-codebooks.md",
    )
    source = {"kind": "first_principles", "name": "the header above, in exact fractions rounded once per operation"}
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in (_valid(), _rejected())])
