"""Mistakes of quantisers on integer grids (op quant.rtn): a plain quantiser with one thing at a time done otherwise."""

from collections.abc import Callable, Iterator

import numpy as np

from refllm.evaluate.golden.mistakes.base import Given, Hypothesis


def ties_away(x: np.ndarray) -> np.ndarray:
    """To the nearest integer, halves away from zero."""
    whole = np.trunc(x)
    return whole + np.copysign(np.abs(x - whole) >= 0.5, x)


def ties_up(x: np.ndarray) -> np.ndarray:
    """To the nearest integer, halves upwards."""
    whole = np.floor(x)
    return whole + (x - whole >= 0.5)


def half_added(x: np.ndarray) -> np.ndarray:
    """One half added to the magnitude, in the precision of x, and the fraction cut off: wrong just below one half."""
    return np.trunc(x + np.copysign(x.dtype.type(0.5), x))


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ties-away": ties_away,
    "ties-up": ties_up,
    "half-added": half_added,
    "truncation": np.trunc,
    "rounds-down": np.floor,
}
# What is done otherwise, by mistake.
_QUIRKS: dict[str, dict] = {
    **{mistake: {"rint": rounding} for mistake, rounding in ROUNDINGS.items()},
    "half-floor": {"rint": lambda x: np.floor(x + x.dtype.type(0.5))},
    "reciprocal-product": {"reciprocal": True},
    "unrounded-scale": {"exact_scale": True},
    "wide-arithmetic": {"wide": True},
    "divisor-half-range": {"levels": lambda bits, symmetric: (2**bits - 1) / 2 if symmetric else 2**bits - 1},
    "divisor-power-of-two": {"levels": lambda bits, symmetric: 2 ** (bits - symmetric)},
    "no-clip": {"clip": False},
    "lowest-code-used": {"lowest": 0},
    "maximum-not-absmax": {"amax": lambda g: np.maximum(g.max(1), 0)},
    "sign-in-scale": {"amax": lambda g: np.take_along_axis(g, np.abs(g).argmax(1)[:, None], 1)[:, 0]},
    "groups-along-out": {"along_out": True},
    "zero-outside-range": {"zero_in_range": False},
    "rounded-after-offset": {"after_offset": True},
    "three-bit-words": {"cell": 4},
    "rows-run-on": {"run_on": True},
}


def predict(given: Given) -> Iterator[Hypothesis]:
    """Predictions for quant.rtn and quant.rtn.matmul."""
    if given.op == "quant.rtn.matmul":
        yield from _products(given)
    if given.op != "quant.rtn":
        return
    w = given.inputs["w"]
    if w.ndim != 2 or not w.size:
        return
    for mistake, quirk in _QUIRKS.items():
        outputs = quantized(w, **given.params, **quirk)
        if mistake == "groups-along-out":  # what becomes of the shape of the scales is anybody's guess
            outputs |= dict.fromkeys(("scale", "zero_point", "packed_zero_point"))
        yield Hypothesis(mistake, "", outputs)
    for step, mistake in ((-1, "zero-point-minus-one"), (1, "zero-point-plus-one")):
        if not given.params["symmetric"]:
            yield Hypothesis(mistake, "", _stored_zero(given, step))
    bits, codes = given.params["bits"], given.expected["codes"]
    zero = given.expected.get("zero_point", np.full_like(given.expected["scale"], 1 << bits - 1))
    steps = codes - _per_element(zero, w.shape).astype(np.uint8)  # wraps
    wide = steps.astype(np.float32) * _per_element(given.expected["scale"], w.shape)
    yield Hypothesis("unsigned-difference", "", {"w_hat": wide})
    if given.params["symmetric"]:
        yield Hypothesis("twos-complement", "", {"packed": packed(codes ^ np.uint8(1 << bits - 1), bits)})


def _products(given: Given) -> Iterator[Hypothesis]:
    """Codes read wrongly, as packed input that reads like them; wrong scales; a narrow accumulator."""
    x, data, scale, p = given.inputs["x"], given.inputs["packed"], given.inputs["scale"], given.params
    bits, columns = p["bits"], p["columns"]
    if x.ndim != 2 or data.ndim != 2 or not x.size:
        return
    codes = unpacked(data, bits, columns)
    for mistake, read in (
        (
            "three-bit-words",
            unpacked(np.pad(data, ((0, 0), (0, columns))), 4 if bits == 3 else bits, columns)
            & np.uint8((1 << bits) - 1),
        ),
        ("rows-run-on", unpacked(data.reshape(1, -1), bits, codes.size).reshape(codes.shape)),
        ("twos-complement", codes ^ np.uint8(1 << bits - 1) if p["symmetric"] else codes),
    ):
        yield Hypothesis(mistake, "", given.right(packed=packed(read, bits)))
    yield Hypothesis("first-group-scale", "", given.right(scale=np.repeat(scale[:, :1], scale.shape[1], axis=1)))
    yield Hypothesis("float16-scale", "", given.right(scale=scale.astype(np.float16)))
    zeros = np.full(scale.shape, 1 << bits - 1, np.uint8)
    if not p["symmetric"]:
        zeros = unpacked(given.inputs["packed_zero_point"], bits, scale.shape[1])
    shape = (len(data), columns)
    wrapped = (codes - _per_element(zeros, shape).astype(np.uint8)).astype(np.float64)
    yield Hypothesis("unsigned-difference", "", _y(x.astype(np.float64) @ (wrapped * _per_element(scale, shape)).T))
    steps = codes.astype(np.float64) - _per_element(zeros, shape)
    if columns % 2 == 0 and scale.shape[1] == 1 and (x == np.rint(x)).all() and np.abs(x).max() <= 127:
        pairs = lambda left: (x[:, None, :].astype(np.float64) * left).reshape(len(x), len(data), -1, 2).sum(-1)
        y = pairs(steps).clip(-32768, 32767).sum(-1) * scale[:, 0].astype(np.float64)
        yield Hypothesis("int16-saturation", "", _y(y))
        offset = x.sum(-1, dtype=np.float64)[:, None] * zeros[:, 0]
        y = (pairs(codes.astype(np.float64)).clip(-32768, 32767).sum(-1) - offset) * scale[:, 0].astype(np.float64)
        yield Hypothesis("int16-saturation", "unsigned codes", _y(y))
    yield Hypothesis("all-zero-product", "", {"y": np.zeros((len(x), len(data)), np.float32)})


