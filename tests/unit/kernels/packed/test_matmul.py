"""matmul and rows: every record against its dense matrix, the NumPy text as the definition, and what is refused."""

import gc
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.bits import pack_bits
from refllm.kernels import packed
from refllm.kernels.grids import SymmetricGrid
from refllm.kernels.masks import keep_n_of_m
from refllm.kernels.packed import ACTIVATIONS, backend, matmul, matmul_each, reference, rows, threads
from refllm.kernels.packed.activations import dequantize_activations, quantize_activations
from refllm.kernels.packed.records import IntWeight, LowRank, Rotated, Sparse24, Sum
from tests.strategies import PROPERTY, activation_row, gamma, weight_row
from tests.unit.kernels.packed.test_records import coded, int_weight, one_of_each, same_rows

W = np.stack([weight_row("normal", 32, seed) for seed in range(6)])
EACH = {**one_of_each(), "dense": W}
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


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 4])
@given(names=st.lists(st.sampled_from(list(EACH)), max_size=6), count=st.integers(1, 3))
@PROPERTY
def test_several_weights_at_once_equal_one_after_another(activations, tokens, names, count):
    x, weights = np.resize(X, (tokens, 32)), [EACH[name] for name in names]
    with pytest.MonkeyPatch.context() as patch:  # enough threads that slices begin in the middle of weights
        patch.setattr(threads, "MINIMUM_WORK", 256)
        patch.setenv("REFLLM_THREADS", str(count))
        together = matmul_each(x, weights, activations)
        alone = [matmul(x, weight, activations) for weight in weights]
    assert len(together) == len(alone)
    for y, expected in zip(together, alone, strict=True):
        assert y.dtype == expected.dtype and np.array_equal(y, expected)


def test_several_weights_at_once_with_the_text_and_leading_axes(kernels):
    weights = [EACH[name] for name in ("gguf", "int asym", "gguf")]
    for x in (X, X[0], X.reshape(2, 2, 32), X[:0], X.astype(np.float64)):
        for y, weight in zip(matmul_each(x, weights, "int8"), weights, strict=True):
            assert np.array_equal(y, matmul(x, weight, "int8"))
    with pytest.raises(ValueError, match="weight with 32 columns"):
        matmul_each(X[:, :16], weights)
    with pytest.raises(ValueError, match="activations must be one of"):
        matmul_each(X, weights, "int7")


def test_inputs_that_may_not_be_written_to():
    x = X.copy()
    x.flags.writeable = False
    for tokens in (1, len(x)):
        assert np.array_equal(matmul(x[:tokens], EACH["gguf"], "int8"), matmul(X[:tokens], EACH["gguf"], "int8"))


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_known_of_weights_together_goes_with_any_of_them(which):
    weights = [one_of_each()["gguf"] for _ in range(2)]
    matmul_each(X, weights, "int8")
    first = id(weights[0])
    assert packed._plans[first].key == ("int8", *map(id, weights))
    del weights[which]
    gc.collect()
    assert first not in packed._plans


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
        same_rows(weight, rows(weight, ids), weight.dense()[ids])
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


@pytest.mark.parametrize("name", [name for name in one_of_each() if one_of_each()[name].whole(slice(0, 1))])
def test_whole_numbers_make_up_the_weight(name):
    weight = one_of_each()[name]
    numbers, scale, low, run = weight.whole(slice(1, 6))
    wide = lambda a: np.repeat(a, 32 // a.shape[1], axis=1)
    assert np.array_equal(numbers, np.rint(numbers)) and numbers.shape == (5, 32)
    assert np.array_equal(wide(scale) * numbers + (0 if low is None else wide(low)), weight.dense()[1:])
    assert all(a is None or a.dtype == np.float32 for a in (numbers, scale, low))
    assert weight.whole(slice(0, 0)).numbers.shape == (0, 32)
    assert abs(numbers).max() * 127 * run < 1 << 24  # sums of products are exact in float32


def test_a_rounded_product_by_hand():
    """Groups of 576 columns: runs of 512 and 64, each rounded on its way into the total, which meets the scale of x."""
    codes = np.arange(1152, dtype=np.uint8)[None] % 16
    weight = IntWeight(pack_bits(codes, 4), np.float32([[0.1, 0.3]]), None, 4, 576, 1152)
    x = np.float32(np.random.default_rng(0).standard_normal((1, 1152)))
    x_codes, (step,) = quantize_activations(x)[0][0].astype(int), quantize_activations(x)[1][0]
    total = Fraction(0)
    for scale, start, stop in ((0.1, 0, 512), (0.1, 512, 576), (0.3, 576, 1088), (0.3, 1088, 1152)):
        part = int((x_codes[start:stop] * (codes[0, start:stop].astype(int) - 8)).sum())
        total = nearest_float32(part * Fraction(float(np.float32(scale))) + total)
    assert reference.matmul_int8(x, weight).tolist() == [[float(np.float32(total) * step)]]


def nearest_float32(value: Fraction) -> Fraction:
    """Ties to even; of normal size."""
    exponent = max(-126, math.frexp(float(value))[1] - 1)
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit  # Python rounds ties to even


NORMAL = st.tuples(st.integers(1 << 23, (1 << 24) - 1), st.integers(-30, 30))


@given(NORMAL, NORMAL, NORMAL, st.booleans())
def test_fma_rounds_once(x, y, addend, negative):
    numbers = [np.float32(math.ldexp(*pair)) for pair in (x, y, addend)]
    numbers[2] *= -1 if negative else 1
    exact = Fraction(float(numbers[0])) * Fraction(float(numbers[1])) + Fraction(float(numbers[2]))
    assert Fraction(float(reference.fma(*(np.array([n]) for n in numbers))[0])) == nearest_float32(exact)


@given(st.integers(0, (1 << 11) - 1), st.integers(-60, -30), st.sampled_from([-1, 0, 1]))
def test_fma_rounds_once_where_float64_lies_halfway(k, exponent, sign):
    """A product of 25 bits, so halfway between two float32 numbers, and an addend that float64 loses."""
    x, y = np.float32([4096 + 2 * k + 1]), np.float32([4097])
    addend = np.float32([sign * 2.0**exponent])
    exact = Fraction(float(x[0])) * Fraction(float(y[0])) + Fraction(float(addend[0]))
    assert Fraction(float(reference.fma(x, y, addend)[0])) == nearest_float32(exact)


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
