"""cla: layers that read another layer's cache, exact where both would hold the same."""

from dataclasses import replace

import numpy as np
import pytest

import refllm
from refllm.methods.kvcache.cla import cla
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from tests.models import random_model

IDS = np.random.default_rng(0).integers(0, 64, 30)


def run(model, policy):
    cache = new_cache(model, policy)
    parts = [forward(model, part, cache=cache) for part in (IDS[:20], IDS[20:21], IDS[21:])]
    return np.concatenate(parts), cache


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2"])
def test_a_share_of_one_is_the_plain_cache(architecture):
    model = random_model(architecture)
    logits, cache = run(model, lambda layer: cla(layer, share=1))
    plain, dense = run(model, None)
    np.testing.assert_allclose(logits, plain, atol=1e-4)  # the plain one may run compiled
    assert cache.nbytes == dense.nbytes


@pytest.mark.parametrize(("share", "owners"), [(2, 3), (3, 2), (4, 2), (6, 1), (9, 1)])
def test_bytes_are_those_of_the_owners(share, owners):
    model = random_model("llama", num_layers=6)
    _, cache = run(model, lambda layer: cla(layer, share=share))
    assert cache.nbytes == new_and_run(model).nbytes * owners // 6


def new_and_run(model):
    return run(model, None)[1]


def test_it_is_attention_over_the_owners_keys_and_values():
    """A model whose second layer computes what the first does: nothing is added in between, the same weights."""
    model = random_model("llama", np.float64, num_layers=2)
    weights = dict(model.weights)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"] = np.zeros_like(weights[f"model.layers.0.{name}.weight"])
    for name in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm"):
        weights[f"model.layers.1.{name}.weight"] = weights[f"model.layers.0.{name}.weight"]
    alike = replace(model, weights=weights)
    np.testing.assert_allclose(run(alike, cla)[0], run(alike, None)[0], atol=1e-12)
    assert np.abs(run(model, cla)[0] - run(model, None)[0]).max() > 0.1


def test_what_the_reader_projects_is_not_read():
    model = random_model("llama", np.float64)
    changed = model.weights | {f"model.layers.1.self_attn.{n}_proj.weight": np.full((16, 32), 9.0) for n in "kv"}
    np.testing.assert_array_equal(run(model, cla)[0], run(replace(model, weights=changed), cla)[0])


def test_rolled_back_and_in_a_recipe():
    model = refllm.compress(random_model("llama", num_layers=4), "rtn:bits=8,group=16+cla:share=2")
    cache = new_cache(model)
    forward(model, IDS, cache=cache)
    cache.truncate(10)
    again = forward(model, IDS[10:], cache=cache)
    fresh = new_cache(model)
    forward(model, IDS[:10], cache=fresh)
    # The first ten keys came with ten others, and BLAS may sum another number of rows in another order.
    np.testing.assert_allclose(again, forward(model, IDS[10:], cache=fresh), rtol=0, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="cla share must be 1 or more, got 0"):
        cla(0, share=0)
    stores = [cla(0), cla(1)]
    stores[1].join(stores)
    stores[0].extend(np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 4)), np.arange(3))
    with pytest.raises(ValueError, match="cla shares keys between layers of one shape"):
        stores[1].extend(np.ones((1, 2, 3, 6)), np.ones((1, 2, 3, 6)), np.arange(3))
