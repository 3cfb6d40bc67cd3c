"""Changes of the weights that leave the function of a model as it is.

Between two weights without a non-linearity that minds, a factor or a rotation can be moved from one to the other:

    norm -> readers    gain[c] / s[c]            every linear that reads the norm: W[:, c] * s[c]
    v -> o             v row of channel c / s    o columns that read it * s, in every head of the group
    up -> down         up row c / s              down column c * s
    q, k               q rows j, j + D/2 * s     k rows j, j + D/2 / s, one s for both: they turn together (RoPE)
    residual stream    every reader's W @ Q, every writer's Q^T @ W, after the gains of the norms moved into the readers
    v -> o             v rows of a head R^T @ W, o columns W @ R
    into o, into down  W @ Q stored, inputs turned by Q at run time: nothing before them lets a rotation through

SmoothQuant, AWQ, Outlier Suppression+ and the rotations are these steps with a rule for s or Q. Functions take a
dictionary of weights that the caller owns (a copy of model.weights) and replace entries; arrays are not written to.
They compute in float64 and store the dtype that came.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from refllm.kernels.hadamard import has_hadamard
from refllm.kernels.packed.rotated import Rotated
from refllm.model.config import ModelConfig
from refllm.model.model import Model

EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def check_dense(model: Model, purpose: str) -> None:
    """Raise ValueError unless every weight is an array: a factor cannot be moved into codes."""
    packed = [name for name, weight in model.weights.items() if not isinstance(weight, np.ndarray)]
    if packed:
        raise ValueError(
            f"{purpose} in dense weights, but {packed[0]} is packed; load the uncompressed model, or put this stage "
            "before those that pack"
        )


def check_foldable(model: Model, purpose: str) -> None:
    """`check_dense`, and raise ValueError unless every layer has the seven linears of a Llama layer."""
    check_dense(model, purpose)
    if model.config.special:
        raise ValueError(
            f"{purpose} between the seven linears of a Llama layer, but {model.config.architecture} has "
            f"{model.config.special}; leave this stage out, methods that pack weights one by one do work"
        )


def rows_with_bias(weights: dict, name: str) -> np.ndarray:
    """A projection as float64 [out, in + 1]: its bias, or zeros, is the last column."""
    w = weights[f"{name}.weight"].astype(np.float64)
    return np.column_stack([w, weights.get(f"{name}.bias", np.zeros(len(w)))])


def store_rows(weights: dict, name: str, rows: np.ndarray) -> None:
    """The inverse of `rows_with_bias`, of any number of rows (..., in + 1), in the type that was there."""
    rows = rows.reshape(-1, rows.shape[-1])
    weights[f"{name}.weight"] = rows[:, :-1].astype(weights[f"{name}.weight"].dtype)
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"] = rows[:, -1].astype(weights[f"{name}.bias"].dtype)


def norm_readers(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """The two norms of a layer that linears read: {name of the gain: names of the weights}."""
    prefix = f"model.layers.{layer}."
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        before_mlp: ("mlp.gate_proj", "mlp.up_proj"),
    }
    return {
        f"{prefix}{norm}.weight": tuple(f"{prefix}{of}.weight" for of in linears) for norm, linears in readers.items()
    }


def scale_weight(
    weights: dict, name: str, *, rows: np.ndarray | None = None, columns: np.ndarray | None = None
) -> None:
    """A weight with its rows (and its bias with them) and its columns multiplied.

    Parameters
    ----------
    rows : (out,), columns : (in,) float64
    """
    weight = weights[name].astype(np.float64)
    if rows is not None:
        weight = weight * rows[:, None]
        bias = name.removesuffix("weight") + "bias"
        if bias in weights:
            weights[bias] = (weights[bias] * rows).astype(weights[bias].dtype)
    if columns is not None:
        weight = weight * columns
    weights[name] = weight.astype(weights[name].dtype)


def scale_gain(weights: dict, name: str, factor: np.ndarray, offset: float) -> None:
    """Multiply a norm's gain: the norm multiplies by (offset + stored), and that sum takes the factor."""
    gain = weights[name]
    weights[name] = ((gain.astype(np.float64) + offset) * factor - offset).astype(gain.dtype)


def divide_norm(weights: dict, config: ModelConfig, norm: str, readers: Iterable[str], s: np.ndarray) -> None:
    """The output of a norm divided by s (d,), the columns of all its readers multiplied."""
    scale_gain(weights, norm, 1 / s, config.norm_offset)
    for name in readers:
        scale_weight(weights, name, columns=s)


def divide_values(weights: dict, config: ModelConfig, layer: int, s: np.ndarray) -> None:
    """Values divided by s (Hk * D,), the columns of o that read them multiplied.

    Query heads of one group read the same values, so s is one number for each channel of a key-value head.
    """
    prefix, group = f"model.layers.{layer}.self_attn.", config.num_heads // config.num_kv_heads
    scale_weight(weights, prefix + "v_proj.weight", rows=1 / s)
    columns = np.repeat(s.reshape(config.num_kv_heads, config.head_dim), group, axis=0).ravel()
    scale_weight(weights, prefix + "o_proj.weight", columns=columns)


def divide_gated(weights: dict, layer: int, s: np.ndarray) -> None:
    """act(gate) * up divided by s (intermediate,) through up, the columns of down multiplied."""
    prefix = f"model.layers.{layer}.mlp."
    scale_weight(weights, prefix + "up_proj.weight", rows=1 / s)
    scale_weight(weights, prefix + "down_proj.weight", columns=s)


