"""Choosing the next token, and the loop that generates text.

Filters are applied in the order temperature, top-k, top-p, min-p, each on what the one before has left. Ties are broken
by the lowest id, so every seed gives the same text on every machine that gives the same logits.
Top-p: Holtzman et al. 2019, arXiv:1904.09751; min-p: Nguyen et al. 2024, arXiv:2407.01082.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from refllm.kernels.nn import log_softmax
from refllm.model.cache import new_cache
from refllm.model.llama import check_ids, forward
from refllm.model.model import Model


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Parameters
    ----------
    temperature : float
        0 is greedy (the first of the largest logits); otherwise logits are divided by it.
    top_k : int
        Keep the k most likely tokens; 0 keeps all.
    top_p : float
        Keep the shortest head of the sorted list whose probability reaches top_p; 1 keeps all.
    min_p : float
        Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    seed : int

    Raises
    ------
    ValueError
        A value outside its range, a top_k or seed that is not an integer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, np.inf),
            ("top_k", self.top_k, 0, np.inf),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
        ):
            if not low <= value <= high:
                wanted = "0 or more" if high == np.inf else f"between {low} and {high}"
                raise ValueError(f"{name} must be {wanted}, got {value}")
        for name, value in (("top_k", self.top_k), ("seed", self.seed)):
            if not isinstance(value, int | np.integer) or value < 0:
                raise ValueError(f"{name} must be an integer from 0, got {value!r}")
        if self.top_p == 0:
            raise ValueError("top_p must be above 0, got 0; temperature 0 is the greedy choice")


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that is drawn from, after every filter.

    Parameters
    ----------
    logits : (..., V) float
    sampling : Sampling
        temperature 0 puts all probability on the first largest logit.

    Returns
    -------
    (..., V) float64 that sums to 1

    Examples
    --------
    >>> probabilities(np.log(np.array([0.5, 0.3, 0.2])), Sampling(temperature=1.0, top_p=0.6)).round(3).tolist()
    [0.625, 0.375, 0.0]
    """
    if sampling.temperature == 0:
        return (np.arange(logits.shape[-1]) == np.argmax(logits, axis=-1)[..., None]).astype(np.float64)
    logits = np.asarray(logits, np.float64)
    below_top = logits - np.max(logits, axis=-1, keepdims=True)
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the largest to -inf, as it should
        p = np.exp(log_softmax(below_top / sampling.temperature))
    order = np.argsort(-logits, axis=-1, kind="stable")  # equal logits: lowest id first
    ranked = np.take_along_axis(p, order, axis=-1)
    keep = np.ones(ranked.shape, bool)
    if sampling.top_k:
        keep[..., sampling.top_k :] = False
    if sampling.top_p < 1:
        reached = np.cumsum(np.where(keep, ranked, 0), axis=-1)
        # A token stays if the tokens before it have not reached top_p yet: the one that crosses is kept.
        keep[..., 1:] &= reached[..., :-1] < sampling.top_p * reached[..., -1:]
    keep &= ranked >= sampling.min_p * ranked[..., :1]
    kept = np.zeros_like(p)
    np.put_along_axis(kept, order, np.where(keep, ranked, 0), axis=-1)
    return kept / kept.sum(axis=-1, keepdims=True)


def draw(p: np.ndarray, rng: np.random.Generator) -> int:
    """One id from the distribution p (V,): the first whose cumulative probability exceeds a uniform number."""
    cumulative = np.cumsum(p)
    # The largest cumulative sum may fall short of 1 by rounding; scale the draw instead of missing the end.
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def generate_ids(
    model: Model,
    ids,
    max_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop_ids: tuple[int, ...] | None = None,
    on_prefill: Callable[[], None] | None = None,
) -> Iterator[int]:
    """Prefill `ids`, then yield up to `max_tokens` new ids one by one, ending before a stop id or a full context.

    Parameters
    ----------
    model : Model
        Its `runtime.generate`, where set, takes over.
    ids : (T,) integers
    max_tokens : int
    sampling : Sampling, optional
        None is greedy.
    stop_ids : tuple of int, optional
        None takes the model's end-of-text ids; () never stops.
    on_prefill : callable, optional
        Called once when the prompt has been read, so that a caller can time the two phases apart.

    Raises
    ------
    ValueError
        At the first token: ids that are not (T,) integers inside the vocabulary, or longer than the context.
    """
    sampling = sampling or Sampling()
    stop_ids = model.config.eos_token_ids if stop_ids is None else stop_ids
    ids = check_ids(ids, model.config.vocab_size)
    if ids.ndim != 1:
        raise ValueError(f"generation takes one sequence of ids (T,), got shape {ids.shape}")
    if model.runtime.generate is not None:
        yield from model.runtime.generate(model, ids, max_tokens, sampling, stop_ids=stop_ids, on_prefill=on_prefill)
        return
    rng = np.random.default_rng(sampling.seed)
    cache = new_cache(model)
    logits = forward(model, ids, cache=cache, last_only=True)[-1]
    if on_prefill is not None:
        on_prefill()
    greedy = sampling.temperature == 0  # no distribution is needed, and it costs more than a token of a small model
    for i in range(max_tokens):
        token = int(np.argmax(logits)) if greedy else draw(probabilities(logits, sampling), rng)
        if token in stop_ids:
            return
        yield token
        if i + 1 == max_tokens or cache.length >= cache.context_length:
            return
        logits = forward(model, [token], cache=cache)[-1]
