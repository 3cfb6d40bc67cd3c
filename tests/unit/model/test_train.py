"""The training engine: the same bits after a resume and on every repetition, falling losses, workers that may fail."""

import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from refllm.formats.errors import FormatError
from refllm.formats.tensors import write_safetensors
from refllm.kernels import fused
from refllm.kernels.autograd import Tensor
from refllm.kernels.optimizers import Optimizer, Schedule
from refllm.model.differentiable import NextToken, initial_weights
from refllm.model.train import train
from tests.models import random_config

CONFIG = random_config("llama", tied_embeddings=True)


@dataclass(frozen=True)
class Cycle:
    """Rows that count upwards modulo 7 from a random start: learnable to zero loss."""

    rows: int = 4

    def __call__(self, step, part, parts):
        starts = np.random.default_rng(step).integers(0, 7, self.rows)
        mine = starts[self.rows * part // parts : self.rows * (part + 1) // parts]
        row = (mine[:, None] + np.arange(13)) % 7
        return row[:, :-1], row[:, 1:]


SETTINGS = dict(optimizer=Optimizer(rate=3e-3, muon_rate=0.02, decay=0.01), schedule=Schedule(steps=12, warmup=3))


def run(**kwargs):
    settings = SETTINGS | dict(checkpoint=None) | kwargs
    return train(initial_weights(CONFIG, 1), NextToken(CONFIG), Cycle(), **settings)


def same_bits(a, b):
    return all(np.array_equal(a[name].view(np.uint32), b[name].view(np.uint32)) for name in a)


def test_loss_falls_and_start_weights_are_untouched():
    start, seen = initial_weights(CONFIG, 1), []
    before = {name: w.copy() for name, w in start.items()}
    report = lambda step, losses, weights: seen.extend(losses)
    schedule = Schedule(steps=100, warmup=5)
    train(start, NextToken(CONFIG), Cycle(), optimizer=SETTINGS["optimizer"], schedule=schedule, report=report)
    assert len(seen) == 100 and abs(seen[0] - np.log(64)) < 0.5
    assert np.mean(seen[-5:]) < 0.3  # from ln 64 = 4.2; guessing among the 7 would be 1.9
    assert all(np.array_equal(start[name], before[name]) for name in start)


def test_any_loss_function_can_be_trained():
    """The loop knows nothing of models: least squares with plain AdamW finds the solution."""
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(40, 3)), np.array([[1.0, -2.0, 0.5]])

    def loss(params, batch):
        error = fused.linear(Tensor(x), params["w"]) - x @ true.T
        return (error * error).sum() / 40.0

    fit = train(
        {"w": np.zeros((1, 3)), "unused": np.ones(2)},
        loss,
        lambda *_: None,
        optimizer=Optimizer(rate=0.1, clip=None),
        schedule=Schedule(steps=200, warmup=1),
    )
    assert np.abs(fit["w"] - true).max() < 1e-3
    assert fit["unused"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("stop", [1, 7])
def test_resume_continues_bit_for_bit(tmp_path, stop):
    whole = run(report_every=5)
    path = tmp_path / "c.safetensors"

    class Stop(Exception):
        pass

    def interrupt(step, losses, weights):
        if step >= stop:
            raise Stop

    with pytest.raises(Stop):
        run(checkpoint=path, checkpoint_every=1, report=interrupt, report_every=stop)
    assert not same_bits(whole, run(schedule=Schedule(steps=11, warmup=3)))  # the comparison can fail
    seen = []
    resumed = run(checkpoint=path, report=lambda step, losses, weights: seen.append((step, len(losses))))
    assert seen == [(12, 12 - stop)]
    assert same_bits(whole, resumed)


def test_finished_training_returns_the_checkpoint(tmp_path):
    path = tmp_path / "c.safetensors"
    first = run(checkpoint=path)
    assert same_bits(first, run(checkpoint=path))


def test_another_past_is_refused_another_future_is_not(tmp_path):
    path = tmp_path / "c.safetensors"
    run(checkpoint=path, history=lambda step: f"a{step}")
    with pytest.raises(ValueError, match="followed another recipe"):
        run(checkpoint=path, history=lambda step: f"b{step}")
    run(checkpoint=path, history=lambda step: f"a{step}", schedule=Schedule(steps=14, warmup=3))


def test_wrong_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    write_safetensors(path, {"x": np.zeros(3, np.float32)})
    with pytest.raises(FormatError, match="not a checkpoint"):
        run(checkpoint=path)
    path.unlink()
    run(checkpoint=path)
    other = random_config("llama", tied_embeddings=True, num_layers=1)
    with pytest.raises(ValueError, match="other parameters"):
        train(initial_weights(other, 1), NextToken(other), Cycle(), **SETTINGS, checkpoint=path)
    with pytest.raises(ValueError, match="processes"):
        run(checkpoint=path, processes=2)


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    run(checkpoint=path, schedule=Schedule(steps=5, warmup=1))
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="space"):
        run(checkpoint=path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    path = tmp_path / "c.safetensors"
    weights = {"w": np.array([1.0])}

    def loss(params, step):
        return (params["w"] * (np.inf if step == 3 else 1.0)).sum()

    batch = lambda step, part, parts: step
    with pytest.raises(ValueError, match="not finite at step 3"), np.errstate(invalid="ignore"):
        train(weights, loss, batch, optimizer=Optimizer(rate=0.1), schedule=Schedule(steps=9), checkpoint=path)
    assert not path.exists()


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="one dtype"):
        train(
            {"a": np.ones(2), "b": np.ones(2, np.float32)}, None, None, optimizer=Optimizer(1.0), schedule=Schedule(1)
        )


# Several processes


def test_two_processes_equal_one_and_repeat_exactly(tmp_path):
    schedule = Schedule(steps=6, warmup=3)
    alone = run(schedule=schedule)
    path = tmp_path / "c.safetensors"
    twice = [run(schedule=schedule, processes=2), run(schedule=schedule, processes=2, checkpoint=path)]
    assert same_bits(*twice)
    # The halves of a batch are summed in another order: each gradient moves by some roundings of 2^-24, and a step of
    # Adam or Muon can turn that into a change of a few 1e-4 of its rate (0.02) where the gradient is nearly zero.
    differences = [np.abs(alone[name] - twice[0][name]).max() for name in alone]
    assert 0 < max(differences) <= 6 * 0.02 * 1e-2
    assert os.listdir(tmp_path) == ["c.safetensors"]


def failing_loss(params, batch):
    if batch == 1:
        raise ArithmeticError("part 1 is broken")
    return params["w"].sum()


def dying_loss(params, batch):
    if batch == 1:
        os._exit(3)
    return params["w"].sum()


def part_number(step, part, parts):
    return part


@pytest.mark.parametrize("loss, message", [(failing_loss, "part 1 is broken"), (dying_loss, "died")])
def test_a_failing_worker_ends_the_run_with_its_reason(loss, message):
    with pytest.raises(RuntimeError, match=message):
        train(
            {"w": np.ones(3)}, loss, part_number, optimizer=Optimizer(rate=0.1), schedule=Schedule(steps=4), processes=2
        )


def test_progress_is_silent_without_a_terminal():
    code = (
        "import numpy as np\n"
        "from refllm.model.train import Optimizer, Schedule, train\n"
        "loss, batch = lambda p, b: p['w'].sum(), lambda *a: None\n"
        "train({'w': np.ones(2)}, loss, batch, optimizer=Optimizer(0.1), schedule=Schedule(3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""