def divide_keys(weights: dict, config: ModelConfig, layer: int, s: np.ndarray) -> None:
    """Keys divided by s (Hk, D / 2), queries of the group multiplied.

    One factor for the two halves j and j + D/2 that the rotary embedding turns together; only then do scores stay.

    Raises
    ------
    ValueError
        The model norms q and k, which would undo a factor on them.
    """
    if config.qk_norm:
        raise ValueError("this model norms q and k, which would undo a factor on them")
    prefix, group = f"model.layers.{layer}.self_attn.", config.num_heads // config.num_kv_heads
    both = np.concatenate([s, s], axis=1)
    scale_weight(weights, prefix + "k_proj.weight", rows=1 / both.ravel())
    scale_weight(weights, prefix + "q_proj.weight", rows=np.repeat(both, group, axis=0).ravel())


def fold_norms(model: Model) -> Model:
    """The gains of all norms that linears read moved into these linears; what is left multiplies by one.

    The head is untied from the embedding, since only it reads the last norm.

    Raises
    ------
    ValueError
        Packed weights.
    """
    check_foldable(model, "norms are folded")
    config, weights = model.config, dict(model.weights)
    if config.tied_embeddings:
        weights[HEAD] = weights[EMBEDDING].copy()
        config = replace(config, tied_embeddings=False)
    readers = {LAST_NORM: (HEAD,)}
    for layer in range(config.num_layers):
        readers |= norm_readers(config, layer)
    for norm, names in readers.items():
        gain = weights[norm].astype(np.float64) + config.norm_offset
        for name in names:
            scale_weight(weights, name, columns=gain)
        weights[norm] = np.full_like(weights[norm], 1 - config.norm_offset)
    return replace(model, config=config, weights=weights)


def rotate_residual(model: Model, Q: np.ndarray) -> Model:
    """The residual stream in another basis: x Q for an orthogonal Q (d, d), in a model whose norms are folded.

    Raises
    ------
    ValueError
        A norm with a gain (a rotation mixes what it scales apart), norms on branches, Q of another size or not
        orthogonal.
    """
    check_foldable(model, "the residual stream is rotated")
    config, weights = model.config, dict(model.weights)
    d = config.hidden_size
    if Q.shape != (d, d) or np.abs(Q.T @ Q - np.eye(d)).max() > 1e-6:
        raise ValueError(f"the residual stream needs an orthogonal matrix ({d}, {d}), got {Q.shape}, or not orthogonal")
    if config.post_norms:
        raise ValueError(
            f"{config.architecture} norms what each branch returns, with a gain that cannot be folded: "
            "its residual stream cannot be rotated"
        )
    names = [LAST_NORM] + [norm for layer in range(config.num_layers) for norm in norm_readers(config, layer)]
    if uneven := [name for name in names if np.any(weights[name] + config.norm_offset != 1)]:
        raise ValueError(f"{uneven[0]} has a gain; fold the norms first (fold_norms)")
    for name in [HEAD, EMBEDDING] + [n for layer in range(config.num_layers) for n in _readers(config, layer)]:
        weights[name] = (weights[name].astype(np.float64) @ Q).astype(weights[name].dtype)
    for layer in range(config.num_layers):
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            for part in ("weight", "bias"):
                name = f"model.layers.{layer}.{linear}.{part}"
                if name in weights:  # Q^T W and Q^T b
                    weights[name] = (Q.T @ weights[name].astype(np.float64)).astype(weights[name].dtype)
    return replace(model, weights=weights)


def _readers(config: ModelConfig, layer: int) -> list[str]:
    return [name for names in norm_readers(config, layer).values() for name in names]


def rotate_values(model: Model, layer: int, R: np.ndarray) -> Model:
    """Values of one layer in another basis: v R for each key-value head, undone in the columns of o.

    Parameters
    ----------
    R : (D, D) orthogonal, one for all heads, or (Hk, D, D)
    """
    check_foldable(model, "values are rotated")
    config, weights = model.config, dict(model.weights)
    heads, D, group = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads
    R = np.broadcast_to(R, (heads, D, D))
    prefix = f"model.layers.{layer}.self_attn."
    for name in (prefix + "v_proj.weight", prefix + "v_proj.bias"):
        if name in weights:
            rows = weights[name].astype(np.float64).reshape(heads, D, -1)  # v = W x: R^T W gives v R as a row
            weights[name] = (R.swapaxes(1, 2) @ rows).reshape(weights[name].shape).astype(weights[name].dtype)
    o = weights[prefix + "o_proj.weight"]
    columns = o.astype(np.float64).reshape(len(o), heads * group, D).swapaxes(0, 1)  # [H, out, D]
    turned = (columns @ np.repeat(R, group, axis=0)).swapaxes(0, 1)
    weights[prefix + "o_proj.weight"] = turned.reshape(o.shape).astype(o.dtype)
    return replace(model, weights=weights)


def turn_online(model: Model) -> Model:
    """The inputs of every o and down turned by a Hadamard matrix at run time (`Rotated`), their weights stored turned.

    For o, heads are mixed with each other, channel by channel; the channels of a head are the matter of
    `rotate_values`. Where no Hadamard matrix mixes so many heads (9, say), its whole input is turned.

    Raises
    ------
    ValueError
        Packed weights, or no Hadamard matrix for these widths.
    """
    check_foldable(model, "inputs are turned")
    config, weights = model.config, dict(model.weights)
    inner = config.head_dim if has_hadamard(config.num_heads) else 1
    for layer in range(config.num_layers):
        for linear, together in (("self_attn.o_proj", inner), ("mlp.down_proj", 1)):
            name = f"model.layers.{layer}.{linear}.weight"
            try:
                weights[name] = Rotated.of(weights[name], together)
            except ValueError as error:
                raise ValueError(f"the inputs of {name} cannot be turned: {error}") from error
    return replace(model, weights=weights)
