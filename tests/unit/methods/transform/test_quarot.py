"""quarot: the function stays to the last digits, outliers are spread, and what is behind a turn packs what it meets."""

from dataclasses import replace

import numpy as np
import pytest

import refllm
from refllm.evaluate.perplexity import documents
from refllm.formats.files import data_path
from refllm.kernels.hadamard import hadamard
from refllm.kernels.packed.records import IntWeight, Rotated, Sparse24, is_record
from refllm.kernels.stats import Stats
from refllm.methods.prune import wanda
from refllm.methods.quant import gptq, rtn
from refllm.methods.transform import dartquant, quarot
from refllm.model.llama import forward
from refllm.model.load import load
from refllm.model.native import save_native
from refllm.model.planter import plant_outliers
from refllm.model.walk import walk
from tests.models import random_model

IDS = np.random.default_rng(0).integers(0, 64, 60)
DOWN, O = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"


def gap(a, b):
    x, y = forward(a, IDS), forward(b, IDS)
    return np.abs(x - y).max() / np.abs(y).max()


@pytest.mark.parametrize("knobs", [{}, dict(online=False), dict(rotation="orthogonal"), dict(seed=3)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "qwen3"])
def test_logits_stay_in_float64(architecture, knobs):
    """Gains, biases, tied heads, q/k norms, grouped heads."""
    overrides = dict(head_dim=8) if architecture == "qwen3" else {}
    model = random_model(architecture, np.float64, **overrides)
    assert gap(quarot(model, **knobs), model) <= 1e-10


@pytest.mark.parametrize("make", [quarot, lambda model: dartquant(model, IDS, steps=2)], ids=["quarot", "dartquant"])
def test_biases_of_every_linear_are_turned(make):
    model = random_model("llama", np.float64, attention_bias=True, output_bias=True, mlp_bias=True)
    assert gap(make(model), model) <= 1e-10


@pytest.mark.parametrize(("heads", "inner"), [(4, 8), (6, 1)])
def test_heads_that_no_hadamard_matrix_mixes(heads, inner):
    """Six heads of 8 channels: the whole input of 48 is turned, as for SmolLM2's nine heads."""
    model = random_model("llama", np.float64, num_heads=heads)
    turned = quarot(model)
    assert turned.weights[O].inner == inner and turned.weights[DOWN].inner == 1
    assert gap(turned, model) <= 1e-10


def test_a_rotation_of_the_keys_before_rope_is_another_function():
    """Why queries and keys are not in the list: RoPE turns pairs, and an H in front of it does not pass through."""
    model = random_model("llama", np.float64)
    H = hadamard(8) / 8**0.5
    changed = dict(model.weights)
    for name, heads in (("q", 4), ("k", 2)):
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        changed[key] = (H @ changed[key].reshape(heads, 8, -1)).reshape(changed[key].shape)
    assert gap(replace(model, weights=changed), model) > 1e-3


def test_every_token_of_the_rotated_stream_is_even():
    """Outliers planted in the gains: max / rms of what q, gate and down read falls to that of a Gaussian."""
    model = plant_outliers(refllm.load("tiny"), kinds=("norm",))
    turned = quarot(model)
    ids = np.random.default_rng(1).integers(0, 800, 256)
    peak = lambda x: np.median(np.abs(x).max(axis=1) / np.sqrt(np.mean(x**2, axis=1)))
    before, after = next(walk(model, ids))[1], next(walk(turned, ids))[1]
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        key = f"model.layers.0.{name}.weight"
        assert peak(after[key].X) < 4 < 6 < peak(before[key].X)
    assert peak(turned.weights[DOWN].turned(after[DOWN].X)) < peak(before[DOWN].X)


def test_lengths_of_tokens_stay():
    model = random_model("llama", np.float64)
    folded = quarot(model, online=False)
    norm = lambda m: np.linalg.norm(m.weights["model.embed_tokens.weight"], axis=1)
    np.testing.assert_allclose(norm(folded), norm(model), rtol=1e-12)


def test_later_stages_pack_what_is_inside_from_turned_inputs():
    """The calibration inputs that a method is handed are those that the stored weight meets."""
    model = random_model("llama")
    turned = quarot(model)
    small = refllm.compress(model, "quarot+rtn:bits=4,group=-1", IDS)
    record = small.weights[DOWN]
    assert isinstance(record, Rotated) and isinstance(record.weight, IntWeight)
    assert np.array_equal(record.weight.codes, rtn(turned.weights[DOWN].weight, bits=4, group_size=-1).codes)
    sparse = refllm.compress(model, "quarot+wanda:pattern=2:4,dtype=float32", IDS).weights[O]
    stats = next(walk(turned, IDS))[1][O]
    twin = wanda(turned.weights[O].weight, Stats(turned.weights[O].turned(stats.X)), pattern="2:4", dtype="float32")
    assert np.array_equal(sparse.weight.indices, twin.indices)
    both = refllm.compress(model, "quarot+wanda:pattern=2:4+rtn:bits=4,group=-1", IDS).weights[O]
    assert isinstance(both.weight, Sparse24) and isinstance(both.weight.values, IntWeight)


