"""The suites formats/gguf_decode and formats/gguf_encode. Ids are never reused and never renumbered."""

import hashlib
import math

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, Values
from refllm.evaluate.golden.suites import gguf_notes, gguf_oracles
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, splitmix64
from refllm.evaluate.golden.suites.gguf_bits import PLACES, SIZES, decode, f32, half_bits, read, write
from refllm.evaluate.golden.suites.gguf_definition import SEARCHED, encode_row

_BITS_HEADER = [
    "Blocks, little-endian, as GGUF files have them; i is the number within the block, h = i / 128, k = i % 128 / 32, "
    "l = i % 32 (integer divisions). f16 d: a scale.",
    "Q4_0: d, byte 2 + i % 16 bits 4 (i / 16)..: x = d (q - 8). Q4_1: d, f16 m, nibbles from byte 4: x = d q + m. "
    "Q5_0: d, u32 with bit i the fifth bit of number i, nibbles from byte 6: x = d (q - 16). Q5_1: d, m, u32, "
    "nibbles from 8: x = d q + m. Q8_0: d, i8[32]: x = d q. Q8_1: d, f16 d sum(q), i8[32].",
    "Q2_K: u8[16] (scale low, minimum high nibble), codes at byte 16 + 32 h + l bits 2 k.., d at 80, f16 dmin at 82: "
    "x = d sc q - dmin mn, sub-blocks of 16. Q3_K: third bits at byte l bit i / 32, codes from byte 32 as Q2_K, "
    "six-bit scale j: low four bits byte 96 + j % 8 nibble j / 8, high two byte 104 + j % 4 bits 2 (j / 4).., d at "
    "108: x = d (sc - 32) (q - 4).",
    "Q4_K: d, dmin, 12 bytes of scales, codes at byte 16 + 32 (i / 64) + l nibble i % 64 / 32: x = d sc q - dmin mn, "
    "sub-blocks of 32. Scale j < 4: byte 4 + j bits 0..5, minimum byte 8 + j; j >= 4: low four bits byte 8 + j (scale "
    "low, minimum high nibble), high two bits on top of scale (minimum) j - 4. Q5_K: the same, fifth bits at byte "
    "16 + l bit i / 32, nibbles from byte 48.",
    "Q6_K: low nibbles at byte 64 h + 32 (k % 2) + l nibble k / 2, high two bits at byte 128 + 32 h + l bits 2 k.., "
    "i8[16] scales at 192, d at 208: x = d sc (q - 32). Q8_K: f32 d, i8[256], i16[16] sums of 16 codes: x = d q.",
    "IQ4_NL: d, nibbles: x = d v[q], v = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113. IQ4_XS: d, u16 and "
    "u8[4] with the high two and low four bits of eight scales, nibbles half-split in every 32: x = d (sc - 32) v[q].",
    "MXFP4: u8 e, nibbles: x = 2^(e - 127) E2M1(q), but code 8 is +0. NVFP4: four UE4M3 scales (0x7F is 0), nibbles "
    "half-split in every 16: x = s E2M1(q). Q1_0: d, bit i: x = d or -d. Q2_0: d, two bits: x = d (q - 1). TQ2_0: "
    "codes as Q2_K from byte 0, d at 64: x = d (q - 1). TQ1_0: byte ceil(v 256 / 243), v of five digits to base 3, the "
    "first most significant: bytes m < 32 hold m + 32 n, bytes 32 + m hold 160 + m + 16 n, bytes 48 + m hold "
    "240 + m + 4 n (n < 4), d at 52.",
    "Every operation is rounded to float32, from left to right.",
]
DECODE_HEADER = ["Input blocks u8 [rows, bytes]; param type. Output x f32 [rows, numbers].", *_BITS_HEADER]
ENCODE_HEADER = [
    "Inputs x f32 [rows, n], and importance f32 [n] in some cases; param type. Output blocks u8 [rows, bytes]: exactly "
    "what ggml's quantize functions write, built without contraction of products and sums (no FMA).",
    "The definition is refllm/evaluate/golden/suites/gguf_definition.py and gguf_search.py: scalar float32 text.",
    *_BITS_HEADER,
]
_FIRST = {"kind": "first_principles", "name": "the header above, one number at a time in float32"}
TIES = {"Q4_0": "TieUp", "Q5_0": "TieUp", "Q4_1": "TieUp", "Q5_1": "TieUp", "Q8_0": "TieAway", "Q8_1": "TieAway",
        "TQ1_0": "TieAway", "TQ2_0": "TieAway", "Q2_0": "TieAway", "MXFP4": "TieTowardZero",
        "NVFP4": "TieTowardZero"}  # fmt: skip
