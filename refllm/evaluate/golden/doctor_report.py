"""What the doctor says: as text, one line a finding, and as JSON."""

from refllm.evaluate.golden.doctor import Diagnosis, Finding
from refllm.evaluate.golden.mistakes.base import Mistake


def diagnosis_text(found: Diagnosis) -> str:
    """One line a finding, and one for what no known mistake explains."""
    if not found.failed:
        return f"{found.suite}: nothing is wrong, {found.passed} pass, {found.skipped} skip"
    lines = [f"{found.suite}: {found.failed} of {found.failed + found.passed} fail"]
    lines += [f"  {_line(finding, found.failed)}" for finding in found.findings]
    if found.unexplained:
        lines.append(f"  no known mistake explains {_names(found.unexplained)}")
    return "\n".join(lines)


def _line(finding: Finding, failed: int) -> str:
    where = f" ({finding.where})" if finding.where else ""
    against = f", although {_names(finding.contradicted)} pass" if finding.contradicted else ""
    mistake = finding.mistake
    text = (
        f"{mistake.name}{where} explains {len(finding.cases)} of {failed}{against}: {mistake.sentence} {mistake.mend}"
    )
    if finding.others:
        text += f" Or: {'; '.join(f'{other.name}: {other.sentence}' for other in finding.others)}"
    return " ".join([text, *mistake.urls])


def _names(cases: tuple[str, ...]) -> str:
    shown = ", ".join(f"#{case.partition('#')[2]}" for case in cases[:8])
    return shown + (f" and {len(cases) - 8} more" if len(cases) > 8 else "")


def diagnosis_json(found: Diagnosis) -> dict:
    """The same for programs.

    Returns
    -------
    dict
        suite, pass, fail, skip, findings [mistake, sentence, mend, links, where, cases, contradicted, others],
        unexplained.
    """
    findings = [
        _mistake(finding.mistake)
        | {
            "where": finding.where,
            "cases": finding.cases,
            "contradicted": finding.contradicted,
            "others": [_mistake(other) for other in finding.others],
        }
        for finding in found.findings
    ]
    counts = {"pass": found.passed, "fail": found.failed, "skip": found.skipped}
    return {"suite": found.suite, **counts, "findings": findings, "unexplained": found.unexplained}


def _mistake(mistake: Mistake) -> dict:
    return {"mistake": mistake.name, "sentence": mistake.sentence, "mend": mistake.mend, "links": mistake.urls}
