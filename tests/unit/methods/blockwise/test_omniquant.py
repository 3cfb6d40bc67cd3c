"""omniquant: gradients against differences, limits that are min-max, moves that cancel, what is stored is what was
learned, losses that fall, and what it is worth."""

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
from refllm.kernels.packed.records import IntWeight, TokenInputs
from refllm.methods.apply import compress
from refllm.methods.blockwise import omniquant
from refllm.methods.blockwise.omniquant import (
    Plan,
    block_loss,
    clipped_grid,
    first_scales,
    first_values,
    learn,
    pack,
    rounded_weight,
    scaled_weights,
)
from refllm.methods.quant import rtn
from refllm.model.differentiable import block_states
from refllm.model.equivalent import divide_keys, divide_norm, divide_values, norm_readers
from refllm.model.llama import block, embed, forward
from refllm.model.native import save_native
from refllm.model.planter import plant_outliers
from refllm.model.reconstruct import observe
from refllm.model.walk import layer_linears
from tests.models import random_model
from tests.strategies import PROPERTY, weights

module = sys.modules["refllm.methods.blockwise.omniquant"]
IDS = np.random.default_rng(3).integers(0, 64, 96)
SEEDS = st.integers(0, 10**6)
BITS = st.integers(2, 8)
ALL = Plan(3, 8, activation_bits=4, attention_bits=4)
Q, K, V, O, UP, DOWN = (
    f"model.layers.0.{name}_proj.weight"
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.up", "mlp.down")
)


def tensors(values):
    return {name: Tensor(value) for name, value in values.items()}


def limits(name, shape, hi, lo, dtype=np.float32):
    return {f"{name}.hi": Tensor(np.full(shape, hi, dtype)), f"{name}.lo": Tensor(np.full(shape, lo, dtype))}


def one_block(plan=ALL, dtype=np.float32, alpha=0.5, seed=0):
    """A layer's first values, shaken, one window and what the uncompressed block makes of it."""
    model = random_model("llama", dtype, seed=seed)
    x = embed(model, IDS[None, :24])
    stats, (target,) = observe(model, 0, [x], np.arange(24))
    rng = np.random.default_rng(seed)
    values = first_values(model, 0, stats, plan, alpha=alpha)
    shaken = {
        name: (value * np.exp(0.2 * rng.normal(size=value.shape))).astype(dtype) for name, value in values.items()
    }
    return model, shaken, x, target


def model_with(model, replaced):
    return replace(model, weights=model.weights | {name: W.data for name, W in replaced.items()})


# --- the grid --------------------------------------------------------------------------------------------------------


def slow_grid(group, hi, lo, bits, symmetric, dtype):
    """Scale, zero point and decoded numbers of one group, number by number in float32."""
    f = np.float32
    share = lambda c: (f(1) if c >= 0 else np.exp(f(c))) / (f(1) + np.exp(-abs(f(c))))
    hi = share(hi) * max(f(0), *group)
    lo = share(lo) * min(f(0), *group)
    exact = max(hi, -lo) / f(2 ** (bits - 1) - 1) if symmetric else (hi - lo) / f(2**bits - 1)
    scale = f(np.dtype(dtype).type(min(max(exact, f(1e-5)), f(1e4))))
    levels = 2**bits - 1
    zero = 2 ** (bits - 1) if symmetric else min(max(round(float(-lo / scale)), 0), levels)
    codes = [min(max(round(float(w / scale)) + zero, 0), levels) for w in group]
    return scale, zero, [f(c - zero) * scale for c in codes]


@PROPERTY
@given(weights(columns=st.just(8)), BITS, st.booleans(), st.sampled_from(["float16", "float32"]), SEEDS)
def test_the_grid_against_a_slow_twin(W, bits, symmetric, dtype, seed):
    plan, rng = Plan(bits, 4, dtype, symmetric), np.random.default_rng(seed)
    c = {f"w.{end}": rng.normal(2, 2, (len(W), 2, 1)).astype(np.float32) for end in ("hi", "lo")}
    scale, zero = clipped_grid(Tensor(W), tensors(c), "w", plan)
    decoded = rounded_weight(Tensor(W), tensors(c), "w", plan).data
    for row in range(len(W)):
        for group in range(2):
            part = slice(4 * group, 4 * group + 4)
            ends = (c["w.hi"][row, group, 0], c["w.lo"][row, group, 0])
            s, z, numbers = slow_grid(W[row, part], *ends, bits, symmetric, dtype)
            assert scale.data[row, group, 0] == s
            assert symmetric or zero.data[row, group, 0] == z
            assert decoded[row, part].tolist() == numbers


