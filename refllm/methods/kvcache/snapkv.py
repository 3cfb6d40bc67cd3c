"""snapkv: let the last tokens of the prompt vote, once, on which of the tokens before them stay.

The end of a prompt usually says what is wanted, so what it looks at is likely to be looked at again. With w = voters
and N tokens in the prompt, of which `capacity` are to stay, each key-value head keeps its last w tokens and

    votes[j] = sum over the last w queries, and the query heads of the group, of weight[query, j],   j < N - w
    pooled   = the mean (or maximum) of `kernel` neighbouring votes, zeros beyond the ends
    the capacity - w tokens with the highest pooled votes, the earlier of equals

Neighbours keep each other: a name is worth little without what was said of it. Nothing is given up after the prompt;
its end must be known, so a prompt in several calls needs `new_cache(model, prompt_length=...)`.

The votes need weights. Beside an attention function of its own (flash) they are taken with scale D^-0.5 and neither
window nor cap. Sums are float64.

Paper: Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv:2404.14469, section 4.
Differs from the authors' code: that repeats keys to as many heads as there are queries, so that its cache grows; here
a group votes together; kept tokens stay in their order; at most `capacity` tokens vote.
Stage: memory, decode
Inventory: none, background of the sequence dimension
Lesson: lessons/21-which-tokens.md
Golden: kvcache/snapkv
"""

import numpy as np

from refllm.kernels.attention import attend, attention_weights
from refllm.model.stores import PromptStore, amount, check_amounts, highest


def snapkv(
    layer: int, *, capacity: int | float = 2048, voters: int = 32, kernel: int = 5, pool: str = "mean"
) -> "SnapKVStore":
    """The store of one layer: `new_cache(model, policy=snapkv)`.

    Parameters
    ----------
    layer : int
        Every layer is treated alike.
    capacity : int or float
        Tokens of the prompt that each head keeps, the voters included. An int counts them, a float is a share of the
        prompt, rounded down. Prompts that are not longer stay whole; 0 keeps nothing of the prompt.
    voters : int
        w: last tokens of the prompt, which vote and stay; at least 1.
    kernel : int
        Neighbouring votes that are pooled; odd, 1 for none.
    pool : "mean" or "max"

    Returns
    -------
    SnapKVStore

    Raises
    ------
    ValueError
        A number out of range, another pool.
    """
    return SnapKVStore(capacity, voters, kernel, pool)


class SnapKVStore(PromptStore):
    """Keys, values and positions of what each head keeps; until the prompt ends, its last queries, too."""

    name = "snapkv"

    def __init__(self, capacity: int | float, voters: int, kernel: int, pool: str):
        check_amounts("snapkv", capacity=capacity)
        if voters < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"snapkv needs voters from 1 on and an odd kernel, got {voters} and {kernel}")
        if pool not in ("mean", "max"):
            raise ValueError(f"snapkv pool must be mean or max, got {pool!r}")
        self.capacity, self.voters, self.kernel, self.pool = capacity, voters, kernel, pool
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self._queries = None
        self._rule = {}  # how queries meet keys

    def extend(self, k, v, positions, queries=None):
        """As `PromptStore.extend`; the queries are needed, and taken to meet keys with scale D^-0.5."""
        self._take(k, v, positions)
        self._note(queries, scale=k.shape[-1] ** -0.5)
        seen = self._seen(queries)
        self._finish()
        return seen

    def attend(self, q, k, v, positions, *, scale, window=None, softcap=None):
        """Attention over what `extend` returns; parameters and result as of `refllm.kernels.attention.attend`."""
        self._take(k, v, positions)
        rule = dict(scale=scale, window=window, softcap=softcap)
        self._note(q, **rule)
        K, V, at = self._seen(q)
        out = attend(q, K, V, positions, at, **rule)
        self._finish()
        return out

    def _note(self, q, **rule) -> None:
        """Keep the last queries of the prompt, for its end may be here."""
        if self.prompt is None:
            q = q if self._queries is None else np.concatenate([self._queries, q], axis=-2)
            self._queries, self._rule = q[..., -(self.voters + self.rollback) :, :].copy(), rule
            if q.shape[-2] > self.voters + self.rollback:
                self._floor = self.length - self.rollback

    def _end_prompt(self) -> None:
        capacity = amount(self.capacity, self.prompt)
        self._floor = 0
        if self.prompt > capacity:
            voters = min(self.voters, capacity)
            old = self.prompt - voters
            rest = np.arange(old, self.prompt)
            if voters:
                chosen = highest(pooled(self._votes(voters), self.kernel, self.pool), capacity - voters)
                rest = np.broadcast_to(rest, (*chosen.shape[:-1], voters))
                rest = np.concatenate([chosen, rest], axis=-1)
            self._give_up(rest)
        self._queries = None

    def _votes(self, voters: int) -> np.ndarray:
        """What the last queries give to each token before them, (..., Hk, N - voters) float64."""
        at = np.arange(self.prompt - voters, self.prompt)
        q = self._queries[..., -voters:, :]
        weights = attention_weights(q, self.tokens.keys, at, self.tokens.positions, **self._rule)
        return weights[..., : self.prompt - voters].sum(axis=(-3, -2), dtype=np.float64)

    def _cut(self, count: int) -> None:
        super()._cut(count)
        if self._queries is not None:
            self._queries = self._queries[..., : self._queries.shape[-2] - count, :]

    def parts(self) -> dict[str, np.ndarray]:
        """Views of exactly what is stored: keys, values, positions, and until the prompt ends its last queries."""
        return super().parts() | ({} if self._queries is None else {"queries": self._queries})


def pooled(votes: np.ndarray, kernel: int, pool: str) -> np.ndarray:
    """Mean or maximum of the `kernel` votes around each, zeros beyond both ends.

    Parameters
    ----------
    votes : (..., n) float, not negative
    kernel : int
        Odd.
    pool : "mean" or "max"
        The mean divides by `kernel` at the ends, too.

    Returns
    -------
    (..., n)

    Examples
    --------
    >>> pooled(np.array([3.0, 0.0, 0.0, 6.0]), 3, "mean").tolist(), pooled(np.array([3.0, 0.0, 1.0]), 3, "max").tolist()
    ([1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 1.0])
    """
    half = kernel // 2
    padded = np.pad(votes, [(0, 0)] * (votes.ndim - 1) + [(half, half)])
    around = np.stack([padded[..., i : i + votes.shape[-1]] for i in range(kernel)])
    return around.sum(axis=0) / kernel if pool == "mean" else around.max(axis=0)
