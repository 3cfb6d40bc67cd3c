"""bitsandbytes' dynamic 8-bit type, and the scales it stores: the double quantisation of NF4 and FP4.

Source: Dettmers 2015, arXiv:1511.04561; Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3; bitsandbytes 0.50,
functional.py.
"""

from functools import cache

import numpy as np

NESTED_BLOCK = 256


@cache
def dynamic_map() -> np.ndarray:
    """The 256 signed values of the dynamic 8-bit type, sorted, float32.

    A run of k zero bits is an exponent 10^-k; the bits after it are a linear fraction between 0.1 and 1, of which the
    middles of the intervals are taken. 0 and 1 are added. Source: Dettmers 2015, arXiv:1511.04561; bitsandbytes,
    create_dynamic_map.
    """
    values = [np.float32([0.0, 1.0])]
    for i in range(7):
        edges = _linspace(1 + (1 << i))
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive = np.float32(10.0 ** (i - 6)) * middles
        values += [positive, -positive]
    table = np.sort(np.concatenate(values))
    table.flags.writeable = False
    return table


def _linspace(n: int) -> np.ndarray:
    """0.1 .. 1 in n float32 steps, counted from the nearer end, product and sum rounded once, as torch does."""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(n - 1))
    k = np.arange(n)
    return np.where(k < n // 2, first + step * k, last - step * (n - 1 - k)).astype(np.float32)


def encode_absmax(absmax: np.ndarray, offset: float | None = None) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Double quantisation: scales -> dynamic 8-bit codes.

    Parameters
    ----------
    absmax : (blocks,) float32
    offset : float, optional
        Subtracted first; None: the mean, summed in float64.

    Returns
    -------
    codes : (blocks,) uint8
    nested_absmax : (ceil(blocks / 256),) float32
    offset : float32

    Notes
    -----
    The nearest value, the lower one of two: what bitsandbytes computes in PyTorch. Its compiled CPU code looks codes up
    in a coarse table instead, takes a code nearby in about 0.2% of cases, and gives a block of zeros the code 0.
    """
    absmax = np.asarray(absmax, np.float32)
    offset = np.float32(absmax.astype(np.float64).mean() if offset is None else offset)
    centred = absmax - offset
    blocks = -(-len(centred) // NESTED_BLOCK)
    full = np.zeros(blocks * NESTED_BLOCK, np.float32)
    full[: len(centred)] = centred
    full = full.reshape(blocks, NESTED_BLOCK)
    nested = np.abs(full).max(axis=1)
    inverse = np.float32(1) / np.maximum(nested, np.float32(1e-38))
    scaled = (full * inverse[:, None]).reshape(-1)[: len(centred)]
    table = dynamic_map()
    middles = (table[:-1] + table[1:]) / np.float32(2)
    return np.searchsorted(middles, scaled, side="left").astype(np.uint8), nested, offset
