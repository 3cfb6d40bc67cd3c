"""speculative: draft a few tokens cheaply, check them all in one pass of the model, keep what it would have said.

One decode step reads every weight for one token; a pass over gamma + 1 tokens reads them once, too. With p the model's
distribution and q the draft's, both after the same temperature and filters, take the drafted x_1 .. x_gamma in order:

    accept x_i with probability min(1, p_i(x_i) / q_i(x_i))
    at the first rejection draw from normalise(max(p_i - q_i, 0)) and stop; if all are accepted, draw one more from p

so every token has exactly the distribution p. Greedy is the case of one-hot p and q. With acceptance rate alpha a pass
yields (1 - alpha^(gamma+1)) / (1 - alpha) tokens.

Drafts: `ngram` looks for the last tokens earlier in the text and proposes what followed there (q is one-hot); `layers`
runs the first layers of the model itself, then its head (a model that was not trained to exit early agrees with itself
rarely); in Python any smaller model with the same vocabulary.

Exact in exact arithmetic: a pass over several tokens may differ from one over a single token in the last bits (matrix
products sum in another order), which can turn a near tie. With a cache that quantises between calls (`kivi`) the pass
reads up to gamma tokens in full that single steps would read quantised; what is stored is the same.

Paper: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, Alg. 1.
Also: Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv:2302.01318.
Stage: decode
Inventory: 110
Lesson: lessons/02-prefill-decode-cache.md
Golden: runtime/speculative
Baseline: refllm.model.sample.generate_ids
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from refllm.model.cache import DenseStore, new_cache
from refllm.model.llama import check_ids, forward
from refllm.model.model import Model
from refllm.model.sample import Sampling, draw, probabilities


@dataclass
class Counts:
    """What a generation has done; pass one to `speculative` to fill it.

    Parameters
    ----------
    passes : int
        Passes of the model after the prefill, each over the drafted tokens and one more.
    drafted, accepted, rejected : int
        Tokens proposed, taken over, and turned down; what follows a rejected token in its draft is none of the two.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Accepted tokens plus the one that each pass adds itself; 0 before the first pass."""
        return (self.accepted + self.passes) / self.passes if self.passes else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted share of the tokens that were looked at, the alpha of the formulas; 0 where there were none."""
        looked_at = self.accepted + self.rejected
        return self.accepted / looked_at if looked_at else 0.0


def speculative(
    model: Model,
    ids,
    max_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop_ids: tuple[int, ...] | None = None,
    on_prefill: Callable[[], None] | None = None,
    draft: str = "ngram",
    gamma: int = 4,
    ngram: int = 3,
    draft_layers: int = 1,
    draft_model: Model | None = None,
    counts: Counts | None = None,
) -> Iterator[int]:
    """Prefill `ids`, then yield up to `max_tokens` new ids with the distribution of `generate_ids`.

    Parameters
    ----------
    model, ids, max_tokens, sampling, stop_ids, on_prefill :
        As in `refllm.model.sample.generate_ids`. A seed gives the same text on every run, but for temperatures above 0
        not the text of plain decoding: the random numbers are used up differently.
    draft : "ngram" or "layers"
        Not used with a draft_model.
    gamma : int
        Tokens drafted per pass, at most.
    ngram : int
        Longest run of last tokens that the n-gram draft looks for; it falls back to shorter ones.
    draft_layers : int
        Layers of the model that the `layers` draft runs.
    draft_model : Model, optional
        A model with the same vocabulary; its cache is dense.
    counts : Counts, optional
        Filled as generation goes on.

    Yields
    ------
    int

    Raises
    ------
    ValueError
        An unknown draft, a number out of range, a draft model of another vocabulary; whatever `forward` refuses.
    """
    sampling = sampling or Sampling()
    stop_ids = model.config.eos_token_ids if stop_ids is None else stop_ids
    counts = Counts() if counts is None else counts
    ids = check_ids(ids, model.config.vocab_size)
    if ids.ndim != 1:
        raise ValueError(f"generation takes one sequence of ids (T,), got shape {ids.shape}")
    if gamma < 1:
        raise ValueError(f"gamma must be at least 1, got {gamma}")
    propose = _draft(model, draft, ngram, draft_layers, draft_model, sampling)
    rng = np.random.default_rng(sampling.seed)
    cache = new_cache(model)
    for store in cache.stores:
        if hasattr(store, "rollback"):  # a store that gives things up must put that off until a pass is decided
            store.rollback = gamma
    logits = forward(model, ids, cache=cache, last_only=True)[-1]
    if on_prefill is not None:
        on_prefill()
    text = ids.tolist()
    end = min(len(text) + max_tokens, model.config.context_length + 1)  # as `generate_ids`: the last id is never read
    new = [draw(probabilities(logits, sampling), rng)] if len(text) < end else []
    while True:
        for token in new:
            if token in stop_ids:
                return
            yield token
        text += new
        if len(text) >= end:
            return
        new = _one_pass(model, cache, text, min(gamma, end - len(text) - 1), propose, sampling, rng, counts)


def _one_pass(model, cache, text, room, propose, sampling, rng, counts) -> list[int]:
    """The next 1 to room + 1 ids. The cache holds `text` without its last id, and will hold text + result likewise."""
    drafted, q = propose(text, room, rng) if room else ([], None)
    logits = forward(model, [text[-1], *drafted], cache=cache)
    accepted, last = accept(probabilities(logits, sampling), q, drafted, rng)
    cache.truncate(len(text) + accepted)
    counts.passes += 1
    counts.drafted += len(drafted)
    counts.accepted += accepted
    counts.rejected += accepted < len(drafted)
    return [*drafted[:accepted], last]


