"""teal: the sparsity it promises, its allocation, joint sparsity, and a recipe that is stored and runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.packed import matmul
from refllm.kernels.packed.kept import ThresholdInputs
from refllm.kernels.packed.sparse import Plain, SparseBitmask
from refllm.kernels.stats import Stats
from refllm.methods.apply import compress
from refllm.methods.finish import teal
from refllm.methods.finish.teal import allocate, joint_bytes, multiplications, threshold
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model
from tests.strategies import PROPERTY, inputs

IDS = np.random.default_rng(0).integers(0, 64, 60)


@PROPERTY
@given(inputs(6), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999]))
def test_at_least_the_share_of_calibration_becomes_zero(X, sparsity):
    record = teal(Plain(np.ones((2, 6), np.float32)), None, Stats(X), sparsity=sparsity)
    dropped = (record.rounded(X) == 0).sum()
    assert dropped >= sparsity * X.size - 1e-6
    smaller = np.abs(X) < record.threshold
    assert smaller.sum() < max(sparsity * X.size, 1)  # and no more than ties make necessary


def test_sparsity_0_is_dense():
    X = np.random.default_rng(0).standard_normal((9, 8), np.float32)
    W = np.random.default_rng(1).standard_normal((4, 8), np.float32)
    np.testing.assert_array_equal(matmul(X, teal(Plain(W), W, Stats(X), sparsity=0.0)), matmul(X, Plain(W)))
    assert threshold(X, 0.0) == 0


def test_allocation_is_greedy_and_reaches_its_target():
    sizes = {"q": 100, "k": 25, "up": 400}
    cost = {"q": 5.0, "k": 1.0, "up": 2.0}
    error = lambda s: sum(cost[name] * sizes[name] * x**2 for name, x in s.items())
    chosen = allocate(sizes, error, 0.4, step=0.01)
    mean = sum(sizes[n] * s for n, s in chosen.items()) / 525
    assert 0.4 <= mean < 0.4 + 0.01 * 400 / 525 + 1e-9
    assert error(chosen) < error(dict.fromkeys(sizes, mean))
    assert chosen["k"] > chosen["up"] > chosen["q"]
    with pytest.raises(ValueError, match="no projection can take more"):
        allocate({"q": 1}, lambda s: 0.0, 0.99, step=0.3)


def test_joint_sparsity_multiplies():
    """Independent masks: within 4 standard deviations of d_W d_x of all; bytes are kept weights and their bits."""
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal((64, 128), np.float32), rng.standard_normal((1, 128), np.float32)
    mask = rng.random(W.shape) < 0.5
    record = ThresholdInputs(SparseBitmask.compress(W, mask), np.full((1, 1), 0.6745, np.float32))
    kept = np.abs(x[0]) > np.float32(0.6745)
    pairs = (mask * kept).sum()
    assert multiplications(record, x) == pairs
    density = mask.mean() * kept.mean()
    assert abs(pairs / mask.size - density) < 4 * np.sqrt(density / mask.size)
    assert joint_bytes(record, x) == -(-(16 * pairs + 64 * kept.sum()) // 8)
    np.testing.assert_allclose(matmul(x, record), (x * kept) @ (W * mask).T, rtol=2e-3, atol=2e-2)  # float16 values
    dense = ThresholdInputs(Plain(W), record.threshold)
    assert multiplications(dense, x) == 64 * kept.sum() and joint_bytes(dense, x) == dense.bytes_read(x)
    all_inputs = ThresholdInputs(record.weight, np.zeros((1, 1), np.float32))
    assert multiplications(all_inputs, x) == mask.sum()


@pytest.mark.parametrize("recipe", ["rtn:bits=8,group=-1+teal:sparsity=0.3", "wanda:sparsity=0.5+teal:sparsity=0.3"])
def test_a_recipe_is_stored_and_runs(recipe, tmp_path):
    model = random_model("llama")
    small = compress(model, recipe, IDS)
    name = "model.layers.0.mlp.down_proj.weight"
    assert isinstance(small.weights[name], ThresholdInputs)
    save_native(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    np.testing.assert_array_equal(forward(again, IDS), forward(small, IDS))
    plain = compress(model, recipe.split("+")[0], IDS)
    assert small.weights[name].nbytes == plain.weights[name].nbytes + 4
    assert not np.allclose(forward(small, IDS), forward(plain, IDS))


def test_refusals():
    record, X = Plain(np.ones((2, 4), np.float32)), np.ones((3, 4))
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1"):
        teal(record, None, Stats(X), sparsity=1.0)
    with pytest.raises(ValueError, match="calibration inputs have 3 columns, the weight has 4"):
        teal(record, None, Stats(X[:, :3]))