def test_by_hand():
    """-3 .. 4.5 at 2 bits: min-max has the step 2.5. With half of the upper end left (c = 0) it is 1.75."""
    W, plan = np.float32([[-3.0, -1.0, 1.0, 4.5]]), Plan(2, -1, "float32")
    whole = rounded_weight(Tensor(W), limits("w", (1, 1, 1), 40, 40), "w", plan).data
    half = rounded_weight(Tensor(W), limits("w", (1, 1, 1), 0, 40), "w", plan).data
    assert whole.tolist() == [[-2.5, 0.0, 0.0, 5.0]] and half.tolist() == [[-3.5, -1.75, 1.75, 1.75]]
    plan = replace(plan, symmetric=True)  # 4.5 / 1: codes -2, -1, 0, 1
    assert rounded_weight(Tensor(W), limits("w", (1, 1, 1), 40, 40), "w", plan).data.tolist() == [[-4.5, 0, 0, 4.5]]
    halves = rounded_weight(Tensor(W), limits("w", (1, 1, 1), -40, 0), "w", plan).data
    assert halves.tolist() == [[-3.0, -1.5, 1.5, 1.5]]  # the end of the grid below is one step longer


@given(weights(columns=st.sampled_from([4, 8, 24])), BITS, st.booleans())
def test_no_clipping_is_rounding_to_nearest(W, bits, symmetric):
    """sigmoid of a large number is exactly 1; groups of zeros have another scale, and are zeros."""
    plan = Plan(bits, 4, symmetric=symmetric)
    record = pack(Tensor(W), limits("w", (len(W), W.shape[1] // 4, 1), 1e3, 1e3), "w", plan)
    nearest = rtn(W, bits=bits, group_size=4, symmetric=symmetric)
    amax = np.abs(W).reshape(len(W), -1, 4).max(axis=-1)
    large = np.repeat(amax > 2e-5 * 2**bits, 4, axis=1)  # the least step is 1e-5
    assert np.array_equal(record.dense()[large], nearest.dense()[large])
    assert np.array_equal(record.unpacked()[large], nearest.unpacked()[large])
    assert np.abs(record.dense() - W)[~large].max(initial=0) <= 2e-5 * 2**bits


@given(weights(columns=st.just(8)), BITS, st.booleans(), SEEDS, st.sampled_from([None, 4]))
def test_what_is_stored_is_what_was_learned(W, bits, symmetric, seed, activation_bits):
    plan, rng = Plan(bits, 4, symmetric=symmetric, activation_bits=activation_bits), np.random.default_rng(seed)
    c = tensors({f"w.{end}": rng.normal(2, 2, (len(W), 2, 1)).astype(np.float32) for end in ("hi", "lo")})
    assert np.array_equal(pack(Tensor(W), c, "w", plan).dense(), rounded_weight(Tensor(W), c, "w", plan).data)


def test_without_learned_clipping_ranges_are_those_of_the_weight():
    W = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    assert np.array_equal(pack(Tensor(W), {}, "w", Plan(3, 4)).dense(), rtn(W, bits=3, group_size=4).dense())


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_gradients_against_differences_with_frozen_rounding(symmetric, second, monkeypatch):
    """The block's loss with every rounding and clipping decision frozen is smooth, and its slopes are the gradients.

    rint(u) is replaced by u + d, with the d that it adds at this point; what is clipped here stays clipped.
    """
    plan = Plan(3, 8, "float32", symmetric, activation_bits=4, attention_bits=4)
    model, values, x, target = one_block(plan, np.float64)
    targets = (target, target + 0.1) if second else (target,)
    leaves = {name: parameter(value) for name, value in values.items()}
    loss = block_loss(model, 0, leaves, x, targets, plan)
    loss.backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves.values())
    added, decided = freeze(monkeypatch)
    at = lambda moved: float(block_loss(model, 0, tensors(moved), x, targets, plan).data)
    assert at(values) == pytest.approx(float(loss.data), rel=1e-12)
    added.learn = decided.learn = False
    rng = np.random.default_rng(1)
    checked = 0
    for name, value in values.items():
        direction = rng.normal(size=value.shape)
        ends = [at(values | {name: value + h * direction}) for h in (1e-6, -1e-6)]
        expected = (ends[0] - ends[1]) / 2e-6
        size = abs(leaves[name].grad * direction).sum()
        assert np.sum(leaves[name].grad * direction) == pytest.approx(expected, rel=1e-5, abs=1e-6 * size + 1e-9), name
        checked += size > 1e-6
    assert checked >= 17  # seven linears with two ends, and scales


class Memory:
    """What was noted in one run, given back in the same order in every further one."""

    def __init__(self):
        self.learn, self.notes, self.next = True, [], 0

    def __call__(self, compute):
        if self.learn:
            self.notes.append(compute())
            return self.notes[-1]
        note = self.notes[self.next % len(self.notes)]
        self.next += 1
        return note


def freeze(monkeypatch):
    """Straight-through operators replaced by smooth ones that equal them at the point of their first run."""
    through = module.through
    added, decided = Memory(), Memory()

    def quantize(x, scale, zero, levels):
        zero = zero.data if isinstance(zero, Tensor) else zero
        ratio = x.data / scale.data
        extra = added(lambda: np.rint(ratio) - ratio)
        free, codes = decided(lambda: inside(np.rint(ratio) + zero, levels))
        return Tensor(scale.data * np.where(free, ratio + extra, codes - zero))

    def inside(codes, levels):
        return (codes >= 0) & (codes <= levels), np.clip(codes, 0, levels)

    def zero_point(lo, scale, levels):
        exact = -lo.data / scale.data
        extra = added(lambda: np.rint(exact) - exact)
        free, codes = decided(lambda: inside(np.rint(exact), levels))
        return Tensor(np.where(free, exact + extra, codes))

    monkeypatch.setattr(through, "quantize", quantize)
    monkeypatch.setattr(through, "zero_point", zero_point)
    store = lambda x, dtype: Tensor(x.data + added(lambda: x.data.astype(dtype) - x.data))
    monkeypatch.setattr(through, "store", store)
    return added, decided


def test_without_rounded_keys_their_factor_has_no_gradient():
    """Rows of q and k keep their codes whatever factor they take, and in the scores it cancels: only then it is left
    out, for AdamW would follow the rounding errors."""
    model, values, x, target = one_block(ALL, np.float64)
    for plan, matters in ((ALL, True), (replace(ALL, attention_bits=None), False)):
        exact = replace(plan, scale_dtype="float32")
        leaves = {name: parameter(value) for name, value in values.items()}
        block_loss(model, 0, leaves, x, (target,), exact).backward()
        others = np.abs(leaves["let.values"].grad).max()
        assert (np.abs(leaves["let.keys"].grad).max() > 1e-5 * others) == matters
        assert ("let.keys" in first_values(model, 0, *observed(model), plan, alpha=0.5)) == matters


def observed(model):
    return (observe(model, 0, [embed(model, IDS[None, :24])], np.arange(24))[0],)


# --- scales of channels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_scales_alone_leave_the_function(heads):
    model = random_model("llama", np.float64, num_kv_heads=heads)
    values = first_values(model, 0, *observed(model), ALL, alpha=0.5)
    rng = np.random.default_rng(0)
    moved = {name: Tensor(value * np.exp(rng.normal(size=value.shape))) for name, value in values.items()}
    scaled = model_with(model, scaled_weights(model, 0, moved))
    a, b = forward(scaled, IDS), forward(model, IDS)
    assert np.abs(a - b).max() <= 1e-11 * np.abs(b).max()
    changed = {n for n in model.weights if not np.array_equal(scaled.weights[n], model.weights[n])}
    assert {Q, K, V, O, UP} <= changed and DOWN not in changed  # down has none


def test_moves_are_those_of_the_transforms():
    model, values, _, _ = one_block(ALL, np.float64)
    weights = dict(model.weights)
    for norm, readers in norm_readers(model.config, 0).items():
        divide_norm(weights, model.config, norm, readers, values[f"let.{norm}"])
    divide_values(weights, model.config, 0, values["let.values"].ravel())
    divide_keys(weights, model.config, 0, values["let.keys"])
    for name, W in scaled_weights(model, 0, tensors(values)).items():
        assert np.allclose(W.data, weights[name], rtol=1e-13, atol=0), name


def test_scales_are_never_below_a_hundredth_and_can_come_back():
    model, values, _, _ = one_block(ALL, np.float64)
    low = parameter(np.full_like(values["let.values"], 1e-5))
    weights = scaled_weights(model, 0, {"let.values": low})
    assert np.allclose(weights[V].data, model.weights[V] * 100)
    weights[V].sum().backward()
    assert (low.grad != 0).all()


def test_first_values_by_hand():
    """a^alpha / w^(1 - alpha): w of q alone, of up alone; of v the largest of the heads that share it; c = 4."""
    model = random_model("llama", np.float64)
    stats = observed(model)[0]
    values = first_values(model, 0, stats, Plan(4, 8, attention_bits=4), alpha=0.75)
    columns = lambda name: np.abs(model.weights[name]).max(axis=0)
    norm, after = (f"let.model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention"))
    assert np.allclose(values[norm], stats[Q].absmax ** 0.75 / columns(Q) ** 0.25)
    assert np.allclose(values[after], stats[UP].absmax ** 0.75 / columns(UP) ** 0.25)
    a, w = (x.reshape(2, 2, 8).max(axis=1) for x in (stats[O].absmax, columns(O)))
    assert np.allclose(values["let.values"], a**0.75 / w**0.25)
    assert values["let.keys"].shape == (2, 4) and (values["let.keys"] == 1).all()
    assert values[f"{DOWN}.hi"].shape == (32, 6, 1) and (values[f"{DOWN}.lo"] == 4).all()
    assert 1 / (1 + np.exp(-4)) == pytest.approx(0.982, abs=1e-4)
    assert {name for name in values if name.startswith("let.")} == {norm, after, "let.values", "let.keys"}
    assert first_values(model, 0, stats, Plan(), lwc=False) == {}


def test_dead_inputs_and_weights_have_a_scale():
    assert first_scales(np.array([0.0, 4.0]), np.array([1.0, 0.0]), 0.5).tolist() == [
        0.01,
        pytest.approx(2 / 1e-5**0.5),
    ]
    assert first_scales(np.array([0.0]), np.array([0.0]), 0.5).tolist() == [1.0]


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [Plan(2, 8), ALL, Plan(3, -1, symmetric=True, activation_bits=4)])
def test_the_loss_on_the_calibration_falls(plan):
    model = random_model("llama")
    inputs = [embed(model, part[None]) for part in IDS.reshape(4, 24)]
    stats, outputs = observe(model, 0, inputs, np.arange(24))
    targets = [(y,) for y in outputs]
    first = first_values(model, 0, stats, plan, alpha=0.5)
    of = lambda values, i: float(block_loss(model, 0, tensors(values), inputs[i], targets[i], plan).data)
    mean = lambda values: np.mean([of(values, i) for i in range(4)])
    losses = [mean(learn(model, 0, first, inputs, targets, plan, epochs=n, clip_rate=0.05)) for n in (0, 5, 20)]
    assert losses[0] == mean(first) and losses[1] < 0.99 * losses[0] and losses[2] < losses[1]


