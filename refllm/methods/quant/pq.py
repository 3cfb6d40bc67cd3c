"""pq: codes of vectors: every few columns of a row are one of 2^B vectors, or a sum of one from each of M codebooks.

    vectors u of d columns of W / s, s the size of a row                   code_1 = nearest of C_1 to u
    code_m = nearest of C_m to u - C_1[code_1] - ... - C_m-1[code_m-1]      w^ = s (C_1[code_1] + ... + C_M[code_M])

A codebook is the k-means of what the codebooks before it have left (residual quantisation); k-means counts a vector by
s^2, so that it is the error of W that shrinks. With `spans` there are codebooks of their own for spans of columns,
down to product quantisation proper, where every d columns have one.

Bits a weight: M B / d for codes, and 16 spans M 2^B d / (out in) for codebooks, which is nothing in a matrix of 4096 x
4096 and more than the codes in one of 128 x 128. So the sizes follow from the matrix unless they are given: the largest
codebooks, of 2^8 to 2^4 vectors, that cost a quarter of a bit at most; of 256 vectors as long ones as may be (8, 4 or 2
columns, in as many codebooks as that takes), of fewer vectors as few codebooks as may be, since choosing one after
another loses most where each says little. At 2 bits that is 2 x 256 vectors of 8 from 262,144 weights on, 256 vectors
of 4 from 65,536 on, and 16 vectors of 2 below.

Paper: Jegou et al. 2011, "Product Quantization for Nearest Neighbor Search", IEEE TPAMI 33; Chen et al. 2010,
"Approximate Nearest Neighbor Search by Residual Vector Quantization", Sensors 10.
Differs from them: rows are divided by their root mean square, stored as float16; codebooks are float16 and the codes
are those of the rounded codebooks; k-means looks at 64 vectors a centre at most, drawn without replacement.
Stage: memory, decode
Inventory: none, the ground that rows 34 to 37 stand on
Lesson: lessons/15-vector-codes.md
Golden: quant/pq
Baseline: rtn:bits=2,group=64
"""

import numpy as np

from refllm.kernels.kmeans import kmeans, nearest
from refllm.kernels.packed.records import VectorWeight, as_float
from refllm.kernels.packed.vectors import MOST_BOOKS
from refllm.kernels.stats import Stats

VECTORS, BOOK_BITS = (8, 4, 2), (8, 7, 6, 5, 4)  # tried in this order
BOOK_COST = 0.25  # bits a weight that codebooks may cost
SAMPLE = 64  # vectors a centre


def pq(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    bits: int = 2,
    vector: int | None = None,
    books: int | None = None,
    spans: int = 1,
    seed: int = 0,
) -> VectorWeight:
    """Residual or product quantisation by k-means.

    Parameters
    ----------
    W : (out, in) float, finite
    stats : ignored
        Part of every weight method's call.
    bits : int
        1 to 8: of codes a weight.
    vector : int, optional
        Columns of a vector, a divisor of `in`; chosen by the size of W unless given.
    books : int, optional
        Codebooks that are added, 1 to 8; bits * vector / books, an integer of 1 to 16, is B.
    spans : int
        Spans of columns with codebooks of their own; 0: one for every vector of columns (product quantisation).
    seed : int
        Of the draws of k-means.

    Returns
    -------
    VectorWeight

    Raises
    ------
    ValueError
        NaN or Inf in W; a vector or spans that do not divide `in`; books that do not divide the bits of a vector.

    Examples
    --------
    Two bits name four pairs, and there are no more than four here:

    >>> W = np.array([[1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, -1.0]])
    >>> pq(W, bits=1, vector=2).dense().tolist()
    [[1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, -1.0]]
    """
    W = checked(W)
    d, M, B, spans = sizes(W.shape, bits, vector, books, spans)
    scale = as_float(np.sqrt(np.cumsum(W * W, axis=1)[:, -1:] / W.shape[1]), "float16")
    U = np.divide(W, scale, out=np.zeros_like(W), where=scale > 0).reshape(len(W), spans, -1, d)
    weights = np.broadcast_to((scale.astype(np.float64) ** 2)[:, None], U.shape[:3])
    rng = np.random.default_rng(seed)
    codes, tables = np.empty((*U.shape[:3], M), np.uint16), np.empty((spans, M, 1 << B, d), np.float16)
    for span in range(spans):
        rest, weight = U[:, span].reshape(-1, d), weights[:, span].ravel()
        for m in range(M):
            tables[span, m], found = codebook(rest, weight, 1 << B, rng)
            rest = rest - tables[span, m][found]
            codes[:, span, :, m] = found.reshape(codes.shape[0], -1)
    return VectorWeight.pack(codes.reshape(len(W), -1, M), tables, scale)


def checked(W: np.ndarray) -> np.ndarray:
    """A weight as float64, finite."""
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; quantization needs finite values")
    return W.astype(np.float64)


def codebook(vectors: np.ndarray, weights: np.ndarray, K: int, rng: np.random.Generator):
    """The k-means of some vectors as float16 (K, d), and the code of every vector by it."""
    if not weights.any():
        weights = np.ones(len(weights))
    some = slice(None)
    if len(vectors) > SAMPLE * K:
        some = np.sort(rng.choice(len(vectors), SAMPLE * K, replace=False))
    picked = weights[some] if weights[some].any() else None
    table = as_float(kmeans(vectors[some], K, rng, picked)[0], "float16")
    return table, nearest(vectors, table)[0]


def sizes(shape: tuple[int, int], bits: int, vector: int | None, books: int | None, spans: int):
    """d, M, B and the number of spans for a weight: what is given, and for the rest the rule of the module."""
    out, columns = shape
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if books is not None and not 1 <= books <= MOST_BOOKS:
        raise ValueError(f"books must be 1 to {MOST_BOOKS}, got {books}")
    fitting = [d for d in ((vector,) if vector else VECTORS) if columns % d == 0]
    if not fitting:
        tried = vector or "8, 4 or 2"
        raise ValueError(f"vectors of {tried} columns do not divide the {columns} columns of the weight")
    choices = [(d, M, bits * d // M) for d in fitting for M in _numbers_of_books(bits * d, books)]
    if not choices:
        raise ValueError(f"{books} books do not share the {bits * fitting[0]} bits of a vector of {fitting[0]} columns")
    spans_of = lambda d: spans or columns // d
    choices = [choice for choice in choices if columns % (spans_of(choice[0]) * choice[0]) == 0]
    if not choices:
        raise ValueError(f"{spans} spans do not divide the {columns} columns into whole vectors of {fitting}")
    cost = lambda d, M, B: 16 * spans_of(d) * M * d * 2**B
    choices.sort(key=lambda choice: (-choice[2], -choice[0] if choice[2] == max(BOOK_BITS) else choice[1]))
    cheap = [choice for choice in choices if cost(*choice) <= BOOK_COST * out * columns]
    chosen = cheap[0] if cheap else min(choices, key=lambda choice: cost(*choice))
    return *chosen, spans_of(chosen[0])


def _numbers_of_books(vector_bits: int, books: int | None) -> list[int]:
    """How many codebooks may share the bits of a vector, the fewest first."""
    if books is not None:
        return [books] if vector_bits % books == 0 and vector_bits // books <= 16 else []
    fitting = [M for M in range(1, MOST_BOOKS + 1) if vector_bits % M == 0 and vector_bits // M in BOOK_BITS]
    # Few bits in all: one small codebook.
    return fitting or ([1] if vector_bits < min(BOOK_BITS) else [])
