"""Every docstring example of refllm runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent / "refllm"
TINY = ROOT.parent / "data/tiny/model.safetensors"
SKIP = {"refllm.__main__"}  # running it runs the command line


def module_names() -> list[str]:
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if name not in SKIP]


@pytest.mark.parametrize("name", module_names())
def test_examples(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    if 'load("tiny")' in Path(module.__file__).read_text(encoding="utf-8") and not TINY.exists():
        pytest.skip("an example loads the bundled model, which is not there yet")
    monkeypatch.chdir(tmp_path)  # an example that writes a file writes it there
    assert doctest.testmod(module, extraglobs={"np": np}).failed == 0


def test_examples_are_found_and_can_fail():
    assert doctest.testmod(importlib.import_module("refllm.kernels.nn")).attempted >= 6
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1
