"""Tiles hold exactly the numbers of the record they are made from, and lie where tiling.py draws them."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.formats import blocks
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import tiled
from refllm.kernels.packed.quantized import has_levels
from refllm.kernels.packed.records import GGUFBlocks, IntWeight, LowRank
from refllm.kernels.packed.tiled import tiles_of
from refllm.kernels.packed.tiling import BLOCK, PLANES, ROWS, SUPER, tile_codes, tile_numbers, untile_codes
from tests.strategies import PROPERTY

MANY = settings(PROPERTY, max_examples=200)
GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
WIDTHS = sorted(PLANES)
FEW = st.integers(1, 35)
NUMBERS = (0.0, -0.0, 65504.0, -65504.0, 6e-8, -6e-8, 1.0)  # scales that look for trouble: float16's ends


def gguf_blocks(name, rows, count, seed):
    """Random blocks: codes of any bits or all the largest, scales of any size and sign, some at the ends of float16."""
    form, rng = blocks.BLOCKS[name], np.random.default_rng(seed)
    fields = form.layout.unpack(rng.integers(0, 256, (rows, count, form.bytes_per_block), dtype=np.uint8))
    for field, values in fields.items():
        if values.dtype.kind == "f":
            values[:] = rng.standard_normal(values.shape) * 10.0 ** rng.integers(-7, 4, values.shape)
            some = rng.random(values.shape) < 0.2
            values[some] = rng.choice(NUMBERS, some.sum())
        elif rng.random() < 0.2:
            widest = form.layout.unpack(np.full((1, 1, form.bytes_per_block), 255, np.uint8))[field]
            values[rng.random(rows) < 0.5] = widest[0, 0, 0]
    return GGUFBlocks(form.layout.pack(**fields).reshape(rows, -1), name, count * form.block_size)


def int_weight(grid, rows, columns, seed, largest=False):
    """Random codes (or the largest in most rows), scales and zero points; a grid's fit would not find most of them."""
    rng = np.random.default_rng(seed)
    groups = 1 if grid.group_size <= 0 else columns // grid.group_size
    shape = (1, 1) if grid.group_size == 0 else (rows, groups)
    codes = rng.integers(0, 1 << grid.bits, (rows, columns))
    if largest:
        codes[rng.random(rows) < 0.7] = (1 << grid.bits) - 1
    scale = rng.standard_normal(shape) * 10.0 ** rng.integers(-7, 4, shape)
    scale[rng.random(shape) < 0.2] = rng.choice(NUMBERS)
    zero = rng.integers(0, 1 << grid.bits, shape) if isinstance(grid, AffineGrid) else None
    zero = zero if zero is None else zero.astype(np.uint8)
    return IntWeight.pack(grid, codes.astype(np.uint8), scale.astype(grid.scale_dtype), zero)


