"""Mistakes with GGUF blocks (ops formats.gguf.decode and formats.gguf.encode): fields of the right block, changed."""

from collections.abc import Iterator

import numpy as np

from refllm.evaluate.golden.mistakes.base import Given, Hypothesis
from refllm.evaluate.golden.mistakes.grids import ROUNDINGS, ties_away
from refllm.formats.blocks import BLOCKS, BlockFormat
from refllm.formats.layouts import Digits

# What a code of 0 stands for, in steps: the offset of each type.
_OFFSETS = {"Q4_0": 8, "Q5_0": 16, "Q3_K": 4, "Q6_K": 32, "Q8_0": 128, "TQ2_0": 1, "Q2_0": 1}
_SIMPLE = ("Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1")


def predict(given: Given) -> Iterator[Hypothesis]:
    """Predictions for formats.gguf.decode and formats.gguf.encode."""
    if not given.op.startswith("formats.gguf.") or given.params.get("type") not in BLOCKS:
        return
    form = BLOCKS[given.params["type"]]
    if given.op == "formats.gguf.decode":
        yield from _decode(given, form)
    else:
        yield from _encode(given, form)


def _decode(given: Given, form: BlockFormat) -> Iterator[Hypothesis]:
    blocks, x = given.inputs["blocks"], given.expected["x"]
    if blocks.shape[-1] % form.bytes_per_block:
        return
    fields = form.layout.unpack(blocks.reshape(*blocks.shape[:-1], -1, form.bytes_per_block))
    read = lambda **new: given.right(blocks=form.layout.pack(**fields | new).reshape(blocks.shape))
    for mistake, order in _orders(form):
        yield Hypothesis(mistake, "", read(q=fields["q"][..., order]))
    q = fields.get("q")
    offset = _OFFSETS.get(form.name)
    if offset is not None and q.dtype == np.uint8 and offset > 1:
        yield Hypothesis("twos-complement", "", read(q=q ^ np.uint8(offset)))
    if form.name == "Q8_0":
        yield Hypothesis("twos-complement", "", read(q=q ^ np.int8(-128)))
        unsigned = q.view(np.uint8).astype(np.float32) * fields["d"].astype(np.float32)
        yield Hypothesis("unsigned-for-signed", "", {"x": unsigned.reshape(x.shape)})
    if offset is not None and "sc" not in fields:
        d = fields["d"].astype(np.float32)
        yield Hypothesis("offset-missing", "", {"x": (d * q.astype(np.float32)).reshape(x.shape)})
    if form.name in ("Q5_0", "Q5_1", "Q5_K"):
        yield Hypothesis("fifth-bit-ignored", "", read(q=q & np.uint8(15)))
    for factor in (0.5, 2):
        yield Hypothesis("factor-of-two", f"{factor}", {"x": x * np.float32(factor)})
    if "e" in fields:
        for step, mistake in ((-1, "e8m0-one-low"), (1, "e8m0-one-high")):
            yield Hypothesis(mistake, "", read(e=(fields["e"].astype(int) + step).clip(0, 255).astype(np.uint8)))
    if "dmin" in fields:
        yield Hypothesis("minimum-added", "", read(dmin=-fields["dmin"]))
    yield Hypothesis("negative-zero-lost", "", {"x": x + np.float32(0)})


