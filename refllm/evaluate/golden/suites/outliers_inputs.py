"""Suites about rounded inputs. Ids are never reused and never renumbered: new cases take new numbers."""

import math
from collections.abc import Callable

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, values
from refllm.evaluate.golden.suites import outliers_definition as definition
from refllm.evaluate.golden.suites.exact import first_clear, to_f32
from refllm.evaluate.golden.suites.outliers_cases import (
    bits_output,
    drawn_rows,
    near_output,
    recipe_of,
    rejected,
    suite_of,
)
from refllm.evaluate.golden.suites.outliers_definition import Rounder, exact, floats
from refllm.evaluate.golden.suites.rtn_notes import note

# --- activations/dynamic ---------------------------------------------------------------------------------------------


def _dynamic(id, comment, flags, x, *, recipe=None, ties=True, **params) -> CaseSpec:
    params = {"bits": 8, "clip_ratio": 1.0, "symmetric": True} | params
    rint, given = Rounder(ties), (params["bits"], params["clip_ratio"])
    form = definition.token if params["symmetric"] else definition.token_affine
    found = [form(row, *given, rint) for row in exact(x)]
    expected = {
        "codes": bits_output("i8", [codes for codes, *_ in found]),
        "scale": bits_output("f32", [[float(scale)] for _, scale, *_ in found]),
    }
    if not params["symmetric"]:
        expected["zero"] = bits_output("f32", [[float(zero)] for *_, zero in found])
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
        return first_clear(
            lambda s: _dynamic(id, "random", flags, drawn_rows(s, 4, 9), recipe=recipe_of(s), ties=False, **params),
            100 * id,
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
            rejected(40, "bits 9", "BadParams", "value", {"x": [[1.0]]}, bits=9, clip_ratio=1.0, symmetric=True),
            rejected(41, "clip_ratio 0", "BadParams", "value", {"x": [[1.0]]}, bits=8, clip_ratio=0.0, symmetric=True),
        ],
    ]
    return suite_of("activations/dynamic", "Inputs rounded token by token", header, notes, groups)


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
    expected = {"codes": bits_output("i8", codes), "scale": bits_output("f32", [[float(scale)]])}
    if not params["symmetric"]:
        expected["zero_point"] = bits_output("u8", [[zero]])
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
            rejected(40, "bits 1", "BadParams", "value", plain, **(knobs | {"bits": 1})),
            rejected(41, "percentile 50", "BadParams", "value", plain, **(knobs | {"percentile": 50.0})),
            rejected(42, "momentum 1", "BadParams", "value", plain, **(knobs | {"momentum": 1.0})),
            rejected(
                43, "two and one columns", "WrongWidth", "shape", {"calibration": [[1.0]], "x": [[1.0, 2]]}, **knobs
            ),
        ],
    ]
    return suite_of("finish/static", "Inputs rounded with one calibrated scale", header, notes, groups)


# --- quant/llm_int8 --------------------------------------------------------------------------------------------------


def _int8(id, comment, flags, w, x, threshold=6.0, *, recipes=(None, None), ties=True) -> CaseSpec:
    found = definition.llm_int8(exact(w), exact(x), threshold, Rounder(ties))
    size = max(sum(abs(float(v)) for v in row) for row in x) * max(abs(float(v)) for row in w for v in row)
    expected = {
        "w_codes": bits_output("i8", found["w_codes"]),
        "w_scale": bits_output("f32", floats(found["w_scale"])),
        "x_codes": bits_output("i8", found["x_codes"]),
        "x_scale": bits_output("f32", floats(found["x_scale"])),
        "outliers": bits_output("u8", found["outliers"]),
        "y": near_output([[float(to_f32(v)) for v in row] for row in found["y"]], 0, 2.0**-19 * size + 1e-30, "f32"),
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
            w, x = drawn_rows(seed, 3, 8, -11), drawn_rows(seed + 5000, 4, 8)
            return _int8(
                id,
                "random",
                "Random",
                w,
                x,
                threshold,
                recipes=(recipe_of(seed, -11), recipe_of(seed + 5000)),
                ties=False,
            )

        return first_clear(make, 100 * id)

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
            rejected(40, "threshold -1", "BadParams", "value", {"w": [[1.0]], "x": [[1.0]]}, threshold=-1.0),
            rejected(41, "NaN", "NonFinite", "value", {"w": [[math.nan, 1.0]], "x": [[1.0, 1.0]]}, threshold=6.0),
        ],
    ]
    return suite_of("quant/llm_int8", "8-bit products with outlier columns apart", header, notes, groups)
