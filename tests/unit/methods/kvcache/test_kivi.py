"""kivi against a twin that builds the stored state of S tokens from scratch, one group at a time, in Python loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.formats.bits import unpack_bits
from refllm.methods.kvcache.kivi import KiviStore, dequantize_groups, kivi, quantize_groups
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from tests.models import random_model


def random_kv(tokens, *, lead=(1, 2), dim=8, value_dim=None, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shape = lambda d: (*lead, tokens, d)
    return rng.normal(size=shape(dim)).astype(dtype), rng.normal(size=shape(value_dim or dim)).astype(dtype)


def feed(store, k, v, cuts=()):
    """Extend with the tokens in chunks that end at `cuts` and at the end; the last call's result."""
    start, result = store.length, None
    for stop in (*cuts, k.shape[-2]):
        result = store.extend(k[..., start:stop, :], v[..., start:stop, :], np.arange(start, stop))
        start = stop
    return result


def quantize_slowly(group, bits):
    """One group, one number at a time: (codes, scale, minimum, reconstruction)."""
    lowest = min(group)
    minimum = np.float16(lowest)
    if minimum > lowest:
        minimum = np.nextafter(minimum, np.float16(-np.inf))
    kind = group.dtype.type
    levels = 2**bits - 1
    scale = np.float16((max(group) - kind(minimum)) / kind(levels))
    step = kind(scale) if scale > 0 else kind(1)
    codes = [int(np.rint(min(max((x - kind(minimum)) / step, 0), levels))) for x in group]
    return codes, scale, minimum, [kind(c) * kind(scale) + kind(minimum) for c in codes]


