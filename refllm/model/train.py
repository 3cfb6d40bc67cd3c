"""The training engine: one loop for everything that is trained, on one process or on several.

`train` takes a loss function of named parameters, a function that makes batches, an `Optimizer` and a `Schedule`. With
`processes > 1` the workers are data parallel: each takes its part of every batch, and values, optimizer state and
gradients live in shared memory. A step is

    every worker     gradient of its part                                          -> its row of `gradients`
    (all wait)
    owner of tensor  adds the rows in order of rank, divides by their number       -> squared norm of the tensor
    (all wait)
    owner of tensor  clips by the norm over all tensors, updates the tensor in place
    (all wait)

so every sum has a fixed order: the same recipe and the same number of processes give the same bits, interrupted or not.
Elementwise work dominates in NumPy, so two workers with one BLAS thread each are faster than one worker with two.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from threading import BrokenBarrierError

import numpy as np

from refllm.formats.errors import FormatError
from refllm.formats.tensors import read_safetensors, write_safetensors
from refllm.kernels import autograd
from refllm.kernels.optimizers import Optimizer, Schedule, adamw_update, muon_update

_SPAWN = multiprocessing.get_context("spawn")  # the same on every platform, and no copied BLAS threads


def train(
    weights: Mapping[str, np.ndarray],
    loss: Callable,
    batch: Callable,
    *,
    optimizer: Optimizer,
    schedule: Schedule,
    processes: int = 1,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 200,
    history: Callable[[int], str] | None = None,
    report: Callable | None = None,
    report_every: int = 20,
) -> dict[str, np.ndarray]:
    """Minimise a loss.

    Parameters
    ----------
    weights : mapping of name to float array, all of one dtype
        Start values; not changed.
    loss : callable
        `loss(params, part) -> scalar Tensor`, the mean over the part; params maps names to Tensors. Must be picklable
        when processes > 1 (a module's function or dataclass, not a lambda).
    batch : callable
        `batch(step, part, parts) -> anything`: part number `part` of `parts` equal ones of the step's batch. Must
        depend on its arguments only; then a resumed run sees what an uninterrupted one would have seen.
    optimizer, schedule : Optimizer, Schedule
    processes : int
        Workers; 1 = in this process.
    checkpoint : path, optional
        Written every `checkpoint_every` steps and at the end; if it exists, training continues from it.
    history : callable, optional
        `history(step)` describes everything steps 0..step-1 depended on; stored in the checkpoint. Resuming with
        another past is refused, another future (more steps, a later decay) is fine.
    report : callable, optional
        `report(step, losses, weights)` after every `report_every` steps: losses of those steps, current weights
        (read-only views).

    Returns
    -------
    dict of name to array

    Raises
    ------
    ValueError
        If a loss is not finite, or the checkpoint belongs to another training.
    RuntimeError
        If a worker process fails.
    """
    layout = _Layout.of(weights)
    memory = _Memory(layout, processes)
    for name, view in layout.views(memory.values).items():
        view[...] = weights[name]
    step = 0
    if checkpoint is not None and Path(checkpoint).exists():
        step = _read_checkpoint(checkpoint, layout, memory, history)
    crew = _Crew(memory, layout, loss, batch, optimizer, schedule)
    try:
        progress = _Progress(step, schedule.steps)
        while step < schedule.steps:
            stop = min(schedule.steps, step + report_every - step % report_every)
            losses = crew.run(step, stop)
            if not np.isfinite(losses).all():
                raise ValueError(
                    f"the loss is not finite at step {step + int(np.argmin(np.isfinite(losses)))}; lower the rate"
                )
            due = stop // checkpoint_every > step // checkpoint_every or stop == schedule.steps
            step = stop
            if checkpoint is not None and due:
                _write_checkpoint(checkpoint, step, layout, memory, history)
            progress.show(step, losses)
            if report is not None:
                report(step, losses, layout.views(memory.values, writeable=False))
    finally:
        crew.close()
    return {name: view.copy() for name, view in layout.views(memory.values).items()}


class _Progress:
    """One line on stderr that is written over; silent when stderr is not a terminal."""

    def __init__(self, start: int, steps: int):
        self.start, self.steps, self.since = start, steps, time.monotonic()

    def show(self, step: int, losses: list[float]) -> None:
        """Write the line anew: steps done, mean loss of the last ones, minutes left."""
        if sys.stderr.isatty():
            left = (time.monotonic() - self.since) / (step - self.start) * (self.steps - step)
            end = "\n" if step == self.steps else ""
            line = f"\rstep {step}/{self.steps}  loss {np.mean(losses):.4f}  {left / 60:.0f} min left "
            print(line, end=end, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Layout:
    """Where each tensor lies in a flat buffer: (name, offset, shape), in the order of the weights."""

    entries: tuple[tuple[str, int, tuple[int, ...]], ...]
    dtype: str

    @classmethod
    def of(cls, weights: Mapping[str, np.ndarray]) -> _Layout:
        """The layout of a mapping of name to array. Raises ValueError if their dtypes differ."""
        kinds = {w.dtype for w in weights.values()}
        if len(kinds) != 1:
            raise ValueError(f"weights to train must have one dtype, got {sorted(str(kind) for kind in kinds)}")
        entries, offset = [], 0
        for name, weight in weights.items():
            entries.append((name, offset, weight.shape))
            offset += weight.size
        return cls(tuple(entries), str(kinds.pop()))

    @property
    def size(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for _, _, shape in self.entries)

    def views(self, flat: np.ndarray, writeable: bool = True) -> dict[str, np.ndarray]:
        """Every tensor as a view of a flat buffer, by name."""
        views = {name: flat[at : at + math.prod(shape)].reshape(shape) for name, at, shape in self.entries}
        for view in views.values():
            view.flags.writeable = writeable
        return views


class _Memory:
    """Values, optimizer moments, one gradient row per worker, squared norms and losses, as views of one buffer.

    The buffer is shared between processes when there are several; it is freed with its last view.
    """

    def __init__(self, layout: _Layout, processes: int, buffer=None):
        item, size, tensors = np.dtype(layout.dtype).itemsize, layout.size, len(layout.entries)
        tail = -(-(3 + processes) * size * item // 8) * 8  # float64 numbers start at a multiple of 8 bytes
        if buffer is None:
            nbytes = tail + 8 * (tensors + processes)
            buffer = bytearray(nbytes) if processes == 1 else _SPAWN.RawArray("b", nbytes)  # both start as zeros
        self.processes, self.buffer = processes, buffer
        flat = np.frombuffer(buffer, layout.dtype, (3 + processes) * size).reshape(3 + processes, size)
        self.values, self.first, self.second, self.gradients = flat[0], flat[1], flat[2], flat[3:]
        doubles = np.frombuffer(buffer, np.float64, tensors + processes, offset=tail)
        self.squares, self.losses = doubles[:tensors], doubles[tensors:]


class _Alone:
    """The barrier of a single worker."""

    def wait(self) -> None:
        """Nobody to wait for."""


class _Worker:
    """One rank: runs steps on its part of each batch."""

    def __init__(self, rank: int, memory: _Memory, layout: _Layout, loss, batch, optimizer, schedule, barrier):
        self.rank, self.memory, self.layout = rank, memory, layout
        self.loss, self.batch, self.optimizer, self.schedule, self.barrier = loss, batch, optimizer, schedule, barrier
        self.owned = _share(layout, optimizer, memory.processes)[rank]

    def run(self, start: int, stop: int) -> list[float]:
        """Steps start..stop-1; the mean loss of each, over all parts."""
        losses = []
        for step in range(start, stop):
            self._differentiate(step)
            self.barrier.wait()
            losses.append(float(self.memory.losses.sum()) / self.memory.processes)
            self._reduce()
            self.barrier.wait()
            self._update(step)
            self.barrier.wait()
        return losses

    def _differentiate(self, step: int) -> None:
        memory = self.memory
        params = {name: autograd.parameter(view) for name, view in self.layout.views(memory.values).items()}
        loss = self.loss(params, self.batch(step, self.rank, memory.processes))
        memory.losses[self.rank] = loss.data
        loss.backward()
        for name, view in self.layout.views(memory.gradients[self.rank]).items():
            view[...] = 0 if params[name].grad is None else params[name].grad

    def _reduce(self) -> None:
        memory = self.memory
        for index in self.owned:
            _, at, shape = self.layout.entries[index]
            rows = memory.gradients[:, at : at + math.prod(shape)]
            for row in rows[1:]:
                rows[0] += row
            if len(rows) > 1:
                rows[0] /= len(rows)
            memory.squares[index] = np.dot(rows[0], rows[0])

    def _update(self, step: int) -> None:
        memory, optimizer = self.memory, self.optimizer
        norm = math.sqrt(float(memory.squares.sum()))
        shrink = 1.0 if optimizer.clip is None else min(1.0, optimizer.clip / (norm + 1e-12))
        factor = self.schedule.factor(step)
        for index in self.owned:
            name, at, shape = self.layout.entries[index]
            part = slice(at, at + math.prod(shape))
            value, gradient, first, second = (
                flat[part].reshape(shape) for flat in (memory.values, memory.gradients[0], memory.first, memory.second)
            )
            if shrink < 1:
                gradient *= shrink
            if optimizer.uses_muon(name, shape):
                muon_update(value, gradient, first, factor * optimizer.muon_rate, optimizer)
            else:
                adamw_update(value, gradient, first, second, step, factor * optimizer.rate_of(name), optimizer)


def _share(layout: _Layout, optimizer: Optimizer, processes: int) -> list[list[int]]:
    """Which tensors each rank updates: the most expensive first, each to the rank with the least to do so far."""

    def cost(entry) -> float:
        name, _, shape = entry
        return math.prod(shape) * (1 + min(shape) / 2 if optimizer.uses_muon(name, shape) else 10)

    owned: list[list[int]] = [[] for _ in range(processes)]
    load = [0.0] * processes
    for index in sorted(range(len(layout.entries)), key=lambda i: -cost(layout.entries[i])):
        rank = load.index(min(load))
        owned[rank].append(index)
        load[rank] += cost(layout.entries[index])
    return owned


class _Crew:
    """The workers: this process alone, or spawned ones that obey messages (start, stop)."""

    def __init__(self, memory: _Memory, layout: _Layout, loss, batch, optimizer, schedule):
        work = (layout, loss, batch, optimizer, schedule)
        self.pipes, self.workers = [], []
        if memory.processes == 1:
            self.alone = _Worker(0, memory, *work, _Alone())
            return
        self.alone = None
        barrier = self.barrier = _SPAWN.Barrier(memory.processes)  # kept: it dies with its last reference
        with _worker_environment():
            for rank in range(memory.processes):
                ours, theirs = _SPAWN.Pipe()
                arguments = (rank, memory.processes, memory.buffer, theirs, barrier, *work)
                worker = _SPAWN.Process(target=_serve, args=arguments, daemon=True)
                worker.start()
                theirs.close()
                self.pipes.append(ours)
                self.workers.append(worker)

    def run(self, start: int, stop: int) -> list[float]:
        """Steps start..stop-1 on all workers; the mean loss of each step."""
        if self.alone is not None:
            return self.alone.run(start, stop)
        answers = {}
        try:
            for pipe in self.pipes:
                pipe.send((start, stop))
            while len(answers) < len(self.pipes):
                waiting = [pipe for pipe in self.pipes if pipe not in answers]
                for pipe in connection.wait(waiting):
                    answers[pipe] = pipe.recv()
                    if isinstance(answers[pipe], str):
                        raise RuntimeError(f"a training process failed: {answers[pipe]}")
        except (EOFError, OSError):
            for worker in self.workers:
                worker.join(timeout=0.2)  # so that the exit code of the dead one is known
            codes = [worker.exitcode for worker in self.workers]
            raise RuntimeError(
                f"a training process died (exit codes {codes}); resume from the last checkpoint"
            ) from None
        return answers[self.pipes[0]]

    def close(self) -> None:
        """End the workers."""
        for pipe in self.pipes:
            pipe.close()  # a worker that waits for a message sees the end of the pipe and returns
        for worker in self.workers:
            worker.join(timeout=1)
            if worker.is_alive():
                worker.terminate()
                worker.join()


# Read by the libraries when a worker starts. One BLAS thread each; and glibc keeps freed arrays for the next step
# instead of handing their pages back to the kernel, which would cost a quarter of the time (other systems ignore it).
_WORKER_ENVIRONMENT = {
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
}


@contextmanager
def _worker_environment() -> Iterator[None]:
    """Processes started inside inherit the environment of a worker."""
    before = {name: os.environ.get(name) for name in _WORKER_ENVIRONMENT}
    os.environ.update(_WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(rank, processes, buffer, pipe, barrier, layout, loss, batch, optimizer, schedule) -> None:
    """Main function of a worker process."""
    memory = _Memory(layout, processes, buffer)
    worker = _Worker(rank, memory, layout, loss, batch, optimizer, schedule, barrier)
    try:
        while True:
            pipe.send(worker.run(*pipe.recv()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        barrier.abort()
    except BrokenBarrierError:
        pass  # another worker failed and has said so
    except Exception as error:
        barrier.abort()
        pipe.send(f"{type(error).__name__}: {error}")


def _write_checkpoint(path, step: int, layout: _Layout, memory: _Memory, history) -> None:
    state = {"values": memory.values, "first": memory.first, "second": memory.second}
    meta = {"step": str(step), "layout": json.dumps(asdict(layout)), "processes": str(memory.processes)}
    if history is not None:
        meta["history"] = history(step)
    write_safetensors(path, state, meta)


def _read_checkpoint(path, layout: _Layout, memory: _Memory, history) -> int:
    """Load the state into memory; returns the step to go on with."""
    tensors, meta = read_safetensors(path)
    if not {"step", "layout", "processes"} <= set(meta):
        raise FormatError("not a checkpoint of this training engine (no step, layout and processes)", path=path)
    step = int(meta["step"])
    if meta["layout"] != json.dumps(asdict(layout)):
        raise ValueError(f"{path} holds other parameters than this training; move it away to start from scratch")
    if int(meta["processes"]) != memory.processes:
        raise ValueError(
            f"{path} was written with {meta['processes']} processes, this run has {memory.processes}; "
            "the bits would differ, use the same number or move it away"
        )
    if history is not None and meta.get("history") != history(step):
        raise ValueError(f"{path}: its first {step} steps followed another recipe; move it away to start from scratch")
    for name in ("values", "first", "second"):
        getattr(memory, name)[...] = tensors[name].stored()
    return step
