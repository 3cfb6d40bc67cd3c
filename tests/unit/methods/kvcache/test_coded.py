"""What the stores that code every token by itself share, on one that codes to whole numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.methods.kvcache._coded import CodedStore, Growing


class Whole(CodedStore):
    """Rounds to whole numbers."""

    name = "whole"

    def _encode(self, side, x):
        return {"codes": np.rint(x).astype(np.int8)}

    def _decode(self, side, arrays, dtype):
        return arrays["codes"].astype(dtype)


class OwnToo(Whole):
    rounds_own = True


def numbers(tokens, seed=0):
    return np.random.default_rng(seed).normal(0, 9, (2, 1, 2, tokens, 3)).astype(np.float32)


def feed(store, x, cuts=(), start=0):
    for stop in (*cuts, x.shape[-2]):
        result = store.extend(x[0, ..., start:stop, :], x[1, ..., start:stop, :], np.arange(start, stop))
        start = stop
    return result


def seen_slowly(x, last_call, recent, sinks, own):
    """Token by token: rounded where it was neither sink nor recent when the last call began (with `own`: ended)."""
    out = x.copy()
    total = x.shape[-2]
    end = total if own else total - last_call
    for token in range(total):
        if sinks <= token < end - recent:
            out[..., token, :] = np.rint(x[..., token, :])
    return out


@pytest.mark.parametrize("kind", [Whole, OwnToo])
@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 19), max_size=4, unique=True).map(sorted),
    recent=st.integers(0, 21),
    sinks=st.integers(0, 21),
    rollback=st.integers(0, 4),
)
def test_what_a_call_sees(kind, cuts, recent, sinks, rollback):
    x = numbers(20)
    store = kind(recent, sinks)
    store.rollback = rollback
    K, V, at = feed(store, x, cuts)
    expected = seen_slowly(x, 20 - (cuts or [0])[-1], recent, sinks, kind.rounds_own)
    np.testing.assert_array_equal(np.stack([K, V]), expected)
    assert at.tolist() == list(range(20))


@pytest.mark.parametrize("kind", [Whole, OwnToo])
@settings(max_examples=60, deadline=None)
@given(recent=st.integers(0, 6), sinks=st.integers(0, 25), length=st.integers(0, 25), rollback=st.integers(0, 3))
def test_truncate_leaves_what_a_new_store_would_hold_or_changes_nothing(kind, recent, sinks, length, rollback):
    x = numbers(24)
    store, fresh = kind(recent, sinks), kind(recent, sinks)
    store.rollback = rollback
    feed(store, x, (20,))
    before = {name: part.copy() for name, part in store.parts().items()}
    try:
        store.truncate(length)
    except ValueError as error:
        assert recent and sinks < length < 24 - rollback and f"from 24 to {length} tokens" in str(error)
        assert all(np.array_equal(store.parts()[name], part) for name, part in before.items())
        return
    length = min(length, 24)
    if length:
        feed(fresh, x[..., :length, :])
    if not rollback:  # else some that are due still wait
        assert store.parts().keys() == fresh.parts().keys()
        assert all(np.array_equal(part, store.parts()[name]) for name, part in fresh.parts().items())
    more = numbers(length + 3, seed=5)
    more[..., :length, :] = x[..., :length, :]
    for a, b in zip(feed(store, more, start=length), feed(fresh, more, start=length), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_the_codes_and_the_tokens_in_full_count():
    store = Whole(recent=4, sinks=2)
    feed(store, numbers(20))
    assert {name: part.shape for name, part in store.parts().items()} == {
        "k_codes": (1, 2, 14, 3), "k_full": (1, 2, 4, 3), "k_sinks": (1, 2, 2, 3),
        "v_codes": (1, 2, 14, 3), "v_full": (1, 2, 4, 3), "v_sinks": (1, 2, 2, 3),
    }  # fmt: skip
    assert store.nbytes == 2 * (14 * 6 + 6 * 6 * 4)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 65520.0])
def test_numbers_that_float16_scales_cannot_take_leave_the_store_as_it_was(wrong):
    store = Whole()
    feed(store, numbers(5))
    x = numbers(6)
    x[1, 0, 0, 5, 0] = wrong
    with pytest.raises(ValueError, match="whole stores float16: values must be finite and at most 65504"):
        feed(store, x, start=5)
    assert store.length == 5 and store.coded == 5
    assert feed(store, numbers(6), start=5)[0].shape == (1, 2, 6, 3)


def test_negative_counts_and_changed_shapes_are_refused():
    with pytest.raises(ValueError, match="whole keeps 0 or more tokens in full, got recent -1, sinks 0"):
        Whole(-1)
    store = Whole()
    feed(store, numbers(5))
    with pytest.raises(ValueError, match="must stay as in the first call"):
        store.extend(*numbers(1)[..., :2], np.array([5]))


class Grown:
    """Three `Growing` arrays that are alike, and what they should hold."""

    def __init__(self, axis):
        self.arrays, self.held = [Growing(axis) for _ in range(3)], np.empty((3, 2, 0, 4), np.float32)
        self.next = 0.0

    def new(self, count):
        """Numbers that have not been met."""
        self.next += 1
        return self.next + np.random.default_rng(int(self.next)).random((3, 2, count, 4), np.float32)

    def act(self, action, count):
        if action == "together":
            x = self.new(count)
            Growing.append_all(self.arrays, x)
        elif action == "alone":
            x = self.new(count)
            for array, mine in zip(self.arrays, x, strict=True):
                array.append(mine)
        elif action == "written":  # behind the last one first, as a compiled step does, and counted later
            x = self.new(1)
            for array, mine in zip(self.arrays, x, strict=True):
                array.reserve(mine, 1)
                array._part(array._start + array.count, array._start + array.count + 1)[...] = mine
            found = Growing.of_all(self.arrays, self.arrays[0].count, self.arrays[0].count + 1)
            assert (found == x).all()
            for array in self.arrays:
                array.count += 1
        else:
            count, x = min(count, self.held.shape[2]), self.new(0)
            for array in self.arrays if count else ():
                array.drop(count)
            self.held = self.held[:, :, count:]
        self.held = np.concatenate([self.held, x], axis=2)


@given(actions=st.lists(st.tuples(st.sampled_from(["together", "alone", "written", "drop"]), st.integers(1, 40))))
def test_arrays_that_are_alike_hold_together_what_each_would_alone(actions):
    grown = Grown(axis=-2)
    for action in actions:
        grown.act(*action)
        for array, held in zip(grown.arrays, grown.held, strict=True):
            assert array.count == held.shape[1] and (array.count == 0 or (array.view == held).all())
