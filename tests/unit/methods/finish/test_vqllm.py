"""vqllm: another order of vectors, the same weight; hits counted; two orders of work with one result."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.packed.records import SparseBitmask, VectorWeight
from refllm.methods.finish import vqllm
from refllm.methods.finish.vqllm import codebook_product, gather_product, histogram, hit_rates, traffic
from tests.strategies import PROPERTY, SEEDS


@st.composite
def vector_weights(draw):
    rng = np.random.default_rng(draw(SEEDS))
    spans, books, d = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 4)))
    vectors, rows, groups = draw(st.integers(1, 9)), draw(st.integers(1, 7)), spans * draw(st.integers(1, 3))
    codes = np.minimum(rng.geometric(0.4, (rows, groups, books)) - 1, vectors - 1)
    scale = rng.random((rows, draw(st.sampled_from((1, groups))))).astype(np.float32) if draw(st.booleans()) else None
    tables = rng.normal(size=(spans, books, vectors, d)).astype(draw(st.sampled_from(("float16", "float32"))))
    return VectorWeight.pack(codes, tables, scale)


@PROPERTY
@given(vector_weights())
def test_the_weight_is_the_same_and_the_order_is_by_use(record):
    done = vqllm(record, None)
    assert done.dense().tobytes() == record.dense().tobytes() and done.nbytes == record.nbytes
    uses = histogram(done)
    assert (np.diff(uses, axis=-1) <= 0).all()
    np.testing.assert_array_equal(np.sort(histogram(record), axis=-1)[..., ::-1], uses)
    again = vqllm(done, None)
    assert again.codes.tobytes() == done.codes.tobytes() and again.codebooks.tobytes() == done.codebooks.tobytes()


@PROPERTY
@given(vector_weights())
def test_the_histogram_counts(record):
    uses, codes = histogram(record), record.unpacked()
    assert uses.sum() == codes.size
    for span, book, k in np.ndindex(uses.shape):
        assert uses[span, book, k] == np.count_nonzero(codes[:, record.spans == span, book] == k)


@PROPERTY
@given(vector_weights(), SEEDS)
def test_both_orders_of_work_give_one_result(record, seed):
    x = np.random.default_rng(seed).normal(size=(3, record.shape[1]))
    exact, tables = gather_product(x, record), codebook_product(x, record)
    size = np.abs(x) @ np.abs(record.dense()).T.astype(np.float64)
    most = 16 * np.abs(record.codebooks).max() * np.abs(x).sum(axis=1, keepdims=True)  # float32 sums of vectors
    assert (np.abs(exact - tables) <= 1e-6 * (size + most)).all()


@PROPERTY
@given(vector_weights(), st.integers(0, 200), st.integers(0, 200))
def test_hits_are_shares_and_sorting_never_lowers_the_fast_ones(record, registers, shared):
    before, after = hit_rates(record, registers, shared), hit_rates(vqllm(record, None), registers, shared)
    assert sum(before) == pytest.approx(1) and sum(after) == pytest.approx(1)
    if record.codebooks.shape[:2] == (1, 1):
        assert after[0] >= before[0] and after[2] <= before[2]


def test_by_hand():
    # Uses: 3 of vector 2, 2 of vector 0, none of 1, 1 of 3. A vector has two float16: 4 bytes.
    record = VectorWeight.pack(np.array([[[2], [0], [2]], [[3], [2], [0]]]), np.zeros((1, 1, 4, 2), np.float16), None)
    assert histogram(record).tolist() == [[[2, 0, 3, 1]]]
    assert hit_rates(record, 4, 4) == (2 / 6, 0, 4 / 6)
    assert hit_rates(vqllm(record, None), 4, 4) == (3 / 6, 2 / 6, 1 / 6)
    assert hit_rates(vqllm(record, None), 0, 1000) == (0, 1, 0)
    assert traffic(record, row_blocks=5) == {"rows_first": 80, "codebooks_first": 16}


def test_more_codebooks_bring_partial_sums():
    record = VectorWeight.pack(np.zeros((10, 4, 2), int), np.zeros((2, 2, 4, 2), np.float16), None)
    moved = traffic(record, row_blocks=3, tokens=2)
    assert moved == {"rows_first": 3 * 64, "codebooks_first": 64 + 2 * 4 * 4 * 10 * 2}


def test_other_records_are_refused():
    with pytest.raises(ValueError, match=r"follows a stage that gives codes of vectors.*the weight is bitmask"):
        vqllm(SparseBitmask.compress(np.eye(8, dtype=np.float32)), None)
