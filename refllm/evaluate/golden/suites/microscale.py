"""The suites formats/microscale and formats/nvfp4. Ids are never reused and never renumbered."""

import math
from fractions import Fraction

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, Values, manifest_head, values
from refllm.evaluate.golden.suites import number_oracles
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe
from refllm.evaluate.golden.suites.microscale_definition import (
    CONVENTIONS,
    MX,
    RULES,
    element_max,
    floor_log2,
    mx,
    nvfp4,
)
from refllm.evaluate.golden.suites.number_definition import LOGICAL
from refllm.evaluate.golden.suites.number_notes import MICROSCALE, NVFP4

MX_HEADER = [
    "Input x, f32 [rows, n], n a multiple of 32. Param: format. 32 consecutive columns of a row are a block.",
    "Outputs: codes [rows, n], one element a byte (INT8 as two's complement); scales [rows, n / 32], E8M0; w_hat f32, "
    "decoded.",
    "amax is the largest magnitude of a block, max the largest element, emax its exponent: FP8_E4M3FN 448, 8; FP8_E5M2 "
    "57344, 15; FP6_E2M3 7.5, 2; FP6_E3M2 28, 4; FP4_E2M1 6, 2; INT8 (code / 64, -128 unused) 127 / 64, 0.",
    "The scale is 2^s, s = floor(log2 amax) - emax. Declare scale_rule=ceil for ceil(log2 amax) - emax; "
    "scale_rule=rceil for ceil(log2 q), q = amax / max rounded to float32; scale_rule=even for floor(log2 (amax + h)) "
    "- emax, h half a step of the element's mantissa (of m bits: 2^(floor(log2 amax) - m - 1); INT8: m = 6).",
    "s is kept within -127 .. 127, and -127 for a block of zeros. code = element(x / 2^s), to nearest, ties to even, "
    "saturating. w_hat = element 2^s.",
    "NaN and infinities may be rejected. Else a NaN in the block makes the scale NaN, and so does an infinity; declare "
    "infinity=saturate if it becomes the largest element of a block with amax 2^128.",
    "Declare ties=away or ties=zero for other ties of the elements.",
]
NVFP4_HEADER = [
    "Input x, f32 [rows, n], n a multiple of 16. 16 consecutive columns of a row are a block.",
    "Outputs: codes [rows, n], E2M1, one a byte; scales [rows, n / 16], E4M3; global_scale f32 []; w_hat f32, decoded.",
    "amax is the largest magnitude of the tensor, b of a block. Every operation is rounded to float32, E4M3 and E2M1 "
    "saturate and round ties to even.",
    "g = 2688 (1 / amax); s = E4M3(g (b / 6)), 0.125 if that is 0; code = E2M1(x / (s / g)); w_hat = element (s / g).",
    "Declare convention=modelopt for g = amax / 2688, s = E4M3(b / (6 g)), 1 before rounding if that is 0, code = "
    "E2M1(x / (s g)), w_hat = element (s g); convention=torchao for g = amax / 2688, s = E4M3(max((b / 6) / g, 2^-6)), "
    "code = E2M1(x ((1 / g) / s)), w_hat = element (s g).",
    "g = 1 for a tensor of zeros. Numbers that are not finite are rejected. Declare ties=away or ties=zero for other "
    "ties of the elements.",
]
_SOURCE = {"kind": "first_principles", "name": "the header above, in exact fractions rounded once per operation"}
_MX_CHECKED = [
    {"oracle": "torchao", "version": "0.18.0", "agreement": "differs_documented",
     "note": "to_mx, all four rules, FP elements; elements of a block with the scale 2^-127 are divided by another "
             "number; RCEIL takes log2 in float32"},
    {"oracle": "compressed-tensors", "version": "0.20.0", "agreement": "bit_exact", "note": "MXFP4 scales: even"},
]  # fmt: skip
_NVFP4_CHECKED = [
    {"oracle": "compressed-tensors", "version": "0.20.0", "agreement": "bit_exact"},
    {"oracle": "torchao", "version": "0.18.0", "agreement": "bit_exact", "note": "convention=torchao"},
]
_RULES = ("scale_rule", RULES)
_TIES = ("ties", ("even", "away", "zero"))
_CONVENTIONS = ("convention", CONVENTIONS)


def suite() -> SuiteSpec:
    """The suite formats/microscale."""
    groups = []
    for place, name in enumerate(MX):
        head = {"params": {"format": name}, "source": _SOURCE | {"cross_checked": _MX_CHECKED}}
        groups.append((head, _mx_cases(name, 100 * (place + 1))))
    frozen = [_frozen(*rest) for rest in number_oracles.microscale()]
    bad = CaseSpec(1, "no such format", ("BadParams",), {"x": values("f32", [[1.0] * 32])}, result="invalid",
                   error="any", params={"format": "MXFP5"})  # fmt: skip
    head = _head("microscale", "mx", "Microscaling: blocks of 32 small floats and a power of two", MX_HEADER)
    return SuiteSpec(head, MICROSCALE, [*groups, *frozen, ({"params": {}, "source": _SOURCE}, [bad])])


