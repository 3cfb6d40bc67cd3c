"""kvquant: a slow twin, what tables and percentiles promise, outliers to the bit, tables that travel with a model."""

from functools import partial
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.formats.bits import unpack_bits
from refllm.formats.errors import FormatError
from refllm.formats.tensors import read_safetensors, write_safetensors
from refllm.kernels.rope import Rope, cos_sin, rotate
from refllm.methods.apply import check, needs_calibration
from refllm.methods.kvcache import kvquant
from refllm.methods.kvcache.kvquant import (
    LIMIT,
    decode,
    encode,
    fit_table,
    gather,
    key_outliers,
    middle,
    percentiles,
    scatter,
    token_rows,
    value_range,
)
from refllm.model.cache import new_cache
from refllm.model.cached import cache_sensitivity, cached_values
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model
from tests.unit.methods.kvcache import laws


def tables_of(K, bits=3, outliers=0.1, table=None, norm=False):
    """Of layer 0, for keys (B, Hk, T, D): their own percentiles, and a table that is not even."""
    table = np.sort(np.random.default_rng(bits).uniform(-1, 1, (1, 1 << bits)), axis=1) if table is None else table
    table = np.concatenate([table, 1.1 * table + 0.05] if norm else [table]).astype(np.float32)
    x = token_rows(K)
    return {
        "0.k_range": percentiles(x.reshape(-1, x.shape[-1]).astype(np.float64), outliers),
        "0.k_table": table,
        "0.v_table": -table[:1, ::-1] if not norm else table,
    }


def seen(store, k, v):
    """What a later call sees of k and v."""
    tokens = k.shape[-2]
    store.extend(k, v, np.arange(tokens))
    parts = {name: part.copy() for name, part in store.parts().items()}
    K, V, _ = store.extend(k[..., :1, :], v[..., :1, :], np.array([tokens]))
    return K[..., :tokens, :], V[..., :tokens, :], parts


def slow_token(x, limits, apart, table, back):
    """One token's numbers: codes, [(place, rest)], decoded numbers. limits: offset and spread of each."""
    codes, sparse, found = [], [], []
    for i, (number, (offset, spread), out) in enumerate(zip(x, limits, apart, strict=True)):
        if out:
            rest = float(np.float16(number - offset))
            sparse.append((i, rest))
            codes.append(0)
            found.append(offset + rest)
        else:
            near = [abs((number - offset) / spread - entry) for entry in table] if spread else [0]
            codes.append(near.index(min(near)))
            found.append(offset + spread * back[codes[-1]])
    return codes, sparse, found


def slow_quantile(x, q):
    x, h = sorted(x), q * (len(x) - 1)
    i = min(int(h), len(x) - 2) if len(x) > 1 else 0
    return x[i] + (x[min(i + 1, len(x) - 1)] - x[i]) * (h - i)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    bits=st.sampled_from([2, 3, 5]),
    share=st.sampled_from([0, 0.03, 0.3]),
    norm=st.booleans(),
)
def test_the_store_equals_the_slow_twin(seed, bits, share, norm):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_t(3, (2, 2, 2, 4, 5)).astype(np.float32)
    tables = tables_of(k[:, :, 1:], bits, 0.2, norm=norm)
    store = kvquant(0, bits=bits, outliers=share, sinks=0, norm=norm, tables=tables)
    K, V, parts = seen(store, k, v)
    low, high = tables["0.k_range"].astype(np.float64)
    taken = {"k": 0, "v": 0}
    for token in range(4):
        for row in range(2):
            x = k[row, :, token].ravel().astype(np.float64).tolist()
            k_limits = [((a + b) / 2, (b - a) / 2) for a, b in zip(low, high, strict=True)]
            apart = [bool(share) and (n < a or n > b) for n, a, b in zip(x, low, high, strict=True)]
            y = v[row, :, token].ravel().astype(np.float64).tolist()
            q = slow_quantile(y, share / 2), slow_quantile(y, 1 - share / 2)
            v_apart = [bool(share) and (n <= q[0] or n >= q[1]) for n in y]
            rest = [n for n, out in zip(y, v_apart, strict=True) if not out]
            own = float(np.float16((max(rest) + min(rest)) / 2)), float(np.float16((max(rest) - min(rest)) / 2))
            assert (parts["v_offset"][row, token, 0], parts["v_spread"][row, token, 0]) == own
            for side, numbers, limits, out, got in (("k", x, k_limits, apart, K), ("v", y, [own] * 10, v_apart, V)):
                table = tables[f"0.{side}_table"].astype(np.float64)
                codes, sparse, back = slow_token(numbers, limits, out, table[0].tolist(), table[-1].tolist())
                assert unpack_bits(parts[f"{side}_codes"], bits, 10)[row, token].tolist() == codes
                np.testing.assert_allclose(got[row, :, token].ravel(), back, rtol=1e-6, atol=1e-7)
                if share:
                    assert parts[f"{side}_counts"][row, token, 0] == len(sparse)
                    for place, number in sparse:
                        assert parts[f"{side}_places"][taken[side]] == place
                        assert parts[f"{side}_rest"][taken[side]] == number
                        taken[side] += 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), C=st.integers(1, 9), size=st.sampled_from([1e-3, 1.0, 300.0]))
