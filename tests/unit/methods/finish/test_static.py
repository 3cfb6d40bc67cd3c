"""static: the scale by its definition, what saturates, and W8A8 with it through a recipe."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import StaticInputs, TokenInputs
from refllm.kernels.packed.records import GGUFBlocks, IntWeight
from refllm.kernels.stats import Stats
from refllm.methods.apply import check, compress
from refllm.methods.finish import static
from refllm.methods.finish.static import BATCH
from refllm.methods.quant import rtn
from refllm.methods.record import report
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.walk import layer_linears, walk
from tests.models import random_model
from tests.strategies import PROPERTY, inputs

IDS = np.random.default_rng(0).integers(0, 64, 60)
W8 = "rtn:bits=8,symmetric=true,group=-1"


def example(out=6, columns=24, tokens=200, seed=0):
    rng = np.random.default_rng(seed)
    W, X = rng.standard_normal((out, columns), np.float32), rng.standard_normal((tokens, columns), np.float32)
    return rtn(W, bits=8, symmetric=True, group_size=-1), W, X


@PROPERTY
@given(inputs(5), st.integers(2, 8))
def test_the_largest_input_takes_the_last_code(X, bits):
    W = np.ones((2, 5), np.float32)
    record = static(rtn(W, group_size=-1), W, Stats(X), bits=bits)
    codes, scale, zero = record.steps(X)
    most = (1 << (bits - 1)) - 1
    assert zero is None and np.abs(codes).max() == (most if X.any() else 0)
    assert (np.abs(codes * scale - X) <= scale * 0.5001).all()  # nothing that calibration has seen saturates
    affine = static(rtn(W, group_size=-1), W, Stats(X), bits=bits, symmetric=False)
    codes, scale, zero = affine.steps(X)
    assert (np.abs((codes - zero) * scale - X) <= scale * 1.0001).all()
    assert affine.rounded(np.zeros((1, 5), np.float32)).tolist() == [[0] * 5]  # 0 is on the grid


def test_beyond_calibration_it_saturates():
    record, W, X = example()
    made = static(record, W, Stats(X))
    codes = made.steps(np.float32([[1e6, -1e6] * 12]))[0]
    assert codes.tolist() == [[127, -127] * 12]


def test_the_three_observers():
    record, W, X = example(tokens=3 * BATCH + 100)
    X[5, 3] = 50  # in the first batch only
    tops = [np.abs(X[i : i + BATCH]).max() for i in range(0, len(X), BATCH)]
    average = tops[0]
    for top in tops[1:]:
        average = 0.8 * average + (1 - 0.8) * top
    amax = lambda **knobs: static(record, W, Stats(X), **knobs).scale.item() * 127
    assert amax() == pytest.approx(50, rel=1e-6)
    assert amax(observer="average", momentum=0.8) == pytest.approx(average, rel=1e-6)
    assert amax(observer="average", momentum=0.0) == pytest.approx(tops[-1], rel=1e-6)
    ordered = np.sort(np.abs(X).ravel().astype(np.float64))
    at = 0.99 * (len(ordered) - 1)
    below, part = int(at), at - int(at)
    wanted = (1 - part) * ordered[below] + part * ordered[below + 1]
    assert amax(observer="percentile", percentile=99) == pytest.approx(wanted, rel=1e-6)
    assert amax(observer="percentile", percentile=100) == amax()


def test_a_percentile_is_better_where_one_value_is_far_out():
    record, W, X = example()
    X[7, 3] = 1000
    clean = np.delete(X, 7, axis=0)
    exact = clean @ record.dense().T
    error = lambda **knobs: np.square(matmul(clean, static(record, W, Stats(X), **knobs)) - exact).sum()
    assert error(observer="percentile", percentile=99.9) < error() / 100


def test_a_zero_point_is_better_where_inputs_lean_to_one_side():
    """After SiLU or GELU, say: nearly half of the symmetric codes are never used."""
    record, W, X = example()
    X = np.abs(X) - 0.2
    exact = X @ record.dense().T
    error = lambda **knobs: np.square(matmul(X, static(record, W, Stats(X), **knobs)) - exact).sum()
    assert error(symmetric=False, bits=4) < error(bits=4) / 2


def test_dynamic_rounding_is_finer_where_tokens_differ_in_size():
    record, W, X = example()
    X *= np.exp(np.random.default_rng(1).standard_normal((len(X), 1))).astype(np.float32)
    stats = Stats(X)
    fixed = report("w", W, static(record, W, stats), stats).output_error
    token = report("w", W, TokenInputs(record, "int8"), stats).output_error
    assert token < fixed


def test_the_report_counts_the_scale_and_the_rounded_inputs():
    record, W, X = example()
    stats = Stats(X)
    made = static(record, W, stats, bits=4, symmetric=False)
    assert made.nbytes == record.nbytes + 4 + 1
    exact = X @ W.T
    expected = np.square(exact - matmul(X, made)).sum() / np.square(exact).sum()
    assert report("w", W, made, stats).output_error == pytest.approx(expected, rel=1e-4)
    assert expected > 4 * report("w", W, record, stats).output_error


def test_layers_are_calibrated_behind_rounded_ones():
    model = random_model("llama", np.float32)
    small = compress(model, f"{W8}+static", IDS)
    by_hand = replace(model, weights=dict(model.weights))
    for layer, stats in walk(by_hand, IDS):
        for name in layer_linears(layer):
            W = model.weights[name]
            by_hand.weights[name] = static(rtn(W, bits=8, symmetric=True, group_size=-1), W, stats[name])
    for name in layer_linears(1):
        assert small.weights[name].scale == by_hand.weights[name].scale
    exact = forward(model, IDS)
    assert np.linalg.norm(forward(small, IDS) - exact) < 0.1 * np.linalg.norm(exact)


def test_turned_inputs_are_rounded_where_they_are_turned():
    """The scale is that of what the codes meet, and the report counts its rounding."""
    model, reports = random_model("llama", np.float32), {}
    recipe = "quarot+rtn:bits=8,symmetric=true,group=-1"
    for knobs in ("", "+static:bits=3"):
        small = compress(model, recipe + knobs, IDS, on_report=lambda r, k=knobs: reports.update({(k, r.name): r}))
    name = "model.layers.0.mlp.down_proj.weight"
    inner = small.weights[name].weight
    assert isinstance(inner, StaticInputs) and isinstance(inner.weight, IntWeight)
    assert reports["+static:bits=3", name].output_error > 10 * reports["", name].output_error


def test_a_stored_model_runs_as_before(tmp_path):
    small = compress(random_model("llama", np.float32), "rtn:bits=4,group=16+static:symmetric=false,bits=6", IDS)
    back = refllm.load(save_native(small, tmp_path / "m"))
    assert np.array_equal(forward(back, IDS), forward(small, IDS))


def test_packed_weights_of_a_file_keep_their_form():
    model = random_model("llama", np.float32)
    name = layer_linears(0)[0]
    blocks = GGUFBlocks(np.zeros((32, 34), np.uint8), "Q8_0", 32)
    packed = replace(compress(model, W8), weights=compress(model, W8).weights | {name: blocks})
    check(packed, "static", IDS)
    small = compress(packed, "static", IDS)
    assert small.weights[name].weight is blocks
    assert all(isinstance(small.weights[n], StaticInputs) for n in layer_linears(1))
    assert isinstance(small.weights[layer_linears(1)[0]].weight, IntWeight)


def test_dead_inputs_and_a_short_calibration():
    W = np.ones((2, 3), np.float32)
    dead = static(rtn(W, group_size=-1), W, Stats(np.zeros((1, 3), np.float32)), symmetric=False)
    assert dead.scale == np.float32(1 / 255) and np.isfinite(matmul(np.ones((1, 3), np.float32), dead)).all()
    for observer in ("max", "percentile", "average"):
        one = static(rtn(W, group_size=-1), W, Stats(np.float32([[1, -2, 0.5]])), observer=observer, percentile=100.0)
        assert one.scale == np.float32(2 / 127)
    small = compress(random_model("llama", np.float32), f"{W8}+static", IDS[:1])
    assert np.isfinite(forward(small, IDS)).all()


@pytest.mark.parametrize(
    ("recipe", "calibration", "message"),
    [
        ("static", IDS, "it follows a stage that packs, such as rtn"),
        (f"{W8}+static", None, "static needs calibration tokens"),
        (f"{W8}+static+static", IDS, "whose inputs are not rounded, got static_inputs"),
        (f"{W8}+static+rtn", IDS, "already packed as static_inputs"),
        (f"{W8}+static:bits=1", IDS, "bits of activations must be 2 to 8, got 1"),
        (f"{W8}+static:observer=mean", IDS, "observer must be one of max, percentile, average, got 'mean'"),
        (f"{W8}+static:percentile=50", IDS, "percentile must lie above 50"),
        (f"{W8}+static:momentum=1", IDS, r"momentum in \[0, 1\)"),
        (f"{W8},only=lm_head+static:only=lm_head", IDS, "static needs calibration inputs, which lm_head.weight"),
    ],
)
def test_bad_recipes(recipe, calibration, message):
    model = random_model("llama", np.float32)
    for call in (check, compress):
        with pytest.raises(ValueError, match=message) as caught:
            call(model, recipe, calibration)
        assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit_are_named():
    record, W, X = example()
    with pytest.raises(ValueError, match="calibration inputs have 23 columns, the weight has 24"):
        static(record, W, Stats(X[:, 1:]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        static(record, W, Stats(np.float32([[np.nan] * 24])))
