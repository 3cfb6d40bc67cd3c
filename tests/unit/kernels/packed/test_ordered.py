"""Products in a fixed order: against Python's own numbers, and that cutting the work changes no bit."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.packed import ordered, threads
from refllm.kernels.packed.ordered import EXACT_ROWS, gram, subtract_product
from tests.strategies import PROPERTY, SEEDS, inputs

SIDES = st.integers(0, 9)


def slow_subtract(C, A, B):
    out = C.copy()
    for i in range(C.shape[0]):
        for k in range(C.shape[1]):
            value = float(C[i, k])
            for j in range(A.shape[1]):
                value = value - float(A[i, j]) * float(B[j, k])
            out[i, k] = value
    return out


def same_bits(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(params=["numba", "numpy"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", request.param)


@pytest.mark.parametrize("text", ["numba", "numpy"])
@PROPERTY
@given(SIDES, SIDES, st.integers(0, 11), SEEDS)
def test_subtract_product_equals_the_loops(text, rows, columns, depth, seed):
    rng = np.random.default_rng(seed)
    C, A, B = rng.normal(size=(rows, columns)), rng.normal(size=(rows, depth)), rng.normal(size=(depth, columns))
    expected = slow_subtract(C, A, B)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFLLM_KERNELS", text)
        subtract_product(C, A, B)
    assert same_bits(C, expected)


@pytest.mark.parametrize("shape", [(3, 256, 5), (2, 257, 4), (700, 513, 130)], ids=str)
def test_tiles_threads_and_strides_change_no_bit(shape, monkeypatch):
    rows, columns, depth = shape
    rng = np.random.default_rng(0)
    C, A, B = rng.normal(size=(rows, columns)), rng.normal(size=(rows, depth)), rng.normal(size=(depth, columns))
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    expected = C.copy()
    subtract_product(expected, A, B)
    monkeypatch.setenv("REFLLM_KERNELS", "numba")
    monkeypatch.setattr(threads, "MINIMUM_WORK", 1)
    for count in ("1", "3"):
        monkeypatch.setenv("REFLLM_THREADS", count)
        strided = np.zeros((2 * rows, 3 * columns))
        strided[::2, ::3] = C
        subtract_product(strided[::2, ::3], np.asfortranarray(A), B.T.copy().T)
        assert same_bits(np.ascontiguousarray(strided[::2, ::3]), expected)
        assert not strided[1::2].any() and not strided[:, 1::3].any()


def test_order_and_rounding_are_those_of_the_text(kernels):
    """1 - 2^-53 - 2^-53 stays 1 term by term; the sum of the terms first, or fused products, would give another."""
    C = np.ones((1, 1))
    subtract_product(C, np.full((1, 2), 2.0**-27), np.full((2, 1), 2.0**-27))
    assert C[0, 0] == 1.0
    C, near = np.ones((1, 1)), 1 + 2.0**-30
    subtract_product(C, np.array([[near]]), np.array([[near]]))
    assert C[0, 0] == 1 - near * near  # a fused product would keep the 2^-60


@PROPERTY
@given(st.integers(1, 6).flatmap(lambda columns: inputs(columns)))
def test_gram_is_the_exact_sum_to_the_last_places(X):
    H = gram(X)
    assert same_bits(H, np.ascontiguousarray(H.T))
    top = np.abs(X).max(axis=0)
    for j in range(X.shape[1]):
        for k in range(X.shape[1]):
            exact = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(X[:, j], X[:, k], strict=True))
            allowed = (len(X) * 2.0**-43) * float(top[j]) * float(top[k])
            assert abs(float(Fraction(float(H[j, k])) - exact)) <= allowed


def test_gram_does_not_depend_on_the_order_of_tokens_of_a_part():
    """Sums without rounding: BLAS may add the products of 512 tokens in any order."""
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(EXACT_ROWS, 40)) * np.exp(3 * rng.normal(size=40))).astype(np.float32)
    H = gram(X)
    assert same_bits(gram(X[::-1]), H) and same_bits(gram(X[rng.permutation(EXACT_ROWS)]), H)
    assert same_bits(gram(np.asfortranarray(X)), H)
    assert not same_bits(*(x.T @ x for x in (X.astype(np.float64), X[::-1].astype(np.float64))))  # plain BLAS: it does


def test_gram_at_its_limit_is_exact():
    """512 products of the largest whole numbers, and inputs whose lower half is not zero."""
    largest = np.full((EXACT_ROWS, 1), 1 - 2.0**-24, np.float32)
    assert gram(largest)[0, 0] == float(EXACT_ROWS * (1 - Fraction(1, 2**24)) ** 2)
    assert gram(np.tile(largest, (4, 3)))[2, 1] == float(4 * EXACT_ROWS * (1 - Fraction(1, 2**24)) ** 2)
    assert gram(np.float32([[1.0, 2.0**-40], [2.0**-24, 0.0]])).tolist() == [
        [1 + 2.0**-48, 2.0**-40],
        [2.0**-40, 2.0**-80],
    ]


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_gram_of_very_small_and_very_large_inputs(scale):
    X = (np.float32([[1.0, -0.5], [0.25, 1.0]]) * np.float32(scale)).astype(np.float32)
    x = X.astype(np.float64)
    np.testing.assert_array_equal(gram(X), [[x[:, j] @ x[:, k] for k in (0, 1)] for j in (0, 1)])
    assert gram(np.zeros((3, 2), np.float32)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_split_leaves_room_for_exact_sums():
    assert 2 * ordered.HALF_BITS + int(EXACT_ROWS).bit_length() - 1 <= 53
