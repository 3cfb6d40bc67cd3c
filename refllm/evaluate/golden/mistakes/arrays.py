"""Mistakes that show as a change of one array: in the order of bits, of elements, in a sign or a factor.

A changed output is the right one, changed; a changed input is read wrongly, and refllm says what comes of it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from refllm.evaluate.golden.mistakes.base import Given, Hypothesis

_WORDS = {"u8", "i8", "u16", "i16", "u32", "i32", "bytes"}  # bytes and words that may hold packed codes
_FLOATS = {"f16", "f32", "f64"}
# Codes of small floats: their bit of the sign.
_SIGNS = {"bf16": 0x8000, "f8_e4m3fn": 0x80, "f8_e5m2": 0x80, "f6_e2m3fn": 0x20, "f6_e3m2fn": 0x20, "f4_e2m1fn": 8}
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_BACK = tuple(_AWQ.index(i) for i in range(8))
_NO_CODES = ("idx", "indptr", "indices", "offsets", "shape", "state", "positions")  # integers that are no codes
_HEADERS = (0, 1, 2, 4, 6, 16)  # bytes of a block before its codes
_RUNS = (8, 16, 32, 64, 128)  # bytes of codes


class View(NamedTuple):
    """An array of a case: its name, logical dtype, whether it is an output, and the params of the case."""

    array: np.ndarray
    name: str
    dtype: str
    is_output: bool
    params: dict

    @property
    def bits(self) -> int:
        """Bits of a code, as far as the params say."""
        bits = self.params.get("bits")
        if isinstance(bits, int):  # a mean of several widths is none
            return bits
        return 8 if self.params.get("quant_type") == "int8" else 4


Change = Callable[[View], Iterator[tuple[str, np.ndarray]]]


def predict(given: Given) -> Iterator[Hypothesis]:
    """Every change of `CHANGES` to each output, to each input, and to all inputs it applies to at once."""
    for mistake, change in CHANGES:
        for name, array in given.expected.items():
            for words, changed in _changed(change, View(array, name, given.dtypes[name], True, given.params)):
                yield Hypothesis(mistake, f"output {name}{words}", {name: changed})
        versions: dict[str, dict[str, np.ndarray]] = {}
        for name, array in given.inputs.items():
            for words, changed in _changed(change, View(array, name, given.dtypes[name], False, given.params)):
                versions.setdefault(words, {})[name] = changed
        for words, inputs in versions.items():
            for name, array in inputs.items():
                yield from _read(mistake, f"input {name}{words}", given.right(**{name: array}))
            if len(inputs) > 1:
                yield from _read(mistake, f"inputs{words}", given.right(**inputs))


def _read(mistake: str, where: str, outputs: dict[str, np.ndarray]) -> Iterator[Hypothesis]:
    """What comes of a wrong input; the decoded weights may suffer alone."""
    yield Hypothesis(mistake, where, outputs)
    if len(outputs) > 1 and "w_hat" in outputs:
        yield Hypothesis(mistake, f"{where}, decoding", {"w_hat": outputs["w_hat"]})


def _changed(change: Change, view: View) -> Iterator[tuple[str, np.ndarray]]:
    """(what is said of it, the array changed) where the change does something."""
    array = view.array
    if any(word in view.name for word in _NO_CODES):
        return
    for words, changed in change(view) if array.size else ():
        if changed.shape != array.shape or changed.tobytes() != array.tobytes():
            yield words, changed


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _like(data: np.ndarray, array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(array.dtype).reshape(array.shape)


def _bodies(view: View) -> Iterator[tuple[str, np.ndarray, int]]:
    """Ways to see an array of bytes as blocks: (words, (blocks, bytes), bytes before the codes)."""
    row = view.array.shape[-1] if view.array.ndim else 0
    for header in _HEADERS if view.dtype in ("u8", "bytes") else ():
        for run in dict.fromkeys((*_RUNS, row) if header == 0 else _RUNS):
            if row % (header + run) == 0:
                words = (
                    f", blocks of {header} + {run} bytes" if header else f", runs of {run if run != row else 'a row'}"
                )
                yield words, view.array.reshape(-1, header + run), header


def _in_codes(change_bytes: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A change of single bytes: of the whole array, or of the codes of blocks that begin with something else."""

    def change(view):
        if view.dtype in _WORDS:
            yield "", _like(change_bytes(_bytes(view.array)), view.array)
            for words, blocks, header in _bodies(view):
                if header:
                    codes = change_bytes(blocks[:, header:])
                    yield words, np.concatenate([blocks[:, :header], codes], axis=1).reshape(view.array.shape)

    return change