AFFINE = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
SIGNED = ("Q4_0", "Q5_0", "Q3_K", "Q6_K", "Q8_K", "IQ4_NL", "IQ4_XS")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
BITS = {"sc": {"Q2_K": 4, "Q6_K": 8}, "q": {"Q1_0": 1, "Q2_K": 2, "TQ2_0": 2, "Q2_0": 2, "Q3_K": 3, "Q5_0": 5,
        "Q5_1": 5, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8, "Q8_1": 8, "Q8_K": 8}}  # fmt: skip


def decode_suite() -> SuiteSpec:
    """The suite formats/gguf_decode."""
    groups = [_group(name, _decode_cases(name, 100 * (t + 1)), "decode") for t, name in enumerate(SIZES)]
    bad = CaseSpec(1, "no such type", ("BadParams",), {"blocks": _bytes([[0] * 18])}, result="invalid", error="any",
                   params={"type": "Q4_9"})  # fmt: skip
    head = _head("gguf_decode", "GGUF blocks to numbers, every type", DECODE_HEADER)
    return SuiteSpec(head, gguf_notes.DECODE, [*groups, ({"params": {}, "source": _FIRST}, [bad])])


def suite() -> SuiteSpec:
    """The suite formats/gguf_encode."""
    groups = [_group(name, _encode_cases(name, 100 * (t + 1)), "encode") for t, name in enumerate(SIZES)]
    bad = CaseSpec(1, "no such type", ("BadParams",), {"x": _full(1, 32, 1.0)}, result="invalid", error="any",
                   params={"type": "Q4_9"})  # fmt: skip
    head = _head("gguf_encode", "Numbers to GGUF blocks, every type, with and without importance", ENCODE_HEADER)
    contracted = ({"params": {"type": "Q4_0"}, "source": _FIRST}, [_contracted()])
    return SuiteSpec(head, gguf_notes.ENCODE, [*groups, contracted, ({"params": {}, "source": _FIRST}, [bad])])


def _contracted() -> CaseSpec:
    """x / d + 8.5 a little below an integer: two roundings reach it, one (a fused multiply-add) does not."""
    near = ["-0x1.d08cp+2", "-0x1.8914p+2", "-0x1.419cp+2", "-0x1.f44802p+1", "-0x1.655802p+1", "-0x1.acd004p+0",
            "0x1.accff6p+0", "0x1.6557fap+1", "0x1.f447fap+1", "0x1.8913fcp+2", "0x1.d08bfcp+2"]  # fmt: skip
    row = [float.fromhex(x) for x in ["-0x1.1dep+3", "-0x1.0c02p+3", *near, "0x1p+0"]]
    return _encoded(2, "Q4_0", "sums a bit below an integer", "TieUp", _floats([row + [0.0] * (32 - len(row))]))


def _head(name: str, title: str, header: list[str]) -> dict:
    return {
        "suite": f"formats/{name}",
        "suite_version": "1.0.0",
        "lesson": "lessons/05-packed-layouts.md",
        "op": f"formats.{name.replace('_', '.')}",
        "title": title,
        "header": header,
        "generator": {"name": "refllm golden regen, suites/gguf.py", "version": "1"},
    }


def _group(name: str, cases: list[CaseSpec], op: str) -> tuple[dict, list[CaseSpec]]:
    """A type's cases; what upstream answered to them is in gguf_oracles and must be the same."""
    answers = [output.tensor.array for case in cases for output in case.expected.values()]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in answers)).hexdigest()
    checked = []
    for oracle, version, call, digests in gguf_oracles.ANSWERS[op]:
        if name in digests:
            if digests[name] != digest:
                raise ValueError(f"{op} {name}: {oracle} {version} answered otherwise")
            checked.append({"oracle": oracle, "version": version, "agreement": "bit_exact", "note": call})
    source = _FIRST | ({"cross_checked": checked} if checked else {})
    return {"params": {"type": name}, "source": source}, cases


def _bytes(rows: list) -> Values:
    return Values("u8", np.array(rows, np.uint8))


def _floats(rows: list, recipe: dict | None = None) -> Values:
    return Values("f32", np.array(rows, np.float32), recipe)


def _full(rows: int, columns: int, value: float) -> Values:
    return _floats([[value] * columns] * rows, {"kind": "full", "value": float(value).hex()})


def _decoded(id: int, name: str, comment: str, flags: str, blocks: list[bytes]) -> CaseSpec:
    with np.errstate(all="ignore"):
        x = [decode(name, block) for block in blocks]
    expected = {"x": Output({"class": "bits"}, tensor=_floats(x))}
    return CaseSpec(id, comment, tuple(flags.split()), {"blocks": _bytes([list(b) for b in blocks])}, expected)


