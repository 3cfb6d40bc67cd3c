"""What a compressed model costs and what it keeps: bytes, speed, and how far its predictions have moved.

    KL = mean over positions of sum over v of p(v) (log p(v) - log q(v)), p the base model, q the compressed one, nats
    top-1 agreement = share of positions where both give the largest logit to the same token (ties: the lowest id)

KL and agreement look at every position of the text and need no labels, so they see small damage long before perplexity
does. Adding a constant to the logits of a position changes neither.
"""

import time
from dataclasses import dataclass
from math import prod
from statistics import median

import numpy as np

from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.model import Model
from refllm.model.names import expected_shapes
from refllm.model.sample import generate_ids
from refllm.model.walk import layer_linears


@dataclass(frozen=True)
class Sizes:
    """Stored bytes of a model's weights.

    Parameters
    ----------
    weight_bytes : int
        Every stored array of every weight: codes, scales, zero points, indices, norms, embedding; and the tables that
        run-time methods have learned.
    parameters : int
        Numbers the uncompressed model has, embedding included.
    bits_per_weight : float
        8 weight_bytes / parameters.
    linear_bits_per_weight : float
        The same over the linears of the layers only, which is what most papers mean.
    """

    weight_bytes: int
    parameters: int
    bits_per_weight: float
    linear_bits_per_weight: float


def sizes(model: Model) -> Sizes:
    """Count what is stored."""
    shapes = expected_shapes(model.config)
    linears = [name for layer in range(model.config.num_layers) for name in layer_linears(layer, model.config)]
    nbytes = sum(array.nbytes for part in (model.weights, model.tables) for array in part.values())
    parameters = sum(map(prod, shapes.values()))
    linear_bytes = sum(model.weights[name].nbytes for name in linears)
    return Sizes(
        nbytes, parameters, 8 * nbytes / parameters, 8 * linear_bytes / sum(prod(shapes[name]) for name in linears)
    )


def kv_bytes_per_token(model: Model, ids) -> float:
    """Bytes the key-value cache stores after these ids, divided by their number."""
    cache = new_cache(model)
    forward(model, ids, cache=cache, last_only=True)
    return cache.nbytes / cache.length


PATIENCE = 20.0  # seconds of a run that measures speed


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the two phases; medians over the repeats.

    prefill_tokens_per_s counts the prompt's tokens; decode_tokens_per_s the tokens after the first, which the prefill
    has paid for.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class PhaseTimer:
    """Splits the time of one generation: `on_prefill` and the first token end the prefill.

    Examples
    --------
    >>> timer = PhaseTimer(prompt_tokens=2)
    >>> timer.on_prefill(); timer.on_token(); timer.on_token()
    >>> timer.speed().decode_tokens_per_s > 0
    True
    """

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens, self.tokens = prompt_tokens, 0
        self._begin = self._prefilled = self._first = self._last = time.perf_counter()

    def on_prefill(self) -> None:
        """The prompt has been read."""
        self._prefilled = time.perf_counter()

    def on_token(self) -> None:
        """A token has come."""
        self._last = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self._first = self._last

    def speed(self) -> Speed:
        """NaN for a phase that has not taken place."""
        rate = lambda tokens, seconds: tokens / seconds if tokens > 0 and seconds > 0 else float("nan")
        return Speed(
            rate(self.prompt_tokens, self._prefilled - self._begin), rate(self.tokens - 1, self._last - self._first)
        )


def measure_speed(model: Model, prompt, new_tokens: int = 64, repeats: int = 3, patience: float = PATIENCE) -> Speed:
    """Greedy generation after a prompt, a warm-up excluded.

    A run ends after `patience` seconds, with the tokens it has by then, two at least. If the warm-up takes as long, it
    is the measurement: what it warms does not matter any more.

    Parameters
    ----------
    model : Model
    prompt : (T,) integers
        T + new_tokens must fit in the context.
    new_tokens : int
    repeats : int
        The median of so many runs.
    patience : float
    """
    runs = []
    for _ in range(repeats + 1):
        timer, begin, late = PhaseTimer(len(prompt)), time.perf_counter(), False
        for _ in generate_ids(model, prompt, new_tokens, stop_ids=(), on_prefill=timer.on_prefill):
            timer.on_token()
            if late := time.perf_counter() - begin > patience and timer.tokens > 1:
                break
        runs.append(timer.speed())
        if late and len(runs) == 1:
            break
    runs = runs[1:] or runs
    return Speed(median(r.prefill_tokens_per_s for r in runs), median(r.decode_tokens_per_s for r in runs))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last axis, computed in float64.

    Returns
    -------
    (..., V) float64
    """
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(base: np.ndarray, logits: np.ndarray, top: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """KL to the base and agreement, position by position.

    Parameters
    ----------
    base : (n, V) float
        log p of the base model, up to a constant a row; any stored type.
    logits : (n, V) float
        Of the model to judge.
    top : (n,) integers, optional
        The base's most likely token, where `base` is rounded so far (float16) that it has ties; None looks in `base`.

    Returns
    -------
    kl : (n,) float64, nats, at least 0
    agree : (n,) bool

    Examples
    --------
    >>> kl, agree = divergence(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]))
    >>> round(float(kl[0]), 4), bool(agree[0])
    (0.1438, False)
    """
    log_p, log_q = log_probabilities(base), log_probabilities(logits)
    p = np.exp(log_p)
    # p = 0 contributes nothing, whatever q is: 0 * (-inf - x) must not become NaN.
    terms = np.where(p > 0, p * (np.where(p > 0, log_p, 0) - log_q), 0)
    top = base.argmax(axis=-1) if top is None else top
    return np.maximum(terms.sum(axis=-1), 0), top == logits.argmax(axis=-1)
