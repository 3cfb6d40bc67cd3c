"""What every GGUF block format is: a layout of bytes and two functions of arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from refllm.formats.blocks import scale_search
from refllm.formats.layouts import Layout

_CHUNK = 1 << 16  # numbers worked on at a time: the temporaries of a search stay in cache


class Terms(NamedTuple):
    """What the fields of n blocks mean: number = scale times a whole number, plus low; all float32.

    Parameters
    ----------
    scale : (n, k)
        One for every block_size / k consecutive numbers; (n, 1) beside levels.
    whole : (n, block_size)
    low : (n, k), optional
        What is added; (n, 1) beside levels.
    levels, low_levels : (n, k), optional
        Whole numbers that the scale, and what is added, are multiplied with first.
    """

    scale: np.ndarray
    whole: np.ndarray
    low: np.ndarray | None = None
    levels: np.ndarray | None = None
    low_levels: np.ndarray | None = None

    @property
    def of_groups(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scale and low of every group of numbers, (n, k) each, or no low."""
        times = lambda top, levels: top if levels is None else top * levels
        return times(self.scale, self.levels), times(self.low, self.low_levels)

    def decode(self) -> np.ndarray:
        """The numbers, (n, block_size) float32."""
        scale, low = self.of_groups
        x = scale[..., None] * self.whole.reshape(*scale.shape, -1)
        if low is not None:
            x += low[..., None]
        return x.reshape(self.whole.shape)


@dataclass(frozen=True)
class BlockFormat:
    """One block format.

    Parameters
    ----------
    type_id : int
        As in the GGUF specification.
    layout : Layout
        Name, bytes and fields of a block.
    terms : callable
        What the fields mean: by name, each (n, count), -> Terms.
    encode_fields : callable or None
        (n, block_size) float32 -> fields; None for a format that is only read. With `takes_importance` it has two more
        arguments: (n, block_size) float32 importance or None, and who searches the scales (the module scale_search or
        its equal).
    takes_importance : bool
    weigh : callable, optional
        For a format whose weights need the whole row: rows (..., n) and their importance -> what encode_fields gets as
        importance.
    activations_only : bool
        Never a weight in a file: what ggml rounds activations to before it multiplies them with weights.

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
    terms: Callable[..., Terms]
    encode_fields: Callable[..., dict[str, np.ndarray]] | None = None
    takes_importance: bool = False
    weigh: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    activations_only: bool = False

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
        blocks, weights = self.prepare(x, importance)
        out = np.empty((len(blocks), self.bytes_per_block), np.uint8)
        self.encode_blocks(blocks, weights, out)
        return self.finish(out, np.shape(x))

    def prepare(self, x: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """What `encode` does first: check; blocks (n, block_size) float32 and their weights, or None."""
        if self.encode_fields is None:
            raise ValueError(f"{self.name} can be read but not written")
        with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite, and refused below
            x = np.asarray(x, np.float32)
        if x.ndim == 0 or x.shape[-1] % self.block_size:
            raise ValueError(f"{self.name} needs rows that are a multiple of {self.block_size}, got shape {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{self.name} cannot hold NaN or infinity")
        blocks = np.ascontiguousarray(x).reshape(-1, self.block_size)
        if importance is None:
            return blocks, None
        if not self.takes_importance:
            raise ValueError(f"{self.name} is encoded without importance; leave it out")
        weights = np.asarray(importance, np.float32)
        if weights.shape not in (x.shape, x.shape[-1:]):
            raise ValueError(f"importance must have the shape {x.shape[-1:]} or {x.shape}, got {weights.shape}")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError("importance must be finite and not negative")
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            weights = self.weigh(x, weights) if self.weigh else np.broadcast_to(weights, x.shape)
        return blocks, np.ascontiguousarray(weights).reshape(-1, self.block_size)

    def encode_blocks(self, blocks, weights, out: np.ndarray, search=scale_search) -> None:
        """What `encode` does next: blocks and weights of `prepare` -> out (n, bytes_per_block) uint8."""
        step = max(1, _CHUNK // self.block_size)
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            for start in range(0, len(blocks), step):
                part = slice(start, start + step)
                rest = (None if weights is None else weights[part], search) if self.takes_importance else ()
                out[part] = self.layout.pack(**self.encode_fields(blocks[part], *rest))

    def finish(self, out: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """What `encode` does last: check that every scale is finite, and give rows their shape."""
        if not self.is_finite(out):
            raise ValueError(f"a value is too large for {self.name}: the scale overflows float16")
        return out.reshape(*shape[:-1], shape[-1] // self.block_size * self.bytes_per_block)

    def decode(self, data: np.ndarray) -> np.ndarray:
        """Blocks (..., bytes) uint8 -> (..., bytes / bytes_per_block * block_size) float32. Any bytes decode."""
        data = np.asarray(data)
        if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] % self.bytes_per_block:
            expected = f"uint8 rows that are a multiple of {self.bytes_per_block} bytes"
            raise ValueError(f"{self.name} decodes {expected}, got {data.dtype} of shape {data.shape}")
        blocks = data.reshape(-1, self.bytes_per_block)
        out = np.empty((len(blocks), self.block_size), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            step = max(1, _CHUNK // self.block_size)
            for start in range(0, len(blocks), step):
                part = slice(start, start + step)
                out[part] = self.read(blocks[part]).decode()
        return out.reshape(*data.shape[:-1], data.shape[-1] // self.bytes_per_block * self.block_size)

    def read(self, blocks: np.ndarray) -> Terms:
        """What blocks (n, bytes_per_block) mean."""
        return self.terms(**self.layout.unpack(blocks))

    def is_finite(self, data: np.ndarray) -> bool:
        """Whether every decoded number of these bytes is finite."""
        blocks = np.asarray(data).reshape(-1, self.bytes_per_block)
        floats = {field.name: field.dtype for field in self.layout.fields if field.dtype[0] == "f"}
        if floats and set(floats.values()) == {"f2"}:  # times codes, far from float32's end: the scales decide
            fields = self.layout.unpack(blocks, tuple(floats))
            return all(bool(np.isfinite(value).all()) for value in fields.values())
        step = max(1, _CHUNK // self.block_size)
        return all(np.isfinite(self.decode(blocks[i : i + step])).all() for i in range(0, len(blocks), step))
