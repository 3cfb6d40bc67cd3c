"""SPARK's code of numbers from 0 to 255: four bits for those up to 7, eight bits for the others, half of them rounded.

    number b0 b1 ... b7, b0 the highest bit

    0 b5 b6 b7                     0 to 7
    1 b1 b2 b0   b4 b5 b6 b7       b0 = b3: exact
    1 b1 b2 0    1  1  1  1        b0 = 0, b3 = 1: rounded down
    1 b1 b2 1    0  0  0  0        b0 = 1, b3 = 0: rounded up

The first bit of a code says how long it is, so a reader needs no table and no marks; b3 gives its place to that bit. No
number moves by more than 16, those up to 15 do not move, and a rounded number is not rounded again. Seen from another
side, a long code is the number itself with the bits 16 and 128 merged.

Liu et al. 2024, "SPARK: Scalable and Precision-Aware Acceleration of Neural Networks via Efficient Encoding", HPCA, pp.
1029-1042. Its text says that the numbers 32 i to 32 i + 15 are exact; by its own rules that is so for i < 4, and from
144 on it is the other halves.
"""

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits

SHORT = 7  # the largest number with a short code


def _codes() -> np.ndarray:
    v = np.arange(256)
    top, fourth = v >> 7, v >> 4 & 1
    low = np.where(top < fourth, 15, np.where(top > fourth, 0, v & 15))
    return np.where(v <= SHORT, v, 0x80 | v & 0x60 | top << 4 | low).astype(np.uint8)


def decode_long(codes: np.ndarray) -> np.ndarray:
    """The numbers of long codes, uint8: bit 4 stands for bits 4 and 7.

    Examples
    --------
    >>> decode_long(np.array([0b1000_1111, 0b1101_0010], np.uint8)).tolist()
    [15, 210]
    """
    return np.where(codes & 0x10, codes | 0x80, codes & 0x7F).astype(np.uint8)


CODES = _codes()  # of every number; a short code is its low nibble
ROUNDED = np.where(np.arange(256) <= SHORT, np.arange(256), decode_long(CODES)).astype(np.uint8)
for _table in (CODES, ROUNDED):
    _table.flags.writeable = False


def encode_rows(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of numbers as one stream of nibbles.

    Parameters
    ----------
    numbers : (rows, n) uint8, both at least 1

    Returns
    -------
    stream : (bytes,) uint8
        The rows one after another, each on bytes of its own: the first nibble in the low half of a byte, a zero nibble
        behind an odd number of them.
    row_bytes : (rows,) int64

    Examples
    --------
    >>> stream, row_bytes = encode_rows(np.array([[5, 8], [18, 0]], np.uint8))
    >>> [f"{byte:02x}" for byte in stream], row_bytes.tolist()
    (['85', '08', 'f8', '00'], [2, 2])
    """
    is_long = numbers > SHORT
    ends = np.cumsum(1 + is_long, axis=1)
    row_bytes = (ends[:, -1] + 1) // 2
    first = 2 * (np.cumsum(row_bytes) - row_bytes)
    places = first[:, None] + ends - (1 + is_long)
    codes = CODES[numbers]
    nibbles = np.zeros(2 * int(row_bytes.sum()), np.uint8)
    nibbles[places] = np.where(is_long, codes >> 4, codes)
    nibbles[places[is_long] + 1] = codes[is_long] & 15
    return pack_bits(nibbles, 4), row_bytes


def decode_rows(stream: np.ndarray, row_bytes: np.ndarray, n: int) -> np.ndarray:
    """Inverse of encode_rows.

    A reader goes from left to right. Here all places are found at once: behind a nibble whose first bit is 0 a code
    begins, whatever came before; behind a row of nibbles with a 1 every second one does.

    Parameters
    ----------
    stream : (bytes,) uint8
    row_bytes : (rows,) integers, at least 1 each
    n : int
        Numbers in a row.

    Returns
    -------
    (rows, n) uint8

    Raises
    ------
    ValueError
        A row does not hold exactly n codes, or a nibble behind them is not zero.

    Examples
    --------
    >>> decode_rows(np.array([0x85, 0x08, 0xF8, 0x00], np.uint8), np.array([2, 2]), 2).tolist()
    [[5, 8], [15, 0]]
    """
    lengths = 2 * row_bytes.astype(np.int64)
    if lengths.min(initial=1) < 1 or lengths.sum() != 2 * stream.size:
        raise ValueError(f"rows of at least a byte must fill {stream.size} bytes, got {lengths.sum() // 2}")
    nibbles = unpack_bits(stream, 4, 2 * stream.size)
    ends = np.cumsum(lengths)
    places = np.arange(nibbles.size)
    sure = np.maximum.accumulate(np.where(nibbles < 8, places, -1))  # the last nibble that surely ends a code
    sure = np.maximum(np.concatenate([[-1], sure[:-1]]), np.repeat(ends - lengths, lengths) - 1)
    begins = (places - sure) % 2 == 1
    last = ends - 1
    cut = begins[last] & (nibbles[last] > 7)
    spare = np.add.reduceat(begins, ends - lengths, dtype=np.int64) - n
    filled = (spare == 1) & begins[last] & (nibbles[last] == 0)
    if cut.any() or not ((spare == 0) | filled).all():
        raise ValueError(f"every row of the stream must hold {n} whole codes, and a zero where a nibble is left")
    begins[last[spare == 1]] = False
    at = np.flatnonzero(begins)
    first = nibbles[at]
    second = nibbles[np.minimum(at + 1, nibbles.size - 1)]
    numbers = np.where(first > 7, decode_long(first << 4 | second), first)
    return numbers.astype(np.uint8).reshape(len(row_bytes), n)
