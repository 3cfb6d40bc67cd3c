"""Mistakes with small floats, microscaling and NVFP4: refllm's formats, asked for the wrong thing."""

from collections.abc import Iterator

import numpy as np

from refllm.evaluate.golden.mistakes.base import Given, Hypothesis
from refllm.formats.dtypes import E8M0, FLOATS, FP4_E2M1, FP8_E4M3FN, FloatFormat
from refllm.formats.microscale import MX_FORMATS, SCALE_RULES, MXFormat

_FORMATS = {form.name: form for form in FLOATS}


def predict(given: Given) -> Iterator[Hypothesis]:
    """Predictions for formats.float.encode, formats.float.decode, formats.mx.encode, formats.nvfp4.encode."""
    name = given.params.get("format")
    if given.op == "formats.float.encode" and name in _FORMATS:
        yield from _encode(given, _FORMATS[name])
    elif given.op == "formats.float.decode" and name in _FORMATS:
        yield from _decode(given, _FORMATS[name])
    elif given.op == "formats.mx.encode" and name in MX_FORMATS:
        yield from _mx(given, MX_FORMATS[name])
    elif given.op == "formats.nvfp4.encode":
        yield from _nvfp4(given)


def _encode(given: Given, form: FloatFormat) -> Iterator[Hypothesis]:
    x, codes = given.inputs["x"], given.expected["codes"]
    like = lambda new: {"codes": new.view(codes.dtype) if new.itemsize == codes.itemsize else new.astype(codes.dtype)}
    coded = lambda numbers, **how: like(form.encode(numbers, nan="zero", **how))
    yield Hypothesis("truncation", "", coded(x, rounding="toward_zero"))
    yield Hypothesis("rounded-away", "", coded(x, rounding="away_from_zero"))
    for words, wide in (("float32", np.float32), ("float16", np.float16)):
        yield Hypothesis("double-rounding", words, coded(x.astype(wide)))
    bf16 = _FORMATS["BF16"]
    yield Hypothesis("double-rounding", "bfloat16", coded(bf16.decode(bf16.encode(x, "ieee"))))
    for factor in (2, 0.5):
        yield Hypothesis("factor-of-two", f"{factor}", coded(x * x.dtype.type(factor)))
    if form is E8M0:
        for step, mistake in ((-1, "e8m0-one-low"), (1, "e8m0-one-high")):
            moved = np.where(codes == 255, codes, np.clip(codes.astype(int) + step, 0, 254))
            yield Hypothesis(mistake, "", like(moved.astype(np.uint8)))
        return
    sign = np.array(form.sign_bit, form.code_dtype)
    right = codes.view(form.code_dtype) if codes.dtype.kind == "f" else codes
    magnitude = right & ~sign
    small = magnitude < 1 << form.mantissa_bits
    yield Hypothesis("subnormals-flushed", "", like(np.where(small, right & sign, right)))
    yield Hypothesis("subnormals-flushed", "no -0", like(np.where(small, 0, right).astype(right.dtype)))
    little = np.abs(x.astype(np.float64)) < 2.0**form.min_exponent
    yield Hypothesis(
        "subnormals-flushed", "before rounding", coded(np.where(little, np.copysign(0, x), x).astype(x.dtype))
    )
    if form.specials == "fn":
        top = (magnitude >> form.mantissa_bits == (1 << form.exponent_bits) - 1) & (magnitude <= form.max_code)
        yield Hypothesis("top-binade-lost", "", like(np.where(top, right & sign | form.max_code, right)))
    if form.specials == "fnuz":
        minus = np.signbit(x) & (right == 0)
        yield Hypothesis("fnuz-negative-zero", "", like(np.where(minus, sign, right)))
        capped = np.where((magnitude == form.max_code) & (right != form.nan_code), right - 1, right)
        yield Hypothesis("fnuz-max-224", "", like(capped))


def _decode(given: Given, form: FloatFormat) -> Iterator[Hypothesis]:
    x = given.expected["x"]
    smallest = 2.0**form.min_exponent
    yield Hypothesis(
        "subnormals-flushed", "", {"x": np.where(np.abs(x) < smallest, np.copysign(0, x), x).astype(x.dtype)}
    )
    codes = given.inputs["codes"]
    codes = (codes.view(np.uint16) if codes.dtype == np.float16 else codes).astype(np.int64)
    fraction, field = codes & (1 << form.mantissa_bits) - 1, (codes & ~form.sign_bit) >> form.mantissa_bits
    sign = np.where(codes & form.sign_bit, -1.0, 1.0)
    if form.has_zero:
        for words, least in (("", 0), ("with the exponent of subnormals", 1)):
            normal = sign * np.ldexp(1 + fraction / (1 << form.mantissa_bits), least - form.bias)
            yield Hypothesis("subnormals-as-normals", words, {"x": np.where(field == 0, normal, x).astype(x.dtype)})
    plain = sign * np.ldexp((field > 0) + fraction / (1 << form.mantissa_bits), np.maximum(field, 1) - form.bias)
    yield Hypothesis("specials-as-numbers", "", {"x": np.where(np.isfinite(x), x, plain).astype(x.dtype)})
    if form.specials == "fnuz":
        yield Hypothesis("fnuz-negative-zero", "", {"x": np.where(codes == form.sign_bit, np.float32(-0.0), x)})
    if form.specials != "ieee" and form is not E8M0:
        magnitude, field = codes & ~form.sign_bit, (1 << form.exponent_bits) - 1
        special = magnitude >> form.mantissa_bits == field
        infinite = magnitude == field << form.mantissa_bits
        ieee = np.where(special, np.where(infinite, np.copysign(np.inf, x), np.nan), x).astype(x.dtype)
        yield Hypothesis("ieee-specials", "", {"x": ieee})
    if form is E8M0:
        yield Hypothesis("e8m0-zero", "", {"x": np.where(codes == 0, np.float32(0), x)})
        for step, mistake in ((-1, "e8m0-one-low"), (1, "e8m0-one-high")):
            yield Hypothesis(mistake, "", {"x": np.ldexp(x, step)})


