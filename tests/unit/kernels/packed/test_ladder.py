"""Every rung of the kernel ladder is the same product: whole numbers to the bit, floats within their roundings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.grids import SymmetricGrid
from refllm.kernels.packed import ladder, reference, threads
from refllm.kernels.packed.activations import dequantize_activations, quantize_activations
from refllm.kernels.packed.records import IntWeight
from tests.strategies import ACTIVATION_ROWS, KERNEL, activation_row, gamma, weight_row
from tests.unit.kernels.packed.test_tiling import int_weight

ROWS, GROUPS, SEEDS = st.integers(1, 35), st.integers(1, 4), st.integers(0, 2**16)
GRID = SymmetricGrid(4, 32)


def tolerance(x, weight):
    """Of one rung, from the product of the rounded x in float64.

    A whole number meets the product with its scale, the sums of the groups from its own on and the product with the
    activations' scale (the last rung: that one first, and products and sums rounded at once). One more is that of the
    decoded weight. What underflows is wrong by half of 2^-149 before it meets a scale, the activations' one included.
    """
    groups = weight.columns // ladder.GROUP
    roundings = groups + 3
    codes, scale = quantize_activations(x[None])
    seen = np.abs(codes[0] * scale[0].astype(np.float64))
    weights = np.abs(weight.dense()).astype(np.float64)
    return gamma(roundings) * (weights @ seen) + roundings * 2.0**-149 * (1 + weights.max(axis=1) + scale[0, 0])


@pytest.mark.parametrize("rung", ladder.RUNGS, ids=lambda rung: rung.__name__)
@KERNEL
@given(ROWS, GROUPS, st.sampled_from(ACTIVATION_ROWS), SEEDS, st.booleans())
def test_a_rung_is_within_its_roundings_of_the_text_and_of_the_last(rung, rows, groups, kind, seed, largest):
    weight = int_weight(GRID, rows, 32 * groups, seed, largest)
    x = activation_row(kind, 32 * groups, seed)
    codes, scale = quantize_activations(x[None])
    exact = reference.matmul_float(codes * scale.astype(np.float64), weight)[0]
    y, last = rung(x, weight), ladder.tiles(x, weight)
    assert y.dtype == np.float32 and y.shape == (rows,)
    assert (np.abs(y - exact) <= tolerance(x, weight)).all()
    assert (np.abs(y - last) <= 2 * tolerance(x, weight)).all()


@pytest.mark.parametrize("rung", ladder.RUNGS[:-1], ids=lambda rung: rung.__name__)
@KERNEL
@given(ROWS, GROUPS, SEEDS, st.booleans(), st.sampled_from(["any", "largest", "smallest"]))
def test_whole_numbers_to_the_bit(rung, rows, groups, seed, largest, kind):
    """Scales of 1 and activations with largest magnitude 127 leave whole numbers all the way: no rung may differ.

    With all codes 15 or 0 and all activations 127 a pair of byte products is 2 x 15 x 127, the worst of 16-bit sums.
    """
    weight = int_weight(GRID, rows, 32 * groups, seed, largest)
    weight = IntWeight(weight.codes, np.ones_like(weight.scale), None, 4, 32, weight.columns)
    x = activation_row("integers" if kind == "any" else "all largest", weight.columns, seed)
    x = -np.abs(x) if kind == "smallest" else x
    exact = x.astype(np.int64) @ weight.dense().astype(np.int64).T
    assert np.array_equal(rung(x, weight), exact) and np.array_equal(ladder.tiles(x, weight), exact)


@KERNEL
@given(ROWS, GROUPS, st.sampled_from(ACTIVATION_ROWS), SEEDS)
def test_the_first_four_rungs_round_alike(rows, groups, kind, seed):
    weight = int_weight(GRID, rows, 32 * groups, seed)
    x = activation_row(kind, weight.columns, seed)
    first, *others = (rung(x, weight) for rung in ladder.RUNGS[:-1])
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("rung", ladder.RUNGS, ids=lambda rung: rung.__name__)
def test_zero_groups_and_numbers_that_are_none(rung):
    weight = int_weight(GRID, 5, 96, 0)
    zero = IntWeight(np.full_like(weight.codes, 0x88), weight.scale, None, 4, 32, 96)
    x = weight_row("normal", 96, 0)
    assert not rung(x, zero).any() and not rung(np.zeros_like(x), weight).any()
    for bad in (np.nan, np.inf, -np.inf):
        x[40] = bad
        assert not np.isfinite(rung(x, weight)).any()


@pytest.mark.parametrize("rung", [ladder.blocked, ladder.tiles])
def test_any_number_of_threads_gives_the_same_bits(rung, monkeypatch):
    monkeypatch.setattr(threads, "MINIMUM_WORK", 1)
    weight = int_weight(GRID, 37, 96, 1)
    x = weight_row("normal", 96, 0)
    results = []
    for count in (1, 2, 3, 8):
        monkeypatch.setenv("REFLLM_THREADS", str(count))
        results.append(rung(x, weight))
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("rung", ladder.RUNGS, ids=lambda rung: rung.__name__)
def test_strided_and_read_only_arrays(rung):
    weight = int_weight(GRID, 5, 96, 2)
    codes = np.repeat(weight.codes, 2, axis=1)[:, ::2]
    codes.flags.writeable = False
    strange = IntWeight(codes, np.asfortranarray(weight.scale), None, 4, 32, 96)
    x = weight_row("normal", 192, 0)[::2]
    assert np.array_equal(rung(x, strange), rung(x.copy(), weight))


def test_activations_are_those_of_the_text():
    """The rungs in the middle lay out codes themselves; a row that only one column meets shows each of them."""
    x = weight_row("normal", 64, 3)
    back = dequantize_activations(*quantize_activations(x[None]))[0]
    codes = np.full((64, 64), 8, np.uint8) + np.eye(64, dtype=np.uint8)
    weight = IntWeight.pack(GRID, codes, np.ones((64, 2), np.float16), None)
    assert all(np.array_equal(rung(x, weight), back) for rung in ladder.RUNGS)
