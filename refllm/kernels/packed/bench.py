"""How fast the packed products are, always as a ratio to NumPy's float32 product measured in the same run.

The candidates take turns, round after round, so that other work on the machine hurts all alike. Medians are compared,
and the fastest rounds too: on a machine with more work than processors a median also counts the time a product was
suspended. All weights of a run are read in every round, so that none stays in an inner cache that is smaller than
their sum.
"""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from refllm.formats import blocks
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import matmul
from refllm.kernels.packed.records import GGUFBlocks, IntWeight

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
    median, fastest : float
        Seconds.
    ratio, fastest_ratio : float
        NumPy's float32 median by this median; its fastest round by this fastest round.
    """

    name: str
    nbytes: int
    median: float
    fastest: float
    ratio: float
    fastest_ratio: float


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
    if not getattr(getattr(blocks, kind, None), "encode_blocks", None):
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)} and the GGUF types that can be written")
    return GGUFBlocks(getattr(blocks, kind).encode(W), kind, W.shape[1])


def gemv_ratios(
    shape: tuple[int, int] = (4096, 4096), *, kinds: tuple[str, ...] = DEFAULT, tokens: int = 1, rounds: int = 21
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
    seconds = {name: [] for name in runs}
    for counted in range(rounds + 1):
        for name, (weight, activations) in runs.items():
            start = perf_counter()
            matmul(x, weight, activations)
            if counted:
                seconds[name].append(perf_counter() - start)
    base, base_fastest = float(np.median(seconds["numpy-float32"])), min(seconds["numpy-float32"])
    timings = []
    for name, times in seconds.items():
        median, fastest = float(np.median(times)), min(times)
        timings.append(Timing(name, runs[name][0].nbytes, median, fastest, base / median, base_fastest / fastest))
    return timings


def table(timings: list[Timing]) -> str:
    """The timings as text."""
    lines = [f"{'product':<16}{'MB':>7}{'median us':>11}{'fastest us':>12}{'x NumPy':>9}{'fastest x':>11}"]
    for t in timings:
        lines.append(
            f"{t.name:<16}{t.nbytes / 1e6:>7.1f}{t.median * 1e6:>11.0f}{t.fastest * 1e6:>12.0f}"
            f"{t.ratio:>9.2f}{t.fastest_ratio:>11.2f}"
        )
    return "\n".join(lines)