def _mx(given: Given, form: MXFormat) -> Iterator[Hypothesis]:
    x, expected = given.inputs["x"], given.expected
    if not np.isfinite(x).all() or "scales" not in expected:
        return
    for mistake, how in (
        ("truncation", {"rounding": "toward_zero"}),
        ("ties-away", {"ties": "away"}),
        ("ties-toward-zero", {"ties": "zero"}),
    ):
        codes, scales = form.encode(x, **how)
        yield Hypothesis(mistake, "elements", _mx_outputs(form, codes, scales))
    for rule in SCALE_RULES:
        yield Hypothesis(f"e8m0-{rule}", f"--declare scale_rule={rule}", _mx_outputs(form, *form.encode(x, rule)))
    mantissa, exponent = np.frexp(
        (np.abs(x).reshape(*expected["scales"].shape, 32).max(-1) / form.max).astype(np.float32)
    )
    nearest = np.where(mantissa > 0, exponent - 1 + (mantissa >= 0.75) + 127, 0).clip(0, 254)
    yield Hypothesis("e8m0-nearest-quotient", "", _mx_outputs(form, *_requantised(form, x, nearest, 0)))
    for step, mistake in ((-1, "e8m0-one-low"), (1, "e8m0-one-high")):
        yield Hypothesis(mistake, "", _mx_outputs(form, *_requantised(form, x, expected["scales"], step)))
        yield Hypothesis(
            mistake, "stored only", {"scales": np.clip(expected["scales"].astype(int) + step, 0, 254).astype(np.uint8)}
        )
    if x.ndim == 2 and x.shape[0] % 32 == 0:
        codes, scales = form.encode(np.ascontiguousarray(x.T))
        yield Hypothesis(
            "groups-along-out", "", {"codes": codes.T, "w_hat": form.decode(codes, scales).T, "scales": None}
        )
    rows, blocks = expected["scales"].shape
    if rows > 1 < blocks:
        across = np.ascontiguousarray(expected["scales"].T).reshape(rows, blocks)
        yield Hypothesis("scales-transposed", "", {"scales": across})
        yield Hypothesis("scales-transposed", "and decoded", _mx_outputs(form, form.encode(x)[0], across))


def _mx_outputs(form: MXFormat, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": codes, "scales": scales, "w_hat": form.decode(codes, scales)}


def _requantised(form: MXFormat, x: np.ndarray, scales: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements and scales with the exponent of every scale moved."""
    moved = np.clip(scales.astype(int) + step, 0, 254)
    scaled = np.ldexp(x.reshape(*moved.shape, 32).astype(np.float64), 127 - moved[..., None]).reshape(x.shape)
    if isinstance(form.element, FloatFormat):
        codes = form.element.encode(scaled, "satfinite")
    else:
        high = form.element.high
        codes = form.element.encode(np.clip(scaled / form.unit, -high, high))
    return codes, moved.astype(np.uint8)


def _nvfp4(given: Given) -> Iterator[Hypothesis]:
    x, g = given.inputs["x"], given.expected.get("global_scale")
    if g is None or not np.isfinite(x).all() or x.shape[-1] % 16:
        return
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    wanted = (g * (np.abs(blocks).max(-1) / np.float32(6))).astype(np.float32)
    scales = FP8_E4M3FN.encode(wanted)
    scales = np.where(scales == 0, FP8_E4M3FN.encode(np.float32(0.125)), scales)
    step = (FP8_E4M3FN.decode(scales) / g)[..., None]
    unrounded = np.where(wanted == 0, np.float32(0.125), wanted)[..., None] / g
    codes = FP4_E2M1.encode(np.nan_to_num(blocks / unrounded))
    outputs = {"codes": codes.reshape(x.shape), "w_hat": (FP4_E2M1.decode(codes) * step).reshape(x.shape)}
    yield Hypothesis("unrounded-scale", "", outputs)
    wide = {"codes": outputs["codes"], "w_hat": (FP4_E2M1.decode(codes) * unrounded).reshape(x.shape)}
    yield Hypothesis("unrounded-scale", "decoding too", wide)
    codes = FP4_E2M1.encode(np.nan_to_num(blocks / step))
    decoded = FP4_E2M1.decode(codes)
    s = FP8_E4M3FN.decode(scales)[..., None]
    yield Hypothesis("reciprocal-global-scale", "decoding", {"w_hat": (decoded * (s * g)).reshape(x.shape)})
    yield Hypothesis("reciprocal-global-scale", "stored", {"global_scale": np.asarray(np.float32(1) / g)})
    yield Hypothesis("global-scale-ignored", "decoding", {"w_hat": (decoded * s).reshape(x.shape)})
    plain = FP8_E4M3FN.encode(np.abs(blocks).max(-1) / np.float32(6))
    codes = FP4_E2M1.encode(np.nan_to_num(blocks / FP8_E4M3FN.decode(plain)[..., None]))
    one = {"codes": codes.reshape(x.shape), "scales": plain, "global_scale": np.asarray(np.float32(1)),
           "w_hat": (FP4_E2M1.decode(codes) * FP8_E4M3FN.decode(plain)[..., None]).reshape(x.shape)}  # fmt: skip
    yield Hypothesis("global-scale-ignored", "", one)
    yield Hypothesis("global-scale-ignored", "stored as it is", one | {"global_scale": None})
