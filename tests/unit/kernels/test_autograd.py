"""The tape, and every generic operator's gradient against central differences."""

import numpy as np
import pytest

from refllm.kernels import autograd as ag
from tests.gradients import assert_gradients, normal

GENERIC = {
    "add, broadcast": (lambda a, b: a + b, normal(3, 4), normal(4)),
    "add, kept axis": (lambda a, b: a + b, normal(3, 4), normal(3, 1)),
    "subtract": (lambda a, b: a - b, normal(2, 3), normal(1, 3)),
    "multiply": (lambda a, b: a * b, normal(3, 4), normal(1, 4)),
    "multiply, one operand twice": (lambda a: a * a * 3.0, normal(5)),
    "divide": (lambda a, b: a / b, normal(3, 2), 2 + np.abs(normal(3, 2, seed=1))),
    "number divided by tensor": (lambda a: 3.0 / a, 2 + np.abs(normal(3))),
    "array minus tensor": (lambda a: np.ones((2, 3)) - a, normal(3)),
    "tensor minus array": (lambda a: a - np.ones((2, 3)), normal(3)),
    "number minus tensor": (lambda a: 1.0 - a, normal(3)),
    "power": (lambda a: ag.power(a, -0.5), 1 + np.abs(normal(4))),
    "exp": (ag.exp, normal(2, 3)),
    "sigmoid": (ag.sigmoid, 3 * normal(2, 5)),
    "log": (ag.log, 1 + np.abs(normal(2, 3))),
    "matmul": (lambda a, b: a @ b, normal(3, 4), normal(4, 2)),
    "matmul of stacks, broadcast": (lambda a, b: a @ b, normal(2, 3, 4), normal(4, 2)),
    "sum, all": (lambda a: a.sum(), normal(2, 3)),
    "sum, one axis": (lambda a: a.sum(axis=0), normal(2, 3)),
    "sum, kept": (lambda a: a.sum(axis=(1, 2), keepdims=True), normal(2, 3, 2)),
    "reshape": (lambda a: a.reshape(3, 2), normal(2, 3)),
    "transpose": (lambda a: a.transpose(2, 0, 1), normal(2, 3, 4)),
    "slice": (lambda a: a[1:, ::2], normal(3, 4)),
    "repeated rows": (lambda a: a[np.array([0, 2, 2])], normal(3, 2)),
    "clip": (lambda a: ag.clip(a, -0.5, 0.75), normal(7)),
}


@pytest.mark.parametrize("name", GENERIC)
def test_generic_operator_gradient(name):
    assert_gradients(*GENERIC[name])


def test_check_itself_can_fail():
    wrong = lambda a: ag.record(a.data**2, (a,), lambda g: (g * a.data,))  # lacks the factor 2
    with pytest.raises(AssertionError):
        assert_gradients(wrong, normal(3))


def test_a_quotient_is_rounded_once():
    x = np.arange(1, 100, dtype=np.float32)
    assert np.array_equal((ag.parameter(x) / 49.0).data, x / np.float32(49))
    assert not np.array_equal(x * (np.float32(1) / np.float32(49)), x / np.float32(49))  # the test can fail


def test_rounding_passes_the_gradient_straight_through():
    x = ag.parameter(np.array([-1.5, -0.5, 0.5, 1.5, 2.4]))
    y = ag.round_through(x)
    assert y.data.tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0]  # half to even
    (y * np.arange(5.0)).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_sigmoid_of_large_numbers():
    x = ag.parameter(np.float32([-1e4, 0.0, 1e4]))
    y = ag.sigmoid(x)
    assert y.data.tolist() == [0.0, 0.5, 1.0] and y.data.dtype == np.float32
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 0.25, 0.0]


def test_clip_passes_gradient_at_the_bounds():
    x = ag.parameter(np.array([-2.0, -1.0, 0.0, 1.0, 2.0]))
    ag.clip(x, -1.0, 1.0).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_shared_operand_collects_both_gradients():
    x = ag.parameter(np.array([2.0]))
    y = x * 3.0
    ((y + y) + y * y).sum().backward()  # 2y + y^2 with y = 3x: 6 + 18 x
    assert x.grad.tolist() == [42.0]


def test_gradient_of_one_operand_is_not_overwritten_by_another():
    # add hands the same array to both parents; adding a second gradient to one must not change the other.
    a, b = ag.parameter(np.ones(2)), ag.parameter(np.ones(2))
    ((a + b) + a * 5.0).sum().backward()
    assert a.grad.tolist() == [6.0, 6.0] and b.grad.tolist() == [1.0, 1.0]


def test_nothing_is_recorded_without_parameters():
    y = ag.Tensor(np.ones((2, 3))) @ ag.Tensor(np.ones((3, 4)))
    assert not y.needs_grad and y.pull is None and y.parents == ()


def test_backward_needs_a_scalar():
    with pytest.raises(ValueError, match="scalar"):
        ag.parameter(np.ones(2)).backward()


def test_matmul_refuses_vectors():
    with pytest.raises(ValueError, match="reshape"):
        ag.parameter(np.ones(2)) @ np.ones(2)
