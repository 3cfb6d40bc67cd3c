"""cq: neighbouring channels of a head share a code, which names a vector; vectors are learned once, for the model.

Channels depend on each other: what c of them do together takes fewer bits to say than what each does by itself (the
entropy of joint codes is at most the sum of the entropies). So c channels of one head are coded as one vector of R^c:

    code = nearest of 2^bits vectors in the codebook of this layer, side, head and part        bits / c bits a channel

Codebooks are found by k-means over the keys and values of a calibration text. There is no scale and no zero beside the
codes, and no token's codes depend on another token. What codebooks cost is the model's, however many tokens there are:
16 2^bits bits a channel, of both sides. With c = 1 each channel has a table of numbers, which is found on the line.

An error e in one vector moves the loss by about (g . e)^2 / 2, so k-means weighs a vector by |g|^2, g being the
gradient of the loss by it (`fisher`). Keys are coded before their rotation, which mixes channels differently at each
position; then every step has to rotate all decoded keys. With pre_rope=false it need not even decode them: a step of
one token attends over codes, by tables (refllm.methods.kvcache._books).

The order of the vectors is free. It is VQ-LLM's: those that name most calibration tokens come first, so that a kernel
knows by the code alone where a vector lies (refllm.methods.finish.vqllm counts what that gains).

Paper: Zhang et al. 2024, "KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled
Quantization", NeurIPS, arXiv:2405.03917; Liu et al. 2025, "VQ-LLM", arXiv:2503.02236, for order and attention.
Differs from it: none of the authors' code was found, and whether keys are coded before the rotation is not said;
vectors are float16. With fewer calibration tokens than vectors each token is a vector, and the rest repeat one.
Stage: memory, decode
Inventory: 37
Lesson: lessons/31-coupled-codes.md
Golden: kvcache/cq
"""

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.attention import attend, visible
from refllm.kernels.kmeans import kmeans, nearest
from refllm.kernels.kmeans_1d import near_best_1d
from refllm.kernels.nn import softmax
from refllm.kernels.packed.records import as_float
from refllm.methods.kvcache._books import decode, encode, mix_codes, table_scores
from refllm.methods.kvcache._coded import CodedStore
from refllm.model.cached import cache_sensitivity, cached_values
from refllm.model.model import Model


def cq(
    layer: int,
    *,
    channels: int = 4,
    bits: int = 8,
    pre_rope: bool = True,
    fisher: bool = True,
    sinks: int = 0,
    recent: int = 0,
    iterations: int = 10,
    seed: int = 0,
    tables: dict[str, np.ndarray] | None = None,
) -> "CQStore":
    """The store of one layer: `refllm.compress(model, "cq:channels=4,bits=8", ids)`.

    Parameters
    ----------
    layer : int
    channels : int
        c: channels that share a code; must divide the head dimension.
    bits : int
        Of a code, 1 to 12.
    pre_rope : bool
        False: keys are coded as attention meets them, rotated.
    fisher : bool
        False: k-means weighs all vectors alike, which needs no gradients.
    sinks, recent : int
        First and last tokens that are kept in full. Nothing is learned of the sinks of a calibration window.
    iterations, seed : int
        Steps of the k-means of vectors, at most, and where it begins. Tables of numbers (c = 1) do not ask.
    tables : dict
        "0.k_books" and "0.v_books" (Hk, D / c, 2^bits, c) float16, for every layer.

    Returns
    -------
    CQStore

    Raises
    ------
    ValueError
        A number out of range, tables that are missing or of another layout.
    """
    _check_knobs(channels, bits, iterations)
    if tables is None:
        raise ValueError(
            "cq needs codebooks, which are learned of a text: use the model that refllm.compress(model, recipe, ids) "
            "returns, or give tables=cq.learn(model, ids) with the same knobs"
        )
    books = {side: _checked(tables, f"{layer}.{side}_books", channels, bits) for side in "kv"}
    if len(books["k"]) != len(books["v"]):
        raise ValueError(f"cq needs codebooks of as many heads on both sides, got {[len(b) for b in books.values()]}")
    return (CQStore if pre_rope else RotatedCQStore)(books, sinks, recent)


def _check_knobs(channels: int, bits: int, iterations: int) -> None:
    if channels < 1 or not 1 <= bits <= 12 or iterations < 0:
        raise ValueError(
            f"cq needs channels from 1 on, bits 1 to 12, iterations from 0 on, got {channels}, {bits}, {iterations}"
        )


