"""Thread counts from the environment, and rows covered once each."""

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
def test_every_row_once(monkeypatch, count, rows):
    monkeypatch.setenv("REFLLM_THREADS", count)
    hits = np.zeros(rows, int)

    def run(first, last):
        hits[first:last] += 1

    threads.over_rows(run, rows, work=1 << 30)
    assert (hits == 1).all()


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
