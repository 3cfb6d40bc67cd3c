"""Files that a run of `refllm golden verify` leaves behind: JUnit XML for CI, Markdown for people."""

from collections import Counter
from xml.etree import ElementTree

from refllm.evaluate.golden.report import STATUSES
from refllm.evaluate.golden.runner import Result


def report_junit(who: str, results: list[Result]) -> str:
    """JUnit XML: a testsuite a suite, a testcase a case.

    A failure that was expected is skipped, a pass that was not is a failure.
    """
    root = ElementTree.Element("testsuites", name=f"refllm golden verify {who}")
    for suite in dict.fromkeys(result.case.suite for result in results):
        chosen = [result for result in results if result.case.suite == suite]
        count = Counter(result.status for result in chosen)
        element = ElementTree.SubElement(
            root,
            "testsuite",
            name=suite,
            tests=str(len(chosen)),
            failures=str(count["fail"] + count["xpass"]),
            skipped=str(count["skip"] + count["xfail"]),
        )
        for result in chosen:
            case = ElementTree.SubElement(
                element, "testcase", classname=suite, name=f"{result.case.name} {_flags(result)}"
            )
            if result.status == "pass":
                continue
            child = ElementTree.SubElement(case, "failure" if result.status in ("fail", "xpass") else "skipped")
            child.set(
                "message", _plain({"xpass": "passes, but is listed in --xfails"}.get(result.status, _problem(result)))
            )
            child.text = _plain("\n".join([result.case.comment, *result.problems]))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def report_markdown(who: str, results: list[Result]) -> str:
    """A table of suites and a list of the failures."""
    rows = [
        f"# golden verify: {who}",
        "",
        "| suite | " + " | ".join(STATUSES) + " |",
        "|---|" + "---:|" * len(STATUSES),
    ]
    for suite in dict.fromkeys(result.case.suite for result in results):
        count = Counter(result.status for result in results if result.case.suite == suite)
        rows.append(f"| {suite} | " + " | ".join(str(count[status]) for status in STATUSES) + " |")
    count = Counter(result.status for result in results)
    rows.append("| all | " + " | ".join(str(count[status]) for status in STATUSES) + " |")
    failures = [result for result in results if result.status in ("fail", "xpass")]
    if failures:
        rows += ["", "## Failures", ""]
    for result in failures:
        why = "passes, but is listed in --xfails" if result.status == "xpass" else "; ".join(result.problems)
        rows.append(f"- `{result.case.name}` {result.case.comment} ({_flags(result)}): `{why.replace('`', chr(39))}`")
    return "\n".join(rows) + "\n"


def _flags(result: Result) -> str:
    return " ".join(result.case.flags)


def _problem(result: Result) -> str:
    return (result.problems or ("",))[0]


def _plain(text: str) -> str:
    """What XML 1.0 can hold."""
    return "".join(c if c in "\t\n" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" else "?" for c in text)
