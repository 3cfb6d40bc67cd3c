"""The catalogue: one name throughout - module, lesson, tests and vectors of every method exist."""

import re
from pathlib import Path

import pytest

from refllm.methods.catalogue import _lines, _summary, catalogue
from refllm.methods.recipes import FAMILIES, WEIGHT_FAMILIES, methods

ROOT = Path(__file__).resolve().parents[3]
ENTRIES = {entry["name"]: entry for entry in catalogue()}
# Methods that have no golden vectors yet. This set only shrinks: a method with vectors must not stand in it.
WITHOUT_GOLDEN: set[str] = set()
every_method = pytest.mark.parametrize("name", sorted(ENTRIES))


def test_every_method_of_every_family_is_listed_once():
    assert set(ENTRIES) == set(methods()) and len(catalogue()) == len(ENTRIES)
    assert {entry["family"] for entry in catalogue()} == set(FAMILIES)


@every_method
@pytest.mark.parametrize("kind", ["module", "lesson", "tests"])
def test_module_lesson_and_tests_exist(name, kind):
    path = ENTRIES[name][kind]
    assert "\\" not in path and (ROOT / path).is_file(), f"{name}: {kind} {path} is missing"


@every_method
def test_golden_vectors_exist_or_are_known_to_be_missing(name):
    path = ENTRIES[name]["golden"]
    if path is None:
        assert name in WITHOUT_GOLDEN, f"{name}: write vectors and name them in a line Golden: FAMILY/NAME"
    else:
        assert name not in WITHOUT_GOLDEN, f"{name} has vectors: take it out of WITHOUT_GOLDEN"
        assert (ROOT / path).is_file(), f"{name}: golden {path} is missing"
        assert (ROOT / path).with_suffix(".safetensors").is_file()


@every_method
def test_entries_are_complete(name):
    entry = ENTRIES[name]
    assert list(entry) == "name family summary stage rows paper module lesson tests golden".split()
    assert entry["module"].startswith(f"refllm/methods/{entry['family']}/")
    assert all(isinstance(row, int) and 1 <= row <= 120 for row in entry["rows"])
    assert re.search(r"\b(19|20)\d\d, \"", entry["paper"]), entry["paper"]
    assert re.search(r"prefill|decode|memory", entry["stage"])
    for key in ("summary", "stage", "paper"):
        assert entry[key] and "\n" not in entry[key] and "  " not in entry[key]
    # Nothing of the lines that follow has slipped in.
    assert not re.search(r"(Differs|Also|Stage|Inventory|Lesson|Golden|Baseline)\b.*:", entry["paper"])


@every_method
def test_the_lesson_names_its_module(name):
    """A reader of the chapter finds the code, and a method cannot point to a chapter that is about something else."""
    text = (ROOT / ENTRIES[name]["lesson"]).read_text(encoding="utf-8")
    assert re.search(rf"\b({name}|{Path(ENTRIES[name]['module']).stem})\b", text)


@pytest.mark.parametrize("name", sorted(n for n, e in ENTRIES.items() if e["family"] in WEIGHT_FAMILIES))
def test_weight_methods_name_their_baseline(name):
    source = (ROOT / ENTRIES[name]["module"]).read_text(encoding="utf-8")
    assert re.search(r"^Baseline: \S", source, re.MULTILINE)


def test_known_entries():
    rtn = ENTRIES["rtn"]
    assert rtn["rows"] == [3] and rtn["family"] == "quant"
    assert rtn["tests"] == "tests/unit/methods/quant/test_rtn.py"
    assert rtn["golden"] == "data/golden/quant/rtn.json"
    assert rtn["summary"].startswith("round every weight to the nearest point")
    assert ENTRIES["wanda"]["rows"] == [50] and ENTRIES["svd"]["rows"] == [78] and ENTRIES["magnitude"]["rows"] == []


def test_lines_are_read_up_to_the_next():
    doc = """twin: does this.

    Idea: not a line of ours.

    Paper: A 2020, "T",
    arXiv:1, section 2.
    Also: B 2021.
    Stage: decode
    Inventory: 1, 2
    Differs from A: nothing.
    Lesson: lessons/01-a.md

    Golden: is part of no paragraph above
    """
    assert _lines(doc) == {
        "Paper": 'A 2020, "T", arXiv:1, section 2.',
        "Stage": "decode",
        "Inventory": "1, 2",
        "Lesson": "lessons/01-a.md",
        "Golden": "is part of no paragraph above",
    }
    assert _lines(None) == {}
    assert _summary("twin", doc, None) == "does this."
    assert _summary("other", doc, "The other one.\n\nMore.") == "The other one."
