"""pq: lossless where vectors are few, never worse with another codebook, sizes by rule, the same bits everywhere."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.kmeans import nearest
from refllm.methods.quant import pq
from refllm.methods.quant.pq import sizes
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.strategies import PROPERTY, SEEDS


def normal(seed, shape=(24, 64)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@PROPERTY
@given(SEEDS, st.sampled_from((1, 2, 4)), st.sampled_from((1, 2)))
def test_as_many_centres_as_different_vectors_lose_nothing_but_float16(seed, d, spans):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(1 << 2 * d, d))
    U = vectors[rng.integers(len(vectors), size=(12, 8))].reshape(12, 8 * d)
    U /= np.sqrt((U**2).mean())
    record = pq(U, vector=d, books=1, spans=spans)
    # Rows are scaled each by its own size, so that equal vectors differ after it: compare the decoded with codes' best.
    scale = record.scale.astype(np.float64)
    pieces = (U / scale).reshape(12, spans, -1, d)
    for span in range(spans):
        best = nearest(pieces[:, span].reshape(-1, d), record.codebooks[span, 0])[0]
        of_span = record.unpacked().reshape(12, spans, -1)[:, span]
        np.testing.assert_array_equal(of_span.ravel(), best)  # one book: every code is that of the nearest vector
    same = np.tile(vectors[:4].reshape(1, -1), (5, 2 * spans))
    np.testing.assert_allclose(pq(same, vector=d, books=1, spans=spans).dense(), same, rtol=2.0**-9, atol=2.0**-9)


@PROPERTY
@given(SEEDS)
def test_every_further_codebook_lowers_the_error(seed):
    W = normal(seed)
    errors = [np.sum((pq(W, bits=M, vector=4, books=M).dense() - W) ** 2) for M in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_longer_vectors_are_better_at_equal_bits_of_codes():
    W = normal(0, (256, 256))
    errors = [np.mean((pq(W, vector=d, books=M).dense() - W) ** 2) for d, M in ((1, 1), (2, 1), (4, 1))]
    assert errors[0] > errors[1] > errors[2]


def test_spans_have_codebooks_of_their_own():
    W = normal(1)
    W[:, 32:] = np.sign(W[:, 32:])  # one half is binary
    one, two = pq(W, vector=2), pq(W, vector=2, spans=2)
    assert one.codebooks.shape[0] == 1 and two.codebooks.shape[0] == 2
    assert pq(W, vector=2, spans=0).codebooks.shape[:2] == (32, 1)
    off = lambda record: np.sum((record.dense() - W)[:, 32:] ** 2)
    assert off(two) < off(one)


@pytest.mark.parametrize(
    ("shape", "bits", "expected"),
    [
        ((1536, 576), 2, (8, 2, 8)),
        ((384, 384), 2, (4, 1, 8)),
        ((384, 128), 2, (2, 1, 4)),
        ((128, 128), 2, (2, 1, 4)),
        ((64, 64), 2, (2, 1, 4)),
        ((1536, 576), 3, (8, 3, 8)),
        ((384, 128), 1, (4, 1, 4)),
        ((1536, 570), 2, (2, 1, 4)),
    ],
)
def test_sizes_follow_from_the_weight(shape, bits, expected):
    *found, spans = sizes(shape, bits, None, None, 1)
    d, M, B = found
    assert tuple(found) == expected and spans == 1
    assert 16 * M * d * 2**B <= 0.25 * shape[0] * shape[1]


def test_bytes_are_counted():
    record = pq(normal(2), vector=4, books=2)
    assert record.nbytes == 24 * 16 * 2 * 4 // 8 + 2 * 2 * 16 * 4 + 2 * 24


def test_rows_of_any_size():
    W = normal(3) * 2.0 ** np.arange(-12, 12)[:, None].astype(np.float32)
    W[5] = 0
    record = pq(W)
    relative = np.sum((record.dense() - W) ** 2, axis=1) / np.maximum(np.sum(W**2, axis=1), 1e-30)
    assert not record.dense()[5].any() and relative.max() < 0.5


@pytest.mark.parametrize(
    ("shape", "knobs", "message"),
    [
        ((2, 9), {}, "vectors of 8, 4 or 2 columns do not divide the 9 columns"),
        ((2, 12), dict(vector=8), "vectors of 8 columns do not divide the 12 columns"),
        ((2, 12), dict(bits=9), "bits must be 1 to 8, got 9"),
        ((2, 12), dict(books=9), "books must be 1 to 8, got 9"),
        ((2, 12), dict(vector=2, books=3), "3 books do not share the 4 bits of a vector of 2 columns"),
        ((2, 12), dict(vector=2, spans=4), "4 spans do not divide the 12 columns"),
    ],
)
def test_bad_input_is_one_clear_line(shape, knobs, message):
    with pytest.raises(ValueError, match=message):
        pq(np.ones(shape), **knobs)


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_codes_are_the_same_on_every_machine(kernels, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", kernels)
    W = np.random.default_rng(11).integers(-512, 512, (64, 64)) / 256.0
    digest = hashlib.sha256()
    for record in (pq(W), pq(W, vector=4, books=2, seed=5)):
        for part in (record.codes, record.codebooks, record.scale):
            digest.update(part.tobytes())
    assert digest.hexdigest()[:16] == "926858c35db43fb4"


def test_a_model_stores_it_and_runs(tmp_path):
    small = refllm.compress(refllm.load("tiny"), "pq:only=layers.1+kivi:bits=4")
    save_native(small, tmp_path / "small")
    ids = np.arange(20)[None]
    np.testing.assert_array_equal(forward(refllm.load(tmp_path / "small"), ids), forward(small, ids))
