"""Tiny random models of every architecture, for tests that need a forward pass and no training."""

import numpy as np

from refllm.kernels.rope import Rope
from refllm.model.config import ModelConfig
from refllm.model.model import Model, Runtime

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")

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
    architecture : one of ARCHITECTURES
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
