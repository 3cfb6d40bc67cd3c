"""The suite formats/stochastic: stochastic rounding, judged by what n answers have in common. Ids are never reused."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, values
from refllm.evaluate.golden.suites import number_definition
from refllm.evaluate.golden.suites.small_number_definition import (
    INTEGERS,
    chances,
    dyadic_f32,
    grid,
    largest_step,
    signed_code,
)
from refllm.evaluate.golden.suites.small_number_notes import STOCHASTIC
from refllm.evaluate.golden.suites.small_numbers import FORMAT_TEXT, head_of

FORMATS = ("INT2", "INT4", "INT8", "TERNARY", "FP4_E2M1", "FP6_E2M3", "FP6_E3M2", "FP8_E4M3FN", "FP8_E5M2",
           "FP8_E4M3FNUZ", "BF16")  # fmt: skip
N, ALPHA = 16384, 1e-6
PARTS = [Fraction(n, 16) for n in (2, 5, 8, 15)]
HEADER = [
    "Input x: f32 [k]. Params: format, n, seed. Outputs: codes [k, n], u8 (BF16: u16), n independent roundings of each "
    "x, and x_hat [k, n], f32, the numbers of these codes. Any generator will do; the seed is only there so that an "
    "answer can be had again.",
    "x between the neighbours a and b of the format becomes b with the probability (x - a) / (b - a), else a. A number "
    "of the format stays. What goes up from the largest number is the largest.",
    *FORMAT_TEXT[:1],
    "FP and BF16 codes are those of formats/small_floats.",
    f"A right implementation fails a row with a probability of about {ALPHA:g}: codes by Pearson's chi-squared, a code "
    "that cannot be must not be; x_hat by the mean, whose bound is Hoeffding's, step sqrt(ln(2 / alpha) / (2 n)).",
]


def suite() -> SuiteSpec:
    """The suite formats/stochastic."""
    head = head_of("stochastic", "stochastic", "Stochastic rounding to small formats", "stochastic")
    source = {"kind": "first_principles", "name": "the header above, in exact fractions"}
    groups = []
    for place, name in enumerate(FORMATS):
        params = {"format": name, "n": N, "seed": 100 + place}
        groups.append(({"params": params, "source": source}, _cases(name, 100 * (place + 1))))
    bad = CaseSpec(1, "no such format", ("BadParams",), {"x": values("f32", [1.0])}, result="invalid", error="any",
                   params={"format": "INT9", "n": 4, "seed": 1})  # fmt: skip
    return SuiteSpec(head | {"header": HEADER}, STOCHASTIC, [*groups, ({"params": {}, "source": source}, [bad])])


def _cases(name: str, base: int) -> list[CaseSpec]:
    top, whole = largest_step(name), name in INTEGERS
    mantissa = 0 if whole else number_definition.FORMATS[name][1]
    middle = 0 if top == 1 else (top // 2) | 1
    cases = [
        _grid_points(base, name),
        _between(base + 1, "above zero", "Mean Neighbours", name, middle, False),
        _between(base + 2, "below zero", "Negative Mean Neighbours", name, middle, True),
        _beyond(base + 5, name),
    ]
    if not whole:
        cases.append(_between(base + 3, "between zero and the smallest number", "Subnormal", name, 0, False))
        edge = ((middle >> mantissa) << mantissa) - 1
        cases.append(_between(base + 4, "up to a power of two", "BinadeEdge", name, edge, False))
    if name == "INT8":
        cases.append(_between(base + 6, "small numbers", "Random", name, 0, False))
    return cases


def _grid_points(id: int, name: str) -> CaseSpec:
    """Numbers of the format, 64 times each."""
    top = largest_step(name)
    steps = sorted({0, 1, 2, 3, top // 3, top // 2, top - 1, top} & set(range(top + 1)))
    signed = [(step, negative) for step in steps for negative in (False, True)]
    codes = [[signed_code(name, *one)] * 64 for one in signed]
    x = [-float(grid(name, step)) if negative else float(grid(name, step)) for step, negative in signed]
    stored = values("bf16" if name == "BF16" else "u8", codes)
    return CaseSpec(id, "numbers of the format, both signs", ("GridPoint",), {"x": dyadic_f32(x)},
                    {"codes": Output({"class": "bits"}, stored)}, params={"n": 64})  # fmt: skip


def _between(id: int, comment: str, flags: str, name: str, step: int, negative: bool) -> CaseSpec:
    """Numbers between a step and the next."""
    low, width = grid(name, step), grid(name, step + 1) - grid(name, step)
    sign = -1 if negative else 1
    x = [float(sign * (low + part * width)) for part in PARTS]
    bound = float(width) * math.sqrt(math.log(2 / ALPHA) / (2 * N))
    mean = {"class": "statistical", "test": "mean", "n": N, "alpha": ALPHA, "bound": bound}
    expected = {"x_hat": Output(mean, dyadic_f32(x))}
    if name != "BF16":  # 65536 probabilities a row would be too many
        expected = {"codes": _probabilities(name, step, negative)} | expected
    return CaseSpec(id, comment, tuple(flags.split()), {"x": dyadic_f32(x)}, expected)


def _probabilities(name: str, step: int, negative: bool) -> Output:
    chi2 = {"class": "statistical", "test": "chi2", "n": N, "alpha": ALPHA}
    rows = [[float(p) for p in chances(name, step, part, negative)] for part in PARTS]
    return Output(chi2, dyadic_f32(rows))


def _beyond(id: int, name: str) -> CaseSpec:
    """Beyond the largest number there is only the largest."""
    top = largest_step(name)
    width = grid(name, top + 1) - grid(name, top)
    size = [float(grid(name, top) + part * width) for part in (Fraction(1, 4), Fraction(1, 2), Fraction(7, 8))]
    low = float(grid(name, top) + 1) if name in INTEGERS else float(grid(name, top))
    down = [-(low + v - float(grid(name, top))) for v in size]
    codes = [[signed_code(name, top + 1, False)] * 64] * 3
    codes += [[signed_code(name, top + 2 if name in INTEGERS else top, True)] * 64] * 3
    stored = values("bf16" if name == "BF16" else "u8", codes)
    return CaseSpec(id, "beyond the largest number", ("Clip",), {"x": dyadic_f32([*size, *down])},
                    {"codes": Output({"class": "bits"}, stored)}, params={"n": 64})  # fmt: skip
