"""Thread counts from the environment, and rows covered once each."""

import os
import threading

import numpy as np
import pytest

from refllm.kernels.packed import threads


def test_thread_count(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    monkeypatch.setenv("REFLLM_THREADS", "2")
    assert threads.thread_count() == 2
    monkeypatch.delenv("REFLLM_THREADS")
    assert threads.thread_count() == 3
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    assert threads.thread_count() >= 1
    for bad in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("REFLLM_THREADS", bad)
        with pytest.raises(ValueError, match="REFLLM_THREADS must be a positive whole number"):
            threads.thread_count()


@pytest.mark.parametrize("count", ["1", "2", "5"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("together", [1, 2])
def test_every_row_once(monkeypatch, count, rows, together):
    monkeypatch.setenv("REFLLM_THREADS", count)
    hits = np.zeros(rows, int)

    def run(first, last):
        assert first % together == 0 and first < last
        hits[first:last] += 1

    threads.over_rows(run, rows, 1 << 30, together)
    assert (hits == 1).all()


def test_a_late_thread_is_not_waited_for(monkeypatch):
    """The slices that it has not begun are taken by others."""
    monkeypatch.setenv("REFLLM_THREADS", "2")
    mine, slices, others = threading.get_ident(), [], threading.Event()

    def run(first, last):
        if threading.get_ident() == mine:
            slices.append(first)
            if len(slices) == 2 * threads.SLICES - 1:
                others.set()
        else:
            others.wait(10)

    threads.over_rows(run, 100, 1 << 30)
    assert len(slices) >= 2 * threads.SLICES - 1


@pytest.mark.skipif(threads.processor() is None, reason="the system does not tell the processor")
def test_a_thread_leaves_a_processor_and_may_come_back(monkeypatch):
    allowed = os.sched_getaffinity(0)
    number = min(allowed)
    try:
        os.sched_setaffinity(0, {number})
        assert threads.processor() == number
        threads.leave(number)  # nowhere to go
        assert threads.processor() == number and os.sched_getaffinity(0) == {number}
    finally:
        os.sched_setaffinity(0, allowed)
    threads.leave(number)
    threads.leave(None)
    assert os.sched_getaffinity(0) == allowed
    moved = []
    monkeypatch.setattr(threads, "processor", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda which: {3, 5, 6})
    monkeypatch.setattr(os, "sched_setaffinity", lambda which, where: moved.append(where))
    threads.leave(5)
    threads.leave(3)
    assert moved == [{5, 6}, {3, 5, 6}]


def test_small_products_stay_on_the_calling_thread(monkeypatch):
    monkeypatch.setenv("REFLLM_THREADS", "4")
    calls = []
    threads.over_rows(lambda first, last: calls.append((first, last)), 64, work=1000)
    assert calls == [(0, 64)]


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setenv("REFLLM_THREADS", "2")

    def run(first, last):
        if first:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        threads.over_rows(run, 10, work=1 << 30)
