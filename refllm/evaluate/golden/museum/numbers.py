"""Defects of number formats, quantisers and integer products."""

import numpy as np

from refllm.evaluate.golden.museum.exhibit import Room, right
from refllm.formats.dtypes import E8M0, FP4_E2M1, FP8_E4M3FN, FP8_E4M3FNUZ
from refllm.formats.microscale import MX_FORMATS

ROOM = Room()


def only(params: dict, *formats: str) -> None:
    """Raise NotImplementedError for formats that the software does not have."""
    if params["format"] not in formats:
        raise NotImplementedError(params["format"])


def _mx(params: dict, x: np.ndarray, *rule: str, **how) -> dict[str, np.ndarray]:
    if params["format"] not in MX_FORMATS:
        raise ValueError(params["format"])
    form = MX_FORMATS[params["format"]]
    codes, scales = form.encode(x, *rule, **how)
    return {"codes": codes, "scales": scales, "w_hat": form.decode(codes, scales)}


@ROOM.enter(
    "e2m1-subnormals-normal",
    "formats/small_floats_decode",
    "subnormals-as-normals",
    2026,
    "tile-ai/tilelang/issues/2704",
    "FP4 was widened to bfloat16 by moving the exponent, as if every code were a normal number: 0 became 0.5.",
)
def _(op, params, inputs):
    only(params, "FP4_E2M1")
    codes = inputs["codes"].astype(int)
    size = np.ldexp(1 + (codes & 1) / 2, (codes >> 1 & 3) - 1)
    return {"x": np.where(codes & 8, -size, size).astype(np.float32)}


@ROOM.enter(
    "e4m3-top-binade",
    "formats/small_floats",
    "top-binade-lost",
    2026,
    "tile-ai/tilelang-metax/pull/140",
    "A cast to E4M3 saturated as soon as the exponent field was 15: 256 became 448.",
)
def _(op, params, inputs):
    only(params, "FP8_E4M3FN")
    codes = right(op, params, inputs)["codes"]
    top = (codes & 0x78) == 0x78
    return {"codes": np.where(top & (codes & 0x7F != 0x7F), codes & 0x80 | 0x7E, codes).astype(np.uint8)}


@ROOM.enter(
    "e4m3-saturates-silently",
    "formats/small_floats",
    "saturates",
    2026,
    "stillwater-sc/universal/issues/1302 stillwater-sc/universal/pull/1351",
    "A type meant to follow OCP without saturation turned 500 and infinity into 448.",
    declared={"overflow": "ieee"},
)
def _(op, params, inputs):
    only(params, "FP8_E4M3FN")
    return {"codes": FP8_E4M3FN.encode(inputs["x"], "satfinite")}


@ROOM.enter(
    "e4m3-nan-on-overflow",
    "formats/small_floats",
    "does-not-saturate",
    2025,
    "jax-ml/ml_dtypes/issues/260 jax-ml/ml_dtypes/issues/400",
    "One library's cast gives NaN above 464, the runtime that loads the model saturates: one large weight is NaN.",
)
def _(op, params, inputs):
    only(params, "FP8_E4M3FN")
    return {"codes": FP8_E4M3FN.encode(inputs["x"], "ieee")}


@ROOM.enter(
    "fnuz-ends-at-224",
    "formats/small_floats",
    "fnuz-max-224",
    2025,
    "sgl-project/sglang/pull/3959 modelscope/DiffSynth-Studio/pull/1528",
    "The largest E4M3FNUZ number was taken for 224, by analogy with E4M3FN, whose top code is NaN.",
)
def _(op, params, inputs):
    only(params, "FP8_E4M3FNUZ")
    x = inputs["x"]
    return {"codes": FP8_E4M3FNUZ.encode(np.clip(x, -224, 224))}


@ROOM.enter(
    "e8m0-ties-away",
    "formats/small_floats",
    "ties-away",
    2026,
    "jax-ml/ml_dtypes/pull/398",
    "Half of all ties between powers of two went up instead of to the even code, in the library used as a judge.",
)
def _(op, params, inputs):
    only(params, "E8M0")
    return {"codes": E8M0.encode(inputs["x"], ties="away")}


@ROOM.enter(
    "mx-scale-of-quotient",
    "formats/microscale",
    "e8m0-nearest-quotient",
    2026,
    "ROCm/FlyDSL/pull/590",
    "The scale was amax / max to the nearest power of two instead of even_round: one step low for most blocks.",
    declared={"scale_rule": "even"},
)
def _(op, params, inputs):
    only(params, "MXFP6_E2M3", "MXFP8_E4M3")
    form, x = MX_FORMATS[params["format"]], inputs["x"]
    if not np.isfinite(x).all() or x.shape[-1] % 32:
        raise ValueError("blocks")
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    mantissa, exponent = np.frexp((np.abs(blocks).max(-1) / form.max).astype(np.float32))
    s = np.where(mantissa > 0, exponent - 1 + (mantissa >= 0.75), -127).clip(-127, 127)
    codes = form.element.encode(np.ldexp(blocks.astype(float), -s[..., None]), "satfinite").reshape(x.shape)
    scales = (s + 127).astype(np.uint8)
    return {"codes": codes, "scales": scales, "w_hat": form.decode(codes, scales)}


