"""The tensors a ModelConfig calls for, by name, and the check that a checkpoint holds exactly these."""

from collections.abc import Mapping

from refllm.formats.errors import FormatError
from refllm.model.config import ModelConfig

ROUTER, ROUTER_BIAS = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"  # of a layer with experts


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of this config; linears are (out, in).

    Examples
    --------
    >>> from refllm.model.config import Rope
    >>> config = ModelConfig("llama", 8, 4, 1, 2, 1, 2, 6, 16, 1e-5, Rope(1e4), True)
    >>> expected_shapes(config)["model.layers.0.self_attn.k_proj.weight"]
    (2, 4)
    """
    d = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in linear_shapes(config, layer).items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes |= {f"{prefix}{name}": shape for name, shape in _other_shapes(config, layer).items()}
    shapes["model.norm.weight"] = (d,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def linear_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, int, bool]]:
    """The linears of a layer in the order in which they run: {name: (out, in, whether it has a bias)}."""
    return _attention(config, layer) | (
        _experts(config)
        if config.has_experts(layer)
        else _gated("mlp", config.hidden_size, config.intermediate_size, config.mlp_bias)
    )


def _attention(config: ModelConfig, layer: int) -> dict[str, tuple[int, int, bool]]:
    d, heads, bias, D = config.hidden_size, config.num_heads, config.attention_bias, config.head_dim
    q, kv = heads * D, config.num_kv_heads * D
    if config.low_rank_kv is not None:
        low = config.low_rank_kv
        of_key, of_value = low.key_ranks[layer], low.value_ranks[layer]
        shapes = {"q_proj": (q, d, bias), "k_proj": (low.groups * of_key, d, False)}
        shapes["v_proj"] = (low.groups * of_value, d, False)
        shapes |= {f"k_up_proj.{group}": (kv // low.groups, of_key, bias) for group in range(low.groups)}
        shapes["o_proj"] = (d, heads * of_value, config.output_bias)
    elif config.factored is not None:
        rank, reuse = config.factored.query_rank, config.factored.reuse_keys
        shapes = {"q_a_proj": (rank, d, False), "q_b_proj": (q, rank, bias), "k_proj": (kv, d, bias)}
        shapes["v_proj"] = (kv, kv, False) if reuse else (kv, d, bias)
        shapes["o_proj"] = (d, q, config.output_bias)
    elif config.latent is None:
        shapes = {"q_proj": (q, d, bias), "k_proj": (kv, d, bias), "v_proj": (kv, d, bias)}
        shapes["o_proj"] = (d, q, config.output_bias)
    else:
        latent = config.latent
        if latent.q_rank is None:
            shapes = {"q_proj": (q, d, False)}
        else:
            shapes = {"q_a_proj": (latent.q_rank, d, bias), "q_b_proj": (q, latent.q_rank, False)}
        shapes["kv_a_proj_with_mqa"] = (latent.kv_rank + latent.rope_dim, d, bias)
        shapes["kv_b_proj"] = (heads * (latent.nope_dim + latent.value_dim), latent.kv_rank, False)
        shapes["o_proj"] = (d, heads * latent.value_dim, config.output_bias)
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _gated(prefix: str, d: int, width: int, bias: bool) -> dict[str, tuple[int, int, bool]]:
    names = {"gate_proj": (width, d, bias), "up_proj": (width, d, bias), "down_proj": (d, width, bias)}
    return {f"{prefix}.{name}": shape for name, shape in names.items()}


def _experts(config: ModelConfig) -> dict[str, tuple[int, int, bool]]:
    """The router is none of them: it is kept in full."""
    experts, d, shapes = config.experts, config.hidden_size, {}
    for i in range(experts.count):
        shapes |= _gated(f"mlp.experts.{i}", d, experts.intermediate_size, False)
    if experts.shared:
        shapes |= _gated("mlp.shared_experts", d, experts.shared * experts.intermediate_size, False)
    return shapes


def _other_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Norms, the gains of reused keys, and the router of experts."""
    d = config.hidden_size
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if config.post_norms:
        norms |= {"pre_feedforward_layernorm": d, "post_feedforward_layernorm": d}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    if config.latent is not None:
        norms["self_attn.kv_a_layernorm"] = config.latent.kv_rank
        if config.latent.q_rank is not None:
            norms["self_attn.q_a_layernorm"] = config.latent.q_rank
    if config.factored is not None and config.factored.query_norm:
        norms["self_attn.q_a_layernorm"] = config.factored.query_rank
    if config.factored is not None and config.factored.reuse_keys:
        norms["self_attn.v_gate"] = config.head_dim
    others: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,) for name, width in norms.items()}
    if config.has_experts(layer):
        others[ROUTER] = (config.experts.count, d)
        if config.experts.scoring == "sigmoid":
            others[ROUTER_BIAS] = (config.experts.count,)
    return others


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
