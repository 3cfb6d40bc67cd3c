"""The doctor: from wrong outputs to the mistake that explains them.

Every known mistake (refllm/evaluate/golden/mistakes) predicts what it would make of a case. A prediction explains a
failing case if all outputs are as predicted, to the bit where the case compares bits; it is contradicted by a case that
it predicts to fail and that passes. The mistake with the most explained, less the contradicted, is named first; then
the one that explains most of the rest. What no mistake explains is said to be unexplained.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from refllm.evaluate.golden.compare import Expected, mismatch, returned_dtype, returned_shape
from refllm.evaluate.golden.mistakes import MISTAKES, PREDICTORS
from refllm.evaluate.golden.mistakes.base import Given, Hypothesis, Mistake
from refllm.evaluate.golden.runner import Answer, Result, choose, expected_of, reference_names, run
from refllm.evaluate.golden.suite import Case, Suite

# Failures that are no wrong numbers, by the kind the runner gives.
_KINDS = {"accepted": "not-rejected", "rejected": "wrongly-rejected"} | dict.fromkeys(
    ("crash", "timeout", "garbage"), "no-answer"
)


@dataclass(frozen=True)
class Finding:
    """A mistake that explains failing cases.

    mistake : Mistake
    where : str
        What it concerns: "input qweight", "params", an output; "" where that says nothing.
    cases : tuple of str
        The failing cases it explains, of those that no earlier finding explains.
    contradicted : tuple of str
        Cases that pass although it predicts that they fail.
    others : tuple of Mistake
        Mistakes that explain the same cases as well.
    """

    mistake: Mistake
    where: str
    cases: tuple[str, ...]
    contradicted: tuple[str, ...] = ()
    others: tuple[Mistake, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What was found in one suite: counts, findings (the best first) and the failing cases that none explains."""

    suite: str
    passed: int
    failed: int
    skipped: int
    findings: tuple[Finding, ...]
    unexplained: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """The mistakes named first: the best one, and those that explain as much."""
        if not self.findings:
            return set()
        first = self.findings[0]
        return {first.mistake.name, *(other.name for other in first.others)}


