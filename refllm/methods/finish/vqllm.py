"""vqllm: the vectors of a codebook in the order of how often codes name them, so that a cache keeps the useful ones.

A product with vector codes (aqlm, pq) reads a vector for every code. Codes do not name all vectors equally often. So a
codebook is sorted once, offline, by falling frequency over the whole weight, and the codes are renamed: the weight
stays the same, bit for bit, and "is it a frequent one?" becomes a comparison of its code with a number. A GPU kernel
then keeps codes below one bound in registers, those below another in shared memory, and leaves the rest in global
memory; how many fit follows from what the product itself leaves free (`hit_rates`).

The order of the work decides how often a codebook is fetched (`traffic`). Row after row, every block of rows needs all
codebooks. Codebook after codebook (`codebook_product`), each is fetched once, and its products with the inputs can be
made once for all rows,

    T[j, c] = x_j . C_m[c]        y_r = sum over books m and groups j of  s T_m[j, code_m[r, j]]

but every row then has a partial sum for every codebook, which must be added up in the end.

A cache in vector codes (cq) is such a matrix for its keys, a row a token (refllm.methods.kvcache._books); there the
order is learned with the codebooks, and attention works codebook after codebook: lessons/31-coupled-codes.md.

This is a method about kernels: no number changes. It is a stage behind one that gives vector codes: `aqlm+vqllm`.

Paper: Liu et al. 2025, "VQ-LLM: High-performance Code Generation for Vector Quantization Augmented LLM Inference",
HPCA, arXiv:2503.02236, sections V and VI.
Differs from it: code for a GPU is not generated; what it would gain is counted.
Stage: decode
Inventory: 36
Lesson: lessons/15-vector-codes.md
Golden: finish/vqllm
Baseline: none, the weight is the same
"""

import numpy as np

from refllm.kernels.packed.records import VectorWeight
from refllm.kernels.stats import Stats


def vqllm(record: VectorWeight, W: np.ndarray, stats: Stats | None = None) -> VectorWeight:
    """Codebooks sorted by how often their vectors are used, codes renamed.

    Parameters
    ----------
    record : VectorWeight
    W, stats : ignored
        Part of every finishing stage's call.

    Returns
    -------
    VectorWeight
        The same matrix, bit for bit. Vectors used equally often keep their order.

    Raises
    ------
    ValueError
        Another kind of record.

    Examples
    --------
    >>> book = np.float32([[[[1.0], [2.0], [3.0]]]])
    >>> record = VectorWeight.pack(np.array([[[2], [2], [0]]]), book, None)
    >>> done = vqllm(record, record.dense())
    >>> done.codebooks.ravel().tolist(), done.unpacked().ravel().tolist(), done.dense().tolist()
    ([3.0, 1.0, 2.0], [0, 0, 1], [[3.0, 3.0, 1.0]])
    """
    if not isinstance(record, VectorWeight):
        raise ValueError(
            f"it follows a stage that gives codes of vectors, such as aqlm or pq; the weight is {record.kind}"
        )
    order = np.argsort(-histogram(record), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1)
    books = np.arange(record.codebooks.shape[1])
    codes = rank[record.spans[:, None], books, record.unpacked()]
    tables = np.take_along_axis(record.codebooks, order[..., None], axis=2)
    return VectorWeight.pack(codes, tables, record.scale)


def histogram(record: VectorWeight) -> np.ndarray:
    """How many codes name each vector, (spans, books, vectors) int64."""
    spans, books, vectors, _ = record.codebooks.shape
    of_book = record.spans[:, None] * books + np.arange(books)
    named = of_book * vectors + record.unpacked().astype(np.int64)
    return np.bincount(named.ravel(), minlength=spans * books * vectors).reshape(spans, books, vectors)


def hit_rates(record: VectorWeight, registers: int, shared: int) -> tuple[float, float, float]:
    """Fractions of all codes that are served from registers, from shared memory and from global memory.

    Parameters
    ----------
    record : VectorWeight
    registers, shared : int
        Bytes that one product may use of each. A vector is served from registers if its code is below the first bound,
        and from shared memory if it is below the second, which counts both.

    Examples
    --------
    >>> record = VectorWeight.pack(np.array([[[0], [0], [1], [2]]]), np.zeros((1, 1, 4, 8), np.float16), None)
    >>> hit_rates(record, registers=16, shared=16)
    (0.5, 0.25, 0.25)
    """
    _, books, vectors, d = record.codebooks.shape
    each = books * d * record.codebooks.itemsize  # one vector of every book
    uses = histogram(record).sum(axis=(0, 1))
    first = min(registers // each, vectors)
    second = min(first + shared // each, vectors)
    parts = uses[:first].sum(), uses[first:second].sum(), uses[second:].sum()
    return tuple(float(part / uses.sum()) for part in parts)


def gather_product(x: np.ndarray, record: VectorWeight) -> np.ndarray:
    """x W^T row by row: every code's vector is fetched and multiplied. (tokens, in) -> (tokens, out) float64."""
    return x.astype(np.float64) @ record.dense().astype(np.float64).T


def codebook_product(x: np.ndarray, record: VectorWeight) -> np.ndarray:
    """x W^T codebook by codebook: a table of products for every vector, then look-ups. Float64, as gather_product."""
    spans, books, _, d = record.codebooks.shape
    codes, of_span = record.unpacked(), record.spans
    pieces = x.astype(np.float64).reshape(len(x), -1, d)  # [token, group, d]
    scale = np.ones((len(codes), 1)) if record.scale is None else record.scale.astype(np.float64)
    scale = np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)  # of every group
    y = np.zeros((len(x), len(codes)))
    for span in range(spans):
        groups = np.flatnonzero(of_span == span)
        for m in range(books):
            table = pieces[:, groups] @ record.codebooks[span, m].astype(np.float64).T  # [token, group, vector]
            for at, group in enumerate(groups):
                y += table[:, at][:, codes[:, group, m]] * scale[:, group]
    return y


def traffic(record: VectorWeight, row_blocks: int, tokens: int = 1) -> dict[str, int]:
    """Bytes besides codes that the two orders of work move.

    Parameters
    ----------
    record : VectorWeight
    row_blocks : int
        Blocks of rows that are worked on apart, each with a cache of its own.
    tokens : int

    Returns
    -------
    dict
        rows_first: every block of rows fetches every codebook. codebooks_first: every codebook is fetched once, and a
        float32 partial sum for every codebook, row and token is written and read again.
    """
    spans, books = record.codebooks.shape[:2]
    partial = 0 if spans * books == 1 else 2 * 4 * spans * books * record.shape[0] * tokens
    return {"rows_first": row_blocks * record.codebooks.nbytes, "codebooks_first": record.codebooks.nbytes + partial}