def nvfp4_suite() -> SuiteSpec:
    """The suite formats/nvfp4."""
    title = "NVFP4: blocks of 16 E2M1 numbers, an E4M3 scale each, a float32 scale for the tensor"
    source = _SOURCE | {"cross_checked": _NVFP4_CHECKED}
    frozen = [_frozen(*rest) for rest in number_oracles.nvfp4()]
    groups = [({"params": {}, "source": source}, _nvfp4_cases()), *frozen]
    return SuiteSpec(_head("nvfp4", "nvfp4", title, NVFP4_HEADER), NVFP4, groups)


def _head(name: str, op: str, title: str, header: list[str]) -> dict:
    return manifest_head(
        __name__, f"formats/{name}", title, header, "lessons/04-number-formats.md", op=f"formats.{op}.encode"
    )


def _outputs(answer: dict, element: str) -> dict[str, Values]:
    scale = "f8_e8m0fnu" if "global_scale" not in answer else "f8_e4m3fn"
    dtypes = {"codes": LOGICAL.get(element, "u8"), "scales": scale, "w_hat": "f32", "global_scale": "f32"}
    return {name: values(dtypes[name], nested) for name, nested in answer.items()}


def _expected(call, x, element: str, vary) -> dict[str, Output]:
    """Outputs of `call(x, **conventions)`; those that a convention changes have variants.

    Where the scale rule varies, w_hat is left out: decoding knows nothing of the rule.
    """
    first = _outputs(call(x), element)
    if vary == _RULES:
        del first["w_hat"]
    if vary is None:
        return {name: Output({"class": "bits"}, array) for name, array in first.items()}
    key, choices = vary
    answers = [({key: choice}, _outputs(call(x, **{key: choice}), element)) for choice in choices]
    expected = {}
    for name, array in first.items():
        same = all(other[name].array.tobytes() == array.array.tobytes() for _, other in answers)
        listed = tuple((when, other[name]) for when, other in answers)
        expected[name] = Output({"class": "bits"}, array) if same else Output({"class": "bits"}, variants=listed)
    return expected


def _case(id, comment, flags, x, call, element, vary=None, recipe=None, result="valid") -> CaseSpec:
    expected = _expected(call, x, element, vary)
    return CaseSpec(id, comment, tuple(flags.split()), {"x": values("f32", x, recipe=recipe)}, expected, result)


def _invalid(id, comment, flag, x, error) -> CaseSpec:
    return CaseSpec(id, comment, (flag,), {"x": values("f32", x)}, result="invalid", error=error)


def _rows(seed: int, rows: int, columns: int, exp2: int = -12) -> tuple[list[list[float]], dict]:
    flat = [float(v) for v in dyadic(seed, 16, exp2, rows * columns)]
    return [flat[r * columns : (r + 1) * columns] for r in range(rows)], dyadic_recipe(seed, 16, exp2)


def _mx_cases(name: str, base: int) -> list[CaseSpec]:
    element = MX[name]
    one = lambda id, comment, flags, x, *rest, **knobs: _case(
        base + id, comment, flags, x, lambda rows, **how: mx(rows, name, **how), element, *rest, **knobs
    )
    small, _ = _rows(base, 12, 32, -19)  # below 1/16
    most = element_max(element)
    top = Fraction(2) ** floor_log2(most)
    below = lambda v: float(np.nextafter(np.float32(float(v)), np.float32(0)))
    above = lambda v: float(np.nextafter(np.float32(float(v)), np.float32(math.inf)))
    peaks = [1.0, above(1), 1.25, 1.5, 1.75, 1.875, below(2), float(most / top), above(most / top), 1.9375, 3.0, 0.875]
    largest = [[peak if c == 5 else float(Fraction(v) * (1 if c % 2 else 4)) for c, v in enumerate(row)]
               for peak, row in zip(peaks, small, strict=True)]  # fmt: skip
    over = [[float((-1) ** c * top * (2 - Fraction(c + 1, 256))) for c in range(32)]]
    # From here to the random numbers, amax is a power of two: the rules agree.
    unit = Fraction(1, 2 ** {"INT8": 7, "FP4_E2M1": 2, "FP6_E3M2": 5, "FP8_E5M2": 4}.get(element, 5))
    odd = [(-1) ** c * (2 * c - 1) * unit for c in range(1, 32)]
    ties = [[float(top), *(float(v) for v in odd)]]
    sizes = [[2.0**-4, *row[1:]] for row in small[:3]]
    sizes = [[v * 2.0 ** (7 * r - 5 * b) for b in range(2) for v in row] for r, row in enumerate(sizes)]
    tiny = [
        [2.0**-149 * (c % 5) for c in range(32)],
        [2.0**-127 * (1 + c % 4) / 2 for c in range(32)],
        [2.0**-126 * (c - 16) / 4 for c in range(32)],
        [2.0**127 * (-1) ** c / (1 + c % 3) for c in range(32)],
    ]
    tiny = [[float(np.float32(v)) for v in row] for row in tiny]
    zeros = [[0.0] * 32 + [2.0**-4, *small[0][1:]], [-0.0, 0.0] * 16 + [0.0] * 32]
    random, recipe = _rows(base + 50, 2, 64)
    edges = [[1.0] * 31 + [bad] for bad in (math.inf, -math.inf)]
    dividing = [[1.0] * 33]
    return [
        one(1, "the largest magnitude decides the scale", "ScaleRule", largest, _RULES),
        one(2, "more than the largest element", "Clip", over, _RULES),
        one(3, "ties, the scale is 1", "TieToEven", ties, _TIES),
        one(4, "3 rows of 2 blocks of different size", "BlockAxis", sizes),
        one(5, "scales at both ends of E8M0", "E8m0Edge", tiny),
        one(6, "blocks of zeros", "AllZeroGroup NegativeZero", zeros),
        one(7, "random numbers", "Random", random, _RULES, recipe=recipe),
        _nan(base + 8),
        _infinity(base + 9, name, edges),
        _invalid(base + 10, "33 columns", "GroupNotDividing", dividing, "shape"),
    ]


