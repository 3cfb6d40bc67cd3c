"""refllm.kernels.rope: published numbers of every scaling, what a rotation must preserve, and the two layouts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.rope import (
    Rope,
    cos_sin,
    half_split_to_interleaved,
    interleaved_to_half_split,
    inverse_frequencies,
    rotate,
    rotate_interleaved,
)

LLAMA31 = Rope(5e5, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
DEEPSEEK = Rope(1e4, scaling="yarn", factor=40.0, original_context=4096)


def turned(x, positions, rope=None):
    return rotate(x, *cos_sin(rope or Rope(1e4), x.shape[-1], positions, x.dtype))


# Frequencies


def test_plain_frequencies():
    # 10000^(-2i/8)
    np.testing.assert_allclose(inverse_frequencies(Rope(1e4), 8), [1, 0.1, 0.01, 0.001], rtol=1e-14)


def test_linear_divides_every_frequency():
    plain = inverse_frequencies(Rope(1e4), 16)
    np.testing.assert_array_equal(inverse_frequencies(Rope(1e4, "linear", 8.0), 16), plain / 8)


def test_llama3_numbers_of_llama_3_1():
    plain, scaled = inverse_frequencies(Rope(5e5), 128), inverse_frequencies(LLAMA31, 128)
    np.testing.assert_array_equal(scaled[:29], plain[:29])
    np.testing.assert_allclose(scaled[35:], plain[35:] / 8, rtol=1e-15)
    assert np.all((scaled[29:35] < plain[29:35]) & (scaled[29:35] > plain[29:35] / 8))
    assert scaled[29] == pytest.approx(2.16657e-3, rel=5e-6)
    assert scaled[34] == pytest.approx(1.78508e-4, rel=5e-6)


def test_llama3_blends_by_turns_within_the_original_context():
    rope = Rope(16.0, "llama3", 4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=50)
    plain = inverse_frequencies(Rope(16.0), 8)
    turns = [7.96, 3.98, 1.99, 0.99]  # 50 / wavelength: kept; blended; blended; divided
    np.testing.assert_allclose(50 * plain / (2 * np.pi), turns, atol=0.006)
    keep = np.array([1, (50 * plain[1] / (2 * np.pi) - 1) / 3, (50 * plain[2] / (2 * np.pi) - 1) / 3, 0])
    np.testing.assert_allclose(inverse_frequencies(rope, 8), keep * plain + (1 - keep) * plain / 4, rtol=1e-14)


def test_yarn_numbers_of_deepseek_v3():
    # the ramp runs from pair 10 (kept) to pair 23 (divided)
    plain, scaled = inverse_frequencies(Rope(1e4), 64), inverse_frequencies(DEEPSEEK, 64)
    np.testing.assert_array_equal(scaled[:11], plain[:11])
    np.testing.assert_allclose(scaled[23:], plain[23:] / 40, rtol=1e-15)
    for i in range(11, 23):
        ramp = (i - 10) / 13
        assert scaled[i] == pytest.approx(plain[i] * (ramp / 40 + 1 - ramp), rel=1e-14)


def test_yarn_clamps_the_ramp_to_head_dim_not_to_its_half():
    # D = 16: bounds floor(5.2) = 5 and ceil(17.2) = 18, clamped to 15; there are only 8 pairs
    low, high = (16 * np.log(900 / (2 * np.pi * turns)) / (2 * np.log(10)) for turns in (32, 1))
    assert (np.floor(low), np.ceil(high)) == (5, 18)
    ramp = np.array([0, 0, 0, 0, 0, 0, 0.1, 0.2])
    scaled = inverse_frequencies(Rope(10.0, "yarn", 2.0, original_context=900), 16)
    np.testing.assert_allclose(scaled, inverse_frequencies(Rope(10.0), 16) * (ramp / 2 + 1 - ramp), rtol=1e-14)


def test_yarn_with_an_empty_ramp_is_a_step():
    # both bounds fall below pair 0 and are clamped to it: pair 0 is kept, the others divided
    rope = Rope(1e4, "yarn", 4.0, original_context=6)
    plain = inverse_frequencies(Rope(1e4), 8)
    np.testing.assert_allclose(inverse_frequencies(rope, 8), plain / [1, 4, 4, 4], rtol=1e-15)


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_factor_one_is_the_identity(scaling):
    rope = Rope(1e4, scaling, 1.0, original_context=64)
    np.testing.assert_allclose(inverse_frequencies(rope, 32), inverse_frequencies(Rope(1e4), 32), rtol=1e-15)
    cos, sin = cos_sin(rope, 32, np.arange(5), np.float64)
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=1e-14)


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_highest_frequency_is_kept_and_lowest_divided_by_exactly_the_factor(scaling):
    rope = Rope(1e4, scaling, 8.0, original_context=1024)
    ratio = inverse_frequencies(Rope(1e4), 64) / inverse_frequencies(rope, 64)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8, rel=1e-15)


def test_yarn_attention_factor_multiplies_cos_and_sin():
    cos, sin = cos_sin(DEEPSEEK, 64, np.arange(3), np.float64)
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * np.log(40) + 1) ** 2, rtol=1e-14)  # 1.36889 squared
    cos, sin = cos_sin(
        Rope(1e4, "yarn", 40.0, original_context=4096, attention_factor=1.0), 64, np.arange(3), np.float64
    )
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=1e-14)


def test_freq_divisors_divide():
    plain = inverse_frequencies(Rope(1e4), 8)
    rope = Rope(1e4, freq_divisors=(1.0, 1.0, 3.5, 8.0))
    np.testing.assert_array_equal(inverse_frequencies(rope, 8), plain / [1, 1, 3.5, 8])
    with pytest.raises(ValueError, match="head_dim/2 = 8 numbers, got 4"):
        inverse_frequencies(rope, 16)


def test_rope_freqs_of_a_gguf_file_reproduce_llama3():
    divisors = tuple(inverse_frequencies(Rope(5e5), 128) / inverse_frequencies(LLAMA31, 128))
    scaled = inverse_frequencies(Rope(5e5, freq_divisors=divisors), 128)
    np.testing.assert_allclose(scaled, inverse_frequencies(LLAMA31, 128), rtol=1e-14)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(theta=0.0), "theta must be positive"),
        (dict(theta=float("nan")), "theta must be positive"),
        (dict(theta=1e4, scaling="dynamic"), "linear, llama3 or yarn, got 'dynamic'"),
        (dict(theta=1e4, scaling="linear", factor=0.0), "factor must be positive"),
        (dict(theta=1e4, scaling="llama3", factor=8.0), "needs original_context"),
        (dict(theta=1e4, scaling="yarn", factor=8.0), "needs original_context"),
        (dict(theta=1e4, scaling="llama3", high_freq_factor=1.0, original_context=64), "low_freq_factor must be below"),
        (dict(theta=1e4, scaling="yarn", beta_fast=1.0, original_context=64), "beta_fast > beta_slow > 0"),
        (dict(theta=1.0, scaling="yarn", original_context=64), "theta > 1"),
        (dict(theta=1e4, scaling="linear", factor=2.0, freq_divisors=(1.0,)), "not both"),
    ],
)
def test_impossible_ropes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Rope(**values)


# The rotation


def test_position_zero_is_the_identity():
    x = np.arange(16.0).reshape(2, 1, 8)
    np.testing.assert_array_equal(turned(x, np.array([0])), x)


def test_quarter_turns_by_hand():
    # one pair at angle pi/2: (a, b) -> (-b, a)
    cos, sin = np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]])
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_array_equal(rotate(x, cos, sin), [[-3, -4, 1, 2]])  # pairs (1,3) (2,4)
    np.testing.assert_array_equal(rotate_interleaved(x, cos, sin), [[-2, 1, -4, 3]])  # pairs (1,2) (3,4)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 2**31), st.sampled_from([None, LLAMA31, DEEPSEEK]))
def test_scores_depend_on_the_distance_only(p, shift, seed, rope):
    q, k = np.random.default_rng(seed).normal(size=(2, 1, 64))
    score = lambda i, j: float((turned(q, np.array([i]), rope) @ turned(k, np.array([j]), rope).T).item())
    # angles reach 10^4 radians: each carries an error of 10^4 * 2^-53, times 64 products of size 10
    assert score(p + shift, shift) == pytest.approx(score(p, 0), abs=1e-9)


@given(st.integers(0, 10**6), st.integers(0, 2**31))
def test_rotation_keeps_norms_and_can_be_undone(p, seed):
    x = np.random.default_rng(seed).normal(size=(3, 1, 10))
    y = turned(x, np.array([p]))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-13)
    np.testing.assert_allclose(turned(y, np.array([-p])), x, atol=1e-13)


@pytest.mark.parametrize("f", [rotate, rotate_interleaved])
def test_rotation_of_read_only_strided_input_makes_a_new_array(f):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32).swapaxes(1, 2)
    x.flags.writeable = False
    cos, sin = cos_sin(Rope(1e4), 8, np.arange(5))
    y = f(x, cos, sin)
    assert y.dtype == np.float32 and y.shape == x.shape
    np.testing.assert_array_equal(y, f(np.ascontiguousarray(x), cos, sin))


def test_angles_are_float64_before_they_are_cast():
    # at position 100,003 a float32 angle is off by up to 2^-8 radians; the cast of the float64 value by 2^-25
    position = np.array([100_003])
    cos32, sin32 = cos_sin(Rope(1e4), 8, position, np.float32)
    cos64, sin64 = cos_sin(Rope(1e4), 8, position, np.float64)
    assert cos32.dtype == np.float32 and cos64.dtype == np.float64
    np.testing.assert_array_equal(cos32, cos64.astype(np.float32))
    np.testing.assert_array_equal(sin32, sin64.astype(np.float32))


# The two layouts


@given(st.integers(1, 6), st.integers(1, 8))
def test_permutations_are_mutual_inverses(heads, half):
    to_half, to_pairs = interleaved_to_half_split(heads, 2 * half), half_split_to_interleaved(heads, 2 * half)
    np.testing.assert_array_equal(to_half[to_pairs], np.arange(2 * half * heads))
    np.testing.assert_array_equal(to_pairs[to_half], np.arange(2 * half * heads))


def test_half_split_rows_come_from_even_and_odd_rows_of_the_same_head():
    order = interleaved_to_half_split(3, 6)
    for head in range(3):
        for j in range(3):
            assert order[head * 6 + j] == head * 6 + 2 * j
            assert order[head * 6 + j + 3] == head * 6 + 2 * j + 1


def test_interleaved_equals_half_split_on_permuted_projections():
    """H = 6 query heads, Hk = 2 key heads: every score agrees; permuting k with the query heads breaks them."""
    rng = np.random.default_rng(1)
    heads, kv_heads, dim, width, tokens = 6, 2, 8, 12, 9
    wq, wk = rng.normal(size=(heads * dim, width)), rng.normal(size=(kv_heads * dim, width))
    x = rng.normal(size=(tokens, width))
    cos, sin = cos_sin(Rope(1e4), dim, np.arange(tokens), np.float64)

    def scores(f, wq, wk):
        q = f((x @ wq.T).reshape(tokens, heads, dim).swapaxes(0, 1), cos, sin)
        k = f((x @ wk.T).reshape(tokens, kv_heads, dim).swapaxes(0, 1), cos, sin)
        return q @ np.repeat(k, heads // kv_heads, axis=0).swapaxes(1, 2)

    expected = scores(rotate_interleaved, wq, wk)
    permuted_q = wq[interleaved_to_half_split(heads, dim)]
    permuted_k = wk[interleaved_to_half_split(kv_heads, dim)]
    np.testing.assert_allclose(scores(rotate, permuted_q, permuted_k), expected, atol=1e-12)
    assert np.abs(scores(rotate, wq, wk) - expected).max() > 1
