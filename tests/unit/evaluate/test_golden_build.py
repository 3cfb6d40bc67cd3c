"""Writing suites: exact rounding in the generators, stable bytes, and the promise of the version number."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.evaluate.golden.build import CaseSpec, check_version, format_json, render, values
from refllm.evaluate.golden.suite import read_suite
from refllm.evaluate.golden.suites import exact
from tests.golden_tiny import spec, write

RATIOS = st.builds(
    lambda a, b, e: Fraction(a, b) * Fraction(2) ** e,
    st.integers(-(2**40), 2**40), st.integers(1, 2**20), st.integers(-60, 10),
)  # fmt: skip


@given(RATIOS)
def test_to_f16_is_the_cast(x):
    """float64 holds the fraction to 53 bits; where that rounding matters for float16 the example is skipped."""
    if exact.f16_margin(x) < Fraction(1, 2**30):
        return
    with np.errstate(over="ignore"):
        cast = np.float16(float(x))
    if np.isinf(cast):
        with pytest.raises(OverflowError):
            exact.to_f16(x)
    else:
        assert float(exact.to_f16(x)) == float(cast)


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**24))
def test_to_f32_is_division_in_float32(a, b):
    a, b = float(np.float32(a)), float(b)
    assert float(exact.to_f32(Fraction(a) / Fraction(b))) == float(np.float32(a) / np.float32(b))


@pytest.mark.parametrize("bits", [0, 1, 2, 0x3FE, 0x3FF, 0x400, 0x3BFF, 0x3C00, 0x5555, 0x7BFD, 0x7BFE])
def test_f16_ties_and_neighbours(bits):
    low, high = np.uint16([bits, bits + 1]).view(np.float16)
    middle = (Fraction(float(low)) + Fraction(float(high))) / 2
    even = low if bits % 2 == 0 else high
    assert exact.to_f16(middle) == Fraction(float(even)) and exact.f16_margin(middle) == 0
    assert exact.to_f16(middle + Fraction(1, 2**60)) == Fraction(float(high))


@given(st.fractions(-100, 100))
def test_nearest(x):
    even, away = exact.nearest(x), exact.nearest(x, "away")
    assert abs(even - x) <= Fraction(1, 2) and abs(away - x) <= Fraction(1, 2)
    if abs(even - x) == Fraction(1, 2):
        assert even % 2 == 0 and abs(away) > abs(x)
    else:
        assert even == away
    assert exact.nearest(-x) == -even and exact.nearest(-x, "away") == -away


def test_values_refuse_what_the_type_cannot_hold():
    for dtype, bad in (("u8", [256]), ("u8", [-1]), ("f32", [0.1]), ("f16", [65520.0]), ("i8", [-129])):
        with pytest.raises(ValueError, match="does not fit"):
            values(dtype, bad)
    assert np.isnan(values("f32", [float("nan")]).array[0])


def test_same_spec_same_bytes_and_back(tmp_path):
    assert render(spec()) == render(spec())
    suite = read_suite(write(tmp_path), "demo/double")
    for case in suite.cases:
        for name, array in suite.inputs(case).items():
            wanted = {c.id: c for c in spec().groups[0][1]}[case.id].inputs[name].array
            assert np.array_equal(array.view(np.uint8), wanted.view(np.uint8))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    )
)
def test_format_json_is_json(value):
    assert json.loads(format_json(value, width=20)) == value


def manifest(version, extra=(), change=lambda m: None):
    made = json.loads(render(spec(version, extra))["demo/double.json"])
    change(made)
    return made


NEW = CaseSpec(9, "new", ("Basic",), {"x": values("f32", [3])}, result="invalid", error="any")


@pytest.mark.parametrize(
    ("extra", "change", "needs"),
    [
        ((), lambda m: None, "1.2.3"),
        ((), lambda m: m.update(title="Two times"), "1.2.4"),
        ((), lambda m: m["groups"][0]["cases"][0].update(comment="reworded", flags=["Long"]), "1.2.4"),
        ((NEW,), lambda m: None, "1.3.0"),
        ((), lambda m: m["groups"][0]["cases"].pop(), "2.0.0"),
        ((), lambda m: m["groups"][0]["cases"][0].update(id=8), "2.0.0"),
        ((), lambda m: m["groups"][0]["cases"][0].update(result="acceptable"), "2.0.0"),
        ((), lambda m: m["groups"][0]["params"].update(times=3), "2.0.0"),
        ((), lambda m: m["groups"][0]["cases"][0]["inputs"]["x"].update(sha256="0" * 64), "2.0.0"),
        ((), lambda m: m["groups"][0]["cases"][0]["expected"]["y"]["compare"].update(zero_sign="ignore"), "2.0.0"),
    ],
)
def test_the_version_number_keeps_its_promise(extra, change, needs):
    old = manifest("1.2.3")
    order = ["1.2.3", "1.2.4", "1.3.0", "2.0.0"]
    for version in order:
        new = manifest(version, extra, change)
        if order.index(version) >= order.index(needs):
            check_version(old, new)
        else:
            with pytest.raises(ValueError, match=r"part of suite_version above 1\.2\.3"):
                check_version(old, new)


def test_moving_an_array_into_the_data_file_changes_nothing_that_was_promised():
    old, new = manifest("1.0.0"), manifest("1.0.1")
    entry = new["groups"][0]["cases"][0]["inputs"]["x"]
    entry["key"] = "1/x"
    del entry["inline"]
    check_version(old, new)


def test_the_first_clear_seed_is_taken_and_real_errors_are_passed_on():
    def make(seed):
        if seed < 7:
            raise exact.Unclear("near a tie")
        return 10 * seed

    assert exact.first_clear(make, 3) == 70 and exact.first_clear(make, 8) == 80
    with pytest.raises(ValueError, match=r"no seed from -20000 on .*: near a tie"):
        exact.first_clear(make, -20000)
    with pytest.raises(ValueError, match="does not fit u8"):
        exact.first_clear(lambda seed: values("u8", [[300]]) if seed else make(0), 0)
