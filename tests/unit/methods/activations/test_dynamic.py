"""dynamic: what the stage binds, W8A8 and W4A4 as recipes, and what outliers cost them."""

from dataclasses import replace

import numpy as np
import pytest

import refllm
from refllm.kernels.packed.activations import Rounding
from refllm.methods.activations import dynamic
from refllm.methods.apply import check, compress, with_activations
from refllm.methods.recipes import RecipeError
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.planter import plant_outliers
from tests.models import ARCHITECTURES, random_model

IDS = np.random.default_rng(0).integers(0, 64, 40)
W8 = "rtn:bits=8,symmetric=true,group=-1"


def test_the_kernels_names_are_used_where_they_mean_the_same():
    assert (dynamic(), dynamic(bits=4)) == ("int8", "int4")
    assert dynamic(bits=8, clip_ratio=0.9) == Rounding(8, 0.9) and dynamic(symmetric=False) == Rounding(8, 1.0, False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("knobs", ["", ":bits=8,symmetric=false", ":bits=6,clip_ratio=0.9"])
def test_a_recipe_runs_with_its_activations(architecture, knobs):
    model = random_model(architecture, np.float32)
    plain, rounded = compress(model, W8), compress(model, f"{W8}+dynamic{knobs}")
    assert plain.runtime.activations == "float32" and rounded.runtime.activations != "float32"
    exact, seen = forward(plain, IDS), forward(rounded, IDS)
    assert 1e-5 < np.linalg.norm(seen - exact) / np.linalg.norm(exact) < 0.3
    by_hand = replace(plain, runtime=replace(plain.runtime, activations=rounded.runtime.activations))
    assert np.array_equal(forward(by_hand, IDS), seen)


def test_fewer_bits_are_worse():
    model = random_model("llama", np.float32)
    exact = forward(compress(model, W8), IDS)
    errors = [np.square(forward(compress(model, f"{W8}+dynamic:bits={b}"), IDS) - exact).sum() for b in (8, 7, 6, 4, 3)]
    assert errors == sorted(errors) and errors[0] < errors[-1] / 100


def test_a_stored_model_knows_its_activations(tmp_path):
    small = compress(random_model("llama", np.float32), f"{W8}+dynamic:bits=6,clip_ratio=0.9")
    back = refllm.load(save_native(small, tmp_path / "m"))
    assert back.runtime.activations == Rounding(6, 0.9) and np.array_equal(forward(back, IDS), forward(small, IDS))


def test_a_recipe_is_not_overruled_by_the_command_line():
    model = compress(random_model("llama", np.float32), f"{W8}+dynamic:bits=4")
    assert with_activations(model, "int8").runtime.activations == "int4"
    assert with_activations(compress(model, "none"), "int8").runtime.activations == "int4"
    plain = compress(random_model("llama", np.float32), W8)
    assert with_activations(plain, "int8").runtime.activations == "int8"


def test_planted_outliers_cost_what_they_take_of_the_range():
    """The function is the same; a channel 64 times larger leaves the others 1/64 of the codes."""
    model = random_model("llama", np.float32)
    loud = plant_outliers(model, kinds=("norm",))
    error = {}
    for name, of in (("quiet", model), ("loud", loud)):
        packed = compress(of, W8)
        error[name] = np.square(forward(compress(of, f"{W8}+dynamic"), IDS) - forward(packed, IDS)).sum()
    assert error["loud"] > 10 * error["quiet"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("dynamic:bits=9", "bits of activations must be 2 to 8, got 9"),
        ("dynamic:clip_ratio=1.5", "clip_ratio must lie above 0"),
    ],
)
def test_bad_knobs_are_found_at_once(recipe, message):
    with pytest.raises(ValueError, match=message):
        check(random_model("llama", np.float32), recipe)


def test_activations_have_one_place():
    with pytest.raises(RecipeError, match="2 activations stages"):
        compress(random_model("llama", np.float32), "dynamic+dynamic:bits=4")
