"""The suites formats/small_numbers and formats/small_numbers_decode. Ids are never reused and never renumbered."""

from fractions import Fraction

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, Values, values
from refllm.evaluate.golden.suites import small_number_oracles
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, first_seed
from refllm.evaluate.golden.suites.number_definition import INF, NAN
from refllm.evaluate.golden.suites.small_number_definition import (
    FORMATS,
    INTEGERS,
    codes_of,
    codes_output,
    decode,
    encode,
    middles,
)
from refllm.evaluate.golden.suites.small_number_notes import DECODE, ENCODE

FORMAT_TEXT = [
    "INT2 to INT8: a code is the whole number in two's complement, in the low bits of a u8. TERNARY: -1, 0, 1 are the "
    "codes 0, 1, 2. BINARY: -1, 1 are 0, 1.",
    "NF4: 16 values in ascending order, from -1 to 1, code 7 is 0. FP4_BNB, the FP4 of bitsandbytes: codes 0 to 7 are "
    "0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4 in float32, codes 8 to 15 the same below zero.",
]
HEADER = [
    "Input x: f32 or f64. Param: format. Output: codes, u8.",
    *FORMAT_TEXT,
    "Integers: to the nearest, ties to even; what is beyond the ends saturates. Declare ties=away or ties=zero for "
    "other ties, rounding=toward_zero for truncation, overflow=wrap if what is too large wraps (INTn).",
    "Lists: the nearest value, beyond the ends the end. Values a and b meet at (a + b) / 2, in float32, and that "
    "number is the lower one's; BINARY's 0 is +1. Declare ties=upper or ties=lower, middle=exact if they meet at the "
    "exact half, binary_zero=sign_bit if -0 is -1, fp4_zero=code_8 if what rounds to 0 from above is code 8, as "
    "bitsandbytes has it.",
    "Infinities saturate or are rejected. NaN is rejected, or 0 in an integer format.",
]
DECODE_HEADER = [
    "Input codes, u8. Param: format. Output x, f32, exact.",
    *FORMAT_TEXT,
    "Declare fp4_zero_sign=minus if code 8 of FP4_BNB is -0, as its sign bit says and kernels that compute the value "
    "have it; it is +0 in bitsandbytes' table, which files carry.",
]
_SOURCE = {"kind": "first_principles", "name": "the header above, in exact fractions"}
_ML_DTYPES = {"oracle": "ml_dtypes", "version": "0.6.0", "agreement": "differs_documented"}
_BNB = {"oracle": "bitsandbytes", "version": "0.50.2"}
_QUANTIZE = "quantize_4bit(x, blocksize=64, quant_type=...) on the CPU, x with a 1 in each block: "
_CHECKED = {
    "INT2": [_ML_DTYPES | {"note": "x.astype(ml_dtypes.int2): rounding=toward_zero, overflow=wrap"}],
    "INT4": [_ML_DTYPES | {"note": "x.astype(ml_dtypes.int4): rounding=toward_zero, overflow=wrap"}],
    "NF4": [_BNB | {"agreement": "bit_exact", "note": _QUANTIZE + "ties=lower, middle=float32"}],
    "FP4_BNB": [_BNB | {"agreement": "differs_documented", "note": _QUANTIZE + "ties=lower, fp4_zero=code_8"}],
}  # fmt: skip
_TABLE_CHECKED = [_BNB | {"agreement": "bit_exact", "note": "get_4bit_type(...), signs of zero included"}]
_NO_FORMAT = {"result": "invalid", "error": "any", "params": {"format": "INT9"}}


def suite() -> SuiteSpec:
    """The suite formats/small_numbers."""
    head = head_of("small_numbers", "encode", "Numbers to the codes of integers and lists of values", "small_numbers")
    groups = []
    for place, name in enumerate(FORMATS):
        group = {"params": {"format": name}, "source": source_of(name)}
        make = _integer_cases if name in INTEGERS else _list_cases
        groups.append((group, make(name, 100 * (place + 1))))
    groups += [(group, [_frozen(*rest)]) for group, *rest in small_number_oracles.answers()]
    bad = CaseSpec(1, "no such format", ("BadParams",), {"x": values("f32", [1.0])}, **_NO_FORMAT)
    return SuiteSpec(head | {"header": HEADER}, ENCODE, [*groups, ({"params": {}, "source": _SOURCE}, [bad])])


