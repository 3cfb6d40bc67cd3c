"""Writing suites: manifests, data files and SHA256SUMS come from here and from nowhere else.

A generator (refllm/evaluate/golden/suites/) says what the cases are; `render` turns them into the bytes of the files.
The same generator always gives the same bytes.
"""

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from refllm.evaluate.golden.suite import SCHEMA_FILE, STORAGE, SUMS_FILE, array_hash
from refllm.formats.files import atomic_write
from refllm.formats.tensors import write_safetensors

INLINE = 32  # elements: small arrays stand in the manifest, where a page of a lesson can print them


@dataclass(frozen=True)
class Values:
    """An array of a case.

    dtype : logical dtype of the schema; array : in its storage type; recipe : how to make it, if it is made so;
    packing : the schema's description of packed codes.
    """

    dtype: str
    array: np.ndarray
    recipe: dict | None = None
    packing: dict | None = None


@dataclass(frozen=True)
class Output:
    """An expected output: one `tensor`, or `variants` as a list of (when, Values), refllm's own first."""

    compare: dict
    tensor: Values | None = None
    variants: tuple[tuple[dict, Values], ...] = ()


@dataclass(frozen=True)
class CaseSpec:
    """A case to write; `params` are those of its own, beside the group's."""

    id: int
    comment: str
    flags: tuple[str, ...]
    inputs: dict[str, Values]
    expected: dict[str, Output] = field(default_factory=dict)
    result: str = "valid"
    error: str | None = None
    params: dict = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteSpec:
    """A suite to write: `head` holds the manifest's keys up to `notes`, `groups` are (head, cases) pairs."""

    head: dict
    notes: dict
    groups: list[tuple[dict, list[CaseSpec]]]

    @property
    def name(self) -> str:
        """As in the manifest: family/method."""
        return self.head["suite"]


def values(dtype: str, nested: object, **rest) -> Values:
    """Values from nested lists of numbers, converted exactly.

    Raises
    ------
    ValueError
        A number that the dtype cannot hold.
    """
    storage = np.dtype(STORAGE[dtype])
    wide = np.array(nested, np.float64 if storage.kind == "f" else np.int64)
    with np.errstate(all="ignore"):
        array = wide.astype(storage)
    same = np.array_equal(array.astype(wide.dtype), wide, equal_nan=storage.kind == "f")
    if not same:
        raise ValueError(f"a value does not fit {dtype}: {nested}")
    return Values(dtype, array, **rest)


def manifest_head(
    generator: str, name: str, title: str, header: list[str], lesson: str, *, op: str = "", version: str = "1.0.0"
) -> dict:
    """The `head` of a suite.

    Parameters
    ----------
    generator : str
        `__name__` of the module that makes it.
    name : str
        family/method.
    title, header, lesson : str, list of str, path of the lesson
    op : str
        Default: the name with a dot, family.method.
    version : str
    """
    return {
        "suite": name,
        "suite_version": version,
        "op": op or name.replace("/", "."),
        "title": title,
        "header": header,
        "lesson": lesson,
        "generator": {"name": f"refllm golden regen, suites/{generator.split('.')[-1]}.py", "version": "1"},
    }


def render(spec: SuiteSpec) -> dict[str, bytes]:
    """The files of a suite.

    Returns
    -------
    dict of relative path -> bytes
        `NAME.json` and `NAME.safetensors`.
    """
    store: dict[str, np.ndarray] = {}
    groups = []
    for head, cases in spec.groups:
        groups.append(head | {"cases": [_case(case, store) for case in cases]})
    data = safetensors_bytes(store)
    file = f"{spec.name.split('/')[-1]}.safetensors"
    manifest = {"schema": "refllm/golden/v1"} | spec.head
    manifest["data"] = {"file": file, "sha256": hashlib.sha256(data).hexdigest()}
    manifest["notes"] = spec.notes
    manifest["num_cases"] = sum(len(group["cases"]) for group in groups)
    manifest["groups"] = groups
    return {f"{spec.name}.json": format_json(manifest).encode(), f"{spec.name}.safetensors": data}


