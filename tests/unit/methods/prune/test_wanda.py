"""wanda: the mask against loops, the identities of its score, and what is stored."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.packed.records import Sparse24, SparseBitmask
from refllm.kernels.stats import Stats
from refllm.methods.prune import magnitude, wanda
from tests.strategies import inputs, weights

WIDTHS = st.sampled_from((4, 8, 16))


@st.composite
def weight_and_inputs(draw, columns=WIDTHS):
    W = draw(weights(columns=columns, kinds=("normal", "ties", "zero_row", "outlier", "one_sign")))
    return W, draw(inputs(W.shape[1]))


def slow_mask(W, X, removed_of):
    """Row by row, and group by group of columns: sort (score, column) pairs, drop the first ones.

    removed_of: list of (first column, end, number removed).
    """
    keep = np.ones(W.shape, bool)
    for i, row in enumerate(W):
        scores = [abs(float(w)) * math.sqrt(sum(float(x) ** 2 for x in X[:, j])) for j, w in enumerate(row)]
        for first, end, removed in removed_of:
            order = sorted(range(first, end), key=lambda j: (scores[j], j))
            keep[i, order[:removed]] = False
    return keep


def dyadic(shape, seed):
    """Multiples of 1/4 up to 2: sums of squares are exact, ties are many."""
    return np.random.default_rng(seed).integers(-8, 9, shape) / 4.0


def mask_of(record):
    """Which weights are stored, from the record's own arrays (a kept weight may be 0)."""
    if isinstance(record, SparseBitmask):
        return np.unpackbits(record.bitmask, axis=1, count=record.columns, bitorder="little").astype(bool)
    nibbles = np.stack([record.indices & 15, record.indices >> 4], axis=-1).reshape(len(record.indices), -1)
    mask = np.zeros((len(nibbles), record.columns), bool)
    for i, row in enumerate(nibbles[:, : record.columns // 4]):
        for group, nibble in enumerate(row):
            mask[i, 4 * group + (nibble & 3)] = mask[i, 4 * group + (nibble >> 2)] = True
    return mask


@given(st.integers(0, 10**6), WIDTHS, st.integers(1, 5), st.sampled_from((0.0, 0.25, 0.3, 0.5, 0.9, 1.0)))
def test_unstructured_equals_the_loops(seed, columns, rows, sparsity):
    W, X = dyadic((rows, columns), seed), dyadic((3, columns), seed + 1)
    record = wanda(W, Stats(X), sparsity=sparsity, dtype="float32")
    keep = slow_mask(W, X, [(0, columns, int(sparsity * columns))])
    np.testing.assert_array_equal(mask_of(record), keep)
    np.testing.assert_array_equal(record.dense(), np.where(keep, W, 0))
    assert (mask_of(record).sum(axis=1) == columns - int(sparsity * columns)).all()


@given(st.integers(0, 10**6), WIDTHS, st.integers(1, 5), st.sampled_from(((2, 4), (1, 4), (3, 4), (1, 2))))
def test_n_of_m_equals_the_loops(seed, columns, rows, n_of_m):
    n, m = n_of_m
    W, X = dyadic((rows, columns), seed), dyadic((3, columns), seed + 1)
    record = wanda(W, Stats(X), pattern=f"{n}:{m}", dtype="float32")
    assert type(record) is (Sparse24 if n_of_m == (2, 4) else SparseBitmask)
    keep = slow_mask(W, X, [(j, j + m, m - n) for j in range(0, columns, m)])
    np.testing.assert_array_equal(mask_of(record), keep)
    np.testing.assert_array_equal(record.dense(), np.where(keep, W, 0))


def test_by_hand():
    # Column norms 5, 1, 2, 0: scores 5 3 8 0 / 10 0 2 0. Two of four go from each row; ties drop the first column.
    W = np.array([[1.0, -3.0, 4.0, 9.0], [-2.0, 0.0, 1.0, 5.0]])
    X = np.array([[3.0, 1.0, 2.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
    assert wanda(W, Stats(X)).dense().tolist() == [[1.0, 0.0, 4.0, 0.0], [-2.0, 0.0, 1.0, 0.0]]
    record = wanda(W, Stats(X), pattern="2:4")
    assert record.dense().tolist() == [[1.0, 0.0, 4.0, 0.0], [-2.0, 0.0, 1.0, 0.0]]
    assert record.indices.tolist() == [[0b10_00], [0b10_00]]  # columns 0 and 2
    assert record.values.tolist() == [[1.0, 4.0], [-2.0, 1.0]]


def test_all_scores_equal_keeps_the_last_columns():
    record = wanda(np.ones((2, 8)), Stats(np.ones((1, 8))))
    assert mask_of(record).tolist() == [[False] * 4 + [True] * 4] * 2


@given(weights(columns=WIDTHS), st.sampled_from(("unstructured", "2:4", "1:4")))
def test_unit_columns_give_magnitude_per_row(W, pattern):
    X = np.eye(W.shape[1])
    ours = wanda(W, Stats(X), pattern=pattern, dtype="float32")
    np.testing.assert_array_equal(ours.dense(), magnitude(W, pattern=pattern, per_row=True, dtype="float32").dense())


@given(weight_and_inputs(), st.integers(-3, 3))
def test_scaling_rows_of_w_or_all_of_x_keeps_the_mask(case, power):
    W, X = case
    factor = np.float32(2.0**power)
    plain = wanda(W, Stats(X))
    assert wanda(W, Stats(X * factor)).bitmask.tobytes() == plain.bitmask.tobytes()
    rows = np.where(np.arange(len(W)) % 2, factor, np.float32(1))[:, None]
    assert wanda(W * rows, Stats(X)).bitmask.tobytes() == plain.bitmask.tobytes()


@given(weight_and_inputs(), st.integers(-3, 3))
def test_moving_a_factor_from_a_column_of_x_to_w_keeps_the_mask(case, power):
    W, X = case
    factor = np.ones(W.shape[1], np.float32)
    factor[:: max(1, len(factor) // 3)] = 2.0**power
    moved = wanda(W / factor, Stats(X * factor))
    assert moved.bitmask.tobytes() == wanda(W, Stats(X)).bitmask.tobytes()


@given(st.integers(0, 10**6))
def test_the_order_of_tokens_does_not_matter(seed):
    W, X = dyadic((3, 8), seed), dyadic((6, 8), seed + 1)
    assert wanda(W, Stats(X)).bitmask.tobytes() == wanda(W, Stats(X[::-1])).bitmask.tobytes()


def test_squared_score_is_what_zeroing_one_weight_costs():
    W, X = dyadic((2, 4), 1), dyadic((5, 4), 2)
    squares = np.array([[w**2 * (X[:, j] ** 2).sum() for j, w in enumerate(row)] for row in W])
    for i in range(2):
        for j in range(4):
            without = W.copy()
            without[i, j] = 0
            assert ((X @ (W - without).T) ** 2).sum() == squares[i, j]


def test_beats_magnitude_on_the_output_when_inputs_differ():
    rng = np.random.default_rng(0)
    W, X = rng.normal(size=(32, 64)).astype(np.float32), rng.normal(size=(256, 64)) * np.exp(rng.normal(size=64))
    stats = Stats(X.astype(np.float32))
    cost = lambda record: np.linalg.norm(X @ (W - record.dense()).T)
    for pattern in ("unstructured", "2:4"):
        ours, theirs = wanda(W, stats, pattern=pattern), magnitude(W, pattern=pattern, per_row=True)
        assert ours.nbytes == theirs.nbytes
        assert cost(ours) < 0.8 * cost(theirs)


def test_stored_bytes():
    """2:4 in float16: 8 bits of value and 1 bit of index a weight. Bitmask at 50%: 8 + 1 bits and 32 bits a row."""
    rng = np.random.default_rng(1)
    W, stats = rng.normal(size=(16, 64)), Stats(rng.normal(size=(8, 64)))
    assert 8 * wanda(W, stats, pattern="2:4").nbytes / W.size == 9
    assert 8 * wanda(W, stats).nbytes / W.size == 9 + 32 / 64
    assert 8 * wanda(W, stats, sparsity=0.75).nbytes / W.size == 5 + 32 / 64
    assert 8 * wanda(W, stats, pattern="4:8").nbytes / W.size == 9 + 32 / 64


def test_kept_values_are_the_weights_rounded_to_float16():
    W = np.array([[1.0, 1.0 + 2.0**-12, 3e-9, -70.1]])
    dense = wanda(W, Stats(np.ones((1, 4))), sparsity=0.0).dense()
    np.testing.assert_array_equal(dense, W.astype(np.float16).astype(np.float32))


def test_dead_inputs_and_dead_rows_are_pruned_first():
    W = np.array([[5.0, 1.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    record = wanda(W, Stats(np.array([[0.0, 1.0, 1.0, 0.0]])))
    assert record.dense().tolist() == [[0.0, 1.0, 1.0, 0.0], [0.0] * 4]
    assert mask_of(record)[1].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("W", "X", "knobs", "message"),
    [
        (np.array([[1.0, np.nan]]), np.ones((1, 2)), {}, "NaN or Inf"),
        (np.array([[1.0, np.inf]]), np.ones((1, 2)), {"sparsity": 1.0}, "NaN or Inf"),
        (np.ones((1, 8)), np.ones((1, 4)), {}, "inputs have 4 columns, the weight has 8"),
        (np.ones((1, 6)), np.ones((1, 6)), {"pattern": "2:4"}, "multiple of 4 columns, got 6"),
        (np.ones((1, 4)), np.ones((1, 4)), {"pattern": "3:8"}, "multiple of 8 columns, got 4"),
        (np.ones((1, 4)), np.ones((1, 4)), {"pattern": "4:2"}, "0 < N < M"),
        (np.ones((1, 4)), np.ones((1, 4)), {"pattern": "0:4"}, "0 < N < M"),
        (np.ones((1, 4)), np.ones((1, 4)), {"pattern": "2x4"}, "pattern must be unstructured or N:M"),
        (np.ones((1, 4)), np.ones((1, 4)), {"pattern": "2:4", "sparsity": 0.5}, "leave out sparsity=0.5"),
        (np.ones((1, 4)), np.ones((1, 4)), {"sparsity": 1.5}, "sparsity must lie between 0 and 1"),
        (np.ones((1, 4)), np.ones((1, 4)), {"sparsity": float("nan")}, "sparsity must lie between 0 and 1"),
        (np.full((1, 4), 1e6), np.ones((1, 4)), {}, "too large for float16"),
        (np.ones((1, 4)), np.ones((1, 4)), {"dtype": "int8"}, "float16 or float32"),
        (np.ones(4), np.ones((1, 4)), {}, "matrix"),
    ],
)
def test_bad_input_is_one_clear_line(W, X, knobs, message):
    with pytest.raises(ValueError, match=message) as caught:
        wanda(W, Stats(X), **knobs)
    assert "\n" not in str(caught.value)
