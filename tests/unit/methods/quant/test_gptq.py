"""gptq: against exact elimination, the invariants of Algorithm 1, its knobs, and the layouts it is stored in."""

import hashlib
import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refllm.evaluate.golden.suites.exact import dyadic
from refllm.evaluate.golden.suites.gptq_definition import Definition, quantize
from refllm.formats.tensors import read_safetensors
from refllm.kernels.grids import AffineGrid, FullRangeGrid
from refllm.kernels.packed.records import IntWeight, Reordered, parts
from refllm.kernels.stats import Stats
from refllm.methods.apply import compress, load
from refllm.methods.quant.gptq import gptq, rounding_margins
from refllm.methods.quant.rtn import rtn
from refllm.methods.recipes import parse
from refllm.model.convert import save
from refllm.model.llama import forward
from refllm.model.quantized.base import integers_of
from tests.models import random_model
from tests.strategies import PROPERTY, SEEDS, inputs
from tests.unit.kernels.test_linalg import dyadic_factor

FLAGS = st.booleans()


def example(out=16, columns=128, tokens=300, seed=0):
    """Correlated inputs of different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) / np.sqrt(columns)
    X = rng.normal(size=(tokens, columns)) @ mix + 0.3 * rng.normal(size=(tokens, columns))
    return rng.normal(size=(out, columns)).astype(np.float32), (X * np.exp(rng.normal(size=columns))).astype(np.float32)


def integers(record):
    """Codes (out, in) in the order of the inputs, scale, zero point and the group of every input."""
    codes, scale, zero, g_idx = integers_of(record).grouped
    groups = scale.shape[1]
    return codes, scale, zero, np.arange(codes.shape[1]) // (codes.shape[1] // groups) if g_idx is None else g_idx


def exactly(W, X, **knobs):
    rows = lambda A: [[Fraction(float(v)) for v in row] for row in A]
    return quantize(rows(W), rows(X), Definition(**knobs))


def same_as_definition(record, outputs):
    codes, scale, zero, g_idx = integers(record)
    assert codes.tolist() == outputs["codes"]
    per_row = np.array([[float(v) for v in row] for row in outputs["scale"]])
    assert scale.astype(float).tolist() == np.broadcast_to(per_row, scale.shape).tolist()
    assert (zero is None) == ("zero_point" not in outputs)
    if zero is not None:
        assert zero.tolist() == np.broadcast_to(outputs["zero_point"], zero.shape).tolist()
    assert g_idx.tolist() == outputs["g_idx"]
    assert record.dense().tolist() == [[float(v) for v in row] for row in outputs["w_hat"]]


def output_error(W, X, record):
    return np.sum((X.astype(np.float64) @ (W - record.dense().astype(np.float64)).T) ** 2)


@PROPERTY
@given(st.integers(1, 3), st.sampled_from((1, 2, 4, 6)), SEEDS, st.sampled_from((2, 3, 4, 8)), FLAGS)
def test_dyadic_inputs_give_the_codes_of_elimination_bit_for_bit(rows, columns, seed, bits, symmetric):
    """Scales are powers of two (the largest weight is a whole number of them), H = R R^T without damping is dyadic."""
    rng = np.random.default_rng(seed)
    X = dyadic_factor(columns, seed).T
    W = rng.integers(-32, 33, (rows, columns)) / 16.0
    # lo and hi (or amax) that make the scale 2^-3: they stand in a last column that takes part in nothing.
    levels = (1 << bits) - 1
    top = np.full((rows, 1), levels / 16 if symmetric else levels / 8)
    W = np.clip(np.hstack([W, top]), -levels / 16 if symmetric else 0, top)
    X = np.block([[X, np.zeros((columns, 1))], [np.zeros((1, columns)), np.ones((1, 1))]])
    knobs = dict(bits=bits, group_size=-1, symmetric=symmetric, damp=0.0)
    same_as_definition(gptq(W, Stats(X), **knobs), exactly(W, X, **knobs)[0])


@PROPERTY
@given(st.data())
def test_every_knob_gives_the_codes_of_elimination(data):
    """Random weights and inputs (dead, repeated, correlated columns too) whose rounding is clear."""
    columns = data.draw(st.sampled_from((1, 2, 3, 4, 6, 8)))
    X = data.draw(inputs(columns))
    rng = np.random.default_rng(data.draw(SEEDS))
    W = (rng.integers(-512, 513, (data.draw(st.integers(1, 3)), columns)) / 256.0).astype(np.float32)
    knobs = dict(
        bits=data.draw(st.integers(2, 8)),
        group_size=data.draw(st.sampled_from([-1, 0, *(g for g in range(1, columns + 1) if columns % g == 0)])),
        symmetric=data.draw(FLAGS),
        damp=data.draw(st.sampled_from((0.01, 0.125, 1.0))),
        act_order=data.draw(FLAGS),
        static_groups=data.draw(FLAGS),
        group_grid=data.draw(st.sampled_from(("published", "updated"))),
        block=data.draw(st.integers(1, 9)),
        scale_dtype=data.draw(st.sampled_from(("float16", "float32"))),
    )
    outputs, margin = exactly(W, X, **knobs)
    assume(margin > 1e-7)
    same_as_definition(gptq(W, Stats(X), **knobs), outputs)


def algorithm_1(W, H, scale, zero, top, damp=0.01, B=128):
    """The paper's Algorithm 1 with a grid per row, block by block, on LAPACK's factor of H^-1."""
    W, H = W.astype(np.float64), H + damp * np.mean(np.diag(H)) * np.eye(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    codes = np.zeros(W.shape, int)
    for i in range(0, W.shape[1], B):
        end = min(i + B, W.shape[1])
        E = np.zeros((len(W), end - i))
        for j in range(i, end):
            codes[:, j] = np.clip(np.rint(W[:, j] / scale) + zero, 0, top)
            E[:, j - i] = (W[:, j] - scale * (codes[:, j] - zero)) / U[j, j]
            W[:, j:end] -= E[:, j - i, None] * U[j, j:end]
        W[:, end:] -= E @ U[i:end, end:]
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_real_size_gives_the_codes_of_algorithm_1(bits):
    """300 columns, more than two blocks of 128; LAPACK rounds otherwise, so that one row in a hundred may differ."""
    W, X = example(200, 300, 600)
    codes, scale, zero, _ = integers(gptq(W, Stats(X), bits=bits, group_size=-1))
    theirs = algorithm_1(W, X.astype(float).T @ X, scale[:, 0].astype(float), zero[:, 0].astype(int), 2**bits - 1)
    assert (codes == theirs).mean() >= 0.999


@PROPERTY
@given(st.integers(1, 12), SEEDS, st.sampled_from((-1, 0, 1)), FLAGS, FLAGS, FLAGS)
def test_a_diagonal_hessian_gives_round_to_nearest(half, seed, groups, act_order, static, updated):
    rng = np.random.default_rng(seed)
    columns = 2 * half
    W = rng.normal(size=(4, columns))
    X = np.diag(rng.choice([-1, 1], columns) * np.exp(rng.normal(size=columns)))
    knobs = dict(bits=3, group_size=half if groups == 1 else groups)
    if act_order and groups == 1:
        static = True  # groups of permuted columns are other groups
    grid = "updated" if updated else "published"
    ours = gptq(W, Stats(X), act_order=act_order, static_groups=static, group_grid=grid, **knobs)
    plain = rtn(W, **knobs)
    for name in plain.stored:
        assert getattr(ours, name).tobytes() == getattr(plain, name).tobytes()


@PROPERTY
@given(st.integers(1, 8).flatmap(lambda n: inputs(2 * n)), SEEDS, st.integers(1, 20), st.integers(1, 20))
def test_without_groups_the_block_size_changes_no_byte(X, seed, one, other):
    W = np.random.default_rng(seed).normal(size=(3, X.shape[1]))
    for knobs in (
        dict(group_size=-1),
        dict(group_size=0, act_order=True),
        dict(group_size=2, static_groups=True),
        dict(group_size=2, group_grid="updated"),
    ):
        first, second = (gptq(W, Stats(X), block=block, **knobs) for block in (one, other))
        assert first.codes.tobytes() == second.codes.tobytes() and first.scale.tobytes() == second.scale.tobytes()


@PROPERTY
@given(st.integers(1, 8).flatmap(lambda n: inputs(n)), SEEDS, st.integers(-6, 6), FLAGS)
def test_a_factor_of_the_inputs_changes_no_byte(X, seed, power, act_order):
    """While no input is dead."""
    X = X + np.where(np.abs(X).max(axis=0) == 0, np.float32(1), np.float32(0))
    W = np.random.default_rng(seed).normal(size=(3, X.shape[1]))
    knobs = dict(group_size=1, act_order=act_order)
    one, other = (gptq(W, Stats(X * np.float32(f)), **knobs) for f in (1, 2.0**power))
    assert one.dense().tobytes() == other.dense().tobytes()


def test_a_third_as_factor_changes_no_code():
    W, X = example()
    one, other = (gptq(W, Stats(x), bits=3) for x in (X, X / np.float32(3)))
    assert (one.unpacked() == other.unpacked()).mean() > 0.999


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "knobs",
    [dict(), dict(group_size=-1), dict(act_order=True), dict(group_grid="updated"), dict(symmetric=True)],
    ids=str,
)
def test_far_better_than_rounding_on_correlated_inputs(bits, knobs):
    W, X = example()
    ours = gptq(W, Stats(X), bits=bits, **knobs)
    size = {name: value for name, value in knobs.items() if name in ("group_size", "symmetric")}
    assert output_error(W, X, ours) < 0.8 * output_error(W, X, rtn(W, bits=bits, **size))


@PROPERTY
@given(SEEDS, st.sampled_from((2, 3, 4)), FLAGS, FLAGS)
def test_never_worse_than_rounding_on_correlated_inputs(seed, bits, act_order, symmetric):
    """On the same grids, those of the original rows."""
    W, X = example(16, 32, 80, seed)
    knobs = dict(bits=bits, group_size=-1, symmetric=symmetric)
    ours = gptq(W, Stats(X), act_order=act_order, **knobs)
    scale, zero = ours.scales()
    grid = (FullRangeGrid if symmetric else AffineGrid)(bits, -1)
    codes = grid.encode(W, scale, None if symmetric else zero)
    plain = IntWeight.pack(grid, codes, scale, None if symmetric else zero.astype(np.uint8))
    assert output_error(W, X, ours) < output_error(W, X, plain)


@PROPERTY
@given(SEEDS, st.sampled_from((-1, 4, 8)))
def test_many_bits_leave_almost_no_error(seed, group_size):
    """8 bits are the most that a grid has: a step is a 255th of the range."""
    W, X = example(4, 16, 40, seed)
    record = gptq(W, Stats(X), bits=8, group_size=group_size, scale_dtype="float32")
    assert output_error(W, X, record) < 1e-4 * np.sum((X.astype(np.float64) @ W.T.astype(np.float64)) ** 2)


def test_each_bit_takes_a_quarter_of_the_error():
    W, X = example()
    errors = [output_error(W, X, gptq(W, Stats(X), bits=bits, scale_dtype="float32")) for bits in (2, 4, 6, 8)]
    for few, many in itertools.pairwise(errors):
        assert many < few / 8  # two bits more: a quarter of the step, a sixteenth of the error
    assert errors[-1] < 1e-4 * np.sum((X.astype(float) @ W.T.astype(float)) ** 2)


@PROPERTY
@given(st.integers(1, 6).flatmap(lambda n: inputs(3 * n)), SEEDS)
def test_act_order_stores_groups_in_rounding_order(X, seed):
    columns = X.shape[1]
    record = gptq(np.random.default_rng(seed).normal(size=(2, columns)), Stats(X), group_size=3, act_order=True)
    assert type(record) is Reordered and type(record.weight) is IntWeight
    diagonal = np.diag(Stats(X).H)
    assert (np.diff(np.where(diagonal > 0, diagonal, 1)[record.order]) <= 0).all()
    g_idx = integers(record)[3]
    assert sorted(g_idx.tolist()) == [i // 3 for i in range(columns)]  # a permuted group map
    np.testing.assert_array_equal(g_idx[record.order], np.arange(columns) // 3)


@PROPERTY
@given(st.integers(2, 8).flatmap(lambda n: inputs(n)), SEEDS)
def test_the_last_column_repairs_nothing(X, seed):
    """Changing its weight changes no other code, and the first code is that of plain rounding."""
    W = np.random.default_rng(seed).normal(size=(2, X.shape[1]))
    W[:, :1] = np.where(np.abs(X).max(axis=0)[0] > 0, W[:, :1], 0)
    knobs = dict(group_size=1, static_groups=True)
    first, other = (gptq(W * np.r_[np.ones(X.shape[1] - 1), f], Stats(X), **knobs).unpacked() for f in (1, -3))
    np.testing.assert_array_equal(first[:, :-1], other[:, :-1])
    np.testing.assert_array_equal(first[:, 0], rtn(W, group_size=1).unpacked()[:, 0])


@pytest.mark.parametrize("knobs", [dict(group_size=-1), dict(group_size=0), dict(group_size=32, static_groups=True)])
def test_act_order_needs_no_reordering_where_groups_are_those_of_the_weight(knobs):
    W, X = example()
    record = gptq(W, Stats(X), act_order=True, **knobs)
    assert type(record) is IntWeight
    own = rtn(W.astype(np.float64), group_size=knobs["group_size"])
    assert record.scale.tobytes() == own.scale.tobytes()
    assert output_error(W, X, record) < 0.6 * output_error(W, X, own)


def test_ties_in_act_order_go_to_the_first_column():
    record = gptq(np.ones((1, 6)), Stats(np.diag([1.0, 2, 2, 1, 2, 1])), group_size=2, act_order=True)
    assert record.order.tolist() == [1, 2, 4, 0, 3, 5]


def test_act_order_spends_its_care_on_large_inputs():
    W, X = example(seed=3)
    error = lambda **knobs: output_error(W, X, gptq(W, Stats(X), bits=2, group_size=-1, **knobs))
    assert error(act_order=True) < error()


def test_published_groups_lag_inside_a_block():
    """The two forms differ only for groups that open inside a block, and not at all in the first group."""
    W, X = example()
    stats = Stats(X)
    scales = lambda grid, block: gptq(W, stats, group_size=32, group_grid=grid, block=block).scale
    assert scales("published", 32).tobytes() == scales("updated", 32).tobytes() == scales("updated", 128).tobytes()
    late = scales("published", 128)
    assert late[:, 0].tobytes() == scales("updated", 128)[:, 0].tobytes()
    assert (late[:, 1:] != scales("updated", 128)[:, 1:]).mean() > 0.5
    # In one block of the whole width nothing has been passed on yet: the grids of the original weights.
    assert late.tobytes() == rtn(W.astype(np.float64), group_size=32).scale.tobytes()


def test_dead_inputs_get_zero_and_disturb_nobody():
    W, X = example()
    X[:, [3, 40]] = 0
    record = gptq(W, Stats(X), group_size=-1)
    assert not record.dense()[:, [3, 40]].any()
    other = W.copy()
    other[:, [3, 40]] *= -50  # their weights do not count, not even for the scale of the row
    assert gptq(other, Stats(X), group_size=-1).codes.tobytes() == record.codes.tobytes()


def test_inputs_that_are_all_zero_give_zeros():
    W, _ = example()
    for knobs in (dict(), dict(act_order=True), dict(symmetric=True, group_size=-1)):
        assert not gptq(W, Stats(np.zeros((5, 128), np.float32)), **knobs).dense().any()


def test_one_row_of_calibration_is_enough_while_damped():
    W, X = example()
    assert np.isfinite(gptq(W, Stats(X[:1])).dense()).all()


def test_the_kernels_change_no_byte(monkeypatch):
    W, X = example()
    monkeypatch.setenv("REFLLM_KERNELS", "numba")
    compiled = gptq(W, Stats(X), act_order=True)
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    plain = gptq(W, Stats(X), act_order=True)
    assert compiled.weight.codes.tobytes() == plain.weight.codes.tobytes()
    assert compiled.weight.scale.tobytes() == plain.weight.scale.tobytes()


@pytest.mark.parametrize(
    "knobs",
    [
        dict(),
        dict(bits=3, symmetric=True, group_size=-1),
        dict(group_size=0),
        dict(group_size=32, act_order=True),
        dict(group_size=32, act_order=True, static_groups=True),
        dict(group_size=32, group_grid="updated"),
    ],
    ids=str,
)
def test_codes_lie_far_from_their_boundaries(knobs):
    """So they are the same on every machine, in any order of sums."""
    W, X = example()
    stats = Stats(X)
    found = rounding_margins(W, stats, gptq(W, stats, **knobs), act_order=knobs.get("act_order", False))
    assert found.decisions == W.size and found.unsafe == 0
    assert 1e-6 < found.closest < 0.01 and found.safety > 10


def test_a_tie_of_exact_numbers_is_safe():
    W = np.array([[15.0, 2.5, 0.0]])
    found = rounding_margins(W, Stats(np.eye(3)), gptq(W, Stats(np.eye(3)), group_size=-1))
    assert found.closest == 2.0**-23 and found.unsafe == 0  # half a float32 step of 2.5, which is what decides


def test_a_value_on_its_boundary_is_reported():
    W = np.array([[15.0, 2.5 + 2.0**-23, 0.0]])  # float32 has 2.5 and 2.5 + 2^-22 around it
    found = rounding_margins(W, Stats(np.eye(3)), gptq(W, Stats(np.eye(3)), group_size=-1))
    assert found.closest == 0 and found.unsafe == 1


HASHES = {
    "bits=3": "81e68d6112be32e4",
    "bits=4,act_order=true,group=32": "a1e376685b5e2e0f",
    "bits=4,symmetric=true,group=-1": "285122f2a3bc3699",
}


@pytest.mark.parametrize("kernels", ["numba", "numpy"])
@pytest.mark.parametrize("recipe", HASHES)
def test_codes_are_the_same_on_every_machine(recipe, kernels, monkeypatch):
    """Inputs from integers, so that they are the same bits; everything after them is ours."""
    monkeypatch.setenv("REFLLM_KERNELS", kernels)
    X = np.array(dyadic(1, 12, -8, 300 * 192), np.float32).reshape(300, 192)
    X += np.roll(X, 1, axis=1) + np.roll(X, 5, axis=1)
    W = np.array(dyadic(2, 14, -12, 24 * 192), np.float32).reshape(24, 192)
    record = parse("gptq:" + recipe)[0]
    record = record.function(W, Stats(X), **record.knobs)
    digest = hashlib.sha256()
    for name, array in parts(record).items():
        digest.update(name.encode() + array.tobytes())
    assert digest.hexdigest()[:16] == HASHES[recipe]


SIZES = dict(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)
IDS = np.random.default_rng(0).integers(0, 40, 300)


@pytest.fixture(scope="module")
def model():
    return random_model(**SIZES)


def logits(model):
    return forward(model, IDS[:9])


@pytest.mark.parametrize(
    "knobs", ["act_order=true", "act_order=true,symmetric=true", "static_groups=true,act_order=true"]
)
def test_a_gptq_checkpoint_keeps_the_codes_and_their_groups(model, knobs, tmp_path):
    small = compress(model, f"gptq:bits=4,group=32,{knobs}", IDS)
    save(small, tmp_path / "m", "gptq")
    back = load(tmp_path / "m")
    name = "model.layers.1.mlp.down_proj"
    moved = "static" not in knobs
    assert type(back.weights[name + ".weight"]) is (Reordered if moved else IntWeight)
    for weight in (n for n in small.weights if n.endswith("proj.weight")):
        for ours, theirs in zip(integers(small.weights[weight]), integers(back.weights[weight]), strict=True):
            assert (ours is None) == (theirs is None) and (ours is None or (ours == theirs).all())
        np.testing.assert_array_equal(back.weights[weight].dense(), small.weights[weight].dense())
    # The file says which group an input is in, not its place there: sums of a group run in another order.
    np.testing.assert_allclose(logits(back), logits(small), atol=1e-4)
    stored, _ = read_safetensors(tmp_path / "m" / "model.safetensors")
    assert (np.diff(stored[name + ".g_idx"].stored()) < 0).any() == moved


@pytest.mark.parametrize(
    "recipe", ["gptq:bits=3,group=32,act_order=true", "quarot+gptq:bits=4,group=32", "gptq+kivi:group=8"]
)
def test_a_stored_model_runs(recipe, tmp_path):
    model = random_model(**SIZES) if "gptq+" not in recipe else random_model(**(SIZES | dict(intermediate_size=64)))
    small = compress(model, recipe, IDS)
    save(small, tmp_path / "m")
    back = load(tmp_path / "m")
    np.testing.assert_array_equal(logits(back), logits(small))
    size = lambda m: sum(w.nbytes for n, w in m.weights.items() if n.endswith("proj.weight"))
    assert size(small) == size(back) < size(model) / 4


def test_better_than_rounding_through_a_model(model):
    far = lambda recipe: np.sum((logits(compress(model, recipe, IDS)) - logits(model)) ** 2)
    for bits in (3, 4):
        assert far(f"gptq:bits={bits},group=32") < far(f"rtn:bits={bits},group=32")


def test_a_calibration_text_of_a_few_tokens_is_one_window(model):
    assert np.isfinite(logits(compress(model, "gptq:group=32", IDS[:3]))).all()


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("gptq:group=64", {}, r"cannot compress .*down_proj.weight .* group_size 64 does not divide the 96 columns"),
        ("gptq:group=32,damp=0", {}, "cannot compress .* singular .* raise damp"),
        ("wanda+gptq:group=32", {}, "needs calibration inputs, which the parts of a"),
        ("gptq:group=32", {"model.layers.0.mlp.up_proj.weight": np.nan}, "NaN or inf"),
    ],
)
def test_through_a_model_errors_are_one_line_too(model, recipe, change, message):
    weights = {name: np.full_like(w, change[name]) if name in change else w for name, w in model.weights.items()}
    with pytest.raises(ValueError, match=message) as caught:
        compress(replace(model, weights=weights), recipe, IDS[:40])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("knobs", "message"), [("bits=5", "5 bits; 2, 3, 4 or 8"), ("scale_dtype=float32", "float16")])
def test_what_a_gptq_checkpoint_cannot_hold_is_named(model, knobs, message, tmp_path):
    small = compress(model, f"gptq:group=32,{knobs}", IDS[:40])
    with pytest.raises(ValueError, match=message):
        save(small, tmp_path / "m", "gptq")


@pytest.mark.parametrize(
    ("W", "X", "knobs", "message"),
    [
        (np.array([[1.0, np.nan]]), np.ones((1, 2)), {"group_size": -1}, "NaN or Inf"),
        (np.ones((1, 8)), np.ones((1, 4)), {"group_size": -1}, "inputs have 4 columns, the weight has 8"),
        (np.ones((1, 6)), np.ones((1, 6)), {"group_size": 4}, "group_size 4 does not divide the 6 columns"),
        (np.ones((1, 6)), np.ones((1, 6)), {"group_size": -2}, "group_size must be .* got -2"),
        (np.ones((1, 4)), np.ones((1, 4)), {"group_size": -1, "bits": 1}, "bits must be 2 to 8, got 1"),
        (np.ones((1, 4)), np.ones((1, 4)), {"group_size": -1, "bits": 16}, "bits must be 2 to 8, got 16"),
        (np.ones((1, 4)), np.ones((1, 4)), {"group_size": -1, "block": 0}, "block must be at least 1 column, got 0"),
        (np.ones((1, 4)), np.ones((1, 4)), {"group_size": 2, "block": -8}, "block must be .* got -8"),
        (np.ones((1, 4)), np.ones((1, 4)), {"group_size": -1, "damp": -1.0}, "damp must be .* got -1"),
        (np.ones((1, 4)), np.ones((1, 4)), {"group_size": -1, "damp": np.nan}, "damp must be .* got nan"),
        (np.ones((1, 4)), np.ones((1, 4)), {"group_size": -1, "damp": 0.0}, "H is singular .* raise damp"),
        (
            np.ones((1, 4)),
            np.ones((1, 4)),
            {"group_grid": "fixed", "group_size": 2},
            "published or updated, got 'fixed'",
        ),
        (np.ones((1, 4)), np.ones((1, 4)), {"group_size": -1, "scale_dtype": "int8"}, "float16, float32"),
        (np.full((1, 4), 1e7), np.eye(4), {"group_size": -1}, "does not fit float16"),
        (np.ones(4), np.ones((1, 4)), {"group_size": -1}, "matrix"),
        (np.ones((0, 4)), np.ones((1, 4)), {"group_size": -1}, "matrix"),
    ],
)
def test_bad_input_is_one_clear_line(W, X, knobs, message):
    with pytest.raises(ValueError, match=message) as caught:
        gptq(W, Stats(X), **knobs)
    assert "\n" not in str(caught.value)
