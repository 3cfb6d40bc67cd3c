"""The suite quant/gptq. Ids are never reused and never renumbered: new cases take new numbers."""

import math

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec, manifest_head
from refllm.evaluate.golden.suites.gptq_definition import Definition, case, invalid, random_case
from refllm.evaluate.golden.suites.gptq_notes import HEADER, NOTES

IDENTITY = [[float(i == j) for j in range(4)] for i in range(4)]
EQUAL = [[1, 0, 0], [0, 1, 1]]  # the second and third input are one and the same
SMALL = [[0.125, 0.125, 0, 0.0625], [0, 0.125, 0, 0.125], [0.0625, 0, 0, 0.125]]


def _valid() -> list[CaseSpec]:
    return [
        case(1, "two equal inputs: the third weight takes over", "Compensation", [[3, 0.375, 0.375]], EQUAL, bits=2),
        random_case(2, "blocks of 2, damped by half", "Compensation UpperFactor Damping LaterBlocks", (2, 7), 9, bits=3,
                    damp=0.5, block=2),
        case(3, "a dead input with a large weight", "DeadInput", [[0.5, -1, 90, 2.25], [1, 0.75, -7, -1.5]],
             [[2, 1, 0, 1], [0, 1, 0, -1], [1, 0, 0, 3]]),
        case(4, "dead inputs weigh in the mean", "DeadDamping", [[1, -0.4375, 5, 0.6875], [0.8125, 0.3125, 1, -1],
             [-0.25, 0.8125, 0, 1], [1, 0.40625, 0, 0.5]], SMALL, bits=2, damp=0.125),
        case(5, "scale 1 + 2^-11 - 2^-16 stored as 1", "ScaleRoundedFirst",
             [[255 * (1 + 2.0**-11 - 2.0**-16), 200.5625, 128, 64]], IDENTITY, bits=8),
        random_case(20, "act-order in groups of 2", "ActOrder GroupIndex", (2, 6), 8, group_size=2, act_order=True),
        case(21, "of equal inputs the first comes first", "ActOrderTies GroupIndex", [[1, 0.375, -0.8125, 2]],
             [[1, 1, 2, 2], [1, -1, 0, 1], [1, -1, 0, -1], [1, -1, 0, 1]], bits=3, group_size=2, act_order=True),
        random_case(22, "static groups, act-order", "StaticGroups ActOrder", (2, 6), 8, bits=3, group_size=3,
                    static_groups=True, act_order=True),
        random_case(30, "groups of 2 in blocks of 4", "PublishedGroups", (2, 8), 10, bits=3, group_size=2, block=4),
        random_case(31, "groups of 2 in blocks of 4, updated", "UpdatedGroups", (2, 8), 10, bits=3, group_size=2,
                    block=4, group_grid="updated"),
        random_case(40, "one scale, symmetric", "PerTensor FullRange", (3, 4), 6, bits=3, group_size=0, symmetric=True),
        case(41, "symmetric, positive", "OneSign FullRange", [[1, 2.875, 0.5, 1.75]], [[1, 1, 0, 0], [0, 1, 1, 0],
             [0, 0, 1, 1], [1, 0, 0, 2]], bits=3, symmetric=True),
        case(42, "a row of zeros", "ZeroGroup", [[0, 0, 0, 0], [1, -0.75, 0.5, 0.1875]],
             [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 2]]),
        random_case(43, "float32 scales", "Float32Scale", (2, 4), 6, bits=5, scale_dtype="float32"),
        case(44, "the largest weight is a tie in float32, below it in float64", "FloatQuotient FullRange",
             [[-3, 1, 0.5, 2], [-11, 4, 7, 1]], IDENTITY, near=True, symmetric=True, scale_dtype="float32"),
        random_case(50, "5 x 16, groups of 4, act-order, blocks of 6", "Random", (5, 16), 20, group_size=4,
                    act_order=True, block=6),
    ]  # fmt: skip


def _rejected() -> list[CaseSpec]:
    fine, nan = [[1.0, 2, 3, 4], [8, 7, 6, 5]], math.nan
    return [
        invalid(70, "NaN in w", "NonFinite", "value", [[1.0, nan, 3, 4]], IDENTITY),
        invalid(71, "Inf in x", "NonFinite", "value", fine, [[1.0, math.inf, 1, 1]]),
        invalid(73, "4 columns in groups of 3", "GroupNotDividing", "shape", fine, IDENTITY, group_size=3),
        invalid(74, "2 tokens, no damping", "Singular", "value", fine, [[1.0, 2, 0, 1], [0, 1, 1, 3]], damp=0.0),
        invalid(75, "scale 65520", "ScaleOverflow", "overflow", [[15 * 65520.0, 0, 1, 2]], IDENTITY),
        invalid(77, "damp -1", "BadParams", "value", fine, IDENTITY, damp=-1.0),
        invalid(79, "group_grid fixed", "BadParams", "value", fine, IDENTITY, group_grid="fixed"),
        invalid(80, "x has 3 columns", "BadShape", "shape", fine, [[1.0, 2, 3]]),
        invalid(81, "a vector", "BadShape", "shape", [1.0, 2, 3, 4], IDENTITY),
    ]


def suite() -> SuiteSpec:
    """The suite quant/gptq."""
    head = manifest_head(
        __name__,
        "quant/gptq",
        "GPTQ: weights and calibration inputs to codes, scales, zero points and the group of each input",
        HEADER,
        "lessons/10-gptq.md",
        version="1.1.0",
    )
    source = {"kind": "first_principles", "name": "the header above, by elimination of H^-1 in fractions"}
    groups = (_valid(), _rejected())
    return SuiteSpec(head, NOTES, [({"params": dict(vars(Definition())), "source": source}, cases) for cases in groups])
