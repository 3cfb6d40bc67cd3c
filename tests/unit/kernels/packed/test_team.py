"""A team meets at its barriers, however its members are delayed."""

import threading

import numpy as np
import pytest
from numba import njit, types

from refllm.kernels.packed import team


@njit(types.void(types.intp, types.intp, types.int64[:, ::1], types.intp, types.intp), nogil=True)
def relay(thread, threads, values, meeting, slow):
    """Row r + 1 takes from row r what a neighbour has written: wrong if a barrier lets anybody through early."""
    count = values.shape[1]
    first, last = team.share(count, thread, threads)
    for r in range(len(values) - 1):
        if thread == slow:
            for _ in range(100):
                values[0, 0] += 0  # time passes, nothing changes
        for i in range(first, last):
            values[r + 1, i] = values[r, (i + 1) % count] + 1
        team.barrier(meeting, threads)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_nobody_passes_before_all_have_come(threads):
    rounds, count = 300, 50
    for slow in range(threads):
        values = np.zeros((rounds + 1, count), np.int64)
        values[0] = np.arange(count)
        meeting = team.new_meeting()
        team.run_team(lambda t, n, v=values, m=meeting, s=slow: relay(t, n, v, m.ctypes.data, s), threads)
        assert np.array_equal(values[-1], (np.arange(count) + rounds) % count + rounds)


def test_shares_cover_everything_once():
    for count in (0, 1, 5, 16):
        for threads in (1, 2, 3, 8):
            parts = [team.share(count, thread, threads) for thread in range(threads)]
            assert [i for first, last in parts for i in range(first, last)] == list(range(count))


def test_two_teams_at_once_do_not_wait_for_each_other():
    done = []

    def work():
        values, meeting = np.zeros((200, 9), np.int64), team.new_meeting()
        team.run_team(lambda t, n: relay(t, n, values, meeting.ctypes.data, 0), 3)
        done.append(int(values[-1].min()))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert done == [199] * 4
