"""The flags of prune/magnitude and prune/wanda: which mistake a failing case points at."""

from refllm.evaluate.golden.suites.rtn_notes import note

HEADER = [
    "sparsity is the fraction removed, 0.5 unless given. unstructured: int(sparsity * n) weights go (the product as "
    "float64 has it, its fraction cut off), n the columns per row or the elements of the matrix. N:M: of every M "
    "consecutive columns of a row the N highest scores stay; sparsity is then not allowed, and M must divide the "
    "columns.",
    "Lowest scores go first, among equal ones the lowest index (over the matrix: in row-major order). Scores are "
    "those of "
    "w as given, before anything is rounded to dtype.",
    "Outputs: mask u8 [out, in], 1 = kept; values, the kept weights rounded to dtype (nearest, ties to even). "
    "unstructured, and N:M but 2:4: values [kept], row-major; bitmask u8 [out, ceil(in / 8)], one bit a "
    "weight, low bit first, unused bits 0; row_offsets u32 [out], where the values of each row begin.",
    "2:4: values [out, in / 2]; indices u8 [out, ceil(in / 8)], a nibble first | second << 2 (first < second, columns "
    "within the group) per group of four, low nibble first. Two columns of every group are kept, zeros if need "
    "be. Declare "
    "zeros=filled_up if yours names the columns that are not zero and fills up with column 2, else 3.",
    "Signs of zero do not count. NaN and infinities, a kept value beyond dtype, and params out of range are rejected.",
]

NOTES = {
    "StableTies": note(
        "ORDER",
        "Equal scores: the lowest index goes first, and exactly as many go as were asked for.",
        "Masks that differ between machines and sort algorithms.",
    ),
    "Threshold": note(
        "OFF_BY_ONE",
        "A count, not a threshold: score <= sorted[k] removes k + 1 weights, and every one that equals it.",
        "More zeros than asked for; a matrix of equal weights vanishes.",
    ),
    "SparsityFloor": note(
        "OFF_BY_ONE",
        "int(sparsity * n) in float64: 0.5 of 5 is 2, 0.4 of 7 is 2, 0.7 of 10 is 7.",
        "One weight too many or too few per row.",
    ),
    "Scope": note(
        "LAYOUT",
        "Where scores are compared: within each row, or over the whole matrix.",
        "A small row vanishes, or a large one is cut that should have stayed.",
    ),
    "Transposed": note(
        "LAYOUT",
        "Weights are [out, in]: groups of M and rows run along `in`, the axis that is summed over.",
        "A plausible mask that no sparse unit can run.",
    ),
    "KeptNotRemoved": note(
        "OFF_BY_ONE",
        "N of N:M is the number kept. Wanda's and SparseGPT's code call the number removed n.",
        "1:4 keeps three times too much; 2:4 and 4:8 hide it.",
    ),
    "NibbleOrder": note(
        "LAYOUT",
        "A nibble is first | second << 2 with first < second, and the first group of a byte sits in its low nibble.",
        "Weights move to other columns of their group.",
    ),
    "FewNonzeros": note(
        "DEGENERATE",
        "Groups of four with fewer than two weights that are not zero still name two different columns.",
        "An index pair (0, 0): the value is written twice, or the wrong one is overwritten by 0.",
    ),
    "BitOrder": note(
        "LAYOUT", "The first column of a row is the lowest bit of its first byte.", "Columns are mirrored."
    ),
    "OddSize": note(
        "SHAPE",
        "Rows whose bits do not fill whole bytes: each row starts on a byte of its own, unused bits are zero.",
        "Rows after the first are shifted.",
    ),
    "RowOffsets": note(
        "OFF_BY_ONE",
        "Rows keep different numbers of weights, some none at all: offsets begin at 0 and count kept weights, "
        "not bytes.",
        "A row reads another row's values.",
    ),
    "Magnitude": note("BASIC", "|w|: large negative weights are large.", "Every negative weight is removed."),
    "ValueRounding": note(
        "ROUNDING", "Kept values round to the nearest float16, ties to even.", "Values one step off."
    ),
    "ScoreBeforeRounding": note(
        "PRECISION",
        "Scores come from the weights as given: two that round to one float16 are still ordered.",
        "The smaller one is kept.",
    ),
    "Float32Values": note("PRECISION", "dtype float32: the values are those of w, bit for bit."),
    "Everything": note("DEGENERATE", "sparsity 0 keeps all, 1 keeps nothing.", "Empty arrays or off-by-one slices."),
    "Random": note("BASIC", "Random weights, no two scores equal."),
    "NonFinite": note(
        "NON_FINITE", "NaN cannot be ranked; infinities cannot be stored.", "NaN sorts last: it is kept."
    ),
    "WidthNotDividing": note(
        "SHAPE", "M must divide the columns: no shorter last group.", "A tail that is not pruned."
    ),
    "ValueOverflow": note(
        "OVERFLOW", "A kept value beyond float16 is rejected; one that goes may be as large as it likes.", "Infinities."
    ),
    "BadParams": note("MALFORMED", "An unknown pattern, sparsity outside [0, 1], sparsity beside N:M."),
    "BadShape": note("SHAPE", "A weight is a matrix with elements; inputs have as many columns as the weight."),
}
WANDA_NOTES = {
    "NormNotMean": note(
        "BASIC",
        "The statistic of an input is its L2 norm over the rows of x: not the mean of |x|, its maximum, or the "
        "variance.",
        "The mask of another method.",
    ),
    "NormAxis": note(
        "LAYOUT",
        "One norm a column of x, over its rows, multiplied onto the columns of w.",
        "With a square x the wrong norms fit.",
    ),
    "DeadInput": note(
        "DEGENERATE",
        "An input that is always zero: its weights have score 0 and go first, whatever their size.",
        "0 / 0, or large useless weights that stay.",
    ),
    "StatisticRange": note(
        "OVERFLOW",
        "Sums of squares beyond float32, and below its smallest number: accumulate in float64.",
        "Infinite or zero norms: all those weights tie.",
    ),
}
