"""What kvcache/kivi expects: which tokens are quantised when, and every group number by number in exact fractions."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, Values, values
from refllm.evaluate.golden.suites.exact import Unclear, f16_margin, nearest, pack_low_first, to_f16, to_f32

MARGIN = Fraction(1, 1000)
Grid = tuple[list[int], Fraction, Fraction]  # codes, scale, minimum of one group
STEP16 = Fraction(1, 2**24)


@dataclass(frozen=True)
class Store:
    """The op's params."""

    bits: int = 2
    group_size: int = 4
    residual: int = 4


def floor_f16(x: Fraction) -> Fraction:
    """The largest float16 that is not above x."""
    near = to_f16(x)
    while near > x:  # the next one below, whatever its exponent
        step = STEP16
        while to_f16(near - step) == near:
            step *= 2
        near = to_f16(near - step)
    return near


def quantize(group: list[Fraction], bits: int, margins: list) -> Grid:
    """Codes, scale and minimum of a group; every operation rounded once to float32, what is stored to float16."""
    minimum = floor_f16(min(group))
    above = [to_f32(x - minimum) for x in group]
    exact = to_f32(max(above) / ((1 << bits) - 1))
    margins.append(f16_margin(exact) if exact else Fraction(1, 2))
    scale = to_f16(exact)
    steps = [to_f32(x / (scale or 1)) for x in above]
    steps = [min(x, Fraction((1 << bits) - 1)) for x in steps]
    margins += [abs(x - x.numerator // x.denominator - Fraction(1, 2)) for x in steps]
    return [nearest(x) for x in steps], scale, minimum


def decode(grid: Grid) -> list[Fraction]:
    """scale * code + minimum, the product and the sum rounded to float32."""
    codes, scale, minimum = grid
    return [to_f32(to_f32(scale * code) + minimum) for code in codes]


def _split(row: list, size: int) -> list[list]:
    return [row[i : i + size] for i in range(0, len(row), size)]


def state(k: list, v: list, s: Store, margins: list) -> tuple[list[list[list[Grid]]], list[list[list[Grid]]]]:
    """What is quantised once all these tokens of one head have been attended.

    Returns
    -------
    keys : blocks of channels of groups, values : tokens of groups
    """
    keys = []
    for start in range(0, len(k) // s.residual * s.residual, s.residual):
        block = k[start : start + s.residual]
        channels = [list(channel) for channel in zip(*block, strict=True)]
        keys.append([[quantize(g, s.bits, margins) for g in _split(c, s.group_size)] for c in channels])
    due = v[: max(0, len(v) - s.residual)]
    return keys, [[quantize(g, s.bits, margins) for g in _split(token, s.group_size)] for token in due]


def returned(k: list, v: list, before: int, s: Store) -> tuple[list, list]:
    """Keys and values of one head as the last call sees them; `before` tokens had been attended before it."""
    keys, tokens = state(k[:before], v[:before], s, [])
    k_hat, v_hat = [], []
    for block in keys:
        channels = [[x for g in channel for x in decode(g)] for channel in block]
        k_hat += [list(row) for row in zip(*channels, strict=True)]
    v_hat = [[x for g in token for x in decode(g)] for token in tokens]
    return k_hat + k[len(k_hat) :], v_hat + v[len(v_hat) :]


def _arrays(stored: list, side: str, bits: int) -> dict[str, Output]:
    """Codes, scales and minima of one side: heads of blocks (tokens) of channels (none) of groups."""
    row = lambda groups: pack_low_first([c for codes, _, _ in groups for c in codes], bits)
    rows = (row, lambda g: [float(s) for _, s, _ in g], lambda g: [float(m) for *_, m in g])
    deep = (lambda f, x: [[[f(c) for c in b] for b in head] for head in x]) if side == "k" else (
        lambda f, x: [[f(t) for t in head] for head in x])  # fmt: skip
    codes, scale, minimum = (deep(f, stored) for f in rows)
    packing = {"bits": bits, "order": "low_first"} if bits in (1, 2, 3, 4, 6) else None
    return {
        f"{side}_codes": Output({"class": "bits"}, values("u8", codes, packing=packing)),
        f"{side}_scale": Output({"class": "bits"}, values("f16", scale)),
        f"{side}_min": Output({"class": "bits", "zero_sign": "ignore"}, values("f16", minimum)),
    }


def case(
    id: int, comment: str, flags: str, k: list, v: list, chunks: list[int], s: Store, *, near: bool = False,
    recipes: dict | None = None, only: str = "",
) -> CaseSpec:  # fmt: skip
    """A valid case: k and v as heads of tokens of numbers, all in float32.

    Parameters
    ----------
    near : bool
        The case is about a rounding boundary; any other must keep away from all of them.
    recipes : dict, optional
        How "k" and "v" are made.
    only : str
        Outputs to expect, separated by spaces; all unless given.
    """
    exact_k, exact_v = ([[[Fraction(x) for x in token] for token in head] for head in side] for side in (k, v))
    margins: list[Fraction] = []
    heads = list(zip(exact_k, exact_v, strict=True))
    states = [state(hk, hv, s, margins) for hk, hv in heads]
    if not near and min(margins, default=Fraction(1, 2)) < MARGIN:
        raise Unclear(f"case {id}: a value lies {float(min(margins)):.2g} steps from a rounding boundary")
    seen = [returned(hk, hv, sum(chunks[:-1]), s) for hk, hv in heads]
    floats = lambda side: [[[float(x) for x in token] for token in head[side]] for head in seen]
    bits = {"class": "bits", "zero_sign": "ignore"}
    expected = {name: Output(bits, values("f32", floats(side))) for side, name in ((0, "k_hat"), (1, "v_hat"))}
    for side, name in ((0, "k"), (1, "v")):
        if states[0][side]:
            expected |= _arrays([head[side] for head in states], name, s.bits)
    total = sum(o.tensor.array.nbytes for n, o in expected.items() if not n.endswith("hat"))
    full = [len(k[0]) % s.residual, min(len(v[0]), s.residual)]
    total += 4 * len(k) * (full[0] * len(k[0][0]) + full[1] * len(v[0][0]))
    expected["full"] = Output({"class": "bits"}, values("i64", full))
    expected["nbytes"] = Output({"class": "bits"}, values("i64", total))
    expected = {name: output for name, output in expected.items() if not only or name in only.split()}
    recipes = recipes or {}
    inputs = {"k": values("f32", k, recipe=recipes.get("k")), "v": values("f32", v, recipe=recipes.get("v"))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params(s) | {"chunks": chunks})


def params(s: Store) -> dict:
    """As the manifest gives them."""
    return {"bits": s.bits, "group_size": s.group_size, "residual": s.residual}


def constant(value: float, *shape: int) -> Values:
    """An array of one value, as a recipe."""
    return Values("f32", np.full(shape, value, np.float32), recipe={"kind": "full", "value": value.hex()})


def invalid(
    id: int, comment: str, flags: str, error: str, s: Store, k: object = None, v: object = None, dim: int = 4
) -> CaseSpec:
    """A case that must be rejected; keys and values of ones unless given, eight tokens in one call."""
    k = constant(1.0, 1, 2 if v else 8, dim) if k is None else values("f32", k)
    inputs = {"k": k, "v": constant(1.0, *k.array.shape) if v is None else values("f32", v)}
    options = params(s) | {"chunks": [k.array.shape[1]]}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, result="invalid", error=error, params=options)
