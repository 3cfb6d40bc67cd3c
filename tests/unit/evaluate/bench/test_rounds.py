"""Turns are taken in order and timed one by one; other work is what this process did not do."""

import time

import pytest

from refllm.evaluate.bench import rounds
from refllm.evaluate.bench.rounds import Candidate, OtherWork, Rounds, Timing, busy_seconds, settle, take_turns


def test_turns_alternate_and_warmups_do_not_count():
    order, shown = [], []
    say = lambda text: lambda: order.append(text)
    candidates = [Candidate(name, say(name), units=2, before=say(f"({name}")) for name in "ab"]
    found = take_turns(candidates, 3, warmups=2, pause=0, on_round=lambda done, total: shown.append((done, total)))
    assert order == ["(a", "a", "(b", "b"] * 5
    assert shown == [(i, 5) for i in range(5)]
    assert {name: len(times) for name, times in found.seconds.items()} == {"a": 3, "b": 3}


def test_times_are_per_unit_and_leave_out_what_comes_before():
    slow = Candidate("slow", lambda: time.sleep(0.02), units=4, before=lambda: time.sleep(0.05))
    found = take_turns([slow], 3, warmups=0, pause=0).timings["slow"]
    assert 0.005 <= found.lower <= found.median <= found.upper
    assert found.lower < 0.05 / 4  # neither `before` nor all four units


def test_quartiles_and_ratios():
    timing = Timing.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert timing == Timing(2.0, 3.0, 4.0)
    assert Rounds({"a": timing, "b": Timing(6.0, 6.0, 6.0)}).ratio("a", "b") == 2.0


def test_two_candidates_of_one_name():
    with pytest.raises(ValueError, match="two candidates have one name: a, a"):
        take_turns([Candidate("a", int), Candidate("a", int)], 1)


def test_a_turn_waits_until_this_process_is_idle(monkeypatch):
    clock = iter([0.0, 0.009, 0.009, 0.018, 0.018, 0.0181])  # two pauses in which some thread works, then none
    slept = []
    monkeypatch.setattr(rounds.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(rounds.time, "sleep", slept.append)
    settle(0.01)
    assert slept == [0.01] * 3


def test_busy_seconds_reads_what_linux_writes(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 1000 50 10 10 30 0 0\ncpu0 1 2 3\n", encoding="ascii")
    busy = busy_seconds(str(stat))
    if busy is None:
        pytest.skip("this system does not tell the length of a tick")
    assert busy == pytest.approx(250 / 100, rel=9)  # 250 ticks, mostly of 10 ms
    stat.write_text("nonsense\n", encoding="ascii")
    assert busy_seconds(str(stat)) is None
    assert busy_seconds(str(tmp_path / "none")) is None


def test_other_work_is_not_this_process(monkeypatch):
    seconds = {"busy": 100.0, "own": 10.0, "now": 0.0}
    monkeypatch.setattr(rounds, "busy_seconds", lambda: seconds["busy"])
    monkeypatch.setattr(rounds.time, "process_time", lambda: seconds["own"])
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: seconds["now"])
    monkeypatch.setattr(rounds.os, "cpu_count", lambda: 4)
    work = OtherWork()
    seconds.update(busy=118.0, own=16.0, now=10.0)  # 18 s of processors in 10 s, 6 of them ours
    assert work.share() == pytest.approx(12 / 40)
    monkeypatch.setattr(rounds, "busy_seconds", lambda: None)
    assert OtherWork().share() is None
