"""Decoding kernels equal the NumPy texts bit for bit, and which kernel runs what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats import blocks
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.masks import keep_n_of_m, keep_top
from refllm.kernels.packed import fast, reference
from refllm.kernels.packed.records import GGUFBlocks, IntWeight, Sparse24, SparseBitmask
from tests.strategies import PROPERTY, group_sizes, mixed_weights
from tests.unit.kernels.packed.test_records import int_weight, one_of_each


def unpacked(weight):
    out = np.full((weight.shape[0] + 1, weight.shape[1]), 7, np.float32)  # the last row must stay as it is
    fast.decoder(weight)(0, weight.shape[0], out[:-1])
    assert (out[-1] == 7).all()
    return out[:-1]


def random_blocks(name, rows, count, seed):
    """Random bytes with finite scales."""
    form, rng = blocks.BLOCKS[name], np.random.default_rng(seed)
    fields = form.layout.unpack(rng.integers(0, 256, (rows, count, form.bytes_per_block), dtype=np.uint8))
    for values in fields.values():
        if values.dtype.kind == "f":
            values[:] = rng.standard_normal(values.shape) * 10.0 ** rng.integers(-7, 4, values.shape)
    if "e" in fields:  # MXFP4: 12 times 2^125 is infinite
        fields["e"][:] = np.minimum(fields["e"], 252)
    return GGUFBlocks(form.layout.pack(**fields).reshape(rows, -1), name, count * form.block_size)


@pytest.mark.parametrize("name", blocks.BLOCKS)
@PROPERTY
@given(rows=st.integers(1, 3), count=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_gguf_blocks_bit_for_bit(name, rows, count, seed):
    weight = random_blocks(name, rows, count, seed)
    assert np.array_equal(unpacked(weight), weight.dense())


@pytest.mark.parametrize("bits", range(2, 9))
@PROPERTY
@given(data=st.data())
def test_integer_codes_bit_for_bit(bits, data):
    W = data.draw(mixed_weights(st.integers(1, 5), st.integers(1, 70)))
    grid = data.draw(st.sampled_from([SymmetricGrid, AffineGrid]))(bits, data.draw(group_sizes(W.shape[1])))
    weight = int_weight(W, grid)
    assert np.array_equal(unpacked(weight), weight.dense())


@PROPERTY
@given(
    mixed_weights(st.integers(1, 5), st.integers(1, 9).map(lambda n: 4 * n)), st.sampled_from(["float16", "float32"])
)
def test_2_4_bit_for_bit(W, dtype):
    weight = Sparse24.compress(W, keep_n_of_m(np.abs(W), 2, 4), dtype)
    assert np.array_equal(unpacked(weight), weight.dense())


@PROPERTY
@given(mixed_weights(st.integers(1, 5), st.integers(1, 30)), st.floats(0, 1), st.sampled_from(["float16", "float32"]))
def test_bitmask_bit_for_bit(W, sparsity, dtype):
    weight = SparseBitmask.compress(W, keep_top(np.abs(W), sparsity), dtype)
    assert np.array_equal(unpacked(weight), weight.dense())


@pytest.mark.parametrize("name", one_of_each())
def test_blocks_of_rows_cover_every_record_in_order(name, monkeypatch):
    weight = one_of_each()[name]
    monkeypatch.setattr(fast, "BLOCK_ELEMENTS", 4 * weight.shape[1])
    seen = [(block.start, block.stop, rows.copy()) for block, rows in fast.decoded(weight)]
    assert [(start, stop) for start, stop, _ in seen] == [(0, 4), (4, 6)]
    assert np.allclose(np.concatenate([rows for *_, rows in seen]), weight.dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_both_sides_of_the_switch_agree(activations):
    weight = int_weight(np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32), AffineGrid(4, 32))
    x = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    product = getattr(fast, f"matmul_{activations}")
    many, text = product(x, weight), getattr(reference, f"matmul_{activations}")(x, weight)
    few = np.concatenate([product(x[i : i + 1], weight) for i in range(40)])
    assert np.array_equal(many, few) and np.allclose(many, text, rtol=1e-5, atol=1e-5)
    assert activations == "float" or np.array_equal(many, text)


def test_a_block_of_rows_is_all_the_memory_a_product_takes():
    import tracemalloc

    weight = IntWeight(np.zeros((4096, 768), np.uint8), np.ones((4096, 1), np.float16), None, 3, -1, 2048)
    x = np.ones((16, 2048), np.float32)
    fast.matmul_float(x, weight)
    tracemalloc.start()
    fast.matmul_float(x, weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20 < 4096 * 2048 * 4 // 8
