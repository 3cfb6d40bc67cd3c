"""The suite formats/compressed_tensors. Ids are never reused: packing 1.., reading the same 101.., rejected 301.."""

from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec
from refllm.evaluate.golden.suites import checkpoint_notes, checkpoint_oracles
from refllm.evaluate.golden.suites.checkpoint_definition import (
    ANY_ZERO,
    SOURCE,
    case,
    checked,
    even_groups,
    head,
    invalid,
    line_words,
    random_codes,
    random_scales,
    transposed,
    variants,
    weights,
    words,
)
from refllm.evaluate.golden.suites.exact import to_f32
from refllm.evaluate.golden.suites.number_definition import decode

HEADER = [
    "Params: direction (pack, unpack), format, bits (integer formats). Codes and zero points are u8 from 0 on.",
    "pack-quantized (bits 1 to 8): weight_packed i32 [out, ceil(in bits / 32)], each row one stream of bits, low bits "
    "first; weight_scale [out, groups] as given; weight_shape i64 [2] = out, in; weight_zero_point i32 "
    "[ceil(out bits / 32), groups], each column a stream in the same way, if zero points are given; weight_g_idx i32 "
    "[in] "
    "if g_idx is given. Declare words=padded for the older packing with 32 // bits codes in a word and the rest empty.",
    "int-quantized: weight i8 [out, in] = code - 2^(bits-1), weight_scale, weight_zero_point i8 likewise.",
    "Without zero points the zero point is 2^(bits-1). w_hat = scale (code - zero_point), rounded to float32 once.",
    "nvfp4-pack-quantized: codes are E2M1 (u8, 0 to 15), scale f8_e4m3fn [out, in / 16], global_scale f32 [1]; stored "
    "as "
    "weight_packed u8 [out, in / 2] (even column low nibble), weight_scale, weight_global_scale. w_hat = E2M1 times "
    "(E4M3(scale) / global_scale), both operations in float32.",
    "With param parts several NVFP4 weights lie one below the other, as engines fuse q, k and v or gate and up: parts "
    "are their numbers of rows, global_scale is f32 [parts], and each part has its own. Only unpack.",
    "mxfp4-pack-quantized: the same codes, scale f8_e8m0fnu [out, in / 32]; w_hat = E2M1 times 2^(scale - 127). "
    "Declare "
    "scale_255=infinite if 255 is an infinity and not NaN.",
    "float-quantized: codes f8_e4m3fn [out, in] stored as weight, scale f32 [out, groups] as weight_scale; w_hat is "
    "their "
    "product.",
]


def _stored(codes, scale, zero, bits, form, dtype, g_idx) -> dict:
    """Stored tensors as (dtype, nested); packed ones also in the older packing."""
    middle, per_word = 1 << (bits - 1), 32 // bits
    found = {"weight_scale": (dtype, scale), "weight_g_idx": ("i32", g_idx) if g_idx else None}
    if form == "int-quantized":
        minus = lambda rows: [[x - middle for x in row] for row in rows]
        return found | {"weight": ("i8", minus(codes)), "weight_zero_point": ("i8", minus(zero)) if zero else None}
    dense, padded = (line_words(codes, bits, per_word=n) for n in (None, per_word))
    found |= {"weight_packed": {"dense": dense, "padded": padded}, "weight_shape": ("i64", [len(codes), len(codes[0])])}
    if zero:
        columns = transposed(zero)
        ways = {"dense": None, "padded": per_word}
        found["weight_zero_point"] = {k: transposed(line_words(columns, bits, per_word=n)) for k, n in ways.items()}
    return found


def _int(id, comment, flags, codes, scale, zero=None, *, bits=4, form="pack-quantized", g_idx=None, dtype="f16"):
    """Both directions of one weight."""
    groups = g_idx or even_groups(len(codes[0]), len(scale[0]))
    params = {"format": form, "bits": bits}
    given = {
        "codes": ("u8", codes),
        "scale": (dtype, scale),
        "zero_point": ("u8", zero) if zero else None,
        "g_idx": ("i32", g_idx) if g_idx else None,
    }
    tensors = _stored(codes, scale, zero, bits, form, dtype, g_idx)
    expected, stored = dict(tensors), dict(tensors)
    for name, ways in tensors.items():
        if isinstance(ways, dict):  # the conventions differ only where codes straddle words
            differ = ways["dense"] != ways["padded"]
            expected[name] = variants("i32", "words", ways) if differ else ("i32", ways["dense"])
            stored[name] = ("i32", ways["dense"])
    read = given | {"w_hat": ("f32", weights(codes, scale, zero, groups, 1 << (bits - 1)))}
    found = [case(id, comment, flags, {"direction": "pack"} | params, given, expected)]
    return [*found, case(100 + id, comment, flags, {"direction": "unpack"} | params, stored, read)]


