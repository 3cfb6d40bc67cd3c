"""Every row of a job is done once, whoever helps, comes late or does not come."""

import ctypes
import os
import threading
import time

import numpy as np
import pytest
from numba import carray, cfunc, types

from refllm.kernels.packed import standing
from refllm.kernels.packed.threads import SLICES


@cfunc(types.void(types.CPointer(types.int64), *[types.intp] * 8))
def add_to_rows(address, add, a, b, total, same, length, first, last):
    """Adds to rows first .. last - 1; something else if arguments of two jobs meet."""
    rows = carray(address, length)
    for i in range(first, last):
        rows[i] += add if a + b == total and same == add else 1_000_000


def job(rows: np.ndarray, add: int, threads: int, together: int = 1) -> tuple:
    units = -(-len(rows) // together)
    arguments = rows.ctypes.data, add, add, 7, add + 7, add, len(rows)
    return add_to_rows.address, arguments, len(rows), (min(units, SLICES * threads), units, together)


def mark(rows: np.ndarray, add: int, threads: int, together: int = 1) -> bool:
    return standing.run_job(*job(rows, add, threads, together), threads)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_jobs_one_after_another_do_every_row_once(threads):
    rng = np.random.default_rng(threads)
    for add in range(1, 400):
        rows = np.zeros(rng.integers(1, 200), np.int64)
        assert mark(rows, add, threads, together=int(rng.integers(1, 4)))
        assert (rows == add).all()
        if add % 100 == 0:
            time.sleep(0.02)  # helpers lie down and are called again


def test_a_helper_takes_part():
    seen = set()

    def slowly(*arguments):
        seen.add(threading.get_ident())
        time.sleep(0.01)

    function = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 9)(slowly)
    standing.run_job(ctypes.cast(function, ctypes.c_void_p).value, (0,) * 7, 16, (16, 16, 1), 2)
    assert threading.get_ident() in seen and len(seen) == 2


def test_no_job_misses_a_helper_that_is_about_to_lie_down():
    alone = []

    def slowly(*arguments):
        seen.add(threading.get_ident())
        time.sleep(0.001)

    function = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 9)(slowly)
    address = ctypes.cast(function, ctypes.c_void_p).value
    for pause in np.linspace(0, 0.001, 200):  # a helper looks out for some 200 us
        seen = set()
        standing.run_job(address, (0,) * 7, 8, (8, 8, 1), 2)
        alone.append(len(seen) < 2)
        end = time.perf_counter() + pause
        while time.perf_counter() < end:
            pass
    assert sum(alone) < 20  # none; on a busy machine a thread may be late


def test_an_owner_does_not_go_on_while_somebody_may_read_the_job():
    own, rows = standing._Job(1), np.zeros(20, np.int64)
    own.words[standing.INSIDE] = 1  # a helper that is just about to look whether the job is open
    owner = threading.Thread(target=own.run, args=job(rows, 1, 2))
    owner.start()
    owner.join(0.05)
    assert (rows == 1).all() and owner.is_alive() and own.words[standing.OPENED] % 2 == 0
    own.words[standing.INSIDE] = 0
    owner.join(60)
    assert not owner.is_alive()


def test_callers_of_several_threads_do_not_disturb_each_other():
    wrong, busy = [], []

    def work(add):
        for _ in range(200):
            rows = np.zeros(97, np.int64)
            if mark(rows, add, 3):
                wrong.extend(rows[rows != add])
            else:
                busy.append(add)
                wrong.extend(rows[rows != 0])

    callers = [threading.Thread(target=work, args=(add,)) for add in (1, 2, 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong and len(busy) < 600


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_helpers_of_its_own():
    mark(np.zeros(9, np.int64), 1, 2)
    child = os.fork()
    if child == 0:
        rows = np.zeros(50, np.int64)
        os._exit(0 if mark(rows, 3, 2) and (rows == 3).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
