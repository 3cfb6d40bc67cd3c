"""The suite prune/magnitude. Ids are never reused and never renumbered: new cases take new numbers."""

import math

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, manifest_head
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, first_seed
from refllm.evaluate.golden.suites.prune_definition import case, invalid
from refllm.evaluate.golden.suites.prune_notes import HEADER, NOTES

_OWN = [
    "Input w, f32 [out, in]. Params: pattern (unstructured or N:M), sparsity, per_row (unstructured: compare "
    "within each "
    "row, else over the matrix; false unless given), dtype of the stored values. Score: |w|."
]


def _plain() -> list[CaseSpec]:
    return [
        case(1, "over the matrix", "Magnitude Scope", [[4, -1, 8], [0.5, -16, 2]]),
        case(2, "the same within each row", "Magnitude Scope", [[4, -1, 8], [0.5, -16, 2]], per_row=True),
        case(3, "all equal: the first half goes", "StableTies Threshold", [[1, -1, 1, -1], [-1, 1, 1, 1]]),
        case(5, "0.5 of 5", "SparsityFloor", [[5, 4, 3, 2, 1]], per_row=True),
        case(6, "0.7 of 10: the product is 7, the exact one below", "SparsityFloor",
             [[3, 1, 4, 10, 5, 9, 2, 6, 8, 7]], sparsity=0.7),
        case(7, "0.4 of 7 is 2", "SparsityFloor", [[1, 7, 2, 6, 3, 5, 4]], sparsity=0.4, per_row=True),
        case(8, "9 columns: rows of two bytes", "OddSize BitOrder",
             [[9, 1, 1.5, 8, 7, 2, 3, 2.5, 10], [1, 12, 13, 2, 3, 14, 15, 16, 0.5]], sparsity=0.4, per_row=True),
        case(9, "rows that keep 3, 0, 1 and 2", "RowOffsets",
             [[9, 8, 7], [1, 2, 3], [2.5, 0.5, 4], [5, 0.25, 6]]),
        case(10, "sparsity 0: zeros are kept like all else", "Everything", [[0, -1, 2], [3, 0, 0.5]], sparsity=0),
        case(11, "sparsity 1", "Everything RowOffsets", [[7, -1, 2], [3, 5, 0.5]], sparsity=1),
        case(12, "ties and near misses of float16", "ValueRounding",
             [[2049, 2051, -2049, 4098.0625, 1 + 2.0**-11, 2.0**-26, 3 * 2.0**-25, 0.0625]], sparsity=0.25),
        case(13, "two weights that round to one float16", "ScoreBeforeRounding", [[2056.75, 2055.25, 1, 1.5]],
             sparsity=0.75),
        case(14, "float32 values", "Float32Values", [[1 + 2.0**-23, 2.0**100, 2.0**-140, 2.0**-149]], dtype="float32"),
    ]  # fmt: skip


def _patterns() -> list[CaseSpec]:
    square = [[8, 7, 6, 5], [4, 3, 2, 1], [1, -9, 2, 8], [9, 1, 8, 2]]
    pairs = [[4, 3, 1, 2, 4, 1, 3, 2, 1, 4, 3, 2, 4, 2, 1, 3, 1, 4, 2, 3, 1, 2, 4, 3]]
    lonely = [[5, 0, 0, 0, 0, -5, 0, 0, 0, 0, 5, 0, 0, 0, 0, 5, 0, 0, 0, 0]]
    return [
        case(30, "2:4: every pair of columns", "NibbleOrder", pairs, pattern="2:4"),
        case(31, "2:4: 12 columns, three nibbles a row", "NibbleOrder OddSize Transposed",
             [[1, -9, 8, 2, 3, 4, -6, 5, -7, 1, 2, 3]], pattern="2:4"),
        case(32, "2:4: one weight or none in four", "FewNonzeros", lonely, pattern="2:4"),
        case(34, "2:4 on a square block", "Transposed Magnitude", square, pattern="2:4"),
        case(35, "1:4 keeps one", "KeptNotRemoved", square, pattern="1:4"),
        case(36, "3:4 keeps three", "KeptNotRemoved BitOrder", square, pattern="3:4"),
        case(38, "2:5: groups across bytes", "OddSize", [[5, 1, 4, 2, 3, -1, -2, -3, 4, 5]], pattern="2:5"),
    ]  # fmt: skip


def _random() -> list[CaseSpec]:
    def draw(id, shape, **knobs):
        rows, columns = shape

        def weights(seed):
            flat = dyadic(seed, 11, -9, rows * columns)
            return [flat[i : i + columns] for i in range(0, len(flat), columns)]

        distinct = lambda seed: len({abs(v) for row in weights(seed) for v in row}) == rows * columns
        seed = first_seed(distinct, 1000 * id)
        w = [[float(v) for v in row] for row in weights(seed)]
        return case(id, f"{rows} x {columns}", "Random", w, w_recipe=dyadic_recipe(seed, 11, -9), **knobs)

    return [draw(51, (3, 11), per_row=True), draw(52, (4, 8), pattern="2:4")]


def _rejected() -> list[CaseSpec]:
    fine = [[1.0, 2, 3, 4], [8, 7, 6, 5]]
    planted = lambda value: [[1.0, 2, 3, 4], [8, 7, value, 5]]
    return [
        invalid(70, "NaN", "NonFinite", "value", planted(math.nan)),
        invalid(71, "Inf", "NonFinite", "value", planted(math.inf), pattern="2:4"),
        invalid(73, "6 columns, 2:4", "WidthNotDividing", "shape", [[1.0, 2, 3, 4, 5, 6]], pattern="2:4"),
        invalid(74, "4 columns, 4:8", "WidthNotDividing", "shape", fine, pattern="4:8"),
        invalid(75, "65520 is kept", "ValueOverflow", "overflow", [[65520.0, 1], [2, 3]]),
        invalid(77, "sparsity 1.5", "BadParams", "value", fine, sparsity=1.5),
        invalid(79, "sparsity beside 2:4", "BadParams", "value", fine, pattern="2:4", sparsity=0.25),
        invalid(80, "4:2", "BadParams", "value", fine, pattern="4:2"),
        invalid(82, "a vector", "BadShape", "shape", [1.0, 2, 3, 4]),
    ]


def suite() -> SuiteSpec:
    """The suite prune/magnitude."""
    head = manifest_head(
        __name__,
        "prune/magnitude",
        "Pruning by magnitude: masks, kept values, bitmasks and 2:4 indices",
        _OWN + HEADER,
        "lessons/08-zeros-and-ranks.md",
        version="1.0.2",
    )
    source = {"kind": "first_principles", "name": "the header above, by sorting exact scores"}
    groups = (_plain(), _patterns(), _random(), _rejected())
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases) for cases in groups])