def _integers() -> list[CaseSpec]:
    in_order = lambda rows, columns, levels: [[(i + 3 * o) % levels for i in range(columns)] for o in range(rows)]
    ones = lambda rows: [[1.0]] * rows
    g_idx = [2, 0, 1, 1, 0, 2, 2, 0]
    return [
        *_int(1, "codes in order", "NibbleOrder OffsetBinary UnsignedSubtract", [list(range(8)), list(range(8, 16))],
              ones(2)),
        *_int(2, "3 x 8, zero points of three outputs in one word", "Transposed ZeroPoint", in_order(3, 8, 16), ones(3),
              [[0], [9], [15]]),
        *_int(3, "9 x 3 in groups of 1: zero points of nine outputs in two words", "Transposed GroupBoundary SignBit",
              in_order(9, 3, 16), [[1.0, 8.0, 64.0]] * 9, [[o % 16, 15 - o, (7 * o) % 16] for o in range(9)]),
        *_int(4, "1 bit, 37 columns", "OddSize SignBit", in_order(2, 37, 2), ones(2), [[0], [1]], bits=1),
        *_int(5, "2 bits, 17 columns", "OddSize SignBit", in_order(2, 17, 4), ones(2), bits=2),
        *_int(6, "3 bits, 12 columns", "BitStream OddSize", in_order(3, 12, 8), ones(3), [[0], [7], [3]], bits=3),
        *_int(7, "5 bits, 33 columns", "BitStream OddSize", in_order(2, 33, 32), ones(2), bits=5),
        *_int(8, "6 bits, 16 columns: three whole words", "BitStream", in_order(2, 16, 64), ones(2), [[63], [1]],
                bits=6),
        *_int(9, "7 bits, 9 columns", "BitStream OddSize", in_order(6, 9, 128), ones(6), [[o * 21] for o in range(6)],
              bits=7),
        *_int(10, "8 bits: 0, 127, 128, 255, one word and a byte", "SignBit UnsignedSubtract OddSize",
              [[0, 127, 128, 255, 1], [255, 128, 127, 0, 254]], ones(2), [[255], [0]], bits=8),
        *_int(11, "one column", "OddSize", [[7], [15], [0]], ones(3)),
        *_int(12, "symmetric", "Symmetric", [[8, 9, 7, 15, 0]], [[0.5]]),
        *_int(13, "act-order", "ActOrder", in_order(2, 8, 16), [[1.0, 4.0, 32.0]] * 2, [[3, 8, 13], [0, 1, 15]],
              g_idx=g_idx),
        *_int(14, "float32 scales, products rounded once", "GroupBoundary", in_order(2, 4, 16),
              [[float.fromhex("0x1.555556p-3"), 3.0]] * 2, [[1, 14], [8, 7]], dtype="f32"),
        *_int(21, "int-quantized, 8 bits: -128 to 127", "OffsetBinary", [[0, 1, 127, 128, 129, 255]], [[0.25]], bits=8,
              form="int-quantized"),
        *_int(22, "int-quantized, 4 bits with zero points", "OffsetBinary ZeroPoint", in_order(3, 6, 16),
              [[1.0, 2.0]] * 3, [[0, 15], [8, 7], [3, 12]], form="int-quantized"),
    ]  # fmt: skip


def _random(bits: int, id: int) -> list[CaseSpec]:
    codes, zero = random_codes(100 * id, 9, 40, bits), random_codes(100 * id + 1, 9, 5, bits)
    scale = random_scales(100 * id + 2, 9, 5)
    return _int(id, f"9 x 40 in groups of 8, {bits} bits", "Random", codes, scale, zero, bits=bits)


def times(a: float, b: float) -> float:
    """The float32 product; infinities and NaN as IEEE has them."""
    if a != a or b != b:
        return float("nan")
    if abs(b) == float("inf"):
        return float("nan") if a == 0 else (b if a > 0 else -b)
    if a == 0 or b == 0:
        return a * b  # a zero with its sign
    exact = Fraction(a) * Fraction(b)
    if abs(exact) >= 2**128:
        return float("inf") if exact > 0 else float("-inf")
    return float(to_f32(exact))


