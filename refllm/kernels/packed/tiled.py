"""Records in tiles (tiling.py): which have them, and how they are made.

A weight whose groups do not fall on blocks or halves of them has none, nor has a factored one: `tiles_of` gives None.
"""

import math
import threading
from dataclasses import replace
from math import gcd
from weakref import WeakKeyDictionary

import numpy as np

from refllm.formats.bits import unpack_bits
from refllm.formats.files import forget_pages
from refllm.kernels.grids import PER_TENSOR, group_count
from refllm.kernels.packed import code_tiles, tables
from refllm.kernels.packed.block_sparse import BlockSparse
from refllm.kernels.packed.codes import CodeWeight, TableRows
from refllm.kernels.packed.quantized import GGUFBlocks, IntWeight, MinWeight
from refllm.kernels.packed.sparse import Plain, Sparse24, SparseBitmask
from refllm.kernels.packed.tiling import (
    BLOCK,
    PLANES,
    ROWS,
    Form,
    Tiles,
    share_levels,
    tile_codes,
    tile_floats,
    tile_numbers,
)
from refllm.kernels.packed.two_level import TwoLevel
from refllm.kernels.packed.vectors import VectorWeight

MOST_COLUMNS = 1 << 20
PART = 1 << 19  # weights tiled at a time

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
    if isinstance(weight, TableRows):
        return Form(weight.bits, "float", table=tables.OF_ROWS) if weight.bits <= 4 else None
    if isinstance(weight, Sparse24):
        return _pairs_form(weight)
    if isinstance(weight, Plain):
        return Form(8 * weight.values.itemsize, "float", table=tables.of_floats(weight.values.dtype))
    if isinstance(weight, SparseBitmask) and isinstance(weight.values, np.ndarray):
        dtype = weight.values.dtype
        return Form(8 * dtype.itemsize, "none", table=tables.of_floats(dtype), layout="bitmask")
    if isinstance(weight, BlockSparse):
        return _blocks_form(weight)
    if isinstance(weight, VectorWeight):
        return _vectors_form(weight)
    if isinstance(weight, MinWeight):
        return _min_form(weight)
    if isinstance(weight, TwoLevel):
        return _int_form(weight.flat)
    return _int_form(weight) if isinstance(weight, IntWeight) else None


