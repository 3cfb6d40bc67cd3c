"""turboquant: the table of the normal distribution, the errors it promises, scores that are right on average."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.formats.bits import unpack_bits
from refllm.kernels.hadamard import random_orthogonal, random_rotation
from refllm.methods.kvcache.turboquant import (
    centroids,
    decode,
    decode_residual,
    encode,
    encode_residual,
    turboquant,
)
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model

# Max 1960, "Quantizing for minimum distortion", table I: the positive centroids and the squared error.
MAX = {
    1: ([0.7979], 0.3634),
    2: ([0.4528, 1.5104], 0.1175),
    3: ([0.2451, 0.7560, 1.3439, 2.1519], 0.03454),
    4: ([0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], 0.009497),
}


@pytest.mark.parametrize("bits", MAX)
def test_the_table_is_the_one_of_max(bits):
    positive, _ = MAX[bits]
    np.testing.assert_allclose(centroids(bits), [*(-x for x in positive[::-1]), *positive], atol=6e-5)


@pytest.mark.parametrize("bits", MAX)
def test_every_centroid_is_the_mean_of_what_is_nearest_to_it(bits):
    c = centroids(bits)
    grid = np.linspace(-9, 9, 1_800_001)
    weight = np.exp(-grid * grid / 2)
    codes = np.searchsorted((c[1:] + c[:-1]) / 2, grid)
    mean = np.bincount(codes, weight * grid) / np.bincount(codes, weight)
    np.testing.assert_allclose(mean, c, atol=1e-5)


@pytest.mark.parametrize("bits", MAX)
@pytest.mark.parametrize("kind", ["orthogonal", "hadamard"])
def test_squared_errors_are_those_of_the_normal_distribution(bits, kind):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(400, 128))
    turning = random_rotation(128, kind, rng, "x")
    codes, norm = encode(x, turning, bits)
    error = squared_error(x, codes, turning, bits)
    assert abs(error / MAX[bits][1] - 1) < 0.05
    assert error < sqrt(3) * np.pi / 2 * 4.0**-bits
    np.testing.assert_array_equal(norm, np.float16(np.sqrt((x * x).sum(axis=-1))))


def squared_error(x, codes, turning, bits):
    """Of |x|, the norm being exact."""
    back = decode(codes, turning, bits) * np.linalg.norm(x, axis=-1, keepdims=True)
    return (((back - x) ** 2).sum(-1) / (x**2).sum(-1)).mean()


def test_a_loud_channel_does_not_matter_on_average_over_rotations():
    """No grid of its own range would give the other channels anything at two bits."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(80):
        x = rng.normal(size=(1, 64))
        x[0, 5] *= 100
        turning = random_orthogonal(64, rng)
        found.append(squared_error(x, encode(x, turning, 2)[0], turning, 2))
    assert abs(np.mean(found) / MAX[2][1] - 1) < 0.05


def test_the_rotation_is_one():
    turning = random_orthogonal(32, np.random.default_rng(0))
    np.testing.assert_allclose(turning @ turning.T, np.eye(32), atol=1e-12)


def slowly(x, turning, S, bits):
    """A key, number by number: codes, norm, signs, residual norm, and what comes back."""
    D = len(x)
    c = centroids(bits).tolist()
    norm = sqrt(sum(float(v) ** 2 for v in x))
    unit = [float(v) / (norm or 1) for v in x]
    y = [sqrt(D) * sum(turning[i, j] * unit[j] for j in range(D)) for i in range(D)]
    codes = [min(range(len(c)), key=lambda k: (abs(v - c[k]), k)) for v in y]
    back = [sum(turning[i, j] * c[codes[i]] for i in range(D)) / sqrt(D) for j in range(D)]
    r = [a - b for a, b in zip(unit, back, strict=True)]
    signs = [int(sum(S[i, j] * r[j] for j in range(D)) >= 0) for i in range(D)]
    size = float(np.float16(sqrt(sum(v * v for v in r))))
    more = [size * sqrt(np.pi / 2) / D * sum((2 * signs[i] - 1) * S[i, j] for i in range(D)) for j in range(D)]
    n = float(np.float16(norm))
    return codes, n, signs, size, [n * (a + b) for a, b in zip(back, more, strict=True)], [n * a for a in back]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), width=st.sampled_from([1, 3, 8]), bits=st.integers(1, 4))
def test_codes_and_signs_equal_the_slow_twin(seed, width, bits):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=width).astype(np.float32)
    turning, S = random_orthogonal(width, rng), rng.normal(size=(width, width))
    codes, norm = encode(x, turning, bits)
    signs, size = encode_residual(x, codes, turning, S, bits)
    expected = slowly(x, turning, S, bits)
    assert (codes.tolist(), norm, signs.tolist(), size) == expected[:4]
    back = norm * (decode(codes, turning, bits) + decode_residual(signs, size, S))
    np.testing.assert_allclose(back, expected[4], rtol=1e-9, atol=1e-12)


