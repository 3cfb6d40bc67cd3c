"""squeezellm: what is kept apart is exact and pulls nothing; sensitive weights get their values; bytes counted."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.kernels.kmeans_1d import exact_1d
from refllm.kernels.packed.records import SparseRows, Sum, TableRows
from refllm.kernels.stats import Stats
from refllm.methods.apply import check
from refllm.methods.quant import rtn, squeezellm
from refllm.methods.quant.squeezellm import kept_apart
from refllm.model.fisher import fisher_diagonal
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.strategies import PROPERTY, SEEDS, weights

ALONE = dict(sensitive=0.0, outliers=0.0)


def problem(seed, shape=(6, 40)):
    rng = np.random.default_rng(seed)
    return rng.standard_t(3, shape).astype(np.float32), np.exp(2 * rng.normal(size=shape)).astype(np.float32)


@PROPERTY
@given(SEEDS, st.sampled_from((0.0, 0.01, 0.1)), st.sampled_from((0.0, 0.02, 0.2)))
def test_what_is_kept_apart(seed, sensitive, outliers):
    W, F = problem(seed)
    apart = kept_apart(W, F, sensitive, outliers)
    first, second = int(sensitive * W.size), int(outliers * W.size)
    assert apart.sum() == first + second
    order = sorted(range(W.size), key=lambda i: (-F.flat[i], i))[:first]
    left = sorted(set(range(W.size)) - set(order), key=lambda i: (-abs(W.flat[i]), i))[:second]
    assert sorted([*order, *left]) == np.flatnonzero(apart).tolist()


@PROPERTY
@given(SEEDS)
def test_kept_weights_come_back_and_the_others_are_values_of_their_row(seed):
    W, F = problem(seed)
    record = squeezellm(W, None, fisher=F, sensitive=0.02, outliers=0.05)
    lut, kept = record.terms
    apart = kept_apart(W, F, 0.02, 0.05)
    assert type(record) is Sum and type(lut) is TableRows and type(kept) is SparseRows
    np.testing.assert_allclose(record.dense()[apart], W[apart], rtol=2.0**-10, atol=2.0**-10)
    for row, table, taken in zip(record.dense(), lut.tables, apart, strict=True):
        assert set(row[~taken]) <= set(table.astype(np.float32))
        assert (np.diff(table) >= 0).all()  # rising, and codes count in that order


def test_kept_weights_pull_no_value():
    """Whatever large number stands at a place kept apart: the same table."""
    W, F = problem(1)
    W[2, 3], W[4, 5] = 500, -500
    one = squeezellm(W, None, fisher=F, outliers=2 / W.size).terms[0]
    W[2, 3], W[4, 5] = -900, 700
    other = squeezellm(W, None, fisher=F, outliers=2 / W.size).terms[0]
    assert one.tables.tobytes() == other.tables.tobytes() and one.codes.tobytes() == other.codes.tobytes()
    zeros = np.delete(W[2].astype(np.float64), 3)[None], np.delete(F[2].astype(np.float64), 3)[None]
    np.testing.assert_array_equal(one.tables[2], exact_1d(*zeros, 8)[0].astype(np.float16))


@PROPERTY
@given(weights(columns=st.integers(2, 40)), SEEDS, st.integers(1, 4))
def test_no_worse_than_an_even_grid_of_as_many_values(W, seed, bits):
    """The weighted error, up to the rounding of the table to float16."""
    F = np.random.default_rng(seed).random(W.shape)
    error = lambda Q: float(np.sum(F * (W - Q.astype(np.float64)) ** 2))
    steps = np.linspace(W.min(axis=1), W.max(axis=1), 1 << bits, axis=1)
    even = np.take_along_axis(steps, np.abs(W[:, :, None] - steps[:, None]).argmin(axis=-1), axis=1)
    ours = squeezellm(W, None, bits=bits, fisher=F, **ALONE).dense()
    rounding = 2.0**-11 * np.abs(W).max() + 2.0**-24
    assert error(ours) <= error(even) + 4 * rounding * (np.sqrt(error(even) * F.sum()) + rounding * F.sum()) + 1e-12


def test_even_weights_are_plain_k_means_and_a_factor_changes_nothing():
    W, F = problem(2)
    plain = squeezellm(W, None, fisher=np.ones(W.shape), **ALONE)
    np.testing.assert_array_equal(plain.tables, exact_1d(W, np.ones(W.shape), 8).astype(np.float16))
    one, two = (squeezellm(W, None, fisher=factor * F).terms[0] for factor in (1, 64))
    assert one.tables.tobytes() == two.tables.tobytes()
    zeros = squeezellm(W, None, fisher=np.zeros(W.shape), **ALONE)
    assert zeros.tables.tobytes() == plain.tables.tobytes()


def test_without_gradients_inputs_weigh():
    W, _ = problem(3)
    X = np.random.default_rng(0).normal(size=(50, 40)) * np.exp(np.random.default_rng(1).normal(size=40))
    stats = Stats(X)
    direct = squeezellm(W, stats, **ALONE)
    given = squeezellm(W, None, fisher=np.tile(stats.sum_squares / stats.n, (6, 1)), **ALONE)
    assert direct.tables.tobytes() == given.tables.tobytes()
    output = lambda Q: np.sum(((W - Q) ** 2) @ stats.sum_squares)
    assert output(direct.dense()) < output(squeezellm(W, None, fisher=np.ones(W.shape), **ALONE).dense())


def test_bits_are_counted():
    W, F = problem(4, (64, 200))
    record = squeezellm(W, None, fisher=F)
    kept = int(0.0005 * W.size) + int(0.0045 * W.size)
    assert record.nbytes == 64 * 75 + 64 * 8 * 2 + kept * (2 + 1) + 64  # codes, tables, values and columns, counts


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(bits=0), "bits must be 1 to 8, got 0"),
        (dict(outliers=1.0), "outliers must be a fraction from 0 to less than 1, got 1.0"),
        (dict(sensitive=-0.1), "sensitive must be a fraction"),
        (dict(fisher=np.ones((6, 39))), r"fisher must be .* of shape \(6, 40\), got shape \(6, 39\)"),
        (dict(fisher=-np.ones((6, 40))), "fisher must be finite, not negative"),
    ],
)
def test_bad_input_is_one_clear_line(knobs, message):
    W, F = problem(0)
    with pytest.raises(ValueError, match=message):
        squeezellm(W, None, **(dict(fisher=F) | knobs))
    with pytest.raises(ValueError, match="3 columns, the weight has 40"):
        squeezellm(W, Stats(np.ones((2, 3))))


def test_fisher_is_the_square_of_finite_differences():
    model = refllm.load("tiny")
    name, ids = "model.layers.1.mlp.up_proj.weight", np.arange(40) * 7 % 800
    fisher = fisher_diagonal(model, ids, [name], window=20)[name]
    at = np.unravel_index(np.argmax(fisher), fisher.shape)

    def loss(step, window):
        weight = model.weights[name].astype(np.float64)
        weight[at] += step
        moved = {n: w.astype(np.float64) for n, w in model.weights.items()} | {name: weight}
        logits = forward(replace(model, weights=moved), window[None, :-1])[0]
        highest = logits.max(axis=-1, keepdims=True)
        nats = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[:, 0]
        return np.mean(nats - logits[np.arange(len(window) - 1), window[1:]])

    slopes = [(loss(1e-4, w) - loss(-1e-4, w)) / 2e-4 for w in (ids[:20], ids[20:])]
    assert fisher[at] == pytest.approx(np.mean(np.square(slopes)), rel=1e-3)


def test_compress_fills_in_the_gradients(tmp_path):
    model, ids = refllm.load("tiny"), np.arange(300) * 7 % 800
    check(model, "squeezellm", ids)
    small = refllm.compress(model, "squeezellm:only=layers.2+kivi:bits=4", ids)
    name = "model.layers.2.self_attn.o_proj.weight"
    fisher = fisher_diagonal(model, ids, [name])[name]
    expected = squeezellm(model.weights[name], None, fisher=fisher)
    assert small.weights[name].first.tables.tobytes() == expected.first.tables.tobytes()
    save_native(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    np.testing.assert_array_equal(forward(again, ids[None, :30]), forward(small, ids[None, :30]))
    with pytest.raises(ValueError, match="squeezellm needs calibration"):
        refllm.compress(model, "squeezellm")


def test_ahead_of_an_even_grid_of_more_bits():
    W, F = problem(7, (32, 256))
    error = lambda Q: float(np.sum(F * (W - Q) ** 2))
    ours, grid = squeezellm(W, None, fisher=F), rtn(W, bits=3, group_size=16)
    assert ours.nbytes < grid.nbytes and error(ours.dense()) < 0.6 * error(grid.dense())
