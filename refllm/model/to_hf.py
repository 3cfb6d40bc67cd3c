"""A model -> a folder in Hugging Face layout: dense, or its packed linears as a quantised checkpoint."""

import json
import math
import os

import numpy as np

from refllm.formats.files import atomic_folder
from refllm.formats.tensors import write_safetensors
from refllm.kernels.packed.records import is_record
from refllm.kernels.rope import Rope
from refllm.model.config import ModelConfig
from refllm.model.from_hf import ARCHITECTURES, EMBEDDING, linears
from refllm.model.model import Model
from refllm.model.quantized import pack
from refllm.model.to_gguf import encode, frequency_divisors, narrowest_exact

HF_TYPES = ("F32", "BF16", "F16")


def to_hf(model: Model, folder: str | os.PathLike, type_name: str = "F32", overwrite: bool = False) -> None:
    """Write a dense model as a folder in Hugging Face layout: config.json, model.safetensors and the tokenizer."""
    arrays, dtypes = {}, {}
    for name, array in _float_weights(model).items():
        arrays[name] = encode(array, "F32" if array.ndim == 1 else type_name, name)
        if arrays[name].dtype == np.uint16:
            dtypes[name] = "BF16"
    config = hf_config(model.config) | {"torch_dtype": _TORCH_NAMES[type_name]}
    _write(model, folder, config, arrays, dtypes, overwrite)


def to_quantized_hf(model: Model, folder: str | os.PathLike, method: str, overwrite: bool = False) -> None:
    """Write a model's packed linears as a quantised checkpoint, its other weights as floats.

    The floats get the narrowest of F16, BF16 and F32 that all of them have in common; transformers runs in that type.

    Parameters
    ----------
    model : Model
    folder : path
    method : str
        A name of refllm.model.quantized.METHODS.
    overwrite : bool
        Replace an existing model folder.

    Raises
    ------
    ValueError
        Naming a tensor that the layout cannot store, and the formats that can.
    """
    modules = linears(model.config)
    records = {module: w for module in modules if is_record(w := model.weights[f"{module}.weight"])}
    plain = [module for module in modules if module not in records]
    if is_record(model.weights[EMBEDDING]):
        raise ValueError(f"{EMBEDDING} is packed, which {method} cannot store; native can")
    floats = _float_weights(model)
    types = {narrowest_exact(array) for array in floats.values()}
    type_name = types.pop() if len(types) == 1 else "F32"
    packed = pack(method, records, plain, type_name)
    arrays = packed.tensors | {name: encode(array, type_name, name) for name, array in floats.items()}
    dtypes = packed.dtypes | (dict.fromkeys(floats, "BF16") if type_name == "BF16" else {})
    config = hf_config(model.config) | {"torch_dtype": _TORCH_NAMES[type_name], "quantization_config": packed.config}
    _write(model, folder, config, arrays, dtypes, overwrite)


_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def _float_weights(model: Model) -> dict[str, np.ndarray]:
    """The weights that are not packed, float32, norms as Hugging Face's Gemma wants them."""
    # It multiplies by 1 + w whatever this model was loaded from.
    offset = np.float32(1.0 if model.config.architecture == "gemma3" else 0.0) - np.float32(model.config.norm_offset)
    floats = {n: w.astype(np.float32, copy=False) for n, w in model.weights.items() if not is_record(w)}
    return {name: array - offset if name.endswith("norm.weight") else array for name, array in floats.items()}


def _write(model: Model, folder, config: dict, arrays: dict, dtypes: dict, overwrite: bool) -> None:
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_safetensors(temporary / "model.safetensors", arrays, {"format": "pt"}, dtypes)
        (temporary / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)


def hf_config(config: ModelConfig) -> dict:
    """config.json of a ModelConfig, in the keys of transformers 4, which version 5 reads too.

    Raises
    ------
    ValueError
        The config has something this architecture's config.json cannot say.
    """
    architecture = config.architecture
    if config.factored is not None or config.low_rank_kv is not None:
        raise ValueError(f"config.json of {architecture} cannot say {config.special}; native can")
    if architecture == "llama" and config.sliding_layers:
        architecture = "mistral"  # GGUF calls both llama
    name = next(name for name, known in ARCHITECTURES.items() if known == architecture)
    stops = config.eos_token_ids
    values: dict[str, object] = {
        "architectures": [name],
        "model_type": "gemma3_text" if architecture == "gemma3" else architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(stops) if len(stops) > 1 else next(iter(stops), None),
        **_hf_rope(config),
        **_hf_sliding(config, architecture),
    }
    if config.latent is not None:
        values |= _hf_latent(config)
    if config.experts is not None:
        values |= _hf_experts(config)
    activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation]
    values["hidden_activation" if architecture == "gemma3" else "hidden_act"] = activation
    if architecture == "gemma3":
        values["query_pre_attn_scalar"] = _whole(config.attention_scale**-2)
        values["attn_logit_softcapping"] = config.attention_softcap
        values["final_logit_softcapping"] = config.logit_softcap
    expected_bias = (True, False) if architecture == "qwen2" else (config.attention_bias,) * 2
    if (config.attention_bias, config.output_bias) != expected_bias or (config.mlp_bias and architecture != "llama"):
        raise ValueError(f"config.json of {architecture} cannot say which of these projections have a bias")
    if architecture != "qwen2":
        values["attention_bias"] = config.attention_bias
    if architecture == "llama":
        values["mlp_bias"] = config.mlp_bias
    return values


