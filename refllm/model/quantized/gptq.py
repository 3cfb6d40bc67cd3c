"""GPTQ folders <-> records."""

from collections.abc import Mapping

import numpy as np

from refllm.formats.checkpoints import gptq as layout
from refllm.formats.checkpoints import gptq_pack, gptq_unpack
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
)

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# Keys that say how the codes were found or how a kernel runs them, not what they mean.
HARMLESS = (
    "quant_method", "model_name_or_path", "model_file_base_name", "damp_percent", "damp_auto_increment",
    "true_sequential", "static_groups", "act_group_aware", "mse", "v2", "v2_alpha", "gptaq", "failsafe",
    "fail_safe", "meta", "tokenizer", "dataset", "backend", "model_seqlen", "block_name_to_quantize",
    "module_name_preceding_first_block", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs",
    "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "pack_impl", "offload_to_disk",
    "offload_to_disk_path", "device", "autoround_version", "iters", "lr", "minmax_lr", "nsamples", "seqlen",
    "enable_quanted_input", "enable_minmax_tuning", "amp", "low_gpu_mem_usage",
)  # fmt: skip
KNOWN = {
    "bits": one_of(*layout.BITS),
    "group_size": lambda value: type(value) is int and (value == -1 or value > 0),
    "desc_act": is_flag,
    "sym": is_flag,
    "checkpoint_format": one_of(*layout.FORMATS),
    "format": one_of(*layout.FORMATS),
    "lm_head": is_flag,
    "pack_dtype": one_of("int32", None),
    "is_marlin_format": one_of(False, None),
    "dynamic": one_of(None, {}),
    "rotation": one_of(None),
    "adapter": one_of(None),
    "modules_in_block_to_quantize": lambda value: (
        value is None
        or (
            isinstance(value, list)
            and all(isinstance(part, str) or (part is not None and names_or_none(part)) for part in value)
        )
    ),
}


def read(config: dict) -> Settings:
    """Check a quantization_config."""
    check_keys(config, KNOWN, HARMLESS)
    if missing := [key for key in ("bits", "group_size") if key not in config]:
        raise ValueError(f"{', '.join(missing)} missing")
    form = either(config, "checkpoint_format", "format") or "gptq"
    values = {
        "bits": config["bits"],
        "group_size": config["group_size"],
        "desc_act": config.get("desc_act", False),
        "sym": config.get("sym"),
        "format": form,
    }
    parts = config.get("modules_in_block_to_quantize")
    names = {name for part in parts or () for name in (part if isinstance(part, list) else [part])}
    has_head = config.get("lm_head", False)

    def plain(module: str) -> bool:
        if module == HEAD:
            return not has_head
        return parts is not None and not any(module.endswith(f".{name}") for name in names)

    zero = "stored minus 1 (v1)" if form == "gptq" else "stored as they are (v2)"
    conventions = {
        "packing": f"int32 along in, {values['bits']} bits, lowest bits first; zero points along out",
        "zero point": f"{form}: {zero}; {'symmetric' if values['sym'] else 'asymmetric'}",
        "group size": str(values["group_size"]),
        "column order": "by activation (g_idx)" if values["desc_act"] else "as stored",
    }
    return Settings(values, plain, conventions)


def load(values: dict, tensors: Mapping[str, StoredTensor], module: str) -> Record:
    """The record of one module.

    Raises
    ------
    ValueError
        A tensor that is missing, misshapen or of another dtype, or a zero point that proves the label wrong.
    """
    bits, form = values["bits"], values["format"]
    found = arrays(tensors, layout.STORED[layout.BITS.index(bits)])
    grouped = gptq_unpack(found, bits=bits, checkpoint_format=form)
    if values["sym"]:
        _check_label(grouped.zero_point, bits, form)
    columns, groups = grouped.codes.shape[1], grouped.scale.shape[1]
    check_groups(groups, columns, values["group_size"])
    record = record_of(grouped, bits, bool(values["sym"]))
    if record.kind == "reordered" and not values["desc_act"]:
        raise ValueError("g_idx is not in order although desc_act is false; readers disagree on such a file")
    return record


def _check_label(zero_point: np.ndarray, bits: int, form: str) -> None:
    """A symmetric grid has the zero point 2^(bits-1), so its zero points tell which convention wrote them."""
    middle = 1 << (bits - 1)
    other, off = ("gptq_v2", 1) if form == "gptq" else ("gptq", -1)
    if (zero_point == middle + off).all():
        raise ValueError(
            f"the label lies: read as {form!r}, all zero points are {middle + off}, but a symmetric grid has {middle}; "
            f"these are zero points of {other!r}: write checkpoint_format {other!r} in the config"
        )


def storable(record: Record) -> tuple:
    """(bits, group_size, sym) of a record.

    Raises
    ------
    ValueError
        Why a GPTQ folder cannot hold it.
    """
    grouped, bits, group_size, symmetric = integers_of(record)
    if bits not in layout.BITS:
        raise ValueError(f"{bits} bits; 2, 3, 4 or 8 can be stored")
    half_scales(grouped.scale)
    unit = layout.dense_words(bits).elements
    if any(size % unit for size in grouped.codes.shape):
        raise ValueError(f"out and in must be multiples of {unit}, the shape is {grouped.codes.shape}")
    return bits, group_size, symmetric


def pack(records: Mapping[str, Record], plain: list[str], floats: str) -> Packed:
    """Tensors of all modules; raises ValueError where one config cannot describe them."""
    if inside := [name for name in plain if name != HEAD]:
        raise ValueError(f"{inside[0]}.weight is not quantised, and a GPTQ config cannot list such modules")
    settings = {module: storable(record) for module, record in records.items()}
    bits, group_size, symmetric = same_settings(settings, ("bits", "group", "symmetric"))
    taken = {module: integers_of(record).grouped for module, record in records.items()}
    zeros = any(grouped.zero_point is not None and (grouped.zero_point == 0).any() for grouped in taken.values())
    form = "gptq_v2" if zeros else "gptq"
    tensors = {}
    for module, (codes, scale, zero_point, g_idx) in taken.items():
        packed = gptq_pack(codes, scale, zero_point, bits=bits, g_idx=g_idx, checkpoint_format=form)
        tensors |= {f"{module}.{name}": array for name, array in packed.items()}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(grouped.g_idx is not None for grouped in taken.values()),
        "sym": symmetric,
        "lm_head": HEAD in records,
        "checkpoint_format": form,
        "pack_dtype": "int32",
    }
    return Packed(config, tensors, {})