def test_what_makes_it_worse_is_dropped():
    """A rate far too large: the first values come back."""
    model, _, x, target = one_block(Plan(4, 8))
    first = first_values(model, 0, *observed(model), Plan(4, 8))
    learned = learn(model, 0, first, [x], [(target,)], Plan(4, 8), epochs=2, clip_rate=1e3)
    assert learned is first


def test_rates_are_those_of_their_kind():
    """A first step of AdamW moves everything with a gradient by its rate."""
    model, _, x, target = one_block(ALL, np.float64)
    first = first_values(model, 0, *observed(model), ALL, alpha=0.5)
    far = target + 5.0  # so that the step is kept
    learned = learn(model, 0, first, [x], [(far,)], ALL, epochs=1, clip_rate=1e-3, let_rate=2e-3)
    assert learned is not first
    for name, value in learned.items():
        steps = np.abs(value - first[name])
        assert steps.max() == pytest.approx(2e-3 if name.startswith("let.") else 1e-3, rel=1e-2)


def test_targets_are_of_the_uncompressed_stream_and_inputs_of_the_compressed_one(monkeypatch):
    calls = []
    real = module.learn
    monkeypatch.setattr(module, "learn", lambda *a, **k: calls.append(a) or real(*a, **k))
    model = random_model("llama")
    small = omniquant(model, IDS, bits=2, group_size=8, epochs=1, step_tokens=48, second_loss=True)
    exact = inputs = [embed(model, part[None]) for part in IDS.reshape(2, 48)]
    for layer, (_, at, _, seen, targets, _) in enumerate(calls):
        assert at == layer
        own = [block(model, layer, x, np.arange(48)) for x in inputs]
        exact = [block(model, layer, x, np.arange(48)) for x in exact]
        for i in range(2):
            assert np.array_equal(seen[i], inputs[i])
            assert np.array_equal(targets[i][0], exact[i]) and np.array_equal(targets[i][1], own[i])
        inputs = [block(small, layer, x, np.arange(48)) for x in inputs]
    assert len(calls) == 2 and not np.array_equal(inputs[0], exact[0])


