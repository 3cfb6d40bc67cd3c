"""Heads in codes of vectors, a codebook for every part of a head: coding, and attention that decodes no token.

With m parts of c channels and codebooks of n vectors, a token of a head is m codes. What it stands for is met by a
query, or mixed with a weight, one codebook at a time and all tokens with it:

    q . k^_j = sum over parts of  table[code_j]         table = book q_part, n products, made once for all tokens
    o_part   = sum over n of  mass_n book_n             mass_n = sum of the weights of the tokens whose code is n

Decoding token by token is the same sum in another order (pqcache ranks by the first, cq attends by both).
"""

from math import prod

import numpy as np

from refllm.kernels.kmeans import nearest
from refllm.kernels.packed.records import VectorWeight


def encode(x: np.ndarray, books: np.ndarray) -> np.ndarray:
    """The nearest vector of every part.

    Parameters
    ----------
    x : (..., Hk, tokens, D) float
    books : (..., Hk, m, n, D / m) float
        Leading axes are those of x, or fewer: shared ones.

    Returns
    -------
    (..., Hk, tokens, m) uint8, or uint16 for more than 256 vectors
        Of equally near vectors the first.
    """
    m, n, c = books.shape[-3:]
    split = x.reshape(prod(x.shape[:-2]), x.shape[-2], m, c)
    books = np.broadcast_to(books, (*x.shape[:-2], m, n, c)).reshape(len(split), m, n, c)
    codes = np.empty(split.shape[:-1], np.uint8 if n <= 256 else np.uint16)
    for row, part in np.ndindex(len(split), m):
        codes[row, :, part] = nearest(split[row, :, part], books[row, part])[0]
    return codes.reshape(*x.shape[:-1], m)


def decode(codes: np.ndarray, books: np.ndarray) -> np.ndarray:
    """What codes stand for: (..., Hk, tokens, m) and (Hk, m, n, c) -> (..., Hk, tokens, m c) in the type of the books.

    Examples
    --------
    >>> decode(np.array([[[1, 0]]]), np.array([[[[1.0], [2.0]], [[3.0], [4.0]]]])).tolist()
    [[[2.0, 3.0]]]
    """
    heads, m, _, c = books.shape
    return books[np.arange(heads)[:, None, None], np.arange(m), codes].reshape(*codes.shape[:-1], m * c)


def table_scores(q: np.ndarray, codes: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Products of queries with what codes stand for, by a table of products with each codebook.

    Parameters
    ----------
    q : (..., Hk, g, D)
        The g queries that share a key head.
    codes : (..., Hk, tokens, m) integers
    books : (..., Hk, m, n, D / m)

    Returns
    -------
    (..., Hk, g, tokens) float64

    Examples
    --------
    >>> books = np.array([[[[1.0], [2.0]], [[3.0], [4.0]]]])  # one head, two parts of one channel
    >>> table_scores(np.array([[[10.0, 1.0]]]), np.array([[[1, 0], [1, 1]]]), books).tolist()
    [[[23.0, 24.0]]]
    """
    m, _, c = books.shape[-3:]
    q = q.astype(np.float64)
    scores = np.zeros((*q.shape[:-1], codes.shape[-2]))
    for part in range(m):
        piece, book = q[..., part * c : (part + 1) * c], books[..., part, :, :]
        table = (piece[..., None, :] * book[..., None, :, :]).sum(axis=-1)  # (..., Hk, g, n)
        scores += np.take_along_axis(table, codes[..., None, :, part].astype(np.intp), axis=-1)
    return scores


def mix_codes(weights: np.ndarray, codes: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Weighted sums of what codes stand for: weights are added code by code, and then meet each codebook once.

    Parameters
    ----------
    weights : (..., Hk, g, tokens) float64
    codes : (..., Hk, tokens, m) integers
    books : (..., Hk, m, n, D / m)

    Returns
    -------
    (..., Hk, g, D) float64

    Examples
    --------
    >>> books = np.array([[[[1.0], [2.0]], [[3.0], [4.0]]]])
    >>> mix_codes(np.array([[[0.5, 0.25]]]), np.array([[[1, 0], [1, 1]]]), books).tolist()
    [[[1.5, 2.5]]]
    """
    m, n, c = books.shape[-3:]
    rows = np.arange(weights.size // weights.shape[-1]).reshape(*weights.shape[:-1], 1)
    out = np.empty((*weights.shape[:-1], m * c))
    for part in range(m):
        named = rows * n + codes[..., None, :, part]
        mass = np.bincount(named.ravel(), weights.ravel(), rows.size * n).reshape(*weights.shape[:-1], n, 1)
        out[..., part * c : (part + 1) * c] = (mass * books[..., None, part, :, :]).sum(axis=-2)
    return out


def as_weight(codes: np.ndarray, books: np.ndarray) -> VectorWeight:
    """The tokens of one head as rows of a weight, which refllm.methods.finish.vqllm sorts, multiplies and counts.

    Parameters
    ----------
    codes : (tokens, m) integers
    books : (m, n, c) float16 or float32

    Returns
    -------
    VectorWeight of shape (tokens, m c)
        Codes take as many bits as n asks for.
    """
    return VectorWeight.pack(codes[..., None], books[:, None], None)
