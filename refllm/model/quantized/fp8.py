"""Block-FP8 folders (DeepSeek-V3, Qwen3-FP8) <-> records. Activations stay floats."""

from collections.abc import Mapping

import numpy as np

from refllm.formats.checkpoints import fp8_block as layout
from refllm.formats.checkpoints import fp8_block_pack, fp8_block_unpack
from refllm.formats.tensors import StoredTensor
from refllm.kernels.packed.records import CodeWeight, Record
from refllm.model.quantized.base import (
    HEAD,
    Packed,
    Settings,
    arrays,
    check_keys,
    describe,
    either,
    is_block,
    names_or_none,
    one_of,
    same_settings,
    skipped_by,
)

SUFFIXES = ("weight", "weight_scale_inv", "activation_scale", "input_scale")
HARMLESS = ("quant_method", "dequantize")
KNOWN = {
    "weight_block_size": is_block,
    "activation_scheme": one_of("dynamic", "static"),
    "modules_to_not_convert": names_or_none,
    "ignored_layers": names_or_none,
    "modules_to_convert": one_of(None),
    "fmt": one_of("e4m3", None),
    "scale_fmt": one_of("float", "ue8m0", None),
    "expert_dtype": one_of("fp8"),
}


def read(config: dict) -> Settings:
    """Check a quantization_config."""
    check_keys(config, KNOWN, HARMLESS)
    if "weight_block_size" not in config:
        raise ValueError("weight_block_size is missing; only blocks of weights are read")
    block, skipped = tuple(config["weight_block_size"]), either(config, "modules_to_not_convert", "ignored_layers")
    conventions = {
        "packing": "E4M3 codes; weight_scale_inv multiplies",
        "zero point": "none",
        "group size": f"blocks of {block[0]} x {block[1]}",
        "activations": "the checkpoint rounds them to FP8; refllm runs them as floats",
        "ignored modules": ", ".join(skipped or []) or "none",
    }
    return Settings({"block": block}, skipped_by(skipped), conventions)


def load(values: dict, tensors: Mapping[str, StoredTensor], module: str) -> CodeWeight:
    """The record of one module; raises ValueError for tensors that are missing, misshapen or of another dtype."""
    weights = {name: tensor for name, tensor in tensors.items() if name in SUFFIXES[:2]}
    codes, scale = fp8_block_unpack(arrays(weights, layout.STORED[0]), block_size=values["block"])
    return CodeWeight.pack(codes, scale, "FP8_E4M3FN", values["block"])


def storable(record: Record) -> tuple:
    """(rows, columns) of a record's blocks; raises ValueError with the reason why a block-FP8 folder cannot hold it."""
    if isinstance(record, CodeWeight) and record.table == "FP8_E4M3FN" and record.rule == "multiply":
        if isinstance(record.scale, np.ndarray) and record.offset is None and record.block_rows > 0:
            return record.block_rows, record.block_columns
    raise ValueError(f"it is stored as {describe(record)}, not as E4M3 codes in blocks")


def pack(records: Mapping[str, Record], plain: list[str], floats: str) -> Packed:
    """Tensors of all modules; raises ValueError where one config cannot describe them."""
    settings = {module: storable(record) for module, record in records.items()}
    block = same_settings(settings, ("block rows", "block columns"))
    tensors, dtypes = {}, {}
    for module, record in records.items():
        packed = fp8_block_pack(record.unpacked(), record.scale.astype(np.float32), block_size=block)
        tensors |= {f"{module}.{name}": array for name, array in packed.items()}
        dtypes[f"{module}.weight"] = "F8_E4M3"
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": plain or [HEAD],
    }
    return Packed(config, tensors, dtypes)
