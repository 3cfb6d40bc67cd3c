"""Every key-value method keeps the promises of the store protocol in refllm/model/cache.py, and the laws of laws.py."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.methods import kvcache
from refllm.methods.attention.flash import flash
from refllm.model.cache import DenseStore, new_cache
from refllm.model.llama import forward
from tests.models import random_model
from tests.unit.methods.kvcache import laws
from tests.unit.methods.kvcache.laws import feed, part_of, with_prompt


@cache
def tables(name, knobs):
    """What a method learns of a model whose caches look like the ones here; None for methods that learn nothing."""
    learn = getattr(getattr(kvcache, name), "learn", None)
    return learn and learn(random_model(), np.arange(64), **dict(knobs))


# Knobs that make a method work on heads of width 8 and compress within 40 tokens, and knobs that keep everything.
COMPRESSING = {
    "kivi": dict(bits=2, group_size=8, residual=16),
    "streaming": dict(sinks=2, recent=9),
    "h2o": dict(heavy=5, recent=4),
    "snapkv": dict(capacity=12, voters=4, kernel=3),
    "razor": dict(heads="0.1/1.0", sinks=2, recent=5),
    "freekv": dict(page=4, sinks=2, recent=8, budget=8, skip_layers=0),
    "pqcache": dict(ratio=0.5, sinks=2, bits=2),
    "minicache": dict(block=8, gamma=0.0),
    "cla": dict(),
    "qserve": dict(),
    "llmqat": dict(bits=3, recent=5),
    "kvquant": dict(outliers=0.1, recent=3),
    "kvtuner": dict(pairs="4.2/2.2"),
    "turboquant": dict(bits=3, recent=3),
    "rotatekv": dict(bits=3, group_size=8, sinks=2, recent=3),
    "cq": dict(channels=2, bits=3, recent=3, sinks=1, pre_rope=False),
}
KEEPING = {
    "kivi": dict(group_size=8, residual=128),
    "streaming": dict(recent=128),
    "h2o": dict(heavy=64, recent=64),
    "snapkv": dict(capacity=128),
    "razor": dict(heads="none"),
    "freekv": dict(skip_layers=0),
    "pqcache": dict(),
    "minicache": dict(block=64, gamma=1.0),
    "cla": dict(share=1),
    "qserve": dict(recent=128),
    "llmqat": dict(recent=128),
    "kvquant": dict(recent=128),
    "kvtuner": dict(pairs="8.8", recent=128),
    "turboquant": dict(recent=128),
    "rotatekv": dict(recent=128),
    "cq": dict(channels=2, bits=3, recent=128),
}
CROSS_LAYER = ("minicache", "cla")  # share what they keep between layers
# Methods that return other numbers than they were given: codes, means, another layer's.
LOSSY = {
    "kivi", "razor", "minicache", "cla", "qserve", "llmqat", "kvtuner", "turboquant", "kvquant", "rotatekv", "cq",
}  # fmt: skip
MOVES_POSITIONS = {"streaming"}

ALL = pytest.mark.parametrize("name", kvcache.__all__)


class Pair:
    """Two layers that share what they keep, as one store: other numbers go to the first, results are the second's."""

    layers, pre_rope = 2, False

    def __init__(self, make):
        self.stores = [make(layer) for layer in range(2)]
        for store in self.stores:
            if hasattr(store, "join"):
                store.join(self.stores)
        if all(hasattr(store, "rollback") for store in self.stores):
            self.rollback = 0

    def extend(self, k, v, positions, queries):
        if hasattr(self, "rollback"):
            for store in self.stores:
                store.rollback = self.rollback
        self.stores[0].extend(k[..., ::-1] + k.dtype.type(0.25), v[..., ::-1] + v.dtype.type(0.25), positions, queries)
        return self.stores[1].extend(k, v, positions, queries)

    def truncate(self, length):
        for store in self.stores:
            store.truncate(length)

    def parts(self):
        return {f"{i}.{name}": part for i, store in enumerate(self.stores) for name, part in store.parts().items()}

    @property
    def nbytes(self):
        return sum(store.nbytes for store in self.stores)


def store_of(name, knobs, prompt=None):
    found = tables(name, tuple(knobs[name].items()))
    learned = {} if found is None else {"tables": found}
    make = lambda layer: getattr(kvcache, name)(layer, **knobs[name], **learned)
    return with_prompt(Pair(make) if name in CROSS_LAYER else make(0), prompt)


