"""smoothquant: the scales by the authors' formula, the identities of the method, and what it is for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.methods.apply import compress
from refllm.methods.transform import smoothquant
from refllm.methods.transform.smoothquant import inverted_scales, scales
from refllm.model.equivalent import norm_readers
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.planter import plant_outliers
from refllm.model.walk import walk
from tests.models import ARCHITECTURES, random_model
from tests.strategies import PROPERTY, inputs, weights

IDS = np.random.default_rng(0).integers(0, 64, 90)
W8A8 = "rtn:bits=8,symmetric=true,group=-1+dynamic"


@PROPERTY
@given(st.data(), st.sampled_from([0.0, 0.25, 0.5, 0.85, 1.0]))
def test_scales_equal_the_published_formula(data, alpha):
    first = data.draw(weights())
    second = data.draw(weights(columns=st.just(first.shape[1])))
    a = np.abs(data.draw(inputs(first.shape[1]))).max(axis=0)
    for k, s in enumerate(scales(a, [first, second], alpha)):
        w = max(1e-5, max(abs(float(W[i, k])) for W in (first, second) for i in range(len(W))))
        assert s == pytest.approx(max(1e-5, float(a[k]) ** alpha / w ** (1 - alpha)), rel=1e-12)


def smoothed(alpha, **knobs):
    model = random_model("llama", np.float64)
    changed = smoothquant(model, IDS, alpha=alpha, **knobs)
    for (layer, before), (_, after) in zip(walk(model, IDS), walk(changed, IDS), strict=True):
        for readers in norm_readers(model.config, layer).values():
            columns = lambda m, readers=readers: np.max([np.abs(m.weights[n]).max(axis=0) for n in readers], axis=0)
            name = readers[0]
            yield before[name].absmax, columns(model), after[name].absmax, columns(changed)


def test_where_the_difficulty_goes():
    """One s for q, k and v: the weights' maximum is that of all of them."""
    for _, _, a, _ in smoothed(1.0):
        np.testing.assert_allclose(a, 1, rtol=1e-10)
    for _, _, _, w in smoothed(0.0):
        np.testing.assert_allclose(w, 1, rtol=1e-10)
    for a, w, a_then, w_then in smoothed(0.5):
        np.testing.assert_allclose(a_then, np.sqrt(a * w), rtol=1e-10)
        np.testing.assert_allclose(w_then, np.sqrt(a * w), rtol=1e-10)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_inverted_scales_move_size_the_other_way(alpha):
    for a, w, a_then, w_then in smoothed(alpha, inverted=True):
        np.testing.assert_allclose(a_then, a ** (1 + alpha) / w ** (1 - alpha), rtol=1e-10)
        np.testing.assert_allclose(a_then * w_then, a * w, rtol=1e-10)


def test_inverted_scales_leave_what_is_dead():
    """Neither floor of the published formula may be turned round: one channel would be 100000 times too loud."""
    a = np.array([0.0, 4.0, 4.0])
    s = inverted_scales(a, [np.array([[1.0, 0.0, 1.0]]), np.array([[1.0, 0.0, -16.0]])], 0.5)
    assert s.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("knobs", [{}, {"all_linears": True, "alpha": 0.8}, {"inverted": True}], ids=str)
def test_the_function_stays(architecture, knobs):
    for dtype, rtol in ((np.float64, 1e-11), (np.float32, 3e-5)):
        model = random_model(architecture, dtype)
        exact = forward(model, IDS)
        changed = smoothquant(model, IDS, **knobs)
        assert np.abs(forward(changed, IDS) - exact).max() <= rtol * np.abs(exact).max()
        assert {n for n in model.weights if changed.weights[n] is not model.weights[n]} >= {
            name for norm, readers in norm_readers(model.config, 0).items() for name in (norm, *readers)
        }


def test_folding_into_the_norm_is_dividing_the_inputs():
    model = random_model("llama", np.float64)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (next(walk(m, IDS))[1][name].X for m in (model, smoothquant(model, IDS)))
    s = scales(np.abs(before).max(axis=0), [model.weights[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv"])
    np.testing.assert_allclose(after, before / s, rtol=1e-12)


def test_all_linears_smooths_o_and_down():
    """alpha = 1: every channel of their inputs ends at 1; of o's, the larger one of two heads that share values."""
    model = random_model("llama", np.float64)
    _, stats = next(walk(smoothquant(model, IDS, alpha=1.0, all_linears=True), IDS))
    np.testing.assert_allclose(stats["model.layers.0.mlp.down_proj.weight"].absmax, 1, rtol=1e-10)
    heads = stats["model.layers.0.self_attn.o_proj.weight"].absmax.reshape(2, 2, 8)
    np.testing.assert_allclose(heads.max(axis=1), 1, rtol=1e-10)


def error(model, recipe, exact):
    return np.square(forward(compress(model, recipe, IDS), IDS) - exact).sum()


def test_planted_outliers_are_smoothed_away():
    model = random_model("llama", np.float32)
    exact = forward(model, IDS)
    loud = plant_outliers(model, kinds=("norm",), factors=(64.0,))
    assert error(loud, "smoothquant+" + W8A8, exact) < error(loud, W8A8, exact) / 10
    assert error(loud, "smoothquant+" + W8A8, exact) < 2 * error(model, W8A8, exact)
    behind_values = plant_outliers(model, kinds=("vo",), channels=1)
    only_norms, everything = ("smoothquant" + knob + "+" + W8A8 for knob in ("", ":all_linears=true"))
    assert error(behind_values, everything, exact) < error(behind_values, only_norms, exact) / 3


def test_a_dead_channel_is_scaled_as_the_authors_scale_it():
    model = random_model("llama", np.float64)
    gain = "model.layers.0.input_layernorm.weight"
    dead = model.weights[gain].copy()
    dead[3] = 0
    model = replace(model, weights=model.weights | {gain: dead})
    changed = smoothquant(model, IDS)
    q = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(changed.weights[q][:, 3], 1e-5 * model.weights[q][:, 3], rtol=1e-12)
    np.testing.assert_allclose(forward(changed, IDS), forward(model, IDS), rtol=1e-9, atol=1e-9)


def test_one_token_of_calibration_is_enough_to_keep_the_function():
    model = random_model("llama", np.float64)
    np.testing.assert_allclose(forward(smoothquant(model, IDS[:1]), IDS), forward(model, IDS), rtol=1e-8, atol=1e-8)


def test_it_composes_and_is_stored(tmp_path):
    model = random_model("llama", np.float32)
    for recipe in ("smoothquant+" + W8A8, "smoothquant+rtn:bits=4,group=16+static", "smoothquant+wanda+rtn:group=8"):
        small = compress(model, recipe, IDS)
        back = refllm.load(save_native(small, tmp_path / str(len(recipe))))
        assert np.array_equal(forward(back, IDS), forward(small, IDS))


def test_bad_input():
    model = random_model("llama", np.float32)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        smoothquant(model, IDS, alpha=1.5)
    with pytest.raises(ValueError, match=r"in dense weights, but .* is packed"):
        smoothquant(compress(model, "rtn:group=16"), IDS)
    with pytest.raises(ValueError, match="no token ids"):
        smoothquant(model, IDS[:0])
    broken = model.weights | {"model.embed_tokens.weight": np.full((64, 32), np.nan, np.float32)}
    with pytest.raises(ValueError, match="calibration inputs hold NaN or infinity"):
        smoothquant(replace(model, weights=broken), IDS)
