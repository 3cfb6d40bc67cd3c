"""Rounding on the tape: values of the grids and of the run-time rounding, gradients against a twin without rint."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refllm.kernels import straight_through as through
from refllm.kernels.autograd import Tensor, parameter
from refllm.kernels.grids import AffineGrid, FullRangeGrid, SymmetricGrid, TwosGrid
from refllm.kernels.packed.activations import Rounding, dequantize_activations
from tests.gradients import assert_gradients, normal
from tests.strategies import PROPERTY, weights

SEEDS = st.integers(0, 10**6)


def frozen(x, scale, zero, levels):
    """The operator with rint(u) replaced by u + what rint added here: smooth around this point, with the value and the
    slopes that straight-through means. One number at a time."""
    shape = x.shape
    x, scale, zero = (np.broadcast_to(a, shape).ravel() for a in (x, scale, zero))
    added = [round(float(v / s)) - v / s for v, s in zip(x, scale, strict=True)]

    def value(x, scale, zero):
        x, scale, zero = (np.broadcast_to(a, shape).ravel() for a in (x, scale, zero))
        out = [
            s * (min(max(v / s + extra + z, 0), levels) - z)
            for v, s, z, extra in zip(x, scale, zero, added, strict=True)
        ]
        return np.array(out).reshape(shape)

    return value


def slopes(value, arrays, weights, h=1e-6):
    """Central differences of sum(weights value(arrays)) for every number."""
    found = [np.zeros_like(a) for a in arrays]
    for which, array in enumerate(arrays):
        for at in np.ndindex(array.shape):
            ends = []
            for step in (h, -h):
                moved = [a.copy() for a in arrays]
                moved[which][at] += step
                ends.append(np.sum(weights * value(*moved)))
            found[which][at] = (ends[0] - ends[1]) / (2 * h)
    return found


def away_from_edges(x, scale, zero, levels):
    """Whether no code lies where a small step would clip it or set it free."""
    codes = np.rint(x / scale) + zero
    return not np.isin(codes, (0, levels)).any()


@given(SEEDS, st.integers(2, 4))
def test_gradients_against_differences_of_the_twin_without_rint(seed, bits):
    """A code that stands at the end of the grid is where `inside` jumps; it is left out, clipped codes are not."""
    rng, levels = np.random.default_rng(seed), (1 << bits) - 1
    x = rng.normal(size=(2, 3, 5)) * 2
    scale, zero = rng.uniform(0.5, 1.5, (2, 3, 1)), rng.integers(0, levels + 1, (2, 3, 1)).astype(float)
    x = np.where(np.isin(np.rint(x / scale) + zero, (0, levels)), x + np.where(x > 0, 9, -9) * scale, x)
    assert away_from_edges(x, scale, zero, levels)
    leaves, weigh = [parameter(a) for a in (x, scale, zero)], rng.normal(size=x.shape)
    out = through.quantize(*leaves, levels)
    twin = frozen(x, scale, zero, levels)
    assert np.allclose(out.data, twin(x, scale, zero), rtol=1e-13)
    (out * weigh).sum().backward()
    for leaf, expected in zip(leaves, slopes(twin, [x, scale, zero], weigh), strict=True):
        assert np.allclose(leaf.grad, expected, rtol=1e-6, atol=1e-7)


def test_gradients_by_hand():
    """s = 2, z = 1, codes 0 to 3: -1 -> code 0 or 1; 1.4 stays inside, 9 is clipped."""
    x, scale, zero = (parameter(np.array([a])) for a in ([1.4, 9.0], [2.0], [1.0]))
    out = through.quantize(x, scale, zero, 3)
    assert out.data.tolist() == [[2.0, 4.0]]
    out.sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]
    assert scale.grad[0, 0] == pytest.approx((1 - 0.7) + 2)
    assert zero.grad.tolist() == [[-2.0]]


def test_a_whole_number_as_zero_point():
    x, scale = parameter(np.array([[1.4, 9.0]])), parameter(np.array([[2.0]]))
    out = through.quantize(x, scale, 1, 3)
    assert out.data.tolist() == [[2.0, 4.0]]
    out.sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]] and scale.grad[0, 0] == pytest.approx(2.3)


@given(weights(columns=st.just(8)), st.integers(2, 8), st.sampled_from([AffineGrid, SymmetricGrid, TwosGrid]))
def test_the_nearest_of_the_fitted_grid_passes_every_slope(W, bits, kind):
    grid, leaf = kind(bits, 4), parameter(W)
    out = through.nearest(leaf, grid)
    scale, zero = grid.fit(W)
    assert np.array_equal(out.data, grid.decode(grid.encode(W, scale, zero), scale, zero))
    assert out.data.dtype == W.dtype
    weigh = np.arange(W.size, dtype=W.dtype).reshape(W.shape)
    (out * weigh).sum().backward()
    assert np.array_equal(leaf.grad, weigh)


@given(weights(), st.integers(2, 8), st.booleans())
@example(np.float32([[-2.325e-7, 1.3e-7, -5.4e-8]]), 3, True)  # its scale, rounded to float16, needs the lowest code
def test_values_are_those_of_the_grids(W, bits, symmetric):
    """Of the grids whose lowest code is 0, as here: those that learned weights are stored in."""
    grid = (FullRangeGrid if symmetric else AffineGrid)(bits, -1)
    scale, zero = grid.fit(W)
    offset = grid.offset if symmetric else Tensor(zero.astype(np.float32)[..., None])
    out = through.quantize(Tensor(W[:, None]), Tensor(scale.astype(np.float32)[..., None]), offset, (1 << bits) - 1)
    assert np.array_equal(out.data[:, 0], grid.decode(grid.encode(W, scale, zero), scale, zero))


@PROPERTY
@given(weights(), st.integers(2, 8), st.booleans())
def test_tokens_are_rounded_as_at_run_time(x, bits, symmetric):
    codes, scale, zero = Rounding(bits, symmetric=symmetric).steps(x)
    expected = dequantize_activations(codes, scale) if zero is None else (codes - zero).astype(np.float32) * scale
    assert np.array_equal(through.round_tokens(Tensor(x), bits, symmetric).data, expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_rounded_tokens(symmetric):
    """Scale and zero point come from the token: its largest and smallest number also get what the step asks for."""
    x, levels = normal(4, 6), 7 if not symmetric else 6
    leaf, weigh = parameter(x), normal(4, 6, seed=1)
    (through.round_tokens(leaf, 3, symmetric) * weigh).sum().backward()
    rint = lambda v, at: v + (np.rint(at) - at)

    def twin(moved):
        def steps(y):
            hi, lo = np.maximum(y.max(axis=1, keepdims=True), 0), np.minimum(y.min(axis=1, keepdims=True), 0)
            scale = np.maximum(hi, -lo) / 3 if symmetric else (hi - lo) / 7
            return scale, None if symmetric else -lo / scale

        (scale, zero), (here, zero_here) = steps(moved), steps(x)
        zero = 3.0 if symmetric else rint(zero, zero_here)
        codes = np.rint(x / here) + (3.0 if symmetric else np.rint(zero_here))
        free = (codes >= 0) & (codes <= levels)
        moving = rint(moved / scale, x / here)
        return scale * np.where(free, moving, np.clip(codes, 0, levels) - zero)

    (expected,) = slopes(twin, [x], weigh)
    assert np.allclose(leaf.grad, expected, rtol=1e-5, atol=1e-6)


def test_extremes_hold_zero_and_send_gradients_to_their_place():
    assert_gradients(through.largest, normal(3, 5))
    assert_gradients(lambda x: through.largest(x, -1), normal(3, 5))
    x = parameter(np.array([[-3.0, -1.0], [2.0, 2.0]]))
    out = through.largest(x)
    assert out.data.tolist() == [[0.0], [2.0]]
    out.sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0], [1.0, 0.0]]  # the first of equals; none where zero is the largest


def test_the_larger_end():
    assert_gradients(through.magnitude, np.array([[3.0], [1.0]]), np.array([[-1.0], [-2.0]]))
    hi, lo = parameter(np.array([2.0])), parameter(np.array([-2.0]))
    through.magnitude(hi, lo).sum().backward()
    assert hi.grad.tolist() == [1.0] and lo.grad.tolist() == [0.0]


def test_a_zero_point_stays_among_the_codes_and_lets_gradients_through():
    lo, scale = parameter(np.array([-2.2, -9.0, 0.0])), parameter(np.array([1.0, 1.0, 1.0]))
    zero = through.zero_point(lo, scale, 3)
    assert zero.data.tolist() == [2.0, 3.0, 0.0]
    zero.sum().backward()
    assert lo.grad.tolist() == [-1.0, 0.0, -1.0] and scale.grad.tolist() == [-2.2, 0.0, 0.0]


def test_stored_numbers_let_gradients_through():
    x = parameter(np.array([1 / 3], np.float32))
    out = through.store(x, "float16")
    assert out.data.dtype == np.float32 and out.data[0] == np.float16(1 / 3)
    (out * 2.0).sum().backward()
    assert x.grad.tolist() == [2.0]
