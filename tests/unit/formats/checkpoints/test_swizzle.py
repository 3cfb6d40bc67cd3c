"""The 32-4-4 order of scales: every place by its formula, padding, and back."""

import numpy as np
import pytest

from refllm.formats.checkpoints import swizzle_scales, unswizzle_scales


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 5), (256, 12), (31, 9)])
def test_every_scale_lies_at_its_place(shape):
    scale = np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)
    data = swizzle_scales(np.asfortranarray(scale))
    across = -(-shape[1] // 4)
    expected = np.zeros(512 * -(-shape[0] // 128) * across, np.uint8)
    for r, c in np.ndindex(*shape):
        tile = r // 128 * across + c // 4
        expected[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scale[r, c]
    assert np.array_equal(data, expected)
    data[expected == 0] = 77  # the padding may hold anything
    assert np.array_equal(unswizzle_scales(data, shape), scale)


def test_rows_32_apart_lie_side_by_side():
    scale = np.arange(512, dtype=np.uint16).reshape(128, 4).astype(np.uint8)
    assert swizzle_scales(scale)[:8].tolist() == [0, 1, 2, 3, 128, 129, 130, 131]


def test_nothing_and_what_is_refused():
    assert swizzle_scales(np.zeros((0, 4), np.uint8)).size == 0
    assert unswizzle_scales(np.zeros(0, np.uint8), (0, 4)).shape == (0, 4)
    with pytest.raises(ValueError, match="matrix of uint8 codes, got float32"):
        swizzle_scales(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="take 1024 bytes"):
        unswizzle_scales(np.zeros(512, np.uint8), (129, 4))
