"""The suite kvcache/cq. Ids are never reused: new cases take new numbers."""

from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import Unclear, f16_margin, pack_low_first, to_f16
from refllm.evaluate.golden.suites.rtn_notes import note

BITS = {"class": "bits"}
NEAR = {"class": "allclose", "rtol": 1e-6, "atol": 1e-6}
HEADER = [
    "One head. x f32 [tokens, D]: part p of a token is its channels p c .. p c + c - 1, c = channels, m = D / c parts. "
    "books f16 [m, 2^bits, c], a codebook a part. codes u8: for every part the nearest vector (squared distance, of "
    "equals the first), one little-endian bit stream a token; x_hat f32: what the codes stand for.",
    "Given q f32 [g, D]: scores = q x_hat^T; given weights f32 [g, tokens]: mixed = weights x_hat.",
    "Given sensitivity f32 [tokens, D] in place of books: a vector weighs the sum of its c sensitivities (each 1 where "
    "all of a part are 0). books: f16(the weighted means) of the best 2^bits clusters of each part, by falling number "
    "of tokens whose code they are. The clusters of these cases lie far apart.",
]
NOTES = {
    "Coupled": note("LAYOUT", "A code is that of neighbouring channels, not of channels D / c apart."),
    "Nearest": note("BASIC", "The nearest vector, not the one with the largest product."),
    "Ties": note("ROUNDING", "Of equally near vectors the first."),
    "Parts": note("LAYOUT", "Every part has a codebook of its own."),
    "Packed": note("LAYOUT", "Low bits first, and a code may straddle two bytes."),
    "Table": note("BASIC", "Tables are products of a codebook with its own part of the query."),
    "Mass": note("BASIC", "Weights of tokens with one code are added up.", "The last one of them replaces the others."),
    "Sensitivity": note("BASIC", "All channels of a vector weigh the same: the sum of their sensitivities."),
    "Unweighed": note("DEGENERATE", "A part whose sensitivities are all 0 is clustered as if they were 1."),
    "Order": note("ORDER", "Order is by tokens; sensitivities do not count."),
    "Stored": note("PRECISION", "Means are rounded to the nearest float16."),
}


def _squared(a, b) -> Fraction:
    return sum(((Fraction(x) - Fraction(y)) ** 2 for x, y in zip(a, b, strict=True)), Fraction(0))


def _nearest(vector, book) -> int:
    return min(range(len(book)), key=lambda n: (_squared(vector, book[n]), n))


def _pieces(token, c: int) -> list:
    return [token[i : i + c] for i in range(0, len(token), c)]


def _coded(x, books, c: int) -> tuple[list, list]:
    codes = [[_nearest(piece, book) for piece, book in zip(_pieces(token, c), books, strict=True)] for token in x]
    back = [[v for code, book in zip(row, books, strict=True) for v in book[code]] for row in codes]
    return codes, back


def _learned(x, sensitivity, clusters, c: int) -> list:
    """Codebooks, the clusters of each part being known: their numbers, token by token."""
    books = []
    for part, of_token in enumerate(clusters):
        pieces = [_pieces(token, c)[part] for token in x]
        weights = [sum(map(Fraction, _pieces(token, c)[part])) for token in sensitivity]
        weights = weights if any(weights) else [Fraction(1)] * len(x)
        book = []
        for cluster in range(max(of_token) + 1):
            mine = [i for i, number in enumerate(of_token) if number == cluster]
            total = sum(weights[i] for i in mine)
            means = [sum(weights[i] * Fraction(pieces[i][j]) for i in mine) / total for j in range(c)]
            if any(f16_margin(mean) < Fraction(1, 200) for mean in means if mean):
                raise Unclear("a mean lies near the middle of two float16")
            book.append([to_f16(mean) for mean in means])
        if [_nearest(piece, book) for piece in pieces] != of_token:
            raise Unclear("a token is nearer to another cluster")
        uses = [of_token.count(cluster) for cluster in range(len(book))]
        if len(set(uses)) < len(uses):
            raise Unclear("two clusters are as large, and their order is free")
        books.append([vector for _, vector in sorted(zip(uses, book, strict=True), reverse=True)])
    return books