def _floats(id, comment, flags, form, codes, scale, divisor=None, parts=None) -> list[CaseSpec]:
    """Both directions of one weight; of fused ones, `parts` rows with a divisor each, only reading."""
    divisors = divisor if parts else [divisor]
    of_row = [d for d, rows in zip(divisors, parts or [len(codes)], strict=True) for _ in range(rows)]
    nvfp4, mxfp4 = form == "nvfp4-pack-quantized", form == "mxfp4-pack-quantized"
    dtype = "f8_e4m3fn" if nvfp4 else "f8_e8m0fnu" if mxfp4 else "f32"
    given = {"codes": ("u8" if nvfp4 or mxfp4 else "f8_e4m3fn", codes), "scale": (dtype, scale)}
    stored = {"weight_scale": (dtype, scale)}
    if nvfp4:
        given["global_scale"] = stored["weight_global_scale"] = ("f32", divisors)
    if nvfp4 or mxfp4:
        stored["weight_packed"] = ("u8", [words(row, 4, 8) for row in codes])
    else:
        stored["weight"] = given["codes"]

    def factor(o, i, at_255):
        if nvfp4:
            s = decode("FP8_E4M3FN", scale[o][i // 16])
            return s if s != s else float(to_f32(Fraction(s) / Fraction(of_row[o])))
        if mxfp4:
            return at_255 if scale[o][i // 32] == 255 else 2.0 ** (scale[o][i // 32] - 127)
        return scale[o][i // (len(codes[0]) // len(scale[0]))]

    def w_hat(at_255):
        element = "FP4_E2M1" if nvfp4 or mxfp4 else "FP8_E4M3FN"
        return [
            [times(decode(element, c), factor(o, i, at_255)) for i, c in enumerate(row)] for o, row in enumerate(codes)
        ]

    ways = {"nan": w_hat(float("nan")), "infinite": w_hat(float("inf"))}
    special = mxfp4 and any(255 in row for row in scale)
    read = given | {"w_hat": variants("f32", "scale_255", ways, ANY_ZERO) if special else ("f32", ways["nan"])}
    params = {"format": form} | ({"parts": parts} if parts else {})
    reading = case(100 + id, comment, flags, {"direction": "unpack"} | params, stored, read)
    return [reading] if parts else [case(id, comment, flags, {"direction": "pack"} | params, given, stored), reading]


def _float_cases() -> list[CaseSpec]:
    every, one = [list(range(16))], 0x38
    third = float.fromhex("0x1.555556p-2")
    return [
        *_floats(31, "every E2M1 code, scale 1", "NibbleOrder FloatCodes", "nvfp4-pack-quantized", every, [[one]], 1.0),
        *_floats(32, "3 x 32, global scale 4", "ReciprocalScale BlockSize GroupBoundary", "nvfp4-pack-quantized",
                 [[(5 * i + o) % 16 for i in range(32)] for o in range(3)], [[one, one + 24], [one + 8, 1], [0x7E,
                         0]], 4.0),
        *_floats(33, "scale / global scale is no float32", "ReciprocalScale", "nvfp4-pack-quantized", every, [[0x35]],
                3.0),
        *_floats(34, "a NaN scale", "FloatCodes", "nvfp4-pack-quantized", every, [[0x7F]], 1.0),
        *_floats(35, "gate and up fused, global scales 4 and 8", "FusedLayers", "nvfp4-pack-quantized",
                 [[(5 * i + o) % 16 for i in range(16)] for o in range(4)], [[one], [one + 8], [one], [0x7E]],
                 [4.0, 8.0], [2, 2]),
        *_floats(36, "q, k and v fused: 3, 1 and 2 rows", "FusedLayers GroupBoundary", "nvfp4-pack-quantized",
                 [[(7 * i + 3 * o) % 16 for i in range(32)] for o in range(6)],
                 [[one + o, one + 8 - o] for o in range(6)], [96.0, 1.5, 24.0], [3, 1, 2]),
        *_floats(37, "one part is no fusion", "FusedLayers", "nvfp4-pack-quantized", every, [[one]], [2.0], [1]),
        *_floats(41, "2 x 64, scales 1 to 2^3", "NibbleOrder BlockSize GroupBoundary", "mxfp4-pack-quantized",
                 [[(3 * i + o) % 16 for i in range(64)] for o in range(2)], [[127, 130], [128, 124]]),
        *_floats(42, "scale codes 0 and 254", "E8m0Scale", "mxfp4-pack-quantized", [[1, 2, 3, 9] * 16], [[0, 254]]),
        *_floats(43, "the scale code 255", "E8m0Scale", "mxfp4-pack-quantized", [[1, 9, 2, 7] * 8], [[255]]),
        *_floats(46, "float-quantized: signs, subnormals, NaN", "FloatCodes", "float-quantized",
                 [[one, 0x7E, 0xFE, 0x01, 0x81, 0x00], [0x7F, 0xFF, 0x80, 0x08, 0x07, 0xB8]], [[0.5], [third]]),
        *_floats(47, "float-quantized: two groups", "FloatCodes GroupBoundary", "float-quantized",
                 [[one, one + 8, one, one + 4]], [[1.0, 64.0]]),
    ]  # fmt: skip


def _rejected() -> list[CaseSpec]:
    fine = {"codes": ("u8", [[1, 2, 3, 4]] * 2), "scale": ("f16", [[1.0]] * 2)}
    pack = {"direction": "pack", "format": "pack-quantized", "bits": 4}
    unpack = pack | {"direction": "unpack"}
    tensors = {
        "weight_packed": ("i32", [[0x4321]] * 2),
        "weight_scale": ("f16", [[1.0]] * 2),
        "weight_shape": ("i64", [2, 4]),
    }
    e2m1 = {"codes": ("u8", [[1] * 8]), "scale": ("f8_e4m3fn", [[0x38]]), "global_scale": ("f32", [1.0])}
    nvfp4 = {"direction": "pack", "format": "nvfp4-pack-quantized"}
    signed = {"weight": ("i8", [[-9, 7]]), "weight_scale": ("f16", [[1.0]])}
    return [
        invalid(301, "the code 16", "OutOfRange", pack, fine | {"codes": ("u8", [[16] * 4] * 2)}),
        invalid(302, "the zero point 16", "OutOfRange", pack, fine | {"zero_point": ("u8", [[16]] * 2)}),
        invalid(303, "int-quantized: -9 in 4 bits", "OutOfRange", unpack | {"format": "int-quantized"}, signed),
        invalid(304, "0 bits", "BadParams", pack | {"bits": 0}, fine),
        invalid(305, "9 bits", "BadParams", pack | {"bits": 9}, fine),
        invalid(306, "an unknown format", "BadParams", pack | {"format": "marlin-24"}, fine),
        invalid(307, "3 groups of 4 columns", "GroupNotDividing", pack, fine | {"scale": ("f16", [[1.0] * 3] * 2)},
                "shape"),
        invalid(308, "a NaN scale", "NonFinite", pack, fine | {"scale": ("f16", [[float("nan")]] * 2)}),
        invalid(309, "weight_shape of 9 columns", "BadShape", unpack, tensors | {"weight_shape": ("i64", [2, 9])},
                "shape"),
        invalid(310, "scales of three rows", "BadShape", unpack, tensors | {"weight_scale": ("f16", [[1.0]] * 3)},
                "shape"),
        invalid(311, "zero points packed along the groups", "BadShape", unpack,
                tensors | {"weight_zero_point": ("i32", [[8]] * 2)}, "shape"),
        invalid(312, "nvfp4: 8 columns", "WidthNotDividing", nvfp4, e2m1, "shape"),
        invalid(313, "nvfp4: a global scale of 0", "NonFinite", nvfp4,
                e2m1 | {"codes": ("u8", [[1] * 16]), "global_scale": ("f32", [0.0])}),
        invalid(314, "mxfp4: 48 columns", "WidthNotDividing", nvfp4 | {"format": "mxfp4-pack-quantized"},
                {"codes": ("u8", [[1] * 48]), "scale": ("f8_e8m0fnu", [[127]])}, "shape"),
        invalid(315, "nvfp4: fused parts of 1 + 2 rows in 2", "BadShape",
                {"direction": "unpack", "format": "nvfp4-pack-quantized", "parts": [1, 2]},
                {"weight_packed": ("u8", [[17] * 8] * 2), "weight_scale": ("f8_e4m3fn", [[0x38]] * 2),
                 "weight_global_scale": ("f32", [1.0, 2.0])}, "shape"),
        invalid(316, "nvfp4: two fused parts, one global scale", "BadShape",
                {"direction": "unpack", "format": "nvfp4-pack-quantized", "parts": [1, 1]},
                {"weight_packed": ("u8", [[17] * 8] * 2), "weight_scale": ("f8_e4m3fn", [[0x38]] * 2),
                 "weight_global_scale": ("f32", [1.0])}, "shape"),
    ]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite formats/compressed_tensors."""
    groups = [({"params": {}, "source": SOURCE}, [*_integers(), *_float_cases()])]
    for bits in range(1, 9):
        cases = _random(bits, 50 + bits)
        frozen = checkpoint_oracles.matches(
            f"pack-quantized, {bits} bits", cases[0], ("weight_packed", "weight_zero_point")
        )
        groups.append(
            ({"params": {}, "source": checked(frozen, *checkpoint_oracles.CALLS["compressed-tensors"])}, cases)
        )
    groups.append(({"params": {}, "source": SOURCE}, _rejected()))
    title = (
        "compressed-tensors checkpoints: integer and float codes, zero points and scales to and from the stored tensors"
    )
    top = head("compressed_tensors", title, HEADER, "checkpoint_compressed") | {"suite_version": "1.1.0"}
    return SuiteSpec(top, checkpoint_notes.COMPRESSED, groups)
