"""Planted outliers: the logits stay, the weights become hard to quantise."""

from dataclasses import replace

import numpy as np
import pytest

from refllm.model.llama import forward
from refllm.model.load import load
from refllm.model.planter import plant_outliers
from tests.models import random_model

IDS = np.random.default_rng(11).integers(0, 64, 29)


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("kinds", [("norm",), ("vo",), ("qk",), ("norm", "vo", "qk")])
@pytest.mark.parametrize(
    "shape", [dict(), dict(num_heads=6, num_kv_heads=2), dict(num_kv_heads=4), dict(num_kv_heads=1)]
)
def test_logits_stay_with_powers_of_two(kinds, shape):
    model = random_model("llama", np.float64, **shape)
    planted = plant_outliers(model, kinds=kinds, seed=1)
    assert relative(forward(planted, IDS), forward(model, IDS)) <= 1e-12
    assert any(not np.array_equal(planted.weights[name], model.weights[name]) for name in model.weights)


def test_float32_logits_stay_too():
    model = random_model("llama", np.float32)
    # Powers of two change no significand; only the order in which a BLAS sums could differ, and it does not.
    assert relative(forward(plant_outliers(model), IDS), forward(model, IDS)) <= 1e-6


def test_factors_that_are_not_powers_of_two_stay_within_rounding():
    model = random_model("llama", np.float64)
    planted = plant_outliers(model, factors=(3.0, 7.0, 50.0))
    assert relative(forward(planted, IDS), forward(model, IDS)) <= 1e-9


@pytest.mark.parametrize(
    "architecture, kinds",
    [("mistral", None), ("qwen2", None), ("qwen3", ("norm", "vo")), ("gemma3", ("norm", "vo"))],
)
def test_other_architectures(architecture, kinds):
    """Biases take the factor of their row; Gemma's gains count from -1, and its norms before a branch are the ones."""
    model = random_model(architecture, np.float64)
    planted = plant_outliers(model, **({} if kinds is None else {"kinds": kinds}))
    assert relative(forward(planted, IDS), forward(model, IDS)) <= 1e-9


def test_the_outliers_are_there():
    model = random_model("llama", np.float64, hidden_size=64, head_dim=16)
    planted = plant_outliers(model, channels=3, factors=(64.0,), kinds=("norm",), seed=2)
    seen = {}

    def observe(names, x):
        for name in names:
            seen[name] = np.abs(x).max(axis=(0, 1))

    forward(planted, IDS, observe=observe)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        channels = np.sort(seen[f"model.layers.0.{name}.weight"])
        assert channels[-3:].min() > 8 * np.median(channels)
    gain = (
        planted.weights["model.layers.0.input_layernorm.weight"]
        / model.weights["model.layers.0.input_layernorm.weight"]
    )
    assert sorted(gain)[-4:] == [1.0, 64.0, 64.0, 64.0]
    # The head is not tied: the final norm takes part.
    assert (planted.weights["model.norm.weight"] != model.weights["model.norm.weight"]).sum() == 3


def test_tied_head_leaves_the_final_norm_alone():
    model = random_model("llama", np.float64, tied_embeddings=True)
    planted = plant_outliers(model)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert np.array_equal(planted.weights[name], model.weights[name])
    assert relative(forward(planted, IDS), forward(model, IDS)) <= 1e-12


def test_rotary_pairs_take_one_factor():
    model = random_model("llama", np.float64)
    planted = plant_outliers(model, kinds=("qk",), channels=2, seed=4)
    name = "model.layers.1.self_attn.k_proj.weight"
    ratio = (planted.weights[name] / model.weights[name]).reshape(2, 2, 4, -1)  # [Hk, half, D/2, d]
    assert np.array_equal(ratio[:, 0], ratio[:, 1])
    assert ((ratio[:, 0, :, 0] != 1).sum(axis=1) == 2).all()


def test_seeded_and_input_untouched():
    model = random_model("llama")
    before = {name: weight.copy() for name, weight in model.weights.items()}
    first, again, other = (plant_outliers(model, seed=seed) for seed in (3, 3, 4))
    for name, weight in model.weights.items():
        assert np.array_equal(weight, before[name])
        assert np.array_equal(first.weights[name], again.weights[name])
        assert first.weights[name].dtype == weight.dtype
    assert any(not np.array_equal(first.weights[name], other.weights[name]) for name in before)


def test_more_channels_than_there_are_scale_all():
    model = random_model("llama", np.float64)
    planted = plant_outliers(model, channels=1000, factors=(2.0,))
    assert relative(forward(planted, IDS), forward(model, IDS)) <= 1e-12


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(kinds=("bias",)), "unknown outlier kinds"),
        (dict(factors=(0.0,)), "positive"),
        (dict(factors=(np.inf,)), "finite"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        plant_outliers(random_model("llama"), **wrong)


def test_packed_weights_and_qk_norm_are_refused():
    model = random_model("llama")
    packed = replace(model, weights=model.weights | {"model.norm.weight": object()})
    with pytest.raises(ValueError, match="packed"):
        plant_outliers(packed)
    with pytest.raises(ValueError, match="qk"):
        plant_outliers(random_model("qwen3"))


def test_it_is_a_model_with_a_name():
    planted, plain = load("tiny-outliers"), load("tiny")
    assert planted.name == "tiny-outliers" and planted.tokenizer is not None
    assert relative(forward(planted, [1, 2, 3]), forward(plain, [1, 2, 3])) <= 1e-5
    largest = lambda model: max(np.abs(w).max() for name, w in model.weights.items() if "q_proj" in name)
    assert largest(planted) > 4 * largest(plain)