def accept(p: np.ndarray, q: np.ndarray | None, drafted: list[int], rng: np.random.Generator) -> tuple[int, int]:
    """How many drafted ids are kept, and the id that follows them.

    Parameters
    ----------
    p : (n + 1, V) float64
        The model's distribution at each drafted position and after the last.
    q : (n, V) float64
        The draft's distribution, from which drafted[i] was drawn: q[i, drafted[i]] > 0. Not read if nothing is drafted.
    drafted : list of n ids

    Returns
    -------
    accepted, next_id : int

    Examples
    --------
    >>> p, q = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.5, 0.5]])
    >>> accept(p, q, [1], np.random.default_rng(0)), accept(p, q, [0], np.random.default_rng(0))
    ((1, 0), (0, 1))
    """
    for i, token in enumerate(drafted):
        # random() < 1, so p >= q always accepts, and p = 0 never does.
        if rng.random() * q[i, token] >= p[i, token]:
            rest = np.maximum(p[i] - q[i], 0)
            return i, draw(rest if rest.any() else p[i], rng)  # p = q up to rounding leaves nothing: draw from p
    return len(drafted), draw(p[len(drafted)], rng)


def prompt_lookup(text: list[int], ngram: int, count: int) -> list[int]:
    """What followed the latest earlier place where the last tokens of the text stand: `count` ids, or none.

    Parameters
    ----------
    text : list of int
    ngram : int
        Longest tail to look for; shorter ones are tried when it is new.
    count : int
        Reading on past the end of the text continues into what has been read, so a loop goes on looping.

    Examples
    --------
    >>> prompt_lookup([5, 6, 7, 8, 5, 6], ngram=3, count=2), prompt_lookup([5, 6], ngram=3, count=2)
    ([7, 8], [])
    """
    for n in range(min(ngram, len(text) - 1), 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                followed = text[start + n :]
                for i in range(count - len(followed)):
                    followed.append(followed[i])
                return followed[:count]
    return []


def first_layers(model: Model, count: int) -> Model:
    """The model cut after its first `count` layers, with its own norm and head; all weights are shared.

    Raises
    ------
    ValueError
        A count that the model does not have.
    """
    config = model.config
    if not 1 <= count <= config.num_layers:
        raise ValueError(f"draft_layers must be 1 to {config.num_layers}, the layers of the model, got {count}")
    return replace(model, config=replace(config, num_layers=count, sliding_layers=config.sliding_layers[:count]))


def expected_tokens_per_pass(alpha: float, gamma: int) -> float:
    """Tokens per pass of the model if every drafted token is accepted with probability alpha, independently.

    (1 - alpha^(gamma+1)) / (1 - alpha), Leviathan et al., Eq. 1.

    Examples
    --------
    >>> [round(expected_tokens_per_pass(*case), 4) for case in ((0.8, 4), (0.7, 3), (0.9, 8), (1.0, 4))]
    [3.3616, 2.533, 6.1258, 5.0]
    """
    return float(sum(alpha**i for i in range(gamma + 1)))


def expected_speedup(alpha: float, gamma: int, cost: float) -> float:
    """Times faster than plain decoding, where a draft step takes `cost` times as long as a pass of the model.

    Leviathan et al., Theorem 3.8; a pass is taken to last as long as a single decode step (memory-bound).

    Examples
    --------
    >>> round(expected_speedup(0.8, 4, 0.05), 4), round(expected_speedup(0.0, 4, 0.05), 4)
    (2.8013, 0.8333)
    """
    return expected_tokens_per_pass(alpha, gamma) / (gamma * cost + 1)


def operations_factor(alpha: float, gamma: int, cost: float) -> float:
    """Arithmetic per token against plain decoding, where a draft token takes `cost` times the operations of one here.

    Leviathan et al., Theorem 3.11.

    Examples
    --------
    >>> operations_factor(1.0, 4, 0.0), round(operations_factor(0.8, 4, 0.05), 4)
    (1.0, 1.5469)
    """
    return (gamma * cost + gamma + 1) / expected_tokens_per_pass(alpha, gamma)


def _draft(model, draft, ngram, draft_layers, draft_model, sampling) -> Callable:
    """propose(text, count, rng) -> (up to count ids, their distributions (n, V))."""
    vocab_size = model.config.vocab_size
    if draft_model is not None:
        theirs = draft_model.config.vocab_size
        if theirs != vocab_size:
            raise ValueError(f"the draft model must share the vocabulary of {vocab_size} tokens, it has {theirs}")
        return _model_draft(draft_model, sampling)
    if draft == "layers":
        return _model_draft(first_layers(model, draft_layers), sampling)
    if draft != "ngram":
        raise ValueError(f"draft must be ngram or layers, got {draft!r}")
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1, got {ngram}")

    def propose(text, count, rng):
        drafted = prompt_lookup(text, ngram, count)
        q = np.zeros((len(drafted), vocab_size))
        q[np.arange(len(drafted)), drafted] = 1
        return drafted, q

    return propose


def _model_draft(model: Model, sampling: Sampling) -> Callable:
    # Dense, whatever the recipe says: several calls at once may have to be taken back.
    cache = new_cache(model, policy=lambda layer: DenseStore())

    def propose(text, count, rng):
        cache.truncate(min(cache.length, len(text) - 1))  # drop what was rejected
        count = min(count, model.config.context_length + 1 - len(text))
        unread, drafted, q = text[cache.length :], [], []
        for _ in range(count):
            logits = forward(model, unread, cache=cache, last_only=True)[-1]
            q.append(probabilities(logits, sampling))
            unread = [draw(q[-1], rng)]
            drafted += unread
        return drafted, q and np.stack(q)

    return propose
