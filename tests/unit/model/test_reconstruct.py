"""Teaching one layer: what its linears see, losses that fall, and steps that are taken back."""

import numpy as np
import pytest

from refllm.kernels.autograd import Tensor
from refllm.kernels.optimizers import Optimizer
from refllm.model.llama import block, embed
from refllm.model.reconstruct import constants, improve, mean_square, observe
from refllm.model.walk import layer_linears, walk
from tests.models import random_model

IDS = np.random.default_rng(3).integers(0, 64, 96)
TARGETS = [np.array([1.0, 2.0]), np.array([3.0, 0.0])]


def distance(values, i):
    return mean_square(values["w"], [TARGETS[i]])


def test_what_is_observed_is_what_walk_sees_and_what_the_block_gives():
    model = random_model("llama")
    inputs = [embed(model, part[None]) for part in IDS.reshape(4, 24)]
    stats, outputs = observe(model, 0, inputs, np.arange(24))
    _, expected = next(walk(model, IDS, window=24))
    assert set(stats) == set(layer_linears(0)) == set(expected)
    assert all(np.array_equal(stats[name].X, expected[name].X) for name in stats)
    for x, y in zip(inputs, outputs, strict=True):
        assert np.array_equal(y, block(model, 0, x, np.arange(24)))


def test_the_mean_square_is_summed_over_targets():
    out = np.random.default_rng(0).normal(size=(3, 4))
    targets = [out + 1, out - 2]
    assert mean_square(Tensor(out), targets[:1]).data == pytest.approx(1)
    assert mean_square(Tensor(out), targets).data == pytest.approx(1 + 4)


def test_it_goes_to_the_mean_of_all_windows():
    first = {"w": np.zeros(2)}
    learned = improve(first, distance, 2, Optimizer(0.02, betas=(0.9, 0.999), clip=None), 200)
    assert np.abs(learned["w"] - [2, 1]).max() < 0.1
    assert first["w"].tolist() == [0, 0]


def test_the_windows_take_turns():
    seen = []
    note = lambda values, i: seen.append((i, values["w"].needs_grad)) or distance(values, i)
    improve({"w": np.zeros(2)}, note, 2, Optimizer(0.02), 3)
    assert [i for i, learning in seen if learning] == [0, 1] * 3
    assert sorted(i for i, learning in seen if not learning) == [0, 0, 1, 1]  # judged before and after


@pytest.mark.parametrize(("rate", "epochs"), [(50.0, 1), (0.02, 0)])
def test_what_makes_it_worse_is_dropped(rate, epochs):
    first = {"w": np.array([2.0, 1.0])}
    assert improve(first, distance, 2, Optimizer(rate), epochs) is first


def test_nothing_to_learn():
    assert improve({}, distance, 2, Optimizer(0.1), 5) == {}


def test_constants_take_no_gradient():
    assert not constants({"w": np.zeros(2)})["w"].needs_grad
