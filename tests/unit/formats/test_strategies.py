"""Strategies of layouts: everything that fields can hold is drawn, nothing else, and a wrong reader is found."""

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from refllm.formats.blocks import Q4_0
from refllm.formats.layouts import Layout, codes, numbers
from refllm.formats.strategies import fields_of, units_of

MIXED = Layout("mixed", 8, 2, (numbers("d", "f2", 0), numbers("m", "f4", 2), codes("q", 2, 3, "6", "3 * i", "", "i1")))
ONE = (1,)


def drawn(strategy, examples=60):
    """What a strategy gives, again and again."""
    found = []

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(strategy)
    def collect(example):
        found.append(example)

    collect()
    return found


@pytest.mark.parametrize(
    "wanted",
    [
        lambda f: (f["q"] == -4).all(),
        lambda f: (f["q"] == 3).all(),
        lambda f: f["q"][0, 0] not in (-4, 0, 3, f["q"][0, 1]),
        lambda f: np.isnan(f["d"]),
        lambda f: np.isposinf(f["d"]),
        lambda f: np.isneginf(f["m"]),
        lambda f: 0 < np.abs(f["d"]) < 2.0**-14,
        lambda f: 0 < np.abs(f["m"]) < 2.0**-126,
        lambda f: f["d"] == 0 and np.signbit(f["d"]),
        lambda f: (f["m"].view(np.uint32) & 0xFFF).item() not in (0, 1, 0xFFF),  # any bits, not round numbers only
    ],
)
def test_fields_contain(wanted):
    """Found within so many draws, most at once. What is drawn depends on all code that is loaded, so there is room."""
    rule = settings(max_examples=5000, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    assert wanted(find(fields_of(MIXED, ONE), wanted, settings=rule))


def test_shapes():
    byte = Layout("byte", 1, 1, (numbers("q", "u1", 0),))
    of_shape = lambda shape, examples: {units.shape for units in drawn(units_of(byte, shape), examples)}
    assert of_shape(None, 200) == {(n, 1) for n in range(4)}
    assert of_shape(st.tuples(st.sampled_from([0, 3]), st.just(2)), 100) == {(0, 2, 1), (3, 2, 1)}
    assert of_shape((), 5) == {(1,)}
    assert of_shape((2, 0), 5) == {(2, 0, 1)}
    assert {f["q"].shape for f in drawn(fields_of(MIXED, (2, 3)), 5)} == {(2, 3, 2)}


def test_finite_means_no_nan_and_no_infinity():
    finite = lambda f: np.isfinite(f["d"]).all() and np.isfinite(f["m"]).all()
    assert not all(map(finite, drawn(fields_of(MIXED, ONE), 500))) and all(
        map(finite, drawn(fields_of(MIXED, ONE, finite=True)))
    )
    assert all(finite(MIXED.unpack(units)) for units in drawn(units_of(MIXED, finite=True)))
    with pytest.raises(ValueError, match="exclude each other"):
        units_of(MIXED, finite=True, any_bytes=True)


def test_bits_without_an_owner_are_zero_but_in_any_bytes():
    loose = lambda units: (units[:, 6] >> 6 | units[:, 7]).any()
    assert not any(map(loose, drawn(units_of(MIXED))))
    assert any(map(loose, drawn(units_of(MIXED, any_bytes=True))))


def test_a_wrong_reader_is_found_with_a_small_example():
    def swapped(units):
        return Q4_0.decode(np.concatenate([units[:, :2], units[:, 2:] >> 4 | units[:, 2:] << 4], axis=1))

    wrong = lambda units: (swapped(units) != Q4_0.decode(units)).any()
    search = settings(max_examples=200, derandomize=True, database=None)
    assert find(units_of(Q4_0.layout, finite=True), wrong, settings=search).shape == (1, 18)
