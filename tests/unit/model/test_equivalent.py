"""Equivalent weights: factors and rotations that cancel leave the logits, in every architecture that has the place."""

from dataclasses import replace

import numpy as np
import pytest

from refllm.kernels.grids import SymmetricGrid
from refllm.kernels.packed.records import IntWeight
from refllm.model.equivalent import (
    HEAD,
    LAST_NORM,
    divide_gated,
    divide_keys,
    divide_norm,
    divide_values,
    fold_norms,
    norm_readers,
    rotate_residual,
    rotate_values,
)
from refllm.model.llama import forward
from tests.models import random_model

IDS = np.random.default_rng(5).integers(0, 64, 23)
RNG = np.random.default_rng(6)


def factors(*shape):
    return np.exp(RNG.normal(size=shape))


def orthogonal(*shape):
    return np.linalg.qr(RNG.normal(size=shape))[0]


def assert_same(changed, model):
    a, b = forward(changed, IDS), forward(model, IDS)
    assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("step", ["norm", "values", "gated", "keys"])
def test_factors_cancel(architecture, step):
    model = random_model(architecture, np.float64, num_heads=6, num_kv_heads=2)
    config, weights, before = model.config, dict(model.weights), {k: w.copy() for k, w in model.weights.items()}
    for layer in range(config.num_layers):
        if step == "norm":
            for norm, readers in norm_readers(config, layer).items():
                divide_norm(weights, config, norm, readers, factors(config.hidden_size))
        elif step == "values":
            divide_values(weights, config, layer, factors(config.num_kv_heads * config.head_dim))
        elif step == "gated":
            divide_gated(weights, layer, factors(config.intermediate_size))
        elif config.qk_norm:
            with pytest.raises(ValueError, match="norms q and k"):
                divide_keys(weights, config, layer, factors(config.num_kv_heads, config.head_dim // 2))
        else:
            divide_keys(weights, config, layer, factors(config.num_kv_heads, config.head_dim // 2))
    assert_same(replace(model, weights=weights), model)
    assert all(np.array_equal(model.weights[k], w) for k, w in before.items())  # arrays are not written to


def test_the_output_of_the_norm_is_what_is_divided():
    model = random_model("llama", np.float64)
    s, weights = factors(model.config.hidden_size), dict(model.weights)
    (norm, readers), *_ = norm_readers(model.config, 0).items()
    divide_norm(weights, model.config, norm, readers, s)
    np.testing.assert_allclose(weights[norm], model.weights[norm] / s, rtol=1e-14)
    np.testing.assert_allclose(weights[readers[0]], model.weights[readers[0]] * s, rtol=1e-14)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_folded_norms_multiply_by_one(architecture, tied):
    model = random_model(architecture, np.float64, tied_embeddings=tied)
    folded = fold_norms(model)
    assert_same(folded, model)
    assert not folded.config.tied_embeddings and HEAD in folded.weights
    for norm in [LAST_NORM, *norm_readers(model.config, 1)]:
        assert np.all(folded.weights[norm] + model.config.norm_offset == 1)


def test_a_gain_of_zero_can_be_folded():
    model = random_model("llama", np.float64)
    gain = model.weights[LAST_NORM].copy()
    gain[::3] = 0
    model = replace(model, weights=model.weights | {LAST_NORM: gain})
    assert_same(fold_norms(model), model)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_residual_stream_can_be_turned(architecture):
    model = random_model(architecture, np.float64)
    d = model.config.hidden_size
    assert_same(rotate_residual(fold_norms(model), orthogonal(d, d)), model)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("one", [True, False])
def test_values_can_be_turned(architecture, one):
    model = random_model(architecture, np.float64, num_heads=6, num_kv_heads=2)
    D = model.config.head_dim
    assert_same(rotate_values(model, 1, orthogonal(D, D) if one else orthogonal(2, D, D)), model)


def test_what_cannot_be_turned_is_refused():
    model = random_model("llama", np.float64)
    d = model.config.hidden_size
    with pytest.raises(ValueError, match="fold the norms first"):
        rotate_residual(model, orthogonal(d, d))
    with pytest.raises(ValueError, match="orthogonal"):
        rotate_residual(fold_norms(model), 2 * np.eye(d))
    with pytest.raises(ValueError, match="orthogonal"):
        rotate_residual(fold_norms(model), np.eye(d + 1))
    gemma = random_model("gemma3", np.float64)
    with pytest.raises(ValueError, match="norms what each branch returns"):
        rotate_residual(fold_norms(gemma), np.eye(gemma.config.hidden_size))
    name = "model.layers.0.mlp.up_proj.weight"
    grid = SymmetricGrid(8, -1)
    scale, _ = grid.fit(model.weights[name])
    packed = IntWeight.pack(grid, grid.encode(model.weights[name], scale, None), scale, None)
    with pytest.raises(ValueError, match=r"up_proj.weight is packed; load the uncompressed"):
        fold_norms(replace(model, weights=model.weights | {name: packed}))
