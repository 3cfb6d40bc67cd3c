"""exl2: presets and sizes, a slow twin of fitting and rounding, the choice against all choices, whole models."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.linalg import inverse_factor
from refllm.kernels.packed.records import ColumnGroups, Reordered
from refllm.kernels.stats import Stats
from refllm.methods.apply import compress, load
from refllm.methods.blockwise.exl2 import DAMP, choose, exl2, measure, ordered, relative, table
from refllm.methods.blockwise.exl2_mixes import ATTENTION, MLP, fitted, groups_of, quantised
from refllm.methods.quant.gptq import gptq
from refllm.methods.record import report
from refllm.model.convert import save
from refllm.model.llama import attention_half, embed, forward, mlp_half
from refllm.model.walk import layer_linears, walk
from tests.models import random_model
from tests.strategies import PROPERTY, SEEDS
from tests.unit.methods.quant.test_gptq import example, output_error

IDS = np.random.default_rng(3).integers(0, 64, 96)
MIXES = sorted({mix for option in (*ATTENTION, *MLP) for mix in option})


def small():
    return random_model("llama", np.float32, hidden_size=64, intermediate_size=96)


@PROPERTY
@given(st.sampled_from(MIXES), st.integers(1, 700))
def test_groups_cover_the_columns_and_shares_are_reached(mix, columns):
    groups = groups_of(mix, columns)
    assert sum(n for _, n in groups) == columns and all(n >= 1 for _, n in groups)
    parts = mix.split()
    first = parts[0].partition("@")[2].partition("/")[0]
    if first:  # the share is reached by as few whole groups as possible
        bits, size = int(parts[0][0]), int(parts[0].partition("/")[2])
        taken = sum(n for b, n in groups if b == bits)
        assert taken >= columns * int(first) / 100 - 1e-9 or taken == columns
        assert taken - size < columns * int(first) / 100
    size_of = {int(part[0]): int(part.split("/")[1]) for part in parts}
    assert all(n == size_of[b] for b, n in groups[:-1])
    assert [b for b, _ in groups] == sorted((b for b, _ in groups), reverse=True)


@pytest.mark.parametrize("mix", ["", "3", "x/64", "3@5/64 2", "3@50/64", "4/0", "3@-5/64 2/64"])
def test_mixes_that_are_none(mix):
    with pytest.raises(ValueError, match=r"mix"):
        groups_of(mix, 400)


@pytest.mark.parametrize("columns", [128, 384, 576, 1000])
def test_bytes_are_those_of_the_format(columns):
    """weights, 16 bits of scale and 32 of bits and width a group, 4 of level a group and row, 32 of order a column."""
    rng = np.random.default_rng(0)
    W, order, U = rng.normal(size=(16, columns)), np.arange(columns), np.eye(columns)
    for mix in MIXES[:: max(1, len(MIXES) // 6)]:
        groups = groups_of(mix, columns)
        bits = sum(b * n * 16 for b, n in groups) + len(groups) * (16 + 32 + 4 * 16) + 32 * columns
        assert 8 * quantised(W, order, U, mix, steps=1).nbytes == bits


def slow_fit(W, bits, steps):
    """Row by row and p by p, in Python's floats."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    base = [(max(abs(float(v)) for v in row) + 1e-12) / (top / 2) for row in W]
    level = [min(max(round(16 * math.sqrt(b / max(base))), 1), 16) for b in base]  # Python rounds half to even, too
    best = None
    for i in range(steps + 1):
        p = 0.7 + 0.5 * i / steps
        total = 0.0
        for row, k in zip(W, level, strict=True):
            s = (k / 16) ** 2 * max(base) * p
            for w in row:
                total += abs(min(max(round(w / s), -half), half - 1) * s - w) ** 3.5
        if best is None or total < best[0] * (1 - 1e-9):
            best = total, p
    return level, np.float16(max(base) * best[1])


@PROPERTY
@given(SEEDS, st.integers(2, 8), st.integers(1, 4), st.integers(1, 9))
def test_levels_and_scale_of_a_group(seed, bits, rows, columns):
    W = np.random.default_rng(seed).normal(size=(rows, columns)) * np.exp(np.arange(rows))[:, None]
    group = fitted(W, bits, steps=8)
    level, scale = slow_fit(W.tolist(), bits, 8)
    assert group.level.tolist() == level and group.scale == scale
    assert np.array_equal(group.step, np.square(group.level / 16) * np.float64(group.scale))


def test_a_searched_scale_serves_high_powers_of_errors_better():
    W = np.random.default_rng(0).standard_normal((32, 64))
    left = lambda group: np.sum(np.abs(np.clip(np.rint(W / group), -4, 3) * group - W) ** 3.5)
    searched = fitted(W, 3)
    plain = np.square(searched.level / 16)[:, None] * np.abs(W).max() / 3.5
    assert left(searched.step[:, None]) < 0.8 * left(plain)


