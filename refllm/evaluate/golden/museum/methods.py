"""Defects of attention, rotary embedding, caches and speculative decoding."""

import numpy as np

from refllm.evaluate.golden.museum.exhibit import Room, right

ROOM = Room()


def attend(q, k, v, seen, params) -> np.ndarray:
    """Plain attention of heads that already match; `seen` says which keys a query sees."""
    score = np.einsum("htd,hsd->hts", q.astype(float), k.astype(float)) * params["scale"]
    if params.get("softcap"):
        score = params["softcap"] * np.tanh(score / params["softcap"])
    score = np.where(seen, score, -np.inf)
    top = score.max(-1, keepdims=True)
    weights = np.exp(score - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return (np.einsum("hts,hsd->htd", weights, v.astype(float)) / np.where(total, total, 1)).astype(np.float32)


def visible(q_positions, k_positions, window) -> np.ndarray:
    """Which keys are seen: (heads, T, S)."""
    ours, theirs = q_positions[:, None], np.atleast_2d(k_positions)[:, None, :]
    seen = theirs <= ours
    return seen if window is None else seen & (theirs > ours - window)


def shared(x, heads: int) -> np.ndarray:
    """Key-value heads repeated for the query heads that share one."""
    if heads % len(x):
        raise ValueError("heads")
    return np.repeat(x, heads // len(x), axis=0)


@ROOM.enter(
    "mask-top-left",
    "attention/flash",
    "mask-top-left",
    2023,
    "pytorch/pytorch/issues/103082 Dao-AILab/flash-attention/issues/282",
    "is_causal aligned the mask top-left: a decode step with a cache saw only the first key.",
    outputs="o",
)
def _(op, params, inputs):
    q, k, v = (inputs[name] for name in "qkv")
    seen = visible(np.arange(q.shape[1]), np.arange(k.shape[1]), params.get("window"))
    return {"o": attend(q, shared(k, len(q)), shared(v, len(q)), seen, params)}


@ROOM.enter(
    "mask-dropped-for-chunks",
    "attention/flash",
    "mask-missing",
    2026,
    "mlx-node/mlx-node/pull/24",
    "The mask was used only when queries and keys are equally many: a chunk behind a cache saw its own future.",
    outputs="o",
)
def _(op, params, inputs):
    q, k, v = (inputs[name] for name in "qkv")
    seen = visible(inputs["q_positions"], inputs["k_positions"], params.get("window"))
    seen = shared(seen, len(q)) if len(seen) > 1 else seen
    seen = seen if q.shape[1] == k.shape[1] else np.ones_like(seen)
    return {"o": attend(q, shared(k, len(q)), shared(v, len(q)), seen, params)}


@ROOM.enter(
    "heads-transposed",
    "attention/flash",
    "heads-interleaved",
    2026,
    "nntile/nntile/pull/347",
    "Converted weights put head h with key-value head h mod Hk; the tests had one head.",
    outputs="o",
)
def _(op, params, inputs):
    q, k, v = (inputs[name] for name in "qkv")
    of = np.arange(len(q)) % len(k)
    shared(k, len(q))
    seen = visible(inputs["q_positions"], inputs["k_positions"], params.get("window"))
    return {"o": attend(q, k[of], v[of], seen[of] if len(seen) > 1 else seen, params)}


@ROOM.enter(
    "places-after-eviction",
    "attention/flash",
    "positions-ignored",
    2026,
    "rajveer43/VeloxQuant-MLX/issues/137 rajveer43/VeloxQuant-MLX/issues/370",
    "After eviction the places of the keys that stay were used as their positions.",
    outputs="o",
)
def _(op, params, inputs):
    q, k, v = (inputs[name] for name in "qkv")
    T, S = q.shape[1], k.shape[1]
    seen = visible(np.arange(S - T, S), np.arange(S), params.get("window"))
    return {"o": attend(q, shared(k, len(q)), shared(v, len(q)), seen, params)}


@ROOM.enter(
    "wrong-pairs-rotated",
    "model/rope",
    "rope-layout",
    2023,
    "jzhang38/TinyLlama/issues/24 ggml-org/llama.cpp/issues/3018",
    "A half-split model was run with the rotation of neighbouring elements: gibberish after one word.",
)
def _(op, params, inputs):
    if params["layout"] != "half_split":
        raise NotImplementedError
    x, D = inputs["x"], inputs["x"].shape[-1]
    angle = inputs["positions"][:, None] * params["theta"] ** (-np.arange(0, D, 2) / D) / params.get("factor", 1)
    a, b = x[..., 0::2], x[..., 1::2]
    turned = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return {"y": np.stack(turned, axis=-1).reshape(x.shape).astype(np.float32)}


def _permuted(w, heads: int, direction: str) -> np.ndarray:
    half = len(w) // heads // 2
    inner = (half, 2) if direction == "to_half_split" else (2, half)
    return w.reshape(heads, *inner, -1).swapaxes(1, 2).reshape(w.shape)


@ROOM.enter(
    "k-permuted-by-group",
    "model/rope_permute",
    "permuted-with-wrong-heads",
    2023,
    "ggml-org/llama.cpp/pull/3364 ggml-org/llama.cpp/issues/2376",
    "The converter used n_head / n_head_kv heads for k; Llama 2 70B has 64 and 8, so 64 / 8 = 8 hid it.",
)
def _(op, params, inputs):
    heads = params["num_heads"]
    if params["tensor"] == "k" and params["num_kv_heads"] != heads:
        heads //= params["num_kv_heads"]
    return {"permuted": _permuted(inputs["w"], heads, params["direction"])}


@ROOM.enter(
    "k-permuted-like-q",
    "model/rope_permute",
    "permuted-with-wrong-heads",
    2024,
    "huggingface/transformers/pull/31788 Dao-AILab/flash-attention/pull/546",
    "k was permuted with the number of query heads when GGUF files were loaded.",
)
def _(op, params, inputs):
    return {"permuted": _permuted(inputs["w"], params["num_heads"], params["direction"])}


@ROOM.enter(
    "kivi-groups-of-one",
    "kvcache/kivi",
    "decode-keys-in-full",
    2026,
    "rajveer43/VeloxQuant-MLX/issues/162",
    "Each decoded key was quantised alone, in groups of one token: the result was exact and billed as 2-bit.",
    outputs="k_hat v_hat",
)
def _(op, params, inputs):
    first = params["chunks"][0]
    outputs = right(op, params, inputs)
    if len(params["chunks"]) == 1:
        return outputs
    k, R = inputs["k"].copy(), params["residual"]
    k[:, : first // R * R] = outputs["k_hat"][:, : first // R * R]
    return outputs | {"k_hat": k}


@ROOM.enter(
    "kivi-decode-in-full",
    "kvcache/kivi",
    "decode-keys-in-full",
    2026,
    "rajveer43/VeloxQuant-MLX/issues/86 rajveer43/VeloxQuant-MLX/pull/89",
    "Whether a token is old enough was decided by the length of its own call: one, when decoding.",
    outputs="k_hat v_hat",
)
def _(op, params, inputs):
    first, outputs = params["chunks"][0], right(op, params, inputs)
    if len(params["chunks"]) == 1:
        return outputs
    R, k, v = params["residual"], inputs["k"].copy(), inputs["v"].copy()
    keys, values = first // R * R, max(first - R, 0)
    k[:, :keys], v[:, :values] = outputs["k_hat"][:, :keys], outputs["v_hat"][:, :values]
    return outputs | {"k_hat": k, "v_hat": v}


def _draw(weights: np.ndarray, u: float) -> int:
    total = np.cumsum(weights)
    return int(np.argmax(total > u * total[-1]))


@ROOM.enter(
    "first-draft-token-kept",
    "runtime/speculative",
    "first-unverified",
    2026,
    "ohdearquant/lattice/issues/243",
    "The first drafted token was committed before the model had been asked: greedy text changed.",
)
def _(op, params, inputs):
    if "drafted" not in inputs:
        raise NotImplementedError
    p, q, drafted, uniforms = (inputs[name] for name in ("p", "q", "drafted", "uniforms"))
    if not len(drafted):
        return right(op, params, inputs)
    rest = {"p": p[1:], "q": q[1:], "drafted": drafted[1:], "uniforms": uniforms}
    outputs = right(op, params, rest)
    return outputs | {"accepted": np.asarray(outputs["accepted"] + 1)}


@ROOM.enter(
    "kept-if-above",
    "runtime/speculative",
    "accepts-if-above",
    2025,
    "vllm-project/vllm-project.github.io/pull/80",
    "Drafted tokens were kept exactly when p >= q, in an explanation of rejection sampling.",
)
def _(op, params, inputs):
    if "drafted" not in inputs:
        raise NotImplementedError
    p, q, uniforms = inputs["p"], inputs["q"], iter(inputs["uniforms"].tolist())
    for i, token in enumerate(inputs["drafted"].tolist()):
        next(uniforms)
        if p[i, token] < q[i, token]:
            left = np.maximum(p[i] - q[i], 0)
            drawn = _draw(left if left.any() else p[i], next(uniforms, 0.0))
            return {"accepted": np.array(i), "next_id": np.array(drawn)}
    return {"accepted": np.array(len(q)), "next_id": np.array(_draw(p[-1], next(uniforms, 0.0)))}