def _scales(name: str, fields: dict, value: float) -> dict:
    """Fields with other floating scales."""
    new = {key: [half_bits(value)] for key in ("d", "m", "dmin", "s") if key in fields}
    if name == "Q8_K":
        new["d"] = [int(f32(value).view(np.uint32))]
    if name == "NVFP4":
        new["s"] = [1, 2, 7, 9] if abs(value) < 2**-10 else [0x38, 0x40, 0x44, 0x7E]
    if name == "MXFP4":
        new["e"] = [1 if abs(value) < 2**-10 else 130]
    return fields | new


def _decode_cases(name: str, id: int) -> list[CaseSpec]:
    numbers, size = SIZES[name]
    raw = [word >> 56 for word in splitmix64(id, 2 * size)]
    random = [read(name, bytes(raw[:size])), read(name, bytes(raw[size:]))]
    random = [write(name, _scales(name, fields, scale)) for fields, scale in zip(random, (0.37, -1.1), strict=True)]
    counting = {field: list(range(count)) for field, (count, _) in PLACES.get(name, {}).items()}
    counting["q"] = [i % (2 ** BITS["q"].get(name, 4)) for i in range(numbers)]
    if name == "TQ1_0":
        counting = {"q": [i // 5 % 3 for i in range(numbers)], "d": [0]}
    if "sc" in counting:
        step = 2 ** BITS["sc"].get(name, 6) // len(counting["sc"])
        counting["sc"] = [step * j + step - 1 for j in range(len(counting["sc"]))]
    in_order = write(name, _scales(name, counting, 0.75))
    ones = read(name, bytes([0xFF] * size))
    cases = [
        _decoded(id, name, "random bytes, two blocks a row apart", "Random", random),
        _decoded(id + 1, name, "codes and scales that count up", "BitOrder", [in_order]),
        _decoded(id + 2, name, "the same under the smallest scale", "Subnormal",
                 [write(name, _scales(name, counting, 2.0**-24))]),
        _decoded(id + 3, name, "all bits set", "Extremes", [write(name, _scales(name, ones, 1.5))]),
    ]  # fmt: skip
    if name not in ("Q1_0", "MXFP4", "NVFP4", "IQ4_NL", "Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"):
        zero = {"Q4_0": 8, "Q5_0": 16, "Q3_K": 4, "Q6_K": 32, "TQ1_0": 1, "TQ2_0": 1, "Q2_0": 1}.get(name, 0)
        fields = _scales(name, counting, -2.0) | {"q": [zero] * numbers}
        cases.append(_decoded(id + 4, name, "zeros under a negative scale", "SignedZero", [write(name, fields)]))
    cases.append(CaseSpec(id + 5, "a byte too few", ("OddSize",), {"blocks": _bytes([[0] * (size - 1)])},
                          result="invalid", error="shape"))  # fmt: skip
    return cases


def _encoded(id: int, name: str, comment: str, flags: str, x: Values, importance: Values | None = None) -> CaseSpec:
    weights = None if importance is None else list(importance.array)
    rows = [list(encode_row(name, list(row), weights)) for row in x.array]
    inputs = {"x": x} | ({} if importance is None else {"importance": importance})
    return CaseSpec(
        id, comment, tuple(flags.split()), inputs, {"blocks": Output({"class": "bits"}, tensor=_bytes(rows))}
    )


def _dyadic(seed: int, rows: int, columns: int, bits: int = 16, exp2: int = -12) -> Values:
    flat = [float(v) for v in dyadic(seed, bits, exp2, rows * columns)]
    return _floats([flat[r * columns : (r + 1) * columns] for r in range(rows)], dyadic_recipe(seed, bits, exp2))


def _arange(columns: int, start: int, step: int) -> Values:
    return _floats([[start + step * i for i in range(columns)]], {"kind": "arange", "start": start, "step": step})


def _ties(name: str) -> Values:
    """Numbers halfway between two codes."""
    numbers = SIZES[name][0]
    if name in ("MXFP4", "NVFP4"):
        some = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    elif name.startswith("Q8"):
        some = [127, *(k + 0.5 for k in range(7))]
    elif TIES[name] == "TieAway":
        some = [2, 1, -1, 0, 0.5, 1.5, -0.5, -1.5]
    else:
        top = {"Q4_0": -8, "Q5_0": -16, "Q4_1": 15, "Q5_1": 31}[name]
        some = [top, *(k + 0.5 for k in range(7))] if top > 0 else [top, *(k - 3.5 for k in range(7))]
    low = [0.0 if name.endswith("_1") and name != "Q8_1" else -v for v in some[1:]]
    return _floats([[[*some, 0.0, *low][i % 16] for i in range(numbers)]])


def _encode_cases(name: str, id: int) -> list[CaseSpec]:
    numbers = SIZES[name][0]
    row = 64 if numbers < 64 else numbers
    random = _dyadic(id, 2, row)
    search = name in ("IQ4_NL", "IQ4_XS", *K_QUANTS)
    flags = "Random" + " Search" * search + " Requantized" * (name in (*K_QUANTS, "IQ4_XS"))
    ones = [1.0 if i % 7 else -0.0 for i in range(numbers)]
    cases = [
        _encoded(id, name, "random numbers, two rows", flags, random),
        _encoded(id + 1, name, "numbers that count up", "NibbleOrder", _arange(numbers, -numbers // 2, 1)),
        _encoded(id + 2, name, "zeros", "AllZeroGroup", _full(1, numbers, 0.0)),
        _encoded(id + 3, name, "zeros of both signs; ones among them", "NegativeZero",
                 _floats([[-0.0] * numbers, [0.0 * (-1) ** i for i in range(numbers)], ones])),
        _encoded(id + 4, name, "float16 scales that are subnormal", "Subnormal", _dyadic(id + 4, 1, row, exp2=-34)),
    ]  # fmt: skip
    if name in TIES:
        cases.append(_encoded(id + 5, name, "halves", TIES[name], _ties(name)))
    if name in SIGNED:
        some = [float(v) for v in dyadic(id + 6, 8, -5, numbers)]
        some[3] = 5.0
        cases.append(_encoded(id + 6, name, "the largest magnitude positive, then negative", "AbsmaxNegative",
                              _floats([some, [-v for v in some]])))  # fmt: skip
    if name in AFFINE:
        some = [5.0 + float(v) for v in dyadic(id + 7, 8, -7, numbers)]
        cases.append(_encoded(id + 7, name, "all above zero, all below", "OneSided",
                              _floats([some, [-v for v in some]])))  # fmt: skip
    return cases + (_importance_cases(name, id, random, row) if name in SEARCHED else []) + _rejected(name, id)


def _importance_cases(name: str, id: int, random: Values, row: int) -> list[CaseSpec]:
    rising = Values("f32", np.arange(row, dtype=np.float32), {"kind": "arange", "start": 0, "step": 1})
    none = Values("f32", np.zeros(row, np.float32), {"kind": "full", "value": "0x0p+0"})
    cases = [
        _encoded(id + 20, name, "importance that rises", "Importance", random, rising),
        _encoded(id + 21, name, "no column is important", "ImportanceZero", random, none),
    ]
    if name in TIES:  # 32-blocks whose weights see the whole row
        x = random.array.copy()
        x[:, 32:] *= np.float32(64)
        cases.append(_encoded(id + 22, name, "the second block of a row is larger", "RowMean Importance", _floats(x),
                              rising))  # fmt: skip
    return cases


def _rejected(name: str, id: int) -> list[CaseSpec]:
    numbers = SIZES[name][0]

    def case(at, comment, flag, error, **inputs):
        return CaseSpec(id + at, comment, (flag,), inputs, result="invalid", error=error)

    good = _full(1, numbers, 1.0)
    cases = [
        case(30, "NaN", "NonFinite", "value", x=_floats([[math.nan] * numbers], {"kind": "full", "value": "nan"})),
        case(31, "infinity", "NonFinite", "value", x=_floats([[math.inf] * numbers], {"kind": "full", "value": "inf"})),
        case(32, "a number too few", "OddSize", "shape", x=_full(1, numbers - 1, 1.0)),
    ]
    if name not in ("Q8_K", "MXFP4", "NVFP4"):
        cases.append(case(33, "too large", "ScaleOverflow", "overflow", x=_full(1, numbers, -(2.0**120))))
    if name in SEARCHED:
        negative = Values("f32", np.full(numbers, -1, np.float32), {"kind": "full", "value": "-0x1p+0"})
        short = Values("f32", np.ones(numbers - 1, np.float32), {"kind": "full", "value": "0x1p+0"})
        cases.append(case(34, "negative importance", "BadImportance", "value", x=good, importance=negative))
        cases.append(case(35, "importance for fewer columns", "BadImportance", "shape", x=good, importance=short))
    else:
        one = Values("f32", np.ones(numbers, np.float32), {"kind": "full", "value": "0x1p+0"})
        cases.append(
            case(34, "importance for a type that knows none", "BadImportance", "value", x=good, importance=one)
        )
    return cases
