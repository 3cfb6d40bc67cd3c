"""A small reverse-mode autograd: a tape of NumPy arrays.

Every operator computes its result at once and leaves behind a `pull`: the function that turns the gradient of the
result into the gradients of the operands (the vector-Jacobian product). `Tensor.backward` walks the tape backwards and
adds up what arrives at each operand. The operators here are enough to write any parametrisation; `refllm.kernels.fused`
has the parts of a transformer in one piece each, with a backward pass written out by hand.

Rounding has no useful derivative; `round_through` passes the gradient straight through (Bengio et al. 2013,
"Estimating or propagating gradients through stochastic neurons", arXiv:1308.3432), which is what quantisation-aware
training needs. All operators keep the dtype of their operands: float32 for training, float64 for checking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

_clock = count()  # creation order is a valid topological order of the tape


class Tensor:
    """A NumPy array that remembers how it was made.

    Parameters
    ----------
    data : ndarray, float32 or float64, any shape
    needs_grad : bool
        True for a parameter. A result needs a gradient when one of its parents does; otherwise nothing is recorded, so
        the same code without parameters is plain inference.

    Attributes
    ----------
    grad : ndarray or None
        After `backward`: d(result)/d(self), same shape as `data`; kept for parameters only.
    """

    __slots__ = ("data", "grad", "needs_grad", "order", "parents", "pull")
    __array_ufunc__ = None  # array + tensor is left to the tensor

    def __init__(self, data: np.ndarray, needs_grad: bool = False):
        self.data = np.asarray(data)
        self.grad: np.ndarray | None = None
        self.needs_grad = needs_grad
        self.order = next(_clock)
        self.parents: tuple[Tensor, ...] = ()
        self.pull: Callable | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.data.shape

    def backward(self) -> None:
        """Fill `.grad` of every parameter this scalar was made from; the tape is consumed.

        Raises
        ------
        ValueError
            If the tensor is not a scalar.
        """
        if self.data.size != 1:
            raise ValueError(f"backward starts from a scalar loss, got shape {self.shape}; sum or average it first")
        self.grad = np.ones_like(self.data)
        for node in _reachable(self):
            gradients = node.pull(node.grad)
            for parent, gradient in zip(node.parents, gradients, strict=True):
                if parent.needs_grad:
                    # A new array on the second arrival: the first may be shared with another operand.
                    parent.grad = gradient if parent.grad is None else parent.grad + gradient
            node.grad = node.pull = None  # frees what the operator kept
            node.parents = ()

    def __add__(self, other):
        return add(self, other)

    __radd__ = __add__

    def __sub__(self, other):
        return add(self, -other)

    def __rsub__(self, other):
        return add(other, -self)

    def __mul__(self, other):
        return mul(self, other)

    __rmul__ = __mul__

    def __neg__(self):
        return mul(self, -1.0)

    def __truediv__(self, other):
        return divide(self, other)

    def __rtruediv__(self, other):
        return divide(other, self)

    def __matmul__(self, other):
        return matmul(self, other)

    def __getitem__(self, index):
        return take(self, index)

    def reshape(self, *shape):
        """The same numbers in another shape."""
        return reshape(self, shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape)

    def transpose(self, *axes):
        """Axes in another order."""
        return transpose(self, axes)

    def sum(self, axis=None, keepdims=False):
        """Sum over the axes named, or over everything."""
        return total(self, axis, keepdims)


def parameter(data: np.ndarray) -> Tensor:
    """A leaf whose gradient is wanted."""
    return Tensor(data, needs_grad=True)


def _reachable(result: Tensor) -> list[Tensor]:
    """The recorded results behind `result`, newest first."""
    seen, stack, nodes = set(), [result], []
    while stack:
        node = stack.pop()
        if id(node) in seen or node.pull is None:
            continue
        seen.add(id(node))
        nodes.append(node)
        stack.extend(node.parents)
    return sorted(nodes, key=lambda node: -node.order)


def _tensor(value, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(np.asarray(value, dtype=like.data.dtype))


def _both(a, b) -> tuple[Tensor, Tensor]:
    like = a if isinstance(a, Tensor) else b
    return _tensor(a, like), _tensor(b, like)


def record(data: np.ndarray, parents: Sequence[Tensor], pull: Callable) -> Tensor:
    """The result of an operator: what every operator here ends with, and all a new one has to call.

    Parameters
    ----------
    data : ndarray
        The operator's value.
    parents : sequence of Tensor
        Its operands.
    pull : callable
        `pull(gradient of data) -> one gradient per parent`, same shapes as the parents.
    """
    result = Tensor(data)
    if any(parent.needs_grad for parent in parents):
        result.needs_grad, result.parents, result.pull = True, tuple(parents), pull
    return result


def _unbroadcast(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum a gradient over the axes along which its operand was repeated."""
    extra = gradient.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        extra + i for i, n in enumerate(shape) if n == 1 and gradient.shape[extra + i] != 1
    )
    return gradient.sum(axis=axes, keepdims=True).reshape(shape) if axes else gradient


