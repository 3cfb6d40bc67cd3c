"""Lint: is a suite well formed, complete and comparable by this tool?"""

import re
from collections.abc import Iterator
from pathlib import Path

from refllm.evaluate.golden.compare import CLASSES, FLOATS, TESTS
from refllm.evaluate.golden.schema import schema_errors
from refllm.evaluate.golden.suite import CorruptVectors, Suite, read_schema, read_suite, read_sums, suite_names

_NAME = re.compile(r"[A-Za-z0-9_]{1,60}")
_RECIPE_KEYS = {
    "splitmix64_dyadic": {"kind", "seed", "bits", "exp2"},
    "arange": {"kind", "start", "step"},
    "full": {"kind", "value"},
    "all_bit_patterns": {"kind"},
}


def lint(root: Path, names: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """Every problem of some suites.

    Parameters
    ----------
    root : Path
        Folder of vectors.
    names : list of str, optional
        All suites when absent; then files that are listed but missing are found too.

    Yields
    ------
    (suite name, problem)

    Raises
    ------
    CorruptVectors
        A file or a tensor does not have its hash.
    """
    schema = read_schema(root)
    if not names:
        for file in read_sums(root):
            if not (root / file).is_file():
                raise CorruptVectors("listed in SHA256SUMS but missing", path=root / file)
    for name in names or suite_names(root):
        suite = read_suite(root, name)
        errors = sorted(schema_errors(suite.manifest, schema))
        # What does not fit the schema cannot be looked at any closer.
        yield from ((name, error) for error in errors or _problems(suite))


def _problems(suite: Suite) -> Iterator[str]:
    manifest = suite.manifest
    if manifest["suite"] != suite.name:
        yield f"suite is {manifest['suite']!r}, the file is {suite.name}.json"
    if manifest["num_cases"] != len(suite.cases):
        yield f"num_cases is {manifest['num_cases']}, there are {len(suite.cases)}"
    ids = [case.id for case in suite.cases]
    for number in sorted({i for i in ids if ids.count(i) > 1}):
        yield f"id {number} stands twice"
    used = {flag for case in suite.cases for flag in case.flags}
    for flag in sorted(used - manifest["notes"].keys()):
        yield f"flag {flag} is not explained in notes"
    for flag in sorted(manifest["notes"].keys() - used):
        yield f"flag {flag} is explained in notes but no case has it"
    for flag, note in manifest["notes"].items():
        for link in note.get("links", ()):
            if not link.startswith("https://"):
                yield f"flag {flag}: link {link!r} does not start with https://"
    keys: set[str] = set()
    for case in suite.cases:
        for problem in _case_problems(suite, case, keys):
            yield f"#{case.id} {problem}"
    for key in sorted(suite.tensors.keys() - keys):
        yield f"tensor {key!r} of the data file is not used"


def _case_problems(suite: Suite, case, keys: set[str]) -> Iterator[str]:
    if not case.flags:
        yield "has no flag: a failure would not say what is wrong"
    if case.result == "invalid" and case.expected:
        yield "is invalid, yet gives expected values"
    if case.result != "invalid" and not case.expected:
        yield "expects nothing"
    for name in [*case.inputs, *case.expected]:
        if not _NAME.fullmatch(name):
            yield f"name {name!r} is not a plain word: exported files are called after it"
    for name, entry in case.inputs.items():
        yield from _tensor_problems(suite, entry, name, keys)
    for name, output in case.expected.items():
        variants = output.get("variants", ())
        tensors = [variant["tensor"] for variant in variants] or [output["tensor"]]
        for tensor in tensors:
            yield from _tensor_problems(suite, tensor, name, keys)
            yield from _compare_problems(case, output["compare"], tensor, name)
        whens = [variant["when"] for variant in variants]
        for word in [word for when in whens for item in when.items() for word in item if not _NAME.fullmatch(word)]:
            yield f"{name}: {word!r} in a variant's condition is not a plain word"
        if not all(whens) or any(when in whens[:i] for i, when in enumerate(whens)):
            yield f"{name}: variants need different, non-empty conditions"


def _tensor_problems(suite: Suite, entry: dict, name: str, keys: set[str]) -> Iterator[str]:
    if "sha256" not in entry:
        yield f"{name}: has no sha256"
    if "recipe" in entry and set(entry["recipe"]) != _RECIPE_KEYS[entry["recipe"]["kind"]]:
        kind = entry["recipe"]["kind"]
        yield f"{name}: recipe {kind} takes {', '.join(sorted(_RECIPE_KEYS[kind]))}"
        return
    keys.add(entry.get("key", ""))
    suite.array(entry, f"{suite.name} {name}")


def _compare_problems(case, compare: dict, tensor: dict, name: str) -> Iterator[str]:
    kind = compare["class"]
    if kind not in CLASSES:
        yield f"{name}: class {kind!r} cannot be compared by this version; it knows {', '.join(CLASSES)}"
        return
    required, optional = CLASSES[kind]
    for key in sorted(compare.keys() - {"class", *required, *optional}):
        yield f"{name}: class {kind} does not take {key!r}"
    for key in sorted(set(required) - compare.keys()):
        yield f"{name}: class {kind} needs {key!r}"
    if kind != "bits" and tensor["dtype"] not in FLOATS:
        yield f"{name}: class {kind} needs f16, f32 or f64, got {tensor['dtype']}"
    if any(isinstance(v, int | float) and v < 0 for v in compare.values()):
        yield f"{name}: a bound is negative"
    if kind == "statistical":
        test = compare.get("test")
        if test not in TESTS:
            yield f"{name}: test {test!r} cannot be compared by this version; it knows {', '.join(TESTS)}"
        elif ("bound" in compare) != TESTS[test]:
            yield f"{name}: test {test} {'needs' if TESTS[test] else 'does not take'} 'bound'"
    if kind == "dot_bound":
        reference = case.expected.get(compare["abs_ref"], {}).get("tensor", {})
        if (reference.get("dtype"), reference.get("shape")) != ("f64", tensor["shape"]) or tensor["dtype"] != "f64":
            yield f"{name}: a dot_bound and its abs_ref {compare['abs_ref']!r} must both be f64 of one shape"
