"""kquants: the table of the mixes, fallbacks, and what an importance matrix buys."""

from dataclasses import replace

import numpy as np
import pytest

import refllm
from refllm.formats import blocks
from refllm.kernels.packed.records import Plain
from refllm.methods.blockwise.kquants import MIXES, kquants, tensor_types, use_more
from tests.models import random_config, random_model

IDS = np.random.default_rng(0).integers(0, 64, 64)


def types_of(mix, kind, layers, **config):
    config = random_config("llama", num_layers=layers, **config)
    return [t for name, t in tensor_types(config, mix).items() if f".{kind}." in name]


def test_use_more_of_a_model_of_32_layers():
    assert [i for i in range(32) if use_more(i, 32)] == [*range(4), 6, 9, 12, 15, 18, 21, 24, 27, *range(28, 32)]


@pytest.mark.parametrize("layers", [1, 7, 8, 30, 32])
def test_the_table(layers):
    more = ["Q6_K" if use_more(i, layers) else "Q4_K" for i in range(layers)]
    for kind in ("v_proj", "down_proj"):
        assert types_of("Q4_K_M", kind, layers) == more
        assert types_of("Q5_K_M", kind, layers) == [t.replace("Q4", "Q5") for t in more]
    assert types_of("Q4_K_S", "v_proj", layers) == (["Q5_K"] * 4 + ["Q4_K"] * layers)[:layers]
    assert types_of("Q4_K_S", "down_proj", layers) == ["Q5_K"] * (layers // 8) + ["Q4_K"] * (layers - layers // 8)
    assert types_of("Q3_K_M", "v_proj", layers) == (["Q5_K"] * 2 + ["Q4_K"] * layers)[:layers]
    assert types_of("Q3_K_M", "down_proj", layers) == ["Q5_K"] * (layers // 16) + ["Q4_K"] * (layers - layers // 16)
    assert types_of("Q2_K", "v_proj", layers) == ["Q3_K"] * layers  # two query heads a key-value head
    assert types_of("Q2_K", "v_proj", layers, num_kv_heads=1) == ["Q4_K"] * layers
    outputs = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
    for mix in MIXES:
        assert set(types_of(mix, "o_proj", layers)) == {outputs[mix]}
        for kind in ("q_proj", "k_proj", "gate_proj", "up_proj"):
            assert set(types_of(mix, kind, layers)) == {mix[:4]}


def test_embedding_and_head():
    tied, apart = (tensor_types(random_config("llama", tied_embeddings=t), "Q4_K_M") for t in (True, False))
    assert tied["model.embed_tokens.weight"] == "Q6_K" and "lm_head.weight" not in tied
    assert apart["model.embed_tokens.weight"] == "Q4_K" and apart["lm_head.weight"] == "Q6_K"


def test_rows_that_no_block_divides_fall_back():
    model = random_model("llama", hidden_size=256, intermediate_size=48, num_heads=4, head_dim=8)
    weights = kquants(model, mix="Q4_K_M").weights
    kind = lambda name: weights[f"model.layers.0.{name}.weight"]
    assert kind("mlp.up_proj").type_name == "Q4_K"  # 256 columns
    assert kind("self_attn.o_proj").type_name == "Q5_0"  # 32
    assert isinstance(kind("mlp.down_proj"), Plain) and kind("mlp.down_proj").values.dtype == np.float16  # 48
    assert weights["lm_head.weight"].type_name == "Q6_K"


def test_bytes_are_those_of_the_block_types():
    model = random_model("llama", hidden_size=256, intermediate_size=256)
    small = kquants(model, mix="Q3_K_M")
    W = model.weights["model.layers.0.mlp.gate_proj.weight"]
    record = small.weights["model.layers.0.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(record.data, blocks.Q3_K.encode(W))
    assert record.nbytes == W.size // 256 * 110


def test_importance_lowers_the_error_that_counts():
    model = random_model("llama", hidden_size=256, intermediate_size=256)
    reports = {False: [], True: []}
    for imatrix in reports:
        kquants(model, IDS, mix="Q2_K", imatrix=imatrix, on_report=reports[imatrix].append)
    lost = {key: sum(r.output_error for r in found if r.output_error is not None) for key, found in reports.items()}
    assert lost[True] < lost[False]
    assert [r.nbytes for r in reports[True]] == [r.nbytes for r in reports[False]]


def test_what_is_refused():
    model = random_model("llama")
    with pytest.raises(ValueError, match="mix must be one of Q2_K, Q3_K_M"):
        kquants(model, mix="Q4_K_L")
    with pytest.raises(ValueError, match="imatrix needs calibration tokens"):
        kquants(model, imatrix=True)
    name = "model.layers.1.mlp.up_proj.weight"
    spoilt = replace(model, weights=model.weights | {name: np.full_like(model.weights[name], np.nan)})
    with pytest.raises(ValueError, match=r"NaN|finite"):
        kquants(spoilt)


def test_in_a_recipe(tmp_path):
    from refllm.methods.apply import needs_calibration
    from refllm.model.native import save_native

    assert needs_calibration("kquants:imatrix=true") and not needs_calibration("kquants:mix=Q2_K")
    small = refllm.compress(refllm.load("tiny"), "kquants:mix=Q4_K_M+kivi:bits=4")
    save_native(small, tmp_path / "small")
    again = refllm.load(tmp_path / "small")
    np.testing.assert_array_equal(refllm.forward(again, [1, 2, 3]), refllm.forward(small, [1, 2, 3]))
