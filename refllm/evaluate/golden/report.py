"""What a run of `refllm golden verify` says: as text, and as JSON."""

from collections import Counter

from refllm.evaluate.golden.runner import Result
from refllm.evaluate.golden.suite import Suite

# xfail: a failure that --xfails lists; xpass: a pass that it lists, which is an error.
STATUSES = ("pass", "fail", "skip", "xfail", "xpass")
# No answer at all: that says nothing about the mistake a flag stands for.
_NO_ANSWER = ("crash", "timeout", "garbage")


def _by_flag(results: list[Result]) -> dict[tuple[str, str], Counter]:
    """(suite, flag) -> how its cases went; "points" are failures by a wrong answer."""
    table: dict[tuple[str, str], Counter] = {}
    for result in results:
        for flag in result.case.flags:
            count = table.setdefault((result.case.suite, flag), Counter())
            count[result.status] += 1
            count["points"] += result.status == "fail" and result.kind not in _NO_ANSWER
    return table


def _totals(count: Counter) -> dict[str, int]:
    return {status: count[status] for status in STATUSES}


def _cases(count: Counter) -> int:
    return sum(_totals(count).values())


def _share(count: Counter) -> float:
    return count["points"] / _cases(count)


def _line(name: str, results: list[Result]) -> str:
    count = Counter(result.status for result in results)
    text = f"{name}: {count['pass']} pass, {count['fail']} fail, {count['skip']} skip"
    return text + "".join(f", {count[status]} {status}" for status in ("xfail", "xpass") if count[status])


def report_text(who: str, suites: list[Suite], results: list[Result]) -> str:
    """Failing cases, the flags they point at, and the totals.

    Parameters
    ----------
    who : str
        The implementation, in words.
    suites : list of Suite
    results : list of Result
    """
    lines = []
    for result in results:
        if result.status == "fail":
            lines.append(f"FAIL {result.case.name}  {result.case.comment}  [{' '.join(result.case.flags)}]")
            lines += [f"     {problem}" for problem in result.problems]
        if result.status == "xpass":
            lines.append(f"XPASS {result.case.name}  {result.case.comment}: it passes, take it out of --xfails")
    failing = {place: count for place, count in _by_flag(results).items() if count["points"]}
    if failing:
        lines += ["", "What the failures point at, the flags first that fail as a whole:"]
    notes = {suite.name: suite.manifest["notes"] for suite in suites}
    for suite, flag in sorted(failing, key=lambda place: (-_share(failing[place]), place)):
        note, count = notes[suite][flag], failing[suite, flag]
        share = f"{count['points']} of {_cases(count)} fail"
        lines.append(f"  {suite} {flag} ({note['bug_type']}): {share}. {note['description']}")
        lines += [f"    {link}" for link in note.get("links", ())]
    for name in dict.fromkeys(result.case.suite for result in results):
        lines.append(_line(name, [result for result in results if result.case.suite == name]))
    return "\n".join([*lines, _line(who, results)])


def report_json(who: str, suites: list[Suite], results: list[Result], declared: dict[str, str]) -> dict:
    """The same for programs; parameters as above, and what was declared.

    Returns
    -------
    dict
        implementation, suites {name: version}, declared, pass, fail, skip, xfail, xpass, flags [...], cases [...].
    """
    notes = {suite.name: suite.manifest["notes"] for suite in suites}
    cases = [
        {"case": r.case.name, "status": r.status, "kind": r.kind, "flags": r.case.flags, "problems": r.problems}
        for r in results
    ]
    flags = [
        {"suite": suite, "flag": flag, "bug_type": notes[suite][flag]["bug_type"], **_totals(count)}
        for (suite, flag), count in _by_flag(results).items()
    ]
    versions = {suite.name: suite.manifest["suite_version"] for suite in suites}
    counts = Counter(result.status for result in results)
    return {
        "implementation": who,
        "suites": versions,
        "declared": declared,
        **_totals(counts),
        "flags": flags,
        "cases": cases,
    }
