"""methods, lesson, golden: commands for readers and for other implementations."""

from pathlib import Path

from refllm.cli.common import Silent, UsageError, add_command, note, print_json
from refllm.formats.names import meant


def add_commands(commands) -> None:
    """Add the commands of this module."""
    parser = add_command(
        commands, "methods", methods, "list the methods with settings, paper, code, lesson and vectors"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods or families; all without")

    parser = add_command(commands, "lesson", lesson, "list the lessons, or run one and check what it prints")
    parser.add_argument("number", nargs="?", metavar="N", help="number of a lesson, or the path of a page")
    parser.add_argument("--all", action="store_true", help="run every lesson")

    from refllm.evaluate import golden

    golden.add_parser(commands)


def methods(args) -> None:
    """The tree: families, their methods, where each is explained."""
    from refllm.methods.catalogue import catalogue
    from refllm.methods.recipes import key_defaults
    from refllm.methods.recipes import methods as functions

    entries = catalogue()
    known = {word for entry in entries for word in (entry["name"], entry["family"])}
    if unknown := [name for name in args.names if name not in known]:
        near = meant(unknown[0], sorted(known))
        raise UsageError(f"no method or family {unknown[0]!r}{near}; there are {', '.join(sorted(known))}")
    if args.names:
        entries = [entry for entry in entries if {entry["name"], entry["family"]} & set(args.names)]
    if args.json:
        print_json({"methods": entries})
        return
    family = None
    for entry in entries:
        if entry["family"] != family:
            family = entry["family"]
            print(f"\n{family}" if entry is not entries[0] else family)
        print(f"  {entry['name']:<13} {entry['summary']}")
        print(f"  {'':<13} keys: {', '.join(key_defaults(functions()[entry['name']][1])) or 'none'}")
        for key in ("paper", "module", "lesson", "tests", "golden"):
            if entry[key]:
                print(f"  {'':<13} {key}: {entry[key]}")


def lesson(args) -> int:
    """Run lessons; the outputs are shown and compared with the page."""
    from refllm.evaluate.lessons import lessons, title

    if args.number is not None and Path(args.number).is_file():
        return _run([Path(args.number).resolve()], args)
    pages = {page.name[:2]: page for page in lessons()}
    if not pages:
        note("no lessons are installed")
        raise Silent(3)
    if args.number is None and not args.all:
        if args.json:
            print_json({"lessons": [{"number": n, "title": title(p), "path": str(p)} for n, p in pages.items()]})
        else:
            print(*(title(page) for page in pages.values()), sep="\n")
        return 0
    number = None if args.number is None else args.number.zfill(2)
    if number is not None and number not in pages:
        raise UsageError(f"there is no lesson and no file {args.number}; there are {', '.join(pages)}")
    return _run(list(pages.values()) if number is None else [pages[number]], args)


def _run(pages, args) -> int:
    from refllm.evaluate.lessons import LessonError, run, title

    results = []
    for page in pages:
        try:
            output, problem = run(page), None
        except LessonError as error:
            output, problem = "", str(error)
        results.append({"path": str(page), "title": title(page), "ok": problem is None, "problem": problem})
        if not args.json:
            print(f"== {title(page)} ({page}): {'as printed in the lesson' if problem is None else 'DIFFERS'}")
            print(output, end="")
        if problem is not None:
            note(f"refllm: error: {problem}")
    if args.json:
        print_json({"lessons": results})
    return 0 if all(result["ok"] for result in results) else 1
