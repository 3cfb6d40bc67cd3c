"""The suites quant/pq, quant/aqlm and finish/vqllm. Ids are never reused: new cases take new numbers."""

import math
from collections import Counter
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, dyadic, first_clear
from refllm.evaluate.golden.suites.rtn_notes import note

BITS = {"class": "bits"}
SOURCE = {"kind": "first_principles", "name": "the header above, in exact fractions"}
NON_FINITE = note("NON_FINITE", "NaN and infinities are rejected.")
BAD_SHAPE = note("SHAPE", "Columns that vectors or spans do not divide.")

# --- pq --------------------------------------------------------------------------------------------------------------

PQ_HEADER = [
    "Input w, f32 [out, in]. Params: bits, vector (d), books (M), spans (0: one for every vector). B = bits d / M.",
    "s of a row = its root mean square, rounded to float16. Its columns, divided by s, are cut into vectors of d; "
    "every span of in / spans columns has M codebooks of 2^B vectors. Codebook m is the k-means of what the ones "
    "before it leave, weighted by s^2, rounded to float16.",
    "Expected are weights whose vectors are clusters that any k-means with distinct seeds must find: as many different "
    "vectors as centres. Codes and the order of vectors are free: compared are w_hat f32 [out, in], and nbytes i64 [], "
    "the bytes of codes (rows of whole bytes), of float16 codebooks and of float16 scales.",
    "NaN and infinities, d or spans that do not divide the columns, and M that does not divide bits d are rejected.",
]
PQ_NOTES = {
    "Columns": note("LAYOUT", "Vectors run along `in`, not along `out`."),
    "Scale": note("BASIC", "Rows are scaled to a root mean square of 1, and scaled back.", "Small rows vanish."),
    "Spans": note("LAYOUT", "Each span has its own codebooks.", "Vectors of one place decoded by the book of another."),
    "Residual": note("BASIC", "The second codebook codes what the first one leaves, and is added."),
    "ZeroRow": note("DEGENERATE", "A row of zeros stays zeros, without NaN."),
    "Bytes": note("BASIC", "Codebooks and scales count."),
    "NonFinite": NON_FINITE,
    "BadShape": BAD_SHAPE,
}  # fmt: skip


