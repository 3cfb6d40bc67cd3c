"""LLM.int8 against bitsandbytes' operations on the CPU: codes, scales, outlier columns, products within float16."""

import numpy as np
import pytest

from refllm.kernels.packed import matmul
from refllm.methods.quant import llm_int8

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")


def half(rng, *shape):
    """Numbers of float16, the type bitsandbytes rounds its inputs to."""
    return rng.standard_normal(shape).astype(np.float16)


def check_codes(agreement, ours, theirs, note):
    different = int((ours != theirs).sum())
    agreement("bitsandbytes", bnb.__version__, "LLM.int8 codes", ours.size, different, note=note)
    assert not different


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_codes_scales_and_outlier_columns(threshold, agreement):
    from bitsandbytes import functional as F

    rng = np.random.default_rng(0)
    W, X = half(rng, 96, 256), half(rng, 32, 256)
    X[:, 17], X[3, 40], X[9, 41] = X[:, 17] * 20, 6, 5.996
    record = llm_int8(W.astype(np.float32), threshold=threshold)
    codes, scale, _ = F.int8_vectorwise_quant(torch.from_numpy(W))
    ours = record.weight.unpacked().astype(np.int16) - 128
    check_codes(agreement, ours, codes.numpy(), "weights")
    assert np.array_equal(record.weight.scale[:, 0], scale.numpy() / np.float32(127))
    x_codes, x_scale, columns = F.int8_vectorwise_quant(torch.from_numpy(X.copy()), threshold=threshold)
    steps, size, _ = record.steps(X.astype(np.float32))
    check_codes(agreement, steps, x_codes.numpy(), f"inputs, threshold {threshold}")
    assert np.array_equal(size[:, 0], x_scale.numpy() / np.float32(127))
    found = np.flatnonzero(record.outliers(X.astype(np.float32)))
    assert found.tolist() == ([] if columns is None else sorted(columns.tolist()))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_products(threshold, agreement):
    """They return float16, add the outlier part in float16 and take 6.200124e-5 for 1 / 127^2."""
    from bitsandbytes import functional as F

    rng = np.random.default_rng(1)
    W, X = half(rng, 96, 256), half(rng, 32, 256)
    X[:, 17] = X[:, 17] * 20
    CB, SCB, _ = F.int8_vectorwise_quant(torch.from_numpy(W.copy()))
    CA, SCA, columns = F.int8_vectorwise_quant(torch.from_numpy(X.copy()), threshold=threshold)
    mixed = torch.ops.bitsandbytes.int8_mixed_scaled_mm
    theirs = mixed(torch.from_numpy(X), CA, CB, SCA, SCB, columns if threshold else None)[0].float().numpy()
    ours = matmul(X.astype(np.float32), llm_int8(W.astype(np.float32), threshold=threshold))
    exact = X[:, columns.numpy()].astype(np.float64) if threshold else np.zeros((len(X), 1))
    size = np.abs(ours) + np.abs(exact).sum(axis=1, keepdims=True) * np.abs(W).max()
    bound = 2.0**-10 * size + 1e-3
    different = int((np.abs(ours - theirs) > bound).sum())
    agreement("bitsandbytes", bnb.__version__, "LLM.int8 products", ours.size, different, note=f"threshold {threshold}")
    assert not different
