"""The suites quant/omse, quant/hqq and quant/aciq. Ids are never reused and never renumbered."""

import math
from dataclasses import replace
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import (
    Unclear,
    dyadic,
    dyadic_recipe,
    f16_margin,
    first_clear,
    nearest,
    to_f16,
    to_f32,
)
from refllm.evaluate.golden.suites.rtn_definition import MARGIN, Definition, quantize
from refllm.evaluate.golden.suites.rtn_notes import note

_LESSON = "lessons/09-choosing-the-range.md"
_BITS = {"class": "bits", "zero_sign": "ignore"}
_REJECTED = {
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "BadParams": note("MALFORMED", "Params out of range are rejected."),
}
_RANDOM = note("BASIC", "Dyadic random weights, every decision well clear of its boundary.")


def _rows(seed: int, bits: int, exp2: int, shape: tuple[int, int]) -> list[list[Fraction]]:
    flat = dyadic(seed, bits, exp2, shape[0] * shape[1])
    return [flat[i : i + shape[1]] for i in range(0, len(flat), shape[1])]


def _floats(nested) -> list:
    return [[float(x) for x in row] for row in nested]


def _margin(x: Fraction) -> Fraction:
    """How far x is from where rounding changes its mind, in steps."""
    return abs(x - x.numerator // x.denominator - Fraction(1, 2))


def _clear(condition: bool) -> None:
    if not condition:
        raise Unclear


def _drawn(id: int, comment: str, flags: str, shape, make, bits=12, exp2=-10) -> CaseSpec:
    """A case on the first random weights all of whose decisions are clear."""

    made = lambda seed: make(id, comment, flags, _rows(seed, bits, exp2, shape), dyadic_recipe(seed, bits, exp2))
    return first_clear(made, 1000 * id)


def _invalid(id, comment, flag, w, error, **params) -> CaseSpec:
    return CaseSpec(id, comment, (flag,), {"w": values("f32", w)}, result="invalid", error=error, params=params)


def _head(name: str, title: str, header: list[str], version="1.0.0") -> dict:
    return manifest_head(__name__, f"quant/{name}", title, header, _LESSON, version=version)


def _suite(head: dict, notes: dict, source: str, cases: list[CaseSpec]) -> SuiteSpec:
    source = {"kind": "first_principles", "name": source}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


# --- omse ------------------------------------------------------------------------------------------------------------


def _searched(group: list[Fraction], d: Definition) -> dict:
    """Codes, scale, zero point and decoded weights of one group, by trying the 80 ranges."""
    tried = []
    for step in range(80):
        r = to_f32(Fraction(1 - step / 100))
        lo, hi = to_f32(r * min(0, *group)), to_f32(r * max(0, *group))
        # The range [lo, hi] as rtn finds it: its two ends stand beside the weights of a group of their own.
        fitted, fit_margin = quantize([[lo, hi]], replace(d, group_size=-1))
        scale, zero = fitted["scale"][0][0], fitted.get("zero_point", [[1 << (d.bits - 1)]])[0][0]
        steps = [to_f32(w / scale) for w in group]
        lowest = 1 if d.symmetric else 0
        codes = [min(max(nearest(x) + zero, lowest), d.levels) for x in steps]
        decoded = [to_f32(scale * (code - zero)) for code in codes]
        error = sum((a - b) ** 2 for a, b in zip(decoded, group, strict=True))
        margin = min(fit_margin, *map(_margin, steps))
        tried.append((error, margin, {"codes": codes, "scale": scale, "zero_point": zero, "w_hat": decoded}))
    least = min(error for error, _, _ in tried)
    winners = [(margin, found) for error, margin, found in tried if error == least]
    _clear(all(found == winners[0][1] for _, found in winners))  # so that only the result counts, not which is kept
    others = [error for error, _, _ in tried if error != least]
    _clear(not others or not least or min(others) > least * Fraction(1000001, 1000000))
    _clear(winners[0][0] >= MARGIN)
    return winners[0][1]


def _omse(id, comment, flags, w, recipe, d: Definition) -> CaseSpec:
    g = len(w[0]) if d.group_size == -1 else d.group_size
    found = [[_searched(row[i : i + g], d) for i in range(0, len(row), g)] for row in w]
    flat = lambda name: [[x for group in row for x in group[name]] for row in found]
    one = lambda name: [[group[name] for group in row] for row in found]
    expected = {
        "codes": Output(_BITS, values("u8", flat("codes"))),
        "scale": Output(_BITS, values("f16", _floats(one("scale")))),
        "w_hat": Output(_BITS, values("f32", _floats(flat("w_hat")))),
    }
    if not d.symmetric:
        expected["zero_point"] = Output(_BITS, values("u8", one("zero_point")))
    weights = values("f32", _floats(w), recipe=recipe)
    params = d.params() | {"symmetric": d.symmetric}
    return CaseSpec(id, comment, tuple(flags.split()), {"w": weights}, expected, params=params)


def omse_suite() -> SuiteSpec:
    """The suite quant/omse."""
    header = [
        "Input w, f32 [out, in]. Params: bits, group_size (g columns, or -1: a row), symmetric. For r = float32(1 - "
        "i / "
        "100), i = 0 .. 79, the range of every group is r lo .. r hi with lo = min(w, 0), hi = max(w, 0), each product "
        "rounded to float32; scale (float16), zero point, codes and decoded weights follow as in quant/rtn, the codes "
        "from w itself. Kept is what makes the sum of (w_hat - w)^2 least, the first of equals.",
        "Outputs: codes u8 [out, in], scale f16 [out, groups], zero_point u8 [out, groups] unless symmetric, w_hat "
        "f32.",
    ]
    notes = {
        "Search": note("BASIC", "The range is searched: rounding to the full range is another answer."),
        "Power": note("BASIC", "The error is squared.", "GPTQ's `mse` option takes the power 2.4, others |error|."),
        "PerGroup": note("LAYOUT", "Every group has its own range.", "One range for a row fits its largest group."),
        "Unclipped": note("BASIC", "The error is taken against w, not against w clipped to the range.",
                          "Against the clipped weight the smallest range wins."),
        "Random": _RANDOM,
        **_REJECTED,
    }  # fmt: skip
    made = lambda d: lambda *given: _omse(*given, d)
    cases = [
        _drawn(1, "4 bits, groups of 8", "Search Random PerGroup Unclipped", (2, 16), made(Definition(4, 8))),
        _drawn(2, "3 bits, one range a row", "Search Power Unclipped", (3, 12), made(Definition(3, -1))),
        _drawn(3, "4 bits, affine", "Search Random", (2, 16), made(Definition(4, 8, symmetric=False))),
        _drawn(4, "2 bits, affine", "Search Power", (3, 8), made(Definition(2, -1, symmetric=False))),
        _invalid(20, "NaN", "NonFinite", [[math.nan, 1.0]], "value", bits=4, group_size=-1, symmetric=True),
        _invalid(21, "1 bit", "BadParams", [[2.0, 1.0]], "value", bits=1, group_size=-1, symmetric=True),
    ]
    source = "the header above, every range tried in exact fractions rounded once per operation"
    return _suite(_head("omse", "The range of least squared error", header), notes, source, cases)


# --- hqq -------------------------------------------------------------------------------------------------------------


def _split(w: list[list[Fraction]], most: int, beta: Fraction, growth: Fraction, rounds: int):
    """1 / scale and zero of every row, exactly: with p = 1 all numbers are rational."""
    inverse, zero = [], []
    for row in w:
        span = max(row) - min(row)
        inverse.append(min(most / span, Fraction(20000)) if span > Fraction(1, 10000) else Fraction(1))
        zero.append(-min(row) * inverse[-1])
    least, count = None, 0
    for _ in range(rounds):
        errors = []
        for i, row in enumerate(w):
            wanted = []
            for x in row:
                step = x * inverse[i] + zero[i]
                _clear(_margin(step) > Fraction(1, 10**6))
                code = min(max(nearest(step), 0), most)
                error = x - (code - zero[i]) / inverse[i]
                kept = max(abs(error) - 1 / beta, Fraction(0)) * (1 if error > 0 else -1)
                wanted.append(code - (x - kept) * inverse[i])
                errors.append(abs(error))
            zero[i] = Fraction(sum(wanted), len(wanted)).limit_denominator(10**30)
        beta, mean, count = beta * growth, Fraction(sum(errors), len(errors)), count + 1
        if least is not None:
            _clear(abs(mean - least) > Fraction(1, 10**6) * least)
        if least is not None and mean >= least:
            break
        least = mean
    return inverse, zero, count


def _hqq(id, comment, flags, w, recipe, bits, beta, rounds, stops=None, growth=Fraction(101, 100)) -> CaseSpec:
    most = (1 << bits) - 1
    inverse, zero, count = _split(w, most, Fraction(beta), Fraction(growth), rounds)
    _clear(stops is None or count == stops)
    outputs = {"codes": [], "scale": [], "minimum": [], "w_hat": []}
    for row, inv, z in zip(w, inverse, zero, strict=True):
        _clear(f16_margin(1 / inv) > Fraction(1, 10**6) and f16_margin(-z / inv) > Fraction(1, 10**6))
        scale, minimum = to_f16(1 / inv), to_f16(-z / inv)
        steps = [(x - minimum) / scale for x in row]
        _clear(all(_margin(step) > MARGIN for step in steps))
        codes = [min(max(nearest(step), 0), most) for step in steps]
        outputs["codes"].append(codes)
        outputs["scale"].append([float(scale)])
        outputs["minimum"].append([float(minimum)])
        outputs["w_hat"].append([float(to_f32(to_f32(scale * code) + minimum)) for code in codes])
    dtypes = {"codes": "u8", "scale": "f16", "minimum": "f16", "w_hat": "f32"}
    expected = {name: Output(_BITS, values(dtypes[name], nested)) for name, nested in outputs.items()}
    params = {"bits": bits, "group_size": -1, "p": 1.0, "beta": float(beta), "growth": float(growth), "rounds": rounds}
    return CaseSpec(
        id, comment, tuple(flags.split()), {"w": values("f32", _floats(w), recipe=recipe)}, expected, params=params
    )


def hqq_suite() -> SuiteSpec:
    """The suite quant/hqq."""
    header = [
        "Input w, f32 [out, in]. Params: bits, group_size -1 (a row), p = 1, beta, growth, rounds. Per row: inverse = "
        "(2^bits - 1) / (max - min), at most 20000, and 1 where the range is at most 1e-4; zero = -min * inverse. "
        "Up to "
        "`rounds` times: W_q = clip(rint(w * inverse + zero), 0, 2^bits - 1); error = w - (W_q - zero) / inverse; e = "
        "sign(error) * max(0, |error| - |error|^(p-1) / beta); zero = mean over the row of W_q - (w - e) * inverse; "
        "beta "
        "*= growth. The loop ends, with this last zero, when the mean of |error| over the whole matrix is not below "
        "that "
        "of the round before.",
        "scale = float16(1 / inverse), minimum = float16(-zero / inverse), codes = clip(rint((w - minimum) / "
        "scale), 0, "
        "2^bits - 1) with the stored numbers, w_hat = scale * codes + minimum, a product and a sum in float32.",
    ]
    notes = {
        "FloatZero": note("BASIC", "The zero point is a real number and is never rounded.",
                          "A rounded one is another method: the splitting then changes next to nothing."),
        "Shrink": note("BASIC", "Large errors are set aside before the zero point is fitted: |error| - 1 / beta is "
        "kept of "
                       "them, not 1 / beta."),
        "LastZero": note("ORDER", "The loop ends with the zero point of the last round, not of the best."),
        "StoredNumbers": note("PRECISION", "Codes are computed with the float16 scale and minimum that are stored."),
        "ConstantRow": note("DEGENERATE", "A row without range: inverse 1, no division by zero."),
        "Growth": note("BASIC", "beta grows after every round."),
        "Random": _RANDOM,
        **_REJECTED,
    }  # fmt: skip
    made = lambda bits, beta, rounds, **more: lambda *given: _hqq(*given, bits, beta, rounds, **more)
    flat = [[Fraction(3, 4)] * 6, [Fraction(x) for x in (0, 1, 3, 2, 5, 7)]]
    cases = [
        _drawn(1, "2 bits, one round", "FloatZero Shrink Random", (3, 8), made(2, 4, 1)),
        _drawn(2, "3 bits, 3 rounds", "FloatZero Shrink Random", (3, 8), made(3, 8, 3)),
        _drawn(3, "4 bits, ends after 2 of 9 rounds", "LastZero", (4, 8), made(4, 100, 9, stops=2)),
        _drawn(4, "2 bits, beta doubles", "Growth Shrink", (3, 8), made(2, 2, 3, growth=2)),
        _hqq(5, "a constant row", "ConstantRow", flat, None, 3, 8, 0),
        _drawn(6, "8 bits", "StoredNumbers", (4, 24), made(8, 8, 2), bits=16, exp2=-12),
        _invalid(20, "Inf", "NonFinite", [[math.inf, 1.0]], "value", bits=4, group_size=-1, p=1.0, beta=1.0, growth=1.0,
                 rounds=1),
        _invalid(21, "p 1.5", "BadParams", [[2.0, 1.0]], "value", bits=4, group_size=-1, p=1.5, beta=1.0, growth=1.0,
                 rounds=1),
    ]  # fmt: skip
    source = "the header above in exact fractions (p = 1 keeps all numbers rational)"
    return _suite(_head("hqq", "Half-quadratic splitting of the zero point", header), notes, source, cases)


# --- aciq ------------------------------------------------------------------------------------------------------------


def _best_clip(bits: int, law: str) -> float:
    """The minimum of the expected error by golden section, without its derivative."""

    def error(a):
        rounding = a * a / (3 * 4**bits)
        if law == "laplace":
            return 2 * math.exp(-a) + rounding
        tail = (1 + a * a) * math.erfc(a / math.sqrt(2))
        return tail - a * math.sqrt(2 / math.pi) * math.exp(-a * a / 2) + rounding

    low, high, golden = 0.5, 12.0, (math.sqrt(5) - 1) / 2
    for _ in range(200):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return (low + high) / 2


def _aciq(id, comment, flags, w, recipe, bits, law, correct) -> CaseSpec:
    """Equal bits for all rows."""
    most, outputs = (1 << bits) - 1, {"codes": [], "scale": [], "minimum": []}
    for row in w:
        n, mean = len(row), Fraction(sum(row), len(row))
        if law == "laplace":
            size = float(sum(abs(x - mean) for x in row) / n)
        else:
            size = math.sqrt(sum((x - mean) ** 2 for x in row) / n)
        alpha = _best_clip(bits, law) * size
        lo, hi = max(float(min(row)), float(mean) - alpha), min(float(max(row)), float(mean) + alpha)
        scale = (hi - lo) / most
        steps = [(float(x) - lo) / scale for x in row]
        # The clip is known to seven digits here, from either method.
        _clear(all(abs(s % 1 - 0.5) > 1e-3 for s in steps))
        codes = [min(max(round(s), 0), most) for s in steps]
        centre = sum(codes) / n
        spread = math.sqrt(sum((c - centre) ** 2 for c in codes) / n)
        if correct == "both":
            scale = math.sqrt(sum(float(x - mean) ** 2 for x in row) / n) / spread
        minimum = lo if correct == "none" else float(mean) - scale * centre
        outputs["codes"].append(codes)
        outputs["scale"].append(scale)
        outputs["minimum"].append(minimum)
    close = {"class": "allclose", "rtol": 1e-6, "atol": 1e-6}
    single = lambda name: values("f32", [float(to_f32(Fraction(x))) for x in outputs[name]])
    expected = {
        "codes": Output({"class": "bits"}, values("u8", outputs["codes"])),
        "scale": Output(close, single("scale")),
        "minimum": Output(close, single("minimum")),
    }
    params = {"bits": bits, "law": law, "correct": correct, "allocate": False}
    return CaseSpec(
        id, comment, tuple(flags.split()), {"w": values("f32", _floats(w), recipe=recipe)}, expected, params=params
    )


def aciq_suite() -> SuiteSpec:
    """The suite quant/aciq."""
    header = [
        "Input w, f32 [out, in]. Params: bits, law, correct, allocate = false. Per row, in float64: mean m; size b "
        "= mean "
        "|w - m| (laplace) or sigma = sqrt(mean (w - m)^2) (normal); alpha = ratio * size, where the ratio a makes "
        "2 e^-a + a^2 / (3 * 4^bits) least (laplace), or (1 + a^2)(1 - erf(a / sqrt 2)) - a sqrt(2 / pi) e^(-a^2 / "
        "2) + "
        "a^2 / (3 * 4^bits) (normal). lo = max(min w, m - alpha), hi = min(max w, m + alpha), scale = (hi - lo) / "
        "(2^bits "
        "- 1), codes = clip(rint((w - lo) / scale), 0, 2^bits - 1).",
        "correct: none, minimum = lo; mean, minimum = m - scale * mean(codes); both, first scale = std(w) / "
        "std(codes). "
        "w_hat = scale * codes + minimum. Outputs: codes u8 [out, in]; scale and minimum f32 [out].",
    ]
    notes = {
        "Clip": note("BASIC", "The ratio belongs to 2^bits bins: the table one line off is that of another width.",
                     "Tensors that are never negative take the line below in the published code."),
        "Law": note("BASIC", "Laplace takes the mean deviation, a normal law the standard deviation."),
        "Mean": note("BASIC", "Every row gets the mean back that clipping and rounding took from it."),
        "Spread": note("ORDER", "both: first the standard deviation, then the mean.", "The other way the mean moves "
        "again."),
        "RowRange": note("OFF_BY_ONE", "The range does not reach beyond the smallest and largest weight of the row."),
        "Random": _RANDOM,
        **_REJECTED,
    }  # fmt: skip
    made = lambda *knobs: lambda *given: _aciq(*given, *knobs)
    cases = [
        _drawn(1, "4 bits, Laplace", "Clip Law Random", (3, 16), made(4, "laplace", "none")),
        _drawn(2, "2 bits, Laplace, mean", "Clip Law Mean", (3, 16), made(2, "laplace", "mean")),
        _drawn(3, "2 bits, normal, both", "Clip Law Spread", (3, 16), made(2, "normal", "both")),
        _drawn(4, "3 bits, normal, mean", "Clip Law Mean Random", (2, 24), made(3, "normal", "mean")),
        _drawn(5, "8 bits: nothing is clipped", "RowRange Mean", (2, 8), made(8, "laplace", "mean")),
        _invalid(20, "NaN", "NonFinite", [[math.nan, 1.0]], "value", bits=4, law="normal", correct="mean",
                 allocate=False),
        _invalid(21, "9 bits", "BadParams", [[2.0, 1.0]], "value", bits=9, law="normal", correct="mean",
                 allocate=False),
    ]  # fmt: skip
    source = "the header above, one number at a time; the ratio by golden section on the error itself"
    return _suite(_head("aciq", "Analytic clipping and bias correction", header), notes, source, cases)