def _hf_latent(config: ModelConfig) -> dict:
    """Keys of DeepSeek's attention; head_dim is there the part of a key that turns."""
    latent = config.latent
    values = {
        "num_key_value_heads": config.num_heads,
        "head_dim": latent.rope_dim,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": latent.interleaved,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": None,
    }
    if config.architecture == "deepseek_v2" and not latent.interleaved:
        raise ValueError("config.json of deepseek_v2 cannot say that pairs are half-split")
    if config.attention_scale is not None:  # head_dim^-0.5 (0.1 mscale ln factor + 1)^2
        rope = _hf_rope(config)
        root = math.sqrt(config.attention_scale * config.head_dim**0.5)
        if config.rope.scaling != "yarn" or root <= 1:
            raise ValueError("config.json of deepseek can say another scale of scores only with yarn, and above 1")
        mscale = round((root - 1) / (0.1 * math.log(config.rope.factor)), 9)
        values["rope_scaling"] = rope["rope_scaling"] | {"mscale_all_dim": mscale}
    return values


def _hf_experts(config: ModelConfig) -> dict:
    experts, v3 = config.experts, config.architecture == "deepseek_v3"
    if (experts.scoring != "sigmoid") if v3 else (experts.scoring != "softmax" or experts.normalised):
        raise ValueError(f"config.json of {config.architecture} cannot say how these experts are weighed")
    method = "noaux_tc" if v3 else "greedy" if experts.groups == 1 else "group_limited_greedy"
    return {
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.active,
        "moe_intermediate_size": experts.intermediate_size,
        "n_shared_experts": experts.shared,
        "first_k_dense_replace": experts.first_layer,
        "n_group": experts.groups,
        "topk_group": experts.active_groups,
        "topk_method": method,
        "scoring_func": experts.scoring,
        "norm_topk_prob": experts.normalised,
        "routed_scaling_factor": experts.scaling,
    }


def _whole(value: float) -> float | int:
    """256.00000001 -> 256: a number that went through a square root."""
    return round(value) if abs(value - round(value)) < 1e-4 * value else value


def _hf_sliding(config: ModelConfig, architecture: str) -> dict:
    if architecture == "llama" or config.latent is not None:
        return {}
    layers = config.sliding_layers or (False,) * config.num_layers
    values: dict[str, object] = {"sliding_window": config.sliding_window}
    if architecture == "mistral":
        if len(set(layers)) > 1:
            raise ValueError("config.json of mistral cannot say that only some layers slide")
        return values
    values["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in layers]
    if architecture != "gemma3":
        values["use_sliding_window"] = any(layers)
    return values


def _hf_rope(config: ModelConfig) -> dict:
    rope = _named_scaling(config.rope, config.head_dim)
    values: dict[str, object] = {"rope_theta": rope.theta, "rope_scaling": None}
    if config.rope_local is not None:
        values["rope_local_base_freq"] = config.rope_local.theta
    if rope.scaling is None:
        return values
    scaling: dict[str, object] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        scaling["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        scaling |= {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
    return values | {"rope_scaling": scaling}


def _named_scaling(rope: Rope, head_dim: int) -> Rope:
    """Frequency divisors back into the llama3 scaling that makes them, if the published constants do."""
    if rope.freq_divisors is None:
        return rope
    if all(divisor == 1.0 for divisor in rope.freq_divisors):
        return Rope(rope.theta)
    guess = Rope(rope.theta, "llama3", float(max(rope.freq_divisors)), 1.0, 4.0, original_context=8192)
    if np.allclose(frequency_divisors(guess, head_dim), rope.freq_divisors, rtol=1e-5, atol=0):
        return guess
    raise ValueError("config.json cannot say these rope frequency divisors (they are not Llama 3's scaling from 8192)")
