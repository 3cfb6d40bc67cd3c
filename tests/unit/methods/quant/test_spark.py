"""spark: numbers and scales by a slow twin, bits counted, inputs, and a run through recipes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.formats.spark import ROUNDED
from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import TokenInputs
from refllm.kernels.packed.records import Plain, SparkWeight
from refllm.methods.quant import rtn, spark
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model
from tests.strategies import PROPERTY, mixed_weights

IDS = np.random.default_rng(0).integers(0, 64, 60)


def slow_row(row, scale):
    """Decoded weights of a row with one scale, number by number."""
    out = []
    for w in row:
        with np.errstate(over="ignore"):
            v = int(min(np.rint(abs(w) / np.float32(scale)), 255))
        out.append(np.float32(ROUNDED[v]) * np.float32(scale) * np.float32(-1 if w < 0 else 1))
    return out


@PROPERTY
@given(mixed_weights(columns=st.integers(1, 6).map(lambda n: 3 * n)), st.sampled_from((-1, 0, 3)))
def test_equals_the_loops(W, group_size):
    record = spark(W, group_size=group_size, scale_dtype="float32")
    groups = {-1: W[:, None], 0: W.reshape(1, 1, -1), 3: W.reshape(len(W), -1, 3)}[group_size]
    assert type(record) is SparkWeight and record.scale.shape == groups.shape[:2]
    dense = record.dense().reshape(groups.shape)
    for some, scales, back in zip(groups, record.scale, dense, strict=True):
        for row, scale, values in zip(some, scales, back, strict=True):
            amax = np.abs(row).max()
            if amax > 1e-30:
                assert scale == amax / np.float32(255)
            assert values.tolist() == slow_row(row, scale)
            # Half a step, and sixteen where a number lies in the wrong half.
            assert (np.abs(values.astype(np.float64) - row) <= 16.501 * scale).all()
            small = np.abs(row) <= 15 * scale
            assert (np.abs(values.astype(np.float64) - row)[small] <= 0.5001 * scale).all()


@PROPERTY
@given(mixed_weights(columns=st.integers(1, 20)), st.sampled_from(("float16", "float32")))
def test_rows_bytes_and_order(W, dtype):
    record = spark(W, scale_dtype=dtype)
    dense = record.dense()
    ids = np.array([0, len(W) - 1, 0])
    assert np.array_equal(record.rows(ids), dense[ids]) and np.array_equal(record.rows(slice(1, None)), dense[1:])
    assert np.array_equal(spark(W[::-1], scale_dtype=dtype).dense(), dense[::-1])
    assert not np.signbit(dense[dense == 0]).any()
    short = (record.magnitudes() <= 7).sum(axis=1)
    assert record.row_bytes.tolist() == [-(-(2 * W.shape[1] - k) // 2) for k in short]
    assert record.nbytes == record.stream.size + len(W) * (-(-W.shape[1] // 8) + record.row_bytes.itemsize) + (
        record.scale.nbytes
    )


def test_bits_follow_the_share_of_small_numbers():
    """1 + 8 - 4 P(v <= 7): normal rows cost more than 8 bits, rows with a large weight fewer."""
    W = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    bits = lambda record: 8 * record.nbytes / W.size
    assert bits(spark(W)) > bits(rtn(W, bits=8, symmetric=True, group_size=-1))
    W[:, 0] = 40
    few = spark(W)
    p = (few.magnitudes() <= 7).mean()
    assert 0.7 < p and bits(few) == pytest.approx(9 - 4 * p + 16 / 1024 + 16 / 1024 + 8 / 1024 / 4, abs=5e-3)
    assert bits(few) < 6.3
    # What four bits code has steps half as wide as those of eight bits and a sign.
    eight, small = rtn(W, bits=8, symmetric=True, group_size=-1), few.magnitudes() <= 7
    error = lambda record: np.square(record.dense() - W)[small].mean()
    assert error(few) < 0.3 * error(eight)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_inputs_are_coded_token_by_token(backend, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((16, 64), np.float32), rng.standard_normal((9, 64), np.float32)
    X[2], X[5, 7] = 0, 80
    record = spark(W, inputs=True)
    assert type(record) is TokenInputs and record.form == "spark"
    seen = np.array([slow_row(x, np.abs(x).max() / np.float32(255) or np.float32(1)) for x in X])
    assert np.array_equal(record.rounded(X), seen)
    np.testing.assert_allclose(matmul(X, record), seen @ record.dense().T, rtol=1e-4, atol=1e-4)
    X[3, 3] = np.inf
    y = matmul(X, record)
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, axis=0)).all()
    tiny = np.full((1, 4), 1e-45, np.float32)
    assert np.isfinite(TokenInputs(Plain(np.ones((1, 4), np.float32)), "spark").rounded(tiny)).all()


def test_a_model_in_codes_of_two_lengths(tmp_path):
    model = random_model("llama", np.float32)
    exact = forward(model, IDS)
    error = lambda recipe: np.linalg.norm(forward(refllm.compress(model, recipe, IDS), IDS) - exact)
    assert error("spark") < error("rtn:bits=4,symmetric=true,group=-1")
    small = refllm.compress(model, "smoothquant+spark:inputs=true,group=0", IDS)
    back = refllm.load(save_native(small, tmp_path / "m"))
    assert np.array_equal(forward(back, IDS), forward(small, IDS))
    assert {type(w.weight) for n, w in back.weights.items() if "proj" in n} == {SparkWeight}
    assert all(w.weight.scale.shape == (1, 1) for n, w in back.weights.items() if "proj" in n)


def test_a_stage_may_follow_one_that_prunes():
    """The values of a sparse record are coded in turn."""
    small = refllm.compress(random_model("llama", np.float32), "magnitude:pattern=2:4+spark")
    assert {type(w.values) for n, w in small.weights.items() if "proj" in n} == {SparkWeight}


@pytest.mark.parametrize(
    ("W", "knobs", "message"),
    [
        (np.ones((2, 4)), {"group_size": 3}, "group_size 3 does not divide the 4 columns"),
        (np.ones((2, 4)), {"scale_dtype": "int8"}, "scale_dtype must be one of float16, float32, got 'int8'"),
        (np.full((2, 4), 1e9), {}, "does not fit float16"),
        (np.ones(4), {}, r"non-empty \[out, in\] matrix, got shape \(4,\)"),
    ],
)
def test_bad_input(W, knobs, message):
    with pytest.raises(ValueError, match=message):
        spark(W, **knobs)
