"""magnitude: exact counts, ties, scopes, and that no other mask of its size is nearer to the weight."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.packed.records import Sparse24, SparseBitmask
from refllm.methods.prune import magnitude
from tests.strategies import weights

SPARSITIES = st.sampled_from((0.0, 0.1, 0.5, 0.77, 1.0))


def slow_magnitude(W, sparsity, per_row):
    """Sort (|w|, position) pairs, drop the first int(sparsity * n)."""
    places = list(np.ndindex(W.shape))
    groups = [[place for place in places if place[0] == i] for i in range(len(W))] if per_row else [places]
    result = W.copy()
    for group in groups:
        for place in sorted(group, key=lambda p: (abs(W[p]), p))[: int(sparsity * len(group))]:
            result[place] = 0
    return result


@given(weights(), SPARSITIES, st.booleans())
def test_equals_the_loops(W, sparsity, per_row):
    record = magnitude(W, sparsity=sparsity, per_row=per_row, dtype="float32")
    np.testing.assert_array_equal(record.dense(), slow_magnitude(W, sparsity, per_row))
    n = W.shape[1] if per_row else W.size
    removed = int(sparsity * n) * (len(W) if per_row else 1)
    assert record.values.size == W.size - removed  # zeros that were there before count as weights


def test_by_hand_with_ties():
    W = np.array([[1.0, -1.0, 2.0], [1.0, 3.0, -2.0]])
    # Whole matrix: three of six go, the three ones. Per row: one of three goes, the first of equals.
    assert magnitude(W).dense().tolist() == [[0.0, 0.0, 2.0], [0.0, 3.0, -2.0]]
    assert magnitude(W, per_row=True).dense().tolist() == [[0.0, -1.0, 2.0], [0.0, 3.0, -2.0]]
    assert magnitude(np.ones((1, 4))).dense().tolist() == [[0.0, 0.0, 1.0, 1.0]]


@given(weights(columns=st.sampled_from((4, 8))))
def test_two_of_four_keeps_the_two_largest(W):
    record = magnitude(W, pattern="2:4", dtype="float32")
    assert isinstance(record, Sparse24)
    kept = np.sort(np.abs(record.dense()).reshape(-1, 4), axis=1)
    best = np.sort(np.abs(W).reshape(-1, 4), axis=1)
    assert not kept[:, :2].any()
    np.testing.assert_array_equal(kept[:, 2:], best[:, 2:])


def test_no_mask_of_equal_count_is_nearer():
    W = np.random.default_rng(0).normal(size=(2, 4))
    ours = ((W - magnitude(W, sparsity=0.5, dtype="float32").dense()) ** 2).sum()
    every = [sum(W.flat[i] ** 2 for i in removed) for removed in combinations(range(8), 4)]
    assert ours == pytest.approx(min(every), rel=1e-6)


@given(weights(), SPARSITIES, st.integers(-3, 3))
def test_scaling_and_repeating_change_nothing(W, sparsity, power):
    record = magnitude(W, sparsity=sparsity, dtype="float32")
    scaled = magnitude(W * np.float32(2.0**power), sparsity=sparsity, dtype="float32")
    assert scaled.bitmask.tobytes() == record.bitmask.tobytes()
    again = magnitude(record.dense(), sparsity=sparsity, dtype="float32")
    np.testing.assert_array_equal(again.dense(), record.dense())


@given(weights(max_rows=1), SPARSITIES)
def test_one_row_is_the_whole_matrix(W, sparsity):
    a, b = (magnitude(W, sparsity=sparsity, per_row=flag) for flag in (False, True))
    assert a.bitmask.tobytes() == b.bitmask.tobytes() and a.values.tobytes() == b.values.tobytes()


def test_sparsity_zero_is_the_identity_and_one_is_empty():
    W = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_array_equal(magnitude(W, sparsity=0.0, dtype="float32").dense(), W)
    empty = magnitude(W, sparsity=1.0)
    assert isinstance(empty, SparseBitmask) and empty.values.size == 0 and not empty.dense().any()


@pytest.mark.parametrize(
    ("W", "knobs", "message"),
    [
        (np.array([[1.0, np.nan]]), {}, "NaN or Inf"),
        (np.ones((1, 6)), {"pattern": "2:4"}, "multiple of 4 columns, got 6"),
        (np.ones((2, 0)), {}, "non-empty"),
        (np.ones((1, 4)), {"sparsity": -0.1}, "sparsity must lie between 0 and 1"),
        (np.ones((1, 4)), {"pattern": "2:4", "sparsity": 0.0}, "leave out sparsity=0.0"),
    ],
)
def test_bad_input_is_one_clear_line(W, knobs, message):
    with pytest.raises(ValueError, match=message):
        magnitude(W, **knobs)
