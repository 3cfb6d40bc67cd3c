"""GGUF block formats: rows of numbers <-> blocks of bytes.

A row is cut into blocks of 32 (or super-blocks of 256) numbers; each block carries its own float16 scale d and perhaps
a minimum m. Codes of a 32-block lie half-split: byte j holds element j in its low nibble, element j + 16 in the high.

    Q4_0  d qs[16]          x = d (q - 8)       Q5_0  d qh[4] qs[16]    x = d (q - 16)
    Q4_1  d m qs[16]        x = d q + m         Q5_1  d m qh[4] qs[16]  x = d q + m
    Q8_0  d int8 q[32]      x = d q             qh: bit i is bit 4 of element i
    Q4_K  d m s[12] qs[128] 8 sub-blocks of 32:  x = (d sc) q - (m mn), sc and mn 6-bit, packed into s
    Q6_K  ql[128] qh[64] int8 sc[16] d           16 sub-blocks of 16: x = (d sc) (q - 32)

Source: ggml's quantize_row_*_ref and dequantize_row_* in ggml-quants.c; the same bytes and floats as gguf-py 0.19.
Deviations: a value that is not finite, or so large that its scale overflows float16, is a ValueError; a block so small
that 1/d overflows float32 gets the codes of a zero block (its stored scale is 0 either way).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_CHUNK = 8192  # blocks worked on at a time: keeps the temporaries small on large tensors


@dataclass(frozen=True)
class BlockFormat:
    """One block format.

    Parameters
    ----------
    name, type_id : str, int
        As in the GGUF specification.
    block_size, bytes_per_block : int
    decode_blocks : callable
        (n, bytes_per_block) uint8 -> (n, block_size) float32.
    encode_blocks : callable or None
        The inverse; None for a format that is only read.
    scale_bytes : tuple of int
        Where the float16 fields of a block start.

    Examples
    --------
    >>> Q8_0.decode(Q8_0.encode(np.full(32, 127.0, np.float32)))[:2].tolist()
    [127.0, 127.0]
    >>> Q4_1.bits_per_weight
    5.0
    """

    name: str
    type_id: int
    block_size: int
    bytes_per_block: int
    decode_blocks: Callable[[np.ndarray], np.ndarray]
    encode_blocks: Callable[[np.ndarray], np.ndarray] | None
    scale_bytes: tuple[int, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for one number, scales included."""
        return 8 * self.bytes_per_block / self.block_size

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Numbers (..., n) -> uint8 (..., n / block_size * bytes_per_block); computed in float32.

        Raises
        ------
        ValueError
            n is not a multiple of the block size, a value is NaN or infinite or overflows the float16 scale, or the
            format is only read.
        """
        if self.encode_blocks is None:
            known = ", ".join(form.name for form in BLOCKS.values() if form.encode_blocks)
            raise ValueError(f"{self.name} can be read but not written; formats that can: {known}")
        x = np.asarray(x, np.float32)
        if x.ndim == 0 or x.shape[-1] % self.block_size:
            raise ValueError(f"{self.name} needs rows that are a multiple of {self.block_size}, got shape {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{self.name} cannot hold NaN or infinity")
        out = self._chunked(self.encode_blocks, x, self.block_size, self.bytes_per_block, np.uint8)
        if not self.is_finite(out):
            raise ValueError(f"a value is too large for {self.name}: the scale overflows float16")
        return out

    def decode(self, data: np.ndarray) -> np.ndarray:
        """uint8 (..., bytes) -> float32 (..., bytes / bytes_per_block * block_size). Any bytes decode to something."""
        data = np.asarray(data)
        if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] % self.bytes_per_block:
            expected = f"uint8 rows that are a multiple of {self.bytes_per_block} bytes"
            raise ValueError(f"{self.name} decodes {expected}, got {data.dtype} of shape {data.shape}")
        return self._chunked(self.decode_blocks, data, self.bytes_per_block, self.block_size, np.float32)

    def is_finite(self, data: np.ndarray) -> bool:
        """Whether every scale in these bytes is finite; then every decoded number is."""
        blocks = np.asarray(data).reshape(-1, self.bytes_per_block)
        return all(bool(np.isfinite(_f16(blocks, at)).all()) for at in self.scale_bytes)

    @staticmethod
    def _chunked(function, array, width_in, width_out, dtype):
        blocks = np.ascontiguousarray(array).reshape(-1, width_in)
        out = np.empty((len(blocks), width_out), dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(blocks), _CHUNK):
                out[start : start + _CHUNK] = function(blocks[start : start + _CHUNK])
        return out.reshape(*array.shape[:-1], array.shape[-1] // width_in * width_out)


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block as float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _f16_bytes(values: np.ndarray) -> np.ndarray:
    return values.astype("<f2").view(np.uint8)


def _split(nibbles: np.ndarray) -> np.ndarray:
    """(n, k) bytes -> (n, 2k) codes: all low nibbles, then all high ones."""
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=1)


def _join(codes: np.ndarray) -> np.ndarray:
    """The inverse of `_split`; only the low four bits of a code are kept."""
    low, high = np.split(codes & 15, 2, axis=1)
    return low | high << 4


def _inverse(d: np.ndarray) -> np.ndarray:
    """1/d in float32; 0 where d is 0 or 1/d overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _signed_codes(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """d and codes 0..levels-1 around levels/2: the element of largest magnitude gets code 0, its sign goes into d."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    d = largest / np.float32(-levels / 2)
    codes = np.trunc(x * _inverse(d) + np.float32(levels / 2 + 0.5))
    return d, np.minimum(codes, levels - 1).astype(np.uint8)


def _affine_codes(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d, m = min(x), and codes 0..levels-1; halves round up."""
    low = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(levels - 1)
    codes = np.trunc((x - low) * _inverse(d) + np.float32(0.5))
    return d, low, np.minimum(codes, levels - 1).astype(np.uint8)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    """(n, 32) codes -> (n, 4) bytes: bit i of the little-endian word is bit 4 of code i."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _five_bit(qh: np.ndarray, qs: np.ndarray) -> np.ndarray:
    return _split(qs) | np.unpackbits(qh, axis=1, bitorder="little") << 4


def _encode_q4_0(x: np.ndarray) -> np.ndarray:
    d, codes = _signed_codes(x, 16)
    return np.concatenate([_f16_bytes(d), _join(codes)], axis=1)


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks, 0) * (_split(blocks[:, 2:]).astype(np.float32) - 8)


def _encode_q4_1(x: np.ndarray) -> np.ndarray:
    d, low, codes = _affine_codes(x, 16)
    return np.concatenate([_f16_bytes(d), _f16_bytes(low), _join(codes)], axis=1)


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks, 0) * _split(blocks[:, 4:]).astype(np.float32) + _f16(blocks, 2)


def _encode_q5_0(x: np.ndarray) -> np.ndarray:
    d, codes = _signed_codes(x, 32)
    return np.concatenate([_f16_bytes(d), _fifth_bits(codes), _join(codes)], axis=1)


def _decode_q5_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks, 0) * (_five_bit(blocks[:, 2:6], blocks[:, 6:]).astype(np.float32) - 16)


def _encode_q5_1(x: np.ndarray) -> np.ndarray:
    d, low, codes = _affine_codes(x, 32)
    return np.concatenate([_f16_bytes(d), _f16_bytes(low), _fifth_bits(codes), _join(codes)], axis=1)


def _decode_q5_1(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks, 0) * _five_bit(blocks[:, 4:8], blocks[:, 8:]).astype(np.float32) + _f16(blocks, 2)


def _encode_q8_0(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    # Halves go away from zero here, unlike np.round; |scaled| < 128 makes the fraction exact.
    whole = np.floor(np.abs(scaled))
    rounded = np.copysign(whole + (np.abs(scaled) - whole >= 0.5), scaled)
    return np.concatenate([_f16_bytes(d), rounded.astype(np.int8).view(np.uint8)], axis=1)


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def unpack_k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 6-bit scales and minima of Q4_K and Q5_K: (n, 12) uint8 -> two (n, 8) uint8.

    Bytes 0..3 and 4..7 hold in their low six bits the first four scales and minima; their top two bits are the top bits
    of the last four, whose low four bits lie in bytes 8..11 (scale low, minimum high).
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = unpack_k_scales(blocks[:, 4:16])
    d = (_f16(blocks, 0) * scales.astype(np.float32))[:, :, None]  # (n, 8, 1)
    low = (_f16(blocks, 2) * minima.astype(np.float32))[:, :, None]
    pairs = blocks[:, 16:].reshape(-1, 4, 32)  # 32 bytes hold two sub-blocks: low nibbles, then high ones
    codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    return (d * codes.astype(np.float32) - low).reshape(-1, 256)


def _decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    d = _f16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)  # (n, 16)
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.uint8([[0], [4]]) & 15  # per half: 64 low nibbles, 64 high
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.uint8([[0], [2], [4], [6]]) & 3
    codes = low.reshape(-1, 16, 16) | high.reshape(-1, 16, 16) << 4
    return (d[:, :, None] * (codes.astype(np.float32) - 32)).reshape(-1, 256)


Q4_0 = BlockFormat("Q4_0", 2, 32, 18, _decode_q4_0, _encode_q4_0, (0,))
Q4_1 = BlockFormat("Q4_1", 3, 32, 20, _decode_q4_1, _encode_q4_1, (0, 2))
Q5_0 = BlockFormat("Q5_0", 6, 32, 22, _decode_q5_0, _encode_q5_0, (0,))
Q5_1 = BlockFormat("Q5_1", 7, 32, 24, _decode_q5_1, _encode_q5_1, (0, 2))
Q8_0 = BlockFormat("Q8_0", 8, 32, 34, _decode_q8_0, _encode_q8_0, (0,))
Q4_K = BlockFormat("Q4_K", 12, 256, 144, _decode_q4_k, None, (0, 2))
Q6_K = BlockFormat("Q6_K", 14, 256, 210, _decode_q6_k, None, (208,))
BLOCKS = {form.name: form for form in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q6_K)}
