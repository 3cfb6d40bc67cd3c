"""osplus: shift and scale by their definitions, the search against loops, and what it is for."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.grids import SymmetricGrid
from refllm.kernels.packed.activations import Rounding
from refllm.methods import transform
from refllm.methods.apply import compress
from refllm.methods.transform.osplus import (
    block_function,
    fold,
    osplus,
    rounded_loss,
    search,
    shift,
    shrink,
    thresholds,
)
from refllm.model.equivalent import norm_readers
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.planter import plant_outliers
from refllm.model.walk import walk
from tests.models import ARCHITECTURES, random_model
from tests.strategies import PROPERTY, inputs
from tests.twins import slow_attend

IDS = np.random.default_rng(0).integers(0, 64, 90)
GRID = SymmetricGrid(4, -1, "float32")


@PROPERTY
@given(inputs(6))
def test_after_the_shift_a_channel_reaches_as_far_down_as_up(X):
    X = X.astype(np.float64) + np.arange(6)
    z = shift(X.max(axis=0), X.min(axis=0))
    np.testing.assert_allclose((X - z).max(axis=0), -(X - z).min(axis=0), atol=1e-9)


@PROPERTY
@given(inputs(6), st.floats(0.01, 50))
def test_only_channels_that_stick_out_are_scaled(X, t):
    high, low = X.max(axis=0), X.min(axis=0)
    s = shrink(high, low, t)
    assert (s >= 1).all() and (np.abs(X / s) <= t * (1 + 1e-6)).all()
    inside = (high <= t) & (low >= -t)
    assert (s[inside] == 1).all() and (s[~inside] > 1).all()
    assert (shrink(high, low, max(np.abs(X).max(), 1e-9)) == 1).all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 60.0, 400.0])
def test_thresholds_are_the_authors_steps(scale):
    rng = np.random.default_rng(int(scale))
    high, low = scale * rng.random(5), -2 * scale * rng.random(5)
    top, count = max(high.max(), -low.min()), max(100, int(high.max() / 0.5))
    found = list(thresholds(high, low))
    if top <= 0.1:
        assert found == [top]
        return
    wanted, t, step = [], top, (top - 0.1) / count
    while t >= 0.1 - step / 2:  # as published, but for the rounding of the last step
        wanted.append(t)
        t -= step
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert len(list(thresholds(high, low, 7))) == 8


def test_the_search_keeps_the_first_of_the_least():
    high, low = np.array([8.0, 1.0]), np.array([-1.0, -1.0])
    losses = {t: float(i % 3) for i, t in enumerate(thresholds(high, low, 20))}
    by_t = lambda s: losses[min(losses, key=lambda t: abs(shrink(high, low, t)[0] - s[0]))]
    s, t = search(high, low, by_t, 20)
    assert t == next(iter(losses)) and (s == 1).all()
    assert search(high, low, lambda s: -s[0], 20)[1] == pytest.approx(0.1)


def test_the_block_functions_are_attention_and_the_gated_product():
    model = random_model("llama", np.float64)
    qkv, gated = norm_readers(model.config, 0).values()
    x = np.random.default_rng(0).standard_normal((1, 9, 32))
    ours = block_function(model, 0, gated)(x, [model.weights[n] for n in gated])
    gate, up = (x @ model.weights[n].T for n in gated)
    np.testing.assert_allclose(ours, gate / (1 + np.exp(-gate)) * up, rtol=1e-12)
    mixed = block_function(model, 0, qkv)(x, [model.weights[n] for n in qkv])
    from refllm.kernels.rope import cos_sin, rotate

    heads = lambda n: (x[0] @ model.weights[n].T).reshape(9, -1, 8).swapaxes(0, 1)
    cos, sin = cos_sin(model.config.rope, 8, np.arange(9), np.float64)
    q, k, v = (heads(n) for n in qkv)
    wanted = slow_attend(rotate(q, cos, sin), rotate(k, cos, sin), v, np.arange(9), np.arange(9), scale=8**-0.5)
    np.testing.assert_allclose(mixed[0], wanted.swapaxes(0, 1).reshape(9, -1), rtol=1e-10, atol=1e-12)


def test_the_loss_is_that_of_rounded_inputs_and_weights():
    rng = np.random.default_rng(1)
    X, W = rng.standard_normal((2, 5, 6)), rng.standard_normal((3, 6))
    s = np.array([1, 2, 1, 1, 4, 1.0])
    f = lambda x, weights: x @ weights[0].T
    for rounding in (Rounding(4), Rounding(4, symmetric=False)):
        total = 0.0
        scale, _ = GRID.fit(W * s)
        W_hat = GRID.decode(GRID.encode(W * s, scale), scale)
        for x in X.reshape(-1, 6):
            codes, step, zero = rounding.steps((x / s)[None].astype(np.float32))
            x_hat = (codes - (0 if zero is None else zero))[0] * step[0]
            total += np.square(W_hat @ x_hat - W @ x).sum()
        assert rounded_loss(f, X, [W], rounding, GRID)(s) == pytest.approx(total / 10, rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_function_stays(architecture):
    for dtype, rtol in ((np.float64, 1e-11), (np.float32, 3e-5)):
        model = plant_outliers(random_model(architecture, dtype), kinds=("norm",))
        exact = forward(model, IDS)
        changed = transform.osplus(model, IDS, bits=4, steps=5)
        assert np.abs(forward(changed, IDS) - exact).max() <= rtol * np.abs(exact).max()


def test_its_loss_is_never_above_that_of_rounding_alone():
    model = plant_outliers(random_model("llama", np.float32), kinds=("norm",))
    for layer, stats in walk(model, IDS):
        for readers in norm_readers(model.config, layer).values():
            X = stats[readers[0]].X
            f = block_function(model, layer, readers)
            loss = rounded_loss(f, X[None], [model.weights[n] for n in readers], Rounding(4), GRID)
            s, _ = search(X.max(axis=0), X.min(axis=0), loss, 30)
            assert loss(s) < loss(np.ones(len(s)))


def test_planted_outliers_are_shrunk():
    model = random_model("llama", np.float32)
    exact = forward(model, IDS)
    loud = plant_outliers(model, kinds=("norm",), factors=(64.0,))
    recipe = "rtn:bits=6,symmetric=true,group=-1+dynamic:bits=6"
    error = lambda m, r: np.square(forward(compress(m, r, IDS), IDS) - exact).sum()
    plain, shrunk = error(loud, recipe), error(loud, "osplus:bits=6,steps=30+" + recipe)
    assert shrunk < plain / 5


def test_shift_and_scale_of_a_layer_norm_leave_the_function():
    rng = np.random.default_rng(2)
    x, gain, bias = rng.standard_normal((7, 6)), rng.standard_normal(6), 20 * rng.standard_normal(6)
    weights, biases = [rng.standard_normal((n, 6)) for n in (4, 3)], [rng.standard_normal(4), np.zeros(3)]
    normed = lambda g, b: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) * g + b
    X = normed(gain, bias)
    z = shift(X.max(axis=0), X.min(axis=0))
    s = shrink((X - z).max(axis=0), (X - z).min(axis=0), 0.7)
    g, b, W, c = fold(gain, bias, weights, biases, z, s)
    np.testing.assert_allclose(normed(g, b), (X - z) / s, rtol=1e-10, atol=1e-12)
    for before, after, c0, c1 in zip(weights, W, biases, c, strict=True):
        np.testing.assert_allclose(normed(g, b) @ after.T + c1, X @ before.T + c0, rtol=1e-9, atol=1e-9)
    assert np.abs((X - z) / s).max() <= 0.7 + 1e-9 < np.abs(X - z).max() < np.abs(X).max()


def test_knobs_reach_the_search(monkeypatch):
    module, seen = sys.modules["refllm.methods.transform.osplus"], []

    def spy(f, X, weights, rounding, grid):
        tried = []
        seen.append((X.shape, rounding, grid.bits, tried))
        return lambda s: tried.append(s) or len(tried)

    monkeypatch.setattr(module, "rounded_loss", spy)
    model = random_model("llama", np.float32)
    osplus(model, IDS, bits=4, activation_bits=6, symmetric=False, steps=7, tokens=1)
    assert len(seen) == 4 and {s[:3] for s in seen} == {((1, 90, 32), Rounding(6, 1.0, False), 4)}
    assert all(len(s[3]) == 8 for s in seen)
    osplus(model, IDS, bits=5)
    assert seen[-1][1:3] == (Rounding(5), 5) and len(seen[-1][3]) == 101


def test_one_token_dead_inputs_and_a_stored_model(tmp_path):
    model = random_model("llama", np.float32)
    gain = "model.layers.1.input_layernorm.weight"
    dead = replace(model, weights=model.weights | {gain: np.zeros(32, np.float32)})
    for some, ids in ((dead, IDS), (model, IDS[:1])):
        small = compress(some, "osplus:steps=3+rtn:bits=8,group=-1+dynamic", ids)
        back = refllm.load(save_native(small, tmp_path / str(len(ids))))
        assert np.isfinite(forward(small, IDS)).all() and np.array_equal(forward(back, IDS), forward(small, IDS))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 9}, "bits must be 2 to 8|bits of activations must be 2 to 8"),
        ({"activation_bits": 1}, "bits of activations must be 2 to 8, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        osplus(random_model("llama", np.float32), IDS, **knobs)