@PROPERTY
@given(SEEDS, st.sampled_from(("4@25/2 3/4", "8@20/1 2/3", "5/4")), st.integers(1, 11))
def test_the_sweep_is_algorithm_1_with_mixed_groups(seed, mix, columns):
    """Column by column with nothing put off, against the blocks of the sweep."""
    rng = np.random.default_rng(seed)
    W, X = rng.normal(size=(3, columns)), rng.normal(size=(columns + 6, columns))
    order, U = ordered(Stats(X).H)
    record = quantised(W, order, U, mix, steps=4)
    now, start, inner = W[:, order].copy(), 0, record.weight
    codes = inner.unpacked()
    for (bits, n), level, scale in zip(inner.groups.tolist(), inner.levels(), inner.scale, strict=True):
        group = fitted(now[:, start : start + n], bits, steps=4)
        assert group.level.tolist() == level.tolist() and group.scale == scale
        for j in range(start, start + n):
            code = np.clip(np.rint(now[:, j] / group.step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            assert np.array_equal(codes[:, j], code + 2 ** (bits - 1))
            error = (now[:, j] - (code * group.step).astype(np.float32)) / U[j, j]
            now[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
        start += n
    assert np.array_equal(record.order, np.argsort(-np.diag(Stats(X).H), kind="stable"))


def test_damping_and_order():
    X = np.random.default_rng(0).normal(size=(50, 6)) * [1, 5, 2, 5e-9, 3, 4]
    H = Stats(X).H
    order, U = ordered(H)
    assert order.tolist() == [1, 5, 4, 2, 0, 3]
    full = H[np.ix_(order, order)] + DAMP * np.trace(H) / 6 * np.eye(6)
    np.testing.assert_allclose(U.T @ U, np.linalg.inv(full), rtol=1e-9)
    assert np.array_equal(ordered(np.zeros((3, 3)))[1], inverse_factor(1e-5 * np.eye(3)))  # all inputs dead


def test_zero_weights_stay_zero():
    order, U = ordered(np.eye(64))
    dense = quantised(np.zeros((4, 64)), order, U, "3@5/32 2/32").dense()
    assert not dense.any()


def test_between_uniform_widths_in_size_and_better_than_the_lower():
    """A quarter of the columns with 4 bits, the others with 2: on inputs of very different sizes that is well spent."""
    W, X = example(64, 256, 600)
    ours = quantised(W, *ordered(Stats(X).H), "4@25/64 2/64")
    plain = gptq(W, Stats(X), bits=3, group_size=32, act_order=True)
    assert ours.nbytes < plain.nbytes
    assert output_error(W, X, ours) < output_error(W, X, gptq(W, Stats(X), bits=2, group_size=32, act_order=True))


def problem(seed, halves, options):
    """More bytes, less error, here and there not; as far apart as measured ones."""
    rng = np.random.default_rng(seed)
    nbytes = np.sort(rng.integers(100, 400, (halves, options)), axis=1)
    error = np.sort(rng.uniform(0.05, 0.9, (halves, options)), axis=1)[:, ::-1]
    return np.minimum(error * rng.uniform(0.9, 1.1, error.shape), 0.99), nbytes


@settings(PROPERTY, max_examples=20)
@given(SEEDS, st.integers(1, 6), st.integers(2, 5), st.floats(0, 1), st.sampled_from(("anneal", "hull")))
def test_the_budget_holds_and_nothing_useful_is_left_over(seed, halves, options, share, optimizer):
    error, nbytes = problem(seed, halves, options)
    every = np.arange(halves)
    low, high = nbytes.min(axis=1).sum(), nbytes.max(axis=1).sum()
    budget = int(low + share * (high - low))
    choice, p = choose(error, nbytes, budget, optimizer, moves=1)
    spent = nbytes[every, choice].sum()
    assert spent <= budget and 1.4 < p < 3.6
    for i, o in itertools.product(range(halves), range(options)):  # no option alone would be better and fit
        fits = spent - nbytes[i, choice[i]] + nbytes[i, o] <= budget
        assert not fits or error[i, o] >= error[i, choice[i]] or optimizer == "hull"
    assert choose(error, nbytes, budget, optimizer, moves=1)[0].tolist() == choice.tolist()


@pytest.mark.parametrize("optimizer", ["anneal", "hull"])
def test_near_the_best_of_all_choices(optimizer):
    """Six halves, all choices tried. Annealing comes nearer than the hulls, whose steps do not fit near the end."""
    over, every = [], np.arange(6)
    for seed in range(4):
        error, nbytes = problem(seed, 6, 5)
        budget = int(nbytes.min(axis=1).sum() * 1.5)
        choice, p = choose(error, nbytes, budget, optimizer, moves=4)
        tried = np.array(list(itertools.product(range(5), repeat=6)))
        tried = tried[nbytes[every, tried].sum(axis=1) <= budget]
        over.append((error[every, choice] ** p).sum() / (error[every, tried] ** p).sum(axis=1).min())
    assert max(over) < (1.06 if optimizer == "anneal" else 1.15)


def test_with_enough_bytes_the_least_errors_and_with_too_few_a_refusal():
    error, nbytes = problem(3, 5, 4)
    chosen = lambda budget: choose(error, nbytes, budget, moves=1)[0].tolist()
    assert chosen(10**6) == error.argmin(axis=1).tolist()
    assert chosen(int(nbytes.min(axis=1).sum())) == nbytes.argmin(axis=1).tolist()
    with pytest.raises(ValueError, match=r"the cheapest options take .* raise the target"):
        choose(error, nbytes, int(nbytes.min(axis=1).sum()) - 1)


def test_errors_are_those_of_the_residual_stream_behind_each_half():
    model, option = small(), 5
    halves = list(measure(model, IDS, 2, 2))
    assert [len(h.error) for h in halves] == [19, 17, 19, 17]
    states, positions = embed(model, IDS[None]), np.arange(len(IDS))
    _, stats = next(iter(walk(model, IDS)))
    runs = (lambda m, x: attention_half(m, 0, x, positions), lambda m, x: mlp_half(m, 0, x))
    for half, run in zip(halves[:2], runs, strict=True):
        expected, changed, total = run(model, states), dict(model.weights), 0
        for name, mix in zip(half.names, half.options[option], strict=True):
            record = quantised(model.weights[name], *ordered(stats[name].H), mix, 2)
            changed[name], total = record.dense(), total + record.nbytes
        got = run(replace(model, weights=changed), states)
        assert half.error[option] == pytest.approx(relative(got, expected), rel=1e-5)
        assert half.nbytes[option] == total
        states = expected
    assert relative(np.zeros(3), np.zeros(3)) == 0 and relative(np.ones(3), np.zeros(3)) == 1


def test_halves_with_fewer_options_get_some_that_no_budget_allows():
    halves = list(measure(small(), IDS, 1, 1))
    error, nbytes = table(halves, 1000)
    assert error.shape == (4, 19) and (nbytes[1, 17:] == 1001).all()


@pytest.mark.parametrize("bits", [4.0, 5.0])
@pytest.mark.parametrize("optimizer", ["anneal", "hull"])
def test_a_model_within_its_target(bits, optimizer):
    model, reports = small(), []
    packed = exl2(model, IDS, on_report=reports.append, bits=bits, rows=1, steps=3, moves=1, optimizer=optimizer)
    linears = [n for layer in range(2) for n in layer_linears(layer)]
    total = sum(8 * packed.weights[n].nbytes for n in linears) / sum(model.weights[n].size for n in linears)
    assert bits - 0.5 < total <= bits
    assert [r.name for r in reports] == linears
    for n in linears:
        record = packed.weights[n]
        assert type(record) is Reordered and type(record.weight) is ColumnGroups
    assert report("w", model.weights[linears[0]], packed.weights[linears[0]]).weight_error < 0.3


def test_more_bits_change_the_predictions_less():
    model = small()
    packed = lambda bits: exl2(model, IDS, bits=bits, rows=1, steps=6, moves=1)
    change = [np.abs(forward(packed(bits), IDS) - forward(model, IDS)).mean() for bits in (4, 5, 8)]
    assert change[2] < change[1] < change[0]


def test_a_recipe_with_other_stages_is_stored_and_runs(tmp_path):
    model = small()
    packed = compress(model, "smoothquant+exl2:bits=4.5,rows=1,steps=4,moves=1+kivi", IDS)
    save(packed, tmp_path / "model")
    again = load(tmp_path / "model")
    for name, weight in packed.weights.items():
        if isinstance(weight, Reordered):
            assert np.array_equal(again.weights[name].dense(), weight.dense())
    assert np.array_equal(forward(again, IDS), forward(packed, IDS))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(bits=2.0), "the cheapest options take .* raise the target"),
        (dict(optimizer="best"), "optimizer must be one of anneal, hull, got 'best'"),
        (dict(rows=0), "moves, rows and steps must be at least 1, got 8, 0 and 96"),
    ],
)
def test_knobs_out_of_range(knobs, message):
    with pytest.raises(ValueError, match=message):
        exl2(small(), IDS, **({"steps": 1} | knobs if "rows" not in knobs else knobs))


def test_weights_that_are_not_finite_are_refused():
    model = small()
    model.weights[layer_linears(1)[3]][0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        exl2(model, IDS, rows=1, steps=1)
