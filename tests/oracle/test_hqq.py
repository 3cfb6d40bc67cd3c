"""hqq beside the authors' package: its loop for the zero point, and its quantizer from weights to codes."""

from importlib.metadata import version

import numpy as np
import pytest

from refllm.methods.quant.hqq import hqq

pytestmark = pytest.mark.oracle


def example(bits):
    return np.random.default_rng(bits).standard_t(4, size=(64, 256)).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 5, 20])
def test_zero_points_and_codes(bits, rounds, agreement):
    torch, optimize = pytest.importorskip("torch"), pytest.importorskip("hqq.core.optimize")
    W = example(bits)
    groups, most = torch.tensor(W.reshape(-1, 64)), 2**bits - 1
    low = groups.min(dim=1, keepdim=True)[0]
    inverse = (most / (groups.max(dim=1, keepdim=True)[0] - low)).clamp(max=2e4)
    knobs = {"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "iters": rounds}
    theirs, _, zero = optimize.optimize_weights_proximal_legacy(
        groups, inverse, -low * inverse, [0, most], axis=1, opt_params=knobs
    )
    mine = hqq(W, bits=bits, growth=1.0, rounds=rounds, scale_dtype="float32")  # their loop keeps beta as it is
    codes = mine.unpacked().reshape(-1, 64)
    different = np.count_nonzero(codes != theirs.numpy())
    agreement("hqq", version("hqq"), f"{bits} bits, {rounds} rounds", codes.size, different, "the loop; float32 there")
    assert different <= 1e-4 * codes.size
    np.testing.assert_allclose(-mine.minimum.ravel() / mine.scale.ravel(), zero.numpy().ravel(), atol=5e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_quantizer(bits, agreement):
    """Codes, scales and zero points of Quantizer.quantize with its defaults, groups along `in` (axis=1)."""
    torch, module = pytest.importorskip("torch"), pytest.importorskip("hqq.core.quantize")
    W = example(bits)
    theirs, meta = module.Quantizer.quantize(
        torch.tensor(W), nbits=bits, group_size=64, axis=1, optimize=True, round_zero=False, bitpack=False,
        device="cpu", compute_dtype=torch.float32,
    )  # fmt: skip
    mine = hqq(W, bits=bits, growth=1.0, scale_dtype="float32")
    codes = mine.unpacked().reshape(-1, 64)
    different = np.count_nonzero(codes != theirs.numpy().reshape(codes.shape))
    agreement("hqq", version("hqq"), f"{bits} bits, Quantizer", codes.size, different, "float32 there")
    assert different <= 1e-3 * codes.size
    np.testing.assert_allclose(mine.scale.ravel(), meta["scale"].numpy().ravel(), rtol=1e-5)
    np.testing.assert_allclose(-mine.minimum.ravel() / mine.scale.ravel(), meta["zero"].numpy().ravel(), atol=5e-3)