def _checked(tables: dict[str, np.ndarray], name: str, channels: int, bits: int) -> np.ndarray:
    """One of the tables, if it is there and right."""
    if name not in tables:
        raise ValueError(f"cq has no table {name}: learn all layers again, or compress the model again")
    books = tables[name]
    if books.dtype != np.float16 or books.ndim != 4 or books.shape[2:] != (1 << bits, channels):
        expected = f"float16 (heads, parts, {1 << bits}, {channels})"
        raise ValueError(f"cq table {name} must be {expected}, got {books.dtype} {books.shape}")
    if not np.isfinite(books).all():
        raise ValueError(f"cq table {name} holds NaN or Inf: compress the model again")
    return books


class CQStore(CodedStore):
    """Packed codes of every token and head; keys come before their rotation.

    Parameters
    ----------
    books : dict
        "k" and "v": (Hk, m, 2^bits, c) float16. They are the model's, and no part of the store's bytes.
    sinks, recent : int
        As in `cq`.
    """

    name = "cq"
    pre_rope = True

    def __init__(self, books: dict[str, np.ndarray], sinks: int = 0, recent: int = 0):
        self.books = books
        self.bits = books["k"].shape[2].bit_length() - 1
        super().__init__(recent, sinks)

    def _check_width(self, side, shape):
        heads, parts, _, channels = self.books[side[0]].shape
        if (shape[-3], shape[-1]) != (heads, parts * channels):
            raise ValueError(
                f"cq has codebooks of {heads} heads of {parts * channels} channels for a {side}, got {shape[-3]} of "
                f"{shape[-1]}: they belong to the model they were learned of"
            )

    def _encode(self, side, x):
        return {"codes": pack_bits(encode(x, self.books[side]), self.bits)}

    def _decode(self, side, arrays, dtype):
        return decode(self._unpacked(side, arrays["codes"]), self.books[side]).astype(dtype)

    def _unpacked(self, side: str, packed: np.ndarray) -> np.ndarray:
        return unpack_bits(packed, self.bits, self.books[side].shape[1])

    def codes(self, side: str) -> np.ndarray:
        """Codes of the tokens that are in codes, (..., Hk, tokens, m) uint8, or uint16 for more than 8 bits."""
        return self._unpacked(side, self._codes[side]["codes"].view)


class RotatedCQStore(CQStore):
    """The same of rotated keys, which attention can meet in codes."""

    pre_rope = False

    def attend(self, q, k, v, positions, *, scale, window=None, softcap=None):
        """`extend`, and attention over what it returns; of a single token without decoding the others.

        Parameters
        ----------
        q : (..., H, T, D)
            The other parameters are those of `extend` and of `refllm.kernels.attention.attend`.

        Returns
        -------
        (..., H, T, Dv)
        """
        self._take(k, v, positions)
        how = dict(scale=scale, window=window, softcap=softcap)
        if self.coded and q.shape[-2] == 1:
            out = self._attend_codes(q, positions, **how)
        else:
            K, V = self._seen("k", k.dtype), self._seen("v", v.dtype)
            out = attend(q, K, V, positions, np.arange(self.length), **how)
        self._settle(self.length - self.recent - self.rollback)
        return out

    def _attend_codes(self, q, positions, scale, window, softcap):
        group = q.reshape(*q.shape[:-3], len(self.books["k"]), -1, q.shape[-1]).astype(np.float64)  # (..., Hk, g, D)
        scores = [
            table_scores(group, x, self.books["k"]) if is_codes else np.matmul(group, np.swapaxes(x, -1, -2))
            for x, is_codes in self._sections("k")
        ]
        scores = scale * np.concatenate(scores, axis=-1)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        seen = visible(positions, np.arange(self.length), window)  # (1, S)
        weights = softmax(np.where(seen, scores, -np.inf))
        out, start = 0.0, 0
        for x, is_codes in self._sections("v"):
            part = weights[..., start : start + x.shape[-2]]
            out = out + (mix_codes(part, x, self.books["v"]) if is_codes else np.matmul(part, x))
            start += x.shape[-2]
        return out.reshape(*q.shape[:-1], out.shape[-1]).astype(q.dtype)

    def _sections(self, side: str):
        """The tokens in their order: (numbers or codes, whether they are codes)."""
        sinks, full = self._sinks[side], self._full[side]
        found = [(sinks.view.astype(np.float64), False)] if sinks.count else []
        return [*found, (self.codes(side), True), (full.view.astype(np.float64), False)]


