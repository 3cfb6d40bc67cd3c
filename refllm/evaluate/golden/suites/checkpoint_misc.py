"""The suite formats/checkpoints_misc. Ids are never reused: packing 1.., reading the same 101.., rejected 301.."""

import struct
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec
from refllm.evaluate.golden.suites import checkpoint_notes, checkpoint_oracles
from refllm.evaluate.golden.suites.checkpoint_compressed import times
from refllm.evaluate.golden.suites.checkpoint_definition import (
    ANY_ZERO,
    SOURCE,
    case,
    checked,
    head,
    invalid,
    random_codes,
    random_scales,
    variants,
    weights,
    words,
)
from refllm.evaluate.golden.suites.exact import to_f32
from refllm.evaluate.golden.suites.number_definition import decode

HEADER = [
    "Params: direction (pack, unpack), format, and what the format names. unpack also gives w_hat f32 "
    "(scales_swizzled: "
    "none), the decoded weight.",
    "fp8_block (block_size [rows, columns]): codes f8_e4m3fn [out, in], scale f32 [ceil(out / rows), ceil(in / "
    "columns)] "
    "<-> weight, weight_scale_inv; w = E4M3(code) scale.",
    "gpt_oss: codes u8 [experts, out, in] (E2M1), scale f8_e8m0fnu [experts, out, in / 32] <-> blocks u8 [experts, "
    "out, "
    "in / 32, 16] (even column low nibble), scales; w = E2M1 2^(scale - 127). Declare scale_255=power if 255 is 2^128.",
    "i2_s (order x86 or arm, shape): codes u8 [out, in] (0, 1, 2 = -1, 0, 1), scale f32 [1] <-> data u8 [out in / 4 + "
    "32]: "
    "a unit of 128 (arm: 64) codes of the row-major weight is 32 (16) bytes, byte j holding the codes j, j + 32, j + "
    "64, "
    "j + 96 (j, j + 16 ...) in its bits 6-7, 4-5, 2-3, 0-1; then the scale as a little-endian float32 and 28 zero "
    "bytes. "
    "w = (code - 1) scale.",
    "bitnet: codes u8 [out, in], scale f32 [1] <-> weight u8 [out / 4, in], byte [r, c] holding rows r, r + out / 4, "
    "r + out / 2, r + 3 out / 4 from the low bits up; weight_scale. w = (code - 1) / scale.",
    "matmul_nbits (bits 2, 4, 8; block_size; columns): codes u8 [out, in], scale f32 [out, blocks], zero_point u8 "
    "[out, "
    "blocks] or none (2^(bits-1)) <-> B u8 [out, blocks, block_size bits / 8], low bits first, a short last block "
    "filled "
    "with 0; scales; zero_points u8 [out, ceil(blocks bits / 8)], each row a stream of its own.",
    "sparse24: values f32 [out, in / 2], columns u8 [out, in / 2] (0 to 3, ascending in pairs) <-> values, metadata "
    "u16 "
    "[out, in / 16]: a nibble i0 | i1 << 2 per four columns, low nibble first.",
    "bitmask (columns): w f32 [out, in], mask u8 <-> values f32 [kept] row by row, bitmask u8 [out, ceil(in / 8)] low "
    "bit "
    "first, row_offsets i64 [out]. csr (columns): w, mask <-> data f32, indices i32, indptr i32 [out + 1].",
    "scales_swizzled (shape): scale u8 [rows, columns] <-> data u8 [512 tiles]: zero-padded to tiles of 128 x 4, tile "
    "by "
    "tile row-major, row r and column c of a tile at byte 16 (r % 32) + 4 (r // 32) + c.",
]


def _both(id, comment, flags, params, given, stored, w_hat) -> list[CaseSpec]:
    """Both directions; w_hat as (dtype, nested), an Output, or None."""
    return [
        case(id, comment, flags, {"direction": "pack"} | params, given, stored),
        case(100 + id, comment, flags, {"direction": "unpack"} | params, stored, given | {"w_hat": w_hat}),
    ]


