"""Weights -> GGUF blocks, with compiled searches on several threads.

Most of an encoder is a few vector operations; the time goes into its searches for scales. `encode_gguf` hands the
encoders of refllm.formats.blocks compiled twins of scale_search, and gives every thread blocks of its own: the same
bytes, sooner. With REFLLM_KERNELS=numpy it is BlockFormat.encode.
"""

from functools import cache

import numpy as np

from refllm.formats.blocks import BLOCKS, scale_search
from refllm.kernels.packed.threads import over_rows

SEARCH_WORK = 32  # a number is touched at least so many times: tells threads when they pay


def encode_gguf(name: str, W: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Encode rows as GGUF blocks.

    Parameters
    ----------
    name : str
        A name of refllm.formats.blocks: Q4_0, Q4_K ...
    W : (..., in) float
    importance : (in,) or (..., in) float, optional
        See BlockFormat.encode.

    Returns
    -------
    (..., in / block_size * bytes_per_block) uint8
        What BlockFormat.encode returns, byte for byte.

    Raises
    ------
    ValueError
        An unknown name, or what BlockFormat.encode refuses.

    Examples
    --------
    >>> encode_gguf("Q8_0", np.full((1, 32), 127, np.float32))[0, :4].tolist()
    [0, 60, 127, 127]
    """
    if name not in BLOCKS:
        raise ValueError(f"unknown GGUF block type {name!r}; known: {', '.join(BLOCKS)}")
    from refllm.kernels.packed import backend

    form = BLOCKS[name]
    if backend() == "numpy" or not form.takes_importance:
        return form.encode(W, importance)
    blocks, weights = form.prepare(W, importance)
    out = np.empty((len(blocks), form.bytes_per_block), np.uint8)

    def run(first, last):
        part = slice(first, last)
        form.encode_blocks(blocks[part], None if weights is None else weights[part], out[part], CompiledSearch)

    over_rows(run, len(blocks), SEARCH_WORK * blocks.size)
    return form.finish(out, np.shape(W))


@cache
def _kernel(name: str):
    from refllm.kernels.packed import encode_kernels
    from refllm.kernels.packed.compile import compile_kernel

    return compile_kernel(getattr(encode_kernels, name), encode_kernels.SIGNATURES[name])


def _rows(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


class CompiledSearch:
    """The functions of scale_search that encoders call, compiled."""

    @staticmethod
    def make_qx(x, nmax, weights):
        """See scale_search.make_qx."""
        scales, codes = np.empty(len(x), np.float32), np.empty(x.shape, np.int32)
        _kernel("make_qx")(_rows(x), nmax, _rows(weights), scales, codes)
        return scales, codes

    @staticmethod
    def make_q3(x, nmax):
        """See scale_search.make_q3."""
        scales, codes = np.empty(len(x), np.float32), np.empty(x.shape, np.int32)
        _kernel("make_q3")(_rows(x), nmax, scales, codes)
        return scales, codes

    @staticmethod
    def make_qkx(x, nmax, weights, rmin, rdelta, nstep, absolute=False):
        """See scale_search.make_qkx."""
        scales, minima, codes = np.empty(len(x), np.float32), np.empty(len(x), np.float32), np.empty(x.shape, np.int32)
        _kernel("make_qkx")(_rows(x), nmax, _rows(weights), rmin, rdelta, nstep, absolute, scales, minima, codes)
        return scales, minima, codes

    @staticmethod
    def make_qp(x, nmax, weights):
        """See scale_search.make_qp."""
        scales, codes = np.empty(len(x), np.float32), np.empty(x.shape, np.int32)
        _kernel("make_qp")(_rows(x), nmax, _rows(weights), scales, codes)
        return scales, codes

    @staticmethod
    def fit_levels(x, levels, weights, tries):
        """See scale_search.fit_levels."""
        scales = np.empty(len(x), np.float32)
        of_half = scale_search.levels_of_half_steps(levels)
        _kernel("fit_levels")(_rows(x), of_half, levels[0], _rows(weights), tries, scales)
        return scales
