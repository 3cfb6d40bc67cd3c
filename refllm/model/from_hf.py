"""Hugging Face config.json -> ModelConfig, and the checkpoint's tensors -> weights. What is not understood raises.

Both generations of config.json are read: transformers 4 wrote `rope_theta` and `rope_scaling`, transformers 5 writes
`rope_parameters` (for Gemma 3 one per kind of layer). A missing rope theta is an error, never 10000: that default made
models of longer context fail without a word. The output head is tied only if config and tensors agree.
"""

import math

import numpy as np

from refllm.formats.errors import FormatError
from refllm.formats.hf import HFFolder
from refllm.formats.tensors import StoredTensor
from refllm.kernels.packed.records import Record
from refllm.model.config import Experts, Latent, ModelConfig, Rope
from refllm.model.names import ROUTER, check_weights, expected_shapes
from refllm.model.quantized import HEAD, take_records

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
_DEEPSEEK = ("deepseek_v2", "deepseek_v3")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
# Values that would change the forward pass in a way refllm does not compute.
_MUST_BE = {
    "use_bidirectional_attention": (False, None),
    "partial_rotary_factor": (1.0, None),
    "is_decoder": (True, None),
    "moe_layer_freq": (1, None),
}
_BUFFERS = ("rotary_emb.inv_freq",)  # old checkpoints store what the config already says
EMBEDDING = "model.embed_tokens.weight"
_OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def read_model(folder: HFFolder, dtype: str = "float32") -> tuple[ModelConfig, dict[str, np.ndarray | Record]]:
    """Config and weights of an opened folder; quantised weights stay packed.

    Parameters
    ----------
    folder : HFFolder
        From `refllm.formats.hf.open_hf`.
    dtype : "float32" or "float64"
        float16 and bfloat16 weights are widened to it; float64 weights stay float64 only when it is "float64".

    Raises
    ------
    FormatError
        One line naming the key or tensor that is missing, unknown, contradictory, misshapen, or not finite.
    """
    tensors = text_tensors(folder.tensors)
    has_head = any(name.startswith(f"{HEAD}.") for name in tensors)
    config = parse_config(folder.config, folder.generation, has_head, path=folder.path / "config.json")
    if config.tied_embeddings:
        _drop_tied_copy(tensors, folder)
    if config.architecture in _DEEPSEEK:  # what predicts a second token stands behind the last layer
        behind = f"model.layers.{config.num_layers}."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(behind)}
    shapes = expected_shapes(config)
    weights = {}
    if folder.quantization is not None:
        weights = take_records(folder.quantization, tensors, linears(config), folder.quantization_path)
    check_weights(shapes, {name: weight.shape for name, weight in (tensors | weights).items()}, path=folder.path)
    for name, tensor in tensors.items():
        array = tensor.floats().astype(dtype, copy=False)
        if not np.isfinite(array).all():
            raise FormatError(f"weight {name!r} holds NaN or infinity", path=tensor.path, offset=tensor.offset)
        weights[name] = array
    return config, {name: weights[name] for name in shapes}


def linears(config: ModelConfig) -> list[str]:
    """Names of the modules that a checkpoint can hold quantised: the linears of all layers, and an untied head."""
    shapes = expected_shapes(config)
    kept = lambda name: name == EMBEDDING or name.endswith(ROUTER)
    return [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2 and not kept(name)]