@pytest.mark.parametrize("activation_bits", [None, 6])
def test_the_stored_block_is_the_one_that_was_learned(activation_bits):
    """Folding and the temporary form of learning agree: codes to the last bit, outputs within float32."""
    knobs = dict(bits=3, group_size=8, activation_bits=activation_bits, epochs=1, let=True, step_tokens=48)
    plan = Plan(3, 8, activation_bits=activation_bits)
    model, seen = random_model("llama", num_layers=1), []
    real = module.learn
    module.learn = lambda *a, **k: seen.append(real(*a, **k)) or seen[-1]
    try:
        small = omniquant(model, IDS, **knobs)
    finally:
        module.learn = real
    learned = tensors(seen[0])
    params = scaled_weights(model, 0, learned)
    for norm in norm_readers(model.config, 0):
        assert np.array_equal(small.weights[norm], params[norm].data)
    for name in layer_linears(0):
        params[name] = rounded_weight(params[name], learned, name, plan)
        assert np.array_equal(small.weights[name].dense(), params[name].data)
    x = embed(model, IDS[None, :30])
    temporary = block_states(params, model.config, 0, Tensor(x[0]), 1, 30, at_linears=plan.at_linears).data
    stored = block(small, 0, x, np.arange(30))[0]
    different = np.abs(temporary - stored) > 1e-4 * np.abs(stored).max()
    assert different.mean() < (0.01 if activation_bits is None else 0.05)  # a tie of rounded inputs may go either way


