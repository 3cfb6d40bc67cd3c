"""refllm's own implementation of the ops about heads, latents and layers of the cache."""

import numpy as np


def _model(weights: dict, *, heads: int, kv_heads: int, head_dim: int, d: int, theta: float = 1e4):
    """A model of one layer with these weights, the others zeros."""
    from refllm.kernels.rope import Rope
    from refllm.model.config import ModelConfig
    from refllm.model.model import Model
    from refllm.model.names import expected_shapes

    config = ModelConfig(
        "llama", vocab_size=2, hidden_size=d, num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        intermediate_size=2, context_length=16, norm_eps=1e-5, rope=Rope(theta), tied_embeddings=True,
    )  # fmt: skip
    zeros = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(config).items()}
    return Model(config, zeros | {f"model.layers.0.self_attn.{name}.weight": w for name, w in weights.items()})


def _gqa(params: dict, k: np.ndarray, v: np.ndarray, q: np.ndarray | None = None) -> dict[str, np.ndarray]:
    from refllm.methods.transform.gqa import gqa

    D, q = params["head_dim"], k if q is None else q
    shape = dict(heads=len(q) // D, kv_heads=len(k) // D, head_dim=D, d=k.shape[1])
    model = _model({"q_proj": q, "k_proj": k, "v_proj": v}, **shape)
    made = gqa(model, kv_heads=params["kv_heads"], init=params["init"]).weights
    return {name: made[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"}


def _mfa(params: dict, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.rope import cos_sin, rotate
    from refllm.methods.transform.mfa import mfa

    if "n" in inputs:
        return _reused(**inputs)
    q, k, x = (inputs[name].astype(np.float64) for name in ("q", "k", "x"))
    D = params["head_dim"]
    shape = dict(heads=len(q) // D, kv_heads=len(k) // D, head_dim=D, d=k.shape[1], theta=params["theta"])
    made = mfa(_model({"q_proj": q, "k_proj": k}, **shape), width=params["width"])
    weight = lambda name: made.weights[f"model.layers.0.self_attn.{name}.weight"]
    queries = (x @ weight("q_a_proj").T @ weight("q_b_proj").T).reshape(len(x), shape["heads"], -1).swapaxes(0, 1)
    turn = lambda y: rotate(y, *cos_sin(made.config.rope, made.config.head_dim, np.arange(len(x)), np.float64))
    return {"scores": turn(queries) @ turn(x @ weight("k_proj").T).T}


def _reused(x: np.ndarray, n: np.ndarray, alpha: np.ndarray) -> dict[str, np.ndarray]:
    """Each token alone, at a position of its own: it attends to itself, and with an o of ones its value comes back."""
    from dataclasses import replace

    from refllm.model.config import Factored
    from refllm.model.mfa import attention_branch

    C = x.shape[1]
    one = np.eye(C)
    model = _model(
        {"q_a_proj": one, "q_b_proj": one, "k_proj": one, "v_proj": n, "v_gate": alpha, "o_proj": one},
        heads=1, kv_heads=1, head_dim=C, d=C,
    )  # fmt: skip
    model = replace(model, config=replace(model.config, factored=Factored(C, reuse_keys=True)))
    x = x.astype(np.float64)
    tokens = [attention_branch(model, 0, token[None, None], np.array([i + 3])) for i, token in enumerate(x)]
    return {"v": np.concatenate(tokens)[:, 0]}


def _palu(params: dict, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.factors import whitened, whitening
    from refllm.methods.transform.palu import allocate_ranks, fold_values, round_to_block

    if "w" in inputs:
        A, B = whitened(inputs["w"], whitening(inputs["gram"]), params["rank"])
        return {"w_hat": A @ B}
    if "scores" in inputs:
        full, groups = params["full"], params["groups"]
        totals = allocate_ranks(inputs["scores"].tolist(), full, params["ratio"])
        return {"ranks": np.array([round_to_block(t // groups, params["block"], full // groups) for t in totals])}
    o, factor, bias = inputs["o"], inputs["l"], inputs["bias"]
    D = params["head_dim"]
    weights = {"o_proj.weight": o, "v_proj.bias": bias}
    fold_values(weights, "", o.shape[1] // D, len(factor) // D, factor.astype(np.float64), bias)
    return {"folded": weights["o_proj.weight"], "added": weights["o_proj.bias"]}


def _minicache(params: dict, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.minicache import merge, minicache

    minicache(0, **params)  # checks the params
    merged = merge(a, b, **params)
    return {"keep": merged.keep.astype(np.uint8), "a_hat": merged.restored(0), "b_hat": merged.restored(1)}


def _cla(params: dict, k: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.cla import cla
    from refllm.model.cache import KVCache

    cache = KVCache(len(k), 16, lambda layer: cla(layer, **params))
    take = lambda store, x: store.extend(x[None, None], x[None, None], np.arange(len(x)))[0][0, 0]
    read = [take(store, x) for store, x in zip(cache.stores, k, strict=True)]
    return {"read": np.stack(read), "nbytes": np.array(cache.nbytes)}


def _mla(params: dict, q_n, q_r, c, k_r, up) -> dict[str, dict[str, np.ndarray]]:
    from refllm.kernels.attention import attend
    from refllm.model.config import Latent
    from refllm.model.mla import attend_absorbed, attend_naive

    (_, T, n), (S, rank) = q_n.shape, c.shape
    latent = Latent(None, rank, n, k_r.shape[1], len(up) // len(q_n) - n)
    run = lambda q, k, v: attend(q, k, v, np.arange(S - T, S), np.arange(S), scale=params["scale"])
    one = lambda x: x[None, None]
    naive = attend_naive(latent, q_n[None], q_r[None], (c @ up.T)[None], one(k_r), run)
    absorbed = attend_absorbed(latent, q_n[None], q_r[None], one(c), one(k_r), up, run)
    return {"naive": {"o": naive[0]}, "absorbed": {"o": absorbed[0]}}


def _route(params: dict, logits: np.ndarray, bias: np.ndarray | None = None) -> dict[str, np.ndarray]:
    from refllm.model.config import Experts
    from refllm.model.moe import route

    chosen, weight = route(Experts(count=logits.shape[1], intermediate_size=1, **params), logits, bias)
    return {"chosen": chosen, "weight": weight}


OPS = {
    "transform.gqa": _gqa,
    "transform.mfa": _mfa,
    "transform.palu": _palu,
    "kvcache.minicache": _minicache,
    "kvcache.cla": _cla,
    "model.mla": _mla,
    "model.moe.route": _route,
}