def _orders(form: BlockFormat) -> Iterator[tuple[str, np.ndarray]]:
    """(mistake, order): number i is taken from where the code order[i] lies."""
    field = next((field for field in form.layout.fields if field.name == "q"), None)
    if field is None or isinstance(field.parts, Digits) or field.parts[0].width not in (2, 4):
        return
    width = field.parts[0].width
    first = form.layout.positions("q")[:, 0]
    slots = {int(place): i for i, place in enumerate(first)}
    last = 8 - width
    swapped = [slots.get(int(8 * (place // 8) + last - place % 8), i) for i, place in enumerate(first)]
    yield ("nibbles-swapped" if width == 4 else "high-bits-first"), np.array(swapped)
    yield ("halves-as-pairs" if width == 4 else "linear-for-strided"), np.argsort(first)


def _encode(given: Given, form: BlockFormat) -> Iterator[Hypothesis]:
    blocks = given.expected["blocks"]
    fields = form.layout.unpack(blocks.reshape(*blocks.shape[:-1], -1, form.bytes_per_block))
    write = lambda **new: {"blocks": form.layout.pack(**fields | new).reshape(blocks.shape)}
    q = fields.get("q")
    for mistake, order in _orders(form):
        moved = np.empty_like(q)
        moved[..., order] = q
        yield Hypothesis(mistake, "", write(q=moved))
    offset = _OFFSETS.get(form.name)
    if offset is not None and q.dtype == np.uint8 and offset > 1:
        yield Hypothesis("twos-complement", "", write(q=q ^ np.uint8(offset)))
    if form.name in _SIMPLE and "importance" not in given.inputs:
        for mistake, where, d, m, codes in _requantised(form.name, given.inputs["x"]):
            where = f"{form.name}{where}"
            new = {"d": d, "q": codes.astype(q.dtype)} | ({} if m is None else {"m": m})
            yield Hypothesis(
                mistake, where, write(**{key: value.reshape(fields[key].shape) for key, value in new.items()})
            )
    if form.name in ("TQ2_0", "Q2_0"):
        for mistake, rounding in ROUNDINGS.items() | {("ties-even", np.rint)}:
            yield Hypothesis(
                mistake, form.name, write(q=_trits(given.inputs["x"], form.block_size, rounding).astype(q.dtype))
            )
    if form.name == "MXFP4":
        for step, mistake in ((-1, "e8m0-one-low"), (1, "e8m0-one-high")):
            moved = (fields["e"].astype(int) + step).clip(0, 255).astype(np.uint8)
            yield Hypothesis(mistake, "stored only", write(e=moved))


def _trits(x: np.ndarray, size: int, rounding) -> np.ndarray:
    """Codes 0..2 of blocks, shaped as the field."""
    blocks = x.reshape(*x.shape[:-1], -1, size).astype(np.float32)
    d = np.abs(blocks).max(-1, keepdims=True)
    return np.clip(rounding(blocks * np.where(d == 0, 0, np.float32(1) / d).astype(np.float32)) + 1, 0, 3)


def _requantised(name: str, x: np.ndarray) -> Iterator[tuple[str, str, np.ndarray, np.ndarray | None, np.ndarray]]:
    """(mistake, where, d, m, codes) of blocks of 32, each with one thing done otherwise."""
    blocks = x.reshape(-1, 32).astype(np.float32)
    top = np.float32(2 ** (int(name[1]) - 1))
    if name == "Q8_0":
        d, m, low, high = np.abs(blocks).max(1, keepdims=True) / np.float32(127), None, -128, 127
    elif name.endswith("_1"):
        m = blocks.min(1, keepdims=True)
        d, low, high = (blocks.max(1, keepdims=True) - m) / (2 * top - 1), 0, 2 * int(top) - 1
    else:
        at = np.abs(blocks).argmax(1)[:, None]
        d, m, low, high = np.take_along_axis(blocks, at, 1) / -top, None, 0, 2 * int(top) - 1
    inverse = np.where(d == 0, 0, np.float32(1) / d).astype(np.float32)
    shifted = blocks if m is None else blocks - m
    multiplied, divided = shifted * inverse, np.where(d == 0, 0, shifted / d).astype(np.float32)
    half = top + np.float32(0.5) if name.endswith("_0") and name != "Q8_0" else np.float32(0.5)
    exact = shifted.astype(np.float64) * inverse + half
    finish = lambda codes: np.clip(codes, low, high)
    cut = lambda v: np.trunc(v + half) if name != "Q8_0" else ties_away(v)
    offset = top if name.endswith("_0") and name != "Q8_0" else np.float32(0)
    yield "division-for-product", "", d, m, finish(cut(divided))
    for mistake, rounding in {"ties-even": np.rint, **ROUNDINGS}.items():
        yield mistake, "", d, m, finish(rounding(multiplied) + offset)
        yield mistake, ", and divided", d, m, finish(rounding(divided) + offset)
    if name != "Q8_0":
        yield "fused-multiply-add", "", d, m, finish(np.trunc(exact.astype(np.float32)))
    stored = d.astype(np.float16).astype(np.float32)
    yield "rounded-scale", "", d, m, finish(cut(np.where(stored == 0, 0, shifted / stored).astype(np.float32)))
    if name in ("Q4_0", "Q5_0"):
        positive = np.abs(blocks).max(1, keepdims=True) / (top - 1)
        codes = finish(np.rint(np.where(positive == 0, 0, blocks / positive)) + top)
        yield "absmax-for-signed-largest", "", positive, m, codes
