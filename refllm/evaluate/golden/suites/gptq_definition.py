"""What quant/gptq expects: explicit elimination of H^-1, number by number in exact fractions.

Optimal brain surgery as it is written: one column is rounded, the rest of its row takes the least-squares share of the
error, and the column's row and column leave H^-1. No Cholesky factor, no square root, no blocks but the one that says
which weights "published" groups are fitted to.
"""

from dataclasses import dataclass
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, Values, values
from refllm.evaluate.golden.suites.exact import (
    Unclear,
    dyadic,
    dyadic_recipe,
    f16_margin,
    f32_step,
    first_clear,
    nearest,
    to_f16,
    to_f32,
)

MARGIN = Fraction(1, 1000)
SMALLEST = {"float16": Fraction(1, 2**24), "float32": Fraction(1, 2**149)}
Rows = list[list[Fraction]]


@dataclass(frozen=True)
class Definition:
    """The op with its params."""

    bits: int = 4
    group_size: int = -1
    symmetric: bool = False
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    group_grid: str = "published"
    block: int = 128
    scale_dtype: str = "float16"

    def params(self) -> dict:
        """As the manifest gives them: what differs from the params of the group, which are the first of this class."""
        return {name: value for name, value in vars(self).items() if value != getattr(Definition, name)}


def hessian(x: Rows) -> Rows:
    """X^T X."""
    columns = range(len(x[0]))
    return [[sum(row[i] * row[j] for row in x) for j in columns] for i in columns]


def inverse(H: Rows) -> Rows:
    """H^-1 of a positive definite matrix, by Gauss and Jordan."""
    n = len(H)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(H)]
    for j in range(n):
        if rows[j][j] <= 0:
            raise ValueError("H is singular")
        rows[j] = [v / rows[j][j] for v in rows[j]]
        for i in range(n):
            if i != j and rows[i][j]:
                rows[i] = [v - rows[i][j] * p for v, p in zip(rows[i], rows[j], strict=True)]
    return [row[n:] for row in rows]


def _round(x: Fraction, margins: list) -> int:
    """rint of the nearest float32. What lies within half a step of a half becomes that half: two boundaries."""
    half = x.numerator // x.denominator + Fraction(1, 2)
    margins.append(abs(abs(x - half) - f32_step(half) / 2))
    return nearest(to_f32(x))


def _fit(group: list[Fraction], d: Definition, margins: list) -> tuple[Fraction, int]:
    """Scale and zero point of some weights."""
    levels, half = (1 << d.bits) - 1, 1 << (d.bits - 1)
    empty = not any(group)
    lo, hi = (Fraction(-1), Fraction(1)) if empty else (min(*group, 0), max(*group, 0))
    if d.symmetric:
        lo, hi = -max(-lo, hi), max(-lo, hi)
    exact = (hi - lo) / levels
    if d.scale_dtype == "float16":
        margins.append(f16_margin(exact))
    rounded = to_f16(exact) if d.scale_dtype == "float16" else to_f32(exact)
    scale = rounded or SMALLEST[d.scale_dtype]
    return scale, half if d.symmetric else min(max(_round(-lo / scale, margins), 0), levels)


