"""load(source): a built-in name, a Hugging Face folder, a .gguf file or a folder refllm compressed -> Model."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from refllm.formats.errors import FormatError
from refllm.formats.files import data_path
from refllm.formats.tensors import refuse_pickle
from refllm.model.model import Model

BUILT_IN = ("tiny", "tiny-outliers", "smollm2")
OUTLIERS = "tiny-outliers"


def load(source: str | os.PathLike, *, dtype: str = "float32", dense: bool = False) -> Model:
    """Read a model.

    Parameters
    ----------
    source : str or path
        "tiny" (bundled), "tiny-outliers" (the same function with channels that `refllm.model.planter` has made large),
        "smollm2" (after `refllm fetch smollm2`), a folder in Hugging Face layout, a .gguf file, or a folder written by
        `refllm compress`.
    dtype : "float32" or "float64"
        Of dense weights and therefore of the whole forward pass. "float64" implies `dense`.
    dense : bool
        Unpack every packed weight; otherwise the quantised tensors of a GGUF file stay as they are stored.

    Returns
    -------
    Model

    Raises
    ------
    FormatError
        Nothing is guessed: an unknown architecture, rope or tensor type, a missing or unexpected tensor, a wrong shape,
        a weight that is not finite is named in one line.
    FileNotFoundError
        No such model; the message says how to get one.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
    path = resolve(source)
    if str(source) == OUTLIERS and path == data_path("tiny"):
        from refllm.model.planter import plant_outliers

        return replace(plant_outliers(load("tiny", dtype=dtype)), name=OUTLIERS)
    name = str(source) if str(source) in BUILT_IN else (path.stem if path.is_file() else path.resolve().name)
    if path.is_file():
        model = _load_gguf(path, dtype)
    elif (path / "refllm.json").exists():
        from refllm.model.native import load_native

        model = load_native(path)
    else:
        model = _load_hf(path, dtype)
    _check_vocabulary(model, path)
    model = replace(model, name=model.name or name)  # a compressed folder knows the name of its model
    return densify(model, dtype) if dense or dtype == "float64" else model


def _check_vocabulary(model: Model, path: Path) -> None:
    if model.tokenizer is not None and model.tokenizer.vocab_size > model.config.vocab_size:
        message = f"the tokenizer has {model.tokenizer.vocab_size} ids, the embedding {model.config.vocab_size} rows"
        raise FormatError(message, path=path)


def resolve(source: str | os.PathLike) -> Path:
    """The file or folder a MODEL argument means. An existing path goes before a built-in name."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        refuse_pickle(path)
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            hint = "; give the folder it is in" if path.suffix == ".safetensors" else ""
            message = f"neither a .gguf file (it begins with {magic!r}) nor a folder with a model{hint}"
            raise FormatError(message, path=path, offset=0)
        return path
    if str(source) in ("tiny", OUTLIERS):
        return data_path("tiny")
    if str(source) == "smollm2":
        from refllm.formats.fetch import smollm2_path

        return smollm2_path()
    raise FileNotFoundError(
        f"no such file or folder {str(source)!r}: give {' or '.join(BUILT_IN)}, a folder in Hugging Face layout or "
        "a .gguf file"
    )


def densify(model: Model, dtype: str = "float32") -> Model:
    """The same model with every weight a dense array of this dtype; packed records are unpacked."""
    dense = lambda weight: weight if isinstance(weight, np.ndarray) else weight.dense()
    return replace(
        model, weights={name: dense(weight).astype(dtype, copy=False) for name, weight in model.weights.items()}
    )


def _load_hf(path: Path, dtype: str) -> Model:
    from refllm.formats.hf import open_hf
    from refllm.formats.tokenizer import load_tokenizer
    from refllm.model.from_hf import read_model

    folder = open_hf(path)
    config, weights = read_model(folder, dtype)
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
    return Model(config, weights, tokenizer)


def _load_gguf(path: Path, dtype: str) -> Model:
    from refllm.formats.gguf import read_gguf
    from refllm.formats.gguf_vocab import tokenizer_from_gguf
    from refllm.model.from_gguf import read_model

    file = read_gguf(path)
    config, weights = read_model(file, dtype)
    return Model(config, weights, tokenizer_from_gguf(file.metadata, path=path))
