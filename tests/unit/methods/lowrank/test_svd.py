"""svd: Eckart-Young against eigenvalues found another way, ranks from budgets, signs, and what is stored."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.methods.lowrank import svd
from tests.strategies import weights

U16 = 2.0**-11  # half a unit in the last place of float16, relative
SEEDS = st.integers(0, 2**32 - 1)


def slow_singular_values(W):
    """Power iteration with deflation on W^T W: no decomposition routine."""
    M = W.astype(np.float64)
    values = []
    for _ in range(min(M.shape)):
        v = np.ones(M.shape[1]) + np.arange(M.shape[1]) / 10
        for _ in range(60):  # a gap of 4 in the squares: 4^-60
            v = M.T @ (M @ v)
            norm = np.linalg.norm(v)
            if norm < 1e-300:
                break
            v /= norm
        u = M @ v
        values.append(np.linalg.norm(u))
        M = M - np.outer(u, v)
    return np.array(values)


def separated(seed, out=6, columns=9):
    """A weight whose singular values are 2^0, 2^-1, ...: vectors are well defined and power iteration converges."""
    rng = np.random.default_rng(seed)
    k = min(out, columns)
    U = np.linalg.qr(rng.normal(size=(out, k)))[0]
    V = np.linalg.qr(rng.normal(size=(columns, k)))[0]
    return U * 2.0 ** -np.arange(k) @ V.T


@given(SEEDS, st.integers(1, 6))
def test_error_is_the_energy_of_the_dropped_singular_values(seed, rank):
    W = separated(seed)
    record = svd(W, rank=rank, dtype="float32")
    S = slow_singular_values(W)
    error = np.linalg.norm(W - record.A.astype(np.float64) @ record.B)
    # Rounding the factors to float32 adds at most 2^-24 (|A| |B|) twice; |A| |B| <= sqrt(rank) |W|, here below 4.
    assert error == pytest.approx(np.sqrt((S[rank:] ** 2).sum()), rel=1e-9, abs=4 * 2.0**-23)


@given(SEEDS)
def test_no_other_pair_of_factors_is_nearer(seed):
    """Alternating least squares from a random start never gets below."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(5, 7))
    ours = np.linalg.norm(W - svd(W, rank=2, dtype="float32").dense())
    B = rng.normal(size=(2, 7))
    for _ in range(20):
        A = np.linalg.lstsq(B.T, W.T, rcond=None)[0].T
        B = np.linalg.lstsq(A, W, rcond=None)[0]
        assert ours <= np.linalg.norm(W - A @ B) * (1 + 1e-6)


def test_by_hand():
    # [[3, 0], [4, 5]] has singular values 3 sqrt 5 and sqrt 5; its first right vector is (1, 1) / sqrt 2.
    record = svd(np.array([[3.0, 0.0], [4.0, 5.0]]), rank=1, dtype="float32")
    np.testing.assert_allclose(record.dense(), [[1.5, 1.5], [4.5, 4.5]], rtol=1e-6)
    np.testing.assert_allclose(record.B, (3 * 5**0.5) ** 0.5 / 2**0.5 * np.ones((1, 2)), rtol=1e-6)


@given(weights(max_rows=8, columns=st.integers(1, 12)))
def test_full_rank_gives_the_weight_back(W):
    """Entries of A and B are rounded by u = 2^-24 of themselves (2^-150 absolute for the smallest).

    |W' - W| <= (2 u + u^2) |A| |B|, and dense() adds one rounding for each of its products and sums.
    """
    record = svd(W, rank=min(W.shape), dtype="float32")
    magnitude = np.abs(record.A).astype(np.float64) @ np.abs(record.B).astype(np.float64)
    allowed = (2 + min(W.shape)) * 2.0**-24 * magnitude * 1.01 + 1e-13 * np.abs(W).max() + 1e-40
    assert (np.abs(record.dense().astype(np.float64) - W) <= allowed).all()


@given(weights(max_rows=8, columns=st.integers(2, 12)))
def test_error_never_grows_with_the_rank(W):
    errors = [
        np.linalg.norm(W.astype(np.float64) - svd(W, rank=r, dtype="float32").dense())
        for r in range(1, min(W.shape) + 1)
    ]
    slack = 1e-6 * np.linalg.norm(W)
    assert all(later <= earlier + slack for earlier, later in pairwise(errors))


