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

Codes that are not numbers themselves have a table (tables.py): w = scale table[code].

Rows and columns that a weight does not have are filled up: with codes of any value, for the activations there are 0.
A weight that has no such form (groups that do not fall on blocks) has no tiles: `tiles_of` gives None.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from weakref import WeakKeyDictionary

import numpy as np

from refllm.formats.files import forget_pages
from refllm.kernels.grids import PER_TENSOR, group_count
from refllm.kernels.packed import code_tiles, tables
from refllm.kernels.packed.codes import CodeWeight
from refllm.kernels.packed.quantized import GGUFBlocks, IntWeight
from refllm.kernels.packed.sparse import Sparse24

ROWS = 16  # of a tile
BLOCK = 32  # columns
SUPER = 256  # columns under one top scale
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # widths of a code
MOST_COLUMNS = 1 << 20
PART = 1 << 19  # weights tiled at a time


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
    pairs : bool
        2:4: what stands here of columns is said of the kept half of them; behind the codes of 32 kept columns lie their
        places among four, as codes of 2 bits.
    """

    bits: int
    scale: str
    low: str = "constant"
    offset: int = 0
    parts: int = 1
    table: str = ""
    pairs: bool = False

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
        return self.code_bytes + (ROWS * BLOCK // 4 if self.pairs else 0)

    @property
    def key(self) -> str:
        """A name for file names."""
        key = f"{self.bits}_{self.scale}_{self.low}_{self.offset}_{self.parts}"
        return "_".join([key, *filter(None, (self.table, "pairs" * self.pairs))])


@dataclass(frozen=True, eq=False)
class Tiles:
    """A weight in tiles.

    Parameters
    ----------
    form : Form
    codes : (tiles, blocks, block_bytes) uint8
    scale : (tiles, groups, 16) float16 or float32; levels: int8; power and ue4m3: uint8
        Two groups a block where form.parts is 2.
    low : the same for zero points (uint8) or minima (float16), or None
    tops : (tiles, columns / 256, 1 or 2, 16) float16, or None
        Over the levels: the scale's, and the one of what is subtracted.
    shape : (out, in)
    per : int
        Blocks that share a scale.
    values : (16 or 256,) float32, or None
        The table where it is one of floats.
    factor : (tiles, 16) float32, or None
        What a row's product is multiplied with in the end, beside ue4m3 scales.
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
        return self.codes, self.scale, self.low, self.tops, self.values, self.factor

    @cached_property
    def table(self) -> np.ndarray:
        """Where a kernel finds the arrays: four addresses, blocks and per, two more addresses; (8,) int64."""
        addresses = [0 if a is None else a.ctypes.data for a in self._arrays]
        return np.array([*addresses[:4], self.blocks, self.per, *addresses[4:]], np.int64)

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
    quads = codes.reshape(tiles, ROWS, blocks, BLOCK // 4, 4).transpose(0, 2, 3, 1, 4)  # [tile, block, quad, row, c]
    made, start, low = np.empty((tiles, blocks, bits, ROWS * 4), np.uint8), 0, 0
    for width in PLANES[bits]:
        mask = np.uint8((1 << width) - 1)
        for v in range(width):
            vector = np.zeros((tiles, blocks, ROWS, 4), np.uint8)
            for s in range(8 // width):
                vector |= (quads[:, :, width * s + v] >> np.uint8(low) & mask) << np.uint8(width * s)
            made[:, :, start + v] = vector.reshape(tiles, blocks, -1)
        start, low = start + width, low + width
    return made.reshape(tiles, blocks, -1)


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


_IQ4, _FP4, _BINARY = (tables.whole_bytes(name)[1] for name in ("IQ4", "FP4", "BINARY"))
_GGUF = {  # type -> form; the fields of their layouts: q codes, d scale, m minimum, sc and mn levels
    "Q4_0": Form(4, "half", offset=8),
    "Q4_1": Form(4, "half", "minimum"),
    "Q5_0": Form(5, "half", offset=16),
    "Q5_1": Form(5, "half", "minimum"),
    "Q8_0": Form(8, "half", offset=128),
    "Q2_K": Form(2, "levels", "levels", parts=2),
    "Q3_K": Form(3, "levels", offset=4, parts=2),
    "Q4_K": Form(4, "levels", "levels"),
    "Q5_K": Form(5, "levels", "levels"),
    "Q6_K": Form(6, "levels", offset=32, parts=2),
    "IQ4_NL": Form(4, "half", offset=_IQ4, table="IQ4"),
    "IQ4_XS": Form(4, "levels", offset=_IQ4, table="IQ4"),
    "MXFP4": Form(4, "power", offset=_FP4, table="FP4"),
    "NVFP4": Form(4, "ue4m3", offset=_FP4, parts=2, table="FP4"),
    "TQ1_0": Form(2, "half", offset=1),
    "TQ2_0": Form(2, "half", offset=1),
    "Q1_0": Form(1, "half", offset=_BINARY, table="BINARY"),
    "Q2_0": Form(2, "half", offset=1),
}


def form_of(weight) -> Form | None:
    """The form of a record's tiles, or None if it has none."""
    if weight.shape[1] > MOST_COLUMNS:
        return None
    if isinstance(weight, GGUFBlocks):
        return _GGUF.get(weight.type_name)
    if isinstance(weight, CodeWeight):
        return _code_form(weight)
    if isinstance(weight, Sparse24):
        return _pairs_form(weight)
    return _int_form(weight) if isinstance(weight, IntWeight) else None


def _pairs_form(weight: Sparse24) -> Form | None:
    values = weight.values
    if isinstance(values, np.ndarray):
        return Form(8 * values.itemsize, "float", table=tables.of_floats(values.dtype), pairs=True)
    form = form_of(values)
    if form is None or form.scale == "levels" or form.low not in ("constant", "zero"):
        return None
    return None if form.pairs else replace(form, pairs=True)


def _int_form(weight: IntWeight) -> Form | None:
    groups = group_count(weight.columns, weight.group_size)
    two = groups > 1 and weight.columns == groups * (BLOCK // 2)
    if weight.bits not in PLANES or (groups > 1 and weight.columns // groups % BLOCK and not two):
        return None
    scale, parts = "half" if weight.scale.dtype == np.float16 else "float", 2 if two else 1
    if weight.zero_point is None:
        return Form(weight.bits, scale, "constant", weight.grid.offset, parts)
    return Form(weight.bits, scale, "zero", 0, parts)


def _code_form(weight: CodeWeight) -> Form | None:
    shared, scale = code_tiles.shared_columns(weight), code_tiles.scale_kind(weight)
    whole = shared == weight.columns or shared % BLOCK == 0
    if scale is None or (not whole and shared % (BLOCK // 2)):
        return None
    table, offset = tables.table_of(weight.table, weight.entries)
    return Form(weight.bits, scale, "constant", offset, 1 if whole else 2, table)


_made: WeakKeyDictionary = WeakKeyDictionary()


def tiles_of(weight) -> Tiles | None:
    """The tiles of a record, made once and kept as long as it lives; None if it has none."""
    if weight not in _made:
        form = form_of(weight)
        if form is None:
            return None
        _made[weight] = _tile(weight, form)
    return _made[weight]


def _tile(weight, form: Form) -> Tiles:
    """Some rows at a time, so that no more than a few megabytes are needed beside the result."""
    out, columns = weight.shape
    step, made = max(1, PART // (columns * ROWS)) * ROWS, None
    for start in range(0, out, step):
        ids = slice(start, min(start + step, out))
        parts = _arrays(weight, ids, form)
        if isinstance(weight, GGUFBlocks):
            forget_pages(weight.data[ids])  # of a file: they can be read again
        if made is None:
            tiles = -(-out // ROWS)
            made = [None if part is None else np.empty((tiles, *part.shape[1:]), part.dtype) for part in parts]
        for whole, part in zip(made, parts, strict=True):
            if part is not None:
                whole[start // ROWS : start // ROWS + len(part)] = part
    codes, scale, low, tops, factor = made
    values = None
    if form.table in (tables.SIXTEEN, tables.MANY):
        values = code_tiles.lookup_values(weight.values if form.pairs else weight)
    per = codes.shape[1] * form.parts // scale.shape[1]
    return Tiles(form, codes, scale, low, tops, weight.shape, per, values, factor)


def _arrays(weight, ids: slice, form: Form) -> tuple:
    """Codes, scale, low, tops and factor of some rows, tiled."""
    if isinstance(weight, Sparse24):
        codes, *rest = _arrays(weight.values, ids, form)
        return np.concatenate([codes, tile_codes(weight.pairs(ids), 2)], axis=2), *rest
    if isinstance(weight, np.ndarray):
        return tile_floats(weight[ids]), tile_numbers(np.ones((len(weight[ids]), 1), np.float32)), None, None, None
    return {IntWeight: _int_arrays, GGUFBlocks: _gguf_arrays, CodeWeight: _code_arrays}[type(weight)](weight, ids, form)


def _int_arrays(weight: IntWeight, ids: slice, form: Form) -> tuple:
    codes, (scale, zero) = weight.unpacked(ids), weight.scales(ids)
    if weight.group_size == PER_TENSOR:
        scale, zero = (np.broadcast_to(a, (len(codes), 1)) for a in (scale, zero))
    if scale.shape[1] % form.parts:  # a block is half empty
        scale, zero = (np.pad(a, ((0, 0), (0, 1))) for a in (scale, zero))
    low = tile_numbers(zero.astype(np.uint8)) if form.low == "zero" else None
    return tile_codes(codes, form.bits), tile_numbers(scale), low, None, None


def _code_arrays(weight: CodeWeight, ids: slice, form: Form) -> tuple:
    shared, blocks = code_tiles.shared_columns(weight), -(-weight.columns // BLOCK)
    per = blocks if shared == weight.columns else gcd(shared // BLOCK, blocks) if form.parts == 1 else 1
    scale = code_tiles.spread_scales(weight, form.scale, BLOCK // form.parts * per, ids)
    scale = np.pad(scale, ((0, 0), (0, blocks * form.parts // per - scale.shape[1])))
    codes = weight.unpacked(ids)
    if form.offset:  # two's complement: the offset makes them unsigned
        codes ^= np.uint8(form.offset)
    factor = _factor(len(codes), code_tiles.row_factor(weight)) if form.scale == "ue4m3" else None
    return tile_codes(codes, form.bits), tile_numbers(scale), None, None, factor


def _factor(rows: int, value: float) -> np.ndarray:
    """One number for every row: (tiles, 16) float32."""
    return np.full((-(-rows // ROWS), ROWS), value, np.float32)


def _gguf_arrays(weight: GGUFBlocks, ids: slice, form: Form) -> tuple:
    data = weight.data[ids]
    out = len(data)
    fields = weight.layout.layout.unpack(data.reshape(out, -1, weight.layout.bytes_per_block))
    row = lambda name: fields[name].reshape(out, -1)
    if "first" in fields:  # TQ1_0
        fields["q"] = np.concatenate([fields[name] for name in ("first", "second", "last")], axis=-1)
    codes = row("q")
    if codes.dtype == np.int8:  # stored in two's complement: the offset makes them unsigned
        codes = codes.view(np.uint8) ^ np.uint8(form.offset)
    codes = tile_codes(codes, form.bits)
    if form.scale == "ue4m3":  # the top bit means nothing, and 0x7F means 0; the table holds doubled values
        scale = np.where(row("d") == 0x7F, 0, row("d") & 0x7F).astype(np.uint8)
        return codes, tile_numbers(scale), None, None, _factor(out, 0.5)
    if form.scale != "levels":
        scale = row("e" if form.scale == "power" else "d")
        return codes, tile_numbers(scale), tile_numbers(row("m")) if form.low == "minimum" else None, None, None
    level = lambda name: (
        row(name)
        if name in fields
        else np.concatenate([fields[f"{name}_low"], fields[f"{name}_high"]], axis=-1).reshape(out, -1)
    )
    sc = level("sc")
    if form.low == "constant" and sc.dtype == np.uint8:  # Q3_K and IQ4_XS store their levels with an offset
        sc = sc.astype(np.int8) - np.int8(32)
    names = ("d", "dmin") if form.low == "levels" else ("d",)
    tops = np.stack([tile_numbers(row(name)) for name in names], axis=2)
    low = tile_numbers(level("mn")) if form.low == "levels" else None
    return codes, tile_numbers(sc.astype(np.int8)), low, np.ascontiguousarray(tops), None
