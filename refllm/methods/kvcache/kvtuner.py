"""kvtuner: bits of keys and bits of values for each layer, searched once, under a limit on their mean.

    pairs    (K, V) bits from {2, 4, 8} x {2, 4, 8}; an error is |o - o^| / |o| of a layer's attention output
    front    pairs of a layer than which no other has fewer (or as many) bits and a smaller (or equal) error
    group    layers with the same front, which take the same pair
    search   of all ways to give groups pairs of their fronts, with C = sum over layers of (K + V) / (2 layers) <= bits,
             the one that moves the predictions least (KL on the calibration text, its first half in the cache)

Where there are more ways than `trials`, the search is greedy: every group begins with its largest pair; while C is too
large, the group whose next smaller pair costs least KL a bit saved takes it. Of equals the one with fewer bits, then
the one whose pairs come first. Which side needs the bits is the model's affair: keys with loud channels, which large
models have, err more than values, and errors of scores move weight between tokens. Where a front leaves out what the
predictions would prefer (even keys: the lesson shows it), the search cannot find it: `pairs` can be given by hand.

Tokens are coded as in `qserve`, so a layer takes (K + V) / 2 + 32 / D bits a number. The answer is the knob `pairs`,
which is stored with the model: nothing is searched again, and nothing decided at run time.

Paper: Li et al. 2025, "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization for Efficient and
Nearly Lossless LLM Inference", arXiv:2502.04420.
Differs from the authors' code: KL on a text instead of the accuracy in a task, an exhaustive or greedy search instead
of NSGA-II; only the mode with a grid for each token, whose zero is not rounded; layers of a group need not have similar
errors (how similar, is not published).
Stage: decode, memory
Inventory: 31
Lesson: lessons/27-quantised-caches.md
Golden: kvcache/kvtuner
"""

from collections.abc import Callable
from itertools import product
from math import prod

import numpy as np

from refllm.kernels.attention import attention_weights, mix
from refllm.kernels.nn import log_softmax
from refllm.methods.kvcache.qserve import QServeStore, dequantize_tokens, quantize_tokens
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.model import Model

BITS = (2, 4, 8)
PAIRS = tuple(product(BITS, BITS))  # (K, V)
WINDOW = 256  # calibration tokens, one sequence
Pair = tuple[int, int]


def kvtuner(
    layer: int, *, pairs: str = "search", bits: float = 4.0, recent: int = 0, trials: int = 100
) -> "QServeStore":
    """The store of one layer: `new_cache(model, policy=partial(kvtuner, pairs="8.4/4.2"))`.

    Parameters
    ----------
    layer : int
    pairs : str
        K.V of every layer, joined by /; a single pair is that of all layers. In a recipe "search": they are searched
        once, on the calibration text. In Python `pairs_text(search_pairs(model, ids))`.
    bits : float
        C at most, for the search: 2 to 8.
    recent : int
        Last tokens that are kept in full.
    trials : int
        Ways that the search may try one by one.

    Returns
    -------
    QServeStore

    Raises
    ------
    ValueError
        Pairs that are not of this form, are missing for a layer, or still to be searched.
    """
    if pairs == "search":
        raise ValueError(
            "kvtuner needs pairs of bits: a recipe searches them; in Python give pairs=pairs_text(search_pairs(model, "
            "ids)), or one for all layers, pairs=4.4"
        )
    of_layers = parse_pairs(pairs)
    if len(of_layers) > 1 and layer >= len(of_layers):
        raise ValueError(
            f"kvtuner has pairs of {len(of_layers)} layers, but there is a layer {layer}: search them again"
        )
    return QServeStore(*of_layers[layer if len(of_layers) > 1 else 0], recent, "kvtuner")


def parse_pairs(text: str) -> list[Pair]:
    """(K, V) bits by layer.

    Examples
    --------
    >>> parse_pairs("8.4/4.2")
    [(8, 4), (4, 2)]
    """
    try:
        found = [tuple(map(int, pair.split("."))) for pair in text.split("/")]
    except ValueError:
        found = [()]
    if any(len(pair) != 2 for pair in found):
        raise ValueError(f"kvtuner pairs must be K.V of every layer joined by /, such as 8.4/4.2, got {text!r}")
    return found


def pairs_text(pairs: list[Pair]) -> str:
    """What the knob `pairs` takes.

    Examples
    --------
    >>> pairs_text([(8, 4), (4, 2)])
    '8.4/4.2'
    """
    return "/".join(f"{k}.{v}" for k, v in pairs)


def _prepare(model: Model | None, *, ids=None, pairs="search", bits=4.0, trials=100, **_):
    """See `refllm.methods.apply`: the pairs where they are to be searched; without a model a stand-in for them."""
    if not 2 <= bits <= 8 or trials < 1:
        raise ValueError(f"kvtuner bits must be 2 to 8 and trials 1 or more, got {bits} and {trials}")
    if pairs != "search":
        return {}
    return {"pairs": "4.4" if model is None else pairs_text(search_pairs(model, ids, bits=bits, trials=trials))}


