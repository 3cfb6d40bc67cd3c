"""Zeros inside a gated feed-forward network: CATS, and what ReLU in place of SiLU would give.

    a = silu(gate x)     CATS: a = 0 where |a| <= tau
    y = down (a * (up x))     reading the rows of up and the columns of down where a is not 0

The gate is computed whole, and says which rows of up and columns of down are worth reading: two thirds of the network
at the sparsity of a. A ReLU in its place has true zeros, about nine of ten once a model is trained with it; without
that training it is another function, so it is a fact here and not a method.

Lee et al. 2024, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models", arXiv:2404.08763;
Mirzadeh et al. 2023, "ReLU Strikes Back", arXiv:2310.04564. Lesson: lessons/25-activation-sparsity.md.
"""

import numpy as np

from refllm.kernels.nn import silu


def gate_values(x: np.ndarray, gate: np.ndarray, *, tau: float = 0.0, relu: bool = False) -> np.ndarray:
    """What multiplies up x, with its zeros.

    Parameters
    ----------
    x : (tokens, in), gate : (width, in)
    tau : float
        |a| up to this becomes 0.
    relu : bool
        ReLU in place of SiLU.

    Returns
    -------
    (tokens, width)
    """
    a = x @ gate.T
    a = np.maximum(a, 0) if relu else silu(a)
    return np.where(np.abs(a) <= tau, a.dtype.type(0), a)


def sparse_mlp(x: np.ndarray, a: np.ndarray, up: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, int]:
    """The rest of the network for one token, reading only where the gate is open.

    Parameters
    ----------
    x : (in,), a : (width,)
    up : (width, in), down : (out, width)

    Returns
    -------
    y : (out,)
    read : int
        Weights of up and down that were read.

    Examples
    --------
    >>> x, a = np.ones(2), np.array([0.0, 2.0])
    >>> sparse_mlp(x, a, np.array([[9.0, 9.0], [1.0, 2.0]]), np.array([[9.0, 1.0]]))
    (array([6.]), 3)
    """
    open_ = np.flatnonzero(a)
    return down[:, open_] @ (a[open_] * (up[open_] @ x)), len(open_) * (up.shape[1] + down.shape[0])