def state_slowly(k, v, bits, G, R):
    """What must be stored after all tokens of k, v: codes, scales, minima, tokens in full; and the reconstruction."""
    tokens = k.shape[-2]
    lead = k.shape[:-2]
    n_k, n_v = tokens // R * R, max(0, tokens - R)
    K, V = k.copy(), v.copy()
    state = {"k_full": k[..., n_k:, :], "v_full": v[..., n_v:, :]}
    for side in "kv":
        for name in ("codes", "scale", "min"):
            state[f"{side}_{name}"] = {}
    for head in np.ndindex(*lead):
        for channel in range(k.shape[-1]):
            for start in range(0, n_k, G):
                key = (*head, start // R, channel, start % R // G)
                codes, scale, minimum, back = quantize_slowly(k[head][start : start + G, channel], bits)
                state["k_codes"][key], state["k_scale"][key], state["k_min"][key] = codes, scale, minimum
                K[head][start : start + G, channel] = back
        for token in range(n_v):
            for start in range(0, v.shape[-1], G):
                key = (*head, token, start // G)
                codes, scale, minimum, back = quantize_slowly(v[head][token, start : start + G], bits)
                state["v_codes"][key], state["v_scale"][key], state["v_min"][key] = codes, scale, minimum
                V[head][token, start : start + G] = back
    return state, K, V


def assert_state(store, state, G):
    parts = store.parts()
    for name, expected in state.items():
        if not len(expected) or (isinstance(expected, np.ndarray) and not expected.size):
            assert name not in parts
        elif name.endswith("full"):
            np.testing.assert_array_equal(parts[name], expected)
        elif name.endswith("codes"):
            groups = parts[name.replace("codes", "scale")].shape[-1]
            codes = unpack_bits(parts[name], store.bits, groups * G)
            for key, group in expected.items():
                at = key[-1] * G
                assert codes[key[:-1]][at : at + G].tolist() == group
        else:
            assert parts[name].dtype == np.float16
            assert parts[name].size == len(expected)
            for key, number in expected.items():
                assert parts[name][key] == number


def assert_same_parts(one, other):
    a, b = one.parts(), other.parts()
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- the quantiser ---------------------------------------------------------------------------------------------------


def test_codes_by_hand_with_ties_to_even_and_clip_before_rounding():
    codes, scale, minimum = quantize_groups(np.array([-1.0, 0.0, 1.0, 2.0, 5.0]), 2)  # step 2, ties at 0, 2
    assert (scale, minimum) == (2.0, -1.0)
    assert codes.tolist() == [0, 0, 1, 2, 3]  # (0 - -1)/2 = 0.5 -> 0; (2 - -1)/2 = 1.5 -> 2
    assert dequantize_groups(codes, scale, minimum, np.float64).tolist() == [-1.0, -1.0, 1.0, 3.0, 5.0]


@pytest.mark.parametrize("constant", [0.0, -0.0, 1.0, -3.5, 65504.0, -65504.0, 2.0**-24, 2.0**-14])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_constant_group_of_a_float16_number_is_exact(constant, bits):
    if bits == 1 and abs(constant) > 32752:
        constant /= 2
    x = np.full(32, constant, np.float32)
    codes, scale, minimum = quantize_groups(x, bits)
    assert scale == 0 and not codes.any()
    np.testing.assert_array_equal(dequantize_groups(codes, scale, minimum), x)


@pytest.mark.parametrize("constant", [0.1, -0.1, 1000.3, -1 / 3, 60001.0])
def test_constant_group_of_any_other_number_costs_a_tiny_step(constant):
    x = np.full(32, constant, np.float32)
    codes, scale, minimum = quantize_groups(x, 2)
    assert len(set(codes.tolist())) == 1
    gap = float(np.spacing(np.float16(abs(constant))))  # minimum is the float16 number below
    assert 0 < constant - float(minimum) <= gap
    # The step is a third of what is missing, rounded to 11 bits or to a multiple of 2^-24; code 3 takes it three times.
    bound = max(gap * 2.0**-11, 3 * 2.0**-25)
    np.testing.assert_allclose(dequantize_groups(codes, scale, minimum, np.float64), x, rtol=0, atol=bound)


finite = st.floats(-65504, 65504, width=32)


@settings(max_examples=200, deadline=None)
@given(
    x=st.lists(st.lists(finite, min_size=8, max_size=8), min_size=1, max_size=4),
    bits=st.integers(2, 8),
    spread=st.sampled_from([1.0, 1e-3, 1e-7]),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
)
def test_error_is_at_most_half_a_step(x, bits, spread, offset):
    """|x^ - x| <= scale / 2, up to the rounding of float16 scales and of the float arithmetic."""
    x = (np.array(x) * spread * 0.9 + offset).astype(np.float32)
    codes, scale, minimum = quantize_groups(x, bits)
    assert codes.max() < 2**bits
    assert (minimum <= x.min(axis=-1)).all()
    back = dequantize_groups(codes, scale, minimum, np.float64)
    wide = scale.astype(np.float64)[:, None]
    # A subnormal scale (below 2^-14) is off by up to 2^-25, and the largest element is 2^bits - 1 of them away.
    # A normal one is off by 2^-11 of itself: (2^bits - 1) 2^-11 < 1/2 for 8 bits, so its clipped end stays within half.
    subnormal = (2**bits - 1) * 2.0**-25
    arithmetic = 4 * np.finfo(np.float32).eps * np.abs(x).max()
    assert (np.abs(back - x) <= wide / 2 + subnormal + arithmetic).all()


# --- the stored state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8, 9, 15, 16, 17, 23])
@pytest.mark.parametrize("bits", [2, 3])
def test_state_and_values_equal_the_slow_twin(tokens, bits):
    k, v = random_kv(tokens, lead=(2, 2), dim=4, value_dim=8, seed=tokens)
    store = kivi(0, bits=bits, group_size=4, residual=8)
    feed(store, k, v)
    state, K, V = state_slowly(k, v, bits, 4, 8)
    assert_state(store, state, 4)
    # What the next call reads of the old tokens is the reconstruction, in the float32 of the twin to the last bit.
    more = random_kv(1, lead=(2, 2), dim=4, value_dim=8, seed=99)
    got_k, got_v, positions = store.extend(*more, np.array([tokens]))
    np.testing.assert_array_equal(got_k, np.concatenate([K, more[0]], axis=-2))
    np.testing.assert_array_equal(got_v, np.concatenate([V, more[1]], axis=-2))
    np.testing.assert_array_equal(positions, np.arange(tokens + 1))


def test_prefill_attends_over_unquantised_tokens_and_a_step_quantises_after_itself():
    k, v = random_kv(9)
    store = kivi(0, group_size=4, residual=4)
    K, V, _ = feed(store, k[..., :4, :], v[..., :4, :])
    np.testing.assert_array_equal(K, k[..., :4, :])  # exactly R tokens: all keys are quantised, but only afterwards
    assert "k_full" not in store.parts() and store.parts()["v_full"].shape[-2] == 4
    for n in range(4, 8):
        K, V, _ = store.extend(k[..., n : n + 1, :], v[..., n : n + 1, :], np.array([n]))
        np.testing.assert_array_equal(K[..., 4:, :], k[..., 4 : n + 1, :])  # the window, this step's token included
        oldest_full = max(0, n - 4)  # before the flush of this step: R old tokens and the new one
        np.testing.assert_array_equal(V[..., oldest_full:, :], v[..., oldest_full : n + 1, :])
        assert (K[..., :4, :] != k[..., :4, :]).any()
    assert "k_full" not in store.parts()  # the second block, right after its last step


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lossless_until_the_window_is_full(dtype):
    """Keys iff S < R, values iff S <= R: seen by the next call, since a call sees its own tokens in full."""
    for tokens, keys_exact, values_exact in ((7, True, True), (8, False, True), (9, False, False)):
        k, v = random_kv(tokens + 1, dtype=dtype)
        store = kivi(0, group_size=4, residual=8)
        K, V, _ = feed(store, k, v, cuts=(tokens,))
        assert K.dtype == V.dtype == dtype
        assert np.array_equal(K, k) is keys_exact
        assert np.array_equal(V, v) is values_exact


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    data=st.data(),
    blocks=st.integers(1, 3),
    rollback=st.integers(0, 6),
)
def test_state_does_not_depend_on_chunks(tokens, data, blocks, rollback):
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens), max_size=6)) - {tokens})
    k, v = random_kv(tokens, seed=tokens)
    at_once, in_chunks = (kivi(0, group_size=4, residual=4 * blocks) for _ in range(2))
    in_chunks.rollback = rollback
    feed(at_once, k, v)
    feed(in_chunks, k, v, cuts)
    in_chunks.rollback = 0
    nothing = k[..., :0, :], v[..., :0, :]
    in_chunks.extend(*nothing, np.arange(0))  # what rollback held back becomes due with the next call
    assert_same_parts(at_once, in_chunks)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 100, 129])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_nbytes_is_the_formula(tokens, bits):
    B, Hk, D, Dv, G, R = 2, 3, 16, 24, 8, 32
    k, v = random_kv(tokens, lead=(B, Hk), dim=D, value_dim=Dv)
    store = kivi(0, bits=bits, group_size=G, residual=R)
    assert store.nbytes == 0
    feed(store, k, v)
    n_k, n_v = tokens // R * R, max(0, tokens - R)
    # Codes fill whole bytes here: R and Dv are multiples of 8. Scale and minimum: 2 + 2 bytes a group.
    packed = n_k * D * bits // 8 + n_k // G * D * 4 + n_v * Dv * bits // 8 + n_v * (Dv // G) * 4
    full = 4 * ((tokens - n_k) * D + (tokens - n_v) * Dv)
    assert store.nbytes == B * Hk * (packed + full) == sum(x.nbytes for x in store.parts().values())
    if n_k and bits == 2:  # bits + 32 / G per quantised element, as the docstring says
        parts = store.parts()
        stored = sum(parts[f"k_{name}"].nbytes for name in ("codes", "scale", "min"))
        assert 8 * stored == B * Hk * n_k * D * (bits + 32 / G)