# --- what is learned ------------------------------------------------------------------------------------------------


def _learn(
    model: Model,
    ids,
    *,
    channels: int = 4,
    bits: int = 8,
    pre_rope: bool = True,
    fisher: bool = True,
    sinks: int = 0,
    iterations: int = 10,
    seed: int = 0,
    **_,
) -> dict[str, np.ndarray]:
    """See `refllm.methods.apply`: the tables of all layers."""
    _check_knobs(channels, bits, iterations)
    values = cached_values(model, ids, pre_rope=pre_rope)
    weights = _sensitivity(model, ids, pre_rope) if fisher else [(None, None)] * len(values)
    tables = {}
    for layer, sides in enumerate(zip(values, weights, strict=True)):
        for side, x, weight in zip("kv", *sides, strict=True):
            if not 0 <= sinks < x.shape[-2]:
                raise ValueError(
                    f"cq learns of the tokens behind the sinks: {sinks} of windows of {x.shape[-2]} tokens"
                )
            x, weight = (a if a is None else _of_heads(a[..., sinks:, :]) for a in (x, weight))
            try:
                books = learn_books(x, weight, channels, bits, iterations, (seed, layer, "kv".index(side)))
            except ValueError as error:
                raise ValueError(f"cq cannot learn the codebooks {layer}.{side}: {error}") from error
            tables[f"{layer}.{side}_books"] = books
    return tables


cq.learn = _learn


def _sensitivity(model: Model, ids, pre_rope: bool):
    try:
        return cache_sensitivity(model, ids, pre_rope=pre_rope)
    except ValueError as error:
        raise ValueError(f"cq weighs by gradients, without them with fisher=false: {error}") from error


def _of_heads(x: np.ndarray) -> np.ndarray:
    """Windows behind each other: (windows, Hk, tokens, D) -> (Hk, windows tokens, D)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])


def learn_books(
    x: np.ndarray, weight: np.ndarray | None, channels: int, bits: int, iterations: int, seed: tuple[int, ...]
) -> np.ndarray:
    """Codebooks of every head and part, in the order of use.

    Parameters
    ----------
    x : (Hk, tokens, D) float
    weight : (Hk, tokens, D) float or None
        Squared gradients; a vector weighs their sum. Where all are 0, and for None, all vectors weigh the same.
    channels, bits, iterations :
        As in `cq`.
    seed : tuple of int
        With the number of the head's part it seeds each k-means.

    Returns
    -------
    (Hk, D / channels, 2^bits, channels) float16
        Most used by these tokens first (weights do not count), of equally used ones the one k-means has first.

    Raises
    ------
    ValueError
        `channels` do not divide D, numbers that are not finite or beyond float16.

    Examples
    --------
    >>> x = np.array([[[1.0, 9.0], [0.0, 0.0], [0.0, 2.0]]])
    >>> learn_books(x, None, channels=2, bits=1, iterations=9, seed=(0,)).tolist()
    [[[[0.0, 1.0], [1.0, 9.0]]]]
    """
    heads, tokens, D = x.shape
    if D % channels:
        raise ValueError(f"channels={channels} do not divide the head dimension {D}")
    if not np.isfinite(x).all():
        raise ValueError("keys and values of the calibration text must be finite")
    split = lambda a: a.reshape(heads, tokens, D // channels, channels).swapaxes(1, 2)
    x = split(x).reshape(-1, tokens, channels)  # a row a head and part
    weight = np.ones(x.shape[:2]) if weight is None else split(weight).sum(-1, np.float64).reshape(x.shape[:2])
    weight[~weight.any(axis=1)] = 1
    if channels == 1:
        found = near_best_1d(x[..., 0], weight, 1 << bits)[..., None]
    else:
        found = np.empty((len(x), 1 << bits, channels))
        for i, (X, w) in enumerate(zip(x, weight, strict=True)):
            found[i], _ = kmeans(X, 1 << bits, np.random.default_rng([*seed, i]), w, iterations)
    books = as_float(found, "float16")
    for X, book in zip(x, books, strict=True):
        uses = np.bincount(nearest(X, book)[0], minlength=len(book))
        book[:] = book[np.argsort(-uses, kind="stable")]
    return books.reshape(heads, D // channels, 1 << bits, channels)
