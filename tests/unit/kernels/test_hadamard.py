"""Hadamard matrices and their fast transform: what they must be, whatever the construction."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.hadamard import hadamard, has_hadamard, random_hadamard, random_orthogonal, turn

SIZES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 60, 64, 76, 108, 140, 172, 344, 352, 384, 576)


@pytest.mark.parametrize("n", SIZES)
def test_entries_are_signs_and_rows_are_orthogonal(n):
    H = hadamard(n)
    assert H.shape == (n, n) and set(np.unique(H)) <= {-1.0, 1.0}
    assert np.array_equal(H @ H.T, n * np.eye(n))  # sums of whole numbers: exact


@pytest.mark.parametrize("n", (0, 3, 6, 10, 18, 52, 92, 100, 43 * 2))
def test_sizes_without_a_construction_are_refused(n):
    """52, 92 and 100 have Hadamard matrices, none of which is built here; the others have none."""
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"{n} wide, for which no Hadamard matrix is known here"):
        hadamard(n)


def test_sylvester_by_hand():
    assert hadamard(2).tolist() == [[1, 1], [1, -1]]
    assert np.array_equal(hadamard(8), np.kron(hadamard(2), hadamard(4)))
    bits = np.array([[bin(i & j).count("1") for j in range(16)] for i in range(16)])
    assert np.array_equal(hadamard(16), (-1.0) ** bits)


def test_widths_of_the_models_at_hand():
    """tiny, stories260k, babyllama and SmolLM2: residual streams, heads, MLPs."""
    assert all(map(has_hadamard, (64, 128, 576, 8, 16, 32, 172, 352, 384, 1536, 4)))
    assert not has_hadamard(9)  # SmolLM2's heads: its whole attention output, 576, is turned instead


@given(st.sampled_from((1, 2, 8, 12, 24, 28, 36, 172)), st.sampled_from((1, 2, 3, 5)), st.integers(0, 1000))
def test_the_fast_transform_is_the_product_with_the_matrix(n, inner, seed):
    x = np.random.default_rng(seed).normal(size=(3, n * inner))
    Q = np.kron(hadamard(n), np.eye(inner)) / n**0.5
    np.testing.assert_allclose(turn(x, inner=inner), x @ Q, atol=1e-13)
    np.testing.assert_allclose(turn(x, inner=inner, back=True), x @ Q.T, atol=1e-13)
    np.testing.assert_allclose(turn(turn(x, inner=inner), inner=inner, back=True), x, atol=1e-13)


def test_dtype_shape_and_input_are_kept():
    x = np.random.default_rng(0).normal(size=(2, 3, 48)).astype(np.float32)
    x.flags.writeable = False
    y = turn(x)
    assert y.dtype == np.float32 and y.shape == x.shape
    np.testing.assert_allclose(y, turn(x.astype(np.float64)), atol=1e-5)
    np.testing.assert_array_equal(turn(np.repeat(x, 2, axis=1)[:, ::2]), y)  # not contiguous
    assert turn(x[0, 0]).shape == (48,) and turn(x[:0]).shape == (0, 3, 48)


def test_a_spike_reaches_every_place_alike():
    """A spike of size c becomes c / sqrt(n) everywhere, and lengths stay."""
    for n in (64, 172, 576):
        spike = np.zeros(n)
        spike[n // 3] = 7
        np.testing.assert_allclose(np.abs(turn(spike)), 7 / n**0.5, rtol=1e-13)
    x = np.random.default_rng(1).normal(size=(5, 384))
    np.testing.assert_allclose(np.linalg.norm(turn(x), axis=1), np.linalg.norm(x, axis=1), rtol=1e-13)


@pytest.mark.parametrize(
    ("width", "inner", "match"),
    [(8, 3, "inner must divide the width 8, got 3"), (8, 0, "got 0"), (18, 1, "is 18 wide"), (18, 2, "is 9 wide")],
)
def test_widths_that_do_not_fit(width, inner, match):
    with pytest.raises(ValueError, match=match):
        turn(np.zeros((1, width)), inner=inner)


@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
@pytest.mark.parametrize("n", [1, 4, 36])
def test_random_rotations_are_orthogonal_and_seeded(make, n):
    Q = make(n, np.random.default_rng(5))
    np.testing.assert_allclose(Q @ Q.T, np.eye(n), atol=1e-13)
    assert np.array_equal(Q, make(n, np.random.default_rng(5)))
    if n > 1:
        assert not np.array_equal(Q, make(n, np.random.default_rng(6)))


def test_random_hadamard_has_even_entries_and_random_orthogonal_no_preferred_sign():
    np.testing.assert_allclose(np.abs(random_hadamard(36, np.random.default_rng(0))), 1 / 6, rtol=1e-15)
    corners = np.array([random_orthogonal(3, np.random.default_rng(seed))[0, 0] for seed in range(400)])
    assert abs(np.mean(corners)) < 4 * (1 / 3) ** 0.5 / 20  # mean 0, variance 1/3: four standard errors
