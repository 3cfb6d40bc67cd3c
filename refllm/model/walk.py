"""walk: one decoder layer after another, with the inputs of its linears, earlier layers already compressed."""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from refllm.kernels.stats import Stats
from refllm.model import moe
from refllm.model.config import ModelConfig
from refllm.model.llama import block, check_ids, embed
from refllm.model.model import Model
from refllm.model.names import linear_shapes

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def layer_linears(layer: int, config: ModelConfig | None = None) -> tuple[str, ...]:
    """Weight names of the linears of one layer, in the order in which they run; without a config the seven of a Llama.

    Examples
    --------
    >>> layer_linears(3)[0]
    'model.layers.3.self_attn.q_proj.weight'
    """
    names = PROJECTIONS if config is None else linear_shapes(config, layer)
    return tuple(f"model.layers.{layer}.{name}.weight" for name in names)


def first_layer(model: Model) -> Model:
    """The model cut down to its first layer, to try something out."""
    low = model.config.low_rank_kv
    if low is not None:
        low = replace(low, key_ranks=low.key_ranks[:1], value_ranks=low.value_ranks[:1])
    config = replace(model.config, num_layers=1, sliding_layers=model.config.sliding_layers[:1], low_rank_kv=low)
    others = re.compile(r"model\.layers\.(?!0\.)")
    return replace(model, config=config, weights={n: w for n, w in model.weights.items() if not others.match(n)})


def windows(ids: np.ndarray, length: int) -> np.ndarray:
    """Cut a token stream into (n, length) windows; the tail is dropped, a stream shorter than a window is one window.

    Examples
    --------
    >>> windows(np.arange(7), 3).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    length = min(length, len(ids))
    return ids[: len(ids) // length * length].reshape(-1, length)


def walk(model: Model, ids: np.ndarray, window: int = 512) -> Iterator[tuple[int, dict[str, Stats]]]:
    """Yield (layer, {weight name: Stats}) for every layer.

    The caller replaces entries of `model.weights` between two steps; the next layer's inputs then come from the
    replaced weights. Linears inside one layer see that layer's original activations, as in SparseGPT and Wanda: the
    statistics of all of them are collected in one pass. Linears that share an input share one Stats. An expert sees
    the tokens that were routed to it; one that got none is shown all tokens of its layer.

    Parameters
    ----------
    model : Model
        Its weight dictionary is read afresh at every step.
    ids : (T,) integers
        Calibration tokens, cut into windows of `window` tokens.
    window : int

    Raises
    ------
    ValueError
        Not one stream of ids.
    """
    ids = check_ids(ids, model.config.vocab_size)
    if ids.ndim != 1:
        raise ValueError(f"calibration takes one stream of token ids (T,), got shape {ids.shape}; use ids.ravel()")
    tokens = windows(ids, min(window, model.config.context_length))
    positions = np.arange(tokens.shape[1])
    hidden = [embed(model, row[None]) for row in tokens]  # one window at a time bounds the memory of attention
    for layer in range(model.config.num_layers):
        seen: dict[tuple[str, ...], list[np.ndarray]] = {}
        observe = lambda names, x, seen=seen: seen.setdefault(names, []).append(x.reshape(-1, x.shape[-1]))
        for x in hidden:
            block(model, layer, x, positions, observe=observe)
        if model.config.has_experts(layer):
            moe.show_all(model, layer, seen, observe)
        stats = {}
        for names, inputs in seen.items():
            shared = Stats(np.concatenate(inputs))
            stats.update(dict.fromkeys(names, shared))
        seen.clear()
        yield layer, stats
        hidden = [block(model, layer, x, positions) for x in hidden]
