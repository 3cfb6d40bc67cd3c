"""mfa: grouped-query attention as multi-matrix factorization attention, one wide key-value head and factored queries.

Channels j and j + D/2 of a key are one complex number that RoPE multiplies by exp(i p theta_j). All key heads share the
frequencies, so the H_k numbers of frequency j can be mixed by any complex matrix before RoPE as well as after it:

    K_j [Hk, d] = U_j Sigma V^H        k'_j = U_j[:, :c]^H K_j        q'_h,j,m = conj(U_j[g(h), m]) q_h,j

and sum_m conj(q'_h,j,m) k'_j,m is the score of head h, exactly where c = H_k: every head reads one key of width C = c D
whose frequencies come c times. Values are turned into the C directions that carry most of them, undone in o. The query
matrices of all heads, [H C, d], are then factored by SVD into what they share, S_q [rank, d], and Q_h [C, rank].

With c = H_k and full rank the function is the same, in the layout of the architecture, with more multiplications and no
less cache: a start for training. c below that shrinks the cache to c / H_k, `reuse` to half of that again: values are
then made from keys, v = k + k N^T with N by least squares.

Paper: Hu et al. 2024, "Multi-matrix Factorization Attention", arXiv:2412.19255, section 3.
Differs from it: the paper trains such models from scratch; making one from a trained model is ours, and loses quality
below full width and rank. N is fitted here and starts at 0 there.
Stage: memory, decode
Inventory: 42
Lesson: lessons/26-latent-caches.md
Golden: transform/mfa
Baseline: none, exact at full width and rank
"""

from dataclasses import replace

import numpy as np

from refllm.kernels.factors import whitened, whitening
from refllm.kernels.rope import Rope, cos_sin, inverse_frequencies
from refllm.model.config import Factored, ModelConfig
from refllm.model.equivalent import check_foldable, rows_with_bias, store_rows
from refllm.model.model import Model
from refllm.model.walk import walk


def mfa(
    model: Model, ids=None, *, on_report=None, width: int | None = None, rank: int | None = None, reuse: bool = False
) -> Model:
    """Turn every attention layer into a factored one.

    Parameters
    ----------
    model : Model
        Dense weights.
    ids : (T,) integers, optional
        Calibration tokens: factors are then nearest in the outputs on these, else in the weights.
    on_report : ignored
        Part of every model method's call.
    width : int, optional
        C, a multiple of the head dimension, at most Hk * D. None: that.
    rank : int, optional
        What all query heads share, at most min(H * D, d). None: that.
    reuse : bool
        Make values from keys (MFA-KR).

    Returns
    -------
    Model
        Its `config.factored` is set; the same function at full width and rank without `reuse`.

    Raises
    ------
    ValueError
        Packed weights, a model that norms q and k, width or rank out of range.
    """
    check_foldable(model, "attention is factored")
    config, weights = model.config, dict(model.weights)
    heads, D, d = config.num_kv_heads, config.head_dim, config.hidden_size
    if config.qk_norm:
        raise ValueError("this model norms the q and k of each head, which a key shared by all heads cannot do")
    width = heads * D if width is None else width
    most = min(config.num_heads * D, d)
    rank = most if rank is None else rank
    if width < 1 or width % D or width > heads * D:
        raise ValueError(f"width must be a multiple of the head dimension {D}, at most {heads * D}, got {width}")
    if not 1 <= rank <= most:
        raise ValueError(f"rank must lie between 1 and {most} (heads * head_dim or the model's width), got {rank}")
    grams = {} if ids is None else {layer: stats[_name(layer, "q_proj.weight")].H for layer, stats in walk(model, ids)}
    for layer in range(config.num_layers):
        S = whitening(grams[layer]) if layer in grams else np.eye(d)
        _factor(weights, config, layer, width, rank, S, reuse)
    config = replace(
        config,
        num_kv_heads=1,
        head_dim=width,
        rope=_repeated(config.rope, D, width),
        rope_local=None if config.rope_local is None else _repeated(config.rope_local, D, width),
        attention_scale=config.score_scale,
        factored=Factored(rank, reuse_keys=reuse),
    )
    return replace(model, config=config, weights=weights)


def _name(layer: int, what: str) -> str:
    return f"model.layers.{layer}.self_attn.{what}"


