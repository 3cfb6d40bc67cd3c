"""A suite of a few cases for the tests of the tool: op demo.double gives y = 2 x, and its float16 rounding z."""

import json

import numpy as np

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, folder_files, render, values, write_files
from refllm.evaluate.golden.suite import SCHEMA_FILE, default_root

SCHEMA = (default_root() / SCHEMA_FILE).read_bytes()
BITS = {"class": "bits"}


def double(op, params, inputs):
    """The right implementation."""
    if not np.isfinite(inputs["x"]).all():
        raise ValueError("not finite")
    return {"y": (2 * inputs["x"]).astype(np.float32)}


def spec(version="1.0.0", extra=()):
    recipe = {"kind": "splitmix64_dyadic", "seed": "0x0000000000001234", "bits": 8, "exp2": -4}
    long = np.array([((z >> 56) - 128) / 16 for z in _splitmix(0x1234, 40)], np.float32)
    y = lambda rows: Output(BITS, values("f32", rows))
    either = (({"sign": "plus"}, values("f32", [2, 4])), ({"sign": "minus"}, values("f32", [-2, -4])))
    cases = [
        CaseSpec(1, "two numbers", ("Basic",), {"x": values("f32", [1.5, -2])}, {"y": y([3, -4])}),
        CaseSpec(2, "a long row", ("Long",), {"x": values("f32", long, recipe=recipe)}, {"y": y(2 * long)}),
        CaseSpec(3, "NaN", ("NonFinite",), {"x": values("f32", [float("nan")])}, result="invalid", error="value"),
        CaseSpec(4, "nothing", ("Empty",), {"x": values("f32", [])}, {"y": y([])}, "acceptable"),
        CaseSpec(7, "either sign", ("Basic",), {"x": values("f32", [1, 2])}, {"y": Output(BITS, variants=either)}),
        *extra,
    ]
    head = {"suite": "demo/double", "suite_version": version, "op": "demo.double", "title": "Twice"}
    head["generator"] = {"name": "tests", "version": "1"}
    notes = {name: {"bug_type": "BASIC", "description": f"about {name}"} for name in ("Basic", "Long", "Empty")}
    notes["NonFinite"] = {"bug_type": "NON_FINITE", "description": "reject", "links": ["https://example.org/1"]}
    return SuiteSpec(head, notes, [({"params": {"times": 2}}, cases)])


def _splitmix(seed, n):
    from refllm.evaluate.golden.suites.exact import splitmix64

    return splitmix64(seed, n)


def write(root, spec=None):
    """A folder of vectors with one suite."""
    files = render(spec or globals()["spec"]())
    write_files(root, files, SCHEMA)
    return root


def write_manifest(root, change):
    """The same folder with the manifest changed by `change(manifest)`, every hash of files put right."""
    files = render(spec())
    manifest = json.loads(files["demo/double.json"])
    change(manifest)
    files["demo/double.json"] = json.dumps(manifest).encode()
    for name, data in folder_files(files, SCHEMA).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root
