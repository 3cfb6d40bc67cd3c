"""The suites about rounded inputs and outliers. Ids are never reused or renumbered: new cases take new numbers."""

import math
from collections.abc import Callable
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, values
from refllm.evaluate.golden.suites import outliers_definition as definition
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, to_f32
from refllm.evaluate.golden.suites.outliers_definition import Rounder, exact, floats
from refllm.evaluate.golden.suites.rtn_notes import note
from refllm.evaluate.golden.suites.svd_definition import householder, product

BITS = {"class": "bits", "zero_sign": "ignore"}


def _draw(seed: int, rows: int, columns: int, scale: int = -9) -> list[list]:
    flat = dyadic(seed, 12, scale, rows * columns)
    return [flat[i * columns : (i + 1) * columns] for i in range(rows)]


def _recipe(seed: int, scale: int = -9) -> dict:
    return dyadic_recipe(seed, 12, scale)


def _bits(dtype: str, nested: object) -> Output:
    return Output(BITS, values(dtype, nested))


def _near(nested: object, rtol: float, atol: float = 0.0, dtype: str = "f64") -> Output:
    return Output({"class": "allclose", "rtol": rtol, "atol": float(f"{atol:.1e}")}, values(dtype, nested))


def _suite(name: str, title: str, header: list[str], notes: dict, groups: list[list[CaseSpec]]) -> SuiteSpec:
    head = {
        "suite": name,
        "suite_version": "1.0.0",
        "op": name.replace("/", "."),
        "title": title,
        "header": header,
        "lesson": "lessons/12-outliers.md",
        "generator": {"name": "refllm golden regen, suites/outliers.py", "version": "1"},
    }
    source = {"kind": "first_principles", "name": "the header above, in fractions"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases) for cases in groups])


def _invalid(id: int, comment: str, flag: str, error: str, inputs: dict, **params) -> CaseSpec:
    given = {name: values("f32", nested) for name, nested in inputs.items()}
    return CaseSpec(id, comment, (flag,), given, result="invalid", error=error, params=params)


# --- activations/dynamic ---------------------------------------------------------------------------------------------


