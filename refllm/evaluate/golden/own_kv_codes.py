"""refllm's answers to the suites of caches that store codes, see `refllm.evaluate.golden.own`."""

import numpy as np


def _qserve(params: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.qserve import qserve

    parts, back = _coded(qserve(0, **params), x)
    return {name: parts[f"v_{name}"] for name in ("codes", "scale", "zero")} | {"x_hat": back}


def _coded(store, x: np.ndarray) -> tuple[dict, np.ndarray]:
    """Parts of a store that has seen x as keys and values, and the values that a later call sees."""
    tokens = x.shape[-2]
    store.extend(x, x, np.arange(tokens))
    parts = {name: part.copy() for name, part in store.parts().items()}
    return parts, store.extend(x[:, :1], x[:, :1], np.array([tokens]))[1][:, :tokens]


def _llmqat(params: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.autograd import parameter
    from refllm.methods.kvcache.llmqat import llmqat, round_tokens

    parts, back = _coded(llmqat(0, **params), x)
    trained = parameter(x.swapaxes(0, 1).reshape(x.shape[1], -1))
    round_tokens(trained, params["bits"]).sum().backward()
    gradient = trained.grad.reshape(x.shape[1], len(x), -1).swapaxes(0, 1)
    return {"codes": parts["v_codes"], "step": parts["v_step"].ravel(), "x_hat": back, "gradient": gradient}


def _kvtuner(params: dict, errors: np.ndarray, loss: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.kvtuner import PAIRS, front, search

    fronts = [front(row) for row in errors]
    total = lambda pairs: sum(float(row[PAIRS.index(pair)]) for row, pair in zip(loss, pairs, strict=True))
    kept = np.array([[i in layer for i in range(len(PAIRS))] for layer in fronts], np.uint8)
    return {"front": kept, "pairs": np.array(search(fronts, total, **params))}


def _turboquant(params: dict, x: np.ndarray, rotation: np.ndarray, s: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats.bits import pack_bits
    from refllm.methods.kvcache.turboquant import decode, decode_residual, encode, encode_residual

    bits, turning, S = params["bits"], rotation.astype(np.float64), s.astype(np.float64)
    codes, norm = encode(x, turning, bits)
    signs, residual = encode_residual(x, codes, turning, S, bits)
    unit = decode(codes, turning, bits)
    size = norm.astype(np.float64)[:, None]
    backs = {"x_hat": size * unit, "k_hat": size * (unit + decode_residual(signs, residual, S))}
    packed = {"codes": pack_bits(codes, bits), "signs": pack_bits(signs, 1)[:, 0]}
    return packed | {"norm": norm, "residual": residual.astype(np.float64)} | backs


def _kvquant(params: dict, x: np.ndarray, k_range, k_table, v_table) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.kvquant import kvquant, token_rows

    tables = {"0.k_range": k_range, "0.k_table": k_table, "0.v_table": v_table}
    store = kvquant(0, **params, sinks=0, norm=len(k_table) == 2, tables=tables)
    tokens = x.shape[-2]
    store.extend(x, x, np.arange(tokens))
    parts = {name: part.copy() for name, part in store.parts().items()}
    K, V, _ = store.extend(x[:, :1], x[:, :1], np.array([tokens]))
    one_a_token = {n: parts[n][:, 0] for n in ("k_counts", "v_counts", "v_offset", "v_spread") if n in parts}
    return parts | one_a_token | {"k_hat": token_rows(K)[:tokens], "v_hat": token_rows(V)[:tokens]}


def _kvquant_learn(params: dict, **inputs) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.kvquant import layer_tables

    return layer_tables(**inputs, **params)


def _rotatekv(params: dict, x: np.ndarray, text: np.ndarray | None = None) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.rotatekv import channel_order, rotatekv

    side, heads = params["side"], params.get("heads", 4)
    order = channel_order(x if text is None else text, heads)
    knobs = {name: params[name] for name in ("bits", "group_size", "heads") if name in params}
    store = rotatekv(0, **knobs, sinks=0, tables={"0.order": order})
    keys, of_values, _ = store.extend(x, x, np.arange(x.shape[-2]))
    parts = store.parts()
    found = {name: parts[f"{side}_{name}"] for name in ("codes", "scale", "low")}
    return found | {"order": order, "x_hat": keys if side == "k" else of_values}


def _cq(params: dict, x, books=None, q=None, weights=None, sensitivity=None) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache._books import mix_codes, table_scores
    from refllm.methods.kvcache.cq import cq, learn_books

    channels, bits = params["channels"], params["bits"]
    found = {}
    if books is None:
        found["books"] = books = learn_books(x[None], sensitivity[None], channels, bits, 25, (0,))[0]
    tables = {f"0.{side}_books": books[None] for side in "kv"}
    store = cq(0, channels=channels, bits=bits, tables=tables)
    parts, back = _coded(store, x[None])
    found |= {"codes": parts["v_codes"][0], "x_hat": back[0]}
    codes = store.codes("v")[:, : len(x)]
    if q is not None:
        found["scores"] = table_scores(q[None], codes, books[None])[0]
    if weights is not None:
        found["mixed"] = mix_codes(weights[None].astype(np.float64), codes, books[None])[0]
    return found


def _kivi(params: dict, k: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.kivi import kivi

    store = kivi(0, **{name: value for name, value in params.items() if name != "chunks"})
    for count in params["chunks"]:
        new = slice(store.length, store.length + count)
        K, V, _ = store.extend(k[:, new], v[:, new], np.arange(new.start, new.stop))
    parts = store.parts()
    full = [parts[name].shape[-2] if name in parts else 0 for name in ("k_full", "v_full")]
    stored = {name: part for name, part in parts.items() if not name.endswith("full")}
    return stored | {"k_hat": K, "v_hat": V, "full": np.array(full), "nbytes": np.array(store.nbytes)}


OPS = {
    "kvcache.kivi": _kivi,
    "kvcache.qserve": _qserve,
    "kvcache.llmqat": _llmqat,
    "kvcache.kvtuner": _kvtuner,
    "kvcache.turboquant": _turboquant,
    "kvcache.kvquant": _kvquant,
    "kvcache.kvquant.learn": _kvquant_learn,
    "kvcache.rotatekv": _rotatekv,
    "kvcache.cq": _cq,
}
