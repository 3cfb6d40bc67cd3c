"""Threads over rows of the weight: outputs are divided, sums never, so results do not depend on the number of threads.

The kernels release the interpreter lock, so a plain thread pool is enough and no threading layer of Numba is needed.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

MINIMUM_WORK = 1 << 21  # weights per thread below which a hand-over (about 50 us) costs more than it saves
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def thread_count() -> int:
    """Threads to use: REFLLM_THREADS, else NUMBA_NUM_THREADS, else every processor this process may run on."""
    for name in ("REFLLM_THREADS", "NUMBA_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value:
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
            return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_rows(run: Callable[[int, int], object], rows: int, work: int) -> None:
    """Call run(first, last) on slices that together cover range(rows).

    Parameters
    ----------
    run : callable
        Must write only to outputs of its own rows.
    rows : int
    work : int
        Weights times tokens, which decides whether threads pay.
    """
    worth = min(rows, work // MINIMUM_WORK)
    threads = min(worth, thread_count()) if worth > 1 else 1
    if threads <= 1:
        run(0, rows)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    helpers = [pool(threads - 1).submit(run, bounds[i], bounds[i + 1]) for i in range(1, threads)]
    run(bounds[0], bounds[1])
    for helper in helpers:
        helper.result()


def pool(size: int) -> ThreadPoolExecutor:
    """One pool per process (a fork has none of its parent's threads) and size."""
    key = os.getpid(), size
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(size, thread_name_prefix="refllm")
    return _pools[key]