def test_with_all_numbers_apart_nothing_but_float16_is_lost(seed, C, size):
    rng = np.random.default_rng(seed)
    k, v = size * rng.standard_t(2, (2, 1, 2, 6, C)).astype(np.float32).clip(-90, 90)
    store = kvquant(0, outliers=1.0, sinks=0, tables=tables_of(k[:, :, :3], 3, 1.0))
    for x, got in zip((k, v), seen(store, k, v), strict=False):
        largest = np.abs(x).max()
        assert np.abs(x - got).max() <= 2**-10 * largest + 2e-7


def test_the_even_table_is_plain_rounding_between_the_ends():
    """An asymmetric grid of 2^bits steps from each token's (or channel's) smallest number to its largest."""
    rng = np.random.default_rng(0)
    k, v = rng.integers(-64, 64, (2, 1, 2, 8, 16)).astype(np.float32) / 8
    tables = tables_of(k, 3, 0, table=np.linspace(-1, 1, 8)[None])
    tables["0.v_table"] = tables["0.k_table"]
    K, V, _ = seen(kvquant(0, outliers=0, sinks=0, tables=tables), k, v)
    for x, got, axes in ((k, K, 2), (v, V, (1, 3))):
        low, high = x.min(axis=axes, keepdims=True), x.max(axis=axes, keepdims=True)
        step = (high - low) / 7
        plain = low + step * np.rint((x - low) / step)
        np.testing.assert_allclose(np.abs(got - x), np.abs(plain - x), atol=2e-6)  # halves may go either way


def test_channels_are_easier_before_the_rotation():
    """Loud channels have a level of their own, until RoPE turns it by another angle in every token."""
    rng = np.random.default_rng(0)
    k = rng.normal(size=(1, 2, 256, 16)) + np.where(np.arange(16) % 5 == 0, 12, 0) * rng.normal(
        1, 0.05, (1, 2, 256, 16)
    )
    turned = rotate(k, *cos_sin(Rope(theta=10000.0), 16, np.arange(256), np.float64))
    errors = []
    for x in (k, turned):
        store = kvquant(0, bits=2, sinks=0, tables=tables_of(x, 2, 0.01, np.linspace(-1, 1, 4)[None]))
        errors.append(((seen(store, x, x)[0] - x) ** 2).mean())
    assert errors[0] < errors[1] / 3


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 4), weight=st.sampled_from([0.5, 8.0, 1e-6]))
def test_equal_weights_are_plain_k_means(seed, bits, weight):
    u = np.random.default_rng(seed).uniform(-1, 1, 200)
    plain = fit_table(u, np.ones(200), bits)
    np.testing.assert_array_equal(fit_table(u, np.full(200, weight), bits), plain)
    np.testing.assert_array_equal(fit_table(u, np.zeros(200), bits), plain)
    codes = np.abs(u[:, None] - plain[0]).argmin(axis=1)
    np.testing.assert_allclose(np.bincount(codes, u) / np.bincount(codes), plain[0], atol=1e-6)  # a mean of its own


def test_what_the_loss_minds_pulls_the_table():
    u = np.linspace(-1, 1, 101)
    table = fit_table(u, np.where(u > 0.9, 1e6, 1.0), 2)[0]
    assert (table > 0.9).sum() == 3
    assert (fit_table(u, np.ones(101), 2)[0] > 0.9).sum() == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 4))
