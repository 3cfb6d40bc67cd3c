"""llmqat against a twin that codes one token at a time, and its gradient."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import refllm
from refllm.formats.bits import unpack_bits
from refllm.kernels.attention import attend
from refllm.kernels.autograd import parameter
from refllm.kernels.rope import cos_sin, rotate
from refllm.methods.kvcache.llmqat import dequantize_heads, llmqat, quantize_heads, round_tokens
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model

finite = st.floats(-65504, 65504, width=32)


def slowly(token, bits):
    """The heads of one token, number by number."""
    most = 2 ** (bits - 1) - 1
    numbers = [float(x) for x in token.ravel()]
    step = np.float32(max(abs(x) for x in numbers) / most)
    codes = [min(max(round(x / float(step)) if step else 0, -most), most) for x in numbers]
    return codes, step, [c * float(step) for c in codes]


@settings(max_examples=150, deadline=None)
@given(
    x=st.lists(finite, min_size=6, max_size=6),
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    scale=st.sampled_from([1, 1e-9]),
)
@example(x=[0.0, 0.0, 0.0, 0.0, 0.0, float(np.finfo(np.float32).tiny)], bits=16, scale=1)
def test_codes_equal_the_slow_twin(x, bits, scale):
    x = (np.array(x).reshape(2, 1, 3) * scale).astype(np.float32)
    codes, step = quantize_heads(x, bits)
    expected = slowly(x, bits)
    assert (codes.astype(int) - 2 ** (bits - 1) + 1).ravel().tolist() == expected[0] and step[0, 0, 0] == expected[1]
    back = dequantize_heads(codes, step, bits, np.float64)
    np.testing.assert_array_equal(back.ravel(), expected[2])
    # Half a step, or what saturates where the step was rounded down to one of the smallest numbers there are: for every
    # code by half of 2^-149. 1e-4: the step is float32, 16 bits of it.
    most = 2 ** (bits - 1) - 1
    assert (np.abs(back - x) <= max(step.item() / 2, most * 2.0**-150) * (1 + 1e-4)).all()


def test_one_step_for_all_heads_of_a_token():
    """A mistake the card names: a scale per head would let the quiet one keep its numbers."""
    x = np.zeros((2, 2, 4), np.float32)
    x[0, 0], x[1, 0] = [100, -50, 25, 0], [1, -1, 2, 3]
    codes, step = quantize_heads(x, 4)
    assert step.shape == (1, 2, 1) and step[0, 1, 0] == 0
    assert (codes[1, 0] == 7).all() and (codes[:, 1] == 7).all()  # 3 of 100 is nothing; a token of zeros is exact
    assert not dequantize_heads(codes, step, 4)[:, 1].any()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), power=st.integers(-8, 8), bits=st.integers(2, 8))
def test_codes_do_not_depend_on_the_scale_of_a_token(seed, power, bits):
    x = np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32)
    codes, step = quantize_heads(x, bits)
    scaled, larger = quantize_heads(x * np.float32(2.0**power), bits)
    np.testing.assert_array_equal(codes, scaled)
    np.testing.assert_array_equal(step * np.float32(2.0**power), larger)


def test_sixteen_bits_are_nearly_the_identity():
    x = np.random.default_rng(0).normal(size=(2, 5, 8))
    back = dequantize_heads(*quantize_heads(x, 16), 16, np.float64)
    assert np.abs(back - x).max() < 1.01 * np.abs(x).max() / 32767 / 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gradient_is_one_inside_the_limit_and_zero_from_it_on(dtype):
    below = np.nextafter(dtype(2), dtype(0))
    x = parameter(np.array([[0.0, 1.9, -1.9, 2.0, -2.0, 30.0, below]], dtype))
    y = round_tokens(x, 4)
    (y * np.arange(1, 8, dtype=dtype)).sum().backward()
    assert x.grad.tolist() == [[1, 2, 3, 0, 0, 0, 7]] and x.grad.dtype == dtype
    assert abs(y.data[0, 5] - 30) < 1e-5  # forward nothing is clipped


def test_training_rounds_what_the_cache_rounds():
    x = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    heads = x.reshape(5, 2, 8).swapaxes(0, 1)[None]
    store = llmqat(0, bits=4)
    K, _, _ = store.extend(heads, heads, np.arange(5))  # its own tokens are rounded, too
    np.testing.assert_array_equal(K[0].swapaxes(0, 1).reshape(5, 16), round_tokens(parameter(x), 4).data)
    codes = unpack_bits(store.parts()["v_codes"], 4, 8)[0]
    assert (codes[:, 3].astype(int).ravel() - 7).tolist() == slowly(heads[0, :, 3], 4)[0]
    assert store.nbytes == 2 * 5 * (2 * 4 + 4)


def test_keys_are_rounded_before_the_rotation():
    """The model with this cache equals one whose key and value projections are rounded, computed by hand."""
    model = random_model("llama", np.float64, num_layers=1)
    ids = np.random.default_rng(0).integers(0, 64, 12)
    cache = new_cache(model, lambda layer: llmqat(layer, bits=3))
    got = forward(model, ids, cache=cache)

    def spy(q, k, v, q_positions, k_positions, **rule):
        cos, sin = cos_sin(model.config.rope, 8, q_positions, k.dtype)
        plain = rotate(k, cos, -sin)
        rounded = [dequantize_heads(*quantize_heads(x, 3), 3, np.float64) for x in (plain, v)]
        return attend(q, rotate(rounded[0], cos, sin), rounded[1], q_positions, k_positions, **rule)

    np.testing.assert_allclose(got, forward(model, ids, attend=spy), atol=1e-9)
    steps = new_cache(model, lambda layer: llmqat(layer, bits=3))
    one_by_one = np.concatenate([forward(model, ids[i : i + 1], cache=steps) for i in range(12)])
    np.testing.assert_allclose(got, one_by_one, atol=1e-9)  # a prompt sees what steps see


@pytest.mark.parametrize("bits", [1, 17])
def test_knobs_out_of_range(bits):
    with pytest.raises(ValueError, match=f"llmqat bits must be 2 to 16, got {bits}"):
        llmqat(0, bits=bits)


def test_a_recipe_is_stored_loaded_and_run(tmp_path):
    model = random_model("llama")
    ids = np.random.default_rng(0).integers(0, 64, 30)
    small = refllm.compress(model, "rtn:bits=8,group=8+llmqat:bits=4")
    save_native(small, tmp_path / "m")
    caches = [new_cache(m) for m in (small, refllm.load(tmp_path / "m"))]
    logits = [forward(m, ids, cache=c) for m, c in zip((small, refllm.load(tmp_path / "m")), caches, strict=True)]
    np.testing.assert_array_equal(*logits)
    assert caches[0].nbytes == 2 * 2 * 30 * (2 * 4 + 4)
