"""Our JSON-Schema checker says what jsonschema says, on the shipped manifests and on thousands of damaged ones."""

import copy
import json
import random

import pytest

from refllm.evaluate.golden.schema import schema_errors
from refllm.evaluate.golden.suite import SCHEMA_FILE, default_root, read_suites

pytestmark = pytest.mark.oracle
STRANGE = [None, True, False, 0, 1, -1, 1.0, 1.5, 65, "", "x", "bits", "0" * 64, [], [1], [1, 1], {}, {"x": 1}]


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def damaged(manifest, rng):
    """A copy with one value replaced, removed, renamed or added."""
    made = copy.deepcopy(manifest)
    path = rng.choice([p for p in places(made) if p])
    owner = made
    for key in path[:-1]:
        owner = owner[key]
    action = rng.choice(["replace", "remove", "add", "rename"])
    if action == "replace":
        owner[path[-1]] = rng.choice(STRANGE)
    elif action == "remove":
        del owner[path[-1]]
    elif isinstance(owner, dict):
        copied = owner[path[-1]] if action == "add" else owner.pop(path[-1])
        owner[f"{path[-1]}_"] = copied
    else:
        owner.append(rng.choice(STRANGE))
    return made


def small(manifest, group):
    """The manifest with one of its groups, cut to two cases: the rest would be checked a thousand times, unchanged."""
    return manifest | {"groups": [group | {"cases": group["cases"][:2]}]}


def test_same_verdict_as_jsonschema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((default_root() / SCHEMA_FILE).read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    oracle = jsonschema.Draft202012Validator(schema)
    rng = random.Random(0)
    verdicts = [0, 0]
    for suite in read_suites(default_root()):
        assert oracle.is_valid(suite.manifest) and not list(schema_errors(suite.manifest, schema))
        for _ in range(1000):
            made = damaged(small(suite.manifest, rng.choice(suite.manifest["groups"])), rng)
            ours = not list(schema_errors(made, schema))
            assert ours == oracle.is_valid(made), made
            verdicts[ours] += 1
    assert min(verdicts) > 100, "both verdicts must occur"


def test_nan_codes_are_those_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    import numpy as np

    from refllm.evaluate.golden.compare import _CODED

    names = {
        "f8_e4m3fn": "float8_e4m3fn", "f8_e5m2": "float8_e5m2", "f8_e4m3fnuz": "float8_e4m3fnuz",
        "f8_e5m2fnuz": "float8_e5m2fnuz", "f8_e8m0fnu": "float8_e8m0fnu", "bf16": "bfloat16",
    }  # fmt: skip
    for ours, theirs in names.items():
        width = np.uint16 if ours == "bf16" else np.uint8
        codes = np.arange(np.iinfo(width).max + 1).astype(width)
        sign, is_nan = _CODED[ours]
        value = codes.view(getattr(ml_dtypes, theirs)).astype(np.float32)
        assert np.array_equal(is_nan(codes), np.isnan(value)), ours
        zero = (codes & ~np.array(sign, width)) == 0
        assert np.array_equal(zero, value == 0) or ours == "f8_e8m0fnu", ours
