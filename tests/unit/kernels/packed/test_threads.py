"""Thread counts from the environment, and rows covered once each."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

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
def test_a_thread_is_woken_on_another_processor_and_may_go_everywhere_then():
    allowed = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as workers:
        for _ in range(20):
            seen = threads.begin_on(workers, lambda: (threads.processor(), os.sched_getaffinity(0)))
            assert seen.result()[1] == allowed
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.skipif(threads.processor() is None, reason="the system does not tell the processor")
def test_who_may_be_woken_is_kept_off_the_callers_processor(monkeypatch):
    moved = []
    monkeypatch.setattr(threads, "processor", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda which: {3, 5, 6})
    monkeypatch.setattr(os, "sched_setaffinity", lambda which, where: moved.append((which, where)))
    with ThreadPoolExecutor(1) as workers:
        worker = threads.begin_on(workers, threading.get_native_id).result()
        assert moved == [(0, {5, 6}), (0, {3, 5, 6})]  # it was not known yet, and found itself beside the caller
        moved.clear()
        threads.begin_on(workers, threading.get_native_id).result()
        assert moved == [(worker, {5, 6}), (0, {5, 6}), (0, {3, 5, 6})]


@pytest.mark.skipif(threads.processor() is None, reason="the system does not tell the processor")
def test_who_comes_late_may_come_to_the_callers_processor_for_a_while(monkeypatch):
    kept = [0]
    monkeypatch.setattr(threads, "_keep_to", lambda thread, processors: kept.append(thread))
    monkeypatch.setattr(threads, "LATE", -1.0)
    monkeypatch.setattr(threads, "FREE", 2)
    with ThreadPoolExecutor(1) as workers:
        counts = []
        for _ in range(6):
            threads.begin_on(workers, int).result()
            counts.append(len(kept))
    # The thread is made; it comes late; it is let be twice; it comes late again.
    assert np.diff([1, *counts]).astype(bool).tolist() == [True, True, False, False, True, False]


@pytest.mark.skipif(threads.processor() is None, reason="the system does not tell the processor")
def test_one_processor_is_enough():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        with ThreadPoolExecutor(1) as workers:
            for _ in range(2):
                assert threads.begin_on(workers, lambda: os.sched_getaffinity(0)).result() == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)
