"""Outlier-victim pairs: of two neighbours, a large one takes the bits of the other, which becomes 0.

    steps of two neighbours -> one byte: the first in the low nibble, the second in the high one

    normal      -7 ... 7 in two's complement; 1000, which is left over, says that the neighbour is an outlier
    outlier     abfloat E2M1: a sign, two bits e and one bit m, sign * (2 + m) * 2^(e + 2): 12 16 24 32 48 64 96; its
                exponent begins where the normals end, and e = m = 0, which would be 8, is left out

A number becomes the nearest of both kinds. Halfway it becomes the larger one, but between the last normal and the first
outlier always the outlier. If one of a pair is an outlier, the other is 0; if both are, the second is. With the normals
"flint" the magnitudes 0, 1/2, 1, 3/2, 2, 3, 4, 8 take the place of 0 ... 7: finer near 0, coarser at the end.

Guo et al. 2023, "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair Quantization",
arXiv:2304.07493, section 3, and its published code (the rules for halfway numbers and for two outliers; 4 times these
values there). Flint: Guo et al. 2022, "ANT: Exploiting Adaptive Numerical Data Type for Low-bit Deep Neural Network
Quantization", arXiv:2208.14286.
"""

from functools import cache

import numpy as np

NORMALS = {
    "int": np.arange(8, dtype=np.float32),
    "flint": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 8], np.float32),
}
OUTLIERS = np.array([12, 16, 24, 32, 48, 64, 96], np.float32)
VICTIM = 8  # the nibble
_PARTS = 4  # of a step: no number that is halfway between two values needs a finer cut
_END = int(OUTLIERS[-1]) * _PARTS


@cache
def _nearest(normals: str) -> np.ndarray:
    """The value of every quarter of a step, from -96 to 96, its lower end counted in."""
    values = _values(normals)
    lower_ends = np.arange(-_END, _END + 1) / _PARTS
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, lower_ends, side="right")]


def _values(normals: str) -> np.ndarray:
    """All values, rising, float32."""
    positive = np.concatenate([NORMALS[normals], OUTLIERS])
    return np.concatenate([-positive[:0:-1], positive])


def first_outlier(normals: str) -> float:
    """The magnitude from which on a number is an outlier: halfway between the two kinds."""
    return float(NORMALS[normals][-1] + OUTLIERS[0]) / 2


def round_pairs(steps: np.ndarray, normals: str = "int") -> np.ndarray:
    """The value that each number becomes.

    Parameters
    ----------
    steps : (..., n) float32 or float64, no NaN
        Numbers divided by their scale. Neighbours along the last axis are pairs; where n is odd, the last one has a 0
        beside it.
    normals : str
        int or flint.

    Returns
    -------
    (..., n) float32
        At most one of a pair has a magnitude above 8.

    Examples
    --------
    >>> round_pairs(np.array([6.6, -3.5, 2.0, -50.0, 13.0, 90.0])).tolist()
    [7.0, -3.0, 0.0, -48.0, 12.0, 0.0]
    """
    with np.errstate(over="ignore"):
        quarters = np.floor(np.clip(steps * _PARTS, -_END, _END)).astype(np.int16)
    values = _nearest(normals)[quarters + np.int16(_END)]
    values[steps == -first_outlier(normals)] = -OUTLIERS[0]
    large = np.abs(values) >= OUTLIERS[0]
    first, second = large[..., : values.shape[-1] // 2 * 2 : 2], large[..., 1::2]
    values[..., 1::2][first] = 0
    values[..., : values.shape[-1] // 2 * 2 : 2][second & ~first] = 0
    return values


def encode_pairs(values: np.ndarray, normals: str = "int") -> np.ndarray:
    """The byte of every pair.

    Parameters
    ----------
    values : (..., n) float
        From round_pairs; n is even.

    Returns
    -------
    (..., n / 2) uint8

    Examples
    --------
    >>> [f"{byte:02x}" for byte in encode_pairs(np.array([7.0, -3.0, 0.0, -48.0]))]
    ['d7', 'd8']
    """
    size = np.abs(values)
    large = size >= OUTLIERS[0]
    normal = np.searchsorted(NORMALS[normals], size).astype(np.uint8)
    outlier = (np.searchsorted(OUTLIERS, size) + 1).astype(np.uint8)
    negative = np.signbit(values) & (size > 0)
    nibbles = np.where(large, outlier | negative.astype(np.uint8) << 3, np.where(negative, 16 - normal, normal)) & 15
    first, second = nibbles[..., ::2], nibbles[..., 1::2]
    first = np.where(large[..., 1::2], VICTIM, first)
    second = np.where(large[..., ::2], VICTIM, second)
    return (first | second << 4).astype(np.uint8)


@cache
def pair_table(normals: str = "int") -> np.ndarray:
    """The two values that every byte stands for, (256, 2) float16; 0 and 0 for the bytes that no pair has.

    Examples
    --------
    >>> pair_table()[[0xD7, 0xD8]].tolist()
    [[7.0, -3.0], [0.0, -48.0]]
    """
    normal = np.concatenate([NORMALS[normals], [0], -NORMALS[normals][:0:-1]])
    outlier = np.concatenate([[0], OUTLIERS, [0], -OUTLIERS])
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    first = np.where(high == VICTIM, outlier[low], normal[low])
    second = np.where(low == VICTIM, outlier[high], normal[high])
    table = np.stack([first, second], axis=1).astype(np.float16)
    table.flags.writeable = False
    return table
