"""gqa: pooled heads against loops, exact where heads are alike, and smaller by the size of a group."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.kernels.packed.records import IntWeight
from refllm.methods.transform import gqa
from refllm.methods.transform.gqa import INITS, align_keys, align_values, turned_pairs
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from tests.models import random_model

IDS = np.random.default_rng(0).integers(0, 64, 40)


def gap(a, b):
    x, y = forward(a, IDS), forward(b, IDS)
    return np.abs(x - y).max() / np.abs(y).max()


def with_alike_heads(architecture, group, turn=False, **changes):
    """A float64 model in which every key-value head of a group is the first one, turned by what q and o undo."""
    model = random_model(architecture, np.float64, num_heads=8, num_kv_heads=4, **changes)
    rng, weights, D = np.random.default_rng(1), dict(model.weights), model.config.head_dim
    for layer in range(model.config.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        angles = rng.uniform(-np.pi, np.pi, (4, D // 2)) if turn else np.zeros((4, D // 2))
        turns = np.linalg.qr(rng.normal(size=(4, D, D)))[0] if turn else np.broadcast_to(np.eye(D), (4, D, D))
        for part in ("weight", "bias"):
            for name in "kv":
                if (w := weights.get(f"{prefix}{name}_proj.{part}")) is None:
                    continue
                rows = np.repeat(w.reshape(4, D, -1)[::group], group, axis=0)
                rows = turned_pairs(rows, angles) if name == "k" else turns @ rows
                weights[f"{prefix}{name}_proj.{part}"] = rows.reshape(w.shape)
    return replace(model, weights=weights)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
def test_alike_heads_are_pooled_without_loss(architecture, init):
    model = with_alike_heads(architecture, 2)
    if init == "aligned" and model.config.qk_norm:
        with pytest.raises(ValueError, match="norms q and k channel by channel"):
            gqa(model, kv_heads=2, init=init)
        return
    small = gqa(model, kv_heads=2, init=init)
    assert small.config.num_kv_heads == 2 and gap(small, model) < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_heads_that_differ_by_turns_need_aligning(architecture):
    model = with_alike_heads(architecture, 4, turn=True)
    assert gap(gqa(model, kv_heads=1, init="aligned"), model) < 1e-9
    assert gap(gqa(model, kv_heads=1, init="mean"), model) > 0.05


@pytest.mark.parametrize("init", INITS)
def test_as_many_heads_as_before_is_identity(init):
    model = random_model("qwen2", np.float64)
    assert gap(gqa(model, kv_heads=2, init=init), model) < 1e-12


@pytest.mark.parametrize("init", ["mean", "first"])
def test_equals_a_loop_over_heads_and_rows(init):
    model = random_model("qwen2", np.float64, num_heads=8, num_kv_heads=4)
    small = gqa(model, kv_heads=2, init=init)
    for name in ("k", "v"):
        for part in ("weight", "bias"):
            full = f"model.layers.1.self_attn.{name}_proj.{part}"
            for head in range(2):
                for row in range(8):
                    members = [model.weights[full][(2 * head + i) * 8 + row] for i in range(2)]
                    expected = members[0] if init == "first" else sum(members) / 2
                    np.testing.assert_allclose(small.weights[full][head * 8 + row], expected, atol=1e-14)
    kept = "model.layers.1.self_attn.q_proj.weight"
    assert small.weights[kept] is model.weights[kept]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cache_bytes_shrink_exactly(kv_heads):
    model = random_model("llama", num_heads=8, num_kv_heads=4)
    sizes = []
    for m in (model, gqa(model, kv_heads=kv_heads)):
        cache = new_cache(m)
        forward(m, IDS, cache=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1] * (4 // kv_heads)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_aligning_only_turns_and_never_takes_heads_apart(groups, heads, pairs, seed):
    """Angles of pairs and orthogonal matrices; the turned heads lie nearer to their mean than before."""
    k, v = np.random.default_rng(seed).normal(size=(2, groups, heads, 2 * pairs, 5))
    angles, turns = align_keys(k), align_values(v)
    np.testing.assert_allclose(
        turns @ turns.swapaxes(-1, -2), np.broadcast_to(np.eye(2 * pairs), turns.shape), atol=1e-12
    )
    spread = lambda x: np.sum((x - x.mean(axis=1, keepdims=True)) ** 2)
    for before, after in ((k, turned_pairs(k, angles)), (v, turns @ v)):
        np.testing.assert_allclose(np.sum(before**2), np.sum(after**2))
        assert spread(after) <= spread(before) * (1 + 1e-9) + 1e-12


def test_a_turn_is_that_of_rope():
    """Turning q and k rows alike leaves every score, at every distance."""
    model = random_model("llama", np.float64)
    weights, angles = dict(model.weights), np.random.default_rng(2).uniform(-3, 3, 4)
    for name, heads in (("q", 4), ("k", 2)):
        full = f"model.layers.0.self_attn.{name}_proj.weight"
        weights[full] = turned_pairs(weights[full].reshape(heads, 8, 32), angles).reshape(-1, 32)
    assert gap(replace(model, weights=weights), model) < 1e-12


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(kv_heads=3), "kv_heads must divide the 2 key-value heads of the model, got 3"),
        (dict(kv_heads=0), "kv_heads must divide"),
        (dict(init="median"), "init must be one of mean, first, aligned, got 'median'"),
    ],
)
def test_bad_knobs_are_one_clear_line(knobs, message):
    with pytest.raises(ValueError, match=message):
        gqa(random_model(), **knobs)


def test_before_a_weight_method_in_a_recipe(tmp_path):
    small = refllm.compress(random_model("llama", np.float32), "gqa:kv_heads=1+rtn:bits=4,group=16")
    record = small.weights["model.layers.0.self_attn.k_proj.weight"]
    assert isinstance(record, IntWeight) and record.shape == (8, 32)
    assert np.isfinite(forward(small, IDS)).all()
    with pytest.raises(ValueError, match="is packed"):
        gqa(small)