def text_tensors(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The language model's tensors under the names of a plain Llama, buffers and other modalities left out."""
    result = {}
    for name, tensor in tensors.items():
        if name.startswith(_OTHER_MODALITIES) or name.endswith(_BUFFERS):
            continue
        for old, new in (
            ("model.language_model.", "model."),
            ("language_model.model.", "model."),
            ("language_model.", ""),
        ):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        result[name] = tensor
    return result


def _drop_tied_copy(tensors: dict[str, StoredTensor], folder: HFFolder) -> None:
    """A tied checkpoint may still carry the head; it must be the embedding then."""
    head = tensors.pop("lm_head.weight", None)
    embedding = tensors.get(EMBEDDING)
    if head is not None and embedding is not None and not np.array_equal(head.stored(), embedding.stored()):
        message = "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight"
        raise FormatError(message, path=folder.path)


def parse_config(config: dict, generation: dict, has_head: bool, path: object = None) -> ModelConfig:
    """ModelConfig of a config.json dictionary.

    Parameters
    ----------
    config, generation : dict
        config.json and generation_config.json ({} if missing); the latter's eos_token_id goes first.
    has_head : bool
        Whether the checkpoint holds lm_head.weight.
    path : optional
        For error messages.

    Raises
    ------
    FormatError
    """
    architecture = _architecture(config, path)
    nested = config.get("text_config")
    text = config | nested if isinstance(nested, dict) else config
    read = _Reader(text, path)
    for key, allowed in _MUST_BE.items():
        if text.get(key) not in allowed:
            raise read.fail(f"{key} = {text[key]!r} is not supported (only {allowed[0]!r})")
    gemma = architecture == "gemma3"
    hidden, heads, layers = read.size("hidden_size"), read.size("num_attention_heads"), read.size("num_hidden_layers")
    latent = _latent(read) if architecture in _DEEPSEEK else None
    if latent is None:
        kv_heads = read.size("num_key_value_heads", heads)  # left out by configs older than grouped queries
        head_dim = _head_dim(read, architecture, hidden, heads)
        scale = read.number("query_pre_attn_scalar") ** -0.5 if gemma else None
    else:
        kv_heads, head_dim = 1, latent.nope_dim + latent.rope_dim
        scale = _yarn_scale(read, head_dim)
    sliding, window = _sliding(read, architecture, layers)
    rope, rope_local = _ropes(read, gemma)
    bias = architecture == "qwen2" or read.flag("attention_bias", False)
    stops = generation.get("eos_token_id", text.get("eos_token_id"))
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=read.size("intermediate_size"),
            context_length=read.size("max_position_embeddings"),
            norm_eps=read.number("rms_norm_eps"),
            rope=rope,
            rope_local=rope_local,
            tied_embeddings=_tied(read, has_head),
            activation=_activation(read),
            attention_bias=bias,
            output_bias=bias and architecture != "qwen2",
            mlp_bias=read.flag("mlp_bias", False),
            qk_norm=architecture in ("qwen3", "gemma3"),
            norm_offset=1.0 if gemma else 0.0,
            post_norms=gemma,
            embedding_scale=math.sqrt(hidden) if gemma else 1.0,
            attention_scale=scale,
            attention_softcap=read.number("attn_logit_softcapping", None),
            logit_softcap=read.number("final_logit_softcapping", None),
            sliding_window=window,
            sliding_layers=sliding,
            bos_token_id=read.token_ids(text.get("bos_token_id"), "bos_token_id", 1),
            eos_token_ids=read.token_ids(stops, "eos_token_id"),
            latent=latent,
            experts=None if latent is None else _experts(read, architecture),
        )
    except FormatError:
        raise
    except ValueError as error:
        raise read.fail(str(error)) from None


class _Reader:
    """Typed access to a config dictionary: every error names the file and the key."""

    def __init__(self, values: dict, path: object):
        self.values, self.path = values, path

    def fail(self, message: str) -> FormatError:
        """The error to raise, with the path of the file."""
        return FormatError(message, path=self.path)

    def _get(self, key, kinds, word, default):
        value = self.values.get(key)
        if value is None:
            if default == "required":
                raise self.fail(f"{key} is missing; it must be {word}")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self.fail(f"{key} must be {word}, got {value!r}")
        return value

    def size(self, key: str, default="required") -> int:
        """A positive integer. Raises FormatError for anything else, or if it is missing without a default."""
        value = self._get(key, int, "a positive integer", default)
        if value is not None and not 0 < value < 1 << 31:
            raise self.fail(f"{key} must be a positive integer, got {value}")
        return value

    def count(self, key: str, default="required") -> int:
        """An integer that may be 0, as `size`."""
        value = self._get(key, int, "a number from 0", default)
        if not 0 <= value < 1 << 31:
            raise self.fail(f"{key} must be a number from 0, got {value}")
        return value

    def number(self, key: str, default="required") -> float | None:
        """A positive finite number, as `size`."""
        value = self._get(key, (int, float), "a positive number", default)
        if value is not None and not 0 < value < math.inf:
            raise self.fail(f"{key} must be a positive number, got {value}")
        return None if value is None else float(value)

    def flag(self, key: str, default="required") -> bool | None:
        """true or false, as `size`."""
        return self._get(key, bool, "true or false", default)

    def token_ids(self, value: object, key: str, limit: int | None = None):
        """None, an id or a list of ids -> a tuple; with limit 1 a single id or None."""
        ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.fail(f"{key} must be a token id or a list of them, got {value!r}")
        if limit == 1:
            return ids[0] if ids else None
        return ids


