"""Threads over rows of the weight: outputs are divided, sums never, so results do not depend on the number of threads.

The kernels release the interpreter lock, so a plain thread pool is enough and no threading layer of Numba is needed.
Products from tiles, which may take less time than waking a thread, share helpers that stay awake (standing.py).
"""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from time import perf_counter
from weakref import WeakKeyDictionary

MINIMUM_WORK = 1 << 21  # weights per thread below which a hand-over (about 50 us) costs more than it saves
SLICES = 8  # for each thread
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
# Threads of each pool, by the system's numbers.
_known: WeakKeyDictionary[ThreadPoolExecutor, set[int]] = WeakKeyDictionary()
LATE, FREE = 0.001, 100  # seconds after which who was woken comes late; tasks that then begin wherever the system likes
_free: WeakKeyDictionary[ThreadPoolExecutor, int] = WeakKeyDictionary()  # how many tasks of a pool still do


def thread_count() -> int:
    """Threads to use: REFLLM_THREADS, else NUMBA_NUM_THREADS, else every processor this process may run on."""
    for name in ("REFLLM_THREADS", "NUMBA_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value:
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
            return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_rows(run: Callable[[int, int], object], rows: int, work: int, together: int = 1) -> None:
    """Call run(first, last) on slices that together cover range(rows).

    There are several slices for each thread, and who is done takes the next: processors may differ in speed, have other
    work, or be late (a thread that is woken may share the processor of who woke it for some milliseconds).

    Parameters
    ----------
    run : callable
        Must write only to outputs of its own rows.
    rows : int
    work : int
        Weights times tokens, which decides whether threads pay.
    together : int
        Rows that are best done together: slices begin at multiples of it.
    """
    threads, units, slices = division(rows, work, together)
    if threads == 1:
        run(0, rows)
        return
    number = count()

    def take_slices():
        while (i := next(number)) < slices:  # atomic: a thread that counts holds the interpreter lock
            run(units * i // slices * together, min(units * (i + 1) // slices * together, rows))

    helpers = begin([take_slices] * (threads - 1))
    take_slices()
    for helper in helpers:
        helper.result()


def division(rows: int, work: int, together: int = 1) -> tuple[int, int, int]:
    """How `over_rows` divides: threads, units of `together` rows, and slices of units."""
    units, worth = -(-rows // together), work // MINIMUM_WORK
    threads = 1 if min(units, worth) < 2 else min(units, worth, thread_count())
    return threads, units, 1 if threads == 1 else min(units, worth, SLICES * threads)


def begin(tasks: Sequence[Callable[[], object]]) -> list[Future]:
    """Begin tasks, each on a thread of its own beside the calling one, which does not wait."""
    return [begin_on(pool(len(tasks)), task) for task in tasks]


def begin_on(threads: ThreadPoolExecutor, task: Callable[[], object]) -> Future:
    """Begin a task on one of these threads, beside the calling one.

    Linux may wake a thread where the one runs that woke it, and leave both there for many milliseconds while another
    processor has nothing to do. So nobody who may be woken is let onto this processor until he runs. Where that makes
    him late the others are busy with other programs, and half of this one is better: for a while he may come here.
    """
    here, known, free = processor(), _known.setdefault(threads, set()), _free.get(threads, 0)
    if here is None or free:
        _free[threads] = max(0, free - 1)
        return threads.submit(task)
    begun = perf_counter()
    allowed = os.sched_getaffinity(0)  # of this thread
    for thread in tuple(known):
        _keep_to(thread, allowed - {here})

    def elsewhere():
        if perf_counter() - begun > LATE and threading.get_native_id() in known:  # a thread that is made takes longer
            _free[threads] = FREE
        known.add(threading.get_native_id())
        if processor() == here:  # the first time
            _keep_to(0, allowed - {here})
        _keep_to(0, allowed)
        return task()

    return threads.submit(elsewhere)


def _keep_to(thread: int, processors: set[int]) -> None:
    """Let a thread (0: the calling one) run on these processors only, if there are any and the system lets us."""
    if processors:
        with suppress(OSError):
            os.sched_setaffinity(thread, processors)


def processor() -> int | None:
    """The number of the processor that the calling thread runs on; None where the system does not tell."""
    return None if _which is None else _which()


def _find_which():
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


_which = _find_which()


def pool(size: int) -> ThreadPoolExecutor:
    """One pool per process (a fork has none of its parent's threads) and size."""
    key = os.getpid(), size
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(size, thread_name_prefix="refllm")
    return _pools[key]
