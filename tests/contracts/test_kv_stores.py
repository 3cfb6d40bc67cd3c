"""Every key-value method keeps the promises of the store protocol in refllm/model/cache.py."""

import numpy as np
import pytest

from refllm.methods import kvcache
from refllm.model.cache import DenseStore, new_cache
from refllm.model.llama import forward
from tests.models import random_model

# Knobs that make a method work on heads of width 8 and compress within 40 tokens, and knobs that keep everything.
COMPRESSING = {"kivi": dict(bits=2, group_size=8, residual=16)}
KEEPING = {"kivi": dict(group_size=8, residual=128)}

ALL = pytest.mark.parametrize("name", kvcache.__all__)


def store_of(name, knobs):
    return getattr(kvcache, name)(0, **knobs[name])


def tokens(count, seed=0, batch=2):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, batch, 2, count, 8)).astype(np.float32)
    return k, v, rng.normal(size=(batch, 4, count, 8)).astype(np.float32)


def feed(store, k, v, q, cuts=()):
    start = 0
    for stop in (*cuts, k.shape[-2]):
        part = (..., slice(start, stop), slice(None))
        result = store.extend(k[part], v[part], np.arange(start, stop), q[part])
        start = stop
    return result


@ALL
def test_every_method_has_knobs_here(name):
    assert name in COMPRESSING and name in KEEPING


@ALL
@pytest.mark.parametrize("batch", [1, 3])
def test_keeping_everything_equals_the_dense_store(name, batch):
    k, v, q = tokens(40, batch=batch)
    for cuts in ((), (1,), (13, 14, 39)):
        got = feed(store_of(name, KEEPING), k, v, q, cuts)
        expected = feed(DenseStore(), k, v, q, cuts)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


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
def test_compressing_is_smaller_and_counts_what_it_stores(name):
    k, v, q = tokens(40)
    for knobs in (COMPRESSING, KEEPING):
        store = store_of(name, knobs)
        assert store.nbytes == 0
        feed(store, k, v, q, (7, 8, 31))
        assert store.nbytes == sum(part.nbytes for part in store.parts().values())
        assert (store.nbytes < k.nbytes + v.nbytes) == (knobs is COMPRESSING)


@ALL
def test_shapes_positions_and_types_of_what_comes_back(name):
    for dtype in (np.float32, np.float64):
        k, v, q = (x.astype(dtype) for x in tokens(40))
        store = store_of(name, COMPRESSING)
        K, V, positions = feed(store, k, v, q, (17, 30))
        assert isinstance(store.pre_rope, bool)
        assert K.shape == V.shape and K.shape[:2] == (2, 2) and K.shape[-1] == 8
        assert K.dtype == V.dtype == dtype and np.isfinite(K).all() and np.isfinite(V).all()
        assert positions.shape in ((K.shape[2],), (2, K.shape[2])) and np.issubdtype(positions.dtype, np.integer)
        assert ((np.diff(positions) > 0).all()) and positions.min() >= 0 and positions.max() == 39


@ALL
def test_inputs_are_read_only_to_it_and_may_be_overwritten_afterwards(name):
    for knobs in (COMPRESSING, KEEPING):
        inputs = tokens(40)
        kept = [x.copy() for x in inputs]
        store, untouched = store_of(name, knobs), store_of(name, knobs)
        for x in inputs:
            x.flags.writeable = False
        feed(store, *inputs)
        feed(untouched, *inputs)
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
    for a, b in zip(feed(one, *inputs, (39,)), feed(other, *turned, (39,)), strict=True):
        np.testing.assert_array_equal(a, b)


@ALL
@pytest.mark.parametrize("cuts", [(1,), (16,), (15, 16, 17), tuple(range(1, 40))])
def test_chunks_leave_the_same_state(name, cuts):
    inputs = tokens(40)
    one, other = (store_of(name, COMPRESSING) for _ in range(2))
    feed(one, *inputs)
    feed(other, *inputs, cuts)
    assert one.parts().keys() == other.parts().keys()
    for part, array in one.parts().items():
        np.testing.assert_array_equal(array, other.parts()[part], err_msg=part)


@ALL
def test_a_batch_is_its_rows(name):
    k, v, q = tokens(40, batch=3)
    together = feed(store_of(name, COMPRESSING), k, v, q, (39,))
    for row in range(3):
        part = slice(row, row + 1)
        alone = feed(store_of(name, COMPRESSING), k[part], v[part], q[part], (39,))
        for a, b in zip(together[:2], alone[:2], strict=True):
            np.testing.assert_array_equal(a[part], b)


@ALL
def test_truncate_forgets_or_refuses_in_one_line(name):
    """Going back while nothing has been given up leaves no trace; later it does so, too, or raises a ValueError."""
    k, v, q = tokens(40)
    for knobs, length in ((KEEPING, 25), (KEEPING, 0), (COMPRESSING, 39), (COMPRESSING, 0)):
        store, fresh = store_of(name, knobs), store_of(name, knobs)
        feed(store, k, v, q)
        try:
            store.truncate(length)
        except ValueError as error:
            assert knobs is COMPRESSING and length > 0
            assert str(length) in str(error) and "\n" not in str(error)
            continue
        if length:
            feed(fresh, k[..., :length, :], v[..., :length, :], q[..., :length, :])
        more = [x[..., length : length + 1, :] for x in (k, v, q)]
        for a, b in zip(
            *(s.extend(more[0], more[1], np.array([length]), more[2]) for s in (store, fresh)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


@ALL
def test_announced_rollbacks_are_possible(name):
    """A store with the attribute `rollback` takes back that many tokens of a call, however much it has compressed."""
    k, v, q = tokens(40)
    store = store_of(name, COMPRESSING)
    if not hasattr(store, "rollback"):
        pytest.skip(f"{name} has no rollback")
    store.rollback = 4
    feed(store, k, v, q, (36,))
    store.truncate(36)
    fresh = store_of(name, COMPRESSING)
    feed(fresh, k[..., :36, :], v[..., :36, :], q[..., :36, :])
    more = [x[..., 36:, :] for x in (k, v, q)]
    for a, b in zip(*(s.extend(more[0], more[1], np.arange(36, 40), more[2]) for s in (store, fresh)), strict=True):
        np.testing.assert_array_equal(a, b)
