"""The suite kvcache/kivi. Ids are never reused and never renumbered: new cases take new numbers."""

import math

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, manifest_head
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, first_clear
from refllm.evaluate.golden.suites.kivi_definition import Store, case, invalid
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs k, f32 [heads, tokens, D]; v, f32 [heads, tokens, Dv]. Params: bits 1..8, group_size G, residual R "
    "(a multiple of "
    "G), chunks: the tokens arrive in calls of these lengths.",
    "After a call, with S tokens seen: the first floor(S / R) * R keys are quantised, in blocks of R tokens; the first "
    "max(0, S - R) values are, token by token; the rest stays in full (float32). A key group is G consecutive "
    "tokens of one "
    "channel within a block, a value group G consecutive channels of one token.",
    "A group, in float32, every operation rounded once: min = the largest float16 not above the smallest "
    "element; scale = "
    "float16((largest - min) / (2^bits - 1)), nearest, ties to even; code = rint(clip((x - min) / scale, 0, "
    "2^bits - 1)), "
    "divided by 1 where scale is 0; decoded: scale * code + min.",
    "Outputs: k_codes u8 [heads, blocks, D, bytes], the R codes of a channel of a block as one little-endian bit "
    "stream; "
    "k_scale, k_min f16 [heads, blocks, D, R / G]; v_codes u8 [heads, tokens, bytes of Dv codes]; v_scale, v_min "
    "f16 [heads, "
    "tokens, Dv / G]; not expected where nothing is quantised. full i64 [2]: keys and values left in full per "
    "head. nbytes i64 "
    "[]: of all of these and of the tokens in full.",
    "k_hat, v_hat f32: all keys and values as the attention of the last call is to see them: what was quantised "
    "before that "
    "call, decoded, and the rest, the call's own tokens included, in full.",
    "NaN, infinities, magnitudes above 65504 (32752 with one bit) and params out of range are rejected.",
]
NOTES = {
    "KeysPerChannel": note(
        "LAYOUT",
        "A key group runs along the tokens of one channel: a few channels are large in every token.",
        "One outlier channel sets the scale of all others.",
    ),
    "ValuesPerToken": note("LAYOUT", "A value group runs along the channels of one token.", "Tokens wait for a group."),
    "ResidualBoundary": note(
        "OFF_BY_ONE",
        "With S tokens, S mod R keys and min(S, R) values stay in full: at S = R all keys are quantised and no "
        "value is.",
        "A window one token short, or keys that are quantised a step late.",
    ),
    "KeysByBlock": note(
        "LAYOUT",
        "Keys go in blocks of R tokens, never token by token: between 0 and R - 1 are in full.",
    ),
    "FullPrecisionCall": note(
        "ORDER",
        "A call attends over its own tokens in full; what has become due is quantised afterwards.",
        "Prefill attends over quantised keys.",
    ),
    "ChunkInvariance": note(
        "ORDER",
        "What is stored after S tokens is the same however they came in.",
        "Decoding depends on the prompt's cut.",
    ),
    "Groups": note("LAYOUT", "G below R and below D: several scales per block and channel, and per token."),
    "Heads": note("LAYOUT", "Two heads, and values of another width than keys."),
    "BitStream": note("LAYOUT", "Codes are one stream of bits, low bit first; 3-bit codes straddle bytes."),
    "ScaleDivisor": note("OFF_BY_ONE", "The range is divided by 2^bits - 1, not by 2^bits.", "The largest is clipped."),
    "TieToEven": note("ROUNDING", "Halves round to the even code.", "Codes off by one."),
    "ScaleRoundedFirst": note("PRECISION", "Codes are computed with the scale and the minimum as they are stored."),
    "MinRoundedDown": note(
        "ROUNDING", "The minimum rounds down to float16, so that nothing lies below the grid.", "Codes that clip at 0."
    ),
    "Clip": note(
        "OVERFLOW", "A subnormal scale rounds down: the largest lies beyond the last code.", "Codes wrap around."
    ),
    "ConstantGroup": note("DEGENERATE", "All elements equal: scale 0, code 0, decoded exactly.", "0 / 0 is NaN."),
    "ScaleUnderflow": note("SUBNORMAL", "The scale rounds to zero although the group is not constant: codes 0."),
    "Range": note(
        "OVERFLOW", "65504 and -65504 in one group: the range is twice what float16 holds, its scale is not."
    ),
    "Nbytes": note("BASIC", "Codes, float16 scales and minima, and the float32 tokens in full; nothing else."),
    "Float16Overflow": note("OVERFLOW", "A minimum or a scale beyond float16 is rejected.", "Infinities in the cache."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "GroupNotDividing": note("SHAPE", "G must divide D and R."),
    "BadParams": note("MALFORMED", "bits outside 1..8, a group or window of no tokens."),
    "Random": note("BASIC", "Dyadic random numbers whose every rounding decision is clear."),
}
TINY = 2.0**-24  # the smallest float16


def _drawn(seed: int, heads: int, tokens: int, dim: int) -> tuple[list, dict]:
    """Dyadic random numbers of one side, and their recipe."""
    flat = iter([float(x) for x in dyadic(seed, 8, -5, heads * tokens * dim)])
    side = [[[next(flat) for _ in range(dim)] for _ in range(tokens)] for _ in range(heads)]
    return side, dyadic_recipe(seed, 8, -5)


def _random(id, comment, flags, heads, tokens, dims, chunks, s, only="") -> CaseSpec:
    def made(seed):
        (k, k_recipe), (v, v_recipe) = _drawn(seed, heads, tokens, dims[0]), _drawn(seed + 1, heads, tokens, dims[1])
        return case(id, comment, flags, k, v, chunks, s, recipes={"k": k_recipe, "v": v_recipe}, only=only)

    return first_clear(made, 1000 if id < 20 else 1000 * id)  # the windows share their tokens


def _windows() -> list[CaseSpec]:
    stored, seen = "k_codes v_codes full nbytes", "k_hat v_hat full"
    r4, dims = Store(), (4, 4)
    loud = [[1000.0 * (j == 2) + float((i + j + 1) % 4) for j in range(4)] for i in range(4)]
    steps = [[float((i + 3 + j) % 4) * 4.0**i for j in range(4)] for i in range(5)]
    return [
        _random(1, "3 tokens, R 4: all in full", "ResidualBoundary Nbytes", 1, 3, dims, [3], r4, "full nbytes"),
        _random(2, "4 tokens: keys quantised afterwards, values not", "ResidualBoundary FullPrecisionCall", 1, 4,
            dims, [4],
                r4, "k_codes k_hat full"),
        _random(3, "4 tokens, and a fifth that sees the quantised keys", "ResidualBoundary FullPrecisionCall", 1, 5,
            dims,
                [4, 1], r4, f"v_codes {seen}"),
        _random(4, "the fourth token completes a block that it still sees in full", "FullPrecisionCall", 1, 4, dims,
                [3, 1], r4, "k_hat"),
        _random(6, "9 tokens in one call", "ChunkInvariance FullPrecisionCall", 1, 9, dims, [9], r4, f"{stored} k_hat"),
        _random(7, "9 tokens one by one", "ChunkInvariance KeysByBlock", 1, 9, dims, [1] * 9, r4, f"{stored} {seen}"),
        case(9, "a key channel of 1000", "KeysPerChannel", [loud], [loud], [4], r4, only="k_codes k_scale k_min"),
        case(10, "value tokens of very different size", "ValuesPerToken", [steps], [steps], [5], r4, near=True,
             only="v_codes v_scale v_min"),
        _random(11, "R 8, G 4: two groups per channel of a block", "Groups KeysByBlock", 1, 9, dims, [8, 1],
                Store(residual=8), f"k_codes k_scale {seen}"),
        _random(12, "two heads, keys of 4 and values of 8 channels", "Random Heads Groups", 2, 5, (4, 8), [4, 1], r4),
    ]  # fmt: skip


def _rounding() -> list[CaseSpec]:
    """Groups as channels of keys: four tokens make a block, a fifth of zeros lets the last call see it decoded."""

    def groups(id, comment, flags, columns, bits=2, near=False, only="k_codes k_scale"):
        columns = columns + [[0] * 4] * (4 - len(columns))
        tokens = [[float(x) for x in row] for row in zip(*columns, strict=True)] + [[0.0] * 4]
        zeros = {"kind": "full", "value": "0x0p+0"}
        return case(id, comment, flags, [tokens], [[[0.0] * 4] * 5], [4, 1], Store(bits), near=near,
            recipes={"v": zeros},
                    only=only)  # fmt: skip

    return [
        groups(30, "2 bits: scale 1, 2 and 0.5", "ScaleDivisor BitStream", [[0, 1, 2, 3], [6, 4, 2, 0], [-1, -0.5, 0,
               0.5]], only="k_codes k_scale k_min k_hat"),
        groups(31, "3 bits: 12 bits a channel", "BitStream ScaleDivisor", [[0, 7, 3, 5], [6, 1, 7, 0], [2, 0, 7, 4]],
            3),
        groups(32, "8 bits", "ScaleDivisor", [[0, 255, 1, 254], [-128, 127, -1, 0]], 8),
        groups(34, "exact halves: 0.5, 1.5 and 2.5 steps", "TieToEven", [[0, 0.5, 1.5, 3], [0, 2.5, 1.5, 3]],
            near=True),
        groups(35, "the float16 scale is 4e-4 larger than the exact one", "ScaleRoundedFirst", [[0, 278.931640625,
               219.3125, 164.6171875]], 8, near=True),
        groups(36, "minima that are no float16", "MinRoundedDown", [[2049, 2050, 2055, 2052], [-2049, -2048, -2043,
               -2046]], near=True, only="k_codes k_min k_hat"),
        groups(37, "the scale rounds down: the largest is 4.2 steps up", "Clip", [[0, 4.1875 * TINY, TINY, 3 * TINY],
               [8 * TINY, 12.25 * TINY, 8 * TINY, 9 * TINY]]),
        groups(38, "constant groups", "ConstantGroup", [[3.5] * 4, [0.1015777587890625] * 4], near=True,
            only="k_scale k_hat"),
        groups(40, "the scale rounds to zero", "ScaleUnderflow", [[0, TINY, 0, TINY], [0, 1, 2, 3]]),
        groups(41, "-65504 to 65504", "Range", [[-65504, 65504, 0, 1], [65504] * 4], near=True,
               only="k_codes k_scale k_hat"),
    ]  # fmt: skip


def _mixed() -> list[CaseSpec]:
    return [
        _random(
            61,
            "18 tokens, 3 bits, G 8",
            "Random BitStream",
            1,
            18,
            (8, 8),
            [17, 1],
            Store(3, 8, 8),
            "k_codes v_codes k_scale v_scale k_hat v_hat",
        ),
    ]


def _rejected() -> list[CaseSpec]:
    planted = lambda value: [[[1.0, 2, 3, 4], [1, 2, value, 4]]]
    s = Store()
    return [
        invalid(70, "NaN in k", "NonFinite", "value", s, planted(math.nan)),
        invalid(72, "65520 in k", "Float16Overflow", "overflow", s, planted(65520.0)),
        invalid(73, "-70000 in v, while it is in full", "Float16Overflow", "overflow", s, v=planted(-70000.0)),
        invalid(74, "40000 with 1 bit: the scale could be 80000", "Float16Overflow", "overflow", Store(bits=1),
            planted(40000.0)),
        invalid(75, "G 4, D 6", "GroupNotDividing", "shape", s, dim=6),
        invalid(77, "0 bits", "BadParams", "value", Store(bits=0)),
        invalid(76, "G 4, R 6", "GroupNotDividing", "shape", Store(residual=6)),
    ]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite kvcache/kivi."""
    head = manifest_head(
        __name__,
        "kvcache/kivi",
        "A key-value cache of few bits: what is quantised when, codes, scales, minima, what attention sees",
        HEADER,
        "lessons/02-prefill-decode-cache.md",
    )
    source = {"kind": "first_principles", "name": "the header above, in exact fractions rounded once per operation"}
    groups = (_windows(), _rounding(), _mixed(), _rejected())
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in groups])
