"""awq: its searches against their definitions, the identities of the scale, folding, storing."""

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.formats.errors import FormatError
from refllm.kernels.grids import MinMaxGrid
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.stats import Stats
from refllm.methods.apply import compress
from refllm.methods.blockwise import awq
from refllm.methods.blockwise.awq import best_scale, grid_for, linear_change, pack, scale_at, search_layer
from refllm.model.convert import save
from refllm.model.llama import forward
from refllm.model.walk import layer_linears, walk, windows
from tests.models import random_model
from tests.strategies import PROPERTY

module = sys.modules["refllm.methods.blockwise.awq"]
IDS = np.random.default_rng(3).integers(0, 64, 96)
MEANS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8).map(np.array)


def grids(bits=3, group=8, scale_dtype="float16"):
    return partial(grid_for, bits=bits, group_size=group, scale_dtype=scale_dtype)


def example(seed, out=6, columns=16, tokens=40):
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(tokens, columns)) * np.exp(2 * rng.normal(size=columns))).astype(np.float32)
    return rng.normal(size=(out, columns)).astype(np.float32), X


def codes(model, name):
    return model.weights[name].unpacked()


# --- the scale -------------------------------------------------------------------------------------------------------


@given(MEANS, st.sampled_from(module.RATIOS))
def test_the_largest_and_the_smallest_scale_are_reciprocal(means, ratio):
    s = scale_at(ratio, means)
    assert np.sqrt(s.max() * s.min()) == pytest.approx(1, rel=1e-12)
    assert (
        np.array_equal(np.argsort(s, kind="stable"), np.argsort(s[np.argsort(means, kind="stable")].argsort()))
        or (np.diff(s[np.argsort(means)]) >= 0).all()
    )


def test_ratio_zero_is_one_exactly_and_one_is_never_tried():
    assert scale_at(0.0, np.array([0.0, 3.7, 1e-9])).tolist() == [1.0, 1.0, 1.0]  # 0^0 = 1: a dead input does no harm
    assert len(module.RATIOS) == 20 and module.RATIOS[0] == 0 and max(module.RATIOS) == 0.95


@PROPERTY
@given(MEANS, st.sampled_from(module.RATIOS), st.floats(0.1, 10))
def test_a_common_factor_of_the_inputs_cancels(means, ratio, factor):
    assert np.allclose(scale_at(ratio, factor * means), scale_at(ratio, means), rtol=1e-9)


def test_scales_by_hand():
    """a = (1, 16), r = 1/2: (1, 4) / 2. AutoAWQ's form with w = (1, 1/4): (1, 4 / (1/2)) / sqrt 8."""
    assert scale_at(0.5, np.array([1.0, 16.0])).tolist() == [0.5, 2.0]
    duo = scale_at(0.5, np.array([1.0, 16.0]), np.array([1.0, 0.25]))
    assert duo == pytest.approx([8**-0.5, 8**0.5], rel=2e-4)
    assert scale_at(0.5, np.array([0.0, 1.0])).tolist() == [0.01, 100.0]  # a dead input: 1e-4, not 0


