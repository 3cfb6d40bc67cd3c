"""Microscaling: small elements that share a scale, MX (block 32, power of two) and NVFP4 (block 16, E4M3).

MX. The block's scale is 2^s, stored as E8M0 (s + 127), and an element is x / 2^s, rounded, saturating. s comes from
the block's largest magnitude amax by one of four rules; max is the element's largest number, emax its exponent:
    floor   floor(log2 amax) - emax                                   OCP; torchao FLOOR; amax may be clipped
    ceil    ceil(log2 amax) - emax                                    torchao CEIL; never clips, may waste a bit
    rceil   ceil(log2(amax / max)), the quotient rounded to float32   torchao RCEIL, cuBLAS, DeepSeek's ue8m0
    even    floor(log2 amax') - emax, where amax' is amax rounded up
            by half a step of the element's mantissa                  torchao EVEN, Quark; compressed-tensors' MXFP4
s is kept within -127 .. 127, so a block of zeros has the scale 2^-127.
bits/weight: element + 8 / 32.

NVFP4. One float32 scale a tensor, one E4M3 scale for 16 elements, elements E2M1. The tensor's scale brings the
largest block scale to 448: it is amax / (448 6), or that number's reciprocal, and people have loaded one for the other.
Every step below is one float32 operation, g the tensor's scale, b the block's largest magnitude:
    convention           g               block scale s        s when 0    x divided by   decoded
    compressed-tensors   2688 (1 / amax)  E4M3(g (b / 6))     0.125       s / g          q (s / g)
    modelopt             amax / 2688      E4M3(b / (6 g))     1           s g            q (s g)
    torchao              amax / 2688      E4M3((b / 6) / g),  -           not divided:   q (s g)
                                          at least 2^-6                   x ((1 / g) / s)
g is 1 for a tensor of zeros, or when g would be infinite or 0.
bits/weight: 4 + 8 / 16, and 32 bits a tensor.

Sources: OCP Microscaling Formats (MX) 1.0, section 6.3; Rouhani et al. 2023, arXiv:2310.10537; microxcaling, torchao
0.18 (prototype/mx_formats), compressed-tensors 0.20, ModelOpt (nvfp4_tensor.py).
"""

from dataclasses import dataclass

import numpy as np

from refllm.formats.dtypes import (
    E8M0,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3FN,
    FP8_E5M2,
    INT8,
    FloatFormat,
    IntegerFormat,
)

SCALE_RULES = ("floor", "ceil", "rceil", "even")
NONFINITES = ("error", "nan", "saturate")
CONVENTIONS = ("compressed-tensors", "modelopt", "torchao")


