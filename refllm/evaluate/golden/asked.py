"""What a command line of `refllm golden` asks for: folder, suites, cases, conventions, implementation."""

import os
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from refllm.evaluate.golden.suite import Case, Suite, default_root, read_suite, suite_names
from refllm.formats.names import meant

OK, FAILED, USAGE, NOTHING, CORRUPT = range(5)


class UsageError(ValueError):
    """A command line that cannot be carried out (exit code 2)."""


def folder(args) -> Path:
    """The folder of vectors that was asked for, else the shipped one. Raises UsageError if it is none."""
    if args.vectors is None:
        return default_root()
    if not args.vectors.is_dir():
        raise UsageError(f"--vectors {args.vectors} is not a folder")
    return args.vectors


def names_of(args, root: Path) -> list[str]:
    """The suites that were asked for, else all. Raises UsageError for one that does not exist."""
    known = suite_names(root)
    for name in args.suites:
        if name not in known:
            raise UsageError(f"unknown suite {name!r}{meant(name, known)}; known: {', '.join(known) or 'none'}")
    return args.suites or known


def find_case(root: Path, name: str) -> tuple[Suite, Case]:
    """The suite and the case that SUITE#ID names. Raises UsageError if there is no such case."""
    suite_name, _, number = name.partition("#")
    if suite_name not in (known := suite_names(root)):
        raise UsageError(f"unknown suite {suite_name!r}{meant(suite_name, known)}; known: {', '.join(known) or 'none'}")
    suite = read_suite(root, suite_name)
    for case in suite.cases:
        if str(case.id) == number:
            return suite, case
    ids = ", ".join(str(case.id) for case in suite.cases)
    raise UsageError(f"{suite_name} has no case {number or '(give SUITE#ID)'}; ids: {ids}")


def _selection(args, root: Path) -> tuple[list[Suite], set[str]]:
    """Suites to run, and the single cases asked for."""
    single = {name for name in args.suites if "#" in name}
    for name in single:
        find_case(root, name)
    args.suites = list(dict.fromkeys(name.partition("#")[0] for name in args.suites))
    suites = [read_suite(root, name) for name in names_of(args, root)]
    known = {flag for suite in suites for flag in suite.manifest["notes"]}
    for flag in args.flag:
        if flag not in known:
            raise UsageError(f"no case has the flag {flag!r}; flags: {', '.join(sorted(known))}")
    return suites, single


def declared_by(args, suites: list[Suite]) -> dict[str, str]:
    """The conventions declared by --declare, checked against what the suites ask for: {name: value}."""
    known: dict[str, set[str]] = {}
    for case in (case for suite in suites for case in suite.cases):
        for name in case.requires:
            known.setdefault(name, {"yes"})
        for output in case.expected.values():
            for variant in output.get("variants", ()):
                for key, value in variant["when"].items():
                    known.setdefault(key, set()).add(value)
    declared = dict(item.partition("=")[::2] for item in args.declare)
    for key, value in declared.items():
        if value not in known.get(key, ()):
            legal = [f"{k}={v}" for k in sorted(known) for v in sorted(known[k])]
            raise UsageError(
                f"--declare {key}={value} means nothing to these suites; known: {', '.join(legal) or 'none'}"
            )
    return declared


def implementation_of(args):
    """The function to judge: --impl, --exec, or refllm itself."""
    from refllm.evaluate.golden.own import implementation
    from refllm.evaluate.golden.programs import BatchCall, program_call
    from refllm.evaluate.golden.runner import python_call

    if args.exec is not None:
        if not args.exec or shutil.which(args.exec[0]) is None:
            raise UsageError(f"--exec: no program {args.exec[0] if args.exec else '(nothing given)'!r} found")
        if not 0 < args.timeout < 1e6:
            raise UsageError(f"--timeout must be a positive number of seconds, got {args.timeout:g}")
        wrap = BatchCall if args.batch else program_call
        return wrap(args.exec, args.timeout, args.format), " ".join(args.exec)
    if args.impl is None:
        return python_call(implementation), "refllm"
    module, colon, name = args.impl.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(import_module(module), name) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--impl {args.impl}: {error}") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise UsageError(f"--impl {args.impl}: MODULE:FUNCTION naming a function is expected")
    return python_call(function), args.impl


def chosen(args, root: Path) -> tuple[list[Suite], dict, set[str] | None, Callable[[Case], bool]]:
    """The suites asked for; what is declared, which outputs and which cases count."""
    suites, single = _selection(args, root)
    declared = declared_by(args, suites)
    wanted = None if args.outputs is None else set(args.outputs.split(","))
    known = {name for suite in suites for case in suite.cases for name in case.expected}
    if wanted and wanted - known:
        raise UsageError(f"no case expects {', '.join(sorted(wanted - known))}; outputs: {', '.join(sorted(known))}")
    whole = {name for name in args.suites if not any(one.startswith(f"{name}#") for one in single)}

    def keep(case: Case) -> bool:
        asked = not single or case.name in single or case.suite in whole
        return asked and all(flag in case.flags for flag in args.flag)

    return suites, declared, wanted, keep


def patterns_of(path: Path | None, suites: list[Suite]) -> list[str]:
    """The patterns of a --skips or --xfails file; none without a file. Raises UsageError if it cannot be read."""
    from refllm.evaluate.golden.expectations import read_patterns, unmatched

    try:
        patterns = read_patterns(path) if path else []
    except ValueError as error:
        raise UsageError(str(error)) from None
    mine = [pattern for pattern in patterns if pattern.partition("#")[0] in {suite.name for suite in suites}]
    for pattern in unmatched(mine, (case.name for suite in suites for case in suite.cases)):
        raise UsageError(f"{path}: {pattern} names no case")
    return patterns
