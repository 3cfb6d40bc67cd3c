"""Outlier-victim pairs: a slow twin, what a pair may hold, ties, and bytes there and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.pairs import NORMALS, OUTLIERS, encode_pairs, first_outlier, pair_table, round_pairs
from tests.strategies import PROPERTY, mixed_weights

FORMS = st.sampled_from(tuple(NORMALS))


def slow_pairs(row, normals):
    """Number by number: the nearest of both lists, of equals the later one; then one of each pair goes."""
    both = lambda magnitudes: sorted({sign * float(m) for m in magnitudes for sign in (1, -1)})
    listed = both(NORMALS[normals]) + both(OUTLIERS)
    nearest = lambda x: min(reversed(listed), key=lambda value: abs(x - value))
    values = [nearest(min(max(float(x), -1000.0), 1000.0)) for x in row]
    for i in range(0, len(values) - 1, 2):
        if abs(values[i]) > 8:
            values[i + 1] = 0.0
        elif abs(values[i + 1]) > 8:
            values[i] = 0.0
    return values


@PROPERTY
@given(mixed_weights(columns=st.integers(1, 21)), st.sampled_from((0.25, 1.0, 5.0, 40.0)), FORMS)
def test_equals_the_loops(x, size, normals):
    x = x * np.float32(size)
    expected = [slow_pairs(row, normals) for row in x]
    for same in (x, x.astype(np.float64), np.asfortranarray(x), x.repeat(2, axis=0)[::2]):
        assert round_pairs(same, normals).tolist() == expected


@pytest.mark.parametrize("normals", NORMALS)
def test_every_tie_and_its_neighbours(normals):
    """All quarters from -100 to 100 and the floats beside them, each beside a 0."""
    x = np.arange(-400, 401, dtype=np.float32) / 4
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    x = np.stack([x, 0 * x], axis=1).ravel()
    assert round_pairs(x, normals).tolist() == slow_pairs(x, normals)


def test_halfway_is_the_larger_number_or_the_outlier():
    alone = lambda x: round_pairs(np.array([x]))[0]
    assert [alone(x) for x in (0.5, -0.5, -6.5, 14.0, -14.0, 80.0)] == [1, 0, -6, 16, -12, 96]
    assert first_outlier("int") == 9.5 and first_outlier("flint") == 10
    assert [alone(x) for x in (9.5, -9.5, 9.25, -9.25)] == [12, -12, 7, -7]
    assert [alone(x) for x in (1e30, -np.inf, -0.0)] == [96, -96, 0] and not np.signbit(alone(-0.0))


def test_one_outlier_survives_and_two_leave_the_first():
    pairs = np.array([[3.0, 50], [50, 3], [30, 90], [-90, 30], [9, 9], [9.5, -9.5]])
    assert round_pairs(pairs).tolist() == [[0, 48], [48, 0], [32, 0], [-96, 0], [7, 7], [12, 0]]
    assert round_pairs(np.array([1.0, 2, 60])).tolist() == [1, 2, 64]  # the last of an odd number stands alone
    assert round_pairs(np.array([[2.0, 60, 3], [60, 60, 9]])).tolist() == [[0, 64, 3], [64, 0, 7]]


@PROPERTY
@given(mixed_weights(columns=st.integers(1, 20)), FORMS)
def test_without_outliers_it_is_rounding(x, normals):
    x = x * np.float32(7 / np.maximum(np.abs(x).max(), 1e-30))
    values = round_pairs(x, normals)
    assert set(np.abs(values).ravel()) <= set(NORMALS[normals])
    if normals == "int":
        assert values.tolist() == np.floor(x.astype(np.float64) + 0.5).tolist()  # 15 levels


@PROPERTY
@given(mixed_weights(columns=st.integers(1, 10).map(lambda n: 2 * n)), st.sampled_from((1.0, 30.0)), FORMS)
def test_bytes_there_and_back(x, size, normals):
    values = round_pairs(x * np.float32(size), normals)
    large = np.abs(values.reshape(len(x), -1, 2)) > 8
    assert (large.sum(axis=2) <= 1).all() and not values.reshape(large.shape)[large[..., ::-1]].any()
    codes = encode_pairs(values, normals)
    assert codes.dtype == np.uint8 and codes.shape == (len(x), x.shape[1] // 2)
    assert pair_table(normals)[codes].reshape(values.shape).tolist() == values.tolist()
    assert round_pairs(values, normals).tolist() == values.tolist()


@pytest.mark.parametrize("normals", NORMALS)
def test_the_table_of_bytes(normals):
    """225 bytes of two normals, and 14 outliers with the victim on either side; what no pair has is 0."""
    table = pair_table(normals).astype(np.float64)
    assert table.shape == (256, 2)
    used = np.flatnonzero(table.any(axis=1))
    assert encode_pairs(table[used], normals).ravel().tolist() == used.tolist() and len(used) == 15 * 15 - 1 + 2 * 14
    victims = [code for code in range(256) if np.abs(table[code]).max() > 8]
    assert all((code >> 4 == 8) != (code & 15 == 8) for code in victims)


def test_outliers_are_abfloat():
    """(2 + m) 2^(e + 2), without e = m = 0."""
    assert OUTLIERS.tolist() == [(2 + m) << (e + 2) for e in range(4) for m in range(2)][1:]
    for code in range(1, 8):
        low, high = pair_table()[[0x80 | code, 0x08 | code << 4]].tolist()
        assert low == [OUTLIERS[code - 1], 0] and high == [0, OUTLIERS[code - 1]]
        assert pair_table()[0x80 | 8 | code].tolist() == [-OUTLIERS[code - 1], 0]
