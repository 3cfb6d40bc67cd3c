"""qserve against a twin that codes one number at a time, and the laws of its codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.formats.bits import unpack_bits
from refllm.methods.kvcache.qserve import dequantize_tokens, qserve, quantize_tokens
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model

finite = st.floats(-65504, 65504, width=32)


def slowly(head, bits):
    """One head of one token, number by number: codes, scale, zero and what comes back."""
    levels = 2**bits - 1
    numbers = [float(x) for x in head]
    scale = np.float16((max(numbers) - min(numbers)) / levels)
    zero = -min(numbers) / float(scale) if scale else np.inf
    if abs(zero) >= 65520:
        scale, zero = np.float16((max(numbers) + min(numbers)) / 2), np.float16(-1)
        return [0] * len(head), scale, zero, [float(scale)] * len(head)
    zero = np.float16(zero)
    codes = [round(min(max(x / float(scale) + float(zero), 0), levels)) for x in numbers]
    return codes, scale, zero, [(c - float(zero)) * float(scale) for c in codes]


@settings(max_examples=150, deadline=None)
@given(x=st.lists(finite, min_size=1, max_size=9), bits=st.integers(2, 8), spread=st.sampled_from([1, 1e-3, 1e-8]))
def test_codes_equal_the_slow_twin(x, bits, spread):
    x = (np.array(x) * spread).astype(np.float32)
    codes, scale, zero = quantize_tokens(x, bits)
    expected = slowly(x, bits)
    assert (codes.tolist(), scale, zero) == expected[:3]
    np.testing.assert_array_equal(dequantize_tokens(codes, scale, zero, np.float64), expected[3])


@settings(max_examples=150, deadline=None)
@given(
    x=st.lists(finite, min_size=2, max_size=9),
    bits=st.integers(2, 8),
    offset=st.sampled_from([0, 1, 1000]),
    spread=st.sampled_from([1, 1e-3, 1e-8]),
)
def test_error_is_half_a_step_and_what_float16_loses(x, bits, offset, spread):
    x = (np.array(x) * spread * 0.9 + offset).astype(np.float32)
    codes, scale, zero = quantize_tokens(x, bits)
    assert codes.max() < 2**bits
    back = dequantize_tokens(codes, scale, zero, np.float64)
    # z is off by 2^-11 of itself, which moves the grid by 2^-11 min; a normal s by 2^-11 of the range; a subnormal one
    # by 2^-25 a step. A head that became one number is off by half its range, below the same bound for z.
    one = (codes == 0).all() and zero == -1
    bound = np.ptp(x) / 2 if one else float(scale) / 2
    rounding = (np.abs(x).max() + np.ptp(x)) * 2.0**-10 + 2.0**-25 * 2**bits
    assert (np.abs(back - x) <= bound + rounding).all()
    assert not one or np.ptp(x) / 2 <= np.abs(x).max() * 2**bits / 65504 + 2.0**-25 * 2**bits


def test_smallest_and_largest_take_the_ends_and_zero_is_not_a_whole_number():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 64)).astype(np.float32)
    for bits in (4, 8):
        codes, _, zero = quantize_tokens(x, bits)
        ends = np.take_along_axis(codes, np.stack([x.argmin(-1), x.argmax(-1)], axis=-1), axis=-1)
        assert (ends == [0, 2**bits - 1]).all()
        assert (zero != np.rint(zero)).mean() > 0.7  # float16 has few fractions at 128


def test_a_rounded_zero_is_worse():
    """The mistake of the integer zero: the grid no longer begins at the smallest."""
    x = np.random.default_rng(1).normal(size=(200, 64))
    codes, scale, zero = quantize_tokens(x, 4)
    moved = np.rint(np.clip(x / scale[:, None] + np.rint(zero)[:, None], 0, 15))
    error = lambda c, z: ((dequantize_tokens(c, scale, z, np.float64) - x) ** 2).mean()
    assert error(moved, np.rint(zero)) > 1.02 * error(codes, zero)


@pytest.mark.parametrize("constant", [0.0, -0.0, 1.0, -3.5, 65504.0, -65504.0, 2.0**-24])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_head_of_a_float16_number_is_exact(constant, bits):
    x = np.full(16, constant, np.float32)
    codes, scale, zero = quantize_tokens(x, bits)
    assert not codes.any() and zero == -1
    np.testing.assert_array_equal(dequantize_tokens(codes, scale, zero), x)


def test_nearly_constant_heads_do_not_overflow():
    x = np.float32([1000.0, 1000.001, 1000.002])
    codes, scale, zero = quantize_tokens(x, 4)
    assert np.isfinite(dequantize_tokens(codes, scale, zero)).all() and scale == 1000
    assert np.isfinite(quantize_tokens(np.float32([-65504, 65504, 0]), 2)[1])


@pytest.mark.parametrize("width", [7, 8, 16])
def test_the_store_holds_codes_scale_and_zero_of_every_token_and_head(width):
    rng = np.random.default_rng(2)
    k, v = rng.normal(size=(2, 3, 2, 5, width)).astype(np.float32)
    store = qserve(0, bits=4)
    K, V, _ = store.extend(k, v, np.arange(5))
    np.testing.assert_array_equal(K, k)  # a call sees its own tokens in full
    np.testing.assert_array_equal(V, v)
    parts = store.parts()
    for batch, head, token in np.ndindex(3, 2, 5):
        codes, scale, zero, _ = slowly(v[batch, head, token], 4)
        assert unpack_bits(parts["v_codes"], 4, width)[batch, head, token].tolist() == codes
        assert parts["v_scale"][batch, head, token, 0] == scale and parts["v_zero"][batch, head, token, 0] == zero
    assert store.nbytes == 2 * 3 * 2 * 5 * ((width + 1) // 2 + 4)
    K, V, _ = store.extend(k[..., :1, :], v[..., :1, :], np.array([5]))
    np.testing.assert_array_equal(K[2, 1, 3], np.float32(slowly(k[2, 1, 3], 4)[3]))
    np.testing.assert_array_equal(V[..., 5, :], v[..., 0, :])


@pytest.mark.parametrize(("knobs", "message"), [(dict(bits=1), "2 to 8, got 1"), (dict(bits=9), "2 to 8, got 9")])
def test_knobs_out_of_range(knobs, message):
    with pytest.raises(ValueError, match=message):
        qserve(0, **knobs)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_more_bits_are_nearer_and_a_prompt_alone_is_exact(architecture):
    model = random_model(architecture, np.float64)
    ids = np.random.default_rng(0).integers(0, 64, (1, 40))
    exact = forward(model, ids)
    off = []
    for bits in (2, 4, 8):
        cache = new_cache(model, lambda layer, bits=bits: qserve(layer, bits=bits))
        prompt = forward(model, ids[:, :30], cache=cache)
        np.testing.assert_allclose(prompt, exact[:, :30], atol=1e-12)
        steps = [forward(model, ids[:, i : i + 1], cache=cache) for i in range(30, 40)]
        off.append(np.abs(np.concatenate(steps, axis=1) - exact[:, 30:]).max())
    assert off[0] > off[1] > off[2] > 0 and off[2] < 0.05


def test_a_recipe_with_smoothed_keys_is_stored_loaded_and_run(tmp_path):
    model = random_model("llama")
    ids = np.random.default_rng(0).integers(0, 64, 60)
    small = refllm.compress(model, "smoothattention+rtn:bits=4,group=8+qserve:bits=4", ids)
    save_native(small, tmp_path / "m")
    again = refllm.load(tmp_path / "m")
    caches = [new_cache(m) for m in (small, again)]
    for part in (ids[:40], ids[40:41], ids[41:]):
        np.testing.assert_array_equal(*(forward(m, part, cache=c) for m, c in zip((small, again), caches, strict=True)))
    assert caches[0].nbytes == 2 * 2 * 2 * 60 * (4 + 4)  # layers, sides, heads, tokens: 8 codes, s and z
