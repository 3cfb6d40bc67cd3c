"""Tiles: the order of codes and scales in which kernels read a packed weight. Nothing is rounded, nothing is added.

A tile is 16 rows, a block 32 columns of them. Kernels meet the blocks of a tile one after another; a block's codes are
64-byte vectors whose byte 4 r + c belongs to row r. With codes of w = 1, 2, 4 or 8 bits there are w vectors, and

    bits w s .. w s + w - 1 of byte 4 r + c of vector v   =   code of row r, column 4 (w s + v) + c

so that a shift and a mask give four consecutive columns of every row. Codes of 3, 5, 6 and 7 bits are a plane of 2 or
4 bits and the rest above it (2 + 1, 4 + 1, 4 + 2; 7 as 4 + 2 + 1), each laid out like that, one behind the other.

Scales (and zero points or minima) follow in arrays of their own, sixteen rows side by side:

    w = scale (code - zero)         zero: one number for all, or one a group
    w = scale code + minimum        minimum: one a group
    w = (top level) (code - zero)   levels: small integers under a float16 top for 256 columns (K-quants), and
        - bottom_top bottom_level   for some the same for what is subtracted

A scale's level and a minimum's, of 6 bits each, take 12, as in the files: byte r of a block's sixteen has the scale's
above the highest two bits of the minimum's. The other four lie in `low`, sixteen bytes for blocks b and b + 4 of a
super-block, those of b + 4 above (`share_levels`).

Codes that are not numbers themselves have a table (tables.py): w = scale table[code].

Rows and columns that a weight does not have are filled up: with codes of any value, for the activations there are 0.
Which records have tiles, and how they are made: tiled.py.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refllm.kernels.packed import tables

ROWS = 16  # of a tile
BLOCK = 32  # columns
SUPER = 256  # columns under one top scale
OPENED = "opened"  # a layout (Form) of codes that a kernel has unpacked
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # widths of a code


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for.

    Parameters
    ----------
    bits : int
        Of a code, or of a float that lies there as such.
    scale : str
        half, float, levels (int8 under float16), power (a byte e means 2^(e - 128)) or ue4m3 (times one float a row).
    low : str
        What is subtracted: constant (`offset`), zero (uint8, one a group), minimum (float16, one a group, added), or
        levels (uint8 under float16).
    offset : int
        The constant.
    parts : int
        Scales of a block: 1, or 2 where 16 columns share one.
    table : str
        A name of tables.py; "" where codes are numbers.
    layout : str
        "" as drawn above. "pairs" (2:4): what stands here of columns is said of the kept half of them; behind the
        codes of 32 kept columns lie their places among four, as codes of 2 bits. "bitmask": a block is 32 masks of
        16 bits, the rows kept of each column; `scale` says where in `values` the block's numbers begin, which lie
        column by column. "blocks": the kept blocks of a row of tiles lie one after another; `first` and `where` say
        which they are. "vectors": codes name vectors of `columns` columns, `parts` of them are added; a row of codes
        as a VectorWeight has them, of 8 or 16 bits, lies behind the other, and `where` says where in `values` the
        book of every code of a row begins. OPENED: whole numbers of `width` bits in bytes, as codes of 8 bits lie;
        those of 8 bits as two of 4, the lower ones of the block before the higher.
    columns : int
        Of the vector that a code names.
    """

    bits: int
    scale: str
    low: str = "constant"
    offset: int = 0
    parts: int = 1
    table: str = ""
    layout: str = ""
    columns: int = 1

    @property
    def width(self) -> int:
        """Bits of the whole numbers that are multiplied: codes, or what a table of whole numbers has for them."""
        return int(tables.whole_bytes(self.table)[0].max()).bit_length() if self.table in tables.WHOLE else self.bits

    @property
    def has_integers(self) -> bool:
        """Whether there is a product with int8 activations."""
        return self.table in ("", *tables.WHOLE)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a block: 16 rows, 32 columns."""
        return ROWS * BLOCK * self.bits // 8

    @property
    def block_bytes(self) -> int:
        """Bytes from block to block."""
        if self.layout == "bitmask":
            return ROWS * BLOCK // 8
        if self.layout == OPENED:
            return ROWS * BLOCK * (2 if self.width == 8 else 1)
        return self.code_bytes + (ROWS * BLOCK // 4 if self.layout == "pairs" else 0)

    @property
    def tops(self) -> int:
        """Float16 numbers of a row over the levels of a super-block."""
        return 2 if self.low == "levels" else 1

    @property
    def shared_levels(self) -> bool:
        """Whether levels of 6 bits, of a scale and of a minimum, take 12 bits together."""
        return self.low == "levels" and self.parts == 1

    @property
    def key(self) -> str:
        """A name for file names."""
        key = f"{self.bits}_{self.scale}_{self.low}_{self.offset}_{self.parts}"
        width = str(self.columns) if self.columns > 1 else ""
        return "_".join([key, *filter(None, (self.table, self.layout, width))])


@dataclass(frozen=True, eq=False)
class Tiles:
    """A weight in tiles.

    Parameters
    ----------
    form : Form
    codes : (tiles, blocks, block_bytes) uint8
    scale : (tiles, groups, 16) float16 or float32; levels: int8, shared ones, power and ue4m3: uint8; bitmask: see Form
        Two groups a block where form.parts is 2.
    low : the same for zero points (uint8) or minima (float16); what is shared of levels, half as many; or None
    tops : (tiles, columns / 256, 1 or 2, 16) float16, or None
        Over the levels: the scale's, and the one of what is subtracted.
    shape : (out, in)
    per : int
        Blocks that share a scale.
    values : (16 or 256,) float32, or (kept + 16,) float16 or float32, or None
        The table where it is one of floats; the numbers beside a bitmask, and some behind them that may be read;
        codebooks of vectors; (tiles, 2^bits, 16) float32, tables of rows.
    factor : (tiles, 16) float32, or None
        What a row's product is multiplied with in the end, beside ue4m3 scales.
    first : (tiles + 1,) uint32, or None
        Kept blocks: where those of each tile begin. `codes`, `scale` and `low` then have one of them a row.
    where : (kept,) uint32, or None
        The block of activations that a kept block begins with. Of vectors: (codes of a row,), a book's first byte.
    """

    form: Form
    codes: np.ndarray
    scale: np.ndarray
    low: np.ndarray | None
    tops: np.ndarray | None
    shape: tuple[int, int]
    per: int
    values: np.ndarray | None = None
    factor: np.ndarray | None = None
    first: np.ndarray | None = None
    where: np.ndarray | None = None

    @cached_property
    def tiles(self) -> int:
        """Sixteens of rows."""
        return -(-self.shape[0] // ROWS)

    @property
    def blocks(self) -> int:
        """Blocks of activations, 32 columns each."""
        return -(-self.shape[1] // BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self._arrays if a is not None)

    @property
    def _arrays(self) -> tuple:
        return self.codes, self.scale, self.low, self.tops, self.values, self.factor, self.first, self.where

    @cached_property
    def table(self) -> np.ndarray:
        """Where a kernel finds the arrays: four addresses, blocks, per, four more addresses, blocks of a kept one."""
        addresses = [0 if a is None else a.ctypes.data for a in self._arrays]
        return np.array([*addresses[:4], self.blocks, self.per, *addresses[4:], self.codes.shape[1]], np.int64)

    @cached_property
    def address(self) -> int:
        """Of the table."""
        return self.table.ctypes.data


def tile_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes -> tiles.

    Parameters
    ----------
    codes : (out, in) uint8, below 2^bits

    Returns
    -------
    (ceil(out / 16), ceil(in / 32), 64 bits) uint8

    Examples
    --------
    >>> tile_codes(np.arange(32, dtype=np.uint8)[None] % 16, 4)[0, 0, [0, 1, 2, 3, 64, 128, 192]].tolist()
    [0, 17, 34, 51, 68, 136, 204]
    """
    out, columns = codes.shape
    tiles, blocks = -(-out // ROWS), -(-columns // BLOCK)
    if (out, columns) != (tiles * ROWS, blocks * BLOCK):
        codes = np.pad(codes, ((0, tiles * ROWS - out), (0, blocks * BLOCK - columns)))
    fours = np.ascontiguousarray(codes).view(np.uint32).reshape(tiles, ROWS, blocks, BLOCK // 4)  # shifted at once
    quads = np.ascontiguousarray(fours.transpose(3, 0, 1, 2))  # [quad, tile, row, block]
    made, start, low = np.zeros((bits, tiles, ROWS, blocks), np.uint32), 0, 0
    for width in PLANES[bits]:
        mask = np.uint32(((1 << width) - 1) * 0x01010101)
        for v in range(width):
            for s in range(8 // width):
                made[start + v] |= (quads[width * s + v] >> np.uint32(low) & mask) << np.uint32(width * s)
        start, low = start + width, low + width
    return np.ascontiguousarray(made.transpose(1, 3, 0, 2)).view(np.uint8).reshape(tiles, blocks, -1)


def share_levels(sc: np.ndarray, mn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels of scales and minima, (tiles, blocks, 16) uint8 below 64, as they lie: (tiles, blocks, 16), half as many.

    Examples
    --------
    >>> sc, mn = np.full((1, 8, 16), 33, np.uint8), np.arange(8, dtype=np.uint8)[:, None].repeat(16, 1)[None] * 5
    >>> [part[0, :, 0].tolist() for part in share_levels(sc, mn)]
    [[132, 132, 132, 132, 133, 133, 133, 134], [64, 149, 234, 63]]
    """
    low = (mn & 15).reshape(len(mn), -1, 2, 4, ROWS)
    return sc << 2 | mn >> 4, (low[:, :, 0] | low[:, :, 1] << 4).reshape(len(mn), -1, ROWS)


def untile_codes(tiled: np.ndarray, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of tile_codes: (tiles, blocks, bytes) -> (out, in) uint8."""
    tiles, blocks, _ = tiled.shape
    vectors = tiled.reshape(tiles, blocks, bits, ROWS, 4)
    quads, start, low = np.zeros((tiles, blocks, BLOCK // 4, ROWS, 4), np.uint8), 0, 0
    for width in PLANES[bits]:
        for quad in range(BLOCK // 4):
            piece = vectors[:, :, start + quad % width] >> np.uint8(quad // width * width) & np.uint8((1 << width) - 1)
            quads[:, :, quad] |= piece << np.uint8(low)
        start, low = start + width, low + width
    return quads.transpose(0, 3, 1, 2, 4).reshape(tiles * ROWS, blocks * BLOCK)[: shape[0], : shape[1]]


def tile_numbers(values: np.ndarray) -> np.ndarray:
    """(out, n) numbers of rows -> (tiles, n, 16), missing rows 0."""
    out, count = values.shape
    tiles = -(-out // ROWS)
    padded = np.zeros((tiles * ROWS, count), values.dtype)
    padded[:out] = values
    return np.ascontiguousarray(padded.reshape(tiles, ROWS, count).swapaxes(1, 2))


def tile_floats(values: np.ndarray) -> np.ndarray:
    """(out, in) float16 or float32 -> (tiles, blocks, bytes) uint8: of each column the sixteen rows side by side."""
    out, columns = values.shape
    tiles, blocks = -(-out // ROWS), -(-columns // BLOCK)
    padded = np.pad(values, ((0, tiles * ROWS - out), (0, blocks * BLOCK - columns)))
    turned = padded.reshape(tiles, ROWS, blocks, BLOCK).transpose(0, 2, 3, 1)  # [tile, block, column, row]
    return np.ascontiguousarray(turned).view(np.uint8).reshape(tiles, blocks, -1)
