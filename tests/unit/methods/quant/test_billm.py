"""billm: against exact elimination, the properties of residual binarisation, its searches, and what it stores."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.evaluate.golden.suites.billm_definition import Definition, Unclear, quantize
from refllm.kernels.linalg import damped, inverse_factor
from refllm.kernels.packed.records import BinaryBlocks, is_record
from refllm.kernels.stats import Stats
from refllm.methods.apply import compress, load
from refllm.methods.quant.billm import MOST_SALIENT, billm, groups_of, residual
from refllm.methods.quant.binary import binary
from refllm.model.convert import save
from refllm.model.llama import forward
from tests.models import random_model
from tests.strategies import PROPERTY, SEEDS, weights
from tests.unit.methods.quant.test_gptq import example, output_error


def clear_example(n, seed, definition):
    """The first random weights and inputs all of whose decisions are clear."""
    while True:
        rng = np.random.default_rng(seed)
        W, X = rng.integers(-4096, 4097, (2, n)) / 1024, rng.integers(-8, 9, (n + 4, n)) / 4.0
        try:
            return W, X, {k: np.array(v) for k, (_, v) in quantize(W.tolist(), X.tolist(), definition).items()}
        except (Unclear, ValueError):  # singular
            seed += 1


@settings(PROPERTY, max_examples=5)
@given(
    st.sampled_from((7, 9, 10)),  # twice 8 weights have quantiles that are weights
    SEEDS,
    st.sampled_from((0.0, 0.25)),
    st.sampled_from(("hessian", "magnitude")),
    st.booleans(),
)
def test_the_bits_of_elimination(columns, seed, damp, by, on_weights):
    """One block, and nearly two; the definition works one number at a time in fractions."""
    n = columns + 7 * on_weights
    knobs = dict(block=columns, damp=damp, by=by, search="weights" if on_weights else "importance")
    W, X, expected = clear_example(n, seed, Definition(**knobs))
    record = billm(W, Stats(X), **knobs)
    signs, second, salient = record.unpacked()
    for name, value in dict(salient=salient, mean=record.mean, scale=record.scale, w_hat=record.dense()).items():
        assert np.array_equal(value, expected[name]), name
    # The sign of a scale of 0, which one or two weights leave, means nothing.
    scale = np.repeat(record.scale, columns, axis=1)[:, :n]
    means = np.take_along_axis(scale, np.where(salient, 2, second)[..., None].astype(int), axis=2)[..., 0] > 0
    assert np.array_equal(signs[means], expected["signs"][means])
    means = ~salient | (scale[..., 3] > 0)
    assert np.array_equal(second[means], expected["second"][means])


@PROPERTY
@given(weights(max_rows=4), SEEDS)
def test_two_signs_leave_no_more_than_one(W, seed):
    mask = np.random.default_rng(seed).random(W.shape) < 0.7
    errors = [residual(W.astype(np.float64), mask, order)[-1] for order in (0, 1, 2, 3)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))


@PROPERTY
@given(st.integers(1, 12), SEEDS, st.floats(0.5, 2.0))
def test_the_mean_magnitude_is_the_best_scale(n, seed, factor):
    """For one group whose mean is zero: no other scale leaves less, and what is left is sum w^2 - n a^2."""
    w = np.random.default_rng(seed).normal(size=n)
    w = np.concatenate([w, -w])[None]
    mean, (scale,), (plus,), error = residual(w, np.ones((1, 2 * n), bool), 1)
    assert abs(mean[0]) < 1e-15 and scale[0] == pytest.approx(np.abs(w).mean(), rel=1e-12)
    assert error == pytest.approx(np.sum(w**2) - 2 * n * scale[0] ** 2, abs=1e-12)
    assert error <= np.sum((w - factor * scale[0] * np.where(plus, 1, -1)) ** 2) + 1e-12


@PROPERTY
@given(st.integers(1, 60), st.integers(1, 5), SEEDS)
def test_groups_are_apart_and_cover(columns, rows, seed):
    rng = np.random.default_rng(seed)
    S, M = rng.normal(size=(2, rows, columns))
    salient, far = groups_of(S, M)
    assert 1 <= salient.sum() <= min(MOST_SALIENT, columns)
    assert not far[:, salient].any()  # so near, far and salient weights are three groups that share none
    rest = np.abs(M)[:, ~salient]
    if far.any() and (~far[:, ~salient]).any():
        assert rest[far[:, ~salient]].min() >= rest[~far[:, ~salient]].max()  # one threshold for all rows
    if salient.sum() < columns:
        assert np.abs(S).sum(axis=0)[salient].min() >= np.abs(S).sum(axis=0)[~salient].max()


def test_the_groups_are_the_best_that_the_search_tries():
    """Against a plain search; the threshold in place of one near it would leave more."""
    M = np.random.default_rng(1).standard_t(4, size=(6, 64))
    salient, far = groups_of(M, M)
    error = lambda far: residual(M, far, 1)[-1] + residual(M, ~salient & ~far, 1)[-1]
    size = np.where(salient, 0, np.abs(M))
    tried = [error(~salient & (size >= np.quantile(size, k / 100))) for k in range(10, 91)]
    assert error(far) == min(tried)
    assert min(tried) < 0.7 * residual(M, np.broadcast_to(~salient, M.shape), 1)[-1]  # a bell has a tail


def test_with_inputs_apart_no_error_reaches_another_block():
    W, _ = example(8, 60)
    whole = billm(W, Stats(np.eye(60, dtype=np.float32)), block=20, damp=0)
    for a in range(0, 60, 20):
        alone = billm(W[:, a : a + 20], Stats(np.eye(20, dtype=np.float32)), block=20, damp=0)
        assert np.array_equal(whole.dense()[:, a : a + 20], alone.dense())


def test_errors_reach_later_blocks_only():
    W, X = example(8, 64)
    U = inverse_factor(damped(Stats(X).H))
    record = billm(W, Stats(X), block=32)
    first = record.dense()[:, :32].astype(np.float64)
    alone = billm(W[:, :32], Stats(X[:, :32]), block=32)
    assert record.unpacked()[0][:, :32].shape == alone.shape
    later = W[:, 32:] - ((W[:, :32] - first) / np.diag(U)[:32]) @ U[:32, 32:]
    S = later**2 / np.diag(U)[32:] ** 2
    salient, far = groups_of(S, S)
    assert np.array_equal(record.unpacked()[2][32:], salient)
    assert np.array_equal(record.unpacked()[1][:, 32:][:, ~salient], far[:, ~salient])


def test_compensation_pays():
    """Against the same inputs' sizes without their correlations; across blocks only, so small blocks gain more."""
    W, X = example(32, 256, 600)
    apart = Stats(np.diag(np.sqrt(np.diag(Stats(X).H))))
    gain = []
    for block in (16, 64):
        ours, alone = (billm(W, stats, block=block, by="magnitude") for stats in (Stats(X), apart))
        gain.append(output_error(W, X, ours) / output_error(W, X, alone))
    assert gain[0] < 0.7 and gain[0] < gain[1] < 0.9