def test_the_second_row_restores_mean_and_deviation(seed, bits):
    rng = np.random.default_rng(seed)
    u, weights = rng.uniform(-1, 1, 300), rng.random(300) ** 4
    table = fit_table(u, weights, bits, norm=True).astype(np.float64)
    np.testing.assert_array_equal(table[0], fit_table(u, weights, bits)[0])
    back = table[1][np.abs(u[:, None] - table[0]).argmin(axis=1)]
    np.testing.assert_allclose((back.mean(), back.std()), (u.mean(), u.std()), atol=1e-6)


def test_tables_of_nothing_and_of_one_number():
    even = np.linspace(-1, 1, 4)
    np.testing.assert_allclose(fit_table(np.zeros(0), np.zeros(0), 2, norm=True), [even, even])
    table = fit_table(np.full(5, 0.25), np.ones(5), 2, norm=True)
    assert (table == 0.25).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), share=st.sampled_from([0, 0.01, 0.2, 1]))
def test_percentiles_follow_their_channels_and_let_their_numbers_in(seed, share):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, (50, 6))
    order = rng.permutation(6)
    found = percentiles(x, share)
    np.testing.assert_array_equal(percentiles(x[:, order], share), found[:, order])
    exact = np.quantile(x, [share / 2, 1 - share / 2], axis=0)
    assert (found[0] <= exact[0]).all() and (found[1] >= exact[1]).all()
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="at most 32752"):
        percentiles(x * 1e6, share)


def test_outliers_of_keys_are_beyond_and_those_of_values_may_be_on_the_percentile():
    limits = np.array([[-1.0] * 5, [1.0] * 5])
    x = np.array([[1.0, -1.0, 1.25, -1.25, 0.0]])
    assert key_outliers(x, limits).tolist() == [[False, False, True, True, False]]
    # percentiles 25 and 75 of five numbers are numbers themselves
    apart, offset, spread = value_range(np.array([[0.0, 1.0, 2.0, 3.0, 9.0]]), 0.5)
    assert apart.tolist() == [[True, True, False, True, True]] and (offset, spread) == (2, 0)
    apart, offset, spread = value_range(np.array([[0.0, 1.0, 2.0, 3.0, 9.0]]), 0.2)
    assert apart.tolist() == [[True, False, False, False, True]] and (offset, spread) == (2, 1)


def test_the_farthest_outliers_stay_under_a_cap():
    limits = np.array([[-1.0, -2.0, -1.0, -1.0, 0.0], [1.0, 2.0, 1.0, 1.0, 0.0]])
    x = np.array([[3.0, 5.0, 3.0, -9.0, 0.0], [3.0, -9.0, -9.0, 0.5, 1e-9]])
    assert key_outliers(x, limits, 1).tolist() == [[True, False, False, True, False], [False, False, True, False, True]]
    assert key_outliers(x, limits, 2).tolist() == [[True, False, True, True, False], [True, True, True, False, True]]
    np.testing.assert_array_equal(key_outliers(x, limits, 5), key_outliers(x, limits))


@pytest.mark.parametrize("fill", [0.0, -0.0, 0.1, -300.0])
def test_tokens_of_equal_numbers_have_no_outliers_and_keep_them(fill):
    v = np.full((1, 2, 3, 8), fill, np.float32)
    k = np.random.default_rng(0).normal(size=v.shape).astype(np.float32)
    v[0, 1, 2, 7] = 5  # the last token has one other
    _, V, parts = seen(kvquant(0, sinks=0, tables=tables_of(k)), k, v)
    assert parts["v_counts"].ravel().tolist() == [0, 0, 1] and parts["v_places"].tolist() == [15]
    assert not parts["v_codes"].any()
    np.testing.assert_allclose(V, v, rtol=2**-10)


def test_a_channel_that_never_moves_is_kept():
    k = np.random.default_rng(0).normal(size=(1, 2, 30, 4)).astype(np.float32)
    k[:, 0, :, 1], k[:, 1, :, 2] = 0.1, 0  # 0.1 is no float16
    K, _, parts = seen(kvquant(0, outliers=0.1, sinks=0, tables=tables_of(k)), k, k)
    np.testing.assert_allclose(K[:, 0, :, 1], 0.1, rtol=1e-3)
    assert not K[:, 1, :, 2].any() and not {1, 6} & set(parts["k_places"].tolist())


