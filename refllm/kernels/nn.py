"""The elementwise pieces of a decoder: RMSNorm, activations, softmax, cross-entropy.

Every function keeps the floating type it is given: float32 in, float32 out; float64 in, float64 throughout. Sums, roots
and exponentials are float64 and rounded once: so a faster pass that adds in another order gets the same float32 nearly
always, and where activations are rounded to 8 bits no number falls on the other side of a border between two codes.
Letters as in docs/shapes.md. Lesson: lessons/01-forward-pass.md.
"""

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, offset: float = 0.0) -> np.ndarray:
    """Root-mean-square normalisation over the last axis: x / sqrt(mean(x^2) + eps) * (offset + weight).

    Parameters
    ----------
    x : (..., n) float32 or float64
    weight : (n,) same type as x
    eps : float
        Inside the root, so a zero vector stays zero.
    offset : float
        Gemma stores the gain minus one: 1.0 there, 0.0 elsewhere.

    Returns
    -------
    (..., n) array of the type of x

    References
    ----------
    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467, Eq. 4.

    Examples
    --------
    >>> rms_norm(np.array([3.0, 4.0]), np.ones(2), 0.0).round(4).tolist()
    [0.8485, 1.1314]
    """
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    root = np.sqrt(mean_square + eps).astype(x.dtype)
    gain = weight + x.dtype.type(offset) if offset else weight
    return x / root * gain


def _times_sigmoid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / (1 + exp(-y)), float64; exp(-|y|) is used so that no argument overflows."""
    e = np.exp(-np.abs(y))
    return x * (np.where(y >= 0, 1, e) / (1 + e))


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), elementwise.

    Examples
    --------
    >>> silu(np.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.7311]
    """
    wide = x.astype(np.float64)
    return _times_sigmoid(wide, wide).astype(x.dtype)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415, section 2.
    Gemma uses this form, not the one with erf.

    Examples
    --------
    >>> gelu_tanh(np.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.8412]
    """
    wide = x.astype(np.float64)
    y = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide * wide * wide)
    return _times_sigmoid(wide, 2 * y).astype(x.dtype)  # (1 + tanh y) / 2 = sigmoid 2y, which keeps small values exact


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis. A row that is all -inf (nothing visible) gives zeros, not NaN.

    Examples
    --------
    >>> softmax(np.array([[0.0, 0.0], [-np.inf, -np.inf]])).tolist()
    [[0.5, 0.5], [0.0, 0.0]]
    """
    top = np.max(x, axis=-1, keepdims=True).astype(np.float64)
    e = x - np.where(np.isneginf(top), 0, top)
    # In place: new memory for each step would take as long as the exponentials. That of -inf would take as long as any.
    np.exp(e, out=e, where=e > -np.inf)
    np.maximum(e, 0, out=e)
    total = np.sum(e, axis=-1, keepdims=True)
    e /= np.where(total == 0, 1, total)
    return e.astype(x.dtype, copy=False)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, in float64 whatever comes in: it feeds sums over many tokens.

    Examples
    --------
    >>> log_softmax(np.array([1e4, 1e4], np.float32)).round(4).tolist()
    [-0.6931, -0.6931]
    """
    x = x.astype(np.float64)
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target, in nats.

    Parameters
    ----------
    logits : (..., V) float
    targets : (...) integer ids

    Returns
    -------
    (...) float64

    Raises
    ------
    ValueError
        A target outside 0..V-1: a negative one would quietly count from the end.

    Examples
    --------
    >>> cross_entropy(np.zeros((1, 4)), np.array([2])).round(4).tolist()
    [1.3863]
    """
    targets = np.asarray(targets)
    if targets.size and not 0 <= targets.min() <= targets.max() < logits.shape[-1]:
        raise ValueError(f"targets must be ids 0..{logits.shape[-1] - 1}, got {targets.min()}..{targets.max()}")
    return -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
