"""palu: keys and values as latents of low rank, cached in place of them; keys rebuilt when read, values never.

Key-value heads form groups; the rows of k (or v) of a group are one matrix W_g [s D, d] with inputs X:

    X^T X = S S^T         W_g S = U Sigma V^T         L = U_r Sigma_r^1/2         R = Sigma_r^1/2 V_r^T S^-1
    z = R x  cached, r numbers instead of s D         k = rope(L_k z_k)          W_o,h <- W_o,h L_v for every query head

of all L, R of rank r the pair with the least || (W_g - L R) X^T ||. Biases of k stay with L; biases of v, W_o b_v,
become one of o: weights of attention add up to one. How many numbers each matrix may keep is decided by the Fisher
information: score = mean over its entries of sqrt(mean squared gradient), ranks in proportion to it, shared equally by
the groups of a matrix, in multiples of `block`.

Paper: Chang et al. 2024, "Palu: Compressing KV-Cache with Low-Rank Projection", arXiv:2407.21118, sections 3.1 to 3.4.
Differs from the authors' code: gradients are of the next token (there labels are shifted twice); ranks never exceed the
width after rounding to blocks; a singular X^T X gets a millionth of its mean diagonal (there 1e-3); quantisation of
latents is left to a cache method, for which `hadamard` spreads them evenly.
Stage: memory, decode
Inventory: 40
Lesson: lessons/26-latent-caches.md
Golden: transform/palu
Baseline: search=uniform
"""

from dataclasses import replace

import numpy as np

from refllm.kernels.factors import whitened, whitening
from refllm.kernels.hadamard import check_hadamard, hadamard
from refllm.model.config import LowRankKV
from refllm.model.equivalent import check_foldable, rows_with_bias
from refllm.model.fisher import fisher_diagonal
from refllm.model.model import Model
from refllm.model.walk import walk

SEARCHES = ("fisher", "uniform")
HEADS = 4  # key-value heads of a group, as in the paper