def test_the_mean_is_used_and_not_the_maximum():
    """Two inputs of one mean, one of them by a single large token: their scales are equal."""
    X = np.array([[4.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
    W = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    s, _ = best_scale({"w": W}, Stats(X), linear_change(W, Stats(X)), grids(group=-1))
    assert s.tolist() == [1.0, 1.0]


@PROPERTY
@given(st.integers(0, 10**6), st.booleans())
def test_the_search_equals_the_loops(seed, duo):
    """Every ratio tried one after another, outputs computed token by token in float64."""
    W, X = example(seed)
    stats, grid = Stats(X), MinMaxGrid(3, 8)
    found, errors = best_scale({"w": W}, stats, linear_change(W, stats), grids(), duo)
    a = np.abs(X).astype(np.float64).mean(axis=0)
    amax = np.abs(W).reshape(6, 2, 8).max(axis=-1).repeat(8, axis=1).astype(np.float64)
    w = (np.abs(W) / (amax + 1e-6)).mean(axis=0)
    best, least = None, np.inf
    for i in range(20):
        r = i / 20
        s = np.maximum(a**r / (w ** (1 - r) + 1e-4), 1e-4) if duo else np.maximum(a**r, 1e-4)
        s /= np.sqrt(s.max() * s.min())
        scaled = (W * s).astype(np.float32)
        fit = grid.fit(scaled)
        rounded = (grid.decode(grid.encode(scaled, *fit), *fit) / s).astype(np.float32)
        error = np.mean((X.astype(np.float64) @ (rounded - W.astype(np.float64)).T) ** 2)
        assert errors[i] == pytest.approx(error, rel=1e-6, abs=1e-12)
        if error < least * (1 - 1e-9):
            best, least = s, error
    assert np.allclose(found, best, rtol=1e-9)


@PROPERTY
@given(st.integers(0, 10**6))
def test_the_best_is_no_worse_than_rounding_to_nearest(seed):
    W, X = example(seed)
    _, errors = best_scale({"w": W}, Stats(X), linear_change(W, Stats(X)), grids())
    rtn = pack(W, MinMaxGrid(3, 8)).dense()
    assert errors[0] == pytest.approx(np.mean((X.astype(np.float64) @ (rtn - W).T) ** 2), rel=1e-4)
    assert min(errors) <= errors[0]


def test_few_and_many_tokens_give_the_same_error():
    """Fewer rows than columns go through X, more through X^T X."""
    W, X = example(2, tokens=15)
    change = [linear_change(W, Stats(x))({"w": W + np.float32(0.25)}) for x in (X, np.concatenate([X, X]))]
    assert change[0] == pytest.approx(change[1], rel=1e-6)


# --- the model -------------------------------------------------------------------------------------------------------


def test_without_searches_it_is_rounding_on_the_min_max_grid():
    model = random_model("llama")
    plain = awq(model, IDS, bits=3, group_size=8, auto_scale=False, auto_clip=False)
    for layer in range(2):
        for name in layer_linears(layer):
            grid, W = MinMaxGrid(3, 8), model.weights[name]
            fit = grid.fit(W)
            assert np.array_equal(codes(plain, name), grid.encode(W, *fit))
            assert np.array_equal(plain.weights[name].scale, fit[0])
    unchanged = [n for n in model.weights if "proj" not in n]
    assert all(plain.weights[n] is model.weights[n] for n in unchanged)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_scaling_alone_leaves_the_function(architecture, monkeypatch):
    """With weights kept as floats, what is folded cancels: biases, norm offsets and post-norms included."""
    monkeypatch.setattr(module, "pack", lambda W, grid, X=None: W)
    model = random_model(architecture, np.float64)
    scaled = awq(model, IDS, group_size=8)
    a, b = forward(scaled, IDS), forward(model, IDS)
    assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()
    moved = [n for n in model.weights if scaled.weights[n] is not model.weights[n]]
    assert "model.layers.0.input_layernorm.weight" in moved and "model.layers.1.mlp.up_proj.weight" in moved


@pytest.mark.parametrize("heads", [2, 4])
def test_grouped_queries_leave_values_alone(heads):
    """v -> o is a pair only where both weights have one shape."""
    model = random_model("llama", num_kv_heads=heads)
    _, stats = next(walk(model, IDS))
    found = search_layer(model, 0, stats, lambda X: X[None], grids())
    names = [pair.readers[0].split(".")[-2] for pair, _ in found]
    assert names == (
        ["q_proj", "o_proj", "gate_proj", "down_proj"] if heads == 4 else ["q_proj", "gate_proj", "down_proj"]
    )


def test_readers_of_one_norm_share_a_scale_judged_behind_the_attention():
    """The error is that of the attention branch with q, k and v rounded, windows apart, as written out here."""
    model = random_model("llama")
    tokens = windows(IDS, 48)
    _, stats = next(walk(model, IDS, 48))
    prefix, grid = "model.layers.0.self_attn.", MinMaxGrid(3, 8)
    names = [f"{prefix}{n}_proj.weight" for n in "qkv"]
    X, errors = stats[names[0]].X.reshape(2, 48, -1), []
    branch = lambda m, x: module.attention_branch(m, 0, x[None], np.arange(48))[0].astype(np.float64)
    expected = [branch(model, x) for x in X]
    for ratio in module.RATIOS:
        s = scale_at(ratio, stats[names[0]].mean_abs)
        weights = dict(model.weights)
        for name in names:
            scaled = (weights[name] * s).astype(np.float32)
            fit = grid.fit(scaled)
            weights[name] = (grid.decode(grid.encode(scaled, *fit), *fit) / s).astype(np.float32)
        changed = replace(model, weights=weights)
        errors.append(
            np.mean([(branch(changed, x) - y) ** 2 for x, y in zip(X.reshape(2, 48, -1), expected, strict=True)])
        )
    pair, s = search_layer(model, 0, stats, lambda X: X.reshape(len(tokens), 48, -1), grids())[0]
    assert pair.readers == tuple(names)
    assert np.allclose(s, scale_at(module.RATIOS[int(np.argmin(errors))], stats[names[0]].mean_abs))


def test_later_layers_see_the_uncompressed_ones():
    """The second layer comes out the same whatever was done to the first."""
    model = random_model("llama")
    coarse, fine = (awq(model, IDS, bits=b, group_size=8) for b in (2, 8))
    _, (_, stats) = walk(model, IDS)
    for packed, bits in ((coarse, 2), (fine, 8)):
        for pair, s in search_layer(model, 1, stats, lambda X: X[None], grids(bits)):
            gain = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}.get(
                pair.readers[0].split(".")[-2]
            )
            if gain:
                name = f"model.layers.1.{gain}.weight"
                assert np.array_equal(packed.weights[name], (model.weights[name] / s).astype(np.float32))


def test_queries_and_keys_are_not_clipped():
    model = random_model("llama")
    with_clip, without = (awq(model, IDS, bits=2, group_size=8, auto_clip=c) for c in (True, False))
    for name in layer_linears(0):
        same = np.array_equal(codes(with_clip, name), codes(without, name))
        assert same == name.endswith(("q_proj.weight", "k_proj.weight"))


def test_outputs_are_compared_on_whole_windows(monkeypatch):
    seen = []
    real = module.mlp_branch
    monkeypatch.setattr(module, "mlp_branch", lambda m, layer, x: seen.append(x.shape) or real(m, layer, x))
    monkeypatch.setattr(module, "WINDOW", 16)
    awq(random_model("llama", num_layers=1), IDS, group_size=8, search_tokens=32)
    assert set(seen) == {(1, 16, 32)} and len(seen) == 21 * 2  # 96 tokens are 6 windows, every third one


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(group_size=0), "positive or -1"),
        (dict(group_size=20), "group_size 20 does not divide the 32 columns"),
        (dict(bits=9), "bits must be 2 to 8, got 9"),
        (dict(search_tokens=0), "at least 1, got 0"),
    ],
)
def test_knobs_that_make_no_sense(knobs, message):
    with pytest.raises(ValueError, match=message):
        awq(random_model("llama"), IDS, **knobs)


