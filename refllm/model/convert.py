"""Between Hugging Face folders and GGUF, both ways; and packed models into the layouts of other software.

Lossless where the type allows: float32 stays bit for bit, rotary order and names are mapped back exactly, token ids
stay equal. Norms and biases are always stored as F32. Two things cannot come back exactly: Gemma's norms, which GGUF
holds as w + 1 (one float32 rounding), and numbers of the config, which GGUF holds as float32 (the shortest decimal
returns).
"""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from refllm.kernels.packed import encode_codes
from refllm.model.load import load
from refllm.model.model import Model
from refllm.model.native import save_native
from refllm.model.quantized import METHODS
from refllm.model.to_gguf import GGUF_TYPES, to_gguf
from refllm.model.to_hf import HF_TYPES, to_hf, to_quantized_hf
from refllm.model.walk import layer_linears

# Types of a folder's linears: what encodes one, and the layout that stores it.
_ENCODED = {
    "NF4": (encode_codes.blockwise, "bitsandbytes"),
    "NF4_DOUBLE": (partial(encode_codes.blockwise, double_quant=True), "bitsandbytes"),
    "FP4": (partial(encode_codes.blockwise, table="FP4_BNB"), "bitsandbytes"),
    "INT8": (encode_codes.int8_rows, "bitsandbytes"),
    "FP8": (encode_codes.fp8_blocks, "fp8"),
    "NVFP4": (encode_codes.nvfp4, "compressed-tensors"),
}
FOLDER_TYPES = (*HF_TYPES, *_ENCODED)
FORMATS = ("native", "gguf", *METHODS)


def convert(source: str | os.PathLike, out: str | os.PathLike, type_name: str = "F32", overwrite: bool = False) -> dict:
    """Write a model in the other format: a name that ends in .gguf becomes a GGUF file, any other a folder.

    Parameters
    ----------
    source : str or path
        Anything `load` takes; packed weights are unpacked first.
    out : path
    type_name : str
        Of the matrices. GGUF: F32, F16, BF16 or a block type (Q8_0, Q4_K ...). Folder: F32, BF16, F16; or, for the
        linears of all layers, NF4, NF4_DOUBLE (double quantised), FP4, INT8 (all bitsandbytes), FP8, NVFP4
        (compressed-tensors).
    overwrite : bool
        Replace an existing file or model folder.

    Returns
    -------
    dict
        path, type, tensors, bytes, and `other_types`: matrices whose rows no block of this type divides, and the type
        they got, as llama-quantize chooses it (Q4_K -> Q5_0 ...; F16 where that fails too).

    Raises
    ------
    ValueError
        An unknown type, or something the target format cannot say.
    """
    out = Path(out)
    types = GGUF_TYPES if out.suffix == ".gguf" else FOLDER_TYPES
    if type_name not in types:
        raise ValueError(f"type must be one of {', '.join(types)} for {out.name}, got {type_name!r}")
    if out.is_file() and not overwrite:
        raise FileExistsError(f"{out} exists; give another name or --overwrite (in Python: overwrite=True)")
    model = load(source, dense=True)
    others = {}
    if out.suffix == ".gguf":
        others = to_gguf(model, out, type_name)
    elif type_name in HF_TYPES:
        to_hf(model, out, type_name, overwrite)
    else:
        encode, method = _ENCODED[type_name]
        to_quantized_hf(_with_linears(model, encode), out, method, overwrite)
    nbytes = sum(file.stat().st_size for file in out.iterdir()) if out.is_dir() else out.stat().st_size
    return {"path": str(out), "type": type_name, "tensors": len(model.weights), "bytes": nbytes, "other_types": others}


def _with_linears(model: Model, encode) -> Model:
    weights = dict(model.weights)
    for layer in range(model.config.num_layers):
        for name in layer_linears(layer, model.config):
            try:
                weights[name] = encode(weights[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return replace(model, weights=weights)


def save(model: Model, out: str | os.PathLike, format: str = "native", overwrite: bool = False) -> Path:
    """Store a model with its weights as they are packed.

    Parameters
    ----------
    model : Model
    out : path
        A folder; for gguf a file.
    format : str
        native (refllm's own, stores everything), gguf, gptq, awq, compressed-tensors, bitsandbytes or fp8.
    overwrite : bool
        Replace an existing file or model folder.

    Raises
    ------
    ValueError
        A tensor that the layout cannot store exactly; the message says which formats can.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "native":
        return save_native(model, out, overwrite=overwrite)
    if format != "gguf":
        to_quantized_hf(model, out, format, overwrite)
        return out
    if out.suffix != ".gguf":
        raise ValueError(f"the name of a GGUF file must end in .gguf, got {out.name!r}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; give another name or --overwrite (in Python: overwrite=True)")
    to_gguf(model, out, None)
    return out