def test_weights_that_are_all_zero():
    model = random_model("llama", num_layers=1)
    model.weights[UP] = np.zeros_like(model.weights[UP])
    small = omniquant(model, IDS, group_size=8, activation_bits=4, epochs=2)
    assert not small.weights[UP].dense().any() and np.isfinite(forward(small, IDS)).all()


# --- the method ------------------------------------------------------------------------------------------------------


def test_scales_come_with_rounded_activations():
    """The authors' runs: without activations LWC alone, with them both."""
    model = random_model("llama", num_layers=1)
    gain = "model.layers.0.input_layernorm.weight"
    for knobs, moved in (({}, False), (dict(activation_bits=4), True), (dict(activation_bits=4, let=False), False)):
        small = omniquant(model, IDS, group_size=8, epochs=0, **knobs)
        assert np.array_equal(small.weights[gain], model.weights[gain]) != moved
        assert type(small.weights[UP]) is (TokenInputs if "activation_bits" in knobs else IntWeight)


def test_forms_of_inputs():
    model = random_model("llama", num_layers=1)
    forms = [
        omniquant(model, IDS, group_size=8, epochs=0, activation_bits=b, activation_symmetric=s).weights[UP].form
        for b, s in ((4, False), (6, False), (8, True))
    ]
    assert forms == ["uint4", "uint6", "int8"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(group_size=0), "positive or -1"),
        (dict(group_size=20), "group_size 20 does not divide the 32 columns"),
        (dict(bits=9), "bits must be 2 to 8, got 9"),
        (dict(activation_bits=1), "activation_bits must be 2 to 8, or none, got 1"),
        (dict(attention_bits=9), "attention_bits must be 2 to 8, or none, got 9"),
        (dict(alpha=1.5), "alpha must lie between 0 and 1"),
        (dict(epochs=-1), "epochs be 0 or more"),
        (dict(step_tokens=0), "step_tokens 1 or more"),
        (dict(let_rate=np.nan), "rates finite, not negative"),
        (dict(scale_dtype="float64"), "scale_dtype must be one of"),
    ],
)
def test_knobs_that_make_no_sense(knobs, message):
    with pytest.raises(ValueError, match=message):
        omniquant(random_model("llama"), IDS, **(dict(group_size=8) | knobs))


