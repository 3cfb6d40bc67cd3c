"""The suite prune/wanda. Ids are never reused and never renumbered: new cases take new numbers."""

import math

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, manifest_head
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, first_clear
from refllm.evaluate.golden.suites.prune_definition import case, invalid
from refllm.evaluate.golden.suites.prune_notes import HEADER, NOTES, WANDA_NOTES

_OWN = [
    "Inputs w, f32 [out, in]; x, f32 [n, in], the inputs of the layer. Params: pattern (unstructured or N:M), "
    "sparsity, "
    "dtype of the stored values. Score: |w| times the L2 norm of the column of x, sqrt(sum of squares over its rows), "
    "compared within each row. No weight is changed.",
    "Scores that are not equal differ by 0.05 % at least; equal ones have norms that are exact.",
]
_ALIKE = ("StableTies SparsityFloor Scope Transposed KeptNotRemoved NibbleOrder FewNonzeros "
          "BitOrder OddSize RowOffsets "
          "ScoreBeforeRounding Random NonFinite WidthNotDividing ValueOverflow BadParams BadShape")  # fmt: skip
ONES = [[1.0] * 4]


def _plain() -> list[CaseSpec]:
    return [
        case(1, "the small weight on the large input stays", "NormNotMean NormAxis", [[4, 1, 3, 2]], [[1, 10, 1, 1]]),
        case(2, "norms 3, 5, 4: mean |x| orders them otherwise", "NormNotMean",
             [[1, 1, 1, 1], [1, 1, 2, 2.5], [-4, 2, -3, 4]], [[3, 5, 2, 1], [0, 0, 2, 1], [0, 0, -2, -1], [0, 0, 2,
                 1]]),
        case(3, "a large constant input: no variance", "NormNotMean", [[1, 1, 1, 1]],
             [[10, -5, 3, -1], [10, 5, -3, 1]]),
        case(4, "4 x 4 inputs: rows and columns of other norms", "NormAxis",
             [[2, 3, 5, 7], [8, 4, 2, 1], [1, 1, 1, 1], [1, 9, 4, 16]],
             [[12, 3, 0, 0], [5, 0, 0, 3], [0, 0, 1, 0], [0, 4, 0, 4]]),
        case(5, "rows of very different size lose the same number", "Scope RowOffsets",
             [[100, 200, 300, 400], [1, 4, 3, 2], [0.125, 0.5, 0.25, 1]], ONES),
        case(6, "norms 2 and 1: equal scores, the lowest column goes", "StableTies", [[1, 2, 2, 1, -2, 4], [3, 6, -3, 6,
             6, 3]], [[2, 1, 1, 2, 1, 0.5]], sparsity=0.5),
        case(7, "a dead input", "DeadInput", [[1000, 1, 2, 3], [-5, 0.5, 0.25, 1]], [[0, 4, 2, 1], [0, -3, 2, 3]],
             sparsity=0.25),
        case(9, "squares of 2^70 and 2^-80", "StatisticRange", [[1, 2, 3, 4], [4, 3, 2, 1]],
             [[2.0**70, 2.0**70, 2.0**-80, 2.0**-80], [0, 0, 2.0**-80, 2.0**-80]], sparsity=0.75),
        case(10, "0.4 of 7 is 2", "SparsityFloor OddSize", [[7, 6, 5, 4, 3, 2, 1]], [[1, 1, 1, 1, 1, 8, 16]],
             sparsity=0.4),
        case(11, "9 columns: rows of two bytes", "OddSize BitOrder RowOffsets",
             [[9, 1, 1.5, 8, 7, 2, 3, 2.5, 10], [1, 12, 13, 2, 3, 14, 15, 16, 0.5]], [[1, 4, 1, 1, 2, 1, 1, 1, 1]],
             sparsity=0.4),
        case(12, "a weight that goes is beyond float16", "ValueOverflow DeadInput", [[1e6, 1, 2, 3]], [[0, 1, 1, 1]]),
        case(13, "two weights that round to one float16", "ScoreBeforeRounding", [[2056.75, 2055.25, 1, 1.5]], ONES,
             sparsity=0.75),
    ]  # fmt: skip


def _patterns() -> list[CaseSpec]:
    square = [[8, 7, 6, 5], [4, 3, 2, 1], [1, -9, 2, 8], [9, 1, 8, 2]]
    inputs = [[0.5, 1, 0.25, 2]]
    return [
        case(30, "2:4", "Transposed NibbleOrder", square, inputs, pattern="2:4"),
        case(32, "1:4 keeps one", "KeptNotRemoved Transposed", square, inputs, pattern="1:4"),
        case(33, "2:4: dead inputs leave one in four, or none", "FewNonzeros DeadInput StableTies",
             [[3, 0, 0, 0, 0, 2, 0, 0, 5, 6, 7, 8]], [[1] * 8 + [0] * 4], pattern="2:4"),
    ]  # fmt: skip


def _random() -> list[CaseSpec]:
    def draw(id, shape, tokens, **knobs):
        rows, columns = shape

        def made(seed):
            cut = lambda flat: [[float(v) for v in flat[i : i + columns]] for i in range(0, len(flat), columns)]
            w, x = cut(dyadic(seed, 9, -6, rows * columns)), cut(dyadic(seed + 1, 7, -4, tokens * columns))
            recipes = {"w_recipe": dyadic_recipe(seed, 9, -6), "x_recipe": dyadic_recipe(seed + 1, 7, -4)}
            comment = f"{rows} x {columns}, {tokens} rows of inputs"
            return case(id, comment, "Random NormNotMean", w, x, **recipes, **knobs)

        return first_clear(made, 1000 * id)

    return [draw(50, (3, 10), 6, sparsity=0.4), draw(51, (2, 12), 9, pattern="2:4")]


def _rejected() -> list[CaseSpec]:
    fine, nan = [[1.0, 2, 3, 4], [8, 7, 6, 5]], math.nan
    return [
        invalid(70, "NaN in w", "NonFinite", "value", [[1.0, nan, 3, 4]], ONES),
        invalid(71, "NaN in x", "NonFinite", "value", fine, [[1.0, 1, nan, 1]]),
        invalid(73, "6 columns, 2:4", "WidthNotDividing", "shape", [[1.0, 2, 3, 4, 5, 6]], [[1.0] * 6], pattern="2:4"),
        invalid(74, "x has 3 columns", "BadShape", "shape", fine, [[1.0, 2, 3]]),
        invalid(75, "x has one column", "BadShape", "shape", fine, [[1.0], [2.0]]),
        invalid(76, "65520 is kept", "ValueOverflow", "overflow", [[65520.0, 1, 2, 3]], ONES),
        invalid(77, "sparsity 1.5", "BadParams", "value", fine, ONES, sparsity=1.5),
        invalid(78, "sparsity beside 2:4", "BadParams", "value", fine, ONES, pattern="2:4", sparsity=0.25),
    ]


def suite() -> SuiteSpec:
    """The suite prune/wanda."""
    head = manifest_head(
        __name__,
        "prune/wanda",
        "Pruning by weight times input norm: masks, kept values, bitmasks and 2:4 indices",
        _OWN + HEADER,
        "lessons/08-zeros-and-ranks.md",
        version="1.0.2",
    )
    source = {"kind": "first_principles", "name": "the header above, by sorting exact squares of scores"}
    notes = WANDA_NOTES | {name: NOTES[name] for name in _ALIKE.split()}
    groups = (_plain(), _patterns(), _random(), _rejected())
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases) for cases in groups])
