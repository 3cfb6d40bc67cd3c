"""refllm's own folder: a model stored exactly as it runs.

    refllm.json         {"format": "refllm/1", "name", "recipe", "config", "weights": {name: null | {"kind", ...meta}}}
    model.safetensors   `NAME` for a dense weight, `NAME.PART` for every stored array of a packed one,
                        `tables.METHOD.NAME` for what a run-time method has learned
    tokenizer.json      as loaded

The bytes of model.safetensors are the sizes every table reports.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from refllm.formats.errors import FormatError
from refllm.formats.files import atomic_folder, atomic_write, read_json
from refllm.formats.tensors import StoredTensor, read_safetensors, write_safetensors
from refllm.formats.tokenizer import load_tokenizer
from refllm.kernels.packed.records import from_parts, meta, parts
from refllm.kernels.rope import Rope
from refllm.model.config import Experts, Factored, Latent, LowRankKV, ModelConfig
from refllm.model.model import Model
from refllm.model.names import check_weights, expected_shapes

FORMAT = "refllm/1"
TABLES = "tables."
# Fields of the config that are objects of their own.
_PARTS = {
    "latent": Latent,
    "experts": Experts,
    "factored": Factored,
    "low_rank_kv": LowRankKV,
}
_KEYS = {"format": str, "name": str, "recipe": str, "config": dict, "weights": dict}


def save_native(model: Model, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model, packed weights as they are; the folder appears whole or not at all.

    Parameters
    ----------
    model : Model
    folder : path
        Missing or empty, unless `overwrite`.
    overwrite : bool
        Replace a model folder. Nothing else is ever deleted.

    Returns
    -------
    Path
        The folder.
    """
    arrays, described = {TABLES + name: array for name, array in model.tables.items()}, {}
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
        with atomic_write(temporary / "refllm.json", "w") as file:
            json.dump(document, file, indent=1)
    return Path(folder)


def load_native(folder: str | Path) -> Model:
    """Read what `save_native` wrote. The recipe's run-time stages are bound by `refllm.load`, which knows the methods.

    Raises
    ------
    FormatError
        Another format version, unknown kinds, missing, extra or malformed parts, weights the config does not call for.
    """
    folder = Path(folder)
    path = folder / "refllm.json"
    document = _document(path)
    config = _config(document["config"], path)
    tensors = read_safetensors(folder / "model.safetensors")[0]
    weights = {name: _weight(name, about, tensors, folder) for name, about in document["weights"].items()}
    tables = {
        name.removeprefix(TABLES): _table(name, tensors, folder) for name in list(tensors) if name.startswith(TABLES)
    }
    if tensors:
        raise FormatError(f"tensors that refllm.json does not describe: {', '.join(sorted(tensors)[:3])}", path=folder)
    check_weights(expected_shapes(config), {name: weight.shape for name, weight in weights.items()}, path=folder)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    return Model(config, weights, tokenizer, document["name"], recipe=document["recipe"], tables=tables)


def _document(path: Path) -> dict:
    document = read_json(path)
    if document.get("format") != FORMAT:
        message = f"format {document.get('format')!r} is not {FORMAT!r}; compress the model again with this refllm"
        raise FormatError(message, path=path)
    if set(document) != set(_KEYS) or not all(isinstance(document[key], kind) for key, kind in _KEYS.items()):
        expected = ", ".join(f"{key} ({kind.__name__})" for key, kind in _KEYS.items())
        raise FormatError(f"exactly {expected} are expected, got {', '.join(document)}", path=path)
    return document


def _weight(name: str, description: object, tensors: dict[str, StoredTensor], folder: Path):
    """One weight, its tensors taken out of `tensors`."""
    if description is None:
        if name not in tensors:
            raise FormatError(f"tensor {name} is missing", path=folder / "model.safetensors")
        array = tensors.pop(name).stored()
        if array.dtype not in (np.float32, np.float64) or not np.isfinite(array).all():
            raise FormatError(f"weight {name} must be finite float32 or float64, got {array.dtype}", path=folder)
        return array
    mine = [key for key in tensors if key.startswith(name + ".")]
    found = {key.removeprefix(name + "."): tensors.pop(key).stored() for key in mine}
    if not isinstance(description, dict):
        raise FormatError(f"weight {name} must be described by an object or null", path=folder / "refllm.json")
    details = dict(description)
    try:
        return from_parts(details.pop("kind", None), found, details)
    except ValueError as error:
        raise FormatError(f"weight {name}: {error}", path=folder) from error


def _table(name: str, tensors: dict[str, StoredTensor], folder: Path) -> np.ndarray:
    """What a run-time method has learned; the method knows its shape."""
    array = tensors.pop(name).stored()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FormatError(f"tensor {name} holds NaN or Inf", path=folder)
    return array


def _config(fields: dict, path: Path) -> ModelConfig:
    try:
        rope = lambda key: Rope(**_tuples(dict(fields[key])))
        local = None if fields.get("rope_local") is None else rope("rope_local")
        parts = {name: kind(**_tuples(fields[name])) for name, kind in _PARTS.items() if fields.get(name) is not None}
        return ModelConfig(**{**_tuples(fields), "rope": rope("rope"), "rope_local": local, **parts})
    except (TypeError, ValueError, KeyError) as error:
        raise FormatError(f"bad config: {error}", path=path) from error


def _tuples(fields: dict) -> dict:
    """JSON has lists only; the frozen dataclasses hold tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
