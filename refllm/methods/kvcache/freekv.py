"""freekv: keep everything in host memory, fetch the pages that matter, and choose them one step ahead.

Behind the first `sinks` tokens, the tokens form pages of p = page. A page that is full has a digest: the smallest and
the largest number of every channel of its rotated keys. For a query q no key of the page scores above

    u = sum over channels d of max(q_d kmin_d, q_d kmax_d)

Per query head, softmax over the pages of u (not scaled); the mean over the query heads of a group ranks the pages of a
key-value head, and the budget / p best ones (the first of equals) are fetched. A step attends over the sinks, these
pages, and the last tokens: the page that is not full, and recent / p full ones before it, one less if more than half a
page follows them. Nothing is left out before there are more than sinks + recent + budget tokens.

The query of a step is known too late to fetch for it, so the query of the step before chooses. Where the two point
elsewhere, the mean over the group of cos(q, q before) being below tau, that head chooses again with its own, and waits.

`nbytes` is everything. Of it `device_nbytes` lie where attention runs: sinks, last tokens, fetched pages, digests and
the last query; the rest is host memory. `recalled` counts the bytes fetched: pages that were not there before.

Paper: Liu et al. 2025, "FreeKV: Boosting KV Cache Retrieval for Efficient LLM Inference", arXiv:2505.13109.
Also: Tang et al. 2024, "Quest", arXiv:2406.10774 (the bound).
Differs from the authors' code: a step of several tokens chooses by its last query; the page of the newest token is
always attended; after tokens were taken back a step chooses with its own query.
Stage: decode, memory
Inventory: 39
Lesson: lessons/22-retrieval-heads.md
Golden: kvcache/freekv
"""

import numpy as np

from refllm.kernels.nn import softmax
from refllm.model.cache import DenseStore
from refllm.model.stores import PromptStore, check_amounts, highest


def freekv(
    layer: int,
    *,
    page: int = 32,
    sinks: int = 128,
    recent: int = 128,
    budget: int = 1792,
    tau: float = 0.8,
    pool: str = "mean",
    skip_layers: int = 1,
) -> "FreeKVStore | DenseStore":
    """The store of one layer: `new_cache(model, policy=freekv)`.

    Parameters
    ----------
    layer : int
    page : int
        p: tokens fetched together.
    sinks, recent, budget : int
        Tokens always attended at the front and at the end, and tokens fetched between them; recent and budget count
        whole pages, rounded down.
    tau : float
        A head chooses again where the cosine is below; above 1 always, -1 never.
    pool : "mean" or "max"
        Of the cosines of a group.
    skip_layers : int
        So many first layers keep a dense cache.

    Returns
    -------
    FreeKVStore, or DenseStore for a skipped layer

    Raises
    ------
    ValueError
        A number out of range, another pool.
    """
    check_amounts("freekv", sinks=sinks, recent=recent, budget=budget)
    if page < 1 or skip_layers < 0:
        raise ValueError(f"freekv needs pages of 1 token or more and skip_layers from 0 on, got {page}, {skip_layers}")
    if pool not in ("mean", "max"):
        raise ValueError(f"freekv pool must be mean or max, got {pool!r}")
    return DenseStore() if layer < skip_layers else FreeKVStore(page, sinks, recent, budget, tau, pool)


