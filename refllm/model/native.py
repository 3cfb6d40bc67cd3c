"""refllm's own folder: a model stored exactly as it runs.

    refllm.json         {"format": "refllm/1", "name", "recipe", "config", "weights": {name: null | {"kind", ...meta}}}
    model.safetensors   `NAME` for a dense weight, `NAME.PART` for every stored array of a packed one
    tokenizer.json      as loaded

The bytes of model.safetensors are the sizes every table reports.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from refllm.formats.errors import FormatError
from refllm.formats.files import atomic_folder
from refllm.formats.tensors import read_safetensors, write_safetensors
from refllm.formats.tokenizer import load_tokenizer
from refllm.kernels.packed.records import from_parts, meta, parts
from refllm.kernels.rope import Rope
from refllm.model.config import ModelConfig
from refllm.model.model import Model

FORMAT = "refllm/1"


def save_native(model: Model, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model, packed weights as they are; the folder appears whole or not at all.

    Parameters
    ----------
    model : Model
    folder : path
        Must not exist, be empty, or be a model folder of refllm with `overwrite`.

    Returns
    -------
    Path
        The folder.
    """
    arrays, described = {}, {}
    for name, weight in model.weights.items():
        if isinstance(weight, np.ndarray):
            arrays[name], described[name] = weight, None
        else:
            arrays.update({f"{name}.{part}": array for part, array in parts(weight).items()})
            described[name] = {"kind": weight.kind, **meta(weight)}
    document = {
        "format": FORMAT,
        "name": model.name,
        "recipe": model.recipe,
        "config": asdict(model.config),
        "weights": described,
    }
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_safetensors(temporary / "model.safetensors", arrays)
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)
        (temporary / "refllm.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return Path(folder)


def load_native(folder: str | Path) -> Model:
    """Read what `save_native` wrote. The recipe's run-time stages are bound by `refllm.load`, which knows the methods.

    Raises
    ------
    FormatError
        Another format version, unknown kinds, missing, extra or malformed parts.
    """
    folder = Path(folder)
    path = folder / "refllm.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version, config, described = document["format"], document["config"], document["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"not a refllm model description ({error})", path=path) from error
    if version != FORMAT:
        raise FormatError(f"format {version!r} is not {FORMAT!r}; compress the model again with this refllm", path=path)
    arrays = read_safetensors(folder / "model.safetensors")
    weights = {}
    for name, description in described.items():
        if description is None:
            weights[name] = _take(arrays, name, folder)
        else:
            mine = [key for key in arrays if key.startswith(name + ".")]
            found = {key.removeprefix(name + "."): arrays.pop(key) for key in mine}
            details = dict(description)
            try:
                weights[name] = from_parts(details.pop("kind"), found, details)
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"weight {name}: {error}", path=folder) from error
    if arrays:
        raise FormatError(f"tensors that refllm.json does not describe: {', '.join(sorted(arrays)[:3])}", path=folder)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    name, recipe = document.get("name", folder.name), document.get("recipe", "")
    return Model(_config(config, path), weights, tokenizer, name, recipe=recipe)


def _take(arrays: dict, name: str, folder: Path) -> np.ndarray:
    if name not in arrays:
        raise FormatError(f"tensor {name} is missing", path=folder / "model.safetensors")
    return arrays.pop(name)


def _config(fields: dict, path: Path) -> ModelConfig:
    try:
        ropes = {k: Rope(**_tuples(fields[k])) for k in ("rope", "rope_local") if fields.get(k)}
        return ModelConfig(**{**_tuples(fields), **ropes})
    except (TypeError, ValueError, KeyError) as error:
        raise FormatError(f"bad config: {error}", path=path) from error


def _tuples(fields: dict) -> dict:
    """JSON has lists only; the frozen dataclasses hold tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
