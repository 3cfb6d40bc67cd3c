"""smoothattention: scores stay after RoPE, keys get even, and a cache of few bits loses less."""

import numpy as np
import pytest

import refllm
from refllm.kernels.rope import cos_sin, rotate
from refllm.methods.transform import smoothattention
from refllm.methods.transform.smoothattention import factors
from refllm.model.equivalent import scale_weight
from refllm.model.llama import forward
from refllm.model.model import Model
from refllm.model.planter import plant_outliers
from refllm.model.walk import walk
from tests.models import random_model

IDS = np.random.default_rng(0).integers(0, 64, 80)


def gap(a, b):
    x, y = forward(a, IDS), forward(b, IDS)
    return np.abs(x - y).max() / np.abs(y).max()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_logits_stay_in_float64(architecture, alpha):
    """Grouped heads, biases, windows."""
    model = random_model(architecture, np.float64)
    smooth = smoothattention(model, IDS, alpha=alpha)
    assert gap(smooth, model) <= 1e-10
    changed = (
        smooth.weights["model.layers.1.self_attn.k_proj.weight"]
        != model.weights["model.layers.1.self_attn.k_proj.weight"]
    )
    assert changed.any() == (alpha > 0)


def test_factors_that_are_not_paired_change_the_scores():
    model = random_model("llama", np.float64)
    weights, s = dict(model.weights), np.exp(np.random.default_rng(1).normal(size=(2, 8)))
    scale_weight(weights, "model.layers.0.self_attn.k_proj.weight", rows=1 / s.ravel())
    scale_weight(weights, "model.layers.0.self_attn.q_proj.weight", rows=np.repeat(s, 2, axis=0).ravel())
    assert gap(Model(model.config, weights), model) > 1e-3


def keys(model, layer=0):
    name = f"model.layers.{layer}.self_attn.k_proj.weight"
    X = dict(walk(model, IDS))[layer][name].X
    k = (X @ model.weights[name].T).reshape(len(X), model.config.num_kv_heads, -1).swapaxes(0, 1)
    return rotate(k, *cos_sin(model.config.rope, model.config.head_dim, np.arange(len(X)), k.dtype))


def test_the_factors_are_roots_of_the_largest_keys_after_rope():
    model = random_model("llama", np.float64)
    smooth = smoothattention(model, IDS)
    name = "model.layers.0.self_attn.k_proj.weight"
    ratio = (model.weights[name] / smooth.weights[name]).reshape(2, 8, -1)[..., 0]
    for head, k in enumerate(keys(model)):
        for j in range(4):
            largest = max(abs(v) for t in range(len(k)) for v in (k[t, j], k[t, j + 4]))
            np.testing.assert_allclose(ratio[head, [j, j + 4]], largest**0.5, rtol=1e-12)


def test_with_all_of_it_every_pair_of_channels_ends_at_one():
    smooth = smoothattention(random_model("llama", np.float64), IDS, alpha=1.0)
    top = np.abs(keys(smooth)).max(axis=1)
    np.testing.assert_allclose(np.maximum(top[:, :4], top[:, 4:]), 1, rtol=1e-9)


def test_a_dead_pair_keeps_its_factor():
    assert factors(np.array([[0.0, 9.0, 0.0, 4.0]])).tolist() == [[1.0, 3.0]]


def test_a_cache_of_few_bits_loses_less_when_keys_have_outliers():
    """tiny with planted key channels, keys rounded token by token as QServe's KV4 rounds them."""
    model = plant_outliers(refllm.load("tiny"), kinds=("qk",))
    ids = np.random.default_rng(2).integers(5, 800, 120)

    def error(m):
        (_, stats), *_ = walk(m, ids)
        prefix, config = "model.layers.0.self_attn.", m.config
        make = lambda name, heads: rotate(
            (stats[prefix + name].X @ m.weights[prefix + name].T).reshape(len(ids), heads, -1).swapaxes(0, 1),
            *cos_sin(config.rope, config.head_dim, np.arange(len(ids)), np.float32),
        )
        q, k = make("q_proj.weight", config.num_heads), make("k_proj.weight", config.num_kv_heads)
        low, high = k.min(axis=2, keepdims=True), k.max(axis=2, keepdims=True)
        step = (high - low) / 15
        rounded = np.rint((k - low) / step) * step + low
        scores = lambda k: q @ np.repeat(k, config.num_heads // config.num_kv_heads, axis=0).swapaxes(1, 2)
        return np.linalg.norm(scores(rounded) - scores(k)) / np.linalg.norm(scores(k))

    assert error(smoothattention(model, ids)) < 0.7 * error(model)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="norms q and k"):
        smoothattention(random_model("qwen3"), IDS)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, got 2"):
        smoothattention(random_model("llama"), IDS, alpha=2.0)
