"""The doctor: honest about what it knows, and robust against odd cases and answers."""

import json

import numpy as np
import pytest

from refllm.evaluate.golden.doctor import diagnose, diagnose_array, given_by
from refllm.evaluate.golden.doctor_report import diagnosis_json, diagnosis_text
from refllm.evaluate.golden.mistakes import MISTAKES, PREDICTORS, arrays
from refllm.evaluate.golden.mistakes.arrays import View
from refllm.evaluate.golden.programs import program_call
from refllm.evaluate.golden.runner import python_call
from refllm.evaluate.golden.suite import default_root, read_suite, read_suites
from tests.golden_tiny import double, write


@pytest.fixture(scope="module")
def predicted():
    """(mistakes predicted for shipped cases, predictors that raise); every third case."""
    named, raised = set(), []
    for suite in read_suites(default_root()):
        for case in suite.cases[:: 3 if len(suite.cases) > 60 else 1]:
            if case.result == "invalid":
                continue
            known = given_by(suite, case, {})
            for predict in PREDICTORS:
                try:
                    with np.errstate(all="ignore"):
                        named |= {hypothesis.mistake for hypothesis in predict(known)}
                except Exception as error:
                    raised.append((case.name, predict.__module__, repr(error)))
    return named, raised


def test_no_predictor_stumbles_over_a_shipped_case(predicted):
    assert predicted[1] == []


def test_the_catalogue_has_no_entry_that_nothing_predicts_and_the_reverse(predicted):
    by_kind = {"not-rejected", "wrongly-rejected", "no-answer"}
    assert MISTAKES.keys() - predicted[0] - by_kind == set()
    assert predicted[0] - MISTAKES.keys() == set()


def test_mistakes_say_how_to_mend_them():
    for mistake in MISTAKES.values():
        assert mistake.sentence.endswith(".") and mistake.mend.endswith(".") and len(mistake.sentence) < 130
        assert all(url.startswith("https://") for url in mistake.urls)


@pytest.fixture
def suites(tmp_path):
    return list(read_suites(write(tmp_path / "vectors")))


def diagnosis(suites, function, **options):
    (found,) = diagnose(suites, python_call(function), **options)
    return found


def test_a_healthy_implementation(suites):
    found = diagnosis(suites, double)
    assert (found.passed, found.failed, found.findings, found.unexplained) == (5, 0, (), ())
    assert diagnosis_text(found) == "demo/double: nothing is wrong, 5 pass, 0 skip"


def test_an_unknown_mistake_is_said_to_be_unknown(suites):
    found = diagnosis(suites, lambda *a: {"y": double(*a)["y"] + np.float32(0.37)})
    assert found.findings == () and found.unexplained == tuple(f"demo/double#{i}" for i in (1, 2, 7))
    assert diagnosis_text(found).endswith("no known mistake explains #1, #2, #7")


def test_a_general_mistake_is_found_for_an_op_refllm_does_not_have(suites):
    found = diagnosis(suites, lambda *a: {"y": 2 * double(*a)["y"]})
    assert found.findings[0].mistake.name == "factor-of-two" and len(found.findings[0].cases) == 3


def test_another_convention_is_named_with_its_declaration(suites):
    def minus(op, params, inputs):
        y = double(op, params, inputs)["y"]
        return {"y": -y if inputs["x"].tolist() == [1, 2] else y}

    found = diagnosis(suites, minus)
    assert (found.findings[0].mistake.name, found.findings[0].where) == ("other-convention", "--declare sign=minus")
    assert diagnosis(suites, minus, declared={"sign": "minus"}).failed == 0


def test_two_mistakes_are_both_found(suites):
    def two(op, params, inputs):
        x = inputs["x"]
        y = (2 * x).astype(np.float32)  # NaN is accepted
        return {"y": y.byteswap() if x.size == 40 else 2 * y}

    names = [finding.mistake.name for finding in diagnosis(suites, two).findings]
    assert names == ["factor-of-two", "bytes-reversed", "not-rejected"] or set(names) == {
        "factor-of-two", "bytes-reversed", "not-rejected"
    }  # fmt: skip


