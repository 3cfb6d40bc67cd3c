"""The suite quant/small_float: weights as FP8 or FP6 with a scale per block. Ids are never reused or renumbered."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, dyadic_recipe, f16_margin, first_clear, to_f16, to_f32
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Input w, f32 [out, in]. Params: table (FP8_E4M3FN, FP6_E3M2, FP6_E2M3), block_rows, block_columns (the last "
    "blocks of a side may be smaller), scale_dtype. Per block: scale = float32(amax / largest number of the table), "
    "1 for a block of zeros, rounded to scale_dtype; x = float32(w / scale); code = the number nearest to x, a tie to "
    "the even mantissa, beyond the largest the largest, with the sign of w.",
    "Outputs: codes u8 [out, in] (sign, exponent, mantissa), scale [blocks of rows, blocks of columns], w_hat f32 = "
    "number * scale. NaN, infinities and a scale beyond float16 are rejected.",
]  # fmt: skip
NOTES = {
    "Blocks": note("LAYOUT", "A block spans rows and columns; the last ones are smaller, not shifted."),
    "Largest": note("BASIC", "amax goes to the largest number: 448, 28 and 7.5, not to the largest power of two."),
    "TieToEven": note("ROUNDING", "A tie goes to the even mantissa."),
    "ScaleRounded": note("PRECISION", "Codes are computed with the float16 scale that is stored; what is then beyond "
                         "the largest number saturates."),
    "Subnormal": note("SUBNORMAL", "Below the least normal number the step stays."),
    "ZeroBlock": note("DEGENERATE", "A block of zeros has scale 1, not NaN."),
    "NegativeZero": note("SIGNED_ZERO", "What rounds to zero from below is the code of -0."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "Random": note("BASIC", "Dyadic random weights, every decision well clear of its boundary."),
}  # fmt: skip
# table -> (bits of exponent, bits of mantissa, bias, largest number)
FORMS = {"FP8_E4M3FN": (4, 3, 7, 448), "FP6_E3M2": (3, 2, 3, 28), "FP6_E2M3": (2, 3, 1, Fraction(15, 2))}
MARGIN = Fraction(1, 1000)


def _code(x: Fraction, negative: bool, table: str, margins: list) -> tuple[int, Fraction]:
    """Code and value of one number."""
    exponent_bits, mantissa_bits, bias, largest = FORMS[table]
    size, exponent = min(abs(x), Fraction(largest)), 1
    while exponent + 1 < 1 << exponent_bits and size >= Fraction(2) ** (exponent + 1 - bias):
        exponent += 1
    step = Fraction(2) ** (exponent - bias - mantissa_bits)
    steps = size / step
    below = steps.numerator // steps.denominator
    rest = steps - below
    margins.append(abs(rest - Fraction(1, 2)))
    steps = below + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2))
    code = steps if exponent == 1 else ((exponent - 1) << mantissa_bits) + steps
    sign = -1 if negative else 1
    return code | negative << (exponent_bits + mantissa_bits), sign * steps * step


def _case(id, comment, flags, w, recipe=None, *, table, rows=1, columns, scale_dtype="float32", near=False) -> CaseSpec:
    margins = []
    size = (len(w), len(w[0]))
    codes, w_hat = ([[0] * size[1] for _ in w] for _ in range(2))
    scales = []
    for i in range(0, size[0], rows):
        scales.append([])
        for j in range(0, size[1], columns):
            block = [(r, c) for r in range(i, min(i + rows, size[0])) for c in range(j, min(j + columns, size[1]))]
            amax = max(abs(Fraction(w[r][c])) for r, c in block)
            scale = to_f32(amax / FORMS[table][3]) if amax else Fraction(1)
            if scale_dtype == "float16":
                margins.append(f16_margin(scale))
                scale = to_f16(scale)
            scales[-1].append(float(scale))
            for r, c in block:
                negative = math.copysign(1, w[r][c]) < 0
                codes[r][c], value = _code(to_f32(Fraction(w[r][c]) / scale), negative, table, margins)
                w_hat[r][c] = math.copysign(float(to_f32(value * scale)), w[r][c])
    if not near and min(margins) < MARGIN:
        raise Unclear(f"case {id}: too near to a boundary")
    bits = {"class": "bits"}
    expected = {
        "codes": Output(bits, values("u8", codes)),
        "scale": Output(bits, values("f16" if scale_dtype == "float16" else "f32", scales)),
        "w_hat": Output(bits, values("f32", w_hat)),
    }
    params = {"table": table, "block_rows": rows, "block_columns": columns, "scale_dtype": scale_dtype}
    return CaseSpec(id, comment, tuple(flags.split()), {"w": values("f32", w, recipe=recipe)}, expected, params=params)


def _random(id, comment, flags, shape, **knobs) -> CaseSpec:
    def weights(seed):
        flat = [float(x) for x in dyadic(seed, 12, -9, shape[0] * shape[1])]
        return [flat[i : i + shape[1]] for i in range(0, len(flat), shape[1])]

    made = lambda seed: _case(id, comment, flags, weights(seed), dyadic_recipe(seed, 12, -9), **knobs)
    return first_clear(made, 1000 * id)


def suite() -> SuiteSpec:
    """The suite quant/small_float."""
    head = manifest_head(
        __name__,
        "quant/small_float",
        "FP8 and FP6 weights with a scale per block",
        HEADER,
        "lessons/04-number-formats.md",
    )
    e4, e3, e2 = ({"table": name} for name in FORMS)
    invalid = lambda id, value: CaseSpec(
        id, str(value), ("NonFinite",), {"w": values("f32", [[1.0, value]])}, result="invalid", error="value",
        params={"table": "FP8_E4M3FN", "block_rows": 1, "block_columns": 2, "scale_dtype": "float32"},
    )  # fmt: skip
    half = dict(scale_dtype="float16")
    cases = [
        _random(1, "E4M3, blocks of 2 x 4 in 3 x 6", "Blocks Largest Random", (3, 6), **e4, rows=2, columns=4),
        _random(2, "E3M2, a float16 scale a row", "Largest Random", (3, 12), **e3, columns=12, **half),
        _random(3, "E2M3, a float16 scale a row", "Largest Random", (3, 12), **e2, columns=12, **half),
        _case(4, "E4M3, scale 1: ties", "TieToEven", [[448, 17, 19, 1.0625, 1.1875, -17, -19, 232]], **e4, columns=8,
              near=True),
        _case(5, "E3M2, scale 1: subnormals", "Subnormal TieToEven",
              [[28, 0.0625, 0.125, 0.09375, 0.03125, 0.21875, 1]], **e3, columns=7, near=True),
        _case(6, "a block of zeros, and -0", "ZeroBlock NegativeZero",
              [[0.0, -0.0, 0.0, 0.0, 448, -0.00048828125, 3, 7]], **e4, columns=4),
        _case(7, "E2M3: the float16 scale decides a tie", "ScaleRounded",
              [[7.5 + 7.5 / 4096, 1.0625 + 1.0625 / 8192]], **e2, columns=2, near=True, **half),
        invalid(20, math.nan),
        invalid(21, -math.inf),
    ]  # fmt: skip
    source = {"kind": "first_principles", "name": "the header above in exact fractions"}
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases)])
