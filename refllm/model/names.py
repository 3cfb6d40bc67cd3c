"""The tensors a ModelConfig calls for, by name, and the check that a checkpoint holds exactly these."""

from collections.abc import Mapping

from refllm.formats.errors import FormatError
from refllm.model.config import ModelConfig


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of this config; linears are (out, in).

    Examples
    --------
    >>> from refllm.model.config import Rope
    >>> config = ModelConfig("llama", 8, 4, 1, 2, 1, 2, 6, 16, 1e-5, Rope(1e4), True)
    >>> expected_shapes(config)["model.layers.0.self_attn.k_proj.weight"]
    (2, 4)
    """
    d, ff = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q, d, config.attention_bias),
        "self_attn.k_proj": (kv, d, config.attention_bias),
        "self_attn.v_proj": (kv, d, config.attention_bias),
        "self_attn.o_proj": (d, q, config.output_bias),
        "mlp.gate_proj": (ff, d, config.mlp_bias),
        "mlp.up_proj": (ff, d, config.mlp_bias),
        "mlp.down_proj": (d, ff, config.mlp_bias),
    }
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if config.post_norms:
        norms |= {"pre_feedforward_layernorm": d, "post_feedforward_layernorm": d}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes |= {f"{prefix}{name}.weight": (width,) for name, width in norms.items()}
    shapes["model.norm.weight"] = (d,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def check_weights(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: object = None
) -> None:
    """Raise one FormatError that lists missing tensors, unexpected tensors, or the first wrong shape."""
    for word, names in (
        ("the checkpoint lacks", [name for name in expected if name not in found]),
        (
            "the checkpoint holds tensors the config does not call for:",
            [name for name in found if name not in expected],
        ),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise FormatError(f"{word} {', '.join(names[:3])}{more}", path=path)
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise FormatError(f"{name} has shape {tuple(found[name])}, the config calls for {shape}", path=path)
