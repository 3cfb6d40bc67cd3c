"""mixed: the target is kept, the bits follow what is measured, and the result beats one width at its size."""

import numpy as np
import pytest

import refllm
from refllm.formats.files import data_path
from refllm.kernels.packed.records import IntWeight
from refllm.methods.blockwise.mixed import WIDTHS, mixed, sensitivity
from refllm.model.walk import layer_linears
from tests.models import random_model

IDS = np.random.default_rng(1).integers(0, 64, 96)


@pytest.fixture(scope="module")
def tiny():
    model = refllm.load("tiny")
    return model, np.array(model.tokenizer.encode(data_path("tiny/calib.txt").read_text(encoding="utf-8"))[:1024])


def linears(model):
    return [model.weights[name] for layer in range(model.config.num_layers) for name in layer_linears(layer)]


def average(model):
    return 8 * sum(w.nbytes for w in linears(model)) / sum(w.shape[0] * w.shape[1] for w in linears(model))


@pytest.mark.parametrize("bits", [3.2, 4.0, 5.5, 9.0])
def test_the_target_is_kept_and_nearly_used(bits):
    model = random_model("llama", intermediate_size=64)
    small = mixed(model, IDS, bits=bits)
    assert average(small) <= bits
    widths = {w.bits for w in linears(small)}
    assert widths <= set(WIDTHS)
    if bits == 9.0:
        assert widths == {8}
    else:
        assert average(small) > bits - 0.3 and len(widths) > 1


def test_all_on_the_grid_of_types():
    model = random_model("llama", hidden_size=256, intermediate_size=256)
    small = mixed(model, IDS, grid="gguf", bits=4.6)
    assert average(small) <= 4.6 and len({w.type_name for w in linears(small)}) > 1


def test_a_tensor_that_nothing_depends_on_takes_the_fewest_bits():
    model = random_model("llama", intermediate_size=64)
    name = "model.layers.1.mlp.down_proj.weight"
    gate, up = (f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up"))
    model.weights[name] = np.zeros_like(model.weights[name])  # so what gate and up do is multiplied with zero
    small = mixed(model, IDS, bits=4.5)
    assert {small.weights[n].bits for n in (gate, up)} == {2}


def test_sensitivity_is_zero_for_no_change_and_grows_with_it():
    model = random_model("llama", np.float64, intermediate_size=64)
    name = "model.layers.0.mlp.up_proj.weight"
    W = model.weights[name]

    class Probe:
        def __init__(self, size):
            self.size = size

        def dense(self):
            return W + self.size * np.random.default_rng(3).normal(size=W.shape)

    kl = [sensitivity(model, {name: Probe(size)}, IDS)[0] for size in (0.0, 1e-3, 2e-3)]
    assert kl[0] == 0 and kl[2] == pytest.approx(4 * kl[1], rel=0.05)  # the square law that predictions rest on


def test_better_than_one_width_at_equal_size(tiny):
    model, ids = tiny
    stories = [ids[:512]]
    perplexity = lambda m: refllm.perplexity(m, np.concatenate(stories), protocol="gptq", window=256)
    uniform = refllm.compress(model, "rtn:bits=3,group=32")
    small = mixed(model, ids, bits=average(uniform))
    assert average(small) <= average(uniform)
    assert all(isinstance(w, IntWeight) for w in linears(small))
    assert perplexity(small) < perplexity(uniform)


def test_what_is_refused():
    model = random_model("llama", intermediate_size=64)
    with pytest.raises(ValueError, match=r"the budget is .*: raise the target"):
        mixed(model, IDS, bits=2.0)
    with pytest.raises(ValueError, match="grid must be int or gguf"):
        mixed(model, IDS, grid="nf4")
    with pytest.raises(ValueError, match="group_size 24 does not divide"):
        mixed(model, IDS, group_size=24)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        mixed(model, IDS, tokens=0)
