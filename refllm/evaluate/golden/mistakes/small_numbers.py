"""Mistakes with integers, lists of values and stochastic rounding: refllm's formats with one thing done otherwise."""

from collections.abc import Iterator

import numpy as np

from refllm.evaluate.golden.compare import Expected
from refllm.evaluate.golden.mistakes.base import Given, Hypothesis
from refllm.evaluate.golden.mistakes.grids import ROUNDINGS
from refllm.formats.dtypes import BF16, BINARY, FORMATS, FP4_BNB, FP4_E2M1, INTEGERS, TERNARY
from refllm.formats.dtypes.codebooks import CodebookFormat
from refllm.formats.dtypes.floats import FloatFormat
from refllm.formats.dtypes.integers import IntegerFormat

_ALPHA = 1e-6  # how rarely a prediction of random codes misses what it predicts


def predict(given: Given) -> Iterator[Hypothesis]:
    """Predictions for formats.number.encode, formats.number.decode and formats.number.stochastic."""
    form = FORMATS.get(given.params.get("format"))
    if form is not None and given.op in _OPS:
        yield from _OPS[given.op](given, form)


# --- numbers to codes ------------------------------------------------------------------------------------------------


def _encode(given: Given, form: IntegerFormat | CodebookFormat) -> Iterator[Hypothesis]:
    x, codes = given.inputs["x"], given.expected["codes"]
    for words, narrow in (("float32", np.float32), ("float16", np.float16)):
        yield Hypothesis("double-rounding", words, {"codes": _coded(form, x.astype(narrow))})
    yield Hypothesis("double-rounding", "bfloat16", {"codes": _coded(form, BF16.decode(BF16.encode(x)))})
    little = np.abs(x.astype(np.float64)) < 2.0**-126
    yield Hypothesis("subnormals-flushed", "", {"codes": _coded(form, np.where(little, 0, x))})
    infinite, lowest = np.isinf(x), form.values.min().astype(np.float64)
    yield Hypothesis("nonfinite-cast", "to zero", {"codes": _coded(form, np.where(infinite, 0, x))})
    yield Hypothesis("nonfinite-cast", "to the lowest", {"codes": _coded(form, np.where(infinite, lowest, x))})
    if form is not BINARY:
        minus = (x == 0) & np.signbit(x)
        yield Hypothesis("negative-zero-made", "", {"codes": np.where(minus, codes | len(form.values) // 2, codes)})
    if form in INTEGERS:
        for words, number in (("NaN to the lowest", lowest), ("NaN to the largest", form.high)):
            yield Hypothesis("nonfinite-cast", words, {"codes": _coded(form, np.where(np.isnan(x), number, x))})
        yield from _encode_integer(x, codes, form)
    else:
        yield from _encode_listed(x, form)


def _coded(form, x: np.ndarray) -> np.ndarray:
    """Codes of numbers; NaN is 0 in an integer format."""
    return form.encode(np.nan_to_num(x, nan=0.0, posinf=np.inf, neginf=-np.inf) if form in INTEGERS else x)


def _encode_integer(x: np.ndarray, codes: np.ndarray, form: IntegerFormat) -> Iterator[Hypothesis]:
    mask = (1 << form.bits) - 1

    def stored(number: np.ndarray, low: int = form.low, high: int = form.high) -> dict[str, np.ndarray]:
        whole = np.nan_to_num(np.clip(number, low, high)).astype(int)
        return {"codes": (whole + form.offset & mask).astype(np.uint8)}

    half_floor = {"half-floor": lambda x: np.floor(x + x.dtype.type(0.5))}
    toward_zero = {"ties-toward-zero": lambda x: np.copysign(np.ceil(np.abs(x) - 0.5), x)}
    away = {"rounded-away": lambda x: np.copysign(np.ceil(np.abs(x)), x)}
    for mistake, rounding in (ROUNDINGS | half_floor | toward_zero | away).items():
        yield Hypothesis(mistake, "integers", stored(rounding(x)))
    whole = np.rint(x).astype(np.float64)
    for words, kind in (("cast to int32", np.int32), ("cast to int64", np.int64)):
        fits = np.abs(whole) < -float(np.iinfo(kind).min)
        number = np.where(fits, whole, np.iinfo(kind).min).astype(np.int64)  # what x86 makes of all others
        yield Hypothesis("no-clip", words, {"codes": (number + form.offset & mask).astype(np.uint8)})
    yield Hypothesis("narrow-range", "", stored(np.rint(x), low=-form.high))
    yield Hypothesis("unsigned-for-signed", "", stored(np.rint(x), 0, mask))
    number = form.decode(codes).astype(int)
    if form is TERNARY:
        yield Hypothesis("twos-complement", "modulo 4", {"codes": (number & mask).astype(np.uint8)})
        yield Hypothesis("twos-complement", "modulo 3", {"codes": (number % 3).astype(np.uint8)})
        return
    sign = 1 << form.bits - 1
    yield Hypothesis("twos-complement", "", {"codes": codes ^ np.uint8(sign)})
    magnitude = np.minimum(np.abs(number), form.high)
    yield Hypothesis("sign-magnitude", "", {"codes": np.where(number < 0, sign | magnitude, number).astype(np.uint8)})


def _encode_listed(x: np.ndarray, form: CodebookFormat) -> Iterator[Hypothesis]:
    other = {"lower": "upper", "upper": "lower"}[form.ties]
    yield Hypothesis("midpoint-side", "", {"codes": form.encode(x, ties=other)})
    ordered = np.unique(form.values).astype(np.float64)
    exact = np.searchsorted((ordered[1:] + ordered[:-1]) / 2, x, "left" if form.ties == "lower" else "right")
    yield Hypothesis("wide-arithmetic", "", {"codes": form.encode(ordered[exact])})
    places = {
        "rounds-down": np.searchsorted(ordered, x, "right") - 1,
        "rounds-up": np.searchsorted(ordered, x, "left"),
        "uniform-for-list": np.rint((x - ordered[0]) / (ordered[-1] - ordered[0]) * (len(ordered) - 1)),
    }
    places["truncation"] = np.where(x < 0, places["rounds-up"], places["rounds-down"])
    for mistake, place in places.items():
        place = np.clip(np.nan_to_num(place), 0, len(ordered) - 1).astype(int)
        yield Hypothesis(mistake, "lists", {"codes": form.encode(ordered[place])})
    rank = np.searchsorted(ordered, form.decode(form.encode(x)))
    yield Hypothesis("sorted-codes", "", {"codes": rank.astype(np.uint8)})
    if form is BINARY:
        yield Hypothesis("binary-inverted", "", {"codes": 1 - form.encode(x)})


# --- codes to numbers ------------------------------------------------------------------------------------------------


def _decode(given: Given, form: IntegerFormat | CodebookFormat) -> Iterator[Hypothesis]:
    codes, x = given.inputs["codes"], given.expected["x"]
    read = lambda table: {"x": np.asarray(table, np.float32)[codes]}
    every = np.arange(len(form.values))
    if form in INTEGERS or form is BINARY:
        mistake = "offset-missing" if form in (TERNARY, BINARY) else "unsigned-for-signed"
        yield Hypothesis(mistake, "", read(every))
    yield Hypothesis("negative-zero-made", "", {"x": np.where(x == 0, np.float32(-0.0), x)})
    yield Hypothesis("narrow-table", "float16", {"x": x.astype(np.float16).astype(np.float32)})
    yield Hypothesis("narrow-table", "bfloat16", {"x": BF16.decode(BF16.encode(x))})
    if form is TERNARY:
        yield Hypothesis("twos-complement", "modulo 4", read([0, 1, -2]))
        yield Hypothesis("twos-complement", "modulo 3", read([0, 1, -1]))
    elif form in INTEGERS:
        middle = len(every) // 2
        yield Hypothesis("twos-complement", "", read(every - middle))
        yield Hypothesis("sign-magnitude", "", read(np.where(every < middle, every, middle - every)))
    elif form is BINARY:
        yield Hypothesis("binary-inverted", "", read(-form.values))
    elif form is FP4_BNB:
        yield Hypothesis("sorted-codes", "", read(np.sort(form.values)))
        yield Hypothesis("fp4-tables-confused", "E2M1 / 6", read(FP4_E2M1.decode(every.astype(np.uint8)) / 6))
        next_half = np.float32(1 / 12)
        yield Hypothesis(
            "fp4-smallest", "", read(np.where(every % 8 == 1, np.sign(form.values) * next_half, form.values))
        )


# --- stochastic rounding ---------------------------------------------------------------------------------------------


def _stochastic(given: Given, form: IntegerFormat | FloatFormat) -> Iterator[Hypothesis]:
    """Another probability of going up, another step, or another end: what the codes and their means would be then."""
    x = given.inputs["x"]
    minus, size = np.signbit(x), np.abs(x.astype(np.float64))
    low, chance = _below(form, size)
    said = lambda *outcomes, **how: _outcomes(given, form, minus, outcomes, **how)
    either = lambda chance: said((low, 1 - chance), (low + 1, chance))
    between = (chance > 0) & (chance < 1)
    for words, up in (("even", low % 2 == 1), ("toward zero", False), ("away from zero", True)):
        nearest = np.where(chance == 0.5, up, chance > 0.5)
        yield Hypothesis("not-stochastic", f"ties {words}", either(nearest.astype(float)))
    yield Hypothesis("truncation", "", either(np.zeros_like(chance)))
    yield Hypothesis("rounded-away", "", either((chance > 0).astype(float)))
    yield Hypothesis("chance-reversed", "", either(np.where(between, 1 - chance, chance)))
    yield Hypothesis("chance-reversed", "numbers of the format too", either(1 - chance))
    yield Hypothesis("chance-of-half", "", either(np.where(between, 0.5, chance)))
    yield Hypothesis("chance-of-sign", "", either(np.where(minus & between, 1 - chance, chance)))
    for bits in range(1, 6):
        levels = 1 << bits
        yield Hypothesis("few-random-bits", f"{bits}, u < f", either(np.floor(chance * levels) / levels))
        at_most = np.minimum(np.floor(chance * levels) + 1, levels) / levels
        yield Hypothesis("few-random-bits", f"{bits}, u <= f", either(at_most))
    wide = ((low - 1, 0.5 - chance), (low, 1.5 - chance), (low + 1, chance + 0.5), (low + 2, chance - 0.5))
    yield Hypothesis("noise-too-wide", "", said(*((step, np.clip(twice, 0, 1) / 2) for step, twice in wide)))
    if isinstance(form, FloatFormat):
        edge = (low + 1 & (1 << form.mantissa_bits) - 1) == 0
        wider = np.where(edge & (low >> form.mantissa_bits > 0), chance / 2, chance)
        yield Hypothesis("step-of-next-binade", "", either(wider))
        first = 1 << form.mantissa_bits
        flushed = lambda step: np.where(step < first, 0, step)
        yield Hypothesis("subnormals-flushed", "", said((flushed(low), 1 - chance), (flushed(low + 1), chance)))
        normal = np.where(low < first, 0, chance)
        yield Hypothesis("subnormals-flushed", "before rounding", said((flushed(low), 1 - normal), (low + 1, normal)))
        yield Hypothesis("does-not-saturate", "", said((low, 1 - chance), (low + 1, chance), saturate=False))
    else:
        yield Hypothesis("no-clip", "", said((low, 1 - chance), (low + 1, chance), saturate=False))


def _below(form: IntegerFormat | FloatFormat, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of magnitudes: the step of the format at or below each, and the fraction of a step that is beyond it.

    A step is a magnitude's code in a float format, the number itself in an integer format.
    """
    if form in INTEGERS:
        low = np.floor(size)
        return low.astype(int), size - low
    low = form.encode(size, rounding="toward_zero").astype(int)
    at = np.minimum(low, form.max_code - 1)  # beyond the largest number steps go on as before it
    value = lambda step: form.decode(step.astype(form.code_dtype)).astype(np.float64)
    return low, np.minimum((size - value(low)) / (value(at + 1) - value(at)), 1)


def _outcomes(given: Given, form, minus: np.ndarray, outcomes, saturate: bool = True) -> dict:
    """Outputs where step s of outcomes (s, p) comes with probability p."""
    n, rows = given.params["n"], np.arange(len(minus))
    chances, mean = np.zeros((len(minus), 1 << form.bits)), np.zeros(len(minus))
    for step, chance in outcomes:
        code = _code(form, step, minus, saturate)
        np.add.at(chances, (rows, code), chance)
        mean += np.where(chance > 0, form.decode(code.astype(form.code_dtype)) * chance, 0)
    drawn = {"class": "statistical", "test": "chi2", "n": n, "alpha": _ALPHA}
    codes = Expected(chances.astype(np.float32), "f32", drawn) if form.bits <= 8 else None
    if (chances.max(-1) == 1).all():
        codes = np.repeat(chances.argmax(-1)[:, None], n, axis=1).astype(form.code_dtype)
    return {"codes": codes, "x_hat": mean.astype(np.float32)}


def _code(form, step: np.ndarray, minus: np.ndarray, saturate: bool) -> np.ndarray:
    """Codes of steps with a sign; a step below zero is on the other side."""
    minus, step = minus ^ (step < 0), np.abs(step)
    if form in INTEGERS:
        number = np.where(minus, -step, step)
        span = form.high - form.low + 1
        number = np.clip(number, form.low, form.high) if saturate else (number - form.low) % span + form.low
        return number + form.offset & (1 << form.bits) - 1
    step = np.minimum(step, form.max_code) if saturate else step & ~form.sign_bit & (1 << form.bits) - 1
    keeps_sign = minus & ((step > 0) | (form.specials != "fnuz"))
    return step | np.where(keeps_sign, form.sign_bit, 0)


_OPS = {
    "formats.number.encode": _encode,
    "formats.number.decode": _decode,
    "formats.number.stochastic": _stochastic,
}
