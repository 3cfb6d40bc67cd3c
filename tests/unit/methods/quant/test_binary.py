"""binary: against two lines of plain Python, the least error that a bit can have, bytes and refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.evaluate.golden.suites.billm_definition import Unclear, quantize_binary
from refllm.methods.apply import compress
from refllm.methods.quant.binary import binary
from refllm.model.llama import forward
from tests.models import random_model
from tests.strategies import PROPERTY, SEEDS


@PROPERTY
@given(st.integers(1, 3), st.sampled_from((1, 2, 4)), st.integers(1, 6), SEEDS)
def test_as_the_definition_says(rows, groups, g, seed):
    W = np.random.default_rng(seed).integers(-64, 65, (rows, groups * g)) / 16
    try:
        expected = quantize_binary(W.tolist(), g)
    except Unclear:
        return
    record = binary(W, group_size=g)
    found = {"codes": record.unpacked(), "scale": record.scale, "minimum": record.minimum, "w_hat": record.dense()}
    for name, value in found.items():
        assert value.astype(float).tolist() == np.array(expected[name][1], float).tolist(), name


@PROPERTY
@given(SEEDS, st.floats(-1, 1), st.floats(0.25, 4))
def test_no_other_two_values_around_the_mean_are_nearer(seed, _, factor):
    w = np.random.default_rng(seed).normal(size=32)
    mean, scale = w.mean(), np.abs(w - w.mean()).mean()
    error = lambda a: np.sum((np.abs(w - mean) - a) ** 2)
    values = np.unique(binary(w[None], group_size=-1).dense())
    np.testing.assert_allclose(values, [mean - scale, mean + scale], rtol=2e-3, atol=1e-3)
    assert error(scale) <= error(factor * scale) + 1e-12


def test_a_third_of_the_energy_of_normal_weights_is_lost():
    W = np.random.default_rng(0).standard_normal((64, 1024))
    error = np.mean((W - binary(W, group_size=-1).dense()) ** 2)
    assert error == pytest.approx(1 - 2 / np.pi, rel=0.02)


def test_bytes():
    assert 8 * binary(np.ones((16, 256)), group_size=16).nbytes / 4096 == 1 + 32 / 16


def test_refusals_in_one_line():
    for W, g, message in (
        (np.ones((2, 6)), 4, "4 does not divide the 6"),
        (np.ones((2, 6)), 0, "group_size must be positive or -1"),
        (np.full((1, 2), 1e9), -1, "too large for float16"),
        (np.full((1, 2), np.nan), -1, "NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            binary(W, group_size=g)


def test_a_recipe_runs():
    model = random_model("llama", np.float32, intermediate_size=64)
    assert np.isfinite(forward(compress(model, "binary:group=16"), np.arange(20))).all()
