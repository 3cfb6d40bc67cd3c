"""pqcache: find the tokens that matter by product-quantised keys, and attend over these tokens exactly.

Codes of keys choose; keys and values themselves are stored in full, in host memory. When the prompt (N tokens) has been
read, all keys behind the first `sinks` are cut into m = parts sub-vectors; k-means over the tokens gives each part of
each key-value head 2^bits centroids and each token m codes. Later tokens take the codes of the nearest centroids.

    table[part, c] = q_part . centroid[part, c]        s_j = sum over parts of table[part, code_j]

A step takes softmax over the candidates of s / sqrt(D), adds the query heads of a group up, and attends over the sinks,
the `top` best candidates (the first of equals) of each key-value head, and the last `near` tokens, its own among them.
Candidates are the tokens between. n = ratio (N - sinks), rounded down, is split evenly: top = near = n // 2; both stay
what they were at the end of the prompt. Prompts with no more than 2^bits tokens behind the sinks keep full attention.

`nbytes` is everything. Of it `device_nbytes` lie where attention runs: sinks, last tokens, fetched ones, codes and
centroids; the rest is host memory. `recalled` counts the bytes fetched: tokens that were not there before.

Paper: Zhang et al. 2024, "PQCache: Product Quantization-based KVCache for Long Context LLM Inference",
arXiv:2407.12820.
Differs from the authors' code: k-means starts from k-means++ and a seed, and stops after `iterations`; every token has
its codes from the start, there when it leaves the last ones; a step of several tokens chooses by its last query.
Stage: decode, memory
Inventory: 34
Lesson: lessons/22-retrieval-heads.md
Golden: kvcache/pqcache
"""

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.kmeans import kmeans
from refllm.kernels.nn import softmax
from refllm.methods.kvcache._books import encode, table_scores
from refllm.model.stores import PromptStore, check_amounts, highest


def pqcache(
    layer: int,
    *,
    ratio: float = 0.1,
    sinks: int = 32,
    parts: int = 2,
    bits: int = 6,
    iterations: int = 10,
    seed: int = 0,
) -> "PQCacheStore":
    """The store of one layer: `new_cache(model, policy=pqcache)`.

    Parameters
    ----------
    layer : int
        Also seeds the k-means.
    ratio : float
        Share of the prompt, without the sinks, that a step attends over.
    sinks : int
        First tokens, which are always attended and have no codes.
    parts : int
        m: sub-vectors of a key; must divide the head dimension.
    bits : int
        Of a code, 1 to 8.
    iterations : int
        Steps of the k-means, at most.
    seed : int

    Returns
    -------
    PQCacheStore

    Raises
    ------
    ValueError
        A number out of range.
    """
    check_amounts("pqcache", ratio=ratio, sinks=sinks)
    if parts < 1 or not 1 <= bits <= 8 or iterations < 0:
        raise ValueError(
            f"pqcache needs parts from 1 on, bits 1 to 8, iterations from 0 on, got {parts}, {bits}, {iterations}"
        )
    return PQCacheStore(ratio, sinks, parts, bits, iterations, (seed, layer))


