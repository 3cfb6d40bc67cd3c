"""compress: what reaches a method, what comes back into the model, and what a recipe cannot do."""

from dataclasses import replace

import numpy as np
import pytest

import refllm
from refllm.formats.errors import FormatError
from refllm.kernels.packed.records import IntWeight, LowRank, Sparse24, SparseBitmask, is_record, parts
from refllm.methods.apply import check, compress, load
from refllm.methods.lowrank import svd
from refllm.methods.prune import wanda
from refllm.methods.quant import rtn
from refllm.methods.recipes import RecipeError
from refllm.methods.record import report
from refllm.model.llama import forward
from refllm.model.load import densify
from refllm.model.native import save_native
from refllm.model.sample import generate_ids
from refllm.model.walk import layer_linears, walk
from tests.models import ARCHITECTURES, random_model

IDS = np.random.default_rng(0).integers(0, 64, 60)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model_of(architecture="llama", **overrides):
    return random_model(architecture, **{"intermediate_size": 64, **overrides})


def all_linears(model):
    return [name for layer in range(model.config.num_layers) for name in layer_linears(layer)]


def same_record(a, b):
    """Bit for bit, nested parts too."""
    pa, pb = parts(a), parts(b)
    return type(a) is type(b) and pa.keys() == pb.keys() and all(pa[n].tobytes() == pb[n].tobytes() for n in pa)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_method_without_data_is_called_on_every_linear_of_the_layers(architecture):
    model = model_of(architecture)
    before = {name: w.tobytes() for name, w in model.weights.items()}
    small = compress(model, "rtn:bits=3,group=-1")
    for name, weight in model.weights.items():
        if name in all_linears(model):
            assert same_record(small.weights[name], rtn(weight, bits=3, group_size=-1))
        else:
            assert small.weights[name] is weight  # shared, not copied
    assert {name: w.tobytes() for name, w in model.weights.items()} == before
    assert (model.recipe, small.recipe) == ("", "rtn:bits=3,group=-1")


def test_the_compressed_model_runs_as_its_dense_copy():
    """Products of 32 to 48 float32 terms, in another order: far below the effect of 4 bits."""
    model = model_of()
    for recipe in ("rtn:group=16", "wanda:pattern=2:4+rtn:group=16", "svd:rank=9", "wanda+rtn:group=8"):
        small = compress(model, recipe, IDS)
        packed, dense = forward(small, IDS), forward(densify(small), IDS)
        plain = forward(model, IDS)
        assert np.abs(packed - dense).max() < 1e-4 * np.abs(dense).max()
        assert np.abs(packed - plain).max() > 1e-2 * np.abs(plain).max()


def test_methods_with_data_see_layers_that_are_already_compressed():
    model = model_of(num_layers=3)
    small = compress(model, "wanda:sparsity=0.6", IDS)
    by_hand = replace(model, weights=dict(model.weights))
    for layer, stats in walk(by_hand, IDS):
        for name in layer_linears(layer):
            by_hand.weights[name] = wanda(model.weights[name], stats[name], sparsity=0.6)
    naive = {name: stats[name] for _, stats in walk(model, IDS) for name in stats}
    differs = 0
    for name in all_linears(model):
        assert same_record(small.weights[name], by_hand.weights[name])
        differs += not same_record(small.weights[name], wanda(model.weights[name], naive[name], sparsity=0.6))
    assert differs  # with statistics of the uncompressed model some masks are others


def test_a_compressed_embedding_is_what_the_layers_see():
    model = model_of()
    small = compress(model, "rtn:bits=2,group=-1,only=embed_tokens+wanda", IDS)
    quantised = replace(
        model, weights=model.weights | {EMBEDDING: rtn(model.weights[EMBEDDING], bits=2, group_size=-1)}
    )
    _, stats = next(walk(quantised, IDS))
    name = layer_linears(0)[0]
    assert same_record(small.weights[name], wanda(model.weights[name], stats[name]))
    assert isinstance(small.weights[EMBEDDING], IntWeight)


