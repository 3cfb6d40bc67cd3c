"""The suites quant/olive and quant/spark. Ids are never reused or renumbered: new cases take new numbers."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, f16_margin, first_clear, nearest, to_f16, to_f32
from refllm.evaluate.golden.suites.outliers_cases import bits_output, drawn_rows, rejected
from refllm.evaluate.golden.suites.outliers_definition import MARGIN, exact, floats
from refllm.evaluate.golden.suites.rtn_notes import note


def _suite(name: str, title: str, header: list[str], notes: dict, groups: list[list[CaseSpec]]) -> SuiteSpec:
    head = manifest_head(__name__, name, title, header, "lessons/18-pairs-and-lengths.md")
    source = {"kind": "first_principles", "name": "the header above, in fractions"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases) for cases in groups])


def _clear_f16(x: Fraction) -> Fraction:
    """The nearest float16 of a number that is known up to float64 rounding; at least the smallest."""
    if f16_margin(x) < MARGIN:
        raise Unclear(f"{float(x)} is too near the middle of two float16")
    return to_f16(x) or Fraction(1, 2**24)


# --- quant/olive -----------------------------------------------------------------------------------------------------

NORMALS = {
    "int": [Fraction(n) for n in range(8)],
    "flint": [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 16)],
}
OUTLIERS = [Fraction((2 + m) << (e + 2)) for e in range(4) for m in range(2)][1:]


def nearest_value(x: Fraction, normals: str) -> Fraction:
    """The nearest value; halfway the larger one, between a normal and an outlier the outlier."""
    found = None
    for magnitudes in (NORMALS[normals], OUTLIERS):
        for value in sorted({sign * m for m in magnitudes for sign in (1, -1)}):
            if found is None or abs(x - value) <= abs(x - found):
                found = value
    return found


def pair(first: Fraction, second: Fraction, normals: str) -> tuple[int, Fraction, Fraction]:
    """The byte of two steps and what they become."""
    a, b = nearest_value(first, normals), nearest_value(second, normals)
    if abs(a) > 8:
        return _outlier(a) | 8 << 4, a, Fraction(0)
    if abs(b) > 8:
        return 8 | _outlier(b) << 4, Fraction(0), b
    return _normal(a, normals) | _normal(b, normals) << 4, a, b


def _outlier(value: Fraction) -> int:
    return (8 if value < 0 else 0) + OUTLIERS.index(abs(value)) + 1


def _normal(value: Fraction, normals: str) -> int:
    index = NORMALS[normals].index(abs(value))
    return (-index if value < 0 else index) % 16


def coded(row: list[Fraction], scale: Fraction, normals: str) -> tuple[list[int], list[Fraction]]:
    """Bytes and decoded weights of a row."""
    steps = [to_f32(x / scale) for x in row]
    pairs = [pair(steps[i], steps[i + 1], normals) for i in range(0, len(row), 2)]
    return [code for code, *_ in pairs], [to_f32(value * scale) for _, *both in pairs for value in both]


def unrounded(row: list[Fraction], normals: str, percent: int) -> Fraction:
    """The scale of a candidate before it is rounded, to float64 precision."""
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / (len(row) - 1)
    base = abs(mean) + 3 * Fraction(math.sqrt(variance)) or Fraction(1)
    return base * percent / 100 / NORMALS[normals][-1]


def searched(row: list[Fraction], normals: str, low: int, high: int) -> tuple[Fraction, Fraction]:
    """(scale, squared error), the first of the least."""
    tried = []
    for percent in range(low, high, 2):
        scale = _clear_f16(unrounded(row, normals, percent))
        back = coded(row, scale, normals)[1]
        tried.append((sum((x - y) ** 2 for x, y in zip(row, back, strict=True)), scale))
    least = min(error for error, _ in tried)
    if any(least < error < least * Fraction(1001, 1000) for error, _ in tried):
        raise Unclear("two scales are nearly as good")
    return next((scale, error) for error, scale in tried if error == least)


def _olive(id, comment, flags, w, normals="int", low=75, high=120, *, scale=None) -> CaseSpec:
    W = exact(w)
    inputs = {"w": values("f32", floats(w))}
    if scale is None:
        forms = ("int", "flint") if normals == "best" else (normals,)
        found = {form: [searched(row, form, low, high) for row in W] for form in forms}
        form = min(forms, key=lambda form: sum(error for _, error in found[form]))
        scales = [s for s, _ in found[form]]
        expected = {"scale": bits_output("f16", [[float(s)] for s in scales])}
    else:
        form, expected = normals, {}
        scales = [Fraction(s) for s in scale]
        inputs["scale"] = values("f32", [[float(s)] for s in scales])
    rows = [coded(row, s, form) for row, s in zip(W, scales, strict=True)]
    expected |= {
        "codes": bits_output("u8", [codes for codes, _ in rows]),
        "w_hat": bits_output("f32", floats([back for _, back in rows])),
    }
    params = {"normals": normals, "low": low, "high": high}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _loud_rows(seed: int, rows: int, columns: int) -> list[list[Fraction]]:
    """Random rows, one number of each eight sixteen times as large."""
    drawn = drawn_rows(seed, rows, columns)
    return [[x * (16 if (i + 3 * r) % 8 == 2 else 1) for i, x in enumerate(row)] for r, row in enumerate(drawn)]


def _olive_random(id, flags, shape, normals="int", low=75, high=120) -> CaseSpec:
    make = lambda seed: _olive(id, "random", flags, _loud_rows(seed, *shape), normals, low, high)
    return first_clear(make, 100 * id)


def _olive_rounded_first(seed: int) -> CaseSpec:
    """One candidate, and codes that its scale would change if it were not rounded."""
    w = _loud_rows(seed, 2, 24)
    scales = [(row, unrounded(row, "int", 90)) for row in w]
    if all(coded(row, s, "int")[0] == coded(row, to_f16(s), "int")[0] for row, s in scales):
        raise Unclear("the rounding of the scale changes no code")
    return _olive(27, "codes hang on the rounding of the scale", "RoundedFirst", w, low=90, high=91)


def olive_suite() -> SuiteSpec:
    """The suite quant/olive."""
    header = [
        "Input w, f32 [out, in], `in` even; params normals, low, high. Neighbouring columns 2j and 2j + 1 are a pair.",
        "Values: 0 to 7 (normals int) or 0, .5, 1, 1.5, 2, 3, 4, 8 (flint), the normal ones; 12, 16, 24, 32, 48, 64, "
        "96, the outliers; all with both signs. A step w / scale becomes the nearest value of all; halfway the larger "
        "one, but the outlier where the other one is normal. If the first of a pair has become an outlier, the second "
        "is 0; else if the second has, the first is.",
        "codes u8 [out, in / 2]: the first of a pair in bits 0-3, the second in bits 4-7. A normal value is its place "
        "in the list above, negative ones in two's complement. An outlier is its place in its list, from 1, plus 8 if "
        "negative; the other nibble of its pair is 8. w_hat f32 = value scale.",
        "scale f16 [out, 1]: of alpha / 7 (int) or alpha / 8 (flint), alpha = i / 100 (|mean| + 3 std), i = low, "
        "low + 2 ... below high, the one whose w_hat has the least squared error, of equals the first; std with n - 1; "
        "a row of zeros has 1 for |mean| + 3 std. The scale is rounded to f16 before steps are computed. normals best: "
        "int or flint, whichever has less error over the matrix.",
        "Where the input scale f32 [out, 1] is given, nothing is searched and scale is no output.",
    ]
    notes = {
        "Tie": note("ROUNDING", "Halfway: the larger value, so -0.5 becomes 0 and 0.5 becomes 1."),
        "TieToOutlier": note("ROUNDING", "9.5 and -9.5 lie between 7 and 12, and become outliers."),
        "Victim": note(
            "BASIC", "The neighbour of an outlier is 0, on either side.",
            "Both are kept: there is no code for that.",
        ),
        "FirstWins": note("ORDER", "Of two outliers the first stays, even if it is the smaller one."),
        "Abfloat": note("BASIC", "Outliers begin at 12: e = m = 0, which would be 8, is left out."),
        "Identifier": note("LAYOUT", "The nibble 8 stands in the victim's place, the outlier keeps its own."),
        "NibbleOrder": note("LAYOUT", "The first of a pair lies in the low nibble."),
        "TwosComplement": note("LAYOUT", "Normal values are in two's complement, not sign and magnitude."),
        "Flint": note("BASIC", "The other list of normal values: finer near 0, and 8 instead of 7."),
        "Saturates": note("BASIC", "Beyond 96 the value is 96."),
        "SampleStd": note("OFF_BY_ONE", "The standard deviation divides by n - 1."),
        "Mean": note("BASIC", "|mean| + 3 std: the mean counts."),
        "PerRow": note("LAYOUT", "Every row has its own mean and standard deviation."),
        "VictimsCount": note("BASIC", "The error that is searched includes that of the victims."),
        "UpperEnd": note("OFF_BY_ONE", "high itself is not tried."),
        "Best": note("BASIC", "int or flint is chosen once, for the whole matrix."),
        "RoundedFirst": note("PRECISION", "Codes are those of the rounded scale."),
        "ZeroRow": note("DEGENERATE", "A row of zeros: a positive scale, and zeros.", "NaN."),
        "Random": note("BASIC", "Dyadic random weights, some of them sixteen times as large."),
        "OddWidth": note("SHAPE", "An odd number of columns is rejected: pairs do not run on in the next row."),
        "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
        "BadParams": note("MALFORMED", "Unknown normals, or a search without a candidate."),
    }  # fmt: skip
    ones = lambda *numbers: [x for number in numbers for x in (number, 0)]
    params = {"normals": "int", "low": 75, "high": 120}
    ties = [s * (n + 0.5) for n in range(7) for s in (1, -1)]
    given = [
        _olive(1, "every tie of normals", "Tie", [ones(*ties)], scale=[1]),
        _olive(2, "between normals and outliers", "TieToOutlier Abfloat", [ones(9.5, -9.5, 9.25, -9.25)], scale=[1]),
        _olive(3, "between outliers", "Tie Abfloat", [ones(14, -14, 20, -20, 28, -28, 56, -56, 80, -80)], scale=[1]),
        _olive(4, "one outlier", "Victim Identifier", [[40, 3, -2, 50, 0, -12, 96, 0]], scale=[1]),
        _olive(5, "two outliers", "FirstWins Victim", [[20, 90, -90, 30, 12, -12]], scale=[1]),
        _olive(6, "all outliers, first and second", "Abfloat Identifier NibbleOrder",
               [ones(*map(float, OUTLIERS)), [x for v in OUTLIERS for x in (0, -float(v))]], scale=[1, 1]),
        _olive(7, "pairs of normals", "TwosComplement NibbleOrder", [[-7, 1, -1, 7, 0, -4, 3, -2]], scale=[1]),
        _olive(8, "flint", "Flint Tie", [[0.1875, 0.25, 0.5, -0.75, 1.5, -2.5, 3, -4, 6, 8, 9.875, -8, 10, 1, -10, 1]],
               "flint", scale=[1]),
        _olive(9, "beyond the end", "Saturates", [[1000, 1, 2, -97, 2.0**100, 0]], scale=[1]),
        _olive(10, "a scale a row", "PerRow", [[1, 5, 24, 3], [1, 5, 24, 3]], scale=[0.25, 2]),
    ]  # fmt: skip
    search = [
        _olive_random(20, "Random SampleStd PerRow", (3, 16)),
        _olive_random(21, "Random Flint", (2, 16), "flint"),
        _olive_random(22, "Random Best", (3, 16), "best", 75, 100),
        _olive_random(23, "Random", (2, 24), "int", 40, 90),
        first_clear(
            lambda seed: _olive(24, "rows that lean to one side", "Mean SampleStd",
                                [[x + 3 for x in row] for row in drawn_rows(seed, 2, 8)], high=100),
            2400,
        ),
        _olive(25, "70 per cent only, 72 would be better", "UpperEnd", [[4, -4, 3, -3, 2, -2, 1, 0]], low=70, high=72),
        _olive(26, "a row of zeros", "ZeroRow", [[0, 0, 0, 0], [3, -2, 1, 5]], high=90),
        first_clear(_olive_rounded_first, 2700),
        _olive(28, "as outliers all would be finer, but half of them are victims", "VictimsCount",
               [[12, 16, 16, 12, 12, 24, 16, 12]], low=20, high=100),
    ]  # fmt: skip
    bad = [
        rejected(40, "3 columns", "OddWidth", "shape", {"w": [[1.0, 2, 3]]}, **params),
        rejected(41, "NaN", "NonFinite", "value", {"w": [[math.nan, 2]]}, **params),
        rejected(42, "infinity", "NonFinite", "value", {"w": [[1, -math.inf]]}, **params),
        rejected(43, "normals int8", "BadParams", "value", {"w": [[1.0, 2]]}, **(params | {"normals": "int8"})),
        rejected(44, "from 90 to 90", "BadParams", "value", {"w": [[1.0, 2]]}, **(params | {"low": 90, "high": 90})),
    ]
    return _suite("quant/olive", "Outlier-victim pairs in four bits a weight", header, notes, [given, search, bad])


# --- quant/spark -----------------------------------------------------------------------------------------------------


def spark_code(v: int) -> str:
    """The bits of a number from 0 to 255."""
    b = f"{v:08b}"
    if v <= 7:
        return "0" + b[5:]
    return "1" + b[1:3] + b[0] + (b[4:] if b[0] == b[3] else "1111" if b[0] == "0" else "0000")


def spark_number(code: str) -> int:
    """The number that a code stands for."""
    if len(code) == 4:
        return int(code, 2)
    return int(code[3] + code[1:], 2)


def _spark_row(row: list[Fraction], scales: list[Fraction]) -> tuple[list[int], list[int], list[Fraction]]:
    """Bytes, signs and decoded weights of a row, with a scale for every weight."""
    codes, signs, back = [], [], []
    for w, s in zip(row, scales, strict=True):
        v = min(nearest(to_f32(abs(w) / s)), 255)
        codes.append(spark_code(v))
        signs.append(int(w < 0 and v > 0))
        back.append(to_f32(spark_number(codes[-1]) * s) * (-1 if w < 0 else 1))
    nibbles = [int(code[i : i + 4], 2) for code in codes for i in range(0, len(code), 4)]
    nibbles += [0] * (len(nibbles) % 2)
    packed = [a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True)]
    plane = [sum(bit << k for k, bit in enumerate(signs[i : i + 8])) for i in range(0, len(signs), 8)]
    return packed, plane, back


def _spark(id, comment, flags, w, group_size=-1) -> CaseSpec:
    W, columns = exact(w), len(w[0])
    width = {-1: columns, 0: columns}.get(group_size, group_size)
    amax = [[max(map(abs, row[i : i + width])) for i in range(0, columns, width)] for row in W]
    if group_size == 0:
        amax = [[max(map(max, amax))]]
    scale = [[to_f16(to_f32((a or Fraction(2)) / 255)) or Fraction(1, 2**24) for a in row] for row in amax]
    of_row = lambda r: [scale[0 if group_size == 0 else r][i // width] for i in range(columns)]
    rows = [_spark_row(row, of_row(r)) for r, row in enumerate(W)]
    expected = {
        "stream": bits_output("u8", [byte for packed, *_ in rows for byte in packed]),
        "row_bytes": bits_output("i64", [len(packed) for packed, *_ in rows]),
        "signs": bits_output("u8", [plane for _, plane, _ in rows]),
        "scale": bits_output("f16", floats(scale)),
        "w_hat": bits_output("f32", floats([back for *_, back in rows])),
    }
    inputs = {"w": values("f32", floats(w))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"group_size": group_size})


def _spark_rounded_first(seed: int) -> CaseSpec:
    """Numbers that the scale would change if it were not rounded."""
    row = _loud_rows(seed, 1, 12)[0]
    scale = to_f32(max(map(abs, row)) / 255)
    decoded = lambda s: [spark_number(spark_code(min(nearest(to_f32(abs(w) / s)), 255))) for w in row]
    if decoded(scale) == decoded(to_f16(scale)):
        raise Unclear("the rounding of the scale changes no number")
    return _spark(13, "numbers hang on the rounding of the scale", "RoundedFirst", [row])


def spark_suite() -> SuiteSpec:
    """The suite quant/spark."""
    header = [
        "Input w, f32 [out, in]; param group_size g > 0, -1: a scale a row, 0: one for the matrix.",
        "scale f16 = largest magnitude / 255, each step rounded to f32; 2 / 255 where all are 0. v = rint(|w| / scale) "
        "with ties to even, at most 255, b0 b1 ... b7 its bits, b0 the highest.",
        "Code of v: 0 b5 b6 b7 for v <= 7; else 1 b1 b2 b0 b4 b5 b6 b7 where b0 = b3; 1 b1 b2 0 1111 where b0 = 0, "
        "b3 = 1; 1 b1 b2 1 0000 where b0 = 1, b3 = 0. Decoded, the fourth bit of a long code stands for b0 and b3.",
        "stream u8: the codes of a row as nibbles, the first in bits 0-3 of a byte, a zero nibble behind an odd number "
        "of them; rows one after another. row_bytes i64 [out]. signs u8 [out, ceil(in / 8)]: bit i % 8 of byte i // 8 "
        "is 1 where w < 0 and v > 0. w_hat f32 = scale times the decoded v, with the sign.",
    ]
    notes = {
        "Short": note("BASIC", "0 to 7 have four bits; 8 has eight."),
        "RoundDown": note("ROUNDING", "b0 = 0, b3 = 1: the low nibble is 1111: down to 15, 47, 79, 111."),
        "RoundUp": note("ROUNDING", "b0 = 1, b3 = 0: the low nibble is 0000: up to 144, 176, 208, 240."),
        "FourthBit": note("LAYOUT", "The fourth bit of a long code is b0, not b3; b3 made room for the length."),
        "NibbleOrder": note("LAYOUT", "The first nibble lies in bits 0-3 of a byte."),
        "RowBytes": note("LAYOUT", "Every row begins on a byte of its own, and its bytes are counted."),
        "Signs": note("LAYOUT", "Signs lie in a plane of their own, low bit first."),
        "ZeroSign": note("SIGNED_ZERO", "A negative weight that becomes 0 has no sign."),
        "TieToEven": note("ROUNDING", "Ties go to the even number."),
        "Groups": note("LAYOUT", "A group is consecutive columns of one row."),
        "PerTensor": note("LAYOUT", "One scale for the whole matrix."),
        "Levels": note("OFF_BY_ONE", "The largest weight becomes 255, not 127 or 256."),
        "ZeroGroup": note("DEGENERATE", "All zeros: a positive scale.", "NaN."),
        "RoundedFirst": note("PRECISION", "Numbers are those of the rounded scale."),
        "Random": note("BASIC", "Dyadic random weights, some of them sixteen times as large."),
        "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
        "BadParams": note("MALFORMED", "A group_size that does not divide, or below -1."),
    }  # fmt: skip
    random = lambda id, shape, g: _spark(id, "random", "Random Levels", _loud_rows(100 * id, *shape), g)
    valid = [
        _spark(1, "all numbers", "Short RoundDown RoundUp FourthBit NibbleOrder", [list(range(256))]),
        _spark(2, "signs", "Signs ZeroSign", [[-255, 5, -5, 18, -18, 0, -0.25, -8, 3, -3]]),
        _spark(3, "rows of 2, 4, 3 and 5 nibbles", "RowBytes NibbleOrder Short",
               [[255, 0], [255, 40], [255, 7], [8, 255]]),
        _spark(4, "ties", "TieToEven", [[0.5, 1.5, 2.5, -6.5, 7.5, 8.5, 255]]),
        _spark(5, "groups of 2", "Groups RowBytes", [[255, 3, 510, 4], [-3, 765, 127.5, 7]], 2),
        _spark(6, "one scale", "PerTensor RowBytes", [[255, 3], [7, -5], [100, 8]], 0),
        _spark(7, "zeros", "ZeroGroup", [[0, 0, 0], [255, 1, 2]]),
        random(10, (3, 16), -1),
        random(11, (2, 24), 8),
        random(12, (3, 12), 0),
        first_clear(_spark_rounded_first, 1300),
    ]  # fmt: skip
    bad = [
        rejected(40, "NaN", "NonFinite", "value", {"w": [[math.nan, 2]]}, group_size=-1),
        rejected(41, "groups of 3 in 4 columns", "BadParams", "value", {"w": [[1.0] * 4]}, group_size=3),
        rejected(42, "group_size -2", "BadParams", "value", {"w": [[1.0] * 4]}, group_size=-2),
    ]
    return _suite("quant/spark", "Codes of four and of eight bits", header, notes, [valid, bad])