def _of_bits(bits: int, change: Change) -> Change:
    """A change that only codes of so many bits can suffer."""
    return lambda view: change(view) if view.bits == bits else iter(())


def _halves(of_pairs: bool) -> Change:
    """Nibbles in pairs taken for halves, or halves for pairs."""

    def change(view):
        for words, blocks, header in _bodies(view):
            low, high = blocks[:, header:] & 15, blocks[:, header:] >> 4
            if of_pairs != view.is_output:  # the wrong order read: the elements as the right reader must find them
                order = np.concatenate([low, high], axis=1)
                codes = order[:, 0::2] | order[:, 1::2] << 4
            else:
                order = np.stack([low, high], axis=2).reshape(len(blocks), -1)
                half = order.shape[1] // 2
                codes = order[:, :half] | order[:, half:] << 4
            yield words, np.concatenate([blocks[:, :header], codes], axis=1).reshape(view.array.shape)

    return change


def _awq(wanted: bool) -> Change:
    """AWQ's order of nibbles in a 32-bit word left out where it is wanted, or applied where it is not."""
    order = {(True, False): _AWQ, (True, True): _AWQ_BACK, (False, False): _AWQ_BACK, (False, True): _AWQ}

    def change(view):
        data = _bytes(view.array)
        row = view.array.shape[-1] * view.array.itemsize if view.array.ndim else 0
        if view.dtype in _WORDS and row % 4 == 0 and view.bits == 4:
            nibbles = np.stack([data & 15, data >> 4], axis=1).reshape(-1, 8)[:, order[wanted, view.is_output]]
            yield "", _like(nibbles[:, 0::2] | nibbles[:, 1::2] << 4, view.array)

    return change


def _high_code_first(view):
    """Codes of 2, 4 or 8 bits in the reverse order within words of 32."""
    if view.dtype in ("i32", "u32") and view.bits in (2, 4, 8):
        word = np.ascontiguousarray(view.array).view(np.uint32)[..., None]
        codes = word >> np.arange(0, 32, view.bits, np.uint32) & np.uint32((1 << view.bits) - 1)
        back = codes << np.arange(32 - view.bits, -1, -view.bits).astype(np.uint32)
        yield "", np.bitwise_or.reduce(back, axis=-1).view(view.array.dtype)


def _bytes_reversed(view):
    if view.dtype in _WORDS | _FLOATS and view.array.itemsize > 1:
        yield "", view.array.byteswap()


def _transposed(view):
    array = view.array
    if array.ndim == 2 and min(array.shape) > 1:
        yield "", np.ascontiguousarray(array.T)
        if array.shape[0] != array.shape[1]:
            yield ", in the old shape", np.ascontiguousarray(array.T).reshape(array.shape)
            yield ", taken as it lies", array.reshape(array.shape[::-1]).T.reshape(array.shape).copy()


def _twos_complement(view):
    if view.dtype not in _WORDS:
        return
    pattern = np.uint8({2: 0xAA, 4: 0x88, 8: 0x80}.get(view.bits, 0))
    yield from _in_codes(lambda data: data ^ pattern)(view)
    yield ", one code an element", view.array ^ view.array.dtype.type(1 << min(view.bits, 7) - 1)


