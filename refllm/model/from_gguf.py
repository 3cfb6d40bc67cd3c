"""GGUF metadata -> ModelConfig, and a GGUF file's tensors -> weights under Hugging Face names.

Conventions that differ from a Hugging Face checkpoint and are undone or carried here:
* `llama` files hold q and k rows in the interleaved rotary order: the rows are permuted back (k with its own heads,
  biases too). A permutation of rows moves whole rows of packed bytes, so quantised tensors stay packed.
* `gemma3` files hold norm weights as w + 1: they are kept as they are, and `norm_offset` is 0.
* `rope_freqs.weight` holds what the rotary frequencies are divided by.
"""

import math
from dataclasses import replace

import numpy as np

from refllm.formats.blocks import BLOCKS
from refllm.formats.errors import FormatError
from refllm.formats.files import forget_pages
from refllm.formats.gguf import GGUFFile, GGUFTensor
from refllm.kernels.packed.records import GGUFBlocks
from refllm.kernels.rope import interleaved_to_half_split
from refllm.model.config import ModelConfig, Rope
from refllm.model.names import check_weights, expected_shapes

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# GGUF layer tensors -> Hugging Face; the part before ".weight" or ".bias".
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The norm before the MLP is "post attention" in Llama; Gemma norms both sides of each branch.
MLP_NORMS = {"ffn_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Layers of Gemma 3 that see the whole context, and the rope theta of the others: the files do not say.
GEMMA_FULL_EVERY, GEMMA_LOCAL_THETA = 6, 10000.0


def read_model(file: GGUFFile, dtype: str = "float32") -> tuple[ModelConfig, dict[str, object]]:
    """Config and weights of an opened file.

    Parameters
    ----------
    file : GGUFFile
    dtype : "float32" or "float64"
        Of the tensors that are not quantised.

    Returns
    -------
    config : ModelConfig
    weights : dict of name -> float array, or `GGUFBlocks` for a quantised tensor

    Raises
    ------
    FormatError
        One line naming the key or tensor that is missing, unknown, contradictory, misshapen, or not finite.
    """
    config = parse_config(file)
    names = LAYER_NAMES | (GEMMA_NORMS if config.architecture == "gemma3" else MLP_NORMS)
    tensors = {hf_name(name, names): tensor for name, tensor in file.tensors.items() if name != "rope_freqs.weight"}
    check_weights(expected_shapes(config), {name: tensor.shape for name, tensor in tensors.items()}, path=file.path)
    weights = {name: _weight(tensor, dtype) for name, tensor in tensors.items()}
    if config.architecture == "llama":
        for name in weights:
            heads = config.num_heads if ".q_proj." in name else config.num_kv_heads if ".k_proj." in name else None
            if heads is not None:
                weights[name] = _take_rows(weights[name], interleaved_to_half_split(heads, config.head_dim))
    return config, weights


def hf_name(name: str, layer_names: dict[str, str]) -> str:
    """Hugging Face name of a GGUF tensor; one that is not known comes back unchanged and is reported as unexpected."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in layer_names and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{layer_names[parts[2]]}.{parts[3]}"
    return name


def _weight(tensor: GGUFTensor, dtype: str):
    fail = lambda message: FormatError(message, path=tensor.path, offset=tensor.offset)
    if tensor.type_name not in BLOCKS:
        array = tensor.floats().astype(dtype, copy=False)
        if not np.isfinite(array).all():
            raise fail(f"weight {tensor.name!r} holds NaN or infinity")
        return array
    if len(tensor.shape) != 2:
        raise fail(f"tensor {tensor.name!r} is quantised but has {len(tensor.shape)} dimensions")
    data = tensor.mapped()
    try:
        return GGUFBlocks(data=data, type_name=tensor.type_name, columns=tensor.shape[1])
    except ValueError:
        raise fail(f"weight {tensor.name!r} holds NaN or infinity") from None
    finally:
        forget_pages(data)  # only the scales were looked at


def _take_rows(weight, order: np.ndarray):
    if isinstance(weight, np.ndarray):
        return weight[order]
    taken = replace(weight, data=weight.data[order])
    forget_pages(weight.data)
    return taken


class _Keys:
    """Typed access to the metadata of one architecture: every error names the file and the key."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.architecture = file, architecture

    def fail(self, message: str) -> FormatError:
        """The error to raise, with the path of the file."""
        return FormatError(message, path=self.file.path)

    def get(self, key: str, kind: type, default="required"):
        """A key of the architecture (or general., tokenizer.) of one type.

        Raises FormatError if it is missing without a default, or of another type.
        """
        name = f"{self.architecture}.{key}" if not key.startswith(("general.", "tokenizer.")) else key
        value = self.file.metadata.get(name)
        if value is None:
            if default == "required":
                raise self.fail(f"key {name} is missing")
            return default
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(f"key {name} must be {kind.__name__}, got {value!r:.80}")
        if self.file.types[name] == "FLOAT32":  # 1e-5 was meant, not 9.999999747378752e-06
            return float(str(np.float32(value)))
        return value


def parse_config(file: GGUFFile) -> ModelConfig:
    """ModelConfig of a GGUF file's metadata; the tensors decide the vocabulary's size and whether the head is tied.

    Raises
    ------
    FormatError
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        message = f"general.architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r:.80}"
        raise FormatError(message, path=file.path)
    keys = _Keys(file, architecture)
    hidden, heads = keys.get("embedding_length", int), keys.get("attention.head_count", int)
    layers, gemma = keys.get("block_count", int), architecture == "gemma3"
    head_dim = keys.get("attention.key_length", int, None)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise keys.fail(f"{architecture}.embedding_length {hidden} is not a multiple of {heads} heads")
        head_dim = hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, int, head_dim) != head_dim:
            raise keys.fail(f"{architecture}.{key} must equal the head size {head_dim}")
    sliding, window = _sliding(keys, layers, gemma)
    eos = keys.get("tokenizer.ggml.eos_token_id", int, None)
    biases = {key: f"blk.0.{key}.bias" in file.tensors for key in ("attn_q", "attn_output", "ffn_up")}
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=_vocab_size(keys),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=keys.get("attention.head_count_kv", int, heads),
            head_dim=head_dim,
            intermediate_size=keys.get("feed_forward_length", int),
            context_length=keys.get("context_length", int),
            norm_eps=keys.get("attention.layer_norm_rms_epsilon", float),
            rope=_rope(keys),
            rope_local=Rope(keys.get("rope.freq_base_swa", float, GEMMA_LOCAL_THETA)) if gemma else None,
            tied_embeddings="output.weight" not in file.tensors,
            activation="gelu_tanh" if gemma else "silu",
            attention_bias=biases["attn_q"],
            output_bias=biases["attn_output"],
            mlp_bias=biases["ffn_up"],
            qk_norm=architecture in ("qwen3", "gemma3"),
            norm_offset=0.0,
            post_norms=gemma,
            embedding_scale=math.sqrt(hidden) if gemma else 1.0,
            attention_scale=_gemma_scale(keys, layers, hidden, heads, head_dim) if gemma else None,
            attention_softcap=keys.get("attn_logit_softcapping", float, None),
            logit_softcap=keys.get("final_logit_softcapping", float, None),
            sliding_window=window,
            sliding_layers=sliding,
            bos_token_id=keys.get("tokenizer.ggml.bos_token_id", int, None),
            eos_token_ids=() if eos is None else (eos,),
        )
    except FormatError:
        raise
    except ValueError as error:
        raise keys.fail(str(error)) from None


def _vocab_size(keys: _Keys) -> int:
    embedding = keys.file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise keys.fail("tensor token_embd.weight is missing or not a matrix")
    rows = embedding.shape[0]
    if keys.get("vocab_size", int, rows) != rows:
        raise keys.fail(f"{keys.architecture}.vocab_size contradicts the {rows} rows of token_embd.weight")
    return rows


def _gemma_scale(keys: _Keys, layers: int, hidden: int, heads: int, head_dim: int) -> float:
    """Files rarely say it: head_dim ** -0.5, but the 27B model (62 layers) uses hidden_size / heads."""
    default = (hidden // heads if layers == 62 else head_dim) ** -0.5
    return keys.get("attention.scale", float, default)


def _sliding(keys: _Keys, layers: int, gemma: bool) -> tuple[tuple[bool, ...], int | None]:
    window = keys.get("attention.sliding_window", int, None)
    pattern = keys.file.metadata.get(f"{keys.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool and len(pattern) == layers:
        sliding = tuple(pattern.tolist())
    elif gemma and (pattern is None or isinstance(pattern, int)):
        every = pattern or GEMMA_FULL_EVERY
        sliding = tuple((layer + 1) % every != 0 for layer in range(layers))
    elif pattern is None:
        sliding = (window is not None,) * layers
    else:
        raise keys.fail(f"{keys.architecture}.attention.sliding_window_pattern is not understood: {pattern!r:.80}")
    return (sliding, window) if any(sliding) else ((), None)


def _rope(keys: _Keys) -> Rope:
    theta = keys.get("rope.freq_base", float)
    divisors = keys.file.tensors.get("rope_freqs.weight")
    kind = keys.get("rope.scaling.type", str, "none")
    if divisors is not None:
        if kind != "none":
            raise keys.fail(f"both rope_freqs.weight and rope scaling {kind!r} are given")
        return Rope(theta, freq_divisors=tuple(divisors.floats().ravel().tolist()))
    if kind == "none":
        return Rope(theta)
    if kind not in ("linear", "yarn"):
        raise keys.fail(f"rope scaling type must be none, linear or yarn, got {kind!r}")
    factor = keys.get("rope.scaling.factor", float)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if keys.get("rope.scaling.attn_factor", float, 1.0) != 1.0:
        raise keys.fail("rope.scaling.attn_factor other than 1 is not supported")
    return Rope(
        theta,
        "yarn",
        factor,
        original_context=keys.get("rope.scaling.original_context_length", int),
        beta_fast=keys.get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=keys.get("rope.scaling.yarn_beta_slow", float, 1.0),
    )