def decode_suite() -> SuiteSpec:
    """The suite formats/small_numbers_decode."""
    head = head_of("small_numbers_decode", "decode", "Codes of integers and lists of values, all", "small_numbers")
    groups = []
    for place, name in enumerate(FORMATS):
        source = _SOURCE | ({"cross_checked": _TABLE_CHECKED} if name in ("NF4", "FP4_BNB") else {})
        groups.append(({"params": {"format": name}, "source": source}, _decode_cases(name, 100 * (place + 1))))
    bad = CaseSpec(1, "no such format", ("BadParams",), {"codes": values("u8", [1])}, **_NO_FORMAT)
    head |= {"header": DECODE_HEADER, "suite_version": "2.0.0"}
    return SuiteSpec(head, DECODE, [*groups, ({"params": {}, "source": _SOURCE}, [bad])])


def head_of(name: str, op: str, title: str, module: str) -> dict:
    """A manifest's keys up to its notes."""
    return {
        "suite": f"formats/{name}",
        "suite_version": "1.0.0",
        "op": f"formats.number.{op}",
        "title": title,
        "lesson": "lessons/04-number-formats.md",
        "generator": {"name": f"refllm golden regen, suites/{module}.py", "version": "1"},
    }


def source_of(name: str) -> dict:
    """Where the expected codes of a format come from and what else gives them."""
    return _SOURCE | ({"cross_checked": _CHECKED[name]} if name in _CHECKED else {})


def _whens(key: str, *choices: str) -> tuple[dict, ...]:
    return tuple({key: choice} for choice in choices)


def _case(id, comment, flags, name, x, whens=(), dtype="f32", recipe=None, **rest) -> CaseSpec:
    if name == "FP4_BNB":
        whens = (*(whens or ({"fp4_zero": "code_0"},)), {"fp4_zero": "code_8"})
    inputs = {"x": values(dtype, x, recipe=recipe)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, {"codes": codes_output(name, x, whens)}, **rest)


def _beside(x: Fraction, up: bool) -> float:
    return float(np.nextafter(np.float32(float(x)), np.float32(INF if up else -INF)))


def _shared_cases(name: str, base: int, halves: list[Fraction], bits: int, whens: tuple) -> list[CaseSpec]:
    """Cases that integers and lists have alike; `whens` are conventions that matter off the ties."""
    exp2 = bits - 23  # random numbers up to 2^bits
    tiny = [s * v for v in (2.0**-149, 2.0**-127, 2.0**-126) for s in (1, -1)]
    double = [s * v for v in (2.0**-1074, 2.0**-1023, 2.0**-200) for s in (1, -1)]
    apart = [float(h + side * (abs(h) or Fraction(1, 2**20)) / 2**40) for h in halves for side in (1, -1)]
    numbers = lambda seed: [float(v) for v in dyadic(seed, 24, exp2, 48)]
    everything = [decode(name, code, "minus") for code in range(codes_of(name))]  # -0 is a number to encode, too

    def clear(seed):
        near = lambda x: any(abs(Fraction(x) - h) < Fraction(1, 2**16) for h in halves)
        inside = min(everything) <= min(numbers(seed)) and max(numbers(seed)) <= max(everything)
        return inside and not any(map(near, numbers(seed)))

    seed = first_seed(clear, 1000 * base)
    return [
        _case(base, "every number of the format", "AllCodes", name, everything),
        _case(base + 2, "one float32 beside halfway", "Nearest", name,
              [_beside(h, up) for h in halves for up in (False, True)], whens),
        _case(base + 3, "float64, 2^-40 beside halfway", "DoubleRounding", name, apart, whens, dtype="f64"),
        _case(base + 7, "subnormal float32", "Subnormal", name, tiny),
        _case(base + 8, "float64 that are subnormal, or would be in float32", "Subnormal", name, double, dtype="f64"),
        _case(base + 9, "infinities", "NonFinite", name, [INF, -INF], result="acceptable"),
        _case(base + 12, "random numbers", "Random", name, numbers(seed), whens, recipe=dyadic_recipe(seed, 24, exp2)),
    ]  # fmt: skip


