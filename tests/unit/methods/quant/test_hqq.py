"""hqq: the loop against one number at a time, and its invariants. The authors' code: tests/oracle/test_hqq.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.packed import matmul
from refllm.methods.quant.hqq import hqq, shrink
from tests.strategies import PROPERTY, group_sizes, mixed_weights, weight_row


def slow(W, bits, g, p, beta, growth, rounds):
    """Zero points (rows, groups) and inverse scales, one number at a time."""
    most, rows = 2**bits - 1, [row.reshape(-1, g).astype(np.float64) for row in W]
    ends = [[(min(group), max(group)) for group in row] for row in rows]
    inverse = [[1.0 if hi - lo <= 1e-4 else min(most / (hi - lo), 2e4) for lo, hi in row] for row in ends]
    zero = [[-lo * inv for (lo, _), inv in zip(*pair, strict=True)] for pair in zip(ends, inverse, strict=True)]
    least = np.inf
    for _ in range(rounds):
        sizes = []
        for r, row in enumerate(rows):
            for k, group in enumerate(row):
                inv, z, wanted = inverse[r][k], zero[r][k], []
                for w in group:
                    code = min(max(np.rint(w * inv + z), 0), most)
                    error = w - (code - z) / inv
                    size = abs(error)
                    kept = max(0.0, size - size ** (p - 1) / beta) if size else 0.0
                    wanted.append(code - (w - np.sign(error) * kept) * inv)
                    sizes.append(size)
                zero[r][k] = np.mean(wanted)
        beta *= growth
        if np.mean(sizes) >= least:
            break
        least = np.mean(sizes)
    return np.array(zero), np.array(inverse)


@pytest.mark.parametrize(("bits", "p", "growth"), [(2, 0.7, 1.01), (3, 1.0, 1.0), (4, 0.7, 1.0), (1, 0.5, 1.1)])
def test_equals_one_number_at_a_time(bits, p, growth):
    W = np.stack([weight_row(kind, 32, 7) for kind in ("normal", "outlier", "constant", "zero")])
    zero, inverse = slow(W, bits, 16, p, 10.0, growth, 20)
    record = hqq(W, bits=bits, group_size=16, p=p, growth=growth, scale_dtype="float32")
    np.testing.assert_allclose(record.scale, 1 / inverse, rtol=1e-6)
    np.testing.assert_allclose(record.minimum, -zero / inverse, rtol=1e-5, atol=1e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1), st.floats(0.01, 100))
def test_p_1_is_the_soft_threshold(numbers, beta):
    x = np.array(numbers)
    np.testing.assert_allclose(shrink(x, 1.0, beta), np.sign(x) * np.maximum(np.abs(x) - 1 / beta, 0), atol=1e-12)


@given(st.floats(0.1, 1), st.floats(0.1, 100))
def test_no_error_stays_none_and_small_ones_are_dropped(p, beta):
    assert shrink(np.array([0.0, -0.0]), p, beta).tolist() == [0, 0]
    edge = beta ** (1 / (p - 2))  # where |x| = |x|^(p-1) / beta
    assert shrink(np.array([0.99 * edge, -0.99 * edge]), p, beta).tolist() == [0, 0]
    assert shrink(np.array([1.01 * edge]), p, beta)[0] > 0


@PROPERTY
@given(st.data(), st.integers(1, 8))
def test_without_rounds_it_rounds_to_the_plain_range(data, bits):
    """The zero point is a real number there: the smallest weight is met exactly, up to the stored numbers."""
    W = data.draw(mixed_weights(columns=st.integers(1, 20)))
    g = data.draw(group_sizes(W.shape[1])) or -1
    record = hqq(W, bits=bits, group_size=g, rounds=0, scale_dtype="float32")
    groups = W.astype(np.float64).reshape(len(W), -1, W.shape[1] if g == -1 else g)
    span = groups.max(-1) - groups.min(-1)
    step = np.where(span <= 1e-4, 1, np.maximum(span / (2**bits - 1), 1 / 2e4))
    error = np.abs(record.dense().reshape(groups.shape) - groups).max(axis=-1)
    assert (error <= step / 2 + 1e-6 * np.abs(groups).max(axis=-1)).all()


def test_fewer_outliers_count_than_without_the_splitting():
    W = np.random.default_rng(3).standard_t(4, size=(64, 256)).astype(np.float32)
    lost = lambda rounds: (np.abs(hqq(W, bits=3, rounds=rounds).dense().astype(np.float64) - W) ** 0.7).mean()
    assert lost(20) < lost(0)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (2, -1), (8, 24)])
def test_products(bits, group, backend, monkeypatch):
    """Groups of whole blocks have a kernel (minimum form); groups of 24 are decoded."""
    monkeypatch.setenv("REFLLM_KERNELS", backend)
    W = np.random.default_rng(bits).normal(size=(37, 192)).astype(np.float32)
    x = np.random.default_rng(9).normal(size=(5, 192)).astype(np.float32)
    record = hqq(W, bits=bits, group_size=group)
    exact, bound = x.astype(np.float64) @ record.dense().T, np.abs(x) @ np.abs(record.dense()).T
    assert (np.abs(matmul(x, record) - exact) <= 1e-5 * bound).all()
    assert (np.abs(matmul(x, record, "int8") - exact) <= 0.02 * bound).all()


def test_wrong_knobs_and_weights():
    W = np.ones((2, 4), np.float32)
    for knobs in (dict(bits=0), dict(bits=9), dict(p=0.0), dict(p=1.1), dict(beta=0.0), dict(growth=0.9)):
        with pytest.raises(ValueError, match="hqq needs"):
            hqq(W, **{"group_size": 2} | knobs)
    with pytest.raises(ValueError, match="hqq needs"):
        hqq(W, group_size=2, rounds=-1)
    with pytest.raises(ValueError, match="NaN or Inf"):
        hqq(np.array([[np.inf, 1]]), group_size=2)
    with pytest.raises(ValueError, match="non-empty"):
        hqq(np.ones(3), group_size=1)
    with pytest.raises(ValueError, match="positive or -1"):
        hqq(W, group_size=0)
    with pytest.raises(ValueError, match="too large for float16"):
        hqq(np.array([[0, 1e6]]), group_size=2)


def test_in_a_recipe(tmp_path):
    from refllm.model.native import save_native

    small = refllm.compress(refllm.load("tiny"), "hqq:bits=4,group=32+kivi:bits=4")
    save_native(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    np.testing.assert_array_equal(refllm.forward(again, [1, 2, 3]), refllm.forward(small, [1, 2, 3]))
