"""The Numba side of matmul: which kernel runs a record, and products through decoded blocks of rows where none does.

    a weight that has tiles      its tiles (tiling.py), made at the first product and kept beside the record
    anything else                rows are decoded to float32, a block at a time (it stays in cache), for BLAS

The sums of the second kind are BLAS's: their order, and so their last bits, may depend on its version and threads.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, chain
from weakref import WeakKeyDictionary

import numpy as np

from refllm.kernels.grids import PER_TENSOR
from refllm.kernels.packed import decode_kernels, reference
from refllm.kernels.packed.activations import round_activations
from refllm.kernels.packed.compile import compile_kernel
from refllm.kernels.packed.laid_out import FLOAT, KINDS, TOKEN, TOKENS, laid_kind, lay_out_address, rounded_kind
from refllm.kernels.packed.quantized import GGUFBlocks, IntWeight
from refllm.kernels.packed.reference import activation_block, row_blocks
from refllm.kernels.packed.several import several_address
from refllm.kernels.packed.sparse import Sparse24, SparseBitmask
from refllm.kernels.packed.standing import run_job
from refllm.kernels.packed.threads import division, thread_count
from refllm.kernels.packed.tile_kernels import TILES, product_address
from refllm.kernels.packed.tiled import tiles_of
from refllm.kernels.packed.tiling import BLOCK, ROWS, Tiles

FEW_TOKENS = 3  # up to here one token after another beats a panel that is mostly empty
SLAB = 80 * TOKENS  # tokens laid out at a time
LAYING = 64  # so many weights, or more, are multiplied in the time that it takes to lay a number out
BLOCK_ELEMENTS = 1 << 18  # 1 MB of float32
SLICES = 32  # of a job, for each thread: taking one costs a few nanoseconds
PAGE = 4096  # bytes; what lies so far apart shares few places of a first-level cache


def tile_matmul(x: np.ndarray, tiles: Tiles, kind: int) -> np.ndarray:
    """x W^T by the compiled tile product.

    Parameters
    ----------
    x : (tokens, in) float32
    tiles : Tiles
    kind : int
        FLOAT, or rounded activations with a scale per 32 columns (BLOCKS) or per token (TOKEN); beside levels FLOAT
        or SUPERS (per 256 columns). See laid_out.

    Returns
    -------
    (tokens, out) float32
    """
    return Together([tiles], kind).products(x)[0]


class Together:
    """Weights of one width that read activations laid out alike, and what their products with any x have in common.

    After a product has streamed its weights through the caches, every Python object that the next one touches comes
    from memory: all that is known before x is therefore kept ready.

    Parameters
    ----------
    weights : sequence of Tiles
    kind : int
        As of tile_matmul.
    """

    def __init__(self, weights: Sequence[Tiles], kind: int):
        self.weights, self.kind, self.laid = tuple(weights), kind, laid_kind(weights[0].form, kind)
        self.blocks, self.tiles = weights[0].blocks, sum(tiles.tiles for tiles in weights)
        self.size = sum(tiles.codes.size for tiles in weights)
        starts = list(accumulate((tiles.tiles * ROWS for tiles in weights), initial=0))
        self.width = _apart(starts[-1])
        self.columns = [slice(at, at + tiles.shape[0]) for at, tiles in zip(starts, weights, strict=False)]
        self._calls = {}

    def _call(self, n: int) -> tuple[int, int, np.ndarray | None]:
        """For panels of n tokens: the function's address, its first argument, and the array that lies there."""
        alone = n == 1 and thread_count() == 1
        if (n, alone) not in self._calls:
            kernels = [product_address(tiles.form, self.kind, n, alone) for tiles in self.weights]
            if len(kernels) == 1:
                self._calls[n, alone] = kernels[0], self.weights[0].address, None
            else:
                each = zip(kernels, self.weights, self.columns, strict=True)
                fields = [(kernel, tiles.address, 4 * at.start, tiles.tiles) for kernel, tiles, at in each]
                table = np.array([len(fields), *chain(*fields)], np.int64)
                self._calls[n, alone] = several_address(), table.ctypes.data, table
        return self._calls[n, alone]

    def products(self, x: np.ndarray) -> list[np.ndarray]:
        """x W^T for each of the weights.

        Parameters
        ----------
        x : (tokens, in) float32

        Returns
        -------
        list of (tokens, out) float32
        """
        tokens, blocks, n = len(x), self.blocks, 1 if len(x) <= FEW_TOKENS else TOKENS
        x = _padded(x, blocks * BLOCK)
        panels = -(-tokens // n)
        most = max(1, min(panels, SLAB // n))
        y = np.empty((panels * n, self.width), np.float32)
        each = blocks * n  # of a panel: so many blocks of numbers, scales, and up to four times as many sums
        codes_bytes, scale_bytes = most * each * BLOCK * (4 if self.kind == FLOAT else 1), most * each * 4
        laid = np.empty(codes_bytes + 5 * scale_bytes, np.uint8)
        at, from_x, to_y, stride = _address(laid), _address(x), _address(y), 4 * self.width
        laid_out = at, at + codes_bytes, at + codes_bytes + scale_bytes
        lay_out, (product, weights, _) = lay_out_address(n), self._call(n)
        for start in range(0, panels, most):
            done, count = start * n, min(most, panels - start)
            source = from_x + 4 * done * x.shape[1], tokens - done, x.shape[1], self.laid
            over_tiles(lay_out, (*source, *laid_out), count, LAYING * count * n * x.shape[1], together=1)
            arguments = weights, *laid_out, to_y + done * stride, stride, count
            over_tiles(product, arguments, self.tiles, count * n * self.size)
        return [y[:tokens, columns] for columns in self.columns]


def _address(array: np.ndarray) -> int:
    """Of an array's first byte: array.ctypes.data, by way of fewer objects."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except (TypeError, ValueError):  # read-only, or empty
        return array.ctypes.data


def _apart(columns: int) -> int:
    """Columns of an array of results with so many of use; rows whole pages apart would displace each other."""
    return columns + (ROWS if 4 * columns % PAGE == 0 else 0)


def _padded(x: np.ndarray, columns: int) -> np.ndarray:
    """Rows of so many columns, zero beyond their end; contiguous and aligned."""
    if x.shape[1] < columns:
        x = np.pad(x, ((0, 0), (0, columns - x.shape[1])))
    return x if x.flags.carray and x.dtype == np.float32 else np.require(x, np.float32, ["C", "A"])


def over_tiles(function: int, arguments: tuple, rows: int, work: int, together: int = TILES) -> None:
    """`threads.over_rows` in compiled code: call the function at an address on slices of tiles, or other rows."""
    threads, units, _ = division(rows, work, together)
    parts = min(units, SLICES * threads), units, together
    if threads == 1 or not run_job(function, arguments, rows, parts, threads):
        _function(function)(*arguments, 0, rows)


@cache
def _function(address: int):
    return ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 9)(address)


@cache
def _kernel(name: str, bits: int = 0):
    """A decoding kernel, compiled when first needed."""
    if name == "integers":
        return compile_kernel(decode_kernels.integers_text(bits), decode_kernels.INTEGERS_SIGNATURE, str(bits))
    if name in decode_kernels.GGUF_TEXTS:
        return compile_kernel(decode_kernels.GGUF_TEXTS[name], decode_kernels.BLOCK_SIGNATURE)
    return compile_kernel(getattr(decode_kernels, name), getattr(decode_kernels, f"{name.upper()}_SIGNATURE"))


def decoded(weight) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of a record as float32, in order; each array is overwritten by the next."""
    step = next(row_blocks(weight.shape, BLOCK_ELEMENTS)).stop
    decode = decoder(weight)
    buffer = np.empty((step, weight.shape[1]), np.float32)
    for block in row_blocks(weight.shape, BLOCK_ELEMENTS):
        out = buffer[: block.stop - block.start]
        decode(block.start, block.stop, out)
        yield block, out


def decoder(weight) -> Callable[[int, int, np.ndarray], None]:
    """decode(first, last, out) for one record: some rows into out (last - first, in) float32, C-contiguous."""
    columns = weight.shape[1]
    if isinstance(weight, GGUFBlocks) and weight.type_name in decode_kernels.GGUF_TEXTS:
        run, data, row_bytes = _kernel(weight.type_name), flat(weight.data), weight.data.shape[1]
        return lambda first, last, out: run(data, row_bytes, out.reshape(-1), first, last)
    if isinstance(weight, IntWeight):
        return _int_decoder(weight)
    if isinstance(weight, Sparse24):
        run, indices = _kernel("sparse24"), flat(weight.indices)

        def decode(first, last, out):
            run(_values(weight.values, slice(first, last)), indices, columns, out.reshape(-1), first, last)

    elif isinstance(weight, SparseBitmask):
        run, bits, offsets = _kernel("bitmask"), flat(weight.bitmask), flat(weight.row_offsets)
        values = np.append(_values(weight.values, slice(None)), np.float32(0))

        def decode(first, last, out):
            run(values, bits, offsets, columns, out.reshape(-1), first, last)

    else:

        def decode(first, last, out):
            out[...] = weight.rows(slice(first, last))

    return decode


def _int_decoder(weight: IntWeight) -> Callable[[int, int, np.ndarray], None]:
    run, codes = _kernel("integers", weight.bits), flat(weight.codes)

    def decode(first, last, out):
        scale, zero = weight.scales(slice(None) if weight.group_size == PER_TENSOR else slice(first, last))
        scale = np.require(scale, np.float32, ["C", "A"])
        run(codes, weight.codes.shape[1], weight.columns, scale, zero, out.reshape(-1), first, last)

    return decode


def _values(values, block: slice) -> np.ndarray:
    """Stored values as flat float32: an array, or a record that is decoded."""
    if isinstance(values, np.ndarray):
        return flat(values[block].astype(np.float32, copy=False))
    first, last, _ = block.indices(values.shape[0])
    out = np.empty((last - first, values.shape[1]), np.float32)
    decoder(values)(first, last, out)
    return out.reshape(-1)


def matmul_float(x: np.ndarray, weight) -> np.ndarray:
    """reference.matmul_float for float32 x."""
    if tiled := _tiled(weight, 0):
        return tiled.products(x)[0]
    y = np.empty((len(x), weight.shape[0]), np.float32)
    for block, rows in decoded(weight):
        np.matmul(x, rows.T, out=y[:, block])
    return y


def matmul_int8(x: np.ndarray, weight) -> np.ndarray:
    """reference.matmul_int8 for float32 x."""
    return matmul_rounded(x, weight, 8)


def matmul_rounded(x: np.ndarray, weight, bits: int = 8) -> np.ndarray:
    """reference.matmul_rounded for float32 x. Without an integer product, floats are multiplied."""
    if tiled := _tiled(weight, bits):
        return tiled.products(x)[0]
    return matmul_float(round_activations(x, activation_block(weight), bits), weight)


_ways: WeakKeyDictionary = WeakKeyDictionary()  # record -> bits -> what _tiled finds


def _tiled(weight, bits: int) -> Together | None:
    """The product of a record with activations of so many bits (0: float32); None if its tiles have none."""
    ways = _ways.get(weight)
    if ways is None:
        ways = _ways[weight] = {}
    if bits not in ways:
        tiles, kind = tiles_of(weight), rounded_kind(activation_block(weight), bits) if bits else FLOAT
        fits = tiles is not None and (kind == FLOAT or tiles.form.has_integers)
        ways[bits] = Together([tiles], kind) if fits else None
    return ways[bits]


def together(records: Sequence[tuple]) -> list[tuple[tuple[int, ...], Together]]:
    """Several records as few products: those together that read activations laid out alike.

    Parameters
    ----------
    records : sequence of (record, int)
        Each with the bits of its activations; 0 for float32.

    Returns
    -------
    list of (numbers, Together)
        Which records they are. A record that has no tiles is in none.
    """
    alike = {}
    for i, (record, bits) in enumerate(records):
        if tiled := _tiled(record, bits):
            alike.setdefault((tiled.kind, tiled.laid, tiled.blocks), []).append((i, tiled.weights[0]))
    found = []
    for (kind, *_), members in alike.items():
        numbers, tiles = zip(*members, strict=True)
        found.append((numbers, Together(tiles, kind)))
    return found


def codes_times(x_codes: np.ndarray, weight) -> np.ndarray:
    """reference.codes_times. Kernels take codes of -127 to 127; the few that reach -128, and levels, have the text."""
    tiles = tiles_of(weight)
    if not tiles or not tiles.form.has_integers or tiles.form.scale == "levels" or (x_codes == -128).any():
        return reference.codes_times(x_codes, weight)
    tokens, n = len(x_codes), 1 if len(x_codes) <= FEW_TOKENS else TOKENS
    panels = -(-tokens // n)
    x, sums = _laid_codes(x_codes, tiles, panels, n)
    scale = np.ones((panels, tiles.blocks, n), np.float32)
    y = np.empty((panels * n, _apart(tiles.tiles * ROWS)), np.float32)
    product, stride = product_address(tiles.form, TOKEN, n), y.strides[0]
    target = tiles.address, x.ctypes.data, scale.ctypes.data, sums.ctypes.data, y.ctypes.data, stride, panels
    over_tiles(product, target, tiles.tiles, tiles.codes.size * panels * n)
    return y[:tokens, : tiles.shape[0]]


def _laid_codes(x_codes: np.ndarray, tiles: Tiles, panels: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and their sums as laid_out.lay_out_text leaves them."""
    tokens, columns = x_codes.shape
    padded = np.zeros((panels * n, tiles.blocks * BLOCK), np.int8)
    padded[:tokens, :columns] = x_codes
    x = np.ascontiguousarray(padded.reshape(panels, n, tiles.blocks, BLOCK).swapaxes(1, 2))  # [panel, block, n, 32]
    halves = x.reshape(*x.shape[:3], 2, BLOCK // 2).sum(axis=-1, dtype=np.int32)
    sums = np.stack([halves.sum(axis=-1, dtype=np.int32), halves[..., 0], halves[..., 1]], axis=2)
    offset = laid_kind(tiles.form, TOKEN) >> KINDS
    return x, -offset * sums if offset else sums.astype(np.float32)


def flat(array: np.ndarray) -> np.ndarray:
    """A flat, contiguous, aligned view of an array; a copy only where it must be."""
    return np.require(array, requirements=["C", "A"]).reshape(-1)
