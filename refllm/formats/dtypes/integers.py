"""Integer formats: two's complement of 2 to 8 bits, and the ternary numbers -1, 0, 1.

An INTn code is the number modulo 2^n, in the low n bits of a byte. A TERNARY code is the number plus 1 (0, 1, 2), as
GGUF's TQ1_0 and TQ2_0 and BitNet's I2_S store it. NaN is a ValueError, and so is an infinity unless it saturates.
"""

from dataclasses import dataclass

import numpy as np

from refllm.formats.dtypes.rounding import check_choice, check_rounding, checked_codes, encode_chunks, round_steps

OVERFLOWS = ("saturate", "wrap", "error")


@dataclass(frozen=True)
class IntegerFormat:
    """Whole numbers from `low` to `high`.

    Parameters
    ----------
    name : str
    bits : int
        Of a code.
    low, high : int
    offset : int
        Added to a number to make its code; 0 is two's complement.

    Examples
    --------
    >>> INT4.encode(np.float32([-8, -1, 0, 2.5, 9])).tolist()
    [8, 15, 0, 2, 7]
    >>> TERNARY.decode(TERNARY.encode(np.float32([-3, 0.5, 0.6]))).tolist()
    [-1.0, 0.0, 1.0]
    """

    name: str
    bits: int
    low: int
    high: int
    offset: int = 0

    code_dtype = np.uint8

    def encode(
        self,
        x: np.ndarray,
        overflow: str = "saturate",
        *,
        rounding: str = "nearest",
        ties: str = "even",
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Numbers -> uint8 codes.

        Parameters
        ----------
        x : float16, float32 or float64, any shape
        overflow : str
            Beyond low or high, after rounding: "saturate" (infinities too), "wrap" (modulo high - low + 1, as a cast of
            machine integers and ml_dtypes' int4 do; an infinity is a ValueError) or "error" (ValueError).
        rounding, ties, rng
            As for floats: "nearest" with ties to "even", "away" or "zero"; "toward_zero", "away_from_zero",
            "stochastic". Directions are those of the magnitude.

        Raises
        ------
        ValueError
            Another dtype, NaN, an unknown choice, or what `overflow` refuses.
        """
        check_choice(self.name, "overflow", overflow, OVERFLOWS)
        check_rounding(self.name, rounding, ties, rng)
        span = self.high - self.low + 1

        def encode(part: np.ndarray) -> np.ndarray:
            if np.isnan(part).any():
                raise ValueError(f"{self.name} has no NaN, got one")
            if overflow == "wrap":
                if np.isinf(part).any():
                    raise ValueError(f"{self.name}: an infinity cannot wrap")
                part = np.fmod(part, 2 * span)  # exact, and an even multiple of span: ties keep their parity
            magnitude = np.minimum(np.abs(part), 4.0 * span)  # far outside is as good as any other outside
            number = np.copysign(round_steps(magnitude, 0, rounding, ties, rng), part).astype(np.int64)
            inside = np.clip(number, self.low, self.high)
            if overflow == "error" and (inside != number).any():
                bad = part[inside != number].flat[0]
                raise ValueError(f"{self.name} holds {self.low} to {self.high}, got {bad:.9g}")
            if overflow == "wrap":
                inside = (number - self.low) % span + self.low
            return (inside + self.offset) & ((1 << self.bits) - 1)

        return encode_chunks(x, self.name, self.code_dtype, encode)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 codes -> float32 values.

        Raises
        ------
        ValueError
            Another dtype, or a code that the format does not have.
        """
        return self.values[checked_codes(codes, self.name, self.code_dtype, self.high - self.low)]

    @property
    def values(self) -> np.ndarray:
        """All values in the order of their codes, float32."""
        codes = np.arange(self.high - self.low + 1)
        numbers = codes - self.offset if self.offset else np.where(codes > self.high, codes - (1 << self.bits), codes)
        return numbers.astype(np.float32)


INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (
    IntegerFormat(f"INT{bits}", bits, -(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in range(2, 9)
)
TERNARY = IntegerFormat("TERNARY", bits=2, low=-1, high=1, offset=1)
