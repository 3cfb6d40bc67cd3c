"""Ternary weights of BitNet b1.58: I2_S of bitnet.cpp and the packed bytes of its Hugging Face checkpoints.

Codes are t + 1 for t = -1, 0, 1; the code 3 does not occur.

    I2_S          flat, row-major; units run over the whole weight. A unit of 128 codes is 32 bytes: byte j holds the
                  codes j, j + 32, j + 64, j + 96 from its HIGH bits down ("x86"). ARM builds write units of 64: byte j
                  holds j, j + 16, j + 32, j + 48 ("arm"). Behind the codes 32 bytes: the scale, float32, and padding.
                  w = scale t
    Hugging Face  weight U8 [out / 4, in]: byte [r, c] holds rows r, r + out / 4, r + out / 2, r + 3 out / 4 from its
                  LOW bits up; weight_scale [1].
                  w = t / weight_scale ("autobitlinear" multiplies)

Source: bitnet.cpp, src/ggml-bitnet-mad.cpp (quantize_i2_s); transformers, integrations/bitnet.py. A file does not say
which of the I2_S orders it has. Newer x86 builds can also interleave four rows (ACT_PARALLEL off): not read here.
"""

import numpy as np

from refllm.formats.checkpoints.base import check_codes, check_multiple, stored
from refllm.formats.checkpoints.describe import Stored, Tensor
from refllm.formats.layouts import Layout, codes

I2_S = {
    "x86": Layout("I2_S", 32, 128, (codes("q", 128, 2, "i % 32", "6 - 2 * (i // 32)", "t + 1"),)),
    "arm": Layout("I2_S (ARM)", 16, 64, (codes("q", 64, 2, "i % 16", "6 - 2 * (i // 16)", "t + 1"),)),
}
ROWS = Layout("four rows", 1, 4, (codes("q", 4, 2, "0", "2 * i", "t + 1"),))
_OTHERS = "a file does not say its order; a third one of newer x86 builds, which interleaves four rows, is not read"
TAIL = 32  # bytes behind the codes
STORED = (
    *(
        Stored(
            "I2_S",
            f"{order} order",
            "scale * (q[k] - 1), k = o * in + i",
            "1: codes are t + 1",
            (
                Tensor(
                    "weight", "codes, then the scale as F32", I2_S[order], "flat", ("out * in / 4 + 32",), "U8", _OTHERS
                ),
            ),
            "bitnet.cpp",
        )
        for order in ("x86", "arm")
    ),
    Stored(
        "bitnet",
        "Hugging Face",
        "(q[o, i] - 1) / weight_scale",
        "1: codes are t + 1",
        (
            Tensor("weight", "codes", ROWS, "out", ("out / 4", "in"), "U8", "a byte holds rows a quarter apart"),
            Tensor("weight_scale", "scale", None, "", ("1",), "scale", "divides"),
        ),
        "transformers",
    ),
)


def i2_s_pack(codes: np.ndarray, scale: float, *, order: str = "x86") -> np.ndarray:
    """Ternary codes (out, in) 0..2 and one scale -> the bytes of an I2_S tensor, (out in / 4 + 32,) uint8.

    Raises
    ------
    ValueError
        out * in is not a multiple of the unit; a code above 2; a scale that is not finite.
    """
    layout = _order(order)
    codes = _ternary(codes)
    check_multiple("out * in", codes.size, layout.elements, "whole units")
    if not np.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    units = layout.pack(q=codes.reshape(-1, layout.elements)).reshape(-1)
    tail = np.zeros(TAIL, np.uint8)
    tail[:4] = np.frombuffer(np.array(scale, "<f4").tobytes(), np.uint8)
    return np.concatenate([units, tail])


def i2_s_unpack(data: np.ndarray, shape: tuple[int, int], *, order: str = "x86") -> tuple[np.ndarray, np.float32]:
    """The bytes of an I2_S tensor -> codes (out, in) uint8, scale.

    Raises
    ------
    ValueError
        Another number of bytes than the shape needs, another dtype, or the code 3.
    """
    layout, data, n = _order(order), np.asarray(data), int(np.prod(shape))
    check_multiple("out * in", n, layout.elements, "whole units")
    if data.dtype != np.uint8 or data.shape != (n // 4 + TAIL,):
        raise ValueError(f"I2_S of shape {shape} is {n // 4 + TAIL} bytes, got {data.dtype} of shape {data.shape}")
    units = layout.unpack(np.ascontiguousarray(data[: n // 4]).reshape(-1, layout.nbytes))["q"]
    return _ternary(units.reshape(shape)), data[n // 4 : n // 4 + 4].copy().view("<f4")[0].astype(np.float32)


def i2_s_dequantize(data: np.ndarray, shape: tuple[int, int], *, order: str = "x86") -> np.ndarray:
    """The bytes of an I2_S tensor -> (out, in) float32, exact."""
    codes, scale = i2_s_unpack(data, shape, order=order)
    return (codes.astype(np.float32) - 1) * scale


def bitnet_pack(codes: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """Ternary codes (out, in) 0..2, out a multiple of 4, and the divisor -> weight, weight_scale.

    Raises
    ------
    ValueError
        Wrong shapes; a code above 2; a scale that is zero or not finite.
    """
    codes, scale = _ternary(codes), np.float32(scale)
    check_multiple("out", len(codes), 4, "a byte holds four rows")
    if not np.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    quarters = np.moveaxis(codes.reshape(4, len(codes) // 4, codes.shape[1]), 0, -1)
    return {"weight": ROWS.pack(q=quarters)[..., 0], "weight_scale": np.array([scale])}


def bitnet_unpack(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.float32]:
    """weight, weight_scale -> codes (out, in) uint8, divisor.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype; the code 3.
    """
    packed = stored(tensors, "weight", ("uint8",), 2)
    scale = stored(tensors, "weight_scale", ("float16", "float32"), 1)
    if scale.shape != (1,):
        raise ValueError(f"weight_scale must be one number, got shape {scale.shape}")
    quarters = np.moveaxis(ROWS.unpack(packed[..., None])["q"], -1, 0)
    return _ternary(quarters.reshape(4 * packed.shape[0], packed.shape[1])), np.float32(scale[0])


def bitnet_dequantize(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """weight, weight_scale -> (out, in) float32, each quotient rounded once."""
    codes, scale = bitnet_unpack(tensors)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return (codes.astype(np.float32) - 1) / scale


def _order(order: str) -> Layout:
    if order not in I2_S:
        raise ValueError(f"order must be one of {', '.join(I2_S)} (four interleaved rows are not read), got {order!r}")
    return I2_S[order]


def _ternary(codes: np.ndarray) -> np.ndarray:
    codes = check_codes(codes, 2)
    if codes.size and codes.max() > 2:
        raise ValueError("ternary codes are 0, 1, 2; got 3")
    return codes
