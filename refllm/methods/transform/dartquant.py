"""dartquant: rotations as in quarot, turned further until the activations themselves are spread evenly.

    Whip loss    L = mean over tokens of  sum_i exp(-|o_i|),      o = x Q
    QR-Orth      Q, R = qr(Z) with a positive diagonal of R;      plain gradient descent on Z

|o| = |x| is fixed, so pushing small numbers away from 0 takes from the large ones. A gradient step on Z needs no
projection: whatever Z becomes, Q is orthogonal. The gradient goes through the decomposition:

    dL/dZ = (G + Q copyltu(-G^T Q)) R^-T        G = dL/dQ, copyltu(M): the lower triangle of M mirrored upwards

Q (d, d) is learned from the inputs of q, k, v and of gate, up in all layers, whose gains were moved away; R (D, D), one
for each key-value head, from the inputs of o, the rows of all heads that read it. Both start from random Hadamard
matrices. No loss of the model and no quantizer is involved. The turns at run time are those of quarot.

Paper: Shao et al. 2025, "DartQuant: Efficient Rotational Distribution Calibration for LLM Quantization",
arXiv:2511.04063.
Differs from it: every step draws its rows at random from all layers (the published sampler takes whole sequences, and
always from the first tenth of its files); signs of R are made positive, which the loss does not see.
Stage: prefill, decode, memory
Inventory: 28
Lesson: lessons/13-rotations.md
Golden: transform/dartquant
Baseline: none, a transform alone does not compress
"""

import numpy as np

from refllm.kernels.hadamard import random_rotation
from refllm.model.equivalent import check_foldable, fold_norms, rotate_residual, rotate_values, turn_online
from refllm.model.model import Model
from refllm.model.walk import walk


def dartquant(
    model: Model,
    ids,
    *,
    on_report=None,
    steps: int = 100,
    rows: int = 2048,
    rate: float = 0.001,
    momentum: float = 0.9,
    rotation: str = "hadamard",
    online: bool = True,
    seed: int = 0,
) -> Model:
    """Rotate a model by matrices learned from its activations.

    Parameters
    ----------
    model : Model
        Dense weights.
    ids : (T,) integers
        Calibration tokens.
    on_report : ignored
        Part of every model method's call.
    steps : int
        Of gradient descent, for each matrix; 0 gives quarot.
    rows : int
        Activations that a step looks at, drawn at random; all where there are fewer.
    rate, momentum : float
        Of gradient descent.
    rotation : str
        Where it starts, hadamard or orthogonal, see `quarot`.
    online : bool
        Turn the inputs of o and down at run time, see `quarot`.
    seed : int
        Of the start and of the draws.

    Returns
    -------
    Model
        The same function.

    Raises
    ------
    ValueError
        As `quarot`; negative steps, no rows, a rate that is negative, momentum outside [0, 1).
    """
    if steps < 0 or rows < 1 or not 0 <= rate < np.inf or not 0 <= momentum < 1:
        raise ValueError(
            "steps must be 0 or more, rows 1 or more, rate finite and not negative, momentum from 0 to below 1; got "
            f"{steps}, {rows}, {rate}, {momentum}"
        )
    check_foldable(model, "rotations are folded")
    rng = np.random.default_rng(seed)
    config = model.config
    heads, D = config.num_kv_heads, config.head_dim
    Q = random_rotation(config.hidden_size, rotation, rng, "the residual stream")
    R = np.broadcast_to(random_rotation(D, rotation, rng, "a head"), (heads, D, D))
    folded = fold_norms(model)
    learn = lambda X, start: learn_rotation(X, start, rng, steps=steps, rows=rows, rate=rate, momentum=momentum)
    stream, values = [], []
    for layer, stats in walk(folded, ids):
        of = lambda linear, stats=stats, layer=layer: stats[f"model.layers.{layer}.{linear}_proj.weight"].X
        stream += [of("self_attn.q"), of("mlp.gate")]
        mixed = of("self_attn.o").reshape(-1, heads, config.num_heads // heads, D)
        values.append(learn(mixed.swapaxes(0, 1).reshape(heads, -1, D), R))
    turned = rotate_residual(folded, learn(np.concatenate(stream), Q))
    for layer, matrices in enumerate(values):
        turned = rotate_values(turned, layer, matrices)
    return turn_online(turned) if online else turned


def learn_rotation(
    X: np.ndarray,
    start: np.ndarray,
    rng: np.random.Generator,
    *,
    steps: int = 100,
    rows: int = 2048,
    rate: float = 0.001,
    momentum: float = 0.9,
) -> np.ndarray:
    """The rotation of X that the Whip loss leads to, by gradient descent with momentum through QR.

    Parameters
    ----------
    X : (..., n, d) float
    start : (..., d, d) orthogonal

    Returns
    -------
    (..., d, d) float64, orthogonal
    """
    Z = np.array(start, np.float64)
    velocity = np.zeros_like(Z)
    for _ in range(steps):
        drawn = rng.choice(X.shape[-2], min(rows, X.shape[-2]), replace=False)
        Q, R = qr(Z)
        _, gradient = whip(X[..., drawn, :].astype(np.float64), Q)
        velocity = momentum * velocity + qr_gradient(Q, R, gradient)
        Z -= rate * velocity
    return qr(Z)[0]


def whip(X: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Whip loss of rows X turned by Q, and its gradient with respect to Q.

    Parameters
    ----------
    X : (..., n, d), Q : (..., d, d) float64

    Returns
    -------
    loss : (...) float64
        Mean over the rows of the sum over i of exp(-|o_i|), o = x Q.
    gradient : (..., d, d) float64
        Where o_i = 0, of all slopes 0 is taken.

    Examples
    --------
    >>> loss, gradient = whip(np.array([[1.0, 2.0]]), np.eye(2))
    >>> loss.round(4).item(), gradient.round(4).tolist()
    (0.5032, [[-0.3679, -0.1353], [-0.7358, -0.2707]])
    """
    o = X @ Q
    small = np.exp(-np.abs(o))
    return small.sum(axis=-1).mean(axis=-1), X.swapaxes(-1, -2) @ (-np.sign(o) * small) / X.shape[-2]


def qr(Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Z = Q R with a positive diagonal of R, which makes both unique and Q = Z of an orthogonal Z.

    Parameters
    ----------
    Z : (..., d, d) float64, invertible
    """
    Q, R = np.linalg.qr(Z)
    signs = np.where(np.einsum("...ii->...i", R) < 0, -1.0, 1.0)
    return Q * signs[..., None, :], R * signs[..., :, None]


def qr_gradient(Q: np.ndarray, R: np.ndarray, G: np.ndarray) -> np.ndarray:
    """dL/dZ from G = dL/dQ, for Z = Q R and a loss that R does not enter.

    Parameters
    ----------
    Q, R, G : (..., d, d) float64

    References
    ----------
    Walter and Lehmann 2010, "Algorithmic differentiation of linear algebra functions", arXiv:1009.6112, section 3.
    """
    M = -G.swapaxes(-1, -2) @ Q
    mirrored = np.tril(M) + np.tril(M, -1).swapaxes(-1, -2)
    return np.linalg.solve(R, (G + Q @ mirrored).swapaxes(-1, -2)).swapaxes(-1, -2)
