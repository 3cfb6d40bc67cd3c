"""refllm.model.config: which layers slide and turn how, sizes of a known model, and contradictions."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from refllm.kernels.rope import Rope
from refllm.model.config import ModelConfig
from refllm.model.names import expected_shapes
from tests.models import random_config

LLAMA_31_8B = ModelConfig(
    architecture="llama",
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    context_length=131_072,
    norm_eps=1e-5,
    rope=Rope(5e5, "llama3", 8.0, original_context=8192),
    tied_embeddings=False,
)


def size(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def test_parameters_of_llama_3_1_8b():
    shapes = expected_shapes(LLAMA_31_8B)
    assert size(shapes) == 8_030_261_248
    blocks = {name: shape for name, shape in shapes.items() if "_proj" in name}
    assert size(blocks) == 6_979_321_856
    assert size({"head": shapes["lm_head.weight"]}) == 525_336_576


def test_tying_saves_one_embedding():
    tied = replace(LLAMA_31_8B, tied_embeddings=True)
    assert size(expected_shapes(LLAMA_31_8B)) - size(expected_shapes(tied)) == 128_256 * 4096


def test_windows_and_ropes_per_layer():
    config = random_config("gemma3")
    assert [config.window(i) for i in range(2)] == [5, None]
    assert [config.layer_rope(i).theta for i in range(2)] == [1e4, 1e6]
    assert config.layer_rope(1).scaling == "linear" and config.layer_rope(0).scaling is None


def test_without_a_local_rope_sliding_layers_use_the_common_one():
    config = random_config("mistral")
    assert [config.layer_rope(i) for i in range(2)] == [config.rope] * 2
    assert [config.window(i) for i in range(2)] == [7, 7]


def test_without_sliding_layers_nothing_slides():
    assert [random_config("llama").window(i) for i in range(2)] == [None, None]


def test_config_is_frozen_and_hashable():
    with pytest.raises(FrozenInstanceError):
        LLAMA_31_8B.num_layers = 3
    assert hash(LLAMA_31_8B) == hash(replace(LLAMA_31_8B))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(vocab_size=0), "vocab_size must be a positive integer, got 0"),
        (dict(hidden_size=-4), "hidden_size must be a positive integer"),
        (dict(num_layers=2.0), r"num_layers must be a positive integer, got 2\.0"),
        (dict(num_layers=True), "num_layers must be a positive integer, got True"),
        (dict(context_length=None), "context_length must be a positive integer, got None"),
        (dict(num_heads=4, num_kv_heads=3), r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        (dict(num_heads=2, num_kv_heads=4), r"num_heads \(2\) must be a multiple"),
        (dict(head_dim=7), "head_dim must be even"),
        (dict(activation="relu"), "activation must be silu or gelu_tanh, got 'relu'"),
        (dict(sliding_window=5, sliding_layers=(True,)), "names 1 layers, the model has 2"),
        (dict(sliding_layers=(True, False)), "sliding_layers are set but sliding_window is not"),
        (dict(sliding_window=5), "sliding_window is set but sliding_layers do not say"),
        (dict(sliding_window=0, sliding_layers=(True, True)), "sliding_window must be positive"),
        (dict(sliding_window=-5, sliding_layers=(True, True)), "sliding_window must be positive"),
        (dict(attention_softcap=0.0), "attention_softcap must be positive"),
        (dict(logit_softcap=-1.0), "logit_softcap must be positive"),
        (dict(attention_scale=float("nan")), "attention_scale must be positive"),
        (dict(norm_eps=-1e-5), "norm_eps must not be negative"),
        (dict(norm_eps=float("nan")), "norm_eps must not be negative"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        replace(random_config("llama"), **values)