def _nbytes(shape, bits, d, M, spans) -> int:
    rows, columns = shape
    B = bits * d // M
    return rows * -(-columns // d * M * B // 8) + 2 * spans * M * (1 << B) * d + 2 * rows


def _pq(id, comment, flags, w, bits=1, d=2, M=1, spans=1, w_hat=None) -> CaseSpec:
    params = {"bits": bits, "vector": d, "books": M, "spans": spans}
    shape = len(w), len(w[0])
    expected = {
        "w_hat": Output({"class": "bits", "zero_sign": "ignore"}, values("f32", w_hat or w)),
        "nbytes": Output(BITS, values("i64", _nbytes(shape, bits, d, M, spans or shape[1] // d))),
    }
    return CaseSpec(id, comment, tuple(flags.split()), {"w": values("f32", w)}, expected, params=params)


def pq_suite() -> SuiteSpec:
    """The suite quant/pq."""
    plain = [[1.0, 1, -1, 1, 1, -1, -1, -1], [-1, 1, 1, 1, -1, -1, 1, -1]]
    sized = [[256 * x for x in plain[0]], [x / 64 for x in plain[1]]]
    # Rows of eight whose squares add up to 8.
    three = [[2.0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 2, 0, 1, 1, 1, 1]]
    spans = [[2.0, 0, 0, 1, 1, 1, 1, 0], [0, 2, 1, 0, -1, 1, 0, 1]]
    cases = [
        _pq(1, "four different vectors of two columns, four centres", "Columns Bytes", plain, bits=1, d=2),
        _pq(2, "rows of 256 and of 1/64", "Scale", sized),
        _pq(3, "three different vectors, repeated", "Columns", three),
        _pq(4, "spans of two vectors, each with centres of its own", "Spans Bytes", spans, bits=1, d=2, spans=2),
        _pq(5, "one codebook for every vector of columns", "Spans Bytes", spans, bits=1, d=2, spans=0),
        _pq(6, "a row of zeros", "ZeroRow", [[0.0] * 8, plain[0]]),
        _pq(7, "nothing but zeros", "ZeroRow", [[0.0] * 4]),
        _pq(8, "two codebooks: nothing is left for the second", "Residual Bytes", [[1.0, 1, -1, -1] * 2],
            d=2, M=2),
    ]  # fmt: skip

    def bad(id, comment, flag, error, w, **params):
        params = {"bits": 2, "vector": 2, "books": 1, "spans": 1} | params
        return CaseSpec(id, comment, (flag,), {"w": values("f32", w)}, result="invalid", error=error, params=params)

    rejected = [
        bad(30, "NaN", "NonFinite", "value", [[1.0, math.nan]]),
        bad(31, "3 columns, vectors of 2", "BadShape", "shape", [[1.0, 2, 3]]),
        bad(32, "8 columns, vectors of 2, 3 spans", "BadShape", "shape", [[1.0] * 8], spans=3),
        bad(33, "4 bits of a vector for 3 books", "BadShape", "value", [[1.0] * 8], books=3),
    ]
    return _suite("quant/pq", "quant.pq", "Codes of vectors by k-means", PQ_HEADER, PQ_NOTES, cases, rejected)


def _suite(name, op, title, header, notes, *groups) -> SuiteSpec:
    head = manifest_head(__name__, name, title, header, "lessons/15-vector-codes.md", op=op)
    return SuiteSpec(head, notes, [({"params": {}, "source": SOURCE}, list(cases)) for cases in groups if cases])


# --- aqlm: one search ------------------------------------------------------------------------------------------------

AQLM_HEADER = [
    "One pass of the search for codes with a beam of 1. Inputs: w f32 [out, in]; h f64 [in, in], X^T X; books f32 "
    "[M, K, d]; codes u8 [out, in / d, M]; scale f32 [out, 1]. No params.",
    "w_hat = scale (sum of books[m, code[m]]), group after group of d columns. For j = 0, 1, .. and for each j for "
    "m = 0, 1, ..: in every row code (j, m) becomes the one with the smallest loss tr((w_hat - w) h (w_hat - w)^T) of "
    "the row, all other codes as they are by then; of equal ones the lowest.",
    "Outputs: codes u8; loss f64 [], the sum over rows at the end. All numbers are dyadic and exact in float64; the "
    "best candidate is apart from the next by 2^-20 at least, or equal to it.",
]
AQLM_NOTES = {
    "OffDiagonal": note("BASIC", "Codes of other groups act through h off its diagonal.", "k-means with extra steps."),
    "Metric": note("BASIC", "Within a group, too, distances are measured by h.", "Nearest in the plain sense."),
    "InOrder": note("ORDER", "A later group sees the codes that earlier ones have just been given."),
    "Sum": note("BASIC", "A vector is the sum over codebooks, and the others stay while one is chosen."),
    "Scale": note("BASIC", "The row's scale multiplies the vectors."),
    "Ties": note("ROUNDING", "Of equal candidates the lowest code."),
    "Random": note("BASIC", "Dyadic random numbers."),
}  # fmt: skip


def search(w, h, books, codes, scale):
    """Codes after one pass, the loss, and how far the nearest decision was from another one."""
    d, columns = len(books[0][0]), len(w[0])
    margins, total, found = [], Fraction(0), []
    for row, code, s in zip(w, codes, scale, strict=True):
        code = [list(group) for group in code]

        def row_loss(code=code, row=row, s=s):
            off = [
                s * sum((book[k][i % d] for book, k in zip(books, code[i // d], strict=True)), Fraction(0)) - row[i]
                for i in range(columns)
            ]
            return sum(off[i] * h[i][k] * off[k] for i in range(columns) for k in range(columns))

        for group in code:
            for m, book in enumerate(books):
                tried = []
                for k in range(len(book)):
                    group[m] = k
                    tried.append(row_loss())
                group[m] = tried.index(min(tried))
                margins += [t - min(tried) for t in tried if t != min(tried)]
        total += row_loss()
        found.append(code)
    return found, total, min(margins)


def _search_case(id, comment, flags, w, h, books, codes, scale) -> CaseSpec:
    exact = lambda nested: [exact(x) for x in nested] if isinstance(nested, list) else Fraction(nested)
    found, total, margin = search(exact(w), exact(h), exact(books), codes, exact(scale))
    if margin < Fraction(1, 1 << 20):
        raise Unclear("two candidates are nearly alike")
    inputs = {
        "w": values("f32", w), "h": values("f64", h), "books": values("f32", books), "codes": values("u8", codes),
        "scale": values("f32", [[s] for s in scale]),
    }  # fmt: skip
    expected = {
        "codes": Output(BITS, values("u8", found)),
        "loss": Output({"class": "allclose", "rtol": 1e-12, "atol": 1e-12}, values("f64", float(total))),
    }
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected)


def _search_random(id, shape, d, M, K) -> CaseSpec:
    rows, columns = shape

    def made(seed):
        flat = iter([float(x) for x in dyadic(seed, 8, -5, 2000)])
        matrix = lambda r, c: [[next(flat) for _ in range(c)] for _ in range(r)]
        w, x = matrix(rows, columns), matrix(columns + 2, columns)
        h = [[sum(r[i] * r[k] for r in x) for k in range(columns)] for i in range(columns)]
        books = [matrix(K, d) for _ in range(M)]
        codes = [[[(r + 3 * j + m) % K for m in range(M)] for j in range(columns // d)] for r in range(rows)]
        scale = [[1.0, 0.5, 2.0][r % 3] for r in range(rows)]
        flags = "Random OffDiagonal Metric InOrder Scale" + (" Sum" if M > 1 else "")
        return _search_case(
            id, f"{rows} x {columns}, {M} books of {K} vectors of {d}", flags, w, h, books, codes, scale
        )

    return first_clear(made, 1000 * id)


def aqlm_suite() -> SuiteSpec:
    """The suite quant/aqlm."""
    unit = [[float(i == k) for k in range(4)] for i in range(4)]
    pulled = [[1.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 1]]  # columns 0 and 2 act together
    long = [[1.0, 0], [0, 16.0]]
    book = [[[0.0, 0], [1, 1], [2, 0], [-1, 1]]]
    start = lambda M=1: [[[0] * M, [0] * M]]
    cases = [
        _search_case(1, "h = 1: the nearest vectors", "Scale", [[1.75, 0.5, -1, 0.75]], unit, book, start(), [1.0]),
        _search_case(2, "an error in column 0 is made good in column 2", "OffDiagonal InOrder",
                     [[1.5, 0.25, 0.25, 0.5]], pulled, book, start(), [1.0]),
        _search_case(3, "the second column counts 16 times", "Metric", [[2.0, 0.75]], long, book, [[[0]]], [1.0]),
        _search_case(4, "two books of halves", "Sum", [[2.25, 1, 0.75, -0.5]], unit,
                     [book[0], [[0.0, 0], [0.5, 0], [0, -0.5], [-0.5, 0.5]]], start(2), [1.0]),
        _search_case(5, "scales 2 and 1/2", "Scale", [[2.0, 2, 4, 0], [0.5, 0.5, -0.5, 0.5]], unit, book, start() * 2,
                     [2.0, 0.5]),
        _search_case(6, "a vector that stands twice", "Ties", [[1.0, 1, 0, 0]], unit,
                     [[[3.0, 3], [1, 1], [1, 1], [0, 0]]], [[[2], [3]]], [1.0]),
        _search_random(20, (3, 6), 2, 1, 4),
        _search_random(21, (4, 8), 2, 2, 4),
        _search_random(22, (3, 8), 4, 2, 6),
    ]  # fmt: skip
    return _suite(
        "quant/aqlm", "quant.aqlm.search", "Additive codes: one pass of the search", AQLM_HEADER, AQLM_NOTES, cases
    )


# --- vqllm -----------------------------------------------------------------------------------------------------------

VQLLM_HEADER = [
    "Inputs: codes u8 [out, in / d, M], books f32 [spans, M, K, d]; group j belongs to span j spans / (in / d). "
    "Params: registers and shared, in bytes.",
    "In every book the vectors are sorted by how many codes name them, the most first, equal ones in their order. "
    "Outputs: books f32 and codes u8, renamed, which decode to the same weight; hits f64 [3], the fractions of all "
    "codes below n1 = registers / (4 M d), from n1 on and below n2 = n1 + shared / (4 M d), and above (quotients "
    "rounded down, at most K).",
]
VQLLM_NOTES = {
    "Renamed": note("BASIC", "Codes are renamed with the vectors: by the inverse of the order.", "Another weight."),
    "PerBook": note("LAYOUT", "Every book of every span has an order of its own."),
    "StableOrder": note("ORDER", "Vectors used equally often keep their order."),
    "Unused": note("DEGENERATE", "Vectors that no code names go to the end; they are not dropped."),
    "Levels": note("OFF_BY_ONE", "A code is a hit if it is below the bound; a vector of every book must fit."),
}  # fmt: skip


def _vqllm_case(id, comment, flags, codes, books, registers=16, shared=32) -> CaseSpec:
    spans, M, K, d = len(books), len(books[0]), len(books[0][0]), len(books[0][0][0])
    groups = len(codes[0])
    of = lambda j: j * spans // groups
    order = {}
    for s in range(spans):
        for m in range(M):
            uses = Counter(row[j][m] for row in codes for j in range(groups) if of(j) == s)
            order[s, m] = sorted(range(K), key=lambda k: (-uses[k], k))
    renamed = [[[order[of(j), m].index(row[j][m]) for m in range(M)] for j in range(groups)] for row in codes]
    moved = [[[books[s][m][k] for k in order[s, m]] for m in range(M)] for s in range(spans)]
    n1 = min(registers // (4 * M * d), K)
    n2 = min(n1 + shared // (4 * M * d), K)
    flat = [k for row in renamed for group in row for k in group]
    parts = [sum(k < n1 for k in flat), sum(n1 <= k < n2 for k in flat), sum(k >= n2 for k in flat)]
    expected = {
        "codes": Output(BITS, values("u8", renamed)),
        "books": Output(BITS, values("f32", moved)),
        "hits": Output(BITS, values("f64", [part / len(flat) for part in parts])),
    }
    inputs = {"codes": values("u8", codes), "books": values("f32", books)}
    params = {"registers": registers, "shared": shared}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def vqllm_suite() -> SuiteSpec:
    """The suite finish/vqllm."""
    numbered = lambda s, M, K, d: [
        [[[float(100 * i + 10 * m + k + c / 4) for c in range(d)] for k in range(K)] for m in range(M)]
        for i in range(s)
    ]
    one = [[[3], [1], [3], [0]], [[3], [1], [1], [3]]]
    cases = [
        _vqllm_case(1, "one book: 3, then 1, then 0; 2 is not used", "Renamed Unused Levels", one,
                    numbered(1, 1, 4, 2)),
        _vqllm_case(2, "all used equally often", "StableOrder", [[[2], [0], [3], [1]]], numbered(1, 1, 4, 2)),
        _vqllm_case(3, "two books of two orders", "PerBook Renamed", [[[0, 2], [1, 2], [1, 0], [1, 2]]],
                    numbered(1, 2, 4, 2), 16, 16),
        _vqllm_case(4, "two spans", "PerBook Renamed", [[[3], [3], [0], [1]], [[2], [3], [1], [1]]],
                    numbered(2, 1, 4, 2)),
        _vqllm_case(5, "one byte short of a vector", "Levels", one, numbered(1, 1, 4, 2), 15, 7),
        _vqllm_case(6, "more room than vectors", "Levels", one, numbered(1, 1, 4, 2), 4096, 8),
        _vqllm_case(7, "cyclic: the order is not its own inverse", "Renamed",
                    [[[1], [1], [1], [2], [2], [0], [3], [3]]], numbered(1, 1, 4, 2), 8, 8),
    ]  # fmt: skip
    return _suite("finish/vqllm", "finish.vqllm", "Codebooks in the order of use", VQLLM_HEADER, VQLLM_NOTES, cases)
