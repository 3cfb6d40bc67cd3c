"""lkd: slopes against differences of the plain forward pass, steps against AdamW written out, streams, what is
stored is what was trained, losses that fall, and what it is worth beside zeroquant."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.evaluate.perplexity import documents
from refllm.formats.files import data_path
from refllm.kernels.autograd import Tensor, parameter
from refllm.kernels.fused import linear
from refllm.kernels.packed.records import IntWeight, TokenInputs
from refllm.kernels.straight_through import nearest
from refllm.methods.apply import compress
from refllm.methods.blockwise import lkd
from refllm.methods.blockwise.lkd import Plan, block_loss, learn, pack
from refllm.methods.quant import zeroquant
from refllm.model.equivalent import norm_readers
from refllm.model.llama import block, embed, forward
from refllm.model.native import save_native
from refllm.model.reconstruct import constants, mean_square, observe
from refllm.model.walk import layer_linears
from tests.models import random_model
from tests.strategies import weights

module = sys.modules["refllm.methods.blockwise.lkd"]
IDS = np.random.default_rng(3).integers(0, 64, 96)
NORM = "model.layers.0.input_layernorm.weight"
V, UP, DOWN = (f"model.layers.0.{name}_proj.weight" for name in ("self_attn.v", "mlp.up", "mlp.down"))


def one_layer(dtype=np.float32, seed=0, count=4):
    """A model of one layer, windows of its stream and what the layer makes of them."""
    model = random_model("llama", dtype, seed=seed, num_layers=1)
    inputs = [embed(model, part[None]) for part in IDS.reshape(count, -1)]
    return model, inputs, observe(model, 0, inputs, np.arange(inputs[0].shape[1]))[1]


def names(model, layer=0):
    return (*layer_linears(layer), *norm_readers(model.config, layer))


def trained(model, values):
    return replace(model, weights=model.weights | values)


# --- the loss and its slopes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_bits", [None, 4, 8])
def test_the_loss_is_that_of_the_stored_block(activation_bits):
    """The packed record in the plain forward pass gives what the tape gives."""
    plan = Plan(3, 8, activation_bits)
    model, inputs, _ = one_layer()
    packed = trained(model, {name: pack(model.weights[name], plan) for name in layer_linears(0)})
    for x in inputs:
        target = x + 1
        loss = block_loss(model, 0, constants({n: model.weights[n] for n in names(model)}), x, target, plan)
        expected = np.mean((block(packed, 0, x, np.arange(24)).astype(np.float64) - target) ** 2)
        assert float(loss.data) == pytest.approx(expected, rel=1e-3)  # a tie of rounded inputs may go either way


def test_slopes_are_those_of_the_plain_block_at_the_rounded_weights():
    """Inputs left alone, the loss is smooth in Q(w) and in gains: every weight has the slope that its Q has."""
    plan = Plan(3, 8, None, "float32")
    model, inputs, targets = one_layer(np.float64)
    x, target = inputs[0], targets[0] + 0.1
    leaves = {name: parameter(model.weights[name]) for name in names(model)}
    block_loss(model, 0, leaves, x, target, plan).backward()
    decoded = {name: pack(model.weights[name], plan).dense().astype(np.float64) for name in layer_linears(0)}
    at = lambda moved: np.mean((block(trained(model, decoded | moved), 0, x, np.arange(24)) - target) ** 2)
    rng = np.random.default_rng(1)
    for name, leaf in leaves.items():
        value = decoded.get(name, model.weights[name])
        for _ in range(3):
            direction = rng.normal(size=value.shape)
            slope = (at({name: value + 1e-6 * direction}) - at({name: value - 1e-6 * direction})) / 2e-6
            assert np.sum(leaf.grad * direction) == pytest.approx(slope, rel=1e-5, abs=1e-9), name


def test_a_weight_that_saturates_has_its_slope_and_the_scale_has_none():
    """By hand: 4 is stored as 3 with the step 1 (bits=3), 0.4 as 0. The loss is (y - t)^2 of y = 3 x_0 + 0 x_1."""
    w = parameter(np.array([[4.0, 0.4]]))
    loss = mean_square(linear(Tensor(np.array([[2.0, 1.0]])), nearest(w, Plan(3, -1).grid(2))), [np.array([[5.0]])])
    loss.backward()
    assert float(loss.data) == 1.0 and w.grad.tolist() == [[2 * 1 * 2, 2 * 1 * 1]]


# --- training --------------------------------------------------------------------------------------------------------


def test_steps_are_adamw_written_out():
    """The slow twin: passes over the windows, one a step, moments and their corrections number by number."""
    model, inputs, targets = one_layer(np.float64, count=2)
    plan, rate, first = Plan(2, 8), 1e-3, {name: model.weights[name] for name in names(model)}
    values = {name: value.copy() for name, value in first.items()}
    m, v = ({name: np.zeros_like(value) for name, value in first.items()} for _ in range(2))
    for step in range(3 * 2):
        leaves = {name: parameter(value) for name, value in values.items()}
        block_loss(model, 0, leaves, inputs[step % 2], targets[step % 2], plan).backward()
        for name, leaf in leaves.items():
            m[name] = 0.9 * m[name] + 0.1 * leaf.grad
            v[name] = 0.999 * v[name] + 0.001 * leaf.grad**2
            corrected = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
            values[name] = values[name] - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    learned = learn(model, 0, inputs, targets, plan, epochs=3, rate=rate)
    assert set(learned) == set(first)
    for name in first:
        assert np.allclose(learned[name], values[name], rtol=0, atol=1e-9) and not np.array_equal(
            values[name], first[name]
        )


@pytest.mark.parametrize("plan", [Plan(2, 8), Plan(3, -1, None), Plan(4, 16, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_on_the_calibration_falls(plan, seed):
    model, inputs, targets = one_layer(seed=seed)
    loss = lambda values, i: float(block_loss(model, 0, constants(values), inputs[i], targets[i], plan).data)
    mean = lambda epochs: np.mean(
        [loss(learn(model, 0, inputs, targets, plan, epochs=epochs, rate=1e-3), i) for i in range(4)]
    )
    losses = [mean(epochs) for epochs in (0, 4, 16)]
    assert losses[1] < losses[0] and losses[2] < 0.9 * losses[0]


def test_without_training_it_is_zeroquant():
    model = random_model("llama")
    for knobs in (dict(bits=3, group_size=8), dict(bits=8, group_size=16, activation_bits=4)):
        for small in (lkd(model, IDS, epochs=0, **knobs), lkd(model, IDS, epochs=1, rate=1e3, **knobs)):  # dropped
            for layer in range(2):
                for name in layer_linears(layer):
                    stored, expected = small.weights[name], zeroquant(model.weights[name], **knobs)
                    assert stored.form == expected.form and stored.nbytes == expected.nbytes
                    assert np.array_equal(stored.weight.unpacked(), expected.weight.unpacked())
                    assert np.array_equal(stored.dense(), expected.dense())
                for norm in norm_readers(model.config, layer):
                    assert np.array_equal(small.weights[norm], model.weights[norm])


@given(weights(columns=st.just(8)), st.integers(2, 8), st.sampled_from([4, 8, -1]), st.integers(2, 8))
def test_the_record_is_that_of_zeroquant_and_what_the_loss_decodes(W, bits, group_size, activation_bits):
    plan = Plan(bits, group_size, activation_bits)
    record, plain = pack(W, plan), zeroquant(W, bits=bits, group_size=group_size, activation_bits=activation_bits)
    assert record.form == plain.form and np.array_equal(record.weight.unpacked(), plain.weight.unpacked())
    assert np.array_equal(record.dense(), nearest(Tensor(W), plan.grid(8)).data)
    assert np.array_equal(record.dense(), plain.dense())


@pytest.mark.parametrize("activation_bits", [None, 6])
def test_what_is_stored_is_what_was_trained(monkeypatch, activation_bits):
    seen = []
    monkeypatch.setattr(module, "learn", lambda *a, **k: seen.append(learn(*a, **k)) or seen[-1])
    model = random_model("llama")
    small = lkd(model, IDS, bits=3, group_size=8, activation_bits=activation_bits, epochs=3, rate=1e-3)
    for layer, learned in enumerate(seen):
        for norm in norm_readers(model.config, layer):
            assert np.array_equal(small.weights[norm], learned[norm]) and not np.array_equal(
                learned[norm], model.weights[norm]
            )
        for name in layer_linears(layer):
            assert np.array_equal(small.weights[name].dense(), pack(learned[name], Plan(3, 8)).dense())
            assert not np.array_equal(small.weights[name].dense(), pack(model.weights[name], Plan(3, 8)).dense())
    others = set(model.weights) - set(names(model, 0)) - set(names(model, 1))
    assert len(seen) == 2 and others and all(small.weights[n] is model.weights[n] for n in others)


# --- the streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_teacher_and_student_see_the_same_input(monkeypatch, compressed):
    calls = []
    monkeypatch.setattr(module, "learn", lambda *a, **k: calls.append(a) or learn(*a, **k))
    model = random_model("llama")
    small = lkd(model, IDS, bits=2, group_size=8, epochs=1, step_tokens=48, compressed_inputs=compressed)
    at = np.arange(48)
    stream = exact = [embed(model, part[None]) for part in IDS.reshape(2, 48)]
    for layer, (_, number, inputs, targets, _) in enumerate(calls):
        assert number == layer
        for i in range(2):
            assert np.array_equal(inputs[i], stream[i])
            assert np.array_equal(targets[i], block(model, layer, stream[i], at))
        exact = [block(model, layer, x, at) for x in exact]
        stream = [block(small, layer, x, at) for x in stream] if compressed else exact
    assert len(calls) == 2 and np.array_equal(stream[0], exact[0]) != compressed


def test_on_the_exact_stream_no_block_depends_on_how_another_was_compressed():
    model = random_model("llama")
    whole = lkd(model, IDS, bits=3, group_size=8, epochs=2)
    tokens = [embed(model, IDS[None])]
    inputs = [block(model, 0, x, np.arange(96)) for x in tokens]
    targets = [block(model, 1, x, np.arange(96)) for x in inputs]
    alone = learn(model, 1, inputs, targets, Plan(3, 8), epochs=2)
    for name in layer_linears(1):
        assert np.array_equal(whole.weights[name].dense(), pack(alone[name], Plan(3, 8)).dense())


# --- the method ------------------------------------------------------------------------------------------------------


def test_forms_of_inputs():
    model = random_model("llama", num_layers=1)
    kinds = [lkd(model, IDS, group_size=8, epochs=0, activation_bits=b).weights[UP] for b in (8, 4, None)]
    assert [getattr(kind, "form", None) for kind in kinds] == ["int8", "int4", None]
    assert type(kinds[2]) is IntWeight


def test_weights_that_are_all_zero():
    """Their slopes are not zero: they may begin to help. Numbers stay finite."""
    model = random_model("llama", num_layers=1)
    model.weights[UP] = np.zeros_like(model.weights[UP])
    small = lkd(model, IDS, group_size=8, activation_bits=4, epochs=2)
    assert np.isfinite(small.weights[UP].dense()).all() and np.isfinite(forward(small, IDS)).all()


def test_weights_that_are_not_finite():
    model = random_model("llama", num_layers=1)
    model.weights[V][0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or"):
        lkd(model, IDS, group_size=8)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(group_size=0), "positive or -1"),
        (dict(group_size=20), "group_size 20 does not divide the 32 columns"),
        (dict(bits=9), "bits must be 2 to 8, got 9"),
        (dict(activation_bits=1), "activation_bits must be 2 to 8, or none, got 1"),
        (dict(epochs=-1), "epochs must be 0 or more"),
        (dict(step_tokens=0), "step_tokens 1 or more"),
        (dict(rate=np.inf), "rate finite and not negative"),
        (dict(rate=-1.0), "rate finite and not negative"),
        (dict(scale_dtype="float64"), "scale_dtype must be one of"),
    ],
)
def test_knobs_that_make_no_sense(knobs, message):
    with pytest.raises(ValueError, match=message):
        lkd(random_model("llama"), IDS, **(dict(group_size=8) | knobs))


def test_models_it_cannot_take():
    with pytest.raises(ValueError, match="is packed"):
        lkd(compress(random_model("llama"), "rtn:group=8"), IDS)
    with pytest.raises(ValueError, match="plain Llama only"):
        lkd(random_model("gemma3"), IDS, group_size=8)


def test_it_composes_is_counted_stored_and_loaded(tmp_path):
    recipe = "smoothquant+lkd:bits=4,group=8,epochs=1+rtn:bits=8,group=32,only=embed_tokens+kivi:group=8,residual=8"
    small = compress(random_model("llama"), recipe, IDS)
    assert small.weights[DOWN].nbytes == 32 * 48 // 2 + 32 * 6 * 2
    save_native(small, tmp_path / "m")
    back = refllm.load(tmp_path / "m")
    assert type(back.weights[DOWN]) is TokenInputs
    assert np.array_equal(back.weights[DOWN].dense(), small.weights[DOWN].dense())
    assert np.array_equal(back.weights[NORM], small.weights[NORM])
    assert np.array_equal(forward(back, IDS[:20]), forward(small, IDS[:20]))


def test_reports_are_of_the_weights_before_training():
    model, reports = random_model("llama"), []
    small = lkd(model, IDS, on_report=reports.append, bits=4, group_size=8, epochs=2, rate=1e-3)
    assert [r.name for r in reports] == [n for layer in range(2) for n in layer_linears(layer)]
    for r in reports:
        W = model.weights[r.name].astype(np.float64)
        assert r.weight_error == pytest.approx(np.sum((W - small.weights[r.name].dense()) ** 2) / np.sum(W**2))
        assert 0 < r.output_error < 0.1


# --- what it is worth ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model = refllm.load("tiny")
    read = lambda name: documents(data_path(name).read_text(encoding="utf-8"))
    calibration = np.concatenate([model.tokenizer.encode(story) for story in read("tiny/calib.txt")])[:1024]
    stories = [model.tokenizer.encode(story) for story in read("tiny/eval.txt")[:8]]
    return model, calibration, lambda m: refllm.perplexity(m, stories, protocol="document", window=512)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_quarter_of_what_rounding_costs_is_won_at_least(tiny, bits):
    """8-bit inputs, a few passes: the perplexity lost to zeroquant, and to lkd; equal bytes."""
    model, calibration, perplexity = tiny
    knobs = f"bits={bits},group=128"
    plain, taught = compress(model, f"zeroquant:{knobs}"), compress(model, f"lkd:{knobs},epochs=4", calibration)
    nbytes = lambda m: sum(w.nbytes for w in m.weights.values())
    assert nbytes(plain) == nbytes(taught)
    exact = perplexity(model)
    assert perplexity(taught) - exact < 0.75 * (perplexity(plain) - exact)
