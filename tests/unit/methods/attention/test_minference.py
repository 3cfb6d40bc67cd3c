"""minference: planted heads are found, forced keys are kept, everything kept is dense attention."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.attention import attend
from refllm.kernels.online_softmax import Traffic
from refllm.methods.attention import minference as method
from refllm.methods.attention.minference import (
    a_shape,
    choose,
    last_weights,
    minference_with_lse,
    slash_blocks,
    top_columns,
    top_offsets,
)

T = 256
AT = np.arange(T), np.arange(T)


def planted(columns=(), distance=None, seed=0):
    """A head that looks at some columns, or so many places back: places as one-hot keys."""
    rng = np.random.default_rng(seed)
    k = np.eye(T)[None] + 0.01 * rng.normal(size=(1, T, T))
    q = np.zeros((1, T, T))
    for t in range(T):
        for c in columns:
            q[0, t, c] = 12.0
        if distance is not None and t >= distance:
            q[0, t, t - distance] = 12.0
    return q, k, rng.normal(size=(1, T, 4))


def weights(q, k, last=64):
    return last_weights(q, k, *AT, last, 1.0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), queries=st.integers(2, 40), past=st.integers(0, 30), block=st.integers(3, 20))
def test_everything_kept_is_dense(seed, queries, past, block):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(h, n, 4)) for h, n in ((4, queries), (2, queries + past), (2, queries + past)))
    at = np.arange(past, past + queries), np.arange(past + queries)
    exact = attend(q, k, v, *at, scale=0.5)
    for knobs in (
        dict(pattern="vertical_slash", vertical=queries + past, slash=1),
        dict(pattern="vertical_slash", vertical=1, slash=queries + past),
        dict(pattern="a_shape", sink=queries + past, local=1),
        dict(pattern="a_shape", sink=1, local=queries + past),
        dict(pattern="block", top=999),
    ):
        np.testing.assert_allclose(method(q, k, v, *at, scale=0.5, block=block, **knobs), exact, rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), past=st.integers(0, 200), last=st.integers(1, 30))
def test_sums_of_diagonals_equal_a_loop(seed, past, last):
    """All nearest ones are forced, so look beyond: the ranking of the rest follows the sums."""
    rng = np.random.default_rng(seed)
    n = past + 30
    q, k = rng.normal(size=(2, 30, 4)), rng.normal(size=(1, n, 4))
    at = np.arange(past, n), np.arange(n)
    A = last_weights(q, k, *at, last, 1.0)
    kept = top_offsets(A.copy(), *at, 105)
    for head in range(2):
        sums = np.zeros(n)
        for i in range(last):
            for j in range(n):
                distance = (n - last + i) - j
                if distance >= 0:
                    sums[distance] += A[head, i, j]
        order = [d for d in np.argsort(-sums[100:], kind="stable") + 100]
        assert set(np.flatnonzero(kept[head])) == set(range(min(n, 100))) | set(order[:5])


def test_forced_columns_and_distances():
    q, k, _ = planted(columns=(200,))
    A = weights(q, k)
    np.testing.assert_allclose(A.sum(axis=-1), 1, rtol=1e-12)
    assert set(np.flatnonzero(top_columns(A.copy(), 31)[0])) == {*range(30), 200}
    assert set(np.flatnonzero(top_columns(A.copy(), 1)[0])) == set(range(30))
    offsets = np.flatnonzero(top_offsets(A, *AT, 100)[0])
    assert offsets.tolist() == list(range(100))


@pytest.mark.parametrize(("head", "found"), [(dict(columns=(90, 140)), "vertical"), (dict(distance=150), "slash")])
def test_a_planted_head_is_recovered(head, found):
    """32 columns or 101 distances are enough, if they are the right ones; A-shape of the same cost is not."""
    q, k, v = planted(**head)
    exact, traffic = attend(q, k, v, *AT, scale=1.0), Traffic()
    knobs = dict(vertical=32, slash=1) if found == "vertical" else dict(vertical=1, slash=101)
    got, _ = minference_with_lse(q, k, v, *AT, scale=1.0, block=8, traffic=traffic, **knobs)
    late = slice(150, None)
    relative = lambda x: np.linalg.norm((x - exact)[:, late]) / np.linalg.norm(exact[:, late])
    assert (
        relative(got) < 0.1 < relative(method(q, k, v, *AT, scale=1.0, block=8, pattern="a_shape", sink=8, local=110))
    )
    assert 0 < traffic.tiles < traffic.skipped + traffic.tiles


def test_the_sign_of_a_distance():
    """Distance 2 is the key two places before: blocks below the diagonal."""
    offsets = np.zeros((1, 8), bool)
    offsets[0, 2] = True
    at = np.arange(8), np.arange(8)
    assert slash_blocks(offsets, *at, 1)[0].tolist() == np.eye(8, k=-2, dtype=bool).tolist()


def test_a_shape_is_sink_and_window():
    mask = a_shape(np.arange(6), np.arange(6), 1, 2, 1, 1)[0]
    expected = [[j <= i and (j < 1 or i - j < 2) for j in range(6)] for i in range(6)]
    assert mask.tolist() == expected


def test_one_pattern_for_each_head():
    one, other = planted(columns=(90, 140)), planted(distance=150)
    q, k, v = (np.concatenate(pair) for pair in zip(one, other, strict=True))
    candidates = {"columns": dict(vertical=32, slash=1, block=8), "diagonals": dict(vertical=1, slash=101, block=8)}
    assert choose(q, k, v, *AT, candidates, scale=1.0) == ["columns", "diagonals"]


def test_one_query_attends_to_everything_and_bad_knobs():
    q, k, v = planted(columns=(90,))
    np.testing.assert_array_equal(
        method(q[:, -1:], k, v, AT[0][-1:], AT[1], scale=1.0, vertical=1),
        attend(q[:, -1:], k, v, AT[0][-1:], AT[1], scale=1.0),
    )
    with pytest.raises(ValueError, match="pattern must be one of a_shape, vertical_slash, block, got 'x'"):
        method(q, k, v, *AT, scale=1.0, pattern="x")
    with pytest.raises(ValueError, match="vertical must be at least 1, got 0"):
        method(q, k, v, *AT, scale=1.0, vertical=0)
