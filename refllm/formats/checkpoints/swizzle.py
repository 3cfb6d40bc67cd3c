"""The 32-4-4 order in which NVIDIA's block-scaled matrix products read their scales (128 x 4 tiles).

The scale matrix [rows, columns] (MXFP8, MXFP4: one E8M0 code per 32 inputs; NVFP4: one E4M3 code per 16) is padded with
zeros to whole tiles of 128 rows and 4 columns. Tiles follow each other row-major; within a tile, the scale of row r and
column c lies at byte

    16 (r % 32) + 4 (r // 32) + c

so that the four scales of a row make a 32-bit word and rows 32 apart lie side by side.
Source: NVIDIA cuBLAS documentation, "1D Block Scaling Factors Layout"; torchao's to_blocked.
"""

import numpy as np

from refllm.formats.checkpoints.describe import Stored, Tensor
from refllm.formats.layouts import Layout, codes

TILE_ROWS, TILE_COLUMNS = 128, 4
_PLACE = "16 * (i // 4 % 32) + 4 * (i // 128) + i % 4"
TILE = Layout("scale tile", 512, 512, (codes("q", 512, 8, _PLACE, text="scales"),))
STORED = (
    Stored(
        "32-4-4 swizzle",
        "128 x 4 tiles",
        "scale[r, c] = tile[16 * (r % 32) + 4 * (r // 32) + c] within tile (r // 128, c // 4)",
        "none",
        (
            Tensor(
                "scales",
                "one-byte scales, row-major within a tile",
                TILE,
                "tiles",
                ("512 * ceil(rows / 128) * ceil(columns / 4)",),
                "U8",
                "padded with 0",
            ),
        ),
        "cuBLAS, torchao",
    ),
)


def swizzle_scales(scale: np.ndarray) -> np.ndarray:
    """Scales (rows, columns) uint8 -> the swizzled bytes, (512 tiles,) uint8; padding is 0.

    Raises
    ------
    ValueError
        Not a matrix of uint8 codes.

    Examples
    --------
    >>> scale = np.zeros((128, 4), np.uint8)
    >>> scale[33, 2] = 9
    >>> int(swizzle_scales(scale)[16 * 1 + 4 * 1 + 2])
    9
    """
    scale = np.asarray(scale)
    if scale.dtype != np.uint8 or scale.ndim != 2:
        raise ValueError(f"scales must be a (rows, columns) matrix of uint8 codes, got {scale.dtype} {scale.shape}")
    down, across = _tiles(*scale.shape)
    full = np.zeros((down * TILE_ROWS, across * TILE_COLUMNS), np.uint8)
    full[: scale.shape[0], : scale.shape[1]] = scale
    tiles = full.reshape(down, TILE_ROWS, across, TILE_COLUMNS).swapaxes(1, 2)
    return TILE.pack(q=tiles.reshape(down * across, 512)).reshape(-1)


def unswizzle_scales(data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Swizzled bytes -> scales of the given shape (rows, columns); the padding is dropped, whatever it holds.

    Raises
    ------
    ValueError
        Another number of bytes than the shape needs, or another dtype.
    """
    data = np.asarray(data)
    down, across = _tiles(*shape)
    if data.dtype != np.uint8 or data.size != 512 * down * across:
        expected = f"scales of shape {tuple(shape)} take {512 * down * across} bytes"
        raise ValueError(f"{expected}, got {data.dtype} of shape {data.shape}")
    tiles = TILE.unpack(data.reshape(down * across, 512))["q"].reshape(down, across, TILE_ROWS, TILE_COLUMNS)
    full = tiles.swapaxes(1, 2).reshape(down * TILE_ROWS, across * TILE_COLUMNS)
    return np.ascontiguousarray(full[: shape[0], : shape[1]])


def _tiles(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
