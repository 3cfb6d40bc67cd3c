"""llm_int8: codes by the published order of operations, what the decomposition buys, and a run through recipes."""

import numpy as np
import pytest
from hypothesis import given

import refllm
from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import OutlierInputs
from refllm.kernels.stats import Stats
from refllm.methods.apply import compress
from refllm.methods.quant import llm_int8
from refllm.model.llama import forward
from refllm.model.native import save_native
from refllm.model.planter import plant_outliers
from tests.models import random_model
from tests.strategies import PROPERTY, mixed_weights

IDS = np.random.default_rng(0).integers(0, 64, 60)


def example(out=48, columns=128, tokens=50, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, columns), np.float32), rng.standard_normal((tokens, columns), np.float32)


@PROPERTY
@given(mixed_weights())
def test_codes_equal_the_loops(W):
    record = llm_int8(W)
    for row, codes, scale in zip(W, record.weight.unpacked(), record.weight.scale[:, 0], strict=True):
        amax = max(abs(w) for w in row)
        with np.errstate(over="ignore"):
            factor = np.float32(127) * (np.float32(1) / amax) if amax else np.float32(0)
        if not np.isfinite(factor):  # amax is a subnormal number: its reciprocal is beyond float32
            factor = np.float32(0)
        assert [int(c) - 128 for c in codes] == [int(np.rint(w * factor)) for w in row]
        assert scale == (amax or np.float32(1)) / np.float32(127)


def slow_product(x, record, threshold):
    """Y by the definition, in float64: integer sums, two scales, and the outlier columns with decoded weights."""
    codes = record.weight.unpacked().astype(np.int64) - 128
    c = record.weight.scale.astype(np.float64) * 127
    outliers = (np.abs(x) >= threshold).any(axis=0)
    rest = np.where(np.abs(x) >= threshold, 0, x).astype(np.float32)
    a = np.abs(rest).max(axis=1, keepdims=True)
    q = np.rint(rest * (np.float32(127) * (np.float32(1) / a))).astype(np.int64)
    q[:, outliers] = 0
    decoded = codes[:, outliers] * c / 127
    return (q @ codes.T) * a.astype(np.float64) * c.T / 127**2 + x[:, outliers].astype(np.float64) @ decoded.T


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_products_equal_the_definition(backend, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    W, X = example()
    X[3, 17], X[:, 40] = 60, 8 * X[:, 40]
    record = llm_int8(W)
    np.testing.assert_allclose(matmul(X, record), slow_product(X, record, 6.0), rtol=1e-5, atol=3e-4)


def test_one_planted_channel():
    """The card's measurement: at least 4 times less error than without the decomposition, more if columns are kept."""
    W, X = example(256, 512, 64)
    X[:, 100] *= 60
    exact = X.astype(np.float64) @ W.T.astype(np.float64)
    error = lambda **knobs: np.linalg.norm(matmul(X, llm_int8(W, Stats(X), **knobs)) - exact)
    assert error(threshold=0.0) > 4 * error() > 7 * error(keep_columns=True)


def test_threshold_zero_has_no_outliers_and_a_tiny_one_nothing_else():
    W, X = example()
    plain, exact = llm_int8(W, threshold=0.0), llm_int8(W, threshold=1e-30)
    assert not plain.outliers(100 * X).any()
    np.testing.assert_allclose(matmul(X, exact), X @ exact.dense().T, rtol=1e-4, atol=1e-4)


def test_kept_columns_are_those_of_calibration():
    W, X = example()
    X[7, 5], X[9, 77] = -6, 6.5
    record = llm_int8(W, Stats(X), keep_columns=True)
    assert record.columns.tolist() == [5, 77] and np.array_equal(record.kept, W[:, [5, 77]].astype(np.float16))
    assert record.nbytes == llm_int8(W).nbytes + 48 * 2 * 2 + 2 * 4
    W[:, 5] = 1000  # no longer counts in the scale of its rows
    assert np.array_equal(llm_int8(W, Stats(X), keep_columns=True).weight.scale, record.weight.scale)
    assert llm_int8(W, Stats(0.1 * X), keep_columns=True).columns is None


def test_a_planted_model_is_better_with_the_decomposition(tmp_path):
    """The random model's inputs are near 1, and 3 stands where 6 does in large ones."""
    model = random_model("llama", np.float32)
    loud = plant_outliers(model, kinds=("norm",), factors=(64.0,))
    exact = forward(model, IDS)
    error = lambda recipe: np.linalg.norm(forward(compress(loud, recipe, IDS), IDS) - exact)
    assert error("llm_int8:threshold=3") < error("llm_int8") < error("llm_int8:threshold=0")
    assert error("llm_int8:keep_columns=true") < error("llm_int8:threshold=0") / 1.5
    small = compress(loud, "llm_int8:keep_columns=true", IDS)
    assert {type(w) for n, w in small.weights.items() if "proj" in n} == {OutlierInputs}
    back = refllm.load(save_native(small, tmp_path / "m"))
    assert np.array_equal(forward(back, IDS), forward(small, IDS))


@pytest.mark.parametrize(
    ("knobs", "stats", "message"),
    [
        ({"threshold": -1.0}, None, "threshold must be 0 or more, got -1"),
        ({"threshold": float("nan")}, None, "threshold must be 0 or more, got nan"),
        ({"keep_columns": True}, None, "keep_columns needs calibration inputs"),
        ({"keep_columns": True}, Stats(np.ones((1, 127))), "have 127 columns, the weight has 128"),
    ],
)
def test_bad_knobs(knobs, stats, message):
    with pytest.raises(ValueError, match=message):
        llm_int8(example()[0], stats, **knobs)
