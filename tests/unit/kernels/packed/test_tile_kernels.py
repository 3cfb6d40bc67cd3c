"""Tile products against the NumPy text: rounded activations bit for bit, floats within the bound of their roundings.

A product must not depend on how many tokens come together, so where many are checked against few, bit by bit, the bound
need hold for the few only. Weights are drawn by their numbers (test_tiling.py): no grid would fit most of them.
"""

import re

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types

from refllm.formats import blocks
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import dots, fast, level_kernels, reference, threads, tile_kernels
from refllm.kernels.packed.activations import quantize_activations, quantize_shifted
from refllm.kernels.packed.fast import tile_matmul
from refllm.kernels.packed.inputs import StaticInputs
from refllm.kernels.packed.laid_out import (
    BLOCKS,
    FLOAT,
    KINDS,
    SUPERS,
    TOKEN,
    TOKENS,
    laid_kind,
    lay_out_address,
    rounded_kind,
)  # fmt: skip
from refllm.kernels.packed.records import GGUFBlocks, IntWeight
from refllm.kernels.packed.tiled import form_of, tiles_of
from refllm.kernels.packed.tiling import Form
from tests.strategies import ACTIVATION_ROWS, KERNEL, activation_row, gamma
from tests.targets import AVX, AVX2, GENERIC, run_for
from tests.unit.kernels.packed.test_tiling import GGUF, gguf_blocks, int_weight

BLOCKS_OF, HALVES_OF = [32, 64, 128, -1, 0], [16]  # groups of whole blocks, and two of them in a block
# Every width, symmetric and affine, each with another type of scale and groups; at 4 bits also the other way round.
GRIDS = {
    f"{grid.__name__[0]}{bits} {dtype}": (grid, bits, dtype, groups)
    for bits in range(2, 9)
    for grid in (SymmetricGrid, AffineGrid)
    for i, (dtype, groups) in enumerate((("float16", BLOCKS_OF), ("float32", HALVES_OF)))
    if i == (bits + (grid is AffineGrid)) % 2 or bits == 4
}
FORMS = [*GGUF, *GRIDS]
# Forms whose kernels for many tokens are compiled, too: four widths, each kind of scale and of what is subtracted.
PANELS = {"Q4_1", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "S4 float16", "A4 float32", "A3 float16", "S8 float16"}


def weights(form, rows, count, seed, largest):
    """A weight of a form; `largest`: most codes are the largest."""
    if form in GGUF:
        return gguf_blocks(form, rows, 1 + count % 3, seed)
    grid, bits, dtype, groups = GRIDS[form]
    group = groups[seed % len(groups)]
    columns = 32 * count if group == 16 else group * (1 + count % 3) if group > 0 else 1 + (37 * count + seed) % 150
    return int_weight(grid(bits, group, dtype), rows, columns, seed, largest)


def magnitudes(weight):
    """|scale| |code - zero| + |minimum| of every weight, float64: what the roundings of a product are relative to."""
    if isinstance(weight, GGUFBlocks) and weight.type_name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"):
        form = weight.layout
        fields = form.layout.unpack(weight.data.reshape(len(weight.data), -1, form.bytes_per_block))
        fields = {name: np.abs(v) if v.dtype.kind == "f" else v for name, v in fields.items()}
        if "dmin" in fields:  # which is subtracted
            fields["dmin"] = -fields["dmin"]
        weight = GGUFBlocks(form.layout.pack(**fields).reshape(len(weight.data), -1), weight.type_name, weight.columns)
    return np.abs(weight.dense()).astype(np.float64)


