"""Number formats as codes: small floats, integers and lists of values.

A format has `name`, `bits`, `encode(x, overflow="saturate") -> unsigned codes` and `decode(codes) -> float32`. Codes
are in the low bits of the narrowest unsigned dtype. Encoding rounds once, from the precision the numbers have, to the
nearest value, ties to the even code; other roundings and what happens to a number that has no code are named choices:

    format                              default: too large        infinity      NaN            -0
    FP16 BF16 TF32 FP8_E5M2             largest                   infinity      NaN, sign kept -0
    FP8_E4M3FN                          largest                   largest       NaN, sign kept -0
    FP8_E4M3FNUZ FP8_E5M2FNUZ           largest                   largest       NaN            +0
    FP6_E2M3 FP6_E3M2 FP4_E2M1          largest                   largest       ValueError     -0
    UE4M3 (no sign)                     largest, below 0: NaN     largest       NaN            0
    E8M0 (powers of two)                largest, below 0: NaN,    largest       NaN            2^-127
                                        0: 2^-127
    INT2 ... INT8, TERNARY              largest                   largest       ValueError     0
    NF4 FP4_BNB BINARY                  nearest end               nearest end   ValueError     0; BINARY: +1

Software disagrees on much of this table. `overflow="ieee"` is what most casts do: infinity for FP16, BF16, TF32 and
FP8_E5M2, NaN for the others that have one. UE4M3 is E4M3FN without its sign, 7 bits in a byte. TF32 codes are the 19
bits that count, without the 13 zero bits that follow them in memory.
"""

from refllm.formats.dtypes.codebooks import BINARY, FP4_BNB, NF4, CodebookFormat
from refllm.formats.dtypes.floats import (
    BF16,
    E8M0,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3FN,
    FP8_E4M3FNUZ,
    FP8_E5M2,
    FP8_E5M2FNUZ,
    FP16,
    TF32,
    UE4M3,
    FloatFormat,
)
from refllm.formats.dtypes.integers import INT2, INT3, INT4, INT5, INT6, INT7, INT8, TERNARY, IntegerFormat

FLOATS = (
    FP16, BF16, TF32, FP8_E4M3FN, FP8_E5M2, FP8_E4M3FNUZ, FP8_E5M2FNUZ, FP6_E2M3, FP6_E3M2, FP4_E2M1, E8M0, UE4M3,
)  # fmt: skip
INTEGERS = (INT2, INT3, INT4, INT5, INT6, INT7, INT8, TERNARY)
CODEBOOKS = (NF4, FP4_BNB, BINARY)
FORMATS = {form.name: form for form in (*FLOATS, *INTEGERS, *CODEBOOKS)}

__all__ = [  # noqa: RUF022
    "BF16", "BINARY", "CODEBOOKS", "E8M0", "FLOATS", "FORMATS", "FP16", "FP4_BNB", "FP4_E2M1", "FP6_E2M3", "FP6_E3M2",
    "FP8_E4M3FN", "FP8_E4M3FNUZ", "FP8_E5M2", "FP8_E5M2FNUZ", "INT2", "INT3", "INT4", "INT5", "INT6", "INT7", "INT8",
    "INTEGERS", "NF4", "TERNARY", "TF32", "UE4M3", "CodebookFormat", "FloatFormat", "IntegerFormat",
]  # fmt: skip
