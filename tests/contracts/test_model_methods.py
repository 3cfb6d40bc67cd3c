"""What every method of transform and blockwise promises, whatever it does inside.

Runs for every name in the two families' `__all__`; VARIANTS adds knobs. A new method needs no line.
"""

import inspect
import re

import numpy as np
import pytest

from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import RoundedInputs
from refllm.kernels.packed.records import from_parts, is_record, meta, parts
from refllm.methods.apply import check, compress
from refllm.methods.recipes import MODEL_FAMILIES, methods
from refllm.model.llama import forward
from refllm.model.walk import layer_linears
from tests.models import random_model

VARIANTS: dict[str, tuple[dict, ...]] = {
    "osplus": (dict(bits=4, steps=4, symmetric=False),),
    "dartquant": (dict(steps=3, rate=0.1), dict(steps=2, rotation="orthogonal", online=False)),
    "gqa": (dict(init="first"), dict(init="aligned")),
    "mfa": (dict(rank=32),),
    "palu": (dict(search="uniform", block=4, hadamard=True), dict(search="uniform", block=4, group_heads=1)),
    "quarot": (dict(online=False), dict(rotation="orthogonal", seed=1)),
    "smoothquant": (dict(alpha=0.9, all_linears=True),),
    "omniquant": (
        dict(bits=3, group_size=8, epochs=1, step_tokens=48, second_loss=True),
        dict(group_size=-1, activation_bits=4, attention_bits=4, epochs=1, step_tokens=96),
        dict(symmetric=True, lwc=False, let=True, activation_bits=8, activation_symmetric=True, epochs=1),
        dict(epochs=0, scale_dtype="float32"),
    ),
    "exl2": (dict(bits=4.2, optimizer="hull", rows=1, steps=4), dict(bits=6.0, steps=3, moves=1, seed=2)),
    "lkd": (
        dict(bits=3, group_size=8, epochs=2, step_tokens=48, compressed_inputs=True),
        dict(group_size=-1, activation_bits=4, epochs=1, rate=1e-3, step_tokens=96),
        dict(activation_bits=None, epochs=0, scale_dtype="float32"),
    ),
    "awq": (
        dict(bits=3, duo_scaling=True),
        dict(group_size=16, auto_clip=False),
        dict(auto_scale=False, group_size=-1),
    ),
}
# Transforms that give up something, and knobs with which they do not.
LOSSLESS: dict[str, dict] = {"gqa": dict(kv_heads=2), "palu": dict(ratio=1.0)}
# exl2 stores four bytes for the place of every column: a bit a weight in a matrix of 32 rows.
WIDER = {"exl2": dict(hidden_size=64)}
NAMES = sorted(name for name, (family, _) in methods().items() if family in MODEL_FAMILIES)
TRANSFORMS = [name for name in NAMES if methods()[name][0] == "transform"]
PACKERS = [name for name in NAMES if methods()[name][0] == "blockwise"]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
IDS = np.random.default_rng(3).integers(0, 64, 96)


def cases(names):
    return [
        pytest.param(name, knobs, id=name + "".join(f",{k}={v}" for k, v in knobs.items()))
        for name in names
        for knobs in ({}, *VARIANTS.get(name, ()))
    ]


def run(name, knobs, model):
    return methods()[name][1](model, IDS, on_report=None, **knobs)


def stored(model):
    return {
        name: {key: array.tobytes() for key, array in parts(weight).items()} if is_record(weight) else weight.tobytes()
        for name, weight in model.weights.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_model_ids_and_typed_knobs(name):
    family, function = methods()[name]
    first, second, *rest = inspect.signature(function).parameters.values()
    assert (first.name, second.name) == ("model", "ids")
    assert second.default in (inspect.Parameter.empty, None)
    assert "on_report" in [knob.name for knob in rest]
    for knob in rest:
        assert knob.kind is knob.KEYWORD_ONLY and knob.default is not knob.empty
        if knob.name != "on_report":
            assert re.fullmatch(r"(int|float|bool|str)( \| None)?", inspect.formatannotation(knob.annotation)), knob
    assert function.__module__ == f"refllm.methods.{family}.{function.__module__.rsplit('.', 1)[1]}"


@pytest.mark.parametrize(("name", "knobs"), cases(NAMES))
def test_inputs_are_left_alone_and_same_input_gives_same_bytes(name, knobs):
    model = random_model("llama", np.float32, intermediate_size=64, **WIDER.get(name, {}))
    before = stored(model)
    first = run(name, knobs, model)
    assert stored(model) == before
    assert stored(run(name, knobs, model)) == stored(first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "knobs"), cases(TRANSFORMS))
def test_a_transform_keeps_the_function(name, knobs, architecture):
    """Or refuses an architecture in one line; weights stay arrays, or records that a later stage packs."""
    model = random_model(architecture, np.float64)
    try:
        changed = run(name, knobs | LOSSLESS.get(name, {}), model)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return
    a, b = forward(changed, IDS), forward(model, IDS)
    assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()
    assert any(changed.weights.get(n) is not model.weights[n] for n in model.weights)


@pytest.mark.parametrize(("name", "knobs"), cases(PACKERS))
def test_packers_pack_every_linear(name, knobs):
    model = random_model("llama", np.float32, intermediate_size=64, **WIDER.get(name, {}))
    reports = []
    packed = methods()[name][1](model, IDS, on_report=reports.append, **knobs)
    linears = [n for layer in range(model.config.num_layers) for n in layer_linears(layer)]
    named = [r.name for r in reports]  # one a weight: progress, and the source of tables
    assert len(set(named)) == len(named) and set(linears) <= set(named)
    for n in linears:
        record = packed.weights[n]
        assert is_record(record) and record.shape == model.weights[n].shape
        again = from_parts(record.kind, parts(record), meta(record))
        assert np.array_equal(again.dense(), record.dense())
        x = np.random.default_rng(0).standard_normal((3, record.shape[1]), np.float32)
        seen = record.rounded(x) if isinstance(record, RoundedInputs) else x
        exact = seen.astype(np.float64) @ record.dense().T.astype(np.float64)
        bound = 1e-4 * (np.abs(x) @ np.abs(record.dense()).T).max()
        assert np.abs(matmul(x, record) - exact).max() <= bound
    assert np.isfinite(forward(packed, IDS)).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_tried_and_run_through_a_recipe(name):
    model = random_model("llama", np.float32, intermediate_size=64, **WIDER.get(name, {}))
    check(model, name, IDS)
    assert compress(model, name, IDS).recipe == name
