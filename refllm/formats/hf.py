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
    """What the folder holds: `config` and `generation` as written ({} where the latter is missing), unread tensors."""

    path: Path
    config: dict
    generation: dict
    tensors: dict[str, StoredTensor]


def open_hf(folder: str | os.PathLike) -> HFFolder:
    """Open a checkpoint folder without reading any weight.

    Raises
    ------
    FormatError
        No config.json, a quantised checkpoint of a kind that is not read, or anything `open_folder` refuses.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FormatError(
            "no config.json in this folder; a model folder in Hugging Face layout was expected", path=folder
        )
    config = read_json(folder / "config.json")
    _refuse_quantised(folder, config)
    generation = folder / "generation_config.json"
    return HFFolder(folder, config, read_json(generation) if generation.exists() else {}, open_folder(folder))


def _refuse_quantised(folder: Path, config: dict) -> None:
    """Packed checkpoints would load as garbage when taken for plain weights."""
    place, found = folder / "config.json", config.get("quantization_config")
    for name in ("quantize_config.json", "quantization_config.json"):
        if found is None and (folder / name).exists():
            place, found = folder / name, read_json(folder / name)
    if found is not None:
        method = found.get("quant_method", found) if isinstance(found, dict) else found
        raise FormatError(
            f"quantised checkpoint (quant_method {method!r}); plain float weights were expected", path=place
        )
