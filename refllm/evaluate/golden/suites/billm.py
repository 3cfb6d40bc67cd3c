"""The suites quant/billm and quant/binary. Ids are never reused and never renumbered: new cases take new numbers."""

import math

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.billm_definition import Definition, Unclear, quantize, quantize_binary
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe, first_clear
from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs w, f32 [out, in]; x, f32 [n, in], the inputs of the layer. H = X^T X; an input that is always zero is "
    "dead: its H_jj becomes 1, its weights 0. damp times the mean of diag H is added to diag H. H^-1 = U^T U, U upper.",
    "Blocks of `block` columns in turn, the last may be shorter. In a block S = w^2 / U_cc^2 (by = hessian) or w (by "
    "= magnitude), M = S (search = importance) or w (search = weights), all of the weights as earlier blocks left "
    "them. braq(A, k), on some numbers of every row: k times take away the mean m, note the signs (an exact 0 is "
    "plus) and a = mean |.|, and take away +- a. Columns are ranked by the sum of |S|, equal ones by number. Salient "
    "are the first n: of n = 1 to min(49, columns) the first with the least squared error of braq(., 2) on M's first "
    "n columns and braq(., 2) on its others.",
    "p: of the 81 quantiles 0.10 to 0.90 (linear between neighbours) of |M| over the block, salient columns counted "
    "as zeros, the first with the least squared error of braq(., 1) on |M| < p and braq(., 1) on |M| >= p of the "
    "other columns.",
    "Then, with these groups, braq of w: 1 of near (|M| < p), 1 of far, 2 of salient weights. signs u8 [out, in]; "
    "second u8: the second sign in salient columns, elsewhere 1 = far; salient u8 [in]. mean f16 [out, blocks, 3] and "
    "scale f16 [out, blocks, 4]: near, far, salient (the sum of its two means), and the second scale of salient; 0 "
    "where a row has none. w_hat f32 = mean +- scale (+- second scale), each sum rounded.",
    "e = (w - w_hat) / U_cc of the block's columns; w_k -= e U_ck in all later blocks, and nowhere in the same block.",
    "NaN, infinities, inputs of another width and params out of range are rejected. Every decision that is not exact "
    "is clear: other splits have errors larger by 0.1 % at least.",
]
NOTES = {
    "SecondSign": note("BASIC", "Salient columns have two signs; the second is of what the first leaves."),
    "TwoMeans": note(
        "BASIC",
        "The second order has a mean of its own, which is added to the first.",
        "Salient weights off by a constant.",
    ),
    "Mean": note("BASIC", "Signs are of w less its group's mean; the scale is the mean distance from that mean."),
    "Groups": note("LAYOUT", "The second bit of other columns says which levels a weight has: 1 = far."),
    "Importance": note(
        "BASIC",
        "Columns are ranked by w^2 / U_cc^2, U_cc of the factor: not [H^-1]_cc, and not by w alone.",
        "Other columns get two signs.",
    ),
    "Searched": note("BASIC", "As published, n and p are searched on S, not on w."),
    "SearchWeights": note("BASIC", "search = weights: n and p are searched on w."),
    "Magnitude": note("BASIC", "by = magnitude: S is w with its sign; columns are ranked by the sum of |w|."),
    "OthersTwice": note("BASIC", "While n is searched, the other columns are tried with two signs, too."),
    "CountedZeros": note("OFF_BY_ONE", "Quantiles count the salient columns as zeros.", "A higher threshold."),
    "LaterBlocks": note("BASIC", "Errors go to later blocks.", "Plain binarisation."),
    "WithinBlock": note("BASIC", "Inside its block an error goes nowhere, other than in GPTQ."),
    "Refreshed": note(
        "ORDER",
        "S, groups, means and scales of a block are of its weights as earlier blocks left them.",
    ),
    "StoredNumbers": note("PRECISION", "Errors are of the decoded float16 levels."),
    "DeadInput": note("DEGENERATE", "The weights of a dead input become 0."),
    "Damping": note("BASIC", "damp times the mean of the diagonal is added to every H_jj."),
    "ZeroRow": note("DEGENERATE", "A row of zeros has means and scales of 0.", "NaN."),
    "ShortBlock": note("OFF_BY_ONE", "The last block has what columns are left."),
    "StableTies": note("ORDER", "Of equal columns the first is salient."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "BadParams": note("MALFORMED", "Params out of range are rejected."),
    "BadShape": note("SHAPE", "x has as many columns as w."),
    "Random": note("BASIC", "Dyadic random weights and inputs."),
}
_BITS = {"class": "bits", "zero_sign": "ignore"}
_SOURCE = {"kind": "first_principles", "name": "the header above, by elimination of H^-1 in fractions"}


def _expected(outputs: dict) -> dict[str, Output]:
    return {
        name: Output(_BITS if dtype[0] == "f" else {"class": "bits"}, values(dtype, nested))
        for name, (dtype, nested) in outputs.items()
    }


def _case(id, comment, flags, w, x, w_recipe=None, x_recipe=None, **params) -> CaseSpec:
    d = Definition(**params)
    inputs = {"w": values("f32", w, recipe=w_recipe), "x": values("f32", x, recipe=x_recipe)}
    given = {name: value for name, value in vars(d).items() if value != getattr(Definition, name)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, _expected(quantize(w, x, d)), params=given)


def _drawn(id, flags, shape, tokens, make=None, wanted=None, **params) -> CaseSpec:
    """A case on the first random weights and inputs all of whose decisions are clear."""
    rows, columns = shape
    cut = lambda flat: [[float(v) for v in flat[i : i + columns]] for i in range(0, len(flat), columns)]

    def made(seed):
        w, x = cut(dyadic(seed, 8, -5, rows * columns)), cut(dyadic(seed + 1, 4, -2, tokens * columns))
        recipes = [dyadic_recipe(seed, 8, -5), dyadic_recipe(seed + 1, 4, -2)]
        if make is not None:
            make(w, x)
            recipes = None, None
        case = _case(id, f"{rows} x {columns}", flags, w, x, *recipes, **params)
        if wanted is not None and not wanted(case):
            raise Unclear
        return case

    return first_clear(made, 1000 * id)


def _unit(n: int) -> list[list[float]]:
    return [[float(i == j) for j in range(n)] for i in range(n)]


def _uneven(w, x) -> None:
    for row in x:
        row[1], row[-1] = row[1] * 8, row[-1] / 4


def _dead(w, x) -> None:
    for row in x:
        row[2] = 0.0


def _outlier(w, x) -> None:
    """One large weight whose input is small, so that its column is not salient."""
    w[0][4] = 8.0
    for row in x:
        row[4] /= 64


def _zero_row(w, x) -> None:
    w[0] = [0.0] * len(w[0])


def _equal(w, x) -> None:
    """The second and the fourth column are the same in size, and so are their inputs."""
    for row in w:
        row[3] = -row[1]
    x[:] = _unit(len(x[0]))


def _one_of_two(case) -> bool:
    """Whether of the two equal columns one is salient."""
    salient = case.expected["salient"].tensor.array
    return salient[1] != salient[3]


def suite() -> SuiteSpec:
    """The suite quant/billm."""
    hand = [[1.0, -1, 3, -3, 8, -8, 8, -8]]
    cases = [
        _case(1, "two near, two far, four salient", "Groups Mean SearchWeights", hand, _unit(8), search="weights"),
        _drawn(3, "SecondSign Mean OthersTwice Magnitude", (2, 9), 12, _uneven, by="magnitude"),
        _drawn(4, "Importance Searched", (2, 9), 12, _uneven),
        _drawn(5, "CountedZeros", (2, 9), 12, _outlier, search="weights"),
        _drawn(10, "LaterBlocks WithinBlock TwoMeans Damping", (2, 14), 20, block=7, damp=0.5),
        _drawn(11, "ShortBlock StoredNumbers Refreshed Random", (2, 15), 20, block=9, search="weights"),
        _drawn(13, "DeadInput", (2, 9), 12, _dead, damp=0.125),
        _drawn(14, "ZeroRow", (3, 8), 12, _zero_row),
        _drawn(15, "StableTies", (2, 9), 1, _equal, _one_of_two, search="weights"),
    ]

    def bad(id, comment, flag, error, w, x, **params):
        inputs = {"w": values("f32", w), "x": values("f32", x)}
        return CaseSpec(id, comment, (flag,), inputs, result="invalid", error=error, params=params)

    rejected = [
        bad(30, "NaN in w", "NonFinite", "value", [[1.0, math.nan]], _unit(2)),
        bad(31, "Inf in x", "NonFinite", "value", [[1.0, 2.0]], [[1.0, math.inf]]),
        bad(32, "blocks of 0", "BadParams", "value", [[1.0, 2.0]], _unit(2), block=0),
        bad(33, "by = fisher", "BadParams", "value", [[1.0, 2.0]], _unit(2), by="fisher"),
        bad(34, "search = rows", "BadParams", "value", [[1.0, 2.0]], _unit(2), search="rows"),
        bad(35, "x has 3 columns", "BadShape", "shape", [[1.0, 2.0]], _unit(3)),
    ]
    head = manifest_head(
        __name__,
        "quant/billm",
        "BiLLM: weights and calibration inputs to signs, second bits, salient columns and levels",
        HEADER,
        "lessons/16-sub-2-bit.md",
    )
    group = {"params": dict(vars(Definition())), "source": _SOURCE}
    return SuiteSpec(head, NOTES, [(group, cases), (group, rejected)])


BINARY_HEADER = [
    "Input w, f32 [out, in]. Param group_size: g columns of a row, or -1, a row. m = mean of a group, a = mean |w - "
    "m|.",
    "codes u8 [out, in]: 1 where w >= m. scale f16 [out, groups] = 2 a and minimum f16 = m - a, both rounded. w_hat "
    "f32 = scale code + minimum. NaN, infinities and a g that does not divide the columns are rejected.",
]
BINARY_NOTES = {
    "Mean": note("BASIC", "Signs are around the mean of the group, not around 0."),
    "Scale": note("BASIC", "a is the mean distance, not the root of the mean square, nor the largest."),
    "Ties": note("ROUNDING", "A weight that is the mean counts as plus."),
    "Groups": note("LAYOUT", "g consecutive columns of a row share two numbers."),
    "ZeroRow": note("DEGENERATE", "Zeros stay zeros."),
    "NonFinite": note("NON_FINITE", "NaN and infinities are rejected."),
    "BadShape": note("SHAPE", "Groups that do not divide the columns are rejected."),
    "Random": note("BASIC", "Dyadic random weights."),
}


def binary_suite() -> SuiteSpec:
    """The suite quant/binary."""

    def case(id, comment, flags, w, group_size=-1):
        expected = _expected(quantize_binary(w, group_size))
        params = {"group_size": group_size}
        return CaseSpec(id, comment, tuple(flags.split()), {"w": values("f32", w)}, expected, params=params)

    def drawn(seed):
        flat = [float(v) for v in dyadic(seed, 10, -7, 24)]
        return case(20, "2 x 12 in groups of 6", "Random Groups", [flat[:12], flat[12:]], 6)

    cases = [
        case(1, "mean 4, mean distance 2.5", "Mean Scale", [[1.0, 2, 5, 8]]),
        case(2, "a weight that is the mean", "Ties", [[1.0, 2, 3], [-3, -2, -1]]),
        case(3, "two groups of two", "Groups", [[1.0, 3, -8, -2], [0.5, 0.25, 4, 2]], 2),
        case(4, "zeros", "ZeroRow", [[0.0, 0, 0, 0], [1, 1, -1, -1]]),
        first_clear(drawn, 20000),
    ]

    def bad(id, comment, flag, error, w, group_size):
        params = {"group_size": group_size}
        return CaseSpec(id, comment, (flag,), {"w": values("f32", w)}, result="invalid", error=error, params=params)

    rejected = [
        bad(30, "NaN", "NonFinite", "value", [[1.0, math.nan]], -1),
        bad(31, "3 columns in groups of 2", "BadShape", "shape", [[1.0, 2, 3]], 2),
    ]
    head = manifest_head(
        __name__,
        "quant/binary",
        "A sign for every weight, around the mean of its group",
        BINARY_HEADER,
        "lessons/16-sub-2-bit.md",
    )
    return SuiteSpec(head, BINARY_NOTES, [({"params": {}, "source": _SOURCE}, group) for group in (cases, rejected)])
