"""Formats that are a list of values: NF4, bitsandbytes' FP4, and the signs -1, +1.

Encoding takes the nearest value; numbers beyond the ends take the end. NaN is a ValueError: there is no code for it.
The tables are derived when they are first needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refllm.formats.dtypes.rounding import check_choice, checked_codes, encode_chunks

OVERFLOWS = ("saturate", "error")
TIES = ("lower", "upper")


@dataclass(frozen=True)
class CodebookFormat:
    """A list of values.

    Parameters
    ----------
    name : str
    bits : int
    derive : callable
        () -> 2^bits values in the order of their codes; not necessarily sorted.
    ties : str
        Where a number halfway between two values goes: to the "lower" or the "upper" value. Halfway is (a + b) / 2 in
        float32, as bitsandbytes has it.

    Examples
    --------
    >>> [round(x, 4) for x in NF4.decode(NF4.encode(np.float32([-1, 0.01, 0.3]))).tolist()]
    [-1.0, 0.0, 0.3379]
    >>> BINARY.encode(np.float32([-0.5, 0.0, 2])).tolist()
    [0, 1, 1]
    """

    name: str
    bits: int
    derive: Callable[[], np.ndarray]
    ties: str = "lower"

    code_dtype = np.uint8

    def encode(self, x: np.ndarray, overflow: str = "saturate", *, ties: str | None = None) -> np.ndarray:
        """Numbers -> uint8 codes of the nearest values.

        Parameters
        ----------
        x : float16, float32 or float64, any shape
        overflow : str
            Beyond the ends: "saturate" (infinities too) or "error" (ValueError).
        ties : str, optional
            Instead of the format's own rule: "lower" or "upper" value.

        Raises
        ------
        ValueError
            Another dtype, NaN, an unknown choice, or what `overflow` refuses.

        Notes
        -----
        Of two codes with one value (the two zeros of FP4_BNB) the one that is first in code order is used.
        """
        ties = self.ties if ties is None else ties
        check_choice(self.name, "overflow", overflow, OVERFLOWS)
        check_choice(self.name, "ties", ties, TIES)
        order, midpoints = self._search

        def encode(part: np.ndarray) -> np.ndarray:
            if np.isnan(part).any():
                raise ValueError(f"{self.name} has no NaN, got one")
            outside = np.abs(part) > 1
            if overflow == "error" and outside.any():
                raise ValueError(f"{self.name} holds -1 to 1, got {part[outside].flat[0]:.9g}")
            return order[np.searchsorted(midpoints, part, side="left" if ties == "lower" else "right")]

        return encode_chunks(x, self.name, self.code_dtype, encode)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 codes -> float32 values.

        Raises
        ------
        ValueError
            Another dtype, or a code that the format does not have.
        """
        return self.values[checked_codes(codes, self.name, self.code_dtype, (1 << self.bits) - 1)]

    @cached_property
    def values(self) -> np.ndarray:
        """All values in the order of their codes, float32."""
        table = np.asarray(self.derive(), np.float32)
        table.flags.writeable = False
        return table

    @cached_property
    def _search(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes in the order of their values, each value once, and the midpoints, rounded to float32."""
        values, order = np.unique(self.values, return_index=True)
        return order, (values[1:] + values[:-1]) / np.float32(2)


def nf4_values() -> np.ndarray:
    """NF4: quantiles of the normal distribution, divided by the largest: 8 positive, 0, 7 negative.

    From an outermost probability (about the mean of 1 - 1/30 and 1 - 1/32) to 1/2, whose quantile is 0, go 8 even steps
    for the positive values and 7 for the negative ones, all in float32: the table of bitsandbytes, bit for bit.
    Source: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, equation 4; bitsandbytes, create_normal_map.
    """
    from scipy.special import ndtri

    def quantiles(count: int) -> np.ndarray:
        first, last = np.float32(0.9677083), np.float32(0.5)
        step = (last - first) / np.float32(count)
        i = np.arange(count, dtype=np.float32)
        # Counted from the nearer end, as torch.linspace does: the last bits of the table depend on it.
        probabilities = np.where(i < (count + 1) // 2, first + step * i, last - step * (count - i))
        return ndtri(probabilities.astype(np.float64)).astype(np.float32)

    values = np.concatenate([-quantiles(7), np.float32([0]), quantiles(8)[::-1]])
    return values / values.max()


def bitsandbytes_fp4_values() -> np.ndarray:
    """The FP4 of bitsandbytes: sign, 2 bits of exponent, 1 of mantissa, divided by the largest value. Not E2M1.

    The exponent counts downwards: field 1 is 2^3, field 2 is 2^2, field 3 is 2^1. Field 0 is 0 or 2^-4, far below the
    others. The code 8 is a second zero, +0 as in bitsandbytes' table, by which files are decoded.
    Source: bitsandbytes, csrc/kernels.cu (dDequantizeFP4) and functional.get_4bit_type.
    """
    field, mantissa = np.divmod(np.arange(8), 2)
    magnitude = np.where(field == 0, mantissa / 16, (1 + mantissa / 2) * 2.0 ** (4 - field)) / 12
    return np.concatenate([magnitude, 0 - magnitude])


NF4 = CodebookFormat("NF4", 4, nf4_values)
FP4_BNB = CodebookFormat("FP4_BNB", 4, bitsandbytes_fp4_values)
BINARY = CodebookFormat("BINARY", 1, lambda: np.array([-1, 1]), ties="upper")
