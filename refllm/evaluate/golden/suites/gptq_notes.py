"""The flags of quant/gptq: which mistake a failing case points at."""

from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "Inputs w, f32 [out, in]; x, f32 [n, in], the inputs of the layer. H = X^T X. An input that is always zero is"
    " dead: its H_jj becomes 1, its weights 0. act_order: columns are then taken in descending order of H_jj, "
    "equal ones in their own order; else in their own. damp times the mean of diag H (dead ones counted) is added"
    " to diag H.",
    "With H^-1 = U^T U, U upper, each column in turn: q = rounded w_j, e = (w_j - q) / U_jj, and w_k -= e U_jk "
    "for all later k: the least-squares answer. Sums in float64 or better; every rounding decision of a value "
    "that is not exact lies 0.001 steps or more from its boundary.",
    "Grids: affine lo = min(w, 0), hi = max(w, 0), scale = (hi - lo) / (2^bits - 1), zero_point = clip(rint(-lo /"
    " scale), 0, 2^bits - 1); symmetric scale = 2 amax / (2^bits - 1), zero point 2^(bits-1), not returned. An "
    "all-zero group has lo -1, hi 1. The scale is rounded to scale_dtype before it is used. code = clip(rint(w / "
    "scale) + zero_point, 0, 2^bits - 1), q = scale * (code - zero_point). Both quotients are rounded to float32 "
    "before rint.",
    "group_size -1 is one grid a row, 0 one for the tensor, from w (dead ones zero). g > 0: g columns consecutive"
    " in the order in which they are taken; the grid of a group is fitted when its first column is reached, "
    "group_grid updated: to the weights as all columns before have left them; published: as the columns of the "
    "blocks before have left them (blocks of `block` columns in the order taken), as the published code does. "
    "static_groups: groups of g consecutive columns of w, fitted to w before anything is rounded.",
    "Outputs: codes u8 [out, in], in the order of w's columns; scale [out, groups] ([1, 1] per tensor); "
    "zero_point u8 of that shape unless symmetric; g_idx i32 [in], the group of each input, where "
    "act_order permutes groups.",
    "NaN, infinities, a group size that does not divide the columns, inputs of another width, a singular H and "
    "params out of range are rejected.",
]

NOTES = {
    "Compensation": note(
        "BASIC",
        "Later columns take over what rounding took from a column.",
        "Plain rounding: the right size, several times the error.",
    ),
    "UpperFactor": note(
        "LAYOUT",
        "U is the upper factor of H^-1 = U^T U. NumPy's cholesky gives the lower one: U = cholesky(inv(H)).T. "
        "Neither the factor of H nor H^-1 itself will do.",
        "Plausible codes that are worse than rounding.",
    ),
    "Damping": note(
        "BASIC", "damp times the mean of the diagonal is added to every H_jj.", "Codes of another damping."
    ),
    "DeadInput": note(
        "DEGENERATE",
        "The weights of a dead input become 0 before any grid is fitted.",
        "A useless weight widens the grid of its whole row.",
    ),
    "DeadDamping": note(
        "DEGENERATE",
        "Dead inputs get their 1 first and are then counted in the mean that damps.",
        "Less damping where inputs are small.",
    ),
    "ActOrder": note(
        "LAYOUT",
        "act_order takes the largest H_jj first, and the codes go back to the order of w.",
        "Ascending order, or columns that stay permuted.",
    ),
    "ActOrderTies": note("ORDER", "Equal H_jj: the first column first.", "Other groups on every machine."),
    "GroupIndex": note(
        "LAYOUT",
        "With act_order a group holds the columns taken one after another: g_idx is a permuted map.",
        "Every reader that takes i // g decodes garbage.",
    ),
    "StaticGroups": note(
        "LAYOUT",
        "static_groups are those of w's own columns, with grids from w itself, whatever order they are taken in.",
        "Grids of permuted columns.",
    ),
    "PublishedGroups": note(
        "ORDER",
        "published: a group that opens inside a block is fitted to weights that lack the errors of this block.",
        "Other scales than the published code writes.",
    ),
    "UpdatedGroups": note("ORDER", "updated: a group's grid sees every error passed on so far.", "Stale grids."),
    "LaterBlocks": note(
        "OFF_BY_ONE",
        "At the end of a block all its errors reach the later blocks.",
        "Compensation that ends too early.",
    ),
    "ScaleRoundedFirst": note(
        "PRECISION",
        "Codes and errors are computed with the scale as it is stored.",
        "Codes of large weights off by one.",
    ),
    "Float32Scale": note("PRECISION", "scale_dtype float32: the scale keeps its bits."),
    "FloatQuotient": note(
        "PRECISION",
        "w / scale is rounded to float32 before rint. The largest weight of a symmetric group lies half a step from "
        "its code: a tie in float32, and in float64 whatever the last bit of the stored scale makes of it.",
        "The largest weight one code off in some groups, and what compensates for it.",
        "IST-DASLab/gptq/blob/main/quant.py",
    ),
    "FullRange": note(
        "OFF_BY_ONE",
        "symmetric: scale 2 amax / (2^bits - 1) and all codes in use, 0 too; not amax / (2^(bits-1) - 1).",
        "Steps a fifteenth too wide at 4 bits.",
    ),
    "OneSign": note(
        "DEGENERATE",
        "symmetric, no negative weight: the same formula. The published code halves the scale and clips.",
        "The largest weights of the group are halved.",
    ),
    "ZeroGroup": note("DEGENERATE", "An all-zero group: the grid of lo -1, hi 1, and codes that mean 0.", "NaN."),
    "PerTensor": note("LAYOUT", "group_size 0: one scale for the whole tensor, shape [1, 1]."),
    "Random": note("BASIC", "Random weights and inputs, every decision clear."),
    "NonFinite": note("NON_FINITE", "NaN and infinities in w or x are rejected.", "NaN spreads over the row."),
    "GroupNotDividing": note("SHAPE", "group_size must divide the columns.", "A short last group."),
    "Singular": note(
        "DEGENERATE", "An undamped H of fewer tokens than inputs is rejected.", "Division by nearly zero."
    ),
    "ScaleOverflow": note("OVERFLOW", "A scale beyond float16 is rejected.", "Infinite scales."),
    "BadParams": note("MALFORMED", "bits outside 2..8, a negative damp, an unknown group_grid, a block below 1."),
    "BadShape": note("SHAPE", "A weight is a matrix with elements; inputs have as many columns as the weight."),
}
