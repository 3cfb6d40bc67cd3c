"""Suites about weights made for rounded inputs. Ids are never reused or renumbered: new cases take new numbers."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, values
from refllm.evaluate.golden.suites import outliers_definition as definition
from refllm.evaluate.golden.suites.exact import Unclear, first_clear, to_f32
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
from refllm.evaluate.golden.suites.svd_definition import householder, product

# --- quant/zeroquant -------------------------------------------------------------------------------------------------


def _groups(w, g):
    return [[row[i : i + g] for i in range(0, len(row), g)] for row in w]


def _zeroquant(id, comment, flags, w, g, bits, *, recipe=None, ties=True) -> CaseSpec:
    rint = Rounder(ties)
    found = [[definition.twos(group, bits, rint) for group in row] for row in _groups(exact(w), g)]
    expected = {
        "codes": bits_output("u8", [[c for codes, *_ in row for c in codes] for row in found]),
        "scale": bits_output("f16", [[float(s) for _, s, _ in row] for row in found]),
        "w_hat": bits_output("f32", [[float(v) for *_, back in row for v in back] for row in found]),
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
        "codes": bits_output("u8", codes),
        "scale": bits_output("f16", floats(scales)),
        "w_hat": bits_output(
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
    integer = lambda id, g, bits: first_clear(
        lambda s: _zeroquant(id, "random", "Random", drawn_rows(s, 3, 8), g, bits, recipe=recipe_of(s), ties=False),
        100 * id,
    )
    single = lambda id, g, rule: first_clear(
        lambda s: _zeroquant_fp(id, "random", "Random", drawn_rows(s, 3, 8), g, rule, recipe=recipe_of(s), ties=False),
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
            rejected(40, "bits 9", "BadParams", "value", {"w": [[1.0, 2]]}, **(given | {"bits": 9})),
            rejected(
                41, "groups of 3 in 4 columns", "BadParams", "value", {"w": [[1.0] * 4]}, **(given | {"group_size": 3})
            ),
            rejected(
                42,
                "constraint m3",
                "BadParams",
                "value",
                {"w": [[1.0, 2]]},
                form="float",
                constraint="m3",
                group_size=2,
            ),
            rejected(43, "NaN", "NonFinite", "value", {"w": [[math.nan, 2]]}, **given),
        ],
    ]
    return suite_of("quant/zeroquant", "Weights in groups: integers and FP4", header, notes, groups)


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
        "repaired": near_output(add(w_hat, kept), 0, weight, "f32"),
        "error": near_output(left, 0, 2 * math.sqrt(left) * spread + spread**2),
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
            rejected(40, "rank 0", "BadRank", "value", square, rank=0),
            rejected(41, "rank 3 of 2 x 2", "BadRank", "value", square, rank=3),
            rejected(42, "2 x 2 and 2 x 3", "WrongShape", "shape", square | {"w": [[1.0, 2, 3], [3, 4, 5]]}, rank=1),
            rejected(43, "NaN", "NonFinite", "value", square | {"w": [[math.nan, 2], [3, 4]]}, rank=1),
        ],
    ]
    return suite_of("finish/lorc", "Low-rank repair of a rounding error", header, notes, groups)


# --- transform/smoothquant -------------------------------------------------------------------------------------------


def _smooth(id, comment, flags, absmax, gain, first, second, alpha, **params) -> CaseSpec:
    s = definition.smooth_scales(absmax, [first, second], alpha)
    if params.get("inverted"):
        dead = [not a or not any(w) for a, *w in zip(absmax, *first, *second, strict=True)]
        s = [1.0 if zero else 1 / f for f, zero in zip(s, dead, strict=True)]
    single = lambda rows: near_output(
        [[float(to_f32(Fraction(v))) for v in row] for row in rows], 2.0**-22, dtype="f32"
    )
    scaled = lambda W: single([[v * f for v, f in zip(row, s, strict=True)] for row in W])
    expected = {
        "s": near_output([s], 1e-12),
        "gain": single([[g / f for g, f in zip(gain, s, strict=True)]]),
        "first": scaled(first),
        "second": scaled(second),
    }
    inputs = {"absmax": values("f64", [absmax]), "gain": values("f32", [gain])}
    inputs |= {"first": values("f32", first), "second": values("f32", second)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"alpha": alpha} | params)


def smoothquant_suite() -> SuiteSpec:
    """The suite transform/smoothquant."""
    header = [
        "Inputs absmax f64 [1, in], the largest magnitude of each channel in calibration; gain f32 [1, in] of the "
        "norm "
        "before; first and second, f32 [out, in], weights that read that norm. Param alpha.",
        "w = max(1e-5, largest |entry| of the column in both weights); s = max(1e-5, absmax^alpha / w^(1 - alpha)). "
        "gain / s; both weights times s column by column.",
        "Param inverted, if it is there and true: 1 / s in place of s, and 1 where absmax or the whole column is 0.",
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
        "Inverted": note("BASIC", "The gain is multiplied by s, the weights are divided."),
        "Dead": note("DEGENERATE", "Inverted, dead channels and columns keep their size: 1 / 1e-5 would be deafening."),
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
            _smooth(6, "inverted", "Inverted Alpha", a, gain, A, B, 0.25, inverted=True),
            _smooth(
                7,
                "inverted, a dead channel and a dead column",
                "Dead Inverted",
                [0.0, 1, 4, 1],
                gain,
                [[1, 0, 2, 1]],
                [[1, 0, 1, 1]],
                0.5,
                inverted=True,
            ),
        ],
        [bad],
    ]
    return suite_of("transform/smoothquant", "Scales moved from inputs into weights", header, notes, groups, "1.1.0")


# --- transform/osplus ------------------------------------------------------------------------------------------------


def _osplus(id, comment, flags, x, w, bits, steps, *, recipes=(None, None)) -> CaseSpec:
    s, t, losses = definition.osplus(exact(x), exact(w), bits, steps)
    best, *others = sorted(losses)
    if others and others[0] - best < 1e-3 * best + 1e-9:
        raise Unclear("two thresholds are nearly as good")
    columns = range(len(x[0]))
    z = [(max(float(r[k]) for r in x) + min(float(r[k]) for r in x)) / 2 for k in columns]
    expected = {"s": near_output([s], 1e-9), "t": near_output(t, 1e-9), "z": near_output([z], 1e-12)}
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
            x, w = change(drawn_rows(seed, 5, 4)), drawn_rows(seed + 5000, 3, 4, -11)
            return _osplus(id, "random", flags, x, w, bits, steps)

        return first_clear(make, 100 * id)

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
            rejected(40, "bits 1", "BadParams", "value", plain, bits=1, steps=10),
            rejected(41, "no steps", "BadParams", "value", plain, bits=4, steps=0),
        ],
    ]
    return suite_of("transform/osplus", "Channels shrunk to a searched threshold", header, notes, groups)