def test_keys_are_grouped_by_channel_and_values_by_token():
    """Channel outliers cost keys nothing and token outliers values nothing; grouped the other way they cost a lot."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, 64, 32)).astype(np.float32)
    by_channel, by_token = x.copy(), x.copy()
    by_channel[..., ::8] *= 50
    by_token[..., ::8, :] *= 50

    def errors(outliers):
        store = kivi(0, group_size=32, residual=32)
        feed(store, outliers, outliers)
        K, V, _ = store.extend(x[..., :1, :], x[..., :1, :], np.array([64]))
        plain = np.abs(outliers[..., :32, :]) < 5  # what is no outlier
        return [np.abs(back[..., :32, :] - outliers[..., :32, :])[plain].mean() for back in (K, V)]

    keys, values = errors(by_channel)
    assert keys * 10 < values
    keys, values = errors(by_token)
    assert values * 10 < keys


def test_a_one_token_group_is_not_two_bits():
    """Groups of one element reproduce it (up to float16) and cost bits + 32 bits: they must be billed so."""
    k, v = random_kv(4)
    store = kivi(0, bits=2, group_size=1, residual=1)
    feed(store, k, v)
    quantised_keys, quantised_values = 4 * 8 * 2, 3 * 8 * 2
    assert store.nbytes == quantised_keys * (1 + 4) + 2 * 3 * (2 + 8 * 4) + 8 * 2 * 4
    assert quantised_values == 48


# --- rolling back ----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(before=st.integers(0, 20), drafts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=8))
def test_drafts_leave_no_trace(before, drafts):
    """Speculative decoding: passes of which some tokens are taken back, against the same tokens in single steps."""
    (k, v), rejects = random_kv(60), random_kv(60, seed=7)
    drafted, plain = (kivi(0, group_size=4, residual=8) for _ in range(2))
    drafted.rollback = 6
    if before:
        feed(drafted, k[..., :before, :], v[..., :before, :])
    length = before
    for chunk, rejected in drafts:
        stop = length + chunk
        keep = max(length, stop - rejected)
        mixed_k, mixed_v = (
            np.concatenate([right[..., length:keep, :], wrong[..., keep:stop, :]], axis=-2)
            for right, wrong in zip((k, v), rejects, strict=True)
        )
        K, _, _ = drafted.extend(mixed_k, mixed_v, np.arange(length, stop))
        np.testing.assert_array_equal(K[..., length:, :], mixed_k)
        drafted.truncate(keep)
        assert drafted.length == keep
        length = keep
    next_k, next_v = k[..., length : length + 1, :], v[..., length : length + 1, :]
    if length:
        feed(plain, k[..., :length, :], v[..., :length, :])
    for got, expected in zip(*(s.extend(next_k, next_v, np.array([length])) for s in (drafted, plain)), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_rollback_into_quantised_tokens_is_refused_and_changes_nothing():
    k, v = random_kv(20)
    store = kivi(0, group_size=4, residual=8)
    feed(store, k, v)
    before = {name: part.copy() for name, part in store.parts().items()}
    for length in (19, 16, 1):
        with pytest.raises(ValueError, match=f"cannot go back from 20 to {length}.*rollback = {20 - length}"):
            store.truncate(length)
    assert store.length == 20
    for name, part in store.parts().items():
        np.testing.assert_array_equal(part, before[name])
    store.truncate(20)  # nothing to do
    store.truncate(0)
    assert store.length == store.nbytes == 0
    feed(store, k[..., :3, :], v[..., :3, :])
    store.truncate(1)  # within the window
    np.testing.assert_array_equal(store.parts()["k_full"], k[..., :1, :])


def test_an_interrupted_call_is_repeated():
    """forward died after this layer and before the next: the same positions come again."""
    k, v = random_kv(6)
    wrong_k, wrong_v = random_kv(6, seed=7)
    store = kivi(0, group_size=4, residual=8)
    store.extend(k[..., :4, :], v[..., :4, :], np.arange(4))
    store.extend(wrong_k[..., 4:, :], wrong_v[..., 4:, :], np.arange(4, 6))
    K, V, _ = store.extend(k[..., 4:, :], v[..., 4:, :], np.arange(4, 6))
    np.testing.assert_array_equal(K, k)
    np.testing.assert_array_equal(V, v)
    long_k, long_v = random_kv(20)
    store.extend(long_k[..., 6:, :], long_v[..., 6:, :], np.arange(6, 20))
    with pytest.raises(ValueError, match="cannot go back from 20 to 6"):
        store.extend(k[..., :1, :], v[..., :1, :], np.array([6]))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs, message",
    [
        (dict(bits=0), "bits must be 1 to 8, got 0"),
        (dict(bits=9), "bits must be 1 to 8, got 9"),
        (dict(group_size=0), "group_size must be positive"),
        (dict(residual=0), "residual must be a positive multiple of group_size 32"),
        (dict(group_size=32, residual=48), "residual must be a positive multiple of group_size 32, got 48"),
    ],
)
def test_knobs_out_of_range(knobs, message):
    with pytest.raises(ValueError, match=message):
        kivi(0, **knobs)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65520.0, -1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_do_not_fit_float16(bad, side):
    kv = random_kv(5)
    store = kivi(0, group_size=4, residual=4)
    store.extend(*kv, np.arange(5))
    broken = [x[..., :1, :].copy() for x in kv]
    broken[side][0, 1, 0, 3] = bad
    before = store.nbytes
    with pytest.raises(ValueError, match="finite and at most 65504"):
        store.extend(*broken, np.array([5]))
    assert (store.length, store.nbytes) == (5, before)


def test_largest_numbers_fit():
    for bits, largest in ((1, 32752.0), (2, 65504.0)):
        k = np.tile(np.array([largest, -largest], np.float32), 4)[None, None, :, None] * np.ones(4, np.float32)
        store = kivi(0, bits=bits, group_size=4, residual=4)
        store.extend(k, k, np.arange(8))
        assert all(np.isfinite(part).all() for part in store.parts().values())
        K, _, _ = store.extend(k[..., :1, :], k[..., :1, :], np.array([8]))
        np.testing.assert_allclose(
            K[..., :8, :], k, rtol=0, atol=3 * 16
        )  # float16 numbers near 131008 / 3 lie 32 apart
    with pytest.raises(ValueError, match="at most 32752"):
        kivi(0, bits=1, group_size=4, residual=4).extend(k, k, np.arange(8))


def test_head_dim_must_be_divided_for_keys_and_values():
    k, v = random_kv(1, dim=8, value_dim=12)
    with pytest.raises(ValueError, match="group_size 8 does not divide the value head_dim 12"):
        kivi(0, group_size=8, residual=8).extend(k, v, np.arange(1))
    with pytest.raises(ValueError, match="group_size 8 does not divide the key head_dim 12"):
        kivi(0, group_size=8, residual=8).extend(v, k, np.arange(1))


def test_positions_and_shapes_must_go_on():
    k, v = random_kv(2)
    store = kivi(0, group_size=4, residual=4)
    with pytest.raises(ValueError, match="positions must go on from 0"):
        store.extend(k, v, np.array([1, 2]))
    store.extend(k, v, np.arange(2))
    for wrong in (np.array([3, 4]), np.array([2, 2]), np.array([1, 1]), np.array([2])):
        with pytest.raises(ValueError, match="positions must go on from 2"):
            store.extend(k, v, wrong)
    assert store.length == 2
    wide = np.concatenate([k, k])
    store_of_two = kivi(0, group_size=4, residual=4)
    store_of_two.extend(wide, wide, np.arange(2))
    for other, taken in ((store, wide), (store_of_two, k), (store, k.astype(np.float64))):
        with pytest.raises(ValueError, match="as in the first call"):  # one row would broadcast to two silently
            other.extend(taken, taken, np.arange(2, 4))
    store.extend(wide, wide, np.arange(2))  # from the beginning everything may change


# --- memory and the whole model --------------------------------------------------------------------------------------


def test_appending_does_not_copy_what_is_stored():
    """Amortised growth: over 1000 single steps each array moves about log2 times, not 1000 times."""
    k, v = random_kv(1000, lead=(1, 1))
    store = kivi(0, group_size=8, residual=8)
    moves = 0
    held = None
    for n in range(1000):
        store.extend(k[..., n : n + 1, :], v[..., n : n + 1, :], np.array([n]))
        codes = store.parts().get("v_codes")
        if codes is not None:
            moves += held is not None and codes.base is not held
            held = codes.base
    assert moves <= 10


def test_a_long_prompt_does_not_leave_its_room_behind():
    k, v = random_kv(4000, lead=(1, 1))
    store = kivi(0, group_size=8, residual=8)
    feed(store, k, v)
    assert store.parts()["v_full"].base.nbytes < 0.05 * v.nbytes


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_model_decodes_through_it(architecture):
    """Exact while nothing is quantised, close with 8 bits, further off with 2; a batch gives what its rows give."""
    model = random_model(architecture, np.float64)
    ids = np.random.default_rng(0).integers(0, 64, (2, 40))

    def decode(policy, ids):
        cache = new_cache(model, policy)
        steps = [forward(model, ids[..., :30], cache=cache)]
        steps += [forward(model, ids[..., n : n + 1], cache=cache) for n in range(30, 40)]
        return np.concatenate(steps, axis=-2)

    exact = decode(None, ids)
    np.testing.assert_array_equal(decode(lambda layer: kivi(layer, group_size=8, residual=48), ids), exact)
    off = []
    for bits in (8, 4, 2):
        policy = lambda layer, bits=bits: kivi(layer, bits=bits, group_size=8, residual=16)
        logits = decode(policy, ids)
        # To rounding only: BLAS multiplies matrices of two shapes.
        np.testing.assert_allclose(logits[1], decode(policy, ids[1]), atol=1e-12)
        np.testing.assert_allclose(logits[:, :30], exact[:, :30], atol=1e-12)  # prefill saw nothing quantised
        off.append(np.abs(logits - exact).max())
    assert 0 < off[0] < 0.05 and off[0] < off[1] < off[2]


def test_store_type():
    assert isinstance(kivi(3), KiviStore) and (kivi(3).bits, kivi(3).group_size, kivi(3).residual) == (2, 32, 128)
