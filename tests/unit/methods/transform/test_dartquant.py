"""dartquant: gradients against differences, rotations after every step, spread activations, the same function."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.hadamard import random_hadamard, random_orthogonal
from refllm.kernels.packed.records import IntWeight, Rotated
from refllm.methods.transform import dartquant, quarot
from refllm.methods.transform.dartquant import learn_rotation, qr, qr_gradient, whip
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model

IDS = np.random.default_rng(0).integers(0, 64, 80)


def spiked(n=400, d=32, seed=0):
    """Tokens of even numbers, with three channels that are larger."""
    X = np.random.default_rng(seed).normal(size=(n, d))
    X[:, :3] *= (6, 4, 3)
    return X


def kurtosis(o):
    return np.mean(np.mean(o**4, axis=1) / np.mean(o**2, axis=1) ** 2)


def slope(f, Z, direction, h=1e-6):
    return (f(Z + h * direction) - f(Z - h * direction)) / (2 * h)


@given(st.integers(1, 9), st.integers(0, 10_000))
def test_the_gradient_through_qr_against_differences(d, seed):
    """Of an arbitrary smooth function of Q, in an arbitrary direction, Z neither orthogonal nor symmetric."""
    rng = np.random.default_rng(seed)
    Z, C, direction = rng.normal(size=(d, d)) + 2 * np.eye(d), rng.normal(size=(d, d)), rng.normal(size=(d, d))
    if np.linalg.cond(Z) > 100:
        return
    loss = lambda Z: np.sum(np.sin(C * qr(Z)[0]))
    Q, R = qr(Z)
    gradient = qr_gradient(Q, R, C * np.cos(C * Q))
    expected = slope(loss, Z, direction)
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_whip_loss_against_differences():
    rng = np.random.default_rng(1)
    X, Q, direction = spiked(20, 6), random_orthogonal(6, rng), rng.normal(size=(6, 6))
    loss, gradient = whip(X, Q)
    assert loss == pytest.approx(np.mean([sum(np.exp(-abs(v)) for v in x @ Q) for x in X]))
    np.testing.assert_allclose(np.sum(gradient * direction), slope(lambda Q: whip(X, Q)[0], Q, direction), rtol=1e-6)


def test_a_sum_over_channels_and_not_scale_invariant():
    """By hand: one token (0, ln 2) gives 1 + 1/2; twice as large 1 + 1/4."""
    X = np.array([[0.0, np.log(2.0)]])
    assert whip(X, np.eye(2))[0] == pytest.approx(1.5) and whip(2 * X, np.eye(2))[0] == pytest.approx(1.25)


@given(st.integers(1, 8), st.integers(0, 1000))
def test_qr_is_unique(d, seed):
    Z = np.random.default_rng(seed).normal(size=(2, d, d))
    Q, R = qr(Z)
    np.testing.assert_allclose(Q @ R, Z, atol=1e-12)
    assert (np.einsum("kii->ki", R) >= 0).all() and np.abs(np.tril(R, -1)).max() < 1e-12
    np.testing.assert_allclose(qr(Q)[0], Q, atol=1e-12)  # of a rotation: itself, whatever signs LAPACK takes


def test_every_step_leaves_a_rotation():
    X, start = spiked(), random_hadamard(32, np.random.default_rng(0))
    for steps in range(8):
        Q = learn_rotation(X, start, np.random.default_rng(1), steps=steps, rate=0.1)
        np.testing.assert_allclose(Q.T @ Q, np.eye(32), atol=1e-12)
    np.testing.assert_array_equal(learn_rotation(X, start, np.random.default_rng(1), steps=0), qr(start)[0])


def test_one_step_without_momentum_is_a_gradient_step():
    X, start = spiked(50, 8), random_hadamard(8, np.random.default_rng(0))
    Q, R = qr(start)
    Z = start - 0.25 * qr_gradient(Q, R, whip(X, Q)[1])
    learned = learn_rotation(X, start, np.random.default_rng(0), steps=1, rows=50, rate=0.25, momentum=0.0)
    np.testing.assert_allclose(learned, qr(Z)[0], atol=1e-12)


def test_the_loss_falls_and_the_tails_with_it():
    """On all rows and with a small rate the loss never rises; kurtosis ends below that of the Hadamard start."""
    X, start = spiked(), random_hadamard(32, np.random.default_rng(0))
    losses = [
        whip(X, learn_rotation(X, start, np.random.default_rng(0), steps=n, rows=400, rate=1e-3))[0]
        for n in range(0, 60, 5)
    ]
    assert (np.diff(losses) < 0).all()
    learned = learn_rotation(X, start, np.random.default_rng(0), steps=200, rows=400, rate=1e-2)
    assert kurtosis(X @ learned) < kurtosis(X @ start) < kurtosis(X)
    peak = lambda o: np.mean(np.abs(o).max(axis=1) / np.sqrt(np.mean(o**2, axis=1)))
    assert peak(X @ learned) < 1.1 * peak(X @ start) < peak(X)


def test_stacks_are_learned_as_if_alone():
    X = np.stack([spiked(seed=1), spiked(seed=2)])
    start = np.broadcast_to(random_hadamard(32, np.random.default_rng(0)), (2, 32, 32))
    both = learn_rotation(X, start, np.random.default_rng(3), steps=5, rows=64)
    for i in range(2):
        alone = learn_rotation(X[i], start[i], np.random.default_rng(3), steps=5, rows=64)
        np.testing.assert_allclose(both[i], alone, atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_logits_stay_in_float64(architecture):
    model = random_model(architecture, np.float64)
    a, b = forward(dartquant(model, IDS, steps=5), IDS), forward(model, IDS)
    assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max()


def test_no_steps_are_quarot():
    model = random_model("llama")
    a, b = dartquant(model, IDS, steps=0, seed=4), quarot(model, seed=4)
    for name, weight in b.weights.items():
        dense = lambda w: w.weight if isinstance(w, Rotated) else w
        np.testing.assert_allclose(dense(a.weights[name]), dense(weight), atol=1e-6)


def test_every_key_value_head_has_a_rotation_of_its_own():
    model = random_model("llama", np.float64)
    plain, learned = quarot(model, online=False), dartquant(model, IDS, online=False, rate=0.05)
    name = "model.layers.1.self_attn.v_proj.weight"
    # Behind Q, which both sides of the products have in common, W W^T holds the rotations of the heads alone.
    square = lambda m: m.weights[name] @ m.weights[name].T
    a, b = square(plain), square(learned)
    blocks = [b[i : i + 8, i : i + 8] - a[i : i + 8, i : i + 8] for i in (0, 8)]
    assert min(np.abs(block).max() for block in blocks) > 1e-3 and np.abs(blocks[0] - blocks[1]).max() > 1e-3


def test_a_recipe_packs_and_reloads(tmp_path):
    small = refllm.compress(random_model("llama"), "dartquant:steps=3+rtn:bits=4,group=-1+dynamic:bits=4", IDS)
    save_native(small, tmp_path / "m")
    back = refllm.load(tmp_path / "m")
    assert np.array_equal(forward(back, IDS), forward(small, IDS))
    assert isinstance(back.weights["model.layers.0.mlp.down_proj.weight"].weight, IntWeight)
    with pytest.raises(ValueError, match="dartquant needs calibration"):
        refllm.compress(random_model("llama"), "dartquant")


@pytest.mark.parametrize(
    "knobs", [dict(steps=-1), dict(rows=0), dict(rate=-1.0), dict(rate=np.inf), dict(momentum=1.0)]
)
def test_knobs_out_of_range(knobs):
    with pytest.raises(ValueError, match=r"steps must be 0 or more, .*; got "):
        dartquant(random_model("llama"), IDS, **knobs)
