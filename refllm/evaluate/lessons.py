"""Lessons: Markdown whose code runs, whose printed output is compared, and whose quotations are the real source.

    ```python            runs; all blocks of a page share one namespace, and a traceback points into the page
    ~~~python            is shown and not run
    ```text              what the code since the last such block printed; numbers may differ by 1%
    <!-- source: refllm/kernels/nn.py:softmax -->    the next ```python block is that definition without its docstring,
                         word for word; it is not run

A page runs in an empty folder that holds an empty `img`, so what it saves there stays out of the way.
`python -m refllm.evaluate.lessons PAGE ...` writes outputs, quotations and the figures saved in `img` into the lessons.
"""

import ast
import inspect
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from refllm.formats.files import atomic_write

TOLERANCE = 0.01
_FENCE = re.compile(r"^(```|~~~)(\w*)\s*$")
_SOURCE = re.compile(r"^<!--\s*source:\s*(\S+?):([\w.]+)\s*-->$")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class LessonError(ValueError):
    """A page whose code, output or quotation is not what it says; the message begins with file:line."""


@dataclass(frozen=True)
class Block:
    """A fenced block: `kind` is python, text, source or another language; `line` is that of its first line, from 1."""

    kind: str
    text: str
    line: int
    source: str = ""


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page.

    Raises
    ------
    LessonError
        A fence that is not closed, a source comment without a block.
    """
    lines = page.splitlines()
    i, source = 0, ""
    while i < len(lines):
        if found := _SOURCE.match(lines[i].strip()):
            source = f"{found[1]}:{found[2]}"
        elif fence := _FENCE.match(lines[i]):
            end = next((j for j in range(i + 1, len(lines)) if lines[j].rstrip() == fence[1]), None)
            if end is None:
                raise LessonError(f"{i + 1}: this fence is not closed")
            kind = fence[2] if fence[1] == "```" else "shown"
            text = "".join(line + "\n" for line in lines[i + 1 : end])
            yield Block("source" if source else kind, text, i + 2, source)
            i, source = end, ""
        elif source and lines[i].strip():
            raise LessonError(f"{i + 1}: the source comment above must stand right before its ```python block")
        i += 1
    if source:
        raise LessonError(f"{len(lines)}: a source comment without a block")


def quotation(source: str) -> str:
    """The text of `path.py:name` or `path.py:Class.method`: no docstring, common indentation removed."""
    path, _, name = source.rpartition(":")
    if not re.fullmatch(r"refllm(/\w+)+\.py", path):
        raise LessonError(f"source {path!r} is not a file of refllm such as refllm/kernels/nn.py")
    try:
        value = import_module(path.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            value = getattr(value, part)
        text = inspect.getsource(inspect.unwrap(value))
    except (ImportError, AttributeError, TypeError) as error:
        raise LessonError(f"there is no source {source}: {error}") from None
    return _without_docstring(inspect.cleandoc("\n" + text)) + "\n"


def _without_docstring(text: str) -> str:
    definition = ast.parse(text).body[0]
    if not isinstance(definition, ast.FunctionDef | ast.ClassDef) or ast.get_docstring(definition) is None:
        return text
    first, lines = definition.body[0], text.splitlines()
    return "\n".join(lines[: first.lineno - 1] + lines[first.end_lineno :])


def same_output(expected: str, actual: str) -> str | None:
    """What differs between two outputs, or None: words exactly, spaces loosely, numbers within 1%.

    Examples
    --------
    >>> same_output("loss 2.00", "loss  2.01") is None, same_output("loss 2.00", "loss 2.1")
    (True, "expected 'loss 2.00', got 'loss 2.1'")
    """
    first, second = (text.strip("\n").splitlines() for text in (expected, actual))
    for i in range(max(len(first), len(second))):
        a, b = (lines[i].rstrip() if i < len(lines) else None for lines in (first, second))
        if a is None or b is None:
            return _tail(first[i:], second[i:])
        if not _same_line(a, b):
            return f"expected {a!r}, got {b!r}"
    return None


def _tail(page: list[str], printed: list[str]) -> str:
    """What is left over where one text ends before the other; one of the two is empty."""
    lines, word = (printed, "more") if printed else (page, "fewer")
    count = f"one {word} line" if len(lines) == 1 else f"{len(lines)} {word} lines"
    return f"the code prints {count} than the page: {lines[0]!r}"


def _same_line(a: str, b: str) -> bool:
    words = lambda line: re.sub(r"\s*#\s*", "#", re.sub(r"\s+", " ", _NUMBER.sub("#", line))).strip()
    numbers = lambda line: [float(text.replace(",", "")) for text in _NUMBER.findall(line)]
    if words(a) != words(b):
        return False
    return all(abs(x - y) <= TOLERANCE * abs(x) for x, y in zip(numbers(a), numbers(b), strict=True))


def run(path: str | Path, *, write: bool = False) -> str:
    """Run a page and check it.

    Parameters
    ----------
    path : path
        A Markdown file.
    write : bool
        Instead of checking outputs and quotations, put the present ones into the page.

    Returns
    -------
    str
        Everything it printed.

    Raises
    ------
    LessonError
        file:line and what is wrong. An exception of the code itself comes through; its traceback points into the page.
    """
    path = Path(path).resolve()
    page = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="refllm-", ignore_cleanup_errors=True) as folder:
        images = Path(folder, "img")
        images.mkdir()
        try:
            everything, replaced = _run_blocks(page, path, images.parent, write)
        except LessonError as error:
            raise LessonError(f"{path}:{error}") from None
        if write:
            _write(path, page, replaced)
            shutil.copytree(images, path.parent / "img", dirs_exist_ok=True)
    return everything


def _run_blocks(page: str, path: Path, folder: Path, write: bool) -> tuple[str, list[tuple[Block, str]]]:
    """Everything printed, and with `write` the present text of every output and quotation."""
    space: dict = {"__name__": "__lesson__", "__file__": str(path)}
    printed, everything, replaced = "", "", []
    for block in blocks(page):
        if block.kind == "python":
            output = _execute(block, path, space, folder)
            printed, everything = printed + output, everything + output
        elif block.kind in ("text", "source"):
            actual = quotation(block.source) if block.kind == "source" else printed
            printed = printed if block.kind == "source" else ""
            if write:
                replaced.append((block, actual.strip("\n") + "\n"))
            else:
                _check(block, actual)
    return everything, replaced


def _execute(block: Block, path: Path, space: dict, folder: Path) -> str:
    # Blank lines in front give every statement the line number it has in the page.
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    with io.StringIO() as output, redirect_stdout(output), chdir(folder):
        exec(code, space)
        return output.getvalue()


def _check(block: Block, actual: str) -> None:
    if block.kind == "text":
        wrong = same_output(block.text, actual)
        if wrong:
            raise LessonError(f"{block.line}: {wrong}")
    elif block.text.strip("\n") != actual.strip("\n"):
        raise LessonError(f"{block.line}: this is no longer the source of {block.source}")


def _write(path: Path, page: str, replaced: list[tuple[Block, str]]) -> None:
    lines = page.splitlines(keepends=True)
    for block, text in reversed(replaced):
        start = block.line - 1
        lines[start : start + len(block.text.splitlines())] = [text]
    with atomic_write(path, "w") as file:
        file.write("".join(lines))


def lessons() -> list[Path]:
    """The chapters, in order: in a checkout, or those an installed refllm carries."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "lessons", package.parent / "lessons"):
        if pages := sorted(folder.glob("[0-9][0-9]-*.md")):
            return pages
    return []


def title(path: Path) -> str:
    """The first heading of a page, without its mark."""
    with open(path, encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), path.stem)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(name, write=True)
        print(f"written: {name}")
