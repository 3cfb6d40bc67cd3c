"""hqq beside the authors' package."""

import numpy as np
import pytest

from refllm.methods.quant.hqq import hqq

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 5, 20])
def test_zero_points_and_codes(bits, rounds):
    torch, optimize = pytest.importorskip("torch"), pytest.importorskip("hqq.core.optimize")
    W = np.random.default_rng(bits).standard_t(4, size=(64, 256)).astype(np.float32)
    groups, most = torch.tensor(W.reshape(-1, 64)), 2**bits - 1
    low = groups.min(dim=1, keepdim=True)[0]
    inverse = (most / (groups.max(dim=1, keepdim=True)[0] - low)).clamp(max=2e4)
    knobs = {"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "iters": rounds}
    theirs, _, zero = optimize.optimize_weights_proximal_legacy(
        groups, inverse, -low * inverse, [0, most], axis=1, opt_params=knobs
    )
    mine = hqq(W, bits=bits, growth=1.0, rounds=rounds, scale_dtype="float32")  # their loop keeps beta as it is
    codes = mine.unpacked().reshape(-1, 64)
    assert (codes == theirs.numpy()).mean() >= 0.9999
    np.testing.assert_allclose(-mine.minimum.ravel() / mine.scale.ravel(), zero.numpy().ravel(), atol=5e-3)
