"""Vector quantisation: the record is what its formula says, and its products read the vectors that codes name."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.bits import pack_bits
from refllm.kernels.packed import fast, has_codes, matmul, reference
from refllm.kernels.packed.records import VectorWeight
from refllm.kernels.packed.tiled import form_of, tiles_of
from tests.strategies import KERNEL, PROPERTY, gamma
from tests.targets import GENERIC, run_for
from tests.unit.kernels.packed.test_tables import LEAST, tokens_and

EVERY = 0  # spans: as many as there are vectors in a row
METHODS = {  # books, vectors of a book, d, spans, columns of a scale (None: there is none, -1: all), dtype
    "AQLM 2x8": (2, (1, 7, 200, 256), 8, (1,), (-1,), "float16"),
    "AQLM 1x12": (1, (257, 4096, 5000), 8, (1,), (-1, 64), "float32"),
    "product": (1, (2, 16, 256), 4, (EVERY,), (None, -1), "float16"),
    "product of spans": (1, (16,), 2, (3,), (None, 32), "float16"),
    "residual": (3, (16, 40), 16, (1, 2), (32, 64, 96), "float16"),
}


def vector_weight(books, vectors, d, rows, columns, spans=1, group=-1, dtype="float16", seed=0, last=False):
    """Random codebooks, of different sizes, with zeros of both signs; some rows have the scale 0. last: one code."""
    rng = np.random.default_rng(seed)
    spans = columns // d if spans == EVERY else spans
    codebooks = rng.standard_normal((spans, books, vectors, d)) * 10.0 ** rng.integers(-6, 3, (spans, books, 1, 1))
    codebooks[rng.random(codebooks.shape) < 0.1] = -0.0
    codes = rng.integers(0, vectors, (rows, columns // d, books))
    if last:
        codes[:] = vectors - 1
    scale = None
    if group is not None:
        scale = rng.standard_normal((rows, 1 if group == -1 else columns // group)).astype(rng.choice(["f2", "f4"]))
        scale[rng.random(rows) < 0.1] = 0
    return VectorWeight.pack(codes, codebooks.astype(dtype), scale)


@st.composite
def vector_weights(draw, method):
    books, vectors, d, spans, groups, dtype = METHODS[method]
    group, spans = draw(st.sampled_from(groups)), draw(st.sampled_from(spans))
    step = np.lcm(d * max(1, spans), group if group and group > 0 else 1)
    columns = int(step) * draw(st.integers(1, 192 // int(step)))
    rows, seed, last = draw(st.integers(1, 35)), draw(st.integers(0, 2**16)), draw(st.booleans())
    return vector_weight(books, draw(st.sampled_from(vectors)), d, rows, columns, spans, group, dtype, seed, last)


def test_two_books_by_hand():
    codebooks = np.float16([[[[1, 2], [3, 4], [5, 6]], [[10, 20], [30, 40], [50, 60]]]])
    weight = VectorWeight.pack(np.array([[[0, 2], [1, 0]], [[2, 1], [2, 2]]]), codebooks, np.float16([[1], [0.5]]))
    assert weight.dense().tolist() == [[51, 62, 13, 24], [17.5, 23, 27.5, 33]]
    assert weight.bits == 2 and weight.codes.tolist() == [[0 | 2 << 2 | 1 << 4], [2 | 1 << 2 | 2 << 4 | 2 << 6]]
    assert weight.nbytes == 2 + 2 * 12 + 4 and not has_codes(weight)


@pytest.mark.parametrize("method", METHODS)
@PROPERTY
@given(data=st.data())
def test_every_weight_by_the_formula(method, data):
    weight = data.draw(vector_weights(method))
    W, codes = weight.dense(), weight.unpacked()
    spans, books, _, d = weight.codebooks.shape
    assert W.shape == weight.shape == (len(codes), codes.shape[1] * d)
    for r, c in [(0, 0), (W.shape[0] - 1, W.shape[1] - 1), (W.shape[0] // 2, W.shape[1] // 3)]:
        span, total = c * spans // W.shape[1], np.float32(0)
        for m in range(books):
            total += np.float32(weight.codebooks[span, m, codes[r, c // d, m], c % d])
        if weight.scale is not None:
            total *= np.float32(weight.scale[r, c * weight.scale.shape[1] // W.shape[1]])
        assert W[r, c] == total


def bound(x, weight):
    """Vectors are added as in the record; then one rounding for each eight columns and each group, three for the sum
    of the lanes, and one for the record's own product with the scale."""
    whole = replace(weight, scale=None).dense()
    groups = 1 if weight.scale is None else weight.scale.shape[1]
    scale = np.ones((len(whole), 1)) if weight.scale is None else np.abs(weight.scale).astype(np.float64)
    scale = np.repeat(scale, weight.columns // groups, axis=1)
    x, W = np.abs(x).astype(np.float64), np.abs(whole).astype(np.float64)
    error = gamma(-(-weight.columns // 8) + groups + 4) * (x @ (W * scale).T)
    return error + LEAST * (weight.columns + x.sum(axis=1)[:, None]) * (1 + scale.max(axis=1))


@pytest.mark.parametrize("method", METHODS)
@KERNEL
@given(data=st.data())
def test_products_within_the_bound(method, data):
    weight = data.draw(vector_weights(method))
    x = data.draw(tokens_and(weight.columns))
    assert tiles_of(weight).form.layout == "vectors"
    y = fast.matmul_float(x, weight)
    assert np.array_equal(y, np.concatenate([fast.matmul_float(x[i : i + 1], weight) for i in range(len(x))]))
    exact = reference.matmul_float(x.astype(np.float64), weight)
    assert (np.abs(y - exact) <= bound(x, weight)).all()


def whole(books=2, vectors=256, d=8, rows=40, columns=96, dtype="float16"):
    rng = np.random.default_rng(0)
    codes, codebooks = rng.integers(0, vectors, (rows, columns // d, books)), rng.integers(-9, 10, (books, vectors, d))
    return VectorWeight.pack(codes, codebooks[None].astype(dtype), np.ones((rows, 1), np.float16))


def check_whole_numbers(weight):
    x = np.random.default_rng(1).integers(-99, 100, (13, weight.columns))
    exact = x @ weight.dense().T.astype(np.int64)
    for tokens in (1, 13):
        assert np.array_equal(fast.matmul_float(x[:tokens].astype(np.float32), weight), exact[:tokens])


@pytest.mark.parametrize(("books", "vectors", "d"), [(2, 256, 8), (1, 1 << 16, 32)])
def test_whole_numbers_are_exact(books, vectors, d):
    check_whole_numbers(whole(books, vectors, d))


def test_whole_numbers_without_wide_vectors():
    run_for(GENERIC, "from tests.unit.kernels.packed.test_vectors import *\ncheck_whole_numbers(whole(d=4))")


def test_not_a_number_poisons_its_token_and_threads_change_nothing(monkeypatch):
    monkeypatch.setattr("refllm.kernels.packed.threads.MINIMUM_WORK", 1)
    weight, x = whole(rows=100), np.random.default_rng(0).standard_normal((30, 96), np.float32)
    clean = matmul(x, weight)
    for threads in ("1", "3"):
        monkeypatch.setenv("REFLLM_THREADS", threads)
        assert np.array_equal(matmul(x, weight), clean)
    for bad in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[1, 50] = bad
        y = matmul(spoilt, weight)
        assert not np.isfinite(y[1]).any() and np.array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize(("d", "group"), [(3, -1), (64, -1), (8, 24)])
def test_vectors_and_groups_of_other_sizes_go_through_decoded_rows(d, group):
    weight = vector_weight(2, 20, d, rows=9, columns=192, group=group)
    x = np.random.default_rng(0).standard_normal((5, 192), np.float32)
    assert form_of(weight) is None
    assert np.allclose(matmul(x, weight), reference.matmul_float(x, weight), rtol=1e-5, atol=1e-5)


BOOKS = np.ones((1, 2, 256, 8), np.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebooks": np.ones((2, 256, 8), np.float32)}, r"codebooks must be \[spans, books, vectors, d\]"),
        ({"codebooks": np.ones((1, 9, 256, 8), np.float32)}, "at most 8 books"),
        ({"codebooks": np.ones((1, 2, 65537, 1), np.float32)}, "books of 65536 vectors"),
        ({"codebooks": np.ones((1, 2, 0, 8), np.float32)}, "codebooks must be"),
        ({"codebooks": None}, "codebooks must be"),
        ({"codebooks": np.ones((1, 2, 256, 8))}, "float16 or float32"),
        ({"codebooks": np.full((1, 2, 256, 8), np.inf, np.float32)}, "NaN or Inf"),
        ({"codebooks": np.ones((1, 2, 250, 8), np.float16)}, "name one of 250 vectors, got 25"),
        ({"codebooks": np.ones((1, 2, 300, 8), np.float16)}, r"codes must be uint8 \(40, 27\)"),
        ({"codebooks": np.ones((5, 2, 256, 8), np.float16)}, "96 columns are not 5 equal spans of vectors of 8"),
        ({"codes": np.zeros((40, 23), np.uint8)}, r"codes must be uint8 \(40, 24\)"),
        ({"codes": np.zeros((0, 24), np.uint8)}, "at least one row"),
        ({"columns": 100}, "100 columns are not 1 equal spans of vectors of 8"),
        ({"columns": 0}, "columns must be at least 8"),
        ({"scale": np.ones((40, 5), np.float32)}, "96 columns are not 5 equal groups of vectors of 8"),
        ({"scale": np.ones((40, 0), np.float32)}, "not 0 equal groups"),
        ({"scale": np.ones(40, np.float32)}, r"scale must be float16 or float32 \(40, 1\)"),
        ({"scale": np.full((40, 1), np.nan, np.float16)}, "NaN or Inf"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(whole(), **changes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((2, 3, 2), 256), r"codes must lie in \[0, 255\]"),
        (np.full((2, 3, 2), -1), r"codes must lie in \[0, 255\]"),
        (np.zeros((2, 3, 2)), "integer"),
        (np.zeros((2, 3, 1), int), r"codes must be \[out, columns / d, books\]"),
        (np.zeros((2, 6), int), r"codes must be \[out, columns / d, books\]"),
    ],
)
def test_codes_that_cannot_be_stored(codes, message):
    with pytest.raises(ValueError, match=message):
        VectorWeight.pack(codes, BOOKS, None)


def test_bits_after_the_last_code_must_be_zero():
    codes = pack_bits(np.zeros((2, 3), np.uint8), 3)
    codes[0, 1] |= 0x80
    with pytest.raises(ValueError, match="bits after the last of 3 codes"):
        VectorWeight(codes, np.ones((1, 1, 8, 8), np.float16), None, 24)