@dataclass
class Memory:
    """Predictions already made, by case: they do not depend on what is judged."""

    hypotheses: dict[str, list[Hypothesis]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """A case that ran, with what the implementation gave."""

    result: Result
    ways: list[dict[str, np.ndarray]]
    wanted: dict[str, Expected]


def diagnose(
    suites: Iterable[Suite],
    call: Callable,
    *,
    declared: Mapping[str, str] | None = None,
    outputs: set[str] | None = None,
    keep: Callable[[Case], bool] = lambda case: True,
    memory: Memory | None = None,
) -> Iterator[Diagnosis]:
    """Run cases on an implementation and name its mistakes, suite by suite.

    Parameters
    ----------
    suites, call, declared, outputs, keep
        As in `runner.run`.
    memory : Memory, optional
        Shared between runs with the same suites and declarations.
    """
    memory = Memory() if memory is None else memory
    for suite in suites:
        seen = list(_watch(suite, call, declared or {}, outputs, keep))
        yield _diagnosis(suite, seen, declared or {}, memory)


def diagnose_array(suite: Suite, case: Case, name: str, got: np.ndarray, declared: Mapping | None = None) -> Diagnosis:
    """The same for one output of one case.

    Parameters
    ----------
    suite, case : Suite, Case
    name : str
        An output of the case.
    got : ndarray
    declared : mapping, optional
    """
    call = lambda op, params, inputs: Answer("ok", outputs={name: got})
    (found,) = diagnose([suite], call, declared=declared, outputs={name}, keep=lambda c: c.id == case.id)
    return found


def _watch(suite, call, declared, outputs, keep) -> Iterator[_Seen]:
    """Every case that ran, with the arrays the implementation gave and those it should have given."""
    answers: list[Answer] = []

    def watched(op, params, inputs):
        answers.append(call(op, params, inputs))
        return answers[-1]

    for result in run([suite], watched, declared=declared, outputs=outputs, keep=keep):
        given = answers.pop().outputs if answers else {}
        several = bool(given) and all(isinstance(way, Mapping) for way in given.values())
        case, wanted = result.case, {}
        for name in case.expected.keys() - reference_names(case) if case.result != "invalid" else ():
            if outputs is None or name in outputs:
                wanted[name] = expected_of(suite, case, name, choose(case.expected[name], declared))
        yield _Seen(result, list(given.values()) if several else [given], wanted)


def _diagnosis(suite: Suite, seen: list[_Seen], declared: Mapping, memory: Memory) -> Diagnosis:
    statuses = [one.result.status for one in seen]
    failing = {one.result.case.name: one for one in seen if one.result.status == "fail"}
    findings = list(_without_numbers(failing))
    left = {name for name, one in failing.items() if one.result.kind == "mismatch"}
    scores: dict[tuple[str, str], tuple[set, set]] = {}
    for one in seen if left else ():
        _score(suite, one, declared, memory, scores)
    numbers = _merged(_cover(left, scores))
    left = left.difference(*(finding.cases for finding in numbers))
    findings = sorted([*numbers, *findings], key=lambda f: len(f.contradicted) - len(f.cases))
    counts = (statuses.count(status) for status in ("pass", "fail", "skip"))
    return Diagnosis(suite.name, *counts, tuple(findings), tuple(name for name in failing if name in left))


def _without_numbers(failing: dict[str, _Seen]) -> Iterator[Finding]:
    """Inputs that should have been rejected, or should not; crashes."""
    for name in dict.fromkeys(_KINDS.values()):
        cases = tuple(case for case, one in failing.items() if _KINDS.get(one.result.kind) == name)
        if cases:
            flags = dict.fromkeys(flag for case in cases for flag in failing[case].result.case.flags)
            yield Finding(MISTAKES[name], ", ".join(flags), cases)


def _score(suite: Suite, one: _Seen, declared, memory: Memory, scores: dict) -> None:
    """Enter which hypotheses a case speaks for and against."""
    case, status = one.result.case, one.result.status
    if not any(one.ways) or not one.wanted or (status == "fail" and one.result.kind != "mismatch"):
        return
    if case.name not in memory.hypotheses:
        memory.hypotheses[case.name] = list(_hypotheses(suite, case, declared))
    for mistake, where, outputs in memory.hypotheses[case.name]:
        explained, contradicted = scores.setdefault((mistake, where), (set(), set()))
        predicted = {name: right if name not in outputs else _predicted(outputs[name], right)
                     for name, right in one.wanted.items() if outputs.get(name, name) is not None}  # fmt: skip
        if status == "pass":
            if any(mismatch(_returned(array), one.wanted[name]) for name, array in predicted.items()):
                contradicted.add(case.name)
        elif all(_fits(way, predicted, one) for way in one.ways):
            explained.add(case.name)


def _fits(way: dict[str, np.ndarray], predicted: dict[str, Expected], one: _Seen) -> bool:
    """Whether the arrays of one way to the result are as predicted, or right; what is not predicted may be anything."""
    given = {name for other in one.ways for name in other}
    left_to_another = given - way.keys() if len(one.ways) > 1 else set()
    fits = lambda expected: all(
        name in left_to_another or (name in way and mismatch(way[name], array) is None)
        for name, array in expected.items()
    )
    right = {name: array for name, array in one.wanted.items() if name in predicted}
    return (fits(predicted) and not fits(right)) or fits(one.wanted)


def _predicted(array: np.ndarray, right: Expected) -> Expected:
    """A prediction in the place of the right values; within a bound it is compared as they are, but more loosely.

    A predictor of random codes says how probable each is, and so how they are compared; random answers become that.
    """
    if isinstance(array, Expected):
        return array
    if right.compare["class"] == "statistical" and _answers(array, right):
        array = _summary(array, right)
    if right.compare["class"] != "dot_bound":
        return Expected(array, right.dtype, right.compare)
    array = array.astype(np.float64)
    size = np.abs(np.where(np.isfinite(array), array, 0))
    size = np.maximum(size, right.abs_ref) if size.shape == right.abs_ref.shape else size
    return Expected(array, right.dtype, right.compare | {"factor": 16 * right.compare["factor"]}, size)


def _returned(expected: Expected) -> np.ndarray:
    """An array as an implementation would return it."""
    if expected.compare["class"] == "statistical":
        return _typical(expected)
    if expected.compare["class"] != "dot_bound":
        return expected.array
    with np.errstate(all="ignore"):
        return expected.array.astype({"f16": np.float16}.get(expected.compare["unit"], np.float32))


def _answers(array: np.ndarray, right: Expected) -> bool:
    """Whether an array is n random answers, not what they have in common."""
    return array.shape == returned_shape(right) and array.dtype == returned_dtype(right)


def _summary(answers: np.ndarray, right: Expected) -> np.ndarray:
    """What n random answers have in common: their mean, or how often each code comes."""
    if right.compare["test"] == "mean":
        return answers.mean(-1, dtype=np.float64).astype(right.array.dtype)
    codes = right.array.shape[-1]
    found = [np.bincount(row, minlength=codes)[:codes] / row.size for row in answers.reshape(-1, answers.shape[-1])]
    return np.asarray(found, right.array.dtype).reshape(right.array.shape)


def _typical(expected: Expected) -> np.ndarray:
    """n answers that are just as expected: the mean again and again, or every code as often as it is probable."""
    n = expected.compare["n"]
    if expected.compare["test"] == "mean":
        return np.repeat(expected.array[..., None], n, axis=-1)
    places, last = (np.arange(n) + 0.5) / n, expected.array.shape[-1] - 1
    total = np.cumsum(expected.array.reshape(-1, last + 1), axis=-1, dtype=np.float64)
    codes = np.clip([np.searchsorted(row, places) for row in total], 0, last)
    return codes.astype(returned_dtype(expected)).reshape(returned_shape(expected))


def given_by(suite: Suite, case: Case, declared: Mapping[str, str]) -> Given:
    """A case as the predictors see it."""
    from refllm.evaluate.golden.own import implementation

    names = case.expected.keys() - reference_names(case)
    right = {name: expected_of(suite, case, name, choose(case.expected[name], declared)) for name in names}
    dtypes = {name: entry["dtype"] for name, entry in case.inputs.items()}
    return Given(
        case.op,
        case.params,
        suite.inputs(case),
        {name: expected.array for name, expected in right.items()},
        dtypes | {name: expected.dtype for name, expected in right.items()},
        implementation,
        list(_variants(suite, case, names)),
    )


def _hypotheses(suite: Suite, case: Case, declared: Mapping) -> Iterator[Hypothesis]:
    """Everything the known mistakes predict for a case, without what would be right."""
    names = case.expected.keys() - reference_names(case)
    wanted = {name: expected_of(suite, case, name, choose(case.expected[name], declared)) for name in names}
    given = given_by(suite, case, declared)
    for predict in PREDICTORS:
        for mistake, where, outputs in _said(predict, given):
            known = {name: array for name, array in outputs.items() if name in wanted}
            arrays = {name: array for name, array in known.items() if array is not None}
            with np.errstate(all="ignore"):
                returned = {name: _returned(_predicted(array, wanted[name])) for name, array in arrays.items()}
            if any(mismatch(array, wanted[name]) for name, array in returned.items()):
                yield Hypothesis(mistake, where, known)


def _said(predict, given: Given) -> Iterator[Hypothesis]:
    """What a predictor says; on a case of other people's vectors that it cannot read, it says no more."""
    with np.errstate(all="ignore"), suppress(ValueError, KeyError, IndexError, TypeError, OverflowError):
        yield from predict(given)


def _variants(suite: Suite, case: Case, names) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The outputs under each other convention that the case knows, in the words of --declare."""
    whens = [tuple(v["when"].items()) for name in names for v in case.expected[name].get("variants", ())]
    for when in dict.fromkeys(whens):
        arrays = {}
        for name in names:
            chosen = choose(case.expected[name], dict(when))
            arrays[name] = suite.array(chosen, f"{case.name} {name}")
        yield " ".join(f"{key}={value}" for key, value in when), arrays


def _cover(left: set[str], scores: dict) -> Iterator[Finding]:
    """The best hypothesis for the cases that are left, again and again."""
    order = {name: i for i, name in enumerate(MISTAKES)}
    left = set(left)
    while left:
        worth = {key: len(yes & left) - len(no) for key, (yes, no) in scores.items()}
        ranked = sorted(scores, key=lambda key: (-worth[key], order[key[0]], key[1]))
        if not ranked or worth[ranked[0]] <= 0:
            return
        mistake, where = ranked[0]
        cases = scores[ranked[0]][0] & left
        level = [key for key in ranked if worth[key] == worth[ranked[0]] and scores[key][0] & left == cases]
        others = dict.fromkeys(key[0] for key in level if key[0] != mistake)
        yield Finding(
            MISTAKES[mistake],
            where,
            _in_order(cases),
            _in_order(scores[ranked[0]][1]),
            tuple(MISTAKES[name] for name in others),
        )
        left -= cases


def _in_order(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (len(name), name)))


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings of one mistake in several places as one."""
    merged: dict[str, Finding] = {}
    for new in findings:
        old = merged.get(new.mistake.name)
        if old is not None:
            where = "; ".join(dict.fromkeys(filter(None, (old.where, new.where))))
            others = tuple(other for other in old.others if other in new.others)
            cases, against = set(old.cases) | set(new.cases), set(old.contradicted) | set(new.contradicted)
            new = Finding(new.mistake, where, _in_order(cases), _in_order(against), others)
        merged[new.mistake.name] = new
    return list(merged.values())
