"""Helpers that stay at hand: threads that look for the next product before they lie down.

Waking a thread costs some 50 us, and so does waiting for the one that was woken: half of what a product with a vector
takes that two threads share. So who has helped looks out for `LOOKS` looks, inside compiled code and without the
interpreter lock, and takes part in a product that begins meanwhile at once. (Python between two products takes 200 us
where all that it touches comes from memory, since weights have gone through the caches.) Before it lies down it says so
and looks once more; the owner opens a job first and then counts who is awake. So one of the two notices the other, and
no job waits for a helper that has just left.

Whoever has a product opens a job and takes slices of it like everybody else; the job is done when all slices are,
whoever took them. A helper that comes late, or not at all, makes it slower and changes no result. Nobody may read a job
while the next is written: a helper says that it is inside, looks whether the job is still open, and leaves it alone
otherwise; the owner closes the job and waits until nobody is inside.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
from numba import types

from refllm.kernels.packed.compile import compile_kernel, jitable
from refllm.kernels.packed.team import SPINS, add_atomic, call, load_atomic, yield_address
from refllm.kernels.packed.threads import begin_on

LOOKS = SPINS + 4000  # some 2 ms: those beyond SPINS give the processor away
ARGUMENTS = 7  # of the function, before the first and the last row
# Places of words, those that several threads write in cache lines of their own; of a job: function, arguments, ...
OPENED, NEXT, DONE, INSIDE, AWAKE, YIELD = (8 * i for i in range(6))
HELPERS, JOB = YIELD + 1, YIELD + 2
SLICES, UNITS, TOGETHER, ROWS = (JOB + 1 + ARGUMENTS + i for i in range(4))
WORDS = ROWS + 1
_lock = threading.Lock()


@jitable
def _take_slices(words, at):
    """Slices of the open job, one after another, until none is left. words : (WORDS,) int64, at : their address."""
    slices, units, together, rows = words[SLICES], words[UNITS], words[TOGETHER], words[ROWS]
    while True:
        i = add_atomic(at + 8 * NEXT, 1)
        if i >= slices:
            return
        first, last = units * i // slices * together, min(units * (i + 1) // slices * together, rows)
        a = words[JOB + 1 :]
        call(words[JOB], (a[0], a[1], a[2], a[3], a[4], a[5], a[6], first, last))
        add_atomic(at + 8 * DONE, 1)


def open_job(words, at):
    """Open the job that stands in the words; returns how many helpers have to be woken. Arguments: `_take_slices`."""
    add_atomic(at + 8 * OPENED, 1)
    asleep = max(0, words[HELPERS] - load_atomic(at + 8 * AWAKE))
    add_atomic(at + 8 * AWAKE, asleep)
    return asleep


def own_job(words, at):
    """Take part in the open job until it is done, and close it. Arguments: `_take_slices`."""
    _take_slices(words, at)
    looks = 0
    while load_atomic(at + 8 * DONE) < words[SLICES]:
        looks += 1
        if looks > SPINS:
            call(words[YIELD], ())
    add_atomic(at + 8 * OPENED, 1)
    while load_atomic(at + 8 * INSIDE) > 0:
        looks += 1
        if looks > SPINS:
            call(words[YIELD], ())


def help_jobs(words, at):
    """Take part in every job that is opened (an odd number) until there is none for LOOKS looks; as `_take_slices`."""
    seen, looks = 0, 0
    while True:
        now = load_atomic(at + 8 * OPENED)
        if now % 2 == 1 and now != seen:
            if looks == LOOKS:
                add_atomic(at + 8 * AWAKE, 1)
            add_atomic(at + 8 * INSIDE, 1)
            if load_atomic(at + 8 * OPENED) == now:
                _take_slices(words, at)
            add_atomic(at + 8 * INSIDE, -1)
            seen, looks = now, 0
        elif looks == LOOKS:  # it was said already
            return
        else:
            looks += 1
            if looks > SPINS:
                call(words[YIELD], ())
            if looks == LOOKS:
                add_atomic(at + 8 * AWAKE, -1)


@cache
def _kernel(function, returns=types.void):
    return compile_kernel(function, returns(types.int64[::1], types.intp))


class _Job:
    """The words of the jobs of one process with so many helpers, and the threads that help."""

    def __init__(self, helpers: int):
        self.words = np.zeros(WORDS, np.int64)
        self.words[YIELD] = yield_address()
        self.address = self.words.ctypes.data
        self.threads = ThreadPoolExecutor(helpers, thread_name_prefix="refllm-standing")
        self.words[HELPERS] = helpers
        self.open = _kernel(open_job, types.intp)
        self.own, self.help = _kernel(own_job), partial(_kernel(help_jobs), self.words, self.address)

    def run(self, function: int, arguments: tuple, rows: int, parts: tuple) -> None:
        """As `run_job`."""
        self.words[NEXT] = self.words[DONE] = 0
        self.words[JOB:] = function, *arguments, *parts, rows
        for _ in range(self.open(self.words, self.address)):
            begin_on(self.threads, self.help)
        self.own(self.words, self.address)


@cache
def _job(process: int, helpers: int) -> _Job:
    """A process that was forked has none of its parent's threads, and a job of its own."""
    return _Job(helpers)


def run_job(function: int, arguments: tuple, rows: int, parts: tuple, threads: int) -> bool:
    """Call a C function on slices that together cover range(rows), on several threads.

    Parameters
    ----------
    function : int
        Address of a function (*arguments, first, last) of whole numbers that writes only to outputs of its own rows.
    arguments : tuple of int
        So many as ARGUMENTS.
    rows : int
    parts : tuple of int
        Slices, units and rows of a unit, as `threads.division` counts them.
    threads : int
        At least 2.

    Returns
    -------
    bool
        False if another thread of this process has a job just now: nothing is done then.
    """
    if not _lock.acquire(blocking=False):
        return False
    try:
        _job(os.getpid(), threads - 1).run(function, arguments, rows, parts)
    finally:
        _lock.release()
    return True
