"""The doctor on mistakes with integers, lists of values and stochastic rounding, written by others than its rules."""

import numpy as np
import pytest

from refllm.evaluate.golden.compare import Expected, mismatch
from refllm.evaluate.golden.doctor import Memory, _predicted, _returned, diagnose
from refllm.evaluate.golden.mistakes import MISTAKES
from refllm.evaluate.golden.own import implementation
from refllm.evaluate.golden.runner import python_call
from refllm.evaluate.golden.suite import default_root, read_suite
from tests import golden_mutants_small as mutants

SUITES = {
    suite.manifest["op"]: suite
    for suite in (read_suite(default_root(), f"formats/{name}") for name in
                  ("small_numbers", "small_numbers_decode", "stochastic"))
}  # fmt: skip
# What the mutants of the suites are called; "" is none of the known mistakes.
NAMES = {
    "formats.number.encode": {
        "offset_binary": "twos-complement",
        "ties_away": "ties-away",
        "ties_zero": "ties-toward-zero",
        "floor_of_half_more": "ties-up",
        "ties_upper": "midpoint-side",
        "exact_middles": "wide-arithmetic",
        "truncates": "truncation",
        "via_float16": "double-rounding",
        "via_float32": "double-rounding",
        "wraps": "no-clip",
        "sign_bit_of_zero": "negative-zero-made",
        "flushes_subnormals": "subnormals-flushed",
        "infinity_is_zero": "nonfinite-cast",
        "nan_is_largest": "nonfinite-cast",
        "no_params_check": "not-rejected",
        "noise": "",
    },
    "formats.number.decode": {
        "one_off": "",
        "unsigned": "unsigned-for-signed",
        "offset_binary": "twos-complement",
        "float16_table": "narrow-table",
        "e2m1": "fp4-tables-confused",
        "small_is_half_of_next": "fp4-smallest",
        "negative_zero": "negative-zero-made",
        "cuts_codes": "not-rejected",
        "no_params_check": "not-rejected",
    },
    "formats.number.stochastic": {
        "moves_grid_points": "",
        "dithers_both_ways": "",
        "nearest": "not-stochastic",
        "coin": "chance-of-half",
        "reversed": "chance-reversed",
        "eight_random_levels": "few-random-bits",
        "floor_with_magnitude": "chance-of-sign",
        "step_of_next_binade": "step-of-next-binade",
        "flushes_subnormals": "subnormals-flushed",
        "wraps": "does-not-saturate",
        "off_center": "",
        "no_params_check": "not-rejected",
    },
}


@pytest.fixture(scope="module")
def memories():
    """Predictions, made once for each suite."""
    return {op: Memory() for op in SUITES}


def found(op, function, memory):
    with np.errstate(all="ignore"):
        (diagnosis,) = diagnose([SUITES[op]], python_call(function), memory=memory)
    assert diagnosis.failed
    return diagnosis


def test_every_mutant_has_a_name():
    assert {op: list(names) for op, names in NAMES.items()} == {op: list(bugs) for op, bugs in mutants.BUGS.items()}
    assert {name for names in NAMES.values() for name in names.values()} - {""} <= MISTAKES.keys()


@pytest.mark.parametrize(("op", "bug"), [(op, bug) for op, names in NAMES.items() for bug in names])
def test_the_doctor_names_the_mutants(op, bug, memories):
    wrong = lambda op, params, inputs: mutants.OPS[op](bug, params, *inputs.values())
    diagnosis, name = found(op, wrong, memories[op]), NAMES[op][bug]
    if name:
        assert diagnosis.names == {name}
    else:  # at most a guess at few of the cases
        assert len(diagnosis.unexplained) >= 0.9 * diagnosis.failed


def only(params, *formats):
    if params["format"] not in formats:
        raise NotImplementedError(params["format"])


def narrow_range(op, params, x):
    only(params, "INT4")
    return {"codes": (np.clip(np.rint(np.nan_to_num(x)), -7, 7).astype(int) & 15).astype(np.uint8)}


def sign_magnitude(op, params, codes):
    only(params, "INT4", "INT8")
    sign = 8 if params["format"] == "INT4" else 128
    return {"x": (np.where(codes & sign, -1, 1) * (codes & sign - 1).astype(int)).astype(np.float32)}


def uniform(op, params, x):
    only(params, "NF4")
    return {"codes": np.rint((np.clip(x.astype(float), -1, 1) + 1) * 7.5).astype(np.uint8)}


def inverted(op, params, codes):
    only(params, "BINARY")
    if codes.max() > 1:
        raise ValueError("no such code")
    return {"x": 1 - 2 * codes.astype(np.float32)}


def wide_noise(op, params, x):
    only(params, "INT8")
    u = np.random.default_rng(1).uniform(-1, 1, (len(x), params["n"]))
    number = np.clip(np.rint(x[:, None] + u), -128, 127)
    return {"codes": number.astype(np.int8).view(np.uint8), "x_hat": number.astype(np.float32)}


def confused(op, params, x):
    only(params, "FP8_E4M3FN")
    return implementation(op, params | {"format": "FP8_E5M2"}, {"x": x})


@pytest.mark.parametrize(
    ("op", "wrong", "name"),
    [
        ("formats.number.encode", narrow_range, "narrow-range"),
        ("formats.number.encode", uniform, "uniform-for-list"),
        ("formats.number.decode", sign_magnitude, "sign-magnitude"),
        ("formats.number.decode", inverted, "binary-inverted"),
        ("formats.number.stochastic", wide_noise, "noise-too-wide"),
        ("formats.number.stochastic", confused, "e4m3-e5m2-confused"),
    ],
)
def test_other_mistakes(op, wrong, name, memories):
    given = lambda op, params, inputs: wrong(op, params, **inputs)
    assert name in found(op, given, memories[op]).names


def test_a_rejected_input_that_may_be_rejected_speaks_against_nothing(memories):
    """Who refuses NaN has not shown what codes he would have made of it."""

    def refuses(op, params, inputs):
        only(params, "INT4")
        if not np.isfinite(inputs["x"]).all():
            raise ValueError("not finite")
        return {"codes": implementation(op, params, inputs)["codes"] ^ np.uint8(8)}

    (finding,) = found("formats.number.encode", refuses, memories["formats.number.encode"]).findings
    assert finding.mistake.name == "twos-complement" and finding.contradicted == ()


def test_random_answers_and_their_distribution():
    """A distribution is predicted as it is, answers become theirs; the typical answers to it pass."""
    chi2 = {"class": "statistical", "test": "chi2", "n": 1000, "alpha": 1e-6}
    right = Expected(np.float32([[0.25, 0.75, 0], [0, 0.5, 0.5]]), "f32", chi2)
    typical = _returned(right)
    assert typical.dtype == np.uint8 and mismatch(typical, right) is None
    assert [np.bincount(row, minlength=3).tolist() for row in typical] == [[250, 750, 0], [0, 500, 500]]
    np.testing.assert_array_equal(_predicted(typical, right).array, right.array)
    mean = Expected(
        np.float32([1.5]), "f32", {"class": "statistical", "test": "mean", "n": 4, "alpha": 1e-6, "bound": 1}
    )
    assert _returned(mean).tolist() == [[1.5] * 4]
    assert _predicted(np.float32([[1, 2, 1, 2]]), mean).array.tolist() == [1.5]
    assert _predicted(right, mean) is right