@pytest.mark.parametrize("bits", WIDTHS)
@MANY
@given(rows=FEW, columns=st.integers(1, 100), seed=st.integers(0, 2**16))
def test_codes_come_back(bits, rows, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    tiled = tile_codes(codes, bits)
    assert tiled.shape == (-(-rows // ROWS), -(-columns // BLOCK), 64 * bits) and tiled.dtype == np.uint8
    assert np.array_equal(untile_codes(tiled, bits, codes.shape), codes)
    everything = untile_codes(tiled, bits, (tiled.shape[0] * ROWS, tiled.shape[1] * BLOCK))
    assert not everything[rows:].any() and not everything[:, columns:].any()


@pytest.mark.parametrize("name", [*GGUF, "IQ4_XS"])
@MANY
@given(rows=FEW, count=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_levels_taken_apart_are_the_weight(name, rows, count, seed):
    assert has_levels(name) == (name.endswith("_K") or name == "IQ4_XS")
    if has_levels(name):
        weight = gguf_blocks(name, rows, count, seed)
        ids = slice(rows // 3, None)
        d, whole, low, minimum = weight.levels(ids)
        assert (whole == np.rint(whole)).all() and d.dtype == np.float32
        exact = d.astype(np.float64)[..., None] * whole
        size = np.abs(exact)
        if low is not None:
            assert (minimum == np.rint(minimum)).all() and minimum.min() >= 0 and minimum.max() < 64
            exact = exact + low.astype(np.float64)[..., None] * minimum
            size += np.abs(low.astype(np.float64)[..., None] * minimum)
        dense = weight.rows(ids).reshape(exact.shape)
        assert (np.abs(dense - exact) <= 2.0**-22 * size).all()


def picture(codes, bits):
    """tile_codes bit by bit, from the drawing in tiling.py: no arrays of more than one number at a time."""
    rows, columns = codes.shape
    tiled = np.zeros((-(-rows // ROWS), -(-columns // BLOCK), 64 * bits), np.uint8)
    for row in range(rows):
        for column in range(columns):
            quad, c = divmod(column % BLOCK, 4)
            bit = start = 0
            for w in PLANES[bits]:
                s, v = divmod(quad, w)
                for k in range(w):
                    on = int(codes[row, column]) >> bit & 1
                    byte = start + 64 * v + 4 * (row % ROWS) + c
                    tiled[row // ROWS, column // BLOCK, byte] |= on << (w * s + k)
                    bit += 1
                start += 64 * w
    return tiled


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(16, 32), (17, 33), (3, 70), (1, 1)])
def test_every_bit_lies_where_the_drawing_says(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape, dtype=np.uint8)
    assert np.array_equal(tile_codes(codes, bits), picture(codes, bits))
    assert (picture(np.full((16, 32), (1 << bits) - 1), bits) == 255).all()  # no bit is left over


def test_numbers_of_rows_stand_side_by_side():
    values = np.arange(17 * 3, dtype=np.int8).reshape(17, 3)
    tiled = tile_numbers(values)
    assert tiled.shape == (2, 3, ROWS) and tiled.dtype == np.int8 and tiled.flags.c_contiguous
    assert all(tiled[r // ROWS, g, r % ROWS] == values[r, g] for r in range(17) for g in range(3))
    assert not tiled[1, :, 1:].any()


def decoded(tiles):
    """The weight in float32 from the arrays of its tiles alone, by the formulas at the head of tiling.py."""
    form, (rows, columns) = tiles.form, tiles.shape
    padded = tiles.codes.shape[0] * ROWS, tiles.codes.shape[1] * BLOCK
    q = untile_codes(tiles.codes, form.bits, padded).astype(np.float32)
    by_row = lambda a: a.swapaxes(1, 2).reshape(padded[0], -1).astype(np.float32)
    wide = lambda a: np.repeat(by_row(a), padded[1] // a.shape[1], axis=1)
    zero = np.float32(form.offset) if form.low != "zero" else wide(tiles.low)
    scale, lowest, low = tiles.scale, tiles.low, 0
    if form.shared_levels:
        b = np.arange(scale.shape[1])
        four = lowest[:, b // 8 * 4 + b % 4] >> (b % 8 // 4 * 4)[:, None] & 15
        scale, lowest = scale >> 2, (scale & 3) << 4 | four
    scale = wide(scale)
    if form.scale == "levels":
        scale = wide(tiles.tops[:, :, 0]) * scale
    if form.low == "minimum":
        low = wide(lowest)
    elif form.low == "levels":
        low = -(wide(tiles.tops[:, :, 1]) * wide(lowest))
    return (scale * (q - zero) + low)[:rows, :columns]


@pytest.mark.parametrize("name", GGUF)
@settings(PROPERTY, max_examples=50)
@given(rows=FEW, count=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_gguf_tiles_hold_the_numbers_of_the_blocks(name, rows, count, seed):
    weight = gguf_blocks(name, rows, count, seed)
    tiles = tiles_of(weight)
    assert np.array_equal(decoded(tiles), weight.dense())
    assert tiles.shape == weight.shape and tiles.per == 1
    if tiles.form.scale == "levels":
        assert tiles.scale.dtype == (np.uint8 if tiles.form.shared_levels else np.int8) and tiles.tops.shape[1:] == (
            weight.columns // SUPER,
            tiles.tops.shape[2],
            ROWS,
        )
    if rows == ROWS:  # a tile is full, and no larger than what the file has
        assert tiles.nbytes <= weight.nbytes * (1 if name in ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K") else 1.25)


@pytest.mark.parametrize("bits", range(2, 9))
@MANY
@given(
    kind=st.sampled_from([SymmetricGrid, AffineGrid]),
    group=st.sampled_from([16, 32, 64, 96, 128, -1, 0]),
    dtype=st.sampled_from(["float16", "float32"]),
    rows=FEW,
    count=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_integer_tiles_hold_the_numbers_of_the_record(bits, kind, group, dtype, rows, count, seed):
    columns = 32 * count if group == 16 else group * count if group > 0 else 37 * count
    weight = int_weight(kind(bits, group, dtype), rows, columns, seed, seed % 2)
    tiles = tiles_of(weight)
    assert np.array_equal(decoded(tiles), weight.dense())
    assert tiles.form.scale == ("half" if dtype == "float16" else "float") and tiles.scale.dtype == dtype
    assert tiles.form.parts == (2 if group == 16 else 1)
    assert tiles.tops is None and (tiles.low is None) == (kind is SymmetricGrid)
    # Nothing is added: a whole number of tiles and blocks takes the bytes of the record, but zero points one byte each.
    if weight.shape[0] % ROWS == 0 and columns % BLOCK == 0 and group:
        own = weight.codes.nbytes + weight.scale.nbytes + (0 if tiles.low is None else weight.scale.size)
        assert tiles.nbytes == own


def test_which_groups_have_tiles():
    ones = lambda grid, columns: int_weight(grid, 1, columns, 0)
    for group, columns, parts in (
        (-1, 37, 1),
        (0, 5, 1),
        (12, 12, 1),
        (16, 96, 2),
        (16, 16, 1),
        (16, 48, 2),
        (32, 96, 1),
        (96, 192, 1),
    ):
        assert tiles_of(ones(SymmetricGrid(4, group), columns)).form.parts == parts
    for group, columns in ((8, 96), (12, 96), (48, 96), (1, 32), (40, 80)):
        assert tiles_of(ones(SymmetricGrid(4, group), columns)) is None
        assert tiles_of(ones(AffineGrid(3, group), columns)) is None
    assert tiled.form_of(LowRank(np.ones((2, 1), np.float32), np.ones((1, 2), np.float32))) is None


def test_rows_beyond_the_widest_have_no_tiles():
    wide = tiled.MOST_COLUMNS + 8
    codes = np.zeros((1, wide // 8), np.uint8).repeat(4, axis=1)
    weight = IntWeight(codes, np.ones((1, 1), np.float16), None, 4, -1, wide)
    assert tiles_of(weight) is None


def test_tiles_are_made_once_and_go_with_their_record():
    weight = gguf_blocks("Q4_K", 3, 1, 0)
    tiles = tiles_of(weight)
    assert tiles_of(weight) is tiles
    gone = weakref.ref(tiles)
    del weight, tiles
    gc.collect()
    assert gone() is None


def test_the_table_holds_the_addresses_of_the_arrays():
    tiles = tiles_of(gguf_blocks("Q4_K", 3, 2, 0))
    places = [a.ctypes.data for a in (tiles.codes, tiles.scale, tiles.low, tiles.tops)]
    assert tiles.table.dtype == np.int64 and tiles.table[:6].tolist() == [*places, 16, 1]
    assert all(a.flags.c_contiguous and a.flags.aligned for a in (tiles.codes, tiles.scale, tiles.low, tiles.tops))
    symmetric = tiles_of(int_weight(SymmetricGrid(4, 64), 3, 128, 0))
    assert symmetric.table[2:6].tolist() == [0, 0, 4, 2]


def test_codes_of_small_weights_follow_each_other_in_the_order_in_which_they_are_made(monkeypatch):
    monkeypatch.setattr(tiled, "_shared", [np.empty(0, np.uint8)] * 2)
    made = [tiles_of(gguf_blocks("Q4_0", rows, 4, rows)) for rows in (16, 48, 16)]
    at = [tiles.codes.ctypes.data for tiles in made]
    assert np.diff(at).tolist() == [tiles.codes.nbytes for tiles in made[:2]] == [16 * 64, 48 * 64]
