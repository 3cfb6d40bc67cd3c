"""Mistakes that are a choice: a param, a convention or a format taken for another one."""

from collections.abc import Iterator

import numpy as np

from refllm.evaluate.golden.mistakes.base import Given, Hypothesis

# Param -> {value: the mistake of using it where another one is asked for}.
_VALUES: dict[str, dict[object, str]] = {
    "ties": {
        "away": "ties-away",
        "even": "ties-even",
        "zero": "ties-toward-zero",
        "lower": "midpoint-side",
        "upper": "midpoint-side",
    },
    "rounding": {"toward_zero": "truncation"},
    "middle": {"exact": "wide-arithmetic"},
    "overflow": {"wrap": "no-clip", "saturate": "saturates", "satfinite": "saturates", "ieee": "does-not-saturate"},
    "scale_rule": {"floor": "e8m0-floor", "ceil": "e8m0-ceil", "rceil": "e8m0-rceil", "even": "e8m0-even"},
    "checkpoint_format": {"gptq": "gptq-v1-for-v2", "gptq_v2": "gptq-v2-for-v1"},
    "convention": dict.fromkeys(("compressed-tensors", "modelopt", "torchao"), "reciprocal-global-scale"),
    "order": dict.fromkeys(("x86", "arm"), "i2s-order"),
    "layout": dict.fromkeys(("half_split", "interleaved"), "rope-layout"),
    "words": {"padded": "three-bit-words"},
    "full_zero": {"plus_one": "zero-wraps"},
    "symmetric": dict.fromkeys((True, False), "symmetry-confused"),
}
# Formats that are taken for each other.
_FORMATS = (
    ({"FP8_E4M3FN", "FP8_E4M3FNUZ"}, "fn-fnuz-confused"),
    ({"FP8_E5M2", "FP8_E5M2FNUZ"}, "fn-fnuz-confused"),
    ({"FP8_E4M3FN", "FP8_E5M2"}, "e4m3-e5m2-confused"),
    ({"FP6_E2M3", "FP6_E3M2"}, "e2m3-e3m2-confused"),
    ({"FP16", "BF16"}, "fp16-bf16-confused"),
    ({"NF4", "FP4_BNB", "FP4_E2M1"}, "fp4-tables-confused"),
)


def predict(given: Given) -> Iterator[Hypothesis]:
    """Other values of the params that name a convention, and the variants of the suite."""
    for param, values in _VALUES.items():
        for value, mistake in values.items():
            if param in given.params and given.params[param] != value:
                yield Hypothesis(mistake, f"param {param}", given.right({param: value}))
    for param, value in given.params.items():
        for formats, mistake in _FORMATS:
            for other in formats - {value} if isinstance(value, str) and value in formats else ():
                yield Hypothesis(mistake, f"{param} {other}", given.right({param: other}))
    for words, outputs in given.variants:
        param, _, value = words.partition("=")
        mistake = _VALUES.get(param, {}).get(value, "other-convention")
        yield Hypothesis(mistake, f"--declare {words}", outputs)


def shifted_weights(given: Given) -> Iterator[Hypothesis]:
    """Decoded weights whose codes are off by one number everywhere: a zero point or an offset that is wrong."""
    bits = given.params.get("bits")
    middle = 1 << (bits - 1) if isinstance(bits, int) and 2 <= bits <= 8 else 8
    for name, weights in given.expected.items():
        scale = _scale_for(given, weights) if weights.ndim == 2 and weights.dtype == np.float32 else None
        for step, mistake in _STEPS(middle) if scale is not None else ():
            steps = np.where(scale == 0, 0, np.rint(weights / scale))
            yield Hypothesis(mistake, f"output {name}", {name: ((steps + step) * scale).astype(np.float32)})


def _STEPS(middle: int):
    return (
        (-1, "zero-point-plus-one"),
        (1, "zero-point-minus-one"),
        (middle, "offset-missing"),
        (-middle, "offset-twice"),
    )


def _scale_for(given: Given, weights: np.ndarray) -> np.ndarray | None:
    """Scales of the case, one an element of a matrix of weights, if their shape says how."""
    arrays = given.inputs | given.expected
    for name in (name for name in arrays if "scale" in name.lower() and arrays[name].dtype.kind == "f"):
        for scale in (arrays[name], arrays[name].T):
            if (
                scale.ndim == 2
                and scale.size
                and all(w % s == 0 for w, s in zip(weights.shape, scale.shape, strict=True))
            ):
                wide = scale.astype(np.float32)
                for axis in (0, 1):
                    wide = np.repeat(wide, weights.shape[axis] // scale.shape[axis], axis=axis)
                return wide
    return None
