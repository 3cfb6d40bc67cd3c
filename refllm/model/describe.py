"""describe(path): what a model file or folder holds, without reading its weights."""

import os
from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path

from refllm.formats.blocks import BLOCKS, BlockFormat
from refllm.formats.errors import FormatError
from refllm.formats.files import read_json
from refllm.formats.gguf import GGUFFile, read_gguf
from refllm.formats.hf import quantization
from refllm.formats.tensors import open_folder, read_safetensors
from refllm.model import from_gguf, from_hf
from refllm.model.load import BUILT_IN, resolve
from refllm.model.quantized import HEAD, read_settings, take_records


def describe(source: str | os.PathLike) -> dict:
    """Format, architecture, tensors and the conventions a reader must know.

    Parameters
    ----------
    source : str or path
        A folder, a .gguf or .safetensors file, or a built-in name.

    Returns
    -------
    dict
        format, path, architecture, parameters, bytes, types {dtype: count}, conventions {name: text},
        config (None where refllm cannot run it, `reason` says why), metadata, tensors [{name, shape, dtype, bytes}].

    Raises
    ------
    FormatError
        The file is damaged.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return _report("safetensors", path, None, _plain(tensors), {}, metadata, lambda: None)
    path = path if path.exists() or str(source) not in BUILT_IN else resolve(source)
    path = resolve(path)
    if path.is_file():
        return _describe_gguf(path)
    return _describe_folder(path)


def _report(form, path, architecture, tensors, conventions, metadata, parse) -> dict:
    try:
        config, reason = parse(), None
    except FormatError as error:
        config, reason = None, str(error)
    return {
        "format": form,
        "path": str(path),
        "architecture": architecture,
        "parameters": sum(prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "types": dict(Counter(tensor["dtype"] for tensor in tensors)),
        "conventions": conventions,
        "config": None if config is None else asdict(config),
        "reason": reason,
        "metadata": metadata,
        "tensors": tensors,
    }


def _plain(tensors: dict, dtype: str = "dtype") -> list[dict]:
    row = lambda t: {"name": t.name, "shape": list(t.shape), "dtype": getattr(t, dtype), "bytes": t.nbytes}
    return [row(tensor) for tensor in tensors.values()]


def _describe_gguf(path: Path) -> dict:
    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    rows = [
        {"name": t.name, "shape": list(t.shape), "dtype": t.type_name, "bytes": t.nbytes} for t in file.tensors.values()
    ]
    conventions = _gguf_conventions(file, architecture)
    metadata = {key: _short(value) for key, value in file.metadata.items()}
    form = f"GGUF v{file.version}"
    return _report(form, path, architecture, rows, conventions, metadata, lambda: from_gguf.parse_config(file))


def _gguf_conventions(file: GGUFFile, architecture: object) -> dict[str, str]:
    rope = "interleaved pairs (q and k rows permuted back on load)" if architecture == "llama" else "half-split pairs"
    vocabulary, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    conventions = {
        "rope layout": rope,
        "head": "tied to the embedding" if "output.weight" not in file.tensors else "separate",
        "norms": "stored as w + 1" if architecture == "gemma3" else "stored as w",
        "vocabulary": f"{vocabulary}, pre-tokenizer {pre}",
    }
    for name in sorted({t.type_name for t in file.tensors.values()} & set(BLOCKS)):
        conventions[f"packing of {name}"] = _packing(BLOCKS[name])
    if "rope_freqs.weight" in file.tensors:
        conventions["rope scaling"] = "frequencies divided by rope_freqs.weight"
    return conventions


def _packing(block: BlockFormat) -> str:
    fields = "; ".join(f"{field.name} {field.text}" for field in block.layout.fields)
    return f"{block.block_size} numbers along in are {block.bytes_per_block} bytes: {fields}"


def _short(value: object) -> object:
    """Long arrays and texts by their size, so that a report stays readable."""
    if isinstance(value, str):
        return value if len(value) <= 200 else f"{value[:200]}… ({len(value)} characters)"
    if isinstance(value, list) or hasattr(value, "tolist"):
        items = value if isinstance(value, list) else value.tolist()
        return items if len(items) <= 8 else f"{len(items)} values: {items[:3]} …"
    return value


def _describe_folder(path: Path) -> dict:
    native = path / "refllm.json"
    tensors = open_folder(path)
    if native.exists():
        document = read_json(native)
        config = document.get("config", {})
        conventions = {"recipe": str(document.get("recipe")), "rope layout": "half-split pairs"}
        return _report("refllm", path, config.get("architecture"), _plain(tensors), conventions, {}, lambda: None)
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    generation = path / "generation_config.json"
    found, place = quantization(path, config)

    def parse():
        has_head = any(name.startswith(f"{HEAD}.") for name in tensors)
        generated = read_json(generation) if generation.exists() else {}
        parsed = from_hf.parse_config(config, generated, has_head, path=path)
        if found is not None:  # one module tells whether the label fits the tensors
            some = [name for name in from_hf.linears(parsed) if not name.startswith(HEAD)][:1]
            take_records(found, from_hf.text_tensors(tensors), some, place)
        return parsed

    conventions = {
        "rope layout": "half-split pairs",
        "head": "separate" if any(name.startswith(f"{HEAD}.") for name in tensors) else "tied to the embedding",
        "norms": "stored as w, used as 1 + w" if "Gemma" in str(architecture) else "stored as w",
    }
    form = "Hugging Face"
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        form, conventions["quantization"] = f"{form}, {method}", str(_short(str(found)))
        try:
            conventions |= read_settings(found, place)[1].conventions
        except FormatError:
            pass  # parse() gives it as the reason
    return _report(form, path, architecture, _plain(tensors), conventions, {}, parse)
