"""matmul and rows: every record against its dense matrix, the NumPy text as the definition, and what is refused."""

import numpy as np
import pytest

from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.masks import keep_n_of_m
from refllm.kernels.packed import backend, matmul, reference, rows
from refllm.kernels.packed.activations import dequantize_activations, quantize_activations
from refllm.kernels.packed.records import LowRank, Rotated, Sparse24, Sum
from tests.strategies import activation_row, gamma, weight_row
from tests.unit.kernels.packed.test_records import coded, int_weight, one_of_each

W = np.stack([weight_row("normal", 32, seed) for seed in range(6)])
X = np.stack([activation_row(kind, 32, 7) for kind in ("normal", "alternating", "one hot", "zero")])


@pytest.fixture(params=["numba", "numpy"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", request.param)
    return request.param


MANY_TOKENS = ("int asym", "gguf", "codes with nested scales", "sparse24", "bitmask", "lowrank", "sum")


@pytest.mark.parametrize(
    ("name", "tokens"), [(n, t) for n in one_of_each() for t in (1, 3, 40)[: 2 + (n in MANY_TOKENS)]]
)
def test_product_equals_the_dense_matrix(kernels, name, tokens):
    weight = one_of_each()[name]
    x = np.resize(X, (tokens, 32))
    exact = x.astype(np.float64) @ weight.dense().astype(np.float64).T
    y = matmul(x, weight)
    assert y.dtype == np.float32
    size = np.abs(x) @ np.abs(weight.dense()).T.astype(np.float64)
    if isinstance(weight, LowRank):  # two products, each with its own rounding
        A, B = (factor if isinstance(factor, np.ndarray) else factor.dense() for factor in (weight.A, weight.B))
        size = np.abs(x) @ np.abs(B).T.astype(np.float64) @ np.abs(A).T
    assert (np.abs(y - exact) <= gamma(80) * size).all()


@pytest.mark.parametrize("name", one_of_each())
def test_int8_activations_equal_rounded_activations(kernels, name):
    weight = one_of_each()[name]
    if isinstance(weight, (LowRank, Sum)):
        pytest.skip("activations are rounded for each part: test_lowrank_is_two_products, test_sum_is_both_products")
    if isinstance(weight, Rotated):
        pytest.skip("activations are rounded when they are turned: test_rotated.py")
    y = matmul(X, weight, "int8")
    codes, scale = quantize_activations(X, 32 if name == "gguf" else 0)
    x = dequantize_activations(codes, scale) if coded(name) else X
    exact = x.astype(np.float64) @ weight.dense().astype(np.float64).T
    assert (np.abs(y - exact) <= gamma(80) * (np.abs(x) @ np.abs(weight.dense()).T)).all()


def test_lowrank_is_two_products(kernels):
    A, B = int_weight(W[:, :8], SymmetricGrid(8, -1)), int_weight(W[:4].repeat(2, 0), SymmetricGrid(8, -1))
    weight = LowRank(A, B)
    assert np.array_equal(matmul(X, weight, "int8"), matmul(matmul(X, B, "int8"), A, "int8"))


def test_sum_is_both_products(kernels):
    weight = one_of_each()["sum of int and lowrank"]
    assert np.array_equal(matmul(X, weight, "int8"), matmul(X, weight.first, "int8") + matmul(X, weight.second, "int8"))


def test_float64_stays_float64_throughout(kernels):
    for weight in (W.astype(np.float64), *one_of_each().values()):
        dense = weight if isinstance(weight, np.ndarray) else weight.dense().astype(np.float64)
        y = matmul(X.astype(np.float64), weight)
        assert y.dtype == np.float64
        if not isinstance(weight, (LowRank, Sum, Rotated)):  # their matrix is a product, rounded to float32
            assert np.allclose(y, X.astype(np.float64) @ dense.T, rtol=1e-13, atol=1e-9)


def test_leading_axes_and_empty_batches(kernels):
    weight = one_of_each()["int asym"]
    x = np.resize(X, (2, 3, 32))
    assert matmul(x, weight).shape == (2, 3, 6)
    assert np.allclose(matmul(x, weight)[1, 2], matmul(x[1, 2], weight), rtol=1e-5)
    assert matmul(x[0, 0], weight).shape == (6,)
    assert matmul(x[:0], weight).shape == (0, 3, 6)
    assert matmul(x[:0], weight, "int8").shape == (0, 3, 6)


def test_not_a_number_comes_out_as_such_and_stays_in_its_token(kernels):
    x = X.copy()
    x[1, 3], x[2, 4] = np.nan, np.inf
    for activations in ("float32", "int8"):
        with np.errstate(invalid="ignore"):
            y = matmul(x, one_of_each()["int sym"], activations)
        assert np.isnan(y[1]).all() and not np.isfinite(y[2]).any()
        assert np.isfinite(y[[0, 3]]).all()


def test_sparse_zeros_times_anything_finite_is_zero(kernels):
    weight = Sparse24.compress(np.zeros((3, 8), np.float32), keep_n_of_m(np.ones((3, 8)), 2, 4))
    assert (matmul(np.full((1, 8), 1e30, np.float32), weight) == 0).all()


def test_rows_decodes_only_what_is_asked():
    for weight in one_of_each().values():
        ids = np.array([[1, 5], [0, 1]])
        assert np.array_equal(rows(weight, ids), weight.dense()[ids])
        assert rows(weight, np.array([], int)).shape == (0, 32)
    assert rows(W.astype(np.float64), [2]).dtype == np.float64


def test_quantize_activations_by_hand():
    x = np.array([[254.0, -1.0, 3.0, 1.0], [0, 0, 0, 0], [1e-45, 0, 0, 0]], np.float32)
    codes, scale = quantize_activations(x)
    assert scale.ravel().tolist() == [2, 0, 0]
    assert codes.tolist() == [[127, 0, 2, 0], [0] * 4, [0] * 4]  # -0.5, 1.5 and 0.5 are ties, to even
    assert quantize_activations(x, 2)[1].tolist()[0] == [2, np.float32(3 / 127)]
    assert np.array_equal(dequantize_activations(codes, scale)[0], [254, 0, 4, 0])
    codes, scale = quantize_activations(np.array([[14, -3.0, 1, 13]], np.float32), bits=4)
    assert scale.tolist() == [[2]] and codes.tolist() == [[7, -2, 0, 6]]  # -1.5, 0.5 and 6.5, to even


def test_group_sums_are_the_integers():
    weight = int_weight(W, AffineGrid(4, 8))
    codes, _ = quantize_activations(X)
    sums, scale = reference.group_sums(codes, weight, slice(None))
    steps = weight.unpacked().astype(int) - np.repeat(weight.scales()[1], 8, axis=1)
    assert np.array_equal(sums, np.einsum("tgc,rgc->trg", codes.reshape(4, 4, 8).astype(int), steps.reshape(6, 4, 8)))
    assert sums.dtype == np.int64 and scale.shape == (6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matmul(X[:, :8], W), r"\(4, 8\) do not fit a weight with 32 columns"),
        (lambda: matmul(X, W, "int2"), "float32, int8, int4"),
        (lambda: matmul(X.astype(np.float16), one_of_each()["gguf"]), "float32 or float64"),
        (lambda: matmul(np.float32(1), W), "do not fit"),
        (lambda: rows(W, [6]), r"\[0, 6\)"),
        (lambda: rows(W, [-1]), r"\[0, 6\)"),
        (lambda: rows(W, [0.5]), "integers"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_backend_is_read_at_each_call(monkeypatch):
    monkeypatch.delenv("REFLLM_KERNELS", raising=False)
    assert backend() == "numba"
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    assert backend() == "numpy"
    monkeypatch.setenv("REFLLM_KERNELS", "cuda")
    with pytest.raises(ValueError, match="numba, numpy"):
        matmul(X, one_of_each()["int sym"])