def test_scores_of_keys_are_right_on_average_and_those_of_plain_codes_too_small():
    rng = np.random.default_rng(0)
    D, bits, many = 32, 2, 3000
    x, q = rng.normal(size=(2, D))
    q = q + x  # a query that looks for this key
    exact, plain, fair = q @ x, [], []
    for _ in range(many):
        turning, S = random_orthogonal(D, rng), rng.normal(size=(D, D))
        codes, norm = encode(x, turning, bits)
        unit = decode(codes, turning, bits)
        plain.append(norm * (q @ unit))
        fair.append(norm * (q @ (unit + decode_residual(*encode_residual(x, codes, turning, S, bits), S))))
    spread = np.std(fair) / sqrt(many)
    assert abs(np.mean(fair) - exact) < 4 * spread + 1e-3 * abs(exact)
    assert abs(np.mean(plain) / exact - (1 - MAX[bits][1])) < 0.02


def test_a_wrong_constant_of_the_signs_is_felt():
    """1 / sqrt(D) in place of sqrt(pi / 2) / D: what the card warns of."""
    rng = np.random.default_rng(1)
    D = 64
    r = rng.normal(size=D)
    got = []
    for _ in range(400):
        S = rng.normal(size=(D, D))
        got.append(r @ decode_residual((S @ r >= 0).astype(np.uint8), np.linalg.norm(r).astype(np.float16), S))
    assert abs(np.mean(got) / (r @ r) - 1) < 0.05
    assert sqrt(np.pi / 2) / D < 0.2 / sqrt(D)


@pytest.mark.parametrize("prod", [True, False])
def test_the_store_holds_codes_norms_and_signs(prod):
    rng = np.random.default_rng(2)
    k, v = rng.normal(size=(2, 3, 2, 5, 8)).astype(np.float32)
    store = turboquant(1, bits=3, prod=prod, seed=4)
    store.extend(k, v, np.arange(5))
    parts = store.parts()
    turning, S = store._matrices(8)
    K, V, _ = store.extend(k[..., :1, :], v[..., :1, :], np.array([5]))
    for at in np.ndindex(3, 2, 5):
        codes, norm, signs, size, key, _ = slowly(k[at], turning, S, 2)
        if prod:
            assert unpack_bits(parts["k_codes"], 2, 8)[at].tolist() == codes and parts["k_norm"][at] == norm
            assert unpack_bits(parts["k_signs"], 1, 8)[at].tolist() == signs and parts["k_residual"][at] == size
            np.testing.assert_allclose(K[at], key, rtol=1e-5, atol=1e-6)
        codes, norm, *_, value = slowly(v[at], turning, S, 3)
        assert unpack_bits(parts["v_codes"], 3, 8)[at].tolist() == codes and parts["v_norm"][at] == norm
        np.testing.assert_allclose(V[at], value, rtol=1e-5, atol=1e-6)
    store.truncate(5)
    assert store.nbytes == 3 * 2 * 5 * (3 + 2 + 3 + 2 + 2 * prod)
    assert np.array_equal(turboquant(1, seed=4)._matrices(8)[0], turning)
    assert not np.array_equal(turboquant(2, seed=4)._matrices(8)[0], turning)


def test_zeros_come_back_as_zeros_and_width_and_size_are_checked():
    store = turboquant(0, bits=2)
    zeros = np.zeros((1, 1, 4, 8), np.float32)
    store.extend(zeros, zeros, np.arange(4))
    K, V, _ = store.extend(zeros[..., :1, :], zeros[..., :1, :], np.array([4]))
    assert not K.any() and not V.any()
    with pytest.raises(ValueError, match="at most 2048"):
        store.extend(zeros[..., :1, :] + 3000, zeros[..., :1, :], np.array([5]))
    wide = np.zeros((1, 1, 1, 1024), np.float32)
    with pytest.raises(ValueError, match="up to 1023 channels, got a key of 1024"):
        turboquant(0).extend(wide, wide, np.array([0]))
    odd = np.zeros((1, 1, 1, 10), np.float32)
    with pytest.raises(ValueError, match="rotation=orthogonal needs none"):
        turboquant(0, rotation="hadamard").extend(odd, odd, np.array([0]))


@pytest.mark.parametrize(("knobs", "message"), [(dict(bits=1), "2 to 4"), (dict(rotation="x"), "hadamard or orth")])
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        turboquant(0, **knobs)


def test_a_recipe_is_stored_loaded_and_run(tmp_path):
    model = random_model("llama")
    ids = np.random.default_rng(0).integers(0, 64, 50)
    small = refllm.compress(model, "rtn:bits=8,group=8+turboquant:bits=4,seed=3")
    save_native(small, tmp_path / "m")
    models = small, refllm.load(tmp_path / "m")
    caches = [new_cache(m) for m in models]
    for part in (ids[:40], ids[40:]):
        np.testing.assert_array_equal(*(forward(m, part, cache=c) for m, c in zip(models, caches, strict=True)))
    assert caches[0].nbytes == 2 * 2 * 50 * (4 + 4 + 4 + 2)