def test_outliers_of_a_batch_come_back_to_their_rows():
    rng = np.random.default_rng(0)
    rest, apart = rng.normal(size=(2, 3, 4, 5)).astype(np.float16), rng.random((2, 3, 4, 5)) < 0.3
    sparse = gather(rest, apart)
    assert sparse["counts"].shape == (2, 3, 4, 1) and sparse["places"].dtype == np.uint8
    assert gather(np.zeros((1, 300)), np.ones((1, 300), bool))["places"].dtype == np.uint16
    x = np.full((2, 3, 4, 5), 7.0)
    scatter(x, 1.0, **sparse)
    np.testing.assert_array_equal(x, np.where(apart, 1.0 + rest.astype(np.float64), 7.0))
    assert sparse["rest"].tolist() == [rest[*at[1:3], at[0], at[3]] for at in np.argwhere(np.moveaxis(apart, 2, 0))]


def test_codes_are_made_with_the_offset_and_spread_that_are_stored():
    x = np.random.default_rng(3).normal(2000.3, 0.7, (64, 16))
    apart, offset, spread = value_range(x, 0)
    table = np.linspace(-1, 1, 16)[None]
    back = decode(encode(x, offset, spread, apart, table)[0], offset, spread, table)
    best = np.abs(x[..., None] - (offset + spread * table[0].astype(np.float64))[:, None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(x - back), best, atol=1e-9)
    exact = middle(np.stack([x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)]))
    assert (exact[0] != offset).all()


def test_first_and_last_tokens_are_kept_to_the_bit_and_bytes_are_counted():
    rng = np.random.default_rng(0)
    k, v = rng.standard_t(3, (2, 3, 2, 20, 8)).astype(np.float32)
    store = kvquant(0, bits=3, outliers=0.05, sinks=2, recent=4, tables=tables_of(k, 3, 0.05))
    K, V, parts = seen(store, k, v)
    for x, got in ((k, K), (v, V)):
        np.testing.assert_array_equal(got[..., :2, :], x[..., :2, :])
        np.testing.assert_array_equal(got[..., 16:, :], x[..., 16:, :])
        assert (got[..., 2:16, :] != x[..., 2:16, :]).any(axis=(0, 1, 3)).all()
    coded = 3 * 14
    apart = sum(int(parts[f"{side}_counts"].sum()) for side in "kv")
    assert apart > 2 * coded  # one of a token's sixteen values at each end, and some keys
    dense = 2 * 3 * 2 * 6 * 8 * 4
    assert sum(part.nbytes for part in parts.values()) == dense + coded * (2 * 6 + 2 + 4) + 3 * apart


def test_no_outliers_no_arrays_for_them():
    k, v = np.random.default_rng(0).normal(size=(2, 1, 2, 9, 8)).astype(np.float32)
    K, _, parts = seen(kvquant(0, outliers=0, sinks=0, tables=tables_of(k[:, :, :4])), k, v)
    assert set(parts) == {"k_codes", "v_codes", "v_offset", "v_spread"}
    low, high = tables_of(k[:, :, :4])["0.k_range"].astype(np.float64)
    assert (token_rows(K) <= high).all() and (token_rows(K) >= low).all()  # what is beyond takes the end


# --- calibration -----------------------------------------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(0, 64, 64)


def test_first_tokens_of_every_window_are_left_out(monkeypatch):
    rng = np.random.default_rng(0)
    K, V = rng.normal(size=(2, 3, 2, 10, 4))
    loud = K.copy(), V.copy()
    for x in loud:
        x[:, :, :2] = 1e6
    found = []
    for sides in ((K, V), loud):
        monkeypatch.setitem(kvquant.__globals__, "cached_values", lambda *_, sides=sides, **__: [sides])
        found.append(kvquant.learn(None, None, sinks=2, fisher=False))
    for name, array in found[0].items():
        np.testing.assert_array_equal(found[1][name], array)
    with pytest.raises(ValueError, match="leaves out 10 tokens of a window and is left with none"):
        kvquant.learn(None, None, sinks=10, fisher=False)