def _nan(id: int) -> CaseSpec:
    x = [[math.nan] + [1.0] * 31]
    expected = {"scales": values("f8_e8m0fnu", [[255]]), "w_hat": values("f32", [[math.nan] * 32])}
    outputs = {name: Output({"class": "bits"}, array) for name, array in expected.items()}
    return CaseSpec(id, "a NaN", ("NonFinite",), {"x": values("f32", x)}, outputs, "acceptable")


def _infinity(id: int, name: str, x: list[list[float]]) -> CaseSpec:
    s = min(128 - floor_log2(element_max(MX[name])), 127)
    listed = (
        ({"infinity": "nan"}, values("f8_e8m0fnu", [[255], [255]])),
        ({"infinity": "saturate"}, values("f8_e8m0fnu", [[s + 127]] * 2)),
    )
    outputs = {"scales": Output({"class": "bits"}, variants=listed)}
    return CaseSpec(id, "an infinity", ("NonFinite",), {"x": values("f32", x)}, outputs, "acceptable")


def _nvfp4_cases() -> list[CaseSpec]:
    one = lambda id, comment, flags, x, *rest, **knobs: _case(id, comment, flags, x, nvfp4, "FP4_E2M1", *rest, **knobs)
    small, _ = _rows(7, 3, 32)
    sizes = [[v * 2.0 ** (3 * r - 4 * (c // 16)) for c, v in enumerate(row)] for r, row in enumerate(small)]
    middles = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    tied = [[2688.0, *([0.0] * 15), 6.0, *(s * v for v in middles for s in (1, -1)), 0.0]]
    zero = [[0.0] * 16 + small[0][:16], [-0.0] * 8 + [0.0] * 8 + small[1][:16]]
    little = [[2688.0] * 16 + [6 * 2.0**-9 * (1 + c % 3) / 4 for c in range(16)] + [2.0**-20] * 16]
    little[0] += [0.0] * 15 + [6 * 2.0**-10]
    coarse = [[6.0 * 448] + [1.0] * 15, [6.3 if c == 3 else 0.1 * c for c in range(16)]]
    coarse = [[float(np.float32(v)) for v in row] for row in coarse]
    random, recipe = _rows(70, 4, 64)
    return [
        one(1, "the scale of the tensor", "GlobalScale Random", random, _CONVENTIONS, recipe=recipe),
        one(2, "3 rows of 2 blocks of different size", "BlockAxis", sizes, _CONVENTIONS),
        one(3, "ties, scales 448 and 1, tensor scale 1", "TieToEven", tied, _TIES),
        one(4, "blocks of zeros beside others", "AllZeroGroup NegativeZero", zero, _CONVENTIONS),
        one(5, "block scales that are subnormal, or round to zero", "Subnormal", little, _CONVENTIONS),
        one(6, "the rounded block scale is the divisor", "ScaleRoundedFirst", coarse, _CONVENTIONS),
        one(7, "a tensor of zeros", "AllZeroGroup", [[0.0] * 16], _CONVENTIONS, result="acceptable"),
        _invalid(8, "a NaN", "NonFinite", [[math.nan] + [1.0] * 15], "value"),
        _invalid(9, "an infinity", "NonFinite", [[-math.inf] + [1.0] * 15], "value"),
        _invalid(10, "24 columns", "GroupNotDividing", [[1.0] * 24], "shape"),
    ]


def _frozen(id: int, head: dict, comment: str, when: dict, answer: dict) -> tuple[dict, list[CaseSpec]]:
    """A group of what other software answered, which must be what the definition says."""
    x, recipe = number_oracles.block_rows(), dyadic_recipe(*number_oracles.BLOCKS_INPUT)
    name = head["params"].get("format")
    call = lambda rows, **how: mx(rows, name, **how) if name else nvfp4(rows, **how)
    if any(call(x, **when)[key] != nested for key, nested in answer.items()):
        raise ValueError(f"case {id}: {comment} differs from the definition")
    (key, convention), first = next(iter(when.items())), "floor" if name else CONVENTIONS[0]
    vary = (key, (first, convention)) if convention != first else None
    return head, [_case(id, comment, "Random", x, call, MX.get(name, "FP4_E2M1"), vary, recipe)]
