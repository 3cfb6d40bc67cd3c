"""AutoAWQ folders <-> records: versions gemm and gemv are read, gemm is written."""

from collections.abc import Mapping

from refllm.formats.checkpoints import awq, awq_gemv, awq_gemv_unpack, awq_pack, awq_unpack
from refllm.formats.tensors import StoredTensor
from refllm.kernels.packed.records import Record
from refllm.model.quantized.base import (
    HEAD,
    Packed,
    Settings,
    arrays,
    check_groups,
    check_keys,
    either,
    half_scales,
    integers_of,
    is_flag,
    names_or_none,
    one_of,
    record_of,
    same_settings,
    skipped_by,
)
from refllm.model.quantized.gptq import HARMLESS as GPTQ_HARMLESS

SUFFIXES = ("qweight", "qzeros", "scales")
# transformers writes an AWQ config with all the keys of a GPTQ config.
HARMLESS = (
    *GPTQ_HARMLESS, "sym", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "modules_in_block_to_quantize", "dynamic",
)  # fmt: skip
PACKINGS = {
    "gemm": "int32 along out, 4 bits, nibble order 0,2,4,6,1,3,5,7",
    "gemv": "int32 along in, 4 bits, low nibble first; scales padded",
}
_group = lambda value: type(value) is int and (value == -1 or value > 0)
KNOWN = {
    "bits": one_of(4),
    "w_bit": one_of(4),
    "group_size": _group,
    "q_group_size": _group,
    "zero_point": is_flag,
    "version": lambda value: isinstance(value, str) and value.lower() in PACKINGS,
    "format": lambda value: isinstance(value, str) and value.lower() in PACKINGS,
    "modules_to_not_convert": names_or_none,
    "lm_head": is_flag,
    "desc_act": one_of(False, None),
    "pack_dtype": one_of("int32", None),
}


def read(config: dict) -> Settings:
    """Check a quantization_config."""
    check_keys(config, KNOWN, HARMLESS)
    group_size = either(config, "group_size", "q_group_size")
    if either(config, "bits", "w_bit") is None or group_size is None:
        raise ValueError("bits and group_size are needed")
    version = (either(config, "version", "format") or "gemm").lower()
    values = {"group_size": group_size, "zero_point": config.get("zero_point", True), "version": version}
    conventions = {
        "packing": PACKINGS[version],
        "zero point": "stored as they are" if values["zero_point"] else "always 8",
        "group size": str(group_size),
    }
    return Settings(values, skipped_by(config.get("modules_to_not_convert")), conventions)


def load(values: dict, tensors: Mapping[str, StoredTensor], module: str) -> Record:
    """The record of one module; raises ValueError for tensors that are missing, misshapen or of another dtype."""
    if values["version"] == "gemv":
        grouped = awq_gemv_unpack(arrays(tensors, awq_gemv.STORED[0]), values["group_size"])
    else:
        grouped = awq_unpack(arrays(tensors, awq.STORED[0]))
    check_groups(grouped.scale.shape[1], grouped.codes.shape[1], values["group_size"])
    return record_of(grouped, 4, not values["zero_point"])


def storable(record: Record) -> tuple:
    """(group_size, symmetric) of a record; raises ValueError with the reason why an AWQ folder cannot hold it."""
    grouped, bits, group_size, symmetric = integers_of(record)
    if bits != 4:
        raise ValueError(f"{bits} bits; 4 can be stored")
    if grouped.g_idx is not None:
        raise ValueError("its columns are reordered, and there is no g_idx")
    half_scales(grouped.scale)
    if len(grouped.codes) % 8:
        raise ValueError(f"out must be a multiple of 8, got {len(grouped.codes)}")
    return group_size, symmetric


def pack(records: Mapping[str, Record], plain: list[str], floats: str) -> Packed:
    """Tensors of all modules; raises ValueError where one config cannot describe them."""
    settings = {module: storable(record) for module, record in records.items()}
    group_size, symmetric = same_settings(settings, ("group", "symmetric"))
    tensors = {}
    for module, record in records.items():
        codes, scale, zero_point, _ = integers_of(record).grouped
        tensors |= {f"{module}.{name}": array for name, array in awq_pack(codes, scale, zero_point).items()}
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": not symmetric,
        "version": "gemm",
        "modules_to_not_convert": [name for name in plain if name != HEAD] or None,
    }
    return Packed(config, tensors, {})