def _y(y: np.ndarray) -> dict[str, np.ndarray]:
    return {"y": y.astype(np.float32)}


def unpacked(data: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Rows of little-endian streams of bits -> codes."""
    stream = np.unpackbits(data, axis=1, bitorder="little")[:, : columns * bits]
    return (stream.reshape(len(data), columns, bits) << np.arange(bits)).sum(2).astype(np.uint8)


def _stored_zero(given: Given, step: int) -> dict[str, np.ndarray]:
    bits = given.params["bits"]
    zero = ((given.expected["zero_point"].astype(np.int64) + step) % (1 << bits)).astype(np.uint8)
    return {"zero_point": zero, "packed_zero_point": packed(zero, bits)}


def _per_element(scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    wide = scale.astype(np.float32)
    return np.repeat(np.repeat(wide, shape[0] // wide.shape[0], 0), shape[1] // wide.shape[1], 1)


def quantized(
    w: np.ndarray,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    rint=np.rint,
    reciprocal: bool = False,
    exact_scale: bool = False,
    wide: bool = False,
    levels=lambda bits, symmetric: 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1,
    amax=lambda g: np.abs(g).max(1),
    clip: bool = True,
    lowest: int | None = None,
    along_out: bool = False,
    zero_in_range: bool = True,
    after_offset: bool = False,
    cell: int | None = None,
    run_on: bool = False,
) -> dict[str, np.ndarray]:
    """The outputs of quant.rtn as its header defines them, but for what the last arguments say."""
    rows, columns = w.shape
    g = group_size if group_size > 0 else w.size if group_size == 0 else columns
    along_out = along_out and group_size > 0 and rows % g == 0
    groups = (w.T if along_out else w).reshape(-1, g)
    real = np.float64 if wide else np.float32
    groups = groups.astype(real)
    if symmetric:
        size = amax(groups)
        scale = np.where(size == 0, real(1), size) / real(levels(bits, True))
    else:
        low, high = (np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0))
        if not zero_in_range:
            low, high = groups.min(1), groups.max(1)
        empty = high == low
        low, high = np.where(empty, real(-1), low), np.where(empty, real(1), high)
        scale = (high - low) / real(levels(bits, False))
    stored = scale.astype(scale_dtype)
    stored = np.where(stored == 0, np.finfo(scale_dtype).smallest_subnormal, stored).astype(scale_dtype)
    used = (scale if exact_scale else stored).astype(real)[:, None]
    divide = (lambda x: x * (real(1) / used)) if reciprocal else (lambda x: x / used)
    top, first = 2**bits - 1, (1 if symmetric else 0) if lowest is None else lowest
    zero = np.full((len(groups), 1), 1 << (bits - 1)) if symmetric else np.clip(rint(divide(-low[:, None])), 0, top)
    codes = rint(divide(groups) + zero.astype(real)) if after_offset else rint(divide(groups)) + zero
    codes = np.clip(codes, first, top) if clip else codes % (top + 1)
    w_hat = ((codes - zero) * stored.astype(np.float32)[:, None]).astype(np.float32)
    back = lambda x: np.ascontiguousarray(x.reshape(columns, rows).T if along_out else x.reshape(rows, columns))
    shape = (1, 1) if group_size == 0 else (rows, -1)
    codes = back(np.nan_to_num(codes)).astype(np.uint8)
    scale_shape = stored.reshape(columns, -1).T if along_out else stored.reshape(shape)
    outputs = {"codes": codes, "packed": packed(codes, bits, cell, run_on), "scale": scale_shape, "w_hat": back(w_hat)}
    if symmetric:
        return outputs
    zero = np.nan_to_num(zero).astype(np.uint8)
    zero = np.ascontiguousarray(zero.reshape(columns, -1).T) if along_out else zero.reshape(shape)
    return outputs | {"zero_point": zero, "packed_zero_point": packed(zero, bits)}


def packed(codes: np.ndarray, bits: int, cell: int | None = None, run_on: bool = False) -> np.ndarray:
    """Rows of codes as little-endian streams of bits; `cell` bits a code if given; all rows one stream if `run_on`."""
    cell = bits if cell is None or cell < bits or bits != 3 else cell
    rows = codes.reshape(1, -1) if run_on else codes
    stream = (rows[:, :, None] >> np.arange(cell) & 1).astype(np.uint8).reshape(len(rows), -1)
    data = np.packbits(stream, axis=1, bitorder="little")
    if run_on:
        wanted = len(codes) * -(-codes.shape[1] * bits // 8)
        data = np.pad(data[0], (0, wanted - data.size)).reshape(len(codes), -1)
    return data