@ROOM.enter(
    "mx-scale-rounded-up",
    "formats/microscale",
    "e8m0-ceil",
    2025,
    "DeepWok/mase/pull/321",
    "The shared exponent was rounded up where the specification says down.",
)
def _(op, params, inputs):
    return _mx(params, inputs["x"], "ceil")


@ROOM.enter(
    "mxfp4-ties-away",
    "formats/microscale",
    "ties-away",
    2026,
    "ROCm/aiter/pull/3153",
    "A fused kernel rounded FP4 ties away from zero, its reference to even.",
)
def _(op, params, inputs):
    only(params, "MXFP4")
    return _mx(params, inputs["x"], ties="away")


@ROOM.enter(
    "nvfp4-global-scale-multiplied",
    "formats/nvfp4",
    "reciprocal-global-scale",
    2026,
    "modular/modular/issues/6600 modular/modular/pull/6699",
    "compressed-tensors stores a divisor; the engine multiplied by it and produced garbage.",
)
def _(op, params, inputs):
    outputs = right(op, params, inputs)
    scale = FP8_E4M3FN.decode(outputs["scales"]) * outputs["global_scale"]
    decoded = FP4_E2M1.decode(outputs["codes"]) * np.repeat(scale, 16, axis=-1)
    return outputs | {"w_hat": decoded}


@ROOM.enter(
    "nvfp4-one-level",
    "formats/nvfp4",
    "global-scale-ignored",
    2025,
    "nunchux-ai/nunchaku/issues/362",
    "A kernel computed block scales without the scale of the tensor; a reader asked which of the two it should be.",
)
def _(op, params, inputs):
    x = inputs["x"]
    if x.shape[-1] % 16 or not np.isfinite(x).all():
        raise ValueError("blocks")
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    scales = FP8_E4M3FN.encode(np.abs(blocks).max(-1) / np.float32(6))
    step = FP8_E4M3FN.decode(scales)[..., None]
    with np.errstate(all="ignore"):
        codes = FP4_E2M1.encode(np.nan_to_num(blocks / step))
    w_hat = (FP4_E2M1.decode(codes) * step).reshape(x.shape)
    return {
        "codes": codes.reshape(x.shape),
        "scales": scales,
        "global_scale": np.array(1, np.float32),
        "w_hat": w_hat,
    }


@ROOM.enter(
    "half-added",
    "quant/rtn",
    "half-added",
    2026,
    "ModelCloud/GPTQModel/pull/3058",
    "floor(|x| + 0.5) stood for roundf: the float just below one half rounds up.",
    outputs="codes packed",
)
def _(op, params, inputs):
    w, outputs = inputs["w"], right(op, params, inputs)
    if not params["symmetric"] or (params["scale_dtype"] != "float32" and params["bits"] == 3):
        raise NotImplementedError
    scale = np.repeat(outputs["scale"].astype(np.float32), w.shape[1] // outputs["scale"].shape[1], axis=1)
    with np.errstate(all="ignore"):
        steps = np.copysign(np.floor(np.abs(w / scale) + np.float32(0.5)), w)
    top = 2 ** (params["bits"] - 1) - 1
    codes = (np.clip(steps, -top, top) + top + 1).astype(np.uint8)
    return outputs | {"codes": codes, "packed": _packed(codes, params["bits"])}


@ROOM.enter(
    "inverse-multiplied",
    "quant/rtn",
    "reciprocal-product",
    2024,
    "ggml-org/llama.cpp/pull/7234",
    "The converter in Python divided by the scale, the one in C multiplied by its inverse: two files from one model.",
    outputs="codes packed",
)
def _(op, params, inputs):
    w, outputs = inputs["w"], right(op, params, inputs)
    if not params["symmetric"]:
        raise NotImplementedError
    scale = np.repeat(outputs["scale"].astype(np.float32), w.shape[1] // outputs["scale"].shape[1], axis=1)
    with np.errstate(all="ignore"):
        steps = np.rint(w * (np.float32(1) / scale))
    top = 2 ** (params["bits"] - 1) - 1
    codes = (np.clip(steps, -top, top) + top + 1).astype(np.uint8)
    return outputs | {"codes": codes, "packed": _packed(codes, params["bits"])}


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    stream = (codes[:, :, None] >> np.arange(bits) & 1).reshape(len(codes), codes.shape[1] * bits)
    return np.packbits(stream.astype(np.uint8), axis=1, bitorder="little")


@ROOM.enter(
    "maddubs-saturates",
    "quant/rtn_matmul",
    "int16-saturation",
    2025,
    "ikawrakow/ik_llama.cpp/pull/427 microsoft/BitNet/issues/629 pytorch/pytorch/issues/17458",
    "Pairs of 8-bit products were added in 16 bits, which saturates: only the largest activations show it.",
)
def _(op, params, inputs):
    x, scale = inputs["x"], inputs["scale"]
    outputs = right(op, params, inputs)
    if params["bits"] != 8 or scale.shape[1] != 1 or (x != np.rint(x)).any() or np.abs(x).max() > 127:
        return outputs
    codes = inputs["packed"].astype(np.int64)
    zero = 128 if params["symmetric"] else inputs["packed_zero_point"].astype(np.int64)
    steps = codes - zero
    pairs = (x.astype(np.int64)[:, None] * steps).reshape(len(x), len(steps), -1, 2).sum(-1)
    return {"y": (np.clip(pairs, -32768, 32767).sum(-1) * scale[:, 0].astype(np.float32)).astype(np.float32)}