@given(SEEDS, st.integers(1, 6))
def test_float16_factors_are_the_float64_ones_rounded_once(seed, rank):
    W = separated(seed)
    half, single = svd(W, rank=rank), svd(W, rank=rank, dtype="float32")
    assert half.A.dtype == half.B.dtype == np.float16
    for h, s in ((half.A, single.A), (half.B, single.B)):
        assert (np.abs(h.astype(np.float64) - s) <= U16 * 1.001 * np.abs(s) + 2.0**-25).all()
    product = np.abs(single.A).astype(np.float64) @ np.abs(single.B)
    loose = (np.abs(single.A).sum(axis=1)[:, None] + np.abs(single.B).sum(axis=0)) * 2.0**-25
    error = np.abs(half.dense().astype(np.float64) - single.dense())
    assert (error <= 2.01 * U16 * product + loose * 1.01 + 1e-6 * product).all()


@given(SEEDS)
def test_split_is_balanced_and_signs_are_fixed(seed):
    record = svd(separated(seed), rank=4, dtype="float32")
    A, B = record.A.astype(np.float64), record.B.astype(np.float64)
    np.testing.assert_allclose(A.T @ A, B @ B.T, atol=1e-6)  # both diag(S)
    largest = np.argmax(np.abs(B), axis=1)
    assert (B[np.arange(4), largest] > 0).all()
    flipped = svd(-separated(seed), rank=4, dtype="float32")
    np.testing.assert_allclose(flipped.B, record.B, atol=1e-6)
    np.testing.assert_allclose(flipped.A, -record.A, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "ratio", "rank"),
    [
        ((64, 64), 0.5, 16),
        ((64, 64), 1.0, 32),  # break-even of a square matrix is half its width
        ((4096, 11008), 1.0, 2985),
        ((32, 96), 0.5, 12),
        ((32, 96), 0.51, 12),
    ],
)
def test_rank_from_the_ratio(shape, ratio, rank):
    from refllm.methods.lowrank.svd import _rank

    assert _rank(shape, ratio, None) == rank
    assert rank * sum(shape) <= ratio * shape[0] * shape[1] < (rank + 1) * sum(shape)


def test_stored_bytes_are_below_the_ratio():
    W = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    record = svd(W)
    assert record.A.shape == (64, 19) and record.B.shape == (19, 96)  # int(0.5 * 38.4)
    assert record.nbytes == 2 * 19 * (64 + 96) <= 0.5 * 2 * W.size
    beyond = svd(W, rank=60)  # asked for: larger than the weight itself
    assert beyond.nbytes > 2 * W.size


def test_zero_rows_zero_weight_and_single_rows():
    assert not svd(np.zeros((4, 6)), rank=2).dense().any()
    W = np.random.default_rng(1).normal(size=(4, 6))
    W[2] = 0
    assert np.abs(svd(W, rank=3).dense()[2]).max() < 1e-6
    np.testing.assert_allclose(svd(W[:1], rank=1, dtype="float32").dense(), W[:1], rtol=1e-6)
    np.testing.assert_allclose(svd(W[:, :1], rank=1, dtype="float32").dense(), W[:, :1], rtol=1e-6, atol=1e-12)


def test_memory_order_and_read_only_do_not_matter():
    W = np.random.default_rng(2).normal(size=(6, 8)).astype(np.float32)
    W.flags.writeable = False
    a, b = svd(W, rank=3), svd(np.asfortranarray(W), rank=3)
    np.testing.assert_allclose(a.dense(), b.dense(), rtol=0, atol=1e-2)
    assert svd(W, rank=3).A.tobytes() == a.A.tobytes()


@pytest.mark.parametrize(
    ("W", "knobs", "message"),
    [
        (np.array([[1.0, np.nan]]), {}, "NaN or Inf"),
        (np.array([[np.inf, 1.0]]), {"rank": 1}, "NaN or Inf"),
        (np.ones((8, 8)), {"ratio": 1.5}, "ratio must lie between 0 and 1, got 1.5.*break-even rank 4 "),
        (np.ones((8, 8)), {"ratio": 0.0}, "ratio must lie between 0 and 1"),
        (np.ones((8, 8)), {"ratio": float("nan")}, "ratio must lie between 0 and 1"),
        (np.ones((8, 8)), {"ratio": 0.1}, r"leaves rank 0 for a weight of shape \(8, 8\)"),
        (np.ones((1, 8)), {}, r"leaves rank 0 for a weight of shape \(1, 8\) \(break-even rank 0\)"),
        (np.ones((4, 8)), {"rank": 5}, "rank must lie between 1 and 4"),
        (np.ones((4, 8)), {"rank": 0}, "rank must lie between 1 and 4"),
        (np.ones((4, 8)), {"rank": 2, "ratio": 0.5}, "ratio or rank, not both"),
        (np.full((4, 8), 1e12), {"rank": 1}, "too large for float16"),
        (np.ones(4), {}, "matrix"),
    ],
)
def test_bad_input_is_one_clear_line(W, knobs, message):
    with pytest.raises(ValueError, match=message) as caught:
        svd(W, **knobs)
    assert "\n" not in str(caught.value)
