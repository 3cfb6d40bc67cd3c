"""What the walk over tiles adds to the state: rounding hooks and refusals. The state itself: test_flash.py."""

import numpy as np
import pytest

from refllm.kernels.online_softmax import by_kv_head, empty_state, finish, fold, tiles, walk_tiles


def test_a_product_that_rounds_weights_leaves_the_sum_alone():
    scores, v = np.log(np.array([[0.3, 1.0]])), np.ones((2, 1))
    o, lse = finish(fold(empty_state((1,), 1, np.float64), scores, v, lambda p, v: np.rint(2 * p) / 2 @ v))
    assert o[0, 0] == pytest.approx(1.5 / 1.3) and lse[0] == pytest.approx(np.log(1.3))


def test_products_from_elsewhere():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 3, 4)), rng.normal(size=(1, 5, 4)), rng.normal(size=(1, 5, 2))
    at, whole = (np.full(3, 5), np.arange(5)), (q @ k[0].T)[None]
    taken = lambda rows, columns: whole[..., rows, columns]
    for got, expected in zip(
        walk_tiles(0 * q, k, v, *at, scale=0.5, block_q=2, block_k=2, products=taken),
        walk_tiles(q, k, v, *at, scale=0.5),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_slices_and_heads():
    assert tiles(5, 2, "block") == [slice(0, 2), slice(2, 4), slice(4, 5)] and tiles(0, 2, "block") == []
    assert by_kv_head(np.zeros((3, 4, 5, 6)), 2).shape == (3, 2, 2, 5, 6)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        tiles(3, 0, "block")
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        by_kv_head(np.zeros((4, 5, 6)), 3)
