"""refllm's own implementation of the ops of checkpoint formats: packing, and reading with the decoded weight."""

import numpy as np


def _gptq(params: dict, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats import checkpoints

    kind = {name: params[name] for name in ("bits", "checkpoint_format")}
    if params["direction"] == "pack":
        return checkpoints.gptq_pack(**arrays, **kind)
    w_hat = checkpoints.gptq_dequantize(arrays, **kind)
    return checkpoints.gptq_unpack(arrays, **kind)._asdict() | {"w_hat": w_hat}


def _awq(params: dict, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats import checkpoints

    if params["direction"] == "pack":
        return checkpoints.awq_pack(**arrays)
    return _given(checkpoints.awq_unpack(arrays)) | {"w_hat": checkpoints.awq_dequantize(arrays)}


def _compressed_tensors(params: dict, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats import checkpoints

    names = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4", "float-quantized": "float_quantized"}
    name = names.get(params["format"], "compressed_tensors")
    kind = {} if params["format"] in names else {"bits": params["bits"], "format": params["format"]}
    pack, unpack, dequantize = (getattr(checkpoints, f"{name}_{verb}") for verb in ("pack", "unpack", "dequantize"))
    if "parts" in params:
        return _fused(params, arrays)
    if params["direction"] == "pack":
        if "global_scale" in arrays:
            arrays["global_scale"] = arrays["global_scale"].item()
        return pack(**arrays, **kind)
    read = _given(unpack(arrays, **kind))
    if "global_scale" in read:
        read["global_scale"] = np.array([read["global_scale"]])
    return read | {"w_hat": dequantize(arrays, **kind)}


def _fused(params: dict, arrays: dict) -> dict[str, np.ndarray]:
    """Weights one below the other, read one by one."""
    parts, names = params["parts"], ("weight_packed", "weight_scale")
    if params["direction"] != "unpack" or sum(parts) != len(arrays["weight_packed"]):
        raise ValueError(f"fused parts are only read, and have all rows: {len(arrays['weight_packed'])}, got {parts}")
    if arrays["weight_global_scale"].shape != (len(parts),):
        raise ValueError(f"each of {len(parts)} parts has a global scale, got {arrays['weight_global_scale'].shape}")
    rows = [np.split(arrays[name], np.cumsum(parts)[:-1]) for name in names]
    one = {name: value for name, value in params.items() if name != "parts"}
    read = [
        _compressed_tensors(one, **dict(zip(names, part, strict=True)), weight_global_scale=divisor)
        for *part, divisor in zip(*rows, arrays["weight_global_scale"].reshape(-1, 1), strict=True)
    ]
    return {name: np.concatenate([part[name] for part in read]) for name in read[0]}


def _bitsandbytes(params: dict, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats import checkpoints

    if params["quant_type"] == "int8":
        if params["direction"] == "pack":
            return checkpoints.int8_pack(**arrays)
        codes, scale = checkpoints.int8_unpack(arrays)
        return {"codes": codes, "scale": scale[:, 0], "w_hat": checkpoints.int8_dequantize(arrays)}
    long = {"quant_state": f"weight.quant_state.bitsandbytes__{params['quant_type']}", "weight": "weight"}
    if params["direction"] == "pack":
        offset = arrays.pop("offset").item() if "offset" in arrays else None
        kind = {name: params[name] for name in ("quant_type", "blocksize", "dtype", "double_quant")}
        tensors = checkpoints.bitsandbytes_pack(**arrays, **kind, offset=offset)
        short = {name: key for key, name in long.items()}
        return {short.get(name, name.removeprefix("weight.")): tensor for name, tensor in tensors.items()}
    tensors = {long.get(name, f"weight.{name}"): array for name, array in arrays.items()}
    read = checkpoints.bitsandbytes_unpack(tensors)
    w_hat = checkpoints.bitsandbytes_dequantize(tensors)
    return {"codes": read.codes, "scale": read.scale.reshape(-1), "w_hat": w_hat}


def _checkpoints_misc(params: dict, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    pack, unpack = _MISC.get(params["format"], (None, None))
    if pack is None:
        raise ValueError(f"format must be one of {', '.join(_MISC)}, got {params['format']!r}")
    from refllm.formats import checkpoints

    return (pack if params["direction"] == "pack" else unpack)(checkpoints, params, arrays)


def _read(checkpoints, name: str, arrays: dict, *args, **kind) -> dict[str, np.ndarray]:
    """What X_unpack and X_dequantize make of stored tensors."""
    found = getattr(checkpoints, f"{name}_unpack")(arrays, *args, **kind)
    read = _given(found) if hasattr(found, "_asdict") else dict(zip(("codes", "scale"), found, strict=True))
    return read | {"w_hat": getattr(checkpoints, f"{name}_dequantize")(arrays, *args, **kind)}


def _given(found) -> dict[str, np.ndarray]:
    return {name: array for name, array in found._asdict().items() if array is not None}


def _i2_s_read(c, params: dict, data: np.ndarray) -> dict[str, np.ndarray]:
    where = (data, params["shape"])
    codes, scale = c.i2_s_unpack(*where, order=params["order"])
    return {"codes": codes, "scale": scale.reshape(1), "w_hat": c.i2_s_dequantize(*where, order=params["order"])}


def _bitnet_read(c, arrays: dict) -> dict[str, np.ndarray]:
    read = _read(c, "bitnet", arrays)
    return read | {"scale": read["scale"].reshape(1)}


def _nbits(params: dict) -> dict[str, int]:
    return {name: params[name] for name in ("bits", "block_size")}


# Format -> how it is packed and read: functions of the module, the params and the arrays.
_MISC = {
    "fp8_block": (
        lambda c, p, a: c.fp8_block_pack(**a, block_size=p["block_size"]),
        lambda c, p, a: _read(c, "fp8_block", a, block_size=p["block_size"]),
    ),
    "gpt_oss": (lambda c, p, a: c.gpt_oss_pack(**a), lambda c, p, a: _read(c, "gpt_oss", a)),
    "i2_s": (
        lambda c, p, a: {"data": c.i2_s_pack(a["codes"], a["scale"].item(), order=p["order"])},
        lambda c, p, a: _i2_s_read(c, p, a["data"]),
    ),
    "bitnet": (lambda c, p, a: c.bitnet_pack(a["codes"], a["scale"].item()), lambda c, p, a: _bitnet_read(c, a)),
    "matmul_nbits": (
        lambda c, p, a: c.matmul_nbits_pack(**a, **_nbits(p)),
        lambda c, p, a: _read(c, "matmul_nbits", a, p["columns"], **_nbits(p)),
    ),
    "sparse24": (
        lambda c, p, a: c.sparse24_pack(**a),
        lambda c, p, a: (
            dict(zip(("values", "columns"), c.sparse24_unpack(a), strict=True)) | {"w_hat": c.sparse24_dense(a)}
        ),
    ),
    "bitmask": (
        lambda c, p, a: c.bitmask_pack(a["w"], a["mask"]),
        lambda c, p, a: {"w_hat": c.bitmask_unpack(a, p["columns"])[0]},
    ),
    "csr": (
        lambda c, p, a: c.csr_pack(a["w"], a["mask"]),
        lambda c, p, a: {"w_hat": c.csr_unpack(a, p["columns"])},
    ),
    "scales_swizzled": (
        lambda c, p, a: {"data": c.swizzle_scales(a["scale"])},
        lambda c, p, a: {"scale": c.unswizzle_scales(a["data"], p["shape"])},
    ),
}


OPS = {
    "formats.gptq": _gptq,
    "formats.awq": _awq,
    "formats.compressed_tensors": _compressed_tensors,
    "formats.bitsandbytes": _bitsandbytes,
    "formats.checkpoints_misc": _checkpoints_misc,
}
