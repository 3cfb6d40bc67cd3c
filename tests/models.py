"""Tiny random models of every architecture, for tests that need a forward pass and no training."""

import math

import numpy as np

from refllm.kernels.rope import Rope
from refllm.model.config import Experts, Latent, ModelConfig
from refllm.model.model import Model, Runtime

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
LATENT = ("deepseek_v2", "deepseek_v3")  # branches of their own: not what transforms and the compiled pass know

_COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    context_length=128,
    norm_eps=1e-5,
    rope=Rope(theta=10000.0),
    tied_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)

# Windows are far shorter than any prompt, so that a wrong mask cannot hide.
_SPECIAL = {
    "llama": {},
    "mistral": dict(sliding_window=7, sliding_layers=(True, True)),
    "qwen2": dict(attention_bias=True, tied_embeddings=True),
    "qwen3": dict(qk_norm=True, head_dim=10),  # head_dim != hidden_size / num_heads
    "gemma3": dict(
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        tied_embeddings=True,
        embedding_scale=32**0.5,
        attention_scale=12**-0.5,
        activation="gelu_tanh",
        sliding_window=5,
        sliding_layers=(True, False),
        rope=Rope(theta=1e6, scaling="linear", factor=8.0),
        rope_local=Rope(theta=10000.0),
    ),
    # Every width another one, so that none can stand in for another. One dense layer, one of experts.
    "deepseek_v2": dict(
        num_kv_heads=1,
        head_dim=10,
        latent=Latent(q_rank=None, kv_rank=12, nope_dim=6, rope_dim=4, value_dim=7),
        experts=Experts(
            count=6,
            active=2,
            intermediate_size=20,
            shared=2,
            first_layer=1,
            groups=3,
            active_groups=2,
            scoring="softmax",
            normalised=False,
            scaling=2.0,
        ),
    ),
    "deepseek_v3": dict(
        num_kv_heads=1,
        head_dim=14,
        latent=Latent(q_rank=20, kv_rank=16, nope_dim=8, rope_dim=6, value_dim=8),
        experts=Experts(
            count=8, active=3, intermediate_size=24, shared=1, first_layer=1, groups=4, active_groups=2, scaling=2.5
        ),
        rope=Rope(10000.0, "yarn", 8.0, original_context=32, attention_factor=0.9),
        attention_scale=14**-0.5 * (0.1 * math.log(8) + 1) ** 2,  # yarn's mscale for all dimensions
    ),
}


def random_config(architecture: str = "llama", **overrides) -> ModelConfig:
    """The config of a tiny model; `overrides` are fields of ModelConfig.

    Per-layer windows follow `num_layers` when that is overridden and `sliding_layers` is not.
    """
    values = _COMMON | _SPECIAL[architecture] | overrides
    slides = values.get("sliding_layers", ())
    if slides and "sliding_layers" not in overrides:
        values["sliding_layers"] = tuple(slides[i % len(slides)] for i in range(values["num_layers"]))
    return ModelConfig(architecture=architecture, **values)


def random_model(
    architecture: str = "llama", dtype=np.float32, *, seed: int = 0, runtime: Runtime | None = None, **overrides
) -> Model:
    """A model with seeded random weights and no tokenizer.

    Parameters
    ----------
    architecture : one of ARCHITECTURES or LATENT
    dtype : float32 or float64
        Both are cast from the same float64 numbers.
    seed : int
    runtime : Runtime, optional
    overrides :
        Fields of ModelConfig: qk_norm=True, sliding_window=5, sliding_layers=(True, False), context_length=20 ...
    """
    config = random_config(architecture, **overrides)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        w = rng.normal(0.0, 0.2, shape)
        if name.endswith("norm.weight"):
            w += 1.0 - config.norm_offset  # gains near 1
        weights[name] = w.astype(dtype)
    return Model(config=config, weights=weights, name=f"random-{architecture}", runtime=runtime or Runtime())


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that this config calls for."""
    if config.latent is not None:
        return _latent_shapes(config)
    d, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    wide, narrow = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    linears = {
        "self_attn.q_proj": ((wide, d), config.attention_bias),
        "self_attn.k_proj": ((narrow, d), config.attention_bias),
        "self_attn.v_proj": ((narrow, d), config.attention_bias),
        "self_attn.o_proj": ((d, wide), config.output_bias),
        "mlp.gate_proj": ((inner, d), config.mlp_bias),
        "mlp.up_proj": ((inner, d), config.mlp_bias),
        "mlp.down_proj": ((d, inner), config.mlp_bias),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": (d,) for name in norms}
        if config.qk_norm:
            shapes |= {f"{prefix}self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
        for name, (shape, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes


def _latent_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, H, latent, experts = config.hidden_size, config.num_heads, config.latent, config.experts
    shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        of_layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        if latent.q_rank is None:
            of_layer["self_attn.q_proj"] = (H * (latent.nope_dim + latent.rope_dim), d)
        else:
            of_layer["self_attn.q_a_proj"] = (latent.q_rank, d)
            of_layer["self_attn.q_a_layernorm"] = (latent.q_rank,)
            of_layer["self_attn.q_b_proj"] = (H * (latent.nope_dim + latent.rope_dim), latent.q_rank)
        of_layer["self_attn.kv_a_proj_with_mqa"] = (latent.kv_rank + latent.rope_dim, d)
        of_layer["self_attn.kv_a_layernorm"] = (latent.kv_rank,)
        of_layer["self_attn.kv_b_proj"] = (H * (latent.nope_dim + latent.value_dim), latent.kv_rank)
        of_layer["self_attn.o_proj"] = (d, H * latent.value_dim)
        branches = {"mlp": config.intermediate_size}
        if experts is not None and layer >= experts.first_layer:
            branches = {f"mlp.experts.{i}": experts.intermediate_size for i in range(experts.count)}
            branches |= {"mlp.shared_experts": experts.shared * experts.intermediate_size} if experts.shared else {}
            of_layer["mlp.gate"] = (experts.count, d)
            if experts.scoring == "sigmoid":
                shapes[prefix + "mlp.gate.e_score_correction_bias"] = (experts.count,)
        for name, width in branches.items():
            of_layer |= {
                f"{name}.gate_proj": (width, d),
                f"{name}.up_proj": (width, d),
                f"{name}.down_proj": (d, width),
            }
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in of_layer.items()}
        for name, width in (("q_a_proj", latent.q_rank), ("kv_a_proj_with_mqa", latent.kv_rank + latent.rope_dim)):
            if config.attention_bias and width is not None:
                shapes[f"{prefix}self_attn.{name}.bias"] = (width,)
        if config.output_bias:
            shapes[f"{prefix}self_attn.o_proj.bias"] = (d,)
    return shapes
