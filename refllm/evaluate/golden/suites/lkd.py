"""The suite blockwise/lkd: one linear and its teacher, number by number in fractions. Ids are never reused."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import first_clear
from refllm.evaluate.golden.suites.omniquant_definition import near
from refllm.evaluate.golden.suites.outliers_cases import drawn_rows, recipe_of
from refllm.evaluate.golden.suites.outliers_definition import Rounder, clamp, exact, floats, twos
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "One linear: w, f64 [out, in], what it was; v, what it has become in training; x, f64 [n, in]. In a model the "
    "output of a block is compared.",
    "Q(v): of every group scale = amax / 2^(bits-1), rounded to f16, 1 for amax of zeros; codes - 2^(bits-1) = "
    "clip(rint(v / scale)). x^: of every token s = amax / (2^(b-1) - 1), b = activation_bits, s rint(x / s).",
    "loss = the mean over tokens and outputs of the square of x^ Q(v)^T - x w^T; of_v its slope, that "
    "from v to Q(v) being 1.",
]
PARAMS = {"bits": 3, "group_size": 2, "activation_bits": 4}
NOTES = {
    "Divisor": note("OFF_BY_ONE", "2^(bits-1): +amax saturates by a step."),
    "WholeSlope": note("BASIC", "What saturates has a slope, too, and none goes through the scale."),
    "ScaleFollows": note("BASIC", "Scales are fitted to v, not kept from w."),
    "Teacher": note("BASIC", "The target is of w and of x as they were."),
    "RoundedInputs": note("BASIC", "Output and slope take x^."),
    "TokenScale": note("BASIC", "Every token has a scale."),
    "Mean": note("BASIC", "Mean over tokens and outputs."),
    "Zeros": note("DEGENERATE", "A token of zeros is no division by 0, nor is a group."),
    "NonFinite": note("NON_FINITE", "NaN is rejected."),
    "Random": note("BASIC", "Dyadic random inputs."),
}  # fmt: skip


def _token(row: list[Fraction], bits: int, rint: Rounder) -> list[Fraction]:
    """A token rounded and back."""
    most = (1 << (bits - 1)) - 1
    scale = max(map(abs, row)) / most
    return [scale * clamp(rint(x / scale), -most, most) if scale else Fraction(0) for x in row]


def _case(id: int, comment: str, flags: str, w: list, v: list, x: list, recipes: dict | None = None) -> CaseSpec:
    rint, g = Rounder(), PARAMS["group_size"]
    teacher, student, given = exact(w), exact(v), exact(x)
    found = [[twos(row[i : i + g], PARAMS["bits"], rint) for i in range(0, len(row), g)] for row in student]
    decoded = [[number for *_, back in row for number in back] for row in found]
    rounded = [_token(row, PARAMS["activation_bits"], rint) for row in given]
    dot = lambda a, b: sum((p * q for p, q in zip(a, b, strict=True)), Fraction(0))
    change = [[dot(s, q) - dot(t, r) for q, r in zip(decoded, teacher, strict=True)]
              for s, t in zip(rounded, given, strict=True)]  # fmt: skip
    size = len(x) * len(w)
    tokens = lambda rows: list(zip(*rows, strict=True))
    slope = [[2 * dot(d, s) / size for s in tokens(rounded)] for d in tokens(change)]
    expected = {
        "codes": Output({"class": "bits"}, values("u8", [[c for codes, *_ in row for c in codes] for row in found])),
        "loss": near(float(sum(d * d for row in change for d in row) / size)),
        "of_v": near(floats(slope)),
    }
    recipes = recipes or {}
    given = {"w": w, "v": v, "x": x}
    tensors = {name: values("f64", floats(rows), recipe=recipes.get(name)) for name, rows in given.items()}
    return CaseSpec(id, comment, tuple(flags.split()), tensors, expected)


def _random(seed: int) -> CaseSpec:
    """Two groups a row; v is w after some training."""
    w, moves, x = (drawn_rows(seed + i, 2, 4, scale) for i, scale in enumerate((-10, -12, -9)))
    v = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(w, moves, strict=True)]
    recipes = {"w": recipe_of(seed, -10), "x": recipe_of(seed + 2)}
    flags = "Random ScaleFollows Teacher TokenScale RoundedInputs Mean WholeSlope"
    return _case(2, "drawn", flags, w, v, x, recipes)


def suite() -> SuiteSpec:
    """The suite blockwise/lkd."""
    head = manifest_head(
        __name__,
        "blockwise/lkd",
        "Layer-by-layer distillation on one linear: codes, loss and its slopes",
        HEADER,
        "lessons/28-layer-distillation.md",
    )
    source = {"kind": "first_principles", "name": "the header above, in fractions"}
    w, v, x = [[1.5, -0.375, 0.125, 0]], [[2, -0.4375, 0, 0]], [[1, -0.625, 0.3125, 1], [0] * 4]
    valid = [
        _case(1, "by hand", "Divisor WholeSlope ScaleFollows Teacher RoundedInputs Zeros", w, v, x),
        first_clear(_random, 1000),
    ]
    bad = {name: values("f64", rows) for name, rows in (("w", [[1.0]]), ("v", [[math.nan]]), ("x", [[1.0]]))}
    rejected = CaseSpec(20, "NaN", ("NonFinite",), bad, result="invalid", error="value", params={"group_size": -1})
    return SuiteSpec(head, NOTES, [({"params": PARAMS, "source": source}, [*valid, rejected])])