def test_stages_compose_inside_the_record():
    model = model_of()
    name = layer_linears(0)[0]
    W = model.weights[name]
    stats = next(walk(model, IDS))[1][name]

    both = compress(model, "wanda:pattern=2:4+rtn:bits=4,group=16", IDS).weights[name]
    pruned = wanda(W, stats, pattern="2:4")
    assert isinstance(both, Sparse24) and isinstance(both.values, IntWeight)
    assert both.indices.tobytes() == pruned.indices.tobytes()
    assert same_record(both.values, rtn(pruned.values.astype(np.float32), bits=4, group_size=16))
    assert not both.dense()[pruned.dense() == 0].any()
    assert both.nbytes == both.values.nbytes + both.indices.nbytes

    masked = compress(model, "wanda:sparsity=0.5+rtn:bits=8,group=16", IDS).weights[name]
    assert isinstance(masked, SparseBitmask) and isinstance(masked.values, IntWeight)
    assert masked.values.shape == (W.shape[0], W.shape[1] // 2)  # a group never crosses a row of the weight
    kept = wanda(W, stats).dense()
    assert np.abs(masked.dense() - kept).max() <= masked.values.scale.max()
    assert not masked.dense()[kept == 0].any()

    factors = compress(model, "svd:rank=8+rtn:bits=8,group=8").weights[name]
    plain = svd(W, rank=8)
    assert isinstance(factors, LowRank)
    for part in "AB":
        expected = rtn(getattr(plain, part).astype(np.float32), bits=8, group_size=8)
        assert same_record(getattr(factors, part), expected)


def test_values_of_uneven_rows_are_one_long_row():
    model = model_of()
    name = layer_linears(0)[0]
    record = compress(model, "magnitude:sparsity=0.3+rtn:group=-1").weights[name]
    W = model.weights[name]
    assert record.values.shape == (1, W.size - int(0.3 * W.size))


def test_only_chooses_weights_by_name():
    model = model_of()
    for pattern, chosen in (
        ("mlp", [n for n in all_linears(model) if ".mlp." in n]),
        ("layers.1.*down_proj", ["model.layers.1.mlp.down_proj.weight"]),
        ("[qk]_proj", [n for n in all_linears(model) if "q_proj" in n or "k_proj" in n]),
        ("embed_tokens", [EMBEDDING]),
        ("lm_head", [HEAD]),
    ):
        for calibration in (None, IDS):
            small = compress(model, f"rtn:group=-1,only={pattern}", calibration)
            assert sorted(n for n, w in small.weights.items() if is_record(w)) == sorted(chosen)
    mixed = compress(model, "rtn:bits=8,group=-1,only=attn+rtn:bits=4,group=-1,only=mlp").weights
    assert {mixed[n].bits for n in all_linears(model) if "attn" in n} == {8}
    assert {mixed[n].bits for n in all_linears(model) if "mlp" in n} == {4}


def test_a_tied_model_has_no_head_to_choose():
    with pytest.raises(ValueError, match="only=lm_head matches no weight"):
        compress(model_of("qwen2"), "rtn:only=lm_head")


def test_reports_come_for_every_weight_and_are_measured():
    model = model_of()
    seen = []
    small = compress(model, "rtn:group=16", IDS, on_report=seen.append)
    assert [r.name for r in seen] == all_linears(model)
    by_hand = replace(model, weights=dict(model.weights))
    for layer, stats in walk(by_hand, IDS):
        for r in seen[7 * layer : 7 * layer + 7]:
            assert r == report(r.name, model.weights[r.name], small.weights[r.name], stats[r.name])
            by_hand.weights[r.name] = small.weights[r.name]
    blind = []
    compress(model, "rtn:group=16,only=mlp", on_report=blind.append)
    assert [r.output_error for r in blind] == [None] * 6
    assert [r.weight_error for r in blind] == [r.weight_error for r in seen if "mlp" in r.name]


def test_float64_models_compress():
    small = compress(model_of(dtype=np.float64), "wanda:pattern=2:4+rtn:group=16", IDS)
    assert forward(small, IDS).dtype == np.float64


def test_compressing_again_starts_from_what_is_stored():
    once = compress(model_of(), "rtn:bits=4,group=16")
    twice = compress(once, "rtn:bits=8,group=16")
    name = layer_linears(0)[0]
    assert same_record(twice.weights[name], rtn(once.weights[name].dense(), bits=8, group_size=16))
    assert twice.recipe == "rtn:bits=4,group=16+rtn:bits=8,group=16"
    assert compress(once, "none").recipe == once.recipe


def test_what_a_method_of_the_whole_model_leaves_alone_stays_stored():
    """The codes that such a method is given as floats come back where nothing has changed."""
    model = compress(model_of(), "rtn:bits=8,group=16,only=embed_tokens+rtn:bits=8,group=16,only=o_proj")
    packed = {name for name, weight in model.weights.items() if is_record(weight)}
    assert EMBEDDING in packed and len(packed) == 1 + model.config.num_layers
    small = compress(model, "smoothquant", IDS)
    assert all(small.weights[name] is model.weights[name] for name in packed)
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert small.weights[changed] is not model.weights[changed]
    turned = compress(model, "quarot", IDS)
    assert not is_record(turned.weights[EMBEDDING])


def test_run_time_stages_are_bound():
    model = model_of()
    small = compress(model, "kivi:bits=4,group=4,residual=8+flash:block_q=4,block_k=4")
    assert not any(map(is_record, small.weights.values()))
    store = small.runtime.cache_policy(0)
    assert type(store).__name__ == "KiviStore" and store.bits == 4
    np.testing.assert_allclose(forward(small, IDS), forward(model, IDS), rtol=1e-4, atol=1e-4)
    fast = compress(model, "speculative:gamma=2")
    prompt = np.tile(IDS[:6], 3)
    assert list(generate_ids(fast, prompt, 12)) == list(generate_ids(model, prompt, 12))
    assert fast.runtime.generate is not None and model.runtime.generate is None


def test_load_brings_back_the_run_time_stages(tmp_path):
    small = compress(model_of(), "rtn:group=16+kivi:bits=4,group=4,residual=8")
    save_native(small, tmp_path / "m")
    for read in (load, refllm.load):
        back = read(tmp_path / "m")
        assert back.recipe == small.recipe
        assert back.runtime.cache_policy.keywords == {"bits": 4, "group_size": 4, "residual": 8}
        np.testing.assert_array_equal(forward(back, IDS), forward(small, IDS))


def test_a_stored_recipe_of_another_version_is_named(tmp_path):
    save_native(replace(model_of(), recipe="gptq2:bits=4"), tmp_path / "m")
    with pytest.raises(FormatError, match="stored recipe is not understood: unknown method 'gptq2'") as caught:
        load(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("wanda", ValueError, r"wanda needs calibration tokens: .*--calibration FILE \(in Python: calibration=ids\)"),
        ("rtn:only=nothing", ValueError, "only=nothing matches no weight; names look like model.layers.0"),
        ("rtn:only=MLP", ValueError, "only=MLP matches no weight"),
        (
            "rtn:group=13",
            ValueError,
            r"rtn cannot compress model.layers.0.self_attn.q_proj.weight \(32, 32\): group_size 13 does not divide",
        ),
        ("rtn:bits=9", ValueError, "bits must be 2 to 8, got 9"),
        ("rtn+rtn:group=16", ValueError, "group_size 64 does not divide the 32 columns"),
        ("rtn:group=16+rtn:group=16", ValueError, "already packed as int, whose parts cannot be compressed further"),
        ("svd:rank=4+rtn", ValueError, r"its part A \(32, 4\): group_size 64 does not divide the 4 columns"),
        ("nope", RecipeError, "unknown method 'nope'"),
        ("kivi:group=4+kivi:group=8", RecipeError, r"2 kvcache stages \(kivi, kivi\); keep one"),
        ("flash+flash_v1", RecipeError, r"2 attention stages \(flash, flash_v1\)"),
    ],
)
def test_mistakes_are_one_line(recipe, error, message):
    with pytest.raises(error, match=message) as caught:
        compress(model_of(), recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("svd:rank=4+wanda", "it needs calibration inputs, which the parts of a lowrank record do not have"),
        ("wanda:only=lm_head", "wanda needs calibration inputs, which lm_head.weight does not have"),
        ("wanda:only=embed", "wanda needs calibration inputs, which model.embed_tokens.weight does not have"),
    ],
)
def test_stages_that_cannot_have_data_say_so(recipe, message):
    with pytest.raises(ValueError, match=message):
        compress(model_of(), recipe, IDS)