def _case(id, comment, flags, x, bits, c, *, books=None, q=None, weights=None, sensitivity=None, clusters=None):
    inputs = {"x": values("f32", x)}
    expected = {}
    if books is None:
        inputs["sensitivity"] = values("f32", sensitivity)
        books = _learned(x, sensitivity, clusters, c)
        expected["books"] = Output(BITS, values("f16", _floats(books)))
    else:
        inputs["books"] = values("f16", books)
    codes, back = _coded(x, books, c)
    expected["codes"] = Output(BITS, values("u8", [pack_low_first(row, bits) for row in codes]))
    expected["x_hat"] = Output(BITS, values("f32", _floats(back)))
    dot = lambda a, b: sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True))
    if q is not None:
        inputs["q"] = values("f32", q)
        expected["scores"] = Output(NEAR, values("f64", _floats([[dot(row, token) for token in back] for row in q])))
    if weights is not None:
        inputs["weights"] = values("f32", weights)
        columns = list(zip(*back, strict=True))
        mixed = [[dot(row, column) for column in columns] for row in weights]
        expected["mixed"] = Output(NEAR, values("f64", _floats(mixed)))
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params={"bits": bits, "channels": c})


def _floats(nested):
    return [_floats(part) for part in nested] if isinstance(nested, list) else float(nested)


def suite() -> SuiteSpec:
    """The suite kvcache/cq."""
    two = [[[0, 0], [4, 0], [0, 4], [4, 4]], [[-1, -1], [1, -1], [-1, 1], [8, 8]]]
    eight = [[[n] for n in range(8)], [[2 * n] for n in range(8)], [[-n / 2] for n in range(8)]]
    cases = [
        _case(1, "two parts of two channels", "Coupled Nearest Parts", [[3.5, 0.5, -0.5, 1.25], [1, 3, 2, -2]], 2, 2,
              books=two),
        _case(2, "halfway between vectors, and vectors that are there twice", "Ties",
              [[2, 2, 0, 0], [2, 0, 8, 8]], 2, 2, books=[two[0], [[1, -1], [8, 8], [-1, 1], [8, 8]]]),
        _case(3, "three codes of three bits in two bytes", "Packed Parts",
              [[3, 10, -3], [7.25, 2.5, -0.125]], 3, 1, books=eight),
        _case(4, "attention over codes", "Table Mass Parts",
              [[4, 0, 1, -1], [0, 4, 1, -1], [4, 0, 8, 8], [4, 0, -1, -1], [0, 0, 1, -1]], 2, 2, books=two,
              q=[[1, -2, 0.5, 3], [0.25, 1, -1, 2]],
              weights=[[0.5, 0.125, 0.0625, 0.25, 0.0625], [0, 0.25, 0.5, 0.25, 0]]),
        _case(5, "one bit for two channels, one of which nobody minds", "Sensitivity Order Stored",
              [[1, 2], [2, 0], [0, 1], [100, 50], [101, 53]], 1, 2,
              sensitivity=[[0, 1], [3, 0], [0.5, 0.25], [9, 2], [4, 8]], clusters=[[0, 0, 0, 1, 1]]),
        _case(6, "the loudest cluster is not the largest; a part without sensitivity", "Order Unweighed",
              [[1, 2, 60, 5], [101, 50, 0, 1], [100, 53, 1, 1], [102, 51, 62, 2], [104, 52, 2, 0]], 1, 2,
              sensitivity=[[90, 10, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [0.5, 0, 0, 0]],
              clusters=[[1, 0, 0, 0, 0], [1, 0, 0, 1, 0]]),
        _case(7, "one channel a code: a table of numbers each", "Coupled Parts Stored",
              [[1, -70], [1.5, 3], [40, 2], [1.25, 2], [41, -71]], 1, 1,
              sensitivity=[[1, 1], [2, 1], [1, 4], [4, 2], [2, 2]], clusters=[[0, 0, 1, 0, 1], [1, 0, 0, 0, 1]]),
    ]  # fmt: skip
    head = manifest_head(
        __name__,
        "kvcache/cq",
        "Channels of a head coded together, and attention over the codes",
        HEADER,
        "lessons/31-coupled-codes.md",
    )
    source = {"kind": "first_principles", "name": "the header, in fractions"}
    return SuiteSpec(head, NOTES, [({"params": {}, "source": source}, cases)])
