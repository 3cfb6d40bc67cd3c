"""The suites formats/gptq and formats/awq. Ids are never reused: packing 1.., reading the same 101.., rejected 301.."""

from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec
from refllm.evaluate.golden.suites import checkpoint_notes, checkpoint_oracles
from refllm.evaluate.golden.suites.checkpoint_definition import (
    ANY_ZERO,
    SOURCE,
    awq_words,
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
)
from refllm.evaluate.golden.suites.exact import to_f16

_SHARED = [
    "direction pack: inputs codes u8 [out, in], scale f32 or f16 [out, groups], zero_point u8 [out, groups] (left out: "
    "2^(bits-1)). direction unpack: the stored tensors are the inputs, and the outputs are codes, scale f16, "
    "zero_point "
    "and w_hat f32 [out, in] = scale (code - zero_point), rounded once.",
]
GPTQ_HEADER = [
    "Params: direction, bits (2, 3, 4, 8), checkpoint_format (gptq, gptq_v2).",
    *_SHARED,
    "Stored: qweight i32 [in bits / 32, out], column o holding the codes of output o as one stream of bits, low bits "
    "of "
    "low words first; qzeros i32 [groups, out bits / 32], row g holding the zero points of group g in the same way, "
    "minus "
    "one in the format gptq; scales f16 [groups, out], rounded to nearest, ties to even; g_idx i32 [in], the group of "
    "each "
    "column. The input g_idx may be left out where groups divide the columns: consecutive columns then. It is an "
    "output, "
    "too.",
    "in and out must fill whole words (multiples of 32 / bits; of 32 for 3 bits).",
]
AWQ_HEADER = [
    "Params: direction. 4 bits, version gemm.",
    *_SHARED,
    "Stored: qweight i32 [in, out / 8], nibble n (from the low end) of word c in row i holding the code of output "
    "8 c + (0 2 4 6 1 3 5 7)[n] and input i; qzeros i32 [groups, out / 8], zero points as they are, in the same order; "
    "scales f16 [groups, out]. Groups are consecutive columns and divide them.",
]


def _gptq_stored(codes, scale, zero, g_idx, bits, version) -> dict:
    zero = zero or [[1 << (bits - 1)] * len(row) for row in scale]
    minus = version == "gptq"
    return {
        "qweight": ("i32", transposed(line_words(codes, bits))),
        "qzeros": ("i32", line_words([[z - minus for z in row] for row in transposed(zero)], bits)),
        "scales": ("f16", transposed([[float(to_f16(Fraction(s))) for s in row] for row in scale])),
        "g_idx": ("i32", g_idx),
    }


def _gptq(id, comment, flags, codes, scale, zero, *, bits=4, version="gptq", g_idx=None, dtype="f16") -> list[CaseSpec]:
    """Both directions of one weight."""
    groups = g_idx or even_groups(len(codes[0]), len(scale[0]))
    tensors = _gptq_stored(codes, scale, zero, groups, bits, version)
    params = {"bits": bits, "checkpoint_format": version}
    inputs = {
        "codes": ("u8", codes),
        "scale": (dtype, scale),
        "zero_point": ("u8", zero) if zero else None,
        "g_idx": ("i32", g_idx) if g_idx else None,
    }
    pack = case(id, comment, flags, {"direction": "pack"} | params, inputs, tensors)
    kept = transposed(tensors["scales"][1])
    zero = zero or [[1 << (bits - 1)] * len(row) for row in scale]
    read = {
        "codes": ("u8", codes),
        "scale": ("f16", kept),
        "zero_point": ("u8", zero),
        "g_idx": ("i32", groups),
        "w_hat": ("f32", weights(codes, kept, zero, groups)),
    }
    stored = tensors if g_idx else {name: t for name, t in tensors.items() if name != "g_idx"}
    return [pack, case(100 + id, comment, flags, {"direction": "unpack"} | params, stored, read)]


