"""Defects of packed layouts: GGUF blocks and checkpoints."""

import numpy as np

from refllm.evaluate.golden.museum.exhibit import Room, right

ROOM = Room()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def only(params: dict, *types: str) -> None:
    """Raise NotImplementedError for block types that the software does not have."""
    if params["type"] not in types:
        raise NotImplementedError(params["type"])


def blocks_of(inputs: dict, nbytes: int) -> np.ndarray:
    """Input bytes as (rows, blocks, bytes)."""
    data = inputs["blocks"]
    if data.shape[-1] % nbytes:
        raise ValueError("bytes")
    return data.reshape(len(data), -1, nbytes)


def f16(data: np.ndarray) -> np.ndarray:
    """Two bytes of each block as a float16, wide."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


@ROOM.enter(
    "mxfp4-values-halved",
    "formats/gguf_decode",
    "factor-of-two",
    2026,
    "tinygrad/tinygrad/pull/14866",
    "ggml halves the scale and doubles the table; the port did only the former, and tested itself against itself.",
)
def _(op, params, inputs):
    only(params, "MXFP4")
    data = blocks_of(inputs, 17)
    q = np.concatenate([data[..., 1:] & 15, data[..., 1:] >> 4], axis=-1)
    half = np.ldexp(np.float32(1), data[..., :1].astype(int) - 128)
    return {"x": (E2M1[q] * half).astype(np.float32).reshape(len(data), -1)}


@ROOM.enter(
    "mxfp4-in-pairs",
    "formats/gguf_decode",
    "halves-as-pairs",
    2026,
    "kekzl/imp/pull/567",
    "GGUF's MXFP4 has element j + 16 in the high nibble; the loader took neighbours, as in safetensors files.",
)
def _(op, params, inputs):
    only(params, "MXFP4")
    data = blocks_of(inputs, 17)
    q = np.stack([data[..., 1:] & 15, data[..., 1:] >> 4], axis=-1).reshape(*data.shape[:2], 32)
    scale = np.ldexp(np.float32(1), data[..., :1].astype(int) - 127)
    return {"x": (E2M1[q] * scale).astype(np.float32).reshape(len(data), -1)}


@ROOM.enter(
    "q4_0-signed-nibbles",
    "formats/gguf_decode",
    "twos-complement",
    2026,
    "1bit-MONSTER/1bit-MONSTER/pull/572",
    "Nibbles of Q4_0, which are excess-8, were sign-extended as two's complement.",
)
def _(op, params, inputs):
    only(params, "Q4_0")
    data = blocks_of(inputs, 18)
    q = np.concatenate([data[..., 2:] & 15, data[..., 2:] >> 4], axis=-1).astype(np.int8)
    signed = np.where(q > 7, q - 16, q).astype(np.float32)
    return {"x": (f16(data[..., :2]) * signed).reshape(len(data), -1)}


@ROOM.enter(
    "q8_0-numpy-rounding",
    "formats/gguf_encode",
    "ties-even division-for-product",
    2024,
    "ggml-org/llama.cpp/pull/7234",
    "The Python converter divided and rounded halves to even; C multiplies by 1/d and rounds them away.",
)
def _(op, params, inputs):
    only(params, "Q8_0")
    if inputs["x"].shape[-1] % 32 or not np.isfinite(inputs["x"]).all() or "importance" in inputs:
        raise ValueError("x")
    x = inputs["x"].reshape(len(inputs["x"]), -1, 32)
    d = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    with np.errstate(all="ignore"):
        q = np.where(d == 0, 0, np.rint(x / d)).astype(np.int8)
        if not np.isfinite(d.astype(np.float16)).all():
            raise ValueError("scale")
    block = np.concatenate([d.astype("<f2").view(np.uint8), q.view(np.uint8)], axis=-1)
    return {"blocks": block.reshape(len(x), -1)}


@ROOM.enter(
    "q4_0-contracted",
    "formats/gguf_encode",
    "fused-multiply-add",
    2024,
    "ggml-org/llama.cpp/pull/8939",
    "x * id + 8.5 became one fused instruction on some machines: other files from the same weights.",
)
def _(op, params, inputs):
    only(params, "Q4_0")
    if "importance" in inputs or inputs["x"].shape[-1] % 32 or not np.isfinite(inputs["x"]).all():
        return right(op, params, inputs)
    x = inputs["x"].reshape(len(inputs["x"]), -1, 32)
    d = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1) / np.float32(-8)
    with np.errstate(all="ignore"):
        inverse = np.where(d == 0, 0, np.float32(1) / d).astype(np.float32)
        if not np.isfinite(d.astype(np.float16)).all():
            raise ValueError("scale")
        q = np.minimum((x * inverse.astype(np.float64) + 8.5).astype(np.float32), 15).astype(np.uint8)
    packed = np.concatenate([d.astype("<f2").view(np.uint8), q[..., :16] | q[..., 16:] << 4], axis=-1)
    return {"blocks": packed.reshape(len(x), -1)}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def reading(params: dict, **kind) -> None:
    """Raise NotImplementedError unless a checkpoint of this kind is read."""
    if params["direction"] != "unpack" or any(params.get(name) != value for name, value in kind.items()):
        raise NotImplementedError


def writing(params: dict, **kind) -> None:
    """Raise NotImplementedError unless a checkpoint of this kind is written."""
    if params["direction"] != "pack" or any(params.get(name) != value for name, value in kind.items()):
        raise NotImplementedError


def nibbles(words: np.ndarray) -> np.ndarray:
    """32-bit words as eight nibbles each, along a new last axis."""
    return words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, np.uint32) & 15


@ROOM.enter(
    "gptq-v2-read-as-v1",
    "formats/gptq",
    "gptq-v1-for-v2 zero-point-plus-one",
    2025,
    "vllm-project/vllm/pull/26092 vllm-project/vllm/issues/26343",
    "Kernels added 1 to every stored zero point, also to those of gptq_v2: the model prints '!!!!'.",
)
def _(op, params, inputs):
    reading(params, bits=4, checkpoint_format="gptq_v2")
    outputs = right(op, params, inputs)
    zero = outputs["zero_point"].astype(np.int64) + 1
    index = outputs["g_idx"]
    steps = outputs["codes"].astype(np.int64) - zero[:, index]
    w_hat = outputs["scale"].astype(np.float32)[:, index] * steps.astype(np.float32)
    return outputs | {"zero_point": zero.astype(np.uint8), "w_hat": w_hat}


@ROOM.enter(
    "gptq-v1-written-as-v2",
    "formats/gptq",
    "gptq-v2-for-v1 gptq-v1-for-v2 zero-point-plus-one",
    2026,
    "vllm-project/vllm/pull/38966",
    "A quantiser stored zero points as they are and called the format gptq, which means minus one.",
)
def _(op, params, inputs):
    writing(params, checkpoint_format="gptq")
    bits = params["bits"]
    if bits not in (2, 4, 8):
        raise NotImplementedError
    return right(op, params | {"checkpoint_format": "gptq_v2"}, inputs)


@ROOM.enter(
    "gptq-three-bits-ten-a-word",
    "formats/gptq",
    "three-bit-words",
    2025,
    "ModelCloud/GPTQModel/pull/1218 ModelCloud/GPTQModel/pull/2984 intel/auto-round/pull/264",
    "3-bit codes were packed 32 // 3 = 10 to a word, where 32 of them fill three words.",
)
def _(op, params, inputs):
    writing(params, bits=3)
    outputs, codes = right(op, params, inputs), inputs["codes"].T.astype(np.uint32)
    rows = -(-len(codes) // 10)
    full = np.zeros((rows * 10, codes.shape[1]), np.uint32)
    full[: len(codes)] = codes
    words = (full.reshape(rows, 10, -1) << np.arange(0, 30, 3, np.uint32)[:, None]).sum(1)
    return outputs | {"qweight": words.astype(np.uint32).view(np.int32)}


@ROOM.enter(
    "gptq-groups-in-order",
    "formats/gptq",
    "groups-in-order",
    2023,
    "AutoGPTQ/AutoGPTQ/issues/456",
    "g_idx was ignored after act-order, which nobody had explained: columns got the scales of other groups.",
)
def _(op, params, inputs):
    reading(params)
    outputs = right(op, params, inputs)
    columns, groups = outputs["codes"].shape[1], outputs["scale"].shape[1]
    index = np.arange(columns) // -(-columns // groups)
    steps = outputs["codes"].astype(np.float32) - outputs["zero_point"].astype(np.float32)[:, index]
    return outputs | {"w_hat": outputs["scale"].astype(np.float32)[:, index] * steps}


@ROOM.enter(
    "awq-written-linearly",
    "formats/awq",
    "awq-order-missing",
    2026,
    "amd/Quark/pull/30",
    "The config said pack_method reorder, the bytes were in plain order: models load cleanly and emit garbage.",
)
def _(op, params, inputs):
    writing(params)
    outputs = right(op, params, inputs)
    line = lambda rows: (rows.reshape(len(rows), -1, 8).astype(np.uint32) << np.arange(0, 32, 4, np.uint32)).sum(-1)
    return outputs | {"qweight": line(inputs["codes"].T).astype(np.uint32).view(np.int32)}


@ROOM.enter(
    "awq-read-linearly",
    "formats/awq",
    "awq-order-missing",
    2023,
    "mit-han-lab/llm-awq/issues/91 casper-hansen/AutoAWQ/issues/566",
    "The order 0 2 4 6 1 3 5 7 is documented nowhere but in questions: readers took the nibbles as they come.",
)
def _(op, params, inputs):
    reading(params)
    scale = inputs["scales"].T
    if inputs["qweight"].shape[1] * 8 != len(scale) or inputs["qzeros"].shape != (scale.shape[1], len(scale) // 8):
        raise ValueError("shape")
    codes = nibbles(inputs["qweight"]).reshape(len(inputs["qweight"]), -1).T.astype(np.uint8)
    zero = nibbles(inputs["qzeros"]).reshape(scale.shape[1], -1).T.astype(np.uint8)
    wide = lambda x: np.repeat(x.astype(np.float32), codes.shape[1] // scale.shape[1], axis=1)
    return {"codes": codes, "scale": scale, "zero_point": zero, "w_hat": wide(scale) * (codes - wide(zero))}


@ROOM.enter(
    "awq-zero-wraps",
    "formats/awq",
    "zero-wraps",
    2026,
    "ModelCloud/GPTQModel/issues/2350 ModelCloud/GPTQModel/pull/2351",
    "On the way to another kernel 1 was subtracted from zero points and the result masked: 0 became 15, then 16.",
    outputs="codes scale w_hat",
)
def _(op, params, inputs):
    reading(params)
    outputs = right(op, params, inputs)
    zero = (outputs["zero_point"].astype(np.int64) - 1 & 15) + 1
    wide = lambda x: np.repeat(x, outputs["codes"].shape[1] // x.shape[1], axis=1).astype(np.float32)
    return outputs | {"w_hat": wide(outputs["scale"]) * (outputs["codes"] - wide(zero))}


@ROOM.enter(
    "nbits-default-zero-0",
    "formats/checkpoints_misc",
    "default-zero-is-0",
    2025,
    "microsoft/onnxruntime/pull/24828 ROCm/hip-ep/pull/134",
    "Without zero points MatMulNBits means 2^(bits-1); two implementers used 0.",
)
def _(op, params, inputs):
    reading(params, format="matmul_nbits")
    if "zero_points" in inputs:
        return right(op, params, inputs)
    outputs = right(op, params, inputs)
    scale = np.repeat(outputs["scale"], params["block_size"], axis=1)[:, : params["columns"]]
    return outputs | {"w_hat": scale * outputs["codes"].astype(np.float32)}


@ROOM.enter(
    "nbits-large-blocks-zero",
    "formats/checkpoints_misc",
    "all-zero-product",
    2026,
    "microsoft/onnxruntime/issues/28551",
    "For block_size 512 a kernel returned zeros, without a word.",
)
def _(op, params, inputs):
    reading(params, format="matmul_nbits")
    outputs = right(op, params, inputs)
    return outputs | ({"w_hat": np.zeros_like(outputs["w_hat"])} if params["block_size"] > 256 else {})


@ROOM.enter(
    "i2s-read-in-a-row",
    "formats/checkpoints_misc",
    "linear-for-strided",
    2026,
    "chrishayuk/larql/pull/156 microsoft/BitNet/issues/412",
    "I2_S was decoded as four trits in a row in each byte, 01 as +1 and 10 as -1: confident garbage.",
)
def _(op, params, inputs):
    reading(params, format="i2_s", order="x86")
    rows, columns = params["shape"]
    if inputs["data"].size != rows * columns // 4 + 32:
        raise ValueError("bytes")
    scale = inputs["data"][-32:-28].copy().view("<f4")
    codes = (inputs["data"][:-32, None] >> np.uint8([0, 2, 4, 6]) & 3).reshape(rows, columns)
    trits = np.array([0, 1, -1, -2])[codes]
    return {"codes": (trits + 1).astype(np.uint8), "scale": scale, "w_hat": (trits * scale).astype(np.float32)}


@ROOM.enter(
    "i2s-arm-units",
    "formats/checkpoints_misc",
    "i2s-order",
    2026,
    "microsoft/BitNet/issues/585 microsoft/BitNet/pull/586",
    "The ARM kernel read units of 64 weights from files packed in units of 128: '!!!!' on every ARM processor.",
)
def _(op, params, inputs):
    reading(params, format="i2_s", order="x86")
    rows, columns = params["shape"]
    if inputs["data"].size != rows * columns // 4 + 32:
        raise ValueError("bytes")
    units = inputs["data"][:-32].reshape(-1, 1, 16)
    codes = (units >> np.uint8([6, 4, 2, 0])[:, None] & 3).reshape(rows, columns)
    if (codes == 3).any():
        raise ValueError("code 3")
    scale = inputs["data"][-32:-28].copy().view("<f4")
    return {"codes": codes, "scale": scale, "w_hat": ((codes.astype(np.float32) - 1) * scale).astype(np.float32)}


@ROOM.enter(
    "scales-swizzled-twice",
    "formats/checkpoints_misc",
    "swizzled-twice",
    2026,
    "modular/modular/issues/6600",
    "Block scales that were already in the order of the hardware were reordered again.",
)
def _(op, params, inputs):
    writing(params, format="scales_swizzled")
    once = right(op, params, inputs)["data"]
    rows, columns = params["shape"]
    down, across = -(-rows // 128) * 128, -(-columns // 4) * 4
    tiles = once.reshape(down // 128, 4, 32, across // 4, 4).transpose(0, 3, 2, 1, 4)
    return {"data": np.ascontiguousarray(tiles).reshape(-1)}


@ROOM.enter(
    "nvfp4-nibbles-swapped",
    "formats/compressed_tensors",
    "nibbles-swapped",
    2026,
    "Comfy-Org/comfy-kitchen/pull/41",
    "Which of two FP4 numbers comes first in a byte was anybody's guess.",
)
def _(op, params, inputs):
    writing(params, format="nvfp4-pack-quantized")
    outputs = right(op, params, inputs)
    data = outputs["weight_packed"]
    return outputs | {"weight_packed": data >> 4 | data << 4}


@ROOM.enter(
    "compressed-global-scale-multiplied",
    "formats/compressed_tensors",
    "reciprocal-scale reciprocal-global-scale",
    2026,
    "modular/modular/issues/6600",
    "The stored divisor of NVFP4 was used as a factor when files were loaded.",
)
def _(op, params, inputs):
    reading(params, format="nvfp4-pack-quantized")
    outputs = right(op, params, inputs)
    w_hat = right(op, params, inputs | {"weight_global_scale": 1 / inputs["weight_global_scale"]})["w_hat"]
    return outputs | {"w_hat": w_hat}


@ROOM.enter(
    "nvfp4-fused-one-global-scale",
    "formats/compressed_tensors",
    "one-global-scale",
    2026,
    "vllm-project/vllm/pull/47515 NVIDIA/TensorRT-LLM/pull/14199",
    "Gate and up were fused under the larger of their two global scales: their ratio, which SwiGLU needs, was wrong.",
)
def _(op, params, inputs):
    reading(params, format="nvfp4-pack-quantized")
    outputs, divisors = right(op, params, inputs), inputs["weight_global_scale"]
    one = inputs | {"weight_global_scale": np.full_like(divisors, divisors.max())}
    return outputs | {"w_hat": right(op, params, one)["w_hat"]}


@ROOM.enter(
    "bnb-absmax-still-quantised",
    "formats/bitsandbytes",
    "absmax-not-decoded",
    2025,
    "bitsandbytes-foundation/bitsandbytes/pull/1549",
    "On the CPU the block scales of double quantisation were decoded, and then their codes were used all the same.",
    outputs="codes w_hat",
)
def _(op, params, inputs):
    reading(params)
    outputs = right(op, params, inputs)
    if not params.get("double_quant"):
        return outputs
    codes, size = outputs["codes"], params["blocksize"]
    absmax = np.repeat(inputs["absmax"].astype(np.float32), size)[: codes.size].reshape(codes.shape)
    return outputs | {"w_hat": inputs["quant_map"][codes] * absmax}
