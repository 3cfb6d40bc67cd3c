"""h2o: keep the most recent tokens and those that have drawn the most attention so far, head by head.

    score[j] = sum over all queries so far, and over the query heads that share the key-value head, of weight[query, j]

After the prompt, and after every step, a head keeps its last `recent` tokens and, of the others, the `heavy` ones with
the highest score (the earlier of equals). What is given up is gone: its score, too. Early tokens are seen by more
queries, so they lead from the start; a fact that nobody has asked about yet looks like any other token.

Scores need the weights, which attention functions that never write them out (flash) do not give; beside one of these
they are computed again, with scale D^-0.5 and neither window nor cap. Sums are float64.

Paper: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
arXiv:2306.14048, Algorithm 1.
Differs from the authors' code: that is for models with as many key-value heads as query heads, here a group adds its
scores up; a call of several tokens after the prompt (a speculative pass) is one step.
Stage: memory, decode
Inventory: none, background of the sequence dimension
Lesson: lessons/21-which-tokens.md
Golden: kvcache/h2o
"""

import numpy as np

from refllm.kernels.attention import attention_weights, mix
from refllm.model.stores import PromptStore, amount, check_amounts, highest


def h2o(layer: int, *, heavy: int | float = 0.1, recent: int | float = 0.1) -> "H2OStore":
    """The store of one layer: `new_cache(model, policy=h2o)`.

    Parameters
    ----------
    layer : int
        Every layer is treated alike.
    heavy, recent : int or float
        Tokens each head keeps by score, and the last ones it keeps whatever their score. An int counts tokens, a float
        is a share of the prompt, rounded down. Both 0: a step sees its own tokens only.

    Returns
    -------
    H2OStore

    Raises
    ------
    ValueError
        A negative number.
    """
    return H2OStore(heavy, recent)


class H2OStore(PromptStore):
    """Keys, values, positions and scores of the tokens each head keeps; see `refllm.model.stores`.

    Attributes
    ----------
    scores : (..., Hk, S) float64
        Of the tokens kept, in their order. None before the first call.
    """

    name = "h2o"

    def __init__(self, heavy: int | float, recent: int | float):
        check_amounts("h2o", heavy=heavy, recent=recent)
        self.heavy, self.recent = heavy, recent
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.scores = None
        self._rows = None  # weights of the last queries, (..., Hk, rows, S), while they may still be taken back

    def extend(self, k, v, positions, queries=None):
        """As `PromptStore.extend`; the queries are needed, and taken to meet keys with scale D^-0.5."""
        self._take(k, v, positions)
        K, V, at = self._seen(queries)
        self._add(attention_weights(queries, K, positions, at, scale=k.shape[-1] ** -0.5))
        self._finish()
        return K, V, at

    def attend(self, q, k, v, positions, *, scale, window=None, softcap=None):
        """Attention over what `extend` returns, whose weights are added to the scores.

        Parameters and result are those of `refllm.kernels.attention.attend`.
        """
        self._take(k, v, positions)
        K, V, at = self._seen(q)
        weights = attention_weights(q, K, positions, at, scale=scale, window=window, softcap=softcap)
        self._add(weights)
        self._finish()
        return mix(weights, V)

    def _append(self, k, v, positions) -> None:
        super()._append(k, v, positions)
        new = np.zeros(k.shape[:-1])
        self.scores = new if self.scores is None else np.concatenate([self.scores, new], axis=-1)

    def _add(self, weights: np.ndarray) -> None:
        """Count the rows of a call; those that may be taken back wait."""
        rows = weights.sum(axis=-3, dtype=np.float64)  # (..., Hk, T, S)
        sure = max(rows.shape[-2] - self.rollback, 0)
        self._sum(rows[..., :sure, :])
        self._rows = rows[..., sure:, :].copy()
        if sure:
            self._floor = self.length - self._rows.shape[-2]

    def _sum(self, rows: np.ndarray) -> None:
        """Add rows one after the other, so that it does not matter how many come at once."""
        if rows.shape[-2]:
            self.scores = np.concatenate([self.scores[..., None, :], rows], axis=-2).sum(axis=-2)

    def _settle(self) -> None:
        if self._due:
            self._sum(self._rows)
            self._rows, self._floor = None, self.length
        super()._settle()

    def _end_prompt(self) -> None:
        recent, heavy = (amount(wanted, self.prompt) for wanted in (self.recent, self.heavy))
        others = max(self.tokens.count - recent, 0)
        if others > heavy:
            chosen = highest(self.scores[..., :others], heavy)
            rest = np.broadcast_to(
                np.arange(others, self.tokens.count), (*chosen.shape[:-1], self.tokens.count - others)
            )
            places = np.concatenate([chosen, rest], axis=-1)
            self.scores = np.take_along_axis(self.scores, places, axis=-1)
            self._give_up(places)

    _end_step = _end_prompt

    def _cut(self, count: int) -> None:
        super()._cut(count)
        self.scores = self.scores[..., : self.tokens.count]
        if self._rows is not None:
            self._rows = self._rows[..., : self._rows.shape[-2] - count, : self.tokens.count]

    def parts(self) -> dict[str, np.ndarray]:
        """Views of exactly what is stored: keys, values, positions, scores, and rows that wait."""
        parts = super().parts()
        if self.tokens.count:
            parts["scores"] = self.scores
        return parts if self._rows is None else parts | {"rows": self._rows}
