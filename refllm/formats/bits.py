"""Pack n-bit codes into bytes. The bit order of refllm's own layouts is drawn here and nowhere else.

A row of codes is one little-endian bit stream: code i occupies bits [i * bits, (i + 1) * bits) of the row, bit k of the
stream is bit k % 8 of byte k // 8, and low bits come first. Every row starts on a byte of its own; the unused high
bits of its last byte are zero.

    bits = 4   byte 0 = code 0 (low nibble), code 1 (high nibble)
    bits = 3   byte 0 = c0 c0 c0 c1 c1 c1 c2 c2   byte 1 = c2 c3 c3 c3 c4 c4 c4 c5   byte 2 = ...   (low bit first)

Eight codes fill exactly `bits` bytes, and each of the eight always lies in the same one, two or three of them, so the
text below handles every width alike.
"""

import numpy as np


def packed_size(n: int, bits: int) -> int:
    """Bytes of a row of n codes.

    Examples
    --------
    >>> packed_size(5, 3)
    2
    """
    return (n * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")


def _place(i: int, bits: int) -> tuple[int, int, range]:
    """Where code i of eight lies: its first byte, the bits below it there, and how many bytes it reaches into.

    Examples
    --------
    >>> _place(2, 3), _place(1, 12)
    ((0, 6, range(0, 2)), (1, 4, range(0, 2)))
    """
    byte, below = divmod(i * bits, 8)
    return byte, below, range((below + bits + 7) // 8)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes along the last axis.

    Parameters
    ----------
    codes : (..., n) integer, each in [0, 2**bits)
    bits : int
        1 to 16.

    Returns
    -------
    (..., ceil(n * bits / 8)) uint8

    Raises
    ------
    ValueError
        If the codes are not integers or one does not fit.

    Examples
    --------
    >>> [hex(b) for b in pack_bits(np.array([1, 2, 15]), 4)]
    ['0x21', '0xf']
    """
    _check_bits(bits)
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" or codes.ndim == 0:
        raise ValueError(f"codes must be an integer array of one or more axes, got {codes.dtype} {codes.shape}")
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(
            f"codes must lie in [0, {(1 << bits) - 1}] for {bits} bits, got {codes.min()} to {codes.max()}"
        )
    *lead, n = codes.shape
    eights = -(-n // 8)
    stream = np.zeros((*lead, eights, bits), np.uint8)
    for i in range(8):
        column = codes[..., i::8].astype(np.uint16 if bits <= 8 else np.uint32)
        byte, below, reach = _place(i, bits)
        column <<= below
        for k in reach:
            stream[..., : column.shape[-1], byte + k] |= (column >> 8 * k).astype(np.uint8)
    return np.ascontiguousarray(stream.reshape(*lead, eights * bits)[..., : packed_size(n, bits)])


def unpack_bits(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Inverse of pack_bits.

    Parameters
    ----------
    packed : (..., ceil(n * bits / 8)) uint8
    bits : int
        1 to 16.
    n : int
        Codes per row; what the padding bits hold is ignored.

    Returns
    -------
    (..., n) uint8, or uint16 for more than 8 bits

    Examples
    --------
    >>> unpack_bits(np.array([0x21, 0x0F], np.uint8), 4, 3).tolist()
    [1, 2, 15]
    """
    _check_bits(bits)
    packed = np.asarray(packed)
    if packed.dtype != np.uint8 or packed.ndim == 0 or packed.shape[-1] != packed_size(n, bits):
        need = f"{n} codes of {bits} bits need uint8 rows of {packed_size(n, bits)} bytes"
        raise ValueError(f"{need}, got {packed.dtype} {packed.shape}")
    *lead, size = packed.shape
    eights = -(-n // 8)
    stream = np.zeros((*lead, eights * bits), np.uint8)
    stream[..., :size] = packed
    stream = stream.reshape(*lead, eights, bits)
    codes = np.empty((*lead, eights, 8), np.uint8 if bits <= 8 else np.uint16)
    for i in range(8):
        byte, below, reach = _place(i, bits)
        some = np.zeros((*lead, eights), np.uint16 if bits <= 8 else np.uint32)
        for k in reach:
            some |= stream[..., byte + k].astype(some.dtype) << 8 * k
        codes[..., i] = some >> below & (1 << bits) - 1
    return codes.reshape(*lead, eights * 8)[..., :n]


def padding_is_zero(packed: np.ndarray, bits: int, n: int) -> bool:
    """Whether the bits after the last code of every row are zero, as pack_bits writes them."""
    used = n * bits % 8
    return used == 0 or not (packed[..., -1] >> np.uint8(used)).any()
