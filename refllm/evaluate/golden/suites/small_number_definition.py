"""What the suites of integers and lists of values expect: codes one number at a time, in fractions.

Also what stochastic rounding may answer: the two neighbours of a number and how often each.
"""

import itertools
import math
from fractions import Fraction

import numpy as np

from refllm.evaluate.golden.build import Output, Values, values
from refllm.evaluate.golden.suites import number_definition
from refllm.evaluate.golden.suites.checkpoint_bitsandbytes import TABLES
from refllm.evaluate.golden.suites.exact import nearest, to_f32

INTEGERS = {f"INT{n}": (-(1 << (n - 1)), (1 << (n - 1)) - 1) for n in range(2, 9)} | {"TERNARY": (-1, 1)}
LISTS = {"NF4": TABLES["nf4"], "FP4_BNB": TABLES["fp4"], "BINARY": (-1.0, 1.0)}
FORMATS = (*INTEGERS, *LISTS)


def codes_of(name: str) -> int:
    """How many codes a format has."""
    if name in LISTS:
        return len(LISTS[name])
    low, high = INTEGERS[name]
    return high - low + 1


def decode(name: str, code: int, fp4_zero_sign: str = "plus") -> float:
    """The number of a code."""
    if name in LISTS:
        return -0.0 if (name, code, fp4_zero_sign) == ("FP4_BNB", 8, "minus") else LISTS[name][code]
    low, high = INTEGERS[name]
    if name == "TERNARY":
        return float(code - 1)
    return float(code if code <= high else code - (high - low + 1))


def encode(name: str, x: float, **conventions: str) -> int:
    """The code of one number."""
    return (_listed if name in LISTS else _integer)(name, x, **conventions)


def _integer(name, x, ties="even", rounding="nearest", overflow="saturate") -> int:
    low, high = INTEGERS[name]
    if math.isnan(x):
        number = 0
    elif math.isinf(x):
        number = high if x > 0 else low
    elif rounding == "toward_zero":
        number = math.trunc(Fraction(x))
    elif ties == "zero" and Fraction(x).denominator == 2:
        number = math.trunc(Fraction(x))
    else:
        number = nearest(Fraction(x), "away" if ties == "away" else "even")
    if overflow == "wrap":
        number = (number - low) % (high - low + 1) + low
    number = min(max(number, low), high)
    return number + 1 if name == "TERNARY" else number % (high - low + 1)


def middles(name: str, middle: str = "float32") -> list[Fraction]:
    """Where two values meet, ascending: the rounded half of their rounded sum, or exactly halfway."""
    ordered = sorted({Fraction(v) for v in LISTS[name]})
    sums = [a + b for a, b in itertools.pairwise(ordered)]
    return [(s if middle == "exact" else to_f32(s)) / 2 for s in sums]


def _listed(name, x, ties=None, middle="float32", fp4_zero="code_0", binary_zero="plus") -> int:
    if name == "BINARY" and x == 0 and binary_zero == "sign_bit":
        return int(math.copysign(1, x) > 0)
    ordered = sorted({Fraction(v) for v in LISTS[name]})
    ties = ties or ("upper" if name == "BINARY" else "lower")
    if math.isinf(x):
        chosen = ordered[-1 if x > 0 else 0]
    else:
        below = sum(m < Fraction(x) or (m == x and ties == "upper") for m in middles(name, middle))
        chosen = ordered[below]
    if (name, fp4_zero) == ("FP4_BNB", "code_8") and chosen == 0 and x > 0:
        return 8
    return LISTS[name].index(chosen)


def codes_output(name: str, x: list[float], whens: tuple[dict, ...] = ()) -> Output:
    """The codes of some numbers, under each of some conventions if they matter; refllm's own is the first."""
    compare, listed = {"class": "bits"}, [(when, [encode(name, v, **when) for v in x]) for when in whens]
    if all(codes == listed[0][1] for _, codes in listed):
        return Output(compare, values("u8", [encode(name, v) for v in x]))
    return Output(compare, variants=tuple((when, values("u8", codes)) for when, codes in listed))


# Stochastic rounding -------------------------------------------------------------------------------------------------


def grid(name: str, code: int) -> Fraction:
    """The number of the code-th step from zero upwards, as if the format went on beyond its largest."""
    return Fraction(code) if name in INTEGERS else number_definition.value(name, code)


def largest_step(name: str) -> int:
    """Which step from zero upwards is the largest number; of integers the positive one."""
    return INTEGERS[name][1] if name in INTEGERS else number_definition.special_codes(name)[0]


def signed_code(name: str, step: int, negative: bool) -> int:
    """The code of a step with a sign; beyond the largest it is the largest."""
    if name in INTEGERS:
        return encode(name, float(-step if negative else step))
    step = min(step, largest_step(name))
    fnuz_zero = number_definition.FORMATS[name][3] == "fnuz" and step == 0
    return step | (number_definition.sign_of(name) if negative and not fnuz_zero else 0)


def chances(name: str, step: int, part: Fraction, negative: bool) -> list[Fraction]:
    """How probable each code is for (1 - part) grid(step) + part grid(step + 1)."""
    found = [Fraction(0)] * (codes_of(name) if name in INTEGERS else 1 << number_definition.bits_of(name))
    found[signed_code(name, step, negative)] += 1 - part
    found[signed_code(name, step + 1, negative)] += part
    return found


def dyadic_f32(nested: list) -> Values:
    """Fractions as float32, which must hold them exactly."""
    return values("f32", np.array(nested, np.float64))
