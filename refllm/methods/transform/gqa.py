"""gqa: the key-value heads of a model pooled into fewer, each shared by more query heads.

The heads are cut into groups of neighbours, and one head takes the place of each group:

    mean      the mean of the group's rows of k and v
    first     its first head
    aligned   the mean after every head has been turned towards the group, as far as the function allows

Cache and traffic of a decode step shrink by the size of a group, and so do the weights of k and v. Turning changes
nothing by itself: values of a head turn by any rotation that the columns of o undo; keys turn pair by pair (j and
j + D/2, what RoPE turns together) by angles that the rows of q turn by, too. One head alone is MQA. Heads that were
trained apart differ, so this breaks a model unless it is trained further (the paper: 5% of the pre-training steps); it
is a start, better or worse, for that training.

Paper: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
arXiv:2305.13245, section 2.1; Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need",
arXiv:1911.02150.
Differs from them: no further training here; `aligned` is not in the papers, which compare mean, first and random.
Stage: memory, decode
Inventory: 44, 45
Lesson: lessons/19-five-dimensions.md
Golden: transform/gqa
Baseline: mean
"""

from dataclasses import replace

import numpy as np

from refllm.model.equivalent import check_foldable, rows_with_bias, store_rows
from refllm.model.model import Model

INITS = ("mean", "first", "aligned")
ROUNDS = 8  # of turning every head towards the mean of the turned ones


def gqa(model: Model, ids=None, *, on_report=None, kv_heads: int | None = None, init: str = "mean") -> Model:
    """Pool key-value heads.

    Parameters
    ----------
    model : Model
        Dense weights.
    ids, on_report : ignored
        Part of every model method's call.
    kv_heads : int, optional
        How many remain; must divide those there are. None: half of them, one at least; 1 is multi-query attention.
    init : str
        mean, first or aligned.

    Returns
    -------
    Model
        Another function, unless the heads of each group are alike (`aligned`: alike but for turns).

    Raises
    ------
    ValueError
        Packed weights, kv_heads that do not divide, an unknown init, `aligned` where the model norms q and k.
    """
    check_foldable(model, "heads are pooled")
    config, weights = model.config, dict(model.weights)
    before, D = config.num_kv_heads, config.head_dim
    after = max(before // 2, 1) if kv_heads is None else kv_heads
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if after < 1 or before % after:
        raise ValueError(f"kv_heads must divide the {before} key-value heads of the model, got {after}")
    if init == "aligned" and config.qk_norm:
        raise ValueError(
            "this model norms q and k channel by channel, so keys cannot be turned; use init=mean or first"
        )
    share = config.num_heads // before
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        k, v = (
            rows_with_bias(weights, f"{prefix}{name}_proj").reshape(after, -1, D, config.hidden_size + 1)
            for name in "kv"
        )
        if init == "aligned":
            angles, turns = align_keys(k), align_values(v)
            k, v = turned_pairs(k, angles), turns @ v
            q = rows_with_bias(weights, f"{prefix}q_proj").reshape(before, share, D, -1)
            q = turned_pairs(q, angles.reshape(before, 1, D // 2))
            store_rows(weights, f"{prefix}q_proj", q)
            o = weights[f"{prefix}o_proj.weight"]
            columns = o.astype(np.float64).reshape(len(o), before, share, D)
            columns = np.einsum("ohsd,hed->ohse", columns, turns.reshape(before, D, D))
            weights[f"{prefix}o_proj.weight"] = columns.reshape(o.shape).astype(o.dtype)
        pooled = (lambda x: x[:, 0]) if init == "first" else (lambda x: x.mean(axis=1))
        store_rows(weights, f"{prefix}k_proj", pooled(k))
        store_rows(weights, f"{prefix}v_proj", pooled(v))
    return replace(model, config=replace(config, num_kv_heads=after), weights=weights)


def turned_pairs(rows: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rows j and j + D/2 of every head turned together, as RoPE turns them.

    Parameters
    ----------
    rows : (..., D, in)
    angles : (..., D / 2)

    Examples
    --------
    >>> turned_pairs(np.array([[1.0], [0.0]]), np.array([np.pi / 2])).round(3).tolist()
    [[0.0], [1.0]]
    """
    a, b = np.split(rows, 2, axis=-2)
    cos, sin = np.cos(angles)[..., None], np.sin(angles)[..., None]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-2)


def align_keys(k: np.ndarray) -> np.ndarray:
    """The angle of every pair of every head that brings it nearest to the mean of its group.

    A pair of rows is one complex row z; the angle of the product with the mean says how far to turn. Starts from the
    first head of a group.

    Parameters
    ----------
    k : (groups, heads, D, in) float64

    Returns
    -------
    (groups, heads, D / 2)
    """
    half = k.shape[2] // 2
    z = k[:, :, :half] + 1j * k[:, :, half:]
    target = z[:, 0]
    for _ in range(ROUNDS):
        angles = np.angle(np.sum(np.conj(z) * target[:, None], axis=-1))
        target = (z * np.exp(1j * angles)[..., None]).mean(axis=1)
    return angles


def align_values(v: np.ndarray) -> np.ndarray:
    """The rotation of every head that brings it nearest to the mean of its group (orthogonal Procrustes).

    Parameters
    ----------
    v : (groups, heads, D, in) float64

    Returns
    -------
    (groups, heads, D, D)
        Orthogonal R; R @ v is the turned head.
    """
    target = v[:, 0]
    for _ in range(ROUNDS):
        U, _, Vt = np.linalg.svd(target[:, None] @ v.swapaxes(-1, -2))
        turns = U @ Vt
        target = (turns @ v).mean(axis=1)
    return turns
