"""How fast the packed products are, always as a ratio to NumPy's float32 product measured in the same run.

The candidates take turns, round after round, so that other work on the machine hurts all alike. Decoding a model reads
every weight once a token, so no weight may be met in a cache here either: each has several copies, all of them together
are `SPREAD` bytes or more, and the rounds go through the copies in turn. Between two uses of one copy the others have
been read, which is more than the caches of today's processors hold. The same holds for NumPy's matrix: a benchmark that
leaves it in a large last-level cache, or leaves only the small packed one there, measures the cache.

Medians are compared, and the lower quartiles too: on a machine with more work than processors a median also counts the
time a product was suspended.
"""

from copy import deepcopy
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from refllm.formats import blocks
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import encode_gguf, matmul
from refllm.kernels.packed.records import GGUFBlocks, IntWeight

SPREAD = 1 << 30  # bytes; the largest last-level caches of single processors hold less
DEFAULT = ("w4", "w4-int8", "w8", "w8-int8")
KINDS = {
    "w4": SymmetricGrid(4, 128),
    "w4g32": SymmetricGrid(4, 32),
    "w4a": AffineGrid(4, 32),
    "w2a": AffineGrid(2, 64),
    "w8": SymmetricGrid(8, -1),
    "w8g128": SymmetricGrid(8, 128),
}


@dataclass(frozen=True)
class Timing:
    """One product.

    Parameters
    ----------
    name : str
    nbytes : int
        Of the weight.
    median, quartile : float
        Seconds; half and a quarter of the rounds took less.
    ratio, quartile_ratio : float
        NumPy's float32 median by this median; its lower quartile by this one.
    """

    name: str
    nbytes: int
    median: float
    quartile: float
    ratio: float
    quartile_ratio: float


def packed_weight(kind: str, W: np.ndarray) -> IntWeight | GGUFBlocks:
    """A weight in one of KINDS, or as GGUF blocks (Q4_0, Q8_0 ...).

    Parameters
    ----------
    kind : str
    W : (out, in) float32
    """
    if kind in KINDS:
        scale, zero_point = KINDS[kind].fit(W)
        return IntWeight.pack(KINDS[kind], KINDS[kind].encode(W, scale, zero_point), scale, zero_point)
    if kind not in blocks.BLOCKS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)} and the GGUF types")
    return GGUFBlocks(encode_gguf(kind, W), kind, W.shape[1])


def gemv_ratios(
    shape: tuple[int, int] = (4096, 4096),
    *,
    kinds: tuple[str, ...] = DEFAULT,
    tokens: int = 1,
    rounds: int = 21,
    spread: int = SPREAD,
) -> list[Timing]:
    """Time x W^T for float32 in NumPy and for packed weights, interleaved.

    Parameters
    ----------
    shape : (out, in)
    kinds : tuple of str
        Names of KINDS or GGUF types; the ending "-int8" means int8 activations.
    tokens : int
        Rows of x.
    rounds : int
        Every product is timed once a round, after one round that is not counted.
    spread : int
        Bytes that are read before a copy of a weight is used again; 0 = one copy of each, met where the round left it.

    Returns
    -------
    list of Timing
        NumPy's float32 first. Threads are those of BLAS and of REFLLM_THREADS; set both to 1 for one thread.
    """
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape, np.float32)
    x = rng.standard_normal((tokens, shape[1]), np.float32)
    runs = {"numpy-float32": (W, "float32")}
    for kind in kinds:
        name, _, activations = kind.partition("-")
        runs[kind] = packed_weight(name, W), activations or "float32"
    copies = -(-spread // sum(weight.nbytes for weight, _ in runs.values())) or 1
    turns = [runs] + [{name: (deepcopy(w), kind) for name, (w, kind) in runs.items()} for _ in range(copies - 1)]
    seconds = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (weight, activations) in turns[turn % copies].items():
            start = perf_counter()
            matmul(x, weight, activations)
            if turn:
                seconds[name].append(perf_counter() - start)
    quartile, median = ({name: float(np.quantile(t, q)) for name, t in seconds.items()} for q in (0.25, 0.5))
    base = "numpy-float32"
    return [
        Timing(
            name,
            weight.nbytes,
            median[name],
            quartile[name],
            median[base] / median[name],
            quartile[base] / quartile[name],
        )
        for name, (weight, _) in runs.items()
    ]


def table(timings: list[Timing]) -> str:
    """The timings as text."""
    lines = [f"{'product':<16}{'MB':>7}{'median us':>11}{'quartile us':>13}{'x NumPy':>9}{'quartile x':>12}"]
    for t in timings:
        lines.append(
            f"{t.name:<16}{t.nbytes / 1e6:>7.1f}{t.median * 1e6:>11.0f}{t.quartile * 1e6:>13.0f}"
            f"{t.ratio:>9.2f}{t.quartile_ratio:>12.2f}"
        )
    return "\n".join(lines)