def _factor(weights: dict, config: ModelConfig, layer: int, width: int, rank: int, S: np.ndarray, reuse: bool) -> None:
    """One layer: its four projections replaced."""
    heads, D, group = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads
    take = lambda which: rows_with_bias(weights, _name(layer, f"{which}_proj"))
    dtype = weights[_name(layer, "q_proj.weight")].dtype
    # What yarn multiplies cos and sin by, queries and keys alike, is no part of the frequencies that are repeated.
    stretch = cos_sin(config.layer_rope(layer), D, np.zeros(1, int), np.float64)[0][0, 0]
    q = stretch**2 * take("q").reshape(heads, group, D, -1)
    q, k = mix_heads(q, take("k").reshape(heads, D, -1), width // D, S)
    v = take("v")
    U = principal(v[:, :-1] @ S, width)
    o = weights[_name(layer, "o_proj.weight")]
    columns = o.astype(np.float64).reshape(len(o), heads, group, D)
    folded = np.einsum("ohsd,hdc->ohsc", columns, U.reshape(heads, D, -1))
    weights[_name(layer, "o_proj.weight")] = folded.reshape(len(o), -1).astype(o.dtype)
    A, B = whitened(q[:, :-1], S, rank)
    for name in ("q_proj.weight", "q_proj.bias"):
        weights.pop(_name(layer, name), None)
    weights[_name(layer, "q_a_proj.weight")] = B.astype(dtype)
    weights[_name(layer, "q_b_proj.weight")] = A.astype(dtype)
    if config.attention_bias:
        weights[_name(layer, "q_b_proj.bias")] = q[:, -1].astype(dtype)
    store_rows(weights, _name(layer, "k_proj"), k)
    if not reuse:
        store_rows(weights, _name(layer, "v_proj"), U.T @ v)
        return
    metric = np.zeros((len(S) + 1, len(S) + 1))
    metric[:-1, :-1], metric[-1, -1] = S, max(1.0, np.trace(S) / len(S))  # the bias, as an input that is always there
    made = np.linalg.lstsq((k @ metric).T, (U.T @ v @ metric).T, rcond=None)[0].T  # v ~ made k
    weights.pop(_name(layer, "v_proj.bias"), None)
    weights[_name(layer, "v_proj.weight")] = (made - np.eye(width)).astype(dtype)
    weights[_name(layer, "v_gate.weight")] = np.ones(width, dtype)


def mix_heads(q: np.ndarray, k: np.ndarray, kept: int, S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of all heads mixed into `kept`, frequency by frequency, and the queries that read them.

    Parameters
    ----------
    q : (Hk, g, D, in + 1), k : (Hk, D, in + 1) float64
        Rows of the projections with their bias as last column.
    kept : int
        c: complex numbers that remain of each frequency.
    S : (in, in)
        The metric of inputs (`whitening`), or the identity.

    Returns
    -------
    q : (H * c * D, in + 1), k : (c * D, in + 1)
        Channel m D/2 + j is the real part of number m of frequency j; imaginary parts follow behind all real ones.
    """
    half = k.shape[1] // 2
    z = (k[:, :half] + 1j * k[:, half:]).swapaxes(0, 1)  # (D/2, Hk, in + 1)
    U = principal(z[..., :-1] @ S, kept)  # (D/2, Hk, c)
    latent = (np.conj(U).swapaxes(1, 2) @ z).swapaxes(0, 1)  # (c, D/2, in + 1)
    queries = np.einsum("jhm,hsjx->hsmjx", np.conj(U), q[:, :, :half] + 1j * q[:, :, half:])
    flat = lambda x, lead: np.concatenate([part.reshape(*lead, kept * half, -1) for part in (x.real, x.imag)], axis=-2)
    return flat(queries, q.shape[:2]).reshape(-1, q.shape[-1]), flat(latent, ())


def principal(W: np.ndarray, kept: int) -> np.ndarray:
    """The orthonormal columns U (..., out, kept) for which W - U U^H W is least: eigenvectors of W W^H.

    Parameters
    ----------
    W : (..., out, in) float64 or complex128
    """
    return np.linalg.eigh(W @ np.conj(W).swapaxes(-1, -2))[1][..., ::-1][..., :kept]


def _repeated(rope: Rope, head_dim: int, width: int) -> Rope:
    """The rotary embedding of a head of `width` in which the frequencies of `head_dim` come again and again."""
    wanted = np.tile(inverse_frequencies(rope, head_dim), width // head_dim)
    plain = inverse_frequencies(Rope(rope.theta), width)
    return Rope(rope.theta, freq_divisors=tuple((plain / wanted).tolist()))