def _fp8(id, comment, flags, codes, scale, block) -> list[CaseSpec]:
    given = {"codes": ("f8_e4m3fn", codes), "scale": ("f32", scale)}
    stored = {"weight": given["codes"], "weight_scale_inv": given["scale"]}
    value = lambda o, i, c: times(decode("FP8_E4M3FN", c), scale[o // block[0]][i // block[1]])
    w_hat = [[value(o, i, c) for i, c in enumerate(row)] for o, row in enumerate(codes)]
    return _both(id, comment, flags, {"format": "fp8_block", "block_size": block}, given, stored, ("f32", w_hat))


def _gpt_oss(id, comment, flags, codes, scale) -> list[CaseSpec]:
    cut = lambda row: [words(row[i : i + 32], 4, 8) for i in range(0, len(row), 32)]
    given = {"codes": ("u8", codes), "scale": ("f8_e8m0fnu", scale)}
    stored = {"blocks": ("u8", [[cut(row) for row in expert] for expert in codes]), "scales": given["scale"]}

    def w_hat(at_255):
        power = lambda s: at_255 if s == 255 else 2.0 ** (s - 127)
        line = lambda row, s: [times(decode("FP4_E2M1", c), power(s[i // 32])) for i, c in enumerate(row)]
        return [[line(row, s) for row, s in zip(*expert, strict=True)] for expert in zip(codes, scale, strict=True)]

    ways = {"nan": w_hat(float("nan")), "power": w_hat(2.0**128)}
    special = any(255 in row for expert in scale for row in expert)
    decoded = variants("f32", "scale_255", ways, ANY_ZERO) if special else ("f32", ways["nan"])
    return _both(id, comment, flags, {"format": "gpt_oss"}, given, stored, decoded)


def _i2_s(id, comment, flags, codes, scale, order="x86") -> list[CaseSpec]:
    flat, quarter = [code for row in codes for code in row], 32 if order == "x86" else 16
    data = []
    for start in range(0, len(flat), 4 * quarter):
        unit = flat[start : start + 4 * quarter]
        for j in range(quarter):
            a, b, c, d = (unit[j + quarter * k] for k in range(4))
            data.append(a << 6 | b << 4 | c << 2 | d)
    data += [*struct.pack("<f", scale), *[0] * 28]
    given, w_hat = (
        {"codes": ("u8", codes), "scale": ("f32", [scale])},
        [[(c - 1) * scale for c in row] for row in codes],
    )
    params = {"format": "i2_s", "order": order, "shape": [len(codes), len(codes[0])]}
    return _both(id, comment, flags, params, given, {"data": ("u8", data)}, ("f32", w_hat))


def _bitnet(id, comment, flags, codes, scale) -> list[CaseSpec]:
    quarter = len(codes) // 4
    byte = lambda r, c: sum(codes[r + quarter * k][c] << (2 * k) for k in range(4))
    packed = [[byte(r, c) for c in range(len(codes[0]))] for r in range(quarter)]
    given = {"codes": ("u8", codes), "scale": ("f32", [scale])}
    stored = {"weight": ("u8", packed), "weight_scale": given["scale"]}
    w_hat = [[float(to_f32(Fraction(c - 1) / Fraction(scale))) for c in row] for row in codes]
    return _both(id, comment, flags, {"format": "bitnet"}, given, stored, ("f32", w_hat))


def _nbits(id, comment, flags, codes, scale, zero=None, *, bits=4, block_size=16) -> list[CaseSpec]:
    columns = len(codes[0])
    full = lambda row: row + [0] * (-columns % block_size)
    blocks = lambda row: [words(row[i : i + block_size], bits, 8) for i in range(0, len(row), block_size)]
    given = {"codes": ("u8", codes), "scale": ("f32", scale), "zero_point": ("u8", zero) if zero else None}
    stored = {
        "B": ("u8", [blocks(full(row)) for row in codes]),
        "scales": ("f32", scale),
        "zero_points": ("u8", [words(row, bits, 8) for row in zero]) if zero else None,
    }
    groups = [i // block_size for i in range(columns)]
    w_hat = ("f32", weights(codes, scale, zero, groups, 1 << (bits - 1)))
    params = {"format": "matmul_nbits", "bits": bits, "block_size": block_size, "columns": columns}
    return _both(id, comment, flags, params, given, stored, w_hat)


def _sparse24(id, comment, flags, values_, columns) -> list[CaseSpec]:
    width = 2 * len(columns[0])
    dense = []
    for row, places in zip(values_, columns, strict=True):
        line = [0.0] * width
        for k, (value, place) in enumerate(zip(row, places, strict=True)):
            line[4 * (k // 2) + place] = value
        dense.append(line)
    given = {"values": ("f32", values_), "columns": ("u8", columns)}
    stored = {"values": ("f32", values_), "metadata": ("u16", [words(row, 2, 16) for row in columns])}
    return _both(id, comment, flags, {"format": "sparse24"}, given, stored, ("f32", dense))


def _masked(id, comment, flags, form, w, mask) -> list[CaseSpec]:
    kept = [[(i, x) for i, (x, m) in enumerate(zip(*pair, strict=True)) if m] for pair in zip(w, mask, strict=True)]
    offsets = [sum(map(len, kept[:o])) for o in range(len(kept) + 1)]
    values_ = [x for row in kept for _, x in row]
    dense = [[x if m else 0.0 for x, m in zip(*pair, strict=True)] for pair in zip(w, mask, strict=True)]
    if form == "bitmask":
        stored = {
            "values": ("f32", values_),
            "bitmask": ("u8", [words(row, 1, 8) for row in mask]),
            "row_offsets": ("i64", offsets[:-1]),
        }
    else:
        columns = [i for row in kept for i, _ in row]
        stored = {"data": ("f32", values_), "indices": ("i32", columns), "indptr": ("i32", offsets)}
    params = {"format": form, "columns": len(w[0])}
    given = {"w": ("f32", w), "mask": ("u8", mask)}
    return [
        case(id, comment, flags, {"direction": "pack"} | params, given, stored),
        case(100 + id, comment, flags, {"direction": "unpack"} | params, stored, {"w_hat": ("f32", dense)}),
    ]


def _swizzle(id, comment, flags, scale) -> list[CaseSpec]:
    rows, columns = len(scale), len(scale[0])
    across = -(-columns // 4)
    data = [0] * (512 * -(-rows // 128) * across)
    for r in range(rows):
        for c in range(columns):
            data[512 * (r // 128 * across + c // 4) + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scale[r][c]
    params = {"format": "scales_swizzled", "shape": [rows, columns]}
    return _both(id, comment, flags, params, {"scale": ("u8", scale)}, {"data": ("u8", data)}, None)


def _codes_and_blocks() -> list[CaseSpec]:
    one, spread = 0x38, lambda rows, columns, n: [[(5 * i + 3 * o) % n for i in range(columns)] for o in range(rows)]
    trits = lambda rows, columns: [[(i + 2 * o + o // 3) % 3 for i in range(columns)] for o in range(rows)]
    return [
        *_fp8(1, "5 x 7 in blocks of 2 x 3, scales that differ by factors", "SquareBlocks GroupBoundary",
              [[one + (i + o) % 8 for i in range(7)] for o in range(5)],
              [[1.0, 16.0, 0.25], [64.0, 2.0, 8.0], [0.5, 128.0, 4.0]], [2, 3]),
        *_fp8(2, "signs, subnormals, NaN; products rounded once", "FloatCodes", [[one, 0x7E, 0xFE, 1, 0x81, 0x7F,
                0xFF, 7]],
              [[float.fromhex("0x1.555556p-2")]], [128, 128]),
        *_gpt_oss(6, "every E2M1 code", "NibbleOrder FloatCodes", [[[i % 16 for i in range(32)]]], [[[128]]]),
        *_gpt_oss(7, "2 experts x 2 x 64", "GroupBoundary", [spread(2, 64, 16), spread(2, 64, 15)],
                  [[[127, 130], [120, 127]], [[128, 126], [140, 100]]]),
        *_gpt_oss(8, "scale codes 0 and 255", "E8m0Scale", [[[1, 2, 9, 7] * 16]], [[[0, 255]]]),
        *_i2_s(11, "2 x 64", "Strides", spread(2, 64, 3), 1.5),
        *_i2_s(12, "2 x 64, ARM", "Strides", spread(2, 64, 3), 1.5, "arm"),
        *_i2_s(13, "1 x 256, a negative scale", "Strides", [[(7 * i + i // 5) % 3 for i in range(256)]], -0.375),
        *_bitnet(16, "8 x 3", "Quarters Reciprocal", trits(8, 3), 0.5),
        *_bitnet(17, "4 x 5, a divisor that rounds", "Quarters Reciprocal", trits(4, 5), 3.0),
    ]  # fmt: skip


def _matmul_nbits() -> list[CaseSpec]:
    spread = lambda rows, columns, n: [[(5 * i + 3 * o) % n for i in range(columns)] for o in range(rows)]
    return [
        *_nbits(21, "codes in order", "NibbleOrder Symmetric", [list(range(16))], [[1.0]]),
        *_nbits(22, "3 blocks: an odd number of zero points", "ZeroPointPacking GroupBoundary", spread(3, 48, 16),
                [[1.0, 8.0, 64.0]] * 3, [[0, 15, 7], [8, 1, 14], [3, 12, 5]]),
        *_nbits(23, "20 columns: a short last block", "ShortBlock", spread(2, 20, 16), [[1.0, 32.0]] * 2,
                [[3, 9], [15, 0]]),
        *_nbits(24, "8 bits", "UnsignedSubtract Symmetric", [[0, 1, 127, 128, 129, 254, 255, 64] * 2], [[0.5]], bits=8),
        *_nbits(25, "2 bits, 5 blocks: zero points in a byte and a quarter", "ZeroPointPacking", spread(2, 80, 4),
                [[1.0, 2.0, 4.0, 8.0, 16.0]] * 2, [[0, 1, 2, 3, 2], [3, 2, 1, 0, 1]], bits=2),
        *_nbits(26, "zero points 0 and 15", "ZeroPoint UnsignedSubtract", spread(2, 16, 16), [[1.0]] * 2, [[0], [15]]),
        *_nbits(27, "8 bits, 33 columns in blocks of 32", "ShortBlock UnsignedSubtract", spread(2, 33, 256),
                [[1.0, 4.0]] * 2, [[255, 0], [1, 128]], bits=8, block_size=32),
        *_nbits(28, "a block of 512", "GroupBoundary", spread(1, 512, 16), [[0.5]], [[3]], block_size=512),
    ]  # fmt: skip


def _sparse() -> list[CaseSpec]:
    pairs = [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0, 1, 2, 3]
    w = [
        [0.0, 1.5, -2.0, 0.0, 3.0, 0.0, 0.0, 4.0, 5.0],
        [0.0] * 9,
        [6.0] * 9,
        [-0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0],
    ]
    mask = [[int(x != 0) for x in row] for row in w[:3]] + [[1, 0, 0, 0, 0, 0, 0, 0, 1]]
    tile = [[(r + 7 * c) % 255 + 1 for c in range(4)] for r in range(128)]
    odd = [[(3 * r + 11 * c) % 255 + 1 for c in range(5)] for r in range(130)]
    return [
        *_sparse24(31, "every pair of columns", "PairOrder", [[float(k + 1) for k in range(16)]], [pairs]),
        *_sparse24(32, "3 x 16", "PairOrder", [[float(10 * o + k) for k in range(8)] for o in range(3)],
                   [pairs[2 * o : 2 * o + 8] for o in range(3)]),
        *_masked(36, "9 columns, an empty row, a full row, a kept -0", "BitOrder RowOffsets", "bitmask", w, mask),
        *_masked(37, "the same as CSR", "RowOffsets", "csr", w, mask),
        *_swizzle(41, "one tile", "TileOrder", tile),
        *_swizzle(42, "130 x 5: four tiles, three of them mostly padding", "TileOrder TilePadding", odd),
        *_swizzle(43, "3 x 2", "TilePadding", [[1, 2], [3, 4], [5, 6]]),
    ]  # fmt: skip


def _rejected() -> list[CaseSpec]:
    pack = lambda form, **params: {"direction": "pack", "format": form} | params
    unpack = lambda form, **params: {"direction": "unpack", "format": form} | params
    i2_s, nbits = {"order": "x86", "shape": [1, 128]}, {"bits": 4, "block_size": 16, "columns": 16}
    trits = ("u8", [[1] * 128])
    scale = ("f32", [1.0])
    sparse = {"values": ("f32", [[1.0] * 8]), "columns": ("u8", [[0, 1] * 4])}
    csr = {"data": ("f32", [1.0, 2.0]), "indices": ("i32", [0, 2]), "indptr": ("i32", [0, 1, 2])}
    return [
        invalid(301, "fp8: scales of one block row for two", "BadShape", pack("fp8_block", block_size=[1, 128]),
                {"codes": ("f8_e4m3fn", [[0x38]] * 2), "scale": ("f32", [[1.0]])}, "shape"),
        invalid(302, "fp8: an infinite scale", "NonFinite", pack("fp8_block", block_size=[128, 128]),
                {"codes": ("f8_e4m3fn", [[0x38]]), "scale": ("f32", [[float("inf")]])}),
        invalid(303, "gpt-oss: 16 columns", "WidthNotDividing", pack("gpt_oss"),
                {"codes": ("u8", [[[1] * 16]]), "scale": ("f8_e8m0fnu", [[[127]]])}, "shape"),
        invalid(304, "gpt-oss: the code 16", "OutOfRange", pack("gpt_oss"),
                {"codes": ("u8", [[[16] * 32]]), "scale": ("f8_e8m0fnu", [[[127]]])}),
        invalid(305, "I2_S: 64 codes on x86", "WidthNotDividing", pack("i2_s", order="x86", shape=[1, 64]),
                {"codes": ("u8", [[1] * 64]), "scale": scale}, "shape"),
        invalid(306, "I2_S: the code 3", "OutOfRange", pack("i2_s", **i2_s), {"codes": ("u8", [[3] * 128]),
                "scale": scale}),
        invalid(307, "I2_S: a byte with the code 3", "OutOfRange", unpack("i2_s", **i2_s), {"data": ("u8",
                [255] * 32 + [0] * 32)}),
        invalid(308, "I2_S: 63 bytes", "BadShape", unpack("i2_s", **i2_s), {"data": ("u8", [0] * 63)}, "shape"),
        invalid(309, "I2_S: an unknown order", "BadParams", pack("i2_s", order="cuda", shape=[1, 128]),
                {"codes": trits, "scale": scale}),
        invalid(310, "BitNet: 3 rows", "WidthNotDividing", pack("bitnet"), {"codes": ("u8", [[1]] * 3),
                "scale": scale}, "shape"),
        invalid(311, "BitNet: a divisor of 0", "NonFinite", pack("bitnet"), {"codes": ("u8", [[1]] * 4),
                "scale": ("f32", [0.0])}),
        invalid(312, "MatMulNBits: 3 bits", "BadParams", pack("matmul_nbits", **nbits | {"bits": 3}),
                {"codes": ("u8", [[1] * 16]), "scale": ("f32", [[1.0]])}),
        invalid(313, "MatMulNBits: blocks of 24", "BadParams", pack("matmul_nbits", **nbits | {"block_size": 24}),
                {"codes": ("u8", [[1] * 16]), "scale": ("f32", [[1.0]])}),
        invalid(314, "MatMulNBits: two scales, one block", "BadShape", pack("matmul_nbits", **nbits),
                {"codes": ("u8", [[1] * 16]), "scale": ("f32", [[1.0, 1.0]])}, "shape"),
        invalid(315, "MatMulNBits: zero points packed over all rows", "BadShape", unpack("matmul_nbits", **nbits),
                {"B": ("u8", [[[0] * 8]] * 2), "scales": ("f32", [[1.0]] * 2), "zero_points": ("u8", [[0x21]])},
                        "shape"),
        invalid(316, "2:4: a pair that descends", "OutOfRange", pack("sparse24"), sparse | {"columns": ("u8", [[1,
                0] * 4])}),
        invalid(317, "2:4: metadata that names one column twice", "OutOfRange", unpack("sparse24"),
                {"values": sparse["values"], "metadata": ("u16", [[0]])}),
        invalid(318, "2:4: 8 columns", "WidthNotDividing", pack("sparse24"),
                {"values": ("f32", [[1.0] * 4]), "columns": ("u8", [[0, 1] * 2])}, "shape"),
        invalid(319, "bitmask: more bits than values", "BadShape", unpack("bitmask", columns=3),
                {"values": ("f32", [1.0]), "bitmask": ("u8", [[7]]), "row_offsets": ("i64", [0])}, "shape"),
        invalid(320, "bitmask: offsets of other rows", "RowOffsets", unpack("bitmask", columns=3),
                {"values": ("f32", [1.0, 2.0]), "bitmask": ("u8", [[1], [1]]), "row_offsets": ("i64", [1, 2])}),
        invalid(321, "CSR: indptr descends", "RowOffsets", unpack("csr", columns=3), csr | {"indptr": ("i32", [0, 3,
                2])}),
        invalid(322, "CSR: a column beyond the last", "OutOfRange", unpack("csr", columns=2), csr),
        invalid(323, "CSR: a column twice in a row", "OutOfRange", unpack("csr", columns=3),
                csr | {"indices": ("i32", [1, 1]), "indptr": ("i32", [0, 2, 2])}),
        invalid(324, "swizzle: bytes of one tile for two", "BadShape", unpack("scales_swizzled", shape=[129, 4]),
                {"data": ("u8", [0] * 512)}, "shape"),
        invalid(325, "an unknown format", "BadParams", pack("exl3"), {"codes": trits}),
    ]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite formats/checkpoints_misc."""
    groups = [({"params": {}, "source": SOURCE}, [*_codes_and_blocks(), *_matmul_nbits(), *_sparse()])]
    zero = random_codes(512, 6, 5, 4)
    frozen = {
        "matmul_nbits": _nbits(51, "6 x 72 in blocks of 16", "Random", random_codes(510, 6, 72, 4),
                               random_scales(511, 6, 5), zero),
        "fp8": _fp8(52, "6 x 8 in blocks of 2 x 4", "Random",
                    [[z - (z % 128 == 127) for z in row] for row in random_codes(520, 6, 8, 8)],
                    random_scales(521, 3, 2), [2, 4]),
        "gpt_oss": _gpt_oss(53, "1 x 3 x 64", "Random", [random_codes(530, 3, 64, 4)],
                            [[[112 + z for z in row] for row in random_codes(531, 3, 2, 5)]]),
        "bitnet": _bitnet(54, "8 x 12", "Random", [[z % 3 for z in row] for row in random_codes(540, 8, 12, 8)], 1.0),
        "swizzle": _swizzle(55, "140 x 6", "Random", random_codes(550, 140, 6, 8)),
    }  # fmt: skip
    outputs = {"bitnet": (0, ("weight",)), "swizzle": (0, ("data",))}
    for name, cases in frozen.items():
        which, names = outputs.get(name, (1, ("w_hat",)))
        source = checked(checkpoint_oracles.matches(name, cases[which], names), *checkpoint_oracles.CALLS[name])
        groups.append(({"params": {}, "source": source}, cases))
    groups.append(({"params": {}, "source": SOURCE}, _rejected()))
    title = "Block-FP8, gpt-oss, BitNet, MatMulNBits, sparse weights and swizzled scales, to and from the stored arrays"
    return SuiteSpec(head("checkpoints_misc", title, HEADER, "checkpoint_misc"), checkpoint_notes.MISC, groups)