def tokens(count, seed=0, batch=2):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, batch, 2, count, 8)).astype(np.float32)
    return k, v, rng.normal(size=(batch, 4, count, 8)).astype(np.float32)


@ALL
def test_every_method_has_knobs_here(name):
    assert name in COMPRESSING and name in KEEPING


@ALL
@pytest.mark.parametrize("batch", [1, 3])
def test_keeping_everything_equals_the_dense_store(name, batch):
    for cuts in ((), (1,), (13, 14, 39)):
        laws.keep_all_equals_dense(lambda: store_of(name, KEEPING), tokens(40, batch=batch), cuts)


@ALL
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_keeping_everything_leaves_every_logit(name, architecture):
    model = random_model(architecture)
    ids = np.random.default_rng(0).integers(0, 64, (2, 30))
    logits = []
    for policy in (None, lambda layer: store_of(name, KEEPING)):
        cache = new_cache(model, policy)
        chunks = (ids[:, :20], *np.split(ids[:, 20:], 10, axis=1))
        logits.append(np.concatenate([forward(model, chunk, cache=cache) for chunk in chunks], axis=1))
    np.testing.assert_array_equal(*logits)


@ALL
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_compressed_models_run_with_any_attention_and_batch(name, architecture):
    """A batch is its rows, also behind an attention of its own; a window and a cap do not disturb a store."""
    model = random_model(architecture, np.float64, attention_softcap=5.0)
    ids = np.random.default_rng(0).integers(0, 64, (2, 40))
    for method in (None, flash):
        together, alone = [], [[], []]
        cache = new_cache(model, lambda layer: store_of(name, COMPRESSING))
        caches = [new_cache(model, lambda layer: store_of(name, COMPRESSING)) for _ in range(2)]
        for chunk in (ids[:, :32], *np.split(ids[:, 32:], 8, axis=1)):
            together.append(forward(model, chunk, cache=cache, attend=method))
            for row in range(2):
                alone[row].append(forward(model, chunk[row : row + 1], cache=caches[row], attend=method))
        together = np.concatenate(together, axis=1)
        assert np.isfinite(together).all()
        for row in range(2):
            np.testing.assert_allclose(together[row], np.concatenate(alone[row], axis=1)[0], atol=1e-9)


@ALL
def test_compressing_is_smaller_and_counts_what_it_stores(name):
    inputs = tokens(40)
    for knobs in (COMPRESSING, KEEPING):
        store = store_of(name, knobs, prompt=31)
        assert store.nbytes == 0
        feed(store, inputs, (7, 8, 31))
        assert store.nbytes == sum(part.nbytes for part in store.parts().values())
        device = getattr(store, "device_nbytes", store.nbytes)
        dense = getattr(store, "layers", 1) * (inputs[0].nbytes + inputs[1].nbytes)
        assert device <= store.nbytes and (device < dense) == (knobs is COMPRESSING)


@ALL
def test_shapes_positions_and_types_of_what_comes_back(name):
    for dtype in (np.float32, np.float64):
        inputs = tuple(x.astype(dtype) for x in tokens(40))
        store = store_of(name, COMPRESSING)
        K, V, positions = feed(store, inputs, (17, 30))
        assert isinstance(store.pre_rope, bool)
        assert K.shape == V.shape and K.shape[:2] == (2, 2) and K.shape[-1] == 8
        assert K.dtype == V.dtype == dtype and np.isfinite(K).all() and np.isfinite(V).all()
        assert positions.shape in ((K.shape[2],), (2, K.shape[2]), (2, 2, K.shape[2]))
        assert np.issubdtype(positions.dtype, np.integer)
        assert ((np.diff(positions) > 0).all()) and positions.min() >= 0 and positions.max() == 39


