"""The model that is trained is the model that runs: equal forward passes, and gradients of every tensor."""

import numpy as np
import pytest

from refllm.kernels.autograd import Tensor, parameter
from refllm.kernels.nn import cross_entropy
from refllm.model.differentiable import NextToken, block_states, hidden_states, initial_weights
from refllm.model.llama import block, forward
from refllm.model.model import Model
from refllm.model.probe import attention_weights
from tests.models import random_config, random_model

IDS = np.random.default_rng(5).integers(0, 64, (2, 21))


@pytest.mark.parametrize("tied", [True, False])
def test_training_forward_equals_inference_forward(tied):
    model = random_model("llama", np.float64, tied_embeddings=tied)
    params = {name: Tensor(weight) for name, weight in model.weights.items()}
    hidden = hidden_states(params, model.config, IDS).data
    head = model.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    logits = (hidden @ head.T).reshape(2, 21, -1)
    want = forward(model, IDS)
    assert np.abs(logits - want).max() <= 1e-12 * np.abs(want).max()
    targets = np.roll(IDS, -1, axis=1)
    loss = NextToken(model.config)(params, (IDS, targets)).data
    assert float(loss) == pytest.approx(np.mean(cross_entropy(want, targets)), rel=1e-12)


def test_a_block_and_what_stands_before_its_linears_and_its_attention():
    """Equal to the readable block; the two places see what the readable one shows, in its order."""
    model, seen, heads = random_model("llama", np.float64), [], []
    x = np.random.default_rng(0).normal(size=(2, 21, 32))
    params = {name: Tensor(weight) for name, weight in model.weights.items()}
    at_linears, at_attention = (lambda h, to=to: to.append(h.data) or h for to in (seen, heads))
    out = block_states(
        params, model.config, 1, Tensor(x.reshape(42, 32)), 2, 21, at_linears=at_linears, at_attention=at_attention
    )
    shown = []
    want = block(model, 1, x, np.arange(21), observe=lambda names, h: shown.append(h.reshape(42, -1)))
    assert np.abs(out.data - want.reshape(42, 32)).max() <= 1e-12 * np.abs(want).max()
    assert len(seen) == len(shown) == 4
    assert all(np.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(seen, shown, strict=True))
    assert [h.shape for h in heads] == [(2, 21, 4, 8), (2, 21, 2, 8), (2, 21, 2, 8)]
    halved = block_states(params, model.config, 1, Tensor(x.reshape(42, 32)), 2, 21, at_linears=lambda h: h * 0.5)
    assert np.abs(halved.data - out.data).max() > 0.01


def test_gradient_of_the_whole_model():
    """Central differences along random directions, one per tensor, so that every tensor's gradient is exercised."""
    model = random_model("llama", np.float64, tied_embeddings=True, num_layers=1)
    loss, batch = NextToken(model.config), (IDS, np.roll(IDS, -1, axis=1))
    params = {name: parameter(weight) for name, weight in model.weights.items()}
    loss(params, batch).backward()
    rng = np.random.default_rng(3)
    fixed = {name: Tensor(weight) for name, weight in model.weights.items()}
    for name, weight in model.weights.items():
        direction = rng.normal(size=weight.shape)

        def moved(h, name=name, at=weight, direction=direction):
            return float(loss(fixed | {name: Tensor(at + h * direction)}, batch).data)

        slopes = [(moved(h) - moved(-h)) / (2 * h) for h in (1e-4, 2e-4)]
        # Truncation by the difference of the two steps; rounding: 1e-12 relative in a loss of about 5 nats.
        bound = abs(slopes[1] - slopes[0]) + 5e-12 / 1e-4
        assert abs(np.sum(params[name].grad * direction) - slopes[0]) <= bound, name


@pytest.mark.parametrize("architecture, part", [("gemma3", "activation"), ("qwen2", "biases"), ("mistral", "window")])
def test_other_architectures_are_refused_by_name(architecture, part):
    model = random_model(architecture)
    with pytest.raises(ValueError, match=part):
        hidden_states({name: Tensor(w) for name, w in model.weights.items()}, model.config, IDS)


def test_first_heads_start_at_offsets_and_the_rest_even():
    config = random_config("llama", hidden_size=128, head_dim=32, num_heads=4, num_kv_heads=2, tied_embeddings=True)
    weights = initial_weights(config, 3)
    ids = np.random.default_rng(0).integers(0, 64, (2, 60))
    first, second = (w[:, :, 20:] for w in attention_weights(Model(config, weights), ids))
    rows = np.arange(20, 60)
    for head in range(3):
        assert first[:, head, np.arange(40), rows - head - 1].mean() > 0.7
    assert first[:, 3].max() < 0.5
    # In the next layer a position is drawn to what resembles it most: itself.
    assert second.max() < 0.5
    assert second[:, :, np.arange(40), rows].mean() > 1.5 * (1 / (rows + 1)).mean()
    assert all(w.dtype == np.float32 for w in weights.values())
    again = initial_weights(config, 3)
    assert all(np.array_equal(w, again[name]) for name, w in weights.items())


def test_products_of_the_start():
    config = random_config("llama", hidden_size=128, head_dim=32, num_heads=4, num_kv_heads=2)
    weights = initial_weights(config, 3)
    for layer in range(config.num_layers):
        q, k, v, o = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
        for head in range(4):
            own, shared = (slice(32 * i, 32 * i + 32) for i in (head, head // 2))
            assert np.array_equal(o[:, own], np.float32((2 * config.num_layers) ** -0.5) * v[shared].T)
            assert np.array_equal(q[own], k[shared]) == (layer > 0)
        assert np.array_equal(v[:32], v[32:]) == (layer == 0)


def test_shared_direction_moves_no_probability_of_a_tied_head():
    config = random_config("llama", hidden_size=128, head_dim=32, num_heads=4, num_kv_heads=2, tied_embeddings=True)
    table = initial_weights(config, 3)["model.embed_tokens.weight"]
    shared = table.mean(axis=0)
    assert np.abs(np.abs(shared) / 0.05 - 1).max() < 0.6  # 64 rows: the mean's noise is 1/8
    hidden = np.random.default_rng(1).normal(size=128)
    logits = table.astype(float) @ hidden
    moved = (table - shared).astype(float) @ hidden
    assert np.allclose(
        np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum(),
        np.exp(moved - moved.max()) / np.exp(moved - moved.max()).sum(),
        rtol=1e-4,
    )
