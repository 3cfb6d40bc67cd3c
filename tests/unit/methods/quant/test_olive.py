"""olive: the search by a slow twin, what it is good for, inputs, bytes, and a run through recipes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.grids import SymmetricGrid
from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import PairInputs
from refllm.kernels.packed.records import IntWeight, VectorWeight
from refllm.kernels.pairs import NORMALS, round_pairs
from refllm.kernels.stats import Stats
from refllm.methods.finish import static
from refllm.methods.quant import olive, omse, rtn
from refllm.methods.quant.olive import least_error_scale
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model
from tests.strategies import PROPERTY, mixed_weights

EVEN = st.integers(1, 10).map(lambda n: 2 * n)
IDS = np.random.default_rng(0).integers(0, 64, 60)


def loud(out=32, columns=256, seed=0, share=0.01):
    """Normal weights, of which a few are twenty times as large."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((out, columns), np.float32)
    W[rng.random(W.shape) < share] *= 20
    return W


def squared_error(W, record):
    return float(np.sum((record.dense().astype(np.float64) - W) ** 2))


def slow_search(row, normals, low, high):
    """(scale, error) of one row by trying all, with Python floats; pairs from the kernel, which has its own twin."""
    mean = math.fsum(map(float, row)) / len(row)
    std = math.sqrt(math.fsum((float(x) - mean) ** 2 for x in row) / (len(row) - 1))
    base = max(abs(mean + 3 * std), abs(mean - 3 * std)) or 1.0
    tried = []
    for i in range(low, high, 2):
        scale = np.float32(base * i / 100 / float(NORMALS[normals][-1]))
        back = round_pairs(row / scale, normals) * scale
        tried.append((math.fsum((float(a) - float(b)) ** 2 for a, b in zip(back, row, strict=True)), scale))
    return tried


@PROPERTY
@given(
    mixed_weights(columns=EVEN), st.sampled_from(("int", "flint")), st.sampled_from(((75, 150), (60, 61), (90, 250)))
)
def test_search_equals_the_loops(W, normals, ends):
    W = np.where(np.abs(W) < 1e-30, 0, W).astype(np.float32)
    scale, error = least_error_scale(W, normals, *ends, "float32")
    for row, s, e in zip(W, scale[:, 0], error[:, 0], strict=True):
        tried = slow_search(row, normals, *ends)
        # Their standard deviations may differ in the last bits, and so may scales, and errors by that times the row.
        allowed = 1e-5 * min(tried)[0] + 1e-6 * float(np.square(row.astype(np.float64)).sum()) + 1e-70
        assert abs(e - min(tried)[0]) <= allowed
        assert any(t[0] <= e + allowed and abs(t[1] - s) <= 1e-6 * s for t in tried)


@PROPERTY
@given(mixed_weights(columns=EVEN), st.sampled_from(("int", "flint", "best")), st.sampled_from(("float16", "float32")))
def test_codes_are_those_of_the_stored_scale(W, normals, dtype):
    record = olive(W, normals=normals, scale_dtype=dtype)
    assert type(record) is VectorWeight and record.scale.shape == (len(W), 1) and record.scale.dtype == dtype
    assert (record.scale > 0).all() and np.isfinite(record.dense()).all()
    form = "int" if 7 in record.codebooks else "flint"
    with np.errstate(over="ignore"):
        values = round_pairs(W / record.scale.astype(np.float32), form)
    assert np.array_equal(record.dense(), values * record.scale.astype(np.float32))
    assert np.array_equal(olive(np.asfortranarray(W), normals=normals, scale_dtype=dtype).codes, record.codes)


def test_bits_are_counted():
    record = olive(loud(48, 200))
    assert record.nbytes == 48 * 100 + 48 * 2 + 1024


def test_of_equal_errors_the_smallest_scale():
    """Every candidate rounds a row of one value to it, where 7 or 96 steps are that value; zeros stay zeros."""
    scale, error = least_error_scale(np.zeros((2, 4), np.float32), "int", 75, 250, "float32")
    assert error.tolist() == [[0.0], [0.0]] and scale[0, 0] == np.float32(0.75 / 7)


def test_a_standard_deviation_of_its_own_for_each_row():
    W = loud(4, 64)
    W[2] *= 1000
    together = olive(W, scale_dtype="float32")
    for row in range(4):
        assert np.array_equal(olive(W[row : row + 1], scale_dtype="float32").codes, together.codes[row : row + 1])


@pytest.mark.parametrize("seed", range(5))
def test_no_more_error_than_the_same_normals_with_the_same_search(seed):
    """Outliers pay for their victims: the codes contain those of 4-bit integers, which saturate instead."""
    W = loud(seed=seed)
    record = olive(W, scale_dtype="float32")
    ints = SymmetricGrid(4, -1, "float32")
    scales = [np.float32((np.abs(W.mean(1, keepdims=True)) + 3 * W.std(1, ddof=1, keepdims=True)) * i / 700)
              for i in range(75, 250, 2)]  # fmt: skip
    saturated = [np.square(ints.decode(ints.encode(W, s), s) - W).sum(axis=1) for s in scales]
    assert squared_error(W, record) < 0.5 * np.min(saturated, axis=0).sum()
    size = W.size // 2 + 2 * len(W)
    for other in (rtn(W, bits=4, symmetric=True, group_size=-1), omse(W, bits=4, symmetric=True, group_size=-1)):
        assert other.nbytes == size == record.nbytes - 1024 - 2 * len(W)
        assert squared_error(W, record) < 0.4 * squared_error(W, other)


