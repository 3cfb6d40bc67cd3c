"""Small floats, all from one definition: sign, exponent, mantissa, bias and what the topmost codes mean.

A code is sign | field | fraction. With m mantissa bits, a field f > 0 means (1 + fraction / 2^m) 2^(f - bias), the
field 0 means fraction / 2^m 2^(1 - bias): the subnormals. So the codes of one sign stand in the order of their values,
and rounding is rounding to a whole number of steps: with 2^e <= |x| and e at least the smallest exponent, a step is
2^(e - m).

Which codes are special (`specials`):
    ieee    field all ones: fraction 0 is infinity, any other NaN                   FP16 BF16 TF32 FP8_E5M2
    fn      the code of all ones (but the sign) is NaN; no infinity                 FP8_E4M3FN UE4M3 E8M0
    fnuz    the code of -0 is NaN; neither infinity nor -0                          FP8_E4M3FNUZ FP8_E5M2FNUZ
    finite  none                                                                    FP6_E2M3 FP6_E3M2 FP4_E2M1
E8M0 has neither sign nor mantissa, and no zero: code 0 is 2^-127.

Sources: IEEE 754-2019; OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP Microscaling Formats (MX) 1.0; Noune et
al. 2022, arXiv:2206.02915 (FNUZ).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refllm.formats.dtypes.rounding import check_choice, check_rounding, checked_codes, encode_chunks, round_steps

OVERFLOWS = ("saturate", "satfinite", "ieee", "error")
NANS = ("error", "zero", "negative_zero", "max")
NEGATIVES = ("nan", "zero", "magnitude", "error")


@dataclass(frozen=True)
class FloatFormat:
    """A small float.

    Parameters
    ----------
    name : str
    exponent_bits, mantissa_bits, bias : int
    specials : str
        "ieee", "fn", "fnuz" or "finite", see the module.
    signed, has_zero : bool

    Examples
    --------
    >>> BF16.encode(np.float32([1.0, -2.0])).tolist()
    [16256, 49152]
    >>> FP8_E4M3FN.decode(FP8_E4M3FN.encode(np.float32([0.3, 500, -0.001]))).tolist()
    [0.3125, 448.0, -0.001953125]
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str
    signed: bool = True
    has_zero: bool = True

    @property
    def bits(self) -> int:
        """Bits of a code: sign, exponent and mantissa."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def code_dtype(self) -> type:
        """NumPy type of the codes: the narrowest unsigned one."""
        return np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32

    @property
    def sign_bit(self) -> int:
        """The bit of the sign; 0 if there is none."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def max_code(self) -> int:
        """Code of the largest finite number."""
        all_ones = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        if self.specials == "ieee":
            return all_ones - (1 << self.mantissa_bits)
        return all_ones - (self.specials == "fn")

    @property
    def inf_code(self) -> int | None:
        """Code of +infinity, None without one."""
        return self.max_code + 1 if self.specials == "ieee" else None

    @property
    def nan_code(self) -> int | None:
        """Code of the NaN that encoding makes (quiet, sign clear), None without one."""
        if self.specials == "ieee":
            return self.max_code + 1 + (1 << (self.mantissa_bits - 1))
        return {"fn": self.max_code + 1, "fnuz": self.sign_bit, "finite": None}[self.specials]

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return int(self.has_zero) - self.bias

    @property
    def max(self) -> float:
        """The largest finite number."""
        return float(self._values(np.array(self.max_code)))

    @property
    def min_subnormal(self) -> float:
        """The smallest positive number."""
        return float(self._values(np.array(int(self.has_zero))))

    def encode(
        self,
        x: np.ndarray,
        overflow: str = "saturate",
        *,
        nan: str = "error",
        negative: str = "nan",
        rounding: str = "nearest",
        ties: str = "even",
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Numbers -> codes, rounded once, from the precision the numbers have.

        Parameters
        ----------
        x : float16, float32 or float64, any shape
        overflow : str
            Of a finite number that rounds beyond the largest one as if there were no largest, and of infinities:
            "saturate" the largest number; an infinity stays one if the format has it, else it is the largest number
            (torch 2.13 for E4M3FN). "satfinite": an infinity becomes the largest number even then (OCP's and ONNX's
            saturation). "ieee": infinity, or NaN in a format without infinities (ml_dtypes for E4M3FN, OCP's
            non-saturating mode), except that rounding toward zero stops at the largest number. "error": ValueError, for
            an infinity only if the format has none.
        nan : str
            Of a NaN in a format without NaN: "error" (ValueError), "zero" (+0), "negative_zero" (ml_dtypes) or "max"
            (+largest, as NVIDIA's conversions). Where there is a NaN, NaN stays NaN and keeps its sign.
        negative : str
            Of a number below 0 in a format without sign: "nan", "zero" (ggml's UE4M3), "magnitude" (torch's E8M0
            drops the sign) or "error". -0 is 0.
        rounding : str
            "nearest", "toward_zero" (truncation), "away_from_zero", or "stochastic": up with the probability of the
            fraction of a step that is lost, from `rng`.
        ties : str
            Of "nearest", halfway between two codes: to the "even" code, "away" from zero or toward "zero".
        rng : numpy Generator
            For stochastic rounding only; one number is drawn for every x.

        Returns
        -------
        unsigned codes in the low bits of `code_dtype`, shape of x

        Raises
        ------
        ValueError
            Another dtype, an unknown choice, or what a policy above refuses.

        Notes
        -----
        -0 keeps its sign, and so does what rounds to it, except in FNUZ formats, which have no -0. In a format without
        zero (E8M0), 0 and what rounds to it are an underflow: the smallest number, but for "ieee" 0 is NaN (ml_dtypes)
        and for "error" a ValueError.
        """
        check_choice(self.name, "overflow", overflow, OVERFLOWS)
        check_choice(self.name, "nan", nan, NANS)
        check_choice(self.name, "negative", negative, NEGATIVES)
        check_rounding(self.name, rounding, ties, rng)
        if overflow == "ieee" and self.specials == "finite":
            raise ValueError(f"{self.name} has neither infinity nor NaN to overflow to; overflow='saturate' or 'error'")

        def encode(part: np.ndarray) -> np.ndarray:
            magnitude, negatives = np.abs(part), np.signbit(part)
            finite = np.where(np.isfinite(part), magnitude, 0.0)
            codes = self._round(finite, rounding, ties, rng)
            codes = self._overflow(codes, magnitude, overflow, rounding)
            codes = self._sign(codes, negatives, magnitude > 0, negative)
            return self._nan(codes, np.isnan(part), negatives, nan)

        return encode_chunks(x, self.name, self.code_dtype, encode)

    def _round(self, magnitude: np.ndarray, rounding: str, ties: str, rng) -> np.ndarray:
        """Codes as if every exponent above the smallest existed, int64; -1 below the smallest where 0 is missing."""
        m = self.mantissa_bits
        exponent = np.maximum((magnitude.view(np.int64) >> 52) - 1023, self.min_exponent)
        # Times 2^(m - exponent), a power of two written as its bits: exact, never an overflow.
        steps = magnitude * ((1023 + m - exponent) << 52).view(np.float64)
        first = ((exponent - self.min_exponent) << m) - (0 if self.has_zero else 1 << m)
        # With mantissa bits `first` is even, and what is even among the steps is so among the codes.
        return first + round_steps(steps, 0 if m else first, rounding, ties, rng)

    def _overflow(self, codes: np.ndarray, magnitude: np.ndarray, overflow: str, rounding: str) -> np.ndarray:
        infinite = np.isinf(magnitude)
        finite_over, under = codes > self.max_code, codes < 0
        if not (infinite.any() or finite_over.any() or under.any()):
            return codes
        if overflow == "error":
            for bad, why in (
                (finite_over, f"beyond {self.max:.6g}"),
                (infinite & (self.inf_code is None), "infinite"),
                (under & ~infinite & (magnitude == magnitude), f"below {self.min_subnormal:.6g}"),
            ):
                if bad.any():
                    raise ValueError(f"{self.name} cannot hold {magnitude[bad].flat[0]:.9g} (either sign): it is {why}")
        beyond = self.nan_code if self.inf_code is None else self.inf_code
        codes = np.clip(codes, 0, self.max_code)
        if overflow == "ieee":
            codes[(finite_over & (rounding != "toward_zero")) | infinite] = beyond
            codes[under & (magnitude == 0)] = self.nan_code
        else:
            keep = self.inf_code is not None and overflow != "satfinite"
            codes[infinite] = self.inf_code if keep else self.max_code
        return codes

    def _sign(self, codes: np.ndarray, negatives: np.ndarray, nonzero: np.ndarray, negative: str) -> np.ndarray:
        if self.signed:
            if self.specials == "fnuz":
                negatives = negatives & (codes != 0) & (codes != self.nan_code)
            return codes | np.where(negatives, self.sign_bit, 0)
        below = negatives & nonzero
        if negative == "magnitude" or not below.any():
            return codes
        if negative == "error":
            raise ValueError(f"{self.name} has no sign, got a negative number; negative= may be nan, zero or magnitude")
        return np.where(below, self.nan_code if negative == "nan" else 0, codes)

    def _nan(self, codes: np.ndarray, nans: np.ndarray, negatives: np.ndarray, nan: str) -> np.ndarray:
        if not nans.any():
            return codes
        if self.nan_code is not None:
            keeps_sign = self.signed and self.specials != "fnuz"
            return np.where(nans, self.nan_code | np.where(negatives & keeps_sign, self.sign_bit, 0), codes)
        if nan == "error":
            raise ValueError(f"{self.name} has no NaN, got one; nan= may be zero, negative_zero or max")
        return np.where(nans, {"zero": 0, "negative_zero": self.sign_bit, "max": self.max_code}[nan], codes)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes of `code_dtype` -> float32 values, exact.

        Raises
        ------
        ValueError
            Another dtype, or a code of more than `bits` bits.
        """
        codes = checked_codes(codes, self.name, self.code_dtype, (1 << self.bits) - 1)
        if (self.exponent_bits, self.bias, self.signed) == (8, 127, True):  # BF16, TF32: the upper bits of a float32
            return (codes.astype(np.uint32) << np.uint32(23 - self.mantissa_bits)).view(np.float32)
        return self.values[codes]

    @cached_property
    def values(self) -> np.ndarray:
        """All values in the order of their codes, float32 (formats of at most 16 bits)."""
        if self.bits > 16:
            raise ValueError(f"{self.name} has 2^{self.bits} values")
        table = self._values(np.arange(1 << self.bits))
        table.flags.writeable = False
        return table

    def _values(self, codes: np.ndarray) -> np.ndarray:
        m = self.mantissa_bits
        magnitude = codes & ~self.sign_bit
        field, fraction = magnitude >> m, magnitude & ((1 << m) - 1)
        normal = (field > 0) | (not self.has_zero)
        values = np.ldexp(fraction + (normal << m), np.maximum(field, int(self.has_zero)) - self.bias - m)
        if self.inf_code is not None:
            values = np.where(magnitude == self.inf_code, np.inf, values)
        if self.specials in ("ieee", "fn"):
            values = np.where(magnitude > (self.inf_code or self.max_code), np.nan, values)
        values = np.where((codes & self.sign_bit) != 0, -values, values)
        if self.specials == "fnuz":
            values = np.where(codes == self.nan_code, np.nan, values)
        return values.astype(np.float32)


FP16 = FloatFormat("FP16", exponent_bits=5, mantissa_bits=10, bias=15, specials="ieee")
BF16 = FloatFormat("BF16", exponent_bits=8, mantissa_bits=7, bias=127, specials="ieee")
TF32 = FloatFormat("TF32", exponent_bits=8, mantissa_bits=10, bias=127, specials="ieee")
FP8_E4M3FN = FloatFormat("FP8_E4M3FN", exponent_bits=4, mantissa_bits=3, bias=7, specials="fn")
FP8_E5M2 = FloatFormat("FP8_E5M2", exponent_bits=5, mantissa_bits=2, bias=15, specials="ieee")
FP8_E4M3FNUZ = FloatFormat("FP8_E4M3FNUZ", exponent_bits=4, mantissa_bits=3, bias=8, specials="fnuz")
FP8_E5M2FNUZ = FloatFormat("FP8_E5M2FNUZ", exponent_bits=5, mantissa_bits=2, bias=16, specials="fnuz")
FP6_E2M3 = FloatFormat("FP6_E2M3", exponent_bits=2, mantissa_bits=3, bias=1, specials="finite")
FP6_E3M2 = FloatFormat("FP6_E3M2", exponent_bits=3, mantissa_bits=2, bias=3, specials="finite")
FP4_E2M1 = FloatFormat("FP4_E2M1", exponent_bits=2, mantissa_bits=1, bias=1, specials="finite")
E8M0 = FloatFormat("E8M0", exponent_bits=8, mantissa_bits=0, bias=127, specials="fn", signed=False, has_zero=False)
UE4M3 = FloatFormat("UE4M3", exponent_bits=4, mantissa_bits=3, bias=7, specials="fn", signed=False)
