"""nf4 and fp4 against bitsandbytes: codes and scales of a million weights, bit for bit."""

import warnings
from importlib.metadata import version

import numpy as np
import pytest

from refllm.methods.quant import fp4, nf4

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
        from bitsandbytes import functional
    return functional


@pytest.mark.parametrize("double", [False, True], ids=["absmax", "double"])
@pytest.mark.parametrize("method", [nf4, fp4], ids=lambda m: m.__name__)
@pytest.mark.parametrize("shape", [(1024, 1024), (7, 33), (513, 65)], ids=str)
def test_codes_and_scales(bnb, agreement, method, double, shape):
    rng = np.random.default_rng(5)
    W = (rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))).astype(np.float32)
    W[0], W[-1, ::2] = 0, -0.0
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(W), blocksize=64, quant_type=method.__name__, compress_statistics=double
    )
    theirs = np.stack([packed.numpy()[:, 0] >> 4, packed.numpy()[:, 0] & 15], axis=1).ravel()[: W.size]
    record = method(W, double_quant=double)
    values = record.entries
    wrong = np.count_nonzero(values[record.unpacked().ravel()] != values[theirs])
    name, release = f"{method.__name__}{', double' if double else ''}", version("bitsandbytes")
    agreement("bitsandbytes", release, name, W.size, wrong, f"{shape[0]} x {shape[1]}: codes of the weights")
    assert wrong == 0
    if not double:
        assert record.scale.tobytes() == state.absmax.numpy().tobytes()
        return
    # The offset is a float32 sum there; the codes of the scales come from a coarse table in its compiled CPU code.
    assert record.scale.offset[0] == pytest.approx(state.offset.item(), rel=1e-5)
    off = np.count_nonzero(record.scale.unpacked()[0] != state.absmax.numpy())
    agreement("bitsandbytes", release, name, state.absmax.numel(), off, "codes of the scales; coarse table, documented")
    assert off <= 3 + 0.01 * state.absmax.numel()
