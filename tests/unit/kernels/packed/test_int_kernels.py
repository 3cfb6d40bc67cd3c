"""The fused Numba products against the NumPy text: integers bit for bit, floats within the bound of their roundings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.grids import AffineGrid, SymmetricGrid, group_count
from refllm.kernels.packed import int_kernels, reference, threads
from refllm.kernels.packed.activations import dequantize_activations, quantize_activations
from refllm.kernels.packed.int_kernels import blocking, int_matmul, planes
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.packed.tiles import target_has_byte_dot
from tests.strategies import PROPERTY, activations, gamma, mixed_weights, weight_row

# One grid for every shape of the kernels: a row or tensor as one group, groups of several blocks, of one, of a part.
GRIDS = {
    "w4 row": SymmetricGrid(4, -1),
    "w4 row float32": SymmetricGrid(4, -1, "float32"),
    "w4 g128": SymmetricGrid(4, 128),
    "w4 g64": SymmetricGrid(4, 64),
    "w4a g32": AffineGrid(4, 32),
    "w4a tensor": AffineGrid(4, 0),
    "w8 g128": SymmetricGrid(8, 128),
    "w8a g32": AffineGrid(8, 32),
    "w2a g64": AffineGrid(2, 64),
}
# Widths on and off the blocks of 64, 128 and 256 codes; every group above divides those of GROUPED.
ANY_WIDTH = st.integers(1, 300)
X_KINDS = ["float32", "int16"] + (["int8"] if target_has_byte_dot() else [])
PORTABLE = ("w4 row", "w4a g32", "w8 g128", "w8a g32", "w2a g64")  # of the layout this machine would not choose


def widths(grid):
    return (
        ANY_WIDTH
        if grid.group_size <= 0
        else st.integers(1, 384 // grid.group_size + 1).map(lambda n: n * grid.group_size)
    )


def packed(grid, W):
    scale, zero_point = grid.fit(W)
    return IntWeight.pack(grid, grid.encode(W, scale, zero_point), scale, zero_point)


@pytest.fixture(params=X_KINDS)
def x_kind(request, monkeypatch):
    """Each layout of activations, also the one this machine would not choose."""
    monkeypatch.setattr(int_kernels, "kind_of_x", lambda integers: request.param)
    return request.param


def tolerance(x, weight):
    """Every path of a sum passes one product, at most columns / 16 + 40 sums and scalings; results may be subnormal."""
    roundings = weight.columns // 16 + group_count(weight.columns, weight.group_size) + 48
    return gamma(roundings) * (np.abs(x).astype(np.float64) @ np.abs(weight.dense()).T) + roundings * 2.0**-149


@pytest.mark.parametrize("name", GRIDS)
def test_product(name, x_kind):
    grid = GRIDS[name]
    if x_kind == "int16" and target_has_byte_dot() and name not in PORTABLE:
        pytest.skip("one kernel for each width of codes is enough here")

    @PROPERTY
    @given(data=st.data())
    def check(data):
        W = data.draw(mixed_weights(st.integers(1, 11), widths(grid)))
        x = data.draw(activations(W.shape[1]))
        weight = packed(grid, W)
        assert blocking(weight) is not None
        y = int_matmul(x, weight, x_kind != "float32")
        if x_kind != "float32":
            x = dequantize_activations(*quantize_activations(x)).astype(np.float32)
        exact = reference.matmul_float(x.astype(np.float64), weight)
        assert y.dtype == np.float32 and (np.abs(y - exact) <= tolerance(x, weight)).all()

    check()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integer_sums_bit_for_bit(bits, x_kind):
    """With every scale 1 and activations that are whole numbers, each float on the way is a whole number too."""
    rng = np.random.default_rng(bits)
    groups = 256 // (64 if bits == 2 else 32)
    zero = rng.integers(0, 1 << bits, (7, groups), dtype=np.uint8)
    grids = (SymmetricGrid(bits, -1), 301, 1, None), (AffineGrid(bits, 256 // groups), 256, groups, zero)
    for grid, columns, groups, zero in grids:
        for codes in (rng.integers(0, 1 << bits, (7, columns)), np.full((7, columns), (1 << bits) - 1)):
            weight = IntWeight.pack(grid, codes, np.ones((7, groups), np.float16), zero)
            for x in (rng.integers(-127, 128, columns), np.full(columns, 127), np.full(columns, -127)):
                x = x.astype(np.float32)[None]
                x[0, 0] = 127
                exact = x.astype(np.int64) @ weight.dense().astype(np.int64).T
                assert np.abs(exact).max() < 2**24
                assert np.array_equal(int_matmul(x, weight, x_kind != "float32"), exact)


@pytest.mark.parametrize("kind", X_KINDS[1:])
@PROPERTY
@given(data=st.data())
def test_activation_codes_bit_for_bit(kind, data):
    columns = data.draw(ANY_WIDTH)
    x = data.draw(activations(columns))
    codes, scale = quantize_activations(x)
    laid_out, kernel_scale = planes(x, 4, kind)
    back = laid_out.transpose(0, 1, 3, 2).reshape(len(x), -1)
    assert np.array_equal(back[:, :columns], codes) and not back[:, columns:].any()
    assert np.array_equal(kernel_scale, scale.ravel())


def test_not_a_number_poisons_its_token_only(x_kind):
    weight = packed(SymmetricGrid(4, -1), weight_row("normal", 64, 0)[None])
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[2, 6] = np.nan, -np.inf
    y = int_matmul(x, weight, x_kind != "float32")
    assert np.isnan(y[0, 0]) and np.isfinite(y[1, 0]) and not np.isfinite(y[2, 0])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 13])
def test_any_number_of_rows_and_threads_gives_the_same_bits(rows, x_kind, monkeypatch):
    monkeypatch.setattr(threads, "MINIMUM_WORK", 1)
    W = np.stack([weight_row("normal", 96, seed) for seed in range(rows)])
    x = np.stack([weight_row("normal", 96, 50 + seed) for seed in range(2)])
    weight = packed(AffineGrid(4, 32), W)
    results = []
    for count in (1, 2, 3, 8):
        monkeypatch.setenv("REFLLM_THREADS", str(count))
        results.append(int_matmul(x, weight, x_kind != "float32"))
    assert all(np.array_equal(results[0], other) for other in results[1:])
    alone = [int_matmul(x, packed(AffineGrid(4, 32), W[i : i + 1]), x_kind != "float32") for i in range(rows)]
    assert np.array_equal(np.concatenate(alone, axis=1), results[0])


def test_strided_misaligned_and_read_only_arrays(x_kind):
    weight = packed(AffineGrid(4, 32), np.stack([weight_row("normal", 96, seed) for seed in range(5)]))
    x = weight_row("normal", 192, 9)[None, ::2]

    def awkward(array):
        raw = np.zeros(array.nbytes * 2 + 1, np.uint8)[1:]  # odd address
        wide = raw.view(array.dtype).reshape(array.shape[0], -1)
        wide[:, ::2] = array
        wide.flags.writeable = False
        return wide[:, ::2]

    strange = IntWeight(awkward(weight.codes), awkward(weight.scale), awkward(weight.zero_point), 4, 32, 96)
    assert not strange.scale.flags.aligned and not strange.codes.flags.c_contiguous
    integers = x_kind != "float32"
    assert np.array_equal(int_matmul(x, strange, integers), int_matmul(x.copy(), weight, integers))


def test_blocking_declines_groups_that_do_not_fall_on_lanes():
    W = np.ones((1, 96), np.float32)
    assert blocking(packed(SymmetricGrid(3, -1), W)) is None
    assert blocking(packed(SymmetricGrid(4, 12), W)) is None
    assert blocking(packed(SymmetricGrid(4, 48), W)) is None
    assert blocking(packed(SymmetricGrid(4, 8), W)) == (1, 1, 16)
    assert blocking(packed(SymmetricGrid(4, 32), W)) == (1, 1, 4)
    assert blocking(packed(SymmetricGrid(8, -1), W)) == (1, 2, 0)
