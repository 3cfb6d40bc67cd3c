"""What every GGUF block format is: a layout of bytes and two functions of arrays."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refllm.formats.layouts import Layout

_CHUNK = 8192  # blocks worked on at a time: keeps the temporaries small on large tensors


@dataclass(frozen=True)
class BlockFormat:
    """One block format.

    Parameters
    ----------
    type_id : int
        As in the GGUF specification.
    layout : Layout
        Name, bytes and fields of a block.
    decode_fields : callable
        Fields by name, each (n, count), -> (n, block_size) float32.
    encode_fields : callable or None
        The inverse; None for a format that is only read. With `takes_importance` it has a second argument: (n,
        block_size) float32 weights of the squared errors, or None.
    takes_importance : bool

    Examples
    --------
    >>> from refllm.formats.blocks import Q4_1, Q8_0
    >>> Q8_0.decode(Q8_0.encode(np.full(32, 127.0, np.float32)))[:2].tolist()
    [127.0, 127.0]
    >>> Q4_1.bits_per_weight
    5.0
    """

    type_id: int
    layout: Layout
    decode_fields: Callable[..., np.ndarray]
    encode_fields: Callable[..., dict[str, np.ndarray]] | None = None
    takes_importance: bool = False

    @property
    def name(self) -> str:
        """As in the GGUF specification: Q4_0 ..."""
        return self.layout.name

    @property
    def block_size(self) -> int:
        """Numbers in a block."""
        return self.layout.elements

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block."""
        return self.layout.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for one number, scales included."""
        return self.layout.bits_per_element

    def encode(self, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Numbers -> blocks; computed in float32.

        Parameters
        ----------
        x : (..., n) float
        importance : (n,) or (..., n) float, optional
            How much the squared error of a column counts, as an importance matrix (llama.cpp's imatrix) says: the mean
            square of the input that the column is multiplied with.

        Returns
        -------
        (..., n / block_size * bytes_per_block) uint8

        Raises
        ------
        ValueError
            n is not a multiple of the block size; a value is NaN or infinite or overflows the scale; the format is only
            read, or knows no importance; an importance is negative, not finite or of another shape.
        """
        if self.encode_fields is None:
            raise ValueError(f"{self.name} can be read but not written")
        x = np.asarray(x, np.float32)
        if x.ndim == 0 or x.shape[-1] % self.block_size:
            raise ValueError(f"{self.name} needs rows that are a multiple of {self.block_size}, got shape {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{self.name} cannot hold NaN or infinity")
        blocks = x.reshape(-1, self.block_size)
        if self.takes_importance:
            weights = None if importance is None else self._importance(importance, x.shape)
            work = lambda part: (blocks[part], None if weights is None else weights[part])
        elif importance is None:
            work = lambda part: (blocks[part],)
        else:
            raise ValueError(f"{self.name} is encoded without importance; leave it out")
        out = np.empty((len(blocks), self.bytes_per_block), np.uint8)
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            for start in range(0, len(blocks), _CHUNK):
                part = slice(start, start + _CHUNK)
                out[part] = self.layout.pack(**self.encode_fields(*work(part)))
        if not self.is_finite(out):
            raise ValueError(f"a value is too large for {self.name}: the scale overflows float16")
        return out.reshape(*x.shape[:-1], x.shape[-1] // self.block_size * self.bytes_per_block)

    def decode(self, data: np.ndarray) -> np.ndarray:
        """Blocks (..., bytes) uint8 -> (..., bytes / bytes_per_block * block_size) float32. Any bytes decode."""
        data = np.asarray(data)
        if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] % self.bytes_per_block:
            expected = f"uint8 rows that are a multiple of {self.bytes_per_block} bytes"
            raise ValueError(f"{self.name} decodes {expected}, got {data.dtype} of shape {data.shape}")
        blocks = data.reshape(-1, self.bytes_per_block)
        out = np.empty((len(blocks), self.block_size), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(blocks), _CHUNK):
                part = slice(start, start + _CHUNK)
                out[part] = self.decode_fields(**self.layout.unpack(blocks[part]))
        return out.reshape(*data.shape[:-1], data.shape[-1] // self.bytes_per_block * self.block_size)

    def is_finite(self, data: np.ndarray) -> bool:
        """Whether every float in these bytes is finite; then every decoded number is."""
        floats = tuple(field.name for field in self.layout.fields if field.dtype[0] == "f")
        fields = self.layout.unpack(np.asarray(data).reshape(-1, self.bytes_per_block), floats)
        return all(bool(np.isfinite(value).all()) for value in fields.values())

    def _importance(self, importance: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        weights = np.asarray(importance, np.float32)
        if weights.shape not in (shape, shape[-1:]):
            raise ValueError(f"importance must have the shape {shape[-1:]} or {shape}, got {weights.shape}")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError("importance must be finite and not negative")
        return np.broadcast_to(weights, shape).reshape(-1, self.block_size)
