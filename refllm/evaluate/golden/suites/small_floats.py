"""The suites formats/small_floats and formats/small_floats_decode. Ids are never reused and never renumbered."""

import math
from fractions import Fraction

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, Values, values
from refllm.evaluate.golden.suites import number_oracles
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, first_seed
from refllm.evaluate.golden.suites.number_definition import (
    FORMATS,
    INF,
    NAN,
    bits_of,
    code_values,
    codes_output,
    decode,
    encode,
    largest,
    sign_of,
    special_codes,
    value,
)
from refllm.evaluate.golden.suites.number_notes import DECODE, ENCODE

_FORMAT_TEXT = [
    "A code is sign | exponent field f | fraction, the sign in the highest bit. With m mantissa bits a field f > 0 is "
    "(1 + fraction / 2^m) 2^(f - bias), the field 0 is fraction / 2^m 2^(1 - bias).",
    "Formats, exponent / mantissa bits / bias: FP16 5/10/15, BF16 8/7/127, TF32 8/10/127 (19 bits, u32), FP8_E4M3FN "
    "4/3/7, FP8_E5M2 5/2/15, FP8_E4M3FNUZ 4/3/8, FP8_E5M2FNUZ 5/2/16, FP6_E2M3 2/3/1, FP6_E3M2 3/2/3, FP4_E2M1 2/1/1, "
    "UE4M3 4/3/7 without sign (7 bits), E8M0 8/0/127 without sign and without zero: code 0 is 2^-127.",
    "Special codes: FP16, BF16, TF32, FP8_E5M2 as IEEE 754 (field all ones: fraction 0 infinity, else NaN). "
    "FP8_E4M3FN, UE4M3, E8M0: all ones (but the sign) is NaN, no infinity. FNUZ: 0x80 is NaN, no infinity and no -0. "
    "FP6 and FP4: none.",
]
HEADER = [
    "Input x: f32, f64 or f16. Param: format. Output: codes.",
    *_FORMAT_TEXT,
    "x is rounded once, to nearest, ties to the even code; 0 and what rounds to it keep their sign, but not in FNUZ "
    "formats. NaN becomes NaN.",
    "A number that rounds beyond the largest, with the exponents thought to go on, becomes the largest; an infinity "
    "stays one, or becomes the largest where there is none.",
    "Declare overflow=satfinite if infinities become the largest number everywhere, overflow=ieee if what is too "
    "large becomes infinity, or NaN where there is none (FP6 and FP4 saturate always); ties=away or ties=zero for "
    "other ties.",
    "NaN in a format without NaN may be rejected; else it is nan=zero, nan=negative_zero or nan=max (+largest).",
    "Below 0 without a sign is NaN; declare negative=magnitude if the sign is dropped. 0 in E8M0 is code 0; declare "
    "e8m0_zero=nan if it is NaN.",
]
DECODE_HEADER = ["Input codes. Param: format. Output x, f32, exact.", *_FORMAT_TEXT]
_TIES = ("ties", ("even", "away", "zero"))
_SOURCE = {"kind": "first_principles", "name": "the header above, in exact fractions"}
_CHECKED = [
    {"oracle": "ml_dtypes", "version": "0.6.0", "agreement": "bit_exact",
     "note": "BF16, FP8, FP6, FP4 with overflow=ieee (FP6, FP4: always saturate)"},
    {"oracle": "torch", "version": "2.13.0", "agreement": "bit_exact",
     "note": "FP16, BF16, FP8_E5M2, FNUZ with overflow=ieee; FP8_E4M3FN with overflow=satfinite"},
    {"oracle": "gfloat", "version": "0.5.2", "agreement": "bit_exact",
     "note": "all but FNUZ and E8M0; ties=even and away; overflow=satfinite and ieee"},
]  # fmt: skip
_E8M0_CHECKED = [
    {"oracle": name, "version": version, "agreement": "differs_documented",
     "note": f"ties=away, {zero}; 2^-127 < x < 1.5 2^-127 becomes code 1, although 2^-127 is nearer"}
    for name, version, zero in (
        ("ml_dtypes", "0.6.0", "e8m0_zero=nan"), ("torch", "2.13.0", "negative=magnitude"))
]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite formats/small_floats."""
    head = _head("small_floats", "encode", "Numbers to the codes of small floats: rounding, overflow, special values")
    groups = []
    for place, name in enumerate(FORMATS):
        source = _SOURCE | {"cross_checked": _E8M0_CHECKED if name == "E8M0" else _CHECKED}
        groups.append(({"params": {"format": name}, "source": source}, _cases(name, 100 * (place + 1))))
    frozen = [(head, [_frozen(id, *rest)]) for id, head, *rest in number_oracles.small_floats()]
    bad = CaseSpec(1, "no such format", ("BadParams",), {"x": values("f32", [1.0])}, result="invalid", error="any",
                   params={"format": "FP8_E4M3B11"})  # fmt: skip
    source = {"params": {}, "source": _SOURCE}
    return SuiteSpec(head | {"header": HEADER}, ENCODE, [*groups, *frozen, (source, [bad])])


def decode_suite() -> SuiteSpec:
    """The suite formats/small_floats_decode."""
    head = _head("small_floats_decode", "decode", "Codes of small floats to numbers: every code of up to 8 bits")
    groups = []
    for place, name in enumerate(FORMATS):
        group = {"params": {"format": name}, "source": _SOURCE | {"cross_checked": _CHECKED[:1]}}
        groups.append((group, _decode_cases(name, 100 * (place + 1))))
    bad = CaseSpec(1, "no such format", ("BadParams",), {"codes": values("u8", [1])}, result="invalid", error="any",
                   params={"format": "FP8_E4M3B11"})  # fmt: skip
    source = {"params": {}, "source": _SOURCE}
    return SuiteSpec(head | {"header": DECODE_HEADER}, DECODE, [*groups, (source, [bad])])


def _head(name: str, op: str, title: str) -> dict:
    return {
        "suite": f"formats/{name}",
        "suite_version": "1.0.0",
        "op": f"formats.float.{op}",
        "title": title,
        "lesson": "lessons/04-number-formats.md",
        "generator": {"name": "refllm golden regen, suites/small_floats.py", "version": "1"},
    }


def _case(id, comment, flags, name, x, vary=None, dtype="f32", **rest) -> CaseSpec:
    inputs = {"x": values(dtype, x, recipe=rest.pop("recipe", None))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, {"codes": codes_output(name, x, vary)}, **rest)


def _chosen(name: str) -> list[int]:
    """Codes without sign: all of up to 8 bits, else those around the ends of the subnormals and of the exponents."""
    top, mantissa = special_codes(name)[0], FORMATS[name][1]
    if bits_of(name) <= 8:
        return list(range(top + 1))
    edges = (0, 1 << mantissa, 2 << mantissa, (top + 1) // 2 + 333, top - 2)
    return sorted({c for edge in edges for c in range(max(edge - 2, 0), min(edge + 3, top + 1))})


def _f32_beside(x: Fraction, up: bool) -> float:
    return float(np.nextafter(np.float32(float(x)), np.float32(INF if up else 0)))


def _cases(name: str, base: int) -> list[CaseSpec]:
    both = (1, -1) if sign_of(name) else (1,)
    codes = _chosen(name)
    top, _, nan_code = special_codes(name)
    finite = nan_code is None
    policies = None if finite else ("overflow", ("saturate", "satfinite", "ieee"))
    few = codes[:: max(1, len(codes) // 24)]
    middles = [(value(name, c) + value(name, c + 1)) / 2 for c in few if c < top]
    numbers = [float(s * value(name, c)) for s in both for c in codes]
    cases = [
        _case(base, "every number of the format" if bits_of(name) <= 8 else "numbers of the format",
              "EveryCode Subnormal", name, [x for x in numbers if x != 0]),
        _case(base + 1, "halfway between two numbers", "TieToEven", name,
              [float(s * x) for s in both for x in middles], _TIES),
        _case(base + 2, "one float32 beside halfway", "Nearest", name,
              [s * _f32_beside(x, up) for s in both for x in middles for up in (False, True)]),
        _double_rounding(base + 3, name),
        _overflow(base + 4, name, both, policies),
        _random(base + 5, name),
    ]  # fmt: skip
    if FORMATS[name][5]:
        least, signs = value(name, 1), "NegativeZero Fnuz" if FORMATS[name][3] == "fnuz" else "NegativeZero"
        cases += [
            _case(base + 6, "the smallest subnormal, half of it (a tie), three halves", "Subnormal TieToEven", name,
                  [float(s * least * part) for s in both for part in (1, Fraction(1, 2), Fraction(3, 2))], _TIES),
            _case(base + 7, "zeros, and what rounds to them", signs if sign_of(name) else "Subnormal", name,
                  [0.0, -0.0, *(float(s * least / 8) for s in both)]),
        ]  # fmt: skip
    cases.append(_case(base + 8, "infinities", "NonFinite", name, [s * INF for s in both], policies))
    cases.append(_case(base + 9, "NaN", "NonFinite", name, [NAN, 1.0],
                       ("nan", ("zero", "negative_zero", "max")) if finite else None,
                       result="acceptable" if finite else "valid"))  # fmt: skip
    if not sign_of(name):
        cases.append(_case(base + 10, "below zero", "Unsigned", name, [-1.0, 1.0, -0.3125, -INF],
                           ("negative", ("nan", "magnitude"))))  # fmt: skip
    return cases + (_e8m0(base + 20) if name == "E8M0" else [])


def _overflow(id: int, name: str, both, policies) -> CaseSpec:
    top = special_codes(name)[0]
    most, next_ = largest(name), value(name, top + 1)
    tie = (most + next_) / 2
    wide = [most, tie, next_, 4 * most]
    fits = [float(x) for x in wide if x < 2**127 * 2]
    near = [] if tie >= 2**128 else [_f32_beside(tie, False), _f32_beside(tie, True)]
    x = [s * v for s in both for v in (*fits, *near)]
    return _case(id, "around the largest number", "Overflow", name, x, policies)


def _double_rounding(id: int, name: str) -> CaseSpec:
    """float64 numbers just beside halfway: a float32 in between makes them ties, which then round the other way."""
    top = special_codes(name)[0]
    picked = [c for c in _chosen(name) if c < top and value(name, c) >= value(name, top) / 2**20][::-1][:12]
    x = []
    for code in picked:
        tie = (value(name, code) + value(name, code + 1)) / 2
        beside = tie * (1 + Fraction(1, 2**40) * (1 if code % 2 == 0 else -1))  # away from the even code
        x.append(float(beside))
    assert [encode(name, v) for v in x] != [encode(name, float(np.float32(v))) for v in x]
    return _case(id, "float64, 2^-40 beside halfway", "DoubleRounding", name, x, dtype="f64")


def _random(id: int, name: str) -> CaseSpec:
    """Numbers of 24 bits up to the largest, or up to 2^4, no tie among them."""
    exp2 = min(3, math.frexp(float(largest(name)))[1]) - 23
    sizes = lambda seed: dyadic(seed, 24, exp2, 48)

    def clear(seed):
        numbers = [float(x) for x in sizes(seed)]
        return all(encode(name, x, ties="away") == encode(name, x, ties="zero") for x in numbers)

    seed = first_seed(clear, 1000 * id)
    x = [float(v) for v in sizes(seed)]
    return _case(id, "random numbers", "Random", name, x, None if sign_of(name) else ("negative", ("nan", "magnitude")),
                 recipe=dyadic_recipe(seed, 24, exp2))  # fmt: skip


def _e8m0(base: int) -> list[CaseSpec]:
    just = lambda x, up: _f32_beside(Fraction(x), up)
    edges = [1.0, just(1.0, True), just(2.0, False), 1.25, 1.75, 2.0**-126, 2.0**-127, 1.75 * 2.0**-127, 2.0**127,
             just(2.0**-127 * 1.5, True)]  # fmt: skip
    return [
        _case(base, "powers of two and what lies beside them", "E8m0Edge", "E8M0", edges),
        _case(base + 1, "zero", "E8m0Edge", "E8M0", [0.0, 1.0, -0.0], ("e8m0_zero", ("smallest", "nan"))),
        _case(base + 2, "below the smallest number", "E8m0Edge Subnormal", "E8M0", [2.0**-149, 2.0**-128]),
    ]


def _frozen(id: int, name: str, comment: str, x: Values, codes: list[int]) -> CaseSpec:
    """What other software answered, which must be what the definition says."""
    if codes != [encode(name, float(v)) for v in x.array]:
        raise ValueError(f"case {id}: {comment} differs from the definition")
    return CaseSpec(id, comment, ("Random",), {"x": x}, {"codes": Output({"class": "bits"}, code_values(name, codes))})


def _decode_cases(name: str, base: int) -> list[CaseSpec]:
    top, infinity, nan_code = special_codes(name)
    sign = sign_of(name)
    specials = sorted({c for c in (top, infinity, nan_code) if c is not None})
    specials += [c | sign for c in specials if c | sign not in specials]

    def one(id, comment, flags, codes):
        # FP16 as u16: an array of floats would not keep which NaN it is.
        inputs = {"codes": values("u16", codes) if name == "FP16" else code_values(name, codes)}
        x = Values("f32", np.array([decode(name, c) for c in codes], np.float32))
        return CaseSpec(id, comment, tuple(flags.split()), inputs, {"x": Output({"class": "bits"}, x)})

    chosen = _chosen(name)
    cases = [
        one(base, "all codes" if bits_of(name) <= 8 else "codes", "EveryCode",
            list(range(1 << bits_of(name))) if bits_of(name) <= 8 else chosen + [c | sign for c in chosen]),
        one(base + 1, "the largest number and the special codes", "Specials", specials),
    ]  # fmt: skip
    if FORMATS[name][5]:
        subnormals = [c for c in (1, 2, 3, (1 << FORMATS[name][1]) - 1, 1 << FORMATS[name][1]) if c <= top]
        cases.append(one(base + 2, "subnormals and the smallest normal number", "Subnormal", subnormals))
    if FORMATS[name][3] != "fnuz" and sign:
        cases.append(one(base + 3, "0 and -0", "NegativeZero", [0, sign]))
    if FORMATS[name][3] == "fnuz":
        cases.append(one(base + 3, "0, and the code that is -0 elsewhere", "Fnuz", [0, sign, 1, sign | 1]))
    if name == "E8M0":
        cases.append(one(base + 4, "code 0 is 2^-127, not 0", "E8m0Edge", [0, 1, 127, 254, 255]))
    return cases
