"""Cases that an implementation is not asked (--skips) or known to fail (--xfails).

A file has one pattern a line, as the shell reads them: `quant/rtn#20`, `quant/rtn#3*` or `formats/*`; a line that
begins with `#` is a comment.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from refllm.evaluate.golden.runner import Result


def read_patterns(path: Path) -> list[str]:
    """The patterns of a file.

    Raises
    ------
    ValueError
        No such file, or no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def listed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names a case, `SUITE#ID`, or its suite."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.partition("#")[0], pattern) for pattern in patterns)


def unmatched(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Patterns that name no case."""
    names = list(names)
    return [pattern for pattern in patterns if not any(listed(name, [pattern]) for name in names)]


def expect_failures(results: Iterable[Result], patterns: list[str]) -> Iterator[Result]:
    """Results in which a failure that is listed is "xfail", and a pass that is listed "xpass"."""
    for result in results:
        if result.status in ("pass", "fail") and listed(result.case.name, patterns):
            result = replace(result, status=f"x{result.status}")
        yield result
