"""Perplexity, by protocols that must not be mixed: the same model and text give different numbers in each.

    nll = -1/n sum over the n scored tokens of log p(token | its context)          perplexity = exp(nll)

What differs is which tokens are scored and how much context each one has; N tokens, window W, stride s:

    gptq       windows [0, W), [W, 2W), ..., the tail is dropped; each scores all its tokens but the first. A BOS stands
               where tokenisation put it (once, before the text), not before every window.
               The convention of the GPTQ, SparseGPT and Wanda tables (there W is 2048, or 4096 for Llama 2).
    strided    windows that begin s tokens apart; each scores only the tokens that no earlier one has scored, so all but
               the first of the text count once, with at least W - s tokens of context where there are that many.
               Hugging Face's page on perplexity, but counted exactly (there every window weighs one token less).
    llamacpp   windows as in gptq, but only the last W - W // 2 - 1 tokens of each are scored, and where the model
               begins texts with BOS, a BOS takes the place of each window's first token. llama.cpp's
               `llama-perplexity`, except that one window is enough.
    document   every document by itself: its prefix is BOS (the first end-of-text id where a model has no BOS), every
               token is scored once, the first one after the prefix too. Windows are disjoint, each begins with the last
               token of the one before, and the last one reaches back as far as a whole window allows: the rolling
               log-likelihood of lm-evaluation-harness.

A key-value cache that loses something loses nothing in a single call over a whole window. Models with a cache method
are therefore fed `chunk` tokens at a time through the cache. The sum is taken in float64.

Frantar et al. 2022, "GPTQ", arXiv:2210.17323 (its published code); huggingface.co/docs/transformers/perplexity.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from refllm.model.cache import new_cache
from refllm.model.llama import check_ids, forward
from refllm.model.model import Model

PROTOCOLS = ("gptq", "strided", "llamacpp", "document")
CACHE_CHUNK = 16  # tokens a call where a lossy cache is evaluated
_ROWS = 64  # logits turned into float64 at a time: 64 rows of a vocabulary of 50,000 are 26 MB


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was measured.

    Parameters
    ----------
    perplexity : float
        exp(nll).
    nll : float
        Nats per scored token.
    tokens_scored : int
    protocol : str
    window : int
        Most tokens that one forward pass saw.
    stride : int
        Tokens from one window's begin to the next one's; window, but for `strided`.
    windows : int
    """

    perplexity: float
    nll: float
    tokens_scored: int
    protocol: str
    window: int
    stride: int
    windows: int


@dataclass(frozen=True)
class Window:
    """One forward pass: `ids` are fed, and the last `len(targets)` logits predict `targets`.

    A window's last token is predicted and not fed: what would follow it is not asked.
    """

    ids: np.ndarray
    targets: np.ndarray


def perplexity(
    model: Model,
    ids,
    *,
    protocol: str = "gptq",
    window: int | None = None,
    stride: int | None = None,
) -> float:
    """Perplexity of a model on token ids; see `evaluate_perplexity` for the parameters and the full record.

    Examples
    --------
    >>> from refllm.methods.apply import load
    >>> round(perplexity(load("tiny"), [0, 5, 9, 12], protocol="gptq", window=4)) > 1
    True
    """
    return evaluate_perplexity(model, ids, protocol=protocol, window=window, stride=stride).perplexity


