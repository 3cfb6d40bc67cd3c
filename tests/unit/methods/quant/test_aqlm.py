"""aqlm: its search against every candidate tried, loss that never rises, gradients by differences, bits pinned."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.kmeans import nearest
from refllm.kernels.stats import Stats
from refllm.methods.quant import aqlm, pq
from refllm.methods.quant.aqlm import Additive, beam_search, follow_gradient, loss
from tests.strategies import PROPERTY, SEEDS


def problem(seed, out=5, groups=3, d=2, M=2, K=4):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(4 * groups * d, groups * d)) @ rng.normal(size=(groups * d, groups * d))
    W, books = rng.normal(size=(out, groups * d)), rng.normal(size=(M, K, d))
    codes, scale = rng.integers(K, size=(out, groups, M)).astype(np.uint8), rng.random((out, 1)) + 0.5
    return W, X, X.T @ X / len(X), Additive(codes, books, scale)


def row_losses(W, H, state):
    D = state.scale * state.sums() - W
    return np.einsum("ri,ij,rj->r", D, H, D)


@PROPERTY
@given(SEEDS, st.sampled_from((1, 2)))
def test_search_equals_trying_every_candidate(seed, M):
    W, _, H, state = problem(seed, M=M)
    found = beam_search(W, H, state, 1, np.random.default_rng(seed))
    rng, codes = np.random.default_rng(seed), state.codes.astype(int)
    for j in rng.permutation(3):
        for m in rng.permutation(M):
            tried = []
            for k in range(4):
                codes[:, j, m] = k
                tried.append(row_losses(W, H, Additive(codes, state.books, state.scale)))
            codes[:, j, m] = np.argmin(tried, axis=0)
    np.testing.assert_array_equal(found.codes, codes)


@PROPERTY
@given(SEEDS, st.integers(1, 5))
def test_search_never_raises_the_loss_of_a_row(seed, beam):
    W, _, H, state = problem(seed)
    before = state.codes.copy()
    found = beam_search(W, H, state, beam, np.random.default_rng(seed))
    assert (row_losses(W, H, found) <= row_losses(W, H, state) * (1 + 1e-9) + 1e-9).all()
    np.testing.assert_array_equal(state.codes, before)


def test_a_wider_beam_finds_better_codes():
    losses = np.zeros(3)
    for seed in range(20):
        W, _, H, state = problem(seed, groups=4, K=6)
        for i, beam in enumerate((1, 4, 16)):
            losses[i] += row_losses(W, H, beam_search(W, H, state, beam, np.random.default_rng(0))).sum()
    assert losses[0] > losses[1] > losses[2]


def test_a_beam_of_all_ways_finds_the_best():
    W, _, H, state = problem(3, groups=2, M=1)
    found = beam_search(W, H, state, 16, np.random.default_rng(0))
    least = np.full(5, np.inf)
    for a in range(4):
        for b in range(4):
            codes = np.tile(np.array([[[a], [b]]]), (5, 1, 1))
            least = np.minimum(least, row_losses(W, H, Additive(codes, state.books, state.scale)))
    np.testing.assert_allclose(row_losses(W, H, found), least, rtol=1e-9)


@PROPERTY
@given(SEEDS)
def test_one_book_and_even_inputs_take_the_nearest_vector(seed):
    W, _, _, state = problem(seed, M=1)
    found = beam_search(W, np.eye(6), state, 1, np.random.default_rng(seed))
    codes = nearest((W / state.scale).reshape(-1, 2), state.books[0])[0]
    np.testing.assert_array_equal(found.codes.ravel(), codes)


@PROPERTY
@given(SEEDS)
def test_the_loss_is_that_of_the_outputs(seed):
    W, X, H, state = problem(seed)
    error = X @ (state.scale * state.sums() - W).T
    assert loss(W, H, state) == pytest.approx(np.sum(error**2) / len(X) / len(W), rel=1e-9)


def test_a_step_goes_against_finite_differences():
    """Adam's first step is the sign of the gradient times the rate."""
    W, _, H, state = problem(7)
    moved = follow_gradient(W, H, state, 1, 1e-3)
    for at in np.ndindex(state.books.shape):
        books = state.books.copy()
        books[at] += 1e-5
        slope = loss(W, H, Additive(state.codes, books, state.scale)) - loss(W, H, state)
        if abs(slope) > 1e-8:
            step = moved.books[at] - state.books[at].astype(np.float16)
            assert step == 0 or np.sign(step) == -np.sign(slope)
    assert loss(W, H, follow_gradient(W, H, state, 50, 1e-2)) < 0.9 * loss(W, H, state)


def test_ahead_of_residual_codes_where_inputs_go_together():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(32, 64)).astype(np.float32)
    X = rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64))
    output = lambda record: np.sum((X @ (record.dense() - W).T) ** 2)
    ours, plain = aqlm(W, Stats(X)), pq(W)
    assert ours.nbytes == plain.nbytes and output(ours) < 0.7 * output(plain)
    start = aqlm(W, Stats(X), rounds=0)
    assert start.codes.tobytes() == plain.codes.tobytes()


def test_an_input_that_is_always_zero_does_not_matter():
    W = np.random.default_rng(1).normal(size=(8, 16))
    X = np.random.default_rng(2).normal(size=(30, 16))
    X[:, 5] = 0
    assert np.isfinite(aqlm(W, Stats(X), rounds=1, steps=2).dense()).all()
    assert np.isfinite(aqlm(W, Stats(np.zeros((3, 16))), rounds=1, steps=2).dense()).all()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(beam=0), "beam 1 or more, got 4, 40 and 0"),
        (dict(steps=-1), "must be 0 or more"),
        (dict(vector=3), "vectors of 3 columns do not divide the 16 columns"),
    ],
)
def test_bad_input_is_one_clear_line(knobs, message):
    with pytest.raises(ValueError, match=message):
        aqlm(np.ones((2, 16)), Stats(np.ones((3, 16))), **knobs)
    with pytest.raises(ValueError, match="inputs have 3 columns, the weight has 16"):
        aqlm(np.ones((2, 16)), Stats(np.ones((3, 3))))


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_codes_are_the_same_on_every_machine(kernels, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", kernels)
    rng = np.random.default_rng(11)
    W, X = rng.integers(-512, 512, (32, 32)) / 256.0, rng.integers(-64, 64, (50, 32)) / 16.0
    record = aqlm(W, Stats(X), vector=4, books=2, beam=2, rounds=2, steps=5)
    digest = hashlib.sha256(b"".join(part.tobytes() for part in (record.codes, record.codebooks, record.scale)))
    assert digest.hexdigest()[:16] == "435ccab3ffaeb6ee"


def test_codes_of_a_model():
    small = refllm.compress(
        refllm.load("tiny"), "aqlm:rounds=1,steps=2,only=layers.0.mlp+vqllm:only=layers.0.mlp", np.arange(100)
    )
    assert small.weights["model.layers.0.mlp.down_proj.weight"].kind == "vectors"
