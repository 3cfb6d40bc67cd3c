"""The compiled forward pass is the readable one: every architecture, dense and packed, one token and many."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import refllm
from refllm.formats.files import data_path
from refllm.kernels.grids import SymmetricGrid
from refllm.kernels.packed import threads
from refllm.kernels.packed.quantized import IntWeight
from refllm.kernels.packed.records import LowRank, SparseBitmask, Sum, as_float
from refllm.methods.kvcache.kivi import kivi
from refllm.model import compiled
from refllm.model.cache import DenseStore, KVCache, new_cache
from refllm.model.llama import forward
from tests.models import ARCHITECTURES, random_model

IDS = np.random.default_rng(0).integers(0, 64, 100)  # longer than a block of keys, than every window, than six panels
SHAPES = {
    "even": dict(head_dim=16),
    "tails": dict(hidden_size=80, intermediate_size=112, head_dim=12),  # no multiple of a vector, a tile, a block
    "caps": dict(head_dim=24, attention_softcap=4.0, logit_softcap=3.0),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Whatever the environment of this run says: the compiled pass is what is tested."""
    monkeypatch.setenv("REFLLM_KERNELS", "numba")


def packed(model, recipe="rtn:bits=4,group=16"):
    return refllm.compress(model, recipe)


def readable(model, ids, monkeypatch):
    with monkeypatch.context() as context:
        context.setenv("REFLLM_KERNELS", "numpy")
        return forward(model, ids)


def through_a_cache(model, ids, cache=None):
    """Two prompts in turn, then one token after another."""
    cache = cache or new_cache(model)
    parts = [forward(model, ids[:37], cache=cache), forward(model, ids[37:70], cache=cache)]
    parts += [forward(model, [i], cache=cache) for i in ids[70:]]
    return np.concatenate(parts), cache


def distance(y, expected):
    """Largest difference at each position, relative to the largest logit."""
    return np.abs(y - expected).max(axis=-1) / np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_readable_pass(architecture, shape, monkeypatch):
    dense = random_model(architecture, **SHAPES[shape])
    for model in (dense, packed(dense)):
        expected = readable(model, IDS, monkeypatch)
        y, cache = through_a_cache(model, IDS)
        assert isinstance(cache.compiled[1], compiled.Compiled) and cache.length == len(IDS)
        assert distance(y, expected).max() < 1e-5
        assert distance(forward(model, IDS), expected).max() < 1e-5  # no cache at all


def check_rounded_alike(model, activations, ids, monkeypatch):
    """With rounded activations both passes get the same bits, but for a dense head, which sums float32 in two orders.

    Where a float64 sum in another order is rounded to another float32, as good as never, a position may differ by more.
    """
    model = replace(model, runtime=replace(model.runtime, activations=activations))
    expected = readable(model, ids, monkeypatch)
    y, cache = through_a_cache(model, ids)
    assert isinstance(cache.compiled[1], compiled.Compiled)
    assert (distance(y, expected) < 1e-6).mean() >= 0.98
    assert (forward(model, ids) == expected).all(axis=-1).mean() >= 0.98


