"""rotatekv: what is turned and reordered comes back, codes are those of a slow twin, loud channels are spread."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.formats.bits import unpack_bits
from refllm.formats.errors import FormatError
from refllm.kernels.hadamard import hadamard
from refllm.methods.kvcache.kivi import dequantize_groups
from refllm.methods.kvcache.rotatekv import (
    channel_order,
    rotatekv,
    round_groups,
    together,
    turn_keys,
    turn_keys_back,
)
from refllm.model.cache import new_cache
from refllm.model.cached import cached_values
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model

IDS = np.random.default_rng(0).integers(0, 64, 50)


def of(order, **knobs):
    return rotatekv(0, tables={"0.order": np.asarray(order, np.uint16)}, **knobs)


def shuffled(n, seed=0):
    return np.random.default_rng(seed).permutation(n)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    count=st.integers(1, 8),
    D=st.sampled_from([1, 4, 8, 12]),
    heads=st.integers(1, 9),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_turning_and_reordering_without_rounding_is_the_identity(seed, count, D, heads, dtype):
    if together(count, heads) * D not in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 60, 64, 72, 80, 84, 96):
        return  # no such Hadamard matrix
    k = np.random.default_rng(seed).normal(size=(2, count, 3, D)).astype(dtype)
    rows = turn_keys(k, heads)
    order = shuffled(count * D, seed)
    back = turn_keys_back(rows[..., order][..., np.argsort(order)], D, heads)
    assert rows.shape == (2, 3, count * D) and back.shape == k.shape and back.dtype == dtype
    np.testing.assert_allclose(back, k, atol=50 * np.finfo(dtype).eps)
    np.testing.assert_allclose((rows**2).sum(-1), (k**2).sum((1, -1)), rtol=1e-5 if dtype == np.float32 else 1e-12)


def test_four_heads_are_turned_by_one_orthonormal_matrix():
    n = 4 * 8
    H = hadamard(n) / np.sqrt(n)
    np.testing.assert_allclose(H @ H.T, np.eye(n), atol=1e-15)
    k = np.random.default_rng(1).normal(size=(8, 5, 8))
    rows = turn_keys(k, 4)
    for token in range(5):
        for group in range(2):
            numbers = k[4 * group : 4 * group + 4, token].ravel()  # head after head
            np.testing.assert_allclose(rows[token, group * n : (group + 1) * n], H @ numbers, atol=1e-12)


def test_turning_in_the_store_is_turning_the_projection():
    """What the authors fold into the weight: the rows of W are turned and reordered in its place."""
    rng = np.random.default_rng(2)
    W, X, order = rng.normal(size=(32, 6)), rng.normal(size=(5, 6)), shuffled(32)
    k = (X @ W.T).reshape(5, 4, 8).swapaxes(0, 1)
    folded = (hadamard(32) / np.sqrt(32) @ W)[order]
    np.testing.assert_allclose(turn_keys(k, 4)[..., order], X @ folded.T, atol=1e-12)


@pytest.mark.parametrize(("count", "heads", "expected"), [(8, 4, 4), (6, 4, 3), (7, 4, 1), (2, 4, 2), (9, 3, 3)])
def test_as_many_heads_as_divide_their_number(count, heads, expected):
    assert together(count, heads) == expected


def test_channels_are_sorted_by_signed_sums_over_windows_and_tokens():
    K = np.random.default_rng(3).normal(size=(3, 2, 7, 8)).astype(np.float32)
    order = channel_order(K, 4)
    sums = turn_keys(K.astype(np.float64), 4).sum(axis=(0, 1))
    assert order.dtype == np.uint16 and sorted(order.tolist()) == list(range(16))
    assert (np.diff(sums[order]) > 0).all() and sums[order[0]] < 0 < sums[order[-1]]
    assert channel_order(np.zeros((1, 2, 4, 8)), 4).tolist() == list(range(16))  # ties stay in order


def f16_down(x):
    found = np.float16(float(x))
    return found if Fraction(float(found)) <= x else np.nextafter(found, np.float16(-np.inf))


def group_slowly(x, bits):
    """Codes, scale, low and what comes back of one group, in fractions."""
    x = [Fraction(float(v)) for v in x]
    keep = Fraction(8, 10) if bits == 2 else Fraction(1)
    middle, half = (max(x) + min(x)) / 2, keep * (max(x) - min(x)) / 2
    x = [min(max(v, middle - half), middle + half) for v in x]
    low = Fraction(float(f16_down(min(x))))
    scale = Fraction(float(np.float16(float((max(x) - low) / (2**bits - 1)))))
    codes = [round(min(max((v - low) / (scale or 1), Fraction(0)), Fraction(2**bits - 1))) for v in x]
    return codes, float(scale), float(low), [float(low + scale * c) for c in codes]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), bits=st.integers(2, 8), far=st.sampled_from([0, 1, 40, -300]))
def test_groups_equal_the_slow_twin(seed, bits, far):
    x = np.random.default_rng(seed).normal(far, 1, 9)
    codes, scale, low = round_groups(x, bits)
    expected = group_slowly(x, bits)
    assert (codes.tolist(), scale.item(), low.item()) == expected[:3]
    np.testing.assert_allclose(dequantize_groups(codes, scale, low, np.float64), expected[3], rtol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_divisor_is_the_largest_code_and_only_two_bits_are_clipped(bits):
    x = np.linspace(-1, 1, 17)
    _, scale, low = round_groups(x, bits)
    keep = 0.8 if bits == 2 else 1
    assert abs(scale / (keep * 2 / (2**bits - 1)) - 1) < 2e-3
    assert abs(low + keep) < 1e-3


def test_a_group_far_from_zero_keeps_its_numbers_and_a_constant_one_is_exact():
    """Shrinking both ends towards zero would leave 8 .. 8.8 of the range 10 .. 11."""
    x = np.linspace(10, 11, 16)
    back = dequantize_groups(*round_groups(x, 2), np.float64)
    assert len(set(back.tolist())) == 4 and np.abs(back - x).max() < 0.25
    for constant in (0.0, -0.0, 3.5, -1000.0):
        back = dequantize_groups(*round_groups(np.full(5, constant), 2), np.float64)
        np.testing.assert_array_equal(back, constant)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_store_holds_rows_of_keys_and_heads_of_values(dtype):
    rng = np.random.default_rng(4)
    k, v = rng.normal(size=(2, 3, 4, 6, 8)).astype(dtype)
    order = shuffled(32)
    store = of(order, bits=3, group_size=16, sinks=1)
    K, V, at = store.extend(k, v, np.arange(6))
    parts = store.parts()
    assert parts["k_codes"].shape == (3, 5, 12) and parts["v_codes"].shape == (3, 4, 5, 3)
    assert store.nbytes == 3 * 5 * (12 + 2 * 4 + 4 * (3 + 4)) + 3 * 4 * 8 * 2 * k.itemsize
    rows = turn_keys(k, 4)[..., order]
    values = v @ (hadamard(8) / np.sqrt(8)).astype(dtype)
    for b, token in np.ndindex(3, 5):
        for group in range(2):
            codes, scale, low, _ = group_slowly(rows[b, token + 1, 16 * group : 16 * group + 16], 3)
            got = unpack_bits(parts["k_codes"], 3, 32)[b, token, 16 * group : 16 * group + 16]
            assert got.tolist() == codes
            assert (parts["k_scale"][b, token, group], parts["k_low"][b, token, group]) == (scale, low)
        for head in range(4):
            expected = group_slowly(values[b, head, token + 1], 3)
            np.testing.assert_allclose(V[b, head, token + 1] @ hadamard(8) / np.sqrt(8), expected[3], atol=1e-5)
    assert at.tolist() == list(range(6)) and K.dtype == V.dtype == dtype


def test_sinks_come_back_to_the_bit_and_a_call_sees_its_own_tokens_coded():
    rng = np.random.default_rng(5)
    k, v = rng.normal(size=(2, 1, 2, 9, 8)).astype(np.float32)
    for cuts in ((9,), (1, 3, 9)):
        store, start = of(shuffled(16), sinks=4), 0
        for stop in cuts:
            K, V, _ = store.extend(k[..., start:stop, :], v[..., start:stop, :], np.arange(start, stop))
            start = stop
        np.testing.assert_array_equal(K[..., :4, :], k[..., :4, :])
        np.testing.assert_array_equal(V[..., :4, :], v[..., :4, :])
        assert (K[..., 4:, :] != k[..., 4:, :]).mean() > 0.9 and (V[..., 4:, :] != v[..., 4:, :]).mean() > 0.9


@pytest.mark.parametrize("D", [8, 12, 20])
def test_eight_bits_are_nearly_exact_at_widths_of_every_construction(D):
    """Hadamard matrices of 12 and 20 are not symmetric: turning back is another product than turning."""
    k, v = np.random.default_rng(8).normal(size=(2, 1, 4, 7, D)).astype(np.float32)
    K, V, _ = of(shuffled(4 * D), bits=8, sinks=0).extend(k, v, np.arange(7))
    assert np.abs(K - k).max() < 0.05 and np.abs(V - v).max() < 0.05


def test_keys_are_stored_before_the_rotation():
    model = random_model()
    small = refllm.compress(model, "rotatekv:sinks=3", IDS)
    cache = new_cache(small)
    forward(small, IDS[:5], cache=cache)
    (K, V), *_ = cached_values(model, IDS[:5], pre_rope=True)
    np.testing.assert_array_equal(cache.stores[0].parts()["k_sinks"], K[..., :3, :])
    np.testing.assert_array_equal(cache.stores[0].parts()["v_sinks"], V[..., :3, :])


def error(k, order, heads):
    store = of(order, bits=2, heads=heads, group_size=32, sinks=0)
    return np.square(store.extend(k, k, np.arange(k.shape[-2]))[0] - k).sum() / np.square(k).sum()


@pytest.mark.parametrize("loud", [8, 25])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_keys_with_loud_channels_lose_less_than_half_of_what_plain_groups_lose(loud, heads):
    """Two channels of every head are loud in all tokens; without the order most of the gain is gone."""
    rng = np.random.default_rng(6)
    k = rng.normal(size=(1, 4, 200, 32)).astype(np.float32)
    for head in range(4):
        k[:, head, :, [3 + head, 17]] = 3 * k[:, head, :, [3 + head, 17]] + loud
    plain = np.square(dequantize_groups(*round_groups(k, 2), np.float32) - k).sum() / np.square(k).sum()
    sorted_ = error(k, channel_order(k, heads), heads)
    assert 2 * sorted_ < plain and 1.9 * sorted_ < error(k, np.arange(128), heads)


def test_learning_gives_the_order_of_every_layer():
    model = random_model()
    tables = rotatekv.learn(model, IDS)
    assert list(tables) == ["0.order", "1.order"]
    for layer, (K, _) in enumerate(cached_values(model, IDS, pre_rope=True)):
        np.testing.assert_array_equal(tables[f"{layer}.order"], channel_order(K, 4))
    assert not np.array_equal(*tables.values())
    assert not np.array_equal(tables["0.order"], rotatekv.learn(model, IDS, heads=1)["0.order"])
    with pytest.raises(ValueError, match="what rotatekv turns of a key is 6 wide"):
        rotatekv.learn(random_model("deepseek_v3"), IDS)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(bits=1), "bits must be 2 to 8, got 1"),
        (dict(bits=9), "bits must be 2 to 8, got 9"),
        (dict(group_size=0), "must be positive, got 0 and 4"),
        (dict(heads=0), "must be positive, got 128 and 0"),
        (dict(group_size=6), "must divide the 16 channels of a key's heads, got 6"),
        (dict(sinks=-1), "keeps 0 or more tokens in full"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        of(range(16), **knobs)


@pytest.mark.parametrize(
    "order",
    [
        np.arange(16, dtype=np.int64),
        np.zeros(16, np.uint16),
        np.arange(1, 17, dtype=np.uint16),
        np.arange(16, dtype=np.uint16).reshape(2, 8),
    ],
)
def test_an_order_that_is_none(order):
    with pytest.raises(ValueError, match=r"0 \.\. n - 1 once each, uint16") as caught:
        rotatekv(0, tables={"0.order": order})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tables", [None, {}, {"1.order": np.arange(16, dtype=np.uint16)}])
def test_a_missing_order(tables):
    with pytest.raises(ValueError, match="order of the channels of layer 0: a recipe learns it"):
        rotatekv(0, tables=tables)


def test_what_does_not_fit_is_refused_and_leaves_the_store_unchanged():
    store = of(shuffled(16), sinks=0)
    x = np.ones((1, 2, 1, 8), np.float32)
    store.extend(x, x, np.array([0]))
    before = {name: part.copy() for name, part in store.parts().items()}
    for k, v, message in (
        (x[:, :1], x[:, :1], "order of 16 channels, got 1 heads of 8: learn it again"),
        (x, x[..., :6], "what rotatekv turns of a value is 6 wide"),
        (x * np.float32(np.nan), x, "finite and at most 2000"),
        (x, x * np.float32(2001), "finite and at most 2000"),
        (x.astype(np.float64), x, "stay as in the first call"),
    ):
        with pytest.raises(ValueError, match=message):
            store.extend(k, v, np.array([1]))
    assert store.length == 1
    for name, part in store.parts().items():
        np.testing.assert_array_equal(part, before[name])
    wide = np.ones((1, 4, 1, 512), np.float32)
    with pytest.raises(ValueError, match="up to 1024 channels together, got 2048: take fewer heads"):
        of(range(2048)).extend(wide, wide, np.array([0]))
    big = np.full((1, 4, 1, 256), 2000, np.float32)
    K, _, _ = of(range(1024), sinks=0).extend(big, big, np.array([0]))
    assert np.isfinite(K).all()


def test_a_recipe_is_stored_loaded_and_run_and_damage_is_found(tmp_path):
    model = random_model()
    small = refllm.compress(model, "rtn:bits=8,group=8+rotatekv:bits=4,group_size=8,sinks=2", IDS)
    save_native(small, tmp_path / "m")
    models = small, refllm.load(tmp_path / "m")
    assert sorted(small.tables) == ["rotatekv.0.order", "rotatekv.1.order"]
    caches = [new_cache(m) for m in models]
    for part in (IDS[:40], IDS[40:]):
        np.testing.assert_array_equal(*(forward(m, part, cache=c) for m, c in zip(models, caches, strict=True)))
    assert caches[0].nbytes == 2 * (48 * (8 + 2 * 4 + 2 * (4 + 4)) + 2 * 2 * 16 * 4)  # layers, coded tokens and sinks
    for damaged in ({}, {"rotatekv.0.order": small.tables["rotatekv.0.order"][:-1]}):
        save_native(
            refllm.model.model.Model(small.config, small.weights, recipe=small.recipe, tables=damaged),
            tmp_path / "m",
            overwrite=True,
        )
        with pytest.raises(FormatError, match="the stored tables do not fit: rotatekv"):
            refllm.load(tmp_path / "m")


def test_a_recipe_without_a_text_is_refused():
    with pytest.raises(ValueError, match="rotatekv needs calibration tokens"):
        refllm.compress(random_model(), "rotatekv")