def quantize(w: Rows, x: Rows, d: Definition) -> tuple[dict, Fraction]:
    """The op.

    Returns
    -------
    outputs : dict of nested lists
    margin : Fraction
        Distance of the nearest rounding decision from its boundary, in rounding steps.
    """
    margins: list[Fraction] = []
    columns, g = len(w[0]), d.group_size
    H = hessian(x)
    dead = [H[j][j] == 0 for j in range(columns)]
    w = [[Fraction(0) if dead[j] else v for j, v in enumerate(row)] for row in w]
    for j in range(columns):
        H[j][j] = Fraction(1) if dead[j] else H[j][j]
    order = list(range(columns))
    if d.act_order:
        order.sort(key=lambda j: (-H[j][j], j))
    add = Fraction(d.damp) * sum(H[j][j] for j in range(columns)) / columns
    A = inverse([[H[i][j] + (add if i == j else 0) for j in order] for i in order])

    moving = g > 0 and not d.static_groups
    groups = 1 if g <= 0 else columns // g
    group_of = [0 if g <= 0 else (i if moving else j) // g for i, j in enumerate(order)]
    grids: list[list] = [[None] * groups for _ in w]
    if g == 0:
        grids = [[_fit([v for row in w for v in row], d, margins)] for _ in w]
    elif not moving:
        size = columns // groups
        grids = [[_fit(row[a : a + size], d, margins) for a in range(0, columns, size)] for row in w]

    now = [[row[j] for j in order] for row in w]
    outer = [list(row) for row in now]
    codes = [[0] * columns for _ in w]
    w_hat = [[Fraction(0)] * columns for _ in w]
    for i in range(columns):
        if i % d.block == 0 or d.group_grid == "updated":
            outer = [list(row) for row in now]
        for r, row in enumerate(now):
            if moving and i % g == 0:
                grids[r][i // g] = _fit(outer[r][i : i + g], d, margins)
            scale, zero = grids[r][group_of[i]]
            code = min(max(_round(row[i] / scale, margins) + zero, 0), (1 << d.bits) - 1)
            q = to_f32(scale * (code - zero))
            codes[r][order[i]], w_hat[r][order[i]] = code, q
            step = (row[i] - q) / A[i][i]
            for k in range(i, columns):
                row[k] -= step * A[i][k]
        pivot = list(A[i])
        for m in range(i + 1, columns):
            A[m] = [v - pivot[m] * p / pivot[i] for v, p in zip(A[m], pivot, strict=True)]

    stored = grids[:1] if g == 0 else grids
    g_idx = [0] * columns
    for i, j in enumerate(order):
        g_idx[j] = group_of[i]
    outputs = {"codes": codes, "scale": [[s for s, _ in row] for row in stored], "w_hat": w_hat, "g_idx": g_idx}
    if not d.symmetric:
        outputs["zero_point"] = [[z for _, z in row] for row in stored]
    return outputs, min(margins)


def _output(name: str, nested: list, d: Definition) -> Output:
    kind = {"scale": "f16" if d.scale_dtype == "float16" else "f32", "g_idx": "i32"}.get(name, "u8")
    numbers = [[float(v) for v in row] for row in nested] if name == "scale" else nested
    return Output({"class": "bits"}, values(kind, numbers))


def case(
    id: int,
    comment: str,
    flags: str,
    w: list[list[float]],
    x: list[list[float]],
    *,
    near: bool = False,
    w_recipe: dict | None = None,
    x_recipe: dict | None = None,
    **params,
) -> CaseSpec:
    """A valid case.

    Parameters
    ----------
    flags : str
        Separated by spaces.
    w, x : rows of numbers
    near : bool
        The case is about a rounding boundary, and all its numbers are exact; any other must keep away from them.
    **params
        Of Definition.
    """
    d = Definition(**params)
    exact = lambda rows: [[Fraction(v) for v in row] for row in rows]
    outputs, margin = quantize(exact(w), exact(x), d)
    if not near and margin < MARGIN:
        raise Unclear(f"case {id}: a value lies {float(margin):.2g} steps from a rounding boundary")
    permuted = d.act_order and d.group_size > 0 and not d.static_groups
    stored = [name for name in outputs if name != "w_hat" and (permuted or name != "g_idx")]
    expected = {name: _output(name, outputs[name], d) for name in stored}
    inputs: dict[str, Values] = {"w": values("f32", w, recipe=w_recipe), "x": values("f32", x, recipe=x_recipe)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=d.params())


def random_case(id: int, comment: str, flags: str, shape: tuple[int, int], tokens: int, **params) -> CaseSpec:
    """A case on dyadic random numbers whose every rounding decision is clear."""
    rows, columns = shape
    cut = lambda flat: [[float(v) for v in flat[i : i + columns]] for i in range(0, len(flat), columns)]

    def made(seed):
        w, x = cut(dyadic(seed, 10, -8, rows * columns)), cut(dyadic(seed + 1, 5, -3, tokens * columns))
        recipes = {"w_recipe": dyadic_recipe(seed, 10, -8), "x_recipe": dyadic_recipe(seed + 1, 5, -3)}
        return case(id, comment, flags, w, x, **recipes, **params)

    return first_clear(made, 1000 * id)


def invalid(id: int, comment: str, flags: str, error: str, w: object, x: object, **params) -> CaseSpec:
    """A case that must be rejected."""
    inputs = {"w": values("f32", w), "x": values("f32", x)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, result="invalid", error=error, params=params)