def _architecture(config: dict, path: object) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(ARCHITECTURES):
        message = f"architectures must be one of {', '.join(ARCHITECTURES)}, got {names!r}"
        raise FormatError(message, path=path)
    architecture = ARCHITECTURES[names[0]]
    model_type = config.get("model_type", architecture)
    if model_type not in (architecture, f"{architecture}_text"):
        raise FormatError(f"architectures {names[0]} contradicts model_type {model_type!r}", path=path)
    return architecture


def _head_dim(read: _Reader, architecture: str, hidden: int, heads: int) -> int:
    given = read.size("head_dim", None)
    if given is not None:
        return given
    if architecture in ("qwen3", "gemma3"):
        raise read.fail(f"head_dim is missing; {architecture} does not derive it from hidden_size")
    if hidden % heads:
        raise read.fail(f"head_dim is missing and hidden_size {hidden} is not a multiple of {heads} heads")
    return hidden // heads


def _latent(read: _Reader) -> Latent:
    return Latent(
        q_rank=read.size("q_lora_rank", None),
        kv_rank=read.size("kv_lora_rank"),
        nope_dim=read.size("qk_nope_head_dim"),
        rope_dim=read.size("qk_rope_head_dim"),
        value_dim=read.size("v_head_dim"),
        interleaved=read.flag("rope_interleave", True),
    )


def _experts(read: _Reader, architecture: str) -> Experts | None:
    """The mixture of experts; None where the config says there is none (n_routed_experts null)."""
    if read.values.get("n_routed_experts", 0) is None:
        return None
    count = read.size("n_routed_experts")
    v3 = architecture == "deepseek_v3"
    scoring, method = ("sigmoid", ("noaux_tc",)) if v3 else ("softmax", ("greedy", "group_limited_greedy"))
    for key, allowed in (("scoring_func", (scoring,)), ("topk_method", method)):
        if read.values.get(key) not in (None, *allowed):
            raise read.fail(f"{key} = {read.values[key]!r} is not supported ({' or '.join(allowed)} of {architecture})")
    normalised = read.flag("norm_topk_prob", v3)
    if normalised and not v3:
        raise read.fail("norm_topk_prob true is not supported for deepseek_v2")
    grouped = v3 or read.values.get("topk_method") == "group_limited_greedy"
    return Experts(
        count=count,
        active=read.size("num_experts_per_tok"),
        intermediate_size=read.size("moe_intermediate_size"),
        shared=read.count("n_shared_experts", 0),
        first_layer=read.count("first_k_dense_replace", 0),
        groups=read.size("n_group", 1) if grouped else 1,
        active_groups=read.size("topk_group", 1) if grouped else 1,
        scoring=scoring,
        normalised=normalised,
        scaling=read.number("routed_scaling_factor", 1.0),
    )


def _yarn_scale(read: _Reader, head_dim: int) -> float | None:
    """DeepSeek's scores with yarn: head_dim^-0.5 times the square of the mscale that holds for all dimensions."""
    values = read.values.get("rope_parameters") or read.values.get("rope_scaling") or {}
    inner = _Reader(values, read.path)
    everywhere = inner.number("mscale_all_dim", None) if isinstance(values, dict) else None
    if everywhere is None or values.get("rope_type", values.get("type", "default")) == "default":
        return None
    return head_dim**-0.5 * _mscale(inner.number("factor"), everywhere) ** 2


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _tied(read: _Reader, has_head: bool) -> bool:
    tied = read.flag("tie_word_embeddings", not has_head)
    if not tied and not has_head:
        raise read.fail("tie_word_embeddings is false but the checkpoint holds no lm_head.weight")
    return tied


