"""bitsandbytes folders <-> records: NF4 and FP4, with or without double quantisation, and int8."""

import json
from collections.abc import Mapping

import numpy as np

from refllm.formats.checkpoints import bitsandbytes as layout
from refllm.formats.checkpoints import bitsandbytes_pack, bitsandbytes_unpack, int8_pack, int8_unpack
from refllm.formats.tensors import StoredTensor
from refllm.kernels.packed.codes import DYNAMIC8, FLAT, OWN, table_values
from refllm.kernels.packed.records import CodeWeight, Record
from refllm.model.quantized.base import (
    Packed,
    Settings,
    arrays,
    check_keys,
    describe,
    is_flag,
    names_or_none,
    one_of,
    same_settings,
    skipped_by,
)

_STATE = "weight.quant_state.bitsandbytes__"
SUFFIXES = (
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    f"{_STATE}nf4", f"{_STATE}fp4", "SCB", "weight_format",
)  # fmt: skip
TABLES = {"nf4": "NF4", "fp4": "FP4_BNB"}
HARMLESS = ("quant_method", "llm_int8_enable_fp32_cpu_offload", "bnb_4bit_compute_dtype", "llm_int8_threshold")
KNOWN = {
    "load_in_4bit": is_flag,
    "_load_in_4bit": is_flag,
    "load_in_8bit": is_flag,
    "_load_in_8bit": is_flag,
    "llm_int8_has_fp16_weight": one_of(False),
    "llm_int8_skip_modules": names_or_none,
    "bnb_4bit_quant_type": one_of(*TABLES),
    "bnb_4bit_use_double_quant": is_flag,
    "bnb_4bit_quant_storage": one_of("uint8", None),
}


def read(config: dict) -> Settings:
    """Check a quantization_config."""
    check_keys(config, KNOWN, HARMLESS)
    four, eight = (config.get(f"load_in_{n}bit", config.get(f"_load_in_{n}bit", False)) for n in (4, 8))
    if four == eight:
        raise ValueError("exactly one of load_in_4bit and load_in_8bit must be true")
    kind, double = config.get("bnb_4bit_quant_type", "fp4"), config.get("bnb_4bit_use_double_quant", False)
    values = {"kind": kind if four else "int8", "double": double and four}
    skipped = config.get("llm_int8_skip_modules")
    conventions = {
        "format": values["kind"] + (", double quantised" if values["double"] else ""),
        "packing": "uint8, pairs along the flat weight, high nibble first"
        if four
        else "int8; scales divided by 127 on use",
        "zero point": "none",
        "group size": "blocks of the flat weight, across rows" if four else "one scale a row",
        "ignored modules": ", ".join(skipped or []) or "none",
    }
    if eight:
        conventions["activations"] = "the checkpoint's users round them to int8; refllm runs them as floats"
    return Settings(values, skipped_by(skipped), conventions)


def load(values: dict, tensors: Mapping[str, StoredTensor], module: str) -> Record:
    """The record of one module; raises ValueError for tensors that are missing, misshapen or of another dtype."""
    variant = (
        "int8" if values["kind"] == "int8" else f"{values['kind']}{', double quantised' if values['double'] else ''}"
    )
    found = arrays(tensors, next(form for form in layout.STORED if form.variant == variant))
    if values["kind"] == "int8":
        codes, scb = int8_unpack(found)
        return CodeWeight.pack(codes.view(np.uint8), scb, "INT8", (1, codes.shape[1]), rule="multiply_127")
    codes, scale, quant_map, kind, blocksize, _ = bitsandbytes_unpack(found)
    if kind != values["kind"]:
        raise ValueError(f"the config says {values['kind']}, the tensor's own state {kind}")
    state = json.loads(found[f"{_STATE}{kind}"].tobytes())
    nested = "nested_offset" in state
    if nested != values["double"]:
        word = "" if nested else "not "
        raise ValueError(f"bnb_4bit_use_double_quant = {values['double']}, but the tensor's scales are {word}quantised")
    scales = np.ascontiguousarray(scale, np.float32).reshape(1, -1)
    if nested:
        absmax, scale = found["weight.absmax"].reshape(1, -1), found["weight.nested_absmax"].reshape(1, -1)
        offset, block = np.full(1, state["nested_offset"], np.float32), (FLAT, state["nested_blocksize"])
        scales = _record(absmax, scale, found["weight.nested_quant_map"], DYNAMIC8, block, offset)
    return _record(codes, scales, quant_map, TABLES[kind], (FLAT, blocksize))


def _record(codes, scale, table: np.ndarray, name: str, block: tuple[int, int], offset=None) -> CodeWeight:
    """With the table by name if the file's is the one of that name, else with the file's own."""
    own = not np.array_equal(table, table_values(name))
    return CodeWeight.pack(codes, scale, OWN if own else name, block, offset=offset, values=table if own else None)


def storable(record: Record) -> tuple:
    """(nf4, fp4 or int8; whether double quantised) of a record.

    Raises
    ------
    ValueError
        Why a bitsandbytes folder cannot hold it.
    """
    if isinstance(record, CodeWeight) and record.offset is None:
        if record.table == "INT8" and record.rule == "multiply_127" and record.block_rows == 1:
            if record.block_columns == record.columns and isinstance(record.scale, np.ndarray):
                return "int8", False
        kind = {table: name for name, table in TABLES.items()}.get(record.table)
        scale, inner = record.scale, getattr(record.scale, "table", None)
        if kind and record.rule == "multiply" and record.block_rows == FLAT:
            if isinstance(scale, np.ndarray):
                return kind, False
            if inner == DYNAMIC8 and scale.rule == "multiply" and scale.block_rows == FLAT and scale.offset is not None:
                return kind, True
    raise ValueError(f"it is stored as {describe(record)}, not as NF4, FP4 or int8 in bitsandbytes' blocks")


def pack(records: Mapping[str, Record], plain: list[str], floats: str) -> Packed:
    """Tensors of all modules; raises ValueError where one config cannot describe them."""
    settings = {module: storable(record) for module, record in records.items()}
    kind, double = same_settings(settings, ("type", "double_quant"))
    tensors = {}
    for module, record in records.items():
        packed = _int8(record) if kind == "int8" else _four_bits(record, kind, double)
        tensors |= {f"{module}.{name}": array for name, array in packed.items()}
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "llm_int8_skip_modules": plain or None,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    if kind != "int8":
        config |= {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
        config |= {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8"}
    return Packed(config, tensors, {})


def _int8(record: CodeWeight) -> dict[str, np.ndarray]:
    return int8_pack(record.unpacked().view(np.int8), record.scale.astype(np.float32))


def _four_bits(record: CodeWeight, kind: str, double: bool) -> dict[str, np.ndarray]:
    """Double quantised scales are stored as the codes they are, never coded anew."""
    scale = record.scale.rows(slice(None)) if double else record.scale
    packed = bitsandbytes_pack(
        record.unpacked(), scale, quant_type=kind, blocksize=record.block_columns, dtype="float32"
    )
    if double:
        inner = record.scale
        packed["weight.absmax"] = inner.unpacked()[0]
        packed["weight.nested_absmax"] = inner.scale[0].astype(np.float32)
        packed["weight.nested_quant_map"] = inner.entries.copy()
        state = json.loads(packed[f"{_STATE}{kind}"].tobytes())
        state |= {"nested_blocksize": inner.block_columns, "nested_dtype": "float32"}
        state |= {"nested_offset": float(inner.offset[0])}
        packed[f"{_STATE}{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return packed
