"""gguf: the bytes of the block types, their order of quality, and importance."""

import numpy as np
import pytest

import refllm
from refllm.formats.blocks import BLOCKS
from refllm.kernels.stats import Stats
from refllm.methods.quant.gguf import gguf
from tests.strategies import weight_row

TYPES = [name for name, form in BLOCKS.items() if not form.activations_only]


@pytest.mark.parametrize("name", TYPES)
def test_bytes_are_those_of_the_encoder(name):
    W = np.stack([weight_row(kind, 512, 2) for kind in ("normal", "zero", "outlier")])
    record = gguf(W, type=name)
    np.testing.assert_array_equal(record.data, BLOCKS[name].encode(W))
    assert record.nbytes * 8 == W.size * BLOCKS[name].bits_per_weight


def test_more_bits_lose_less_and_k_quants_less_than_the_old_types():
    W = np.random.default_rng(0).normal(size=(16, 1024)).astype(np.float32)
    lost = lambda name: np.square(gguf(W, type=name).dense() - W).sum()
    assert lost("Q2_K") > lost("Q3_K") > lost("Q4_K") > lost("Q5_K") > lost("Q6_K") > lost("Q8_0")
    assert lost("Q4_0") > lost("Q4_K") and BLOCKS["Q4_0"].bits_per_weight == BLOCKS["Q4_K"].bits_per_weight


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q4_0", "IQ4_NL"])
def test_importance(name):
    rng = np.random.default_rng(1)
    W = rng.normal(size=(16, 512)).astype(np.float32)
    X = (rng.normal(size=(64, 512)) * np.exp(2 * rng.normal(size=512))).astype(np.float32)
    stats, double = Stats(X), Stats(2 * X)
    lost = lambda record: np.square((record.dense() - W) @ X.T).sum()
    weighed = gguf(W, stats, type=name, imatrix=True)
    assert lost(weighed) < lost(gguf(W, stats, type=name))
    np.testing.assert_array_equal(weighed.data, gguf(W, double, type=name, imatrix=True).data)  # a power of two


def test_what_is_refused():
    W = np.ones((2, 256), np.float32)
    for name in ("Q9_K", "Q8_1"):
        with pytest.raises(ValueError, match="type must be one of Q4_0"):
            gguf(W, type=name)
    with pytest.raises(ValueError, match="imatrix needs calibration inputs"):
        gguf(W, imatrix=True)
    with pytest.raises(ValueError, match="encoded without importance"):
        gguf(W, Stats(W), type="Q8_0", imatrix=True)
    with pytest.raises(ValueError, match="32"):
        gguf(np.ones((2, 40), np.float32))
    with pytest.raises(ValueError, match=r"finite|NaN"):
        gguf(np.full((2, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match="non-empty"):
        gguf(np.ones(32, np.float32))


def test_in_a_recipe():
    small = refllm.compress(refllm.load("tiny"), "gguf:type=Q4_0+kivi:bits=2")
    weight = small.weights["model.layers.0.mlp.up_proj.weight"]
    assert 8 * weight.nbytes == 4.5 * weight.shape[0] * weight.shape[1]