def test_gptq_compensates_with_turned_inputs():
    """The recipe of the paper; the same codes as GPTQ on what is stored and what it meets."""
    model = random_model("llama")
    small = refllm.compress(model, "quarot+gptq:bits=4,group=-1+dynamic:bits=4", IDS)
    turned = quarot(model)
    stats = next(walk(turned, IDS))[1]
    for name in (O, DOWN):
        inside = turned.weights[name]
        twin = gptq(inside.weight, Stats(inside.turned(stats[name].X)), bits=4, group_size=-1)
        assert np.array_equal(small.weights[name].weight.codes, twin.codes)
        blind = gptq(inside.weight, stats[name], bits=4, group_size=-1)
        assert not np.array_equal(blind.codes, twin.codes)
    assert np.isfinite(forward(small, IDS)).all()


def test_rounded_inputs_are_measured_behind_the_turn():
    """The scale that `static` finds is that of the turned inputs."""
    model = random_model("llama")
    small = refllm.compress(model, "quarot+rtn:bits=8,group=-1+static:bits=8", IDS)
    inside = small.weights[DOWN].weight
    turned = quarot(model)
    X = turned.weights[DOWN].turned(next(walk(turned, IDS))[1][DOWN].X)
    top, wide = (np.abs(x).max() for x in (X, next(walk(turned, IDS))[1][DOWN].X))
    np.testing.assert_allclose(inside.scale.item() * 127, top, rtol=0.02)
    assert abs(wide / top - 1) > 0.1


def test_sizes_count_the_head_of_its_own():
    model = random_model("qwen2")
    assert model.config.tied_embeddings
    size = lambda m: sum(w.nbytes for w in m.weights.values())
    assert size(quarot(model)) == size(model) + model.weights["model.embed_tokens.weight"].nbytes


def test_compressed_saved_and_loaded(tmp_path):
    small = refllm.compress(random_model("llama"), "quarot+rtn:bits=4,group=-1+kivi:bits=4,group=8", IDS)
    save_native(small, tmp_path / "m")
    back = refllm.load(tmp_path / "m")
    assert isinstance(back.weights[DOWN], Rotated)
    assert np.array_equal(forward(back, IDS), forward(small, IDS))
    assert load(tmp_path / "m").recipe == small.recipe


def test_a_second_compression_opens_what_is_inside_and_keeps_the_turn():
    small = refllm.compress(random_model("llama"), "quarot+rtn:bits=4,group=-1", IDS)
    again = refllm.compress(small, "rtn:bits=8,group=-1")
    assert isinstance(again.weights[DOWN], Rotated) and again.weights[DOWN].weight.bits == 8
    with pytest.raises(ValueError, match=r"packed; load the uncompressed model"):
        refllm.compress(small, "quarot")


def test_what_cannot_be_rotated_is_named():
    with pytest.raises(ValueError, match=r"a head is 10 wide.*rotation=orthogonal needs none"):
        quarot(random_model("qwen3"))
    with pytest.raises(ValueError, match="norms what each branch returns"):
        quarot(random_model("gemma3"))
    with pytest.raises(ValueError, match=r"inputs of model.layers.0.mlp.down_proj.weight cannot be turned.*50 wide"):
        quarot(random_model("llama", intermediate_size=50))
    assert gap(quarot(random_model("llama", np.float64, intermediate_size=50), online=False),
               random_model("llama", np.float64, intermediate_size=50)) <= 1e-10  # fmt: skip
    with pytest.raises(ValueError, match="rotation must be hadamard or orthogonal, got 'x'"):
        quarot(random_model("llama"), rotation="x")


@pytest.mark.parametrize("kinds", [("norm",), ("norm", "vo", "qk")], ids="+".join)
def test_four_bit_weights_and_activations_survive_outliers(kinds):
    """Measured: gains only 905 -> 2.28 (2.26 in float32); with planted values and keys 6995 -> 60."""
    model = plant_outliers(refllm.load("tiny"), kinds=kinds)
    texts = documents(data_path("tiny/eval.txt").read_text(encoding="utf-8"))[:2]
    stories = [model.tokenizer.encode(text) for text in texts]

    def perplexity(recipe):
        small = refllm.compress(model, recipe + "+dynamic:bits=4")
        return refllm.perplexity(small, stories, protocol="document", window=512)

    plain, turned = (perplexity(recipe + "rtn:bits=4,group=-1") for recipe in ("", "quarot+"))
    assert turned < plain / 20
    if kinds == ("norm",):
        assert turned < 2.6


def test_scales_that_can_move_go_first():
    """Values of very different size are mixed by a rotation; SmoothQuant evens them out before: 60 -> 2.29."""
    model = plant_outliers(refllm.load("tiny"))
    texts = documents(data_path("tiny/eval.txt").read_text(encoding="utf-8"))[:2]
    stories = [model.tokenizer.encode(text) for text in texts]
    recipe = "quarot+rtn:bits=4,group=-1+dynamic:bits=4"
    calibration = np.concatenate(stories)
    plain, smooth = (refllm.compress(model, r + recipe, calibration) for r in ("", "smoothquant:all_linears=true+"))
    plain, smooth = (refllm.perplexity(m, stories, protocol="document", window=512) for m in (plain, smooth))
    assert smooth < 2.6 < 10 < plain


def test_no_weight_is_shared_by_mistake():
    """quarot leaves the model it was given alone, its tied head too."""
    model = random_model("qwen2")
    before = {name: weight.tobytes() for name, weight in model.weights.items()}
    quarot(model)
    assert before == {name: weight.tobytes() for name, weight in model.weights.items()}
    assert not any(map(is_record, model.weights.values()))
