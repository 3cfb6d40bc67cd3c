"""Suites as plain files, for programs that make no recipes or read no JSON.

    files   NAME.json + NAME.safetensors as shipped, but every array stands in the data file
    raw     NAME/ID/case.txt and one .bin file an array, little-endian, C order; cases.txt lists the folders

A line of case.txt is as in golden/raw.py, with these keys beside `param` and `input`:

    op quant.rtn                                             also: suite, id, result, comment, requires, flag, error
    expect codes u8 2 3 8 codes.out.bin class=bits           as an input; then the comparison
    variant codes u8 2 3 8 codes.ties-away.out.bin class=bits ties=away
"""

import hashlib
from pathlib import Path

import numpy as np

from refllm.evaluate.golden.build import Values, format_json, safetensors_bytes, tensor_entry, write_files
from refllm.evaluate.golden.raw import param_lines, write_array
from refllm.evaluate.golden.suite import Case, Suite


def export_files(folder: Path, suites: list[Suite], schema: bytes) -> None:
    """Write suites as manifest and data file, with every array in the data file.

    Parameters
    ----------
    folder : Path
    suites : list of Suite
    schema : bytes
        Text of golden-v1.schema.json.
    """
    files = {}
    for suite in suites:
        store: dict[str, np.ndarray] = {}
        manifest = _expanded(suite.manifest, suite, store, "")
        data = safetensors_bytes(store)
        manifest["data"] = manifest["data"] | {"sha256": hashlib.sha256(data).hexdigest()}
        files |= {f"{suite.name}.json": format_json(manifest).encode(), f"{suite.name}.safetensors": data}
    write_files(folder, files, schema)


def _expanded(value: object, suite: Suite, store: dict[str, np.ndarray], path: str) -> object:
    """A copy of a part of the manifest in which every array is a key of `store`."""
    if isinstance(value, list):
        return [_expanded(item, suite, store, f"{path}/{i}") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "shape" in value and "dtype" in value:
        tensor = Values(value["dtype"], suite.array(value, f"{suite.name}{path}"), packing=value.get("packing"))
        return tensor_entry(path.lstrip("/"), tensor, store, inline=-1)
    return {key: _expanded(inner, suite, store, f"{path}/{key}") for key, inner in value.items()}


def export_raw(folder: Path, suites: list[Suite]) -> None:
    """Write one folder a case.

    Parameters
    ----------
    folder : Path
    suites : list of Suite
        Linted: the names of arrays become names of files.
    """
    index = []
    for suite in suites:
        for case in suite.cases:
            place = folder / suite.name / str(case.id)
            place.mkdir(parents=True)
            lines = [*_case_lines(case), *_array_lines(suite, case, place)]
            (place / "case.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
            index.append(f"{suite.name}/{case.id}")
    (folder / "cases.txt").write_text("".join(f"{line}\n" for line in index), encoding="utf-8", newline="\n")


def _case_lines(case: Case) -> list[str]:
    lines = [f"suite {case.suite}", f"id {case.id}", f"op {case.op}", f"result {case.result}"]
    lines += [f"comment {' '.join(case.comment.split())}"]
    lines += [f"error {case.error}"] if case.error else []
    lines += [f"requires {name}" for name in case.requires] + [f"flag {flag}" for flag in case.flags]
    return lines + param_lines(case.params)


def _array_lines(suite: Suite, case: Case, place: Path) -> list[str]:
    def write(key, name, tensor, file, rest):
        line = write_array(place, key, name, tensor["dtype"], suite.array(tensor, f"{case.name} {name}"), file)
        return " ".join([line, *(f"{k}={v}" for k, v in rest.items())])

    lines = [write("input", name, tensor, f"{name}.in.bin", {}) for name, tensor in case.inputs.items()]
    for name, output in case.expected.items():
        if "tensor" in output:
            lines.append(write("expect", name, output["tensor"], f"{name}.out.bin", output["compare"]))
        for variant in output.get("variants", ()):
            when = "-".join(f"{key}-{value}" for key, value in variant["when"].items())
            rest = output["compare"] | variant["when"]
            lines.append(write("variant", name, variant["tensor"], f"{name}.{when}.out.bin", rest))
    return lines
