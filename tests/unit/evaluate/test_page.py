"""Pages of measurements: their commands are found and are commands, and only their output is replaced."""

import shlex
from pathlib import Path

import pytest

from refllm.cli import build_parser
from refllm.evaluate import page
from refllm.methods.recipes import parse

DOCS = Path(__file__).parents[3] / "docs"
TEXT = "# A\n```console\n$ refllm bench decode\nold\n```\nwords\n```console\n$ refllm bench decode --threads 2\n```\n"


def done(code=0, out="new\n", err=""):
    return type("Done", (), {"returncode": code, "stdout": out, "stderr": err})


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("benchmarks.md", {"bandwidth", "kernels", "decode", "prefill", "quantize"}),
        ("benchmarks-avx2.md", {"bandwidth", "kernels", "decode", "prefill"}),
    ],
)
def test_every_command_of_a_document_is_one(name, kinds):
    text = (DOCS / name).read_text("utf-8")
    found = page.commands(text)
    parsed = [build_parser().parse_args(shlex.split(command)) for command in found]
    assert {args.what for args in parsed} == kinds
    assert len(set(found)) == len(found)
    for args in parsed:
        assert args.plot is None or f"]({args.plot.removeprefix('docs/')})" in text


@pytest.mark.parametrize("path", sorted((DOCS / "results").glob("*.md")), ids=lambda path: path.stem)
def test_every_recipe_of_the_results_is_one(path):
    text = path.read_text("utf-8")
    found = page.commands(text)
    assert found and len(set(found)) == len(found)
    for command in found:
        args = build_parser().parse_args(shlex.split(command))
        assert args.plot is None or f"](../{args.plot.removeprefix('docs/')})" in text
        for recipe in args.recipes:
            parse(recipe)
            assert f"\n{recipe} " in text  # it has a row


def test_output_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(page, "run_quietly", lambda command: ran.append(command) or f"{len(ran)} measured\n\n")
    path = tmp_path / "page.md"
    path.write_text(TEXT, encoding="utf-8")
    page.main([str(path), "--threads"])
    assert ran == ["bench decode --threads 2"]
    assert path.read_text("utf-8") == TEXT.replace("--threads 2\n", "--threads 2\n1 measured\n")
    page.main([str(path)])
    assert path.read_text("utf-8") == TEXT.replace("old", "2 measured").replace(
        "--threads 2\n", "--threads 2\n3 measured\n"
    )


def test_what_was_disturbed_is_repeated(monkeypatch, capsys):
    noisy = done(err="other work took 40% of the processors while this was measured: repeat it on a quiet machine\n")
    answers = [noisy, done()]
    monkeypatch.setattr(page.subprocess, "run", lambda *a, **k: answers.pop(0))
    assert page.run_quietly("bench decode") == "new\n"
    answers = [noisy] * 3
    with pytest.raises(RuntimeError, match="refllm bench decode: disturbed by other work 3 times"):
        page.run_quietly("bench decode")
    answers = [done(code=1, err="refllm: error: no\n")]
    with pytest.raises(RuntimeError, match="refllm bench decode: refllm: error: no"):
        page.run_quietly("bench decode")
    with pytest.raises(SystemExit):
        page.main([])