@ALL
def test_inputs_are_read_only_to_it_and_may_be_overwritten_afterwards(name):
    for knobs in (COMPRESSING, KEEPING):
        inputs = tokens(40)
        kept = [x.copy() for x in inputs]
        store, untouched = store_of(name, knobs), store_of(name, knobs)
        for x in inputs:
            x.flags.writeable = False
        feed(store, inputs)
        feed(untouched, inputs)
        for x, before in zip(inputs, kept, strict=True):
            np.testing.assert_array_equal(x, before)
            x.flags.writeable = True
            x[:] = np.nan
        more = [x[..., :1, :] for x in kept]
        for a, b in zip(
            *(s.extend(more[0], more[1], np.array([40]), more[2]) for s in (store, untouched)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
            assert np.isfinite(a).all()


@ALL
def test_non_contiguous_input(name):
    inputs = tokens(40)
    turned = [np.asfortranarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in inputs]
    assert not turned[0].flags.c_contiguous
    one, other = (store_of(name, COMPRESSING) for _ in range(2))
    laws.same_results(feed(one, inputs, (39,)), feed(other, turned, (39,)))


@ALL
@pytest.mark.parametrize("cuts", [(1,), (16,), (15, 16, 17), tuple(range(1, 40))])
def test_chunks_leave_the_same_state(name, cuts):
    laws.chunked_equals_one_shot(lambda: store_of(name, COMPRESSING), tokens(40), cuts)


@ALL
@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 40), steps=st.integers(1, 5), seed=st.integers(0, 999))
def test_the_chunk_size_of_a_prompt_does_not_matter(name, size, steps, seed):
    laws.independent_of_chunk_size(lambda: store_of(name, COMPRESSING), tokens(40, seed), size, steps)


@pytest.mark.parametrize("name", sorted(set(kvcache.__all__) - LOSSY - MOVES_POSITIONS))
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=5, unique=True).map(sorted), seed=st.integers(0, 999))
def test_positions_never_move(name, cuts, seed):
    laws.positions_never_move(lambda: store_of(name, COMPRESSING), tokens(40, seed), cuts)


@ALL
def test_a_batch_is_its_rows(name):
    k, v, q = tokens(40, batch=3)
    together = feed(store_of(name, COMPRESSING), (k, v, q), (39,))
    for row in range(3):
        part = slice(row, row + 1)
        alone = feed(store_of(name, COMPRESSING), (k[part], v[part], q[part]), (39,))
        for a, b in zip(together[:2], alone[:2], strict=True):
            np.testing.assert_array_equal(a[part], b)


@ALL
def test_truncate_forgets_or_refuses_in_one_line(name):
    """Going back while nothing has been given up leaves no trace; later it does so, too, or raises a ValueError."""
    inputs = tokens(40)
    for knobs, length in ((KEEPING, 25), (KEEPING, 0), (COMPRESSING, 39), (COMPRESSING, 0)):
        store, fresh = store_of(name, knobs), store_of(name, knobs)
        feed(store, inputs)
        try:
            store.truncate(length)
        except ValueError as error:
            assert length > 0 and (knobs is COMPRESSING or name == "h2o")  # whose scores hold what is taken back
            assert str(length) in str(error) and "rollback" in str(error) and "\n" not in str(error)
            assert store.nbytes == feed_bytes(name, knobs, inputs)
            continue
        if length:
            feed(fresh, part_of(inputs, 0, length))
        k, v, q = part_of(inputs, length, length + 1)
        laws.same_results(*(s.extend(k, v, np.array([length]), q) for s in (store, fresh)))


def feed_bytes(name, knobs, inputs):
    store = store_of(name, knobs)
    feed(store, inputs)
    return store.nbytes


@ALL
@pytest.mark.parametrize("back", [1, 4])
def test_announced_rollbacks_are_possible(name, back):
    """A store with the attribute `rollback` takes back that many tokens of a call, however much it has compressed."""
    laws.rollback_leaves_no_trace(lambda: store_of(name, COMPRESSING), tokens(40), back)


@ALL
def test_positions_must_go_on(name):
    store = store_of(name, COMPRESSING)
    feed(store, tokens(10))
    k, v, q = tokens(1)
    for wrong in ([12], [11], [11, 10]):
        with pytest.raises(ValueError, match="go on from 10"):
            store.extend(*(np.repeat(x, len(wrong), axis=-2) for x in (k, v)), np.array(wrong), q)


def test_a_store_knows_its_prompt_by_the_first_call_or_by_its_length():
    store = kvcache.snapkv(0, capacity=4, voters=2)
    feed(store, tokens(40), (10,))
    assert store.prompt == 10 and store.tokens.count == 34
    store = with_prompt(kvcache.snapkv(0, capacity=4, voters=2), 20)
    with pytest.raises(ValueError, match="the prompt ends after 20 tokens, but a call goes from 10 to 40; split it"):
        feed(store, tokens(40), (10,))
    assert isinstance(new_cache(random_model(), prompt_length=3).stores[0], DenseStore)
    policy = lambda layer: kvcache.snapkv(layer, capacity=4)
    assert [s.prompt_length for s in new_cache(random_model(), policy, prompt_length=3).stores] == [3, 3]
