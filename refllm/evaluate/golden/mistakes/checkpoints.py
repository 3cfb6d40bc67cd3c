"""Mistakes with checkpoint formats: what the stored integers mean, and the order of the rarer layouts."""

import json
from collections.abc import Iterator

import numpy as np

from refllm.evaluate.golden.mistakes.base import Given, Hypothesis

_OPS = ("formats.gptq", "formats.awq", "formats.compressed_tensors", "formats.bitsandbytes", "formats.checkpoints_misc")

_INTEGERS = (None, "pack-quantized", "int-quantized", "matmul_nbits")  # formats whose codes are integers


def predict(given: Given) -> Iterator[Hypothesis]:
    """Predictions for formats.gptq, awq, compressed_tensors, bitsandbytes and checkpoints_misc."""
    if given.op not in _OPS:
        return
    reads = given.params.get("direction") == "unpack"
    form = given.params.get("format")
    if reads and form in _INTEGERS and {"codes", "scale", "w_hat"} <= given.expected.keys():
        yield from _weights(given)
    if "parts" in given.params:
        yield from _fused(given)
    if given.op == "formats.bitsandbytes" and reads:
        yield from _bitsandbytes(given)
    if form == "i2_s" and reads:
        yield from _i2_s(given)
    if form == "scales_swizzled":
        yield from _swizzled(given, reads)
    if given.params.get("bits") == 3 and not reads:
        for name in given.expected.keys() & {"qweight", "weight_packed"}:
            codes = given.inputs["codes"]
            wide = _ten_a_word(codes)
            wide = np.ascontiguousarray(wide.T) if name == "qweight" else wide
            yield Hypothesis(
                "three-bit-words", f"output {name}", {name: wide, "qzeros": None, "weight_zero_point": None}
            )
    if "qweight" in given.expected and "zero_point" in given.inputs and given.params.get("bits", 4) in (2, 4, 8):
        yield from _stored_zeros(given)


