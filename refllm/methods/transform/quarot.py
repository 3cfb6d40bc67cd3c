"""quarot: turn every activation that meets a weight by a random Hadamard matrix, so that no channel stands out.

    residual stream    x Q      Q = diag(+-1) H / sqrt(d), after the gains of the norms moved into the weights behind
                                them; folded into every weight that reads or writes the stream, and the embedding
    values             v R      one R for every head: out of v, undone in the columns of o
    input of o         mixed across heads, and
    input of down      mixed across all channels, by the fast transform while the model runs (records `Rotated`)

    RMSNorm(x Q) = RMSNorm(x) Q without a gain: |x Q| = |x|

A rotation keeps every product, (x Q)(W Q)^T = x W^T, and lengths. An outlier of size c in one of d channels becomes
c / sqrt(d) in all of them: the largest number of a token falls from c to a few times its mean, and with it the step of
4-bit activations. Nothing is calibrated; the tokens are not looked at. The head is untied from the embedding, because
the gain of the last norm moves into it alone: so many more bytes are counted.

Paper: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv:2404.00456.
Differs from it: the rotation of values has random signs, too; where no Hadamard matrix has as many rows as there are
heads, the whole input of o is turned; queries and keys are not turned for a quantized cache here. SpinQuant
(arXiv:2405.16406) learns Q and R through the quantized network; `dartquant` learns them from activations.
Stage: prefill, decode, memory
Inventory: 28
Lesson: lessons/13-rotations.md
Golden: transform/quarot
Baseline: none, a transform alone does not compress
"""

import numpy as np

from refllm.kernels.hadamard import random_rotation
from refllm.model.equivalent import check_foldable, fold_norms, rotate_residual, rotate_values, turn_online
from refllm.model.model import Model


def quarot(
    model: Model, ids=None, *, on_report=None, rotation: str = "hadamard", online: bool = True, seed: int = 0
) -> Model:
    """Rotate a model.

    Parameters
    ----------
    model : Model
        Dense weights.
    ids, on_report : ignored
        Part of every model method's call.
    rotation : str
        hadamard (random signs), or orthogonal: drawn evenly from all rotations, for widths that have no Hadamard
        matrix here. Only of the rotations that are folded into weights.
    online : bool
        Turn the inputs of o and down, too, which costs additions at run time.
    seed : int
        Of the random signs, or of the rotation.

    Returns
    -------
    Model
        The same function. o and down are `Rotated` where `online`; what is inside is packed by later stages.

    Raises
    ------
    ValueError
        Packed weights, norms on branches (Gemma 3), no Hadamard matrix of a width, unknown rotation.

    Examples
    --------
    >>> import refllm
    >>> turned = quarot(refllm.load("tiny"))
    >>> type(turned.weights["model.layers.0.mlp.down_proj.weight"]).__name__
    'Rotated'
    """
    check_foldable(model, "rotations are folded")
    rng = np.random.default_rng(seed)
    config = model.config
    Q = random_rotation(config.hidden_size, rotation, rng, "the residual stream")
    R = random_rotation(config.head_dim, rotation, rng, "a head")
    model = rotate_residual(fold_norms(model), Q)
    for layer in range(config.num_layers):
        model = rotate_values(model, layer, R)
    return turn_online(model) if online else model
