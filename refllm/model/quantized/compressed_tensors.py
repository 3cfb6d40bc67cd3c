"""compressed-tensors folders <-> records. What it says of activations is not computed: weights alone are quantised."""

import re
from collections.abc import Mapping

import numpy as np

from refllm.formats.checkpoints import (
    Stored,
    compressed_tensors_pack,
    compressed_tensors_unpack,
    float_quantized_pack,
    mxfp4_pack,
    mxfp4_unpack,
    nvfp4_pack,
    nvfp4_unpack,
)
from refllm.formats.checkpoints import compressed_floats as float_layouts
from refllm.formats.checkpoints import compressed_tensors as integers
from refllm.formats.tensors import StoredTensor
from refllm.kernels.grids import PER_CHANNEL, PER_TENSOR, AffineGrid, SymmetricGrid
from refllm.kernels.packed.codes import scale_shape
from refllm.kernels.packed.records import CodeWeight, IntWeight, Record, Reordered
from refllm.model.quantized.base import (
    Packed,
    Settings,
    arrays,
    check_groups,
    check_keys,
    describe,
    integers_of,
    is_block,
    is_flag,
    names_or_none,
    one_of,
    record_of,
)

SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
_OF_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
INTEGER_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
FORMATS = (*INTEGER_FORMATS, "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
STRATEGIES = ("group", "channel", "tensor", "tensor_group", "block")
HARMLESS = ("quant_method", "version", "global_compression_ratio")
KNOWN = {
    "format": one_of(*FORMATS, "mixed-precision"),
    "config_groups": lambda value: isinstance(value, dict) and bool(value),
    "ignore": names_or_none,
    "quantization_status": one_of("compressed"),
    "kv_cache_scheme": one_of(None),
    "sparsity_config": lambda value: (
        value in (None, {}) or (isinstance(value, dict) and value.get("format") == "dense")
    ),
    "transform_config": one_of(None, {}),
    "moe_sparsity_config": one_of(None),
}
_WEIGHTS = {
    "num_bits": lambda value: type(value) is int and 1 <= value <= 8,
    "type": one_of("int", "float"),
    "symmetric": is_flag,
    "strategy": one_of(*STRATEGIES),
    "group_size": lambda value: value is None or (type(value) is int and value >= -1),
    "block_structure": lambda value: value is None or is_block(value),
    "dynamic": one_of(False),
    "actorder": one_of(None, False, "weight", "static", "group"),
}
_WEIGHTS_HARMLESS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_GROUP = {
    "targets": lambda value: names_or_none(value) and bool(value),
    "weights": lambda value: isinstance(value, dict),
    "input_activations": lambda value: value is None or isinstance(value, dict),
    "output_activations": one_of(None),
    "format": one_of(None, *FORMATS),
}


def read(config: dict) -> Settings:
    """Check a quantization_config."""
    check_keys(config, KNOWN, HARMLESS)
    if "config_groups" not in config or "format" not in config:
        raise ValueError("config_groups and format are needed")
    groups = []
    for name, group in config["config_groups"].items():
        try:
            groups.append(_group(group, config["format"]))
        except ValueError as error:
            raise ValueError(f"config_groups.{name}: {error}") from None
    ignore = config.get("ignore") or []
    for pattern in [p for group in groups for p in group["targets"]] + ignore:
        _check_pattern(pattern)

    def scheme(module: str) -> dict | None:
        if any(_matches(pattern, module) for pattern in ignore):
            return None
        # An exact name goes before a pattern, a pattern before the class.
        ranked = [
            (_rank(pattern), group) for group in groups for pattern in group["targets"] if _matches(pattern, module)
        ]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None

    return Settings({"scheme": scheme}, lambda module: scheme(module) is None, _conventions(groups, ignore))


def _group(group: object, form: str) -> dict:
    if not isinstance(group, dict) or "targets" not in group or not isinstance(group.get("weights"), dict):
        raise ValueError(f"an object with targets and weights is expected, got {group!r:.80}")
    check_keys(group, _GROUP, ())
    weights = group["weights"]
    check_keys(weights, _WEIGHTS, _WEIGHTS_HARMLESS)
    form = group.get("format") or form
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if not weights.get("group_size") else "group" if weights["group_size"] > 0 else "channel"
    if form == "mixed-precision":
        raise ValueError("format 'mixed-precision' needs a format for each group")
    fits = {
        "float-quantized": kind == "float" and bits == 8,
        "nvfp4-pack-quantized": kind == "float"
        and bits == 4
        and weights.get("group_size") == float_layouts.NVFP4_BLOCK,
        "mxfp4-pack-quantized": kind == "float"
        and bits == 4
        and weights.get("group_size") == float_layouts.MXFP4_BLOCK,
        "naive-quantized": kind == "int" or bits == 8,
    }.get(form, kind == "int")
    if not fits:
        raise ValueError(
            f"format {form!r} does not hold {bits}-bit {kind} weights with group_size {weights.get('group_size')}"
        )
    if form == "naive-quantized" and kind == "float":
        form = "float-quantized"
    if strategy in ("group", "tensor_group") and (weights.get("group_size") or 0) < 1:
        raise ValueError(f"strategy {strategy!r} needs a group_size, got {weights.get('group_size')}")
    if strategy == "block" and form != "float-quantized":
        raise ValueError(f"strategy 'block' is read in float-quantized only, not in {form!r}")
    return {
        "targets": group["targets"],
        "format": form,
        "bits": bits,
        "symmetric": weights.get("symmetric", True),
        "strategy": strategy,
        "group_size": weights.get("group_size") if strategy in ("group", "tensor_group") else -1,
        "block": weights.get("block_structure"),
        "activations": group.get("input_activations"),
    }


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from None
    if pattern[:1].isupper() and pattern != "Linear" and "." not in pattern:
        raise ValueError(
            f"{pattern!r} names a class of modules; only 'Linear', module names and 're:' patterns are read"
        )


def _rank(pattern: str) -> int:
    return 2 if pattern == "Linear" else 1 if pattern.startswith("re:") else 0


def _matches(pattern: str, module: str) -> bool:
    """Every module that is asked for is a linear."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern in (module, "Linear")


def _conventions(groups: list[dict], ignore: list[str]) -> dict[str, str]:
    packings = {
        "pack-quantized": "int32 along in, one bit stream a row, lowest bits first, codes with 2^(bits-1) added",
        "int-quantized": "int8, signed codes",
        "naive-quantized": "int8, signed codes",
        "float-quantized": "E4M3 codes",
        "nvfp4-pack-quantized": "E2M1 pairs, low nibble first; E4M3 block scales; weight_global_scale divides",
        "mxfp4-pack-quantized": "E2M1 pairs, low nibble first; E8M0 block scales",
    }
    text = lambda form, part: "; ".join(dict.fromkeys(part(group) for group in form))
    found = {
        "format": text(groups, lambda group: f"{group['format']}, {group['bits']} bits"),
        "packing": text(groups, lambda group: packings[group["format"]]),
        "zero point": text(groups, lambda group: "none, symmetric" if group["symmetric"] else "packed along out"),
        "group size": text(
            groups, lambda group: str(group["group_size"]) if group["group_size"] != -1 else group["strategy"]
        ),
        "ignored modules": ", ".join(ignore) or "none",
    }
    if any(group["activations"] for group in groups):
        found["activations"] = "the checkpoint quantises them too; refllm runs them as floats"
    return found


def _form(scheme: dict) -> Stored:
    """The description of the tensors of a scheme."""
    if scheme["format"] == "pack-quantized":
        return integers.STORED[scheme["bits"] - 1]
    if scheme["format"] in INTEGER_FORMATS:
        return integers.STORED[-1]
    return next(form for form in float_layouts.STORED if form.name == scheme["format"])


def load(values: dict, tensors: Mapping[str, StoredTensor], module: str) -> Record:
    """The record of one module; raises ValueError for tensors that are missing, misshapen or of another dtype."""
    scheme = values["scheme"](module)
    left_out = (*_OF_INPUTS, "weight_zero_point") if _per_tensor(scheme) else _OF_INPUTS
    found = arrays({name: tensor for name, tensor in tensors.items() if name not in left_out}, _form(scheme))
    if _per_tensor(scheme):
        return _load_per_tensor(scheme, found, tensors.get("weight_zero_point"))
    load_one = {
        "float-quantized": _load_float,
        "nvfp4-pack-quantized": _load_nvfp4,
        "mxfp4-pack-quantized": _load_mxfp4,
    }
    return load_one.get(scheme["format"], _load_integers)(scheme, found)


def _load_integers(scheme: dict, found: dict) -> Record:
    _check_symmetry(scheme, found.get("weight_zero_point") is not None)
    grouped = compressed_tensors_unpack(found, bits=scheme["bits"], format=scheme["format"])
    check_groups(grouped.scale.shape[1], grouped.codes.shape[1], scheme["group_size"])
    return record_of(grouped, scheme["bits"], scheme["symmetric"])


def _per_tensor(scheme: dict) -> bool:
    return scheme["format"] in INTEGER_FORMATS and scheme["strategy"] == "tensor"


def _load_per_tensor(scheme: dict, found: dict, zero: StoredTensor | None) -> IntWeight:
    """One scale for all; the zero point lies beside it as an int8, also where those of groups are packed."""
    _check_symmetry(scheme, zero is not None)
    scale, bits = found.get("weight_scale"), scheme["bits"]
    if scale is None or scale.size != 1:
        raise ValueError(f"strategy 'tensor' needs one weight_scale, got {'none' if scale is None else scale.shape}")
    rows = found["weight"].shape[0] if "weight" in found else int(found.get("weight_shape", [1])[0])
    found = found | {"weight_scale": np.broadcast_to(scale.reshape(1, 1), (rows, 1))}
    codes = compressed_tensors_unpack(found, bits=bits, format=scheme["format"]).codes
    one = scale.reshape(1, 1).copy()
    if zero is None:
        return IntWeight.pack(SymmetricGrid(bits, PER_TENSOR), codes, one, None)
    middle, number = 1 << bits - 1, zero.stored()
    if zero.dtype != "I8" or number.size != 1 or not -middle <= number.item() < middle:
        raise ValueError(
            f"strategy 'tensor' needs one weight_zero_point, I8 of {-middle}..{middle - 1}, got {zero.dtype} of shape "
            f"{number.shape}{f': {number.item()}' if number.size == 1 else ''}"
        )
    return IntWeight.pack(AffineGrid(bits, PER_TENSOR), codes, one, np.array([[number.item() + middle]], np.uint8))


def _check_symmetry(scheme: dict, has_zero_point: bool) -> None:
    """Raise ValueError if there are zero points and should be none, or the reverse."""
    if has_zero_point == scheme["symmetric"]:
        word = "there is a weight_zero_point" if has_zero_point else "there is no weight_zero_point"
        raise ValueError(f"the config says symmetric = {str(scheme['symmetric']).lower()}, but {word}")


def _load_float(scheme: dict, found: dict) -> CodeWeight:
    codes, scale = found.get("weight"), found.get("weight_scale")
    if codes is None or scale is None or codes.dtype != np.uint8 or codes.ndim != 2:
        raise ValueError(f"weight (F8_E4M3) and weight_scale are needed, got {', '.join(sorted(found)) or 'nothing'}")
    out, columns = codes.shape
    if scheme["strategy"] == "group":
        block = (1, scheme["group_size"])
    else:
        block = {"channel": (1, columns), "tensor": (out, columns)}.get(scheme["strategy"], scheme["block"])
    if block is None:
        raise ValueError(f"strategy {scheme['strategy']!r} of float codes is not read without block_structure")
    shape = scale_shape(codes.shape, *block)
    scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    if scale.shape != shape:
        raise ValueError(f"weight_scale must be {shape} for strategy {scheme['strategy']!r}, got {scale.shape}")
    return CodeWeight.pack(codes, np.ascontiguousarray(scale), "FP8_E4M3FN", tuple(block))


def _load_nvfp4(scheme: dict, found: dict) -> CodeWeight:
    codes, scale, divisor = nvfp4_unpack(found)
    if not divisor > 0:
        raise ValueError(f"weight_global_scale must be positive, got {divisor}")
    total = np.full((1, 1), divisor, np.float32)
    scales = CodeWeight.pack(scale, total, "FP8_E4M3FN", scale.shape, rule="divide")
    return CodeWeight.pack(codes, scales, "FP4_E2M1", (1, float_layouts.NVFP4_BLOCK))


def _load_mxfp4(scheme: dict, found: dict) -> CodeWeight:
    codes, scale, _ = mxfp4_unpack(found)
    scales = CodeWeight.pack(scale, None, "E8M0", (1, 1))
    return CodeWeight.pack(codes, scales, "FP4_E2M1", (1, float_layouts.MXFP4_BLOCK))


def storable(record: Record) -> tuple:
    """(format, weights of a config group) of a record, the latter as sorted items.

    Raises
    ------
    ValueError
        Why a compressed-tensors folder cannot hold it.
    """
    form, weights = _settings(record)
    return form, tuple(sorted(weights.items(), key=lambda item: item[0]))


def _settings(record: Record) -> tuple[str, dict]:
    plain = {"symmetric": True, "dynamic": False}
    if isinstance(record, CodeWeight):
        inner = getattr(record.scale, "table", None)
        block, whole = (record.block_rows, record.block_columns), record.shape
        if record.table == "FP8_E4M3FN" and record.rule == "multiply" and record.offset is None and inner is None:
            weights = plain | {"num_bits": 8, "type": "float"}
            # One row is a channel and a tensor alike.
            if block == (1, whole[1]):
                return "float-quantized", weights | {"strategy": "channel"}
            if block == whole:
                return "float-quantized", weights | {"strategy": "tensor"}
            if block[0] > 1:
                return "float-quantized", weights | {"strategy": "block", "block_structure": tuple(block)}
        if record.table == "FP4_E2M1" and record.rule == "multiply" and record.offset is None:
            weights = plain | {"num_bits": 4, "type": "float", "strategy": "tensor_group"}
            if inner == "FP8_E4M3FN" and record.scale.rule == "divide" and block == (1, 16):
                return "nvfp4-pack-quantized", weights | {"group_size": 16}
            if inner == "E8M0" and record.scale.scale is None and block == (1, 32):
                return "mxfp4-pack-quantized", weights | {"strategy": "group", "group_size": 32}
        raise ValueError(f"it is stored as {describe(record)} in blocks {block}")
    _, bits, group_size, symmetric = integers_of(record)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    if isinstance(record, Reordered):
        weights["actorder"] = "group"
    grouped = group_size != PER_CHANNEL
    return "pack-quantized", weights | (
        {"strategy": "group", "group_size": group_size} if grouped else {"strategy": "channel"}
    )


def pack(records: Mapping[str, Record], plain: list[str], floats: str) -> Packed:
    """Tensors of all modules; different settings become several config groups.

    Scales get the type of the model's floats where that is exact, as its own software writes them: it dequantises into
    the type of the scale, so that a float16 scale would round the weights of a float32 model.
    """
    groups: dict[tuple, list[str]] = {}
    tensors, dtypes = {}, {}
    for module, record in records.items():
        groups.setdefault(storable(record), []).append(module)
        packed = _tensors(record)
        if floats != "F16" and packed["weight_scale"].dtype == np.float16:
            packed["weight_scale"] = packed["weight_scale"].astype(np.float32)
        tensors |= {f"{module}.{name}": array for name, array in packed.items()}
        form = _settings(record)[0]
        if form == "float-quantized":
            dtypes[f"{module}.weight"] = "F8_E4M3"
        if form == "nvfp4-pack-quantized":
            dtypes[f"{module}.weight_scale"] = "F8_E4M3"
    formats = list(dict.fromkeys(form for form, _ in groups))
    described = {}
    for number, ((form, weights), modules) in enumerate(groups.items()):
        described[f"group_{number}"] = {
            "targets": ["Linear"] if len(groups) == 1 else modules,
            "weights": {key: list(value) if isinstance(value, tuple) else value for key, value in weights},
            "input_activations": None,
            "output_activations": None,
            "format": form,
        }
    config = {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": described,
        "ignore": plain,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return Packed(config, tensors, dtypes)


def _tensors(record: Record) -> dict[str, np.ndarray]:
    form = _settings(record)[0]
    if form == "pack-quantized":
        (codes, scale, zero_point, g_idx), bits, _, _ = integers_of(record)
        return compressed_tensors_pack(codes, scale, zero_point, bits=bits, g_idx=g_idx)
    codes = record.unpacked()
    if form == "nvfp4-pack-quantized":
        return nvfp4_pack(codes, record.scale.unpacked(), record.scale.scale[0, 0])
    if form == "mxfp4-pack-quantized":
        return mxfp4_pack(codes, record.scale.unpacked())
    if record.scale.shape == (len(codes), 1):
        return float_quantized_pack(codes, record.scale)
    scale = record.scale.reshape(-1) if record.scale.size == 1 else record.scale
    return {"weight": np.ascontiguousarray(codes), "weight_scale": scale}
