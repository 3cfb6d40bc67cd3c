"""config.json of both generations of transformers becomes the same ModelConfig; nothing is guessed."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.errors import FormatError
from refllm.formats.hf import open_hf
from refllm.formats.tensors import write_safetensors
from refllm.kernels.rope import Rope
from refllm.model.from_hf import parse_config, read_model
from refllm.model.names import expected_shapes
from tests.models import ARCHITECTURES, random_config, weight_shapes

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(architecture: str = "Llama", drop=(), **changes) -> dict:
    names = {"architectures": [f"{architecture}ForCausalLM"], "model_type": architecture.lower()}
    return {key: value for key, value in (BASE | names | changes).items() if key not in drop}


def parse(values: dict, generation=None, has_head=True):
    return parse_config(values, generation or {}, has_head, path="config.json")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES = [
    (None, Rope(10000.0)),
    ({"rope_type": "default"}, Rope(10000.0)),
    ({"rope_type": "linear", "factor": 4.0}, Rope(10000.0, "linear", 4.0)),
    ({"rope_type": "llama3"} | LLAMA3, Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 8192)),
    (
        {
            "rope_type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 32768,
            "beta_fast": 16,
            "truncate": True,
        },
        Rope(10000.0, "yarn", 4.0, original_context=32768, beta_fast=16.0),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
        Rope(10000.0, "yarn", 4.0, original_context=64, attention_factor=1.5),
    ),
]


@pytest.mark.parametrize(("scaling", "rope"), ROPES)
def test_rope_of_either_generation(scaling, rope):
    assert parse(config(rope_scaling=scaling)).rope == rope
    new = {"rope_theta": 10000.0, "rope_type": "default"} | (scaling or {})
    assert parse(config(drop=["rope_theta"], rope_parameters=new)).rope == rope
    if scaling:  # the spelling before rope_type
        old = {"type": scaling["rope_type"]} | {key: value for key, value in scaling.items() if key != "rope_type"}
        assert parse(config(rope_scaling=old)).rope == rope


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config(drop=["rope_theta"]), "rope_theta is missing"),
        (config(drop=["rope_theta"], rope_parameters={"rope_type": "default"}), "rope_theta is missing"),
        (config(rope_theta=0), "rope_theta must be a positive number"),
        (config(rope_theta="1e4"), "rope_theta must be a positive number"),
        (config(rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), "contradicts"),
        (config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope type 'dynamic'; known: default, linear"),
        (config(rope_scaling={"rope_type": "linear"}), "factor is missing"),
        (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor is missing"),
        (config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "original_max_position_embeddings is missing"),
        (config(rope_scaling={"rope_type": "linear", "factor": 2.0, "mscale": 1.0}), "not understood: mscale"),
        (config(rope_scaling={"rope_type": "linear", "type": "yarn", "factor": 2.0}), "both type 'yarn'"),
        (config(rope_scaling=[1]), "rope_scaling must be an object"),
        (config(rope_scaling={"rope_type": ["linear"]}), "rope type ..linear..; known"),
        (config(rope_scaling={"rope_type": "default", "rope_theta": 5.0}), "rope_scaling says rope_theta 5.0"),
        (
            config(
                rope_scaling={"type": "linear", "factor": 2},
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            ),
            "rope_scaling contradicts rope_parameters",
        ),
        (config(architectures=["GPT2LMHeadModel"]), "architectures must be one of LlamaForCausalLM"),
        (config(architectures=None), "architectures must be one of"),
        (config(architectures=["LlamaForCausalLM", "x"]), "architectures must be one of"),
        (config(model_type="qwen2"), "contradicts model_type 'qwen2'"),
        (config(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
        (config(hidden_act="relu"), "hidden_act must be one of silu"),
        (config(drop=["hidden_act"]), "hidden_act must be one of silu"),
        (config(hidden_size=0), "hidden_size must be a positive integer"),
        (config(hidden_size=32.0), "hidden_size must be a positive integer, got 32.0"),
        (config(vocab_size=True), "vocab_size must be a positive integer, got True"),
        (config(drop=["rms_norm_eps"]), "rms_norm_eps is missing"),
        (config(drop=["max_position_embeddings"]), "max_position_embeddings is missing"),
        (config(num_key_value_heads=3), "num_heads .4. must be a multiple of num_kv_heads .3."),
        (config(head_dim=7), "head_dim must be even"),
        (config(drop=["head_dim"], num_attention_heads=6, num_key_value_heads=2), "not a multiple of 6 heads"),
        (config("Qwen3", drop=["head_dim"]), "qwen3 does not derive it"),
        (config(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false"),
        (config(eos_token_id="</s>"), "eos_token_id must be a token id"),
        (config("Qwen3", layer_types=["full_attention"]), "layer_types must name 2 layers"),
        (config("Qwen3", layer_types=["full_attention", "linear_attention"]), "layer_types holds linear_attention"),
        (config("Qwen3", layer_types=["full_attention", "sliding_attention"]), "sliding_window is missing"),
    ],
)
def test_what_is_not_understood_is_named(values, message):
    with pytest.raises(FormatError, match=rf"^config\.json.*{message}") as caught:
        parse(values)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.sampled_from([2**40, 0.5, 1e400, "", "linear", "silu"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ROPE_KEYS = ["rope_parameters", "rope_scaling", "partial_rotary_factor"]
WINDOW_KEYS = ["layer_types", "sliding_window", "use_sliding_window", "max_window_layers"]
KEYS = [*BASE, *ROPE_KEYS, *WINDOW_KEYS, "text_config", "attention_bias", "final_logit_softcapping"]


@given(
    st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3"]),
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
)
def test_any_values_parse_or_raise_format_error(name, changes):
    base = GEMMA_NEW if name == "Gemma3" else config(name)
    try:
        parse(base | changes)
    except FormatError as error:
        assert "\n" not in str(error)


def test_the_head_is_tied_only_if_config_and_tensors_agree():
    assert not parse(config(), has_head=True).tied_embeddings
    assert parse(config(tie_word_embeddings=True), has_head=False).tied_embeddings
    assert parse(config(drop=["tie_word_embeddings"]), has_head=False).tied_embeddings
    assert not parse(config(drop=["tie_word_embeddings"]), has_head=True).tied_embeddings
    with pytest.raises(FormatError, match=r"tie_word_embeddings is false but .* no lm_head\.weight"):
        parse(config(), has_head=False)


def test_sizes_that_old_configs_leave_out():
    parsed = parse(config(drop=["num_key_value_heads", "head_dim"]))
    assert (parsed.num_kv_heads, parsed.head_dim) == (4, 8)


def test_eos_may_be_a_list_and_generation_config_goes_first():
    assert parse(config()).eos_token_ids == (2,)
    assert parse(config(eos_token_id=[2, 5])).eos_token_ids == (2, 5)
    assert parse(config(), {"eos_token_id": [7]}).eos_token_ids == (7,)
    assert parse(config(eos_token_id=None, bos_token_id=None)).eos_token_ids == ()


def test_what_makes_each_architecture():
    llama = parse(config(attention_bias=True, mlp_bias=True))
    assert (llama.attention_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = parse(config("Qwen2"))
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = parse(config("Qwen3"))
    assert (qwen3.attention_bias, qwen3.qk_norm) == (False, True)
    mistral = parse(config("Mistral", sliding_window=7))
    assert (mistral.sliding_window, mistral.sliding_layers) == (7, (True, True))
    assert parse(config("Mistral", sliding_window=None)).sliding_layers == ()


def test_windows_of_qwen():
    assert parse(config("Qwen2", sliding_window=7, use_sliding_window=False)).sliding_layers == ()
    late = parse(config("Qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=1))
    assert (late.sliding_layers, late.sliding_window) == ((False, True), 7)
    listed = parse(config("Qwen3", sliding_window=7, layer_types=["sliding_attention", "full_attention"]))
    assert listed.sliding_layers == (True, False)


GEMMA = dict(
    model_type="gemma3_text",
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=16,
    sliding_window=5,
    num_hidden_layers=7,
    tie_word_embeddings=True,
)
GEMMA_OLD = config(
    "Gemma3",
    drop=["hidden_act"],
    **GEMMA,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    sliding_window_pattern=6,
    rope_scaling={"rope_type": "linear", "factor": 8.0},
)
GEMMA_NEW = config(
    "Gemma3",
    drop=["hidden_act", "rope_theta"],
    **GEMMA,
    layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
)


def test_gemma_of_both_generations():
    old, new = parse(GEMMA_OLD, has_head=False), parse(GEMMA_NEW, has_head=False)
    assert old == new
    assert old.rope == Rope(1e6, "linear", 8.0)
    assert old.rope_local == Rope(1e4)
    assert old.sliding_layers == (True,) * 5 + (False, True)
    assert (old.norm_offset, old.post_norms, old.qk_norm, old.activation) == (1.0, True, True, "gelu_tanh")
    assert old.embedding_scale == math.sqrt(32)
    assert old.attention_scale == 0.25


def test_gemma_needs_both_ropes():
    for broken in (
        GEMMA_NEW | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        GEMMA_NEW | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    ):
        with pytest.raises(FormatError, match="full_attention and sliding_attention"):
            parse(broken, has_head=False)
    with pytest.raises(FormatError, match="rope_local_base_freq is missing"):
        parse({key: value for key, value in GEMMA_OLD.items() if key != "rope_local_base_freq"}, has_head=False)
    with pytest.raises(FormatError, match="use_bidirectional_attention = True"):
        parse(GEMMA_NEW | {"use_bidirectional_attention": True}, has_head=False)


def test_a_nested_text_config_is_read():
    inner = {key: value for key, value in GEMMA_NEW.items() if key != "architectures"}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner}
    assert parse(outer | {"vision_config": {}}, has_head=False) == parse(GEMMA_NEW, has_head=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expected_shapes_name_every_tensor(architecture):
    for changes in ({}, {"tied_embeddings": True}, {"attention_bias": True, "output_bias": True, "mlp_bias": True}):
        made = random_config(architecture, **changes)
        assert expected_shapes(made) == weight_shapes(made)


# Reading whole folders


def write_folder(folder, values=BASE, change=None, dtypes=None):
    """A random checkpoint of this config; `change` edits the dictionary of tensors."""
    rng = np.random.default_rng(0)
    shapes = weight_shapes(parse(values, has_head=not values.get("tie_word_embeddings")))
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if change:
        change(tensors)
    write_safetensors(folder / "model.safetensors", tensors, dtypes=dtypes)
    (folder / "config.json").write_text(json.dumps(values))
    return tensors


def test_a_folder_loads_bit_for_bit(tmp_path):
    tensors = write_folder(tmp_path)
    made, weights = read_model(open_hf(tmp_path))
    assert made.hidden_size == 32
    assert set(weights) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(weights[name], array)
        assert weights[name].dtype == np.float32
    assert read_model(open_hf(tmp_path), "float64")[1]["lm_head.weight"].dtype == np.float64


def test_half_precision_is_widened_exactly(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
        tensors["model.norm.weight"] = np.full(32, 0x3F81, np.uint16)

    tensors = write_folder(tmp_path, change=change, dtypes={"model.norm.weight": "BF16"})
    _, weights = read_model(open_hf(tmp_path))
    np.testing.assert_array_equal(weights["lm_head.weight"], tensors["lm_head.weight"].astype(np.float32))
    assert set(weights["model.norm.weight"]) == {np.float32(1.0078125)}
    assert all(weight.dtype == np.float32 for weight in weights.values())


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (lambda t: t.update(extra=np.float32([1])), "does not call for: extra"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}), "q_proj.bias"),
        (rename("model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"), r"lacks model\.layers\.1"),
        (lambda t: t.update({"lm_head.weight": np.zeros((64, 31), np.float32)}), r"shape \(64, 31\), .* \(64, 32\)"),
        (lambda t: t.update({"model.norm.weight": np.zeros(32, np.int32)}), "is I32; F64, F32, F16 or BF16"),
        (lambda t: np.copyto(t["model.norm.weight"][3:4], np.nan), r"'model\.norm\.weight' holds NaN or infinity"),
        (lambda t: np.copyto(t["lm_head.weight"][1:2], np.inf), r"'lm_head\.weight' holds NaN or infinity"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path, change, message):
    write_folder(tmp_path, change=change)
    with pytest.raises(FormatError, match=message) as caught:
        read_model(open_hf(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_long_list_of_missing_tensors_is_cut(tmp_path):
    write_folder(tmp_path, change=lambda t: [t.pop(name) for name in list(t) if "mlp" in name])
    with pytest.raises(FormatError, match="and 3 more"):
        read_model(open_hf(tmp_path))


def test_a_tied_checkpoint_may_carry_the_same_head_but_no_other(tmp_path):
    tied = BASE | {"tie_word_embeddings": True}
    copy = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    write_folder(tmp_path, tied, change=copy)
    made, weights = read_model(open_hf(tmp_path))
    assert made.tied_embeddings and "lm_head.weight" not in weights
    other = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    write_folder(tmp_path, tied, change=other)
    with pytest.raises(FormatError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        read_model(open_hf(tmp_path))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_multimodal_checkpoint(tmp_path, prefix):
    def change(tensors):
        for name in list(tensors):
            if name.startswith("model."):
                tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["model.vision_tower.x"] = tensors["vision_tower.x"] = np.float32([1])

    plain = write_folder(tmp_path, GEMMA_NEW | {"tie_word_embeddings": True})
    inner = {key: value for key, value in GEMMA_NEW.items() if key != "architectures"}
    write_folder(tmp_path, GEMMA_NEW, change)
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    _, weights = read_model(open_hf(tmp_path))
    assert set(weights) == set(plain)


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text"])
def test_configs_as_transformers_writes_them(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in BASE.items() if key.endswith(("_size", "_heads", "_dim", "_embeddings"))}
    sizes |= {"num_hidden_layers": 7, "tie_word_embeddings": True}
    made = getattr(transformers, f"{name}Config")(**sizes)
    made.architectures = [f"{name.removesuffix('Text')}ForCausalLM"]
    made.save_pretrained(tmp_path)
    parsed = parse(json.loads((tmp_path / "config.json").read_text()), has_head=False)
    theirs = made.rope_parameters
    assert parsed.rope.theta == theirs.get("full_attention", theirs)["rope_theta"]
    assert parsed.num_layers == 7
    assert parsed.head_dim == 8
    assert parsed.norm_eps == made.rms_norm_eps
    window = lambda kind: kind == "sliding_attention"
    slides = tuple(map(window, getattr(made, "layer_types", None) or [])) or (name == "Mistral",) * 7
    assert parsed.sliding_layers == (slides if any(slides) else ())