kvtuner.prepare = _prepare


# --- the search ------------------------------------------------------------------------------------------------------


def search_pairs(model: Model, ids, *, bits: float = 4.0, trials: int = 100) -> list[Pair]:
    """Bits of keys and values for every layer, by the first 256 calibration tokens.

    Parameters
    ----------
    model : Model
    ids : (T,) integers, 2 or more
    bits, trials :
        As in `kvtuner`.

    Returns
    -------
    list of (K, V), one a layer

    Raises
    ------
    ValueError
        Fewer than two tokens, or `bits` that no choice of pairs meets.
    """
    ids = np.asarray(ids).ravel()[: min(WINDOW, model.config.context_length)]
    if ids.size < 2:
        raise ValueError(f"kvtuner needs two calibration tokens or more, got {ids.size}")
    fronts = [front(errors) for errors in output_errors(model, ids)]
    half = len(ids) // 2
    exact = log_softmax(forward(model, ids)[half:])

    def loss(pairs: list[Pair]) -> float:
        cache = new_cache(model, lambda layer: QServeStore(*pairs[layer], name="kvtuner"))
        forward(model, ids[:half], cache=cache, last_only=True)
        got = log_softmax(forward(model, ids[half:], cache=cache))
        return float((np.exp(exact) * (exact - got)).sum(axis=-1).mean())

    return search(fronts, loss, bits, trials)


def output_errors(model: Model, ids: np.ndarray) -> np.ndarray:
    """Relative error of every layer's attention output, (layers, 9) in the order of PAIRS, all tokens being coded."""
    found = []

    def spy(q, k, v, q_positions, k_positions, **rule):
        coded = [[dequantize_tokens(*quantize_tokens(x, bits), x.dtype) for bits in BITS] for x in (k, v)]
        exact = attention_weights(q, k, q_positions, k_positions, **rule)
        weights = [attention_weights(q, key, q_positions, k_positions, **rule) for key in coded[0]]
        out = mix(exact, v)
        size = np.linalg.norm(out) or 1.0
        found.append([np.linalg.norm(mix(w, value) - out) / size for w in weights for value in coded[1]])
        return out

    forward(model, ids, attend=spy)
    return np.array(found, np.float64)


def front(errors: np.ndarray) -> list[int]:
    """The pairs that no other beats in bits and error, the ones with most bits first.

    Parameters
    ----------
    errors : (9,) in the order of PAIRS

    Returns
    -------
    list of places in PAIRS
        Of pairs that are equal in both the first.

    Examples
    --------
    >>> [PAIRS[i] for i in front(np.array([9, 8, 7, 5, 3, 4, 6, 1, 0]))]
    [(8, 8), (8, 4), (4, 4), (4, 2), (2, 2)]
    """
    order = sorted(range(len(PAIRS)), key=lambda i: (sum(PAIRS[i]), errors[i], i))
    kept: list[int] = []
    for i in order:  # more bits have to buy something
        if not kept or errors[i] < errors[kept[-1]]:
            kept.append(i)
    return kept[::-1]


def search(fronts: list[list[int]], loss: Callable, bits: float, trials: int) -> list[Pair]:
    """The pairs of all layers, by the rule in the module's text.

    Parameters
    ----------
    fronts : list of list of int
        What `front` gives for every layer.
    loss : callable
        loss(pairs of all layers) -> float.
    bits, trials :
        As in `kvtuner`.

    Examples
    --------
    >>> search([[8, 4, 0], [8, 4, 0]], lambda pairs: -sum(map(sum, pairs)), bits=5, trials=9)
    [(4, 4), (4, 4)]
    """
    groups = list(dict.fromkeys(map(tuple, fronts)))  # in the order of their first layers
    of_layer = [groups.index(tuple(layer)) for layer in fronts]
    spread = lambda chosen: [PAIRS[chosen[group]] for group in of_layer]
    mean_bits = lambda chosen: sum(map(sum, spread(chosen))) / (2 * len(fronts))
    least = mean_bits([group[-1] for group in groups])
    if least > bits:
        raise ValueError(f"kvtuner cannot reach {bits:g} bits: the smallest pairs of the fronts need {least:g}")
    if prod(map(len, groups)) <= trials:
        ways = [way for way in product(*groups) if mean_bits(way) <= bits]
        return spread(min(ways, key=lambda way: (loss(spread(way)), mean_bits(way), spread(way))))
    at = [0] * len(groups)
    chosen = lambda: [group[i] for group, i in zip(groups, at, strict=True)]
    now = loss(spread(chosen()))
    while mean_bits(chosen()) > bits:
        steps = []
        before = mean_bits(chosen())
        for i, group in enumerate(groups):
            if at[i] + 1 < len(group):
                at[i] += 1
                then, after = loss(spread(chosen())), mean_bits(chosen())
                steps.append(((then - now) / (before - after), after, spread(chosen()), i, then))
                at[i] -= 1
        *_, best, now = min(steps)
        at[best] += 1
    return spread(chosen())
