"""aqlm: sums of vectors from several codebooks, chosen together for the outputs of the layer.

    w^ = s (C_1[code_1] + ... + C_M[code_M]) for d columns of a row          loss = tr(D H D^T), D = W^ - W, H = X^T X

Plain residual codes (pq) choose codebook after codebook and minimise the error of the weights. Here three steps take
turns, and each lowers the error of the outputs: codebooks and scales follow the gradient of the loss (Adam); codes are
chosen anew by beam search, one group of columns and one codebook after another, in an order drawn anew each round. Let
g = D H at the columns J of a group, and e = s C[code] the part of one code in it. Another vector c in its place costs

    2 s c . (g - e H_JJ) + s^2 c H_JJ c^T   minus the same for C[code]

so every candidate takes one product of d numbers; codes of other groups act through H off its diagonal, in g. Rows are
independent. A beam keeps the best few ways of coding a row and lets later choices decide between them.

Paper: Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization", ICML,
arXiv:2401.06118, section 3, algorithm 1.
Differs from the authors' code: rows are scaled to a root mean square of 1 instead of a norm of 1, and the rate of Adam
with them; no AMSGrad; codebooks and scales are rounded to float16 before codes are searched; codebooks are sized by the
weight (see pq); all sums are float64 in a fixed order; a round that does not lower the loss is undone. Fine-tuning of
whole blocks afterwards is left out.
Stage: memory, decode
Inventory: 35
Lesson: lessons/15-vector-codes.md
Golden: quant/aqlm
Baseline: pq
"""

from dataclasses import dataclass

import numpy as np

from refllm.kernels.optimizers import Optimizer, adamw_update
from refllm.kernels.packed.ordered import subtract_product
from refllm.kernels.packed.records import VectorWeight, as_float
from refllm.kernels.stats import Stats
from refllm.methods.quant.pq import checked, pq


@dataclass
class Additive:
    """codes (out, J, M); books (M, K, d) and scale (out, 1), float64."""

    codes: np.ndarray
    books: np.ndarray
    scale: np.ndarray

    def sums(self) -> np.ndarray:
        """The added vectors, not scaled, (out, in)."""
        total = np.zeros((*self.codes.shape[:2], self.books.shape[2]))
        for m, book in enumerate(self.books):
            total += book[self.codes[..., m]]
        return total.reshape(len(self.codes), -1)


def aqlm(
    W: np.ndarray,
    stats: Stats,
    *,
    bits: int = 2,
    vector: int | None = None,
    books: int | None = None,
    rounds: int = 4,
    steps: int = 40,
    rate: float = 0.005,
    tolerance: float = 0.01,
    beam: int = 1,
    seed: int = 0,
) -> VectorWeight:
    """Additive quantisation.

    Parameters
    ----------
    W : (out, in) float, finite
    stats : Stats
        Calibration inputs X (n, in).
    bits, vector, books : int
        As for `pq`: sizes follow from W unless given.
    rounds : int
        At most so many of gradient steps and a beam search.
    steps : int
        Of Adam in a round.
    rate : float
        Of Adam, for codebooks whose entries are about 1, and for logarithms of scales.
    tolerance : float
        A round that lowers the loss by less than this fraction is the last.
    beam : int
        Ways of coding a row that are kept.
    seed : int
        Of k-means, and of the orders of the beam search.

    Returns
    -------
    VectorWeight

    Raises
    ------
    ValueError
        As `pq`; inputs of another width; rounds or steps below 0, a beam below 1.

    Examples
    --------
    >>> W, X = np.random.default_rng(0).normal(size=(2, 8, 16))
    >>> aqlm(W, Stats(X)).shape
    (8, 16)
    """
    if stats.X.shape[1] != np.shape(W)[-1]:
        raise ValueError(f"calibration inputs have {stats.X.shape[1]} columns, the weight has {np.shape(W)[-1]}")
    if rounds < 0 or steps < 0 or beam < 1:
        raise ValueError(f"rounds and steps must be 0 or more and beam 1 or more, got {rounds}, {steps} and {beam}")
    start = pq(W, bits=bits, vector=vector, books=books, seed=seed)
    W, H, rng = checked(W), _unit(stats.H), np.random.default_rng([seed, 1])
    best = Additive(start.unpacked(), start.codebooks[0].astype(np.float64), start.scale.astype(np.float64))
    least = loss(W, H, best)
    for _ in range(rounds):
        tried = beam_search(W, H, follow_gradient(W, H, best, steps, rate), beam, rng)
        now, before = loss(W, H, tried), least
        if now < least:
            best, least = tried, now
        if now >= (1 - tolerance) * before:
            break
    half = lambda x: as_float(x, "float16")
    return VectorWeight.pack(best.codes, half(best.books)[None], half(best.scale))


def _unit(H: np.ndarray) -> np.ndarray:
    """H with a mean diagonal of 1: a factor of the inputs changes nothing."""
    mean = np.cumsum(np.diagonal(H))[-1] / len(H)
    return H / mean if mean > 0 else np.eye(len(H))