def _ten_a_word(codes: np.ndarray) -> np.ndarray:
    full = np.zeros((len(codes), -(-codes.shape[1] // 10) * 10), np.uint32)
    full[:, : codes.shape[1]] = codes
    return (full.reshape(len(codes), -1, 10) << np.arange(0, 30, 3, np.uint32)).sum(-1).astype(np.uint32).view(np.int32)


def _stored_zeros(given: Given) -> Iterator[Hypothesis]:
    """Writers that subtract one where they should not, or let 0 wrap; refllm refuses some of that."""
    zero, bits = given.inputs["zero_point"].astype(np.int64), given.params.get("bits", 4)
    for step, mistake in ((-1, "zero-point-minus-one"), (1, "zero-point-plus-one")):
        yield Hypothesis(mistake, "", given.right(zero_point=((zero + step) % (1 << bits)).astype(np.uint8)))


def _weights(given: Given) -> Iterator[Hypothesis]:
    """The same codes with other zero points, groups or signs."""
    codes, scale = given.expected["codes"].astype(np.int64), given.expected["scale"].astype(np.float32)
    if codes.ndim != 2 or scale.ndim != 2 or len(scale) != len(codes) or given.expected["w_hat"].shape != codes.shape:
        return
    bits = given.params.get("bits", 8 if given.params.get("quant_type") else 4)
    stored = given.expected.get("zero_point")
    middle = 1 << bits - 1
    zero = np.full(scale.shape, middle) if stored is None else stored.astype(np.int64)
    index = given.expected.get("g_idx")
    if index is None:
        size = given.params.get("block_size", -(-codes.shape[1] // max(scale.shape[1], 1)))
        index = np.arange(codes.shape[1]) // size

    def outputs(codes=codes, zero=zero, scale=scale, index=index) -> dict[str, np.ndarray]:
        w_hat = (scale[:, index] * (codes - zero[:, index]).astype(np.float32)).astype(np.float32)
        return {"w_hat": w_hat} | ({} if stored is None else {"zero_point": zero.astype(stored.dtype)})

    top = 1 << bits
    for step, mistake in ((-1, "zero-point-minus-one"), (1, "zero-point-plus-one")):
        yield Hypothesis(mistake, "modulo 2^bits", outputs(zero=(zero + step) % top))
        yield Hypothesis(mistake, "not wrapped", outputs(zero=zero + step))
    yield Hypothesis("zero-wraps", f"to {top}", outputs(zero=np.where(zero == 0, top, zero)) | {"zero_point": None})
    yield Hypothesis(
        "zero-wraps", f"to {top - 1}", outputs(zero=np.where(zero == 0, top - 1, zero)) | {"zero_point": None}
    )
    absent = not given.inputs.keys() & {"zero_points", "weight_zero_point", "qzeros"}
    if absent:
        yield Hypothesis("default-zero-is-0", "", {"w_hat": outputs(zero=np.zeros_like(zero))["w_hat"]})
        yield Hypothesis("zero-point-minus-one", "default", {"w_hat": outputs(zero=zero - 1)["w_hat"]})
    signed = (codes ^ middle) - middle
    yield Hypothesis(
        "twos-complement", "w_hat only", {"w_hat": outputs(codes=signed, zero=np.zeros_like(zero))["w_hat"]}
    )
    yield Hypothesis(
        "unsigned-difference", "", {"w_hat": scale[:, index] * ((codes - zero[:, index]) % 256).astype(np.float32)}
    )
    yield Hypothesis(
        "first-group-scale", "", {"w_hat": outputs(scale=np.repeat(scale[:, :1], scale.shape[1], 1))["w_hat"]}
    )
    for name in given.inputs.keys() & {"g_idx", "weight_g_idx"}:
        in_order = np.arange(codes.shape[1]) // -(-codes.shape[1] // scale.shape[1])
        yield Hypothesis("groups-in-order", "", {"w_hat": outputs(index=in_order)["w_hat"]})
        yield Hypothesis(
            "groups-in-order", f"input {name}", outputs(index=in_order) | {"g_idx": in_order.astype(np.int32)}
        )
    yield Hypothesis("all-zero-product", "w_hat", {"w_hat": np.zeros(codes.shape, np.float32)})
    block = given.params.get("block_size", 0)
    if isinstance(block, int) and block > 256:
        yield Hypothesis("all-zero-product", "blocks above 256", {"w_hat": np.zeros(codes.shape, np.float32)})
    else:
        yield Hypothesis("all-zero-product", "blocks above 256", {})


def _fused(given: Given) -> Iterator[Hypothesis]:
    """One global scale for all parts of a fused weight."""
    scales = given.inputs["weight_global_scale"]
    for words, one in (("largest", scales.max()), ("smallest", scales.min()), ("first", scales[0])):
        outputs = given.right(weight_global_scale=np.full_like(scales, one))
        yield Hypothesis("one-global-scale", f"the {words}", {"w_hat": outputs["w_hat"]})
        yield Hypothesis("one-global-scale", f"the {words}, stored", outputs)


def _bitsandbytes(given: Given) -> Iterator[Hypothesis]:
    """Another table, or scales whose offset is missing, or that are not decoded."""
    if "quant_map" not in given.inputs:
        return
    from refllm.formats.dtypes import FP4_BNB, NF4

    codes, scale, size = given.expected["codes"], given.expected["scale"], given.params["blocksize"]
    wide = np.repeat(scale, size)[: codes.size].reshape(codes.shape)
    other = FP4_BNB if given.params["quant_type"] == "nf4" else NF4
    yield Hypothesis("fp4-tables-confused", "", {"w_hat": other.decode(codes) * wide})
    if given.params.get("double_quant"):
        offset = np.float32(json.loads(given.inputs["quant_state"].tobytes()).get("nested_offset", 0))
        wide = np.repeat(scale - offset, size)[: codes.size].reshape(codes.shape)
        w_hat = given.inputs["quant_map"][codes] * wide
        yield Hypothesis("absmax-offset-missing", "", {"scale": scale - offset, "w_hat": w_hat.astype(np.float32)})
        stored = given.inputs["absmax"].astype(np.float32)
        wide = np.repeat(stored, size)[: codes.size].reshape(codes.shape)
        yield Hypothesis("absmax-not-decoded", "", {"scale": None, "w_hat": given.inputs["quant_map"][codes] * wide})


def _i2_s(given: Given) -> Iterator[Hypothesis]:
    """Four neighbours in a byte, from either end, and trits as two's complement."""
    codes, data = given.expected["codes"], given.inputs["data"]
    scale = given.expected["scale"]
    scrambled = {"": codes}
    bytes_ = data[: codes.size // 4, None]
    for words, shifts in (("low bits first", (0, 2, 4, 6)), ("high bits first", (6, 4, 2, 0))):
        scrambled[words] = (bytes_ >> np.uint8(shifts) & 3).reshape(codes.shape)
    for words, read in scrambled.items():
        mistake = "linear-for-strided" if words else "twos-complement"
        plain, signed = read.astype(np.int64) - 1, np.array([0, 1, -1, -2])[read]
        for extra, trits in (("", plain), (", as two's complement", signed)):
            w_hat = (trits * scale).astype(np.float32)
            yield Hypothesis(mistake, words + extra, {"codes": (trits + 1).astype(np.uint8), "w_hat": w_hat})
            yield Hypothesis(mistake, f"{words}{extra}, whatever the codes", {"codes": None, "w_hat": w_hat})


def _swizzled(given: Given, reads: bool) -> Iterator[Hypothesis]:
    rows, columns = given.params["shape"]
    down, across = -(-rows // 128) * 128, -(-columns // 4) * 4
    if reads:
        plain = given.inputs["data"].reshape(down, across)[:rows, :columns]
        yield Hypothesis("not-swizzled", "", {"scale": np.ascontiguousarray(plain)})
        return
    plain = np.zeros((down, across), np.uint8)
    plain[:rows, :columns] = given.inputs["scale"]
    yield Hypothesis("not-swizzled", "", {"data": plain.reshape(-1)})
    again = given.right({"shape": [down, across]}, scale=given.expected["data"].reshape(down, across))
    yield Hypothesis("swizzled-twice", "", again)