def _gptq_layout() -> list[CaseSpec]:
    in_order = lambda rows, columns, levels: [[(i + o) % levels for i in range(columns)] for o in range(rows)]
    ones = lambda rows: [[1.0]] * rows
    return [
        *_gptq(1, "codes in order, zero points 1 to 8", "NibbleOrder ZeroPoint UnsignedSubtract",
               [list(range(8))] * 8, ones(8), [[o + 1] for o in range(8)]),
        *_gptq(2, "the same in gptq_v2", "NibbleOrder ZeroPoint UnsignedSubtract", [list(range(8))] * 8, ones(8),
               [[o + 1] for o in range(8)], version="gptq_v2"),
        *_gptq(3, "8 x 24, three groups of very different scale", "Transposed GroupBoundary SignBit",
               in_order(8, 24, 16), [[1.0, 8.0, 64.0]] * 8, [[1, 15, 7], [2, 9, 14], [12, 3, 5], [4, 8, 1]] * 2),
        *_gptq(4, "no zero points", "Symmetric", in_order(8, 8, 16), ones(8), None),
        *_gptq(5, "no zero points, gptq_v2", "Symmetric SignBit", in_order(8, 8, 16), ones(8), None, version="gptq_v2"),
        *_gptq(6, "2 bits", "NibbleOrder SignBit", in_order(16, 16, 4), ones(16), [[1 + o % 3] for o in range(16)],
               bits=2),
        *_gptq(7, "3 bits: 32 codes in three words", "BitStream SignBit", in_order(32, 32, 8), ones(32),
               [[1 + o % 7] for o in range(32)], bits=3),
        *_gptq(8, "8 bits: 0, 127, 128, 255", "SignBit UnsignedSubtract", [[0, 127, 128, 255], [255, 0, 127, 128],
               [128, 255, 0, 127], [127, 128, 255, 0]], [[0.5]] * 4, [[1], [128], [255], [127]], bits=8),
        *_gptq(9, "act-order: columns in any order", "ActOrder", in_order(8, 16, 16), [[1.0, 4.0, 32.0]] * 8,
               [[3, 8, 13]] * 8, g_idx=[2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 0, 0, 2, 1, 2, 1]),
        *_gptq(10, "the last group is shorter", "ActOrder GroupBoundary", in_order(8, 24, 16), [[1.0, 16.0]] * 8,
               [[7, 9]] * 8, g_idx=[i // 16 for i in range(24)]),
        *_gptq(11, "zero points 0 and 15, gptq_v2", "ZeroPoint", in_order(8, 8, 16), ones(8),
               [[15 * (o % 2)] for o in range(8)], version="gptq_v2"),
        *_gptq(12, "zero points 1 and 15, gptq", "ZeroPoint", in_order(8, 8, 16), ones(8),
               [[1 + 14 * (o % 2)] for o in range(8)]),
        *_gptq(13, "float32 scales on halves of a float16 step, and subnormals", "ScaleRounding", in_order(8, 8, 16),
               [[1 + 2.0**-11], [1 + 3 * 2.0**-11], [-1 - 2.0**-11], [2.0**-24], [2.0**-25], [3 * 2.0**-25],
                [65519.0], [0.333251953125]], [[8]] * 8, dtype="f32"),
    ]  # fmt: skip


def _full_zero() -> CaseSpec:
    """Reading v1 zero points that the format cannot mean."""
    codes, scale, g_idx = [list(range(8))] * 8, [[1.0]] * 8, [0] * 8
    stored = _gptq_stored(codes, scale, [[16]] * 8, g_idx, 4, "gptq")
    read = {"zero": [[0]] * 8, "plus_one": [[16]] * 8}
    expected = {
        "codes": ("u8", codes),
        "zero_point": variants("u8", "full_zero", read),
        "w_hat": variants("f32", "full_zero", {k: weights(codes, scale, z, g_idx) for k, z in read.items()}, ANY_ZERO),
    }
    params = {"direction": "unpack", "bits": 4, "checkpoint_format": "gptq"}
    return case(201, "qzeros of 0xffffffff", "ZeroPointZero", params, stored, expected, "acceptable")


def _random_gptq(bits: int, version: str, id: int) -> list[CaseSpec]:
    out, columns, groups = 32, 32, 4
    codes = random_codes(1000 * id, out, columns, bits)
    zero = random_codes(1000 * id + 1, out, groups, bits, low=1 if version == "gptq" else 0)
    scale = random_scales(1000 * id + 2, out, groups)
    return _gptq(id, f"{out} x {columns} in groups of 8", "Random", codes, scale, zero, bits=bits, version=version)


def _gptq_rejected() -> list[CaseSpec]:
    codes, scale = ("u8", [list(range(8))] * 8), ("f16", [[1.0]] * 8)
    fine = {"codes": codes, "scale": scale}
    pack = {"direction": "pack", "bits": 4, "checkpoint_format": "gptq"}
    unpack = pack | {"direction": "unpack"}
    tensors = _gptq_stored(codes[1], scale[1], None, [0] * 8, 4, "gptq")
    zeros = lambda rows, columns: ("i32", [[0] * columns] * rows)
    return [
        invalid(301, "a zero point 0 in the format gptq", "ZeroPointZero", pack,
                fine | {"zero_point": ("u8", [[0]] + [[3]] * 7)}),
        invalid(302, "the code 16", "OutOfRange", pack, fine | {"codes": ("u8", [[16] * 8] * 8)}),
        invalid(303, "the zero point 16", "OutOfRange", pack, fine | {"zero_point": ("u8", [[16]] * 8)}),
        invalid(304, "5 bits", "BadParams", pack | {"bits": 5}, fine),
        invalid(305, "a third format", "BadParams", pack | {"checkpoint_format": "gptq_v3"}, fine),
        invalid(306, "12 columns", "WidthNotDividing", pack, fine | {"codes": ("u8", [[1] * 12] * 8)}, "shape"),
        invalid(307, "4 outputs", "WidthNotDividing", pack,
                {"codes": ("u8", [[1] * 8] * 4), "scale": ("f16", [[1.0]] * 4)}, "shape"),
        invalid(308, "3 bits, 16 columns", "WidthNotDividing", pack | {"bits": 3},
                {"codes": ("u8", [[1] * 16] * 32), "scale": ("f16", [[1.0]] * 32)}, "shape"),
        invalid(309, "3 groups of 8 columns", "GroupNotDividing", pack, fine | {"scale": ("f16", [[1.0] * 3] * 8)},
                "shape"),
        invalid(310, "g_idx names a group that has no scale", "BadShape", pack, fine | {"g_idx": ("i32",
                [0] * 7 + [1])}),
        invalid(311, "scales of 7 outputs", "BadShape", pack, fine | {"scale": ("f16", [[1.0]] * 7)}, "shape"),
        invalid(312, "a NaN scale", "NonFinite", pack, fine | {"scale": ("f32", [[float("nan")]] + [[1.0]] * 7)}),
        invalid(313, "a scale of 65520", "ScaleOverflow", pack, fine | {"scale": ("f32", [[65520.0]] + [[1.0]] * 7)},
                "overflow"),
        invalid(314, "qweight of 16 outputs, scales of 8", "BadShape", unpack, tensors | {"qweight": zeros(1, 16)},
                "shape"),
        invalid(315, "qzeros one word too wide", "BadShape", unpack, tensors | {"qzeros": zeros(1, 2)}, "shape"),
        invalid(316, "g_idx one column short", "BadShape", unpack, tensors | {"g_idx": ("i32", [0] * 7)}, "shape"),
        invalid(317, "g_idx is negative", "BadShape", unpack, tensors | {"g_idx": ("i32", [-1] + [0] * 7)}),
    ]  # fmt: skip


def gptq_suite() -> SuiteSpec:
    """The suite formats/gptq."""
    groups = [({"params": {}, "source": SOURCE}, [*_gptq_layout(), _full_zero()])]
    for id, (bits, version) in enumerate(((b, v) for v in ("gptq", "gptq_v2") for b in (2, 3, 4, 8)), 51):
        cases = _random_gptq(bits, version, id)
        frozen = checkpoint_oracles.matches(f"{version}, {bits} bits", cases[0], ("qweight", "qzeros"))
        source = checked(frozen, *checkpoint_oracles.CALLS["gptq"])
        groups.append(({"params": {}, "source": source}, cases))
    groups.append(({"params": {}, "source": SOURCE}, _gptq_rejected()))
    title = "GPTQ checkpoints: codes, zero points and scales to and from the stored words"
    return SuiteSpec(head("gptq", title, GPTQ_HEADER, "checkpoint_gptq"), checkpoint_notes.GPTQ, groups)


def _awq_stored(codes, scale, zero) -> dict:
    zero = zero or [[8] * len(row) for row in scale]
    return {
        "qweight": ("i32", [awq_words(column) for column in transposed(codes)]),
        "qzeros": ("i32", [awq_words(group) for group in transposed(zero)]),
        "scales": ("f16", transposed([[float(to_f16(Fraction(s))) for s in row] for row in scale])),
    }


def _awq(id, comment, flags, codes, scale, zero, *, dtype="f16") -> list[CaseSpec]:
    tensors = _awq_stored(codes, scale, zero)
    inputs = {"codes": ("u8", codes), "scale": (dtype, scale), "zero_point": ("u8", zero) if zero else None}
    pack = case(id, comment, flags, {"direction": "pack"}, inputs, tensors)
    kept, zero = transposed(tensors["scales"][1]), zero or [[8] * len(row) for row in scale]
    read = {
        "codes": ("u8", codes),
        "scale": ("f16", kept),
        "zero_point": ("u8", zero),
        "w_hat": ("f32", weights(codes, kept, zero, even_groups(len(codes[0]), len(scale[0])))),
    }
    return [pack, case(100 + id, comment, flags, {"direction": "unpack"}, tensors, read)]


def _awq_layout() -> list[CaseSpec]:
    in_order = lambda rows, columns: [[(i + o) % 16 for i in range(columns)] for o in range(rows)]
    return [
        *_awq(1, "outputs 0 to 7 in order, zero points 8 to 15", "NibbleOrder UnsignedSubtract",
              [[o] for o in range(8)], [[1.0]] * 8, [[8 + o] for o in range(8)]),
        *_awq(2, "16 x 3: outputs 8 to 15 in order in the second word", "NibbleOrder SignBit Transposed",
              in_order(16, 3), [[1.0]] * 16, [[15 - o] for o in range(16)]),
        *_awq(3, "8 x 6, three groups of very different scale", "GroupBoundary Transposed", in_order(8, 6),
              [[1.0, 8.0, 64.0]] * 8, [[1, 15, 7], [0, 9, 14], [12, 3, 5], [4, 8, 0]] * 2),
        *_awq(4, "zero points 0 and 15", "ZeroPoint", in_order(8, 4), [[1.0]] * 8, [[15 * (o % 2)] for o in range(8)]),
        *_awq(5, "no zero points", "Symmetric", in_order(8, 4), [[1.0]] * 8, None),
        *_awq(6, "float32 scales on halves of a float16 step, and subnormals", "ScaleRounding", in_order(8, 4),
              [[1 + 2.0**-11], [1 + 3 * 2.0**-11], [-1 - 2.0**-11], [2.0**-24], [2.0**-25], [3 * 2.0**-25],
               [65519.0], [0.333251953125]], [[8]] * 8, dtype="f32"),
    ]  # fmt: skip


def _awq_rejected() -> list[CaseSpec]:
    fine = {"codes": ("u8", [[1, 2, 3, 4]] * 8), "scale": ("f16", [[1.0]] * 8)}
    pack, unpack = {"direction": "pack"}, {"direction": "unpack"}
    tensors = _awq_stored(fine["codes"][1], fine["scale"][1], None)
    return [
        invalid(301, "the code 16", "OutOfRange", pack, fine | {"codes": ("u8", [[16] * 4] * 8)}),
        invalid(302, "the zero point 16", "OutOfRange", pack, fine | {"zero_point": ("u8", [[16]] * 8)}),
        invalid(303, "4 outputs", "WidthNotDividing", pack,
                {"codes": ("u8", [[1] * 4] * 4), "scale": ("f16", [[1.0]] * 4)}, "shape"),
        invalid(304, "3 groups of 4 columns", "GroupNotDividing", pack, fine | {"scale": ("f16", [[1.0] * 3] * 8)},
                "shape"),
        invalid(305, "a scale of 65520", "ScaleOverflow", pack, fine | {"scale": ("f32", [[65520.0]] + [[1.0]] * 7)},
                "overflow"),
        invalid(306, "an infinite scale", "NonFinite", pack, fine | {"scale": ("f32", [[float("inf")]] + [[1.0]] * 7)}),
        invalid(307, "zero points of two groups, scales of one", "BadShape", pack,
                fine | {"zero_point": ("u8", [[3, 3]] * 8)}, "shape"),
        invalid(308, "qweight of GPTQ's shape", "BadShape", unpack, tensors | {"qweight": ("i32", [[0] * 8])}, "shape"),
        invalid(309, "qzeros of two groups", "BadShape", unpack, tensors | {"qzeros": ("i32", [[0]] * 2)}, "shape"),
    ]  # fmt: skip


def awq_suite() -> SuiteSpec:
    """The suite formats/awq."""
    codes, zero = random_codes(7000, 32, 24, 4), random_codes(7001, 32, 3, 4)
    cases = _awq(51, "32 x 24 in groups of 8", "Random", codes, random_scales(7002, 32, 3), zero)
    frozen = checkpoint_oracles.matches("awq", cases[1], ("codes", "zero_point"))
    groups = [
        ({"params": {}, "source": SOURCE}, _awq_layout()),
        ({"params": {}, "source": checked(frozen, *checkpoint_oracles.CALLS["awq"])}, cases),
        ({"params": {}, "source": SOURCE}, _awq_rejected()),
    ]
    title = "AutoAWQ checkpoints (gemm): codes, zero points and scales to and from the stored words"
    return SuiteSpec(head("awq", title, AWQ_HEADER, "checkpoint_gptq"), checkpoint_notes.AWQ, groups)
