"""refllm.model.mla: latent attention against loops over tokens and heads, its two forms, and what its cache holds."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.kernels.attention import attend
from refllm.kernels.nn import rms_norm
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.rope import cos_sin, rotate_interleaved
from refllm.methods.kvcache.kivi import kivi
from refllm.model.cache import DenseStore, new_cache
from refllm.model.compiled import compiled_for
from refllm.model.config import Latent
from refllm.model.convert import save
from refllm.model.fisher import fisher_diagonal
from refllm.model.from_hf import parse_config
from refllm.model.llama import forward
from refllm.model.mla import attend_absorbed, attend_naive, attention_branch, multiply_adds
from refllm.model.names import expected_shapes
from refllm.model.to_gguf import to_gguf
from refllm.model.to_hf import hf_config, to_hf
from refllm.model.walk import layer_linears, walk
from tests.models import LATENT, random_config, random_model, weight_shapes
from tests.twins import slow_attend

IDS = np.random.default_rng(7).integers(0, 64, 23)
BOTH = pytest.mark.parametrize("architecture", LATENT)


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def slow_branch(model, layer, states):
    """The attention branch of normed states (T, d), one token and one head at a time."""
    config, latent = model.config, model.config.latent
    w = lambda name: model.weights[f"model.layers.{layer}.self_attn.{name}.weight"]
    norm = lambda gain, x: x / math.sqrt(sum(a * a for a in x) / len(x) + latent.norm_eps) * gain
    n, r, H = latent.nope_dim, latent.kv_rank, config.num_heads
    q, k, v = ([[] for _ in range(H)] for _ in range(3))
    for position, x in enumerate(states):
        angles = cos_sin(config.rope, latent.rope_dim, [position], float)
        turn = lambda z, angles=angles: rotate_interleaved(z[None], *angles)[0]
        if latent.q_rank is None:
            queries = w("q_proj") @ x
        else:
            queries = w("q_b_proj") @ norm(w("q_a_layernorm"), w("q_a_proj") @ x)
        compressed = w("kv_a_proj_with_mqa") @ x
        c, k_r = norm(w("kv_a_layernorm"), compressed[:r]), turn(compressed[r:])
        both = w("kv_b_proj") @ c
        for h in range(H):
            own = queries.reshape(H, -1)[h]
            made = both.reshape(H, -1)[h]
            q[h].append(np.concatenate([own[:n], turn(own[n:])]))
            k[h].append(np.concatenate([made[:n], k_r]))
            v[h].append(made[n:])
    at = range(len(states))
    mixed = slow_attend(np.array(q), np.array(k), np.array(v), at, at, scale=config.score_scale)
    return np.stack([w("o_proj") @ np.concatenate(mixed[:, t]) for t in at])


@BOTH
def test_equals_the_slow_twin(architecture):
    model = random_model(architecture, np.float64)
    x = np.random.default_rng(0).normal(size=(9, 32))
    fast = attention_branch(model, 0, x[None], np.arange(9))[0]
    assert relative(fast, slow_branch(model, 0, x)) < 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 9), st.integers(0, 2**31))
def test_absorbed_equals_naive(heads, tokens, before, seed):
    latent = Latent(q_rank=None, kv_rank=6, nope_dim=5, rope_dim=4, value_dim=3)
    rng, S = np.random.default_rng(seed), tokens + before
    q_n, q_r = rng.normal(size=(2, heads, tokens, 5)), rng.normal(size=(2, heads, tokens, 4))
    c, k_r, up = rng.normal(size=(2, 1, S, 6)), rng.normal(size=(2, 1, S, 4)), rng.normal(size=(heads * 8, 6))
    run = lambda q, k, v: attend(q, k, v, np.arange(before, S), np.arange(S), scale=0.7)
    naive = attend_naive(latent, q_n, q_r, c[:, 0] @ up.T, k_r, run)
    assert naive.shape == (2, heads, tokens, 3)
    np.testing.assert_allclose(attend_absorbed(latent, q_n, q_r, c, k_r, up, run), naive, atol=1e-10)


def forms(model, ids, sizes):
    """Logits through one cache, and the number of key-value heads that each call attended over in layer 0."""
    cache, out, heads, start = new_cache(model), [], [], 0

    def spy(q, k, v, *args, **options):
        heads.append(k.shape[1])
        return attend(q, k, v, *args, **options)

    for size in sizes:
        out.append(forward(model, ids[..., start : start + size], cache=cache, attend=spy))
        start += size
    return np.concatenate(out, axis=-2), heads[:: model.config.num_layers]


@BOTH
def test_decode_equals_prefill_and_each_takes_its_form(architecture):
    model = random_model(architecture, np.float64)
    whole = forward(model, IDS)
    for sizes, expected in (([23], [4]), ([20, 1, 1, 1], [4, 1, 1, 1]), ([1] * 23, None), ([9, 1, 6, 7], None)):
        logits, heads = forms(model, IDS, sizes)
        assert relative(logits, whole) < 1e-12
        assert expected is None or heads == expected


def test_the_cheaper_form_is_taken_at_the_count():
    """With these widths and one query: naive 12 S 13 + 17 S, absorbed 12 13 + 28 S, times 4 heads."""
    latent = random_config("deepseek_v2").latent
    assert multiply_adds(latent, 4, 1, 10) == (4 * (10 * 12 * 13 + 10 * 17), 4 * (12 * 13 + 10 * 28))
    for T in (1, 2, 9):
        naive, absorbed = multiply_adds(latent, 4, T, 40)
        assert (naive > absorbed) == (40 * 12 * 13 + T * 40 * 17 > T * (12 * 13 + 40 * 28))


def test_deepseek_v3_counted():
    """Card A7 and B2: 576 numbers a token and layer; absorbed decode does 2 * 128 * (576 + 512) * S operations."""
    v3 = Latent(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    S = 10**6
    _, absorbed = multiply_adds(v3, 128, 1, S)
    assert 2 * (absorbed - 128 * 512 * 256) == 2 * 128 * (576 + 512) * S
    assert 61 * (v3.kv_rank + v3.rope_dim) * 2 == 70_272
    assert round(2 * 128 * (576 + 512) / (576 * 2), 1) == 241.8


# The cache


@BOTH
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_bytes_do_not_depend_on_the_heads(architecture, heads):
    model = random_model(architecture, num_heads=heads)
    cache = new_cache(model)
    forward(model, IDS, cache=cache)
    latent = model.config.latent
    assert cache.nbytes == 23 * 2 * (latent.kv_rank + latent.rope_dim) * 4
    store = cache.stores[0]
    assert store.keys.shape[:2] == store.values.shape[:2] == (1, 1)


@BOTH
def test_permuted_heads_change_nothing_in_the_cache(architecture):
    model = random_model(architecture, np.float64)
    order = np.array([2, 0, 3, 1])
    weights = dict(model.weights)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        for name in ("q_proj", "q_b_proj", "kv_b_proj"):
            if (w := weights.get(f"{prefix}{name}.weight")) is not None:
                weights[f"{prefix}{name}.weight"] = w.reshape(4, -1, w.shape[1])[order].reshape(w.shape)
        o = weights[prefix + "o_proj.weight"]
        weights[prefix + "o_proj.weight"] = o.reshape(len(o), 4, -1)[:, order].reshape(o.shape)
    caches = []
    for m in (model, replace(model, weights=weights)):
        caches.append(new_cache(m))
        logits = forward(m, IDS, cache=caches[-1])
        assert relative(logits, forward(model, IDS)) < 1e-12
    for a, b in zip(*(cache.stores for cache in caches), strict=True):
        np.testing.assert_allclose(a.values, b.values, atol=1e-12)
        np.testing.assert_allclose(a.keys, b.keys, atol=1e-12)


def test_what_is_cached_is_the_latent_after_its_norm_and_the_key_after_rope():
    model = random_model("deepseek_v3", np.float64)
    store, x = DenseStore(), np.random.default_rng(1).normal(size=(1, 5, 32))
    attention_branch(model, 0, x, np.arange(5), store=store)
    prefix = "model.layers.0.self_attn."
    compressed = x @ model.weights[prefix + "kv_a_proj_with_mqa.weight"].T
    c = rms_norm(compressed[..., :16], model.weights[prefix + "kv_a_layernorm.weight"], 1e-6)
    k_r = rotate_interleaved(compressed[..., 16:], *cos_sin(model.config.rope, 6, np.arange(5), np.float64))
    np.testing.assert_allclose(store.values[0, 0, :5], c[0], atol=1e-13)
    np.testing.assert_allclose(store.keys[0, 0, :5], k_r[0], atol=1e-13)


class Unrotated(DenseStore):
    """Keys as they come, the newest first: positions alone must put them right."""

    pre_rope = True

    def extend(self, k, v, positions, queries=None):
        K, V, key_positions = super().extend(k, v, positions)
        return K[..., ::-1, :], V[..., ::-1, :], key_positions[None, ::-1]


@BOTH
def test_stores_of_unrotated_keys_and_kivi_work_unchanged(architecture):
    model = random_model(architecture, np.float64)
    policies = (lambda layer: Unrotated(), lambda layer: kivi(layer, group_size=2, residual=64))
    for policy in policies:
        cache = new_cache(model, policy)
        pieces = [forward(model, part, cache=cache) for part in (IDS[:20], IDS[20:21], IDS[21:])]
        assert relative(np.concatenate(pieces), forward(model, IDS)) < 1e-12
    small, dense = new_cache(model, lambda layer: kivi(layer, bits=4, group_size=2, residual=2)), new_cache(model)
    for cache in (small, dense):
        logits = forward(model, IDS, cache=cache)
        forward(model, IDS[:1], cache=cache)
    assert small.nbytes < dense.nbytes and np.isfinite(logits).all()


# Loading, storing, compressing


@BOTH
def test_names_and_shapes(architecture):
    for changes in ({}, dict(attention_bias=True, output_bias=True, tied_embeddings=True, num_layers=3)):
        config = random_config(architecture, **changes)
        assert expected_shapes(config) == weight_shapes(config)


@BOTH
def test_through_config_json_and_back(architecture, tmp_path):
    model = random_model(architecture)
    to_hf(model, tmp_path / "hf")
    again = refllm.load(tmp_path / "hf")
    assert again.config == model.config
    np.testing.assert_array_equal(forward(again, IDS), forward(model, IDS))


def test_the_layer_that_predicts_a_second_token_is_left_out(tmp_path):
    deeper = random_model("deepseek_v3", num_layers=3)
    to_hf(deeper, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    assert refllm.load(tmp_path / "hf").config.num_layers == 2


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        (
            "deepseek_v3",
            {"scoring_func": "softmax"},
            "scoring_func = 'softmax' is not supported .sigmoid of deepseek_v3",
        ),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported .greedy or group"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob true is not supported"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ("deepseek_v3", {"n_group": 3}, "8 experts in 3 groups"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "5 experts a token cannot be chosen from 2 groups of 2"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "rope_dim must be even"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a number from 0"),
    ],
)
def test_configs_that_are_not_understood(architecture, change, message):
    values = {k: v for k, v in (hf_config(random_config(architecture)) | change).items()}
    with pytest.raises(ValueError, match=message):
        parse_config(values, {}, True)


def test_a_missing_number_of_experts_is_not_guessed():
    values = hf_config(random_config("deepseek_v3"))
    del values["n_routed_experts"]
    with pytest.raises(ValueError, match="n_routed_experts is missing"):
        parse_config(values, {}, True)
    assert parse_config(values | {"n_routed_experts": None}, {}, True).experts is None


def test_yarn_scales_scores_or_angles():
    """DeepSeek-V3's own numbers: scale 0.135234, cos and sin untouched."""
    values = hf_config(random_config("deepseek_v3")) | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    yarn = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    config = parse_config(values | {"rope_scaling": yarn}, {}, True)
    assert round(config.score_scale, 6) == 0.135234 and config.rope.attention_factor == 1.0
    config = parse_config(values | {"rope_scaling": yarn | {"mscale": 0.707}}, {}, True)
    assert config.rope.attention_factor == pytest.approx((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1))