def evaluate_perplexity(
    model: Model,
    ids,
    *,
    protocol: str = "gptq",
    window: int | None = None,
    stride: int | None = None,
    chunk: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Measure perplexity by one of PROTOCOLS.

    Parameters
    ----------
    model : Model
    ids : (N,) integers; for `document` a sequence of such, one a document
        As `model.tokenizer.encode` gives them: with BOS where the model was made with it.
    protocol : str
    window : int, optional
        Tokens a forward pass sees; None takes the context of the model, at most 2048.
    stride : int, optional
        Of `strided`; None takes half the window.
    chunk : int, optional
        Tokens a call; None takes the whole window, or 16 where the model has a cache method.
    on_window : callable, optional
        Called as on_window(done, all, nll so far) after each window.

    Returns
    -------
    Perplexity

    Raises
    ------
    ValueError
        An unknown protocol, a window above the context, a text shorter than a window, ids outside the vocabulary.
    """
    window = check_window(model, window)
    windows = plan(model, ids, protocol, window, stride)
    total, count = 0.0, 0
    for done, part in enumerate(windows, 1):
        nll = token_nll(window_logits(model, part, chunk), part.targets)
        total, count = total + float(nll.sum()), count + len(nll)
        if on_window is not None:
            on_window(done, len(windows), total / count)
    mean = total / count
    with np.errstate(over="ignore"):
        value = float(np.exp(mean))
    stride = _stride(window, stride) if protocol == "strided" else window
    return Perplexity(value, mean, count, protocol, window, stride, len(windows))


def documents(text: str) -> list[str]:
    """The documents of a text: what stands between two blank lines.

    Examples
    --------
    >>> documents("One story.\\nIts end.\\n\\nAnother.\\n")
    ['One story.\\nIts end.', 'Another.']
    """
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def check_window(model: Model, window: int | None) -> int:
    """The window to use, or a ValueError: at least 2 tokens, at most the context of the model."""
    context = model.config.context_length
    if window is None:
        return min(context, 2048)
    if not 2 <= window <= context:
        raise ValueError(f"the window must be from 2 to the model's context of {context} tokens, got {window}")
    return window


def plan(model: Model, ids, protocol: str, window: int, stride: int | None = None) -> list[Window]:
    """The forward passes a protocol asks for, in order. See the module docstring."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if stride is not None and protocol != "strided":
        raise ValueError(f"a stride belongs to the protocol strided, not to {protocol}")
    if protocol == "document":
        prefix = _prefix(model)
        documents = [check_ids(d, model.config.vocab_size) for d in _documents(ids)]
        return [part for document in documents for part in _rolling(document, prefix, window)]
    ids = check_ids(ids, model.config.vocab_size)
    if ids.ndim != 1:
        raise ValueError(f"perplexity takes one stream of ids (N,), got shape {ids.shape}")
    if protocol == "strided":
        return list(_strided(ids, window, _stride(window, stride)))
    if window < 2 + (protocol == "llamacpp"):
        raise ValueError(f"a window of {window} tokens scores none; take a larger window")
    if len(ids) < window:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}; take a smaller window")
    whole = ids[: len(ids) // window * window].reshape(-1, window)
    if protocol == "gptq":
        return [Window(row[:-1], row[1:]) for row in whole]
    return [Window(_with_bos(model, row)[:-1], row[window // 2 + 1 :]) for row in whole]


def _stride(window: int, stride: int | None) -> int:
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"the stride must be from 1 to the window of {window} tokens, got {stride}")
    return stride


def _strided(ids: np.ndarray, window: int, stride: int) -> Iterator[Window]:
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} token; at least 2 are needed to score one")
    begin, scored = 0, 1  # the first token has no context
    while scored < len(ids):
        begin = min(begin, scored - 1)  # a stride of a whole window still leaves one token of context
        end = min(begin + window, len(ids))
        yield Window(ids[begin : end - 1], ids[scored:end])
        begin, scored = begin + stride, end


def _with_bos(model: Model, row: np.ndarray) -> np.ndarray:
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.add_bos:
        return row
    return np.concatenate([[tokenizer.bos_token_id], row[1:]])


def _prefix(model: Model) -> int:
    config = model.config
    for token in (config.bos_token_id, *config.eos_token_ids):
        if token is not None:
            return token
    raise ValueError("the protocol document needs a model with a BOS or an end-of-text token; use gptq or strided")


def _documents(ids) -> Sequence:
    documents = [d for d in ids if np.ndim(d) == 1 and len(d)]
    if not documents or len(documents) < len(ids):
        raise ValueError("the protocol document takes a list of documents, each a list of at least one token id")
    return documents


def _rolling(ids: np.ndarray, prefix: int, window: int) -> Iterator[Window]:
    if ids[0] == prefix:
        ids = ids[1:]  # tokenised with BOS: it is the prefix, not a token to score
    fed = np.concatenate([[prefix], ids])  # fed[i] is what stands before ids[i]
    for start in range(0, len(ids), window):
        end = min(start + window, len(ids))
        first = max(0, end - window) if end == len(ids) else start
        yield Window(fed[first:end], ids[start:end])


def window_logits(model: Model, window: Window, chunk: int | None = None) -> np.ndarray:
    """Logits (n, V) of a window's n targets; through the cache where `chunk`, or the model's cache method, says so.

    A cache that treats a prompt apart (`prompt_length`) reads the first half of the window as one, the rest by tokens.
    """
    n, length = len(window.targets), len(window.ids)
    if chunk is None and model.runtime.cache_policy is None:
        return forward(model, window.ids)[-n:]
    cache = new_cache(model)
    starts = list(range(0, length, chunk or CACHE_CHUNK))
    if chunk is None and any(hasattr(store, "prompt_length") for store in cache.stores):
        starts = [0, *range(max(length // 2, 1), length)]
    parts, kept = [], length - n
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        logits = forward(model, window.ids[start:stop], cache=cache)
        parts.append(logits[max(0, kept - start) :])
    return np.concatenate(parts)


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of every row, in float64.

    Parameters
    ----------
    logits : (n, V) float
    targets : (n,) integers

    Returns
    -------
    (n,) float64, nats
    """
    out = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        x = logits[rows].astype(np.float64)
        x -= x.max(axis=-1, keepdims=True)
        right = np.take_along_axis(x, targets[rows, None], axis=-1)[:, 0]
        out[rows] = np.log(np.exp(x, out=x).sum(axis=-1)) - right
    return out
