"""The catalogue of methods, read from their modules' docstrings: what `refllm methods` prints.

A module says what the table needs in lines of its own:

    name: one sentence.                                   the first line
    Paper: Author et al. YEAR, "Title", arXiv:ID, ...     one or more sources, may run over several lines
    Stage: prefill, decode                                what the method helps
    Inventory: 11, 12                                     rows of the inventory it covers, or "none, why"
    Lesson: lessons/07-name.md                            its chapter
    Golden: quant/rtn, quant/rtn_matmul                   its vectors under data/golden; left out where there are none

Where several methods share a module, a method's own docstring may repeat a line for itself.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from refllm.methods.recipes import methods

REQUIRED = ("Paper", "Stage", "Inventory", "Lesson")
_KEYS = (*REQUIRED, "Golden")
# A line ends where the next word with a colon, a remark on the differences, or an empty line begins.
_LINE = r"^{key}: (.+?)(?=\n(?:[A-Z][a-z]+:|Differs )|\n\s*\n|\s*\Z)"


def catalogue() -> list[dict]:
    """Every method, in the order of the families.

    Returns
    -------
    list of dict
        name, family, summary, stage, paper: str; rows: list of int (inventory); module, lesson, tests: path from the
        root of the repository, with forward slashes; golden: such a path or None, the first where there are several.

    Raises
    ------
    ValueError
        A docstring without one of the lines every module must have.

    Examples
    --------
    >>> [entry["module"] for entry in catalogue() if entry["name"] == "rtn"]
    ['refllm/methods/quant/rtn.py']
    """
    return [_entry(name, family, function) for name, (family, function) in methods().items()]


def _entry(name: str, family: str, function: Callable) -> dict:
    module = inspect.getmodule(function)
    lines = _lines(module.__doc__) | _lines(function.__doc__)
    if missing := [key for key in REQUIRED if key not in lines]:
        raise ValueError(
            f"{module.__name__}: the docstring lacks the line {missing[0]}: (see refllm.methods.catalogue)"
        )
    path = Path(*module.__name__.split("."))  # refllm/methods/FAMILY/MODULE
    tests = Path("tests", "unit", *path.parts[1:-1], f"test_{path.name}.py")
    rows = "" if lines["Inventory"].startswith("none") else lines["Inventory"]
    return {
        "name": name,
        "family": family,
        "summary": _summary(name, module.__doc__, function.__doc__),
        "stage": lines["Stage"],
        "rows": [int(row) for row in rows.split(",") if row.strip()],
        "paper": lines["Paper"],
        "module": path.with_suffix(".py").as_posix(),
        "lesson": lines["Lesson"],
        "tests": tests.as_posix(),
        "golden": _golden(lines)[0] if "Golden" in lines else None,
    }


def _lines(docstring: str | None) -> dict[str, str]:
    """The machine-read lines of a docstring, each as one line of text."""
    text = inspect.cleandoc(docstring or "")
    found = {key: re.search(_LINE.format(key=key), text, re.MULTILINE | re.DOTALL) for key in _KEYS}
    return {key: " ".join(match[1].split()) for key, match in found.items() if match}


def _golden(lines: dict[str, str]) -> list[str]:
    return [f"data/golden/{suite.strip()}.json" for suite in lines["Golden"].split(",")]


def _summary(name: str, of_module: str, of_function: str | None) -> str:
    """The sentence after "name: " in the module's first line, or the first line of the method's own docstring."""
    first = inspect.cleandoc(of_module).splitlines()[0]
    if first.startswith(f"{name}: "):
        return first.removeprefix(f"{name}: ")
    return inspect.cleandoc(of_function or "").splitlines()[0]
