"""What the memory of this machine delivers: the roof over every product that reads its weights once.

A kernel adds up integers. Their sum may be taken in any order, so the compiler keeps several partial sums in vector
registers (a sum of floats in its written order would wait for every addition and read a few GB/s). The array is written
before it is read, with numbers that all differ: pages that nobody has touched are all the same page of zeros, a host
may merge pages that are equal, and reading one page again and again measures a cache.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np

from refllm.evaluate.bench.rounds import Candidate, take_turns

READ_BYTES = 1 << 29  # far more than a cache holds
NAME = "read"


def sum_words(words):
    """Add up, which has to read. Text for Numba."""
    total = np.uint64(0)
    for i in range(words.size):
        total += words[i]
    return total


@cache
def _kernel() -> Callable:
    from numba import uint64

    from refllm.kernels.packed.compile import compile_kernel

    return compile_kernel(sum_words, uint64(uint64[::1]))


def read_candidate(threads: int, nbytes: int = READ_BYTES, name: str = NAME) -> Candidate:
    """A turn reads `nbytes` bytes, each once, with so many threads.

    Parameters
    ----------
    threads : int
    nbytes : int
        A multiple of 8.
    name : str
    """
    words = np.arange(nbytes // 8, dtype=np.uint64)
    return Candidate(name, _reader(words, threads))


def _reader(words: np.ndarray, threads: int) -> Callable[[], int]:
    bounds = [len(words) * i // threads for i in range(threads + 1)]
    parts = [words[first:last] for first, last in pairwise(bounds)]
    pool, kernel = ThreadPoolExecutor(threads), _kernel()
    return lambda: sum(map(int, pool.map(kernel, parts)))


def measure_bandwidth(
    threads: int, rounds: int = 9, read_bytes: int = READ_BYTES, on_round: Callable[[int, int], None] | None = None
) -> dict:
    """Read bandwidth at 1, 2 ... `threads` threads, in turns over one array.

    Returns
    -------
    dict
        rows (threads, gbytes_per_s by the median, lower and upper quartile) and other_work.
    """
    words = np.arange(read_bytes // 8, dtype=np.uint64)
    candidates = [Candidate(str(n), _reader(words, n)) for n in range(1, threads + 1)]
    found = take_turns(candidates, rounds, on_round=on_round)
    rate = lambda seconds: words.nbytes / seconds / 1e9
    rows = [
        {
            "threads": int(name),
            "gbytes_per_s": rate(timing.median),
            "lower": rate(timing.upper),
            "upper": rate(timing.lower),
        }
        for name, timing in found.timings.items()
    ]
    return {"rows": rows, "other_work": found.other_work}