def test_models_it_cannot_take():
    with pytest.raises(ValueError, match="is packed"):
        omniquant(compress(random_model("llama"), "rtn:group=8"), IDS)
    with pytest.raises(ValueError, match="plain Llama only"):
        omniquant(random_model("gemma3"), IDS, group_size=8)


def test_it_composes_is_counted_stored_and_loaded(tmp_path):
    recipe = "smoothquant+omniquant:bits=4,group=8,activation_bits=8,activation_symmetric=yes,epochs=1"
    small = compress(
        random_model("llama"), recipe + "+rtn:bits=8,group=32,only=embed_tokens+kivi:group=8,residual=8", IDS
    )
    assert small.weights[DOWN].nbytes == 32 * 48 // 2 + 32 * 6 * 2 + 32 * 6 // 2
    save_native(small, tmp_path / "m")
    back = refllm.load(tmp_path / "m")
    assert type(back.weights[DOWN]) is TokenInputs
    assert np.array_equal(back.weights[DOWN].dense(), small.weights[DOWN].dense())
    assert np.array_equal(forward(back, IDS[:20]), forward(small, IDS[:20]))


def test_reports_are_of_the_scaled_weights():
    model, reports = random_model("llama"), []
    small = omniquant(model, IDS, on_report=reports.append, bits=8, group_size=8, activation_bits=8, epochs=0)
    assert [r.name for r in reports] == [n for layer in range(2) for n in layer_linears(layer)]
    assert all(r.weight_error < 1e-3 and r.output_error < 1e-3 for r in reports)
    assert np.abs(small.weights[V].dense() - model.weights[V]).max() > 0.05  # though what is stored is another matrix


# --- what it is worth ------------------------------------------------------------------------------------------------


def tiny_texts():
    model = refllm.load("tiny")
    read = lambda name: documents(data_path(name).read_text(encoding="utf-8"))
    calibration = np.concatenate([model.tokenizer.encode(story) for story in read("tiny/calib.txt")])[:1024]
    return model, calibration, [model.tokenizer.encode(story) for story in read("tiny/eval.txt")[:8]]


def test_three_bits_are_better_than_rounding_to_nearest():
    """Half of what rounding costs is left or less; default knobs, in a few seconds."""
    model, calibration, stories = tiny_texts()
    perplexity = lambda m: refllm.perplexity(m, stories, protocol="document", window=512)
    exact = perplexity(model)
    nearest, learned = (perplexity(compress(model, f"{m}:bits=3,group=128", calibration)) for m in ("rtn", "omniquant"))
    assert learned - exact < 0.75 * (nearest - exact)


def test_four_bits_of_weights_and_activations_survive_loud_channels():
    """Rounding to nearest is lost where a few channels are tens of times larger; learned scales are not."""
    model, calibration, stories = tiny_texts()
    model = plant_outliers(model)
    perplexity = lambda m: refllm.perplexity(m, stories, protocol="document", window=512)
    nearest = compress(model, "rtn:bits=4,group=-1+dynamic:bits=4,symmetric=no")
    learned = compress(model, "omniquant:bits=4,group=-1,activation_bits=4,epochs=2", calibration)
    assert perplexity(learned) < 1.05 * perplexity(model) < 10 < perplexity(nearest)