def test_best_takes_the_normals_with_less_error():
    for W in (loud(), loud(share=0), loud(share=0.1)):
        errors = {form: squared_error(W, olive(W, normals=form)) for form in ("int", "flint", "best")}
        assert errors["best"] == min(errors.values())
    assert olive(loud(share=0)).codes.tobytes() == olive(loud(share=0), normals="best").codes.tobytes()


def slow_inputs(x, scale):
    """x^ of some tokens: each by itself, with the scale of all."""
    return np.array([round_pairs(token / scale) * scale for token in x])


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_inputs_are_coded_with_one_scale(backend, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    W, X = loud(16, 64), loud(200, 64, seed=1)
    record = olive(W, Stats(X), inputs=True)
    assert type(record) is PairInputs and np.array_equal(record.dense(), olive(W).dense())
    assert record.scale == least_error_scale(X.reshape(1, -1), "int", 75, 250, "float32")[0]
    assert record.nbytes == olive(W).nbytes + 4
    seen = slow_inputs(X[:9], record.scale[0, 0])
    assert np.array_equal(record.rounded(X[:9]), seen) and record.steps(X)[0].dtype == np.int8
    np.testing.assert_allclose(matmul(X[:9], record), seen @ record.dense().T, rtol=1e-4, atol=1e-3)
    bad = X[:3].copy()
    bad[1, 5] = np.nan
    y = matmul(bad, record)
    assert np.isnan(y[1]).all() and np.array_equal(y[[0, 2]], matmul(X[:3], record)[[0, 2]])


def test_pairs_of_inputs_meet_an_integer_weight_in_whole_numbers():
    """Steps reach 96 and fit int8: sums of products of codes are exact before the scales."""
    X, grid = loud(5, 33, seed=2), SymmetricGrid(8, -1, "float32")  # an odd width: the last column stands alone
    scale = np.ones((4, 1), np.float32)
    codes = np.random.default_rng(0).integers(1, 255, (4, 33)).astype(np.uint8)
    record = PairInputs(IntWeight.pack(grid, codes, scale, None), np.full((1, 1), 0.25, np.float32))
    steps = record.steps(X)[0].astype(np.int64)
    assert np.array_equal(matmul(X, record), (steps @ (codes.astype(np.int64) - 128).T).astype(np.float32) / 4)


def test_a_loud_channel_leaves_the_others_their_steps():
    """Where one scale of all must reach it, four bits round its neighbours to nothing."""
    W, X = loud(16, 512, share=0), loud(64, 512, seed=1, share=0)
    X[:, 100] *= 30
    exact = X.astype(np.float64) @ W.T
    error = lambda record: np.linalg.norm(matmul(X, record) - exact) / np.linalg.norm(exact)
    plain = rtn(W, bits=4, symmetric=True, group_size=-1)
    assert error(olive(W, Stats(X), inputs=True)) < 0.5 * error(static(plain, W, Stats(X), bits=4))


def test_a_stored_model(tmp_path):
    model = random_model("llama", np.float32)
    small = refllm.compress(model, "smoothquant+olive:inputs=true,normals=best", IDS)
    back = refllm.load(save_native(small, tmp_path / "m"))
    assert np.array_equal(forward(back, IDS), forward(small, IDS))
    assert {type(w) for n, w in back.weights.items() if "proj" in n} == {PairInputs}


@pytest.mark.parametrize(
    ("knobs", "stats", "message"),
    [
        ({"normals": "int8"}, None, "normals must be int, flint or best, got 'int8'"),
        ({"low": 0}, None, "from low >= 1 to a larger high, got 0 and 250"),
        ({"low": 90, "high": 90}, None, "got 90 and 90"),
        ({"scale_dtype": "int8"}, None, "scale_dtype must be one of float16, float32, got 'int8'"),
        ({"inputs": True}, None, "inputs=true needs calibration inputs"),
        ({"inputs": True}, Stats(np.ones((1, 255))), "have 255 columns, the weight has 256"),
    ],
)
def test_bad_knobs(knobs, stats, message):
    with pytest.raises(ValueError, match=message):
        olive(loud(), stats, **knobs)


def test_bad_weights():
    with pytest.raises(ValueError, match="2 neighbouring columns, and the weight has an odd number, 3"):
        olive(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"non-empty .* \(4,\)"):
        olive(np.ones(4))
    with pytest.raises(ValueError, match="too large for float16"):
        olive(np.full((1, 4), 1e9))
