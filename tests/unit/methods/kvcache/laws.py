"""The exactness laws of key-value stores, by name; `make()` gives a new store, `tokens` are (k, v, q) of one length.

keep_all_equals_dense          what is kept whole is what a dense store would return, to the bit
budget_of_length_is_no_op      the same for a budget of exactly the tokens there are
chunked_equals_one_shot        a prompt in several calls leaves what one call leaves
independent_of_chunk_size      the same for every chunk size, and so does what the next step sees
positions_never_move           a key comes back under the position it came with, or not at all
rollback_leaves_no_trace       tokens taken back, as announced, might never have been there
"""

import numpy as np

from refllm.model.cache import DenseStore

APPROXIMATE = ("scores", "queries", "rows", "sum")  # parts that are sums over tokens: equal but for rounding


def part_of(tokens, start, stop):
    """The tokens start .. stop - 1."""
    return tuple(x[..., start:stop, :] for x in tokens)


def feed(store, tokens, cuts=(), start=0):
    """Give a store its tokens in calls that end at `cuts`; what the last call returned."""
    result = None
    for stop in (*cuts, tokens[0].shape[-2]):
        k, v, q = part_of(tokens, start, stop)
        result = store.extend(k, v, np.arange(start, stop), q)
        start = stop
    return result


def with_prompt(store, length):
    """The store, told how long its prompt is, if it asks."""
    if hasattr(store, "prompt_length"):
        store.prompt_length = length
    return store


def same_results(one, other):
    """Two results of `extend`, to the bit."""
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def same_state(one, other):
    """Two stores hold the same arrays."""
    a, b = one.parts(), other.parts()
    assert a.keys() == b.keys()
    for name in a:
        if name in APPROXIMATE:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def keep_all_equals_dense(make, tokens, cuts=()):
    same_results(feed(make(), tokens, cuts), feed(DenseStore(), tokens, cuts))


def budget_of_length_is_no_op(make_with, tokens, cuts=()):
    """make_with(n) keeps n tokens."""
    keep_all_equals_dense(lambda: make_with(tokens[0].shape[-2]), tokens, cuts)


def chunked_equals_one_shot(make, tokens, cuts):
    length = tokens[0].shape[-2]
    one, other = (with_prompt(make(), length) for _ in range(2))
    feed(one, tokens)
    feed(other, tokens, cuts)
    same_state(one, other)
    return one, other


def independent_of_chunk_size(make, tokens, size, steps=3):
    """The last `steps` tokens come one by one after a prompt in chunks of `size`."""
    prompt = tokens[0].shape[-2] - steps
    ends = [*range(prompt + 1, prompt + steps)]
    one, other = (with_prompt(make(), prompt) for _ in range(2))
    same_results(feed(one, tokens, (prompt, *ends)), feed(other, tokens, (*range(size, prompt, size), prompt, *ends)))
    same_state(one, other)


def positions_never_move(make, tokens, cuts):
    """Every key and value that comes back is, to the bit, the one that came with its position."""
    k, v, _ = tokens
    K, V, at = feed(make(), tokens, cuts)
    at = np.broadcast_to(at, K.shape[:-1])
    assert (np.diff(at) > 0).all() and at.min() >= 0 and at.max() == k.shape[-2] - 1
    for got, given in ((K, k), (V, v)):
        np.testing.assert_array_equal(got, np.take_along_axis(given, at[..., None], axis=-2))


def rollback_leaves_no_trace(make, tokens, back):
    """The last `back` tokens are taken back and come again."""
    length = tokens[0].shape[-2]
    store, fresh = make(), make()
    if hasattr(store, "rollback"):
        store.rollback = back
    kept = length - back
    feed(store, tokens, (kept,))
    store.truncate(kept)
    feed(fresh, part_of(tokens, 0, kept))
    again = part_of(tokens, kept, length)
    same_results(*(s.extend(*again[:2], np.arange(kept, length), again[2]) for s in (store, fresh)))
