"""Rows of a comparison, kept in a file as they are measured: what takes hours can stop, and go on where it stopped.

One JSON object a line: {"of": fingerprint, "row": {...}}. A row is taken for another of the same model, text, setting,
processor and version of refllm, and for nothing else; rows of other comparisons may stand in the same file.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from refllm import __version__
from refllm.evaluate.bench.machine import cpu_name
from refllm.formats.errors import FormatError
from refllm.formats.files import atomic_write
from refllm.kernels.packed.records import meta, parts
from refllm.model.model import Model


def fingerprint(model: Model, setting, asked: list) -> str:
    """What a row depends on but for its recipe: sha256 of all that is measured, by what, and on what.

    Parameters
    ----------
    model : Model
        The base.
    setting : refllm.evaluate.compare.Setting
        With threads as a number.
    asked : list
        Prompts and answers of all tasks.
    """
    digest = hashlib.sha256()
    for name, weight in sorted((*model.weights.items(), *model.tables.items())):
        arrays = {"": weight} if isinstance(weight, np.ndarray) else parts(weight)
        of_record = None if isinstance(weight, np.ndarray) else {"kind": weight.kind, **meta(weight)}
        digest.update(json.dumps([name, of_record]).encode())
        for part, array in arrays.items():
            digest.update(f"{part} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    fields = {name: value for name, value in vars(setting).items() if name not in ("ids", "calibration", "tasks")}
    for ids in (setting.ids, setting.calibration):
        digest.update(np.asarray([] if ids is None else ids, np.int64).tobytes() + b"end")
    whole = [__version__, cpu_name(), model.recipe, asdict(model.config), fields, asked]
    digest.update(json.dumps(whole, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def kept_rows(path: str | Path, of: str) -> dict[str, dict]:
    """The rows of this fingerprint by recipe; a missing file has none.

    A last line without its end (the process was stopped while it wrote) is cut off.

    Raises
    ------
    FormatError
        A line that is no row.
    """
    path, rows = Path(path), {}
    if not path.exists():
        return rows
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            recipe = entry["row"]["recipe"]
            same = entry["of"] == of
        except (ValueError, TypeError, KeyError):
            raise FormatError(
                f"line {number} is not a row kept by compare; expected a file that an earlier compare has begun, or a "
                "new name",
                path=path,
            ) from None
        if same:
            rows[recipe] = entry["row"]
    if len(whole) < len(data):
        with atomic_write(path) as file:
            file.write(whole)
    return rows


def keep_row(path: str | Path, of: str, row: dict) -> None:
    """Add one row at the end of the file, and wait until it is on disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"of": of, "row": row}) + "\n")
        file.flush()
        os.fsync(file.fileno())