def _times_H(D: np.ndarray, H: np.ndarray) -> np.ndarray:
    """D H, the same bits on every machine."""
    product = np.zeros_like(D)
    subtract_product(product, -D, H)
    return product


def loss(W: np.ndarray, H: np.ndarray, state: Additive) -> float:
    """tr(D H D^T) / out."""
    D = state.scale * state.sums() - W
    return float(np.cumsum(D * _times_H(D, H))[-1] / len(W))


def follow_gradient(W: np.ndarray, H: np.ndarray, state: Additive, steps: int, rate: float) -> Additive:
    """Adam on codebooks and logarithms of scales, codes fixed; then both are rounded to float16."""
    books, turn = state.books.copy(), np.zeros_like(state.scale)  # scale = state.scale exp(turn)
    moments = [np.zeros_like(x) for x in (books, books, turn, turn)]
    optimizer = Optimizer(rate, betas=(0.0, 0.95))
    for step in range(steps):
        scale = state.scale * np.exp(turn)
        sums = Additive(state.codes, books, scale).sums()
        slope = (2 / len(W)) * _times_H(scale * sums - W, H)  # d loss / d W^
        of_turn = np.cumsum(slope * sums, axis=1)[:, -1:] * scale
        of_books = _gathered((slope * scale).reshape(*state.codes.shape[:2], -1), state.codes, books.shape)
        adamw_update(books, of_books, *moments[:2], step, rate, optimizer)
        adamw_update(turn, of_turn, *moments[2:], step, rate, optimizer)
    half = lambda x: as_float(x, "float16").astype(np.float64)
    return Additive(state.codes, half(books), half(state.scale * np.exp(turn)))


def _gathered(slope: np.ndarray, codes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Gradients of vectors (out, J, d) added up at the vectors that codes name, (M, K, d)."""
    M, K, d = shape
    found = np.empty(shape)
    for m in range(M):
        named = codes[..., m].ravel()
        for k in range(d):
            found[m, :, k] = np.bincount(named, slope[..., k].ravel(), K)
    return found


def beam_search(W: np.ndarray, H: np.ndarray, state: Additive, beam: int, rng: np.random.Generator) -> Additive:
    """Choose every code of every row anew once, codebooks and scales fixed; never raises the loss of a row.

    Of equal candidates the first is taken: of the better way so far, of the lower code.
    """
    out, groups, M = state.codes.shape
    scale, d = state.scale, state.books.shape[2]
    codes = state.codes.astype(np.int64)[:, None]  # [out, ways, J, M]
    slopes = _times_H(scale * state.sums() - W, H)[:, None]  # D H of every way
    losses = np.zeros((out, 1))  # beside that of the codes at the start
    for j in rng.permutation(groups):
        columns = slice(j * d, (j + 1) * d)
        block = H[columns, columns]
        for m in rng.permutation(M):
            book = state.books[m]
            change = _changes(slopes[..., columns], book, codes[:, :, j, m], block, scale)
            ways, chosen = _least(losses[..., None] + change, beam)
            rows = np.arange(out)[:, None]
            losses = losses[rows, ways] + change[rows, ways, chosen]
            old = codes[rows, ways, j, m]
            if codes.shape[1] > 1 or ways.shape[1] > 1:
                codes, slopes = codes[rows, ways], slopes[rows, ways]
            codes[:, :, j, m] = chosen
            moved, way = np.nonzero(old != chosen)
            step = scale[moved] * (book[chosen[moved, way]] - book[old[moved, way]])
            part = slopes[moved, way]
            for k in range(d):
                part += step[:, k, None] * H[j * d + k]
            slopes[moved, way] = part
    best = np.argmin(losses, axis=1)
    return Additive(codes[np.arange(out), best].astype(state.codes.dtype), state.books, scale)


def _changes(slope, book, codes, block, scale) -> np.ndarray:
    """Change of a row's loss by every vector of a book in place of the one there: (out, ways, K)."""
    d = len(block)
    turned = np.zeros_like(book)  # book H_JJ
    for k in range(d):
        turned += book[:, k, None] * block[k]
    own = np.zeros(len(book))  # c H_JJ c^T
    for k in range(d):
        own += turned[:, k] * book[:, k]
    without = slope - scale[..., None] * turned[codes]
    score = np.zeros((*codes.shape, len(book)))
    for k in range(d):
        score += without[..., k, None] * book[:, k]
    score = 2 * scale[..., None] * score + (scale**2)[..., None] * own
    return score - np.take_along_axis(score, codes[..., None], axis=2)


def _least(total: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` smallest of each row's (ways, K) numbers, in order: numbers of the ways, and within them."""
    flat = total.reshape(len(total), -1)
    if count == 1:
        at = np.argmin(flat, axis=1)[:, None]
    else:
        at = np.argsort(flat, axis=1, kind="stable")[:, :count]
    return np.divmod(at, total.shape[2])
