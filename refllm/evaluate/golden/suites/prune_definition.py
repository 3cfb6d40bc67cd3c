"""What prune/magnitude and prune/wanda expect: masks by sorting exact scores, and the bytes that store what is kept."""

import itertools
from fractions import Fraction
from math import isqrt

from refllm.evaluate.golden.build import CaseSpec, Output, values
from refllm.evaluate.golden.suites.exact import Unclear, pack_low_first, to_f16, to_f64

MARGIN = Fraction(1, 1000)  # two scores that are not equal differ by this fraction at least
BITS = {"class": "bits", "zero_sign": "ignore"}


def drop_lowest(scores: list[Fraction], count: int) -> list[int]:
    """1 = keep: the `count` lowest go, among equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = set(order[:count])
    return [int(i not in gone) for i in range(len(scores))]


def removed(sparsity: float, n: int) -> int:
    """The product as float64 has it, without its fraction."""
    return int(to_f64(Fraction(sparsity) * n))


def mask_of(scores: list[list[Fraction]], pattern: str, sparsity: float, per_row: bool) -> list[list[int]]:
    """Which weights stay."""
    columns = len(scores[0])
    if pattern != "unstructured":
        n, m = map(int, pattern.split(":"))
        return [[k for i in range(0, columns, m) for k in drop_lowest(row[i : i + m], m - n)] for row in scores]
    if per_row:
        return [drop_lowest(row, removed(sparsity, columns)) for row in scores]
    flat = drop_lowest([s for row in scores for s in row], removed(sparsity, columns * len(scores)))
    return [flat[i : i + columns] for i in range(0, len(flat), columns)]


def check_squares(scores: list[list[Fraction]]) -> None:
    """Refuse squares whose roots floating point may order wrongly: nearly equal ones, equal ones with inexact roots."""
    every = [s for row in scores for s in row]
    distinct = sorted(set(every))
    for a, b in itertools.pairwise(distinct):
        if b - a < MARGIN * b:
            raise Unclear(f"scores {float(a):.9g} and {float(b):.9g} are nearly equal")
    for s in (s for s in distinct if every.count(s) > 1):
        if isqrt(s.numerator) ** 2 != s.numerator or isqrt(s.denominator) ** 2 != s.denominator:
            raise Unclear(f"equal scores with the irrational root of {s}")


def pair_nibble(kept: list[int]) -> int:
    """Two of four columns as first | second << 2."""
    first, second = (i for i in range(4) if kept[i])
    return first | second << 2


def nonzero_nibble(w: list[Fraction], kept: list[int]) -> int:
    """As converters that look only at what is not zero write it: column 2, else 3, fills up."""
    chosen = [i for i in range(4) if kept[i] and w[i] != 0]
    for i in (2, 3):
        if len(chosen) < 2 and i not in chosen:
            chosen.append(i)
    return min(chosen) | max(chosen) << 2


def stored(w: list[list[Fraction]], mask: list[list[int]], pattern: str, dtype: str) -> dict[str, Output]:
    """Expected outputs of a mask."""
    rounding = to_f16 if dtype == "float16" else Fraction
    kind = "f16" if dtype == "float16" else "f32"
    kept = [
        [float(rounding(x)) for x, k in zip(row, keep, strict=True) if k] for row, keep in zip(w, mask, strict=True)
    ]
    out = {"mask": Output({"class": "bits"}, values("u8", mask))}
    if pattern == "2:4":
        at = range(0, len(w[0]), 4)
        rows = list(zip(w, mask, strict=True))
        own = [pack_low_first([pair_nibble(keep[i : i + 4]) for i in at], 4) for _, keep in rows]
        other = [pack_low_first([nonzero_nibble(x[i : i + 4], keep[i : i + 4]) for i in at], 4) for x, keep in rows]
        packing = {"bits": 4, "order": "low_first"}
        indices = [values("u8", nested, packing=packing) for nested in (own, other)]
        if own == other:
            out["indices"] = Output({"class": "bits"}, indices[0])
        else:
            whens = ({"zeros": "by_rank"}, {"zeros": "filled_up"})
            out["indices"] = Output({"class": "bits"}, variants=tuple(zip(whens, indices, strict=True)))
        return out | {"values": Output(BITS, values(kind, kept))}
    counts = [sum(keep) for keep in mask]
    bitmask = [pack_low_first(keep, 1) for keep in mask]
    return out | {
        "values": Output(BITS, values(kind, [x for row in kept for x in row])),
        "bitmask": Output({"class": "bits"}, values("u8", bitmask, packing={"bits": 1, "order": "low_first"})),
        "row_offsets": Output({"class": "bits"}, values("u32", [sum(counts[:i]) for i in range(len(counts))])),
    }


def case(
    id: int,
    comment: str,
    flags: str,
    w: list[list[float]],
    x: list[list[float]] | None = None,
    *,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    per_row: bool | None = None,
    dtype: str = "float16",
    w_recipe: dict | None = None,
    x_recipe: dict | None = None,
) -> CaseSpec:
    """A valid case of magnitude (no x; per_row False unless given), or of wanda (x)."""
    exact = [[Fraction(v) for v in row] for row in w]
    if x is None:
        scores = [[abs(v) for v in row] for row in exact]
    else:
        energy = [sum(Fraction(row[j]) ** 2 for row in x) for j in range(len(w[0]))]
        scores = [[v * v * e for v, e in zip(row, energy, strict=True)] for row in exact]  # the squares, in their order
        check_squares(scores)
    by_row = x is not None or bool(per_row)
    mask = mask_of(scores, pattern, 0.5 if sparsity is None else sparsity, by_row)
    params = {"pattern": pattern, "dtype": dtype}
    params |= {} if sparsity is None else {"sparsity": sparsity}
    params |= {} if per_row is None else {"per_row": per_row}
    inputs = {"w": values("f32", w, recipe=w_recipe)}
    if x is not None:
        inputs["x"] = values("f32", x, recipe=x_recipe)
    return CaseSpec(id, comment, tuple(flags.split()), inputs, stored(exact, mask, pattern, dtype), params=params)


def invalid(id: int, comment: str, flags: str, error: str, w: object, x: object = None, **params) -> CaseSpec:
    """A case that must be rejected; `params` beside pattern unstructured and dtype float16."""
    params = {"pattern": "unstructured", "dtype": "float16"} | params
    inputs = {"w": values("f32", w)} | ({} if x is None else {"x": values("f32", x)})
    return CaseSpec(id, comment, tuple(flags.split()), inputs, result="invalid", error=error, params=params)