def _integer_cases(name: str, base: int) -> list[CaseSpec]:
    low, high = INTEGERS[name]
    rounding = _whens("rounding", "nearest", "toward_zero")
    overflow = _whens("overflow", "saturate", "wrap") if name != "TERNARY" else ()
    ends = (*overflow[:1], {"overflow": "wrap", "rounding": "toward_zero"}, *overflow[1:]) if overflow else ()
    halves = [Fraction(2 * n + 1, 2) for n in range(low, high)]
    spaced = halves[:: max(1, len(halves) // 24)]
    ties = (*_whens("ties", "even", "away", "zero"), {"rounding": "toward_zero"})
    beyond = [high + 1, low - 1, high + 2, 2 * high + 3, 3 * low - 1, 1e9, -1e9, 2.0**40 + 2.0**20, -(2.0**100)]
    bits = 0 if name == "TERNARY" else high.bit_length() - 1
    return [
        *_shared_cases(name, base, spaced, bits, rounding),
        _case(base + 1, "halves", "TieToEven", name, [float(h) for h in halves], ties),
        _case(base + 4, "whole numbers beyond the ends", "Clip", name, [float(v) for v in beyond], overflow),
        _case(base + 5, "halves just beyond the ends", "Clip", name, [high + 0.5, low - 0.5], ends),
        _case(base + 6, "zeros, and what rounds to them", "NegativeZero", name, [0.0, -0.0, 0.25, -0.25]),
        _case(base + 10, "NaN", "NonFinite", name, [1.0, NAN, -1.0], result="acceptable"),
    ]  # fmt: skip


def _list_cases(name: str, base: int) -> list[CaseSpec]:
    halves = middles(name)
    order = ("upper", "lower") if name == "BINARY" else ("lower", "upper")
    exact = _whens("middle", "float32", "exact")
    zero = (*_whens("binary_zero", "plus", "sign_bit"), {"ties": "lower"}) if name == "BINARY" else ()
    nan = {"x": values("f32", [1.0, NAN, -1.0])}
    return [
        *_shared_cases(name, base, halves, 0, exact),
        _case(base + 1, "halfway between two values", "Midpoint", name, [float(h) for h in halves],
              (*_whens("ties", *order), {"middle": "exact"})),
        _case(base + 4, "beyond the ends", "Clip", name, [s * v for v in (1.0078125, 2.0, 2.0**100) for s in (1, -1)]),
        _case(base + 6, "zeros", "NegativeZero", name, [0.0, -0.0], zero),
        CaseSpec(base + 10, "NaN", ("NonFinite",), nan, result="invalid", error="value"),
    ]  # fmt: skip


def _frozen(id, name, comment, flags, x: Values, whens, theirs, codes) -> CaseSpec:
    """What other software answered, which must be what the definition says of its conventions."""
    numbers = [float(v) for v in x.array]
    if codes != [encode(name, v, **theirs) for v in numbers]:
        raise ValueError(f"case {id}: {comment} differs from the definition")
    return CaseSpec(id, comment, tuple(flags.split()), {"x": x}, {"codes": codes_output(name, numbers, whens)})


def _decode_cases(name: str, base: int) -> list[CaseSpec]:
    count = codes_of(name)

    def one(id, comment, flags, codes):
        signs = ("plus", "minus") if name == "FP4_BNB" and 8 in codes else ("plus",)
        listed = [({"fp4_zero_sign": s}, values("f32", [decode(name, c, s) for c in codes])) for s in signs]
        bits = {"class": "bits"}
        x = Output(bits, listed[0][1]) if len(listed) == 1 else Output(bits, variants=tuple(listed))
        return CaseSpec(id, comment, tuple(flags.split()), {"codes": values("u8", codes)}, {"x": x})

    zero = [code for code in range(count) if decode(name, code) == 0]
    cases = [one(base, "all codes", "AllCodes" + " Table" * (name in ("NF4", "FP4_BNB")), list(range(count)))]
    if name in INTEGERS:
        edges = [0, 1, 2] if name == "TERNARY" else [count // 2 - 1, count // 2, count - 1]
        cases.append(one(base + 1, "the ends and -1", "TwosComplement", edges))
    if name == "FP4_BNB":
        cases.append(one(base + 2, "the smallest values", "Subnormal", [1, 9]))
    if zero:
        cases.append(one(base + 3, "zero", "NegativeZero", zero))
    if count < 256:
        for i, code in enumerate((count, 255)):
            cases.append(CaseSpec(base + 4 + i, f"code {code}", ("BadCode",), {"codes": values("u8", [0, code])},
                                  result="invalid", error="value"))  # fmt: skip
    return cases
