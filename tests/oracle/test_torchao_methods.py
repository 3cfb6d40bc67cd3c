"""GPTQ, AWQ and SmoothQuant against torchao's own: codes, and the scales that their searches end with."""

import inspect

import numpy as np
import pytest

from refllm.kernels.grids import AffineGrid
from refllm.kernels.stats import Stats
from refllm.methods.blockwise.awq import RATIOS, best_scale, linear_change, scale_at
from refllm.methods.quant import gptq, rtn
from refllm.methods.quant.gptq import rounding_margins
from refllm.methods.transform.smoothquant import scales

torch = pytest.importorskip("torch")
torchao = pytest.importorskip("torchao")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def example(seed, out, columns, tokens):
    """A weight, and correlated inputs whose channels differ in size."""
    rng = np.random.default_rng(seed)
    W = (rng.standard_normal((out, columns)) / 8).astype(np.float32)
    X = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns)) / np.sqrt(columns)
    return W, (X * np.exp(rng.standard_normal(columns))).astype(np.float32)


@pytest.fixture(scope="module")
def gptq_quantize():
    """Their GPTQ without the two lines that refuse a CPU; nothing else in it asks for a GPU."""
    api = pytest.importorskip("torchao.prototype.gptq.api")
    source = inspect.getsource(api.gptq_quantize)
    for line in ('assert device.type == "cuda", "GPTQ only supports CUDA currently"', "torch.cuda.synchronize()"):
        assert source.count(line) == 1
        source = source.replace(line, "pass")
    namespace = dict(vars(api))
    exec(compile(source, api.__file__, "exec"), namespace)
    return namespace["gptq_quantize"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_gptq_codes(gptq_quantize, agreement, seed, damp):
    """Int8 with a scale a row, 2 amax / 255 in both. Theirs is float32: codes that hang on it may differ."""
    from torchao.prototype.gptq.api import GPTQConfig
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerRow

    W, X = example(seed, 64, 128, 400)
    config = GPTQConfig("convert", Int8WeightOnlyConfig(granularity=PerRow()), percdamp=damp)
    H = torch.from_numpy((X.astype(np.float64).T @ X / len(X)).astype(np.float32))
    theirs = gptq_quantize(H, torch.from_numpy(W.copy()), config)
    knobs = dict(bits=8, group_size=-1, symmetric=True, scale_dtype="float32")
    ours = gptq(W, Stats(X), damp=damp, **knobs)
    codes = ours.unpacked().astype(int) - 128
    np.testing.assert_allclose(ours.scale.ravel(), theirs.scale.numpy().ravel(), rtol=1e-6)
    away = np.abs(codes - theirs.qdata.numpy())
    agreement("torchao", torchao.__version__, "GPTQ int8", codes.size, np.count_nonzero(away), f"damp {damp}, float32")
    assert np.mean(away > 0) < 1e-3 and away.max() <= 1
    rounded = rtn(W, bits=8, group_size=-1, symmetric=True, scale_dtype="float32").unpacked().astype(int) - 128
    assert np.mean(rounded != codes) > 0.15  # it is not the rounding alone that agrees
    assert rounding_margins(W, Stats(X), ours, damp=damp).unsafe == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [16, 32])
def test_awq_scales(agreement, seed, group):
    """The search over 20 ratios, judged by the linear's own output, on an affine grid of 4 bits."""
    from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    W, X = example(seed, 48, 64, 200)
    config = IntxWeightOnlyConfig(torch.int4, PerGroup(group), MappingType.ASYMMETRIC)
    observer = AWQObserver(torch.from_numpy(W), None, config)
    observer(torch.from_numpy(X), None)
    theirs, stats = observer.calculate_qparams().numpy(), Stats(X)
    ours, errors = best_scale({"w": W}, stats, linear_change(W, stats), lambda W: AffineGrid(4, group, "float32"))
    ratio = RATIOS[int(np.argmin(errors))]
    different = np.count_nonzero(~np.isclose(ours, theirs, rtol=1e-5))
    agreement("torchao", torchao.__version__, "AWQ scales", ours.size, different, f"groups of {group}, ratio {ratio}")
    assert different == 0
    assert sum(np.allclose(scale_at(r, stats.mean_abs), theirs, rtol=1e-5) for r in RATIOS) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_smoothquant_scales(agreement, alpha):
    """They add float32's epsilon to both maxima where ours has a floor."""
    from torchao.prototype.smoothquant.core import SmoothQuantObserver

    W, X = example(7, 48, 96, 200)
    observer = SmoothQuantObserver(torch.from_numpy(W), alpha)
    for part in np.split(X, 4):
        observer(torch.from_numpy(part))
    theirs, ours = observer.calculate_qparams()[0].numpy(), scales(Stats(X).absmax, [W], alpha)
    different = np.count_nonzero(~np.isclose(ours, theirs, rtol=1e-5))
    agreement("torchao", torchao.__version__, "SmoothQuant scales", ours.size, different, f"alpha {alpha}")
    assert different == 0
