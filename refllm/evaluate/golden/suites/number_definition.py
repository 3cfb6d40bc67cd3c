"""What the suites of number formats expect: values and codes of small floats, one number at a time, in fractions.

A code is found among its neighbours: the largest code whose value is not above the number, or the next one.
"""

import math
from fractions import Fraction

import numpy as np

from refllm.evaluate.golden.build import Output, Values, values

# exponent bits, mantissa bits, bias, specials, signed, has a zero; as in the header of formats/small_floats
FORMATS = {
    "FP16": (5, 10, 15, "ieee", True, True),
    "BF16": (8, 7, 127, "ieee", True, True),
    "TF32": (8, 10, 127, "ieee", True, True),
    "FP8_E4M3FN": (4, 3, 7, "fn", True, True),
    "FP8_E5M2": (5, 2, 15, "ieee", True, True),
    "FP8_E4M3FNUZ": (4, 3, 8, "fnuz", True, True),
    "FP8_E5M2FNUZ": (5, 2, 16, "fnuz", True, True),
    "FP6_E2M3": (2, 3, 1, "finite", True, True),
    "FP6_E3M2": (3, 2, 3, "finite", True, True),
    "FP4_E2M1": (2, 1, 1, "finite", True, True),
    "UE4M3": (4, 3, 7, "fn", False, True),
    "E8M0": (8, 0, 127, "fn", False, False),
}
LOGICAL = {
    "FP16": "f16", "BF16": "bf16", "TF32": "u32", "FP8_E4M3FN": "f8_e4m3fn", "FP8_E5M2": "f8_e5m2",
    "FP8_E4M3FNUZ": "f8_e4m3fnuz", "FP8_E5M2FNUZ": "f8_e5m2fnuz", "FP6_E2M3": "f6_e2m3fn", "FP6_E3M2": "f6_e3m2fn",
    "FP4_E2M1": "f4_e2m1fn", "UE4M3": "u8", "E8M0": "f8_e8m0fnu",
}  # fmt: skip
NAN, INF = math.nan, math.inf


def bits_of(name: str) -> int:
    """Bits of a code."""
    exponent, mantissa, _, _, signed, _ = FORMATS[name]
    return signed + exponent + mantissa


def sign_of(name: str) -> int:
    """The bit of the sign, or 0."""
    return 1 << (bits_of(name) - 1) if FORMATS[name][4] else 0


def special_codes(name: str) -> tuple[int, int | None, int | None]:
    """Codes of the largest number, of infinity and of NaN; None for what a format does not have."""
    exponent, mantissa, _, specials, _, _ = FORMATS[name]
    ones = (1 << (exponent + mantissa)) - 1
    if specials == "ieee":
        infinity = ones - (1 << mantissa) + 1
        return infinity - 1, infinity, infinity + (1 << (mantissa - 1))
    if specials == "fn":
        return ones - 1, None, ones
    return ones, None, sign_of(name) if specials == "fnuz" else None


def value(name: str, code: int) -> Fraction:
    """The number of a code without sign, as if no code were special and the exponents went on."""
    _, mantissa, bias, _, _, has_zero = FORMATS[name]
    field, fraction = divmod(code, 1 << mantissa)
    if field == 0 and has_zero:
        return Fraction(fraction, 1 << mantissa) * Fraction(2) ** (1 - bias)
    return (1 + Fraction(fraction, 1 << mantissa)) * Fraction(2) ** (field - bias)


def largest(name: str) -> Fraction:
    """The largest number."""
    return value(name, special_codes(name)[0])


def _below(name: str, x: Fraction) -> int:
    """The largest code whose number is at most x; -1 if there is none."""
    low, high = -1, special_codes(name)[0] + 2  # far beyond the largest number all is overflow
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(name, middle) <= x else (low, middle)
    return low


def encode(name: str, x: float, overflow: str = "saturate", ties: str = "even", negative: str = "nan",
           e8m0_zero: str = "smallest", nan: str = "zero") -> int:  # fmt: skip
    """The code of one number."""
    top, infinity, nan_code = special_codes(name)
    sign = sign_of(name) if math.copysign(1, x) < 0 else 0
    specials, signed, has_zero = FORMATS[name][3:]
    if math.isnan(x):
        if nan_code is None:
            return {"zero": 0, "negative_zero": sign_of(name), "max": top}[nan]
        return nan_code if specials == "fnuz" else nan_code | sign
    if x < 0 and not signed and negative == "nan":
        return nan_code
    beyond = nan_code if infinity is None else infinity
    if math.isinf(x):
        wanted = top if overflow == "satfinite" or (overflow == "saturate" and infinity is None) else beyond
        return wanted if wanted == sign_of(name) else wanted | sign
    code = _nearest(name, abs(Fraction(x)), ties)
    if x == 0 and not has_zero and e8m0_zero == "nan":
        return nan_code
    if code > top:
        code = beyond if overflow == "ieee" else top
        return code if code == sign_of(name) else code | sign
    return code if specials == "fnuz" and code == 0 else code | sign


def _nearest(name: str, x: Fraction, ties: str) -> int:
    low = _below(name, x)
    if low < 0:
        return 0
    down, up = x - value(name, low), value(name, low + 1) - x
    if down != up:
        return low if down < up else low + 1
    return {"even": low + low % 2, "away": low + 1, "zero": low}[ties]


def decode(name: str, code: int) -> float:
    """The number of a code, a float32."""
    top, infinity, nan_code = special_codes(name)
    if FORMATS[name][3] == "fnuz" and code == nan_code:
        return NAN
    sign = -1.0 if code & sign_of(name) else 1.0
    magnitude = code & ~sign_of(name)
    if magnitude <= top:
        return sign * float(value(name, magnitude))
    return sign * INF if magnitude == infinity else NAN


def code_values(name: str, codes: list) -> Values:
    """Codes as the manifest stores them; nested lists keep their shape."""
    dtype = LOGICAL[name]
    if dtype == "f16":
        return Values(dtype, np.array(codes, np.uint16).view(np.float16))
    return values(dtype, codes)


def codes_output(name: str, x: list[float], vary: tuple[str, tuple[str, ...]] | None = None) -> Output:
    """The codes of some numbers; `vary` is a convention and its values, the first one refllm's own."""
    compare = {"class": "bits"}
    if vary is None:
        return Output(compare, code_values(name, [encode(name, v) for v in x]))
    key, choices = vary
    listed = [({key: choice}, [encode(name, v, **{key: choice}) for v in x]) for choice in choices]
    if all(codes == listed[0][1] for _, codes in listed):
        return Output(compare, code_values(name, listed[0][1]))
    return Output(compare, variants=tuple((when, code_values(name, codes)) for when, codes in listed))
