"""What a key-value cache is handed on a calibration text, and how much the loss minds an error of each number of it."""

import numpy as np

from refllm.kernels.autograd import Tensor, parameter
from refllm.kernels.packed.records import is_record
from refllm.model.cache import DenseStore, new_cache
from refllm.model.differentiable import NextToken
from refllm.model.llama import check_ids, forward
from refllm.model.model import Model
from refllm.model.walk import windows


def cached_values(
    model: Model, ids: np.ndarray, *, pre_rope: bool, window: int = 512
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values of every layer.

    Parameters
    ----------
    model : Model
    ids : (T,) integers
        Calibration tokens, cut into windows, each read from position 0 on.
    pre_rope : bool
        Whether keys are those before the rotation.
    window : int

    Returns
    -------
    list of (K, V), one a layer
        (windows, Hk, tokens, D) and (windows, Hk, tokens, Dv) in the type of the activations.

    Raises
    ------
    ValueError
        No stream of ids.
    """
    samples = _samples(model, ids, window)
    found: list[list] = [[] for _ in range(model.config.num_layers)]
    for row in samples:
        cache = new_cache(model, lambda layer: _Unrotated() if pre_rope else DenseStore())
        forward(model, row, cache=cache, last_only=True)
        for layer, store in zip(found, cache.stores, strict=True):
            layer.append((store.keys[0, :, : len(row)], store.values[0, :, : len(row)]))
    return [tuple(np.stack(side) for side in zip(*layer, strict=True)) for layer in found]


class _Unrotated(DenseStore):
    pre_rope = True


def cache_sensitivity(
    model: Model, ids: np.ndarray, *, pre_rope: bool, window: int = 512
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Squared gradients of the next-token loss (its mean over a window) by the keys and values of every layer.

    Parameters and errors are those of `cached_values`; besides, a ValueError for an architecture whose gradients are
    not known (see refllm.model.differentiable) and for windows of a single token. Packed weights count as what they
    decode to.

    Returns
    -------
    list of (K, V), one a layer
        float32, in the shapes of `cached_values`. What nothing reads (the key of the last token) has 0.
    """
    samples = _samples(model, ids, window)
    if samples.shape[1] < 2:
        raise ValueError(f"gradients of a next-token loss need windows of 2 tokens or more, got {samples.shape[1]}")
    params = {
        name: Tensor(w.dense() if is_record(w) else np.asarray(w, np.float32)) for name, w in model.weights.items()
    }
    wanted = ("rotated", "k")[pre_rope], "v"
    found: list[list] = [[] for _ in range(model.config.num_layers)]
    for row in samples:
        shifts: list[dict[str, Tensor]] = [{} for _ in found]

        def shifted(layer: int, part: str, x: Tensor, shifts=shifts) -> Tensor:
            """The same numbers, plus zeros whose gradients are asked for."""
            if part not in wanted:
                return x
            shifts[layer][part] = parameter(np.zeros_like(x.data))
            return x + shifts[layer][part]

        # The last token is read but its prediction not scored, so that as many tokens have gradients as have values.
        targets = np.append(row[1:], -1)
        NextToken(model.config, shifted)(params, (row[None], targets[None])).backward()
        for layer, of_layer in zip(found, shifts, strict=True):
            layer.append([(of_layer[part].grad[0] ** 2).swapaxes(0, 1) for part in wanted])
    return [tuple(np.stack(side) for side in zip(*layer, strict=True)) for layer in found]


def _samples(model: Model, ids: np.ndarray, window: int) -> np.ndarray:
    ids = check_ids(ids, model.config.vocab_size)
    if ids.ndim != 1:
        raise ValueError(f"calibration takes one stream of token ids (T,), got shape {ids.shape}; use ids.ravel()")
    return windows(ids, min(window, model.config.context_length))
