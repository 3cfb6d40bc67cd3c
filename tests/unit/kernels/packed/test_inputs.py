"""Rounded inputs: what each record makes of x, by slow twins; and that products are those of whole numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import fast, matmul, reference, rounded
from refllm.kernels.packed.activations import Rounding, quantize_affine
from refllm.kernels.packed.inputs import FORMS, OutlierInputs, PairInputs, StaticInputs, TokenInputs, vector_wise
from refllm.kernels.packed.records import GGUFBlocks, IntWeight, LowRank, Reordered, Sparse24, Sum
from tests.strategies import PROPERTY, mixed_weights

RNG = np.random.default_rng(7)
PAIRS = Sparse24.compress(np.tile(np.float32([1, 0, 1, 0]), (6, 16))).indices
ROUNDINGS = (Rounding(), Rounding(6, 0.9), Rounding(8, 1.0, False), Rounding(4, 0.8, False), Rounding(2))


GRID = SymmetricGrid(8, -1, "float32")


def int_weight(W, grid=GRID):
    scale, zero_point = grid.fit(W)
    return IntWeight.pack(grid, grid.encode(W, scale, zero_point), scale, zero_point)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def scale_of(value):
    return np.full((1, 1), value, np.float32)


def one_of_each(weight):
    kept = normal(weight.shape[0], 2).astype(np.float16)
    yield from (TokenInputs(weight, form) for form in ("int8", "int4", "int5", "uint8", "uint4", "e4m3", "spark"))
    yield StaticInputs(weight, scale_of(0.02), None, 8)
    yield StaticInputs(weight, scale_of(0.3), np.full((1, 1), 9, np.uint8), 4)
    yield PairInputs(weight, scale_of(0.05))
    yield from (OutlierInputs(weight, None, None, t) for t in (0.0, 1.5, 1e9, 1e-30))
    yield OutlierInputs(weight, np.int32([0, 7]), kept, 2.0)


WEIGHTS = {
    "int": int_weight(normal(18, 64)),
    "int in groups": int_weight(normal(5, 64), AffineGrid(4, 16)),
    "int of odd width": int_weight(normal(7, 33), AffineGrid(3, -1)),
    "reordered": Reordered(int_weight(normal(5, 64)), np.arange(64, dtype=np.int32)[::-1].copy()),
    "2:4 of int": Sparse24(
        int_weight(normal(6, 32)), Sparse24.compress(np.tile(np.float32([1, 0, 1, 0]), (6, 16))).indices, 64
    ),
    "factors": LowRank(normal(6, 3), normal(3, 64)),
    "sum": Sum(int_weight(normal(6, 64)), LowRank(normal(6, 3).astype(np.float16), normal(3, 64))),
}


@pytest.mark.parametrize("text", ["numba", "numpy"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_are_those_of_the_rounded_inputs(name, text, monkeypatch):
    """Float sums of the same terms: apart by the rounding of so many additions, 2^-24 of the sum of magnitudes each."""
    monkeypatch.setenv("REFLLM_KERNELS", text)
    weight = WEIGHTS[name]
    x = normal(9, weight.shape[1], seed=5) * np.exp(normal(9, weight.shape[1], seed=6))
    records = list(one_of_each(weight)) if name != "factors" else list(one_of_each(weight))[2:10]
    for record in records:
        for some in (x, x[:1], x[4:6]):
            seen, dense = record.rounded(some).astype(np.float64), record.dense().astype(np.float64)
            bound = 40 * weight.shape[1] * 2.0**-24 * (np.abs(seen) + np.abs(some)).max() * np.abs(dense).sum(axis=1)
            y = matmul(some, record)
            assert y.dtype == np.float32
            assert (np.abs(y - seen @ dense.T) <= bound.max()).all(), (record.kind, len(some))
        assert np.array_equal(matmul(x.reshape(3, 3, -1), record).reshape(9, -1), matmul(x, record))
        assert matmul(x.astype(np.float64), record).dtype == np.float64
        assert matmul(x[:0], record).shape == (0, weight.shape[0])


@pytest.mark.parametrize("name", ["int", "int in groups", "int of odd width"])
def test_kernels_and_text_add_up_the_same_whole_numbers(name):
    """Against int64; groups are added in float32, so that the last bits may differ."""
    weight = WEIGHTS[name]
    codes = weight.unpacked().astype(np.int64)
    scale, zero = weight.scales()
    spread = lambda a: np.repeat(a, weight.columns // a.shape[1], axis=1)
    for tokens in (1, 3, 4, 30):
        for low in (-127, -128):
            q = RNG.integers(low, 128, (tokens, weight.columns)).astype(np.int8)
            q[0] = 127 if low == -127 else -128
            terms = q[:, None].astype(np.int64) * (codes - spread(zero))
            exact = (terms * spread(scale).astype(np.float64)).sum(axis=2)
            size = (np.abs(terms) * spread(scale).astype(np.float64)).sum(axis=2)
            for text in (fast, reference):
                assert (np.abs(text.codes_times(q, weight) - exact) <= 80 * 2.0**-24 * size).all()
    if scale.shape[1] == 1:  # one group: nothing is rounded before the scale
        whole = reference.codes_times(q, replace(weight, scale=np.ones_like(weight.scale)))
        assert np.array_equal(whole, (q.astype(np.int64) @ (codes - zero).T).astype(np.float32))


def test_codes_that_are_not_on_a_grid_are_decoded():
    weight = GGUFBlocks(np.zeros((3, 34), np.uint8), "Q8_0", 32)
    assert np.array_equal(rounded.times(np.ones((2, 32), np.int8), weight, reference), np.zeros((2, 3)))
    assert np.array_equal(matmul(normal(2, 32), weight, Rounding(6)), np.zeros((2, 3)))


def slow_token(row, bits, ratio, symmetric):
    """x^ of one token, number by number, in float32 as the definition says."""
    f = np.float32
    with np.errstate(all="ignore"):
        if symmetric:
            most = (1 << (bits - 1)) - 1
            scale = f(max(abs(x) for x in row)) / f(most)
            scale = scale * f(ratio) if ratio != 1 else scale
            return [0.0 if not scale else float(f(np.clip(np.rint(x / scale), -most, most)) * scale) for x in row]
        lo, hi = f(min(*row, 0)) * f(ratio), f(max(*row, 0)) * f(ratio)
        top = (1 << bits) - 1
        scale = hi / f(top) - lo / f(top)
        if not scale:
            return [0.0] * len(row)
        zero = np.rint(-lo / scale)
        return [float((f(np.clip(np.rint(x / scale) + zero, 0, top)) - zero) * scale) for x in row]


@PROPERTY
@given(mixed_weights(columns=st.integers(2, 20)), st.sampled_from(ROUNDINGS))
def test_dynamic_rounding_equals_the_loops(x, how):
    codes, scale, zero = how.steps(x)
    assert codes.dtype == np.int8 and scale.shape == (len(x), 1) == (scale if zero is None else zero).shape
    seen = (codes - (np.float32(0) if zero is None else zero)) * scale
    for row, ours in zip(x, seen, strict=True):
        np.testing.assert_array_equal(ours, np.float32(slow_token(row, how.bits, how.clip_ratio, how.symmetric)))


@PROPERTY
@given(mixed_weights(columns=st.integers(2, 20)), st.sampled_from(ROUNDINGS))
def test_rounding_is_off_by_half_a_step_where_nothing_is_clipped(x, how):
    full = replace(how, clip_ratio=1.0)
    codes, scale, zero = full.steps(x)
    seen = (codes - (np.float32(0) if zero is None else zero)) * scale
    # An affine zero point is rounded: an extreme may lie half a step beyond the last code.
    assert (np.abs(seen - x) <= (0.501 if full.symmetric else 1.002) * scale + 1e-38).all()


def test_tokens_do_not_see_each_other():
    weight = WEIGHTS["int"]
    x = normal(6, 64)
    for activations in ("int8", *ROUNDINGS):
        loud = x.copy()
        loud[3] *= 1000
        same = [i for i in range(6) if i != 3]
        assert np.array_equal(matmul(loud, weight, activations)[same], matmul(x, weight, activations)[same])
    for form in ("int8", "e4m3"):
        record = TokenInputs(weight, form)
        assert np.array_equal(matmul(loud, record)[same], matmul(x, record)[same])


def test_e4m3_rounds_to_its_own_numbers():
    weight = int_weight(np.eye(4, dtype=np.float32))
    seen = TokenInputs(weight, "e4m3").rounded(np.float32([[448, 17, 0.3, -0.0], [0, 0, 0, 0], [-1, 1 / 448, 0, 0.5]]))
    assert seen.tolist()[:2] == [[448, 16, 0.3125, 0], [0, 0, 0, 0]]  # 17 ties to 16
    np.testing.assert_allclose(seen[2], [-1, 1 / 448, 0, 0.5], rtol=1e-6)
    x = normal(50, 64)
    relative = np.abs(TokenInputs(WEIGHTS["int"], "e4m3").rounded(x) - x)[np.abs(x) > 0.1]
    assert relative.max() <= 2.0**-4 * np.abs(x).max()


def test_static_codes_saturate_at_the_ends():
    weight = int_weight(np.eye(3, dtype=np.float32))
    record = StaticInputs(weight, scale_of(0.5), None, 8)
    x = np.float32([[63.5, 63.74, 1e9], [-63.5, -64, -1e30], [0.25, 0.75, -0.0]])
    assert record.steps(x)[0].tolist() == [[127] * 3, [-127, -127, -127], [0, 2, 0]]  # ties to even
    affine = StaticInputs(weight, scale_of(1), np.full((1, 1), 3, np.uint8), 4)
    assert affine.rounded(np.float32([[-9, -3, 0], [11.5, 12, 13]])).tolist() == [[-3, -3, 0], [12, 12, 12]]


def test_a_token_with_nan_gives_nan_and_the_others_do_not():
    x = normal(5, 64)
    for bad in (np.nan, np.inf, -np.inf):
        x[2, 11] = bad
        with np.errstate(invalid="ignore"):
            for name in ("int", "sum"):
                for record in one_of_each(WEIGHTS[name]):
                    y = matmul(x, record)
                    assert not np.isfinite(y[2]).any() and np.isfinite(y[[0, 1, 3, 4]]).all(), (bad, record.kind)
            for how in ROUNDINGS:
                y = matmul(x, WEIGHTS["int"], how)
                assert np.isnan(y[2]).all() and np.isfinite(y[[0, 1, 3, 4]]).all()


def slow_outliers(x, threshold):
    """Steps, scale and outlier columns by the published order: outliers out, then the largest of what is left."""
    columns = [k for k in range(len(x[0])) if any(abs(row[k]) >= threshold for row in x)] if threshold > 0 else []
    steps, amax = [], []
    for row in x:
        rest = [0.0 if threshold > 0 and abs(v) >= threshold else v for v in row]
        top = max(map(abs, rest))
        amax.append(top)
        factor = np.float32(127) * (np.float32(1) / np.float32(top)) if top else np.float32(0)
        steps.append([0 if k in columns else int(np.rint(np.float32(v) * factor)) for k, v in enumerate(rest)])
    return steps, amax, columns


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0, 2.0, 6.0, math.inf]))
def test_outliers_are_taken_out_before_the_maximum(seed, threshold):
    x = np.random.default_rng(seed).integers(-12, 13, (4, 9)).astype(np.float32) / 4
    record = OutlierInputs(int_weight(normal(3, 9)), None, None, threshold)
    steps, scale, zero = record.steps(x)
    expected, amax, columns = slow_outliers(x.tolist(), threshold)
    assert steps.tolist() == expected and zero is None
    assert np.array_equal(scale[:, 0], np.float32(amax) / np.float32(127))
    assert np.flatnonzero(record.outliers(x)).tolist() == columns


def test_the_threshold_itself_is_an_outlier_and_moves_its_column():
    record = OutlierInputs(int_weight(normal(3, 2)), None, None, 6.0)
    x = np.float32([[6, 1], [0.5, 2]])
    assert record.outliers(x).tolist() == [True, False]
    assert record.steps(x)[0].tolist() == [[0, 127], [0, 127]] and record.rounded(x)[1, 0] == 0.5
    assert not record.outliers(np.nextafter(x, np.float32(0))).any()


def test_without_outliers_it_is_vector_wise_and_with_nothing_else_exact():
    weight, x = WEIGHTS["int"], normal(8, 64)
    codes, amax = vector_wise(x)
    y = reference.codes_times(codes, weight) * (amax / np.float32(127))
    for threshold in (0.0, math.inf, 100.0):
        np.testing.assert_allclose(matmul(x, OutlierInputs(weight, None, None, threshold)), y, rtol=1e-5, atol=1e-4)
    exact = matmul(x, OutlierInputs(weight, None, None, 1e-30))
    np.testing.assert_allclose(exact, matmul(x, weight), rtol=1e-5, atol=1e-5)


def test_kept_columns_have_weights_of_their_own():
    weight, kept = WEIGHTS["int"], normal(18, 2, seed=9).astype(np.float16)
    record = OutlierInputs(weight, np.int32([3, 60]), kept, 6.0)
    assert np.array_equal(record.dense()[:, [3, 60]], kept.astype(np.float32))
    assert record.nbytes == weight.nbytes + 2 * kept.size + 8
    x = normal(4, 64)
    x[:, 3] = 500  # never rounded, and never part of a maximum
    assert np.array_equal(record.steps(x)[1], OutlierInputs(weight, None, None, 6.0).steps(x * (x < 500))[1])


def test_affine_codes_reach_both_ends():
    codes, scale, zero = quantize_affine(np.float32([[1, 2, 3], [0, 0, 0], [-1, -2, -3]]), 8)
    assert codes.tolist()[0][2] == 127 and codes.tolist()[2][2] == -128 and zero[:, 0].tolist() == [-128, -128, 127]
    assert scale[1] == 0 and np.isnan(quantize_affine(np.float32([[np.nan, 1]]))[1]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: TokenInputs(w, "int9"), "form of inputs must be e4m3, spark or one of int2, .*got 'int9'"),
        (lambda w: TokenInputs(w.dense(), "int8"), "weight must be a packed record .* got ndarray"),
        (lambda w: TokenInputs(TokenInputs(w, "int8"), "int8"), "whose inputs are not rounded, got token_inputs"),
        (lambda w: StaticInputs(w, scale_of(0), None, 8), "scale of inputs must be positive, got 0.0"),
        (lambda w: StaticInputs(w, scale_of(np.nan), None, 8), "scale holds NaN or Inf"),
        (lambda w: StaticInputs(w, scale_of(1), None, 9), "bits of activations must be 2 to 8, got 9"),
        (lambda w: StaticInputs(w, scale_of(1), np.full((1, 1), 16, np.uint8), 4), "zero_point must be below 16"),
        (lambda w: PairInputs(w, scale_of(-1)), "scale of inputs must be positive, got -1"),
        (lambda w: OutlierInputs(w, None, None, math.nan), "threshold must be a number, got NaN"),
        (lambda w: OutlierInputs(w, np.int32([1]), None, 6.0), "come together or not at all"),
        (lambda w: OutlierInputs(w, np.int32([1, 1]), np.zeros((18, 2), np.float16), 6.0), "must rise and lie in"),
        (lambda w: OutlierInputs(w, np.int32([64]), np.zeros((18, 1), np.float16), 6.0), r"lie in \[0, 64\)"),
        (
            lambda w: OutlierInputs(w, np.int32([4]), np.zeros((17, 1), np.float16), 6.0),
            r"kept must be float16",
        ),
        (lambda w: Rounding(1), "bits of activations must be 2 to 8, got 1"),
        (lambda w: Rounding(8, 0.0), "clip_ratio must lie above 0 and not above 1, got 0.0"),
        (lambda w: matmul(normal(1, 64), w, "int5"), "activations must be one of float32, int8, int4, got 'int5'"),
    ],
)
def test_bad_records(make, message):
    with pytest.raises(ValueError, match=message):
        make(WEIGHTS["int"])


def test_forms_are_all_the_widths():
    assert [FORMS[f"int{bits}"].bits for bits in range(2, 9)] == list(range(2, 9))
    assert [FORMS[f"uint{bits}"] for bits in (2, 8)] == [Rounding(2, symmetric=False), Rounding(8, symmetric=False)]
