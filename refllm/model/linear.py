"""Linears of a model by name: products of one input with several weights, and the gated pair every feed-forward has."""

from collections.abc import Callable

import numpy as np

from refllm.kernels.nn import ACTIVATIONS
from refllm.kernels.packed import matmul_each
from refllm.model.model import Model


def linear(model: Model, names: tuple[str, ...], x: np.ndarray, observe: Callable | None = None) -> list[np.ndarray]:
    """The products of one input with several weights, each with its bias where the checkpoint has one.

    `model.runtime.activations` is float32, or int8 or int4: weights stored as codes then meet inputs of so many bits.

    Parameters
    ----------
    names : tuple of str
        Without the ending `.weight`.
    x : (..., in)
    observe : callable, optional
        As in `refllm.model.llama.forward`.

    Returns
    -------
    list of (..., out)
    """
    names = tuple(name + ".weight" for name in names)
    if observe is not None:
        observe(names, x)
    products = matmul_each(x, [model.weights[name] for name in names], model.runtime.activations)
    biases = [model.weights.get(name.removesuffix("weight") + "bias") for name in names]
    return [y if bias is None else y + bias for y, bias in zip(products, biases, strict=True)]


def gated(model: Model, prefix: str, x: np.ndarray, observe: Callable | None = None) -> np.ndarray:
    """down( act(gate x) * up x ) of the three linears under `prefix`: (..., d) -> (..., d)."""
    gate, up = linear(model, (prefix + "gate_proj", prefix + "up_proj"), x, observe)
    return linear(model, (prefix + "down_proj",), ACTIVATIONS[model.config.activation](gate) * up, observe)[0]