def _activation(read: _Reader) -> str:
    name = read.values.get("hidden_activation") or read.values.get("hidden_act")
    if name not in list(_ACTIVATIONS):
        raise read.fail(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _sliding(read: _Reader, architecture: str, layers: int) -> tuple[tuple[bool, ...], int | None]:
    """Which layers see only a window, and its width."""
    window, kinds = read.size("sliding_window", None), read.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise read.fail(f"layer_types must name {layers} layers, got {kinds!r:.80}")
        if unknown := set(map(str, kinds)) - {"full_attention", "sliding_attention"}:
            raise read.fail(
                f"layer_types holds {', '.join(sorted(unknown))}; full_attention or sliding_attention expected"
            )
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    elif architecture == "gemma3":
        every = read.size("sliding_window_pattern", None) or read.size("_sliding_window_pattern")
        sliding = tuple((layer + 1) % every != 0 for layer in range(layers))
    elif architecture == "mistral":
        sliding = (window is not None,) * layers
    elif architecture in ("qwen2", "qwen3") and read.flag("use_sliding_window", False):
        first = read.size("max_window_layers")
        sliding = tuple(layer >= first for layer in range(layers))
    else:
        sliding = ()
    if not any(sliding):
        return (), None
    if window is None:
        raise read.fail("some layers slide but sliding_window is missing")
    return sliding, window


def _ropes(read: _Reader, gemma: bool) -> tuple[Rope, Rope | None]:
    """The rotary embedding of the full and, where it differs, of the sliding layers, from either generation's keys."""
    new = read.values.get("rope_parameters")
    if new is None:
        rope = _old_rope(read, read.number("rope_theta"))
        return rope, Rope(read.number("rope_local_base_freq")) if gemma else None
    if not isinstance(new, dict):
        raise read.fail(f"rope_parameters must be an object, got {new!r:.80}")
    kinds = {"full_attention", "sliding_attention"} & set(new)
    if not kinds:
        if gemma:
            raise read.fail("rope_parameters of Gemma 3 must give full_attention and sliding_attention")
        rope, local = _rope(read, new, "rope_parameters"), None
    else:
        if set(new) != {"full_attention", "sliding_attention"} or not all(isinstance(new[k], dict) for k in kinds):
            raise read.fail(f"rope_parameters must give full_attention and sliding_attention, got {sorted(new)}")
        rope, local = (
            _rope(read, new[kind], f"rope_parameters.{kind}") for kind in ("full_attention", "sliding_attention")
        )
    theta = read.number("rope_theta", None)
    if theta is not None and theta != rope.theta:
        raise read.fail(f"rope_theta {theta} contradicts rope_parameters, which say {rope.theta}")
    if read.values.get("rope_scaling") is not None and _old_rope(read, rope.theta) != rope:
        raise read.fail("rope_scaling contradicts rope_parameters")
    return rope, local


def _old_rope(read: _Reader, theta: float) -> Rope:
    """From `rope_theta` and `rope_scaling`, the keys of transformers 4."""
    scaling = read.values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise read.fail(f"rope_scaling must be an object, got {scaling!r:.80}")
    if scaling.get("rope_theta", theta) != theta:
        raise read.fail(f"rope_scaling says rope_theta {scaling['rope_theta']}, the config {theta}")
    return _rope(read, scaling | {"rope_theta": theta}, "rope_scaling")


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_ROPE_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")}


def _rope(read: _Reader, given: dict, where: str) -> Rope:
    """One rope dictionary; every key must be understood."""
    if not isinstance(given, dict):
        raise read.fail(f"{where} must be an object, got {given!r:.80}")
    values = {key: value for key, value in given.items() if value is not None}
    kind = values.pop("rope_type", values.pop("type", "default"))
    if given.get("type") not in (None, kind):
        raise read.fail(f"{where} says both type {given['type']!r} and rope_type {kind!r}")
    values.pop("type", None)
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise read.fail(f"{where} has rope type {kind!r}; known: {', '.join(_ROPE_KEYS)}")
    inner = _Reader(values, f"{read.path}: {where}" if read.path is not None else where)
    required, optional = ("rope_theta", *_ROPE_KEYS[kind]), _ROPE_OPTIONAL.get(kind, ())
    numbers = {key: inner.number(key) for key in required}
    numbers |= {key: inner.number(key) for key in optional if key in values}
    # partial_rotary_factor 1 and truncate true say nothing new; other keys would change the result.
    harmless = {"partial_rotary_factor": 1.0, "truncate": True}
    unknown = {k: v for k, v in values.items() if k not in numbers and (k not in harmless or v != harmless[k])}
    if kind == "default":  # transformers leaves these beside the default type
        unknown = {k: v for k, v in unknown.items() if not (k == "factor" and v == 1.0)}
    if unknown:
        raise read.fail(f"{where} of type {kind!r} has keys that are not understood: {', '.join(sorted(unknown))}")
    mscale, everywhere = numbers.pop("mscale", None), numbers.pop("mscale_all_dim", None)
    if mscale and everywhere and "attention_factor" not in numbers:  # one of the two alone says nothing of cos and sin
        numbers["attention_factor"] = _mscale(numbers["factor"], mscale) / _mscale(numbers["factor"], everywhere)
    theta, original = numbers.pop("rope_theta"), int(numbers.pop("original_max_position_embeddings", 0))
    return Rope(theta, None if kind == "default" else kind, original_context=original, **numbers)