def test_what_is_learned_is_what_its_parts_say():
    model = random_model()
    found = kvquant.learn(model, IDS, bits=2, outliers=0.1, sinks=3)
    plain = kvquant.learn(model, IDS, bits=2, outliers=0.1, sinks=3, fisher=False)
    assert set(found) == {f"{layer}.{name}" for layer in range(2) for name in ("k_range", "k_table", "v_table")}
    values = cached_values(model, IDS, pre_rope=True)[1]
    squares = cache_sensitivity(model, IDS, pre_rope=True)[1]
    K, V = (token_rows(x[0, :, 3:]).astype(np.float64) for x in values)
    FK, FV = (token_rows(x[0, :, 3:]).astype(np.float64) for x in squares)
    np.testing.assert_array_equal(found["1.k_range"], percentiles(K, 0.1))
    low, high = found["1.k_range"].astype(np.float64)
    inside = (K >= low) & (K <= high)
    u = (K - (low + high) / 2) / ((high - low) / 2)
    np.testing.assert_array_equal(found["1.k_table"], fit_table(u[inside], FK[inside], 2))
    np.testing.assert_array_equal(plain["1.k_table"], fit_table(u[inside], np.ones(inside.sum()), 2))
    low, high = np.quantile(V, [0.05, 0.95], axis=1, keepdims=True)
    inside = (V >= low) & (V <= high)
    u = (V - (low + high) / 2) / ((high - low) / 2)
    np.testing.assert_array_equal(found["1.v_table"], fit_table(u[inside], FV[inside], 2))
    assert all((found[f"1.{side}_table"] != plain[f"1.{side}_table"]).any() for side in "kv")


def test_without_gradients_the_way_out_is_named():
    model = random_model("gemma3")
    with pytest.raises(ValueError, match=r"plain Llama only.*fisher=false"):
        kvquant.learn(model, IDS)
    with pytest.raises(ValueError, match="does not depend on the keys of layer 0: give more text, or fisher=false"):
        kvquant.learn(random_model(), IDS[:3], sinks=2)  # the last key is not read


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3", "deepseek_v2"])
def test_without_gradients_any_architecture_runs(architecture):
    model = random_model(architecture)
    small = refllm.compress(model, "kvquant:bits=4,fisher=no,outliers=0.1,norm=yes", IDS)
    cache = new_cache(small)
    forward(small, IDS[:30], cache=cache)
    got, exact = forward(small, IDS[30:32], cache=cache), forward(model, IDS[:32])[30:]
    assert 0 < np.abs(got - exact).max() < 0.5 * np.abs(exact).max()


# --- refusals --------------------------------------------------------------------------------------------------------

GOOD = tables_of(np.random.default_rng(0).normal(size=(1, 2, 9, 4)))


def damaged(name, array):
    return {**GOOD, f"0.{name}": array}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(bits=1), "bits must be 2 to 8, got 1"),
        (dict(bits=9), "bits must be 2 to 8, got 9"),
        (dict(outliers=1.5), "share from 0 to 1, got 1.5"),
        (dict(outliers=float("nan")), "share from 0 to 1, got nan"),
        (dict(cap=-1), "cap must be 0"),
        (dict(sinks=-1), "0 or more tokens in full"),
        (dict(tables=None), "tables=kvquant.learn"),
        (dict(tables={}), "no table '0.k_range'"),
        (dict(bits=4), r"0.k_table must be float32 \(1, 16\).*got float32 \(1, 8\)"),
        (dict(norm=True), r"0.k_table must be float32 \(2, 8\).*norm=True"),
        (dict(tables=damaged("v_table", GOOD["0.v_table"].astype(np.float64))), "0.v_table must be float32"),
        (dict(tables=damaged("v_table", GOOD["0.v_table"][:, ::-1])), "rising"),
        (dict(tables=damaged("v_table", np.full((1, 8), np.nan, np.float32))), "finite"),
        (dict(tables=damaged("k_range", GOOD["0.k_range"][::-1])), "not below"),
        (dict(tables=damaged("k_range", GOOD["0.k_range"][:1])), r"float16 \(2, channels\).*got float16 \(1, 8\)"),
        (dict(tables=damaged("k_range", GOOD["0.k_range"].astype(np.float32))), "float16"),
        (dict(tables=damaged("k_range", np.full((2, 8), inf, np.float16))), "at most 32752"),
    ],
)
def test_bad_knobs_and_tables(knobs, message):
    with pytest.raises(ValueError, match=message) as error:
        kvquant(0, **{"tables": GOOD, **knobs})
    assert "\n" not in str(error.value)


