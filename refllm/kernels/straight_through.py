"""Rounding to a grid as an operator of the tape: what is learned through it is what is stored afterwards.

    y = s (c - z)    c = clip(rint(x / s) + z, 0, levels)

rint counts as the identity (straight-through), the clip does not. With u = x / s and `inside` 1 where nothing is
clipped, else 0, that makes

    dy/dx = inside          dy/ds = (c - z) - inside u          dy/dz = s (inside - 1)

so a step that is too small is felt by what it clips, and one that is too large by the rounding errors c - z - u (Esser
et al. 2020, "Learned step size quantization", arXiv:1902.08153, section 2.1; Bhalgat et al. 2020, "LSQ+",
arXiv:2004.09576, for z). Where s and z come from the numbers themselves, gradients reach these through both.

Values are those of refllm.kernels.grids (where the lowest code is 0; SymmetricGrid leaves that one out) and of
refllm.kernels.packed.activations to the last bit, for float32 numbers: every operation here is one of theirs.
"""

import numpy as np

from refllm.kernels.autograd import Tensor, clip, record, round_through


def quantize(x: Tensor, scale: Tensor, zero: Tensor | int, levels: int) -> Tensor:
    """x rounded to a grid and back.

    Parameters
    ----------
    x : Tensor [..., g]
    scale : Tensor [..., 1], positive
    zero : Tensor like scale, whole numbers, or one whole number for all
    levels : int
        The largest code; the smallest is 0.

    Examples
    --------
    >>> x = Tensor(np.array([[-1.0, 0.4, 2.6, 9.0]]))
    >>> quantize(x, Tensor(np.array([[1.0]])), 1, 3).data.tolist()
    [[-1.0, 0.0, 2.0, 2.0]]
    """
    learned = isinstance(zero, Tensor)
    offset = zero.data if learned else x.data.dtype.type(zero)
    ratio = x.data / scale.data
    codes = np.rint(ratio)
    codes += offset
    inside = (codes >= 0) & (codes <= levels)
    np.clip(codes, 0, levels, out=codes)
    codes -= offset

    def pull(g):
        of_scale = of_zero = None
        if scale.needs_grad:
            of_scale = np.einsum("...g,...g->...", g, codes - ratio * inside)[..., None]
        if learned and zero.needs_grad:
            of_zero = -scale.data * (g * ~inside).sum(axis=-1, keepdims=True)
        of_x = g * inside if x.needs_grad else None
        return (of_x, of_scale, of_zero) if learned else (of_x, of_scale)

    return record(codes * scale.data, (x, scale, zero) if learned else (x, scale), pull)


def nearest(W: Tensor, grid) -> Tensor:
    """W rounded to the grid that fits it, and back; the whole gradient passes, as if nothing had happened.

    Where W itself is learned, its scale follows by being fitted anew at every step, and what saturates must be free to
    come back: a mask, or a slope through the scale, would pull at the largest weight of a group alone.

    Parameters
    ----------
    W : Tensor (out, in), finite
    grid : grid of refllm.kernels.grids

    Examples
    --------
    >>> from refllm.kernels.grids import TwosGrid
    >>> nearest(Tensor(np.array([[4.0, -4.0, 1.2]])), TwosGrid(3, -1)).data.tolist()
    [[3.0, -4.0, 1.0]]
    """
    fitted = grid.fit(W.data)
    decoded = grid.decode(grid.encode(W.data, *fitted), *fitted)
    return record(decoded.astype(W.data.dtype), (W,), lambda g: (g,))


def largest(x: Tensor, sign: int = 1) -> Tensor:
    """The largest of the last axis and 0, kept as an axis of 1; with sign -1 the smallest. The gradient goes to its
    place, the first of equals.

    Examples
    --------
    >>> x = Tensor(np.array([[3.0, -1.0], [-2.0, -4.0]]))
    >>> largest(x).data.tolist(), largest(x, -1).data.tolist()
    ([[3.0], [0.0]], [[-1.0], [-4.0]])
    """
    place = np.argmax(sign * x.data, axis=-1)[..., None]
    value = np.take_along_axis(x.data, place, axis=-1)
    beyond = sign * value > 0

    def pull(g):
        gradient = np.zeros_like(x.data)
        np.put_along_axis(gradient, place, g * beyond, axis=-1)
        return (gradient,)

    return record(np.where(beyond, value, x.data.dtype.type(0)), (x,), pull)


def store(x: Tensor, dtype: str) -> Tensor:
    """x rounded to the type it will be stored in; the gradient passes."""
    return record(x.data.astype(dtype).astype(x.data.dtype), (x,), lambda g: (g,))


def magnitude(hi: Tensor, lo: Tensor) -> Tensor:
    """max(hi, -lo); hi of equals."""
    upper = hi.data >= -lo.data
    return record(np.where(upper, hi.data, -lo.data), (hi, lo), lambda g: (g * upper, -g * ~upper))


def zero_point(lo: Tensor, scale: Tensor, levels: int) -> Tensor:
    """The code of 0 on a grid that begins at lo: clip(rint(-lo / scale), 0, levels)."""
    return clip(round_through(-lo / scale), 0, levels)


def round_tokens(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Every row of the last axis rounded with a scale of its own: the differentiable twin of `Rounding(bits)`.

    Examples
    --------
    >>> round_tokens(Tensor(np.array([[7.0, -3.4, 0.0]])), 4, symmetric=True).data.tolist()
    [[7.0, -3.0, 0.0]]
    """
    hi, lo = largest(x), largest(x, -1)
    apart = lambda scale: clip(scale, float(np.finfo(x.data.dtype).tiny), np.inf)  # from 0: a row of zeros
    if symmetric:
        most = (1 << (bits - 1)) - 1
        return quantize(x, apart(magnitude(hi, lo) / float(most)), most, 2 * most)
    levels = (1 << bits) - 1
    scale = apart(hi / float(levels) - lo / float(levels))
    return quantize(x, scale, zero_point(lo, scale, levels), levels)
