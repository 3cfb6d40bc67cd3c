"""Number formats as codes: BF16 and FP16.

A format is an object with `encode(x) -> unsigned codes` and `decode(codes) -> float32`. Rounding is to nearest, ties to
even, done in one step from the input's own precision; a NaN stays a NaN, signs of zero are kept.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BinaryFloat:
    """A 16-bit IEEE-style float: 1 sign bit, `exponent_bits`, `mantissa_bits`; infinities and NaNs as in IEEE 754.

    Examples
    --------
    >>> BF16.encode(np.float32([1.0, -2.0])).tolist()
    [16256, 49152]
    >>> BF16.decode(np.uint16([0x3F80, 0x7F80])).tolist()
    [1.0, inf]
    """

    name: str
    exponent_bits: int
    mantissa_bits: int

    def encode(self, x: np.ndarray) -> np.ndarray:
        """float32 or float16 array of any shape -> uint16 codes of the same shape; overflow gives infinity."""
        x = np.asarray(x)
        if x.dtype not in (np.float16, np.float32):
            raise ValueError(f"{self.name}.encode takes float32 or float16, got {x.dtype}; rounding twice would differ")
        if self.name == "FP16":
            with np.errstate(over="ignore"):
                return x.astype(np.float16).view(np.uint16)
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(x.shape)
        # Adding 0x7FFF, and one more when the kept part is odd, carries exactly where nearest-even rounds up.
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
        return np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint16 codes -> float32 values, exact."""
        codes = np.asarray(codes)
        if codes.dtype != np.uint16:
            raise ValueError(f"{self.name}.decode takes uint16 codes, got {codes.dtype}")
        if self.name == "FP16":
            return np.ascontiguousarray(codes).view(np.float16).reshape(codes.shape).astype(np.float32)
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


BF16 = BinaryFloat("BF16", exponent_bits=8, mantissa_bits=7)
FP16 = BinaryFloat("FP16", exponent_bits=5, mantissa_bits=10)
