"""Activations of 4 bits: the same products with coarser codes, against the NumPy text and against whole numbers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm import load
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import fast, matmul, reference
from refllm.kernels.packed.activations import dequantize_activations, quantize_activations
from refllm.kernels.packed.laid_out import TOKENS, rounded_kind
from refllm.methods.apply import compress
from refllm.model.llama import forward
from tests.strategies import ACTIVATION_ROWS
from tests.unit.kernels.packed.test_records import coded, one_of_each
from tests.unit.kernels.packed.test_tables import MANY_CASES
from tests.unit.kernels.packed.test_tile_kernels import drawn_activations, kind_of, laid_out, rounded, tolerance
from tests.unit.kernels.packed.test_tiling import gguf_blocks, int_weight

FORMS = ("S4", "A4", "S8", "Q4_0", "Q8_0", "Q4_K")


def weight_of(form, rows, seed, largest):
    if form.startswith("Q"):
        return gguf_blocks(form, rows, 1, seed)
    grid = (SymmetricGrid if form[0] == "S" else AffineGrid)(int(form[1]), 32)
    return int_weight(grid, rows, 96, seed, largest)


@pytest.mark.parametrize("n", [1, TOKENS])
@MANY_CASES
@given(
    count=st.integers(1, 9),
    kinds=st.lists(st.sampled_from(ACTIVATION_ROWS), min_size=1, max_size=15),
    seed=st.integers(0, 2**16),
)
def test_codes_bit_for_bit(n, count, kinds, seed):
    x = drawn_activations(32 * count, kinds, seed)
    for block in (0, 32):
        expected, steps = quantize_activations(x, block, 4)
        codes, scale, sums = laid_out(x, rounded_kind(block, 4), n)
        assert np.abs(expected).max() <= 7 and np.array_equal(codes[: len(x)], expected)
        assert np.array_equal(scale[: len(x)], np.broadcast_to(steps, scale[: len(x)].shape))
        assert np.array_equal(sums[: len(x), :, 0], expected.reshape(len(x), -1, 32).sum(-1, dtype=int))


@pytest.mark.parametrize("form", FORMS)
@MANY_CASES
@given(
    rows=st.integers(1, 18),
    kinds=st.lists(st.sampled_from(ACTIVATION_ROWS), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    largest=st.booleans(),
)
def test_products_within_the_bound(form, rows, kinds, seed, largest):
    weight = weight_of(form, rows, seed, largest)
    x = drawn_activations(weight.columns, kinds, seed)
    seen = rounded(x, kind_of(weight), 4)
    y = fast.matmul_rounded(x, weight, 4)
    assert (np.abs(y - reference.matmul_float(seen, weight)) <= tolerance(seen, weight)).all()
    assert np.array_equal(y, reference.matmul_rounded(x, weight, 4))
    assert np.array_equal(fast.matmul_rounded(np.resize(x, (13, weight.columns)), weight, 4)[: len(x)], y)
    if form == "Q4_K":
        assert np.array_equal(y, reference.matmul_rounded(x, weight, 4))


@pytest.mark.parametrize("form", ["S4", "A4", "S8"])
@MANY_CASES
@given(rows=st.integers(1, 18), seed=st.integers(0, 2**16), largest=st.booleans())
def test_whole_numbers_are_exact(form, rows, seed, largest):
    weight = weight_of(form, rows, seed, largest)
    weight = replace(weight, scale=np.ones_like(weight.scale))
    x = np.random.default_rng(seed).integers(-7, 8, (13, 96)).astype(np.float32)
    x[:, 0] = 7
    if largest:
        x[:] = -7
    exact = x.astype(np.int64) @ weight.dense().T.astype(np.int64)
    for module in (fast, reference):
        assert np.array_equal(module.matmul_rounded(x, weight, 4), exact)
        assert np.array_equal(module.matmul_rounded(x[:1], weight, 4), exact[:1])


@pytest.mark.parametrize("kernels", ["numba", "numpy"])
def test_matmul_rounds_what_meets_codes(kernels, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", kernels)
    x = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    for name, weight in one_of_each().items():
        y = matmul(x, weight, "int4")
        if not coded(name):
            assert np.array_equal(y, matmul(x, weight))
        elif not any(part in name for part in ("lowrank", "reordered", "rotated")):
            seen = dequantize_activations(*quantize_activations(x, 32 * (name == "gguf"), 4))
            assert np.allclose(y, seen @ weight.dense().T, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("kernels", ["numba", "numpy"])
def test_a_model_of_four_and_four_bits_still_speaks(kernels, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", kernels)
    model = compress(load("tiny"), "rtn:bits=4,group=32")
    ids = model.tokenizer.encode("The lamp is at Hilltop. Where is the lamp? The lamp is at")
    plain, rough = (
        forward(replace(model, runtime=replace(model.runtime, activations=kind)), ids) for kind in ("float32", "int4")
    )
    off = np.linalg.norm(rough - plain) / np.linalg.norm(plain)
    assert 0.01 < off < 0.5