def test_a_layer_without_tables():
    with pytest.raises(ValueError, match=r"no table '1\.k_range'"):
        kvquant(1, tables=GOOD)


@pytest.mark.parametrize(
    ("width", "fill", "message"),
    [
        (5, 0.0, "learned 8 channels of keys, got 10"),
        (4, np.nan, "finite"),
        (4, inf, "finite"),
        (4, LIMIT * 1.01, "at most 32752"),
    ],
)
def test_a_refusal_leaves_the_store_as_it_was(width, fill, message):
    store = kvquant(0, sinks=0, tables=GOOD)
    good = np.ones((1, 2, 3, 4), np.float32)
    store.extend(good, good, np.arange(3))
    before = {name: part.copy() for name, part in store.parts().items()}
    wrong = np.full((1, 2, 1, width), fill, np.float32)
    with pytest.raises(ValueError, match=message):
        store.extend(wrong, wrong, np.array([3]))
    assert store.length == 3 and all(np.array_equal(store.parts()[name], part) for name, part in before.items())


def test_the_largest_numbers_are_stored_and_too_many_channels_refused():
    k = np.full((1, 2, 4, 4), LIMIT, np.float32)
    k[..., ::2, :] *= -1
    K, V, _ = seen(kvquant(0, outliers=0.5, sinks=0, tables=damaged("k_range", np.float16([[-LIMIT] * 8] * 2))), k, k)
    np.testing.assert_array_equal(K, k)
    np.testing.assert_array_equal(V, k)
    wide = np.zeros((1, 1, 1, 65536), np.float32)
    with pytest.raises(ValueError, match="up to 65535 channels of a token, got 65536 of a value"):
        kvquant(0, tables=GOOD).extend(np.zeros((1, 2, 1, 4), np.float32), wide, np.array([0]))


# --- in a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_is_learned_stored_loaded_and_run(tmp_path):
    model = refllm.load("tiny")
    ids = np.array(model.tokenizer.encode("Once upon a time there was a small dog who lived in a house. " * 8))[:96]
    assert needs_calibration("kvquant")
    with pytest.raises(ValueError, match="kvquant needs calibration tokens"):
        refllm.compress(model, "kvquant")
    check(model, "kvquant:bits=3", ids)
    small = refllm.compress(model, "kvquant:bits=3", ids)
    assert small.recipe == "kvquant:bits=3" and len(small.tables) == 12
    save_native(small, tmp_path / "m")
    models = small, refllm.load(tmp_path / "m")
    caches = [new_cache(m) for m in models]
    for part in (ids[:40], ids[40:60]):
        got = [forward(m, part, cache=c) for m, c in zip(models, caches, strict=True)]
        np.testing.assert_array_equal(*got)
    assert np.abs(got[0] - forward(model, ids[:60])[40:]).max() > 0
    tables = {name.removeprefix("kvquant."): array for name, array in small.tables.items()}
    k, v = cached_values(model, ids[:40], pre_rope=True, window=40)[0]
    unrotated = kvquant(0, tables=tables)
    unrotated.extend(k, v, np.arange(40))
    caches[0].truncate(40)
    laws.same_state(caches[0].stores[0], unrotated)
    again = new_cache(model, partial(kvquant, tables=tables))
    forward(model, ids[:40], cache=again)
    np.testing.assert_array_equal(forward(model, ids[40:60], cache=again), got[0])


@pytest.mark.parametrize("name", ["k_range", "k_table", None])
def test_a_damaged_table_is_refused_when_loaded(tmp_path, name):
    small = refllm.compress(random_model(), "kvquant:outliers=0.1", IDS)
    save_native(small, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    arrays = {n: tensor.stored() for n, tensor in read_safetensors(file)[0].items()}
    for key in [key for key in arrays if key.startswith("tables.")]:
        if name is None:
            del arrays[key]
        elif key.endswith(name):
            arrays[key] = arrays[key][:, ::-1] if name == "k_table" else arrays[key][:1]
    write_safetensors(file, arrays)
    with pytest.raises(FormatError, match="the stored tables do not fit: kvquant"):
        refllm.load(tmp_path / "m")
