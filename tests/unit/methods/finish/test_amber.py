"""amber: factors column by column, errors that fall with longer patterns, and a recipe for some of the layers."""

import numpy as np
import pytest

from refllm.kernels.packed import matmul
from refllm.kernels.packed.kept import PatternInputs
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.packed.sparse import Plain
from refllm.methods.apply import compress, load
from refllm.methods.finish import amber
from refllm.methods.finish.amber import column_factors
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model


def example(seed=0):
    rng = np.random.default_rng(seed)
    W = (rng.standard_normal((32, 64)) * np.exp(rng.normal(size=64))).astype(np.float32)
    return W, rng.standard_normal((200, 64), np.float32)


def test_factors_column_by_column():
    W, _ = example()
    flat = np.sort(W.astype(np.float64).reshape(-1))
    at = lambda q: np.interp(q / 100 * (flat.size - 1), np.arange(flat.size), flat)
    clipped = np.minimum(np.maximum(W.astype(np.float64), at(0.5)), at(99.5))
    mean = clipped.sum() / clipped.size
    deviation = np.sqrt(((clipped - mean) ** 2).sum() / clipped.size)
    norms = [np.sqrt(sum(((v - mean) / deviation) ** 2 for v in column)) for column in clipped.T]
    np.testing.assert_allclose(column_factors(W)[0], np.array(norms) / min(norms), rtol=1e-5)
    assert column_factors(W).min() == 1


def test_a_factor_for_the_whole_weight_changes_nothing():
    W, X = example()
    for factor in (4.0, 0.125):
        np.testing.assert_allclose(column_factors(factor * W), column_factors(W), rtol=1e-6)
    np.testing.assert_array_equal(amber(Plain(4 * W), 4 * W).kept(X), amber(Plain(W), W).kept(X))


def test_longer_patterns_and_the_factors_are_better():
    errors = {}
    for seed in range(5):
        W, X = example(seed)
        exact = X @ W.T
        for name, knobs in {
            "2:4": dict(n=2, m=4), "4:8": dict(n=4, m=8), "8:16": {}, "plain": dict(score="magnitude")
        }.items():  # fmt: skip
            error = np.linalg.norm(matmul(X, amber(Plain(W), W, **knobs)) - exact)
            errors[name] = errors.get(name, 0) + error
    assert errors["8:16"] <= errors["4:8"] <= errors["2:4"] and errors["8:16"] < errors["plain"]


def test_a_recipe_for_some_of_the_layers():
    model, ids = random_model("llama"), np.arange(20)
    small = compress(model, "rtn:bits=8,group=-1+amber:n=2,m=4,only=down_proj")
    kinds = {name: type(w) for name, w in small.weights.items() if ".layers." in name and "proj" in name}
    assert {kind for name, kind in kinds.items() if "down" in name} == {PatternInputs}
    assert {kind for name, kind in kinds.items() if "down" not in name} == {IntWeight}
    assert np.isfinite(forward(small, ids)).all()


def test_w8a8_in_patterns_behind_an_inverted_smoothquant(tmp_path):
    """The paper's recipe runs, is stored, and rounding costs little beside the pattern."""
    model, ids = random_model("llama"), np.arange(20)
    exact = forward(model, ids)
    recipe = "smoothquant:alpha=0.1,inverted=true+rtn:bits=8,symmetric=true,group=-1"
    errors = []
    for bits in (0, 8, 2):
        small = compress(model, f"{recipe}+amber:n=2,m=4,bits={bits},only=down_proj+dynamic", ids)
        back = load(save_native(small, tmp_path / str(bits)))
        np.testing.assert_array_equal(forward(back, ids), forward(small, ids))
        errors.append(np.linalg.norm(forward(small, ids) - exact))
    assert errors[1] < 1.1 * errors[0] and errors[2] > 1.1 * errors[1]


def test_zero_columns_and_refusals():
    W = np.zeros((3, 4), np.float32)
    W[:, 1] = [1, -1, 0]
    assert column_factors(W).tolist() == [[0, 1, 0, 0]] and not column_factors(np.zeros((3, 4))).any()
    with pytest.raises(ValueError, match="score must be amber or magnitude, got 'x'"):
        amber(Plain(W), W, n=2, m=4, score="x")
    with pytest.raises(ValueError, match="need a multiple of 16 columns, got 4"):
        amber(Plain(W), W)
    with pytest.raises(ValueError, match="the weight holds NaN or Inf"):
        amber(Plain(W), np.full((3, 4), np.nan))
