"""Report: every number recomputed from the definition, in float64."""

import numpy as np
import pytest

from refllm.kernels.stats import Stats
from refllm.methods.lowrank import svd
from refllm.methods.prune import magnitude
from refllm.methods.quant import rtn
from refllm.methods.record import report


def example(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(6, 32)).astype(np.float32), rng.normal(size=(20, 32)).astype(np.float32)


@pytest.mark.parametrize("record_of", [lambda W: rtn(W, group_size=16), magnitude, svd])
def test_numbers_follow_their_definitions(record_of):
    W, X = example()
    record = record_of(W)
    result = report("name", W, record, Stats(X))
    assert (result.name, result.shape) == ("name", (6, 32))
    assert result.nbytes == record.nbytes and result.bits_per_weight == 8 * record.nbytes / 192
    wide, dense = W.astype(np.float64), record.dense().astype(np.float64)
    weight_error = sum((a - b) ** 2 for a, b in zip(wide.flat, dense.flat, strict=True)) / sum(a**2 for a in wide.flat)
    assert result.weight_error == pytest.approx(weight_error, rel=1e-12)
    H = X.astype(np.float64).T @ X
    trace = lambda M: np.trace(M @ H @ M.T)
    # The outputs are float32 products: 32 terms, rounded at 2^-24 of their magnitudes.
    assert result.output_error == pytest.approx(trace(wide - dense) / trace(wide), rel=1e-4)


def test_the_output_error_is_the_same_whether_or_not_h_is_there():
    W, X = example()
    fresh, used = Stats(X), Stats(X)
    assert used.H.shape == (32, 32)
    for record in (rtn(W, group_size=16), svd(W)):
        expected = report("w", W, record, fresh).output_error
        assert "H" not in vars(fresh) and report("w", W, record, used).output_error == pytest.approx(expected, rel=1e-4)
    same = np.arange(-8, 8, dtype=np.float32)[None].repeat(2, axis=0) / 4
    stats = Stats(X[:, :16])
    assert stats.H.any() and report("w", same, rtn(same, group_size=-1), stats).output_error == 0.0


def test_no_calibration_no_output_error():
    W, _ = example()
    assert report("w", W, rtn(W, group_size=16)).output_error is None


def test_a_lossless_record_has_no_error_and_zero_weights_are_safe():
    W = np.arange(-8, 8, dtype=np.float32)[None] / 4
    exact = report("w", W, rtn(W, group_size=-1), Stats(np.ones((1, 16), np.float32)))
    assert (exact.weight_error, exact.output_error) == (0.0, 0.0)
    zero = np.zeros((2, 16), np.float32)
    nothing = report("w", zero, rtn(zero, group_size=-1), Stats(np.ones((1, 16), np.float32)))
    assert (nothing.weight_error, nothing.output_error) == (0.0, 0.0)
    wrong = report("w", zero, rtn(zero + 1, group_size=-1))
    assert wrong.weight_error == np.inf