def palu(
    model: Model,
    ids,
    *,
    on_report=None,
    ratio: float = 0.7,
    group_heads: int | None = None,
    search: str = "fisher",
    block: int = 32,
    hadamard: bool = False,
) -> Model:
    """Factor the projections of keys and values.

    Parameters
    ----------
    model : Model
        Dense weights.
    ids : (T,) integers
        Calibration tokens.
    on_report : ignored
        Part of every model method's call.
    ratio : float
        Of the numbers that are cached, above 0 to 1; 1 keeps the function. Rounding to blocks changes it.
    group_heads : int, optional
        Key-value heads of a group. None: 4, or the most below that divide the heads there are.
    search : str
        fisher (a plain Llama only: gradients are needed), or uniform: every group the same.
    block : int
        Ranks are multiples of it, or the full width.
    hadamard : bool
        Turn latents by a Hadamard matrix, undone in L and W_o: even channels for a cache of few bits.

    Returns
    -------
    Model
        Its `config.low_rank_kv` says the ranks.

    Raises
    ------
    ValueError
        Packed weights, numbers out of range, heads that do not divide, an architecture without gradients, a rank for
        which there is no Hadamard matrix.
    """
    check_foldable(model, "keys and values are factored")
    config, weights = model.config, dict(model.weights)
    heads, D = config.num_kv_heads, config.head_dim
    size = next(n for n in range(min(HEADS, heads), 0, -1) if heads % n == 0) if group_heads is None else group_heads
    if size < 1 or heads % size:
        raise ValueError(f"group_heads must divide the {heads} key-value heads of the model, got {size}")
    if not 0 < ratio <= 1 or block < 1 or search not in SEARCHES:
        raise ValueError(
            f"ratio must be above 0 and at most 1, block positive, search one of {', '.join(SEARCHES)}; got {ratio}, "
            f"{block} and {search!r}"
        )
    groups, most = heads // size, min(size * D, config.hidden_size)
    names = [f"model.layers.{layer}.self_attn.{which}_proj" for layer in range(config.num_layers) for which in "kv"]
    if search == "fisher":
        fisher = fisher_diagonal(model, ids, [f"{name}.weight" for name in names])
        scores = [float(np.mean(np.sqrt(fisher[f"{name}.weight"].astype(np.float64)))) for name in names]
        totals = allocate_ranks(scores, heads * D, ratio)
        ranks = [round_to_block(total // groups, block, most) for total in totals]
    else:
        ranks = [round_to_block(size * D * ratio, block, most)] * len(names)
    config = replace(config, low_rank_kv=LowRankKV(groups, tuple(ranks[0::2]), tuple(ranks[1::2])))
    for layer, stats in walk(model, ids):
        S = whitening(stats[f"{names[2 * layer]}.weight"].H)
        prefix, rank = f"model.layers.{layer}.self_attn.", {"k": ranks[2 * layer], "v": ranks[2 * layer + 1]}
        factors = {}
        for which in "kv":
            rows = rows_with_bias(weights, f"{prefix}{which}_proj").reshape(groups, size * D, -1)
            pairs = [whitened(group[:, :-1], S, rank[which]) for group in rows]
            if hadamard:
                pairs = [turned(L, R) for L, R in pairs]
            dtype = weights[f"{prefix}{which}_proj.weight"].dtype
            weights[f"{prefix}{which}_proj.weight"] = np.concatenate([R for _, R in pairs]).astype(dtype)
            factors[which] = [L for L, _ in pairs], rows[..., -1]
        weights.pop(f"{prefix}k_proj.bias", None)
        (of_keys, key_bias), (of_values, value_bias) = factors["k"], factors["v"]
        for g, L in enumerate(of_keys):
            weights[f"{prefix}k_up_proj.{g}.weight"] = L.astype(dtype)
            if config.attention_bias:
                weights[f"{prefix}k_up_proj.{g}.bias"] = key_bias[g].astype(dtype)
        fold_values(weights, prefix, config.num_heads, heads, np.concatenate(of_values), value_bias.reshape(-1))
    if config.attention_bias:
        config = replace(config, output_bias=True)
    return replace(model, config=config, weights=weights)


def fold_values(weights: dict, prefix: str, heads: int, kv_heads: int, L: np.ndarray, bias: np.ndarray) -> None:
    """L_v and the bias of v multiplied into o, once for every query head that reads the key-value head.

    Parameters
    ----------
    weights : dict
        o_proj is replaced; v_proj.bias, where there is one, becomes a part of o_proj.bias.
    prefix : str
        Of the names.
    L : (kv_heads * D, r) float64
    bias : (kv_heads * D,)
    """
    o = weights[f"{prefix}o_proj.weight"]
    columns = o.astype(np.float64).reshape(len(o), kv_heads, heads // kv_heads, -1)
    folded = np.einsum("ohsd,hdr->ohsr", columns, L.reshape(kv_heads, -1, L.shape[1]))
    weights[f"{prefix}o_proj.weight"] = folded.reshape(len(o), -1).astype(o.dtype)
    if weights.pop(f"{prefix}v_proj.bias", None) is not None:
        added = np.einsum("ohsd,hd->o", columns, bias.reshape(kv_heads, -1))
        before = weights.get(f"{prefix}o_proj.bias", np.zeros(len(o)))
        weights[f"{prefix}o_proj.bias"] = (before + added).astype(o.dtype)


def turned(L: np.ndarray, R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L H, H^T R for the normalised Hadamard matrix H of this rank: the same product.

    Raises
    ------
    ValueError
        No such matrix.
    """
    rank = L.shape[1]
    check_hadamard(rank, "a latent")
    H = hadamard(rank) / rank**0.5
    return L @ H, H.T @ R


def allocate_ranks(scores: list[float], full: int, ratio: float) -> list[int]:
    """Ranks in proportion to scores, none above `full`; what rounding and full matrices leave goes round one by one.

    Parameters
    ----------
    scores : list of float, positive
    full : int
        Of one matrix.
    ratio : float
        The ranks add up to floor(ratio * full * matrices).

    Returns
    -------
    list of int

    Raises
    ------
    ValueError
        Scores that are not finite and positive.

    Examples
    --------
    >>> allocate_ranks([3.0, 1.0, 1.0], 8, 0.5)
    [8, 2, 2]
    """
    if not all(0 < score < np.inf for score in scores):
        raise ValueError("scores of matrices must be positive and finite; give more, or other, calibration text")
    target = int(ratio * full * len(scores) + 1e-9)
    exact = [target * score / sum(scores) for score in scores]
    ranks = [min(full, int(share)) for share in exact]
    order = sorted(range(len(scores)), key=lambda i: exact[i] - ranks[i])
    left = target - sum(ranks)
    while left > 0:
        for i in order:
            if left > 0 and ranks[i] < full:
                ranks[i] += 1
                left -= 1
    return ranks


def round_to_block(rank: float, block: int, most: int) -> int:
    """The nearest multiple of a block, one at least; the full width where that is less.

    Examples
    --------
    >>> round_to_block(70, 32, 128), round_to_block(3, 32, 128), round_to_block(100, 32, 96), round_to_block(23, 32, 24)
    (64, 32, 96, 24)
    """
    return most if rank >= most else min(max(1, round(rank / block)) * block, most)