# Operators


def add(a, b) -> Tensor:
    """a + b with broadcasting."""
    a, b = _both(a, b)
    return record(a.data + b.data, (a, b), lambda g: (_unbroadcast(g, a.shape), _unbroadcast(g, b.shape)))


def mul(a, b) -> Tensor:
    """a * b with broadcasting."""
    a, b = _both(a, b)
    return record(
        a.data * b.data, (a, b), lambda g: (_unbroadcast(g * b.data, a.shape), _unbroadcast(g * a.data, b.shape))
    )


def divide(a, b) -> Tensor:
    """a / b with broadcasting, rounded once."""
    a, b = _both(a, b)
    ratio = a.data / b.data

    def pull(g):
        part = g / b.data
        return (
            _unbroadcast(part, a.shape) if a.needs_grad else None,
            _unbroadcast(-part * ratio, b.shape) if b.needs_grad else None,
        )

    return record(ratio, (a, b), pull)


def power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent, the exponent a constant."""
    return record(x.data**exponent, (x,), lambda g: (g * exponent * x.data ** (exponent - 1),))


def exp(x: Tensor) -> Tensor:
    """Elementwise exponential."""
    y = np.exp(x.data)
    return record(y, (x,), lambda g: (g * y,))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), through exp(-|x|), which cannot overflow."""
    small = np.exp(-np.abs(x.data))
    y = np.where(x.data < 0, small, 1) / (1 + small)
    return record(y, (x,), lambda g: (g * y * (1 - y),))


def log(x: Tensor) -> Tensor:
    """Elementwise natural logarithm."""
    return record(np.log(x.data), (x,), lambda g: (g / x.data,))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices and stacks of matrices, [..., n, k] @ [..., k, m]; leading axes broadcast."""
    a, b = _both(a, b)
    if a.data.ndim < 2 or b.data.ndim < 2:
        raise ValueError(
            f"matmul takes matrices or stacks of them, got shapes {a.shape} and {b.shape}; reshape vectors"
        )

    def pull(g):
        return (
            _unbroadcast(g @ np.swapaxes(b.data, -1, -2), a.shape),
            _unbroadcast(np.swapaxes(a.data, -1, -2) @ g, b.shape),
        )

    return record(a.data @ b.data, (a, b), pull)


def total(x: Tensor, axis=None, keepdims: bool = False) -> Tensor:
    """Sum over `axis` (int, tuple or None for all)."""

    def pull(g):
        if axis is not None and not keepdims:
            g = np.expand_dims(g, axis)
        return (np.broadcast_to(g, x.shape),)

    return record(np.asarray(x.data.sum(axis=axis, keepdims=keepdims)), (x,), pull)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same numbers in another shape."""
    return record(x.data.reshape(shape), (x,), lambda g: (g.reshape(x.shape),))


def transpose(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Axes in another order, as np.transpose."""
    return record(x.data.transpose(axes), (x,), lambda g: (g.transpose(np.argsort(axes)),))


def take(x: Tensor, index) -> Tensor:
    """x[index] for slices, integers and index arrays."""

    def pull(g):
        gradient = np.zeros_like(x.data)
        np.add.at(gradient, index, g)
        return (gradient,)

    return record(x.data[index], (x,), pull)


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded (straight-through estimator)."""
    return record(np.rint(x.data), (x,), lambda g: (g,))


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp to [low, high]; the gradient passes where x lies inside, bounds included."""
    inside = (x.data >= low) & (x.data <= high)
    return record(np.clip(x.data, low, high), (x,), lambda g: (g * inside,))
