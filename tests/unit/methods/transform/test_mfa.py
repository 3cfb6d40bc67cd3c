"""mfa and refllm.model.mfa: explicit query matrices, exact at full width and rank, what is cached, reused keys."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.kernels.attention import attend
from refllm.kernels.nn import rms_norm
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.rope import Rope, cos_sin, rotate
from refllm.methods.kvcache.kivi import kivi
from refllm.methods.transform import mfa
from refllm.methods.transform.mfa import mix_heads
from refllm.model.cache import new_cache
from refllm.model.config import Factored
from refllm.model.convert import save
from refllm.model.llama import forward
from refllm.model.mfa import attention_branch
from refllm.model.names import expected_shapes
from refllm.model.to_gguf import to_gguf
from refllm.model.to_hf import to_hf
from refllm.model.walk import layer_linears, walk
from tests.models import random_config, random_model

IDS = np.random.default_rng(0).integers(0, 64, 40)


def gap(a, b):
    x, y = forward(a, IDS), forward(b, IDS)
    return np.abs(x - y).max() / np.abs(y).max()


def factored_model(dtype=np.float64, **choices):
    """A random model of the architecture itself: 4 query heads of width 12 through 10 numbers."""
    changes = dict(num_kv_heads=1, head_dim=12, factored=Factored(10, **choices))
    config = random_config("llama", **changes)
    rng, weights = np.random.default_rng(1), {}
    for name, shape in expected_shapes(config).items():
        w = rng.normal(0, 0.2, shape)
        weights[name] = (w + 1 if name.endswith("norm.weight") else w).astype(dtype)
    return replace(random_model("llama", dtype), config=config, weights=weights)


# The architecture


def test_equals_multi_query_attention_with_explicit_matrices():
    """W_q,h = Q_h S_q multiplied out is a plain model with one key-value head."""
    model = factored_model()
    weights = dict(model.weights)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        b, a = (weights.pop(f"{prefix}{name}.weight") for name in ("q_b_proj", "q_a_proj"))
        weights[f"{prefix}q_proj.weight"] = b @ a
    plain = replace(model, config=replace(model.config, factored=None), weights=weights)
    assert gap(model, plain) < 1e-12


def test_the_norm_between_the_two_query_matrices():
    model, seen = factored_model(query_norm=True), []
    w = lambda name: model.weights[f"model.layers.0.{name}.weight"]
    forward(model, IDS[:6], attend=lambda q, *rest, **options: seen.append(q) or attend(q, *rest, **options))
    hidden = rms_norm(model.weights["model.embed_tokens.weight"][IDS[:6]], w("input_layernorm"), 1e-5)
    shared = rms_norm(hidden @ w("self_attn.q_a_proj").T, w("self_attn.q_a_layernorm"), 1e-5)
    q = (shared @ w("self_attn.q_b_proj").T).reshape(6, 4, 12).swapaxes(0, 1)
    turned = rotate(q, *cos_sin(model.config.rope, 12, np.arange(6), np.float64))
    np.testing.assert_allclose(seen[0][0], turned, atol=1e-12)


def test_reused_keys_against_explicit_values():
    """v_j = k_j + alpha * (N k_j) made for every token before attention, one query after another."""
    model, x = factored_model(reuse_keys=True), np.random.default_rng(3).normal(size=(7, 32))
    w = lambda name: model.weights[f"model.layers.0.self_attn.{name}.weight"]
    k = x @ w("k_proj").T
    v = k + w("v_gate") * (k @ w("v_proj").T)
    turn = lambda y: rotate(y, *cos_sin(model.config.rope, 12, np.arange(7), np.float64))
    q = turn(((x @ w("q_a_proj").T) @ w("q_b_proj").T).reshape(7, 4, 12).swapaxes(0, 1))
    mixed = attend(q, turn(k)[None], v[None], np.arange(7), np.arange(7), scale=12**-0.5)
    expected = mixed.swapaxes(0, 1).reshape(7, -1) @ w("o_proj").T
    np.testing.assert_allclose(attention_branch(model, 0, x[None], np.arange(7))[0], expected, atol=1e-12)


def test_gates_of_zero_make_values_equal_to_keys():
    model, x = factored_model(reuse_keys=True), np.random.default_rng(3).normal(size=(1, 7, 32))
    closed = dict(model.weights)
    closed["model.layers.0.self_attn.v_gate.weight"] = np.zeros(12)
    other = closed | {"model.layers.0.self_attn.v_proj.weight": np.full((12, 12), 5.0)}
    outs = [attention_branch(replace(model, weights=w), 0, x, np.arange(7)) for w in (closed, other)]
    np.testing.assert_array_equal(*outs)
    k = x[0] @ model.weights["model.layers.0.self_attn.k_proj.weight"].T  # a single token sees only itself: v = k
    alone = attention_branch(replace(model, weights=closed), 0, x[:, :1], np.arange(1))
    np.testing.assert_allclose(alone[0], np.tile(k[:1], 4) @ model.weights["model.layers.0.self_attn.o_proj.weight"].T)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("policy", [None, lambda layer: kivi(layer, group_size=4, residual=64)])
def test_decode_equals_prefill_and_the_cache_is_counted(reuse, policy):
    model = factored_model(reuse_keys=reuse)
    cache = new_cache(model, policy)
    parts = [forward(model, part, cache=cache) for part in (IDS[:30], IDS[30:31], IDS[31:33], IDS[33:])]
    assert np.abs(np.concatenate(parts) - forward(model, IDS)).max() < 1e-10
    assert cache.nbytes == 40 * 2 * 12 * (1 if reuse else 2) * 8  # C numbers a token and layer, twice without reuse


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_cache_does_not_depend_on_the_query_heads(heads):
    small = mfa(random_model("llama", num_heads=heads, num_kv_heads=1), width=8)
    cache = new_cache(small)
    forward(small, IDS, cache=cache)
    assert cache.nbytes == 40 * 2 * 2 * 8 * 4


def test_quantised_reused_keys():
    model = factored_model(reuse_keys=True)
    cache = new_cache(model, lambda layer: kivi(layer, bits=4, group_size=4, residual=8))
    parts = [forward(model, part, cache=cache) for part in (IDS[:39], IDS[39:])]
    assert np.isfinite(np.concatenate(parts)).all() and cache.nbytes < 40 * 2 * 12 * 8


# Factoring an existing layer


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_full_width_and_rank_are_exact(architecture, kv_heads):
    model = random_model(architecture, np.float64, num_kv_heads=kv_heads)
    for ids in (None, IDS):
        assert gap(mfa(model, ids), model) < 1e-10


def test_scalings_of_rope_and_scores_are_kept():
    ropes = dict(
        rope=Rope(500.0, "yarn", 4.0, original_context=64, beta_fast=8.0),
        rope_local=Rope(1e3, "llama3", 8.0, original_context=32),
    )
    model = random_model("gemma3", np.float64, qk_norm=False, attention_bias=True, **ropes)
    assert gap(mfa(model), model) < 1e-10


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_mixed_heads_give_the_same_scores_at_every_distance(heads, group, pairs, seed):
    rng, D = np.random.default_rng(seed), 2 * pairs
    q, k = rng.normal(size=(heads, group, D, 6)), rng.normal(size=(heads, D, 6))
    wide_q, wide_k = mix_heads(q, k, heads, np.eye(5))
    x, y, positions = rng.normal(size=6), rng.normal(size=6), np.array([5, 3])
    rope = lambda z, at, times: rotate(
        z, *(np.tile(part[at], times) for part in cos_sin(Rope(100.0), D, positions, float))
    )
    for h in range(heads):
        for s in range(group):
            plain = rope((q[h, s] @ x)[None], 0, 1) @ rope((k[h] @ y)[None], 1, 1).T
            wide = (wide_q @ x).reshape(heads, group, -1)[h, s][None]
            mixed = rope(wide, 0, heads) @ rope((wide_k @ y)[None], 1, heads).T
            np.testing.assert_allclose(mixed, plain, atol=1e-10)


def test_error_falls_with_rank_and_width():
    model = random_model("llama", np.float64, num_kv_heads=4)
    by_rank = [gap(mfa(model, IDS, rank=rank), model) for rank in (4, 16, 28, 32)]
    by_width = [gap(mfa(model, IDS, width=width), model) for width in (8, 24, 32)]
    assert by_rank[0] > by_rank[2] > by_rank[3] < 1e-10 > by_width[2]
    assert by_width[0] > by_width[1] > 1e-6


@pytest.mark.parametrize("reuse", [False, True])
def test_narrower_keys_shrink_the_cache(reuse):
    model = random_model("llama", np.float32, num_kv_heads=4)
    dense, small = new_cache(model), mfa(model, IDS, width=16, reuse=reuse)
    cache = new_cache(small)
    forward(model, IDS, cache=dense)
    forward(small, IDS, cache=cache)
    assert dense.nbytes == cache.nbytes * (4 if reuse else 2)


def test_reuse_is_exact_where_keys_say_all_about_values():
    """As many key channels as the model is wide, and no bias."""
    model = random_model("llama", np.float64, num_kv_heads=4)  # 4 * 8 = 32
    assert gap(mfa(model, reuse=True), model) < 1e-6
    assert gap(mfa(random_model("llama", np.float64), reuse=True), random_model("llama", np.float64)) > 1e-2


@pytest.mark.parametrize(
    ("architecture", "knobs", "message"),
    [
        ("qwen3", {}, "norms the q and k of each head"),
        ("llama", dict(width=12), "width must be a multiple of the head dimension 8, at most 16, got 12"),
        ("llama", dict(width=24), "at most 16, got 24"),
        ("llama", dict(rank=33), "rank must lie between 1 and 32"),
        ("llama", dict(rank=0), "rank must lie between 1 and 32"),
    ],
)
def test_bad_knobs_are_one_clear_line(architecture, knobs, message):
    with pytest.raises(ValueError, match=message):
        mfa(random_model(architecture), **knobs)


def test_configs_that_contradict_it():
    with pytest.raises(ValueError, match="factored attention has one key-value head"):
        random_config("llama", factored=Factored(4))
    with pytest.raises(ValueError, match="query_rank must be a positive integer"):
        Factored(0)


@pytest.mark.parametrize("recipe", ["mfa:width=8+rtn:bits=4,group=8", "mfa:width=8,reuse=true+gptq:bits=4,group=8"])
def test_before_weight_methods_in_a_recipe(recipe, tmp_path):
    small = refllm.compress(random_model("llama", np.float32), recipe, np.tile(IDS, 4))
    for layer in range(2):
        assert all(isinstance(small.weights[n], IntWeight) for n in layer_linears(layer, small.config))
    save(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    assert again.config == small.config
    np.testing.assert_array_equal(forward(again, IDS), forward(small, IDS))


def test_calibration_sees_every_linear():
    for reuse in (False, True):
        model = factored_model(np.float32, reuse_keys=reuse)
        for layer, stats in walk(model, IDS):
            assert set(stats) == set(layer_linears(layer, model.config))


def test_formats_that_cannot_say_it(tmp_path):
    small = mfa(random_model())
    with pytest.raises(ValueError, match=r"config\.json of llama cannot say factored attention; native can"):
        to_hf(small, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"factored attention. are not written; native"):
        to_gguf(small, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="seven linears of a Llama layer"):
        refllm.compress(small, "mfa", IDS)
