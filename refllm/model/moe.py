"""A mixture of experts: every token goes through the few feed-forward branches that a router chooses for it.

    logits = W_gate x        score = sigmoid(logits)  (V3; softmax over all experts in V2)
    choice by score + bias:  the best groups, and of their experts the best `active`
    weight = score of the chosen, divided by their sum where `normalised`, times `scaling`
    y = sum of weight * expert(x)  +  shared(x)

The bias of V3 balances the load: it steers the choice and is no part of the weight. A group counts as much as its two
best experts together (V3), or as its best one (V2). Equal scores: the expert with the lower number.

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 2.1.2; V2: arXiv:2405.04434, section 2.2.
"""

from collections.abc import Callable

import numpy as np

from refllm.kernels.nn import softmax
from refllm.model.config import Experts
from refllm.model.linear import gated
from refllm.model.model import Model
from refllm.model.names import ROUTER, ROUTER_BIAS


def mlp_branch(model: Model, layer: int, x: np.ndarray, *, observe: Callable | None = None) -> np.ndarray:
    """The feed-forward branch: normed states (B, T, d) -> (B, T, d). Parameters as in `refllm.model.llama.block`.

    `observe` sees all tokens as the input of the router, and of each expert the tokens that came to it.
    """
    experts, prefix = model.config.experts, f"model.layers.{layer}."
    tokens = x.reshape(-1, x.shape[-1])
    if observe is not None:
        observe((prefix + ROUTER,), tokens)
    logits = tokens @ model.weights[prefix + ROUTER].T
    chosen, weight = route(experts, logits, model.weights.get(prefix + ROUTER_BIAS))
    out = np.zeros_like(tokens)
    for i in range(experts.count):
        token, place = np.nonzero(chosen == i)
        if len(token):
            y = gated(model, f"{prefix}mlp.experts.{i}.", tokens[token], observe)
            out[token] += weight[token, place, None] * y  # a token chooses an expert once
    out = out.reshape(x.shape)
    return out + gated(model, prefix + "mlp.shared_experts.", x, observe) if experts.shared else out


def show_all(model: Model, layer: int, seen: dict[tuple[str, ...], list[np.ndarray]], observe: Callable) -> None:
    """After calibration: an expert that no token came to is shown all tokens of its layer.

    Parameters
    ----------
    seen : dict
        {names: inputs} of what `observe` has been called with; the router's entry is taken out.
    """
    prefix = f"model.layers.{layer}.mlp."
    tokens = np.concatenate(seen.pop((prefix.removesuffix("mlp.") + ROUTER,)))
    reached = {name for names in seen for name in names}
    for i in range(model.config.experts.count):
        expert = f"{prefix}experts.{i}."
        if expert + "down_proj.weight" not in reached:
            gated(model, expert, tokens, observe)


def route(experts: Experts, logits: np.ndarray, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which experts each token goes to, and with what weight.

    Parameters
    ----------
    experts : Experts
    logits : (N, count) float32 or float64
    bias : (count,), optional
        Added to the scores for the choice only.

    Returns
    -------
    chosen : (N, active) integer, best first
    weight : (N, active) of the type of logits

    Examples
    --------
    >>> four = Experts(count=4, active=2, intermediate_size=8, normalised=True)
    >>> chosen, weight = route(four, np.array([[0.0, 2.0, -1.0, 0.0]]))
    >>> chosen.tolist(), weight.round(3).tolist()
    ([[1, 0]], [[0.638, 0.362]])
    """
    if experts.scoring == "sigmoid":
        e = np.exp(-np.abs(logits))  # no argument overflows
        score = np.where(logits >= 0, 1 / (1 + e), e / (1 + e))
    else:
        score = softmax(logits)
    ranked = score if bias is None else score + bias
    if experts.groups > 1:
        grouped = ranked.reshape(len(ranked), experts.groups, -1)
        best = 2 if experts.scoring == "sigmoid" else 1
        of_group = np.sort(grouped, axis=-1)[..., -best:].sum(axis=-1)
        kept = _largest(of_group, experts.active_groups)
        closed = np.ones(of_group.shape, bool)
        np.put_along_axis(closed, kept, False, axis=-1)
        ranked = np.where(closed[..., None], -np.inf, grouped).reshape(ranked.shape)
    chosen = _largest(ranked, experts.active)
    weight = np.take_along_axis(score, chosen, axis=-1)
    if experts.normalised:
        weight = weight / (weight.sum(axis=-1, keepdims=True) + logits.dtype.type(1e-20))
    return chosen, weight * logits.dtype.type(experts.scaling)


def _largest(x: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest numbers of each row, largest first; of equal ones the first."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :count]