def test_a_prediction_that_passing_cases_contradict_counts_less(suites):
    found = diagnosis(suites, lambda *a: {"y": double(*a)["y"] * (2 if a[2]["x"].size == 40 else 1)})
    assert found.findings == () and found.unexplained == ("demo/double#2",)


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (lambda *a: 1 / 0, "no-answer"),
        (lambda *a: "text", "no-answer"),
        (lambda *a: {"y": np.float64(double(*a)["y"])}, "wrong-dtype"),
    ],
)
def test_crashes_garbage_and_types(suites, answer, name):
    assert diagnosis(suites, answer).findings[0].mistake.name == name


def test_missing_outputs_and_wrong_shapes_are_not_explained_away(suites):
    for answer in (lambda *a: {}, lambda *a: {"z": double(*a)["y"]}, lambda *a: {"y": np.zeros((3, 0), np.float32)}):
        found = diagnosis(suites, answer)
        assert {finding.mistake.name for finding in found.findings} <= {"not-rejected"} and len(found.unexplained) >= 3


def test_refusing_everything(suites):
    def refuse(op, params, inputs):
        raise ValueError("no")

    found = diagnosis(suites, refuse)
    assert [finding.mistake.name for finding in found.findings] == ["wrongly-rejected"]


def test_a_program_that_hangs_is_one_finding_among_others(suites, tmp_path):
    (tmp_path / "p.py").write_text(
        "import json, sys, time\nr = json.load(open(sys.argv[-1]))\n"
        "raw = open(r['inputs'], 'rb').read()\n"
        "time.sleep(60) if b'[40]' in raw else sys.exit(7)\n"
    )
    import sys

    call = program_call([sys.executable, "-S", str(tmp_path / "p.py")], 1.0)
    (found,) = diagnose(suites, call)
    assert found.failed == 5 and found.findings[0].mistake.name == "no-answer" and len(found.findings[0].cases) == 5


def test_one_array(suites):
    (suite,) = suites
    case = next(case for case in suite.cases if case.id == 1)
    found = diagnose_array(suite, case, "y", np.float32([6, -8]))
    assert found.names == {"factor-of-two"} and (found.failed, found.passed) == (1, 0)
    assert diagnose_array(suite, case, "y", np.float32([3, -4])).failed == 0


def test_json_of_a_diagnosis_is_json(suites):
    found = json.loads(json.dumps(diagnosis_json(diagnosis(suites, lambda *a: {"y": 2 * double(*a)["y"]}))))
    assert found["suite"] == "demo/double" and found["fail"] == 3
    first = found["findings"][0]
    assert first["mistake"] == "factor-of-two" and first["links"][0].startswith("https://") and len(first["cases"]) == 3


def change(name, array, dtype="u8", is_output=False, **params):
    """The arrays that a change makes of one."""
    (how,) = [how for mistake, how in arrays.CHANGES if mistake == name][:1]
    return [made.tolist() for _, made in how(View(array, "codes", dtype, is_output, params))]


def test_awq_order_of_an_output_and_of_an_input_are_inverse():
    linear, awq = np.uint32([[0x76543210]]), np.uint32([[0x75316420]])
    assert change("awq-order-missing", awq, "u32", True) == [linear.tolist()]
    assert change("awq-order-unwanted", linear, "u32", True) == [awq.tolist()]
    read = change("awq-order-missing", awq, "u32")[0]  # what the right reader must get to see 0 2 4 6 1 3 5 7
    assert change("awq-order-missing", np.uint32(read), "u32", True) == [awq.tolist()]


def test_halves_and_pairs_are_inverse():
    block = np.arange(16, dtype=np.uint8)[None] * 17
    runs = change("halves-as-pairs", block, is_output=True)
    assert block.tolist() in [change("pairs-as-halves", np.uint8(run), is_output=True)[i] for i, run in enumerate(runs)]
    assert change("halves-as-pairs", block) == change("pairs-as-halves", block, is_output=True)
    assert change("nibbles-swapped", np.uint8([[0x21]]))[0] == [[0x12]]


def test_the_doctor_needs_no_numbers_to_be_finite():
    suite = read_suite(default_root(), "attention/flash")
    nan = lambda op, params, inputs: {"o": np.full_like(inputs["q"], np.nan)}
    (found,) = diagnose([suite], python_call(nan), outputs={"o"})
    assert found.failed > 10
