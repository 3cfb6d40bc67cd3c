"""A checkpoint folder in Hugging Face layout: config.json, safetensors (one file or an index), generation_config.json.

Raw dictionaries and unread tensors only; `refllm.model.from_hf` says what they mean.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from refllm.formats.errors import FormatError
from refllm.formats.files import read_json
from refllm.formats.tensors import StoredTensor, open_folder


@dataclass(frozen=True)
class HFFolder:
    """What the folder holds, as written; tensors are not read yet.

    config, generation : dict
        config.json and generation_config.json ({} where the latter is missing).
    quantization : object
        quantization_config of config.json, or else the older file of its own; None for a plain checkpoint.
    quantization_path : Path
        Where that was found.
    """

    path: Path
    config: dict
    generation: dict
    tensors: dict[str, StoredTensor]
    quantization: object = None
    quantization_path: Path | None = None


def open_hf(folder: str | os.PathLike) -> HFFolder:
    """Open a checkpoint folder without reading any weight.

    Raises
    ------
    FormatError
        No config.json, two descriptions of a quantisation that contradict each other, anything `open_folder` refuses.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FormatError(
            "no config.json in this folder; a model folder in Hugging Face layout was expected", path=folder
        )
    config = read_json(folder / "config.json")
    found, place = quantization(folder, config)
    generation = folder / "generation_config.json"
    generation = read_json(generation) if generation.exists() else {}
    return HFFolder(folder, config, generation, open_folder(folder), found, place)


_SIDE_FILES = ("quantize_config.json", "quantization_config.json")
_SAME = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")  # must not differ between two descriptions


def quantization(folder: Path, config: dict) -> tuple[object, Path | None]:
    """How a folder says it is quantised, and where: config.json goes before the older files beside it.

    Returns
    -------
    object, Path
        None, None for a plain checkpoint. A quantize_config.json without quant_method is GPTQ's.
    """
    place, found = folder / "config.json", config.get("quantization_config")
    if found is None and config.get("compression_config") is not None:
        raise FormatError("compression_config is the key of an old compressed-tensors; it is not read", path=place)
    for name in _SIDE_FILES:
        if not (folder / name).exists():
            continue
        beside = read_json(folder / name)
        if found is None:
            return {"quant_method": "gptq"} | beside, folder / name
        if isinstance(found, dict):
            different = [key for key in _SAME if key in found and key in beside and found[key] != beside[key]]
            if different:
                raise FormatError(f"{different[0]} differs from quantization_config in config.json", path=folder / name)
    return found, None if found is None else place