@pytest.mark.parametrize("recipe", ["rtn:bits=8,group=-1", "rtn:bits=4,group=16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounded_activations_get_the_same_codes(architecture, recipe, monkeypatch):
    for shape in SHAPES.values() if "4" in recipe else [SHAPES["even"]]:
        check_rounded_alike(packed(random_model(architecture, **shape), recipe), "int8", IDS, monkeypatch)


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_rounded_activations_of_the_bundled_model_get_the_same_codes(activations, monkeypatch):
    model = refllm.load("tiny")
    ids = np.array(model.tokenizer.encode(data_path("tiny/eval.txt").read_text(encoding="utf-8"))[:100])
    check_rounded_alike(packed(model, "rtn:bits=4,group=32"), activations, ids, monkeypatch)


@pytest.mark.parametrize("stage", ["static", "static:bits=4", "static:observer=percentile,percentile=90"])
def test_inputs_with_a_scale_of_calibration_get_the_same_codes(stage, monkeypatch):
    """The last one saturates; whatever the run-time stage says, a record is taken at its word."""
    for shape in SHAPES.values():
        model = random_model("llama", **shape)
        small = refllm.compress(model, f"rtn:bits=8,symmetric=true,group=-1+{stage}", IDS[:50])
        for activations in ("float32", "int8"):
            check_rounded_alike(small, activations, IDS, monkeypatch)


@pytest.mark.parametrize("stage", ["static:symmetric=false", "static:bits=6"])
def test_other_inputs_with_a_scale_of_calibration_are_left_to_the_readable_pass(stage):
    small = refllm.compress(random_model("llama"), f"rtn:bits=8,symmetric=true,group=-1+{stage}", IDS[:50])
    cache = new_cache(small)
    forward(small, IDS[:1], cache=cache)
    assert cache.compiled[1] is None


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("sizes", [(4, 48), (6, 48), (4, 172), (4, 176)], ids=str)
def test_inputs_are_turned_inside(sizes, activations, monkeypatch):
    """Heads mixed or a whole width, matrices of 1, 12, 44 and 172 rows in front, tails of vectors; packed and dense."""
    model = random_model("llama", num_heads=sizes[0], intermediate_size=sizes[1], mlp_bias=True)
    for recipe in ("quarot+rtn:bits=8,group=-1", "quarot+rtn:bits=8,group=-1,only=up"):
        turned = packed(model, recipe)
        turned = replace(turned, runtime=replace(turned.runtime, activations=activations))
        expected = readable(turned, IDS, monkeypatch)
        y, cache = through_a_cache(turned, IDS)
        assert np.median(distance(y, expected)) < 1e-5
        assert distance(y, expected).max() < (1e-5 if activations == "float32" else 0.05)
        _, cache = through_a_cache(turned, IDS[:71])
        forward(turned, IDS[71:72], cache=cache)
        assert isinstance(cache.compiled[1], compiled.Compiled)


def test_threads_chunks_and_prompts_in_pieces_change_no_bit(monkeypatch):
    # The head, too: a BLAS may sum products of 33 rows in another order than those of 37.
    whole_model = "rtn:bits=4,group=16+rtn:bits=4,group=16,only=lm_head"
    model = packed(random_model("mistral", num_heads=6, num_kv_heads=3, head_dim=16), whole_model)
    monkeypatch.setattr(threads, "MINIMUM_WORK", 1)
    monkeypatch.setattr(compiled, "MINIMUM_WORK", 1)
    results = []
    for count in (1, 2, 3, 5):
        monkeypatch.setenv("REFLLM_THREADS", str(count))
        results.append(through_a_cache(model, IDS)[0])
    assert all(np.array_equal(results[0], other) for other in results[1:])
    whole = forward(model, IDS)
    assert np.array_equal(whole[:70], results[0][:70])
    monkeypatch.setattr(compiled, "CHUNK", 19)
    assert np.array_equal(whole, forward(model, IDS))


def test_a_rolled_back_cache_goes_on_as_if_nothing_had_been():
    model = packed(random_model("qwen2", head_dim=16))
    y, cache = through_a_cache(model, IDS)
    cache.truncate(80)
    again = [forward(model, [i], cache=cache) for i in IDS[80:]]
    assert np.array_equal(np.concatenate(again), y[80:])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_codes_of_a_cache_are_read_and_written(architecture, bits, monkeypatch):
    """From one state of the cache both passes get the same logits, and stores that hold the same."""
    sizes = dict(head_dim=32) if bits == 4 else dict(head_dim=16, attention_softcap=4.0)
    model = packed(random_model(architecture, **sizes))
    group = sizes["head_dim"]
    cache = new_cache(model, partial(kivi, bits=bits, group_size=group, residual=2 * group if bits == 1 else group))
    for token in IDS:
        cache.compiled, made = None, cache.compiled
        other = copy.deepcopy(cache)
        cache.compiled = made
        y = forward(model, [token], cache=cache)
        with monkeypatch.context() as context:
            context.setenv("REFLLM_KERNELS", "numpy")
            expected = forward(model, [token], cache=other)
        assert isinstance(cache.compiled[1], compiled.Compiled) and other.compiled is None
        assert distance(y, expected).max() < 1e-5
        for mine, its in zip(cache.stores, other.stores, strict=True):
            assert mine.length == its.length and mine.nbytes == its.nbytes
            its = its.parts()
            for name, part in mine.parts().items():
                assert part.shape == its[name].shape and part.dtype == its[name].dtype
                if "codes" in name:
                    assert (part == its[name]).mean() > 0.98
                else:
                    np.testing.assert_allclose(part, its[name], rtol=2e-3, atol=1e-5 * np.abs(its[name]).max())
    ends = cache.length
    with pytest.raises(ValueError, match="cannot go back"):
        cache.truncate(40)
    assert cache.length == ends


def test_several_tokens_and_stores_that_may_go_back_are_for_the_readable_pass(monkeypatch):
    model = packed(random_model("llama", head_dim=16))
    cache = new_cache(model, partial(kivi, group_size=16, residual=16))
    forward(model, IDS[:20], cache=cache)
    assert compiled.compiled_for(model, cache, 1) is not None and compiled.compiled_for(model, cache, 2) is None
    for store in cache.stores:
        store.rollback = 1
    assert compiled.compiled_for(model, cache, 1) is None
    mixed = new_cache(model, lambda layer: kivi(layer, group_size=16, residual=16 << layer))
    mixed.check_batch(1)
    assert compiled.compiled_for(model, mixed, 1) is None


def test_a_first_token_is_checked_as_all_are():
    model = packed(random_model("llama", head_dim=16))
    with pytest.raises(ValueError, match="group_size 32 does not divide the key head_dim 16"):
        forward(model, IDS[:1], cache=new_cache(model, partial(kivi, group_size=32, residual=32)))


def test_numbers_that_codes_cannot_hold_are_refused_and_the_token_forgotten():
    model = packed(random_model("llama", head_dim=16))
    cache = new_cache(model, partial(kivi, group_size=16, residual=16))
    forward(model, IDS[:40], cache=cache)
    before = [{n: p.copy() for n, p in s.parts().items()} for s in cache.stores]
    weights = dict(model.weights)
    weights["model.embed_tokens.weight"] = np.full_like(weights["model.embed_tokens.weight"], np.nan)
    with pytest.raises(ValueError, match=r"(keys|values) must be finite"):
        forward(replace(model, weights=weights), IDS[:1], cache=cache)
    for store, parts in zip(cache.stores, before, strict=True):
        assert all(np.array_equal(parts[n], p) for n, p in store.parts().items())
    assert cache.length == 40


def test_both_passes_share_a_cache(monkeypatch):
    model = packed(random_model("llama", head_dim=16))
    expected, cache = readable(model, IDS, monkeypatch), new_cache(model)
    parts = []
    for start in range(0, 100, 10):
        kernels = "numpy" if start % 20 else "numba"
        monkeypatch.setenv("REFLLM_KERNELS", kernels)
        parts.append(forward(model, IDS[start : start + 9], cache=cache))
        parts.append(forward(model, IDS[start + 9 : start + 10], cache=cache))
    assert distance(np.concatenate(parts), expected).max() < 1e-5
    assert cache.nbytes == 2 * 2 * 2 * 100 * 16 * 4  # layers, keys and values, heads, tokens, head_dim, bytes


def test_what_it_leaves_to_the_readable_pass(monkeypatch):
    model = packed(random_model("llama", head_dim=16))
    one = lambda: KVCache(2, 128)

    def made(model, cache, tokens=1, batch=1):
        if cache is not None:
            cache.check_batch(batch)
        return compiled.compiled_for(model, cache, tokens) is not None

    assert made(model, one()) and made(model, one(), tokens=5) and made(model, None, tokens=5)
    assert not made(model, one(), batch=2)
    assert not made(model, None)
    assert not made(model, KVCache(2, 128, lambda layer: DenseStore(np.float16)))
    assert not made(random_model("llama", np.float64), one())
    assert not made(random_model("llama"), one(), tokens=5)  # dense: BLAS
    assert not made(replace(model, runtime=replace(model.runtime, attend=lambda *_, **__: None)), one())
    odd = packed(random_model("llama", head_dim=16), "rtn:bits=4,group=8")
    assert isinstance(odd.weights["model.layers.0.mlp.up_proj.weight"], IntWeight) and not made(odd, one())
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.weights[name]
    with_up = lambda up: replace(model, weights=model.weights | {name: up})
    low = lambda rank: LowRank(np.zeros((weight.shape[0], rank), np.float16), np.zeros((rank, weight.shape[1]), "f2"))
    assert made(with_up(low(64)), one()) and made(with_up(Sum(weight, low(5))), one(), tokens=5)
    assert not made(with_up(low(65)), one())  # no room for so many numbers between the factors
    assert not made(with_up(Sum(weight, Sum(weight, weight))), one())
    assert not made(with_up(Sum(low(5), low(5))), one())
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    assert not made(model, one())


def test_not_a_number_stays_in_its_sequence():
    model = random_model("llama", head_dim=16)
    embedding = model.weights["model.embed_tokens.weight"].copy()
    embedding[5, 3] = np.nan
    model = packed(replace(model, weights=model.weights | {"model.embed_tokens.weight": embedding}))
    cache = new_cache(model)
    assert np.isfinite(forward(model, [1], cache=cache)).all()
    assert np.isnan(forward(model, [5], cache=cache)).all()
    assert np.isnan(forward(model, np.array([5, 1]))).all()


@pytest.mark.parametrize("activations", ["float32", "int8", "int4"])
@pytest.mark.parametrize(
    "recipe",
    [
        "wanda:pattern=2:4",
        "wanda:pattern=2:4+rtn:bits=4,group=8",
        "wanda:pattern=2:4+rtn:bits=4,group=-1",
        "wanda:sparsity=0.5",
    ],
)
def test_sparse_weights(recipe, activations, monkeypatch):
    """Where a form has no integer product, rounded activations are left to the readable pass."""
    model = random_model("llama", head_dim=16)
    model = refllm.compress(model, recipe, calibration=IDS)
    model = replace(model, runtime=replace(model.runtime, activations=activations))
    expected = readable(model, IDS, monkeypatch)
    y, _ = through_a_cache(model, IDS)
    assert distance(y, expected).max() < 1e-5


def int8_codes(W):
    grid = SymmetricGrid(8, -1)
    return IntWeight.pack(grid, grid.encode(W, *grid.fit(W)), *grid.fit(W))


def of_rank(W, rank, dtype="float16", pack=None):
    U, S, V = np.linalg.svd(W, full_matrices=False)
    A, B = (U * S)[:, :rank].astype(np.float32), V[:rank].astype(np.float32)
    return LowRank(pack(A) if pack else as_float(A, dtype), as_float(B, dtype))


FACTORED = {  # what becomes of a weight; of each the rank differs, so that no row of one product is as long as the next
    "float16": lambda W, rank: of_rank(W, rank),
    "float32": lambda W, rank: of_rank(W, rank, "float32"),
    "codes and floats": lambda W, rank: of_rank(W, rank, pack=int8_codes),
    "codes and a repair": lambda W, rank: Sum(int8_codes(W), of_rank(W / 8, rank)),
    "a repair and codes": lambda W, rank: Sum(of_rank(W / 8, rank, "float32"), int8_codes(W)),
    "codes and kept values": lambda W, rank: Sum(int8_codes(W), SparseBitmask.compress(W, np.abs(W) > 0.8)),
    "two matrices": lambda W, rank: Sum(W, as_float(W / 3, "float16")),
}


def factored(kind, **config):
    """A model whose linears are factored or sums, but for one in six; so is its tied embedding, or its head."""
    model = random_model(**config)
    weights, rank = dict(model.weights), 3
    for name, W in model.weights.items():
        if name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            rank = (rank + 13) % 41 + 1
            weights[name] = int8_codes(W) if rank % 6 == 0 else FACTORED[kind](W, rank)
    return replace(model, weights=weights)


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("kind", FACTORED)
def test_factors_and_sums(kind, activations, monkeypatch):
    model = factored(kind, **SHAPES["tails"])
    model = replace(model, runtime=replace(model.runtime, activations=activations))
    expected = readable(model, IDS, monkeypatch)
    y, cache = through_a_cache(model, IDS)
    assert isinstance(cache.compiled[1], compiled.Compiled)
    many = compiled.compiled_for(model, None, 5)
    assert (many is None) == (kind in ("float32", "a repair and codes", "two matrices"))  # a float32 part: BLAS
    for some in (y, forward(model, IDS)):
        assert np.median(distance(some, expected)) < 1e-5
        assert distance(some, expected).max() < (1e-5 if activations == "float32" else 0.05)


@pytest.mark.parametrize("kind", ["codes and a repair", "float16"])
def test_factors_on_any_number_of_threads(kind, monkeypatch):
    model, results = factored(kind, architecture="mistral", num_heads=6, num_kv_heads=3, head_dim=16), []
    monkeypatch.setattr(compiled, "MINIMUM_WORK", 1)
    for count in (1, 2, 3, 5):
        monkeypatch.setenv("REFLLM_THREADS", str(count))
        results.append(through_a_cache(model, IDS)[0])
    assert all(np.array_equal(results[0], other) for other in results[1:])
