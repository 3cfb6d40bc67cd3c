"""Between Hugging Face folders and GGUF, both ways.

Lossless where the type allows: float32 stays bit for bit, rotary order and names are mapped back exactly, token ids
stay equal. Norms and biases are always stored as F32. Two things cannot come back exactly: Gemma's norms, which GGUF
holds as w + 1 (one float32 rounding), and numbers of the config, which GGUF holds as float32 (the shortest decimal
returns).
"""

import os
from pathlib import Path

from refllm.model.load import load
from refllm.model.to_gguf import GGUF_TYPES, to_gguf
from refllm.model.to_hf import HF_TYPES, to_hf


def convert(source: str | os.PathLike, out: str | os.PathLike, type_name: str = "F32", overwrite: bool = False) -> dict:
    """Write a model in the other format: a name that ends in .gguf becomes a GGUF file, any other a folder.

    Parameters
    ----------
    source : str or path
        Anything `load` takes; packed weights are unpacked first.
    out : path
    type_name : str
        Of the matrices. GGUF: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0; folder: F32, BF16, F16.
    overwrite : bool
        Replace an existing file or model folder.

    Returns
    -------
    dict
        path, type, tensors, bytes, and `kept_f16`: the matrices whose rows no block of this type divides.

    Raises
    ------
    ValueError
        An unknown type, or something the target format cannot say.
    """
    out = Path(out)
    types = GGUF_TYPES if out.suffix == ".gguf" else HF_TYPES
    if type_name not in types:
        raise ValueError(f"type must be one of {', '.join(types)} for {out.name}, got {type_name!r}")
    if out.is_file() and not overwrite:
        raise FileExistsError(f"{out} exists; give another name or allow overwriting")
    model = load(source, dense=True)
    kept = []
    if out.suffix == ".gguf":
        kept = to_gguf(model, out, type_name)
    else:
        to_hf(model, out, type_name, overwrite)
    nbytes = sum(file.stat().st_size for file in out.iterdir()) if out.is_dir() else out.stat().st_size
    return {"path": str(out), "type": type_name, "tensors": len(model.weights), "bytes": nbytes, "kept_f16": kept}
