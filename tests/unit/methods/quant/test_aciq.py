"""aciq: the table of the paper's optimum, the budget of bits, and rows that keep their mean."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.packed.records import MixedRows
from refllm.methods.quant.aciq import aciq, allocate_bits, best_clip, clipped_range, expected_error
from tests.strategies import PROPERTY, mixed_weights, weight_row

LAPLACE = [1.863, 2.831, 3.897, 5.029, 6.205, 7.413, 8.646, 9.897]
NORMAL = [1.240, 1.711, 2.152, 2.559, 2.936, 3.287, 3.615, 3.924]


@pytest.mark.parametrize(("law", "table"), [("laplace", LAPLACE), ("normal", NORMAL)])
def test_the_optimum_for_one_to_eight_bits(law, table):
    assert [best_clip(bits, law) for bits in range(1, 9)] == pytest.approx(table, abs=1e-3)
    for bits in range(1, 9):  # and it is one
        a = best_clip(bits, law) * np.array([0.999, 1, 1.001])
        error = expected_error(a, np.array(bits), law)
        assert error[1] < error[0] and error[1] < error[2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_near_the_best_range_of_laplace_data(bits):
    """A mid-rise quantizer with 2^M bins, by trying ranges: the analytic one is a little short, at next to no cost."""
    x = np.random.default_rng(0).laplace(size=200_000)

    def error(alpha):
        step = 2 * alpha / 2**bits
        return np.square(
            np.clip(np.floor(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step + step / 2 - x
        ).mean()

    tried = np.arange(1.5, 8, 0.05)
    errors = np.array([error(a) for a in tried])
    assert best_clip(bits, "laplace") == pytest.approx(tried[errors.argmin()], rel=0.12)
    assert error(best_clip(bits, "laplace")) <= 1.03 * errors.min()


def slow_allocation(widths, bits):
    """The largest number of bins whose rounded bits keep the mean, found by trying."""
    share = [w ** (2 / 3) for w in widths]
    best = [0] * len(widths)
    for extra in np.arange(-20, 25, 0.005):
        given = [min(8, max(0, round(math.log2(len(widths) * 2**extra * s / sum(share))))) if s else 0 for s in share]
        if sum(given) > bits * len(widths):
            break
        best = given
    return best


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_allocation_by_trying(bits):
    widths = np.exp(np.random.default_rng(bits).normal(size=9) * 2)
    assert allocate_bits(widths, bits).tolist() == slow_allocation(widths, bits)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.integers(1, 8))
def test_the_budget_is_kept_and_nearly_used(widths, bits):
    given = allocate_bits(np.array(widths), bits)
    assert given.sum() <= bits * len(widths)
    assert given.min() >= 0 and given.max() <= 8
    order = np.argsort(widths, kind="stable")
    assert (np.diff(given[order]) >= 0).all()  # a wider row never has fewer bits
    if len(set(widths)) == len(widths) and given.max() < 8:
        assert given.sum() >= (bits - 1) * len(widths)


def test_equal_rows_share_equally_and_constant_ones_need_nothing():
    assert allocate_bits(np.full(5, 3.0), 4).tolist() == [4] * 5
    assert allocate_bits(np.zeros(5), 4).tolist() == [4] * 5
    assert allocate_bits(np.array([0.0, 1.0]), 4).tolist() == [0, 8]


@PROPERTY
@given(mixed_weights(columns=st.integers(2, 24)), st.integers(1, 8), st.sampled_from(["mean", "both"]), st.booleans())
def test_rows_keep_their_mean(W, bits, correct, allocate):
    record = aciq(W, bits=bits, correct=correct, allocate=allocate)
    size = np.abs(record.dense().astype(np.float64)).max(axis=1) + np.abs(W).max(axis=1)
    assert (
        np.abs(record.dense().astype(np.float64).mean(axis=1) - W.astype(np.float64).mean(axis=1))
        <= 1e-6 * size + 1e-44
    ).all()


def test_both_keep_the_standard_deviation_too():
    W = np.random.default_rng(4).normal(size=(6, 64))
    plain, both = (aciq(W, bits=3, allocate=False, correct=c).dense().std(axis=1) for c in ("mean", "both"))
    np.testing.assert_allclose(both, W.std(axis=1), rtol=1e-5)
    assert np.abs(plain - W.std(axis=1)).max() > 1e-3


def test_a_row_never_reaches_beyond_its_range():
    W = np.stack([weight_row("normal", 16, 1), weight_row("constant", 16, 1)]).astype(np.float64)
    lo, hi = clipped_range(W, np.array([8, 8]), "laplace")
    np.testing.assert_array_equal(lo, W.min(axis=1))  # eight bits clip nothing of so few numbers
    np.testing.assert_array_equal(hi, W.max(axis=1))
    two, _ = clipped_range(np.r_[np.zeros(99), -50.0][None], np.array([2]), "laplace")
    assert -5 < two[0] < 0


def test_bits_are_counted_as_stored():
    W = np.random.default_rng(5).normal(size=(8, 30)) * np.exp(np.arange(8))[:, None]
    record = aciq(W, bits=4)
    assert isinstance(record, MixedRows) and record.bits.mean() <= 4 and len(set(record.bits)) > 3
    assert record.nbytes == sum((int(b) * 30 + 7) // 8 for b in record.bits) + 8 * (1 + 4 + 4)


def test_allocation_lowers_the_error_of_uneven_rows():
    W = np.random.default_rng(6).normal(size=(64, 256)) * np.exp(np.random.default_rng(7).normal(size=64))[:, None]
    lost = lambda allocate: np.square(aciq(W, bits=3, allocate=allocate).dense() - W).sum()
    assert lost(True) < 0.8 * lost(False)


def test_wrong_knobs_and_weights():
    W = np.ones((2, 4), np.float32)
    for knobs in (dict(bits=0), dict(bits=9)):
        with pytest.raises(ValueError, match="bits must be 1 to 8"):
            aciq(W, **knobs)
    for knobs in (dict(law="cauchy"), dict(correct="all")):
        with pytest.raises(ValueError, match="law must be"):
            aciq(W, **knobs)
    with pytest.raises(ValueError, match="NaN or Inf"):
        aciq(np.array([[np.nan, 1]]))
    with pytest.raises(ValueError, match="non-empty"):
        aciq(np.ones(3))


def test_in_a_recipe(tmp_path):
    from refllm.model.native import save_native

    small = refllm.compress(refllm.load("tiny"), "aciq:bits=5")
    save_native(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    np.testing.assert_array_equal(refllm.forward(again, [1, 2, 3]), refllm.forward(small, [1, 2, 3]))
