"""The diagonal of the Fisher information: how much the loss on a text minds an error of each weight."""

from collections.abc import Sequence

import numpy as np

from refllm.kernels.autograd import Tensor, parameter
from refllm.kernels.packed.records import is_record
from refllm.model.differentiable import NextToken
from refllm.model.llama import check_ids
from refllm.model.model import Model
from refllm.model.walk import windows


def fisher_diagonal(model: Model, ids: np.ndarray, names: Sequence[str], window: int = 128) -> dict[str, np.ndarray]:
    """Mean squared gradients of the next-token loss.

    Parameters
    ----------
    model : Model
        A plain Llama (see refllm.model.differentiable). Packed weights count as what they decode to.
    ids : (T,) integers
        Calibration tokens, cut into windows: each is a sample, whose loss is its mean over tokens.
    names : sequence of str
        The weights that are asked for.
    window : int
        Tokens of a sample. Many short samples tell the mean of a square from the square of a mean.

    Returns
    -------
    dict of (out, in) float32

    Raises
    ------
    ValueError
        An architecture whose gradients are not known; windows of a single token.
    """
    samples = windows(check_ids(np.asarray(ids).ravel(), model.config.vocab_size), window)
    if samples.shape[1] < 2:
        raise ValueError(f"gradients of a next-token loss need samples of 2 tokens or more, got {samples.shape[1]}")
    dense = {name: w.dense() if is_record(w) else np.asarray(w, np.float32) for name, w in model.weights.items()}
    constants = {name: Tensor(w) for name, w in dense.items() if name not in names}
    loss, sums = NextToken(model.config), {name: np.zeros_like(dense[name]) for name in names}
    for row in samples:
        params = constants | {name: parameter(dense[name]) for name in names}
        loss(params, (row[None, :-1], row[None, 1:])).backward()
        for name in names:
            sums[name] += params[name].grad ** 2
    for total in sums.values():
        total /= len(samples)
    return sums
