"""The fused operators: gradients against central differences, values against their definitions, edges."""

import numpy as np
import pytest

from refllm.kernels import autograd as ag
from refllm.kernels import fused
from refllm.kernels.attention import attend
from tests.gradients import assert_gradients, normal

ANGLES = normal(5, 2)
FUSED = {
    "linear": (fused.linear, normal(5, 3), normal(4, 3)),
    "embedding, repeats and a row not used": (lambda t: fused.embedding(t, np.array([[0, 2], [2, 4]])), normal(5, 3)),
    "rmsnorm": (lambda x, g: fused.rmsnorm(x, g, 1e-5), normal(4, 6), normal(6)),
    "rmsnorm of a zero row": (lambda x, g: fused.rmsnorm(x, g, 0.5), np.zeros((2, 3)), normal(3)),
    "rotate": (lambda x: fused.rotate(x, np.cos(ANGLES), np.sin(ANGLES)), normal(2, 5, 3, 4)),
    "swiglu": (fused.swiglu, 3 * normal(3, 4), normal(3, 4, seed=2)),
    "attention, grouped queries, tail tile": (
        lambda q, k, v: fused.causal_attention(q, k, v, 0.7, tile=3),
        normal(2, 7, 4, 2),
        normal(2, 7, 2, 2),
        normal(2, 7, 2, 2, seed=3),
    ),
    "attention, one position": (
        lambda q, k, v: fused.causal_attention(q, k, v, 1.0),
        normal(1, 1, 2, 2),
        normal(1, 1, 1, 2),
        normal(1, 1, 1, 2, seed=3),
    ),
    "cross-entropy, ignored target, tail chunk": (
        lambda x, w: fused.cross_entropy(x, w, np.array([0, -1, 3, 1, 3]), chunk=2),
        normal(5, 3),
        normal(4, 3),
    ),
    "cross-entropy, weighted": (
        lambda x, w: fused.cross_entropy(x, w, np.array([0, -1, 3, 1, 3]), np.array([1.0, 9, 5, 0, 2]), chunk=2),
        normal(5, 3),
        normal(4, 3),
    ),
    "tied head": (
        lambda w: fused.cross_entropy(fused.embedding(w, np.array([1, 2])), w, np.array([2, 0])),
        normal(4, 3),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_operator_gradient(name):
    assert_gradients(*FUSED[name])


def test_attention_equals_the_definition():
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(2, 11, heads, 4)) for heads in (6, 2, 2))
    got = fused.causal_attention(*map(ag.Tensor, (q, k, v)), 0.5, tile=4).data
    positions = np.arange(11)
    want = attend(*(a.swapaxes(1, 2) for a in (q, k, v)), positions, positions, scale=0.5).swapaxes(1, 2)
    # |o| <= max |v|; the softmax of 11 scores of size <= 10 loses at most ~100 roundings.
    assert np.abs(got - want).max() <= 100 * 2.0**-53 * np.abs(v).max()


def test_attention_does_not_see_the_future():
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(1, 9, heads, 4)) for heads in (2, 1, 1))
    before = fused.causal_attention(*map(ag.Tensor, (q, k, v)), 0.5, tile=4).data
    k[:, 6:], v[:, 6:] = 1e3, 1e6
    after = fused.causal_attention(*map(ag.Tensor, (q, k, v)), 0.5, tile=4).data
    assert np.array_equal(before[:, :6], after[:, :6])


def test_cross_entropy_of_large_logits_is_finite_and_exact():
    x, head = ag.parameter(np.array([[1000.0, 0.0]])), ag.parameter(np.eye(2))
    loss = fused.cross_entropy(x, head, np.array([1]))
    assert float(loss.data) == 1000.0
    loss.backward()
    assert x.grad.tolist() == [[1.0, -1.0]]


def test_weights_are_factors_of_the_terms_of_the_mean():
    x, head = ag.Tensor(normal(4, 3)), ag.Tensor(normal(5, 3))
    targets, weights = np.array([2, -1, 4, 0]), np.array([1.0, 7.0, 3.0, 0.0])
    one = lambda at: float(fused.cross_entropy(ag.Tensor(x.data[at : at + 1]), head, targets[at : at + 1]).data)
    got = float(fused.cross_entropy(x, head, targets, weights).data)
    assert got == pytest.approx((one(0) + 3 * one(2)) / 3, rel=1e-14)  # three targets are scored


def test_swiglu_at_the_ends_of_float32():
    gate = ag.parameter(np.array([-3e38, -200.0, -0.0, 0.0, 200.0, 1e30], np.float32))
    up = ag.parameter(np.ones(6, np.float32))
    out = fused.swiglu(gate, up)
    assert out.data[3:].tolist() == [0.0, 200.0, np.float32(1e30)]
    assert np.abs(out.data[1:3]).max() <= 200 * np.exp(-80.0)
    out.sum().backward()
    assert np.isfinite(gate.grad[1:]).all() and gate.grad[3] == 0.5 and gate.grad[5] == 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(dtype):
    x = ag.parameter(np.ones((3, 4), dtype))
    w = ag.parameter(np.ones((4, 4), dtype))
    h = fused.rmsnorm(fused.linear(x, w) * 2.0 + 1.0, ag.parameter(np.ones(4, dtype)), 1e-5)
    h = fused.rotate(h.reshape(1, 3, 2, 2), np.ones((3, 1)), np.zeros((3, 1)))
    h = fused.causal_attention(h, h, h, 0.5).reshape(3, 4)
    loss = fused.cross_entropy(fused.swiglu(h, h) / 3.0, w, np.array([0, 1, 2]))
    assert loss.data.dtype == dtype
    loss.backward()
    assert x.grad.dtype == dtype and w.grad.dtype == dtype


def test_cross_entropy_refuses_a_batch_without_targets():
    with pytest.raises(ValueError, match="at least one target"):
        fused.cross_entropy(ag.parameter(np.ones((1, 2))), ag.parameter(np.ones((3, 2))), np.array([-1]))
