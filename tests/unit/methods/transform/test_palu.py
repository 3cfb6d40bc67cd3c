"""palu and refllm.model.palu: the rank search, whitened factors, folded values, what is cached."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.kernels.attention import attend
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.rope import cos_sin, rotate
from refllm.methods.kvcache.kivi import kivi
from refllm.methods.transform import palu
from refllm.methods.transform.palu import allocate_ranks, round_to_block
from refllm.model.cache import DenseStore, new_cache
from refllm.model.config import LowRankKV
from refllm.model.convert import save
from refllm.model.llama import block, forward
from refllm.model.palu import attention_branch
from refllm.model.to_gguf import to_gguf
from refllm.model.to_hf import to_hf
from refllm.model.walk import layer_linears, walk
from tests.models import random_config, random_model

IDS = np.random.default_rng(0).integers(0, 64, 96)
UNIFORM = dict(search="uniform", block=2)


def gap(a, b):
    x, y = forward(a, IDS[:40]), forward(b, IDS[:40])
    return np.abs(x - y).max() / np.abs(y).max()


def dense_again(small, original):
    """The plain model whose k_proj and v_proj are the products of the factors, values not folded into o."""
    config, weights = small.config, dict(original.weights)
    low = config.low_rank_kv
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        R = np.split(small.weights[f"{prefix}k_proj.weight"], low.groups)
        L = [small.weights[f"{prefix}k_up_proj.{g}.weight"] for g in range(low.groups)]
        weights[f"{prefix}k_proj.weight"] = np.concatenate([a @ b for a, b in zip(L, R, strict=True)])
    return replace(original, weights=weights)


# The architecture


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("group_heads", [1, 2, None])
def test_full_rank_is_exact(architecture, group_heads):
    model = random_model(architecture, np.float64)
    small = palu(model, IDS, ratio=1.0, search="uniform", group_heads=group_heads)
    assert gap(small, model) < 1e-9
    assert small.config.low_rank_kv.groups == (2 // group_heads if group_heads else 1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_folded_values_equal_explicit_ones(architecture):
    """v = L_v z_v + b for every token and head, then the original o: the factors are found by solving for L_v."""
    model = random_model(architecture, np.float64, num_heads=8, num_kv_heads=4)
    small = palu(model, IDS, ratio=0.5, group_heads=2, **UNIFORM)
    x, prefix, D = np.random.default_rng(1).normal(size=(1, 9, 32)), "model.layers.0.self_attn.", model.config.head_dim
    S = np.linalg.cholesky(dict(walk(model, IDS))[0][f"{prefix}v_proj.weight"].H)
    v, r = [], small.config.low_rank_kv.value_ranks[0]
    for g in range(2):
        rows = slice(g * 2 * D, (g + 1) * 2 * D)
        W, R = (m.weights[f"{prefix}v_proj.weight"] for m in (model, small))
        W, R = W[rows], R[g * r : (g + 1) * r]
        L = (W @ S) @ np.linalg.pinv(R @ S)  # of all L with this R the one with the least error
        v.append(x[0] @ R.T @ L.T + model.weights.get(f"{prefix}v_proj.bias", np.zeros(4 * D))[rows])
    captured = {}

    def spy(q, k, z, *rest, **options):
        captured["out"] = attend(q, k, np.concatenate(v, axis=1).reshape(1, 9, 4, D).swapaxes(1, 2), *rest, **options)
        return attend(q, k, z, *rest, **options)

    got = attention_branch(small, 0, x, np.arange(9), attend=spy)
    explicit = captured["out"].swapaxes(1, 2).reshape(1, 9, -1) @ model.weights[f"{prefix}o_proj.weight"].T
    np.testing.assert_allclose(got, explicit, atol=1e-9)


def test_keys_are_rebuilt_and_only_then_rotated():
    """A rotation does not pass through L: rope(L z) is the key, L rope(z) is not."""
    model = random_model("llama", np.float64)
    small = palu(model, IDS, ratio=0.5, **UNIFORM)
    x, keys = np.random.default_rng(1).normal(size=(1, 5, 32)), []
    attention_branch(
        small,
        0,
        x,
        np.arange(5),
        attend=lambda q, k, *rest, **options: keys.append(k) or attend(q, k, *rest, **options),
    )
    dense = dense_again(small, model).weights["model.layers.0.self_attn.k_proj.weight"]
    turn = lambda y: rotate(y, *cos_sin(model.config.rope, 8, np.arange(5), np.float64))
    np.testing.assert_allclose(keys[0][0], turn((x[0] @ dense.T).reshape(5, 2, 8).swapaxes(0, 1)), atol=1e-10)
    R, L = (small.weights[f"model.layers.0.self_attn.{n}.weight"] for n in ("k_proj", "k_up_proj.0"))
    wrong = (turn(x[0] @ R.T) @ L.T).reshape(5, 2, 8).swapaxes(0, 1)
    assert np.abs(wrong - keys[0][0]).max() > 0.1


class Turned(DenseStore):
    """Tokens in reverse, positions head by head."""

    def extend(self, k, v, positions, queries=None):
        K, V, key_positions = super().extend(k, v, positions)
        return K[..., ::-1, :], V[..., ::-1, :], np.tile(key_positions[::-1], (K.shape[1], 1))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("policy", [None, lambda layer: Turned(), lambda layer: kivi(layer, group_size=2, residual=64)])
def test_decode_equals_prefill_through_any_store(architecture, policy):
    model = palu(
        random_model(architecture, np.float64, num_heads=8, num_kv_heads=4), IDS, ratio=0.5, group_heads=2, **UNIFORM
    )
    cache = new_cache(model, policy)
    parts = [forward(model, part, cache=cache) for part in (IDS[:30], IDS[30:31], IDS[31:33], IDS[33:40])]
    assert np.abs(np.concatenate(parts) - forward(model, IDS[:40])).max() < 1e-10


def test_what_ranks_tokens_gets_queries_that_meet_latents():
    model = random_model("llama", np.float64, num_heads=8, num_kv_heads=4)
    small = palu(model, IDS, ratio=0.375, group_heads=2, **UNIFORM)
    x, seen, prefix = np.random.default_rng(1).normal(size=(1, 5, 32)), [], "model.layers.0.self_attn."

    class Spy(DenseStore):
        def extend(self, k, v, positions, queries=None):
            seen.extend([k, queries])
            return super().extend(k, v, positions)

    attention_branch(small, 0, x, np.arange(5), store=Spy())
    z, ranked = seen
    assert z.shape == (1, 2, 5, 6) and ranked.shape == (1, 8, 5, 6)
    dense = np.concatenate([small.weights[f"{prefix}k_up_proj.{g}.weight"] @ z[0, g].T for g in range(2)])
    q = (x[0] @ model.weights[f"{prefix}q_proj.weight"].T).reshape(5, 8, 8).swapaxes(0, 1)
    for h in range(8):
        keys = dense.reshape(4, 8, 5)[h // 2]
        np.testing.assert_allclose(ranked[0, h] @ z[0, h // 4].T, q[h] @ keys, atol=1e-10)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_cache_bytes_follow_the_ranks(ratio):
    model = random_model("llama", num_heads=8, num_kv_heads=4)
    small = palu(model, IDS, ratio=ratio, group_heads=2, **UNIFORM)
    cache = new_cache(small)
    forward(small, IDS, cache=cache)
    low = small.config.low_rank_kv
    assert cache.nbytes == 96 * 4 * low.groups * sum(low.key_ranks + low.value_ranks)
    assert cache.nbytes == ratio * 96 * 4 * 2 * 2 * 32


# Factors and ranks


def test_factors_are_the_best_on_the_outputs():
    model = random_model("llama", np.float64)
    X = dict(walk(model, IDS))[0]["model.layers.0.self_attn.k_proj.weight"].X * np.geomspace(1, 30, 32)
    from refllm.kernels.factors import truncated, whitened, whitening

    W = model.weights["model.layers.0.self_attn.k_proj.weight"]
    error = lambda A, B: np.linalg.norm((W - A @ B) @ X.T)
    S = whitening(X.T @ X)
    best = np.sqrt(np.sum(np.linalg.svd(W @ X.T, compute_uv=False)[6:] ** 2))  # no rank 6 does better than this
    np.testing.assert_allclose(error(*whitened(W, S, 6)), best, rtol=1e-6)
    assert error(*truncated(W, 6)) > 1.2 * best


def test_hadamard_cancels():
    model = random_model("llama", np.float64)
    plain, turned = (palu(model, IDS, ratio=0.5, hadamard=h, search="uniform", block=8) for h in (False, True))
    assert gap(turned, plain) < 1e-10
    name = "model.layers.0.self_attn.k_proj.weight"
    spread = lambda m: np.linalg.norm(m.weights[name], axis=1)
    assert spread(turned).max() / spread(turned).min() < spread(plain).max() / spread(plain).min()
    with pytest.raises(ValueError, match="a latent is 6 wide"):
        palu(model, IDS, ratio=0.375, hadamard=True, **UNIFORM)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.integers(1, 64), st.floats(0.05, 1.0))
def test_ranks_add_up_and_stay_within_their_matrix(scores, full, ratio):
    ranks = allocate_ranks(scores, full, ratio)
    assert sum(ranks) == int(ratio * full * len(scores) + 1e-9) and all(0 <= rank <= full for rank in ranks)
    above = [i for i in range(len(scores)) if ranks[i] < full]
    for i in above:  # nobody gets less than their share, rounded down, unless it is full
        assert ranks[i] >= int(sum(ranks) * scores[i] / sum(scores) - 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 128))
def test_rounded_ranks_lie_within_half_a_block(rank, block, most):
    rounded = round_to_block(rank, block, most)
    assert 1 <= rounded <= most
    assert rounded in (most, block) or (rounded % block == 0 and abs(rounded - rank) <= block / 2)


def test_fisher_gives_more_to_what_matters_more():
    model = random_model("llama", np.float32, num_layers=3)
    weights = dict(model.weights)
    for layer in (1, 2):  # what these layers write hardly counts
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"] = (
            weights[f"model.layers.{layer}.self_attn.o_proj.weight"] / 100
        )
    small = palu(replace(model, weights=weights), IDS, ratio=0.4, block=1)
    low = small.config.low_rank_kv
    assert low.value_ranks[0] == 16 and low.value_ranks[0] > max(low.value_ranks[1:])
    assert low.key_ranks[0] > max(low.key_ranks[1:])
    assert sum(low.key_ranks + low.value_ranks) == int(0.4 * 6 * 16)


def test_a_whole_block_runs_and_biases_move():
    model = random_model("qwen2", np.float64)
    small = palu(model, IDS, ratio=1.0, search="uniform")
    prefix = "model.layers.0.self_attn."
    assert small.config.output_bias and f"{prefix}v_proj.bias" not in small.weights
    x = np.random.default_rng(0).normal(size=(1, 4, 32))
    np.testing.assert_allclose(block(small, 0, x, np.arange(4)), block(model, 0, x, np.arange(4)), atol=1e-9)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(ratio=0.0), "ratio must be above 0 and at most 1"),
        (dict(ratio=1.5), "ratio must be above 0 and at most 1"),
        (dict(block=0), "block positive"),
        (dict(search="best"), "one of fisher, uniform.*'best'"),
        (dict(group_heads=3), "group_heads must divide the 2 key-value heads of the model, got 3"),
    ],
)
def test_bad_knobs_are_one_clear_line(knobs, message):
    with pytest.raises(ValueError, match=message):
        palu(random_model(), IDS, **knobs)


def test_an_architecture_without_gradients_needs_uniform():
    with pytest.raises(ValueError, match="plain Llama only"):
        palu(random_model("qwen2"), IDS)


@pytest.mark.parametrize("low", [LowRankKV(3, (2, 2), (2, 2)), LowRankKV(1, (2,), (2, 2))])
def test_configs_that_contradict_it(low):
    with pytest.raises(ValueError, match=r"key-value heads do not form 3 groups|for 1 and 2 layers"):
        random_config("llama", low_rank_kv=low)


def test_before_weight_and_cache_methods_in_a_recipe(tmp_path):
    recipe = "palu:ratio=0.5,block=8,hadamard=true+gptq:bits=8,group=8+kivi:bits=4,group_size=4,residual=8"
    model = random_model("llama", np.float32)
    small = refllm.compress(model, recipe, IDS)
    for layer in range(2):
        assert all(isinstance(small.weights[n], IntWeight) for n in layer_linears(layer, small.config))
    save(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    assert again.config == small.config and again.recipe == recipe
    sizes = []
    for m in (again, model):
        cache = new_cache(m)
        logits = np.concatenate([forward(m, part, cache=cache) for part in (IDS[:80], IDS[80:])])
        sizes.append(cache.nbytes)
    assert np.isfinite(logits).all() and sizes[0] < sizes[1] / 3


def test_formats_that_cannot_say_it(tmp_path):
    small = palu(random_model(), IDS)
    with pytest.raises(ValueError, match=r"config\.json of llama cannot say low-rank keys and values; native can"):
        to_hf(small, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"low-rank keys and values. are not written; native"):
        to_gguf(small, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="seven linears of a Llama layer"):
        refllm.compress(small, "palu", IDS)
