"""No kernel reads outside its arrays: each ends at a page that may not be read; one byte too far ends the process."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, mmap
from dataclasses import replace
import numpy as np
from refllm.formats import blocks
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import fast, laid_out
from refllm.kernels.packed.encode_codes import blockwise, fp8_blocks, nvfp4
from refllm.kernels.packed.tiled import tiles_of
from refllm.kernels.packed.records import BlockSparse, CodeWeight, GGUFBlocks, IntWeight, Sparse24, SparseBitmask
from refllm.kernels.packed.records import TableRows, VectorWeight

PAGE, keep = mmap.PAGESIZE, []
libc = ctypes.CDLL(None, use_errno=True)

def guarded(array):
    if array is None:
        return None
    pages = -(-array.nbytes // PAGE)
    area = mmap.mmap(-1, (pages + 1) * PAGE)
    keep.append(area)
    raw = np.frombuffer(area, np.uint8)
    assert libc.mprotect(ctypes.c_void_p(raw.ctypes.data + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    inside = raw[pages * PAGE - array.nbytes : pages * PAGE].view(array.dtype).reshape(array.shape)
    inside[...] = array
    return inside

def tight(tiles):
    names = "codes", "scale", "low", "tops", "values", "factor", "first", "where"
    return replace(tiles, **{name: guarded(getattr(tiles, name)) for name in names})

def check_tiles(weight, W, counts=(1, 13)):
    tiles = tiles_of(weight)
    for tokens in counts if tiles else ():
        x = np.resize(W, (tokens, W.shape[1])).astype(np.float32)
        kinds = (laid_out.FLOAT, laid_out.SUPERS) if tiles.form.scale == "levels" else range(3)
        for kind in kinds if tiles.form.has_integers else (laid_out.FLOAT,):
            product = fast.tile_matmul(guarded(x), tight(tiles), kind)
            assert np.array_equal(product, fast.tile_matmul(x, tiles, kind))

MANY = "Q4_0", "Q4_1", "Q6_K", "Q2_K", "NVFP4"  # many tokens, too: each way of reading scales
rng = np.random.default_rng(0)
row, groups = SymmetricGrid(4, -1), AffineGrid(4, 32)
eight, three = AffineGrid(8, 16, "float32"), SymmetricGrid(3, 16, "float32")
for grid, columns, counts in ((row, 37, (1, 13)), (groups, 160, (1, 13)), (eight, 96, (1,)), (three, 48, (1,))):
    for rows in (1, 3, 6, 8):
        W = rng.standard_normal((rows, columns)).astype(np.float32)
        scale, zero = grid.fit(W)
        plain = IntWeight.pack(grid, grid.encode(W, scale, zero), scale, zero)
        arrays = map(guarded, (plain.codes, plain.scale, plain.zero_point))
        inside = IntWeight(*arrays, grid.bits, grid.group_size, columns)
        out = guarded(np.zeros((rows, columns), np.float32))
        fast.decoder(inside)(0, rows, out)
        assert np.array_equal(out, plain.dense())
        check_tiles(plain, W, counts)
for name, layout in blocks.BLOCKS.items():
    data = guarded(np.zeros((2, layout.bytes_per_block), np.uint8))
    out = guarded(np.ones((2, layout.block_size), np.float32))
    fast.decoder(GGUFBlocks(data, name, layout.block_size))(0, 2, out)
    assert np.isfinite(out).all()
    check_tiles(GGUFBlocks(data, name, layout.block_size), out, (1, 13) if name in MANY else (1,))
W = rng.standard_normal((19, 112)).astype(np.float32)
for weight in (blockwise(W, block=16), fp8_blocks(W), nvfp4(W), blockwise(W, "FP4_BNB", block=112, double_quant=True)):
    check_tiles(weight, W, (1,))
for table, bits in (("DYNAMIC8", 8), ("FP6_E2M3", 6), ("BINARY", 1)):
    codes = rng.integers(0, 1 << bits, (19, 37)).astype(np.uint8)
    check_tiles(CodeWeight.pack(codes, None, table, (1, 37)), W[:, :37], (1,) if bits == 6 else (1, 13))
for bits in (1, 3, 4):
    codes = rng.integers(0, 1 << bits, (19, 37)).astype(np.uint8)
    check_tiles(TableRows.pack(codes, rng.standard_normal((19, 1 << bits)).astype(np.float16)), W[:, :37], (1, 13))
for columns in (32, 36, 96):
    indices = np.resize(np.uint8([0x4E, 0xC9]), (19, -(-columns // 8)))
    indices[:, -1] &= 0xFF if columns % 8 == 0 else 0x0F
    values = W[:, : columns // 2]
    grid = AffineGrid(4, columns // 2)
    packed = IntWeight.pack(grid, grid.encode(values, *grid.fit(values)), *grid.fit(values))
    for stored in (values.copy(), values.astype(np.float16), packed):
        check_tiles(Sparse24(stored, indices, columns), W[:, :columns])
for dtype in ("float16", "float32"):
    for columns in (1, 37, 96):
        check_tiles(SparseBitmask.compress(W[:, :columns], rng.random((19, columns)) < 0.5, dtype), W[:, :columns])
for spans, books, d, vectors, dtype in ((1, 2, 8, 40, "float16"), (10, 1, 4, 9, "float16"), (1, 1, 8, 257, "float32")):
    codes = rng.integers(0, vectors, (19, 40 // d, books))
    codes[-1] = vectors - 1
    books = rng.standard_normal((spans, books, vectors, d)).astype(dtype)
    check_tiles(VectorWeight.pack(codes, books, np.ones((19, 1), np.float32)), W[:, :40])
kept = np.resize(W, (32, 64))
for stored, counts in ((kept.astype(np.float16), (1, 13)), (GGUFBlocks(blocks.Q4_0.encode(kept), "Q4_0", 64), (1,))):
    check_tiles(BlockSparse(stored, np.uint8([[2], [1]]), 19, 128, 16, 64), np.resize(W, (19, 128)), counts)
if MUST_CRASH:
    np.lib.stride_tricks.as_strided(guarded(np.zeros(16, np.float32)), (17,)).sum()
print("read nothing else")
"""


def run(must_crash: bool):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = f"MUST_CRASH = {must_crash}\n{PROGRAM}"
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are set with mprotect")
def test_no_kernel_reads_outside_its_arrays():
    done = run(must_crash=False)
    assert done.returncode == 0 and "read nothing else" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are set with mprotect")
def test_the_guard_pages_do_guard():
    assert run(must_crash=True).returncode < 0
