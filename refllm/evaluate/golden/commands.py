"""`refllm golden list | show | verify | doctor | museum | lint | regen | export`.

Exit codes: 0 all right; 1 a case failed, lint or regen --check found something; 2 usage; 3 nothing ran; 4 vectors
corrupt.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from refllm.evaluate.golden.asked import (
    CORRUPT,
    FAILED,
    NOTHING,
    OK,
    USAGE,
    UsageError,
    chosen,
    find_case,
    folder,
    implementation_of,
    names_of,
    patterns_of,
)
from refllm.evaluate.golden.suite import (
    SCHEMA_FILE,
    CorruptVectors,
    Suite,
    default_root,
    read_schema,
    read_suite,
    suite_names,
)

SCHEMA_VERSION = 1


def add_parser(subparsers) -> None:
    """Add the `golden` command with its sub-commands to `subparsers` (of argparse).

    Every sub-command sets `run` to a function(args) -> exit code.
    """
    golden = subparsers.add_parser("golden", help="golden vectors: check any implementation against refllm's")
    golden.set_defaults(run=lambda args: golden.print_help(sys.stderr) or USAGE)  # without a sub-command
    commands = golden.add_subparsers(dest="golden_command", metavar="COMMAND")
    for name, run, text in (
        ("list", _list, "the suites and what they cover"),
        ("show", _show, "one case with its inputs and expected outputs"),
        ("verify", _verify, "run the cases on refllm itself, a Python function or any program"),
        ("doctor", _doctor, "name the mistake behind wrong outputs"),
        ("museum", _museum, "defects that were shipped, and which cases kill them"),
        ("lint", _lint, "check schema, counts, flags, ids and hashes"),
        ("regen", _regen, "write the suites from their generators"),
        ("export", _export, "write suites as plain files"),
    ):
        parser = commands.add_parser(name, help=text, description=text)
        parser.add_argument("--vectors", metavar="DIR", type=Path, help="folder of suites (default: refllm's own)")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(run=_guarded(run))
        _ARGUMENTS[name](parser)


def _suites_argument(parser, what="SUITE"):
    parser.add_argument("suites", nargs="*", metavar=what, help="e.g. quant/rtn (default: all)")


def _verify_arguments(parser):
    _run_arguments(parser)
    for name, what in (("--skips", "cases not to run"), ("--xfails", "cases that are known to fail")):
        parser.add_argument(name, metavar="FILE", type=Path, help=f"{what}: a pattern like quant/rtn#2* a line")
    parser.add_argument("--junit", metavar="FILE", type=Path, help="write JUnit XML")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write a table of suites and the failures")


def _doctor_arguments(parser):
    _run_arguments(parser)
    parser.add_argument("--got", metavar="FILE", type=Path, help="one wrong array, .npy or raw .bin, of one SUITE#ID")
    parser.add_argument("--output", metavar="NAME", help="which output --got is (default: the one that fits)")


def _run_arguments(parser):
    _suites_argument(parser, "SUITE[#ID]")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--impl", metavar="MODULE:FUNCTION", help="function(op, params, inputs) -> dict of arrays")
    who.add_argument(
        "--exec", nargs=argparse.REMAINDER, metavar="CMD", help="program run as CMD ... request.json; give it last"
    )
    parser.add_argument(
        "--declare", action="append", default=[], metavar="KEY=VALUE", help="a convention of yours, e.g. ties=away"
    )
    parser.add_argument("--outputs", metavar="NAME,...", help="compare only these outputs")
    parser.add_argument("--flag", action="append", default=[], help="only cases with this flag")
    parser.add_argument("--timeout", type=float, default=20, metavar="S", help="seconds a case for --exec (default 20)")
    parser.add_argument("--format", choices=("json", "raw"), default="json", help="of --exec; raw: text and .bin files")
    parser.add_argument("--batch", action="store_true", help="--exec: one process for all cases, run as CMD ... -")


def _export_arguments(parser):
    parser.add_argument("folder", metavar="DIR", type=Path, help="must not exist, or be empty")
    _suites_argument(parser)
    parser.add_argument("--format", choices=("files", "raw"), default="files", help="raw: one .bin an array, no JSON")


def _list_arguments(parser):
    _suites_argument(parser)
    parser.add_argument("--flag", help="only suites with this flag")
    parser.add_argument("--op", help="only suites of this op")


_ARGUMENTS = {
    "list": _list_arguments,
    "show": lambda parser: parser.add_argument("case", metavar="SUITE#ID"),
    "verify": _verify_arguments,
    "doctor": _doctor_arguments,
    "museum": lambda parser: parser.add_argument("mutants", nargs="*", metavar="MUTANT", help="default: all"),
    "lint": _suites_argument,
    "regen": lambda parser: parser.add_argument(
        "--check", action="store_true", help="write nothing, report differences"
    ),
    "export": _export_arguments,
}


def _guarded(function):
    """Errors become one line and an exit code; what is no error of the vectors or of the command line passes on."""

    def run(args) -> int:
        try:
            return function(args)
        except UsageError as error:
            print(f"refllm golden: {error}", file=sys.stderr)
            return USAGE
        except CorruptVectors as error:
            print(f"refllm golden: corrupt vectors: {error}", file=sys.stderr)
            return CORRUPT

    return run


def _print_json(command: str, **content) -> None:
    print(json.dumps({"schema_version": SCHEMA_VERSION, "command": f"golden {command}", **content}, indent=1))


def _list(args) -> int:
    root = folder(args)
    rows = []
    for name in names_of(args, root):
        suite = read_suite(root, name)
        flags = Counter(flag for case in suite.cases for flag in case.flags)
        if (args.flag is None or args.flag in flags) and args.op in (None, suite.manifest["op"]):
            head = {key: suite.manifest[key] for key in ("suite", "suite_version", "op", "title")}
            rows.append(head | {"cases": len(suite.cases), "flags": dict(flags)})
    if args.json:
        _print_json("list", suites=rows)
    for row in rows if not args.json else ():
        print(f"{row['suite']} {row['suite_version']}  {row['cases']} cases  op {row['op']}\n  {row['title']}")
        print("  flags: " + ", ".join(f"{flag} {count}" for flag, count in row["flags"].items()))
    return OK if rows else NOTHING


def _show(args) -> int:
    suite, case = find_case(folder(args), args.case)
    arrays = {("input", name): entry for name, entry in case.inputs.items()}
    for name, output in case.expected.items():
        for variant in output.get("variants", [output]):
            when = "".join(f" if {key}={value}" for key, value in variant.get("when", {}).items())
            arrays["expected", name + when] = variant["tensor"]
    notes = {flag: suite.manifest["notes"].get(flag, {}) for flag in case.flags}
    if args.json:
        listed = [
            {
                "role": role,
                "name": name,
                "dtype": entry["dtype"],
                "shape": entry["shape"],
                "values": _plain(suite, entry),
            }
            for (role, name), entry in arrays.items()
        ]
        _print_json("show", case=case.name, op=case.op, comment=case.comment, result=case.result, params=case.params,
                    flags=notes, arrays=listed, lesson=suite.manifest.get("lesson"))  # fmt: skip
        return OK
    print(f"{case.name}: {case.comment}\nop {case.op}  params {json.dumps(case.params)}  result {case.result}")
    for flag, note in notes.items():
        print(f"flag {flag} ({note.get('bug_type')}): {note.get('description')}")
        for link in note.get("links", ()):
            print(f"  {link}")
    for (role, name), entry in arrays.items():
        print(f"{role} {name} {entry['dtype']} {entry['shape']}")
        print("  " + str(suite.array(entry, case.name)).replace("\n", "\n  "))
    if "lesson" in suite.manifest:
        print(f"lesson: {suite.manifest['lesson']}")
    return OK


def _plain(suite: Suite, entry: dict) -> list:
    """Values for JSON: floats as hex, which is exact and knows NaN."""
    return [x.hex() if isinstance(x, float) else x for x in suite.array(entry).reshape(-1).tolist()]


def _verify(args) -> int:
    from refllm.evaluate.golden.expectations import expect_failures, listed
    from refllm.evaluate.golden.report import report_json, report_text
    from refllm.evaluate.golden.report_files import report_junit, report_markdown
    from refllm.evaluate.golden.runner import run
    from refllm.formats.files import atomic_write

    suites, declared, wanted, keep = chosen(args, folder(args))
    skips, xfails = patterns_of(args.skips, suites), patterns_of(args.xfails, suites)
    call, who = implementation_of(args)
    asked = lambda case: keep(case) and not listed(case.name, skips)
    results = list(expect_failures(run(suites, call, declared=declared, outputs=wanted, keep=asked), xfails))
    counts = Counter(result.status for result in results)
    if args.json:
        _print_json("verify", **report_json(who, suites, results, declared))
    else:
        print(report_text(who, suites, results))
    for path, report in ((args.junit, report_junit), (args.markdown, report_markdown)):
        if path is not None:
            try:
                with atomic_write(path, "w") as file:
                    file.write(report(who, results))
            except OSError as error:
                raise UsageError(str(error)) from None
    if counts["fail"] or counts["xpass"]:
        return FAILED
    return OK if counts["pass"] or counts["xfail"] else NOTHING


def _doctor(args) -> int:
    from refllm.evaluate.golden.doctor_commands import doctor

    return doctor(args, _print_json)


def _museum(args) -> int:
    from refllm.evaluate.golden.doctor_commands import museum

    return museum(args, _print_json)


def _lint(args) -> int:
    from refllm.evaluate.golden.lint import lint

    root = folder(args)
    names = names_of(args, root)
    problems = [{"suite": suite, "problem": problem} for suite, problem in lint(root, args.suites)]
    if args.json:
        _print_json("lint", suites=names, problems=problems)
    else:
        for entry in problems:
            print(f"{entry['suite']}: {entry['problem']}")
        print(f"{len(names)} suites, {len(problems)} problems")
    if problems:
        return FAILED
    return OK if names else NOTHING


def _regen(args) -> int:
    from refllm.evaluate.golden.build import check_version, folder_files, render, write_files
    from refllm.evaluate.golden.suites import GENERATORS

    root = folder(args)
    schema = (default_root() / SCHEMA_FILE).read_bytes()
    files: dict[str, bytes] = {}
    for generate in GENERATORS:
        files |= render(generate())
    wanted = folder_files(files, schema)
    differ = sorted(
        name for name, data in wanted.items() if not (root / name).is_file() or (root / name).read_bytes() != data
    )
    extra = sorted({f"{name}.json" for name in suite_names(root)} - wanted.keys())
    if args.check:
        found = [f"{name} differs from what its generator writes" for name in differ]
        found += [f"{name} has no generator" for name in extra]
        if args.json:
            _print_json("regen", check=True, problems=found)
        else:
            print("\n".join(found) or f"{len(wanted)} files are what their generators write")
        return FAILED if found else OK
    for name in [name for name in files if name.endswith(".json") and (root / name).is_file()]:
        try:
            check_version(json.loads((root / name).read_bytes()), json.loads(files[name]))
        except ValueError as error:
            raise UsageError(str(error)) from None
    write_files(root, files, schema)
    if args.json:
        _print_json("regen", check=False, written=differ)
    else:
        print(f"written: {', '.join(differ)}" if differ else "nothing to write")
    return OK


def _export(args) -> int:
    from refllm.evaluate.golden.export import export_files, export_raw
    from refllm.evaluate.golden.lint import lint
    from refllm.formats.files import atomic_folder

    root = folder(args)
    names = names_of(args, root)
    for suite, problem in lint(root, args.suites):
        raise CorruptVectors(f"{suite}: {problem}", path=root)
    if not names:
        return NOTHING
    suites = [read_suite(root, name) for name in names]
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UsageError(f"{args.folder} is not an empty folder; give another name")
    with atomic_folder(args.folder) as place:
        if args.format == "raw":
            export_raw(place, suites)
        else:
            read_schema(root)
            export_files(place, suites, (root / SCHEMA_FILE).read_bytes())
    if args.json:
        _print_json("export", folder=str(args.folder), format=args.format, suites=names)
    else:
        print(f"{len(names)} suites written to {args.folder}")
    return OK