def test_better_than_one_plane_of_signs_of_the_same_size():
    W, X = example(32, 256, 600)
    for knobs in (dict(), dict(by="magnitude"), dict(search="weights")):
        ours, plain = billm(W, Stats(X), **knobs), binary(W, group_size=16)
        assert ours.nbytes <= plain.nbytes
        assert output_error(W, X, ours) < 0.7 * output_error(W, X, plain)


def test_bytes_are_those_of_two_bits_and_seven_numbers():
    """Above the 1.08 bits that first and second signs alone would be."""
    W, X = example(64, 256)
    record = billm(W, Stats(X))
    assert record.nbytes == 64 * 256 * 2 // 8 + 256 // 8 + 64 * 2 * 7 * 2
    bits = 8 * record.nbytes / W.size
    assert bits == 2 + 7 * 16 / 128 + 1 / 64
    signs_alone = 1 + record.unpacked()[2].mean()
    assert 1 < signs_alone < 1.4 < bits


def test_dead_inputs_get_no_say():
    W, X = example(8, 40)
    X[:, [3, 17]] = 0
    other = W.copy()
    other[:, [3, 17]] *= 50
    assert np.array_equal(billm(W, Stats(X)).dense(), billm(other, Stats(X)).dense())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(block=0), "block must be at least 1 column, got 0"),
        (dict(by="fisher"), "by must be one of hessian, magnitude, got 'fisher'"),
        (dict(search="rows"), "search must be one of importance, weights, got 'rows'"),
        (dict(damp=-1.0), "damp must be a number from 0 up"),
    ],
)
def test_knobs_out_of_range(knobs, message):
    W, X = example(4, 8)
    with pytest.raises(ValueError, match=message):
        billm(W, Stats(X), **knobs)


def test_inputs_of_another_width_and_levels_beyond_float16():
    W, X = example(4, 8)
    with pytest.raises(ValueError, match="inputs have 8 columns, the weight has 7"):
        billm(W[:, :7], Stats(X))
    with pytest.raises(ValueError, match="too large for float16"):
        billm(W * 1e6, Stats(X))


def test_a_recipe_with_other_stages_is_stored_and_runs(tmp_path):
    model = random_model("llama", np.float32, intermediate_size=64)
    ids = np.random.default_rng(3).integers(0, 64, 96)
    for recipe in (
        "smoothquant+billm:block=16",
        "billm:block=32,search=weights,only=mlp+rtn:bits=8,group=32,only=embed",
    ):
        small = compress(model, recipe, ids)
        records = [w for w in small.weights.values() if isinstance(w, BinaryBlocks)]
        assert len(records) == (14 if "smooth" in recipe else 6)
        save(small, tmp_path / f"model{len(records)}")
        again = load(tmp_path / f"model{len(records)}")
        assert np.array_equal(forward(again, ids), forward(small, ids))
        for name, weight in small.weights.items():
            assert not is_record(weight) or np.array_equal(weight.dense(), again.weights[name].dense())
        dense = compress(model, "none")
        dense.weights.update({n: w.dense() if is_record(w) else w for n, w in small.weights.items()})
        np.testing.assert_allclose(forward(small, ids), forward(dense, ids), rtol=1e-3, atol=1e-4)


def test_the_kernels_change_no_byte(monkeypatch):
    W, X = example(16, 96)
    records = []
    for backend in ("numba", "numpy"):
        monkeypatch.setenv("REFLLM_KERNELS", backend)
        records.append(billm(W, Stats(X), block=32))
    for name in records[0].stored:
        assert getattr(records[0], name).tobytes() == getattr(records[1], name).tobytes()