def _dynamic(id, comment, flags, x, *, recipe=None, ties=True, **params) -> CaseSpec:
    params = {"bits": 8, "clip_ratio": 1.0, "symmetric": True} | params
    rint, given = Rounder(ties), (params["bits"], params["clip_ratio"])
    form = definition.token if params["symmetric"] else definition.token_affine
    found = [form(row, *given, rint) for row in exact(x)]
    expected = {
        "codes": _bits("i8", [codes for codes, *_ in found]),
        "scale": _bits("f32", [[float(scale)] for _, scale, *_ in found]),
    }
    if not params["symmetric"]:
        expected["zero"] = _bits("f32", [[float(zero)] for *_, zero in found])
    inputs = {"x": values("f32", floats(x), recipe=recipe)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def dynamic_suite() -> SuiteSpec:
    """The suite activations/dynamic."""
    header = [
        "Input x, f32 [tokens, in]. Params bits 2..8, clip_ratio r in (0, 1], symmetric. All arithmetic in "
        "float32, every "
        "operation rounded once; every token on its own.",
        "symmetric: scale = r (amax / (2^(bits-1) - 1)), codes = clip(rint(x / scale), -(2^(bits-1) - 1), "
        "2^(bits-1) - "
        "1). Otherwise: lo = r min(x, 0), hi = r max(x, 0), n = 2^bits - 1, scale = hi / n - lo / n, zero = "
        "rint(-lo / "
        "scale), codes = clip(rint(x / scale) + zero, 0, n); codes and zero are given less 2^(bits-1).",
        "Outputs: codes i8 [tokens, in]; scale f32 [tokens, 1]; zero f32 [tokens, 1] unless symmetric. A token of "
        "zeros "
        "has scale 0 and codes 0 (not symmetric: codes and zero -2^(bits-1)).",
    ]
    notes = {
        "PerToken": note("LAYOUT", "A token has a scale of its own, whatever its neighbours hold."),
        "Levels": note("OFF_BY_ONE", "Symmetric codes end at 2^(bits-1) - 1 on both sides: 127 and -127, 7 and -7."),
        "TieToEven": note("ROUNDING", "Ties go to the even code."),
        "Clip": note("BASIC", "The ratio shrinks the scale; what lies beyond saturates at both ends."),
        "ZeroPoint": note("BASIC", "The zero point is rounded before the codes are added to it; 0 is on the grid."),
        "OneSided": note("DEGENERATE", "A token of one sign: lo or hi is 0."),
        "ZeroToken": note("DEGENERATE", "A token of zeros: scale 0, and no NaN."),
        "BadParams": note("MALFORMED", "bits or clip_ratio out of range."),
        "Random": note("BASIC", "Dyadic random tokens of several sizes."),
    }

    def drawn(id, flags, **params):
        return definition.search_for(
            lambda s: _dynamic(id, "random", flags, _draw(s, 4, 9), recipe=_recipe(s), ties=False, **params), 100 * id
        )

    loud = [[127, -3, 2.5, 0.5], [1.27, -0.4, 0, 1]]
    groups = [
        [
            _dynamic(1, "two tokens of different size", "PerToken TieToEven", [loud[0], [254, 1, 3, 5]]),
            _dynamic(2, "both ends", "Levels", [[-7, 7, 3.5, -2.5]], bits=4),
            _dynamic(3, "nothing but zeros", "ZeroToken", [[0, 0, 0], [1, 0, 0]]),
            _dynamic(4, "half of the range", "Clip", [[14, -14, 3, 6]], bits=4, clip_ratio=0.5),
            _dynamic(5, "both signs", "ZeroPoint", [[-1, 2, 0, 1]], bits=2, symmetric=False),
            _dynamic(6, "one sign", "OneSided", [[1, 2, 15, 4], [-1, -2, -15, -4]], bits=4, symmetric=False),
            _dynamic(7, "zeros, affine", "ZeroToken", [[0, 0]], bits=8, symmetric=False),
            _dynamic(8, "affine, clipped", "Clip", [[-8, 0, 22, 4]], bits=4, clip_ratio=0.5, symmetric=False),
        ],
        [
            drawn(20, "Random"),
            drawn(21, "Random Clip", bits=6, clip_ratio=0.75),
            drawn(22, "Random ZeroPoint", bits=8, symmetric=False),
            drawn(23, "Random", bits=3),
        ],
        [
            _invalid(40, "bits 9", "BadParams", "value", {"x": [[1.0]]}, bits=9, clip_ratio=1.0, symmetric=True),
            _invalid(41, "clip_ratio 0", "BadParams", "value", {"x": [[1.0]]}, bits=8, clip_ratio=0.0, symmetric=True),
        ],
    ]
    return _suite("activations/dynamic", "Inputs rounded token by token", header, notes, groups)


# --- finish/static ---------------------------------------------------------------------------------------------------


def _static(id, comment, flags, calibration, x, **params) -> CaseSpec:
    params = {"bits": 8, "symmetric": True, "observer": "max", "percentile": 99.99, "momentum": 0.9} | params
    bits, rint = params["bits"], Rounder(True)
    rows = exact(calibration)
    high = _observed(rows, params, abs if params["symmetric"] else lambda v: v)
    if params["symmetric"]:
        most, zero, middle = (1 << (bits - 1)) - 1, 0, 0
        scale, lowest = to_f32(high / most), -most
    else:
        low, high = min(0, -_observed(rows, params, lambda v: -v)), max(0, high)
        most, middle = (1 << bits) - 1, 1 << (bits - 1)
        scale, lowest = to_f32((high - low) / most), 0
        zero = definition.clamp(rint(to_f32(to_f32(-low) / scale)), 0, most)
    codes = [[definition.clamp(rint(to_f32(v / scale)) + zero, lowest, most) - middle for v in r] for r in exact(x)]
    expected = {"codes": _bits("i8", codes), "scale": _bits("f32", [[float(scale)]])}
    if not params["symmetric"]:
        expected["zero_point"] = _bits("u8", [[zero]])
    inputs = {"calibration": values("f32", calibration), "x": values("f32", x)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _observed(rows, params, of: Callable):
    """The upper end of what calibration has seen."""
    if params["observer"] == "max":
        return max(of(v) for row in rows for v in row)
    if params["observer"] == "average":
        batches = [max(of(v) for row in rows[i : i + 512] for v in row) for i in range(0, len(rows), 512)]
        momentum, high = params["momentum"], batches[0]
        for batch in batches[1:]:
            high = type(high)(momentum) * high + type(high)(1 - momentum) * batch
        return high
    ordered = sorted(of(v) for row in rows for v in row)
    at = type(ordered[0])(params["percentile"]) * (len(ordered) - 1) / 100
    below = at.numerator // at.denominator
    above = ordered[min(below + 1, len(ordered) - 1)]
    return ordered[below] + (above - ordered[below]) * (at - below)


def static_suite() -> SuiteSpec:
    """The suite finish/static."""
    header = [
        "Inputs calibration, f32 [n, in], and x, f32 [tokens, in]. Params bits, symmetric, observer, percentile, "
        "momentum.",
        "High is the upper end of |calibration| (not symmetric: of calibration, and low the lower end likewise, both "
        "made to include 0). observer max: the extreme. percentile: linear between the two nearest ranks, rank "
        "percentile / 100 (count - 1). average: extremes of each 512 rows, m <- momentum m + (1 - momentum) extreme, "
        "from the first.",
        "symmetric: scale = high / (2^(bits-1) - 1), codes = clip(rint(x / scale), -(2^(bits-1) - 1), 2^(bits-1) "
        "- 1). "
        "Otherwise scale = (high - low) / (2^bits - 1), zero_point = rint(-low / scale), codes = clip(rint(x / "
        "scale) + "
        "zero_point, 0, 2^bits - 1), given less 2^(bits-1). scale is rounded to float32 first and that number is "
        "used.",
    ]
    notes = {
        "OneScale": note("LAYOUT", "One scale for all tokens and columns, from calibration and not from x."),
        "Saturates": note("BASIC", "What calibration has not seen saturates at both ends."),
        "Percentile": note("BASIC", "Extremes beyond the percentile do not count; between ranks it is linear."),
        "Average": note("ORDER", "The average begins with the first batch and forgets by the momentum."),
        "ZeroPoint": note("BASIC", "Inputs that lean to one side take a zero point."),
        "BadParams": note("MALFORMED", "A knob out of range."),
        "WrongWidth": note("SHAPE", "Calibration inputs of another width."),
    }
    ramp = [[float(i), 0.0] for i in range(101)]
    batches = [[4.0]] + [[0.5]] * 511 + [[8.0]] + [[0.5]] * 511 + [[2.0]]
    plain = {"calibration": [[1.0, 2.0]], "x": [[1.0, 2.0]]}
    knobs = {"bits": 8, "symmetric": True, "observer": "max", "percentile": 99.99, "momentum": 0.9}
    groups = [
        [
            _static(
                1, "a loud token sets the scale of a quiet one", "OneScale", [[127, 0], [1, -1]], [[10, -3], [1, 1]]
            ),
            _static(2, "twice what was seen", "Saturates", [[3.5, -7]], [[14, -14], [7, -7]], bits=4),
            _static(3, "half of the ranks", "Percentile", ramp, [[50, 10]], observer="percentile", percentile=75.0),
            _static(
                4,
                "between two ranks",
                "Percentile",
                [[1, 2, 3, 4, 9]],
                [[9, 1, 0, 4, 2]],
                observer="percentile",
                percentile=62.5,
                bits=4,
            ),
            _static(5, "three batches", "Average", batches, [[4]], observer="average", momentum=0.5),
            _static(
                6,
                "inputs from -1 to 14",
                "ZeroPoint Saturates",
                [[-1, 14], [3, 0]],
                [[-2, 15], [0, 6.5]],
                bits=4,
                symmetric=False,
            ),
            _static(7, "only positive ones", "ZeroPoint", [[1, 15]], [[0, 15]], bits=4, symmetric=False),
        ],
        [
            _invalid(40, "bits 1", "BadParams", "value", plain, **(knobs | {"bits": 1})),
            _invalid(41, "percentile 50", "BadParams", "value", plain, **(knobs | {"percentile": 50.0})),
            _invalid(42, "momentum 1", "BadParams", "value", plain, **(knobs | {"momentum": 1.0})),
            _invalid(
                43, "two and one columns", "WrongWidth", "shape", {"calibration": [[1.0]], "x": [[1.0, 2]]}, **knobs
            ),
        ],
    ]
    return _suite("finish/static", "Inputs rounded with one calibrated scale", header, notes, groups)


# --- quant/llm_int8 --------------------------------------------------------------------------------------------------


def _int8(id, comment, flags, w, x, threshold=6.0, *, recipes=(None, None), ties=True) -> CaseSpec:
    found = definition.llm_int8(exact(w), exact(x), threshold, Rounder(ties))
    size = max(sum(abs(float(v)) for v in row) for row in x) * max(abs(float(v)) for row in w for v in row)
    expected = {
        "w_codes": _bits("i8", found["w_codes"]),
        "w_scale": _bits("f32", floats(found["w_scale"])),
        "x_codes": _bits("i8", found["x_codes"]),
        "x_scale": _bits("f32", floats(found["x_scale"])),
        "outliers": _bits("u8", found["outliers"]),
        "y": _near([[float(to_f32(v)) for v in row] for row in found["y"]], 0, 2.0**-19 * size + 1e-30, "f32"),
    }
    inputs = {"w": values("f32", floats(w), recipe=recipes[0]), "x": values("f32", floats(x), recipe=recipes[1])}
    params = {"threshold": float(threshold)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def llm_int8_suite() -> SuiteSpec:
    """The suite quant/llm_int8."""
    header = [
        "Inputs w, f32 [out, in], and x, f32 [tokens, in]; param threshold (0: no outliers).",
        "A row r becomes codes rint(r (127 (1 / amax))), every operation rounded to float32; amax / 127 is its "
        "scale (of "
        "a row of zeros in w: 1 / 127, in x: 0).",
        "outliers [1, in]: 1 where |x| >= threshold in some token. Rows of x lose every entry that reaches the "
        "threshold "
        "before amax is taken; x_codes are 0 in outlier columns.",
        "y = (x_codes w_codes^T) x_scale w_scale + the outlier columns of x times the decoded weights w_codes w_scale.",
    ]
    notes = {
        "Threshold": note("OFF_BY_ONE", "An entry equal to the threshold is an outlier."),
        "AmaxAfter": note(
            "ORDER",
            "The maximum of a token is taken after its outliers are gone.",
            "One outlier leaves the rest of its token a few codes around zero.",
        ),
        "WholeColumn": note("LAYOUT", "One token's entry moves the column of all tokens."),
        "EntriesOnly": note(
            "ORDER", "Of a moved column, entries below the threshold still count in their token's maximum."
        ),
        "DecodedWeights": note("BASIC", "Outliers meet the decoded 8-bit weights, not the original ones."),
        "Levels": note("OFF_BY_ONE", "Codes end at 127, not at 128; the scale is amax / 127."),
        "ZeroRow": note("DEGENERATE", "A row of zeros gives zeros and no NaN."),
        "NoThreshold": note("BASIC", "threshold 0 turns the decomposition off."),
        "BadParams": note("MALFORMED", "A threshold below 0."),
        "NonFinite": note("NON_FINITE", "NaN or infinity in w is rejected."),
        "Random": note("BASIC", "Dyadic random weights and inputs, one column 16 times the others."),
    }

    def drawn(id, threshold):
        def make(seed):
            w, x = _draw(seed, 3, 8, -11), _draw(seed + 5000, 4, 8)
            return _int8(
                id, "random", "Random", w, x, threshold, recipes=(_recipe(seed, -11), _recipe(seed + 5000)), ties=False
            )

        return definition.search_for(make, 100 * id)

    w = [[1, -0.5, 0.25, 2], [127, 1, -64, 3]]
    groups = [
        [
            _int8(1, "an entry of 6 and one just below", "Threshold", w, [[6, 1, 0, 2], [1, 5.984375, 2, 1]]),
            _int8(2, "one outlier of 60", "AmaxAfter WholeColumn", w, [[60, 1, -2, 0.5], [1, 2, -1, 0.25]]),
            _int8(
                3,
                "a quiet entry in a moved column is the largest of its token",
                "EntriesOnly WholeColumn",
                w,
                [[9, 1, 1, 1], [4, 1, 2, 1]],
            ),
            _int8(
                4,
                "a weight between two codes under an outlier",
                "DecodedWeights",
                [[127, 0.375, 64, 32]],
                [[1, 48, 1, 2]],
            ),
            _int8(5, "both ends", "Levels", [[-1, 1, 0.5, 0.25]], [[-4, 4, 1, 2]]),
            _int8(6, "zeros", "ZeroRow", [[0, 0], [1, 2]], [[0, 0], [8, 1]]),
            _int8(7, "no threshold", "NoThreshold", w, [[60, 1, -2, 0.5]], 0.0),
        ],
        [drawn(20, 6.0), drawn(21, 2.0)],
        [
            _invalid(40, "threshold -1", "BadParams", "value", {"w": [[1.0]], "x": [[1.0]]}, threshold=-1.0),
            _invalid(41, "NaN", "NonFinite", "value", {"w": [[math.nan, 1.0]], "x": [[1.0, 1.0]]}, threshold=6.0),
        ],
    ]
    return _suite("quant/llm_int8", "8-bit products with outlier columns apart", header, notes, groups)


# --- quant/zeroquant -------------------------------------------------------------------------------------------------


def _groups(w, g):
    return [[row[i : i + g] for i in range(0, len(row), g)] for row in w]


def _zeroquant(id, comment, flags, w, g, bits, *, recipe=None, ties=True) -> CaseSpec:
    rint = Rounder(ties)
    found = [[definition.twos(group, bits, rint) for group in row] for row in _groups(exact(w), g)]
    expected = {
        "codes": _bits("u8", [[c for codes, *_ in row for c in codes] for row in found]),
        "scale": _bits("f16", [[float(s) for _, s, _ in row] for row in found]),
        "w_hat": _bits("f32", [[float(v) for *_, back in row for v in back] for row in found]),
    }
    inputs = {"w": values("f32", floats(w), recipe=recipe)}
    params = {"form": "integer", "bits": bits, "group_size": g}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def _zeroquant_fp(id, comment, flags, w, g, constraint, *, recipe=None, ties=True) -> CaseSpec:
    groups = _groups(exact(w), g)
    scales = definition.fp4_scales(groups, constraint)
    codes = [
        [definition.fp4(v, s, ties) for group, s in zip(row, of, strict=True) for v in group]
        for row, of in zip(groups, scales, strict=True)
    ]
    decode = lambda code, s: float(to_f32(definition.FP4[code % 8] * s)) * (-1 if code >= 8 else 1)
    expected = {
        "codes": _bits("u8", codes),
        "scale": _bits("f16", floats(scales)),
        "w_hat": _bits(
            "f32", [[decode(c, scales[r][i // g]) for i, c in enumerate(row)] for r, row in enumerate(codes)]
        ),
    }
    inputs = {"w": values("f32", floats(w), recipe=recipe)}
    params = {"form": "float", "constraint": constraint, "group_size": g}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def zeroquant_suite() -> SuiteSpec:
    """The suite quant/zeroquant."""
    header = [
        "Input w, f32 [out, in]; params group_size g, and form integer with bits, or form float with constraint.",
        "integer: scale = amax / 2^(bits-1), rounded to float16; q = clip(rint(w / scale), -2^(bits-1), "
        "2^(bits-1) - 1); "
        "codes are q + 2^(bits-1); w_hat = scale q.",
        "float: scale = amax / 6, then the constraint, then rounded to float16; codes are the nearest of FP4 E2M1 "
        "(0, .5, 1, 1.5, 2, 3, 4, 6, bit 3 the sign) to w / scale, ties to the even code, beyond 6 the largest.",
        "constraint m1: the least power of two that is not below the scale. m2: the largest scale of the weight, "
        "divided "
        "by the least power of two that makes it not larger than the scale. A group of zeros counts as amax 1.",
    ]
    notes = {
        "Divisor": note(
            "OFF_BY_ONE", "Integers divide by 2^(bits-1), not by 2^(bits-1) - 1: +amax saturates by a step."
        ),
        "GroupAlongRow": note("LAYOUT", "A group is consecutive columns of one row."),
        "TieToEven": note("ROUNDING", "Ties go to the even code."),
        "Divisor6": note("BASIC", "FP4 ends at 6, and so does the largest weight of a group."),
        "M1": note("ROUNDING", "Powers of two, rounded up: no weight of the group saturates."),
        "M2": note("ROUNDING", "Powers of two below the largest scale, rounded down."),
        "PowersStay": note("DEGENERATE", "A scale that is a power of two already stays: ceil(log2) must be exact."),
        "ZeroGroup": note("DEGENERATE", "A group of zeros: a finite scale and zeros."),
        "BadParams": note("MALFORMED", "bits, constraint or group_size out of range."),
        "NonFinite": note("NON_FINITE", "NaN or infinity in w is rejected."),
        "Random": note("BASIC", "Dyadic random weights."),
    }
    integer = lambda id, g, bits: definition.search_for(
        lambda s: _zeroquant(id, "random", "Random", _draw(s, 3, 8), g, bits, recipe=_recipe(s), ties=False), 100 * id
    )
    single = lambda id, g, rule: definition.search_for(
        lambda s: _zeroquant_fp(id, "random", "Random", _draw(s, 3, 8), g, rule, recipe=_recipe(s), ties=False),
        100 * id,
    )
    given = {"form": "integer", "bits": 4, "group_size": 2}
    groups = [
        [
            _zeroquant(1, "both ends", "Divisor TieToEven", [[8, -8, 2.5, 3.5]], 4, 4),
            _zeroquant(2, "two groups", "GroupAlongRow", [[4, 1, 0.5, -0.25], [2, -1, 8, 5]], 2, 3),
            _zeroquant(3, "zeros", "ZeroGroup", [[0, 0, 1, -2]], 2, 4),
            integer(10, 4, 4),
            integer(11, 8, 8),
        ],
        [
            _zeroquant_fp(
                21, "every midpoint", "Divisor6 TieToEven", [[6, 0.25, 0.75, 1.25, 1.75, -2.5, -3.5, 5]], 8, "none"
            ),
            _zeroquant_fp(22, "scales 1, 1.25, 0.5", "M1 PowersStay", [[6, 1, 7.5, 1, 3, 1]], 2, "m1"),
            _zeroquant_fp(23, "scales 3, 1.25, 0.75", "M2 PowersStay", [[18, 1, 7.5, 1, 4.5, 1]], 2, "m2"),
            _zeroquant_fp(24, "zeros", "ZeroGroup", [[0, 0, 6, 3]], 2, "none"),
            single(30, 4, "none"),
            single(31, 4, "m1"),
            single(32, 2, "m2"),
        ],
        [
            _invalid(40, "bits 9", "BadParams", "value", {"w": [[1.0, 2]]}, **(given | {"bits": 9})),
            _invalid(
                41, "groups of 3 in 4 columns", "BadParams", "value", {"w": [[1.0] * 4]}, **(given | {"group_size": 3})
            ),
            _invalid(
                42,
                "constraint m3",
                "BadParams",
                "value",
                {"w": [[1.0, 2]]},
                form="float",
                constraint="m3",
                group_size=2,
            ),
            _invalid(43, "NaN", "NonFinite", "value", {"w": [[math.nan, 2]]}, **given),
        ],
    ]
    return _suite("quant/zeroquant", "Weights in groups: integers and FP4", header, notes, groups)


# --- finish/lorc -----------------------------------------------------------------------------------------------------


def _lorc(id, comment, flags, singular, rank, base) -> CaseSpec:
    U, V = householder([1, 1, 1, 1, 2]), householder([1, 1, 1, 2, 3])
    triple = [U[i] for i in range(len(singular))], list(map(_exact, singular)), [V[i] for i in range(len(singular))]
    error, kept = product(triple), product(tuple(part[:rank] for part in triple))
    w_hat = [[_exact(base)] * 5 for _ in range(5)]
    add = lambda a, b: [[float(u + v) for u, v in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]
    total = sum(singular[:rank])
    left = float(sum(_exact(s) ** 2 for s in singular[rank:]))
    # float16 factors: every product of theirs is off by 2^-10 of itself at most.
    weight = 1.1 * (2.0**-10 * total + 2.0**-20 * abs(base))
    spread = 5 * weight
    expected = {
        "repaired": _near(add(w_hat, kept), 0, weight, "f32"),
        "error": _near(left, 0, 2 * math.sqrt(left) * spread + spread**2),
    }
    inputs = {"w": values("f32", add(w_hat, error)), "w_hat": values("f32", floats(w_hat))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"rank": rank})


def _exact(x):
    return exact([[x]])[0][0]


def lorc_suite() -> SuiteSpec:
    """The suite finish/lorc."""
    header = [
        "Inputs w, the weight, and w_hat, what it was rounded to, f32 [out, in]; param rank m.",
        "E = w - w_hat; repaired = w_hat + (the matrix of rank m nearest to E), from factors stored as float16. "
        "error is "
        "the squared Frobenius norm of w - repaired: the sum of the squares of the singular values of E after the "
        "m-th.",
    ]
    notes = {
        "ErrorNotWeight": note("BASIC", "The error is decomposed, not the weight: a large w_hat changes nothing."),
        "LargestKept": note("ORDER", "The largest singular values stay."),
        "FullRank": note("DEGENERATE", "Full rank repairs everything."),
        "BadRank": note("MALFORMED", "A rank of 0, or above the smaller side."),
        "WrongShape": note("SHAPE", "w and w_hat of different shapes."),
        "NonFinite": note("NON_FINITE", "NaN or infinity is rejected."),
    }
    square = {"w": [[1.0, 2], [3, 4]], "w_hat": [[1.0, 1], [3, 3]]}
    groups = [
        [
            _lorc(1, "rank 1 of singular values 4, 1", "LargestKept", [4, 1], 1, 0),
            _lorc(2, "beside weights of 64", "ErrorNotWeight LargestKept", [4, 2, 0.5], 2, 64),
            _lorc(3, "full rank", "FullRank", [4, 2, 1, 0.5, 0.25], 5, 8),
        ],
        [
            _invalid(40, "rank 0", "BadRank", "value", square, rank=0),
            _invalid(41, "rank 3 of 2 x 2", "BadRank", "value", square, rank=3),
            _invalid(42, "2 x 2 and 2 x 3", "WrongShape", "shape", square | {"w": [[1.0, 2, 3], [3, 4, 5]]}, rank=1),
            _invalid(43, "NaN", "NonFinite", "value", square | {"w": [[math.nan, 2], [3, 4]]}, rank=1),
        ],
    ]
    return _suite("finish/lorc", "Low-rank repair of a rounding error", header, notes, groups)


# --- transform/smoothquant -------------------------------------------------------------------------------------------


def _smooth(id, comment, flags, absmax, gain, first, second, alpha) -> CaseSpec:
    s = definition.smooth_scales(absmax, [first, second], alpha)
    single = lambda rows: _near([[float(to_f32(Fraction(v))) for v in row] for row in rows], 2.0**-22, dtype="f32")
    scaled = lambda W: single([[v * f for v, f in zip(row, s, strict=True)] for row in W])
    expected = {
        "s": _near([s], 1e-12),
        "gain": single([[g / f for g, f in zip(gain, s, strict=True)]]),
        "first": scaled(first),
        "second": scaled(second),
    }
    inputs = {"absmax": values("f64", [absmax]), "gain": values("f32", [gain])}
    inputs |= {"first": values("f32", first), "second": values("f32", second)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"alpha": alpha})


def smoothquant_suite() -> SuiteSpec:
    """The suite transform/smoothquant."""
    header = [
        "Inputs absmax f64 [1, in], the largest magnitude of each channel in calibration; gain f32 [1, in] of the "
        "norm "
        "before; first and second, f32 [out, in], weights that read that norm. Param alpha.",
        "w = max(1e-5, largest |entry| of the column in both weights); s = max(1e-5, absmax^alpha / w^(1 - alpha)). "
        "gain / s; both weights times s column by column.",
    ]
    notes = {
        "Joint": note(
            "BASIC",
            "One s for all readers of a norm, from the largest of their columns.",
            "The norm can be divided by one s only: the other reader computes something else.",
        ),
        "Multiply": note("LAYOUT", "Weights are multiplied where the gain is divided."),
        "Alpha": note("BASIC", "alpha weighs the inputs, 1 - alpha the weights."),
        "Floor": note("DEGENERATE", "Dead channels and dead columns: the floors 1e-5, no NaN and no infinity."),
        "PerColumn": note("LAYOUT", "s belongs to input channels, the columns of [out, in]."),
        "BadParams": note("MALFORMED", "alpha outside [0, 1]."),
    }
    A, B = [[1, -0.25, 2, 0.5], [0.5, 0.125, -1, 4]], [[-4, 0.0625, 0.5, 1]]
    a, gain = [64.0, 1, 4, 0.25], [1.0, 2, 0.5, -1]
    inputs = {"absmax": values("f64", [a]), "gain": values("f32", [gain]), "first": values("f32", A)}
    bad = CaseSpec(
        40,
        "alpha 1.5",
        ("BadParams",),
        inputs | {"second": values("f32", B)},
        result="invalid",
        error="value",
        params={"alpha": 1.5},
    )
    groups = [
        [
            _smooth(1, "one half", "Joint Multiply PerColumn", a, gain, A, B, 0.5),
            _smooth(2, "everything to the weights", "Alpha Multiply", a, gain, A, B, 1.0),
            _smooth(3, "everything to the inputs", "Alpha Joint", a, gain, A, B, 0.0),
            _smooth(4, "three quarters", "Alpha", a, gain, A, B, 0.75),
            _smooth(
                5,
                "a dead channel and a dead column",
                "Floor",
                [0.0, 1, 4, 1],
                gain,
                [[1, 0, 2, 1]],
                [[1, 0, 1, 1]],
                0.5,
            ),
        ],
        [bad],
    ]
    return _suite("transform/smoothquant", "Scales moved from inputs into weights", header, notes, groups)


# --- transform/osplus ------------------------------------------------------------------------------------------------


def _osplus(id, comment, flags, x, w, bits, steps, *, recipes=(None, None)) -> CaseSpec:
    s, t, losses = definition.osplus(exact(x), exact(w), bits, steps)
    best, *others = sorted(losses)
    if others and others[0] - best < 1e-3 * best + 1e-9:
        raise ValueError("two thresholds are nearly as good")
    columns = range(len(x[0]))
    z = [(max(float(r[k]) for r in x) + min(float(r[k]) for r in x)) / 2 for k in columns]
    expected = {"s": _near([s], 1e-9), "t": _near(t, 1e-9), "z": _near([z], 1e-12)}
    inputs = {"x": values("f32", floats(x), recipe=recipes[0]), "w": values("f32", floats(w), recipe=recipes[1])}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"bits": bits, "steps": steps})


def osplus_suite() -> SuiteSpec:
    """The suite transform/osplus."""
    header = [
        "Inputs x, f32 [tokens, in], and w, f32 [out, in]; params bits and steps.",
        "z = (max + min) / 2 of each channel over the tokens (what a LayerNorm would be shifted by; s below is "
        "that of x "
        "itself).",
        "For t = top - i (top - 0.1) / steps, i = 0 .. steps, top = max |x|: s = max(1, max / t, -min / t) per "
        "channel; "
        "loss = mean over tokens of |Q(x / s) Q(w diag(s))^T - x w^T|^2, Q symmetric with 2^(bits-1) - 1 levels, "
        "a float32 "
        "scale per token and per row of w. Outputs: s and t of the least loss, the first of equals.",
    ]
    notes = {
        "OnlyOutside": note("BASIC", "Channels inside the threshold keep s = 1; SmoothQuant's s moves all of them."),
        "BothSigns": note("BASIC", "A channel that reaches far down counts as one that reaches far up."),
        "Search": note("ORDER", "The threshold is the one with the least loss, from the largest input downwards."),
        "Shift": note("BASIC", "The middle of the range, not the mean of the numbers."),
        "Dead": note("DEGENERATE", "Channels of zeros keep s = 1."),
        "BadParams": note("MALFORMED", "bits or steps out of range."),
    }

    def drawn(id, flags, bits, steps, change):
        def make(seed):
            x, w = change(_draw(seed, 5, 4)), _draw(seed + 5000, 3, 4, -11)
            return _osplus(id, "random", flags, x, w, bits, steps)

        return definition.search_for(make, 100 * id)

    def loud(x):
        return [[row[0] * 16, *row[1:]] for row in x]

    def low(x):
        return [[-abs(row[0]) * 16, *row[1:]] for row in x]

    def uneven(x):
        return [[v + 3 for v in row] for row in x[:-1]] + [[v - 9 for v in x[-1]]]

    plain = {"x": [[1.0, 2]], "w": [[1.0, 1]]}
    groups = [
        [
            drawn(1, "OnlyOutside Search", 4, 20, loud),
            drawn(2, "BothSigns OnlyOutside", 4, 20, low),
            drawn(3, "Shift", 4, 10, uneven),
            drawn(4, "Dead", 4, 10, lambda x: [[0 * row[0], row[1] * 8, *row[2:]] for row in x]),
        ],
        [
            _invalid(40, "bits 1", "BadParams", "value", plain, bits=1, steps=10),
            _invalid(41, "no steps", "BadParams", "value", plain, bits=4, steps=0),
        ],
    ]
    return _suite("transform/osplus", "Channels shrunk to a searched threshold", header, notes, groups)
