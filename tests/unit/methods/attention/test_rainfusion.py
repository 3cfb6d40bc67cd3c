"""rainfusion on a toy grid with planted heads; permutations, masks and what text is exempt from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.attention import attend
from refllm.methods.attention.rainfusion import (
    classify,
    coordinates,
    kind_mask,
    rainfusion,
    rainfusion2,
    recall,
    top_blocks,
    window_order,
)

GRID = (4, 8, 8)
N, D = 256, 128
SCALE = D**-0.5
ALL = np.full(N, N), np.arange(N)


def toy(seed=0, beta=10.0):
    """Three heads: looks at its frame, at its place, at nothing in particular."""
    rng = np.random.default_rng(seed)
    frame, y, x = coordinates(GRID)
    E_f, E_xy = rng.normal(size=(4, D)) * D**-0.5, rng.normal(size=(64, D)) * D**-0.5
    planted = (E_f[frame], E_xy[8 * y + x], np.zeros((N, D)))
    q, k = (np.stack([0.3 * rng.normal(size=(N, D)) + beta * e for e in planted]) for _ in range(2))
    return q, k, rng.normal(size=(3, N, 16))


@pytest.mark.parametrize("seed", range(3))
def test_planted_heads_are_classified(seed):
    q, k, _ = toy(seed)
    rows = np.arange(N)
    kept = {kind: recall(q, k, kind_mask(kind, GRID, N), rows, scale=SCALE) for kind in ("spatial", "temporal")}
    assert (kept["spatial"] > [0.99, 0.3, 0.3]).all() and (kept["spatial"][1:] < 0.6).all()
    assert kept["temporal"][1] > 0.9 > 0.3 > kept["temporal"][[0, 2]].max()
    assert classify(q, k, GRID, scale=SCALE).tolist() == ["spatial", "temporal", "textural"]


def test_densities_and_bandwidths():
    """The numbers of the construction: 0.4375 and 0.118; all of it at bandwidth 1; half and a quarter for textures."""
    mean = lambda kind, **knobs: float(kind_mask(kind, GRID, N, **knobs).mean())
    assert mean("spatial") == 0.4375 and mean("temporal") == pytest.approx((22 / 8 / 8) ** 2)
    assert mean("spatial", bandwidth=1.0) == mean("temporal", bandwidth=1.0) == mean("textural", tau=1) == 1
    for tau in (2, 4, 8):
        assert (kind_mask("textural", GRID, N, tau=tau).sum(axis=1) == N // tau).all()


@pytest.mark.parametrize("kind", ["spatial", "temporal", "textural"])
def test_masks_place_by_place(kind):
    grid = (3, 2, 4)
    mask = kind_mask(kind, grid, 26, bandwidth=0.34)  # one row or column or frame further
    place = [(t, y, x) for t in range(3) for y in range(2) for x in range(4)]
    for i, (t, y, x) in enumerate(place):
        for j, (u, b, a) in enumerate(place):
            kept = {
                "spatial": abs(t - u) <= 1 or u == 0,
                "temporal": abs(y - b) <= 0 and abs(x - a) <= 1,
                "textural": b % 2 == a % 2,
            }[kind]
            assert mask[i, j] == kept
    assert mask[24:].all() and mask[:, 24:].all()  # text


def test_each_head_attends_with_the_mask_of_its_kind():
    q, k, v = toy()
    got = rainfusion(q, k, v, *ALL, scale=SCALE, frames=4, height=8, width=8)
    for head, kind in enumerate(("spatial", "temporal", "textural")):
        scores = np.where(kind_mask(kind, GRID, N), SCALE * q[head] @ k[head].T, -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        np.testing.assert_allclose(got[head], p @ v[head] / p.sum(axis=1, keepdims=True), rtol=1e-9, atol=1e-10)
    exact = attend(q, k, v, *ALL, scale=SCALE)
    error = np.linalg.norm(got - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert error[0] < 0.01 and error[1] < 0.1


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 3), height=st.integers(1, 20), width=st.integers(1, 20), text=st.integers(0, 5))
def test_windows_are_a_permutation(frames, height, width, text):
    n = frames * height * width
    order = window_order((frames, height, width), n + text)
    x = np.arange(n + text)
    assert (x[order][np.argsort(order)] == x).all() and (order[n:] == x[n:]).all()
    if height % 8 == width % 8 == 0:
        t, y, x = coordinates((frames, height, width))
        windows = [order[i : i + 64] for i in range(0, n, 64)]
        assert all(len({(t[i], y[i] // 8, x[i] // 8) for i in w}) == 1 for w in windows)


@pytest.mark.parametrize("text", [0, 16])
def test_version_2_keeps_text_and_first_frame_and_is_dense_at_sparsity_0(text):
    q, k, v = toy()
    if text:
        rng = np.random.default_rng(5)
        q, k, v = (np.concatenate([x, rng.normal(size=(3, text, x.shape[2]))], axis=1) for x in (q, k, v))
    at = np.full(N + text, N + text), np.arange(N + text)
    knobs = dict(scale=SCALE, frames=4, height=8, width=8, block=16)
    exact = attend(q, k, v, *at, scale=SCALE)
    np.testing.assert_allclose(rainfusion2(q, k, v, *at, **knobs, sparsity=0.0), exact, rtol=1e-10, atol=1e-12)
    sparse = rainfusion2(q, k, v, *at, **knobs, sparsity=0.75)
    full_rows = [*range(64), *range(N, N + text)]
    np.testing.assert_allclose(sparse[:, full_rows], exact[:, full_rows], rtol=1e-9, atol=1e-11)
    assert not np.allclose(sparse[2], exact[2])
    assert np.linalg.norm(sparse[0] - exact[0]) < 0.05 * np.linalg.norm(exact[0])  # its frame's blocks are found


def test_without_a_grid_it_is_causal():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 40, 8))
    at = np.arange(40), np.arange(40)
    got = rainfusion2(q, k, v, *at, scale=0.35, sparsity=0.5, block=8)
    k[:, 30:], v[:, 30:] = 9, 9
    again = rainfusion2(q, k, v, *at, scale=0.35, sparsity=0.5, block=8)
    np.testing.assert_array_equal(got[:, :24], again[:, :24])
    assert rainfusion(q, k, v, *at, scale=0.35).tolist() == attend(q, k, v, *at, scale=0.35).tolist()


def test_counts_and_ties_of_blocks():
    scores, every = np.array([[5.0, 1, 3, 3, 2]]), np.ones((1, 5), bool)
    assert top_blocks(scores, every, 0.8).tolist() == [[True, False, False, False, False]]
    assert top_blocks(scores, every, 0.6).tolist() == [[True, False, True, True, False]]  # as good as the second
    assert top_blocks(scores, every, 0.0).all()


def test_refusals():
    q, k, v = toy()
    with pytest.raises(ValueError, match="a grid of 4 x 8 x 9 needs as many tokens, got 256 and 256"):
        rainfusion(q, k, v, *ALL, scale=1.0, frames=4, height=8, width=9)
    with pytest.raises(ValueError, match="bandwidth must lie in"):
        kind_mask("spatial", GRID, N, bandwidth=1.5)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1"):
        rainfusion2(q, k, v, *ALL, scale=1.0, sparsity=1)