@dataclass(frozen=True)
class MXFormat:
    """A microscaling format of OCP.

    Parameters
    ----------
    name : str
    element : FloatFormat or IntegerFormat
        MXINT8 has elements code / 64, of which -128 / 64 is read but never written.

    Examples
    --------
    >>> x = np.float32([6, 7, -1, 0.25] * 8)
    >>> codes, scales = MXFP4.encode(x)
    >>> codes[:4].tolist(), scales.tolist(), MXFP4.decode(codes, scales)[:4].tolist()
    ([7, 7, 10, 0], [127], [6.0, 6.0, -1.0, 0.0])
    >>> MXFP4.bits_per_weight
    4.25
    """

    name: str
    element: FloatFormat | IntegerFormat

    block_size = 32

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for one number, scales included."""
        return self.element.bits + E8M0.bits / self.block_size

    @property
    def unit(self) -> float:
        """What an element of value 1 stands for: 1/64 for INT8."""
        return 1.0 if isinstance(self.element, FloatFormat) else 1 / 64

    @property
    def max(self) -> float:
        """The largest element."""
        return self.element.max if isinstance(self.element, FloatFormat) else self.element.high * self.unit

    @property
    def mantissa_bits(self) -> int:
        """Bits after the leading one of the largest element."""
        return self.element.mantissa_bits if isinstance(self.element, FloatFormat) else self.element.bits - 2

    def encode(
        self,
        x: np.ndarray,
        scale_rule: str = "floor",
        *,
        nonfinite: str = "error",
        rounding: str = "nearest",
        ties: str = "even",
        rng: np.random.Generator | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers -> elements and block scales.

        Parameters
        ----------
        x : (..., n) float16, float32 or float64
            n a multiple of 32.
        scale_rule : str
            "floor", "ceil", "rceil" or "even", see the module.
        nonfinite : str
            Of NaN and infinities: "error" (ValueError); "nan": the scale of their block is NaN (microxcaling);
            "saturate": NaN as before, but an infinity is the largest element, of a block with amax 2^128 (torchao).
        rounding, ties, rng
            Of the elements, as in FloatFormat.encode; microxcaling's default is ties="away".

        Returns
        -------
        codes : (..., n) uint8
            Unsigned element codes; 0 in a block whose scale is NaN.
        scales : (..., n / 32) uint8
            E8M0 codes.

        Raises
        ------
        ValueError
            n is no multiple of 32, another dtype, an unknown choice, or what `nonfinite` refuses.
        """
        if scale_rule not in SCALE_RULES or nonfinite not in NONFINITES:
            message = f"scale_rule is one of {', '.join(SCALE_RULES)} and nonfinite one of {', '.join(NONFINITES)}"
            raise ValueError(f"{self.name}: {message}; got {scale_rule!r} and {nonfinite!r}")
        blocks = _blocks(x, self.block_size, self.name).astype(np.float64)
        finite = np.isfinite(blocks)
        if nonfinite == "error" and not finite.all():
            raise ValueError(f"{self.name}: a number is not finite; nonfinite= may be nan or saturate")
        spoilt = (np.isnan(blocks) if nonfinite == "saturate" else ~finite).any(-1)
        blocks = np.where(spoilt[..., None], 0.0, blocks)
        shared = self._shared_exponent(np.abs(blocks).max(-1), scale_rule)
        with np.errstate(over="ignore"):
            scaled = np.ldexp(blocks, -shared[..., None]) / self.unit
        if isinstance(self.element, FloatFormat):
            codes = self.element.encode(scaled, "satfinite", rounding=rounding, ties=ties, rng=rng)
        else:
            scaled = np.clip(scaled, -self.element.high, self.element.high)
            codes = self.element.encode(scaled, rounding=rounding, ties=ties, rng=rng)
        scales = np.where(spoilt, E8M0.nan_code, shared + E8M0.bias).astype(np.uint8)
        return codes.reshape(np.shape(x)), scales

    def _shared_exponent(self, amax: np.ndarray, rule: str) -> np.ndarray:
        emax = int(np.frexp(self.max)[1]) - 1
        if rule == "rceil":
            emax = 0
            with np.errstate(over="ignore"):
                amax = (amax / self.max).astype(np.float32).astype(np.float64)
        amax = np.minimum(amax, 2.0**128)  # an infinity
        mantissa, exponent = np.frexp(amax)  # amax = 2 mantissa 2^(exponent - 1), 1 <= 2 mantissa < 2
        if rule in ("ceil", "rceil"):
            up = mantissa > 0.5
        else:
            up = (rule == "even") & (2 * mantissa + 2.0 ** -(self.mantissa_bits + 1) >= 2)
        shared = np.where(amax > 0, exponent - 1 + up - emax, -E8M0.bias)
        return np.clip(shared, -E8M0.bias, E8M0.bias).astype(np.int32)

    def decode(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Elements (..., n) and E8M0 scales (..., n / 32), both uint8 -> float32 (..., n); a NaN scale gives NaN.

        Raises
        ------
        ValueError
            Shapes that do not fit, another dtype, or codes that the element does not have.
        """
        if isinstance(self.element, IntegerFormat):
            values = self.element.decode(codes).astype(np.float64) * self.unit
        else:
            values = self.element.decode(codes).astype(np.float64)
        blocks = _blocks(values, self.block_size, self.name)
        _check_scales(blocks, scales, self.name)
        with np.errstate(over="ignore", invalid="ignore"):
            decoded = blocks * E8M0.decode(scales).astype(np.float64)[..., None]
            return decoded.astype(np.float32).reshape(values.shape)


@dataclass(frozen=True)
class NVFP4Format:
    """NVIDIA's FP4: E2M1 elements, an E4M3 scale for 16 of them, a float32 scale for the tensor.

    Examples
    --------
    >>> x = np.float32([6, -3, 1, 0.25] * 4)
    >>> codes, scales, g = NVFP4.encode(x)
    >>> codes[:4].tolist(), scales.tolist(), float(g)
    ([7, 13, 2, 0], [126], 448.0)
    >>> round(float(NVFP4.encode(x, "modelopt")[2]) * 448, 6)
    1.0
    """

    name: str = "NVFP4"

    block_size = 16

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for one number, without the 32 of the tensor's scale."""
        return FP4_E2M1.bits + FP8_E4M3FN.bits / self.block_size

    def encode(
        self,
        x: np.ndarray,
        convention: str = "compressed-tensors",
        *,
        global_scale: float | np.ndarray | None = None,
        rounding: str = "nearest",
        ties: str = "even",
        rng: np.random.Generator | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers -> elements, block scales and the tensor's scale.

        Parameters
        ----------
        x : (..., n) float16, float32 or float64
            n a multiple of 16; rounded to float32 first.
        convention : str
            "compressed-tensors", "modelopt" or "torchao", see the module.
        global_scale : float, optional
            The tensor's scale, as the convention stores it (that of a fused layer, or a calibrated one).
        rounding, ties, rng
            Of the elements, as in FloatFormat.encode.

        Returns
        -------
        codes : (..., n) uint8
            E2M1 codes.
        scales : (..., n / 16) uint8
            E4M3 codes.
        global_scale : () float32

        Raises
        ------
        ValueError
            n is no multiple of 16, another dtype, an unknown choice, a number that is not finite, a global scale that
            is not a positive number.
        """
        self._check(convention)
        blocks = _blocks(x, self.block_size, self.name)
        with np.errstate(over="ignore"):
            blocks = blocks.astype(np.float32)
        if not np.isfinite(blocks).all():
            raise ValueError(f"{self.name}: a number is not finite in float32")
        amax = np.abs(blocks).max(-1)
        g = self._global_scale(amax, convention) if global_scale is None else np.float32(global_scale)
        if g.shape != () or not (0 < g < np.inf):
            raise ValueError(f"{self.name}: global_scale is one positive number, got {global_scale!r}")
        with np.errstate(over="ignore", under="ignore"):
            scales = self._block_scales(amax, g, convention)
            s = FP8_E4M3FN.decode(scales)
            if convention == "torchao":
                scaled = blocks * ((np.float32(1) / g) / s)[..., None]
            else:
                scaled = blocks / self._step(s, g, convention)[..., None]
        # 0 / 0 where s g underflows: such a block holds only zeros and what rounds to them.
        scaled = np.where(np.isnan(scaled), np.float32(0), scaled)
        codes = FP4_E2M1.encode(scaled, rounding=rounding, ties=ties, rng=rng)
        return codes.reshape(np.shape(x)), scales, np.asarray(g)

    def decode(
        self, codes: np.ndarray, scales: np.ndarray, global_scale: float, convention: str = "compressed-tensors"
    ) -> np.ndarray:
        """Elements (..., n), E4M3 scales (..., n / 16), the tensor's scale -> float32 (..., n).

        Raises
        ------
        ValueError
            Shapes that do not fit, another dtype, or codes that E2M1 does not have.
        """
        self._check(convention)
        blocks = _blocks(FP4_E2M1.decode(codes), self.block_size, self.name)
        _check_scales(blocks, scales, self.name)
        with np.errstate(all="ignore"):
            step = self._step(FP8_E4M3FN.decode(scales), np.float32(global_scale), convention)
            return (blocks * step[..., None]).reshape(np.shape(codes))

    def _check(self, convention: str) -> None:
        if convention not in CONVENTIONS:
            raise ValueError(f"{self.name}: convention is one of {', '.join(CONVENTIONS)}, got {convention!r}")

    @staticmethod
    def _step(s: np.ndarray, g: np.float32, convention: str) -> np.ndarray:
        return s / g if convention == "compressed-tensors" else s * g

    @staticmethod
    def _global_scale(amax: np.ndarray, convention: str) -> np.float32:
        largest, range_ = amax.max(initial=np.float32(0)), np.float32(448 * 6)
        with np.errstate(all="ignore"):
            g = range_ * (np.float32(1) / largest) if convention == "compressed-tensors" else largest / range_
        return g if 0 < g < np.inf else np.float32(1)

    @staticmethod
    def _block_scales(amax: np.ndarray, g: np.float32, convention: str) -> np.ndarray:
        six = np.float32(6)
        if convention == "compressed-tensors":
            codes = FP8_E4M3FN.encode(g * (amax / six))
            return np.where(codes == 0, FP8_E4M3FN.encode(np.float32(0.125)), codes)
        if convention == "modelopt":
            wanted = amax / (six * g)
            return FP8_E4M3FN.encode(np.where(wanted == 0, np.float32(1), wanted))
        return FP8_E4M3FN.encode(np.maximum((amax / six) / g, np.float32(2.0**-6)))


def _blocks(x: np.ndarray, size: int, name: str) -> np.ndarray:
    """(..., n) -> (..., n / size, size).

    Raises
    ------
    ValueError
    """
    x = np.asarray(x)
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise ValueError(f"{name} takes float16, float32 or float64, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] % size:
        raise ValueError(f"{name} has blocks of {size} along the last axis, got the shape {x.shape}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _check_scales(blocks: np.ndarray, scales: np.ndarray, name: str) -> None:
    if np.shape(scales) != blocks.shape[:-1]:
        raise ValueError(f"{name}: scales of the shape {blocks.shape[:-1]} were expected, got {np.shape(scales)}")


MXFP8_E4M3 = MXFormat("MXFP8_E4M3", FP8_E4M3FN)
MXFP8_E5M2 = MXFormat("MXFP8_E5M2", FP8_E5M2)
MXFP6_E2M3 = MXFormat("MXFP6_E2M3", FP6_E2M3)
MXFP6_E3M2 = MXFormat("MXFP6_E3M2", FP6_E3M2)
MXFP4 = MXFormat("MXFP4", FP4_E2M1)
MXINT8 = MXFormat("MXINT8", INT8)
NVFP4 = NVFP4Format()
MX_FORMATS = {form.name: form for form in (MXFP8_E4M3, MXFP8_E5M2, MXFP6_E2M3, MXFP6_E3M2, MXFP4, MXINT8)}