def test_groups_follow_the_width():
    sizes = {
        columns: grid_for(np.zeros((1, columns)), 4, None, "float16").group_size for columns in (4096, 576, 384, 48, 8)
    }
    assert sizes == {4096: 128, 576: 64, 384: 128, 48: 16, 8: 8}
    with pytest.raises(ValueError, match="100 columns have no group"):
        grid_for(np.zeros((1, 100)), 4, None, "float16")
    assert grid_for(np.zeros((1, 100)), 4, -1, "float16").group_size == -1


def test_packed_models_are_refused():
    with pytest.raises(ValueError, match="is packed"):
        awq(compress(random_model("llama"), "rtn:group=8"), IDS)


# --- with other stages, and stored -----------------------------------------------------------------------------------


def test_it_composes_and_bytes_are_those_stored():
    small = compress(
        random_model("llama"), "awq:bits=4,group=8+rtn:bits=8,group=32,only=embed_tokens+kivi:group=8,residual=8", IDS
    )
    record = small.weights["model.layers.0.mlp.down_proj.weight"]
    assert type(record) is IntWeight
    assert record.nbytes == 32 * 48 // 2 + 32 * 6 * 2 + 32 * 6 // 2
    assert type(small.weights["model.embed_tokens.weight"]) is IntWeight
    assert np.isfinite(forward(small, IDS[:20])).all()


def test_an_awq_folder_brings_the_codes_back(tmp_path):
    model = refllm.load("tiny")
    ids = np.asarray(model.tokenizer.encode("Once upon a time there was a small dog. " * 20))[:128]
    small = compress(model, "awq:bits=4,group=128", ids)
    save(small, tmp_path / "awq", "awq")
    back = refllm.load(tmp_path / "awq")
    for name in layer_linears(3):
        assert np.array_equal(codes(back, name), codes(small, name))
        assert np.array_equal(back.weights[name].dense(), small.weights[name].dense())
    assert np.allclose(forward(back, ids[:32]), forward(small, ids[:32]), atol=1e-5)
    with pytest.raises((ValueError, FormatError), match="3 bits; 4 can be stored"):
        save(compress(model, "awq:bits=3,group=128,auto_scale=no", ids), tmp_path / "three", "awq")
