"""What quant/rtn expects: round to nearest on an integer grid, number by number in exact fractions."""

from dataclasses import dataclass, replace
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, Values, values
from refllm.evaluate.golden.suites.exact import (
    Unclear,
    dyadic,
    dyadic_recipe,
    f16_margin,
    first_seed,
    nearest,
    pack_low_first,
    to_f16,
    to_f32,
    to_f64,
)

FIRST = {"ties": "even", "zero_group": "amax_one", "arithmetic": "float32"}
MARGIN = Fraction(1, 1000)
SMALLEST = {"float16": Fraction(1, 2**24), "float32": Fraction(1, 2**149)}


@dataclass(frozen=True)
class Definition:
    """The op with its params and, for variants, its conventions."""

    bits: int = 4
    group_size: int = -1
    symmetric: bool = True
    scale_dtype: str = "float16"
    ties: str = "even"
    zero_group: str = "amax_one"
    arithmetic: str = "float32"

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def params(self) -> dict:
        """As the manifest gives them; scale_dtype and symmetric are the group's."""
        return {"bits": self.bits, "group_size": self.group_size}


def _operation(x: Fraction, d: Definition) -> Fraction:
    """The result of one floating-point operation."""
    return to_f32(x) if d.arithmetic == "float32" else to_f64(x)


def _round(x: Fraction, d: Definition, margins: list) -> int:
    margins.append(abs(x - x.numerator // x.denominator - Fraction(1, 2)))
    return nearest(x, d.ties)


def _stored_scale(x: Fraction, d: Definition, margins: list) -> Fraction:
    if d.scale_dtype == "float32":
        return to_f32(x) or SMALLEST["float32"]
    margins.append(f16_margin(x))
    return to_f16(x) or SMALLEST["float16"]


def _scale_and_zero(group: list[Fraction], d: Definition, margins: list) -> tuple[Fraction, int]:
    """Scale and zero point of the weights of one group."""
    half = 1 << (d.bits - 1)
    empty = not any(group)
    if empty and d.zero_group != "amax_one":
        return Fraction(d.zero_group == "scale_one"), half if d.symmetric else 0
    if d.symmetric:
        amax = Fraction(1) if empty else max(map(abs, group))
        return _stored_scale(_operation(amax / (half - 1), d), d, margins), half
    lo, hi = (Fraction(-1), Fraction(1)) if empty else (min(*group, 0), max(*group, 0))
    scale = _stored_scale(_operation(_operation(hi - lo, d) / d.levels, d), d, margins)
    zero = _round(_operation(-lo / scale, d), d, margins)
    return scale, min(max(zero, 0), d.levels)


def _code(w: Fraction, scale: Fraction, zero: int, d: Definition, margins: list) -> int:
    if scale == 0:
        return zero
    code = _round(_operation(w / scale, d), d, margins) + zero
    return min(max(code, 1 if d.symmetric else 0), d.levels)


def quantize(w: list[list[Fraction]], d: Definition) -> tuple[dict, Fraction]:
    """The op, weight by weight.

    Returns
    -------
    outputs : dict of nested lists
    margin : Fraction
        Distance of the nearest rounding decision from its boundary, in rounding steps.
    """
    margins: list[Fraction] = []
    rows, columns = len(w), len(w[0])
    g = columns if d.group_size <= 0 else d.group_size
    fitted = [[_scale_and_zero(row[i : i + g], d, margins) for i in range(0, columns, g)] for row in w]
    if d.group_size == 0:
        fitted = [[_scale_and_zero([x for row in w for x in row], d, margins)]]
    of = lambda r, c: fitted[0][0] if d.group_size == 0 else fitted[r][c // g]
    codes = [[_code(w[r][c], *of(r, c), d, margins) for c in range(columns)] for r in range(rows)]
    outputs = {
        "codes": codes,
        "packed": [pack_low_first(row, d.bits) for row in codes],
        "scale": [[scale for scale, _ in row] for row in fitted],
        "w_hat": [[to_f32(of(r, c)[0] * (codes[r][c] - of(r, c)[1])) for c in range(columns)] for r in range(rows)],
    }
    if not d.symmetric:
        outputs["zero_point"] = [[zero for _, zero in row] for row in fitted]
        outputs["packed_zero_point"] = [pack_low_first(row, d.bits) for row in outputs["zero_point"]]
    return outputs, min(margins, default=Fraction(1, 2))


def _values(name: str, nested: list, d: Definition) -> Values:
    dtype = {"scale": "f16" if d.scale_dtype == "float16" else "f32", "w_hat": "f32"}.get(name, "u8")
    packing = None
    if name.startswith("packed") and d.bits in (2, 3, 4, 6):
        packing = {"bits": d.bits, "order": "low_first"}
    numbers = [[float(x) if dtype[0] == "f" else x for x in row] for row in nested]
    return values(dtype, numbers, packing=packing)


def case(
    id: int,
    comment: str,
    flags: str,
    w: list[list[float]],
    d: Definition,
    *,
    vary: tuple[str, ...] = (),
    near: bool = False,
    recipe: dict | None = None,
) -> CaseSpec:
    """A valid case.

    Parameters
    ----------
    flags : str
        Separated by spaces. NegativeZero makes the sign of zeros in w_hat count.
    w : rows of numbers
    d : Definition
    vary : tuple of str
        First a convention's name, then its other legal values: outputs that change become variants.
    near : bool
        The case is about a rounding boundary; any other must keep away from all of them.
    """
    exact = [[Fraction(x) for x in row] for row in w]
    outputs, margin = quantize(exact, d)
    if not near and not vary and margin < MARGIN:
        raise Unclear(f"case {id}: a value lies {float(margin):.2g} steps from a rounding boundary")
    others = {}
    if vary:
        key, *rest = vary
        others = {value: quantize(exact, replace(d, **{key: value}))[0] for value in rest}
    expected = {}
    for name, nested in outputs.items():
        compare = {"class": "bits"}
        if name == "w_hat" and "NegativeZero" not in flags.split():
            compare["zero_sign"] = "ignore"
        changed = {value: other[name] for value, other in others.items() if other[name] != nested}
        if changed:
            # Every value of the convention is listed, so that a declared one never falls back on the first.
            listed = [({key: FIRST[key]}, nested)] + [({key: value}, other[name]) for value, other in others.items()]
            expected[name] = Output(compare, variants=tuple((when, _values(name, v, d)) for when, v in listed))
        else:
            expected[name] = Output(compare, tensor=_values(name, nested, d))
    weights = values("f32", w, recipe=recipe)
    return CaseSpec(id, comment, tuple(flags.split()), {"w": weights}, expected, params=d.params())


def random_case(id: int, comment: str, flags: str, shape: tuple[int, int], d: Definition) -> CaseSpec:
    """A case on dyadic random weights whose every rounding decision is clear."""
    rows, columns = shape

    def weights(seed):
        flat = dyadic(seed, 16, -15, rows * columns)
        return [flat[r * columns : (r + 1) * columns] for r in range(rows)]

    seed = first_seed(lambda s: quantize(weights(s), d)[1] >= MARGIN, 1000 * id)
    w = [[float(x) for x in row] for row in weights(seed)]
    return case(id, comment, flags, w, d, recipe=dyadic_recipe(seed, 16, -15))


def invalid(id: int, comment: str, flags: str, w: object, error: str, **params) -> CaseSpec:
    """A case that must be rejected; `params` beside bits 4 and group_size -1."""
    params = {"bits": 4, "group_size": -1} | params
    return CaseSpec(
        id, comment, tuple(flags.split()), {"w": values("f32", w)}, result="invalid", error=error, params=params
    )
