"""Run the cases of a suite on an implementation: a Python function, or any program.

An implementation is `call(op, params, inputs) -> Answer`. `python_call` makes one, and golden/programs.py those of
programs; what goes wrong inside becomes an Answer too, so that one bad case never stops the run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from refllm.evaluate.golden.compare import Expected, mismatch
from refllm.evaluate.golden.suite import Case, Suite


@dataclass(frozen=True)
class Answer:
    """What an implementation made of one case.

    kind : "ok", "rejected", "unsupported", "crash", "timeout" or "garbage"
    message : str, one line
    outputs : dict of name -> ndarray, for "ok"; or of several such dicts by name, all of which must be right
    """

    kind: str
    message: str = ""
    outputs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The verdict on one case.

    status : "pass", "fail" or "skip"
    kind : why, for "fail": "mismatch", "accepted" (an invalid input), "rejected" (a valid one), "crash", "timeout",
    "garbage"
    problems : one line each, "codes: 1 of 8 differ ..."
    """

    case: Case
    status: str
    kind: str = ""
    problems: tuple[str, ...] = ()


Call = Callable[[str, dict, dict[str, np.ndarray]], Answer]


def python_call(function: Callable) -> Call:
    """Wrap `function(op, params, inputs) -> dict of arrays`.

    Whoever has several ways to the result (kernels, say) may return {way: dict of arrays}: all are judged, and one may
    leave out an output that another gives. NotImplementedError means unsupported, ValueError rejected, any
    other exception a crash.
    """

    def call(op, params, inputs):
        try:
            outputs = function(op, params, inputs)
        except NotImplementedError as error:
            return Answer("unsupported", one_line(error))
        except ValueError as error:
            return Answer("rejected", one_line(error))
        except Exception as error:
            return Answer("crash", f"{type(error).__name__}: {one_line(error)}")
        if not isinstance(outputs, Mapping):
            return Answer("garbage", f"a dict of arrays was expected, got {type(outputs).__name__}")
        return Answer("ok", outputs=dict(outputs))

    return call


def one_line(error: Exception) -> str:
    """What an error says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def run(
    suites: Iterable[Suite],
    call: Call,
    *,
    declared: Mapping[str, str] | None = None,
    outputs: set[str] | None = None,
    keep: Callable[[Case], bool] = lambda case: True,
) -> Iterator[Result]:
    """Verdicts on the cases of some suites.

    Parameters
    ----------
    suites : iterable of Suite
    call : callable
        From `python_call`, `programs.program_call` or `programs.BatchCall`.
    declared : mapping, optional
        What the implementation declares: chooses variants, and satisfies `requires`.
    outputs : set of str, optional
        Compare only these outputs; a case that has none of them is skipped.
    keep : callable, optional
        Which cases to run.

    Raises
    ------
    CorruptVectors
    """
    for suite in suites:
        for case in suite.cases:
            if keep(case):
                yield _verdict(suite, case, call, declared or {}, outputs)


def _verdict(suite: Suite, case: Case, call: Call, declared: Mapping, outputs: set[str] | None) -> Result:
    missing = [name for name in case.requires if name not in declared]
    if missing:
        return Result(case, "skip", problems=(f"needs {', '.join(missing)}, not declared",))
    wanted = {
        name: entry
        for name, entry in case.expected.items()
        if name not in reference_names(case) and (outputs is None or name in outputs)
    }
    if case.result != "invalid" and not wanted:
        return Result(case, "skip", problems=("none of the chosen outputs",))
    answer = call(case.op, dict(case.params), suite.inputs(case))
    if answer.kind == "unsupported":
        return Result(case, "skip", problems=(answer.message or "unsupported",))
    if answer.kind == "rejected" and case.result != "valid":
        return Result(case, "pass")
    if answer.kind != "ok":
        return Result(case, "fail", answer.kind, (f"{answer.kind}: {answer.message}".rstrip(": "),))
    if case.result == "invalid":
        return Result(case, "fail", "accepted", ("an invalid input was accepted",))
    problems = tuple(_problems(suite, case, wanted, answer.outputs, declared))
    return Result(case, "fail" if problems else "pass", "mismatch" if problems else "", problems)


def _problems(suite, case, wanted, outputs, declared) -> Iterator[str]:
    several = bool(outputs) and all(isinstance(way, Mapping) for way in outputs.values())
    ways = outputs if several else {"": outputs}
    given = {name for way in ways.values() for name in way}
    for way, arrays in ways.items():
        for name, entry in wanted.items():
            left_to_another = name not in arrays and name in given
            problem = None if left_to_another else _check(suite, case, name, entry, arrays, declared)
            if problem:
                yield f"{way}: {name}: {problem}" if way else f"{name}: {problem}"


def reference_names(case: Case) -> set[str]:
    """Entries of `expected` that only serve the comparison of another: no implementation returns them."""
    return {entry["compare"]["abs_ref"] for entry in case.expected.values() if "abs_ref" in entry["compare"]}


def _check(suite, case, name, entry, outputs, declared) -> str | None:
    if name not in outputs:
        return f"missing; got {', '.join(map(str, outputs)) or 'nothing'}"
    chosen = choose(entry, declared)
    problem = mismatch(outputs[name], expected_of(suite, case, name, chosen))
    if problem is None or "variants" not in entry:
        return problem
    for variant in entry["variants"]:
        if variant["tensor"] is not chosen:
            if mismatch(outputs[name], expected_of(suite, case, name, variant["tensor"])) is None:
                when = " ".join(f"--declare {key}={value}" for key, value in variant["when"].items())
                return f"{problem}; right under another convention: {when}"
    return problem


def choose(entry: dict, declared: Mapping[str, str]) -> dict:
    """The tensor entry that holds for an implementation: the variant that fits its declarations, else the first one."""
    if "tensor" in entry:
        return entry["tensor"]
    for variant in entry["variants"]:
        if all(declared.get(key) == value for key, value in variant["when"].items()):
            return variant["tensor"]
    return entry["variants"][0]["tensor"]


def expected_of(suite: Suite, case: Case, name: str, tensor: dict) -> Expected:
    """The arrays an output is compared with."""
    compare = case.expected[name]["compare"]
    abs_ref = None
    if "abs_ref" in compare:
        reference = case.expected[compare["abs_ref"]]["tensor"]
        abs_ref = suite.array(reference, f"{case.name} {compare['abs_ref']}")
    return Expected(suite.array(tensor, f"{case.name} {name}"), tensor["dtype"], compare, abs_ref)
