"""The benchmark runs what it says and computes its ratios from what it measured."""

import numpy as np
import pytest

from refllm.kernels.packed.bench import KINDS, gemv_ratios, packed_weight, table


def test_ratios_of_a_small_product():
    timings = gemv_ratios((8, 64), kinds=("w4a", "w8-int8", "Q8_0"), rounds=3, spread=5000)
    assert [t.name for t in timings] == ["numpy-float32", "w4a", "w8-int8", "Q8_0"]
    assert timings[0].ratio == timings[0].quartile_ratio == 1 and timings[0].nbytes == 8 * 64 * 4
    for t in timings:
        assert t.ratio == timings[0].median / t.median and t.quartile_ratio == timings[0].quartile / t.quartile
        assert 0 < t.quartile <= t.median
    assert len(table(timings).splitlines()) == 5


@pytest.mark.parametrize("kind", [*KINDS, "Q4_0"])
def test_kinds_are_what_they_are_called(kind):
    weight = packed_weight(kind, np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32))
    assert weight.shape == (4, 256) and 8 * weight.nbytes / 1024 < 9


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind 'w5'; known: w4"):
        gemv_ratios((8, 64), kinds=("w5",))