@BOTH
def test_calibration_sees_every_linear(architecture):
    model = random_model(architecture)
    for layer, stats in walk(model, np.tile(IDS, 6)):
        assert set(stats) == set(layer_linears(layer, model.config))
        for name, seen in stats.items():
            assert seen.X.shape[1] == model.weights[name].shape[1]


@BOTH
@pytest.mark.parametrize(
    "recipe", ["rtn:bits=8,group=-1", "gptq:bits=8,group=-1", "wanda:sparsity=0.1+rtn:bits=8,group=-1"]
)
def test_weight_methods_apply_and_the_result_is_stored(architecture, recipe, tmp_path):
    model = random_model(architecture)
    small = refllm.compress(model, recipe, np.random.default_rng(0).integers(0, 64, 300))
    assert all(
        not isinstance(small.weights[n], np.ndarray) for layer in (0, 1) for n in layer_linears(layer, small.config)
    )
    save(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    assert again.config == model.config
    cache = new_cache(again)
    pieces = np.concatenate([forward(again, IDS[:20], cache=cache), forward(again, IDS[20:21], cache=cache)])
    assert relative(pieces, forward(small, IDS[:21])) < 1e-5
    assert relative(pieces, forward(model, IDS[:21])) < 0.3
    if recipe.startswith("rtn"):
        assert isinstance(small.weights["model.layers.1.self_attn.kv_b_proj.weight"], IntWeight)


@pytest.mark.parametrize(
    "recipe", ["smoothquant", "quarot", "smoothattention", "awq", "kquants", "osplus", "dartquant"]
)
def test_methods_that_move_numbers_between_the_linears_of_a_llama_say_no(recipe):
    with pytest.raises(ValueError, match=r"seven linears of a Llama layer.*latent attention and experts"):
        refllm.compress(random_model("deepseek_v3"), recipe, np.tile(IDS, 6))


def test_gguf_says_no(tmp_path):
    with pytest.raises(ValueError, match=r"deepseek_v3 .latent attention and experts. are not written"):
        to_gguf(random_model("deepseek_v3"), tmp_path / "model.gguf")


@pytest.mark.parametrize("changes", [dict(head_dim=12), dict(num_kv_heads=2)])
def test_heads_that_contradict_the_latent(changes):
    with pytest.raises(ValueError, match=r"one key-value head and head_dim = nope_dim \+ rope_dim = 14"):
        random_config("deepseek_v3", **changes)


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3"])
def test_gradients_and_compiled_passes_leave_it_to_the_readable_pass(architecture):
    model = random_model(architecture)
    assert compiled_for(model, new_cache(model), 1) is None
    with pytest.raises(ValueError, match=r"training knows plain Llama only; .* latent attention and experts"):
        fisher_diagonal(model, IDS, [layer_linears(0, model.config)[0]])