def test_weights_that_are_not_finite_are_named():
    model = model_of()
    name = "model.layers.1.mlp.up_proj.weight"
    broken = model.weights[name].copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match=f"rtn cannot compress {name} .*NaN or Inf"):
        compress(replace(model, weights=model.weights | {name: broken}), "rtn:group=16")


def test_a_second_call_keeps_the_form_of_sparse_weights():
    """The stored recipe of two calls reads like one recipe of two stages, so it must mean the same."""
    model = model_of()
    once = compress(model, "wanda:pattern=2:4+rtn:bits=8,group=-1", IDS)
    twice = compress(compress(model, "wanda:pattern=2:4", IDS), "rtn:bits=8,group=-1")
    assert once.recipe == twice.recipe
    for name in layer_linears(0):  # later layers are scored on inputs that one stage, or two, have touched
        assert same_record(once.weights[name], twice.weights[name])
    assert all(isinstance(twice.weights[name].values, IntWeight) for name in all_linears(model))


def test_check_refuses_before_anything_is_compressed():
    """What the methods themselves say, on stand-ins: no weight of the model is looked at."""
    model = model_of(intermediate_size=48)
    broken = {name: np.full_like(weight, np.nan) for name, weight in model.weights.items()}
    for recipe in ("none", "rtn:group=16", "wanda:pattern=2:4+rtn:group=8", "svd:rank=16+rtn:group=-1"):
        check(replace(model, weights=broken), recipe, IDS)
    check(model, "kivi:bits=4,group=4,residual=8+flash:block_q=4+speculative:draft=layers")
    for recipe, message in (
        ("rtn:group=32", r"rtn cannot compress model.layers.0.mlp.down_proj.weight \(32, 48\): group_size 32"),
        ("rtn:bits=9,group=16", "bits must be 2 to 8"),
        ("svd:rank=17", "between 1 and 16"),  # of k and v, the smallest
        ("wanda:pattern=2:4+rtn:group=32", r"its part values \(16, 16\)"),
        ("rtn:group=16+rtn:group=16", "already packed"),
        ("rtn:group=16,only=embed+rtn:bits=1,group=16,only=mlp", "bits must be 2 to 8"),
        ("kivi:group=16", "group_size 16 does not divide the key head_dim 8"),
        ("speculative:draft=layers,draft_layers=9", "draft_layers must be 1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            check(model, recipe, IDS)
    with pytest.raises(ValueError, match="wanda needs calibration tokens"):
        check(model, "wanda")


def test_check_leaves_weights_beyond_its_limit_to_the_run(monkeypatch):
    monkeypatch.setattr("refllm.methods.apply._TRIED", 32 * 32)
    check(model_of(intermediate_size=48), "rtn:group=32")  # 48 columns refuse it
    with pytest.raises(ValueError, match="group_size 13 does not divide the 32 columns"):
        check(model_of(intermediate_size=48), "rtn:group=13")
