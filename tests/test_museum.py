"""The bug museum: every defect is caught by the vectors, and the doctor knows it."""

import inspect

import pytest

from refllm.evaluate.golden.doctor import Memory, diagnose
from refllm.evaluate.golden.mistakes import MISTAKES
from refllm.evaluate.golden.museum import MUTANTS
from refllm.evaluate.golden.museum.matrix import examine, matrix_json, matrix_text
from refllm.evaluate.golden.own import implementation
from refllm.evaluate.golden.runner import python_call
from refllm.evaluate.golden.suite import default_root, read_suite

SUITES = {name: read_suite(default_root(), name) for name in sorted({mutant.suite for mutant in MUTANTS.values()})}


@pytest.fixture(scope="module")
def rows():
    memory = Memory()
    return {mutant.name: examine(mutant, SUITES, memory) for mutant in MUTANTS.values()}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed_by_a_wrong_number(name, rows):
    """A crash, or an input that is refused, would say nothing about the defect."""
    found = rows[name].diagnosis
    assert found.failed > 0
    assert {finding.mistake.name for finding in found.findings} != {"no-answer"}
    assert any(finding.mistake.name not in ("no-answer", "wrongly-rejected") for finding in found.findings) or (
        found.unexplained
    )


def test_the_doctor_names_nine_of_ten(rows):
    wrong = [name for name, row in rows.items() if not row.named]
    assert len(wrong) <= 0.1 * len(rows), wrong


def test_the_doctor_is_not_vague(rows):
    """Level with the right mistake there are at most two others."""
    assert {name: row.diagnosis.names for name, row in rows.items() if len(row.diagnosis.names) > 3} == {}


def test_the_matrix_says_what_happened(rows):
    text, listed = matrix_text(list(rows.values())), matrix_json(list(rows.values()))
    assert text.endswith(f"{sum(row.named for row in rows.values())} named by the doctor (100 %)") or "WRONG" in text
    assert [entry["mutant"] for entry in listed] == list(MUTANTS) and all(entry["killed"] for entry in listed)
    assert text.count("\n") == len(MUTANTS) + 1


def test_the_right_answers_are_healthy():
    """No known mistake is found in refllm itself."""
    for found in diagnose(SUITES.values(), python_call(implementation)):
        assert (found.failed, found.findings, found.unexplained) == (0, (), ()) and found.passed > 5


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_an_exhibit_is_small_and_documented(mutant):
    source = inspect.getsource(mutant.answer)
    body = source[source.index("\ndef ") + 1 :]
    assert body.count("\n") <= 20
    assert set(mutant.mistakes) <= MISTAKES.keys() and mutant.mistakes
    assert 2016 <= mutant.year <= 2026 and mutant.links and mutant.story.endswith(".")
    assert all(link.startswith("https://github.com/") for link in mutant.links)


def test_there_are_enough_of_them():
    assert len(MUTANTS) >= 25 and len({mutant.suite.split("/")[0] for mutant in MUTANTS.values()}) >= 5