def _min_form(weight: MinWeight) -> Form | None:
    groups = group_count(weight.columns, weight.group_size)
    if (
        weight.scale.dtype != np.float16
        or weight.bits not in PLANES
        or (groups > 1 and weight.columns // groups % BLOCK)
    ):
        return None
    return Form(weight.bits, "half", "minimum")


def _blocks_form(weight: BlockSparse) -> Form | None:
    """Where tiles make up blocks."""
    if weight.block_rows % ROWS or weight.block_columns % BLOCK or weight.columns % weight.block_columns:
        return None
    values = weight.values
    if not values.shape[0]:
        return None
    if isinstance(values, np.ndarray):
        return Form(8 * values.itemsize, "float", table=tables.of_floats(values.dtype), layout="blocks")
    form = form_of(values)
    if form is None or form.scale in ("levels", "ue4m3") or form.table == tables.OF_ROWS or form.layout:
        return None
    return replace(form, layout="blocks")


def _vectors_form(weight: VectorWeight) -> Form | None:
    """Where blocks are whole vectors, and groups of scales whole blocks."""
    _, books, _, d = weight.codebooks.shape
    groups = 1 if weight.scale is None else weight.scale.shape[1]
    if d not in (2, 4, 8, 16, 32) or (groups > 1 and weight.columns // groups % BLOCK):
        return None
    if weight.codebooks.nbytes >= 1 << 32:
        return None
    table = tables.of_floats(weight.codebooks.dtype)
    return Form(8 if weight.bits <= 8 else 16, "float", parts=books, table=table, layout="vectors", columns=d)


def _pairs_form(weight: Sparse24) -> Form | None:
    values = weight.values
    if isinstance(values, np.ndarray):
        return Form(8 * values.itemsize, "float", table=tables.of_floats(values.dtype), layout="pairs")
    form = form_of(values)
    if form is None or form.scale == "levels" or form.low not in ("constant", "zero"):
        return None
    return None if form.layout else replace(form, layout="pairs")


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


SHARED = 32 << 20  # bytes that small arrays are cut from
LINE, LARGE_PAGE = 64, 2 << 20  # bytes, of a cache and of memory
CODES, BESIDE = 0, 1
_shared, _sharing = [np.empty(0, np.uint8)] * 2, threading.Lock()  # what is left of two large arrays
_made: WeakKeyDictionary = WeakKeyDictionary()


def tiles_of(weight) -> Tiles | None:
    """The tiles of a record, made once and kept as long as it lives; None if it has none."""
    if isinstance(weight, TwoLevel):
        weight = weight.flat
    made = _made.get(weight)
    if made is None and (form := form_of(weight)) is not None:
        make = {"bitmask": _tile_bitmask, "blocks": _tile_blocks, "vectors": _tile_vectors}.get(form.layout, _tile)
        made = _made[weight] = make(weight, form)
    return made


def _tile(weight, form: Form) -> Tiles:
    made = None
    for ids in _row_parts(weight.shape):
        parts = _arrays(weight, ids, form)
        if isinstance(weight, GGUFBlocks):
            forget_pages(weight.data[ids])  # of a file: they can be read again
        if made is None:
            tiles = -(-weight.shape[0] // ROWS)
            made = [
                None if part is None else _room((tiles, *part.shape[1:]), part.dtype, BESIDE if i else CODES)
                for i, part in enumerate(parts)
            ]
        for whole, part in zip(made, parts, strict=True):
            if part is not None:
                whole[ids.start // ROWS : ids.start // ROWS + len(part)] = part
    codes, scale, low, tops, factor = made
    values = None
    if form.table in (tables.SIXTEEN, tables.MANY):
        values = code_tiles.lookup_values(weight.values if form.layout else weight)
    if form.table == tables.OF_ROWS:
        values = tile_numbers((weight.values if form.layout else weight).tables.astype(np.float32))
    per = codes.shape[1] * form.parts // scale.shape[1]
    return Tiles(form, codes, scale, low, tops, weight.shape, per, values, factor)


def _room(shape: tuple[int, ...], dtype: np.dtype, of: int) -> np.ndarray:
    """An uninitialised array; small ones are cut from a large one that they share, CODES from one, BESIDE from another.

    NumPy asks for large pages for arrays of 4 MB and more. Within 4 KB pages the processor reads ahead no further than
    to the end of each, and a model of many small weights comes from memory a fifth more slowly. So arrays begin where a
    large page does. Codes follow each other in the order in which weights are made, which is that of a decoded token:
    what a product asks for behind its last codes (tile_runs.AHEAD) are the first of the next.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes > SHARED // 4:
        return _large(nbytes).view(dtype).reshape(shape)
    with _sharing:
        if nbytes > _shared[of].size:
            _shared[of] = _large(SHARED)
        mine, _shared[of] = _shared[of][:nbytes], _shared[of][-(-nbytes // LINE) * LINE :]
    return mine.view(dtype).reshape(shape)


def _large(nbytes: int) -> np.ndarray:
    """So many bytes that begin with a large page."""
    room = np.empty(nbytes + LARGE_PAGE, np.uint8)
    return room[-room.ctypes.data % LARGE_PAGE :][:nbytes]


def _row_parts(shape: tuple[int, int]) -> list[slice]:
    """Whole tiles of rows, some at a time, so that no more than a few megabytes are needed beside the result."""
    out, columns = shape
    step = max(1, PART // (columns * ROWS)) * ROWS
    return [slice(start, min(start + step, out)) for start in range(0, out, step)]


def _tile_blocks(weight: BlockSparse, form: Form) -> Tiles:
    """The tiles of the kept blocks, in the order in which rows of tiles meet them."""
    inner = Plain(weight.values) if isinstance(weight.values, np.ndarray) else weight.values
    made, mask, high = _tile(inner, replace(form, layout="")), weight.mask(), weight.block_rows // ROWS
    tile = np.arange(-(-weight.out // ROWS))
    row, inside = np.divmod(tile, high)
    number = np.cumsum(mask).reshape(mask.shape) - 1  # of the kept blocks
    k, column = np.nonzero(mask[row])
    order = number[row[k], column] * high + inside[k]
    counts = mask[row].sum(axis=1)
    first = np.append(0, np.cumsum(counts)).astype(np.uint32)
    where = (column * (weight.block_columns // BLOCK)).astype(np.uint32)
    codes, scale, low = (
        a if a is None or np.array_equal(order, np.arange(len(a))) else a[order]
        for a in (made.codes, made.scale, made.low)
    )
    return replace(made, form=form, codes=codes, scale=scale, low=low, shape=weight.shape, first=first, where=where)


def _tile_vectors(weight: VectorWeight, form: Form) -> Tiles:
    """Codes of whole bytes; rows and columns filled up with the code 0 of the first book."""
    (out, columns), (_, books, vectors, d) = weight.shape, weight.codebooks.shape
    blocks = -(-columns // BLOCK)
    edges = (0, -out % ROWS), (0, blocks * (BLOCK // d) - columns // d), (0, 0)
    codes = np.pad(weight.unpacked(), edges).reshape(-(-out // ROWS), ROWS, -1)
    scale = np.ones((out, 1)) if weight.scale is None else weight.scale
    where = (weight.spans[:, None] * books + np.arange(books)) * (vectors * d * weight.codebooks.itemsize)
    where = np.pad(where, edges[1:]).astype(np.uint32).ravel()
    scale, values = tile_numbers(scale.astype(np.float32)), np.ascontiguousarray(weight.codebooks)
    return Tiles(form, codes, scale, None, None, weight.shape, blocks // scale.shape[1], values, where=where)


def _tile_bitmask(weight: SparseBitmask, form: Form) -> Tiles:
    columns, blocks = weight.columns, -(-weight.columns // BLOCK)
    masks, counts, values = [], [], []
    for ids in _row_parts(weight.shape):
        kept = unpack_bits(weight.bitmask[ids], 1, columns).astype(bool)
        first = int(weight.row_offsets[ids.start])
        numbers = np.zeros(kept.shape, weight.values.dtype)
        numbers[kept] = weight.values[first : first + int(kept.sum())]
        edges = (0, -len(kept) % ROWS), (0, -columns % BLOCK)
        kept, numbers = (
            np.pad(a, edges).reshape(-1, ROWS, blocks, BLOCK).transpose(0, 2, 3, 1) for a in (kept, numbers)
        )  # [tile, block, column, row]
        masks.append(np.packbits(kept, axis=-1, bitorder="little").reshape(*kept.shape[:2], -1))
        counts.append(kept.sum(axis=(2, 3)))
        values.append(numbers[kept])
    counts = np.concatenate(counts)
    starts = (np.cumsum(counts) - counts.ravel()).astype(np.uint32).reshape(counts.shape)
    spare = np.zeros(ROWS, weight.values.dtype)  # a kernel reads sixteen values at once
    return Tiles(form, np.concatenate(masks), starts, None, None, weight.shape, 1, np.concatenate([*values, spare]))


def _arrays(weight, ids: slice, form: Form) -> tuple:
    """Codes, scale, low, tops and factor of some rows, tiled."""
    if isinstance(weight, Sparse24):
        codes, *rest = _arrays(weight.values, ids, form)
        return np.concatenate([codes, tile_codes(weight.pairs(ids), 2)], axis=2), *rest
    if isinstance(weight, Plain):
        return _arrays(weight.values, ids, form)
    if isinstance(weight, TableRows):
        return tile_codes(weight.unpacked(ids), form.bits), _ones(ids), None, None, None
    if isinstance(weight, np.ndarray):
        return tile_floats(weight[ids]), _ones(ids), None, None, None
    if isinstance(weight, MinWeight):
        scale, minimum = (tile_numbers(a[ids]) for a in (weight.scale, weight.minimum))
        return tile_codes(weight.unpacked(ids), form.bits), scale, minimum, None, None
    return {IntWeight: _int_arrays, GGUFBlocks: _gguf_arrays, CodeWeight: _code_arrays}[type(weight)](weight, ids, form)


def _ones(ids: slice) -> np.ndarray:
    """Scales of rows that have none."""
    return tile_numbers(np.ones((ids.stop - ids.start, 1), np.float32))


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
    tops, low = np.ascontiguousarray(tops), tile_numbers(level("mn")) if form.low == "levels" else None
    if form.shared_levels:
        return codes, *share_levels(tile_numbers(sc), low), tops, None
    return codes, tile_numbers(sc.astype(np.int8)), low, tops, None
