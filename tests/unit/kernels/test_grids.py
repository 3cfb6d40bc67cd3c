"""Integer grids: the formulas on a hand example, error bounds, invariances, degenerate groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.grids import AffineGrid, FullRangeGrid, SymmetricGrid, TwosGrid, group_count, group_for
from tests.strategies import PROPERTY, group_sizes, mixed_weights, weight_row

GRIDS = (SymmetricGrid, AffineGrid, FullRangeGrid)
WIDTHS = (2, 3, 4, 8)


def quantized(grid, W):
    scale, zero_point = grid.fit(W)
    return grid.encode(W, scale, zero_point), scale, zero_point


def per_weight(array, W):
    """(out, groups) or (1, 1) spread over the weight."""
    return np.repeat(np.broadcast_to(array, (len(W), array.shape[1])), W.shape[1] // array.shape[1], axis=1)


def test_symmetric_by_hand():
    W = np.array([[-7.0, 3.5, 2.5, 0.4]], np.float32)  # amax 7, 4 bits: scale 1; 3.5 and 2.5 are ties, to even
    codes, scale, zero_point = quantized(SymmetricGrid(4, -1), W)
    assert scale.dtype == np.float16 and scale.tolist() == [[1.0]] and zero_point is None
    assert codes.tolist() == [[1, 12, 10, 8]]
    assert SymmetricGrid(4, -1).decode(codes, scale).tolist() == [[-7.0, 4.0, 2.0, 0.0]]


def test_full_range_by_hand():
    W = np.array([[-7.5, 7.5, 0.4, -0.6]], np.float32)  # amax 7.5, 4 bits: scale 1; both extremes are ties, to even
    codes, scale, zero_point = quantized(FullRangeGrid(4, -1), W)
    assert scale.tolist() == [[1.0]] and zero_point is None
    assert codes.tolist() == [[0, 15, 8, 7]]
    assert FullRangeGrid(4, -1).decode(codes, scale).tolist() == [[-8.0, 7.0, 0.0, -1.0]]
    positive = np.array([[7.5, 1.0]])  # no negative number: the published code would halve the step and clip at 3.5
    assert quantized(FullRangeGrid(4, -1), positive)[0].tolist() == [[15, 9]]


def test_twos_by_hand():
    W = np.array([[-8.0, 8.0, 0.5, -2.5]], np.float32)  # amax 8, 4 bits: scale 1; ties to even; 8 has no code
    codes, scale, zero_point = quantized(TwosGrid(4, -1), W)
    assert scale.tolist() == [[1.0]] and zero_point is None and codes.tolist() == [[0, 15, 8, 6]]
    assert TwosGrid(4, -1).decode(codes, scale).tolist() == [[-8.0, 7.0, 0.0, -2.0]]
    assert quantized(TwosGrid(4, 0), np.zeros((2, 2)))[1].tolist() == [[0.125]]


def test_the_largest_weight_is_a_tie_of_float32_whatever_the_weights_are_stored_in():
    W = np.array([[-3.0, 1.0]])  # 4 bits: the scale 2 * 3 / 15 rounds up in float32, 3 / scale to 7.5 - 1.1e-7
    scale = FullRangeGrid(4, -1, "float32").fit(W)[0]
    assert 7.5 - 2.0**-22 < 3 / scale.item() < 7.5
    assert FullRangeGrid(4, -1, "float32").encode(W, scale).tolist() == [[0, 10]]


@PROPERTY
@given(mixed_weights(columns=24), st.sampled_from((*GRIDS, TwosGrid)), st.sampled_from(WIDTHS))
def test_float64_weights_get_the_codes_of_float32_ones(W, kind, bits):
    grid = kind(bits, 8, "float32")
    fitted = grid.fit(W)
    assert (grid.encode(W.astype(np.float64), *fitted) == grid.encode(W, *fitted)).all()


@PROPERTY
@given(mixed_weights(columns=24), st.sampled_from(WIDTHS))
def test_twos_is_off_by_half_a_step_below_and_one_step_above(W, bits):
    grid = TwosGrid(bits, 8, "float32")
    codes, scale, _ = quantized(grid, W)
    error, step = W.astype(np.float64) - grid.decode(codes, scale), per_weight(scale, W)
    step = step + 2.0**-149 * (1 << bits)  # a step below the normal numbers is itself rounded
    assert (np.abs(error)[W <= 0] <= 0.5001 * step[W <= 0]).all() and (error <= 1.0001 * step).all()


def test_affine_by_hand():
    W = np.array([[-1.0, 0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 6.5]], np.float32)  # second half: lo is forced to 0
    codes, scale, zero_point = quantized(AffineGrid(2, 4, "float32"), W)
    assert zero_point.dtype == np.uint8 and zero_point.tolist() == [[1, 0]]
    assert scale.tolist() == [[1.0, np.float32(6.5 / 3)]]
    assert codes.tolist() == [[0, 1, 2, 3, 2, 2, 3, 3]]


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", WIDTHS)
@PROPERTY
@given(data=st.data())
def test_error_is_at_most_half_a_step(kind, bits, data):
    W = data.draw(mixed_weights(columns=24))
    grid = kind(bits, data.draw(group_sizes(24)), data.draw(st.sampled_from(["float16", "float32"])))
    codes, scale, zero_point = quantized(grid, W)
    lowest = 1 if kind is SymmetricGrid else 0
    assert codes.dtype == np.uint8 and codes.min() >= lowest and codes.max() < 1 << bits
    decoded = grid.decode(codes, scale, zero_point)
    assert decoded.dtype == np.float32 and decoded.shape == W.shape
    # Rounding the scale to float16 may move the grid's ends inwards by 2^-11 of the range (+ half a subnormal step).
    step = per_weight(scale.astype(np.float64), W)
    spill = ((1 << bits) - 1) * (step * 2.0**-11 + (2.0**-25 if scale.dtype == np.float16 else 2.0**-150))
    assert (np.abs(decoded.astype(np.float64) - W) <= step / 2 * (1 + 1e-5) + spill).all()
    assert (decoded[W == 0] == 0).all()


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", WIDTHS)
@PROPERTY
@given(data=st.data())
def test_rounding_twice_changes_no_code(kind, bits, data):
    grid = kind(bits, data.draw(group_sizes(24)))
    W = data.draw(mixed_weights(columns=24))
    codes, scale, zero_point = quantized(grid, W)
    assert np.array_equal(grid.encode(grid.decode(codes, scale, zero_point), scale, zero_point), codes)


@pytest.mark.parametrize("kind", GRIDS)
def test_powers_of_two_and_permuted_rows_commute(kind):
    W = np.stack([weight_row("normal", 32, seed) for seed in range(6)])
    grid = kind(4, 8)
    codes, scale, _ = quantized(grid, W)
    scaled = quantized(grid, W * 8)
    assert np.array_equal(scaled[0], codes) and np.array_equal(scaled[1], scale * 8)
    assert np.array_equal(quantized(grid, W[::-1])[0], codes[::-1])
    whole_row, channel = quantized(kind(4, 32), W), quantized(kind(4, -1), W)
    assert np.array_equal(whole_row[0], channel[0]) and np.array_equal(whole_row[1], channel[1])
    assert quantized(kind(4, 0), W)[1].shape == (1, 1)


def test_codes_are_rounded_with_the_stored_scale():
    W = np.array([[1.0, 0.1]], np.float32)
    scale, _ = SymmetricGrid(8, -1).fit(W)
    assert scale[0, 0] == np.float16(1 / 127) != np.float32(1 / 127)
    assert SymmetricGrid(8, -1).encode(W, scale)[0, 1] == 128 + np.rint(np.float32(0.1) / np.float32(scale[0, 0]))


@pytest.mark.parametrize("kind", GRIDS)
def test_zero_group_and_subnormal_group(kind):
    W = np.zeros((2, 4), np.float32)
    W[1] = [0, 1e-9, -1e-9, 5e-10]  # the scale underflows float16
    grid = kind(4, -1)
    codes, scale, zero_point = quantized(grid, W)
    assert (scale > 0).all() and scale[1, 0] == np.finfo(np.float16).smallest_subnormal
    assert (grid.decode(codes, scale, zero_point) == 0).all()


def test_two_bit_symmetric_has_three_codes():
    codes, _, _ = quantized(SymmetricGrid(2, -1), np.linspace(-1, 1, 9, dtype=np.float32)[None])
    assert set(codes.ravel().tolist()) == {1, 2, 3}


def test_subtracting_the_zero_point_does_not_wrap():
    grid = AffineGrid(8, -1, "float32")
    decoded = grid.decode(np.array([[0]], np.uint8), np.ones((1, 1), np.float32), np.array([[200]], np.uint8))
    assert decoded.tolist() == [[-200.0]]


def test_read_only_and_strided_weights_are_not_touched():
    W = np.stack([weight_row("normal", 32, seed) for seed in range(4)])[:, ::2]
    W.flags.writeable = False
    for kind in GRIDS:
        assert np.array_equal(quantized(kind(4, 8), W)[0], quantized(kind(4, 8), W.copy())[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SymmetricGrid(4, 5).fit(np.ones((1, 12))), "group_size 5 does not divide the 12 columns"),
        (lambda: SymmetricGrid(4, 4).fit(np.array([[1, np.nan, 1, 1.0]])), "NaN"),
        (lambda: AffineGrid(4, 4).fit(np.array([[1, np.inf, 1, 1.0]])), "Inf"),
        (lambda: SymmetricGrid(4, -1).fit(np.full((1, 4), 1e6)), "float16.*65504"),
        (lambda: AffineGrid(4, -1, "float32").fit(np.array([[3e38, -3e38]], np.float32)), "float32"),
        (lambda: SymmetricGrid(4, -1).fit(np.ones(3)), r"\[out, in\]"),
        (lambda: SymmetricGrid(9), "bits must be 2 to 8"),
        (lambda: SymmetricGrid(4, 32, "float64"), "scale_dtype"),
        (lambda: SymmetricGrid(4, -2), "group_size"),
        (lambda: group_count(10, -3), "group_size"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_float32_scales_hold_what_float16_cannot():
    codes, scale, _ = quantized(SymmetricGrid(4, -1, "float32"), np.full((1, 4), 1e6))
    assert scale.dtype == np.float32 and (codes == 15).all()


def test_groups_that_follow_the_width():
    widths = (4096, 576, 384, 48, 8)
    assert [group_for(width, None) for width in widths] == [128, 64, 128, 16, 8]
    assert [group_for(100, size) for size in (-1, 10)] == [-1, 10]
    with pytest.raises(ValueError, match="100 columns have no group of 8 to 128 in common with 128"):
        group_for(100, None)
    with pytest.raises(ValueError, match="positive or -1"):
        group_for(100, 0)