def safetensors_bytes(store: dict[str, np.ndarray]) -> bytes:
    """A .safetensors file of some arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.safetensors"
        write_safetensors(path, store)
        return path.read_bytes()


def _case(case: CaseSpec, store: dict) -> dict:
    entry = {"id": case.id, "comment": case.comment, "result": case.result, "flags": list(case.flags)}
    if case.params:
        entry["params"] = case.params
    if case.error:
        entry["error"] = case.error
    entry["inputs"] = {name: tensor_entry(f"{case.id}/{name}", v, store) for name, v in case.inputs.items()}
    if case.result != "invalid":
        entry["expected"] = {name: _output(f"{case.id}/{name}", o, store) for name, o in case.expected.items()}
    return entry


def _output(key: str, output: Output, store: dict) -> dict:
    if output.tensor is not None:
        return {"tensor": tensor_entry(key, output.tensor, store), "compare": output.compare}
    variants = []
    for when, tensor in output.variants:
        suffix = ",".join(f"{k}={v}" for k, v in when.items())
        variants.append({"when": when, "tensor": tensor_entry(f"{key}/{suffix}", tensor, store)})
    return {"variants": variants, "compare": output.compare}


def tensor_entry(key: str, tensor: Values, store: dict[str, np.ndarray], inline: int = INLINE) -> dict:
    """The manifest's entry of an array; arrays of more than `inline` elements go to `store` under `key`."""
    entry: dict = {"dtype": tensor.dtype, "shape": list(tensor.array.shape)}
    if tensor.packing:
        entry["packing"] = tensor.packing
    if tensor.recipe:
        entry["recipe"] = tensor.recipe
    elif tensor.array.size <= inline:
        flat = tensor.array.reshape(-1).tolist()
        entry["inline"] = [_hex(x) if isinstance(x, float) else x for x in flat]
    else:
        entry["key"] = key
        store[key] = tensor.array
    return entry | {"sha256": array_hash(tensor.array)}


def _hex(x: float) -> str:
    """A hex float without the zeros that float.hex pads with: 0x1.8p+1."""
    return re.sub(r"\.?0+p", "p", x.hex()) if "." in x.hex() else x.hex()


def format_json(value: object, width: int = 120, indent: int = 0) -> str:
    """JSON that people can read and `git diff` can show: whatever fits stands on one line, the rest is indented."""
    return _layout(value, width, indent) + "\n"


def _layout(value: object, width: int, indent: int) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) + indent <= width or not isinstance(value, dict | list) or not value:
        return flat
    if isinstance(value, dict) and ("shape" in value or "tensor" in value):  # an array: one line, however long
        return flat
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        if not any(isinstance(item, str) and " " in item for item in value):
            return flat  # a row of numbers
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{pad}{json.dumps(k)}: {_layout(v, width, indent + 1)}" for k, v in value.items()]
    else:
        items = [pad + _layout(item, width, indent + 1) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + "\n" + ",\n".join(items) + "\n" + " " * indent + closing


def check_version(old: dict, new: dict) -> None:
    """Refuse a new manifest that breaks the promise of its version number.

    An id that is gone, or whose inputs, params, result or expected values changed, needs a new major version; a new id
    a new minor one; any other change a new patch version.

    Raises
    ------
    ValueError
    """
    before, after = _contents(old), _contents(new)
    gone = sorted(before.keys() - after.keys())
    changed = sorted(i for i in before.keys() & after.keys() if before[i] != after[i])
    added = sorted(after.keys() - before.keys())
    level, why = 3, ""
    if gone or changed:
        level, why = 0, f"cases {gone} are gone, cases {changed} changed"
    elif added:
        level, why = 1, f"cases {added} are new"
    elif {**old, "suite_version": ""} != {**new, "suite_version": ""}:
        level, why = 2, "the wording changed"
    was, now = (tuple(map(int, m["suite_version"].split("."))) for m in (old, new))
    if level < 3 and not now[: level + 1] > was[: level + 1]:
        part = ("major", "minor", "patch")[level]
        raise ValueError(
            f"{new['suite']}: {why}; raise the {part} part of suite_version above {old['suite_version']} "
            f"(it is {new['suite_version']})"
        )


def _contents(manifest: dict) -> dict[int, str]:
    """What each id promises: all but wording and flags, however the arrays are stored."""
    found = {}
    for group in manifest["groups"]:
        for case in group["cases"]:
            promise = {k: v for k, v in case.items() if k not in ("comment", "flags", "id")}
            promise["params"] = group["params"] | case.get("params", {})
            promise["op"], promise["requires"] = manifest["op"], group.get("requires", [])
            found[case["id"]] = json.dumps(_without_place(promise), sort_keys=True)
    return found


def _without_place(value: object) -> object:
    """A copy in which every array is its dtype, shape and hash only."""
    if isinstance(value, list):
        return [_without_place(item) for item in value]
    if not isinstance(value, dict):
        return value
    place = {"key", "inline", "recipe"} if "sha256" in value else set()
    return {key: _without_place(inner) for key, inner in value.items() if key not in place}


def folder_files(files: dict[str, bytes], schema: bytes) -> dict[str, bytes]:
    """All files of a folder of vectors: the suites', the schema and SHA256SUMS of them."""
    files = {SCHEMA_FILE: schema, **files}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    return {**files, SUMS_FILE: sums.encode()}


def write_files(root: Path, files: dict[str, bytes], schema: bytes) -> None:
    """Write suites into a folder of vectors, with the schema and SHA256SUMS of exactly these files.

    Parameters
    ----------
    root : Path
        Made if it is missing.
    files : dict of relative path -> bytes
        From `render`, of all suites the folder is to hold.
    schema : bytes
        Text of golden-v1.schema.json.
    """
    for name, data in folder_files(files, schema).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != data:
            with atomic_write(path) as file:
                file.write(data)