class FreeKVStore(PromptStore):
    """All tokens, digests of full pages, and the pages that were fetched.

    Attributes
    ----------
    chosen : (..., Hk, n) int64 or None
        Pages fetched for the last step, rising; None where it attended over everything.
    recalled : int
        Bytes fetched so far.
    corrected : (..., Hk) bool or None
        Heads that chose again in the last step.
    """

    name = "freekv"

    def __init__(self, page: int, sinks: int, recent: int, budget: int, tau: float, pool: str):
        self.page, self.sinks, self.recent, self.budget = page, sinks, recent, budget
        self.tau, self.pool = tau, pool
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self._digests = None  # smallest and largest keys, (2, ..., Hk, pages, D)
        self._query = None  # the last of the call before
        self._fetched = None  # (..., Hk, n, p, D) keys and values
        self.chosen = self.corrected = None
        self.recalled = 0

    @property
    def first_recent(self) -> int:
        """The first token after the pages that have to be chosen."""
        body = max(self.length - self.sinks, 0)
        full, partial = divmod(body, self.page)
        near = max(self.recent // self.page - (2 * partial > self.page), 1 if partial == 0 else 0)
        return min(self.sinks, self.length) + self.page * max(full - near, 0)

    def _append(self, k, v, positions) -> None:
        super()._append(k, v, positions)
        first = 0 if self._digests is None else self._digests.shape[-2]
        pages = self._pages(self.tokens.count)
        if pages > first:
            keys = self.tokens.keys[..., self.sinks + first * self.page : self.sinks + pages * self.page, :]
            keys = keys.reshape(*keys.shape[:-2], pages - first, self.page, keys.shape[-1])
            new = np.stack([keys.min(axis=-2), keys.max(axis=-2)])
            self._digests = np.concatenate([self._digests, new], axis=-2) if first else new

    def _pages(self, length: int) -> int:
        return max(length - self.sinks, 0) // self.page

    def _seen(self, q):
        before, self._query = self._query, q[..., -1:, :].copy()
        self.corrected = None
        if self.prompt is None or self.length <= self.sinks + self.recent + self.budget:
            self.chosen = self._fetched = None
            return super()._seen(q)
        start = self.first_recent
        candidates, count = (start - self.sinks) // self.page, self.budget // self.page
        probe = self._query if before is None else before
        chosen = highest(self._rank(probe, candidates), count)
        if before is not None:
            self.corrected = self._turned(before) < self.tau
            if self.corrected.any():
                again = highest(self._rank(self._query, candidates), count)
                chosen = np.where(self.corrected[..., None], again, chosen)
        self._fetch(chosen)
        return self._gather(start)

    def _rank(self, q, candidates: int) -> np.ndarray:
        """Mean over the group of softmax over the pages of the bound: (..., Hk, candidates) float64."""
        return page_scores(q[..., 0, :], *self._digests[..., :candidates, :])

    def _turned(self, before) -> np.ndarray:
        """Cosine between the last query and the one before, pooled over each group: (..., Hk) float64."""
        a, b = (x[..., 0, :].astype(np.float64) for x in (self._query, before))
        size = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
        cosine = np.divide((a * b).sum(axis=-1), size, out=np.zeros_like(size), where=size > 0)
        grouped = cosine.reshape(*cosine.shape[:-1], self.tokens.keys.shape[-3], -1)
        return grouped.mean(axis=-1) if self.pool == "mean" else grouped.max(axis=-1)

    def _fetch(self, chosen) -> None:
        """Copy the chosen pages from host memory; those that were there already cost nothing."""
        old = self.chosen
        there = 0 if old is None else int((chosen[..., None] == old[..., None, :]).any(axis=-1).sum())
        places = (self.sinks + chosen[..., None] * self.page + np.arange(self.page)).reshape(*chosen.shape[:-1], -1)
        self._fetched = [np.take_along_axis(x, places[..., None], -2) for x in (self.tokens.keys, self.tokens.values)]
        row = self._fetched[0][..., :1, :].nbytes + self._fetched[1][..., :1, :].nbytes
        heads = chosen[..., 0].size if chosen.shape[-1] else 1
        self.recalled += (chosen.size - there) * self.page * row // heads
        self.chosen = chosen

    def _gather(self, start: int):
        lead = self.tokens.keys.shape[:-2]
        pages = self.sinks + self.chosen[..., None] * self.page + np.arange(self.page)
        shared = lambda first, last: np.broadcast_to(np.arange(first, last), (*lead, last - first))
        at = np.concatenate([shared(0, self.sinks), pages.reshape(*lead, -1), shared(start, self.length)], axis=-1)
        sides = [
            np.concatenate([x[..., : self.sinks, :], fetched, x[..., start:, :]], axis=-2)
            for x, fetched in zip((self.tokens.keys, self.tokens.values), self._fetched, strict=True)
        ]
        return *sides, self._returned(at)

    def _cut(self, count: int) -> None:
        super()._cut(count)
        pages = self._pages(self.length - count)
        if self._digests is not None:
            self._digests = self._digests[..., :pages, :]
        if self.chosen is not None and (self.chosen >= pages).any():
            self.chosen = self._fetched = None
        self._query = None

    def parts(self) -> dict[str, np.ndarray]:
        """Views of exactly what is stored, all tokens being there once, and fetched pages once more."""
        parts = super().parts()
        if self._digests is not None:
            parts["digests"] = self._digests
        if self._query is not None:
            parts["queries"] = self._query
        if self.chosen is not None:
            parts |= {"fetched_keys": self._fetched[0], "fetched_values": self._fetched[1], "chosen": self.chosen}
        return parts

    @property
    def device_nbytes(self) -> int:
        """Bytes beside the attention: all but the tokens between the sinks and the last ones, once pages are chosen."""
        if self.prompt is None or self.length <= self.sinks + self.recent + self.budget:
            return self.nbytes
        away = slice(self.sinks, self.first_recent)
        return self.nbytes - self.tokens.keys[..., away, :].nbytes - self.tokens.values[..., away, :].nbytes


def page_scores(q: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How much each page may matter to a group of queries.

    Parameters
    ----------
    q : (..., H, D)
    low, high : (..., Hk, pages, D)
        Smallest and largest keys of each page.

    Returns
    -------
    (..., Hk, pages) float64
        Mean over the H / Hk query heads of softmax over the pages of sum_d max(q_d low_d, q_d high_d).

    Examples
    --------
    >>> low, high = np.array([[[0.0], [-2.0]]]), np.array([[[1.0], [1.0]]])
    >>> page_scores(np.array([[1.0], [-1.0]]), low, high).round(3).tolist()
    [[0.31, 0.69]]
    """
    grouped = q.reshape(*q.shape[:-2], low.shape[-3], -1, 1, q.shape[-1]).astype(np.float64)
    low, high = low[..., None, :, :], high[..., None, :, :]
    bound = np.maximum(grouped * low, grouped * high).sum(axis=-1)
    return softmax(bound).mean(axis=-2)
