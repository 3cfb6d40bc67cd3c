"""The Numba side of matmul: which kernel runs a record, and products through decoded blocks of rows where none does.

    few tokens, codes that fall on lanes    int_kernels.int_matmul, on the stored layout
    anything else                           rows are decoded to float32, a block at a time (it stays in cache), for BLAS

The sums of the second kind are BLAS's: their order, and so their last bits, may depend on its version and threads.
"""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np

from refllm.kernels.grids import PER_TENSOR
from refllm.kernels.packed import decode_kernels
from refllm.kernels.packed.activations import dequantize_activations, quantize_activations
from refllm.kernels.packed.compile import compile_kernel
from refllm.kernels.packed.int_kernels import blocking, flat, int_matmul
from refllm.kernels.packed.quantized import GGUFBlocks, IntWeight
from refllm.kernels.packed.reference import GGUF_BLOCK, row_blocks
from refllm.kernels.packed.sparse import Sparse24, SparseBitmask

FEW_TOKENS = 8  # up to here reading codes once per token beats decoding them once for BLAS
BLOCK_ELEMENTS = 1 << 18  # 1 MB of float32


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
    if isinstance(weight, IntWeight) and len(x) <= FEW_TOKENS and blocking(weight):
        return int_matmul(x, weight, integers=False)
    y = np.empty((len(x), weight.shape[0]), np.float32)
    for block, rows in decoded(weight):
        np.matmul(x, rows.T, out=y[:, block])
    return y


def matmul_int8(x: np.ndarray, weight) -> np.ndarray:
    """reference.matmul_int8 for float32 x. Beyond a few tokens the rounded activations are multiplied as floats."""
    if isinstance(weight, IntWeight) and len(x) <= 2 * FEW_TOKENS and blocking(weight):
        return int_matmul(x, weight, integers=True)
    codes, scale = quantize_activations(x, GGUF_BLOCK if isinstance(weight, GGUFBlocks) else 0)
    return matmul_float(dequantize_activations(codes, scale), weight)