def tolerance(x, weight):
    """How far a kernel may be from the product of x with the decoded weight in float64.

    On the way of one number into the result lie at most: 16 sums within a half of a block's columns and the one of both
    halves (float activations) or the product with the activations' step (int8); the product of a scale with its top
    one; the sum into the total, with all later ones of the row: one a part of a block, another for its minimum. Of a
    minimum: the sum of 32 activations (5 levels), times the step, times the top scale. Two more are those of the
    decoded weight. (Levels with int8 need far fewer.)

    What underflows is wrong by half of 2^-149 at most, before it meets the scale or minimum.
    """
    form, blocks_ = tiles_of(weight).form, -(-weight.columns // 32)
    later = blocks_ * form.parts * (1 if form.low in ("constant", "zero") else 2)
    roundings = 17 + 1 + 2 + later
    large = magnitudes(weight)
    # A scale is one of the magnitudes it makes, or less, unless all codes are the zero point: then it multiplies 0.
    largest = 1 + large.max(axis=1)
    absolute = (roundings + weight.columns) * 2.0**-149 * largest
    return gamma(roundings) * (np.abs(x).astype(np.float64) @ large.T) + absolute


def rounded(x, kind, bits=8):
    """Activations as a product of this kind sees them, float64."""
    if kind == FLOAT:
        return x.astype(np.float64)
    if kind == SUPERS:
        codes, scale, shift = quantize_shifted(x, bits)
        scale = np.ldexp(np.repeat(scale.astype(np.float64), 8, axis=1), shift)
    else:
        codes, scale = quantize_activations(x, 32 if kind == BLOCKS else 0, bits)
    wide = np.repeat(scale.astype(np.float64), x.shape[1] // scale.shape[1], axis=1)
    return codes * wide


def kind_of(weight):
    """How the activations beside a weight are rounded."""
    return rounded_kind(reference.activation_block(weight), 8)


def kinds_of(weight):
    """All that meet it."""
    return FLOAT, kind_of(weight)


def drawn_activations(columns, kinds, seed):
    return np.stack([activation_row(kind, columns, seed + i) for i, kind in enumerate(kinds)])


@pytest.mark.parametrize("form", FORMS)
@KERNEL
@given(
    rows=st.integers(1, 35),
    count=st.integers(1, 4),
    kinds=st.lists(st.sampled_from(ACTIVATION_ROWS), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    largest=st.booleans(),
)
def test_product(form, rows, count, kinds, seed, largest):
    weight = weights(form, rows, count, seed, largest)
    x, tiles = drawn_activations(weight.columns, kinds, seed), tiles_of(weight)
    for kind in (FLOAT, kind_of(weight)):
        seen = rounded(x, kind)
        exact = reference.matmul_float(seen, weight)
        y = tile_matmul(x, tiles, kind)
        assert y.dtype == np.float32 and y.shape == exact.shape
        assert (np.abs(y - exact) <= tolerance(seen, weight)).all(), (np.abs(y - exact) / tolerance(seen, weight)).max()
        if kind != FLOAT:
            assert np.array_equal(y, reference.matmul_int8(x, weight))
        if form in PANELS:
            many = np.resize(x, (TOKENS + 1, weight.columns))
            assert np.array_equal(tile_matmul(many, tiles, kind)[: len(x)], y)


@pytest.mark.parametrize("form", ["S4 float16", "S8 float16", "A4 float32"])
@pytest.mark.parametrize("group", [-1, 64, 512, 544])
@settings(KERNEL, max_examples=15)
@given(
    rows=st.integers(1, 70),
    tokens=st.sampled_from([1, TOKENS, TOKENS + 1, 17 * TOKENS]),
    seed=st.integers(0, 2**16),
    largest=st.booleans(),
)
def test_runs_of_many_columns_bit_for_bit(form, group, rows, tokens, seed, largest):
    """Groups shorter and longer than RUN; tiles in twos and one left over; tokens of more panels than stay near."""
    grid, bits, _, _ = GRIDS[form]
    columns = 1111 if group == -1 else 2 * group
    weight = int_weight(grid(bits, group, "float32"), rows, columns, seed, largest)
    x = drawn_activations(columns, ["normal", "all largest"], seed)
    expected = reference.matmul_int8(x, weight)
    found = tile_matmul(np.resize(x, (tokens, columns)), tiles_of(weight), TOKEN)
    assert np.array_equal(found, np.resize(expected, found.shape), equal_nan=True)


def whole_weight(form, rows, columns, seed, largest):
    """A weight of whole numbers: every scale is 1 (of K-quants 1 or 2 times a level of 1 or 3), so is every minimum."""
    rng = np.random.default_rng(seed)
    if form not in GGUF:
        grid, bits, dtype, groups = GRIDS[form]
        weight = int_weight(grid(bits, groups[0], dtype), rows, columns, seed, largest)
        ones = np.ones_like(weight.scale)
        return IntWeight(weight.codes, ones, weight.zero_point, bits, groups[0], columns)
    layout = blocks.BLOCKS[form].layout
    shape = rows, columns // blocks.BLOCKS[form].block_size, blocks.BLOCKS[form].bytes_per_block
    data = rng.integers(0, 256, shape, dtype=np.uint8)
    fields = layout.unpack(np.where(largest, np.uint8(255), data))
    for name, values in fields.items():
        if name.startswith(("sc", "mn")):  # Q3_K's levels mean 32 less
            values[:] = rng.integers(0, 4, values.shape) + (32 if form == "Q3_K" else 0)
        elif values.dtype.kind == "f":
            values[:] = 1
    return GGUFBlocks(layout.pack(**fields).reshape(rows, -1), form, columns)


def check_whole_numbers(form, tokens=1, floats=True):
    """With such a weight and whole activations every float on the way is a whole number: the product is exact."""
    columns = 256 if form in GGUF or GRIDS[form][3] is HALVES_OF else 160
    for seed, largest in enumerate((False, True)):
        weight = whole_weight(form, 17, columns, seed, largest)
        W, tiles = weight.dense().astype(np.int64), tiles_of(weight)
        rng = np.random.default_rng(seed)
        for x in (rng.integers(-127, 128, columns), np.full(columns, 127), np.full(columns, -127)):
            x[::32] = 127  # so that every step is 1
            exact = x @ W.T
            assert np.abs(exact).max() < 2**24 and np.array_equal(exact, np.rint(weight.dense()).astype(np.int64) @ x)
            x = np.resize(x.astype(np.float32), (tokens, columns))
            for kind in kinds_of(weight)[not floats :]:
                assert (tile_matmul(x, tiles, kind) == exact).all(), (form, largest, kind)
            assert (reference.matmul_int8(x, weight) == exact).all()


@pytest.mark.parametrize("form", FORMS)
def test_integer_sums_bit_for_bit(form):
    check_whole_numbers(form)
    if form in PANELS:
        check_whole_numbers(form, TOKENS + 1)


def laid_out(x, kind, n):
    """What the kernel makes of activations: codes [token, column], scale [token, block], sums [token, block, 3]."""
    tokens, columns = x.shape
    panels, blocks_ = -(-tokens // n), columns // 32
    codes = np.full((panels, blocks_, n, 32), 99, np.float32 if kind == FLOAT else np.int8)
    scale = np.full((panels, blocks_, n), np.nan, np.float32)
    sums = np.full((panels, blocks_, 3, n), np.nan, np.float32)
    if kind & 3 == SUPERS:
        sums = np.full((panels, blocks_ // 8, 32, n), 9, np.int32)
    places = codes.ctypes.data, scale.ctypes.data, sums.ctypes.data
    fast._function(lay_out_address(n))(x.ctypes.data, tokens, columns, kind, *places, 0, panels)
    back = codes.transpose(0, 2, 1, 3).reshape(-1, columns), scale.transpose(0, 2, 1).reshape(-1, blocks_)
    return *back, sums.transpose(0, 3, 1, 2).reshape(-1, *sums.shape[1:3])


TINY = st.lists(st.integers(-300, 300).map(lambda n: np.float32(n * 2.0**-149)), min_size=32, max_size=32)


def check_activations(x, n):
    """Codes, scales and sums of each kind equal the NumPy text's."""
    tokens = len(x)
    for kind in (FLOAT, BLOCKS, TOKEN):
        codes, scale, sums = laid_out(x, kind, n)
        assert not codes[tokens:].any() and not sums[tokens:].any()
        expected, steps = (x, np.ones((tokens, 1))) if kind == FLOAT else quantize_activations(x, 32 * (kind == BLOCKS))
        assert np.array_equal(codes[:tokens], expected)
        assert np.array_equal(scale[:tokens], np.broadcast_to(steps, scale[:tokens].shape))
        halves = expected.reshape(tokens, -1, 2, 16).astype(np.float64)
        exact = np.stack([halves.sum((2, 3)), halves[:, :, 0].sum(-1), halves[:, :, 1].sum(-1)], axis=-1)
        if kind == FLOAT:
            size = np.abs(halves)
            bound = np.stack([size.sum((2, 3)), size[:, :, 0].sum(-1), size[:, :, 1].sum(-1)], axis=-1)
            assert (np.abs(sums[:tokens] - exact) <= gamma(5) * bound).all()
        else:
            assert np.array_equal(sums[:tokens], exact)


def check_super_blocks(x, n):
    """The same with a scale for eight blocks: codes, scales, shifts, and sums for a zero and for minimum levels."""
    tokens, supers = len(x), x.shape[1] // 256
    for offset in (0, 32):
        codes, scale, words = laid_out(x, SUPERS | offset << KINDS, n)
        assert not codes[tokens:].any() and not scale[tokens:].any()
        assert not words[tokens:, :, : 24 if offset else 12].any()
        expected, steps, shift = quantize_shifted(x)
        assert np.array_equal(codes[:tokens], expected) and np.array_equal(scale[:tokens], np.repeat(steps, 8, axis=1))
        assert np.array_equal(words[:tokens, :, 24:], shift.reshape(tokens, supers, 8))
        halves = expected.reshape(tokens, supers, 8, 2, 16).sum(-1, dtype=int)
        if offset:
            begins = words[:tokens, :, :24].reshape(tokens, supers, 8, 3)
            assert np.array_equal(begins, -offset * np.concatenate([halves.sum(-1)[..., None], halves], axis=-1))
        else:
            halves <<= shift.reshape(tokens, supers, 8, 1)
            parts = np.ascontiguousarray(words[:tokens, :, :12]).view(np.int8).astype(int)
            assert np.array_equal(256 * parts[..., :8] + parts[..., 8:16], halves.sum(-1))
            assert np.array_equal(256 * parts[..., 16:32] + parts[..., 32:], halves.reshape(tokens, supers, 16))
            first, second = shift.reshape(tokens, supers, 4, 2).transpose(3, 0, 1, 2)
            assert np.array_equal(words[:tokens, :, 12:16], first << 16 | second)
            blocks_ = np.resize(expected.astype(int), (tokens, supers, 8, 32))
            reach = np.maximum(np.maximum(blocks_, 0).sum(-1), np.maximum(-blocks_, 0).sum(-1)).max(-1)
            assert np.array_equal(words[::n, :, 16], [reach[i : i + n].max(0) for i in range(0, tokens, n)])


@pytest.mark.parametrize("n", [1, TOKENS])
@KERNEL
@given(
    supers=st.integers(1, 3),
    kinds=st.lists(st.sampled_from(ACTIVATION_ROWS), min_size=1, max_size=15),
    seed=st.integers(0, 2**16),
    most=st.booleans(),
)
def test_activations_of_super_blocks_bit_for_bit(n, supers, kinds, seed, most):
    x = drawn_activations(256 * supers, kinds, seed)
    if most:  # sums as large as they get, and blocks that are quieter than others
        rng = np.random.default_rng(seed)
        x[:] = rng.choice([-1, 1], (len(x), 1)) * np.repeat(rng.choice([1, 0.5, 0.26, 0.1], 8 * supers), 32)
    check_super_blocks(x, n)


def codes_of_reach(rng, most, sign, others):
    """32 codes whose sum of one sign is `most`, and of the other -`others` at least."""
    codes = np.zeros(32, int)
    count = -(-most // 127)
    codes[:count] = 127
    codes[count - 1] -= 127 * count - most
    rest = min(others, 127 * (32 - count))
    codes[count:] = -rng.multinomial(rest, np.ones(32 - count) / (32 - count)).clip(0, 127)
    return sign * rng.permutation(codes)


@pytest.mark.parametrize("form, most", [("Q4_K", 2184), ("Q5_K", 1057)])
@KERNEL
@given(
    rows=st.integers(1, 35),
    beyond=st.lists(st.integers(-2, 2), min_size=2, max_size=2),
    sign=st.sampled_from([1, -1]),
    others=st.sampled_from([0, 1000, 3000]),
    byte=st.sampled_from([None, 0, 255]),
    seed=st.integers(0, 2**16),
)
def test_two_blocks_that_share_their_lanes(form, most, rows, beyond, sign, others, byte, seed):
    """Codes times activations whose sums just fit 16 bits, or just not, beside others: the text's results anyway."""
    rng = np.random.default_rng(seed)
    weight = gguf_blocks(form, rows, 2, seed)
    if byte is not None:  # all codes and levels the least, or the most
        fields = weight.layout.layout.unpack(weight.data.reshape(rows, 2, -1))
        for values in fields.values():
            if values.dtype.kind != "f":
                values[:] = values.max() if byte else 0
        weight = GGUFBlocks(weight.layout.layout.pack(**fields).reshape(rows, -1), form, 512)
    x = rng.integers(-60, 61, (TOKENS + 1, 2, 8, 32))
    for super_, more in enumerate(beyond):
        token, block = rng.integers(TOKENS), rng.integers(8)
        x[:, super_, (block + 3) % 8, 0] = rng.choice([-1016, 1016], TOKENS + 1)  # so that every step is 1
        x[token, super_, block] = codes_of_reach(rng, most + more, sign, others)
    x = x.reshape(TOKENS + 1, 512).astype(np.float32)
    y = tile_matmul(x, tiles_of(weight), SUPERS)
    assert np.array_equal(y, reference.matmul_int8(x, weight))
    assert np.array_equal(y, np.concatenate([tile_matmul(row[None], tiles_of(weight), SUPERS) for row in x]))


def check_the_ends_of_integers(form, tokens):
    """Codes, levels and minima with all bits the same, activations +-127: the largest sums, still the text's."""
    layout = blocks.BLOCKS[form].layout
    for byte in (0, 255):
        fields = layout.unpack(np.full((17, 2, layout.nbytes), byte, np.uint8))
        for sc in (None, -128):  # the largest level of Q6_K
            if sc is not None and form == "Q6_K":
                fields["sc"][:] = sc
            for d in (65504, -1, 0):
                for name in ("d", "dmin"):
                    if name in fields:
                        fields[name][:] = d
                weight = GGUFBlocks(layout.pack(**fields).reshape(17, -1), form, 512)
                for sign in (1, -1):
                    x = np.resize(np.float32(sign * 127), (tokens, 512))
                    y = tile_matmul(x, tiles_of(weight), SUPERS)
                    assert np.isfinite(y).all() and np.array_equal(y, reference.matmul_int8(x, weight))
                    exact = x.astype(np.float64) @ weight.dense().astype(np.float64).T
                    assert np.allclose(y, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_the_ends_of_integers(form):
    check_the_ends_of_integers(form, 1)
    if form in PANELS:
        check_the_ends_of_integers(form, TOKENS + 1)


@pytest.mark.parametrize("n", [1, TOKENS])
@KERNEL
@given(
    count=st.integers(1, 9),
    kinds=st.lists(st.sampled_from(ACTIVATION_ROWS), min_size=1, max_size=15),
    seed=st.integers(0, 2**16),
)
def test_activations_bit_for_bit(n, count, kinds, seed):
    check_activations(drawn_activations(32 * count, kinds, seed), n)


@pytest.mark.parametrize("n", [1, TOKENS])
@KERNEL
@given(
    kinds=st.lists(st.sampled_from(ACTIVATION_ROWS), min_size=1, max_size=7),
    scale=st.floats(np.float32(2.0**-149), float(np.finfo(np.float32).max), width=32) | st.sampled_from([0.01, 0.125]),
    bits=st.sampled_from([8, 4]),
    bad=st.sampled_from([0, np.nan, np.inf, -np.inf, 3e38, -3e38]),
    seed=st.integers(0, 2**16),
)
def test_activations_with_a_given_scale_bit_for_bit(n, kinds, scale, bits, bad, seed):
    """Those of StaticInputs: what is far beyond the scale saturates, and NaN or Inf poisons its token."""
    x = drawn_activations(96, kinds, seed)
    x[-1, 40] = bad
    given = StaticInputs(weights("S4 float16", 1, 3, 0, False), np.full((1, 1), scale, np.float32), None, bits)
    expected, steps, _ = given.steps(x)
    kind = laid_kind(Form(8, "half", offset=0), rounded_kind(0, bits), scale)
    codes, found, sums = laid_out(x, kind, n)
    assert np.array_equal(codes[: len(x)], expected) and not codes[len(x) :].any()
    finite = np.isfinite(steps)
    assert np.array_equal(np.isfinite(found[: len(x)]), np.broadcast_to(finite, found[: len(x)].shape))
    assert (found[: len(x)][finite[:, 0]] == np.float32(scale)).all()
    assert np.array_equal(sums[: len(x), :, 0], expected.reshape(len(x), -1, 32).sum(-1))


@KERNEL
@given(TINY)
def test_the_smallest_activations_bit_for_bit(row):
    """Where amax / 127 is a few times the smallest number there is, its rounding makes quotients far beyond 127."""
    x = np.array(row, np.float32)[None]
    check_activations(x, 1)
    check_super_blocks(np.concatenate([x * np.float32(2**k) for k in (0, 1, 2, 3, 4, 5, 6, 7)], axis=1), 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [FLOAT, BLOCKS, TOKEN, SUPERS])
@pytest.mark.parametrize("tokens", [3, 13])
def test_not_a_number_poisons_its_token_only(bad, kind, tokens):
    for form in ("Q2_K", "Q6_K", "Q4_1", "S4 float16", "A4 float32"):
        weight = whole_weight(form, 18, 256, 0, False)
        if kind not in kinds_of(weight):
            continue
        x = drawn_activations(256, ["normal"] * tokens, 0)
        good = tile_matmul(x, tiles_of(weight), kind)
        x[1, 77] = bad
        y = tile_matmul(x, tiles_of(weight), kind)
        assert not np.isfinite(y[1]).any()
        assert np.array_equal(np.delete(y, 1, axis=0), np.delete(good, 1, axis=0))


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *[(form, kind) for form in ("S4 float16", "A4 float32") for kind in (FLOAT, TOKEN)],
        *[("Q4_1", BLOCKS), ("Q2_K", FLOAT), ("Q2_K", SUPERS)],
    ],
)
def test_any_number_of_tokens_and_threads_gives_the_same_bits(form, kind, monkeypatch):
    monkeypatch.setattr(threads, "MINIMUM_WORK", 1)
    weight = weights(form, 50, 2, 0, False)
    tiles = tiles_of(weight)
    x = drawn_activations(weight.columns, ["normal", "wide", "ties"] * 14, 1)
    alone = np.concatenate([tile_matmul(x[i : i + 1], tiles, kind) for i in range(len(x))])
    for slab in (fast.SLAB, 12, 24):
        monkeypatch.setattr(fast, "SLAB", slab)
        for count in (1, 2, 3, 8):
            monkeypatch.setenv("REFLLM_THREADS", str(count))
            for tokens in (1, 3, 4, 12, 13, 25, 42):
                assert np.array_equal(tile_matmul(x[:tokens], tiles, kind), alone[:tokens]), (slab, count, tokens)


@pytest.mark.parametrize(
    ("form", "columns"), [("Q8_0", 96), ("Q4_1", 96), ("Q2_K", 256), *[("Q4_K", 256 * n) for n in (1, 16, 32)]]
)
def test_more_panels_than_meet_a_tile_at_once(form, columns, monkeypatch):
    """Each panel as if it were alone. Of the rows of Q4_K 16 panels are near, or fewer, or too few for it to matter."""
    weight = gguf_blocks(form, 17, columns // blocks.BLOCKS[form].block_size, 5)
    assert weight.columns == columns
    x = np.random.default_rng(0).standard_normal((17 * TOKENS + 1, columns), np.float32)
    y = tile_matmul(x, tiles_of(weight), kind_of(weight))
    monkeypatch.setattr(fast, "SLAB", TOKENS)
    np.testing.assert_array_equal(y, tile_matmul(x, tiles_of(weight), kind_of(weight)))


def test_how_many_panels_meet_a_super_block():
    of = lambda panels, columns: level_kernels._panels_together(panels, 12 * columns)
    most = level_kernels.PANELS
    assert [of(n, 256) for n in (1, most, most + 1, 2 * most + 1)] == [1, most, most // 2 + 1, (2 * most + 3) // 3]
    assert of(2 * most, 12 * level_kernels.NEAR) == most  # however few fit
    columns = 2 * level_kernels.NEAR // most // 12 // 256 * 256  # of which at least half of the most are near
    assert most // 2 <= of(10 * most, columns) <= level_kernels.NEAR // (12 * columns) < most


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33])
def test_a_row_is_the_same_alone(rows):
    weight = weights("A4 float32", rows, 3, 3, False)
    x = drawn_activations(weight.columns, ["normal", "ties"], 5)
    y = tile_matmul(x, tiles_of(weight), TOKEN)
    for i in range(rows):
        one = IntWeight(
            weight.codes[i : i + 1], weight.scale[i : i + 1], weight.zero_point[i : i + 1], 4, 16, weight.columns
        )
        assert np.array_equal(tile_matmul(x, tiles_of(one), TOKEN), y[:, i : i + 1])


def awkward(array):
    """The same numbers at odd addresses, every second one of a row, read-only."""
    raw = np.zeros(array.nbytes * 2 + 1, np.uint8)[1:]
    wide = raw.view(array.dtype).reshape(array.shape[0], -1)
    wide[:, ::2] = array
    wide.flags.writeable = False
    return wide[:, ::2]


@pytest.mark.parametrize("kind", [FLOAT, BLOCKS, TOKEN])
def test_strided_misaligned_and_read_only_arrays(kind):
    weight = weights("A4 float32", 5, 3, 0, False)
    strange = IntWeight(*map(awkward, (weight.codes, weight.scale, weight.zero_point)), 4, 16, weight.columns)
    assert not strange.scale.flags.aligned and not strange.codes.flags.c_contiguous
    x = drawn_activations(weight.columns, ["normal"] * 13, 0)
    for tokens in (1, 13):
        y = tile_matmul(x[:tokens], tiles_of(weight), kind)
        assert np.array_equal(tile_matmul(awkward(x[:tokens]), tiles_of(strange), kind), y)
        assert np.array_equal(tile_matmul(np.asfortranarray(x[:tokens]), tiles_of(strange), kind), y)
    gguf = gguf_blocks("Q2_K", 5, 1, 0)
    x = drawn_activations(256, ["normal"], 0)
    strange = GGUFBlocks(awkward(gguf.data), "Q2_K", 256)
    kind = SUPERS if kind else FLOAT
    assert np.array_equal(tile_matmul(x, tiles_of(strange), kind), tile_matmul(x, tiles_of(gguf), kind))


def test_no_tokens_give_no_rows():
    assert tile_matmul(np.zeros((0, 256), np.float32), tiles_of(gguf_blocks("Q2_K", 5, 1, 0)), FLOAT).shape == (0, 5)


OTHER_TARGETS = """
from refllm.kernels.packed import dots
from tests.unit.kernels.packed.test_tile_kernels import *
assert [dots.dot_form(bits) for bits in (4, 8)] == FORMS_OF_THE_DOT
for form in ("S2 float16", "A3 float16", "S4 float16", "Q2_K", "Q4_K", "Q6_K", "A7 float16", "S8 float16"):
    check_whole_numbers(form, 1, floats=False)
check_whole_numbers("S4 float16")
if dots.adds_pairs():
    check_pairs_of_columns()
    for form in ("A5 float16", "S6 float16", "Q5_K"):
        check_whole_numbers(form, 1, floats=False)
    for form in ("S4 float16", "S8 float16", "Q4_K", "Q6_K"):
        check_whole_numbers(form, TOKENS + 1, floats=False)
for form in ("Q2_K", "Q4_K", "Q6_K"):
    check_the_ends_of_integers(form, 1)
check_activations(drawn_activations(96, ACTIVATION_ROWS, 0), 1)
check_super_blocks(drawn_activations(512, ACTIVATION_ROWS, 0), 1)
"""


@pytest.mark.parametrize(
    "features, dots",
    [
        pytest.param(AVX2, [dots.X86_BYTE_PAIRS, dots.PORTABLE], id="avx2"),
        pytest.param(AVX, [dots.PORTABLE] * 2, id="portable with avx"),
        pytest.param(GENERIC, [dots.PORTABLE] * 2, id="generic"),
    ],
)
def test_the_other_forms_of_the_dot_product(features, dots):
    run_for(features, f"FORMS_OF_THE_DOT = {dots}\n{OTHER_TARGETS}")


def assembly(form, n):
    """Of an integer product."""
    kind = SUPERS if form.scale == "levels" else BLOCKS
    product = numba.cfunc(types.void(*[types.intp] * 9), error_model="numpy")
    return product(tile_kernels.product_text(form, kind, n))._library.get_asm_str()


def check_pairs_of_columns():
    """All byte products of a block of 4-bit codes are added in 16 bits, those of 8-bit codes as of two of 4."""
    for bits, times in ((4, 1), (8, 2)):
        for n in (1, TOKENS):
            text = assembly(Form(bits, "half", offset=1 << bits - 1), n)
            found = [len(re.findall(rf"\t{word}\t", text)) for word in ("vpmaddubsw", "vpaddw", "vpmaddwd")]
            assert found == [16 * n * times, 14 * n * times, 2 * n * times], (bits, n, found)


SPILL = r"vmov\w+\s+%zmm\d+, -?\w*\(%r[sb]p\)"  # a vector that leaves the registers
vnni = pytest.mark.skipif(dots.dot_form(4) != dots.X86_BYTE_DOT, reason="Numba's target has no AVX512-VNNI")


@vnni
@pytest.mark.parametrize("bits, n", [(4, 1), (4, TOKENS), (8, TOKENS)])
def test_a_byte_product_is_one_instruction(bits, n):
    """vpdpbusd reads its four activations from memory and repeats them itself; every sum stays in a register."""
    text = assembly(Form(bits, "half", offset=1 << bits - 1), n)
    found = re.findall(r"vpdpbusd.*", text)
    assert len(found) == 8 * n and all("{1to16}" in dot for dot in found)
    assert not re.findall(SPILL, text)


@vnni
@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_the_sums_of_a_super_block_stay_in_registers(name):
    """Between the products of many tokens few vectors leave; all byte products read memory and repeat it."""
    text = assembly(form_of(gguf_blocks(name, 1, 1, 0)), TOKENS)
    found = re.findall(r"vpdpbusd.*", text)
    # Of two blocks together, of one alone where sums are too large for that, and of the minima.
    assert len(found) == (2 * 8 + 8 + 4) * TOKENS and all("{1to16}" in dot for dot in found)
    assert len(re.findall("vpdpwssd", text)) == TOKENS
    assert len(re.findall(SPILL, text[text.index(found[0]) :])) <= TOKENS