def _plus(step: int) -> Change:
    """A number added to every zero point, packed or one an element, modulo 2^bits."""

    def change(view):
        bits = view.bits
        if not any(word in view.name.lower() for word in ("zero", "zp")) or view.dtype not in _WORDS:
            return
        if bits in (2, 4, 8):
            yield ", packed", _like(_shifted(_bytes(view.array), bits, step), view.array)
        yield "", ((view.array.astype(np.int64) + step) % (1 << bits)).astype(view.array.dtype)
        yield ", not wrapped", (view.array.astype(np.int64) + step).astype(view.array.dtype)

    return change


def _shifted(data: np.ndarray, bits: int, step: int) -> np.ndarray:
    out = np.zeros_like(data)
    for at in range(0, 8, bits):
        out |= ((data >> at).astype(np.int64) + step & (1 << bits) - 1).astype(np.uint8) << at
    return out


def _is_scale(view: View) -> bool:
    return any(word in view.name.lower() for word in ("scale", "amax", "absmax"))


def _reciprocal(view):
    if _is_scale(view) and view.dtype in _FLOATS:
        yield "", np.asarray(view.array.dtype.type(1) / view.array, view.array.dtype)


def _times(factor: float) -> Change:
    def change(view):
        if view.dtype in _FLOATS and (view.is_output or _is_scale(view)):
            yield "", np.asarray(view.array * view.array.dtype.type(factor), view.array.dtype)

    return change


def _e8m0(step: int) -> Change:
    def change(view):
        if view.dtype == "f8_e8m0fnu" or (view.dtype == "u8" and _is_scale(view)):
            yield "", (view.array.astype(np.int64) + step).clip(0, 254).astype(np.uint8)

    return change


def _zero_without_sign(view):
    zero = view.array.dtype.type(0)
    if view.dtype in _FLOATS:
        yield "", np.where(view.array == 0, zero, view.array)
    elif view.dtype in _SIGNS:
        yield "", np.where(view.array == _SIGNS[view.dtype], zero, view.array)


def _wide(view):
    if view.is_output and view.dtype in ("f16", "f32"):
        yield "", view.array.astype(np.float64)
    if view.is_output and view.dtype in ("u8", "i8", "u16", "u32", "i32"):
        yield "", view.array.astype(np.int64)


def _reversed_bits(data: np.ndarray) -> np.ndarray:
    return np.packbits(np.unpackbits(data[..., None], axis=-1, bitorder="little"), axis=-1)[..., 0]


def _reversed_crumbs(data: np.ndarray) -> np.ndarray:
    return data << 6 | (data & 12) << 2 | data >> 2 & 12 | data >> 6


CHANGES: tuple[tuple[str, Change], ...] = (
    ("nibbles-swapped", _of_bits(4, _in_codes(lambda data: data >> 4 | data << 4))),
    ("halves-as-pairs", _of_bits(4, _halves(of_pairs=False))),
    ("pairs-as-halves", _of_bits(4, _halves(of_pairs=True))),
    ("awq-order-missing", _awq(wanted=True)),
    ("awq-order-unwanted", _awq(wanted=False)),
    ("high-code-first", _high_code_first),
    ("high-bits-first", _in_codes(_reversed_crumbs)),
    ("bits-reversed", _in_codes(_reversed_bits)),
    ("bytes-reversed", _bytes_reversed),
    ("transposed", _transposed),
    ("twos-complement", _twos_complement),
    ("zero-point-plus-one", _plus(1)),
    ("zero-point-minus-one", _plus(-1)),
    ("reciprocal-scale", _reciprocal),
    ("e8m0-one-low", _e8m0(-1)),
    ("e8m0-one-high", _e8m0(1)),
    ("factor-of-two", _times(2)),
    ("factor-of-two", _times(0.5)),
    ("negative-zero-lost", _zero_without_sign),
    ("wrong-dtype", _wide),
)  # fmt: skip
