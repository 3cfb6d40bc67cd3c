"""Taking turns: how everything here is timed.

Candidates run one after the other, round after round, always in the same order, so that other work on the machine
hurts all alike. A turn is several products over different weights, or many tokens: some milliseconds at least. Decoding
a model reads every weight once a token, so no weight may be met in a cache here either: every candidate has copies of
its weights and a turn goes through all of them; all candidates together have `SPREAD` bytes or more.

A turn begins when this process is idle: the threads of a program that has had its turn spin for a while, waiting for
more work (refllm's 2 ms, ggml's 10, ONNX Runtime's 40, OpenBLAS's 60 and more), and would take a processor from the
next. The first products after a pause take up to a quarter longer than those that follow, whoever makes them. Decoding
never pauses, so single products are timed with a running start: a turn that is not timed goes right before.

Medians are compared. The quartiles beside them say how far to trust them, and `other_work` why not.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

# Bytes. A turn reads its share twice, so that must be more than a cache holds: of twenty candidates, 100 MB.
SPREAD = 1 << 31
PAUSE, LONGEST_PAUSE = 0.01, 0.5  # seconds
BUSY = 0.2  # share of all processors that other work may take before a measurement is called noisy


@dataclass(frozen=True)
class Candidate:
    """Something that takes turns.

    Parameters
    ----------
    name : str
        Unique in its round.
    turn : callable
        One turn; timed.
    units : int
        How many products, tokens ... a turn makes: times are given per unit.
    before : callable, optional
        Run before each turn, not timed.
    """

    name: str
    turn: Callable[[], object]
    units: int = 1
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds per unit; a quarter, half and three quarters of the rounds took less."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Summarise the rounds."""
        return cls(*(float(q) for q in np.quantile(seconds, (0.25, 0.5, 0.75))))


@dataclass(frozen=True)
class Rounds:
    """What the turns took.

    Parameters
    ----------
    timings : dict
        Candidate's name to Timing.
    other_work : float or None
        Share of all processors that other programs (and other guests of the same host) took meanwhile; None where the
        system does not tell.
    """

    timings: dict[str, Timing]
    other_work: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def ratio(self, name: str, to: str) -> float:
        """How many times as fast `name` is as `to`, by medians."""
        return self.timings[to].median / self.timings[name].median


def take_turns(
    candidates: Sequence[Candidate],
    rounds: int,
    *,
    warmups: int = 1,
    pause: float = PAUSE,
    running_start: bool = False,
    on_round: Callable[[int, int], None] | None = None,
) -> Rounds:
    """Time the candidates, interleaved.

    Parameters
    ----------
    candidates : sequence of Candidate
    rounds : int
        Counted turns of each.
    warmups : int
        Rounds before them that are not counted: kernels are compiled, pages touched, threads started.
    pause : float
        Seconds that this process must have been idle for before a turn; 0 does not wait.
    running_start : bool
        Whether each turn directly follows one of the same candidate that is not timed.
    on_round : callable, optional
        Called as on_round(done, all) before each round.

    Examples
    --------
    >>> found = take_turns([Candidate("a", lambda: None), Candidate("b", lambda: None)], rounds=3, pause=0)
    >>> list(found.timings), len(found.seconds["a"])
    (['a', 'b'], 3)
    """
    seconds = {candidate.name: [] for candidate in candidates}
    if len(seconds) < len(candidates):
        raise ValueError(f"two candidates have one name: {', '.join(c.name for c in candidates)}")
    busy = OtherWork()
    for number in range(warmups + rounds):
        if number == warmups:
            busy = OtherWork()
        if on_round is not None:
            on_round(number, warmups + rounds)
        for candidate in candidates:
            if candidate.before is not None:
                candidate.before()
            settle(pause)
            if running_start:
                candidate.turn()
            start = time.perf_counter()
            candidate.turn()
            took = time.perf_counter() - start
            if number >= warmups:
                seconds[candidate.name].append(took / candidate.units)
    return Rounds({name: Timing.of(times) for name, times in seconds.items()}, busy.share(), seconds)


def settle(pause: float) -> None:
    """Wait until no thread of this process has worked for so many seconds, half a second at most."""
    end = time.perf_counter() + LONGEST_PAUSE
    while pause:
        before = time.process_time()
        time.sleep(pause)
        if time.process_time() - before < 0.2 * pause or time.perf_counter() > end:
            return


class OtherWork:
    """How much of the processors other programs take, from the moment this object is made (Linux)."""

    def __init__(self):
        self._busy, self._own, self._begin = busy_seconds(), time.process_time(), time.perf_counter()

    def share(self) -> float | None:
        """Of all processors, 0 to 1, so far."""
        busy = busy_seconds()
        elapsed = time.perf_counter() - self._begin
        if busy is None or self._busy is None or elapsed <= 0:
            return None
        other = (busy - self._busy) - (time.process_time() - self._own)
        return min(1.0, max(0.0, other / elapsed / (os.cpu_count() or 1)))


@contextmanager
def busy_processors(count: int) -> Iterator[None]:
    """Keep so many processors busy with processes that count, to see what a program does that has to share."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}:\n    for i in range(10**6): pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def busy_seconds(path: str = "/proc/stat") -> float | None:
    """Processor time spent by anybody since the start of the machine, the host's other guests included."""
    try:
        with open(path, encoding="ascii") as file:
            ticks = [int(number) for number in file.readline().split()[1:9]]
        idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