class PQCacheStore(PromptStore):
    """All tokens, and once the prompt has been read codes and centroids of their keys.

    Attributes
    ----------
    centroids : (..., Hk, m, 2^bits, D / m) float32 or None
        None before, and for prompts that are too short.
    top, near : int
        Tokens that a step fetches, and last ones it attends over anyway.
    chosen : (..., Hk, n) int64 or None
        Tokens fetched for the last step, rising.
    recalled : int
        Bytes fetched so far.
    """

    name = "pqcache"

    def __init__(self, ratio: float, sinks: int, parts: int, bits: int, iterations: int, seed: tuple[int, int]):
        self.ratio, self.sinks, self.m, self.bits = ratio, sinks, parts, bits
        self.iterations, self.seed = iterations, seed
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.centroids = self._codes = self._fetched = self.chosen = None
        self.top = self.near = self.recalled = 0

    def _append(self, k, v, positions) -> None:
        if k.shape[-1] % self.m:
            raise ValueError(f"pqcache parts {self.m} do not divide the head dimension {k.shape[-1]}")
        super()._append(k, v, positions)
        if self.centroids is not None:
            self._codes = np.concatenate([self._codes, self._packed(encode(k, self.centroids))], axis=-2)

    def _packed(self, codes: np.ndarray) -> np.ndarray:
        """(..., tokens, m) -> (..., tokens, bytes)."""
        return pack_bits(codes, self.bits)

    def codes(self) -> np.ndarray:
        """Codes of the tokens behind the sinks, (..., Hk, tokens, m) uint8."""
        return unpack_bits(self._codes, self.bits, self.m)

    def _end_prompt(self) -> None:
        body = self.prompt - self.sinks
        if body <= 1 << self.bits:
            return
        self.top = self.near = int(self.ratio * body) // 2
        keys = self.tokens.keys[..., self.sinks :, :]
        self.centroids = train(keys, self.m, self.bits, self.iterations, self.seed)
        self._codes = self._packed(encode(keys, self.centroids))
        self._floor = self.length

    def _seen(self, q):
        start = max(self.length - max(self.near, self.new), self.sinks)
        if self.centroids is None or start - self.sinks <= self.top:
            self.chosen = self._fetched = None
            return super()._seen(q)
        scores = approximate_scores(q[..., -1, :], self.codes()[..., : start - self.sinks, :], self.centroids)
        self._fetch(self.sinks + highest(scores, self.top))
        lead = self.tokens.keys.shape[:-2]
        shared = lambda first, last: np.broadcast_to(np.arange(first, last), (*lead, last - first))
        at = np.concatenate([shared(0, self.sinks), self.chosen, shared(start, self.length)], axis=-1)
        sides = [
            np.concatenate([x[..., : self.sinks, :], fetched, x[..., start:, :]], axis=-2)
            for x, fetched in zip((self.tokens.keys, self.tokens.values), self._fetched, strict=True)
        ]
        return *sides, self._returned(at)

    def _fetch(self, chosen) -> None:
        """Copy the chosen tokens from host memory; those that were there already cost nothing."""
        there = 0 if self.chosen is None else int((chosen[..., None] == self.chosen[..., None, :]).any(axis=-1).sum())
        self._fetched = [np.take_along_axis(x, chosen[..., None], -2) for x in (self.tokens.keys, self.tokens.values)]
        if chosen.size:
            self.recalled += (chosen.size - there) * sum(x.nbytes for x in self._fetched) // chosen.size
        self.chosen = chosen

    def _cut(self, count: int) -> None:
        super()._cut(count)
        if self.centroids is not None:
            self._codes = self._codes[..., : self._codes.shape[-2] - count, :]
            self.chosen = self._fetched = None

    def parts(self) -> dict[str, np.ndarray]:
        """Views of exactly what is stored, all tokens being there once, and fetched ones once more."""
        parts = super().parts()
        if self.centroids is not None:
            parts |= {"codes": self._codes, "centroids": self.centroids}
        if self.chosen is not None:
            parts |= {"fetched_keys": self._fetched[0], "fetched_values": self._fetched[1], "chosen": self.chosen}
        return parts

    @property
    def device_nbytes(self) -> int:
        """Bytes beside the attention: all but the tokens between the sinks and the last ones, once there are codes."""
        if self.centroids is None:
            return self.nbytes
        away = slice(self.sinks, max(self.length - max(self.near, self.new), self.sinks))
        return self.nbytes - self.tokens.keys[..., away, :].nbytes - self.tokens.values[..., away, :].nbytes


def train(keys: np.ndarray, m: int, bits: int, iterations: int, seed: tuple[int, int]) -> np.ndarray:
    """Centroids of every part of every head, (..., Hk, m, 2^bits, D / m) float32.

    Parameters
    ----------
    keys : (..., Hk, tokens, D)
        Rotated; the sinks left out.
    seed : (int, int)
        With head and part it seeds each k-means, so that a batch is its rows.
    """
    heads, tokens, width = keys.shape[-3:]
    split = keys.reshape(-1, heads, tokens, m, width // m)
    centroids = np.empty((len(split), heads, m, 1 << bits, width // m), np.float32)
    for row, head, part in np.ndindex(centroids.shape[:3]):
        rng = np.random.default_rng([*seed, head, part])
        centroids[row, head, part] = kmeans(split[row, head, :, part], 1 << bits, rng, iterations=iterations)[0]
    return centroids.reshape(*keys.shape[:-2], *centroids.shape[2:])


def approximate_scores(q: np.ndarray, codes: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """How much each token may matter to a group of queries, by tables.

    Parameters
    ----------
    q : (..., H, D)
    codes : (..., Hk, tokens, m) uint8
    centroids : (..., Hk, m, 2^bits, D / m)

    Returns
    -------
    (..., Hk, tokens) float64
        Sum over the H / Hk query heads of softmax over the tokens of (sum of table entries) / sqrt(D).

    Examples
    --------
    >>> centroids = np.array([[[[0.0], [1.0]], [[0.0], [2.0]]]])  # one head, two parts of one channel, one bit
    >>> approximate_scores(np.zeros((1, 2)), np.array([[[0, 1], [1, 0]]], np.uint8), centroids).tolist()
    [[0.5, 0.5]]
    """
    grouped = q.reshape(*q.shape[:-2], codes.shape[-3], -1, q.shape[-1])
    return softmax(table_scores(grouped, codes, centroids) / np.sqrt(q.shape[-1])).sum(axis=-2)
